// Products of unsigned by signed bytes where only signed ones are multiplied: after lanes/neon.h.
#pragma once

// u = (u - 128) + 128: the same bits with the highest one flipped, and twice a product with 64.
LANES I32 dot_us(I32 acc, Quads u, Quads s) {
  const int8x16_t half = vdupq_n_s8(64);
  return each<I32>([&](int i) {
    const int8x16_t low = as_signed(veorq_u8(u.v[i], vdupq_n_u8(128))), signed_bytes = as_signed(s.v[i]);
    const int32x4_t sum = vdotq_s32(acc.v[i], low, signed_bytes);
    return vaddq_s32(sum, vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), half, signed_bytes), 1));
  });
}

#include "lanes/group_sum.h"
