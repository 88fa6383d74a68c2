// From logits to a token. Every restriction (top-k, top-p, min-p) keeps a prefix of the tokens in descending order, so
// tokens are collected band by band below the maximum until there are enough, and only the last band is put in order: a
// vocabulary is never sorted. The draw is Gumbel-max over noise that is a function of (seed, position, token): it needs
// no state and no order of evaluation.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "guard.h"
#include "kernels.h"
#include "pool.h"
#include "score.h"

namespace snello {
namespace {

constexpr int kSkip = 64;  // tokens whose maximum is kept, to pass over them at once

// ---- noise ----

using Words = std::array<uint32_t, 4>;

Words philox(uint64_t seed, uint32_t quad, uint64_t position) {
  Words c{quad, static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ key0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ key1, static_cast<uint32_t>(p0)};
  }
  return c;
}

double gumbel(uint32_t word) {
  const double u = static_cast<double>(word >> 8) * 0x1p-24 + 0x1p-25;
  return -natural_log(-natural_log(u));
}

// An upper bound of gumbel(word) from the leading bit of 1 - u alone: -log(-log(u)) <= -log(1 - u).
class NoiseBound {
 public:
  NoiseBound() {
    for (size_t bit = 0; bit < bounds_.size(); ++bit)
      bounds_[bit] = 1e-6 - natural_log((std::ldexp(1.0, static_cast<int>(bit)) - 0.5) * 0x1p-24);
  }
  double operator()(uint32_t word) const {
    return bounds_[static_cast<size_t>(std::bit_width((1u << 24) - (word >> 8))) - 1];
  }
  double highest() const { return bounds_[0]; }
  // The least upper 24 bits of a word whose bound is `wanted` or more.
  uint32_t least(double wanted) const {
    size_t bit = 0;  // bounds fall with it
    while (bit + 1 < bounds_.size() && bounds_[bit + 1] >= wanted) ++bit;
    return bit + 1 < bounds_.size() ? (1u << 24) - (2u << bit) + 1 : 0;
  }

 private:
  std::array<double, 25> bounds_;
};

// The best of logit / temperature + noise so far; ties go to the lowest id. A token that cannot win even with the bound
// of its noise costs no logarithm.
class Draw {
 public:
  void offer(int32_t id, float logit, uint32_t word) {
    const double value = static_cast<double>(logit);
    if (value + bound_(word) >= best_) offer(id, value + gumbel(word));
  }
  // Whether a logit could win with the most favourable noise.
  bool could_win(float logit) const { return static_cast<double>(logit) + bound_.highest() >= best_; }
  // The least upper 24 bits of a word with which it could.
  uint32_t least(float logit) const { return bound_.least(best_ - static_cast<double>(logit)); }
  int32_t token() const { return token_; }

 private:
  void offer(int32_t id, double value) {
    if (value > best_ || (value == best_ && id < token_)) best_ = value, token_ = id;
  }

  static const NoiseBound bound_;
  double best_ = -std::numeric_limits<double>::infinity();
  int32_t token_ = -1;
};
const NoiseBound Draw::bound_;

// ---- order ----

struct Candidate {
  float value;
  int32_t id;
  bool operator<(const Candidate& other) const { return value != other.value ? value > other.value : id < other.id; }
};

// What a call works in; kept by the thread, so that a steady stream of calls allocates nothing.
struct Workspace {
  std::vector<float> values;
  std::vector<float> block_maximum;
  std::vector<int32_t> count, answer_count;  // of each token in the history; zero between calls
  std::vector<Candidate> kept;
};

// Collects tokens in bands of falling logits, in no order within a band. -inf is never collected.
class Bands {
 public:
  Bands(const float* values, int n, float maximum, const std::vector<float>& block_maximum)
      : values_(values), n_(n), maximum_(maximum), block_maximum_(block_maximum) {}

