// A decoding step of a whole model in one call: embeddings in, hidden states and logits out.
//
// One team of threads goes through all layers. Between two parts of a layer that need each other's results it waits at a
// barrier of its own, spinning, for what a part takes is less than what it costs to put a thread to sleep. Where the weights
// of a model are few and the sequences many, each thread takes some of the sequences through all layers by itself instead
// (`step.h`). Every part is made of the pieces that calls of whole layers are made of (`parts.h`), so the bits are those of
// the layers run one by one, however many tokens, sequences and threads there are.
#include <vector>

#include "parts.h"
#include "step.h"
#include "team.h"

namespace {

// What all threads see: `[T, width]` each.
struct Shared {
  Scratch q, k, v, gate, q_rotated, k_rotated, mixed, up, active, out, rows;
  std::vector<int32_t> blocks;
  std::vector<BFloat16> narrow_k, narrow_v;  // keys and values as a pool of bfloat16 has them
  int64_t row;  // block scores of a query, where a tile is shared out in stripes; else 0
  Scratch lse, scores;
};

constexpr int64_t STRIPE = 256;  // blocks

// Whether sequence n selects with one tile that is long enough to be shared out, beyond where all blocks are taken and
// before the second level begins.
bool striped(const Model& m, const Batch& b, int64_t n) {
  int64_t tokens = b.bounds[n + 1] - b.bounds[n], first = b.lengths[n] - tokens;
  return b.sparse[n] && b.sequences <= 2 && tokens > 0 && tokens <= 8 && first >= 2 * STRIPE * m.block &&
         first >= std::max(m.num_blocks * m.block, 4 * m.kernel - 1);
}

int64_t row_of_scores(const Model& m, const Batch& b) {
  int64_t most = 0;
  for (int64_t n = 0; n < b.sequences; ++n)
    if (b.any_sparse && striped(m, b, n)) most = std::max<int64_t>(most, b.lengths[n]);
  return most ? round_up((most + m.block - 1) / m.block, W) : 0;
}

int64_t widest(const Model& m, int64_t (*of)(const Layer&)) {
  int64_t most = 1;
  for (int64_t i = 0; i < m.count; ++i) most = std::max(most, of(m.layers[i]));
  return most;
}

// --- one thread's way through the layers ---

class Worker {
 public:
  // `tokens_of_call`: those of all parts of a step, which what is kept and chosen lies in.
  Worker(const Model& m, const Batch& b, Shared& shared, Team& team, int64_t threads, int64_t tokens_of_call)
      : m_(m), b_(b), s_(shared), team_(team), threads_(threads), tokens_(b.bounds[b.sequences]), tokens_of_call_(tokens_of_call),
        table_{b.bounds, b.lengths, b.pages, b.sparse, b.sequences, b.width}, inner_(widest(m, [](const Layer& l) { return l.q.outer; })),
        x_(tokens_ * m.hidden), next_(tokens_ * m.hidden), normal_(tokens_ * std::max(m.hidden, inner_)),
        widened_(needs_widened() ? WIDENED : 0) {}

  void run() {
    float *x = x_.data, *next = next_.data;
    for (int64_t t = 0; t < tokens_; ++t) embed(b_.ids[t], x + t * m_.hidden);
    for (int64_t i = 0, lightning = 0, sparse = 0; i < m_.count; ++i) {
      const Layer& layer = m_.layers[i];
      const float* h = normalised(x, layer.input_norm);
      project(layer, h);
      if (layer.sparse) attend(layer, blocks(layer, sparse++));
      else recur(layer, lightning++);
      multiply({{layer.o, gated(layer), s_.out.data}});
      std::swap(x, next), add(next, x);
      feed_forward(layer, normalised(x, layer.post_norm));
      std::swap(x, next), add(next, x);
    }
    finish(x);
  }

 private:
  static constexpr int64_t WIDENED = 1 << 17;  // floats: what `linear_columns` may need for a unit, and more
  const Model& m_;
  const Batch& b_;
  Shared& s_;
  Team& team_;
  int64_t threads_, tokens_, tokens_of_call_;
  PageTable table_;
  int64_t inner_;
  // Every thread keeps the residual stream for itself: what all would have to wait for takes less time than waiting.
  Scratch x_, next_, normal_, widened_;

