// Products of BF16 rows with BF16 weights: per 32 columns one chain over those of even number and one over those of odd
// number, whose sum goes on top of what was summed before. That is the order in which AMX's tiles add (Intel's manual,
// TDPBF16PS), so it is everyone's. Products of two BF16 are exact in FP32, and no operand lies between 0 and 2^-56 (see
// round_half), so no sum is subnormal and it does not matter that tiles would flush one.
#pragma once

constexpr int kHalfColumns = 32;  // that two chains add up

template <int rows, int panels>
struct HalfSums {
  F32 even[rows][panels], odd[rows][panels];
  LANES HalfSums() {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
      for (int p = 0; p < panels; ++p) even[r][p] = odd[r][p] = set1(0.0f);
  }
  LANES F32 sum(int r, int p) const { return add(even[r][p], odd[r][p]); }
};

// ---- few rows: straight from the packed lines ----

struct DirectHalves {
  const LinearTask& task;
  int p0, p1;
  template <int rows>
  void run() const {
    constexpr int kFit = kDirectAccumulators / (2 * rows), kPanels = kFit < 1 ? 1 : kFit > 4 ? 4 : kFit;
    int p = p0;
    for (; p + kPanels <= p1; p += kPanels) run_panels<rows, kPanels>(p);
    for (; p < p1; ++p) run_panels<rows, 1>(p);
  }
  template <int rows, int panels>
  void run_panels(int p) const {
    Panel w[panels];
    for (int i = 0; i < panels; ++i) w[i] = panel_at(*task.weights, p + i);
    F32 acc[rows][panels];
    for (auto& row : acc)
      for (F32& value : row) value = set1(0.0f);
    const int pairs = (task.weights->columns + 1) / 2;
    for (int first = 0; first < pairs; first += kHalfColumns / 2) {
      const int end = first + kHalfColumns / 2 < pairs ? first + kHalfColumns / 2 : pairs;
      HalfSums<rows, panels> sums;
      for (int i = first; i < end; ++i) multiply_pair(sums, w, i);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < panels; ++i) acc[r][i] = add(acc[r][i], sums.sum(r, i));
    }
    for (int i = 0; i < panels; ++i)
      for (int r = 0; r < rows; ++r) finish_float(task, r, p + i, w[i], acc[r][i]);
  }
  template <int rows, int panels>
  LANES void multiply_pair(HalfSums<rows, panels>& sums, const Panel (&w)[panels], int pair) const {
    F32 even[panels], odd[panels];
    for (int i = 0; i < panels; ++i) {
      const I32 line = load(reinterpret_cast<const int32_t*>(w[i].lines + int64_t{pair} * kLineBytes));
      even[i] = low_bf16(line);
      odd[i] = high_bf16(line);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      int32_t two;
      __builtin_memcpy(&two, task.halves.row(r) + 2 * pair, sizeof two);
      const F32 x = low_bf16(set1(two)), y = high_bf16(set1(two));
      for (int i = 0; i < panels; ++i) sums.even[r][i] = fma(x, even[i], sums.even[r][i]);
      for (int i = 0; i < panels; ++i) sums.odd[r][i] = fma(y, odd[i], sums.odd[r][i]);
    }
  }
};

// ---- many rows: see blocked() ----
//
// One chain after the other: the first waits in memory, so that as many rows have registers as with FP32.

struct HalfTile {
  FloatScratch& scratch;
  const float* const* weights;  // per panel of the group
  int row, panel, panels_left, count;
  template <int rows>
  void run() const {
    if (panels_left >= kPanelBlock) return run_panels<rows, kPanelBlock>();
    run_panels<rows, 1>();
  }
  template <int rows, int panels>
  void run_panels() const {
    alignas(64) float even[rows][panels][kPanel];
    for (int first = 0; first < count; first += kHalfColumns) {
      const int end = first + kHalfColumns < count ? first + kHalfColumns : count;
      F32 acc[rows][panels];
      chain(acc, first, end);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r)
        for (int p = 0; p < panels; ++p) store(even[r][p], acc[r][p]);
      chain(acc, first + 1, end);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r)
        for (int p = 0; p < panels; ++p) {
          float* parked = scratch.sums[row + r][panel + p];
          store(parked, add(load(parked), add(load(even[r][p]), acc[r][p])));
        }
    }
  }
  // From 0 over every other column of [first, end).
  template <int rows, int panels>
  LANES void chain(F32 (&acc)[rows][panels], int first, int end) const {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
      for (int p = 0; p < panels; ++p) acc[r][p] = set1(0.0f);
    multiply_unpacked<2>(acc, weights, scratch, panel, first, end);
  }
};

struct HalfInput {
  static constexpr int kRows = kRowBlock;
  using Tile = HalfTile;
  static void copy(const LinearTask& task, int m, int k, int count, float* to) {
    const uint16_t* from = task.halves.row(m) + k;
    for (int j = 0; j < count; j += kLanes) store(to + j, load_bf16(from + j));
  }
};

inline void linear_halves(const LinearTask& task, int p0, int p1) {
  if (task.num_rows <= kDirectRowsFloat) return with_rows<kDirectRowsFloat>(task.num_rows, DirectHalves{task, p0, p1});
  blocked<HalfInput>(task, p0, p1);
}
