// The lanes interface (see lanes/scalar.h) on ARM's Advanced SIMD: four registers per 16 lanes. How unsigned bytes are
// multiplied by signed ones is in a second header, which an isa/*.cpp includes next: products_dotprod.h or
// products_i8mm.h.
#pragma once

constexpr int kLanes = 16;
constexpr int kWeightBias = 0;
constexpr int kRowBlock = 6;  // x 4 registers = 24 of 32
constexpr int kDirectRowsInt4 = 2, kDirectLinesFrom = 3, kDirectPanels = 1;
constexpr int kDirectRowsMost[] = {2, 2, 2};
constexpr int kDirectRowsInt8 = 2;
constexpr int kDirectRowsFloat = 2;
constexpr int kDirectAccumulators = 4;
constexpr int kPanelBlock = 1;

struct F32 {
  float32x4_t v[4];
};
struct I32 {
  int32x4_t v[4];
};
struct Mask {
  uint32x4_t v[4];
};
struct Quads {
  uint8x16_t v[4];
};
struct I16 {
  int16x8_t v[4];
};

#define LANES inline __attribute__((always_inline))

// Registers 0 to 3 of a result, each a function of its number.
template <class Result, class Function>
LANES Result each(Function function) {
  return {{function(0), function(1), function(2), function(3)}};
}

LANES int8x16_t as_signed(uint8x16_t x) { return vreinterpretq_s8_u8(x); }

// ---- memory ----

LANES F32 set1(float x) {
  return each<F32>([=](int) { return vdupq_n_f32(x); });
}
LANES I32 set1(int32_t x) {
  return each<I32>([=](int) { return vdupq_n_s32(x); });
}
LANES F32 load(const float* p) {
  return each<F32>([=](int i) { return vld1q_f32(p + 4 * i); });
}
LANES I32 load(const int32_t* p) {
  return each<I32>([=](int i) { return vld1q_s32(p + 4 * i); });
}
LANES void store(float* p, F32 x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
LANES void store(int32_t* p, I32 x) {
  for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, x.v[i]);
}