  // Fresh memory for it costs more than a small step computes.
  bool needs_widened() const {
    bool codes = has_codes(m_.head);
    for (int64_t i = 0; i < m_.count && !codes; ++i) {
      for (const Weights* w : weights_of(m_.layers[i])) codes |= has_codes(*w);
    }
    return codes && tokens_ >= 4;
  }
  float eps() const { return float(m_.eps); }

  void embed(int64_t id, float* out) const {
    int64_t width = m_.hidden;
    with_type(m_.embedding.kind, [&](auto type) {
      auto* row = static_cast<const decltype(type)*>(m_.embedding.data) + id * width;
      for (int64_t i = 0; i < width; ++i) out[i] = widen(row[i]) * float(m_.embedding_scale);
    });
  }

  // Norms of rows of the residual stream: each thread makes them for itself while they are few.
  const float* normalised(const float* x, const float* weight) {
    return rows(m_.hidden, [&](int64_t t, float* out) { rms_norm_row(x + t * m_.hidden, weight, out, m_.hidden, eps()); });
  }

  template <typename Make>
  const float* rows(int64_t width, const Make& make) {
    bool alone = threads_ == 1 || tokens_ <= 4;
    float* to = alone ? normal_.data : s_.rows.data;
    auto one = [&](int64_t t) { make(t, to + t * width); };
    if (alone)
      for (int64_t t = 0; t < tokens_; ++t) one(t);
    else team_.share(tokens_, one);
    return to;
  }

  // x + scale * (what the team has just multiplied), into `to`.
  void add(const float* x, float* to) {
    for (int64_t t = 0; t < tokens_; ++t)
      add_scaled_row(x + t * m_.hidden, s_.out.data + t * m_.hidden, to + t * m_.hidden, m_.hidden, float(m_.residual_scale));
  }

  struct Product {
    const Weights& weights;
    const float* x;
    float* out;
  };

  // Several products, their columns shared out; `then(product, first, count)` follows each part at once.
  template <typename Then>
  void multiply(std::initializer_list<Product> products, const Then& then) {
    Linear linear[4];
    int64_t width[4], end[4], many = 0, units = 0;
    for (const Product& p : products) {
      if (!p.weights.data) continue;
      linear[many] = {p.x, p.weights, p.out, tokens_, p.weights.inner, p.weights.outer};
      width[many] = std::max<int64_t>(W, columns_of_unit(linear[many], threads_) / 2 / W * W);
      end[many] = units += (p.weights.outer + width[many] - 1) / width[many];
      ++many;
    }
    team_.share(units, [&](int64_t i) {
      int64_t p = 0;
      while (i >= end[p]) ++p;
      int64_t first = (i - (p ? end[p - 1] : 0)) * width[p];
      int64_t count = std::min(width[p], linear[p].weights.outer - first);
      columns(linear[p], first, count);
      then(p, first, count);
    });
  }
  void multiply(std::initializer_list<Product> products) {
    multiply(products, [](int64_t, int64_t, int64_t) {});
  }

  void columns(const Linear& p, int64_t first, int64_t count) {
    int64_t step = count;
    if (widened_floats(p, count) > WIDENED) step = std::max<int64_t>(1, WIDENED / p.weights.inner / W) * W;
    for (int64_t a = first; a < first + count; a += step)
      linear_columns(p, a, std::min(step, first + count - a), 0, tokens_, widened_.data);
  }

  void project(const Layer& l, const float* h) {
    multiply({{l.q, h, s_.q.data}, {l.k, h, s_.k.data}, {l.v, h, s_.v.data}, {l.gate, h, s_.gate.data}});
  }

  // The mixer's output behind norm and gate, as the output projection takes it.
  const float* gated(const Layer& l) {
    if (!l.o_norm && !l.gate.data) return s_.mixed.data;
    int64_t width = l.o.inner;
    return rows(width, [&](int64_t t, float* out) {
      norm_gate_row(s_.mixed.data + t * width, l.o_norm, l.gate.data ? s_.gate.data + t * width : nullptr, out, width, eps());
    });
  }

