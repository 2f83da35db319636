// Rows of any element type, worked on as rows of float32.
//
// The kernels of training read and write activations in 16 bits as well as in 32. A row is widened into room that the
// core's cache holds, worked on there, and rounded on its way out, so that there is one kernel for all types.
#pragma once
#include "gemm.h"

// A tensor of rows `width` elements apart; `kind` as in `with_type`, never int8. Null data: it is not there.
template <typename Pointer>
struct RowsOf {
  Pointer data;
  int64_t kind, width;
  explicit operator bool() const { return data; }
  Pointer at(int64_t r) const {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
    return static_cast<Byte*>(data) + r * width * item_bytes(kind);
  }
};
using RowsIn = RowsOf<const void*>;
using RowsOut = RowsOf<void*>;

// Row r as floats: where it lies if it is float32, else widened into `room`; null if there are no rows.
static inline const float* widened(const RowsIn& x, int64_t r, float* room) {
  if (!x) return nullptr;
  if (x.kind == 0) return static_cast<const float*>(x.at(r));
  with_type(x.kind, [&](auto type) {
    auto* from = static_cast<const decltype(type)*>(x.at(r));
    for (int64_t i = 0; i < x.width; ++i) room[i] = widen(from[i]);
  });
  return room;
}

// Where row r is to be made: where it will lie if that is float32, else in `room`, for `put` to take it from there.
static inline float* place_of(const RowsOut& x, int64_t r, float* room) {
  return x && x.kind == 0 ? static_cast<float*>(x.at(r)) : room;
}

static inline void put(const RowsOut& x, int64_t r, const float* room) {
  if (!x || room == x.at(r)) return;
  with_type(x.kind, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(x.at(r));
    for (int64_t i = 0; i < x.width; ++i) to[i] = narrowed<decltype(type)>(room[i]);
  });
}
