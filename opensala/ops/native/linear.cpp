// x W^T + b in float32, batch-invariant: the bits of an output row depend on that row of x alone, never on how many rows
// the call has, where they lie in it, or which thread computes them.
//
// Every output element is one dot product, summed the same way everywhere: lane l of a vector adds k = l, l + W, l + 2W,
// ... in this order, then one fixed tree adds the lanes. Register tiles differ only in how many such sums grow side by
// side. Weights are read as they are stored, and widened to float32 in registers: 16-bit ones exactly, codes of 8 and 4
// bits to scale * (code - zero), so that a product with codes has the bits of one with the float32 weights they stand for.
// Only where several rows share a block of codes is it widened in memory.
#include "linear.h"
#include "replay.h"

namespace {

// Rows of x by rows of W of a full register tile: W sums, so that one transposition adds up all their lanes.
constexpr int TILE = W == 16 ? 4 : 2;
// The same of so many rows that weights, if they come from memory, come while all of a small batch is multiplied.
constexpr int TALL = W == 16 ? 8 : TILE;
constexpr int BLOCK_BYTES = 1 << 17;       // of weights, to stay in a core's second-level cache
constexpr int64_t ROWS_PER_UNIT = 256;     // of x, a unit of work
constexpr int64_t SINGLE_WORK = 1 << 17;   // multiplications below which a second thread costs more than it saves
constexpr int64_t WIDEN_FROM = 2 * TILE;   // rows of x from which widening a block of codes once pays
constexpr int64_t CHUNK = 128;             // columns whose 4-bit codes lie together: 16 words of 8
constexpr int WORDS = 16;
constexpr int64_t NEAR_BYTES = 1 << 14;    // of the rows of x of a tile, to stay in the first-level cache beside all else
constexpr int64_t TOGETHER = 16;           // columns that are multiplied with a part of such rows before the next part

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

// Loads W weights of a row from column k on (all of them, or the first n), widened. `begin(k)` comes before every 16
// columns of codes. `ahead(k, elements)` asks for what lies so many elements behind column k, in the second-level cache: the
// first one has too few places for what is under way. AHEAD: rows after which that is.
template <typename T>
struct Plain {
  static constexpr int64_t STEP = 1 << 30, AHEAD = 8, BYTES = sizeof(T);  // STEP: columns between two calls of `begin`
  const T* data;
  void begin(int64_t) {}
  void ahead(int64_t k, int64_t elements) const {
    if (k % int64_t(64 / sizeof(T)) == 0) __builtin_prefetch(data + k + elements, 0, 2);
  }
  Vec all(int64_t k) const { return wide(data + k); }
  Vec part(int64_t k, int64_t n) const { return wide_part(data + k, n); }
};

// The scale and zero of the group that column k lies in, for columns that come in order.
struct Groups {
  const float *scales, *zeros;
  int64_t group, next = 0;
  Groups(const Weights& w, int64_t row) : group(w.group) {
    int64_t groups = (w.inner + group - 1) / group;
    scales = w.scales + row * groups, zeros = w.zeros ? w.zeros + row * groups : nullptr;
  }
  bool begins(int64_t k) const { return k == next; }
  Vec scale() const { return splat(*scales); }
  Vec zero(float otherwise) const { return splat(zeros ? *zeros : otherwise); }
  void step() {
    next += group, ++scales;
    if (zeros) ++zeros;
  }
};

INLINE Vec first_lanes(Vec v, int64_t n) {
  float t[W];
  store(t, v);
  for (int64_t i = n; i < W; ++i) t[i] = 0.0f;
  return load(t);
}

struct Code8 {
  static constexpr int64_t STEP = 16, AHEAD = 8, BYTES = 1;
  const int8_t* data;
  Groups groups;
  Vec scale{}, zero{};
  Code8(const Weights& w, int64_t row) : data(static_cast<const int8_t*>(w.data) + row * w.inner), groups(w, row) {}
  void begin(int64_t k) {
    if (groups.begins(k)) scale = groups.scale(), zero = groups.zero(0.0f), groups.step();
  }
  void ahead(int64_t k, int64_t elements) const {
    if (k % 64 == 0) __builtin_prefetch(data + k + elements, 0, 2);
  }
  Vec all(int64_t k) const {
#if defined(__AVX512F__)
    return meaning((Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(data + k)))));
#else
    return part(k, W);
#endif
  }
  Vec part(int64_t k, int64_t n) const {
    float t[W] = {};
    for (int64_t i = 0; i < n; ++i) t[i] = float(data[k + i]);
    return first_lanes(meaning(load(t)), n);
  }
  Vec meaning(Vec code) const { return (code - zero) * scale; }
};

