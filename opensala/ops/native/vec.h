// Vectors of the machine's own width, and the few operations on them that the kernels need.
//
// Written with the compiler's vector extension (GCC 12 or clang), so that one source serves AVX-512, AVX2,
// NEON and anything else; intrinsics only where the generic form is known to compile badly.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
constexpr int ROWS = 6, COLS = 4;  // register tile of a product: ROWS x COLS vectors are accumulated at once
#elif defined(__AVX__)
constexpr int W = 8;
constexpr int ROWS = 6, COLS = 2;
#else
constexpr int W = 4;
constexpr int ROWS = 4, COLS = 4;
#endif

typedef float Vec __attribute__((vector_size(W * 4)));
typedef float VecUnaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t VecInt __attribute__((vector_size(W * 4)));

constexpr float INF = std::numeric_limits<float>::infinity();

static inline Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
// Not Vec{} + x: that is an addition, for it makes 0 of -0, and then a move of lanes, where a load can do all.
static inline Vec splat(float x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX__)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}

static inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

static inline float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float t[W], best = -INF;
  store(t, v);
  for (int i = 0; i < W; ++i) best = t[i] > best ? t[i] : best;
  return best;
#endif
}

static inline float total(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float t[W], sum = 0;
  store(t, v);
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) t[i] += t[i + step];
  sum = t[0];
  return sum;
#endif
}

// One bit for each lane with a >= b.
static inline uint32_t lanes_at_least(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif defined(__AVX__)
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ));
#else
  float x[W], y[W];
  store(x, a), store(y, b);
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= uint32_t(x[i] >= y[i]) << i;
  return bits;
#endif
}

// 2^f for |f| <= 1/2, to 2e-7 relative.
static inline Vec exp2_fraction(Vec f) {
  Vec p = splat(1.54035304e-4f);
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  return p * f + 1.0f;
}

// 2^x; exactly 0 below -126, so that no denormal number (slow on CPUs) is ever made. Above 127 it is not defined: callers
// keep x below.
static inline Vec exp2_below(Vec x) {
#if defined(__AVX512F__)
  __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);  // NaN stays NaN
  __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (Vec)_mm512_maskz_scalef_ps(keep, (__m512)exp2_fraction(x - (Vec)n), n);
#else
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  VecInt keep = x >= splat(-126.0f);
  Vec y = larger(x, splat(-126.0f));
  Vec r = y + shift;
  VecInt n = (VecInt)r - (VecInt)shift;
  Vec power = (Vec)(((VecInt)exp2_fraction(y - (r - shift)) + (n << 23)) & keep);
  return x != x ? x : power;
#endif
}

// 2^x for any x: what would overflow becomes 2^127.
static inline Vec exp2_any(Vec x) { return exp2_below(x > splat(127.0f) ? splat(127.0f) : x); }

// --- element types of keys and values ---

struct BFloat16 { uint16_t bits; };
typedef _Float16 Float16;

