// The kernels in pieces: what the calls of whole layers are made of, and the decoding step (`step.cpp`) too. A piece has
// one compiled form, so that both give the same bits.
#pragma once
#include "linear.h"
#include "pages.h"
#include "select.h"

// --- elementwise, one row (fused.cpp) ---

// out = x / rms(x) * weight
void rms_norm_row(const float* x, const float* weight, float* out, int64_t width, float eps);
// out = x + scale * y; out may be x
void add_scaled_row(const float* x, const float* y, float* out, int64_t width, float scale);
// out = silu(gate) * up
void silu_mul_row(const float* gate, const float* up, float* out, int64_t width);
// x, out `[heads, dim]`; weight `[dim]` or null, cos and sin `[dim / 2]` or null; out is not x
void norm_rope_row(const float* x, const float* weight, const float* cos, const float* sin, float* out, int64_t heads,
                   int64_t dim, float eps);
// out = x / rms(x) * weight * sigmoid(gate); without weight no norm, gate may be null
void norm_gate_row(const float* x, const float* weight, const float* gate, float* out, int64_t width, float eps);

// --- Lightning attention over states in slots (lightning_slots.cpp) ---

struct Slots {
  const float *q, *k, *v, *decay;  // q `[T, H, D]`, k and v `[T, H / repeats, D or E]`
  float *out, *states;             // [T, H, E], [slots, H, D, E]
  const int32_t *bounds, *read, *write;
  int64_t heads, dim, value_dim, repeats;
  float scale;
};
void lightning_head(const Slots& s, int64_t n, int64_t head);

// --- keys and values into pages (pages.cpp) ---

// A tensor of the pool: elements from page to page, row to row, head to head.
struct Place {
  void* data;
  int64_t page, row, head;
};
struct Store {
  const void *k, *v;         // [T, Hkv, D], [T, Hkv, E]
  int64_t kind, level_kind;  // of keys and values, of k1 and k2; where kind is int8, k and v are float32
  PageTable table;
  Place keys, values, k1, k2;
  int64_t kv_heads, dim, value_dim, size, stride, kernel;
  Rows rows(int64_t n, const Place& place, int64_t of, int64_t step = 1, int64_t last = 0) const {
    return table.rows(n, place.data, of, place.page, place.row, size, step, last);
  }
};
void store_sequence(const Store& s, int64_t n);

// --- selection of blocks (select.cpp) ---

void select_tile(const Unit& unit);
// The same in parts, for a tile of few queries with many blocks. First the denominators, `[queries, group]`:
void select_lse(const Unit& unit, float* lse);
// then scores of blocks first ... last - 1, in any parts (first is a multiple of W), into rows of `stride`:
void select_scores(const Unit& unit, const float* lse, int64_t first, int64_t last, float* scores, int64_t stride);
// then the choice.
void select_best(const Unit& unit, const float* scores, int64_t stride);

// --- attention (attend.cpp) ---

// One sequence.
struct Attention {
  const float* q;
  Rows k, v;  // of head 0
  const int32_t* blocks;  // [T, Hkv, K]; null: each query attends to all blocks up to its own
  int64_t tokens, length, heads, kv_heads, dim, value_dim, num_blocks, block_size;
  int64_t k_head, v_head;  // elements from head to head; q is contiguous [T, Hq, D]
  float factor;  // scale * log2(e)
  float *out = nullptr, *lse = nullptr;  // [T, Hq, E] and, if wanted, [T, Hq]
  bool narrow = false;  // queries and weights may be rounded to bfloat16 where keys and values are that
  int64_t slices = 1;  // parts into which the query heads of a kv head are cut; a "head" below is one such part
  int64_t group() const { return heads / (kv_heads * slices); }
  int64_t kv_head(int64_t head) const { return head / slices; }
  int64_t position(int64_t t) const { return length - tokens + t; }
  int64_t blocks_up_to(int64_t t) const { return position(t) / block_size + 1; }
};
// All queries of one head (or slice of one).
void attend_head(const Attention& p, int64_t head);