LANES F32 load_f16(const uint16_t* p) {
  return each<F32>([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
LANES F32 load_bf16(const uint16_t* p) {
  return each<F32>([=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
LANES F32 low_bf16(I32 pairs) {
  return each<F32>([&](int i) { return vreinterpretq_f32_s32(vshlq_n_s32(pairs.v[i], 16)); });
}
LANES F32 high_bf16(I32 pairs) {
  return each<F32>([&](int i) { return vreinterpretq_f32_s32(vandq_s32(pairs.v[i], vdupq_n_s32(-0x10000))); });
}
LANES void store_f16(uint16_t* p, F32 x) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
}
LANES uint16x4_t narrow_bf16(float32x4_t x) {
  const uint32x4_t raw = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(raw, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(raw, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t quiet = vorrq_u32(raw, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
}
LANES void store_bf16(uint16_t* p, F32 x) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, narrow_bf16(x.v[i]));
}

LANES I32 load_s8(const int8_t* p) {
  const int8x16_t x = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_high_s8(x);
  return {{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}};
}
LANES I32 load_u8(const uint8_t* p) {
  const uint8x16_t x = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_high_u8(x);
  const uint32x4_t v[4] = {vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low), vmovl_u16(vget_low_u16(high)),
                           vmovl_high_u16(high)};
  return each<I32>([&](int i) { return vreinterpretq_s32_u32(v[i]); });
}
LANES void store_s8(int8_t* p, I32 x) {
  const int16x8_t low = vqmovn_high_s32(vqmovn_s32(x.v[0]), x.v[1]);
  const int16x8_t high = vqmovn_high_s32(vqmovn_s32(x.v[2]), x.v[3]);
  vst1q_s8(p, vqmovn_high_s16(vqmovn_s16(low), high));
}
LANES void store_s8(int8_t* p, I32 a, I32 b, I32 c, I32 d) {
  store_s8(p, a);
  store_s8(p + kLanes, b);
  store_s8(p + 2 * kLanes, c);
  store_s8(p + 3 * kLanes, d);
}

#include "lanes/partial.h"

// ---- FP32 ----

LANES F32 add(F32 a, F32 b) {
  return each<F32>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
LANES F32 sub(F32 a, F32 b) {
  return each<F32>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
LANES F32 mul(F32 a, F32 b) {
  return each<F32>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
LANES F32 div(F32 a, F32 b) {
  return each<F32>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
LANES F32 fma(F32 a, F32 b, F32 c) {
  for (int i = 0; i < 4; ++i) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
  return c;
}
LANES F32 fms(F32 a, F32 b, F32 c) {
  return each<F32>([&](int i) { return vfmaq_f32(vnegq_f32(c.v[i]), a.v[i], b.v[i]); });
}
// FMIN and FMAX treat NaN and zeros in another way.
LANES float32x4_t min_of(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
LANES float32x4_t max_of(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
LANES F32 min(F32 a, F32 b) {
  return each<F32>([&](int i) { return min_of(a.v[i], b.v[i]); });
}
LANES F32 max(F32 a, F32 b) {
  return each<F32>([&](int i) { return max_of(a.v[i], b.v[i]); });
}
LANES F32 sqrt(F32 a) {
  return each<F32>([&](int i) { return vsqrtq_f32(a.v[i]); });
}
LANES F32 abs(F32 a) {
  return each<F32>([&](int i) { return vabsq_f32(a.v[i]); });
}
LANES F32 negate(F32 a) {
  return each<F32>([&](int i) { return vnegq_f32(a.v[i]); });
}
LANES F32 round_even(F32 a) {
  return each<F32>([&](int i) { return vrndnq_f32(a.v[i]); });
}

// ---- int32 ----

LANES I32 add(I32 a, I32 b) {
  return each<I32>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
}
LANES I32 sub(I32 a, I32 b) {
  return each<I32>([&](int i) { return vsubq_s32(a.v[i], b.v[i]); });
}
LANES I32 mul(I32 a, I32 b) {
  return each<I32>([&](int i) { return vmulq_s32(a.v[i], b.v[i]); });
}
struct Wide {
  I32 low, high;
};
LANES Wide multiply_wide(I32 a, I32 b) {
  Wide result;
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t x = vreinterpretq_u32_s32(a.v[i]), y = vreinterpretq_u32_s32(b.v[i]);
    const int32x4_t first = vreinterpretq_s32_u64(vmull_u32(vget_low_u32(x), vget_low_u32(y)));
    const int32x4_t second = vreinterpretq_s32_u64(vmull_high_u32(x, y));
    result.low.v[i] = vuzp1q_s32(first, second);
    result.high.v[i] = vuzp2q_s32(first, second);
  }
  return result;
}
LANES I32 min(I32 a, I32 b) {
  return each<I32>([&](int i) { return vminq_s32(a.v[i], b.v[i]); });
}
LANES I32 max(I32 a, I32 b) {
  return each<I32>([&](int i) { return vmaxq_s32(a.v[i], b.v[i]); });
}
LANES I32 bit_and(I32 a, I32 b) {
  return each<I32>([&](int i) { return vandq_s32(a.v[i], b.v[i]); });
}
LANES I32 bit_or(I32 a, I32 b) {
  return each<I32>([&](int i) { return vorrq_s32(a.v[i], b.v[i]); });
}
LANES I32 bit_xor(I32 a, I32 b) {
  return each<I32>([&](int i) { return veorq_s32(a.v[i], b.v[i]); });
}
// A shift by a register of equal numbers may be by 0, which none by an immediate to the right may.
template <int n>
LANES I32 shift_left(I32 a) {
  return each<I32>([&](int i) { return vshlq_s32(a.v[i], vdupq_n_s32(n)); });
}
template <int n>
LANES I32 shift_right(I32 a) {
  return each<I32>([&](int i) { return vshlq_s32(a.v[i], vdupq_n_s32(-n)); });
}
template <int n>
LANES I32 shift_right_logical(I32 a) {
  return each<I32>(
      [&](int i) { return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a.v[i]), vdupq_n_s32(-n))); });
}

// ---- conversions ----

// FCVTNS keeps to the nearest number that there is, and makes 0 of NaN.
LANES I32 to_int(F32 a) {
  return each<I32>([&](int i) {
    const uint32x4_t fits = vcaltq_f32(a.v[i], vdupq_n_f32(0x1p31f));
    return vbslq_s32(fits, vcvtnq_s32_f32(a.v[i]), vdupq_n_s32(INT32_MIN));
  });
}
LANES F32 to_float(I32 a) {
  return each<F32>([&](int i) { return vcvtq_f32_s32(a.v[i]); });
}
LANES I32 as_int(F32 a) {
  return each<I32>([&](int i) { return vreinterpretq_s32_f32(a.v[i]); });
}
LANES F32 as_float(I32 a) {
  return each<F32>([&](int i) { return vreinterpretq_f32_s32(a.v[i]); });
}

// n is in range, so it is converted as it is.
LANES F32 times_power(F32 a, F32 n) {
  return each<F32>([&](int i) {
    const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127));
    return vmulq_f32(a.v[i], vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  });
}

// ---- masks ----

LANES Mask less(F32 a, F32 b) {
  return each<Mask>([&](int i) { return vcltq_f32(a.v[i], b.v[i]); });
}
LANES Mask less_equal(F32 a, F32 b) {
  return each<Mask>([&](int i) { return vcleq_f32(a.v[i], b.v[i]); });
}
LANES Mask equal(F32 a, F32 b) {
  return each<Mask>([&](int i) { return vceqq_f32(a.v[i], b.v[i]); });
}
LANES Mask is_nan(F32 a) {
  return each<Mask>([&](int i) { return vmvnq_u32(vceqq_f32(a.v[i], a.v[i])); });
}
LANES Mask less(I32 a, I32 b) {
  return each<Mask>([&](int i) { return vcltq_s32(a.v[i], b.v[i]); });
}
LANES Mask equal(I32 a, I32 b) {
  return each<Mask>([&](int i) { return vceqq_s32(a.v[i], b.v[i]); });
}
LANES Mask first(int n) {
  const int32x4_t index = {0, 1, 2, 3};
  return each<Mask>([=](int i) { return vcltq_s32(index, vdupq_n_s32(n - 4 * i)); });
}
LANES Mask mask_and(Mask a, Mask b) {
  return each<Mask>([&](int i) { return vandq_u32(a.v[i], b.v[i]); });
}
LANES Mask mask_or(Mask a, Mask b) {
  return each<Mask>([&](int i) { return vorrq_u32(a.v[i], b.v[i]); });
}
LANES Mask mask_not(Mask a) {
  return each<Mask>([&](int i) { return vmvnq_u32(a.v[i]); });
}
LANES uint32_t bits(Mask a) {
  const uint32x4_t index = {1, 2, 4, 8};
  uint32x4_t all = vandq_u32(a.v[0], index);
  all = vorrq_u32(all, vandq_u32(a.v[1], vshlq_n_u32(index, 4)));
  all = vorrq_u32(all, vandq_u32(a.v[2], vshlq_n_u32(index, 8)));
  return vaddvq_u32(vorrq_u32(all, vandq_u32(a.v[3], vshlq_n_u32(index, 12))));
}
LANES bool any(Mask a) { return vmaxvq_u32(vorrq_u32(vorrq_u32(a.v[0], a.v[1]), vorrq_u32(a.v[2], a.v[3]))) != 0; }
LANES F32 select(Mask m, F32 yes, F32 no) {
  return each<F32>([&](int i) { return vbslq_f32(m.v[i], yes.v[i], no.v[i]); });
}
LANES I32 select(Mask m, I32 yes, I32 no) {
  return each<I32>([&](int i) { return vbslq_s32(m.v[i], yes.v[i], no.v[i]); });
}

// ---- across lanes ----

template <int d>
LANES F32 swap(F32 a) {
  static_assert(d == 1 || d == 2 || d == 4 || d == 8);
  return each<F32>([&](int i) {
    if constexpr (d == 1) return vrev64q_f32(a.v[i]);
    if constexpr (d == 2) return vextq_f32(a.v[i], a.v[i], 2);
    if constexpr (d == 4) return a.v[i ^ 1];
    if constexpr (d == 8) return a.v[i ^ 2];
  });
}
LANES float reduce_add(F32 a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x4_t two = vaddq_f32(four, vextq_f32(four, four, 2));
  return vgetq_lane_f32(two, 0) + vgetq_lane_f32(two, 1);
}
LANES float reduce_max(F32 a) {
  const float32x4_t four = max_of(max_of(a.v[0], a.v[2]), max_of(a.v[1], a.v[3]));
  const float32x4_t two = max_of(four, vextq_f32(four, four, 2));
  return vgetq_lane_f32(max_of(two, vrev64q_f32(two)), 0);
}
LANES int32_t reduce_add(I32 a) { return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3]))); }
LANES int32_t reduce_max(I32 a) { return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.v[0], a.v[1]), vmaxq_s32(a.v[2], a.v[3]))); }

