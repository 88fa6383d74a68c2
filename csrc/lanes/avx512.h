// The lanes interface (see lanes/scalar.h) on AVX-512 with VNNI: one register per 16 lanes.
#pragma once

constexpr int kLanes = 16;
constexpr int kWeightBias = 128;  // VPDPBUSD multiplies unsigned by signed bytes: the weights are made unsigned
constexpr int kRowBlock = 12;     // x 2 panels = 24 of 32 registers
constexpr int kDirectRowsInt4 = 11, kDirectLinesFrom = 6, kDirectPanels = 2;
constexpr int kDirectRowsMost[] = {6, 12, 24};
constexpr int kDirectRowsInt8 = 5;
constexpr int kDirectRowsFloat = 4;
constexpr int kDirectAccumulators = 16;
constexpr int kPanelBlock = 2;

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};
struct Mask {
  __mmask16 v;
};
struct Quads {
  __m512i v;
};
struct I16 {
  __m512i v;
};

#define LANES inline __attribute__((always_inline))

LANES __mmask16 first_bits(int n) { return static_cast<__mmask16>((1u << n) - 1); }

// ---- memory ----

LANES F32 set1(float x) { return {_mm512_set1_ps(x)}; }
LANES I32 set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
LANES F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
LANES I32 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
LANES F32 load_partial(const float* p, int n, float fill = 0) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_bits(n), p)};
}
LANES I32 load_partial(const int32_t* p, int n, int32_t fill = 0) {
  return {_mm512_mask_loadu_epi32(_mm512_set1_epi32(fill), first_bits(n), p)};
}
LANES void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
LANES void store(int32_t* p, I32 x) { _mm512_storeu_si512(p, x.v); }
LANES void store_partial(float* p, F32 x, int n) { _mm512_mask_storeu_ps(p, first_bits(n), x.v); }
LANES void store_partial(int32_t* p, I32 x, int n) { _mm512_mask_storeu_epi32(p, first_bits(n), x.v); }

LANES __m256i load_16bit(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
LANES F32 widen_bf16(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
LANES F32 load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(load_16bit(p))}; }
LANES F32 load_bf16(const uint16_t* p) { return widen_bf16(load_16bit(p)); }
LANES F32 low_bf16(I32 pairs) { return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs.v, 16))}; }
LANES F32 high_bf16(I32 pairs) { return {_mm512_castsi512_ps(_mm512_and_si512(pairs.v, _mm512_set1_epi32(-0x10000)))}; }
LANES F32 load_f16_partial(const uint16_t* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_bits(n), p))};
}
LANES F32 load_bf16_partial(const uint16_t* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_bits(n), p)); }
LANES __m256i narrow_f16(F32 x) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Not VCVTNEPS2BF16, which flushes subnormals.
LANES __m256i narrow_bf16(F32 x) {
  const __m512i raw = _mm512_castps_si512(x.v), high = _mm512_srli_epi32(raw, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(raw, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_or_epi32(_mm512_srli_epi32(rounded, 16), nan, high, _mm512_set1_epi32(0x40)));
}
LANES void store_f16(uint16_t* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(x)); }
LANES void store_bf16(uint16_t* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x)); }
LANES void store_f16_partial(uint16_t* p, F32 x, int n) { _mm256_mask_storeu_epi16(p, first_bits(n), narrow_f16(x)); }
LANES void store_bf16_partial(uint16_t* p, F32 x, int n) { _mm256_mask_storeu_epi16(p, first_bits(n), narrow_bf16(x)); }

LANES __m128i load_bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
LANES I32 load_s8(const int8_t* p) { return {_mm512_cvtepi8_epi32(load_bytes(p))}; }
LANES I32 load_u8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(load_bytes(p))}; }
LANES I32 load_s8_partial(const int8_t* p, int n) {
  return {_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_bits(n), p))};
}
LANES I32 load_u8_partial(const uint8_t* p, int n) {
  return {_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_bits(n), p))};
}
LANES void store_s8(int8_t* p, I32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x.v)); }
// What packing two and two leaves of four vectors, in their order.
LANES __m512i in_order(__m512i packed) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, packed);
}
LANES void store_s8(int8_t* p, I32 a, I32 b, I32 c, I32 d) {
  const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(a.v, b.v), _mm512_packs_epi32(c.v, d.v));
  _mm512_storeu_si512(p, in_order(packed));
}
LANES void store_s8_partial(int8_t* p, I32 x, int n) {
  _mm_mask_storeu_epi8(p, first_bits(n), _mm512_cvtsepi32_epi8(x.v));
}

