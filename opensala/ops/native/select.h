// What exact and hierarchical block selection share: the problem, the choice of the best blocks, pooling of one panel.
//
// Nothing that is computed for a query depends on the other queries of its tile, so tiles, threads and the other
// sequences of a call change no choice.
#pragma once
#include <functional>
#include <vector>

#include "few.h"
#include "pages.h"

// One sequence.
struct Selection {
  const float* q;  // [T, Hq, D]
  Rows k1, k2;              // compressed keys of head 0, a row a window
  int64_t k1_head, k2_head;  // elements from head to head
  int64_t tokens, first, heads, kv_heads, dim;     // first: position of query 0
  int64_t block_size, stride, kernel, init, window_blocks, num_blocks;
  bool coarse;
  float factor;  // scale * log2(e)
  int32_t* out;  // [T, Hkv, num_blocks], ascending, padded with -1
  bool narrow = false;  // queries may be rounded to bfloat16 where keys are that, and the processor multiplies it faster
  int64_t group() const { return heads / kv_heads; }
  int64_t ratio() const { return block_size / stride; }
  int64_t position(int64_t t) const { return first + t; }
};

// A tile of queries of one kv head of one sequence.
struct Unit {
  const Selection* s;
  int64_t first, last, head;
  int64_t cost() const { return (last - first) * s->position(last - 1); }
  int64_t blocks() const { return s->position(last - 1) / s->block_size + 1; }
  // Whether it has so few rows, as those of one token, that a panel of windows is not worth packing.
  bool has_few() const { return (last - first) * s->group() <= ROWS; }
};

// Full windows that end at or before a position.
static inline int64_t seen(int64_t position, int64_t kernel, int64_t stride) {
  return position + 1 < kernel ? 0 : (position + 1 - kernel) / stride + 1;
}

constexpr float LARGEST = 3e38f;  // finite stand-in for overflowing scores, below the infinity of forced blocks
constexpr int CHUNK = 48;         // rows whose scores against one panel lie in cache at once

// Best `wanted` entries of one query's block scores, as torch.topk orders them on a CPU; ascending block numbers.
class Best {
 public:
  // scores [blocks]; blocks before `init` and from `window` on are taken in any case.
  void choose(const float* scores, int64_t blocks, int64_t init, int64_t window, int64_t wanted, int32_t* out) {
    if (window < init) window = init;
    int64_t open = wanted - init - (blocks - window);  // places left for scored blocks
    if (open < 0 || !by_threshold(scores, init, window, open)) return by_sort(scores, blocks, init, window, wanted, out);
    int64_t n = 0;
    for (int64_t b = 0; b < init; ++b) out[n++] = int32_t(b);
    for (int32_t b : candidates_) out[n++] = b;
    for (int64_t b = window; b < blocks; ++b) out[n++] = int32_t(b);
  }

 private:
  static constexpr int SIDE = 4;  // vectors of maxima that grow side by side
  std::vector<int32_t> candidates_;  // blocks, ascending
  std::vector<float> values_;
  std::vector<std::pair<float, int64_t>> queue_;

  static float nth_largest(std::vector<float>& values, int64_t n) {
    std::nth_element(values.begin(), values.begin() + (n - 1), values.end(), std::greater<float>());
    return values[n - 1];
  }

  // A score that at least `open` of the scores reach, hardly more: the open-th largest of the maxima of equal parts.
  float lower_bound(const float* scores, int64_t count, int64_t open) {
    int64_t runs = (4 * open + SIDE * W - 1) / (SIDE * W), length = count / (runs * SIDE * W);  // of a run: vectors a side
    if (length < 2) return -INF;
    values_.resize(runs * SIDE * W);
    for (int64_t run = 0; run < runs; ++run) {
      const float* x = scores + run * length * SIDE * W;
      Vec high[SIDE];
      for (int i = 0; i < SIDE; ++i) high[i] = load(x + i * W);
      for (int64_t j = 1; j < length; ++j)
        for (int i = 0; i < SIDE; ++i) high[i] = larger(high[i], load(x + (j * SIDE + i) * W));
      for (int i = 0; i < SIDE; ++i) store(values_.data() + (run * SIDE + i) * W, high[i]);
    }
    return nth_largest(values_, open);
  }

