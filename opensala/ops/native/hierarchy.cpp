// Hierarchical block selection on the CPU: regions of 16 blocks first, compressed keys only inside promising ones.
//
// Of every region the mean, the variance, the maximum and the minimum of its compressed keys are taken, dimension by
// dimension. For a query these give the expected score e of a window in the region, its spread s and an upper bound u.
// Half of the regions looked into are those with the largest e + 2 s (summed over heads as probabilities), half, of
// the others, those with the largest u. The softmax denominator comes from the regions too: a sum of exp(e + s^2 / 2).
// The statement this follows is `naive_select_regions` in ops/sparse/naive.py.
#include "replay.h"
#include "select.h"

namespace {

constexpr int64_t REGION = 16;      // blocks
constexpr int PANEL = COLS * W;     // regions whose statistics lie side by side
constexpr float LIMIT = 100.0f;     // exponents of 2 are cut here before they are summed over heads

// Statistics of the full regions of one kv head: panels [D][PANEL] of each kind, ready to be multiplied.
struct Statistics {
  Rows keys;
  int64_t windows_each, regions, dim;
  std::vector<float> mean, variance, high, low;

  Statistics(const Selection& s, int64_t head)
      : keys(s.k1.head(head * s.k1_head)), windows_each(REGION * s.ratio()),
        regions(seen(s.position(s.tokens - 1), s.kernel, s.stride) / windows_each), dim(s.dim) {
    int64_t panels = (regions + PANEL - 1) / PANEL, size = panels * dim * PANEL;
    for (auto* x : {&mean, &variance, &high, &low}) x->assign(size, 0.0f);
  }

  // Called by all threads of a team, which share the regions.
  void gather() {
#pragma omp for nowait
    for (int64_t r = 0; r < regions; ++r) {
      std::vector<float> sum(dim, 0.0f), square(dim, 0.0f), top(dim, -INF), bottom(dim, INF), x_all(windows_each * dim);
      pack_rows(keys, r * windows_each, int(windows_each), dim, x_all.data(), dim);
      for (int64_t j = 0; j < windows_each; ++j)
        for (int64_t d = 0; d < dim; ++d) {
          float x = x_all[j * dim + d];
          sum[d] += x, top[d] = std::max(top[d], x), bottom[d] = std::min(bottom[d], x);
        }
      for (int64_t d = 0; d < dim; ++d) sum[d] /= float(windows_each);
      for (int64_t j = 0; j < windows_each; ++j)
        for (int64_t d = 0; d < dim; ++d) {
          float x = x_all[j * dim + d] - sum[d];
          square[d] += x * x;
        }
      int64_t base = r / PANEL * dim * PANEL + r % PANEL;
      for (int64_t d = 0; d < dim; ++d) {
        int64_t to = base + d * PANEL;
        mean[to] = sum[d], variance[to] = square[d] / float(windows_each), high[to] = top[d], low[to] = bottom[d];
      }
    }
  }
};

class RegionTile : public Scorer {
 public:
  RegionTile(const Unit& unit, const Statistics& statistics, int64_t budget)
      : Scorer(unit, W * unit.s->ratio(), false), statistics_(statistics), budget_(budget),
        padded_(round_up(std::max<int64_t>(1, statistics.regions), PANEL)), rows_of_(rows() * s_.dim),
        expected_(rows() * padded_), spread_(rows() * padded_), bound_(rows() * padded_) {}

  void run() {
    region_scores();
    pick();
    score();
    choose(scores_.data, row_stride_);
  }

 private:
  const Statistics& statistics_;
  int64_t budget_, padded_;
  Scratch rows_of_, expected_, spread_, bound_;
  std::vector<std::pair<int32_t, int32_t>> pairs_;  // (region, query of the tile)
  std::vector<int32_t> start_, by_region_;          // the same by region: queries by_region_[start_[r]] ... start_[r + 1]
  std::vector<std::pair<float, int32_t>> order_;

  int64_t rows() const { return queries() * s_.group(); }
  int64_t complete(int64_t t) const { return visible(t) / statistics_.windows_each; }

  // out[row][region] (+)= f(query row) . panel of statistics
  template <bool ADD, typename F>
  void against(const std::vector<float>& panels, int64_t panels_used, const F& f, Scratch& out) {
    int64_t dim = s_.dim;
    for (int64_t row = 0; row < rows(); ++row) {
      const float* q = query(row);
      for (int64_t d = 0; d < dim; ++d) rows_of_.data[row * dim + d] = f(q[d]);
    }
    for (int64_t p = 0; p < panels_used; ++p)
      product<ADD>([&](int r, int64_t k) { return rows_of_.data[r * dim + k]; }, int(rows()), dim, panels.data() + p * dim * PANEL,
                   PANEL, [&](int r) { return out.data + r * padded_ + p * PANEL; }, PANEL);
  }