// ---- FP32 ----

LANES F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
LANES F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
LANES F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
LANES F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
LANES F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LANES F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
LANES F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
LANES F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
LANES F32 abs(F32 a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v)}; }
LANES F32 fms(F32 a, F32 b, F32 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
LANES F32 negate(F32 a) { return {_mm512_xor_ps(_mm512_set1_ps(-0.0f), a.v)}; }
LANES F32 times_power(F32 a, F32 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
LANES F32 round_even(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// ---- int32 ----

LANES I32 add(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
LANES I32 sub(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
LANES I32 mul(I32 a, I32 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
struct Wide {
  I32 low, high;
};
LANES Wide multiply_wide(I32 a, I32 b) {
  constexpr __mmask16 kOdd = 0xaaaa;
  const __m512i even = _mm512_mul_epu32(a.v, b.v);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  return {{_mm512_mask_blend_epi32(kOdd, even, _mm512_slli_epi64(odd, 32))},
          {_mm512_mask_blend_epi32(kOdd, _mm512_srli_epi64(even, 32), odd)}};
}
LANES I32 min(I32 a, I32 b) { return {_mm512_min_epi32(a.v, b.v)}; }
LANES I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
LANES I32 bit_and(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
LANES I32 bit_or(I32 a, I32 b) { return {_mm512_or_si512(a.v, b.v)}; }
LANES I32 bit_xor(I32 a, I32 b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int n>
LANES I32 shift_left(I32 a) {
  return {_mm512_slli_epi32(a.v, n)};
}
template <int n>
LANES I32 shift_right(I32 a) {
  return {_mm512_srai_epi32(a.v, n)};
}
template <int n>
LANES I32 shift_right_logical(I32 a) {
  return {_mm512_srli_epi32(a.v, n)};
}

// ---- conversions ----

LANES I32 to_int(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }
LANES F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
LANES I32 as_int(F32 a) { return {_mm512_castps_si512(a.v)}; }
LANES F32 as_float(I32 a) { return {_mm512_castsi512_ps(a.v)}; }

// ---- masks ----

LANES Mask less(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
LANES Mask less_equal(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
LANES Mask equal(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
LANES Mask is_nan(F32 a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
LANES Mask less(I32 a, I32 b) { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }
LANES Mask equal(I32 a, I32 b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
LANES Mask first(int n) { return {first_bits(n)}; }
LANES Mask mask_and(Mask a, Mask b) { return {static_cast<__mmask16>(a.v & b.v)}; }
LANES Mask mask_or(Mask a, Mask b) { return {static_cast<__mmask16>(a.v | b.v)}; }
LANES Mask mask_not(Mask a) { return {static_cast<__mmask16>(~a.v)}; }
LANES uint32_t bits(Mask a) { return a.v; }
LANES bool any(Mask a) { return a.v != 0; }
LANES F32 select(Mask m, F32 yes, F32 no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }
LANES I32 select(Mask m, I32 yes, I32 no) { return {_mm512_mask_blend_epi32(m.v, no.v, yes.v)}; }

// ---- across lanes ----

template <int d>
LANES F32 swap(F32 a) {
  static_assert(d == 1 || d == 2 || d == 4 || d == 8);
  if constexpr (d == 1) return {_mm512_permute_ps(a.v, 0xb1)};
  if constexpr (d == 2) return {_mm512_permute_ps(a.v, 0x4e)};
  if constexpr (d == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)};
  if constexpr (d == 8) return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)};
}
LANES float reduce_add(F32 a) {
  a = add(a, swap<8>(a));
  a = add(a, swap<4>(a));
  a = add(a, swap<2>(a));
  a = add(a, swap<1>(a));
  return _mm512_cvtss_f32(a.v);
}
LANES float reduce_max(F32 a) {
  a = max(a, swap<8>(a));
  a = max(a, swap<4>(a));
  a = max(a, swap<2>(a));
  a = max(a, swap<1>(a));
  return _mm512_cvtss_f32(a.v);
}
LANES int32_t reduce_add(I32 a) { return _mm512_reduce_add_epi32(a.v); }
LANES int32_t reduce_max(I32 a) { return _mm512_reduce_max_epi32(a.v); }

LANES I32 compress(I32 a, Mask m) { return {_mm512_maskz_compress_epi32(m.v, a.v)}; }

// ---- 16 bits ----

LANES I16 set1_16(int32_t x) { return {_mm512_set1_epi16(static_cast<int16_t>(x))}; }
LANES I16 load_16(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
LANES void store_16(int16_t* p, I16 x) { _mm512_storeu_si512(p, x.v); }
LANES I16 pack(I32 a, I32 b) { return {_mm512_packs_epi32(a.v, b.v)}; }
LANES I16 sub(I16 a, I16 b) { return {_mm512_sub_epi16(a.v, b.v)}; }
LANES I16 max(I16 a, I16 b) { return {_mm512_max_epi16(a.v, b.v)}; }
template <int n>
LANES I16 shift_left(I16 a) {
  return {_mm512_slli_epi16(a.v, n)};
}
template <int n>
LANES I16 shift_right_logical(I16 a) {
  return {_mm512_srli_epi16(a.v, n)};
}
LANES I16 shift_right_logical(I16 a, I16 n) { return {_mm512_srlv_epi16(a.v, n.v)}; }
LANES I16 multiply_high(I16 a, I16 b) { return {_mm512_mulhi_epu16(a.v, b.v)}; }
LANES I16 multiply_round(I16 a, I16 b) { return {_mm512_mulhrs_epi16(a.v, b.v)}; }
LANES I32 add_pairs(I32 acc, I16 a) { return {_mm512_dpwssd_epi32(acc.v, a.v, _mm512_set1_epi16(1))}; }
LANES int32_t reduce_max(I16 a) {
  const __m256i half = _mm256_max_epi16(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1));
  const __m128i x = _mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return 0xffff - _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(x, _mm_set1_epi16(-1))), 0);
}
LANES void store_u8(uint8_t* p, I16 a, I16 b) { _mm512_storeu_si512(p, in_order(_mm512_packus_epi16(a.v, b.v))); }

// ---- bytes ----

LANES Quads load_quads(const void* p) { return {_mm512_loadu_si512(p)}; }
LANES void store_quads(void* p, Quads x) { _mm512_storeu_si512(p, x.v); }
LANES Quads set1_quad(const void* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, sizeof quad);
  return {_mm512_set1_epi32(quad)};
}
// Written out: GCC 12 copies the accumulator of the intrinsic around, and stores it, wherever there are many.
LANES I32 dot_us(I32 acc, Quads u, Quads s) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(u.v), "v"(s.v));
  return acc;
}
LANES I32 dot_ss(I32 acc, Quads a, Quads b) {
  const __mmask64 negative = _mm512_movepi8_mask(a.v);
  const __m512i signed_b = _mm512_mask_sub_epi8(b.v, negative, _mm512_setzero_si512(), b.v);
  return {_mm512_dpbusd_epi32(acc.v, _mm512_abs_epi8(a.v), signed_b)};
}
// VPSADBW adds unsigned bytes by eights: made unsigned, 32 of them are 32 * 128 too high.
LANES void sum_bytes(const int8_t* q, int32_t* sums) {
  const __m512i bytes = _mm512_xor_si512(_mm512_loadu_si512(q), _mm512_set1_epi8(-128));
  __m512i x = _mm512_sad_epu8(bytes, _mm512_setzero_si512());
  x = _mm512_add_epi32(x, _mm512_shuffle_epi32(x, static_cast<_MM_PERM_ENUM>(0x4e)));
  x = _mm512_add_epi32(x, _mm512_shuffle_i32x4(x, x, 0xb1));
  const __m512i both = _mm512_permutexvar_epi32(_mm512_set1_epi64(int64_t{8} << 32), x);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(sums),
                   _mm_sub_epi32(_mm512_castsi512_si128(both), _mm_set1_epi32(32 * 128)));
}
LANES Quads as_weights(Quads s) { return {_mm512_xor_si512(s.v, _mm512_set1_epi8(-128))}; }
LANES I32 dot_weights(I32 acc, Quads weights, Quads activations) { return dot_us(acc, weights, activations); }

// ---- nibbles ----

struct Nibbles {
  __m512i v[8];
};
LANES Nibbles load_nibbles(const uint8_t* lines) {
  Nibbles block;
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) block.v[j] = _mm512_loadu_si512(lines + 64 * j);
  return block;
}
template <int half>
LANES __m512i nibbles_of(__m512i line) {
  return _mm512_and_si512(half ? _mm512_srli_epi16(line, 4) : line, _mm512_set1_epi8(15));
}
template <int half>
LANES I32 dot_nibbles(I32 acc, const Nibbles& block, const int8_t* activations) {
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) acc = dot_us(acc, {nibbles_of<half>(block.v[j])}, set1_quad(activations + 4 * j));
  return acc;
}
template <int half>
LANES Quads nibbles(Quads x) {
  return {nibbles_of<half>(x.v)};
}
struct Interleaved {
  Quads v[4];
};
LANES Interleaved interleave(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  const __m512i va = _mm512_loadu_si512(a), vb = _mm512_loadu_si512(b);
  const __m512i vc = _mm512_loadu_si512(c), vd = _mm512_loadu_si512(d);
  const __m512i ab_low = _mm512_unpacklo_epi8(va, vb), ab_high = _mm512_unpackhi_epi8(va, vb);
  const __m512i cd_low = _mm512_unpacklo_epi8(vc, vd), cd_high = _mm512_unpackhi_epi8(vc, vd);
  return {{{_mm512_unpacklo_epi16(ab_low, cd_low)},
           {_mm512_unpackhi_epi16(ab_low, cd_low)},
           {_mm512_unpacklo_epi16(ab_high, cd_high)},
           {_mm512_unpackhi_epi16(ab_high, cd_high)}}};
}
// s as 16-bit pairs, and 8 * s as bytes: s * q <= 225 never carries from one byte of a pair into the other.
struct NibbleScale {
  __m512i scale, offset;
};
LANES NibbleScale nibble_scale(const uint8_t* scale) {
  const __m512i s = _mm512_mullo_epi32(load_u8(scale).v, _mm512_set1_epi32(0x00010001));
  return {s, _mm512_slli_epi32(_mm512_or_si512(s, _mm512_slli_epi32(s, 8)), 3)};
}
template <int half>
LANES Quads scaled_nibbles(const uint8_t* line, NibbleScale s) {
  const __m512i q = nibbles_of<half>(_mm512_loadu_si512(line));
  return {_mm512_sub_epi8(_mm512_mullo_epi16(q, s.scale), s.offset)};
}
template <int shift>
LANES F32 nibble_to_float(I32 line) {
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(line.v, shift), table)};  // uses the 4 low bits of each index
}
template <int index>
LANES F32 byte_to_float(I32 line) {
  return to_float(shift_right<24>(shift_left<24 - 8 * index>(line)));
}

