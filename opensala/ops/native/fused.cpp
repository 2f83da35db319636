// The elementwise steps around the attentions on the CPU, each in one pass over memory.
#include "parts.h"
#include "replay.h"
#include "rows.h"

namespace {

float inverse_rms(const float* x, int64_t n, float eps) {
  Vec sums{};
  float sum = 0;
  int64_t i = 0;
  for (; i + W <= n; i += W) sums += load(x + i) * load(x + i);
  for (; i < n; ++i) sum += x[i] * x[i];
  return 1.0f / std::sqrt((sum + total(sums)) / float(n) + eps);
}

// Elements from which a second thread pays.
constexpr int64_t MANY = 1 << 15;

}  // namespace

// Not inlined: the decoding step calls the very code that whole calls run, whatever a compiler makes of it elsewhere.
void rms_norm_row(const float* x, const float* weight, float* out, int64_t width, float eps) {
  float scale = inverse_rms(x, width, eps);
  for (int64_t i = 0; i < width; ++i) out[i] = x[i] * scale * weight[i];
}

void add_scaled_row(const float* x, const float* y, float* out, int64_t width, float scale) {
  for (int64_t i = 0; i < width; ++i) out[i] = x[i] + scale * y[i];
}

void silu_mul_row(const float* gate, const float* up, float* out, int64_t width) {
  Vec one = splat(1.0f), turn = splat(-1.4426950408889634f);
  int64_t i = 0;
  for (; i + W <= width; i += W) {
    Vec x = load(gate + i);
    store(out + i, x / (one + exp2_any(x * turn)) * load(up + i));
  }
  if (i < width) {
    float a[W] = {}, b[W] = {}, c[W];
    std::copy(gate + i, gate + width, a), std::copy(up + i, up + width, b);
    Vec x = load(a);
    store(c, x / (one + exp2_any(x * turn)) * load(b));
    std::copy(c, c + (width - i), out + i);
  }
}

void norm_rope_row(const float* x, const float* weight, const float* cos, const float* sin, float* out, int64_t heads,
                   int64_t dim, float eps) {
  int64_t half = dim / 2;
  for (int64_t h = 0; h < heads; ++h) {
    const float* from = x + h * dim;
    float *to = out + h * dim, scale = weight ? inverse_rms(from, dim, eps) : 1.0f;
    if (!cos) {
      for (int64_t i = 0; i < dim; ++i) to[i] = from[i] * scale * (weight ? weight[i] : 1.0f);
      continue;
    }
    for (int64_t i = 0; i < half; ++i) {
      float a = from[i] * scale, b = from[i + half] * scale;
      if (weight) a *= weight[i], b *= weight[i + half];
      to[i] = a * cos[i] - b * sin[i];
      to[i + half] = b * cos[i] + a * sin[i];
    }
  }
}

void norm_gate_row(const float* x, const float* weight, const float* gate, float* out, int64_t width, float eps) {
  float scale = weight ? inverse_rms(x, width, eps) : 1.0f;
  Vec one = splat(1.0f), turn = splat(-1.4426950408889634f);
  int64_t i = 0;
  for (; i + W <= width; i += W) {
    Vec y = load(x + i) * scale;
    if (weight) y *= load(weight + i);
    if (gate) y /= one + exp2_any(load(gate + i) * turn);
    store(out + i, y);
  }
  for (; i < width; ++i) out[i] = x[i] * scale * (weight ? weight[i] : 1.0f) / (gate ? 1.0f + std::exp(-gate[i]) : 1.0f);
}

// Below, kinds are those of `with_type` and say in what a tensor comes and in what it goes; all work is in float32, on rows
// in their place where they are float32. Room for a row is a thread's own.

// x, out `[rows, width]`; weight `[width]`.
extern "C" void opensala_rms_norm(const float* x, const float* weight, float* out, int64_t rows, int64_t width, float eps,
                                  int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > MANY)
  for (int64_t r = 0; r < rows; ++r) rms_norm_row(x + r * width, weight, out + r * width, width, eps);
}