  // Per row and region: expected score, spread and bound, in powers of two; lse_ per row.
  void region_scores() {
    const Statistics& st = statistics_;
    int64_t used = (complete(queries() - 1) + PANEL - 1) / PANEL;
    float f = s_.factor;
    against<false>(st.mean, used, [f](float q) { return q * f; }, expected_);
    against<false>(st.variance, used, [f](float q) { return q * q * f * f; }, spread_);
    against<false>(st.high, used, [f](float q) { return std::max(q * f, 0.0f); }, bound_);
    against<true>(st.low, used, [f](float q) { return std::min(q * f, 0.0f); }, bound_);
    const float half = 0.5f * 0.6931471805599453f;  // the variance enters as s^2 / 2 in natural units
    for (int64_t row = 0; row < rows(); ++row) {
      int64_t n = complete(row / s_.group());
      const float *e = expected_.data + row * padded_, *v = spread_.data + row * padded_;
      float peak = -INF, sum = 0;
      for (int64_t r = 0; r < n; ++r) peak = std::max(peak, e[r] + half * v[r]);
      int64_t r = 0;
      Vec sums{}, shift = splat(peak), weight = splat(half);
      for (; r + W <= n; r += W) sums += exp2_below(load(e + r) + weight * load(v + r) - shift);
      for (; r < n; ++r) sum += std::exp2(e[r] + half * v[r] - peak);
      lse_.data[row] = n ? peak + std::log2(sum + total(sums)) : 0.0f;
    }
  }

  // The best `count` of regions [0, n) by a score that the heads share, not among those taken already.
  template <typename Exponent>
  void best_regions(int64_t t, int64_t n, int64_t count, std::vector<char>& taken, const Exponent& exponent) {
    Vec limit = splat(LIMIT);
    int64_t group = s_.group();
    float lanes[W];
    order_.clear();
    for (int64_t r = 0; r < n; r += W) {
      Vec p{};
      for (int64_t g = 0; g < group; ++g) {
        Vec x = exponent(t * group + g, r) - splat(lse_.data[t * group + g]);
        p += exp2_below(x > limit ? limit : x);
      }
      store(lanes, p);
      for (int64_t i = r; i < std::min(n, r + W); ++i)
        if (!taken[i]) order_.push_back({lanes[i - r], int32_t(i)});
    }
    auto before = [](const auto& a, const auto& b) { return a.first > b.first || (a.first == b.first && a.second < b.second); };
    count = std::min<int64_t>(count, order_.size());
    std::nth_element(order_.begin(), order_.begin() + count, order_.end(), before);
    for (int64_t i = 0; i < count; ++i) {
      taken[order_[i].second] = 1;
      pairs_.push_back({order_[i].second, int32_t(t)});
    }
  }

  void pick() {
    pairs_.clear();
    std::vector<char> taken(padded_);
    for (int64_t t = 0; t < queries(); ++t) {
      int64_t n = complete(t), all = s_.position(first_ + t) / s_.block_size / REGION;
      for (int64_t r = n; r <= all; ++r) pairs_.push_back({int32_t(r), int32_t(t)});  // not complete: always looked into
      if (n <= budget_) {
        for (int64_t r = 0; r < n; ++r) pairs_.push_back({int32_t(r), int32_t(t)});
        continue;
      }
      std::fill(taken.begin(), taken.end(), 0);
      best_regions(t, n, budget_ / 2, taken, [&](int64_t row, int64_t r) {
        Vec e = load(expected_.data + row * padded_ + r), v = load(spread_.data + row * padded_ + r);
        Vec s;
        for (int i = 0; i < W; ++i) s[i] = std::sqrt(v[i]);
        return e + s + s;
      });
      best_regions(t, n, budget_ - budget_ / 2, taken, [&](int64_t row, int64_t r) { return load(bound_.data + row * padded_ + r); });
    }
    // Counting sort by region; within a region the queries stay in order.
    start_.assign(s_.position(last_ - 1) / s_.block_size / REGION + 3, 0);
    for (auto [region, t] : pairs_) ++start_[region + 2];
    for (size_t r = 2; r < start_.size(); ++r) start_[r] += start_[r - 1];
    by_region_.resize(pairs_.size());
    for (auto [region, t] : pairs_) by_region_[start_[region + 1]++] = t;
  }

