// What a decoding step is given, and how it is cut into parts.
#pragma once
#include <array>
#include <vector>

#include "linear.h"

namespace {

// --- what Python hands over (`engine/native_step.py` has the same structures; every field is 8 bytes) ---

struct Layer {
  int64_t sparse;  // else Lightning
  const float *input_norm, *post_norm;
  Weights q, k, v, gate, o;     // gate.data is null if there is none
  Weights mlp_gate, mlp_up, down;
  const float *q_norm, *k_norm, *o_norm;  // null for none
  int64_t heads, kv_heads, dim, rotates;
  // sparse layers: the pool
  void *keys, *values, *k1, *k2;
  // Lightning layers
  float* states;
  const float* decay;
};

struct Model {
  const Layer* layers;
  int64_t count, hidden, inner;  // inner: of the feed-forward
  Weights embedding, head;       // head.data is null if no logits are wanted from it
  const float* norm;
  double eps, residual_scale, embedding_scale, logit_divisor, lightning_scale, factor;  // factor: scale * log2(e)
  // the pool of the sparse layers: element types of keys and values and of k1 and k2, and elements from page to page, row to row, head to head
  int64_t kind, level_kind, kv[4][3];
  int64_t block, stride, kernel, init, window_blocks, num_blocks, coarse;
};

struct Batch {
  const int32_t *ids, *bounds, *lengths, *pages, *sparse, *read, *write;
  const float *cos[2], *sin[2];  // of Lightning and of sparse layers: `[T, dim / 2]`, or null
  const float* growth;           // [T], on the queries of sparse layers, or null
  int64_t sequences, width, any_sparse;
  float *hidden, *logits;        // `[T, W]`; `[T, V]` or null
  float* kept;  // keys, then values `[T, Hkv * D]` of each Lightning layer, or null
  int32_t* chosen;  // blocks `[T, Hkv, K]` of each sparse layer, or null; rows of dense sequences are left as they are
};

std::array<const Weights*, 8> weights_of(const Layer& l) {
  return {&l.q, &l.k, &l.v, &l.gate, &l.o, &l.mlp_gate, &l.mlp_up, &l.down};
}

// --- a step in parts, one for each thread ---

constexpr int64_t AT_HAND = 16 << 20;  // bytes of weights that lie in the cache of every core

// What a step takes of a sequence, in multiplications of its products; those with keys and values, which come from further
// away, take four times as long.
int64_t cost(const Model& m, const Batch& b, int64_t n) {
  int64_t length = b.lengths[n], attended = length, sum = m.head.outer * m.head.inner;
  if (b.sparse[n]) attended = std::min(length, m.num_blocks * m.block) + length / m.stride;
  for (int64_t i = 0; i < m.count; ++i) {
    const Layer& l = m.layers[i];
    for (const Weights* w : weights_of(l)) sum += w->data ? w->outer * w->inner : 0;
    if (l.sparse) sum += 8 * l.heads * l.dim * attended;
  }
  return sum * (b.bounds[n + 1] - b.bounds[n]);
}

int64_t weight_bytes(const Model& m) {
  int64_t sum = 0;
  auto add = [&](const Weights& w) {
    if (w.data) sum += w.outer * w.inner * (has_codes(w) ? 1 : item_bytes(w.kind));
  };
  add(m.head);
  for (int64_t i = 0; i < m.count; ++i)
    for (const Weights* w : weights_of(m.layers[i])) add(*w);
  return sum;
}

// Where the sequences of each thread end, if every thread is to compute some by itself: no thread waits for another, and
// keys, values and states stay in the caches of one core. But each thread reads all weights, which pays only where they lie
// in its cache. Empty if all threads go through the layers together.
std::vector<int64_t> ends_of_parts(const Model& m, const Batch& b, int64_t threads) {
  if (threads < 2 || b.sequences < threads || weight_bytes(m) > AT_HAND) return {};
  std::vector<int64_t> until(b.sequences + 1), ends;
  for (int64_t n = 0; n < b.sequences; ++n) until[n + 1] = until[n] + cost(m, b, n);
  int64_t whole = until.back(), greatest = 0;
  for (int64_t i = 1, first = 0; i <= threads; ++i) {
    int64_t last = std::lower_bound(until.begin(), until.end(), whole * i / threads) - until.begin();
    if (2 * (whole * i / threads) < until[last - 1] + until[last]) --last;  // the end nearer to a fair share
    last = std::max(first + 1, std::min(last, b.sequences - (threads - i)));
    greatest = std::max(greatest, until[last] - until[first]);
    ends.push_back(last), first = last;
  }
  return greatest * threads > whole + whole / 4 ? std::vector<int64_t>{} : ends;
}

// Sequences first ... last - 1 of a step as a step of their own.
class Part {
 public:
  Part(const Model& m, const Batch& whole, int64_t first, int64_t last)
      : batch_(whole), bounds_(whole.bounds + first, whole.bounds + last + 1) {
    int64_t token = bounds_[0], kept = 0, chosen = 0, angles[2] = {0, 0};
    for (int32_t& bound : bounds_) bound -= int32_t(token);
    for (int64_t i = 0; i < m.count; ++i) {
      const Layer& l = m.layers[i];
      (l.sparse ? chosen : kept) = l.sparse ? l.kv_heads * m.num_blocks : l.kv_heads * l.dim;
      angles[l.sparse != 0] = l.dim / 2;
    }
    batch_.bounds = bounds_.data(), batch_.sequences = last - first;
    batch_.ids += token, batch_.hidden += token * m.hidden;
    for (const int32_t** x : {&batch_.lengths, &batch_.sparse, &batch_.read, &batch_.write}) *x += first;
    batch_.pages += first * whole.width;
    for (int kind : {0, 1})
      if (whole.cos[kind]) batch_.cos[kind] += token * angles[kind], batch_.sin[kind] += token * angles[kind];
    if (whole.growth) batch_.growth += token;
    if (whole.logits) batch_.logits += token * m.head.outer;
    if (whole.kept) batch_.kept += token * kept;
    if (whole.chosen) batch_.chosen += token * chosen;
  }
  const Batch& batch() const { return batch_; }

 private:
  Batch batch_;
  std::vector<int32_t> bounds_;
};

}  // namespace
