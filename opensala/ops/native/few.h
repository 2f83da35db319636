// Products of a few rows (the query heads of one token) with many rows of B that lie in memory.
//
// As `product` with a panel of B: the same sums in the same order, so the same bits. But B is turned in registers, for a
// panel costs as much to write down as a few rows have to do with it, and pushes out of the cache what was asked for ahead.
// B is of any element type but int8, and widened as it is read.
#pragma once
#include <type_traits>
#include <vector>

#include "gemm.h"

// Pointers to the rows of B, of element type T, that are multiplied now, and to those that will be next.
template <typename T>
class Walk {
 public:
  Walk(const Rows& rows, int64_t size) : rows_(rows), here_(size), soon_(size) {}

  // Goes on to the rows that were next; `many` from `first` on, maybe none, are next.
  void advance(int64_t first, int64_t many) {
    std::swap(here_, soon_);
    count_ = coming_, coming_ = std::max<int64_t>(0, std::min(size(), many));
    rows_.find(first, 1, int(coming_), soon_.data());
    if (coming_) std::fill(soon_.begin() + coming_, soon_.end(), soon_[0]);
  }
  int64_t size() const { return int64_t(here_.size()); }
  int64_t count() const { return count_; }  // rows there are; pointers to others lead to the first
  int64_t coming() const { return coming_; }
  const T* const* here() const { return here_.data(); }
  const T* const* soon() const { return soon_.data(); }

 private:
  Rows rows_;
  int64_t count_ = 0, coming_ = 0;
  std::vector<const T*> here_, soon_;
};

constexpr int STRIPS = W == 16 ? 2 : 1;  // vectors of sums a row that grow side by side: one chain alone waits for itself
constexpr int SLIM = W == 16 ? 8 : W;    // pairs of a row of bfloat16 that are turned at a time

// v[i], lane j = pair i, from column k on, of row b[j * by].
static inline void turn_pairs(const BFloat16* const* b, int64_t by, int64_t k, Vec* v) {
#if defined(__AVX512F__)
  auto half = [&](int row) { return _mm256_loadu_si256((const __m256i*)(b[row * by] + k)); };
  auto halves = [&](int low, int high) { return (Vec)_mm512_inserti64x4(_mm512_castsi256_si512(half(low)), half(high), 1); };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) v[i] = halves(i, 4 + i), v[4 + i] = halves(8 + i, 12 + i);
  transpose_quarters(v), transpose_quarters(v + 4);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    __m512 x = (__m512)v[c], y = (__m512)v[4 + c];
    v[c] = (Vec)_mm512_shuffle_f32x4(x, y, 0x88), v[4 + c] = (Vec)_mm512_shuffle_f32x4(x, y, 0xdd);
  }
#else
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) v[i] = load_pairs(b[i * by] + k);
  transpose_square(v);
#endif
}

// out[r * ldo + s * W + i] = sum over k < depth of a[k * R + r] * b[s * shift + i * by][k] for r < R, s < S, i < W. Asks for the
// `many` rows `soon` meanwhile, some with each step: all at once they would have to wait for each other.
template <int R, int S, typename T>
static void product_turned(const float* a, int64_t depth, const T* const* b, int64_t shift, int64_t by,
                           const T* const* soon, int64_t many, float* out, int64_t ldo) {
  Vec acc[S][R];
#pragma GCC unroll 2
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[s][r] = Vec{};
  int64_t k = 0, asked = 0;
  // After each strip: the more at once, the longer they keep what is read now from coming.
  auto ask = [&](int s, int64_t columns) __attribute__((always_inline)) {
    for (int64_t end = many * (k * S + (s + 1) * columns) / (depth * S); asked < end; ++asked)
      for (int64_t at = 0; at < depth; at += 64 / sizeof(T)) __builtin_prefetch(soon[asked] + at, 0, 2);
  };
  auto add = [&](int s, int64_t k, Vec x) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[s][r] += splat(a[k * R + r]) * x;
  };
  // Pairs of bfloat16 are turned as they are, in half as many moves. Few at a time, so that the strips' chains of sums, each
  // of which waits for itself, overlap.
  if constexpr (std::is_same_v<T, BFloat16>)
    for (; k + 2 * SLIM <= depth; k += 2 * SLIM) {
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) {
        Vec v[SLIM];
        turn_pairs(b + s * shift, by, k, v);
#pragma GCC unroll 16
        for (int i = 0; i < SLIM; ++i) {
          add(s, k + 2 * i, first_of(v[i]));
          add(s, k + 2 * i + 1, second_of(v[i]));
        }
        ask(s, 2 * SLIM);
        asm volatile("" ::: "memory");  // as below
      }
    }
  for (; k + W <= depth; k += W) {
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) {
      Vec v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = load_wide(b[s * shift + i * by] + k);
      transpose_square(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) add(s, k + i, v[i]);
      ask(s, W);
      asm volatile("" ::: "memory");  // the next strip's vectors would not fit beside these
    }
  }
  for (; k < depth; ++k)
    for (int s = 0; s < S; ++s) {
      float x[W];
      for (int i = 0; i < W; ++i) x[i] = widen(b[s * shift + i * by][k]);
      for (int r = 0; r < R; ++r) acc[s][r] += splat(a[k * R + r]) * load(x);
    }
#pragma GCC unroll 2
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(out + r * ldo + s * W, acc[s][r]);
}

// The same for `count` rows of a, at most ROWS, `[depth, count]`, and all rows of a walk; out `[count, size]`. Vector s of a
// row of it is of the rows s * shift, s * shift + by, ...; what is of rows that are not there is any number.
template <int R = ROWS, typename T>
static void product_few(const float* a, int count, int64_t depth, const Walk<T>& b, int64_t shift, int64_t by, float* out) {
  if (count < R) {
    if constexpr (R > 1) product_few<R - 1>(a, count, depth, b, shift, by, out);
    return;
  }
  int64_t strips = b.size() / W, s = 0, asked = 0;
  auto part = [&](auto wide) {
    constexpr int S = decltype(wide)::value;
    int64_t end = b.coming() * (s + S) / strips;
    product_turned<R, S>(a, depth, b.here() + s * shift, shift, by, b.soon() + asked, end - asked, out + s * W, b.size());
    s += S, asked = end;
  };
  if (!b.count()) return;
  while (s + STRIPS <= strips) part(std::integral_constant<int, STRIPS>{});
  while (s < strips) part(std::integral_constant<int, 1>{});
}

// out[k * rows + r] = row(r)[k]
template <typename Row>
static void turn_few(const Row& row, int64_t rows, int64_t depth, float* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < depth; ++k) out[k * rows + r] = row(r)[k];
}
