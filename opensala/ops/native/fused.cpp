// The elementwise steps around the attentions on the CPU, each in one pass over memory.
#include "replay.h"
#include "gemm.h"

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

// to[i] = x[i] / rms(x) * weight[i]
void normalise(const float* x, const float* weight, float* to, int64_t width, float eps) {
  float scale = inverse_rms(x, width, eps);
  for (int64_t i = 0; i < width; ++i) to[i] = x[i] * scale * weight[i];
}

}  // namespace

// x, out `[rows, width]`; weight `[width]`.
extern "C" void opensala_rms_norm(const float* x, const float* weight, float* out, int64_t rows, int64_t width, float eps,
                                  int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > MANY)
  for (int64_t r = 0; r < rows; ++r) normalise(x + r * width, weight, out + r * width, width, eps);
}

// sum = x + scale * y; out = its norm; all `[rows, width]`, weight `[width]`.
extern "C" void opensala_add_rms_norm(const float* x, const float* y, const float* weight, float* sum, float* out, int64_t rows,
                                      int64_t width, float scale, float eps, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > MANY)
  for (int64_t r = 0; r < rows; ++r) {
    const float *a = x + r * width, *b = y + r * width;
    float* to = sum + r * width;
    for (int64_t i = 0; i < width; ++i) to[i] = a[i] + scale * b[i];
    normalise(to, weight, out + r * width, width, eps);
  }
}

// out = x + scale * y, `count` elements.
extern "C" void opensala_add_scaled(const float* x, const float* y, float* out, int64_t count, float scale, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count > MANY)
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] + scale * y[i];
}

// out = gate / (1 + exp(-gate)) * up, element by element; a vector's lanes and the last few elements go the same way.
extern "C" void opensala_silu_mul(const float* gate, const float* up, float* out, int64_t rows, int64_t width, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > MANY)
  for (int64_t r = 0; r < rows; ++r) {
    const float *g = gate + r * width, *u = up + r * width;
    float* to = out + r * width;
    Vec one = splat(1.0f), turn = splat(-1.4426950408889634f);
    int64_t i = 0;
    for (; i + W <= width; i += W) {
      Vec x = load(g + i);
      store(to + i, x / (one + exp2_any(x * turn)) * load(u + i));
    }
    if (i < width) {
      float a[W] = {}, b[W] = {}, c[W];
      std::copy(g + i, g + width, a), std::copy(u + i, u + width, b);
      Vec x = load(a);
      store(c, x / (one + exp2_any(x * turn)) * load(b));
      std::copy(c, c + (width - i), to + i);
    }
  }
}

// x, out `[rows, heads, dim]`; weight `[dim]` or null; cos, sin `[rows or period, dim / 2]` or null: row r uses r % period.
extern "C" void opensala_norm_rope(const float* x, const float* weight, const float* cos, const float* sin, float* out, int64_t rows,
                                   int64_t heads, int64_t dim, int64_t period, float eps, int64_t threads) {
  int64_t half = dim / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * heads * dim > MANY)
  for (int64_t r = 0; r < rows; ++r) {
    const float *c = cos ? cos + r % period * half : nullptr, *s = sin ? sin + r % period * half : nullptr;
    for (int64_t h = 0; h < heads; ++h) {
      const float* from = x + (r * heads + h) * dim;
      float *to = out + (r * heads + h) * dim, scale = weight ? inverse_rms(from, dim, eps) : 1.0f;
      if (!c) {
        for (int64_t i = 0; i < dim; ++i) to[i] = from[i] * scale * (weight ? weight[i] : 1.0f);
        continue;
      }
      for (int64_t i = 0; i < half; ++i) {
        float a = from[i] * scale, b = from[i + half] * scale;
        if (weight) a *= weight[i], b *= weight[i + half];
        to[i] = a * c[i] - b * s[i];
        to[i + half] = b * c[i] + a * s[i];
      }
    }
  }
}

// x, gate (or null), out `[rows, width]`; weight `[width]` or null.
extern "C" void opensala_norm_gate(const float* x, const float* weight, const float* gate, float* out, int64_t rows, int64_t width,
                                   float eps, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > MANY)
  for (int64_t r = 0; r < rows; ++r) {
    const float *from = x + r * width, *g = gate ? gate + r * width : nullptr;
    float *to = out + r * width, scale = weight ? inverse_rms(from, width, eps) : 1.0f;
    Vec one = splat(1.0f), turn = splat(-1.4426950408889634f);
    int64_t i = 0;
    for (; i + W <= width; i += W) {
      Vec y = load(from + i) * scale;
      if (weight) y *= load(weight + i);
      if (g) y /= one + exp2_any(load(g + i) * turn);
      store(to + i, y);
    }
    for (; i < width; ++i) to[i] = from[i] * scale * (weight ? weight[i] : 1.0f) / (g ? 1.0f + std::exp(-g[i]) : 1.0f);
  }
}

REPLAYABLE(opensala_rms_norm)
REPLAYABLE(opensala_add_rms_norm)
REPLAYABLE(opensala_silu_mul)
REPLAYABLE(opensala_norm_rope)
REPLAYABLE(opensala_norm_gate)
REPLAYABLE(opensala_add_scaled)
