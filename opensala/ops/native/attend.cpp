// Block-sparse causal attention on the CPU, forward and backward.
//
// A thread takes a tile of queries of one kv head and goes through the key blocks in order; for each block it
// handles all (query, head) rows of the tile that chose it, so that a block is unpacked once for many rows and
// every product runs on a register tile. The partial softmax of a row lives in the tile's own memory between blocks.
// Softmax is done in powers of two: s * scale * log2(e) goes into exp2.
//
// Nothing that a row computes depends on the other rows of its tile, so tiles, threads and the other sequences of a call
// change no bit of a result.
#include "replay.h"
#include <vector>

#include "parts.h"

namespace {

// Queries of a tile: those listed, or all from one on.
struct Queries {
  const int32_t* listed;
  int64_t first, count;
  int64_t operator[](int64_t i) const { return listed ? listed[i] : first + i; }
};

// The (query, block) pairs of a tile, by block.
struct Pairs {
  std::vector<int32_t> start, query;
  void build(const Attention& p, int64_t first, int64_t last, int64_t head) {
    if (!p.blocks) return;
    int64_t total = p.blocks_up_to(last - 1);
    start.assign(total + 2, 0);
    auto each = [&](auto&& use) {
      for (int64_t t = first; t < last; ++t) {
        const int32_t* row = p.blocks + (t * p.kv_heads + p.kv_head(head)) * p.num_blocks;
        int64_t own = p.position(t) / p.block_size;
        for (int64_t i = 0; i < p.num_blocks; ++i)
          if (row[i] >= 0 && row[i] <= own) use(row[i], t - first);
      }
    };
    each([&](int32_t block, int64_t) { ++start[block + 2]; });
    for (size_t b = 2; b < start.size(); ++b) start[b] += start[b - 1];
    query.resize(start.back());
    each([&](int32_t block, int64_t t) { query[start[block + 1]++] = int32_t(t); });
  }
  Queries of(const Attention& p, int64_t block, int64_t first, int64_t last) const {
    if (p.blocks) return {query.data() + start[block], 0, start[block + 1] - start[block]};
    int64_t begin = std::max<int64_t>(0, block * p.block_size - p.position(first));
    return {nullptr, begin, last - first - begin};
  }
};

constexpr int BATCH = 8 * ROWS;  // rows of a block handled together

// The rows (query of the tile, query head of the group) of one batch, and how many keys of the block each sees.
struct Batch {
  int count = 0;
  int32_t index[BATCH];  // query * group + head in group, within the tile
  int32_t seen[BATCH];
};

template <typename Use>
void for_each_batch(const Attention& p, const Queries& queries, int64_t block, int64_t first, const Use& use) {
  int64_t group = p.group(), base = block * p.block_size;
  Batch rows;
  for (int64_t i = 0; i < queries.count; ++i) {
    int64_t t = queries[i];
    int64_t seen = std::min<int64_t>(p.block_size, p.position(first + t) + 1 - base);
    for (int64_t g = 0; g < group; ++g) {
      rows.index[rows.count] = int32_t(t * group + g);
      rows.seen[rows.count++] = int32_t(seen);
      if (rows.count == BATCH) use(rows), rows.count = 0;
    }
  }
  if (rows.count) use(rows);
}

// Where the keys of a block lie, as far as the tile's last query sees them: behind them may be anything.
struct Block {
  int64_t base, keys;
  Block(const Attention& p, int64_t block, int64_t last)
      : base(block * p.block_size), keys(std::min(p.block_size, p.position(last - 1) + 1 - base)) {}
};

// Keys a row does not see get -inf.
void hide(float* row, int64_t seen, int64_t padded) {
  for (int64_t j = seen; j < padded; ++j) row[j] = -INF;
}

// Rows of a tile up to which values are multiplied where they lie: a copy would be read too seldom to pay. With values in 16
// bits, which have to be widened each time, up to ROWS.
constexpr int64_t FEW = 2 * ROWS;

// Whether the values of a block lie so that a product can read them: full vectors, one step apart.
bool readable(const Rows& v, const Attention& p) {
  return v.kind != INT8 && p.value_dim % W == 0 && (!v.pages || (v.page_size == p.block_size && v.step == 1));
}

// T: the type of keys that are not int8.
template <typename T>
void tile_forward_of(const Attention& p, int64_t first, int64_t last, int64_t head) {
  int64_t group = p.group(), rows_in_tile = (last - first) * group;
  int64_t padded = round_up(p.block_size, W), width = round_up(p.value_dim, W);
  Scratch keys(p.dim * padded), values(padded * width), scores(BATCH * padded), result(rows_in_tile * width);
  Scratch peaks(rows_in_tile), sums(rows_in_tile);
  std::fill_n(result.data, rows_in_tile * width, 0.0f);
  std::fill_n(peaks.data, rows_in_tile, -INF);
  std::fill_n(sums.data, rows_in_tile, 0.0f);
  Pairs pairs;
  pairs.build(p, first, last, head);
  Rows k = p.k.head(p.kv_head(head) * p.k_head), v = p.v.head(p.kv_head(head) * p.v_head);
  const float* queries = p.q + (first * p.heads + head * group) * p.dim;
  auto query = [&](int32_t i) { return queries + ((i / group) * p.heads + i % group) * p.dim; };
  // One token: what is read next is asked for bit by bit, keys among keys and values among values.
  bool few = last - first == 1 && group <= ROWS && k.kind != INT8;
  // By pairs, rows of keys, of values and of queries hold two numbers where they hold one otherwise.
  bool by_pairs = p.narrow && !few && k.pairs(p.dim) && v.kind == BFLOAT16;
  bool in_place = !by_pairs && rows_in_tile <= (v.kind ? ROWS : FEW) && readable(v, p);
  int64_t depth = by_pairs ? p.dim / 2 : p.dim;
  Rows packable = by_pairs ? k.as_pairs() : k;
  Scratch narrowed(by_pairs ? rows_in_tile * depth : 0), weights(by_pairs ? BATCH * padded / 2 : 0);
  if (by_pairs) narrow_to_pairs([&](int64_t r) { return query(int32_t(r)); }, rows_in_tile, p.dim, narrowed.data);
  Walk<T> walk(k, padded);
  Scratch turned(few ? p.dim * group : 0);
  if (few) turn_few([&](int64_t r) { return query(int32_t(r)); }, group, p.dim, turned.data);

  for (int64_t block = 0, end = p.blocks_up_to(last - 1), next = 0; block < end; block = next) {
    Queries asking = pairs.of(p, block, first, last);
    for (next = block + 1; next < end && !pairs.of(p, next, first, last).count;) ++next;
    if (!asking.count) continue;
    Block source(p, block, last);
    Ahead k_ahead, v_ahead;
    if (next < end) {
      Block then(p, next, last);
      k_ahead = k.ahead(then.base, then.keys, p.dim), v_ahead = v.ahead(then.base, then.keys, p.value_dim);
    }
    if (few) {
      if (!walk.coming()) walk.advance(source.base, source.keys);
      walk.advance(next * p.block_size, k_ahead.count);
      product_few(turned.data, int(group), p.dim, walk, W, 1, scores.data);
    } else pack_transposed(packable, source.base, 1, int(source.keys), int(padded), depth, keys.data, padded, k_ahead);
    if (in_place && !few) v_ahead.fetch(0, v_ahead.count);
    if (by_pairs) pack_row_pairs(v, source.base, int(source.keys), p.value_dim, values.data, width, v_ahead);
    else if (!in_place) pack_rows(v, source.base, int(source.keys), p.value_dim, values.data, width, v_ahead);
    for_each_batch(p, asking, block, first, [&](const Batch& rows) {
      const float* a[BATCH];
      float* o[BATCH];
      for (int r = 0; r < rows.count; ++r) {
        a[r] = by_pairs ? narrowed.data + rows.index[r] * depth : query(rows.index[r]);
        o[r] = result.data + rows.index[r] * width;
      }
      auto factors = [&](int r, int64_t k) { return a[r][k]; };
      auto score_row = [&](int r) { return scores.data + r * padded; };
      auto out_row = [&](int r) { return o[r]; };
      if (by_pairs) product<false, OfPairs>(factors, rows.count, depth, keys.data, padded, score_row, int(padded));
      else if (!few) product<false>(factors, rows.count, depth, keys.data, padded, score_row, int(padded));
      for (int r = 0; r < rows.count; ++r) {
        float* s = scores.data + r * padded;
        if (rows.seen[r] < padded) hide(s, rows.seen[r], padded);
        Vec high = load(s);
        for (int64_t j = W; j < padded; j += W) high = larger(high, load(s + j));
        float old = peaks.data[rows.index[r]], peak = std::max(old, largest(high) * p.factor);
        Vec sum{}, shift = splat(peak), factor = splat(p.factor);
        for (int64_t j = 0; j < padded; j += W) {
          Vec e = exp2_below(load(s + j) * factor - shift);
          store(s + j, e);
          sum += e;
        }
        float& mass = sums.data[rows.index[r]];
        if (peak > old) {
          float shrink = std::exp2(old - peak);
          mass *= shrink;
          for (int64_t j = 0; j < width; j += W) store(o[r] + j, load(o[r] + j) * shrink);
          peaks.data[rows.index[r]] = peak;
        }
        mass += total(sum);
      }
      if (by_pairs) {
        narrow_to_pairs(score_row, rows.count, padded, weights.data);
        product<true, OfPairs>([&](int r, int64_t k) { return weights.data[r * (padded / 2) + k]; }, rows.count,
                             (source.keys + 1) / 2, values.data, width, out_row, int(width));
        return;
      }
      for (int64_t j = 0, step = few ? W : source.keys; j < source.keys; j += step) {
        if (few && in_place) v_ahead.fetch(j, step);
        auto add = [&](const auto* values, int64_t value_step) {
          product<true>([&](int r, int64_t k) { return scores.data[r * padded + j + k]; }, rows.count,
                        std::min(step, source.keys - j), values + j * value_step, value_step, out_row, int(width));
        };
        if (in_place) with_type(v.kind, [&](auto type) { add(v.at<decltype(type)>(source.base), v.stride); });
        else add(values.data, width);
      }
    });
  }
  for (int64_t i = 0; i < rows_in_tile; ++i) {
    int64_t row = (first + i / group) * p.heads + head * group + i % group;
    float inverse = 1.0f / sums.data[i];
    for (int64_t j = 0; j < p.value_dim; ++j) p.out[row * p.value_dim + j] = result.data[i * width + j] * inverse;
    if (p.lse) p.lse[row] = peaks.data[i] + std::log2(sums.data[i]);
  }
}

void tile_forward(const Attention& p, int64_t first, int64_t last, int64_t head) {
  with_type(p.k.kind, [&](auto type) { tile_forward_of<decltype(type)>(p, first, last, head); });
}

struct Gradients {
  const float *grad, *lse, *delta;  // [T, Hq, E], [T, Hq], [T, Hq]: sum of grad * out
  float* dq;                        // [T, Hq, D]
  float *dk, *dv;                   // [Hkv, L, D], [Hkv, L, E] of this part, added to
};

void backward_tile(const Attention& p, const Gradients& g, int64_t first, int64_t last, int64_t head) {
  int64_t group = p.group(), rows_in_tile = (last - first) * group;
  int64_t padded = round_up(p.block_size, W), width = round_up(p.value_dim, W), inner = round_up(p.dim, W);
  Scratch keys_t(p.dim * padded), values_t(p.value_dim * padded), keys(padded * inner), dq(rows_in_tile * inner);
  Scratch weights(BATCH * padded), slopes(BATCH * padded), q_rows(BATCH * inner), g_rows(BATCH * width);
  Scratch dk(padded * inner), dv(padded * width);
  std::fill_n(dq.data, rows_in_tile * inner, 0.0f);
  Pairs pairs;
  pairs.build(p, first, last, head);
  Rows k = p.k.head(p.kv_head(head) * p.k_head), v = p.v.head(p.kv_head(head) * p.v_head);
  auto row_of = [&](int32_t i) { return (first + i / group) * p.heads + head * group + i % group; };
  Vec factor = splat(p.factor);
  const float scale = p.factor * 0.6931471805599453f;

  for (int64_t block = 0, end = p.blocks_up_to(last - 1); block < end; ++block) {
    Queries asking = pairs.of(p, block, first, last);
    if (!asking.count) continue;
    Block source(p, block, last);
    pack_transposed(k, source.base, 1, int(source.keys), int(padded), p.dim, keys_t.data, padded);
    pack_transposed(v, source.base, 1, int(source.keys), int(padded), p.value_dim, values_t.data, padded);
    pack_rows(k, source.base, int(source.keys), p.dim, keys.data, inner);
    std::fill_n(dk.data, padded * inner, 0.0f);
    std::fill_n(dv.data, padded * width, 0.0f);
    for_each_batch(p, asking, block, first, [&](const Batch& rows) {
      int n = rows.count;
      pack_rows([&](int r) { return p.q + row_of(rows.index[r]) * p.dim; }, n, n, p.dim, q_rows.data, inner);
      pack_rows([&](int r) { return g.grad + row_of(rows.index[r]) * p.value_dim; }, n, n, p.value_dim, g_rows.data, width);
      auto weight_row = [&](int r) { return weights.data + r * padded; };
      auto slope_row = [&](int r) { return slopes.data + r * padded; };
      product<false>([&](int r, int64_t k) { return q_rows.data[r * inner + k]; }, n, p.dim, keys_t.data, padded, weight_row,
                     int(padded));
      product<false>([&](int r, int64_t k) { return g_rows.data[r * width + k]; }, n, p.value_dim, values_t.data, padded,
                     slope_row, int(padded));
      for (int r = 0; r < n; ++r) {
        float *w = weight_row(r), *s = slope_row(r);
        if (rows.seen[r] < padded) hide(w, rows.seen[r], padded);
        int64_t row = row_of(rows.index[r]);
        Vec lse = splat(g.lse[row]), delta = splat(g.delta[row]);
        for (int64_t j = 0; j < padded; j += W) {
          Vec e = exp2_any(load(w + j) * factor - lse);
          store(w + j, e);
          store(s + j, e * (load(s + j) - delta) * scale);
        }
      }
      product<true>([&](int r, int64_t k) { return slopes.data[r * padded + k]; }, n, source.keys, keys.data, inner,
                    [&](int r) { return dq.data + rows.index[r] * inner; }, int(inner));
      product<true>([&](int j, int64_t r) { return slopes.data[r * padded + j]; }, int(source.keys), n, q_rows.data, inner,
                    [&](int j) { return dk.data + j * inner; }, int(inner));
      product<true>([&](int j, int64_t r) { return weights.data[r * padded + j]; }, int(source.keys), n, g_rows.data, width,
                    [&](int j) { return dv.data + j * width; }, int(width));
    });
    for (int64_t j = 0; j < source.keys; ++j) {
      float* to_k = g.dk + (head * p.length + source.base + j) * p.dim;
      float* to_v = g.dv + (head * p.length + source.base + j) * p.value_dim;
      for (int64_t d = 0; d < p.dim; ++d) to_k[d] += dk.data[j * inner + d];
      for (int64_t d = 0; d < p.value_dim; ++d) to_v[d] += dv.data[j * width + d];
    }
  }
  for (int64_t i = 0; i < rows_in_tile; ++i)
    std::copy_n(dq.data + i * inner, p.dim, g.dq + row_of(int32_t(i)) * p.dim);
}

constexpr int64_t SHARED = 32;  // queries of a tile that a block should have, for unpacking it to pay

// Queries of a tile: some tiles for each thread, but where blocks are many (a long context) rather fewer and larger ones.
int64_t tile_queries(const Attention& p, int64_t tokens_of_call, int64_t rows, int64_t threads) {
  int64_t share = (tokens_of_call * p.kv_heads + threads - 1) / threads, blocks = (p.length + p.block_size - 1) / p.block_size;
  int64_t shared = p.blocks ? SHARED * blocks / p.num_blocks : SHARED;
  int64_t wanted = std::max((share + 3) / 4, std::min(share, shared));
  return std::max<int64_t>(1, std::min(rows / p.group() + 1, wanted));
}

// A tile of queries of one head of one sequence.
struct Unit {
  const Attention* p;
  int64_t first, last, head;
  int64_t cost() const {  // multiplications at most, of queries with keys
    int64_t blocks = p->blocks_up_to(last - 1);
    return (last - first) * (p->blocks ? std::min(blocks, p->num_blocks) : blocks) * p->block_size * p->group() * p->dim;
  }
};

constexpr int64_t SMALL = 1 << 18;  // multiplications that are done before a second thread is awake

// With fewer tiles than threads the query heads of a kv head are shared out: each part unpacks the blocks for itself.
void slice_heads(std::vector<Attention>& problems, int64_t units, int64_t threads) {
  for (Attention& p : problems) {
    int64_t group = p.heads / p.kv_heads;
    while (p.slices < group && (units * p.slices < threads || group % p.slices)) ++p.slices;
  }
}

void forward_all(std::vector<Attention>& problems, int64_t tile_rows, int64_t threads) {
  int64_t tokens = 0, tiles = 0;
  for (const Attention& p : problems) tokens += p.tokens;
  std::vector<int64_t> steps;
  for (const Attention& p : problems) {
    steps.push_back(tile_queries(p, tokens, tile_rows, threads));
    tiles += (p.tokens + steps.back() - 1) / steps.back() * p.kv_heads;
  }
  slice_heads(problems, tiles, threads);
  std::vector<Unit> units;
  for (size_t n = 0; n < problems.size(); ++n) {
    const Attention& p = problems[n];
    for (int64_t first = 0; first < p.tokens; first += steps[n])
      for (int64_t head = 0; head < p.kv_heads * p.slices; ++head)
        units.push_back({&p, first, std::min(first + steps[n], p.tokens), head});
  }
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.cost() > b.cost(); });
  int64_t work = 0;
  for (const Unit& unit : units) work += unit.cost();
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (work > SMALL)
  for (size_t i = 0; i < units.size(); ++i) tile_forward(*units[i].p, units[i].first, units[i].last, units[i].head);
}

}  // namespace

