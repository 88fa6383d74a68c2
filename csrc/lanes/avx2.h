// The lanes interface (see lanes/scalar.h) on AVX2, FMA and F16C: two registers per 16 lanes. How bytes are multiplied
// is in a second header, which an isa/*.cpp includes next: products_avx2.h or products_avxvnni.h.
#pragma once

constexpr int kLanes = 16;
constexpr int kDirectRowsFloat = 2;
constexpr int kDirectAccumulators = 4;
constexpr int kPanelBlock = 1;

struct F32 {
  __m256 lo, hi;
};
struct I32 {
  __m256i lo, hi;
};
struct Mask {
  __m256 lo, hi;
};
struct Quads {
  __m256i lo, hi;
};
struct I16 {
  __m256i lo, hi;
};

#define LANES inline __attribute__((always_inline))

LANES __m256i load_half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
LANES void store_half(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
LANES __m128i load_quarter(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
LANES void store_quarter(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }

// ---- memory ----

LANES F32 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LANES I32 set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
LANES F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LANES I32 load(const int32_t* p) { return {load_half(p), load_half(p + 8)}; }
LANES void store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
LANES void store(int32_t* p, I32 x) {
  store_half(p, x.lo);
  store_half(p + 8, x.hi);
}

LANES F32 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(load_quarter(p)), _mm256_cvtph_ps(load_quarter(p + 8))};
}
LANES __m256 widen_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
LANES F32 load_bf16(const uint16_t* p) { return {widen_bf16(load_quarter(p)), widen_bf16(load_quarter(p + 8))}; }
LANES F32 low_bf16(I32 pairs) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs.lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(pairs.hi, 16))};
}
LANES F32 high_bf16(I32 pairs) {
  const __m256i high = _mm256_set1_epi32(-0x10000);
  return {_mm256_castsi256_ps(_mm256_and_si256(pairs.lo, high)), _mm256_castsi256_ps(_mm256_and_si256(pairs.hi, high))};
}
LANES void store_f16(uint16_t* p, F32 x) {
  store_quarter(p, _mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  store_quarter(p + 8, _mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LANES __m256i narrow_bf16(__m256 x) {
  const __m256i raw = _mm256_castps_si256(x), high = _mm256_srli_epi32(raw, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(raw, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
}
LANES void store_bf16(uint16_t* p, F32 x) {
  const __m256i both = _mm256_packus_epi32(narrow_bf16(x.lo), narrow_bf16(x.hi));
  store_half(p, _mm256_permute4x64_epi64(both, 0xd8));
}

LANES __m128i load_8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
LANES I32 load_s8(const int8_t* p) { return {_mm256_cvtepi8_epi32(load_8(p)), _mm256_cvtepi8_epi32(load_8(p + 8))}; }
LANES I32 load_u8(const uint8_t* p) { return {_mm256_cvtepu8_epi32(load_8(p)), _mm256_cvtepu8_epi32(load_8(p + 8))}; }
LANES __m256i narrow_16(I32 x) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(x.lo, x.hi), 0xd8); }
LANES void store_s8(int8_t* p, I32 x) {
  const __m256i y = narrow_16(x);
  store_quarter(p, _mm_packs_epi16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
}
// What packing two and two leaves of four vectors, in their order.
LANES void store_in_order(void* p, __m256i lo, __m256i hi) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  lo = _mm256_permutevar8x32_epi32(lo, order);
  hi = _mm256_permutevar8x32_epi32(hi, order);
  const __m256i ac = _mm256_unpacklo_epi64(lo, hi), bd = _mm256_unpackhi_epi64(lo, hi);
  store_half(p, _mm256_permute2x128_si256(ac, bd, 0x20));
  store_half(static_cast<uint8_t*>(p) + 32, _mm256_permute2x128_si256(ac, bd, 0x31));
}
LANES void store_s8(int8_t* p, I32 a, I32 b, I32 c, I32 d) {
  store_in_order(p, _mm256_packs_epi16(_mm256_packs_epi32(a.lo, b.lo), _mm256_packs_epi32(c.lo, d.lo)),
                 _mm256_packs_epi16(_mm256_packs_epi32(a.hi, b.hi), _mm256_packs_epi32(c.hi, d.hi)));
}

#include "lanes/partial.h"

// ---- FP32 ----

LANES F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
LANES F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
LANES F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
LANES F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
LANES F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
LANES F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
LANES F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
LANES F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
LANES F32 abs(F32 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
LANES F32 fms(F32 a, F32 b, F32 c) { return {_mm256_fmsub_ps(a.lo, b.lo, c.lo), _mm256_fmsub_ps(a.hi, b.hi, c.hi)}; }
LANES F32 negate(F32 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(sign, a.lo), _mm256_xor_ps(sign, a.hi)};
}
LANES F32 round_even(F32 a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}

// ---- int32 ----

LANES I32 add(I32 a, I32 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
LANES I32 sub(I32 a, I32 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
LANES I32 mul(I32 a, I32 b) { return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)}; }
struct Wide {
  I32 low, high;
};
struct WideHalf {
  __m256i low, high;
};
LANES WideHalf multiply_wide(__m256i a, __m256i b) {
  constexpr int kOdd = 0xaa;
  const __m256i even = _mm256_mul_epu32(a, b);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
  return {_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), kOdd),
          _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, kOdd)};
}
LANES Wide multiply_wide(I32 a, I32 b) {
  const WideHalf lo = multiply_wide(a.lo, b.lo), hi = multiply_wide(a.hi, b.hi);
  return {{lo.low, hi.low}, {lo.high, hi.high}};
}
LANES I32 min(I32 a, I32 b) { return {_mm256_min_epi32(a.lo, b.lo), _mm256_min_epi32(a.hi, b.hi)}; }
LANES I32 max(I32 a, I32 b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
LANES I32 bit_and(I32 a, I32 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
LANES I32 bit_or(I32 a, I32 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
LANES I32 bit_xor(I32 a, I32 b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
template <int n>
LANES I32 shift_left(I32 a) {
  return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)};
}
template <int n>
LANES I32 shift_right(I32 a) {
  return {_mm256_srai_epi32(a.lo, n), _mm256_srai_epi32(a.hi, n)};
}
template <int n>
LANES I32 shift_right_logical(I32 a) {
  return {_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n)};
}

// ---- conversions ----

LANES I32 to_int(F32 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
LANES F32 to_float(I32 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
LANES I32 as_int(F32 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
LANES F32 as_float(I32 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }

LANES F32 times_power(F32 a, F32 n) { return mul(a, as_float(shift_left<23>(add(to_int(n), set1(127))))); }

// ---- masks ----

template <int predicate>
LANES Mask compare(F32 a, F32 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, predicate), _mm256_cmp_ps(a.hi, b.hi, predicate)};
}
LANES Mask as_mask(__m256i lo, __m256i hi) { return {_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)}; }
LANES Mask less(F32 a, F32 b) { return compare<_CMP_LT_OQ>(a, b); }
LANES Mask less_equal(F32 a, F32 b) { return compare<_CMP_LE_OQ>(a, b); }
LANES Mask equal(F32 a, F32 b) { return compare<_CMP_EQ_OQ>(a, b); }
LANES Mask is_nan(F32 a) { return compare<_CMP_UNORD_Q>(a, a); }
LANES Mask less(I32 a, I32 b) { return as_mask(_mm256_cmpgt_epi32(b.lo, a.lo), _mm256_cmpgt_epi32(b.hi, a.hi)); }
LANES Mask equal(I32 a, I32 b) { return as_mask(_mm256_cmpeq_epi32(a.lo, b.lo), _mm256_cmpeq_epi32(a.hi, b.hi)); }
LANES Mask first(int n) {
  const I32 index = {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
  return less(index, set1(n));
}
LANES Mask mask_and(Mask a, Mask b) { return {_mm256_and_ps(a.lo, b.lo), _mm256_and_ps(a.hi, b.hi)}; }
LANES Mask mask_or(Mask a, Mask b) { return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)}; }
LANES Mask mask_not(Mask a) {
  const __m256 ones = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  return {_mm256_xor_ps(a.lo, ones), _mm256_xor_ps(a.hi, ones)};
}
LANES uint32_t bits(Mask a) { return static_cast<uint32_t>(_mm256_movemask_ps(a.lo) | _mm256_movemask_ps(a.hi) << 8); }
LANES bool any(Mask a) { return bits(a) != 0; }
LANES F32 select(Mask m, F32 yes, F32 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
LANES I32 select(Mask m, I32 yes, I32 no) { return as_int(select(m, as_float(yes), as_float(no))); }

// ---- across lanes ----

template <int d>
LANES F32 swap(F32 a) {
  static_assert(d == 1 || d == 2 || d == 4 || d == 8);
  if constexpr (d == 1) return {_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1)};
  if constexpr (d == 2) return {_mm256_permute_ps(a.lo, 0x4e), _mm256_permute_ps(a.hi, 0x4e)};
  if constexpr (d == 4) return {_mm256_permute2f128_ps(a.lo, a.lo, 1), _mm256_permute2f128_ps(a.hi, a.hi, 1)};
  if constexpr (d == 8) return {a.hi, a.lo};
}
LANES float reduce_add(F32 a) {
  a = add(a, swap<8>(a));
  a = add(a, swap<4>(a));
  a = add(a, swap<2>(a));
  a = add(a, swap<1>(a));
  return _mm256_cvtss_f32(a.lo);
}
LANES float reduce_max(F32 a) {
  a = max(a, swap<8>(a));
  a = max(a, swap<4>(a));
  a = max(a, swap<2>(a));
  a = max(a, swap<1>(a));
  return _mm256_cvtss_f32(a.lo);
}
LANES int32_t reduce_add(I32 a) {
  const __m256i half = _mm256_add_epi32(a.lo, a.hi);
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
LANES int32_t reduce_max(I32 a) {
  const __m256i half = _mm256_max_epi32(a.lo, a.hi);
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}

LANES I32 compress(I32 a, Mask m) {
  int32_t from[kLanes], to[kLanes] = {};
  store(from, a);
  int n = 0;
  for (uint32_t left = bits(m); left; left &= left - 1) to[n++] = from[__builtin_ctz(left)];
  return load(to);
}

// ---- 16 bits ----

LANES I16 set1_16(int32_t x) {
  const __m256i both = _mm256_set1_epi16(static_cast<int16_t>(x));
  return {both, both};
}
LANES I16 load_16(const int16_t* p) { return {load_half(p), load_half(p + 16)}; }
LANES void store_16(int16_t* p, I16 x) {
  store_half(p, x.lo);
  store_half(p + 16, x.hi);
}
LANES I16 pack(I32 a, I32 b) { return {_mm256_packs_epi32(a.lo, b.lo), _mm256_packs_epi32(a.hi, b.hi)}; }
LANES I16 sub(I16 a, I16 b) { return {_mm256_sub_epi16(a.lo, b.lo), _mm256_sub_epi16(a.hi, b.hi)}; }
LANES I16 max(I16 a, I16 b) { return {_mm256_max_epi16(a.lo, b.lo), _mm256_max_epi16(a.hi, b.hi)}; }
template <int n>
LANES I16 shift_left(I16 a) {
  return {_mm256_slli_epi16(a.lo, n), _mm256_slli_epi16(a.hi, n)};
}
template <int n>
LANES I16 shift_right_logical(I16 a) {
  return {_mm256_srli_epi16(a.lo, n), _mm256_srli_epi16(a.hi, n)};
}
LANES I16 multiply_high(I16 a, I16 b) { return {_mm256_mulhi_epu16(a.lo, b.lo), _mm256_mulhi_epu16(a.hi, b.hi)}; }
LANES I16 multiply_round(I16 a, I16 b) { return {_mm256_mulhrs_epi16(a.lo, b.lo), _mm256_mulhrs_epi16(a.hi, b.hi)}; }
// There is no such shift of 16 bits: a >> n = 2 a * 2^(15 - n) >> 16, the power from a table of its bytes, of which the
// lower one is that of n - 8 and none if that is negative. From 15 on nothing is left.
LANES __m256i shift_right_half(__m256i a, __m256i n) {
  const __m256i powers = _mm256_broadcastsi128_si256(_mm_set_epi64x(0, 0x0102040810204080));
  n = _mm256_min_epu16(n, _mm256_set1_epi16(15));
  const __m256i bytes = _mm256_sub_epi8(_mm256_or_si256(n, _mm256_slli_epi16(n, 8)), _mm256_set1_epi16(8));
  return _mm256_mulhi_epu16(_mm256_add_epi16(a, a), _mm256_shuffle_epi8(powers, bytes));
}
LANES I16 shift_right_logical(I16 a, I16 n) { return {shift_right_half(a.lo, n.lo), shift_right_half(a.hi, n.hi)}; }
LANES I32 add_pairs(I32 acc, I16 a) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(a.lo, ones)),
          _mm256_add_epi32(acc.hi, _mm256_madd_epi16(a.hi, ones))};
}
LANES int32_t reduce_max(I16 a) {
  const __m256i half = _mm256_max_epi16(a.lo, a.hi);
  const __m128i x = _mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return 0xffff - _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(x, _mm_set1_epi16(-1))), 0);
}
LANES void store_u8(uint8_t* p, I16 a, I16 b) {
  store_in_order(p, _mm256_packus_epi16(a.lo, b.lo), _mm256_packus_epi16(a.hi, b.hi));
}

