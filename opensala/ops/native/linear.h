// Linear layers with weights of any kind: what the product of a whole call and the decoding step share.
#pragma once
#include "gemm.h"

// Weights `[outer, inner]` of one linear layer. `kind` says what `data` holds:
//   0, 1, 2  float32, bfloat16, float16, row by row as nn.Linear keeps them
//   3        signed 8-bit codes `[outer, inner]`
//   4        4-bit codes: for each row, for each 128 columns from c on, 16 words of 32 bits; bits 4 j ... 4 j + 3 of word l
//            are the code of column c + 16 j + l (a row whose length 128 does not divide is filled up with anything)
// A code q of column k stands for scales[row, k / group] * (q - zeros[row, k / group]). The layout is stated, and filled,
// in `ops/linear/quantised.py`.
struct Weights {
  const void* data;
  int64_t kind;
  const float* scales;  // `[outer, ceil(inner / group)]`; null for kinds 0 to 2
  const float* zeros;   // the same, or null: 0 for 8 bits, 8 for 4
  int64_t group;        // columns that share a scale; a multiple of 16, or all of them
  const float* bias;    // `[outer]` or null
  int64_t outer, inner;
};
static inline bool has_codes(const Weights& w) { return w.kind >= 3; }

// x `[rows, inner]` with rows `x_stride` elements apart, times `weights` transposed, into out `[rows, out_stride]`.
struct Linear {
  const float* x;
  Weights weights;
  float* out;
  int64_t rows, x_stride, out_stride;
};

// Columns `first ... first + count - 1` of the outputs for rows `row ... end - 1`. `widened` has room for
// `widened_floats` of them, or is null for fewer.
void linear_columns(const Linear& p, int64_t first, int64_t count, int64_t row, int64_t end, float* widened);
int64_t widened_floats(const Linear& p, int64_t count);
// How many columns make one unit of work for `threads` threads.
int64_t columns_of_unit(const Linear& p, int64_t threads);