static inline float widen(float x) { return x; }
static inline float widen(Float16 x) { return (float)x; }
static inline float widen(BFloat16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

template <typename T>
static inline T narrowed(float x) { return T(x); }
template <>
inline BFloat16 narrowed(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return {uint16_t(x != x ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

static inline Vec load_wide(const float* p) { return load(p); }
#if defined(__AVX512F__)
static inline Vec load_wide(const BFloat16* p) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
static inline Vec load_wide(const Float16* p) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
#elif defined(__AVX2__)
static inline Vec load_wide(const BFloat16* p) {
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
#endif
template <typename T>
static inline Vec load_wide(const T* p) {
  float t[W];
  for (int i = 0; i < W; ++i) t[i] = widen(p[i]);
  return load(t);
}

// W pairs of bfloat16, as 32 bits each: what can be moved as vectors of floats are. Then the first and the second of each.
static inline Vec load_pairs(const BFloat16* p) {
  Vec pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  return pairs;
}
// sum + a.first * b.first + a.second * b.second, in float32.
#if defined(__AVX512BF16__)
constexpr bool MULTIPLIES_PAIRS = true;
static inline Vec add_pairs(Vec sum, Vec a, Vec b) { return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
static inline void store_narrow(BFloat16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
#else
constexpr bool MULTIPLIES_PAIRS = false;  // and nobody asks for it
static inline Vec add_pairs(Vec sum, Vec, Vec) { return sum; }
static inline void store_narrow(BFloat16* p, Vec x) {
  for (int i = 0; i < W; ++i) p[i] = narrowed<BFloat16>(x[i]);
}
#endif
static inline Vec first_of(Vec pairs) { return (Vec)((VecInt)pairs << 16); }
static inline Vec second_of(Vec pairs) { return (Vec)((VecInt)pairs >> 16 << 16); }

// A row of int8 and the scale behind it: stands where a pointer to floats would.
struct Int8Row {
  const int8_t* values;
  float scale;
  static Int8Row at(const int8_t* row, int64_t width) {
    Int8Row r{row, 0};
    std::memcpy(&r.scale, row + width, 4);
    return r;
  }
  Int8Row operator+(int64_t k) const { return {values + k, scale}; }
  float operator[](int64_t k) const { return float(values[k]) * scale; }
};

static inline Vec load_wide(const Int8Row& row) {
#if defined(__AVX512F__)
  Vec v = (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)row.values)));
#elif defined(__AVX2__)
  Vec v = (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)row.values)));
#else
  float t[W];
  for (int i = 0; i < W; ++i) t[i] = float(row.values[i]);
  Vec v = load(t);
#endif
  return v * splat(row.scale);
}

// The last lane of a, then all but the last of b.
template <int... I>
static inline Vec follow(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (W - 1 + I)...);
}
static inline Vec follow(Vec a, Vec b) { return follow(a, b, std::make_integer_sequence<int, W>()); }

// --- transposition ---

template <int S, int... I>
static inline void exchange(Vec& a, Vec& b, std::integer_sequence<int, I...>) {
  Vec low = __builtin_shufflevector(a, b, ((I & S) ? W + I - S : I)...);
  Vec high = __builtin_shufflevector(a, b, ((I & S) ? W + I : I + S)...);
  a = low, b = high;
}

template <int S>
static inline void exchange_all(Vec* v) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) exchange<S>(v[i], v[i + S], std::make_integer_sequence<int, W>());
}

#if defined(__AVX512F__)
// Four vectors, taken as 4 x 4 squares by quarters: each square turned about its diagonal.
static inline void transpose_quarters(Vec* v) {
  auto low = [](Vec a, Vec b) { return (__m512d)_mm512_unpacklo_ps((__m512)a, (__m512)b); };
  auto high = [](Vec a, Vec b) { return (__m512d)_mm512_unpackhi_ps((__m512)a, (__m512)b); };
  __m512d a = low(v[0], v[1]), b = high(v[0], v[1]), c = low(v[2], v[3]), d = high(v[2], v[3]);
  v[0] = (Vec)_mm512_unpacklo_pd(a, c), v[1] = (Vec)_mm512_unpackhi_pd(a, c);
  v[2] = (Vec)_mm512_unpacklo_pd(b, d), v[3] = (Vec)_mm512_unpackhi_pd(b, d);
}
#endif

// Turn W vectors of W floats, a square, about its diagonal.
static inline void transpose_square(Vec* v) {
#if defined(__AVX512F__)
  // By `exchange` it takes permutations by index, each of which needs a register for the index and one to overwrite.
  auto even = [](Vec a, Vec b) { return (Vec)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88); };
  auto odd = [](Vec a, Vec b) { return (Vec)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd); };
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 4) transpose_quarters(v + i);
  // Quarter q of v[4 i + c] now has column 4 q + c of rows 4 i ... 4 i + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    Vec a = even(v[c], v[4 + c]), b = even(v[8 + c], v[12 + c]), x = odd(v[c], v[4 + c]), y = odd(v[8 + c], v[12 + c]);
    v[c] = even(a, b), v[4 + c] = even(x, y), v[8 + c] = odd(a, b), v[12 + c] = odd(x, y);
  }
#else
  exchange_all<1>(v);
  exchange_all<2>(v);
  if constexpr (W > 4) exchange_all<4>(v);
  if constexpr (W > 8) exchange_all<8>(v);
#endif
}
