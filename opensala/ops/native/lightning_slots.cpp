// Lightning attention for inference: the recurrence itself, token by token, over states that lie in slots.
//
// A token's output is one chain of multiply-adds over the rows of the state, and a row of the state one chain over the
// tokens: the bits of both are the same however a sequence is cut into calls, whatever else is in the call, and
// however many threads there are. For speed, a group of state rows is kept in registers while a block of tokens
// passes; the sums of their outputs wait in cache for the next group.
#include "replay.h"
#include "parts.h"

namespace {

constexpr int ROWS_HELD = W == 16 ? 8 : 4;  // state rows in registers at once
constexpr int TOKENS = 64;                  // of a block
constexpr int64_t SINGLE_WORK = 1 << 16;    // multiplications below which a second thread costs more than it saves

// R rows of the state, C vectors wide, walk from `state` over `count` tokens to `to`, rows `width` apart:
// state <- keep state + k v, out += q state.
template <int R, int C>
INLINE void walk(const float* q, const float* k, const float* v, int64_t token, int64_t key_token, int64_t value_token, int count, float keep,
                 const float* state, float* to, int64_t width, float* out) {
  Vec held[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) held[r][c] = load(state + r * width + c * W);
  for (int t = 0; t < count; ++t, q += token, k += key_token, v += value_token, out += C * W) {
    Vec value[C], sum[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) value[c] = load(v + c * W), sum[c] = load(out + c * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec key = splat(k[r]), query = splat(q[r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        held[r][c] = held[r][c] * keep + key * value[c];
        sum[c] += query * held[r][c];
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(out + c * W, sum[c]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(to + r * width + c * W, held[r][c]);
}

// One sequence and head, columns first ... first + width - 1 of values and state; width is a multiple of W, padded. Where
// there are so many columns, states are read from their slot and written to theirs, else in `state` between.
template <int C>
void run(const Slots& s, int64_t n, int64_t head, int64_t first, float* state, float* values, float* sums) {
  constexpr int64_t width = C * W;
  int64_t columns = std::min(width, s.value_dim - first), size = s.heads * s.dim * s.value_dim;
  int64_t offset = head * s.dim * s.value_dim + first, token = s.heads * s.dim, value_token = s.heads * s.value_dim;
  int64_t kv_head = head / s.repeats, key_token = token / s.repeats, from_token = value_token / s.repeats;
  bool in_place = columns == width && s.bounds[n] < s.bounds[n + 1];
  float* to = in_place ? s.states + s.write[n] * size + offset : state;
  const float* from = s.read[n] >= 0 ? s.states + s.read[n] * size + offset : nullptr;
  int64_t step = in_place ? s.value_dim : width;
  for (int64_t d = 0; !(in_place && from) && d < s.dim; ++d) {
    float* row = to + d * step;
    if (from) std::copy_n(from + d * s.value_dim, columns, row), std::fill(row + columns, row + width, 0.0f);
    else std::fill_n(row, width, 0.0f);
  }
  if (!(in_place && from)) from = to;
  float keep = std::exp(-s.decay[head]);
  for (int64_t t = s.bounds[n]; t < s.bounds[n + 1]; t += TOKENS, from = to) {
    int count = int(std::min<int64_t>(TOKENS, s.bounds[n + 1] - t));
    const float *q = s.q + t * token + head * s.dim, *k = s.k + t * key_token + kv_head * s.dim;
    const float* v = s.v + t * from_token + kv_head * s.value_dim + first;
    if (columns < width) std::fill_n(values, count * width, 0.0f);
    for (int i = 0; i < count; ++i) std::copy_n(v + i * from_token, columns, values + i * width);
    std::fill_n(sums, count * width, 0.0f);
    int64_t d = 0;
    for (; d + ROWS_HELD <= s.dim; d += ROWS_HELD)
      walk<ROWS_HELD, C>(q + d, k + d, values, token, key_token, width, count, keep, from + d * step, to + d * step, step, sums);
    for (; d < s.dim; ++d)
      walk<1, C>(q + d, k + d, values, token, key_token, width, count, keep, from + d * step, to + d * step, step, sums);
    float* out = s.out + t * value_token + head * s.value_dim + first;
    for (int i = 0; i < count; ++i)
      for (int64_t c = 0; c < columns; ++c) out[i * value_token + c] = sums[i * width + c] * s.scale;
  }
  if (in_place) return;
  for (int64_t d = 0; d < s.dim; ++d)
    std::copy_n(state + d * width, columns, s.states + s.write[n] * size + offset + d * s.value_dim);
}

constexpr int WIDE = 2;  // vectors of a panel of columns
int64_t panel_width(const Slots& s) { return s.value_dim > W ? WIDE * W : W; }

void one_panel(const Slots& s, int64_t n, int64_t head, int64_t first, float* state, float* values, float* sums) {
  if (panel_width(s) == W) run<1>(s, n, head, first, state, values, sums);
  else run<WIDE>(s, n, head, first, state, values, sums);
}

}  // namespace

void lightning_head(const Slots& s, int64_t n, int64_t head) {
  int64_t panel = panel_width(s);
  Scratch state(s.dim * panel), values(TOKENS * panel), sums(TOKENS * panel);
  for (int64_t first = 0; first < s.value_dim; first += panel) one_panel(s, n, head, first, state.data, values.data, sums.data);
}

// q, k `[T, H, D]`, v, out `[T, H, E]` contiguous; bounds `[N + 1]`; sequence n begins with slot read[n] of states
// `[slots, H, D, E]` (-1: zeros) and leaves its last state in slot write[n].
extern "C" void opensala_lightning_slots(const float* q, const float* k, const float* v, const float* decay, float* out,
                                         float* states, const int32_t* bounds, const int32_t* read, const int32_t* write,
                                         int64_t sequences, int64_t heads, int64_t dim, int64_t value_dim, float scale,
                                         int64_t threads) {
  Slots s{q, k, v, decay, out, states, bounds, read, write, heads, dim, value_dim, 1, scale};
  int64_t panel = panel_width(s), panels = (value_dim + panel - 1) / panel;
  if (bounds[sequences] * heads * dim * value_dim < SINGLE_WORK) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch state(dim * panel), values(TOKENS * panel), sums(TOKENS * panel);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < sequences * heads * panels; ++i) {
      int64_t n = i / (heads * panels), head = i / panels % heads, first = i % panels * panel;
      one_panel(s, n, head, first, state.data, values.data, sums.data);
    }
  }
}

REPLAYABLE(opensala_lightning_slots)
