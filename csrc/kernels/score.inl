// Statistics over a row of logits, and the read that the bandwidth probe times.
#pragma once

inline void softmax_stats(const float* logits, int n, float* maximum, float* sum, int* argmax) {
  const float lowest = -__builtin_inff();
  F32 highest = set1(lowest);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) highest = max(load(logits + i), highest);
  if (i < n) highest = max(load_partial(logits + i, n - i, lowest), highest);
  const float m = reduce_max(highest);

  int found = 0;
  for (i = 0; i < n; i += kLanes) {
    const int some = n - i < kLanes ? n - i : kLanes;
    const F32 x = some == kLanes ? load(logits + i) : load_partial(logits + i, some, lowest);
    if (const uint32_t hit = bits(mask_and(equal(x, set1(m)), first(some)))) {
      found = i + __builtin_ctz(hit);
      break;
    }
  }

  F32 total = set1(0.0f);
  for (i = 0; i + kLanes <= n; i += kLanes) total = add(total, exp(sub(load(logits + i), set1(m))));
  if (i < n) {
    const F32 tail = exp(sub(load_partial(logits + i, n - i, lowest), set1(m)));
    total = add(total, select(first(n - i), tail, set1(0.0f)));
  }
  *maximum = m;
  *sum = reduce_add(total);
  *argmax = found;
}

// The sum of p (log p - log q) + q - p: the two sums are equal, but every term of this one is at least 0, so neither
// rounding nor an error of a log-sum-exp can make much of it. Where p is 0 the term is q.
inline float divergence(const float* a, float lse_a, const float* b, float lse_b, int n) {
  F32 total = set1(0.0f);
  for_columns(n, [&](int i, auto part) {
    const F32 log_p = sub(load(a + i, part), set1(lse_a)), log_q = sub(load(b + i, part), set1(lse_b));
    const F32 p = exp(log_p), q = exp(log_q);
    const F32 term = fma(p, sub(log_p, log_q), sub(q, p));
    total = add(total, keep(select(equal(p, set1(0.0f)), q, term), part));
  });
  const float sum = reduce_add(total);
  return sum < 0.0f ? 0.0f : sum;
}

inline uint64_t read(const void* data, uint64_t bytes) {
  constexpr int kStreams = 8;
  const int32_t* p = static_cast<const int32_t*>(data);
  I32 sum[kStreams];
  for (I32& s : sum) s = set1(0);
  const uint64_t lines = bytes / (kLanes * sizeof(int32_t)) / kStreams;
  for (uint64_t line = 0; line < lines; ++line, p += kStreams * kLanes)
    for (int s = 0; s < kStreams; ++s) sum[s] = add(sum[s], load(p + s * kLanes));
  int32_t total = 0;
  for (I32 s : sum) total ^= reduce_add(s);
  return static_cast<uint64_t>(static_cast<uint32_t>(total));
}
