// Products of a few quantized rows, straight from packed weights: what linear.inl calls direct. Nothing is unpacked to
// memory. The fewest rows meet a whole block of codes one after the other; from kDirectLinesFrom rows on all of them
// meet one line after the other, so that unpacking is shared, and so are loads of rows where two panels fit in the
// registers.
#pragma once

template <int rows>
inline void direct_int8(const LinearTask& task, int p) {
  constexpr int kChains = kDirectAccumulators / rows >= 4 ? 4 : kDirectAccumulators / rows >= 2 ? 2 : 1;
  const Panel panel = panel_at(*task.weights, p);
  const int8_t* a = task.quant.q;
  const int64_t stride = task.quant.stride;
  I32 acc[rows][kChains];
  for (auto& row : acc)
    for (I32& chain : row) chain = set1(0);
  const int lines = task.weights->columns / 4;
  for (int line = 0; line < lines; line += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint8_t* at = panel.lines + static_cast<int64_t>(line + i) * kLineBytes;
      prefetch_direct<rows>(at);
      const Quads w = as_weights(load_quads(at));
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const Quads x = set1_quad(a + r * stride + 4 * (line + i));
        acc[r][i % kChains] = dot_weights(acc[r][i % kChains], w, x);
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    I32 sum = acc[r][0];
    for (int c = 1; c < kChains; ++c) sum = add(sum, acc[r][c]);
    finish_integer(task, r, p, panel, sub(sum, set1(weight_bias(task, r))));
  }
}

// A block of 64 columns as unsigned codes: how many lines it has, what a code of zero weight is, products of a half.
struct CodesInt4 {
  static constexpr int kLines = 8, kOffset = 8;
  Nibbles block;
  static LANES CodesInt4 at(const uint8_t* lines) { return {load_nibbles(lines)}; }
  static LANES I32 scale(const uint8_t* p) { return load_u8(p); }
  template <int half>
  LANES I32 dot(I32 acc, const int8_t* x) const {
    return dot_nibbles<half>(acc, block, x);
  }
  // Calls f(codes of each panel, their first column) for the quads of the low half, of the high one, or of both.
  template <bool low, bool high, int panels, class Function>
  static LANES void for_quads(const uint8_t* const (&lines)[panels], Function f) {
#pragma GCC unroll 8
    for (int i = 0; i < kLines; ++i) {
      Quads codes[panels];
      if constexpr (low) {
        for (int p = 0; p < panels; ++p) codes[p] = nibbles<0>(load_quads(lines[p] + i * kLineBytes));
        f(codes, 4 * i);
      }
      if constexpr (high) {
        for (int p = 0; p < panels; ++p) codes[p] = nibbles<1>(load_quads(lines[p] + i * kLineBytes));
        f(codes, kSumColumns + 4 * i);
      }
    }
  }
};
struct CodesInt3 {
  static constexpr int kLines = 6, kOffset = 4;
  Octals low, high;
  static LANES CodesInt3 at(const uint8_t* lines) { return {load_octals(lines), load_octals(lines + 3 * kLineBytes)}; }
  static LANES I32 scale(const uint8_t* p) { return load_s8(reinterpret_cast<const int8_t*>(p)); }
  template <int half>
  LANES I32 dot(I32 acc, const int8_t* x) const {
    return dot_octals(acc, half ? high : low, x);
  }
  template <int line = 0, int panels, class Function>
  static LANES void for_half(const Octals (&octals)[panels], int column, Function f) {
    Quads codes[panels];
    for (int p = 0; p < panels; ++p) codes[p] = octal_line<line>(octals[p]);
    f(codes, column + 4 * line);
    if constexpr (line < 7) for_half<line + 1>(octals, column, f);
  }
  template <bool low, bool high, int panels, class Function>
  static LANES void for_quads(const uint8_t* const (&lines)[panels], Function f) {
    for (int half = low ? 0 : 1; half < (high ? 2 : 1); ++half) {
      Octals octals[panels];
      for (int p = 0; p < panels; ++p) octals[p] = load_octals(lines[p] + half * 3 * kLineBytes);
      for_half(octals, half * kSumColumns, f);
    }
  }
};