LANES I32 compress(I32 a, Mask m) {
  int32_t from[kLanes], to[kLanes] = {};
  store(from, a);
  int n = 0;
  for (uint32_t left = bits(m); left; left &= left - 1) to[n++] = from[__builtin_ctz(left)];
  return load(to);
}

// ---- 16 bits ----

LANES uint16x8_t unsigned_16(int16x8_t x) { return vreinterpretq_u16_s16(x); }
LANES int16x8_t signed_16(uint16x8_t x) { return vreinterpretq_s16_u16(x); }

LANES I16 set1_16(int32_t x) {
  return each<I16>([=](int) { return vdupq_n_s16(static_cast<int16_t>(x)); });
}
LANES I16 load_16(const int16_t* p) {
  return each<I16>([=](int i) { return vld1q_s16(p + 8 * i); });
}
LANES void store_16(int16_t* p, I16 x) {
  for (int i = 0; i < 4; ++i) vst1q_s16(p + 8 * i, x.v[i]);
}
LANES I16 pack(I32 a, I32 b) {
  return {{vqmovn_high_s32(vqmovn_s32(a.v[0]), a.v[1]), vqmovn_high_s32(vqmovn_s32(a.v[2]), a.v[3]),
           vqmovn_high_s32(vqmovn_s32(b.v[0]), b.v[1]), vqmovn_high_s32(vqmovn_s32(b.v[2]), b.v[3])}};
}
LANES I16 sub(I16 a, I16 b) {
  return each<I16>([&](int i) { return vsubq_s16(a.v[i], b.v[i]); });
}
LANES I16 max(I16 a, I16 b) {
  return each<I16>([&](int i) { return vmaxq_s16(a.v[i], b.v[i]); });
}
template <int n>
LANES I16 shift_left(I16 a) {
  return each<I16>([&](int i) { return vshlq_n_s16(a.v[i], n); });
}
template <int n>
LANES I16 shift_right_logical(I16 a) {
  return each<I16>([&](int i) { return signed_16(vshlq_u16(unsigned_16(a.v[i]), vdupq_n_s16(-n))); });
}
LANES I16 shift_right_logical(I16 a, I16 n) {
  return each<I16>([&](int i) { return signed_16(vshlq_u16(unsigned_16(a.v[i]), vnegq_s16(n.v[i]))); });
}
LANES int16x8_t multiply_high(uint16x8_t a, uint16x8_t b) {
  const uint32x4_t low = vmull_u16(vget_low_u16(a), vget_low_u16(b)), high = vmull_high_u16(a, b);
  return vuzp2q_s16(vreinterpretq_s16_u32(low), vreinterpretq_s16_u32(high));
}
LANES I16 multiply_high(I16 a, I16 b) {
  return each<I16>([&](int i) { return multiply_high(unsigned_16(a.v[i]), unsigned_16(b.v[i])); });
}
LANES I16 multiply_round(I16 a, I16 b) {
  return each<I16>([&](int i) { return vqrdmulhq_s16(a.v[i], b.v[i]); });
}
LANES I32 add_pairs(I32 acc, I16 a) {
  return each<I32>([&](int i) { return vpadalq_s16(acc.v[i], a.v[i]); });
}
LANES int32_t reduce_max(I16 a) { return vmaxvq_s16(vmaxq_s16(vmaxq_s16(a.v[0], a.v[1]), vmaxq_s16(a.v[2], a.v[3]))); }
LANES void store_u8(uint8_t* p, I16 a, I16 b) {
  vst1q_u8(p, vqmovun_high_s16(vqmovun_s16(a.v[0]), a.v[1]));
  vst1q_u8(p + 16, vqmovun_high_s16(vqmovun_s16(a.v[2]), a.v[3]));
  vst1q_u8(p + 32, vqmovun_high_s16(vqmovun_s16(b.v[0]), b.v[1]));
  vst1q_u8(p + 48, vqmovun_high_s16(vqmovun_s16(b.v[2]), b.v[3]));
}