// sum = x + scale * y, of the kind of x; out = its norm, before it is rounded; all `[rows, width]`, weight `[width]`.
extern "C" void opensala_add_rms_norm(const void* x, int64_t x_kind, const void* y, int64_t y_kind, const float* weight, void* sum,
                                      void* out, int64_t out_kind, int64_t rows, int64_t width, float scale, float eps,
                                      int64_t threads) {
  RowsIn xs{x, x_kind, width}, ys{y, y_kind, width};
  RowsOut sums{sum, x_kind, width}, outs{out, out_kind, width};
#pragma omp parallel num_threads(threads) if (rows * width > MANY)
  {
    Scratch a(width), b(width), c(width), d(width);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      float *total = place_of(sums, r, c.data), *normed = place_of(outs, r, d.data);
      add_scaled_row(widened(xs, r, a.data), widened(ys, r, b.data), total, width, scale);
      rms_norm_row(total, weight, normed, width, eps);
      put(sums, r, total);
      put(outs, r, normed);
    }
  }
}

// out = x + scale * y, of the kind of x; `[rows, width]`.
extern "C" void opensala_add_scaled(const void* x, int64_t x_kind, const void* y, int64_t y_kind, void* out, int64_t rows,
                                    int64_t width, float scale, int64_t threads) {
  RowsIn xs{x, x_kind, width}, ys{y, y_kind, width};
  RowsOut outs{out, x_kind, width};
#pragma omp parallel num_threads(threads) if (rows * width > MANY)
  {
    Scratch a(width), b(width), c(width);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      float* total = place_of(outs, r, c.data);
      add_scaled_row(widened(xs, r, a.data), widened(ys, r, b.data), total, width, scale);
      put(outs, r, total);
    }
  }
}

// out = gate / (1 + exp(-gate)) * up, element by element; a vector's lanes and the last few elements go the same way.
extern "C" void opensala_silu_mul(const void* gate, const void* up, void* out, int64_t kind, int64_t rows, int64_t width,
                                  int64_t threads) {
  RowsIn gates{gate, kind, width}, ups{up, kind, width};
  RowsOut outs{out, kind, width};
#pragma omp parallel num_threads(threads) if (rows * width > MANY)
  {
    Scratch a(width), b(width), c(width);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      float* made = place_of(outs, r, c.data);
      silu_mul_row(widened(gates, r, a.data), widened(ups, r, b.data), made, width);
      put(outs, r, made);
    }
  }
}

// x, out `[rows, heads, dim]`; weight `[dim]` or null; cos, sin `[rows or period, dim / 2]` or null: row r uses r % period.
extern "C" void opensala_norm_rope(const void* x, int64_t x_kind, const float* weight, const float* cos, const float* sin, void* out,
                                   int64_t out_kind, int64_t rows, int64_t heads, int64_t dim, int64_t period, float eps,
                                   int64_t threads) {
  int64_t half = dim / 2, width = heads * dim;
  RowsIn xs{x, x_kind, width};
  RowsOut outs{out, out_kind, width};
#pragma omp parallel num_threads(threads) if (rows * width > MANY)
  {
    Scratch a(width), b(width);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      float* made = place_of(outs, r, b.data);
      norm_rope_row(widened(xs, r, a.data), weight, cos ? cos + r % period * half : nullptr, sin ? sin + r % period * half : nullptr,
                    made, heads, dim, eps);
      put(outs, r, made);
    }
  }
}

// x, gate (or null), out `[rows, width]`; weight `[width]` or null.
extern "C" void opensala_norm_gate(const void* x, int64_t x_kind, const float* weight, const void* gate, int64_t gate_kind, void* out,
                                   int64_t out_kind, int64_t rows, int64_t width, float eps, int64_t threads) {
  RowsIn xs{x, x_kind, width}, gates{gate, gate_kind, width};
  RowsOut outs{out, out_kind, width};
#pragma omp parallel num_threads(threads) if (rows * width > MANY)
  {
    Scratch a(width), b(width), c(width);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      float* made = place_of(outs, r, c.data);
      norm_gate_row(widened(xs, r, a.data), weight, widened(gates, r, b.data), made, width, eps);
      put(outs, r, made);
    }
  }
}

REPLAYABLE(opensala_rms_norm)
REPLAYABLE(opensala_add_rms_norm)
REPLAYABLE(opensala_silu_mul)
REPLAYABLE(opensala_norm_rope)
REPLAYABLE(opensala_norm_gate)
REPLAYABLE(opensala_add_scaled)
