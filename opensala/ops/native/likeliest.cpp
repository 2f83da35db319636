// The most likely token of a row of logits and the logarithm of the sum of exponentials, on the CPU.
#include "rows.h"

namespace {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int64_t BLOCK = 64 * W;       // floats that are added up in float32, before double takes over
constexpr int64_t SINGLE_WORK = 1 << 16;  // logits below which a second thread costs more than it saves

// out: token, log of the sum of exponentials (NaN if any logit is), lowest, highest.
void look(const float* row, int64_t width, double* out) {
  int64_t whole = width / W * W;
  float rest[W];
  auto last = [&](float otherwise) {  // the vector that the row's end fills in part
    std::fill_n(rest, W, otherwise);
    std::copy_n(row + whole, width - whole, rest);
    return load(rest);
  };
  Vec high = last(row[0]), low = high;
  for (int64_t i = 0; i < whole; i += W) {
    Vec x = load(row + i);
    high = larger(high, x), low = -larger(-low, -x);
  }
  float highest = largest(high), lowest = -largest(-low);
  int64_t token = 0;
  while (token + W <= whole && !lanes_at_least(load(row + token), splat(highest))) token += W;
  while (token < width - 1 && row[token] != highest) ++token;
  auto exponential = [&](Vec x) { return exp2_any((x - highest) * LOG2_E); };
  double sum = total(exponential(last(-INF)));
  for (int64_t a = 0; a < whole; a += BLOCK) {
    Vec part{};
    for (int64_t i = a; i < std::min(a + BLOCK, whole); i += W) part += exponential(load(row + i));
    sum += total(part);
  }
  out[0] = double(token), out[1] = double(highest) + std::log(sum), out[2] = lowest, out[3] = highest;
}

}  // namespace

// logits `[rows, vocabulary]` with at least one column, out `[rows, 4]`.
extern "C" void opensala_likeliest(const float* logits, double* out, int64_t rows, int64_t vocabulary, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1 && rows * vocabulary > SINGLE_WORK)
  for (int64_t r = 0; r < rows; ++r) look(logits + r * vocabulary, vocabulary, out + 4 * r);
}