  bool exhausted() const { return exhausted_; }
  float lowest() const { return lowest_; }  // what was collected is not below
  void append_next(std::vector<Candidate>& out) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity(), kWidest = 100.0f;
    const float above = lowest_;
    lowest_ = width_ < kWidest ? maximum_ - width_ : -kInfinity;
    width_ *= 2.0f;
    exhausted_ = lowest_ == -kInfinity;
    for (int begin = 0; begin < n_; begin += kSkip) {
      if (!(block_maximum_[static_cast<size_t>(begin / kSkip)] >= lowest_)) continue;
      for (int i = begin; i < std::min(begin + kSkip, n_); ++i)
        if (values_[i] >= lowest_ && values_[i] < above && values_[i] != -kInfinity) out.push_back({values_[i], i});
    }
  }

 private:
  const float* values_;
  int n_;
  float maximum_;
  const std::vector<float>& block_maximum_;
  float lowest_ = std::numeric_limits<float>::infinity();
  float width_ = 2.0f;
  bool exhausted_ = false;
};

double mass(const Candidate* begin, const Candidate* end, float maximum) {
  double sum = 0.0;
  for (; begin < end; ++begin) sum += natural_exp(static_cast<double>(begin->value) - static_cast<double>(maximum));
  return sum;
}

// Of [begin, end): the end of the shortest descending prefix whose mass reaches `target`; rearranges. Halves the range
// around its median until what is left is worth sorting.
Candidate* keep_mass(Candidate* begin, Candidate* end, double target, float maximum) {
  constexpr std::ptrdiff_t kFew = 64;
  while (end - begin > kFew) {
    Candidate* middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end);
    const double half = mass(begin, middle, maximum);
    if (half >= target) {
      end = middle;
    } else {
      target -= half;
      begin = middle;
    }
  }
  std::sort(begin, end);
  while (begin < end) {
    const double one = mass(begin, begin + 1, maximum);
    ++begin;
    target -= one;
    if (target <= 0.0) break;
  }
  return begin;
}

// ---- the steps ----

int check(const snello_sampling& s, int32_t vocabulary) {
  if (!(s.temperature >= 0.0f) || std::isinf(s.temperature)) return fail("temperature %g", s.temperature);
  if (!(s.top_p >= 0.0f && s.top_p <= 1.0f)) return fail("top_p is %g: it must be 0 to 1", s.top_p);
  if (!(s.min_p >= 0.0f && s.min_p <= 1.0f)) return fail("min_p is %g: it must be 0 to 1", s.min_p);
  if (!(s.repetition_penalty > 0.0f) || std::isinf(s.repetition_penalty))
    return fail("repetition_penalty is %g: it must be above 0", s.repetition_penalty);
  if (!std::isfinite(s.presence_penalty) || !std::isfinite(s.frequency_penalty))
    return fail("presence_penalty %g and frequency_penalty %g must be finite", s.presence_penalty, s.frequency_penalty);
  if (s.top_k < 0) return fail("top_k is %d: it must be 0 or more", s.top_k);
  if (s.num_biases < 0 || (s.num_biases > 0 && (s.bias_tokens == nullptr || s.bias_values == nullptr)))
    return fail("%d biases without tokens or values", s.num_biases);
  for (int32_t i = 0; i < s.num_biases; ++i) {
    if (s.bias_tokens[i] < 0 || s.bias_tokens[i] >= vocabulary)
      return fail("bias for token %d, outside the vocabulary of %d", s.bias_tokens[i], vocabulary);
    if (!(s.bias_values[i] < std::numeric_limits<float>::infinity()))
      return fail("bias %g for token %d", s.bias_values[i], s.bias_tokens[i]);
  }
  return 0;
}

