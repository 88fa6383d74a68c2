// Gated short convolutions over the positions of a sequence.
//
// What came before the rows of a step is read from the pages; what is in the step is computed from its registers again,
// which is cheaper than a barrier. A page keeps the last rows of its positions, in slots that are used over and over:
// so all rows of a step are convolved before any is stored. docs/numerics.md, Convolutions.
#pragma once

constexpr int kMaxKernel = kPage;

// Where a row finds one of the positions that it adds up: a row of the step, a stored row, or nothing before the text.
struct Tap {
  const float *gate, *input, *stored;
};

inline Tap find_tap(const ConvolveTask& task, int m, int back) {
  const int before = m - back, position = task.positions[m] - back;
  if (before >= 0 && task.sequences[before] == task.sequences[m])
    return {task.gate.row(before), task.input.row(before), nullptr};
  if (position < 0) return {nullptr, nullptr, nullptr};
  const int32_t* pages = task.page_tables + static_cast<int64_t>(task.sequences[m]) * task.pages_per_sequence;
  return {nullptr, nullptr, task.cache.state(pages[position / kPage], position)};
}

inline void convolve(const ConvolveTask& task, int m0, int m1) {
  Tap found[kMaxKernel];
  for (int m = m0; m < m1; ++m) {
    for (int k = 0; k < task.kernel; ++k) found[k] = find_tap(task, m, task.kernel - 1 - k);
    const float* gate = task.output_gate.row(m);
    float* out = task.output.row(m);
    for_columns(task.width, [&](int i, auto part) {
      F32 sum = task.bias ? load(task.bias + i, part) : set1(0.0f);
      for (int k = 0; k < task.kernel; ++k) {
        const Tap& tap = found[k];
        if (!tap.gate && !tap.stored) continue;
        const F32 u = tap.gate ? mul(load(tap.gate + i, part), load(tap.input + i, part)) : load(tap.stored + i, part);
        sum = fma(load(task.taps + static_cast<int64_t>(k) * task.width + i, part), u, sum);
      }
      store(out + i, mul(sum, load(gate + i, part)), part);
    });
  }
}

// A row whose slot a later row of this step takes is not stored, so no slot is written twice.
inline bool outlived(const ConvolveTask& task, int m) {
  const int later = m + task.cache.state_rows;
  return later < task.num_rows && task.sequences[later] == task.sequences[m] &&
         task.positions[later] / kPage == task.positions[m] / kPage;
}

inline void store_state(const ConvolveTask& task, int m0, int m1) {
  for (int m = m0; m < m1; ++m) {
    if (outlived(task, m)) continue;
    const int position = task.positions[m];
    const int32_t* pages = task.page_tables + static_cast<int64_t>(task.sequences[m]) * task.pages_per_sequence;
    float* out = task.cache.state(pages[position / kPage], position);
    const float *gate = task.gate.row(m), *input = task.input.row(m);
    for_columns(task.width,
                [&](int i, auto part) { store(out + i, mul(load(gate + i, part), load(input + i, part)), part); });
  }
}
