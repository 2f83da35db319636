// The divergence of next-token distributions and its gradient on the CPU: a row of logits is read from memory once and
// its gradient is written once; everything between happens in the core's cache.
#include "rows.h"

namespace {

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr int64_t BLOCK = 64 * W;  // floats that are added up in float32, before double takes over

Vec exponential(Vec x) { return exp2_any(x * LOG2_E); }

// Sum of f(i) for i = 0, W, ... below `width`: a row is too long for one float32 sum.
template <typename F>
double summed(int64_t width, const F& f) {
  double sum = 0;
  for (int64_t a = 0; a < width; a += BLOCK) {
    Vec part{};
    for (int64_t i = a; i < std::min(a + BLOCK, width); i += W) part += f(i);
    sum += total(part);
  }
  return sum;
}

// One distribution: logits in a core's cache, filled up with -inf to a multiple of W.
struct Distribution {
  Scratch logits;
  int64_t width;
  double lse = 0;
  explicit Distribution(int64_t vocabulary) : logits(round_up(vocabulary, W)), width(round_up(vocabulary, W)) {}

  void read(const RowsIn& rows, int64_t r) {
    const float* row = widened(rows, r, logits.data);
    if (row != logits.data) std::copy_n(row, rows.width, logits.data);
    std::fill(logits.data + rows.width, logits.data + width, -INF);
    Vec top = splat(-INF);
    for (int64_t i = 0; i < width; i += W) top = larger(top, load(logits.data + i));
    float most = largest(top);
    lse = most + std::log(summed(width, [&](int64_t i) { return exponential(load(logits.data + i) - most); }));
  }
  Vec at(int64_t i) const { return load(logits.data + i); }
  Vec share(int64_t i) const { return exponential(at(i) - float(lse)); }
};

}  // namespace

// student, teacher (or null) `[rows, vocabulary]` of `kind`; kl, and ce with targets (or both null), `[rows]`; losses
// `[rows]`; gradient `[rows, vocabulary]` of `gradient_kind` or null, may be the student's memory if of one kind.
extern "C" void opensala_divergence(const void* student, const void* teacher, int64_t kind, const float* kl, const float* ce,
                                    const int64_t* targets, float* losses, void* gradient, int64_t gradient_kind, int64_t rows,
                                    int64_t vocabulary, int64_t threads) {
  RowsIn students{student, kind, vocabulary}, teachers{teacher, kind, vocabulary};
  RowsOut gradients{gradient, gradient_kind, vocabulary};
#pragma omp parallel num_threads(threads)
  {
    Distribution s(vocabulary), t(teachers ? vocabulary : 0);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      s.read(students, r);
      float of_kl = teachers ? kl[r] : 0, of_ce = ce ? ce[r] : 0, share = of_kl + of_ce;
      double loss = 0;
      if (ce) loss += double(of_ce) * (s.lse - s.logits.data[targets[r]]);
      if (teachers) {
        t.read(teachers, r);
        float apart = float(t.lse - s.lse);
        // a word that the teacher excludes adds nothing, though 0 * inf is not 0; NaN stays NaN
        loss += double(of_kl) * summed(s.width, [&](int64_t i) {
          Vec p = t.share(i), d = p * (t.at(i) - s.at(i) - apart);
          if (gradients) store(s.logits.data + i, s.share(i) * share - p * of_kl);
          return p == 0.0f ? Vec{} : d;
        });
      } else if (gradients) {
        for (int64_t i = 0; i < s.width; i += W) store(s.logits.data + i, s.share(i) * share);
      }
      losses[r] = float(loss);
      if (!gradients) continue;
      if (ce) s.logits.data[targets[r]] -= of_ce;
      put(gradients, r, s.logits.data);
    }
  }
}