// ---- bytes ----

LANES Quads load_quads(const void* p) {
  return each<Quads>([=](int i) { return vld1q_u8(static_cast<const uint8_t*>(p) + 16 * i); });
}
LANES void store_quads(void* p, Quads x) {
  for (int i = 0; i < 4; ++i) vst1q_u8(static_cast<uint8_t*>(p) + 16 * i, x.v[i]);
}
LANES Quads set1_quad(const void* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, sizeof quad);
  return each<Quads>([=](int) { return vreinterpretq_u8_s32(vdupq_n_s32(quad)); });
}
LANES I32 dot_ss(I32 acc, Quads a, Quads b) {
  return each<I32>([&](int i) { return vdotq_s32(acc.v[i], as_signed(a.v[i]), as_signed(b.v[i])); });
}
LANES Quads as_weights(Quads s) { return s; }
LANES I32 dot_weights(I32 acc, Quads weights, Quads activations) { return dot_ss(acc, weights, activations); }
// 16 columns of a row, and products with one quad of them.
struct RowQuads {
  int8x16_t x;
};
LANES RowQuads row_quads(const int8_t* p) { return {vld1q_s8(p)}; }
template <int i>
LANES I32 dot_quad(I32 acc, Quads weights, RowQuads quads) {
  return each<I32>([&](int j) { return vdotq_laneq_s32(acc.v[j], as_signed(weights.v[j]), quads.x, i); });
}
LANES int32_t sum_32(const int8_t* q) {
  const int8x16_t ones = vdupq_n_s8(1);
  return vaddvq_s32(vdotq_s32(vdotq_s32(vdupq_n_s32(0), vld1q_s8(q), ones), vld1q_s8(q + 16), ones));
}
LANES void sum_bytes(const int8_t* q, int32_t* sums) {
  sums[0] = sum_32(q);
  sums[1] = sum_32(q + 32);
}