// ---- octals ----

struct Octals {
  __m512i v[3];
};
LANES Octals load_octals(const uint8_t* lines) {
  return {{_mm512_loadu_si512(lines), _mm512_loadu_si512(lines + 64), _mm512_loadu_si512(lines + 128)}};
}
template <int line>
LANES Quads octal_line(const Octals& octals) {
  if constexpr (line < 6) {
    const __m512i both = octals.v[line / 2];
    return {_mm512_and_si512(line % 2 ? _mm512_srli_epi16(both, 3) : both, _mm512_set1_epi8(7))};
  } else {
    const __m512i low = _mm512_and_si512(_mm512_srli_epi16(octals.v[line - 6], 6), _mm512_set1_epi8(3));
    const __m512i high = _mm512_srli_epi16(octals.v[2], line - 2);
    return {_mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8(4), 0xf8)};  // low | high & 4
  }
}
template <int line = 0>
LANES I32 dot_octals(I32 acc, const Octals& octals, const int8_t* activations) {
  acc = dot_us(acc, octal_line<line>(octals), set1_quad(activations + 4 * line));
  if constexpr (line < 7) acc = dot_octals<line + 1>(acc, octals, activations);
  return acc;
}
// As of nibbles, with |s|; where s is negative, 7 - q takes the place of q: s * (q - 4) = |s| * (7 - q - 3).
struct OctalScale {
  __m512i scale, offset, flip;
};
LANES OctalScale octal_scale(const uint8_t* scale) {
  const __m512i s = load_s8(reinterpret_cast<const int8_t*>(scale)).v, size = _mm512_abs_epi32(s);
  const __m512i negative = _mm512_srai_epi32(s, 31), bytes = _mm512_mullo_epi32(size, _mm512_set1_epi32(0x01010101));
  const __m512i offset = _mm512_sub_epi8(_mm512_slli_epi32(bytes, 2), _mm512_and_si512(bytes, negative));
  return {_mm512_mullo_epi32(size, _mm512_set1_epi32(0x00010001)), offset,
          _mm512_and_si512(negative, _mm512_set1_epi8(7))};
}
template <int line>
LANES Quads scaled_octals(const Octals& octals, const OctalScale& s) {
  const __m512i q = _mm512_xor_si512(octal_line<line>(octals).v, s.flip);
  return {_mm512_sub_epi8(_mm512_mullo_epi16(q, s.scale), s.offset)};
}

#include "lanes/group_sum.h"