struct Code4 {
  static constexpr int64_t STEP = 16, AHEAD = 32, BYTES = 1;
  const int32_t* data;
  Groups groups;
  void ahead(int64_t k, int64_t elements) const {
    if (k % CHUNK == 0) __builtin_prefetch(data + k / CHUNK * WORDS + (elements + CHUNK - 1) / CHUNK * WORDS, 0, 2);
  }
  Code4(const Weights& w, int64_t row)
      : data(static_cast<const int32_t*>(w.data) + row * ((w.inner + CHUNK - 1) / CHUNK * WORDS)), groups(w, row) {}
#if defined(__AVX512F__)
  // What each of the 16 codes stands for: a weight is one permutation away.
  __m512i words{};
  Vec meaning{};
  void begin(int64_t k) {
    words = k % CHUNK ? _mm512_srli_epi32(words, 4) : _mm512_loadu_si512(data + k / CHUNK * WORDS);
    if (!groups.begins(k)) return;
    const Vec codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    meaning = (codes - groups.zero(8.0f)) * groups.scale();
    groups.step();
  }
  Vec all(int64_t) const { return (Vec)_mm512_permutexvar_ps(words, (__m512)meaning); }
#else
  Vec scale{}, zero{};
  void begin(int64_t k) {
    if (groups.begins(k)) scale = groups.scale(), zero = groups.zero(8.0f), groups.step();
  }
  Vec all(int64_t k) const {
    VecInt words;
    std::memcpy(&words, data + k / CHUNK * WORDS + k % WORDS, sizeof words);
    return (__builtin_convertvector(words >> int(k % CHUNK / WORDS * 4) & 15, Vec) - zero) * scale;
  }
#endif
  Vec part(int64_t k, int64_t n) const { return first_lanes(all(k), n); }
};

// Adds columns from ... to - 1 of the products of row x[r] and weight row w[c] to sums[r * C + c], lane by lane. FIRST: the
// sums begin here. FRESH: no cache is thought to hold the weights.
template <int R, bool FIRST, bool FRESH, typename Row, int... I, int... J>
INLINE void dot_products(const float* const* x, int64_t from, int64_t to, int64_t depth, Vec* sums, const Row& row,
                         std::integer_sequence<int, I...>, std::integer_sequence<int, J...>) {
  constexpr int C = sizeof...(I);
  decltype(row(0)) w[C] = {row(I)...};
  using Weight = decltype(row(0));
  // Where multiplications take longer than weights from memory, x is loaded once for all columns. Where they wait for
  // memory, more loads do no harm, and running further ahead of it does: two rows of float32 got 21 GB/s for 25.
  constexpr bool HELD = !FRESH || R >= 2 * Weight::BYTES;
  Vec acc[R * C];
  const float* a[R];
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) acc[i] = FIRST ? Vec{} : sums[i];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r] = x[r];
  auto step = [&](auto load_x, auto load_w) __attribute__((always_inline)) {
    auto columns = [&](auto... left) __attribute__((always_inline)) {
      if constexpr (HELD) (keep_in_register(left), ...);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        Vec right = load_w(w[c]);
        keep_in_register(right);
        ((acc[J * C + c] += left * right), ...);
      }
    };
    columns(load_x(a[J])...);
  };
  int64_t k = from;
  auto begin = [&] __attribute__((always_inline)) {
    if constexpr (Weight::STEP == 16) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) w[c].begin(k);
    }
  };
  for (; k + W <= to; k += W) {
    if (k % 16 == 0) begin();
    // A few rows are as fast as weights come from memory. Rows of a few KB are too short for the processor to foresee the
    // next ones. A product of 0.9 M weights, two threads: one row in float32 26 -> 31 GB/s, in bfloat16 18 -> 27 by asking for
    // the second-level cache and not the first; eight rows in float32 0.21 -> 0.15 ms.
    if constexpr (FRESH) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) w[c].ahead(k, Weight::AHEAD * depth);
    }
    step([k](const float* p) { return load(p + k); }, [k](const Weight& p) { return p.all(k); });
  }
  if (k < to) {
    if (k % 16 == 0) begin();
    step([=](const float* p) { return wide_part(p + k, to - k); }, [=](const Weight& p) { return p.part(k, to - k); });
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) sums[i] = acc[i];
}