// Groups of 32 columns are one half of a block; larger groups take both halves before they meet their scale.
template <class Codes, int rows, bool halves>
inline void direct_codes(const LinearTask& task, int p) {
  const Panel panel = panel_at(*task.weights, p);
  const int blocks = task.quant.width / kSumColumns;
  const int8_t* a = task.quant.q;
  const int64_t stride = task.quant.stride;
  const int32_t* sums = task.quant.sums;
  I32 acc[rows];
  for (I32& row : acc) row = set1(0);
  for (int k = 0; k < task.weights->columns; k += kBlock) {
    const uint8_t* at = panel.lines + static_cast<int64_t>(k / kBlock) * Codes::kLines * kLineBytes;
#pragma GCC unroll 8
    for (int i = 0; i < Codes::kLines; ++i) prefetch_direct<rows>(at + kLineBytes * i);
    const Codes block = Codes::at(at);
    const I32 low_scale = Codes::scale(panel.group_scale(k));
    const I32 high_scale = halves ? Codes::scale(panel.group_scale(k + kSumColumns)) : low_scale;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const int8_t* x = a + r * stride + k;
      const int32_t* sum = sums + static_cast<int64_t>(r) * blocks + k / kSumColumns;
      if constexpr (halves) {
        const I32 low = block.template dot<0>(set1(-Codes::kOffset * sum[0]), x);
        const I32 high = block.template dot<1>(set1(-Codes::kOffset * sum[1]), x + kSumColumns);
        acc[r] = add(acc[r], add(mul(low, low_scale), mul(high, high_scale)));
      } else {
        const I32 low = block.template dot<0>(set1(-Codes::kOffset * (sum[0] + sum[1])), x);
        // Halves that do not wait for each other, where there are registers for it and nothing else to do meanwhile.
        const I32 both = rows <= 2 ? add(low, block.template dot<1>(set1(0), x + kSumColumns))
                                   : block.template dot<1>(low, x + kSumColumns);
        acc[r] = add(acc[r], mul(both, low_scale));
      }
    }
  }
  for (int r = 0; r < rows; ++r) finish_integer(task, r, p, panel, acc[r]);
}

// The same address, of which the compiler does not know what it has to do with others: it would keep each in a
// register.
template <class T>
LANES T* opaque(T* p) {
  asm("" : "+r"(p));
  return p;
}

// The same line by line, for some panels at once: an unpacked line serves all rows, a quad of a row all panels, and no
// product waits for the one before it. Sums of groups meet their scales in `acc`, in memory, where they are in nobody's
// way.
using DirectSums = int32_t (*)[kDirectPanels][kPanel];  // [rows]

template <class Codes, int rows, int panels>
class DirectLines {
 public:
  LANES DirectLines(const LinearTask& task, int m, int first) : task_(task), m_(m) {
    for (int p = 0; p < panels; ++p) panel_[p] = panel_at(*task.weights, first + p);
  }
  template <int columns>
  LANES void add_group(DirectSums acc, int column) {
    start<columns>(column);
    for (int k = column; k < column + columns; k += kBlock) {
      fetch(k);
      multiply<true, true>(k);
    }
    finish_group(acc, column);
  }
  // A block of two groups.
  LANES void add_halves(DirectSums acc, int column) {
    fetch(column);
    start<kSumColumns>(column);
    multiply<true, false>(column);
    finish_group(acc, column);
    start<kSumColumns>(column + kSumColumns);
    multiply<false, true>(column);
    finish_group(acc, column + kSumColumns);
  }
  LANES void finish(DirectSums acc, int first) const {
    for (int r = 0; r < rows; ++r)
      for (int p = 0; p < panels; ++p) finish_integer(task_, m_ + r, first + p, panel_[p], load(acc[r][p]));
  }

 private:
  LANES static int64_t bytes_before(int column) {
    return static_cast<int64_t>(column / kBlock) * Codes::kLines * kLineBytes;
  }
  // What lies so far ahead: after a panel's end in the one that is read next, for its neighbours are being read.
  LANES void fetch(int column) const {
    const int64_t ahead = bytes_before(column) + kPrefetchBytesL1, end = bytes_before(task_.weights->columns);
    const int64_t skip = ahead < end ? 0 : (panels - 1) * panel_bytes(*task_.weights);
    for (int p = 0; p < panels; ++p) {
      const uint8_t* at = opaque(panel_[p].lines + ahead + skip);
#pragma GCC unroll 8
      for (int i = 0; i < Codes::kLines; ++i) __builtin_prefetch(at + kLineBytes * i, 0, 3);
    }
  }
  // Takes the codes' offset off the columns of a group.
  template <int columns>
  LANES void start(int column) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const int32_t* sums = task_.quant.row_sums(m_ + r) + column / kSumColumns;
      int32_t total = sums[0];
#pragma GCC unroll 4
      for (int i = 1; i < columns / kSumColumns; ++i) total += sums[i];
#pragma GCC unroll 2
      for (int p = 0; p < panels; ++p) sum_[r][p] = GroupSum::start(-Codes::kOffset * total);
    }
  }
  template <bool low, bool high>
  LANES void multiply(int column) {
    const int64_t stride = task_.quant.stride;
    const int8_t* x[(rows + 2) / 3];  // an address reaches three rows
    for (int r = 0; r < rows; r += 3) x[r / 3] = opaque(task_.quant.row(m_ + r) + column);
    const uint8_t* lines[panels];
    for (int p = 0; p < panels; ++p) lines[p] = opaque(panel_[p].lines + bytes_before(column));
    Codes::template for_quads<low, high, panels>(
        lines, [&](const Quads(&codes)[panels], int place) __attribute__((always_inline)) {
#pragma GCC unroll 16
          for (int r = 0; r < rows; ++r) {
            const Quads quad = set1_quad(x[r / 3] + r % 3 * stride + place);
#pragma GCC unroll 2
            for (int p = 0; p < panels; ++p) sum_[r][p].take(codes[p], quad);
          }
        });
  }
  LANES void finish_group(DirectSums acc, int column) const {
#pragma GCC unroll 2
    for (int p = 0; p < panels; ++p) {
      const I32 scale = GroupSum::scale(Codes::scale(panel_[p].group_scale(column)));
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) store(acc[r][p], sum_[r][p].scaled(load(acc[r][p]), scale));
    }
  }

  const LinearTask& task_;
  int m_;  // first row
  Panel panel_[panels];
  GroupSum sum_[rows][panels];
};