// ---- bytes ----

LANES Quads load_quads(const void* p) { return {load_half(p), load_half(static_cast<const uint8_t*>(p) + 32)}; }
LANES void store_quads(void* p, Quads x) {
  store_half(p, x.lo);
  store_half(static_cast<uint8_t*>(p) + 32, x.hi);
}
LANES Quads set1_quad(const void* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, sizeof quad);
  return {_mm256_set1_epi32(quad), _mm256_set1_epi32(quad)};
}
// VPSADBW adds unsigned bytes by eights: made unsigned, 32 of them are 32 * 128 too high.
LANES int32_t sum_bytes(__m256i q) {
  const __m256i bytes = _mm256_xor_si256(q, _mm256_set1_epi8(-128));
  const __m256i x = _mm256_sad_epu8(bytes, _mm256_setzero_si256());
  const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_unpackhi_epi64(half, half))) - 32 * 128;
}
LANES void sum_bytes(const int8_t* q, int32_t* sums) {
  sums[0] = sum_bytes(load_half(q));
  sums[1] = sum_bytes(load_half(q + 32));
}

// ---- nibbles ----

struct Nibbles {
  const uint8_t* lines;
};
LANES Nibbles load_nibbles(const uint8_t* lines) { return {lines}; }
template <int half>
LANES __m256i nibbles_of(__m256i line) {
  return _mm256_and_si256(half ? _mm256_srli_epi16(line, 4) : line, _mm256_set1_epi8(15));
}
template <int half>
LANES Quads nibbles(Quads x) {
  return {nibbles_of<half>(x.lo), nibbles_of<half>(x.hi)};
}
struct Interleaved {
  Quads v[4];
};
struct InterleavedHalf {
  __m256i v[4];
};
LANES InterleavedHalf interleave(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
  return {{_mm256_unpacklo_epi16(ab_low, cd_low), _mm256_unpackhi_epi16(ab_low, cd_low),
           _mm256_unpacklo_epi16(ab_high, cd_high), _mm256_unpackhi_epi16(ab_high, cd_high)}};
}
LANES Interleaved interleave(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  const InterleavedHalf lo = interleave(load_half(a), load_half(b), load_half(c), load_half(d));
  const InterleavedHalf hi = interleave(load_half(a + 32), load_half(b + 32), load_half(c + 32), load_half(d + 32));
  return {{{lo.v[0], hi.v[0]}, {lo.v[1], hi.v[1]}, {lo.v[2], hi.v[2]}, {lo.v[3], hi.v[3]}}};
}
// s as 16-bit pairs, and 8 * s as bytes: s * q <= 225 never carries from one byte of a pair into the other.
struct NibbleScale {
  I32 scale, offset;
};
LANES NibbleScale nibble_scale(const uint8_t* scale) {
  const I32 s = mul(load_u8(scale), set1(0x00010001));
  return {s, shift_left<3>(bit_or(s, shift_left<8>(s)))};
}
template <int half>
LANES Quads scaled_nibbles(const uint8_t* line, NibbleScale s) {
  const Quads raw = load_quads(line);
  const __m256i lo = _mm256_mullo_epi16(nibbles_of<half>(raw.lo), s.scale.lo);
  const __m256i hi = _mm256_mullo_epi16(nibbles_of<half>(raw.hi), s.scale.hi);
  return {_mm256_sub_epi8(lo, s.offset.lo), _mm256_sub_epi8(hi, s.offset.hi)};
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
LANES __m256i octal_half(const uint8_t* lines) {
  if constexpr (line < 6) {
    const __m256i both = load_half(lines + 64 * (line / 2));
    return _mm256_and_si256(line % 2 ? _mm256_srli_epi16(both, 3) : both, _mm256_set1_epi8(7));
  } else {
    const __m256i low = _mm256_srli_epi16(load_half(lines + 64 * (line - 6)), 6);
    const __m256i high = _mm256_srli_epi16(load_half(lines + 128), line - 2);
    return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(3)), _mm256_and_si256(high, _mm256_set1_epi8(4)));
  }
}
template <int line>
LANES Quads octal_line(const Octals& octals) {
  return {octal_half<line>(octals.lines), octal_half<line>(octals.lines + 32)};
}
// As of nibbles, with |s|; where s is negative, 7 - q takes the place of q: s * (q - 4) = |s| * (7 - q - 3).
struct OctalScale {
  I32 scale, offset, flip;
};
LANES OctalScale octal_scale(const uint8_t* scale) {
  const I32 s = load_s8(reinterpret_cast<const int8_t*>(scale)), size = max(s, sub(set1(0), s));
  const I32 negative = shift_right<31>(s), bytes = mul(size, set1(0x01010101));
  const I32 offset = sub(shift_left<2>(bytes), bit_and(bytes, negative));  // no byte borrows: 4 |s| is more than |s|
  return {mul(size, set1(0x00010001)), offset, bit_and(negative, set1(0x07070707))};
}
template <int line>
LANES Quads scaled_octals(const Octals& octals, const OctalScale& s) {
  const __m256i lo = _mm256_xor_si256(octal_half<line>(octals.lines), s.flip.lo);
  const __m256i hi = _mm256_xor_si256(octal_half<line>(octals.lines + 32), s.flip.hi);
  return {_mm256_sub_epi8(_mm256_mullo_epi16(lo, s.scale.lo), s.offset.lo),
          _mm256_sub_epi8(_mm256_mullo_epi16(hi, s.scale.hi), s.offset.hi)};
}