// Rows of the weights by their number.
template <typename T>
struct PlainBlock {
  const T* data;
  int64_t inner;
  Plain<T> row(int64_t c) const { return {data + c * inner}; }
};
template <typename Row>
struct CodeBlock {
  const Weights& w;
  Row row(int64_t c) const { return {w, c}; }
};

// Calls use(block) with the rows of the weights, whatever they are.
template <typename Use>
INLINE void with_block(const Weights& w, const Use& use) {
  if (w.kind == 4) use(CodeBlock<Code4>{w});
  else if (w.kind == 3) use(CodeBlock<Code8>{w});
  else with_type(w.kind, [&](auto type) { use(PlainBlock<decltype(type)>{static_cast<const decltype(type)*>(w.data), w.inner}); });
}

// Columns first ... first + count - 1 of the outputs, whose weights are rows `from` ... of a block.
struct Columns {
  int64_t first, count, from;
};

// W outputs: R rows from `row` on, COLUMNS columns from `column` on, C of them side by side. What lies beyond the last row or
// column is computed from the last one and thrown away, so that edges run the same code.
template <int R, bool FRESH, typename Block>
struct Tile {
  static constexpr int COLUMNS = W / R, C = R == 1 && COLUMNS > 8 ? 8 : std::min(COLUMNS, 4);
  const Linear& p;
  const Block& block;
  const Columns& columns;
  int64_t row;

  // Adds what columns from ... to - 1 of x give.
  template <bool FIRST>
  __attribute__((always_inline)) void add(int64_t column, int64_t from, int64_t to, Vec* sums) const {
    const float* x[R];
    for (int r = 0; r < R; ++r) x[r] = p.x + std::min(row + r, p.rows - 1) * p.x_stride;
#pragma GCC unroll 4
    for (int part = 0; part < COLUMNS; part += C) {
      auto weights = [&](int c) { return block.row(columns.from + std::min(column + part + c, columns.count - 1)); };
      dot_products<R, FIRST, FRESH>(x, from, to, p.weights.inner, sums + part * R, weights, std::make_integer_sequence<int, C>(),
                                    std::make_integer_sequence<int, R>());
    }
  }

  // The outputs behind their sums.
  __attribute__((always_inline)) void finish(int64_t column, const Vec* sums) const {
    Vec in_order[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      int r = i / COLUMNS, c = i % COLUMNS;
      in_order[i] = sums[c / C * C * R + r * C + c % C];
    }
    float result[W];
    store(result, add_lanes(in_order));
    int64_t left = std::min<int64_t>(COLUMNS, columns.count - column), first = columns.first + column;
    for (int r = 0; r < R && row + r < p.rows; ++r) {
      float *from = result + r * COLUMNS, *to = p.out + (row + r) * p.out_stride + first;
      if (p.weights.bias)
        for (int64_t c = 0; c < left; ++c) from[c] += p.weights.bias[first + c];
      if (left == COLUMNS) std::memcpy(to, from, COLUMNS * sizeof(float));
      else std::copy_n(from, left, to);
    }
  }

  __attribute__((always_inline)) void run(int64_t column) const {
    Vec sums[W];
    add<true>(column, 0, p.weights.inner, sums);
    finish(column, sums);
  }

  // Columns first ... end - 1, for rows of x that are longer than the first-level cache holds: part after part of them.
  void run_in_parts(int64_t first, int64_t end, int64_t length) const {
    Vec sums[TOGETHER * R];
    int64_t inner = p.weights.inner;
    for (int64_t from = 0; from < inner; from += length) {
      int64_t to = std::min(inner, from + length);
      for (int64_t column = first; column < end; column += COLUMNS) {
        Vec* part = sums + (column - first) * R;
        if (from) add<false>(column, from, to, part);
        else add<true>(column, from, to, part);
      }
    }
    for (int64_t column = first; column < end; column += COLUMNS) finish(column, sums + (column - first) * R);
  }
};

template <int R, bool FRESH, typename Block>
void rows_by_block(const Linear& p, const Block& block, const Columns& columns, int64_t row) {
  Tile<R, FRESH, Block> tile{p, block, columns, row};
  constexpr int64_t FITS = NEAR_BYTES / sizeof(float) / R;
  constexpr bool PLAIN = decltype(block.row(0))::STEP > 16;  // codes are read from their row's beginning on
  int64_t inner = p.weights.inner;
  if (PLAIN && R > 2 && 2 * inner > 3 * FITS) {
    int64_t parts = (inner + FITS - 1) / FITS, length = round_up((inner + parts - 1) / parts, W);
    for (int64_t c = 0; c < columns.count; c += TOGETHER) tile.run_in_parts(c, std::min(columns.count, c + TOGETHER), length);
    return;
  }
  for (int64_t column = 0; column < columns.count; column += tile.COLUMNS) tile.run(column);
}

