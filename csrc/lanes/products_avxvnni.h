// Products of bytes by VPDPBUSD in 256 bits: after lanes/avx2.h and a function dpbusd(acc, unsigned, signed) of halves.
#pragma once

constexpr int kWeightBias = 128;  // the instruction multiplies unsigned by signed bytes: the weights are made unsigned
constexpr int kRowBlock = 6;      // x 2 registers = 12 of 16
constexpr int kDirectRowsInt4 = 6, kDirectLinesFrom = 3, kDirectPanels = 1;
constexpr int kDirectRowsMost[] = {4, 24, 24};
constexpr int kDirectRowsInt8 = 2;

LANES I32 dot_us(I32 acc, Quads u, Quads s) { return {dpbusd(acc.lo, u.lo, s.lo), dpbusd(acc.hi, u.hi, s.hi)}; }
LANES __m256i dot_ss_half(__m256i acc, __m256i a, __m256i b) {
  return dpbusd(acc, _mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
}
LANES I32 dot_ss(I32 acc, Quads a, Quads b) {
  return {dot_ss_half(acc.lo, a.lo, b.lo), dot_ss_half(acc.hi, a.hi, b.hi)};
}
LANES Quads as_weights(Quads s) {
  const __m256i sign = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(s.lo, sign), _mm256_xor_si256(s.hi, sign)};
}
LANES I32 dot_weights(I32 acc, Quads weights, Quads activations) { return dot_us(acc, weights, activations); }

template <int half>
LANES __m256i dot_nibbles_half(__m256i acc, const uint8_t* lines, const int8_t* activations) {
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j)
    acc = dpbusd(acc, nibbles_of<half>(load_half(lines + 64 * j)), set1_quad(activations + 4 * j).lo);
  return acc;
}
template <int half>
LANES I32 dot_nibbles(I32 acc, Nibbles block, const int8_t* activations) {
  return {dot_nibbles_half<half>(acc.lo, block.lines, activations),
          dot_nibbles_half<half>(acc.hi, block.lines + 32, activations)};
}

template <int line = 0>
LANES __m256i dot_octals_half(__m256i acc, const uint8_t* lines, const int8_t* activations) {
  acc = dpbusd(acc, octal_half<line>(lines), set1_quad(activations + 4 * line).lo);
  if constexpr (line < 7) acc = dot_octals_half<line + 1>(acc, lines, activations);
  return acc;
}
LANES I32 dot_octals(I32 acc, Octals octals, const int8_t* activations) {
  return {dot_octals_half(acc.lo, octals.lines, activations), dot_octals_half(acc.hi, octals.lines + 32, activations)};
}

#include "lanes/group_sum.h"
