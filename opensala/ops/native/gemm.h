// Small products for the attention kernels: operands in cache, a register tile of ROWS x COLS vectors.
//
// C[r, :] (+)= sum_k A(r, k) * B[k, :]. B is row-major with a leading dimension; A is given as a function of
// (row, k), because its rows lie scattered (the queries that chose a block) or transposed (gradients of keys).
#pragma once
#include <cstdlib>

#include "vec.h"

#define INLINE __attribute__((always_inline)) static inline

// What a product does with two numbers, and with two pairs of bfloat16.
struct OfFloats {
  INLINE Vec add(Vec sum, Vec a, Vec b) { return sum + a * b; }
};
struct OfPairs {
  INLINE Vec add(Vec sum, Vec a, Vec b) { return add_pairs(sum, a, b); }
};

template <int R, int C, bool ADD, typename Of, typename A, typename B, typename Out>
INLINE void product_tile(const A& a, int64_t depth, const B* b, int64_t ldb, const Out& out, int row, int column) {
  Vec acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = ADD ? load(out(row + r) + column + c * W) : Vec{};
  b += column;
  for (int64_t k = 0; k < depth; ++k, b += ldb) {
    Vec x[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) x[c] = load_wide(b + c * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec y = splat(a(row + r, k));
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = Of::add(acc[r][c], y, x[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(out(row + r) + column + c * W, acc[r][c]);
}

template <int R, bool ADD, typename Of, typename A, typename B, typename Out>
INLINE void product_rows(const A& a, int64_t depth, const B* b, int64_t ldb, const Out& out, int row, int columns) {
  int column = 0;
  for (; column + COLS * W <= columns; column += COLS * W)
    product_tile<R, COLS, ADD, Of>(a, depth, b, ldb, out, row, column);
  for (; column < columns; column += W) product_tile<R, 1, ADD, Of>(a, depth, b, ldb, out, row, column);
}

// out(r)[0 .. columns) (+)= sum over k < depth of a(r, k) * b[k * ldb ...]; columns is a multiple of W. b is widened as it is
// read. Of pairs, a and b hold two numbers each.
template <bool ADD, typename Of = OfFloats, typename A, typename B, typename Out>
static void product(const A& a, int rows, int64_t depth, const B* b, int64_t ldb, const Out& out, int columns) {
  int row = 0;
  for (; row + ROWS <= rows; row += ROWS) product_rows<ROWS, ADD, Of>(a, depth, b, ldb, out, row, columns);
  // Three together (the query heads of a small group) keep enough sums under way; one row alone waits for its own.
  if (rows - row >= 3 && (rows - row) % 2) product_rows<3, ADD, Of>(a, depth, b, ldb, out, row, columns), row += 3;
  for (; row + 2 <= rows; row += 2) product_rows<2, ADD, Of>(a, depth, b, ldb, out, row, columns);
  if (row < rows) product_rows<1, ADD, Of>(a, depth, b, ldb, out, row, columns);
}

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Element types of keys and values: 0 float32, 1 bfloat16, 2 float16, 3 int8 with a float32 scale behind each row.
constexpr int64_t BFLOAT16 = 1, INT8 = 3, SCALE_BYTES = 4;
static inline int64_t item_bytes(int64_t kind) { return kind == INT8 ? 1 : kind ? 2 : 4; }

// Calls use(T{}) with the element type, which is not int8.
template <typename Use>
static void with_type(int64_t kind, const Use& use) {
  if (kind == 1) use(BFloat16{});
  else if (kind == 2) use(Float16{});
  else use(0.0f);
}

// Rows of a page that are read soon: bytes of a row, from row to row, and how many there are. Pages lie apart, so the
// processor does not foresee them. Asking is always inlined: GCC takes a function that only asks for memory for one that
// does nothing, and drops the calls.
struct Ahead {
  const char* first = nullptr;
  int64_t bytes = 0, stride = 0, count = 0;
  template <int LEVEL = 2>  // as __builtin_prefetch counts: 3 is the first-level cache
  __attribute__((always_inline)) void fetch(int64_t row, int64_t rows) const {
    for (int64_t end = std::min(row + rows, count); row < end; ++row)
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(first + row * stride + at, 0, LEVEL);
  }
};

// Rows of one head of a tensor of any element type: one behind the other, or in the pages of one sequence.
struct Rows {
  const void* data;
  int64_t kind, stride;  // element type; elements from row to row
  const int32_t* pages = nullptr;  // row i lies where token i * step + last belongs
  int64_t page_stride = 0;
  uint32_t page_size = 1, step = 1, last = 0;  // tokens; a page has a slot for every `step` of them
  template <typename T>
  const T* at(int64_t row) const {
    const T* first = static_cast<const T*>(data);
    if (!pages) return first + row * stride;
    uint32_t token = uint32_t(row) * step + last, page = token / page_size;
    return first + pages[page] * page_stride + (token - page * page_size) / step * stride;
  }
  // Pointers to `count` rows, every `by`th from `first` on. Walks through the pages, for divisions take more time than what
  // is done with a row.
  template <typename T>
  void find(int64_t first, int64_t by, int count, const T** out) const {
    uint32_t rows = page_size / step;  // of a page
    if (!pages || rows * step != page_size || uint32_t(by) > rows) {
      for (int i = 0; i < count; ++i) out[i] = at<T>(first + i * by);
      return;
    }
    uint32_t row = uint32_t(first) + last / step, page = row / rows, slot = row - page * rows;
    for (int i = 0; i < count; ++page, slot -= rows) {
      const T* start = static_cast<const T*>(data) + pages[page] * page_stride;
      for (; slot < rows && i < count; ++i, slot += uint32_t(by)) out[i] = start + slot * stride;
    }
  }
  // `count` rows from `first` on, which lie in one page.
  Ahead ahead(int64_t first, int64_t count, int64_t width) const {
    int64_t item = item_bytes(kind), bytes = width * item + (kind == INT8 ? SCALE_BYTES : 0);
    const void* start = at<float>(first);
    if (kind) start = kind == INT8 ? static_cast<const void*>(at<int8_t>(first)) : at<BFloat16>(first);
    return {static_cast<const char*>(start), bytes, stride * item, count};
  }
  Rows head(int64_t offset) const {  // the same rows, `offset` elements further
    Rows moved = *this;
    moved.data = static_cast<const char*>(data) + offset * item_bytes(kind);
    return moved;
  }
  // Rows of bfloat16 as rows of half as many pairs, which are moved as float32 is. Asks that `pairs` holds.
  Rows as_pairs() const {
    Rows moved = *this;
    moved.kind = 0, moved.stride /= 2, moved.page_stride /= 2;
    return moved;
  }
  // Whether they are rows of bfloat16 of an even number of columns, and even numbers apart.
  bool pairs(int64_t depth) const {
    return MULTIPLIES_PAIRS && kind == BFLOAT16 && !(depth % 2 || stride % 2 || page_stride % 2 || uintptr_t(data) % 4);
  }
  Int8Row int8_row(int64_t row, int64_t width) const { return Int8Row::at(at<int8_t>(row), width); }
};

// out[k * ldo + i] = rows[i][k] for i < W, 0 for those from `here` on.
template <bool FULL, typename Pointer>
INLINE void turn_rows(const Pointer* rows, int here, int64_t depth, float* out, int64_t ldo) {
  int64_t k = 0;
  for (; k + W <= depth; k += W) {
    Vec v[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = FULL || i < here ? load_wide(rows[i] + k) : Vec{};
    transpose_square(v);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) store(out + (k + i) * ldo, v[i]);
  }
  for (; k < depth; ++k)
    for (int i = 0; i < W; ++i) out[k * ldo + i] = FULL || i < here ? widen(rows[i][k]) : 0.0f;
}

// out[k * ldo + j] = row(j)[k] for j < count, 0 for count <= j < padded; padded is a multiple of W. find(j, n, rows) finds
// rows j ... j + n - 1. Where `ahead` says so, as much of what will be read next is asked for meanwhile.
template <typename Pointer, typename Find>
static void pack_found(const Find& find, int count, int padded, int64_t depth, float* out, int64_t ldo, const Ahead& ahead) {
  for (int j = 0; j < padded; j += W) {
    int here = std::min(W, std::max(0, count - j));
    Pointer rows[W];
    find(j, here, rows);
    ahead.fetch(j, W);
    if (here == W) turn_rows<true>(rows, W, depth, out + j, ldo);
    else turn_rows<false>(rows, here, depth, out + j, ldo);
  }
}

template <typename Row>
static void pack_transposed(const Row& row, int count, int padded, int64_t depth, float* out, int64_t ldo,
                            const Ahead& ahead = {}) {
  auto find = [&](int j, int n, auto* rows) {
    for (int i = 0; i < n; ++i) rows[i] = row(j + i);
  };
  pack_found<decltype(row(0))>(find, count, padded, depth, out, ldo, ahead);
}

// out[j * ldo + k] = row(j)[k], zero-padded to ldo columns and `padded` rows.
template <typename Row>
static void pack_rows(const Row& row, int count, int padded, int64_t depth, float* out, int64_t ldo,
                      const Ahead& ahead = {}) {
  for (int j = 0; j < padded; ++j) {
    ahead.fetch(j, 1);
    int64_t k = 0;
    if (j < count) {
      auto p = row(j);
      for (; k + W <= depth; k += W) store(out + j * ldo + k, load_wide(p + k));
      for (; k < depth; ++k) out[j * ldo + k] = widen(p[k]);
    }
    for (; k < ldo; ++k) out[j * ldo + k] = 0.0f;
  }
}

// Blocks of memory that were used before, by the power of two that is their size: a thread keeps some of each. The system
// takes longer to give a block, and to take it back, than a small piece of work takes to use it.
class Blocks {
 public:
  ~Blocks() {
    for (int power = 0; power < POWERS; ++power)
      for (int i = 0; i < count_[power]; ++i) std::free(kept_[power][i]);
  }
  void* take(int64_t bytes) {
    int power = power_of(bytes);
    if (power < POWERS && count_[power]) return kept_[power][--count_[power]];
    return std::aligned_alloc(64, power < POWERS ? LEAST << power : round_up(bytes, 64));
  }
  void put_back(void* block, int64_t bytes) {
    int power = power_of(bytes);
    if (power < POWERS && count_[power] < MOST) kept_[power][count_[power]++] = block;
    else std::free(block);
  }

 private:
  static constexpr int64_t LEAST = 256;
  static constexpr int POWERS = 11, MOST = 8;  // up to 256 KB; blocks of each
  static int power_of(int64_t bytes) {
    int power = 0;
    while ((LEAST << power) < bytes) ++power;
    return power;
  }
  void* kept_[POWERS][MOST];
  int count_[POWERS] = {};
};
inline thread_local Blocks blocks_of_thread;

// Scratch memory of one thread, aligned to cache lines.
struct Scratch {
  float* data;
  explicit Scratch(int64_t floats) : data(static_cast<float*>(blocks_of_thread.take(floats * 4 + 64))), bytes_(floats * 4 + 64) {}
  ~Scratch() { blocks_of_thread.put_back(data, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  int64_t bytes_;
};

// The same for rows first, first + step, ... of a tensor of any element type.
static void pack_transposed(const Rows& x, int64_t first, int64_t step, int count, int padded, int64_t depth, float* out,
                            int64_t ldo, const Ahead& ahead = {}) {
  if (x.kind == INT8)
    return pack_transposed([&](int64_t j) { return x.int8_row(first + j * step, depth); }, count, padded, depth, out, ldo, ahead);
  with_type(x.kind, [&](auto type) {
    auto find = [&](int j, int n, const decltype(type)** rows) { x.find(first + j * step, step, n, rows); };
    pack_found<const decltype(type)*>(find, count, padded, depth, out, ldo, ahead);
  });
}

static void pack_rows(const Rows& x, int64_t first, int count, int64_t depth, float* out, int64_t ldo,
                      const Ahead& ahead = {}) {
  if (x.kind == INT8)
    return pack_rows([&](int64_t j) { return x.int8_row(first + j, depth); }, count, count, depth, out, ldo, ahead);
  with_type(x.kind, [&](auto type) {
    pack_rows([&](int64_t j) { return x.at<decltype(type)>(first + j); }, count, count, depth, out, ldo, ahead);
  });
}

// Rows of floats as rows of pairs of bfloat16 in `[count, depth / 2]`; depth is even.
template <typename Row>
static void narrow_to_pairs(const Row& row, int64_t count, int64_t depth, float* out) {
  for (int64_t r = 0; r < count; ++r) {
    const float* x = row(r);
    BFloat16* to = reinterpret_cast<BFloat16*>(out + r * (depth / 2));
    int64_t k = 0;
    for (; k + W <= depth; k += W) store_narrow(to + k, load(x + k));
    for (; k < depth; ++k) to[k] = narrowed<BFloat16>(x[k]);
  }
}

// out[j / 2 * ldo + k] = rows j and j + 1 of bfloat16 at k, as a pair; 0 for a row that is not there.
static void pack_row_pairs(const Rows& x, int64_t first, int count, int64_t depth, float* out, int64_t ldo, const Ahead& ahead) {
  for (int j = 0; j < count; j += 2) {
    ahead.fetch(j, 2);
    const BFloat16* a = x.at<BFloat16>(first + j);
    const BFloat16* b = j + 1 < count ? x.at<BFloat16>(first + j + 1) : nullptr;
    uint32_t* to = reinterpret_cast<uint32_t*>(out + j / 2 * ldo);
    for (int64_t k = 0; k < depth; ++k) to[k] = a[k].bits | (b ? uint32_t(b[k].bits) << 16 : 0);
    for (int64_t k = depth; k < ldo; ++k) to[k] = 0;
  }
}