  // Puts the best `open` blocks of [init, window) into candidates_; false if blocks tie there and more tie than there is room for.
  bool by_threshold(const float* scores, int64_t init, int64_t window, int64_t open) {
    candidates_.clear();
    if (open == 0) return true;
    if (open > window - init) return false;
    float edge = lower_bound(scores + init, window - init, open);
    int64_t b = init;
    for (; b + W <= window; b += W)
      for (uint32_t bits = lanes_at_least(load(scores + b), splat(edge)); bits; bits &= bits - 1)
        candidates_.push_back(int32_t(b + __builtin_ctz(bits)));
    for (; b < window; ++b)
      if (scores[b] >= edge) candidates_.push_back(int32_t(b));
    if (int64_t(candidates_.size()) < open) return false;  // NaN somewhere: let the sort decide
    values_.clear();
    for (int32_t c : candidates_) values_.push_back(scores[c]);
    edge = nth_largest(values_, open);
    candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(), [&](int32_t c) { return scores[c] < edge; }), candidates_.end());
    return int64_t(candidates_.size()) == open;
  }

  // What torch.topk does with the visible blocks: where blocks tie exactly, its choice depends on the whole row.
  void by_sort(const float* scores, int64_t blocks, int64_t init, int64_t window, int64_t wanted, int32_t* out) {
    queue_.resize(blocks);
    for (int64_t b = 0; b < blocks; ++b) queue_[b] = {b < init || b >= window ? INF : scores[b], b};
    auto before = [](const auto& x, const auto& y) { return (std::isnan(x.first) && !std::isnan(y.first)) || x.first > y.first; };
    if (wanted * 64 <= blocks) std::partial_sort(queue_.begin(), queue_.begin() + wanted, queue_.end(), before);
    else std::nth_element(queue_.begin(), queue_.begin() + wanted - 1, queue_.end(), before);
    for (int64_t i = 0; i < wanted; ++i) out[i] = int32_t(queue_[i].second);
    std::sort(out, out + wanted);
  }
};

// Scores of a tile of queries of one kv head against panels of W blocks. The windows of a block lie in the same lane of
// `ratio` vectors, so that pooling is an elementwise maximum.
class Scorer {
 public:
  // few: no panel is packed; only for a tile that `has_few` rows.
  Scorer(const Unit& unit, int64_t widest, bool few)
      : s_(*unit.s), first_(unit.first), last_(unit.last), head_(unit.head), few_(few),
        narrow_(!few && s_.narrow && s_.k1.head(head_ * s_.k1_head).pairs(s_.dim) &&
                (!s_.coarse || s_.k2.head(head_ * s_.k2_head).pairs(s_.dim))),
        panel_(few ? 0 : s_.dim * std::max<int64_t>(widest, W * s_.ratio())), turned_(few ? s_.dim * ROWS : 0),
        narrowed_(narrow_ ? queries() * s_.group() * s_.dim / 2 : 0),
        products_((few ? ROWS : std::max<int64_t>(CHUNK, s_.group())) * std::max<int64_t>(widest, W * s_.ratio())),
        in_order_(few && s_.ratio() % W == 0 ? queries() * s_.group() * W * s_.ratio() : 0),
        row_stride_(round_up(unit.blocks() + 1, W)), scores_(queries() * row_stride_), lse_(queries() * s_.group()),
        carry_(queries() * W), rows_(std::max<int64_t>(CHUNK, s_.group())) {
    auto wide = [&](int64_t r) { return wide_query(r); };
    if (few) turn_few(wide, queries() * s_.group(), s_.dim, turned_.data);
    if (narrow_) narrow_to_pairs(wide, queries() * s_.group(), s_.dim, narrowed_.data);
  }

 protected:
  const Selection& s_;
  int64_t first_, last_, head_;  // the tile: queries first_ ... last_ - 1 of one kv head
  bool few_, narrow_;  // narrow_: queries and keys are pairs of bfloat16
  Scratch panel_, turned_, narrowed_, products_, in_order_;  // turned_: the rows of a tile with few, `[dim, rows]`
  int64_t row_stride_;
  Scratch scores_, lse_, carry_;
  std::vector<const float*> rows_;
  Best best_;

