// Products of many quantized rows with INT4 and INT3 where no instruction multiplies bytes and sums four of them: codes
// are multiplied as they are, without their scales, and so small that products of 32 columns fit in sums of 16 bits.
// Only those meet the scale, which costs nothing there: the step from 16 to 32 bits is a multiplication anyway.
//
// Integer sums are exact, so they are the same to the last bit. The lanes give
//   start_pairs(x)            sums of two columns each, of which one of a lane's two begins with x
//   dot_pairs(pairs, c, a)    + unsigned codes times signed activations
//   add_scaled(acc, p, s)     acc + s times the sum of both; s as twice_16() gives it
#pragma once

constexpr int kPairRows = 5;  // x 2 registers = 10 of 16; with 6 GCC 12 keeps some on the stack
constexpr int kPairBlocks = kIntegerColumns / kSumColumns;

struct PairScratch {
  alignas(64) uint8_t codes[kGroupPanels][kIntegerColumns * kPanel];
  alignas(64) int32_t scales[kGroupPanels][kPairBlocks][kPanel];
  alignas(64) int32_t sums[kSuperRows][kGroupPanels][kPanel];
};

template <int line = 0>
LANES void store_octal_codes(const Octals& octals, uint8_t* out) {
  store_quads(out + line * kLineBytes, octal_line<line>(octals));
  if constexpr (line < 7) store_octal_codes<line + 1>(octals, out);
}

// Columns [k, k + count) of a panel as codes, 8 lines for 32 columns, and the scale of each 32.
inline void unpack_codes(const Panel& panel, int k, int count, uint8_t* codes, int32_t (*scales)[kPanel]) {
  const bool int4 = panel.format == SNELLO_INT4;
  for (int b = 0; b < count; b += kSumColumns) {
    const uint8_t* s = panel.group_scale(k + b);
    store(scales[b / kSumColumns], twice_16(int4 ? load_u8(s) : load_s8(reinterpret_cast<const int8_t*>(s))));
    uint8_t* out = codes + b * kPanel;
    if (!int4) {
      store_octal_codes(load_octals(panel.lines + static_cast<int64_t>(k + b) / kSumColumns * 3 * kLineBytes), out);
      continue;
    }
    const uint8_t* at = panel.lines + static_cast<int64_t>((k + b) / kBlock) * 8 * kLineBytes;
    const bool high = (k + b) % kBlock != 0;
    for (int i = 0; i < 8 * kLineBytes; i += kLineBytes) {
      const Quads line = load_quads(at + i);
      store_quads(out + i, high ? nibbles<1>(line) : nibbles<0>(line));
    }
  }
}

struct PairTile {
  PairScratch& scratch;
  const LinearTask& task;
  int m, row, panel, k, count;  // first row of the task and of the sums; columns [k, k + count)
  const uint8_t* next;          // what is fetched meanwhile, `next_bytes` with each line
  int next_bytes;
  template <int rows>
  void run() const {
    const int offset = task.weights->format == SNELLO_INT4 ? -CodesInt4::kOffset : -CodesInt3::kOffset;
    const int8_t* x = task.quant.row(m) + k;
    const int64_t stride = task.quant.stride, blocks = task.quant.width / kSumColumns;
    const int32_t* sum = task.quant.row_sums(m) + k / kSumColumns;
    const uint8_t *codes = scratch.codes[panel], *fetched = next;
    for (int b = 0; b < count / kSumColumns; ++b, x += kSumColumns) {
      Pairs pairs[rows];
      for (int r = 0; r < rows; ++r) pairs[r] = start_pairs(offset * sum[r * blocks + b]);
#pragma GCC unroll 1  // else GCC 12 puts the sums off and keeps all products on the stack
      for (int line = 0; line < 8; ++line, codes += kLineBytes, fetched += next_bytes) {
        prefetch(fetched);
        const Quads w = load_quads(codes);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) pairs[r] = dot_pairs(pairs[r], w, set1_quad(x + r * stride + 4 * line));
      }
      const I32 scale = load(scratch.scales[panel][b]);
      for (int r = 0; r < rows; ++r) {
        int32_t* acc = scratch.sums[row + r][panel];
        store(acc, add_scaled(load(acc), pairs[r], scale));
      }
    }
  }
};

// Rows [m0, m0 + rows) x panels [p, p + panels).
inline void multiply_pairs(const LinearTask& task, PairScratch& scratch, int m0, int rows, int p, int panels) {
  const snello_tensor& w = *task.weights;
  for (int m = 0; m < rows; ++m)
    for (int i = 0; i < panels; ++i) store(scratch.sums[m][i], set1(0));
  const int line_bytes = w.format == SNELLO_INT4 ? kLineBytes / 2 : kLineBytes * 3 / 8;
  for (int k = 0; k < w.columns; k += kIntegerColumns) {
    const int left = w.columns - k, count = left < kIntegerColumns ? left : kIntegerColumns;
    const uint8_t* next[kGroupPanels];
    for (int i = 0; i < panels; ++i) {
      const Panel panel = panel_at(w, p + i);
      unpack_codes(panel, k, count, scratch.codes[i], scratch.scales[i]);
      next[i] = left > count ? panel.lines + static_cast<int64_t>(k + count) / 4 * line_bytes
                             : panel_at(w, p + i + panels).lines;
    }
    for (int m = 0, size; m < rows; m += size) {
      size = tile_rows(rows - m, kPairRows);
      for (int i = 0; i < panels; ++i)
        with_rows<kPairRows>(size, PairTile{scratch, task, m0 + m, m, i, k, count, next[i], line_bytes});
    }
  }
  for (int i = 0; i < panels; ++i) {
    const Panel panel = panel_at(w, p + i);
    for (int m = 0; m < rows; ++m) finish_integer(task, m0 + m, p + i, panel, load(scratch.sums[m][i]));
  }
}

inline void linear_by_pairs(const LinearTask& task, int p0, int p1) {
  const int format = task.weights->format;
  if (!task.quantized || (format != SNELLO_INT4 && format != SNELLO_INT3) || few_integer_rows(task))
    return linear(task, p0, p1);
  PairScratch scratch;
  for (int m = 0, size; m < task.num_rows; m += size) {
    size = tile_rows(task.num_rows - m, kSuperRows);
    for (int p = p0; p < p1; p += kGroupPanels)
      multiply_pairs(task, scratch, m, size, p, p1 - p < kGroupPanels ? p1 - p : kGroupPanels);
  }
}

constexpr Kernels with_pairs(Kernels kernels) {
  kernels.linear = linear_by_pairs;
  return kernels;
}
