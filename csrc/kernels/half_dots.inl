// Products of BF16 rows with BF16 weights by dot products of pairs, where an instruction set has them: twice the
// products of a fused multiply-add, and the bits of halves.inl. There one chain goes over the even columns and one over
// the odd ones; a dot product adds the upper pair's product first and then the lower one's. So columns 0 and 2 of every
// four are brought together, 2 below, and so are 1 and 3: what was one step of both chains is two steps of one.
#pragma once

constexpr int kDotColumns = 256;    // columns that all rows meet before the next ones: 8 KB of a panel
constexpr int kDotGroupPanels = 8;  // panels that share interleaved rows, and whose sums are parked
constexpr int kDotSuperRows = 256;  // rows of which that is done at once
constexpr int kDotPanels = 2;
constexpr int kDotRows = 4;      // x 2 panels x 2 chains = 16 of 32 registers, and enough to wait for none
constexpr int kDotRowsMost = 6;  // of a remainder
// Up to so many rows are multiplied straight from the packed lines, nearly as fast as memory gives them. They go over
// each kDotColumns of a panel in two passes: memory catches up while the second reads from the first cache.
constexpr int kDotFewRows = 16, kDotFewPasses = 2;
constexpr int kDotFewColumns = 8192;  // of a panel, before the next panel

LANES const uint8_t* half_lines(const LinearTask& task, int p, int k) {
  return panel_at(*task.weights, p).lines + int64_t{k / 2} * kLineBytes;
}

// Columns 0 and 2 of four of a panel's outputs, and columns 1 and 3.
struct EvenOdd {
  I32 even, odd;
};
LANES EvenOdd interleave_lines(const uint8_t* lines) {
  const I32 a = load(reinterpret_cast<const int32_t*>(lines));
  const I32 b = load(reinterpret_cast<const int32_t*>(lines + kLineBytes));
  return {even_halves(a, b), odd_halves(a, b)};
}

// What comes next, to be fetched while products run, a little with every 32 columns of some rows: interleaving is a
// burst that memory cannot follow.
struct DotAhead {
  const uint8_t* at[kDotPanels];  // columns of two panels,
  int64_t bytes, each;            // so many of each: what is left, and what is fetched at once
  const uint16_t* row;            // and a row
  LANES void fetch(int pair) {
    prefetch(row + 2 * pair);
    if (bytes <= 0) return;
    bytes -= each;
    for (const uint8_t*& from : at)
      for (const uint8_t* end = from + each; from < end; from += kLineBytes) prefetch(from);
  }
};

// The weights of four columns, from pair i on: interleaved before, or now.
struct InterleavedPairs {
  const int32_t* at;
  DotAhead* ahead;
  LANES void meanwhile(int pair) const { ahead->fetch(pair); }
  LANES EvenOdd get(int i) const { return {load(at + i * kPanel), load(at + (i + 1) * kPanel)}; }
};
struct PackedPairs {
  const uint8_t* lines;
  LANES void meanwhile(int) const {}
  LANES EvenOdd get(int i) const {
    const uint8_t* line = lines + int64_t{i} * kLineBytes;
    prefetch(line + kPrefetchBytes);
    prefetch(line + kPrefetchBytes + kLineBytes);
    return interleave_lines(line);
  }
};

// Some interleaved rows times one or two panels over `pairs` pairs of columns, onto the parked sums.
template <class Source, int panels>
struct DotTile {
  static constexpr int64_t kSumStride = kDotGroupPanels * kPanel;
  const Source (&weights)[panels];
  const int32_t* x;
  int64_t stride;
  float* parked;
  int pairs;
  template <int rows>
  void run() const {
    for (int first = 0; first < pairs; first += kHalfColumns / 2) {
      weights[0].meanwhile(first);
      HalfSums<rows, panels> sums;
#pragma GCC unroll 8
      for (int i = first; i < first + kHalfColumns / 2; i += 2) multiply(sums, i);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r)
        for (int p = 0; p < panels; ++p) {
          float* at = parked + r * kSumStride + p * kPanel;
          store(at, add(load(at), sums.sum(r, p)));
        }
    }
  }
  template <int rows>
  LANES void multiply(HalfSums<rows, panels>& sums, int i) const {
    EvenOdd w[panels];
    for (int p = 0; p < panels; ++p) w[p] = weights[p].get(i);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const int32_t* two = x + r * stride + i;
      const I32 first = set1(two[0]), second = set1(two[1]);
      for (int p = 0; p < panels; ++p) sums.even[r][p] = dot_halves(sums.even[r][p], first, w[p].even);
      for (int p = 0; p < panels; ++p) sums.odd[r][p] = dot_halves(sums.odd[r][p], second, w[p].odd);
    }
  }
};

