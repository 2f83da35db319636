// x W^T + b in float32, batch-invariant: the bits of an output row depend on that row of x alone, never on how many rows
// the call has, where they lie in it, or which thread computes them.
//
// Every output element is one dot product, summed the same way everywhere: lane l of a vector adds k = l, l + W, l + 2W,
// ... in this order, then one fixed tree adds the lanes. Register tiles differ only in how many such sums grow side by
// side. Weights are read as nn.Linear keeps them; only a block of them is widened, where several rows share it.
#include "replay.h"
#include "gemm.h"

namespace {

// Rows of x by rows of W of a full register tile: W sums, so that one transposition adds up all their lanes.
constexpr int TILE = W == 16 ? 4 : 2;
constexpr int BLOCK_BYTES = 1 << 17;       // of weights, to stay in a core's second-level cache
constexpr int64_t ROWS_PER_UNIT = 256;     // of x, a unit of work
constexpr int64_t SINGLE_WORK = 1 << 17;   // multiplications below which a second thread costs more than it saves
constexpr int64_t WIDEN_FROM = 2 * TILE;   // rows of x from which widening a block of weights once pays

#if defined(__AVX512F__)
INLINE Vec wide(const BFloat16* p) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
INLINE Vec wide(const Float16* p) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE Vec wide(const float* p) { return load(p); }
// Without this GCC reads a vector from memory again for each use: 20 loads instead of 8 for 16 multiplications.
INLINE void keep_in_register(Vec& v) { asm("" : "+v"(v)); }
#else
template <typename T>
INLINE Vec wide(const T* p) { return load_wide(p); }
INLINE void keep_in_register(Vec&) {}
#endif

// The first n < W elements, zeros behind them.
template <typename T>
INLINE Vec wide_part(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#endif
  float t[W] = {};
  for (int64_t i = 0; i < n; ++i) t[i] = widen(p[i]);
  return load(t);
}

// Groups of 2 S lanes, each the partial sums of one dot product, become groups of S lanes: those of a, then those of b.
template <int S, int... I>
INLINE Vec merge(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / S * 2 * S + I % S)...) +
         __builtin_shufflevector(a, b, (I / S * 2 * S + I % S + S)...);
}

// Lane i: the sum over the lanes of sums[i].
template <int S = W / 2>
INLINE Vec add_lanes(Vec* sums) {
#pragma GCC unroll 16
  for (int i = 0; i < S; ++i) sums[i] = merge<S>(sums[2 * i], sums[2 * i + 1], std::make_integer_sequence<int, W>());
  if constexpr (S > 1) return add_lanes<S / 2>(sums);
  else return sums[0];
}

// sums[r * C + c] = products of row x[r] and weight row w[c], lane by lane.
template <int R, int C, typename T>
INLINE void dot_products(const float* const* x, const T* const* w, int64_t depth, Vec* sums) {
  Vec acc[R * C];
  const float* a[R];
  const T* b[C];
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) acc[i] = Vec{};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r] = x[r];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) b[c] = w[c];
  auto step = [&](auto load_x, auto load_w) __attribute__((always_inline)) {
    Vec left[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) left[r] = load_x(a[r]);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      Vec right = load_w(b[c]);
      keep_in_register(right);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r * C + c] += left[r] * right;
    }
  };
  int64_t k = 0;
  for (; k + W <= depth; k += W)
    step([k](const float* p) { return load(p + k); }, [k](const T* p) { return wide(p + k); });
  if (k < depth)
    step([=](const float* p) { return wide_part(p + k, depth - k); }, [=](const T* p) { return wide_part(p + k, depth - k); });
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) sums[i] = acc[i];
}

struct Linear {
  const float* x;
  const void* weight;
  int64_t kind;
  const float* bias;  // or null
  float* out;
  int64_t rows, inner, outer, x_stride;
};

// Rows first ... first + count - 1 of the weights, each next to the one before it.
template <typename T>
struct Block {
  const T* data;
  int64_t first, count;
};