  void feed_forward(const Layer& l, const float* h) {
    // A unit makes the same columns of gate and up, and what they give together.
    Linear gate{h, l.mlp_gate, s_.q.data, tokens_, m_.hidden, m_.inner}, up{h, l.mlp_up, s_.up.data, tokens_, m_.hidden, m_.inner};
    int64_t width = std::max<int64_t>(W, columns_of_unit(gate, threads_) / 2 / W * W);
    team_.share((m_.inner + width - 1) / width, [&](int64_t i) {
      int64_t first = i * width, count = std::min(width, m_.inner - first);
      columns(gate, first, count), columns(up, first, count);
      for (int64_t t = 0; t < tokens_; ++t) {
        int64_t at = t * m_.inner + first;
        silu_mul_row(s_.q.data + at, s_.up.data + at, s_.active.data + at, count);
      }
    });
    multiply({{l.down, s_.active.data, s_.out.data}});
  }

  // Heads head ... head + count - 1 of tokens of sequence n, behind norm and rotary positions.
  void rotate(const Layer& l, int64_t n, const float* x, const float* weight, float* out, int64_t heads, int64_t head, int64_t count) {
    int64_t half = l.dim / 2;
    const float *cos = l.rotates ? b_.cos[l.sparse] : nullptr, *sin = l.rotates ? b_.sin[l.sparse] : nullptr;
    for (int64_t t = b_.bounds[n]; t < b_.bounds[n + 1]; ++t) {
      int64_t at = (t * heads + head) * l.dim;
      norm_rope_row(x + at, weight, cos ? cos + t * half : nullptr, sin ? sin + t * half : nullptr, out + at, count, l.dim, eps());
    }
  }
  static bool rotates(const Layer& l) { return l.q_norm || l.rotates; }

  void recur(const Layer& l, int64_t number) {
    int64_t repeats = l.heads / l.kv_heads;
    bool turns = rotates(l);
    const float *q = turns ? s_.q_rotated.data : s_.q.data, *k = turns ? s_.k_rotated.data : s_.k.data;
    Slots slots{q, k, s_.v.data, l.decay, s_.mixed.data, l.states, b_.bounds, b_.read, b_.write, l.heads, l.dim, l.dim, repeats,
                float(m_.lightning_scale)};
    team_.share(b_.sequences * l.kv_heads, [&](int64_t i) {
      int64_t n = i / l.kv_heads, kv_head = i % l.kv_heads;
      if (turns) {
        rotate(l, n, s_.q.data, l.q_norm, s_.q_rotated.data, l.heads, kv_head * repeats, repeats);
        rotate(l, n, s_.k.data, l.k_norm, s_.k_rotated.data, l.kv_heads, kv_head, 1);
      }
      if (b_.kept) keep(l, n, kv_head, number, k);
      for (int64_t h = kv_head * repeats; h < (kv_head + 1) * repeats; ++h) lightning_head(slots, n, h);
    });
  }

  void keep(const Layer& l, int64_t n, int64_t head, int64_t number, const float* k) {
    int64_t width = l.kv_heads * l.dim;
    float* to = b_.kept + 2 * number * tokens_of_call_ * width;
    for (int64_t t = b_.bounds[n]; t < b_.bounds[n + 1]; ++t) {
      int64_t at = t * width + head * l.dim;
      std::copy_n(k + at, l.dim, to + at);
      std::copy_n(s_.v.data + at, l.dim, to + tokens_of_call_ * width + at);
    }
  }

  Place place(void* data, int i) const { return {data, m_.kv[i][0], m_.kv[i][1], m_.kv[i][2]}; }

