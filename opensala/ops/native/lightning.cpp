// Lightning attention on the CPU, in chunks: masked products inside a chunk, one state carried between chunks.
//
// A unit of work is one head of one sequence, or, where there are fewer of those than threads, a segment of it: then a
// first pass sums what each segment adds to the state, a scan over segments gives the state each begins with, and a
// second pass makes the outputs. Everything a chunk touches (128 KB at D = 64) stays in the core's cache.
// Token strides may be negative: the backward pass runs the same recurrence from the end.
#include <cstdlib>
#include <vector>

#include "gemm.h"

namespace {

constexpr int CHUNK = 64;  // tokens; a multiple of W

struct Tokens {  // one tensor [T, H, D] seen as rows of one head
  const float* data;
  int64_t token, head, dim;  // strides in elements, width
};

// out_i = scale * (sum over j <= i of decay^(i - j) (q_i . k_j) v_j + decay^(i + 1) q_i S); with `swapped`, v takes the
// place of k, k that of v, and S is transposed: the two gradients of the backward pass share one state that way.
struct Output {
  Tokens q;
  bool swapped;
  float* data;
  int64_t token, head;
};

struct Recurrence {
  Tokens k, v;
  std::vector<Output> outputs;
  const float* decay;  // [H], per token
  const float* start;  // [N, H, D, E]
  float* final;        // [N, H, D, E]
  int64_t heads;
  float scale;
};

float power(float decay, int64_t steps) {
  float x = -decay * float(steps);
  return x < -80.0f ? 0.0f : std::exp(x);  // smaller factors would make denormal numbers, many times slower
}

// What one chunk needs, for one head.
class Worker {
 public:
  Worker(const Recurrence& r)
      : r_(r), inner_(round_up(r.k.dim, W)), width_(round_up(r.v.dim, W)), widest_(std::max(inner_, width_)),
        keys_t_(widest_ * CHUNK), keys_(CHUNK * inner_), values_(CHUNK * width_), queries_(CHUNK * widest_),
        scores_(BAND * CHUNK), result_(CHUNK * widest_), state_(round_up(r.k.dim, W) * width_), turned_(width_ * inner_) {}

  void begin(int64_t head, const float* state) {
    head_ = head;
    for (int i = 0; i <= CHUNK; ++i) powers_[i] = power(r_.decay[head], i);
    pack_rows([&](int64_t d) { return state + d * r_.v.dim; }, int(r_.k.dim), int(inner_), r_.v.dim, state_.data, width_);
  }

  void end(float* state) const {
    for (int64_t d = 0; d < r_.k.dim; ++d) std::copy_n(state_.data + d * width_, r_.v.dim, state + d * r_.v.dim);
  }

  void read(int64_t t, int count) {
    pack_rows([&](int64_t j) { return row(r_.k, t + j); }, count, count, r_.k.dim, keys_.data, inner_);
    pack_rows([&](int64_t j) { return row(r_.v, t + j); }, count, count, r_.v.dim, values_.data, width_);
  }

  // state <- decay^count state + sum over the chunk of decay^(count - 1 - j) k_j v_j; spends the chunk's keys
  void fold(int count) {
    for (int j = 0; j < count; ++j)
      for (int64_t d = 0; d < inner_; ++d) keys_.data[j * inner_ + d] *= powers_[count - 1 - j];
    Vec keep = splat(powers_[count]);
    for (int64_t i = 0; i < r_.k.dim * width_; i += W) store(state_.data + i, load(state_.data + i) * keep);
    product<true>([&](int d, int64_t j) { return keys_.data[j * inner_ + d]; }, int(r_.k.dim), count, values_.data, width_,
                  [&](int d) { return state_.data + d * width_; }, int(width_));
  }

  void output(const Output& o, int64_t t, int count) {
    const Tokens &k = o.swapped ? r_.v : r_.k, &v = o.swapped ? r_.k : r_.v;
    const float *values = o.swapped ? keys_.data : values_.data, *state = state_.data;
    int64_t dim = k.dim, width = o.swapped ? inner_ : width_;
    if (o.swapped) {
      pack_transposed([&](int64_t d) { return state_.data + d * width_; }, int(r_.k.dim), int(inner_), r_.v.dim, turned_.data, inner_);
      state = turned_.data;
    }
    pack_transposed([&](int64_t j) { return row(k, t + j); }, count, int(round_up(count, W)), dim, keys_t_.data, CHUNK);
    for (int i = 0; i < count; ++i) {  // queries with the factor of what lies before the chunk
      const float* q = row(o.q, t + i);
      float factor = powers_[i + 1] * r_.scale;
      for (int64_t d = 0; d < dim; ++d) queries_.data[i * dim + d] = q[d] * factor;
    }
    auto result = [&](int i) { return result_.data + i * width; };
    product<false>([&](int i, int64_t d) { return queries_.data[i * dim + d]; }, count, dim, state, width, result, int(width));
    for (int i = 0; i < count; i += BAND) {  // a band of queries sees the keys up to its end only
      int rows = std::min(BAND, count - i), reach = int(round_up(i + rows, W));
      const float* q[BAND];
      for (int r = 0; r < rows; ++r) q[r] = row(o.q, t + i + r);
      auto score = [&](int r) { return scores_.data + r * CHUNK; };
      product<false>([&](int r, int64_t d) { return q[r][d]; }, rows, dim, keys_t_.data, CHUNK, score, reach);
      for (int r = 0; r < rows; ++r) {
        float* s = score(r);
        for (int j = 0; j <= i + r; ++j) s[j] *= powers_[i + r - j] * r_.scale;
        for (int j = i + r + 1; j < i + rows; ++j) s[j] = 0.0f;
      }
      product<true>([&](int r, int64_t j) { return score(r)[j]; }, rows, i + rows, values, width,
                    [&](int r) { return result(i + r); }, int(width));
    }
    for (int i = 0; i < count; ++i) std::copy_n(result(i), v.dim, o.data + (t + i) * o.token + head_ * o.head);
  }

