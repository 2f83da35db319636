// The gradients of the elementwise steps around the attentions, each in one pass over memory.
//
// A row is copied into room of whole vectors whose last ones are filled up with zeros, so that no loop has a tail, and is
// rounded to its element type on the way out. Gradients of weights are summed by each thread for itself, over its rows in
// order: the same number of threads gives the same bits.
#include <omp.h>

#include "rows.h"

namespace {

constexpr int64_t MANY = 1 << 15;  // elements from which a second thread pays
constexpr int64_t LANES = 16;      // a thread's sums begin at a multiple of it, whatever W is: the caller makes the room

Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp2_any(x * -1.4426950408889634f)); }

// A row of n floats in whole vectors.
struct Padded {
  Scratch room;
  int64_t n, size;
  explicit Padded(int64_t n, const float* row = nullptr) : room(round_up(n, W)), n(n), size(round_up(n, W)) {
    std::fill_n(room.data, size, 0.0f);
    if (row) read(row);
  }
  void read(const float* row) { std::copy_n(row, n, room.data); }
  void read(const RowsIn& x, int64_t r) {
    const float* row = widened(x, r, room.data);
    if (row != room.data) read(row);
  }
  Vec at(int64_t i) const { return load(room.data + i); }
  void set(int64_t i, Vec v) { store(room.data + i, v); }
};

// Backwards through y = x / rms(x) * weight: the gradient of y becomes that of x; that of the weight is added to `dweight`,
// whole vectors, if there is one.
void norm_back(const Padded& x, const Padded& weight, Padded& gradient, float eps, float* dweight) {
  Vec squares{}, along{};
  for (int64_t i = 0; i < x.size; i += W) {
    squares += x.at(i) * x.at(i);
    along += gradient.at(i) * weight.at(i) * x.at(i);
  }
  float n = float(x.n), scale = 1.0f / std::sqrt(total(squares) / n + eps), back = total(along) * scale * scale * scale / n;
  for (int64_t i = 0; i < x.size; i += W) {
    Vec d = gradient.at(i) * scale;
    if (dweight) store(dweight + i, load(dweight + i) + d * x.at(i));
    gradient.set(i, d * weight.at(i) - x.at(i) * back);
  }
}

float inverse_rms(const Padded& x, float eps) {
  Vec squares{};
  for (int64_t i = 0; i < x.size; i += W) squares += x.at(i) * x.at(i);
  return 1.0f / std::sqrt(total(squares) / float(x.n) + eps);
}

// Through the gate: y = normed * sigmoid(gate). The gradient of y becomes that of `normed`, the gate that of its logits.
void gate_back(const Padded& x, const Padded* weight, Padded& gate, Padded& gradient, float eps) {
  float scale = weight ? inverse_rms(x, eps) : 1.0f;
  for (int64_t i = 0; i < x.size; i += W) {
    Vec open = sigmoid(gate.at(i)), y = x.at(i) * scale, d = gradient.at(i);
    if (weight) y *= weight->at(i);
    gate.set(i, d * y * open * (1.0f - open));
    gradient.set(i, d * open);
  }
}

// Backwards through the rotation of one head; the transposed rotation.
void turn_back(float* d, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    float a = d[i], b = d[i + half];
    d[i] = a * cos[i] + b * sin[i];
    d[i + half] = b * cos[i] - a * sin[i];
  }
}

}  // namespace

// Of `norm_gate` and, with a null gate, of a norm; `grad` is the gradient of its result, `more` (or null) one that x has from
// elsewhere. All but the weights `[rows, width]` of the kinds given. dx, dgate and dweight are null where not wanted;
// dweight `[threads, width filled up to a multiple of LANES]` begins as zeros, and its sum over threads is the gradient.
extern "C" void opensala_norm_gate_back(const void* x, int64_t x_kind, const float* weight, const void* gate, int64_t gate_kind,
                                        const void* grad, int64_t grad_kind, const void* more, int64_t more_kind, void* dx,
                                        int64_t dx_kind, void* dgate, float* dweight, int64_t rows, int64_t width, float eps,
                                        int64_t threads) {
  RowsIn xs{x, x_kind, width}, gates{gate, gate_kind, width}, grads{grad, grad_kind, width}, others{more, more_kind, width};
  RowsOut dxs{dx, dx_kind, width}, dgates{dgate, gate_kind, width};
#pragma omp parallel num_threads(threads) if (rows * width > MANY)
  {
    Padded row(width), factors(width, weight), opening(width), gradient(width), added(width);
    float* own = dweight ? dweight + omp_get_thread_num() * round_up(row.n, LANES) : nullptr;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      row.read(xs, r);
      gradient.read(grads, r);
      if (gates) {
        opening.read(gates, r);
        gate_back(row, weight ? &factors : nullptr, opening, gradient, eps);
        put(dgates, r, opening.room.data);
      }
      if (weight) norm_back(row, factors, gradient, eps, own);
      if (others) {
        added.read(others, r);
        for (int64_t i = 0; i < row.size; i += W) gradient.set(i, gradient.at(i) + added.at(i));
      }
      put(dxs, r, gradient.room.data);
    }
  }
}

// Of `norm_rope`: x, grad, dx `[rows, heads, dim]`; cos, sin as there; dweight `[threads, dim filled up likewise]`.
extern "C" void opensala_norm_rope_back(const void* x, int64_t x_kind, const float* weight, const float* cos, const float* sin,
                                        const void* grad, int64_t grad_kind, void* dx, int64_t dx_kind, float* dweight,
                                        int64_t rows, int64_t heads, int64_t dim, int64_t period, float eps, int64_t threads) {
  RowsIn xs{x, x_kind, dim}, grads{grad, grad_kind, dim};
  RowsOut dxs{dx, dx_kind, dim};
#pragma omp parallel num_threads(threads) if (rows * heads * dim > MANY)
  {
    Padded row(dim), factors(dim, weight), gradient(dim);
    float* own = dweight ? dweight + omp_get_thread_num() * round_up(row.n, LANES) : nullptr;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows * heads; ++r) {
      int64_t angles = r / heads % period * (dim / 2);
      gradient.read(grads, r);
      if (cos) turn_back(gradient.room.data, cos + angles, sin + angles, dim / 2);
      if (weight) {
        row.read(xs, r);
        norm_back(row, factors, gradient, eps, own);
      }
      put(dxs, r, gradient.room.data);
    }
  }
}

// Of `silu_mul`: all `[rows, width]`, of one kind but for `grad`.
extern "C" void opensala_silu_mul_back(const void* gate, const void* up, int64_t kind, const void* grad, int64_t grad_kind,
                                       void* dgate, void* dup, int64_t rows, int64_t width, int64_t threads) {
  RowsIn gates{gate, kind, width}, ups{up, kind, width}, grads{grad, grad_kind, width};
  RowsOut dgates{dgate, kind, width}, dups{dup, kind, width};
#pragma omp parallel num_threads(threads) if (rows * width > MANY)
  {
    Padded a(width), b(width), gradient(width);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      a.read(gates, r), b.read(ups, r), gradient.read(grads, r);
      for (int64_t i = 0; i < a.size; i += W) {
        Vec x = a.at(i), open = sigmoid(x), d = gradient.at(i);
        a.set(i, d * b.at(i) * open * (1.0f + x * (1.0f - open)));
        b.set(i, d * x * open);
      }
      put(dgates, r, a.room.data);
      put(dups, r, b.room.data);
    }
  }
}
