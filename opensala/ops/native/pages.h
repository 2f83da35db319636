// Where the sequences of one call keep their keys and values: the page table that the paged forms share.
//
// A page holds one selection block. A compressed key lies in the page in which its window ends, so that what a page
// holds depends on nothing behind it.
#pragma once
#include "gemm.h"

struct PageTable {
  const int32_t *cu_seqlens, *lengths, *pages, *sparse;  // [N + 1], [N], [N, width], [N]
  int64_t sequences, width;
  int64_t tokens(int64_t n) const { return cu_seqlens[n + 1] - cu_seqlens[n]; }
  // Row i of sequence n belongs to token i * step + last of it.
  Rows rows(int64_t n, const void* data, int64_t kind, int64_t page_stride, int64_t row_stride, int64_t page_size,
            int64_t step = 1, int64_t last = 0) const {
    return {data, kind, row_stride, pages + n * width, page_stride, uint32_t(page_size), uint32_t(step), uint32_t(last)};
  }
};
