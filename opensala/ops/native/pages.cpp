// New keys and values into their pages, and the compressed keys whose windows end among them.
//
// A compressed key is summed token by token in order, in float32, from the keys as the pages hold them: it has the same
// bits however the tokens arrived.
#include "parts.h"
#include "replay.h"

#include <vector>

namespace {

// Some tokens, or some windows of one level, of one sequence.
struct Piece {
  int64_t sequence, level, first, last;
};

void cut(std::vector<Piece>& pieces, int64_t sequence, int64_t level, int64_t first, int64_t last, int64_t step) {
  for (int64_t a = first; a < last; a += step) pieces.push_back({sequence, level, a, std::min(a + step, last)});
}

int64_t windows(int64_t length, int64_t size, int64_t stride) { return length < size ? 0 : (length - size) / stride + 1; }

// Rows a ... b - 1 of x `[T, Hkv, D]` to rows of a sequence.
template <typename T>
void copy(const T* x, const Rows& to, int64_t to_head, int64_t to_row, int64_t a, int64_t b, int64_t heads, int64_t dim) {
  for (int64_t t = a; t < b; ++t, ++to_row)
    for (int64_t h = 0; h < heads; ++h)
      std::copy_n(x + (t * heads + h) * dim, dim, const_cast<T*>(to.at<T>(to_row)) + h * to_head);
}

// A row of floats as int8 with its scale behind: to nearest, ties to even. What is not finite makes the row NaN.
void quantize(const float* x, int64_t dim, int8_t* out) {
  float peak = 0;
  for (int64_t d = 0; d < dim; ++d) {
    float size = std::fabs(x[d]);
    if (!(size <= peak)) peak = size;  // NaN too, and then it stays
    if (peak != peak) break;
  }
  float scale = peak / 127.0f;
  bool usable = scale > 0 && scale < INF;
  for (int64_t d = 0; d < dim; ++d)
    out[d] = usable ? int8_t(std::max(-127.0f, std::min(127.0f, std::nearbyintf(x[d] / scale)))) : int8_t(0);
  std::memcpy(out + dim, &scale, SCALE_BYTES);
}

// The same as `copy`, into rows of int8.
void copy_quantized(const float* x, const Rows& to, int64_t to_head, int64_t to_row, int64_t a, int64_t b, int64_t heads,
                    int64_t dim) {
  for (int64_t t = a; t < b; ++t, ++to_row)
    for (int64_t h = 0; h < heads; ++h)
      quantize(x + (t * heads + h) * dim, dim, const_cast<int8_t*>(to.at<int8_t>(to_row)) + h * to_head);
}

// A key in full width, in `room`: multiplied before it is added to anything, so that the compiler cannot do both at once
// and round otherwise.
const float* int8_key_row(const Rows& keys, int64_t i, int64_t offset, int64_t dim, float* room) {
  Int8Row row = Int8Row::at(keys.at<int8_t>(i) + offset, dim);
  int64_t d = 0;
  for (; d + W <= dim; d += W) store(room + d, load_wide(row + d));
  for (; d < dim; ++d) room[d] = row[d];
  return room;
}

// Window j, of `size` tokens from j * stride on, of keys to row j of `to`, which has the type T as have keys that are not int8.
template <typename T>
void mean(const Rows& keys, int64_t key_head, const Rows& to, int64_t to_head, int64_t j, int64_t size, int64_t stride,
          int64_t heads, int64_t dim, float* sum, float* room) {
  std::fill_n(sum, heads * dim, 0.0f);
  for (int64_t i = j * stride; i < j * stride + size; ++i) {
    for (int64_t h = 0; h < heads; ++h) {
      auto add = [&](auto* key) {
        for (int64_t d = 0; d < dim; ++d) sum[h * dim + d] += widen(key[d]);
      };
      if (keys.kind == INT8) add(int8_key_row(keys, i, h * key_head, dim, room));
      else add(keys.at<T>(i) + h * key_head);
    }
  }
  T* out = const_cast<T*>(to.at<T>(j));
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t d = 0; d < dim; ++d) out[h * to_head + d] = narrowed<T>(sum[h * dim + d] / float(size));
}

// Calls use(T{}) with the type of compressed keys, and of keys and values that are not int8.
template <typename Use>
void with_level_type(const Store& s, const Use& use) { with_type(s.level_kind, use); }