// The columns [k, k + count) of the rows from m0 on, interleaved, and the sums of these rows with a group of panels.
template <int most_rows, int most_columns>
struct DotRows {
  static constexpr int kColumns = most_columns;
  static constexpr int64_t kStride = most_columns / 2 + kRowGap / 4;
  alignas(64) int32_t pairs[most_rows][kStride];
  alignas(64) float sums[most_rows][kDotGroupPanels][kPanel];
  int m0 = 0, k = 0, count = 0;

  void interleave_rows(const LinearTask& task, int rows) {
    for (int m = 0; m < rows; ++m) {
      const uint16_t* from = task.halves.row(m0 + m) + k;
      for (int j = 0; j < count; j += kHalfColumns)
        store(pairs[m] + j / 2, interleave_halves(load(reinterpret_cast<const int32_t*>(from + j))));
    }
  }
  template <class Source, int panels>
  DotTile<Source, panels> tile(const Source (&weights)[panels], int m, int panel, int first, int columns) {
    return {weights, pairs[m] + first / 2, kStride, sums[m][panel], columns / 2};
  }
};

// Rows [m0, m0 + rows) times panels [p, p + panels).
template <class Products>
inline void dot_group(const LinearTask& task, Products& products, int m0, int rows, int p, int panels) {
  auto& x = products.rows;
  x.m0 = m0;
  for (int m = 0; m < rows; ++m)
    for (int i = 0; i < panels; ++i) store(x.sums[m][i], set1(0.0f));
  for (x.k = 0; x.k < task.weights->columns; x.k += x.kColumns) {
    const int left = task.weights->columns - x.k;
    x.count = left < x.kColumns ? left : x.kColumns;
    x.interleave_rows(task, rows);
    products.multiply(task, rows, p, panels);
  }
  const Panel unscaled = panel_at(*task.weights, p);
  for (int m = 0; m < rows; ++m)
    for (int i = 0; i < panels; ++i) finish_float(task, m0 + m, p + i, unscaled, load(x.sums[m][i]));
}

// Straight from the packed lines.
struct FewDots {
  static constexpr int kRows = kDotFewRows;
  DotRows<kDotFewRows, kDotFewColumns> rows;
  void multiply(const LinearTask& task, int num_rows, int p, int panels) {
    constexpr int kMost = kDotFewRows / kDotFewPasses;
    const int most = num_rows <= kDotRows ? kDotRows : (num_rows + kDotFewPasses - 1) / kDotFewPasses;
    for (int i = 0; i < panels; ++i)
      for (int first = 0; first < rows.count; first += kDotColumns) {
        const int left = rows.count - first, columns = left < kDotColumns ? left : kDotColumns;
        const PackedPairs lines[] = {{half_lines(task, p + i, rows.k + first)}};
        for (int m = 0, size; m < num_rows; m += size) {
          size = tile_rows(num_rows - m, most);
          with_rows<kMost>(size, rows.tile(lines, m, i, first, columns));
        }
      }
  }
};

// Two panels at a time, interleaved once for all rows.
struct ManyDots {
  static constexpr int kRows = kDotSuperRows;
  DotRows<kDotSuperRows, kDotColumns> rows;
  alignas(64) int32_t weights[kDotPanels][kDotColumns / 2 * kPanel];
  DotAhead ahead;

