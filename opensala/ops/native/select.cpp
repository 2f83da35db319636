// Exact block selection on the CPU: every compressed key the query sees is scored.
//
// A thread takes a tile of queries of one kv head. First the softmax denominator of each (query, head) row is summed
// over the second level of compressed keys (or the first). Then panels of W blocks are scored and reduced to block
// scores, 4 bytes a block and query; the best blocks are found by a threshold that rises as candidates are met.
// Softmax is done in powers of two: s * scale * log2(e) goes into exp2.
#include "parts.h"
#include "replay.h"

namespace {

constexpr int PANEL = COLS * W;  // windows of a panel of the denominator pass
constexpr float SLACK = 30.0f;   // exponents above the reference of a sum that are let pass before it is raised

class Tile : public Scorer {
 public:
  using Scorer::choose;
  explicit Tile(const Unit& unit)
      : Scorer(unit, PANEL, unit.has_few()), peak_(queries() * s_.group()), mass_(queries() * s_.group() * W) {}

  void run() {
    sum();
    score_blocks(0, blocks());
    choose(scores_.data, row_stride_);
  }

  void lse(float* out) {
    sum();
    std::copy_n(lse_.data, queries() * s_.group(), out);
  }

  void scores(const float* lse, int64_t first, int64_t last, float* out, int64_t stride) {
    std::copy_n(lse, queries() * s_.group(), lse_.data);
    // The last window of the panel before reaches into the first block.
    score_blocks(std::max<int64_t>(0, first - W), last);
    for (int64_t t = 0; t < queries(); ++t)
      std::copy_n(scores_.data + t * row_stride_ + first, last - first, out + t * stride + first);
  }

 private:
  Scratch peak_, mass_;

  int64_t blocks() const { return s_.position(last_ - 1) / s_.block_size + 1; }

  void sum() {
    bool level2 = s_.coarse && seen(s_.position(first_), 4 * s_.kernel, 4 * s_.stride) > 0;
    Rows keys = level2 ? s_.k2.head(head_ * s_.k2_head) : keys1();
    int64_t factor = level2 ? 4 : 1;
    with_type(keys.kind, [&](auto type) { denominators<decltype(type)>(keys, factor * s_.kernel, factor * s_.stride); });
  }

