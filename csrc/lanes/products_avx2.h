// Products of bytes on AVX2, which has none that are exact: after lanes/avx2.h.
#pragma once

constexpr int kWeightBias = 0;
constexpr int kRowBlock = 4;  // x 2 registers = 8 of 16
constexpr int kDirectRowsInt4 = 5, kDirectLinesFrom = 2, kDirectPanels = 1;
constexpr int kDirectRowsMost[] = {9, 9, 9};
constexpr int kDirectRowsInt8 = 2;

// VPMADDUBSW would saturate, so even and odd bytes are multiplied as 16-bit numbers.
LANES __m256i dot_us_half(__m256i acc, __m256i u, __m256i s) {
  const __m256i u_even = _mm256_and_si256(u, _mm256_set1_epi16(255)), u_odd = _mm256_srli_epi16(u, 8);
  const __m256i s_even = _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8), s_odd = _mm256_srai_epi16(s, 8);
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(u_even, s_even));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(u_odd, s_odd));
}
LANES I32 dot_us(I32 acc, Quads u, Quads s) {
  return {dot_us_half(acc.lo, u.lo, s.lo), dot_us_half(acc.hi, u.hi, s.hi)};
}
// |a| * (b with a's sign): at most 2 * 127 * 127 per 16-bit lane, so VPMADDUBSW does not saturate. Sums are added in
// assembly: GCC 12 copies them around, and stores some on every turn, where there are many.
LANES __m256i dot_ss_half(__m256i acc, __m256i a, __m256i b) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
  asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
  return acc;
}
LANES I32 dot_ss(I32 acc, Quads a, Quads b) {
  return {dot_ss_half(acc.lo, a.lo, b.lo), dot_ss_half(acc.hi, a.hi, b.hi)};
}
LANES Quads as_weights(Quads s) { return s; }
LANES I32 dot_weights(I32 acc, Quads weights, Quads activations) { return dot_ss(acc, weights, activations); }

// 8 lines of at most 2 * 15 * 127 fit in 16 bits, so they are summed there.
template <int half>
LANES __m256i dot_nibbles_half(__m256i acc, const uint8_t* lines, const int8_t* activations) {
  __m256i pairs = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    const __m256i q = nibbles_of<half>(load_half(lines + 64 * j));
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(q, set1_quad(activations + 4 * j).lo));
  }
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
template <int half>
LANES I32 dot_nibbles(I32 acc, Nibbles block, const int8_t* activations) {
  return {dot_nibbles_half<half>(acc.lo, block.lines, activations),
          dot_nibbles_half<half>(acc.hi, block.lines + 32, activations)};
}

template <int line = 0>
LANES __m256i pairs_of_octals(__m256i pairs, const uint8_t* lines, const int8_t* activations) {
  const __m256i products = _mm256_maddubs_epi16(octal_half<line>(lines), set1_quad(activations + 4 * line).lo);
  pairs = _mm256_add_epi16(pairs, products);
  if constexpr (line < 7) pairs = pairs_of_octals<line + 1>(pairs, lines, activations);
  return pairs;
}
LANES __m256i dot_octals_half(__m256i acc, const uint8_t* lines, const int8_t* activations) {
  const __m256i pairs = pairs_of_octals(_mm256_setzero_si256(), lines, activations);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
LANES I32 dot_octals(I32 acc, Octals octals, const int8_t* activations) {
  return {dot_octals_half(acc.lo, octals.lines, activations), dot_octals_half(acc.hi, octals.lines + 32, activations)};
}

// ---- sums of pairs (see kernels/pairs.inl) ----

struct Pairs {
  __m256i lo, hi;
};
LANES Pairs start_pairs(int32_t x) {
  const __m256i first = _mm256_set1_epi32(x & 0xffff);
  return {first, first};
}
LANES Pairs dot_pairs(Pairs acc, Quads codes, Quads activations) {
  asm("vpaddw %1, %0, %0" : "+x"(acc.lo) : "x"(_mm256_maddubs_epi16(codes.lo, activations.lo)));
  asm("vpaddw %1, %0, %0" : "+x"(acc.hi) : "x"(_mm256_maddubs_epi16(codes.hi, activations.hi)));
  return acc;
}
LANES I32 twice_16(I32 x) { return bit_or(bit_and(x, set1(0xffff)), shift_left<16>(x)); }
LANES I32 add_scaled(I32 acc, Pairs pairs, I32 scale) {
  return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(pairs.lo, scale.lo)),
          _mm256_add_epi32(acc.hi, _mm256_madd_epi16(pairs.hi, scale.hi))};
}
// See lanes/group_sum.h.
struct GroupSum {
  static constexpr int kMostColumns = 32;
  Pairs v;
  LANES static GroupSum start(int32_t x) { return {start_pairs(x)}; }
  LANES void take(Quads codes, Quads activations) { v = dot_pairs(v, codes, activations); }
  LANES static I32 scale(I32 s) { return twice_16(s); }
  LANES I32 scaled(I32 acc, I32 scale) const { return add_scaled(acc, v, scale); }
};