  void multiply(const LinearTask& task, int num_rows, int p, int panels) {
    for (int i = 0; i < panels; i += kDotPanels) {
      look_ahead(task, num_rows, p, panels, i + kDotPanels);
      interleave_panel(half_lines(task, p + i, rows.k), weights[0]);
      if (i + 1 == panels) return multiply_rows<1>(task, {{weights[0], &ahead}}, num_rows, i);
      interleave_panel(half_lines(task, p + i + 1, rows.k), weights[1]);
      multiply_rows<kDotPanels>(task, {{weights[0], &ahead}, {weights[1], &ahead}}, num_rows, i);
    }
  }
  void interleave_panel(const uint8_t* lines, int32_t* to) const {
    const int count = rows.count;
    for (int i = 0; i < count / 4; ++i) {
      const EvenOdd w = interleave_lines(lines + int64_t{i} * 2 * kLineBytes);
      store(to + i * 2 * kPanel, w.even);
      store(to + (i * 2 + 1) * kPanel, w.odd);
    }
  }
  int next_columns(const LinearTask& task) const {
    const int next = rows.k + rows.count;
    return next < task.weights->columns ? next : 0;
  }
  // Next come panels i and i + 1 of the group, or the group's next columns, or the next group.
  void look_ahead(const LinearTask& task, int num_rows, int p, int panels, int i) {
    const int k = i < panels ? rows.k : next_columns(task), panel = i < panels ? p + i : k > 0 ? p : p + panels;
    const int blocks = (num_rows + kDotRows - 1) / kDotRows * (rows.count / kHalfColumns);
    const int64_t lines = rows.count / 2;
    ahead.at[0] = half_lines(task, panel, k);
    ahead.at[1] = half_lines(task, panel + 1, k);
    ahead.bytes = lines * kLineBytes;
    ahead.each = (lines + blocks - 1) / blocks * kLineBytes;
  }
  // The first panels fetch the next columns of the first one of some rows, and so on: there are as many.
  template <int panels>
  void multiply_rows(const LinearTask& task, const InterleavedPairs (&from)[panels], int num_rows, int panel) {
    static_assert(kDotGroupPanels / kDotPanels == kDotRows);
    const int next = next_columns(task);
    for (int m = 0, size; m < num_rows; m += size) {
      size = num_rows - m <= kDotRowsMost ? num_rows - m : kDotRows;
      ahead.row = task.halves.row(rows.m0 + m + panel / kDotPanels) + next;
      with_rows<kDotRowsMost>(size, rows.tile(from, m, panel, 0, rows.count));
    }
  }
};

template <class Products>
inline void linear_dots(const LinearTask& task, int p0, int p1) {
  Products products;
  for (int p = p0; p < p1; p += kDotGroupPanels) {
    const int panels = p1 - p < kDotGroupPanels ? p1 - p : kDotGroupPanels;
    for (int m = 0, size; m < task.num_rows; m += size) {
      size = tile_rows(task.num_rows - m, Products::kRows);
      dot_group(task, products, m, size, p, panels);
    }
  }
}

// One row is bound by memory in any way.
inline void linear_by_half_dots(const LinearTask& task, int p0, int p1) {
  if (!task.halves.data || task.num_rows <= 1 || task.weights->columns % kHalfColumns != 0 || !half_dots_here())
    return linear(task, p0, p1);
  if (task.num_rows <= kDotFewRows) return linear_dots<FewDots>(task, p0, p1);
  linear_dots<ManyDots>(task, p0, p1);
}

// The inner loop, on operands that stay in the first cache. They are numbers like any: products of zeros take less
// power, and a processor clocks higher for them.
inline int64_t multiply_half_dots(int passes) {
  DotRows<kDotRows, kDotColumns> rows;
  alignas(64) int32_t weights[kDotPanels][kDotColumns / 2 * kPanel];
  uint32_t state = 1;
  const auto fill = [&state](int32_t* to, int64_t count) {  // sign and mantissa at random, magnitudes near 1
    for (int64_t i = 0; i < count; ++i)
      to[i] = static_cast<int32_t>(((state = state * 1664525 + 1013904223) & 0x80ff80ff) | 0x3f003f00);
  };
  fill(rows.pairs[0], kDotRows * rows.kStride);
  fill(weights[0], kDotPanels * kDotColumns / 2 * kPanel);
  for (auto& sums : rows.sums)
    for (int p = 0; p < kDotPanels; ++p) store(sums[p], set1(0.0f));
  DotAhead none{};
  const InterleavedPairs panels[] = {{weights[0], &none}, {weights[1], &none}};
  for (int pass = 0; pass < passes; ++pass) rows.tile(panels, 0, 0, 0, kDotColumns).template run<kDotRows>();
  return 2 * int64_t{kDotRows} * kDotPanels * kPanel * kDotColumns * passes;
}

// The same table with them.
constexpr Kernels with_half_dots(const Kernels& plain) {
  Kernels kernels = plain;
  kernels.linear = linear_by_half_dots;
  kernels.multiply_halves = multiply_half_dots;
  kernels.multiplies_halves = half_dots_here;
  return kernels;
}