  // lse_[row]: log2 of the sum of 2^(s * factor) over the windows of one level that the row's query sees.
  template <typename T>
  void denominators(const Rows& keys, int64_t kernel, int64_t step) {
    int64_t rows = (last_ - first_) * s_.group();
    std::fill_n(mass_.data, rows * W, 0.0f);
    std::fill_n(peak_.data, rows, -INF);
    int64_t most = seen(s_.position(last_ - 1), kernel, step), least = seen(s_.position(first_), kernel, step);
    Vec factor = splat(s_.factor);
    Walk<T> walk(keys, PANEL);
    if (few_) walk.advance(0, most);
    for (int64_t w = 0; w < most; w += PANEL) {
      if (few_) multiply_few(walk, w + PANEL, most, W, 1, products_.data);
      else pack_transposed(packable(keys), w, 1, int(std::min<int64_t>(PANEL, most - w)), PANEL, depth(), panel_.data, PANEL);
      for (int64_t row = 0; row < rows; row += CHUNK) {
        int count = int(std::min<int64_t>(CHUNK, rows - row));
        if (!few_) multiply([&](int r) { return query(row + r); }, count, PANEL);
        for (int r = 0; r < count; ++r) {
          float* x = products_.data + r * PANEL;
          if (w + PANEL > least) {
            int64_t visible = seen(s_.position(first_ + (row + r) / s_.group()), kernel, step) - w;
            if (visible <= 0) continue;
            for (int64_t j = visible; j < PANEL; ++j) x[j] = -INF;
          }
          Vec high = load(x);
          for (int j = W; j < PANEL; j += W) high = larger(high, load(x + j));
          float& peak = peak_.data[row + r];
          float* mass = mass_.data + (row + r) * W;  // sums lane by lane, added up at the end
          if (peak == -INF || lanes_at_least(high * factor, splat(peak + SLACK))) {
            float old = peak;
            peak = std::max(old, largest(high) * s_.factor);
            if (peak > old) store(mass, load(mass) * splat(std::exp2(old - peak)));
          }
          Vec sum = load(mass), shift = splat(peak);
          for (int j = 0; j < PANEL; j += W) sum += exp2_below(load(x + j) * factor - shift);
          store(mass, sum);
        }
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      float sum = total(load(mass_.data + row * W));
      lse_.data[row] = sum > 0 ? peak_.data[row] + std::log2(sum) : 0.0f;
    }
  }

  // Block scores: maximum over the windows that touch the block of the probabilities summed over heads.
  void score_blocks(int64_t from, int64_t to) {
    with_type(s_.k1.kind, [&](auto type) { score_blocks_of<decltype(type)>(from, to); });
  }

  template <typename T>
  void score_blocks_of(int64_t from, int64_t to) {
    int64_t group = s_.group(), columns = W * s_.ratio(), queries = last_ - first_, windows = visible(queries - 1);
    std::fill_n(carry_.data, queries * W, -INF);
    int64_t together = std::max<int64_t>(1, CHUNK / group);
    Walk<T> walk(keys1(), columns);
    if (few_) walk.advance(from * s_.ratio(), windows - from * s_.ratio());
    for (int64_t block = from; block < to; block += W) {
      if (few_) multiply_few_blocks(walk, (block + W) * s_.ratio(), windows);
      else pack_panel(block, windows);
      for (int64_t t = 0; t < queries; t += together) {
        int64_t many = std::min(together, queries - t);
        if (!few_) multiply([&](int r) { return query(t * group + r); }, int(many * group), int(columns));
        for (int64_t i = 0; i < many; ++i) pool(t + i, i * group, block, visible(t + i));
      }
    }
  }
};

void select_all(const std::vector<Selection>& selections, int64_t tile_rows, int64_t threads) {
  std::vector<Unit> units;
  int64_t tokens = 0;
  for (const Selection& s : selections) tokens += s.tokens;
  for (const Selection& s : selections) {
    int64_t everything = take_all(s, 0, s.kv_heads);
    // No tile holds both queries that see a window of the second level and queries that do not.
    int64_t level2 = std::min(s.tokens, std::max(everything, 4 * s.kernel - 1 - s.first));
    cut(units, s, everything, level2, tokens, tile_rows, threads);
    cut(units, s, level2, s.tokens, tokens, tile_rows, threads);
  }
  for_each_unit(units, threads, [](const Unit& unit) { Tile(unit).run(); });
}

}  // namespace

void select_tile(const Unit& unit) { Tile(unit).run(); }
void select_lse(const Unit& unit, float* lse) { Tile(unit).lse(lse); }
void select_scores(const Unit& unit, const float* lse, int64_t first, int64_t last, float* scores, int64_t stride) {
  Tile(unit).scores(lse, first, last, scores, stride);
}
void select_best(const Unit& unit, const float* scores, int64_t stride) { Tile(unit).choose(scores, stride); }

// Queries at positions first ... first + tokens - 1; out `[T, Hkv, num_blocks]`, ascending, padded with -1.
extern "C" void opensala_select(
    const float* q, const void* k1, const void* k2, int64_t kind, int32_t* out, int64_t tokens, int64_t first, int64_t heads,
    int64_t kv_heads, int64_t dim, int64_t k1_window, int64_t k1_head, int64_t k2_window, int64_t k2_head, int64_t size,
    int64_t stride, int64_t kernel, int64_t init, int64_t window_blocks, int64_t num_blocks, int64_t coarse, float factor,
    int64_t tile_rows, int64_t threads) {
  Selection s{q,    {k1, kind, k1_window}, {k2, kind, k2_window}, k1_head, k2_head, tokens, first, heads, kv_heads, dim, size,
              stride, kernel, init, window_blocks, num_blocks, coarse != 0, factor, out};
  select_all({s}, tile_rows, threads);
}

// The sparse sequences of a page table; rows of the others become -1.
extern "C" void opensala_select_paged(
    const float* q, const void* k1, const void* k2, int64_t kind, int32_t* out, const int32_t* cu_seqlens,
    const int32_t* lengths, const int32_t* pages, const int32_t* sparse, int64_t sequences, int64_t table_width, int64_t heads,
    int64_t kv_heads, int64_t dim, int64_t k1_page, int64_t k1_window, int64_t k1_head, int64_t k2_page, int64_t k2_window,
    int64_t k2_head, int64_t size, int64_t stride, int64_t kernel, int64_t init, int64_t window_blocks, int64_t num_blocks,
    int64_t coarse, float factor, int64_t narrow, int64_t tile_rows, int64_t threads) {
  Selection like{q,    {k1, kind, k1_window}, {k2, kind, k2_window}, k1_head, k2_head, 0, 0, heads, kv_heads, dim, size,
                 stride, kernel, init, window_blocks, num_blocks, coarse != 0, factor, out, narrow != 0};
  PageTable table{cu_seqlens, lengths, pages, sparse, sequences, table_width};
  select_all(paged_selections(table, like, k1_page, k2_page), tile_rows, threads);
}

REPLAYABLE(opensala_select_paged)