 private:
  static constexpr int BAND = 2 * ROWS;
  const Recurrence& r_;
  int64_t inner_, width_, widest_, head_ = 0;
  float powers_[CHUNK + 1];
  Scratch keys_t_, keys_, values_, queries_, scores_, result_, state_, turned_;

  const float* row(const Tokens& x, int64_t t) const { return x.data + t * x.token + head_ * x.head; }
};

struct Segment {
  int64_t sequence, head, begin, end;
};

template <typename Step>
void chunks(const Segment& s, const Step& step) {
  for (int64_t t = s.begin; t < s.end; t += CHUNK) step(t, int(std::min<int64_t>(CHUNK, s.end - t)));
}

void run(const Recurrence& r, const std::vector<std::pair<int64_t, int64_t>>& sequences, int64_t threads) {
  int64_t state = r.k.dim * r.v.dim, units = int64_t(sequences.size()) * r.heads;
  int64_t cuts = std::max<int64_t>(1, (threads + units - 1) / units);
  std::vector<Segment> segments;
  for (size_t n = 0; n < sequences.size(); ++n) {
    auto [begin, end] = sequences[n];
    int64_t length = std::max<int64_t>(CHUNK * 8, round_up((end - begin + cuts - 1) / cuts, CHUNK));
    for (int64_t h = 0; h < r.heads; ++h)
      for (int64_t a = begin; a < end; a += length) segments.push_back({int64_t(n), h, a, std::min(a + length, end)});
  }
  int64_t many = int64_t(segments.size());
  std::vector<float> entry(many * state, 0.0f);  // the state each segment begins with
  if (many > units) {
#pragma omp parallel num_threads(threads)
    {
      Worker worker(r);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < many; ++i) {
        worker.begin(segments[i].head, entry.data() + i * state);
        chunks(segments[i], [&](int64_t t, int count) { worker.read(t, count), worker.fold(count); });
        worker.end(entry.data() + i * state);
      }
    }
  }
  std::vector<float> carried(state), sum(state);
  for (int64_t i = 0; i < many; ++i) {
    const Segment& s = segments[i];
    const float* begin = r.start + (s.sequence * r.heads + s.head) * state;
    if (s.begin == sequences[s.sequence].first) std::copy_n(begin, state, carried.data());
    std::copy_n(entry.data() + i * state, state, sum.data());
    std::copy_n(carried.data(), state, entry.data() + i * state);
    float keep = power(r.decay[s.head], s.end - s.begin);
    for (int64_t j = 0; j < state; ++j) carried[j] = carried[j] * keep + sum[j];
  }
#pragma omp parallel num_threads(threads)
  {
    Worker worker(r);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < many; ++i) {
      const Segment& s = segments[i];
      worker.begin(s.head, entry.data() + i * state);
      chunks(s, [&](int64_t t, int count) {
        worker.read(t, count);
        for (const Output& o : r.outputs) worker.output(o, t, count);
        worker.fold(count);
      });
      if (s.end == sequences[s.sequence].second) worker.end(r.final + (s.sequence * r.heads + s.head) * state);
    }
  }
}

}  // namespace

// q, k `[tokens, H, D]`, v, out `[tokens, H, E]`, contiguous; `bounds` `[N + 1]` cuts the tokens into sequences, `start` and
// `final` are `[N, H, D, E]`. With `backwards` the pointers are those of the last token's row and time runs down. With `q2`
// `[tokens, H, E]`, the output in which v and k have changed places is written to out2 `[tokens, H, D]` as well.
extern "C" void opensala_lightning(
    const float* q, const float* k, const float* v, float* out, const float* q2, float* out2, const float* decay,
    const float* start, float* final, const int64_t* bounds, int64_t sequences, int64_t heads, int64_t dim, int64_t value_dim,
    int64_t backwards, float scale, int64_t threads) {
  int64_t sign = backwards ? -1 : 1, row = sign * heads * dim, value_row = sign * heads * value_dim;
  Recurrence r{{k, row, dim, dim}, {v, value_row, value_dim, value_dim}, {{{q, row, dim, dim}, false, out, value_row, value_dim}},
               decay, start, final, heads, scale};
  if (q2) r.outputs.push_back({{q2, value_row, value_dim, value_dim}, true, out2, row, dim});
  std::vector<std::pair<int64_t, int64_t>> list;
  for (int64_t n = 0; n < sequences; ++n) list.push_back({bounds[n], bounds[n + 1]});
  run(r, list, threads);
}
