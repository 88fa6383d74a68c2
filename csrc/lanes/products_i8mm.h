// Products of unsigned by signed bytes by USDOT: after lanes/neon.h.
#pragma once

LANES I32 dot_us(I32 acc, Quads u, Quads s) {
  return each<I32>([&](int i) { return vusdotq_s32(acc.v[i], u.v[i], as_signed(s.v[i])); });
}

#include "lanes/group_sum.h"

// ---- sums of two rows (see kernels/matrices.inl): register i has outputs 2i and 2i + 1, of each the first row's sum
// and the second one's ----

struct Duo {
  int32x4_t v[8];
};
LANES Duo load(const int32_t* low, const int32_t* high) {
  return {{vld1q_s32(low), vld1q_s32(low + 4), vld1q_s32(low + 8), vld1q_s32(low + 12), vld1q_s32(high),
           vld1q_s32(high + 4), vld1q_s32(high + 8), vld1q_s32(high + 12)}};
}
LANES void store(int32_t* low, int32_t* high, Duo x) {
  for (int i = 0; i < 4; ++i) vst1q_s32(low + 4 * i, x.v[i]);
  for (int i = 0; i < 4; ++i) vst1q_s32(high + 4 * i, x.v[i + 4]);
}
template <int row>
LANES I32 row_of(Duo x) {
  return each<I32>([&](int i) {
    if constexpr (row == 0) return vuzp1q_s32(x.v[2 * i], x.v[2 * i + 1]);
    return vuzp2q_s32(x.v[2 * i], x.v[2 * i + 1]);
  });
}
LANES void eight_columns(Quads line, Quads next, uint8_t* to) {
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t low = vreinterpretq_u32_u8(line.v[i]), high = vreinterpretq_u32_u8(next.v[i]);
    vst1q_u8(to + 32 * i, vreinterpretq_u8_u32(vzip1q_u32(low, high)));
    vst1q_u8(to + 32 * i + 16, vreinterpretq_u8_u32(vzip2q_u32(low, high)));
  }
}
template <int pairs>
LANES void multiply_eight(Duo (&acc)[pairs], const uint8_t* weights, const int8_t* const (&first)[pairs],
                          const int8_t* const (&second)[pairs]) {
  int8x16_t x[pairs];
  for (int i = 0; i < pairs; ++i) x[i] = vcombine_s8(vld1_s8(first[i]), vld1_s8(second[i]));
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    const int8x16_t w = as_signed(vld1q_u8(weights + 16 * j));
#pragma GCC unroll 4
    for (int i = 0; i < pairs; ++i) acc[i].v[j] = vmmlaq_s32(acc[i].v[j], w, x[i]);
  }
}