// Rows of x from `row` on; the first tile of them brings the block into the core's cache.
template <typename Block>
void multiply(const Linear& p, const Block& block, const Columns& columns, int64_t row, int64_t end) {
  auto tile = [&](auto rows, auto fresh) { rows_by_block<rows, fresh>(p, block, columns, row), row += rows; };
  auto last = [&](auto fresh) {
    if (end - row == 2) tile(std::integral_constant<int, 2>{}, fresh);
    if (end - row == 1) tile(std::integral_constant<int, 1>{}, fresh);
  };
  constexpr std::integral_constant<int, TILE> full{};
  constexpr std::integral_constant<int, TALL> tall{};
  if (end - row <= 2) return last(std::true_type{});
  if (end - row > TILE) tile(tall, std::true_type{});
  else tile(full, std::true_type{});
  while (end - row > TILE) tile(tall, std::false_type{});
  while (end - row > 2) tile(full, std::false_type{});
  last(std::false_type{});
}

// Row c of a block in float32.
template <typename Row>
void widen_row(Row row, int64_t inner, float* out) {
  int64_t k = 0;
  for (; k + W <= inner; k += W) {
    if (k % 16 == 0) row.begin(k);
    store(out + k, row.all(k));
  }
  if (k == inner) return;
  if (k % 16 == 0) row.begin(k);
  float t[W];
  store(t, row.part(k, inner - k));
  std::copy_n(t, inner - k, out + k);
}

// Widening 16-bit weights takes no time beside the multiplications of a tile: 8 to 32 rows are faster without a copy.
bool widens(const Linear& p, int64_t rows) { return has_codes(p.weights) && rows >= WIDEN_FROM; }

void run(const Linear& p, int64_t threads) {
  if (p.rows * p.weights.inner * p.weights.outer < SINGLE_WORK) threads = 1;
  int64_t width = columns_of_unit(p, threads), outer = p.weights.outer;
  int64_t blocks = (outer + width - 1) / width, bands = (p.rows + ROWS_PER_UNIT - 1) / ROWS_PER_UNIT;
#pragma omp parallel num_threads(threads)
  {
    Scratch widened(widened_floats(p, width));
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks * bands; ++i) {
      int64_t first = i / bands * width, row = i % bands * ROWS_PER_UNIT;
      linear_columns(p, first, std::min(width, outer - first), row, std::min(p.rows, row + ROWS_PER_UNIT), widened.data);
    }
  }
}

}  // namespace

int64_t widened_floats(const Linear& p, int64_t count) { return widens(p, p.rows) ? count * p.weights.inner : 0; }

int64_t columns_of_unit(const Linear& p, int64_t threads) {
  int64_t fair = (p.weights.outer + 4 * threads - 1) / (4 * threads), fits = BLOCK_BYTES / 4 / std::max<int64_t>(1, p.weights.inner);
  return round_up(std::max<int64_t>(1, std::min(fair, fits)), W);
}

void linear_columns(const Linear& p, int64_t first, int64_t count, int64_t row, int64_t end, float* widened) {
  bool wider = widens(p, end - row);
  with_block(p.weights, [&](const auto& block) {
    if (!wider) return multiply(p, block, {first, count, first}, row, end);
    for (int64_t c = 0; c < count; ++c) widen_row(block.row(first + c), p.weights.inner, widened + c * p.weights.inner);
  });
  if (wider) multiply(p, PlainBlock<float>{widened, p.weights.inner}, {first, count, 0}, row, end);
}

// out `[rows, outer]` = x `[rows, inner]` (rows x_stride elements apart) times weight `[outer, inner]` (element type
// `kind`) transposed, plus bias `[outer]` or null. Kinds 3 and 4 are codes: see `Weights` for scales, zeros and group.
extern "C" void opensala_linear(const float* x, const void* weight, int64_t kind, const float* scales, const float* zeros,
                                int64_t group, const float* bias, float* out, int64_t rows, int64_t inner, int64_t outer,
                                int64_t x_stride, int64_t threads) {
  run({x, {weight, kind, scales, zeros, group, bias, outer, inner}, out, rows, x_stride, outer}, threads);
}

REPLAYABLE(opensala_linear)