  // Queries, keys and values as they are stored and attended with; keys and values into their pages.
  void store(const Layer& l) {
    bool turns = rotates(l), grows = b_.growth, narrow = m_.kind == BFLOAT16;
    int64_t width = l.kv_heads * l.dim, wide = l.heads * l.dim;
    const float* keys = turns ? s_.k_rotated.data : s_.k.data;
    Store to{keys, s_.v.data, m_.kind, m_.level_kind, table_, place(l.keys, 0), place(l.values, 1), place(l.k1, 2), place(l.k2, 3),
             l.kv_heads, l.dim, l.dim, m_.block, m_.stride, m_.kernel};
    if (narrow) to.k = s_.narrow_k.data(), to.v = s_.narrow_v.data();
    team_.share(b_.sequences, [&](int64_t n) {
      int64_t a = b_.bounds[n], b = b_.bounds[n + 1];
      if (turns) {
        rotate(l, n, s_.q.data, l.q_norm, s_.q_rotated.data, l.heads, 0, l.heads);
        rotate(l, n, s_.k.data, l.k_norm, s_.k_rotated.data, l.kv_heads, 0, l.kv_heads);
      }
      float* q = turns ? s_.q_rotated.data : s_.q.data;
      if (grows)
        for (int64_t t = a; t < b; ++t)
          for (int64_t i = 0; i < wide; ++i) q[t * wide + i] *= b_.growth[t];
      if (narrow) {
        narrow_rows(keys + a * width, s_.narrow_k.data() + a * width, (b - a) * width);
        narrow_rows(s_.v.data + a * width, s_.narrow_v.data() + a * width, (b - a) * width);
      }
      store_sequence(to, n);
    });
  }

  static void narrow_rows(const float* x, BFloat16* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = narrowed<BFloat16>(x[i]);
  }

  // Where the blocks of a sparse layer go: to the caller, or to where those of the layer before were.
  int32_t* blocks(const Layer& l, int64_t number) {
    return b_.chosen ? b_.chosen + number * tokens_of_call_ * l.kv_heads * m_.num_blocks : s_.blocks.data();
  }

  void attend(const Layer& l, int32_t* all) {
    store(l);
    const float* q = rotates(l) ? s_.q_rotated.data : s_.q.data;
    if (b_.any_sparse) choose(l, q, all);
    // As many slices of a kv head's query heads as it takes to give every thread one.
    int64_t group = l.heads / l.kv_heads, slices = 1;
    while (slices < group && (b_.sequences * l.kv_heads * slices < threads_ || group % slices)) ++slices;
    int64_t units = l.kv_heads * slices;
    team_.share(b_.sequences * units, [&](int64_t i) {
      int64_t n = i / units, begin = b_.bounds[n];
      if (!table_.tokens(n)) return;
      Place keys = place(l.keys, 0), values = place(l.values, 1);
      const int32_t* blocks = b_.any_sparse && b_.sparse[n] ? all + begin * l.kv_heads * m_.num_blocks : nullptr;
      Attention one{q + begin * l.heads * l.dim, table_.rows(n, keys.data, m_.kind, keys.page, keys.row, m_.block),
                    table_.rows(n, values.data, m_.kind, values.page, values.row, m_.block), blocks, table_.tokens(n),
                    b_.lengths[n], l.heads, l.kv_heads, l.dim, l.dim, m_.num_blocks, m_.block, keys.head, values.head,
                    float(m_.factor), s_.mixed.data + begin * l.heads * l.dim};
      one.slices = slices;
      attend_head(one, i % units);
    });
  }

  // Blocks of the sparse sequences. Everything is cut as a call of the selection alone cuts it; only block scores, each
  // of which stands for itself, are shared out in stripes where one (sequence, kv head) a unit would leave threads idle.
  void choose(const Layer& l, const float* q, int32_t* all) {
    Place k1 = place(l.k1, 2), k2 = place(l.k2, 3);
    Selection like{q, {k1.data, m_.level_kind, k1.row}, {k2.data, m_.level_kind, k2.row}, k1.head, k2.head, 0, 0, l.heads, l.kv_heads, l.dim,
                   m_.block, m_.stride, m_.kernel, m_.init, m_.window_blocks, m_.num_blocks, m_.coarse != 0, float(m_.factor),
                   all};
    auto selection = [&](int64_t i) { return paged_selection(table_, like, i / l.kv_heads, k1.page, k2.page); };
    int64_t units = b_.sequences * l.kv_heads, stripes = (s_.row + STRIPE - 1) / STRIPE;
    team_.share(units, [&](int64_t i) {
      int64_t n = i / l.kv_heads, head = i % l.kv_heads;
      if (!b_.sparse[n] || !table_.tokens(n)) return;
      Selection s = selection(i);
      if (striped(m_, b_, n)) return select_lse({&s, 0, s.tokens, head}, lse(l, i));
      int64_t everything = take_all(s, head, head + 1);
      int64_t level2 = std::min(s.tokens, std::max(everything, 4 * s.kernel - 1 - s.first));
      if (everything < level2) select_tile({&s, everything, level2, head});
      if (level2 < s.tokens) select_tile({&s, level2, s.tokens, head});
    });
    if (!stripes) return;
    team_.share(units * stripes, [&](int64_t u) {
      int64_t i = u / stripes, first = u % stripes * STRIPE;
      if (!striped(m_, b_, i / l.kv_heads)) return;
      Selection s = selection(i);
      Unit unit{&s, 0, s.tokens, i % l.kv_heads};
      int64_t last = std::min(first + STRIPE, unit.blocks());
      if (first < last) select_scores(unit, lse(l, i), first, last, scores(l, i), s_.row);
    });
    team_.share(units, [&](int64_t i) {
      if (!striped(m_, b_, i / l.kv_heads)) return;
      Selection s = selection(i);
      select_best({&s, 0, s.tokens, i % l.kv_heads}, scores(l, i), s_.row);
    });
  }

