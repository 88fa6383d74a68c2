// Comparing two models' logits, and the statistics of one row that scoring and sampling share.
#include "score.h"

#include <algorithm>
#include <limits>

#include "kernels.h"
#include "pool.h"

namespace snello {

LogitRow logit_row(const float* logits, int vocabulary) {
  LogitRow row{};
  kernels().softmax_stats(logits, vocabulary, &row.maximum, &row.sum, &row.argmax);
  // A sum holds the maximum's own 1, so what is not in [1, inf) comes from NaN or an infinite maximum.
  const bool usable = std::isfinite(row.maximum) && row.sum >= 1.0f && std::isfinite(row.sum);
  row.log_sum_exp = usable ? static_cast<double>(row.maximum) + natural_log(static_cast<double>(row.sum))
                           : std::numeric_limits<double>::quiet_NaN();
  return row;
}

}  // namespace snello

extern "C" int32_t snello_compare(const float* a, const float* b, int32_t rows, int32_t vocabulary,
                                  const int32_t* targets, float* log_probability_a, float* log_probability_b,
                                  float* divergence, int32_t* top1_a, int32_t* top1_b) {
  using snello::fail;
  if (a == nullptr || b == nullptr) return fail("compare: no logits");
  if (rows < 0 || vocabulary < 1) return fail("compare: %d rows of %d logits", rows, vocabulary);
  if (targets == nullptr && (log_probability_a != nullptr || log_probability_b != nullptr))
    return fail("compare: log-probabilities need targets");
  for (int32_t m = 0; targets != nullptr && m < rows; ++m)
    if (targets[m] < 0 || targets[m] >= vocabulary)
      return fail("compare: target %d of row %d is outside the vocabulary of %d", targets[m], m, vocabulary);

  const snello::FloatEnvironment environment;
  for (int32_t m = 0; m < rows; ++m, a += vocabulary, b += vocabulary) {
    const snello::LogitRow row_a = snello::logit_row(a, vocabulary), row_b = snello::logit_row(b, vocabulary);
    if (log_probability_a != nullptr) log_probability_a[m] = row_a.log_probability(a[targets[m]]);
    if (log_probability_b != nullptr) log_probability_b[m] = row_b.log_probability(b[targets[m]]);
    if (top1_a != nullptr) top1_a[m] = row_a.argmax;
    if (top1_b != nullptr) top1_b[m] = row_b.argmax;
    if (divergence != nullptr)
      divergence[m] = snello::kernels().divergence(a, static_cast<float>(row_a.log_sum_exp), b,
                                                   static_cast<float>(row_b.log_sum_exp), vocabulary);
  }
  return 0;
}

extern "C" int32_t snello_top(const float* logits, int32_t vocabulary, int32_t count, int32_t* tokens,
                              float* log_probabilities) {
  using snello::fail;
  if (logits == nullptr || tokens == nullptr || log_probabilities == nullptr) return fail("top: no logits or no room");
  if (vocabulary < 1 || count < 0) return fail("top: %d of %d logits", count, vocabulary);
  const snello::FloatEnvironment environment;
  const snello::LogitRow row = snello::logit_row(logits, vocabulary);
  if (!row.finite()) return fail("top: the logits are not finite");
  const int32_t most = std::min(count, vocabulary);
  if (most == 0) return 0;
  const auto better = [logits](int32_t a, int32_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  };
  // A heap of the best so far, the worst of them in front: few of the others get past that one.
  for (int32_t token = 0; token < most; ++token) tokens[token] = token;
  std::make_heap(tokens, tokens + most, better);
  for (int32_t token = most; token < vocabulary; ++token) {
    if (!better(token, tokens[0])) continue;
    std::pop_heap(tokens, tokens + most, better);
    tokens[most - 1] = token;
    std::push_heap(tokens, tokens + most, better);
  }
  std::sort_heap(tokens, tokens + most, better);
  for (int32_t i = 0; i < most; ++i) log_probabilities[i] = row.log_probability(logits[tokens[i]]);
  return most;
}
