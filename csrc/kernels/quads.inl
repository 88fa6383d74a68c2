// Products of many quantized rows where an instruction takes one of the four quads of a register as a factor of all
// others (SDOT by element): a row's 16 columns are loaded once for four lines, and nothing has to be spread over a
// register. The lanes give RowQuads, row_quads(16 bytes) and dot_quad<i>(acc, weights, quads).
#pragma once

struct QuadTile {
  static constexpr int kRows = 5;  // x 4 sums, 5 rows and 4 registers of weights: 29 of 32
  IntegerScratch& scratch;
  const IntegerChunk& chunk;
  const int8_t* x;  // first row, first column
  int64_t stride;
  int row, panel, panels_left;  // first row of the sums, panel of the group
  template <int rows>
  void run() const {
    I32 acc[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) acc[r] = load(scratch.sums[row + r][panel]);
    const uint8_t *at = chunk.weights[panel], *next = chunk.next[panel];
    for (int k = 0; k < chunk.columns; k += 16, at += 4 * kLineBytes) {
      RowQuads quads[rows];
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) quads[r] = row_quads(x + r * stride + k);
      for (int line = 0; line < 4; ++line, next += chunk.next_bytes) prefetch(next);
      multiply_lines<0>(acc, quads, at);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) store(scratch.sums[row + r][panel], acc[r]);
  }
  template <int line, int rows>
  static LANES void multiply_lines(I32 (&acc)[rows], const RowQuads (&quads)[rows], const uint8_t* at) {
    const Quads w = as_weights(load_quads(at + line * kLineBytes));
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) acc[r] = dot_quad<line>(acc[r], w, quads[r]);
    if constexpr (line < 3) multiply_lines<line + 1>(acc, quads, at);
  }
};

inline void linear_by_quads(const LinearTask& task, int p0, int p1) {
  if (!many_integer_rows(task)) return linear(task, p0, p1);
  blocked_integer<QuadTile>(task, p0, p1);
}

constexpr Kernels with_quads(Kernels kernels) {
  kernels.linear = linear_by_quads;
  return kernels;
}
