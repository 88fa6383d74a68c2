// Dot products of pairs of BF16, stated in plain C++. kernels/half_dots.inl is written once over these names;
// lanes/half_dots_avx512.h gives the same names on AVX512_BF16.
//
//   dot_halves(sum, x, w): per lane, high(x) * high(w) fused onto the sum, then low(x) * low(w); x, w and sums as in
//     dot_tiles_bf16
//   interleave_halves(x): 32 columns of a row, each four 0 1 2 3 of them as 2 0 3 1
//   even_halves(a, b), odd_halves(a, b): lines of columns 0 1 and 2 3 of 16 outputs, as 2 0 and as 3 1
#pragma once

inline F32 dot_halves(F32 sum, I32 x, I32 w) {
  return fma(low_bf16(x), low_bf16(w), fma(high_bf16(x), high_bf16(w), sum));
}
inline int32_t low_halves(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) << 16 | (static_cast<uint32_t>(b) & 0xffff));
}
inline int32_t high_halves(int32_t a, int32_t b) {
  return static_cast<int32_t>((static_cast<uint32_t>(a) & 0xffff0000) | static_cast<uint32_t>(b) >> 16);
}
inline I32 even_halves(I32 a, I32 b) {
  return each<I32>([&](int i) { return low_halves(a.v[i], b.v[i]); });
}
inline I32 odd_halves(I32 a, I32 b) {
  return each<I32>([&](int i) { return high_halves(a.v[i], b.v[i]); });
}
inline I32 interleave_halves(I32 x) {
  return each<I32>([&](int i) {
    const int32_t a = x.v[i & ~1], b = x.v[i | 1];
    return i % 2 == 0 ? low_halves(a, b) : high_halves(a, b);
  });
}