  Rows keys1() const { return s_.k1.head(head_ * s_.k1_head); }
  Rows packable(const Rows& keys) const { return narrow_ ? keys.as_pairs() : keys; }
  int64_t depth() const { return narrow_ ? s_.dim / 2 : s_.dim; }  // of a panel
  int64_t visible(int64_t t) const { return seen(s_.position(first_ + t), s_.kernel, s_.stride); }
  int64_t queries() const { return last_ - first_; }

  const float* query(int64_t row) const { return narrow_ ? narrowed_.data + row * depth() : wide_query(row); }
  const float* wide_query(int64_t row) const {  // row: query of the tile * group + head in group
    int64_t group = s_.group();
    return s_.q + ((first_ + row / group) * s_.heads + head_ * group + row % group) * s_.dim;
  }

  // products_[r] = row(r) times the panel
  template <typename Row>
  void multiply(const Row& row, int count, int columns) {
    for (int r = 0; r < count; ++r) rows_[r] = row(r);
    const float* const* a = rows_.data();
    auto at = [a](int r, int64_t k) { return a[r][k]; };
    auto out = [&](int r) { return products_.data + r * columns; };
    if (narrow_) product<false, OfPairs>(at, count, depth(), panel_.data, columns, out, columns);
    else product<false>(at, count, depth(), panel_.data, columns, out, columns);
  }

  // out = all rows of a tile with few times the windows that were next; then those from `next` on, before `end`, are.
  template <typename T>
  void multiply_few(Walk<T>& walk, int64_t next, int64_t end, int64_t shift, int64_t by, float* out) {
    walk.advance(next, end - next);
    product_few(turned_.data, int(queries() * s_.group()), s_.dim, walk, shift, by, out);
  }

  // The same for W blocks, into products_ as `pool` takes them. Keys whose distance is a power of two, as those of the same
  // phase are, push one another out of the cache: they are multiplied in order, and the products turned.
  template <typename T>
  void multiply_few_blocks(Walk<T>& walk, int64_t next, int64_t end) {
    int64_t ratio = s_.ratio();
    if (ratio % W) return multiply_few(walk, next, end, 1, ratio, products_.data);
    multiply_few(walk, next, end, W, 1, in_order_.data);
    for (int64_t row = 0; row < queries() * s_.group(); ++row) {
      const float* x = in_order_.data + row * W * ratio;
      float* out = products_.data + row * W * ratio;
      for (int64_t phase = 0; phase < ratio; phase += W) {
        Vec v[W];
        for (int i = 0; i < W; ++i) v[i] = load(x + i * ratio + phase);
        transpose_square(v);
        for (int i = 0; i < W; ++i) store(out + (phase + i) * W, v[i]);
      }
    }
  }

  void pack_panel(int64_t block, int64_t windows) {
    int64_t ratio = s_.ratio();
    for (int64_t phase = 0; phase < ratio; ++phase) {
      int64_t start = block * ratio + phase;
      int here = int(std::max<int64_t>(0, std::min<int64_t>(W, (windows - start + ratio - 1) / ratio)));
      pack_transposed(packable(keys1()), start, ratio, here, W, depth(), panel_.data + phase * W, W * ratio);
    }
  }

  // Query t of the tile, whose products with the panel begin at `row`: W block scores from `block` on. A window with
  // number `visible` or above does not exist for it.
  void pool(int64_t t, int64_t row, int64_t block, int64_t visible) {
    int64_t group = s_.group(), ratio = s_.ratio(), columns = W * ratio;
    Vec factor = splat(s_.factor), best = splat(-INF), last{};
    const float* lse = lse_.data + t * group;
    for (int64_t phase = 0; phase < ratio; ++phase) {
      Vec p{};
      const float* x = products_.data + row * columns + phase * W;
      for (int64_t g = 0; g < group; ++g, x += columns) p += exp2_any(load(x) * factor - splat(lse[g]));
      p = p > splat(LARGEST) ? splat(LARGEST) : p;
      if ((block + W) * ratio > visible) {
        float lanes[W];
        store(lanes, p);
        for (int i = 0; i < W; ++i)
          if ((block + i) * ratio + phase >= visible) lanes[i] = -INF;
        p = load(lanes);
      }
      best = larger(best, p);
      last = p;
    }
    // The last window of a block reaches into the next one.
    float* carry = carry_.data + t * W;
    store(scores_.data + t * row_stride_ + block, larger(best, follow(load(carry), last)));
    store(carry, last);
  }