// W outputs: R rows from `row` on, W / R columns from `column` of the block on. What lies beyond the last row or column
// is computed from the last one and thrown away, so that edges run the same code.
template <int R, typename T>
INLINE void outputs(const Linear& p, const Block<T>& block, int64_t row, int64_t column) {
  constexpr int COLUMNS = W / R, C = R == 1 && COLUMNS > 8 ? 8 : std::min(COLUMNS, 4);
  const float* x[R];
  for (int r = 0; r < R; ++r) x[r] = p.x + std::min(row + r, p.rows - 1) * p.x_stride;
  Vec sums[W], in_order[W];
#pragma GCC unroll 4
  for (int part = 0; part < COLUMNS; part += C) {
    const T* w[C];
    for (int c = 0; c < C; ++c) w[c] = block.data + std::min(column + part + c, block.count - 1) * p.inner;
    dot_products<R, C>(x, w, p.inner, sums + part * R);
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    int r = i / COLUMNS, c = i % COLUMNS;
    in_order[i] = sums[c / C * C * R + r * C + c % C];
  }
  float result[W];
  store(result, add_lanes(in_order));
  int64_t left = std::min<int64_t>(COLUMNS, block.count - column), first = block.first + column;
  for (int r = 0; r < R && row + r < p.rows; ++r) {
    float *from = result + r * COLUMNS, *to = p.out + (row + r) * p.outer + first;
    if (p.bias)
      for (int64_t c = 0; c < left; ++c) from[c] += p.bias[first + c];
    if (left == COLUMNS) std::memcpy(to, from, COLUMNS * sizeof(float));
    else std::copy_n(from, left, to);
  }
}

template <int R, typename T>
void rows_by_block(const Linear& p, const Block<T>& block, int64_t row) {
  for (int64_t column = 0; column < block.count; column += W / R) outputs<R>(p, block, row, column);
}

template <typename T>
void multiply(const Linear& p, const Block<T>& block, int64_t row, int64_t end) {
  for (; end - row > 2; row += TILE) rows_by_block<TILE>(p, block, row);
  if (end - row == 2) rows_by_block<2>(p, block, row);
  if (end - row == 1) rows_by_block<1>(p, block, row);
}

template <typename T>
void unit(const Linear& p, int64_t first, int64_t count, int64_t row, int64_t end, float* widened) {
  const T* weight = static_cast<const T*>(p.weight) + first * p.inner;
  if (p.kind == 0 || end - row < WIDEN_FROM) return multiply(p, Block<T>{weight, first, count}, row, end);
  int64_t i = 0, size = count * p.inner;
  for (; i + W <= size; i += W) store(widened + i, wide(weight + i));
  for (; i < size; ++i) widened[i] = widen(weight[i]);
  multiply(p, Block<float>{widened, first, count}, row, end);
}

void run(const Linear& p, int64_t threads) {
  if (p.rows * p.inner * p.outer < SINGLE_WORK) threads = 1;
  int64_t fair = (p.outer + 4 * threads - 1) / (4 * threads), fits = BLOCK_BYTES / 4 / std::max<int64_t>(1, p.inner);
  int64_t width = round_up(std::max<int64_t>(1, std::min(fair, fits)), W);
  int64_t blocks = (p.outer + width - 1) / width, bands = (p.rows + ROWS_PER_UNIT - 1) / ROWS_PER_UNIT;
#pragma omp parallel num_threads(threads)
  {
    Scratch widened(p.kind && p.rows >= WIDEN_FROM ? width * p.inner : 0);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks * bands; ++i) {
      int64_t first = i / bands * width, row = i % bands * ROWS_PER_UNIT;
      with_type(p.kind, [&](auto type) {
        unit<decltype(type)>(p, first, std::min(width, p.outer - first), row, std::min(p.rows, row + ROWS_PER_UNIT), widened.data);
      });
    }
  }
}

}  // namespace

// out `[rows, outer]` = x `[rows, inner]` (rows x_stride elements apart) times weight `[outer, inner]` (element type
// `kind`) transposed, plus bias `[outer]` or null.
extern "C" void opensala_linear(const float* x, const void* weight, int64_t kind, const float* bias, float* out, int64_t rows,
                                int64_t inner, int64_t outer, int64_t x_stride, int64_t threads) {
  run({x, weight, kind, bias, out, rows, inner, outer, x_stride}, threads);
}

REPLAYABLE(opensala_linear)