struct Interleaved {
  Quads v[4];
};
LANES Interleaved interleave(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  Interleaved result;
  for (int j = 0; j < 4; ++j) {
    const uint8x16_t aj = vld1q_u8(a + 16 * j), bj = vld1q_u8(b + 16 * j);
    const uint8x16_t cj = vld1q_u8(c + 16 * j), dj = vld1q_u8(d + 16 * j);
    const uint16x8_t ab_low = vreinterpretq_u16_u8(vzip1q_u8(aj, bj)),
                     ab_high = vreinterpretq_u16_u8(vzip2q_u8(aj, bj));
    const uint16x8_t cd_low = vreinterpretq_u16_u8(vzip1q_u8(cj, dj)),
                     cd_high = vreinterpretq_u16_u8(vzip2q_u8(cj, dj));
    result.v[0].v[j] = vreinterpretq_u8_u16(vzip1q_u16(ab_low, cd_low));
    result.v[1].v[j] = vreinterpretq_u8_u16(vzip2q_u16(ab_low, cd_low));
    result.v[2].v[j] = vreinterpretq_u8_u16(vzip1q_u16(ab_high, cd_high));
    result.v[3].v[j] = vreinterpretq_u8_u16(vzip2q_u16(ab_high, cd_high));
  }
  return result;
}