  // From block scores `[queries, stride]`.
  void choose(const float* scores, int64_t stride) {
    for (int64_t t = first_; t < last_; ++t) {
      int64_t own = s_.position(t) / s_.block_size;
      best_.choose(scores + (t - first_) * stride, own + 1, std::min(s_.init, own + 1),
                   std::max<int64_t>(0, own - s_.window_blocks), s_.num_blocks, s_.out + (t * s_.kv_heads + head_) * s_.num_blocks);
    }
  }
};

// As long as there is room for all blocks, all are taken: fills those rows of some kv heads and returns how many queries
// they are.
static inline int64_t take_all(const Selection& s, int64_t head, int64_t end) {
  int64_t everything = std::min(s.tokens, std::max<int64_t>(0, s.num_blocks * s.block_size - s.first));
  for (int64_t t = 0; t < everything; ++t)
    for (int64_t h = head; h < end; ++h)
      for (int64_t i = 0; i < s.num_blocks; ++i)
        s.out[(t * s.kv_heads + h) * s.num_blocks + i] = i <= (s.first + t) / s.block_size ? int32_t(i) : -1;
  return everything;
}

// Adds the tiles of queries begin ... end - 1 of every kv head: large enough for a panel to pay, small enough for all
// threads to have one.
static inline void cut(std::vector<Unit>& units, const Selection& s, int64_t begin, int64_t end, int64_t tokens_of_call,
                       int64_t tile_rows, int64_t threads) {
  int64_t share = (tokens_of_call * s.kv_heads + threads - 1) / threads, least = (CHUNK + s.group() - 1) / s.group();
  int64_t step = std::max<int64_t>(1, std::min(tile_rows / s.group(), std::max(share, least)));
  for (int64_t first = begin; first < end; first += step)
    for (int64_t head = 0; head < s.kv_heads; ++head) units.push_back({&s, first, std::min(first + step, end), head});
}

// Calls use(unit) for each, the long ones first.
template <typename Use>
static void for_each_unit(std::vector<Unit>& units, int64_t threads, const Use& use) {
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.cost() > b.cost(); });
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (units.size() > 1)
  for (size_t i = 0; i < units.size(); ++i) use(units[i]);
}

// Sequence n of a page table: `like` with its own queries, keys and place of the result. `like` describes sequence 0 and
// has Rows without pages.
static inline Selection paged_selection(const PageTable& table, const Selection& like, int64_t n, int64_t k1_page, int64_t k2_page) {
  int64_t begin = table.cu_seqlens[n];
  Selection s = like;
  s.q += begin * s.heads * s.dim, s.tokens = table.tokens(n), s.first = table.lengths[n] - s.tokens;
  s.out += begin * s.kv_heads * s.num_blocks;
  s.k1 = table.rows(n, s.k1.data, s.k1.kind, k1_page, s.k1.stride, s.block_size, s.stride, s.kernel - 1);
  s.k2 = table.rows(n, s.k2.data, s.k2.kind, k2_page, s.k2.stride, s.block_size, 4 * s.stride, 4 * s.kernel - 1);
  return s;
}

// The sequences of a page table that select blocks; the rows of the others become -1.
static inline std::vector<Selection> paged_selections(const PageTable& table, const Selection& like, int64_t k1_page, int64_t k2_page) {
  std::vector<Selection> selections;
  for (int64_t n = 0; n < table.sequences; ++n) {
    Selection s = paged_selection(table, like, n, k1_page, k2_page);
    if (!table.sparse[n]) std::fill_n(s.out, s.tokens * s.kv_heads * s.num_blocks, -1);
    else if (s.tokens) selections.push_back(s);
  }
  return selections;
}
