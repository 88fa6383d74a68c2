// Dot products of pairs of BF16 (see lanes/half_dots_emulated.h) on AVX512_BF16. The instruction is written out, so
// that no flag lets the compiler use it elsewhere.
#pragma once

LANES F32 dot_halves(F32 sum, I32 x, I32 w) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(x.v), "v"(w.v));
  return sum;
}
LANES I32 interleave_halves(I32 x) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(4, 5, 0, 1, 6, 7, 2, 3, 12, 13, 8, 9, 14, 15, 10, 11));
  return {_mm512_shuffle_epi8(x.v, order)};
}
LANES I32 even_halves(I32 a, I32 b) { return {_mm512_mask_blend_epi16(0x55555555, _mm512_slli_epi32(a.v, 16), b.v)}; }
LANES I32 odd_halves(I32 a, I32 b) { return {_mm512_mask_blend_epi16(0x55555555, a.v, _mm512_srli_epi32(b.v, 16))}; }