// Each token of the history once: repetition over prompt and answer, presence and frequency over the answer.
void penalize(const snello_sampling& s, const int32_t* history, int32_t num_history, int32_t num_prompt, float* values,
              size_t vocabulary, Workspace& work) {
  if (work.count.size() < vocabulary) {
    work.answer_count.resize(vocabulary);
    work.count.resize(vocabulary);  // the last: memory may end between the two, and this one is asked for
  }
  for (int32_t i = 0; i < num_history; ++i) {
    ++work.count[static_cast<size_t>(history[i])];
    if (i >= num_prompt) ++work.answer_count[static_cast<size_t>(history[i])];
  }
  for (int32_t i = 0; i < num_history; ++i) {
    const auto token = static_cast<size_t>(history[i]);
    if (work.count[token] == 0) continue;  // seen above in this loop
    float value = values[token];
    value = value > 0.0f ? value / s.repetition_penalty : value * s.repetition_penalty;
    if (const int32_t times = work.answer_count[token])
      value = (value - s.presence_penalty) - s.frequency_penalty * static_cast<float>(times);
    values[token] = value;
    work.count[token] = work.answer_count[token] = 0;
  }
}

// The tokens that top-k, then top-p, then min-p leave, into work.kept.
void collect_allowed(const snello_sampling& s, const float* values, int32_t n, const LogitRow& row, Workspace& work) {
  std::vector<Candidate>& kept = work.kept;
  kept.clear();
  Bands bands(values, n, row.maximum, work.block_maximum);
  const auto resize_to = [&kept](const Candidate* end) { kept.resize(static_cast<size_t>(end - kept.data())); };
  const auto top_p = static_cast<double>(s.top_p);
  const double least = s.min_p > 0.0f ? static_cast<double>(row.maximum) + natural_log(static_cast<double>(s.min_p))
                                      : -std::numeric_limits<double>::infinity();
  if (s.top_k > 0) {
    const auto k = static_cast<size_t>(s.top_k);
    while (kept.size() < k && !bands.exhausted()) bands.append_next(kept);
    if (kept.size() > k) {
      std::nth_element(kept.begin(), kept.begin() + s.top_k, kept.end());
      kept.resize(k);
    }
    if (s.top_p < 1.0f) {
      Candidate *begin = kept.data(), *end = begin + kept.size();
      resize_to(keep_mass(begin, end, top_p * mass(begin, end, row.maximum), row.maximum));
    }
  } else if (s.top_p < 1.0f) {
    double target = top_p * static_cast<double>(row.sum);
    while (!bands.exhausted()) {
      const size_t before = kept.size();
      bands.append_next(kept);
      Candidate *begin = kept.data() + before, *end = kept.data() + kept.size();
      const double band = mass(begin, end, row.maximum);
      if (band >= target) {
        resize_to(keep_mass(begin, end, target, row.maximum));
        break;
      }
      target -= band;
    }
  } else {
    while (!bands.exhausted() && static_cast<double>(bands.lowest()) > least) bands.append_next(kept);
  }
  if (s.min_p > 0.0f) {
    std::erase_if(kept, [&](const Candidate& c) { return static_cast<double>(c.value) < least; });
  }
}

int32_t draw_among(const std::vector<Candidate>& allowed, uint64_t seed, uint64_t position) {
  Draw draw;
  for (const Candidate& c : allowed) {
    if (!draw.could_win(c.value)) continue;
    const Words words = philox(seed, static_cast<uint32_t>(c.id) / 4, position);
    draw.offer(c.id, c.value, words[static_cast<size_t>(c.id) % 4]);
  }
  return draw.token();
}

// The draw over the whole vocabulary: the likeliest token first, so that most others need not be looked at closely.
int32_t draw_among_all(const float* values, int32_t n, int32_t argmax, const std::vector<float>& block_maximum,
                       uint64_t seed, uint64_t position) {
  static_assert(kSkip == 4 * kPanel);
  const auto noise = kernels().noise;
  alignas(64) uint32_t words[kSkip];
  Draw draw;
  const Words first = philox(seed, static_cast<uint32_t>(argmax) / 4, position);
  draw.offer(argmax, values[argmax], first[static_cast<size_t>(argmax) % 4]);
  for (int32_t begin = 0; begin < n; begin += kSkip) {
    const float highest = block_maximum[static_cast<size_t>(begin / kSkip)];
    if (!draw.could_win(highest)) continue;
    uint64_t some = noise(seed, static_cast<uint32_t>(begin) / 4, position, draw.least(highest), words);
    for (; some != 0; some &= some - 1) {
      const int bit = std::countr_zero(some);
      const int32_t id = begin + 4 * (bit % kPanel) + bit / kPanel;
      if (id < n) draw.offer(id, values[id], words[bit]);
    }
  }
  return draw.token();
}