void attend_head(const Attention& p, int64_t head) { tile_forward(p, 0, p.tokens, head); }

extern "C" void opensala_attend_forward(
    const float* q, const void* k, const void* v, int64_t kind, const int32_t* blocks, float* out, float* lse,
    int64_t tokens, int64_t length, int64_t heads, int64_t kv_heads, int64_t dim, int64_t value_dim, int64_t num_blocks,
    int64_t size, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head, float factor, int64_t tile_rows,
    int64_t threads) {
  std::vector<Attention> one{{q, {k, kind, k_token}, {v, kind, v_token}, blocks, tokens, length, heads, kv_heads, dim, value_dim,
                            num_blocks, size, k_head, v_head, factor, out, lse}};
  forward_all(one, tile_rows, threads);
}

// All sequences of a page table: q `[T, Hq, D]`, out `[T, Hq, E]`; blocks `[T, Hkv, K]` are read for sequences whose
// `sparse` flag is set (null: all attend densely).
extern "C" void opensala_attend_paged(
    const float* q, const void* k, const void* v, int64_t kind, const int32_t* blocks, float* out, const int32_t* cu_seqlens,
    const int32_t* lengths, const int32_t* pages, const int32_t* sparse, int64_t sequences, int64_t table_width, int64_t heads,
    int64_t kv_heads, int64_t dim, int64_t value_dim, int64_t num_blocks, int64_t size, int64_t k_page, int64_t k_token,
    int64_t k_head, int64_t v_page, int64_t v_token, int64_t v_head, float factor, int64_t narrow, int64_t tile_rows,
    int64_t threads) {
  PageTable table{cu_seqlens, lengths, pages, sparse, sequences, table_width};
  std::vector<Attention> problems;
  for (int64_t n = 0; n < sequences; ++n) {
    if (!table.tokens(n)) continue;
    int64_t begin = cu_seqlens[n];
    problems.push_back({q + begin * heads * dim, table.rows(n, k, kind, k_page, k_token, size),
                        table.rows(n, v, kind, v_page, v_token, size),
                        blocks && sparse[n] ? blocks + begin * kv_heads * num_blocks : nullptr, table.tokens(n), lengths[n], heads,
                        kv_heads, dim, value_dim, num_blocks, size, k_head, v_head, factor, out + begin * heads * value_dim});
    problems.back().narrow = narrow;
  }
  forward_all(problems, tile_rows, threads);
}