// Four rows' bytes, each four times, in every register: the scales of 16 rows for the bytes of a line.
LANES Quads four_times(uint8x16_t rows) {
  const uint8x16_t first = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  return each<Quads>([=](int i) { return vqtbl1q_u8(rows, vaddq_u8(first, vdupq_n_u8(static_cast<uint8_t>(4 * i)))); });
}

// ---- nibbles ----

struct Nibbles {
  const uint8_t* lines;
};
LANES Nibbles load_nibbles(const uint8_t* lines) { return {lines}; }
template <int half>
LANES Quads nibbles(Quads x) {
  return each<Quads>([&](int i) {
    if constexpr (half) return vshrq_n_u8(x.v[i], 4);
    return vandq_u8(x.v[i], vdupq_n_u8(15));
  });
}
// Codes are small enough to be signed bytes as well.
template <int half, int line = 0>
LANES I32 dot_nibble_lines(I32 acc, const uint8_t* lines, RowQuads x) {
  acc = dot_quad<line>(acc, nibbles<half>(load_quads(lines + 64 * line)), x);
  if constexpr (line < 3) acc = dot_nibble_lines<half, line + 1>(acc, lines, x);
  return acc;
}
// GCC is kept from seeing that both halves and all rows read the same
// lines: it would unpack them once and for all, and keep them on the stack.
template <int half>
LANES I32 dot_nibbles(I32 acc, Nibbles block, const int8_t* activations) {
  asm volatile("" : "+r"(block.lines));
  acc = dot_nibble_lines<half>(acc, block.lines, row_quads(activations));
  return dot_nibble_lines<half>(acc, block.lines + 4 * 64, row_quads(activations + 16));
}
struct NibbleScale {
  Quads scale;
};
LANES NibbleScale nibble_scale(const uint8_t* scale) { return {four_times(vld1q_u8(scale))}; }
template <int half>
LANES Quads scaled_nibbles(const uint8_t* line, NibbleScale s) {
  const Quads q = nibbles<half>(load_quads(line));
  return each<Quads>([&](int i) { return vmulq_u8(vsubq_u8(q.v[i], vdupq_n_u8(8)), s.scale.v[i]); });
}
template <int shift>
LANES F32 nibble_to_float(I32 line) {
  return to_float(sub(bit_and(shift_right_logical<shift>(line), set1(15)), set1(8)));
}
template <int index>
LANES F32 byte_to_float(I32 line) {
  return to_float(shift_right<24>(shift_left<24 - 8 * index>(line)));
}

// ---- octals ----

struct Octals {
  const uint8_t* lines;
};
LANES Octals load_octals(const uint8_t* lines) { return {lines}; }
template <int line>
LANES Quads octal_line(const Octals& octals) {
  if constexpr (line < 6) {
    const Quads both = load_quads(octals.lines + 64 * (line / 2));
    return each<Quads>([&](int i) {
      if constexpr (line % 2) return vandq_u8(vshrq_n_u8(both.v[i], 3), vdupq_n_u8(7));
      return vandq_u8(both.v[i], vdupq_n_u8(7));
    });
  } else {
    const Quads low = load_quads(octals.lines + 64 * (line - 6)), high = load_quads(octals.lines + 128);
    return each<Quads>([&](int i) {
      return vorrq_u8(vshrq_n_u8(low.v[i], 6), vandq_u8(vshrq_n_u8(high.v[i], line - 2), vdupq_n_u8(4)));
    });
  }
}
template <int line = 0>
LANES I32 dot_octals(I32 acc, const Octals& octals, const int8_t* activations) {
  acc = dot_quad<line % 4>(acc, octal_line<line>(octals), row_quads(activations + line / 4 * 16));
  if constexpr (line < 7) acc = dot_octals<line + 1>(acc, octals, activations);
  return acc;
}
struct OctalScale {
  Quads scale;
};
LANES OctalScale octal_scale(const uint8_t* scale) { return {four_times(vld1q_u8(scale))}; }
template <int line>
LANES Quads scaled_octals(const Octals& octals, const OctalScale& s) {
  const Quads q = octal_line<line>(octals);
  return each<Quads>([&](int i) { return vmulq_u8(vsubq_u8(q.v[i], vdupq_n_u8(4)), s.scale.v[i]); });
}
