// Calls of exported functions that are written down once and made again: each takes its arguments from a list of numbers.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

template <typename T>
T from_bits(int64_t bits) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(bits);
  } else if constexpr (std::is_same_v<T, float>) {
    uint32_t low = uint32_t(bits);
    float value;
    std::memcpy(&value, &low, sizeof value);
    return value;
  } else {
    return bits;
  }
}

template <typename... Types, size_t... I>
void call_packed(void (*function)(Types...), const int64_t* arguments, std::index_sequence<I...>) {
  function(from_bits<Types>(arguments[I])...);
}

template <typename... Types>
void call_packed(void (*function)(Types...), const int64_t* arguments) {
  call_packed(function, arguments, std::index_sequence_for<Types...>{});
}

#define REPLAYABLE(name) \
  extern "C" void name##_packed(const int64_t* arguments) { call_packed(name, arguments); }
