// Products of many quantized rows where one instruction multiplies two rows with two outputs, eight columns of each: at
// its best twice the products of one that takes four columns of a row. Weights are unpacked as everywhere (see
// blocked_integer); then two lines become one of eight columns an output. Integer sums are exact, so they are the same
// to the last bit.
//
// The lanes give Duo (sums of two rows with 16 outputs), load, store (two places of 16 sums), row_of<0 or 1>, and
//   eight_columns(line, next, to)                128 bytes from two lines
//   multiply_eight(acc, weights, first, second)  acc[i] += 8 columns of 16 outputs times first[i], second[i]
#pragma once

constexpr int kMatrixPairs = kRowBlock / 2;
static_assert(kSuperRows % 2 == 0);

struct MatrixTile {
  IntegerScratch& scratch;
  const IntegerChunk& chunk;
  const LinearTask& task;
  int m, row, left, panel, k;  // first row of the task and of the sums, how many follow; first column
  template <int pairs>
  void run() const {
    Duo acc[pairs];
    const int8_t *first[pairs], *second[pairs];
    for (int i = 0; i < pairs; ++i) {
      acc[i] = load(scratch.sums[row + 2 * i][panel], scratch.sums[row + 2 * i + 1][panel]);
      first[i] = task.quant.row(m + 2 * i) + k;
      second[i] = 2 * i + 1 < left ? task.quant.row(m + 2 * i + 1) + k : first[i];  // of an odd number the last, twice
    }
    const uint8_t *at = scratch.weights[panel], *next = chunk.next[panel];
    for (int j = 0; j < chunk.columns; j += 8, at += 2 * kLineBytes) {
      for (int line = 0; line < 2; ++line, next += chunk.next_bytes) prefetch(next);
      multiply_eight(acc, at, first, second);
      for (int i = 0; i < pairs; ++i) first[i] += 8, second[i] += 8;
    }
    for (int i = 0; i < pairs; ++i)
      store(scratch.sums[row + 2 * i][panel], scratch.sums[row + 2 * i + 1][panel], acc[i]);
  }
};

// Rows [m0, m0 + rows) x panels [p, p + panels).
inline void multiply_matrices(const LinearTask& task, IntegerScratch& scratch, int m0, int rows, int p, int panels) {
  const int pairs = (rows + 1) / 2;
  for (int m = 0; m < 2 * pairs; ++m)
    for (int i = 0; i < panels; ++i) store(scratch.sums[m][i], set1(0));
  for (int k = 0; k < task.weights->columns; k += kIntegerColumns) {
    const IntegerChunk chunk = chunk_at(*task.weights, scratch, p, panels, k);
    for (int i = 0; i < panels; ++i)
      for (int line = 0; line < chunk.columns / 4; line += 2) {
        const uint8_t* from = chunk.weights[i] + line * kLineBytes;
        eight_columns(load_quads(from), load_quads(from + kLineBytes), scratch.weights[i] + line * kLineBytes);
      }
    for (int pair = 0, size; pair < pairs; pair += size) {
      size = tile_rows(pairs - pair, kMatrixPairs);
      for (int i = 0; i < panels; ++i)
        with_rows<kMatrixPairs>(size, MatrixTile{scratch, chunk, task, m0 + 2 * pair, 2 * pair, rows - 2 * pair, i, k});
    }
  }
  for (int i = 0; i < panels; ++i) {
    const Panel panel = panel_at(*task.weights, p + i);
    for (int m = 0; m < rows; ++m) {
      const Duo sums = load(scratch.sums[m / 2 * 2][i], scratch.sums[m / 2 * 2 + 1][i]);
      finish_integer(task, m0 + m, p + i, panel, m % 2 ? row_of<1>(sums) : row_of<0>(sums));
    }
  }
}

inline void linear_by_matrices(const LinearTask& task, int p0, int p1) {
  if (!many_integer_rows(task)) return linear(task, p0, p1);
  IntegerScratch scratch;
  for (int m = 0, size; m < task.num_rows; m += size) {
    size = tile_rows(task.num_rows - m, kSuperRows);
    for (int p = p0; p < p1; p += kGroupPanels)
      multiply_matrices(task, scratch, m, size, p, p1 - p < kGroupPanels ? p1 - p : kGroupPanels);
  }
}

constexpr Kernels with_matrices(Kernels kernels) {
  kernels.linear = linear_by_matrices;
  return kernels;
}