// Part i of the query tiles adds to its own dk and dv (`[parts, Hkv, L, D]`, zeroed by the caller): whatever the
// order in which threads finish, the sums are formed in the same order.
extern "C" void opensala_attend_backward(
    const float* q, const void* k, const void* v, int64_t kind, const int32_t* blocks, const float* grad, const float* lse,
    const float* delta, float* dq, float* dk, float* dv, int64_t tokens, int64_t length, int64_t heads, int64_t kv_heads,
    int64_t dim, int64_t value_dim, int64_t num_blocks, int64_t size, int64_t k_token, int64_t k_head, int64_t v_token,
    int64_t v_head, float factor, int64_t tile_rows, int64_t parts, int64_t threads) {
  Attention p{q, {k, kind, k_token}, {v, kind, v_token}, blocks, tokens, length, heads, kv_heads, dim, value_dim, num_blocks, size, k_head, v_head, factor};
  int64_t step = tile_queries(p, tokens, tile_rows, threads), tiles = (tokens + step - 1) / step;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t unit = 0; unit < parts * kv_heads; ++unit) {
    int64_t part = unit / kv_heads, head = unit % kv_heads;
    Gradients g{grad, lse, delta, dq, dk + part * kv_heads * length * dim, dv + part * kv_heads * length * value_dim};
    for (int64_t tile = part; tile < tiles; tile += parts)
      backward_tile(p, g, tile * step, std::min((tile + 1) * step, tokens), head);
  }
}

REPLAYABLE(opensala_attend_paged)