// Not inlined: the compiler would know who else sees `acc`, and keep it in registers that it does not have.
template <class Codes, int rows, int panels>
__attribute__((noinline)) void direct_lines(const LinearTask& task, int m, int first, DirectSums acc) {
  DirectLines<Codes, rows, panels> lines(task, m, first);
  for (int r = 0; r < rows; ++r)
    for (int p = 0; p < panels; ++p) store(acc[r][p], set1(0));
  const int columns = task.weights->columns, group = task.weights->group_size;
  int k = 0;
  if (GroupSum::kMostColumns == kSumColumns || group == kSumColumns)
    for (; k < columns; k += kBlock) lines.add_halves(acc, k);
  if constexpr (GroupSum::kMostColumns >= 2 * kBlock) {
    if (group == 2 * kBlock)
      for (; k + 2 * kBlock <= columns; k += 2 * kBlock) lines.template add_group<2 * kBlock>(acc, k);
    for (; k < columns; k += kBlock) lines.template add_group<kBlock>(acc, k);
  }
  lines.finish(acc, first);
}

// Rows from m on of some panels, at most kDirectPanels.
struct DirectInteger {
  const LinearTask& task;
  int m, first, panels;
  DirectSums acc;
  template <int rows>
  void run() const {
    if (task.weights->format == SNELLO_INT8) {
      if constexpr (rows <= kDirectRowsInt8)
        for (int p = first; p < first + panels; ++p) direct_int8<rows>(task, p);
    } else if (task.weights->format == SNELLO_INT4) {
      run_codes<CodesInt4, rows>();
    } else {
      run_codes<CodesInt3, rows>();
    }
  }
  template <class Codes, int rows>
  void run_codes() const {
    if constexpr (rows >= kDirectLinesFrom) {
      if (panels == kDirectPanels) return direct_lines<Codes, rows, kDirectPanels>(task, m, first, acc);
      direct_lines<Codes, rows, 1>(task, m, first, acc);
    } else {
      for (int p = first; p < first + panels; ++p) {
        if (task.weights->group_size == kSumColumns)
          direct_codes<Codes, rows, true>(task, p);
        else
          direct_codes<Codes, rows, false>(task, p);
      }
    }
  }
};

inline bool few_integer_rows(const LinearTask& task) {
  const snello_tensor& w = *task.weights;
  if (by_channel(w.format)) return false;
  if (w.format == SNELLO_INT8) return task.num_rows <= kDirectRowsInt8;
  return task.num_rows <= kDirectRowsMost[w.group_size == kSumColumns ? 0 : w.group_size == kBlock ? 1 : 2];
}

static_assert(kDirectRowsInt8 <= kDirectRowsInt4 && kDirectPanels <= 2);
static_assert(kDirectRowsMost[2] <= kDirectRowsInt4 || (kDirectRowsInt4 + 2) / 2 >= kDirectLinesFrom);  // of passes
inline void direct_integer(const LinearTask& task, int p0, int p1) {
  alignas(64) int32_t acc[kDirectRowsInt4][kDirectPanels][kPanel];
  for (int p = p0, panels; p < p1; p += panels) {
    panels = p1 - p < kDirectPanels ? p1 - p : kDirectPanels;
    for (int m = 0, size; m < task.num_rows; m += size) {
      size = tile_rows(task.num_rows - m, kDirectRowsInt4);
      with_rows<kDirectRowsInt4>(size, DirectInteger{task, m, p, panels, acc});
    }
  }
}