  // Where a (sequence, kv head) has its rows of denominators and of block scores.
  int64_t first_row(const Layer& l, int64_t i) const {
    int64_t n = i / l.kv_heads;
    return b_.bounds[n] * l.kv_heads + i % l.kv_heads * table_.tokens(n);
  }
  float* lse(const Layer& l, int64_t i) const { return s_.lse.data + first_row(l, i) * (l.heads / l.kv_heads); }
  float* scores(const Layer& l, int64_t i) const { return s_.scores.data + first_row(l, i) * s_.row; }

  void finish(const float* x) {
    int64_t width = m_.hidden;
    team_.share(tokens_, [&](int64_t t) { rms_norm_row(x + t * width, m_.norm, b_.hidden + t * width, width, eps()); });
    if (!b_.logits) return;
    const float* h = rows(width, [&](int64_t t, float* out) {
      for (int64_t i = 0; i < width; ++i) out[i] = b_.hidden[t * width + i] / float(m_.logit_divisor);
    });
    multiply({{m_.head, h, b_.logits}});
  }
};

// Room for what the threads of a step or of a part of it see.
Shared room_for(const Model& m, const Batch& b) {
  int64_t tokens = b.bounds[b.sequences];
  int64_t q = widest(m, [](const Layer& l) { return l.q.outer; }), kv = widest(m, [](const Layer& l) { return l.k.outer; });
  int64_t wide = std::max(q, m.inner), kv_heads = widest(m, [](const Layer& l) { return l.kv_heads; });
  bool narrow = m.kind == BFLOAT16;
  int64_t row = row_of_scores(m, b), heads = widest(m, [](const Layer& l) { return l.heads; });
  return Shared{Scratch(tokens * wide), Scratch(tokens * kv), Scratch(tokens * kv), Scratch(tokens * q), Scratch(tokens * q),
                Scratch(tokens * kv), Scratch(tokens * q), Scratch(tokens * m.inner), Scratch(tokens * m.inner),
                Scratch(tokens * m.hidden), Scratch(tokens * std::max(m.hidden, q)),
                std::vector<int32_t>(b.any_sparse && !b.chosen ? tokens * kv_heads * m.num_blocks : 0),
                std::vector<BFloat16>(narrow ? tokens * kv : 0), std::vector<BFloat16>(narrow ? tokens * kv : 0),
                row, Scratch(row ? tokens * heads : 0), Scratch(tokens * kv_heads * row)};
}

}  // namespace

// `model` and `batch` point to the structures above.
extern "C" void opensala_step(const void* model, const void* batch, int64_t threads) {
  const Model& m = *static_cast<const Model*>(model);
  const Batch& b = *static_cast<const Batch*>(batch);
  int64_t tokens = b.bounds[b.sequences];
  if (std::vector<int64_t> ends = ends_of_parts(m, b, threads); !ends.empty()) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (size_t i = 0; i < ends.size(); ++i) {
      Part part(m, b, i ? ends[i - 1] : 0, ends[i]);
      Shared shared = room_for(m, part.batch());
      Team alone(1);
      Worker(m, part.batch(), shared, alone, 1, tokens).run();
    }
    return;
  }
  Shared shared = room_for(m, b);
  Team* team = nullptr;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    team = new Team(omp_get_num_threads());
    Worker(m, b, shared, *team, omp_get_num_threads(), tokens).run();
  }
  delete team;
}