void copy_tokens(const Store& s, int64_t n, int64_t a, int64_t b) {
  int64_t shift = s.table.cu_seqlens[n + 1] - s.table.lengths[n];  // from a token's position to its place in the call
  auto put = [&](const void* x, const Place& place, int64_t width) {
    Rows to = s.rows(n, place, s.kind);
    if (s.kind == INT8) return copy_quantized(static_cast<const float*>(x), to, place.head, a, a + shift, b + shift, s.kv_heads, width);
    with_level_type(s, [&](auto type) {
      copy(static_cast<const decltype(type)*>(x), to, place.head, a, a + shift, b + shift, s.kv_heads, width);
    });
  };
  put(s.k, s.keys, s.dim), put(s.v, s.values, s.value_dim);
}

// Windows a ... b - 1 of a level: 1, or 4 for windows four times as long. `room` has kv_heads * dim + dim floats.
void complete_windows(const Store& s, int64_t n, int64_t level, int64_t a, int64_t b, float* room) {
  int64_t length = level * s.kernel, step = level * s.stride;
  const Place& place = level == 1 ? s.k1 : s.k2;
  Rows from = s.rows(n, s.keys, s.kind), to = s.rows(n, place, s.level_kind, step, length - 1);
  with_level_type(s, [&](auto type) {
    for (int64_t j = a; j < b; ++j)
      mean<decltype(type)>(from, s.keys.head, to, place.head, j, length, step, s.kv_heads, s.dim, room, room + s.kv_heads * s.dim);
  });
}

// Calls use(level, first, last) for the windows that a sequence's new tokens complete.
template <typename Use>
void for_each_level(const Store& s, int64_t n, const Use& use) {
  int64_t length = s.table.lengths[n], before = length - s.table.tokens(n);
  for (int64_t level : {1, 4})
    use(level, windows(before, level * s.kernel, level * s.stride), windows(length, level * s.kernel, level * s.stride));
}

}  // namespace

void store_sequence(const Store& s, int64_t n) {
  copy_tokens(s, n, s.table.lengths[n] - s.table.tokens(n), s.table.lengths[n]);
  Scratch room((s.kv_heads + 1) * s.dim);
  for_each_level(s, n, [&](int64_t level, int64_t first, int64_t last) { complete_windows(s, n, level, first, last, room.data); });
}

// k `[T, Hkv, D]` and v `[T, Hkv, E]` have the pool's element type, float32 for int8. `level_kind` is that of k1 and k2.
extern "C" void opensala_store_kv(
    const void* k, const void* v, void* keys, void* values, void* k1, void* k2, int64_t kind, int64_t level_kind,
    const int32_t* cu_seqlens, const int32_t* lengths, const int32_t* pages, int64_t sequences, int64_t table_width, int64_t kv_heads, int64_t dim,
    int64_t value_dim, int64_t k_page, int64_t k_token, int64_t k_head, int64_t v_page, int64_t v_token, int64_t v_head,
    int64_t k1_page, int64_t k1_window, int64_t k1_head, int64_t k2_page, int64_t k2_window, int64_t k2_head, int64_t size,
    int64_t stride, int64_t kernel, int64_t threads) {
  Store s{k, v, kind, level_kind, {cu_seqlens, lengths, pages, nullptr, sequences, table_width}, {keys, k_page, k_token, k_head},
          {values, v_page, v_token, v_head}, {k1, k1_page, k1_window, k1_head}, {k2, k2_page, k2_window, k2_head},
          kv_heads, dim, value_dim, size, stride, kernel};
  std::vector<Piece> tokens, ends;
  for (int64_t n = 0; n < sequences; ++n) {
    cut(tokens, n, 0, lengths[n] - s.table.tokens(n), lengths[n], 64);
    for_each_level(s, n, [&](int64_t level, int64_t first, int64_t last) { cut(ends, n, level, first, last, 16); });
  }
#pragma omp parallel num_threads(threads) if (cu_seqlens[sequences] > 64)
  {
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tokens.size(); ++i) copy_tokens(s, tokens[i].sequence, tokens[i].first, tokens[i].last);
    Scratch room((kv_heads + 1) * dim);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < ends.size(); ++i)
      complete_windows(s, ends[i].sequence, ends[i].level, ends[i].first, ends[i].last, room.data);
  }
}

REPLAYABLE(opensala_store_kv)