  // The window before a region's first block reaches into that block: its probability for one query.
  float before(int64_t t, int64_t window, const float* key) const {
    if (window < 0 || window >= visible(t)) return -INF;
    float p = 0;
    for (int64_t g = 0; g < s_.group(); ++g) {
      const float* q = query(t * s_.group() + g);
      Vec sums{};
      int64_t d = 0;
      for (; d + W <= s_.dim; d += W) sums += load(q + d) * load(key + d);
      float dot = total(sums);
      for (; d < s_.dim; ++d) dot += q[d] * key[d];
      p += std::exp2(std::min(dot * s_.factor - lse_.data[t * s_.group() + g], 127.0f));
    }
    return std::min(p, LARGEST);
  }

  void score() {
    int64_t group = s_.group(), columns = W * s_.ratio(), windows = visible(queries() - 1);
    int64_t blocks = s_.position(last_ - 1) / s_.block_size + 1, together = std::max<int64_t>(1, CHUNK / group);
    for (int64_t t = 0; t < queries(); ++t) std::fill_n(scores_.data + t * row_stride_, row_stride_, -INF);
    for (int64_t first_block = 0; first_block < blocks; first_block += REGION) {
      int64_t a = start_[first_block / REGION], b = start_[first_block / REGION + 1];
      if (a == b) continue;
      int64_t window = first_block * s_.ratio() - 1;
      float* key = panel_.data;  // free at this moment
      if (window >= 0) pack_rows(keys1(), window, 1, s_.dim, key, s_.dim);
      for (int64_t i = a; i < b; ++i) carry_.data[(by_region_[i] + 1) * W - 1] = before(by_region_[i], window, key);
      for (int64_t block = first_block; block < std::min(blocks, first_block + REGION); block += W) {
        pack_panel(block, windows);
        for (int64_t i = a; i < b; i += together) {
          int64_t many = std::min(together, b - i);
          multiply([&](int r) { return query(by_region_[i + r / group] * group + r % group); }, int(many * group),
                         int(columns));
          for (int64_t j = 0; j < many; ++j) {
            int64_t t = by_region_[i + j];
            pool(t, j * group, block, visible(t));
          }
        }
      }
    }
  }
};

void select_all(const std::vector<Selection>& selections, int64_t budget, int64_t tile_rows, int64_t threads) {
  std::vector<Unit> units;
  std::vector<Statistics> statistics;  // of every kv head of every sequence
  int64_t tokens = 0;
  for (const Selection& s : selections) tokens += s.tokens;
  for (const Selection& s : selections) {
    cut(units, s, take_all(s, 0, s.kv_heads), s.tokens, tokens, tile_rows, threads);
    for (int64_t head = 0; head < s.kv_heads; ++head) statistics.emplace_back(s, head);
  }
  if (units.empty()) return;
#pragma omp parallel num_threads(threads)
  for (Statistics& one : statistics) one.gather();
  for_each_unit(units, threads, [&](const Unit& unit) {
    RegionTile(unit, statistics[(unit.s - selections.data()) * unit.s->kv_heads + unit.head], budget).run();
  });
}

}  // namespace

// As `opensala_select`, looking into at most `budget` complete regions for each query.
extern "C" void opensala_select_regions(
    const float* q, const void* k1, int64_t kind, int32_t* out, int64_t tokens, int64_t first, int64_t heads, int64_t kv_heads,
    int64_t dim, int64_t k1_window, int64_t k1_head, int64_t size, int64_t stride, int64_t kernel, int64_t init,
    int64_t window_blocks, int64_t num_blocks, float factor, int64_t budget, int64_t tile_rows, int64_t threads) {
  Selection s{q,    {k1, kind, k1_window}, {}, k1_head, 0, tokens, first, heads, kv_heads, dim, size, stride, kernel, init,
              window_blocks, num_blocks, false, factor, out};
  select_all({s}, budget, tile_rows, threads);
}

// As `opensala_select_paged`.
extern "C" void opensala_select_regions_paged(
    const float* q, const void* k1, int64_t kind, int32_t* out, const int32_t* cu_seqlens, const int32_t* lengths,
    const int32_t* pages, const int32_t* sparse, int64_t sequences, int64_t table_width, int64_t heads, int64_t kv_heads,
    int64_t dim, int64_t k1_page, int64_t k1_window, int64_t k1_head, int64_t size, int64_t stride, int64_t kernel,
    int64_t init, int64_t window_blocks, int64_t num_blocks, float factor, int64_t budget, int64_t tile_rows, int64_t threads) {
  Selection like{q,    {k1, kind, k1_window}, {}, k1_head, 0, 0, 0, heads, kv_heads, dim, size, stride, kernel, init,
                 window_blocks, num_blocks, false, factor, out};
  PageTable table{cu_seqlens, lengths, pages, sparse, sequences, table_width};
  select_all(paged_selections(table, like, k1_page, 0), budget, tile_rows, threads);
}

REPLAYABLE(opensala_select_regions_paged)