int32_t sample(const float* logits, int32_t vocabulary, const snello_sampling& s, const int32_t* history,
               int32_t num_history, int32_t num_prompt, int64_t position, float* log_probability) {
  thread_local Workspace work;
  const auto size = static_cast<size_t>(vocabulary);
  const bool penalized =
      num_history > 0 && (s.repetition_penalty != 1.0f || s.presence_penalty != 0.0f || s.frequency_penalty != 0.0f);
  const float* values = logits;
  if (penalized || s.num_biases > 0) {
    work.values.assign(logits, logits + vocabulary);
    for (int32_t i = 0; i < s.num_biases; ++i) work.values[static_cast<size_t>(s.bias_tokens[i])] += s.bias_values[i];
    if (penalized) penalize(s, history, num_history, num_prompt, work.values.data(), size, work);
    values = work.values.data();
  }
  if (s.temperature != 0.0f) {
    const bool divided = s.temperature != 1.0f;
    if (divided) work.values.resize(size);
    work.block_maximum.resize((size + kSkip - 1) / kSkip);
    kernels().by_temperature(values, s.temperature, vocabulary, divided ? work.values.data() : nullptr,
                             work.block_maximum.data());
    if (divided) values = work.values.data();
  }
  const LogitRow row = logit_row(values, vocabulary);
  if (!row.finite()) {
    if (values == logits || !logit_row(logits, vocabulary).finite())
      return fail("the logits hold nothing finite to choose from, or NaN");
    return fail("bias, penalties and temperature leave nothing finite to choose from");
  }

  int32_t token = row.argmax;
  if (s.temperature != 0.0f) {
    if ((s.top_k > 0 && s.top_k < vocabulary) || s.top_p < 1.0f || s.min_p > 0.0f) {
      collect_allowed(s, values, vocabulary, row, work);
      token = draw_among(work.kept, s.seed, static_cast<uint64_t>(position));
    } else {
      token =
          draw_among_all(values, vocabulary, row.argmax, work.block_maximum, s.seed, static_cast<uint64_t>(position));
    }
  }
  if (log_probability != nullptr) {
    const LogitRow raw = values == logits ? row : logit_row(logits, vocabulary);
    *log_probability = raw.log_probability(logits[token]);
  }
  return token;
}

}  // namespace
}  // namespace snello

extern "C" int32_t snello_sample(const float* logits, int32_t vocabulary, const snello_sampling* sampling,
                                 const int32_t* history, int32_t num_history, int32_t num_prompt, int64_t position,
                                 float* log_probability) {
  using snello::fail;
  if (logits == nullptr || sampling == nullptr || vocabulary < 1) return fail("sample: no logits or no options");
  if (num_history < 0 || num_prompt < 0 || num_prompt > num_history || (num_history > 0 && history == nullptr))
    return fail("sample: a history of %d tokens, %d of them the prompt", num_history, num_prompt);
  for (int32_t i = 0; i < num_history; ++i)
    if (history[i] < 0 || history[i] >= vocabulary)
      return fail("sample: token %d in the history, outside the vocabulary of %d", history[i], vocabulary);
  if (const int error = snello::check(*sampling, vocabulary)) return error;
  const snello::FloatEnvironment environment;
  return snello::guarded("sample", [&] {
    return snello::sample(logits, vocabulary, *sampling, history, num_history, num_prompt, position, log_probability);
  });
}
