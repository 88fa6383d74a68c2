// Mixtures of experts: which experts a row goes to, and the sum of what they gave. The formulas and their order are in
// docs/numerics.md, Experts; a row's numbers never depend on what other rows chose.
#pragma once

// The largest logits of a row, as truths per expert; ties go to the lowest number, and NaN is never the larger one.
inline void choose(const float* logits, int experts, int active, bool* chosen) {
  for (int e = 0; e < experts; ++e) chosen[e] = false;
  for (int k = 0; k < active; ++k) {
    int best = -1;
    for (int e = 0; e < experts; ++e)
      if (!chosen[e] && (best < 0 || logits[e] > logits[best])) best = e;
    chosen[best] = true;
  }
}

// p[e] = exp(logit - largest) of a row, and their sum.
inline float exponentials(const float* logits, int experts, float* p) {
  float largest = logits[0];
  for (int e = 1; e < experts; ++e) largest = logits[e] > largest ? logits[e] : largest;
  F32 sum = set1(0.0f);
  for_columns(experts, [&](int i, auto part) {
    const F32 x = exp(sub(load(logits + i, part), set1(largest)));
    sum = add(sum, keep(x, part));
    store(p + i, x, part);
  });
  return reduce_add(sum);
}

inline void route(const RouteTask& task, int m0, int m1) {
  alignas(64) float p[kMaxExperts];
  bool chosen[kMaxExperts];
  for (int m = m0; m < m1; ++m) {
    const float* logits = task.logits.row(m);
    choose(logits, task.num_experts, task.num_active, chosen);
    float total = exponentials(logits, task.num_experts, p);
    float *number = task.output.row(m), *weight = number + task.num_active;
    if (task.normalized) {
      total = 0.0f;
      for (int e = 0; e < task.num_experts; ++e)
        if (chosen[e]) total += p[e];
    }
    for (int e = 0; e < task.num_experts; ++e) {
      if (!chosen[e]) continue;
      *number++ = static_cast<float>(e);
      *weight++ = p[e] / total;
    }
  }
}

inline void combine(const CombineTask& task, int m0, int m1) {
  for (int m = m0; m < m1; ++m) {
    const float* weights = task.routes.row(m) + task.num_active;
    const int32_t* places = task.places + static_cast<int64_t>(m) * task.num_active;
    float* out = task.output.row(m);
    for_columns(task.width, [&](int i, auto part) {
      F32 sum = mul(load(task.parts.row(places[0]) + i, part), set1(weights[0]));
      for (int k = 1; k < task.num_active; ++k)
        sum = add(sum, mul(load(task.parts.row(places[k]) + i, part), set1(weights[k])));
      if (task.accumulate) sum = add(load(out + i, part), sum);
      store(out + i, sum, part);
    });
  }
}
