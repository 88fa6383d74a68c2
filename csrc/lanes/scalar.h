// The lanes interface, stated in plain C++: 16 FP32 or int32 values at a time.
//
// Every kernel is written once over these names; lanes/avx2.h, lanes/avx512.h and lanes/neon.h give the same names on
// vector registers and must agree with this file to the last bit, also for -0, subnormals, infinities and (as far as a
// kernel can see) NaN. An isa/*.cpp includes exactly one of the four inside its own anonymous namespace, after
// <cstdint>: nothing here may need a linker symbol or a std type, or code for one instruction set could end up in
// another's.
//
//   F32, I32      16 values            Mask    16 truths            Quads   64 bytes: 16 lanes of 4 bytes
//   I16           32 values of 16 bits, see pack
//   load, store, load_partial, store_partial (the first n of 16; the rest reads as `fill` and is not written)
//   load_/store_ f16, bf16 (nearest even), s8 (saturating), each with _partial; store_s8 also 64 at once; load_u8
//   low_bf16, high_bf16: of pairs of BF16, the first (in the low bits) and the second
//   set1  add  sub  mul  div  fma(a, b, c) = a * b + c  fms: a * b - c  min  max  sqrt  abs  negate  round_even
//   times_power(a, n) = a * 2^n for integral n in -126..127
//   min(a, b) = a < b ? a : b, max(a, b) = a > b ? a : b: the second operand wins ties and NaN
//   less  less_equal  equal  is_nan  select(mask, yes, no)  first(n)  mask_and  mask_or  mask_not  any  bits
//   to_int (nearest even; out of range and NaN: INT32_MIN)  to_float  as_int  as_float
//   multiply_wide(a, b): the lower and the upper halves of unsigned products
//   shift_left<n>  shift_right<n> (arithmetic)  shift_right_logical<n>  bit_and  bit_or  bit_xor
//   swap<d>(x): lane i takes lane i ^ d        reduce_add, reduce_max: the fixed tree of docs/numerics.md
//   pack(a, b): 32 numbers of 16 bits, in an order of their own that all packed numbers share and store_u8 undoes
//   dot_us(acc, u, s): acc + the four products of unsigned and signed bytes, per lane; dot_ss: both in -127..127
#pragma once

#define LANES inline

constexpr int kLanes = 16;
// The bias that as_weights() adds to signed weights, so that a product's accumulator is `bias * sum(activations)` high.
constexpr int kWeightBias = 0;
// Rows that one pass over a panel keeps accumulators for: blocked products; products straight from packed weights, of
// quantized and of float inputs; and the most accumulators of the latter. From kDirectLinesFrom rows on, packed codes
// are unpacked line by line and kDirectPanels panels share the loads of rows, up to kDirectRowsMost rows in several
// passes: by groups of 32, 64 and 128 columns, each of which meets its scale once a row.
constexpr int kRowBlock = 4;
constexpr int kDirectRowsInt4 = 2, kDirectLinesFrom = 3, kDirectPanels = 1;
constexpr int kDirectRowsMost[] = {2, 2, 2};
constexpr int kDirectRowsInt8 = 2;
constexpr int kDirectRowsFloat = 2;
constexpr int kDirectAccumulators = 4;
constexpr int kPanelBlock = 1;

struct F32 {
  float v[kLanes];
};
struct I32 {
  int32_t v[kLanes];
};
struct Mask {
  bool v[kLanes];
};
struct Quads {
  uint8_t v[4 * kLanes];
};
struct I16 {
  int16_t v[2 * kLanes];
};

template <class Result, class Function>
inline Result each(Function function) {
  Result result;
  for (int i = 0; i < kLanes; ++i) result.v[i] = function(i);
  return result;
}

inline int32_t bits_of(float x) {
  int32_t result;
  __builtin_memcpy(&result, &x, sizeof result);
  return result;
}
inline float float_of(uint32_t x) {
  float result;
  __builtin_memcpy(&result, &x, sizeof result);
  return result;
}
inline int32_t wrap(uint32_t x) { return static_cast<int32_t>(x); }
inline uint32_t wrap(int32_t x) { return static_cast<uint32_t>(x); }

// ---- 16-bit floats ----

inline float widen_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa ? 0x400000u | mantissa << 13 : 0));
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return float_of(sign | wrap(bits_of(magnitude)));
}

inline uint16_t narrow_f16(float x) {
  const uint32_t bits = wrap(bits_of(x)), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x47800000u) {  // 65536 and more, infinity
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to multiples of 2^-24
    result = wrap(bits_of(float_of(magnitude) + 0.5f)) - 0x3f000000u;
  } else {  // round the 13 low bits to nearest even; a carry runs into the exponent as it should
    result = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  return static_cast<uint16_t>(sign | result);
}

inline float widen_bf16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

inline uint16_t narrow_bf16(float x) {
  const uint32_t bits = wrap(bits_of(x));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// ---- memory ----

inline F32 set1(float x) {
  return each<F32>([=](int) { return x; });
}
inline I32 set1(int32_t x) {
  return each<I32>([=](int) { return x; });
}
inline F32 load(const float* p) {
  return each<F32>([=](int i) { return p[i]; });
}
inline I32 load(const int32_t* p) {
  return each<I32>([=](int i) { return p[i]; });
}
inline F32 load_partial(const float* p, int n, float fill = 0) {
  return each<F32>([=](int i) { return i < n ? p[i] : fill; });
}
inline I32 load_partial(const int32_t* p, int n, int32_t fill = 0) {
  return each<I32>([=](int i) { return i < n ? p[i] : fill; });
}
inline void store_partial(float* p, F32 x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x.v[i];
}
inline void store_partial(int32_t* p, I32 x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x.v[i];
}
inline void store(float* p, F32 x) { store_partial(p, x, kLanes); }
inline void store(int32_t* p, I32 x) { store_partial(p, x, kLanes); }

inline F32 load_f16_partial(const uint16_t* p, int n) {
  return each<F32>([=](int i) { return i < n ? widen_f16(p[i]) : 0; });
}
inline F32 load_bf16_partial(const uint16_t* p, int n) {
  return each<F32>([=](int i) { return i < n ? widen_bf16(p[i]) : 0; });
}
inline F32 low_bf16(I32 pairs) {
  return each<F32>([&](int i) { return float_of(wrap(pairs.v[i]) << 16); });
}
inline F32 high_bf16(I32 pairs) {
  return each<F32>([&](int i) { return float_of(wrap(pairs.v[i]) & 0xffff0000u); });
}
inline F32 load_f16(const uint16_t* p) { return load_f16_partial(p, kLanes); }
inline F32 load_bf16(const uint16_t* p) { return load_bf16_partial(p, kLanes); }
inline void store_f16_partial(uint16_t* p, F32 x, int n) {
  for (int i = 0; i < n; ++i) p[i] = narrow_f16(x.v[i]);
}
inline void store_bf16_partial(uint16_t* p, F32 x, int n) {
  for (int i = 0; i < n; ++i) p[i] = narrow_bf16(x.v[i]);
}
inline void store_f16(uint16_t* p, F32 x) { store_f16_partial(p, x, kLanes); }
inline void store_bf16(uint16_t* p, F32 x) { store_bf16_partial(p, x, kLanes); }

inline I32 load_s8_partial(const int8_t* p, int n) {
  return each<I32>([=](int i) { return i < n ? p[i] : 0; });
}
inline I32 load_u8_partial(const uint8_t* p, int n) {
  return each<I32>([=](int i) { return i < n ? p[i] : 0; });
}
inline I32 load_s8(const int8_t* p) { return load_s8_partial(p, kLanes); }
inline I32 load_u8(const uint8_t* p) { return load_u8_partial(p, kLanes); }
inline void store_s8_partial(int8_t* p, I32 x, int n) {
  for (int i = 0; i < n; ++i) p[i] = static_cast<int8_t>(x.v[i] < -128 ? -128 : x.v[i] > 127 ? 127 : x.v[i]);
}
inline void store_s8(int8_t* p, I32 x) { store_s8_partial(p, x, kLanes); }
inline void store_s8(int8_t* p, I32 a, I32 b, I32 c, I32 d) {
  store_s8(p, a);
  store_s8(p + kLanes, b);
  store_s8(p + 2 * kLanes, c);
  store_s8(p + 3 * kLanes, d);
}

// ---- FP32 ----

inline F32 add(F32 a, F32 b) {
  return each<F32>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32 sub(F32 a, F32 b) {
  return each<F32>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32 mul(F32 a, F32 b) {
  return each<F32>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32 div(F32 a, F32 b) {
  return each<F32>([&](int i) { return a.v[i] / b.v[i]; });
}
inline F32 fma(F32 a, F32 b, F32 c) {
  return each<F32>([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline F32 min(F32 a, F32 b) {
  return each<F32>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32 max(F32 a, F32 b) {
  return each<F32>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32 sqrt(F32 a) {
  return each<F32>([&](int i) { return __builtin_sqrtf(a.v[i]); });
}
inline F32 abs(F32 a) {
  return each<F32>([&](int i) { return float_of(wrap(bits_of(a.v[i])) & 0x7fffffffu); });
}
inline F32 fms(F32 a, F32 b, F32 c) {
  return each<F32>([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], -c.v[i]); });
}
inline F32 negate(F32 a) {
  return each<F32>([&](int i) { return float_of(wrap(bits_of(a.v[i])) ^ 0x80000000u); });
}
inline F32 round_even(F32 a) {
  return each<F32>([&](int i) { return __builtin_rintf(a.v[i]); });
}

// ---- int32, wrapping ----

inline I32 add(I32 a, I32 b) {
  return each<I32>([&](int i) { return wrap(wrap(a.v[i]) + wrap(b.v[i])); });
}
inline I32 sub(I32 a, I32 b) {
  return each<I32>([&](int i) { return wrap(wrap(a.v[i]) - wrap(b.v[i])); });
}
inline I32 mul(I32 a, I32 b) {
  return each<I32>([&](int i) { return wrap(wrap(a.v[i]) * wrap(b.v[i])); });
}
struct Wide {
  I32 low, high;
};
inline Wide multiply_wide(I32 a, I32 b) {
  Wide result;
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = uint64_t{wrap(a.v[i])} * wrap(b.v[i]);
    result.low.v[i] = wrap(static_cast<uint32_t>(product));
    result.high.v[i] = wrap(static_cast<uint32_t>(product >> 32));
  }
  return result;
}
inline I32 min(I32 a, I32 b) {
  return each<I32>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline I32 max(I32 a, I32 b) {
  return each<I32>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline I32 bit_and(I32 a, I32 b) {
  return each<I32>([&](int i) { return a.v[i] & b.v[i]; });
}
inline I32 bit_or(I32 a, I32 b) {
  return each<I32>([&](int i) { return a.v[i] | b.v[i]; });
}
inline I32 bit_xor(I32 a, I32 b) {
  return each<I32>([&](int i) { return a.v[i] ^ b.v[i]; });
}
template <int n>
inline I32 shift_left(I32 a) {
  return each<I32>([&](int i) { return wrap(wrap(a.v[i]) << n); });
}
template <int n>
inline I32 shift_right(I32 a) {
  return each<I32>([&](int i) { return a.v[i] >> n; });
}
template <int n>
inline I32 shift_right_logical(I32 a) {
  return each<I32>([&](int i) { return wrap(wrap(a.v[i]) >> n); });
}

// ---- conversions ----

inline I32 to_int(F32 a) {
  return each<I32>([&](int i) {
    const float x = a.v[i];
    return x >= -0x1p31f && x < 0x1p31f ? static_cast<int32_t>(__builtin_rintf(x)) : INT32_MIN;
  });
}
inline F32 to_float(I32 a) {
  return each<F32>([&](int i) { return static_cast<float>(a.v[i]); });
}
inline I32 as_int(F32 a) {
  return each<I32>([&](int i) { return bits_of(a.v[i]); });
}
inline F32 as_float(I32 a) {
  return each<F32>([&](int i) { return float_of(wrap(a.v[i])); });
}

inline F32 times_power(F32 a, F32 n) { return mul(a, as_float(shift_left<23>(add(to_int(n), set1(127))))); }

// ---- masks ----

inline Mask less(F32 a, F32 b) {
  return each<Mask>([&](int i) { return a.v[i] < b.v[i]; });
}
inline Mask less_equal(F32 a, F32 b) {
  return each<Mask>([&](int i) { return a.v[i] <= b.v[i]; });
}
inline Mask equal(F32 a, F32 b) {
  return each<Mask>([&](int i) { return a.v[i] == b.v[i]; });
}
inline Mask is_nan(F32 a) {
  return each<Mask>([&](int i) { return a.v[i] != a.v[i]; });
}
inline Mask less(I32 a, I32 b) {
  return each<Mask>([&](int i) { return a.v[i] < b.v[i]; });
}
inline Mask equal(I32 a, I32 b) {
  return each<Mask>([&](int i) { return a.v[i] == b.v[i]; });
}
inline Mask first(int n) {
  return each<Mask>([=](int i) { return i < n; });
}
inline Mask mask_and(Mask a, Mask b) {
  return each<Mask>([&](int i) { return a.v[i] && b.v[i]; });
}
inline Mask mask_or(Mask a, Mask b) {
  return each<Mask>([&](int i) { return a.v[i] || b.v[i]; });
}
inline Mask mask_not(Mask a) {
  return each<Mask>([&](int i) { return !a.v[i]; });
}
inline uint32_t bits(Mask a) {
  uint32_t result = 0;
  for (int i = 0; i < kLanes; ++i) result |= static_cast<uint32_t>(a.v[i]) << i;
  return result;
}
inline bool any(Mask a) { return bits(a) != 0; }
inline F32 select(Mask m, F32 yes, F32 no) {
  return each<F32>([&](int i) { return m.v[i] ? yes.v[i] : no.v[i]; });
}
inline I32 select(Mask m, I32 yes, I32 no) {
  return each<I32>([&](int i) { return m.v[i] ? yes.v[i] : no.v[i]; });
}

// ---- across lanes ----

template <int d>
inline F32 swap(F32 a) {
  return each<F32>([&](int i) { return a.v[i ^ d]; });
}
inline float reduce_add(F32 a) {
  for (int d = kLanes / 2; d > 0; d /= 2)
    for (int i = 0; i < d; ++i) a.v[i] = a.v[i] + a.v[i + d];
  return a.v[0];
}
inline float reduce_max(F32 a) {
  for (int d = kLanes / 2; d > 0; d /= 2)
    for (int i = 0; i < d; ++i) a.v[i] = a.v[i] > a.v[i + d] ? a.v[i] : a.v[i + d];
  return a.v[0];
}
inline int32_t reduce_add(I32 a) {
  uint32_t result = 0;
  for (int i = 0; i < kLanes; ++i) result += wrap(a.v[i]);
  return wrap(result);
}
inline int32_t reduce_max(I32 a) {
  int32_t result = a.v[0];
  for (int i = 1; i < kLanes; ++i) result = result > a.v[i] ? result : a.v[i];
  return result;
}

// The lanes of a mask moved together at the front; what follows them is anything.
inline I32 compress(I32 a, Mask m) {
  I32 result = a;
  for (int i = 0, n = 0; i < kLanes; ++i)
    if (m.v[i]) result.v[n++] = a.v[i];
  return result;
}

// ---- 16 bits ----

template <class Function>
inline I16 each_16(Function function) {
  I16 result;
  for (int i = 0; i < 2 * kLanes; ++i) result.v[i] = static_cast<int16_t>(function(i));
  return result;
}
inline uint32_t unsigned_16(int16_t x) { return static_cast<uint16_t>(x); }

inline I16 set1_16(int32_t x) {
  return each_16([=](int) { return x; });
}
inline I16 load_16(const int16_t* p) {
  return each_16([=](int i) { return p[i]; });
}
inline void store_16(int16_t* p, I16 x) { __builtin_memcpy(p, x.v, sizeof x.v); }
// Saturating.
inline I16 pack(I32 a, I32 b) {
  return each_16([&](int i) {
    const int32_t x = i < kLanes ? a.v[i] : b.v[i - kLanes];
    return x < INT16_MIN ? INT16_MIN : x > INT16_MAX ? INT16_MAX : x;
  });
}
inline I16 sub(I16 a, I16 b) {
  return each_16([&](int i) { return a.v[i] - b.v[i]; });
}
inline I16 max(I16 a, I16 b) {
  return each_16([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
template <int n>
inline I16 shift_left(I16 a) {
  return each_16([&](int i) { return unsigned_16(a.v[i]) << n; });
}
template <int n>
inline I16 shift_right_logical(I16 a) {
  return each_16([&](int i) { return unsigned_16(a.v[i]) >> n; });
}
// Each by its own number, 0 to 31; a is not negative.
inline I16 shift_right_logical(I16 a, I16 n) {
  return each_16([&](int i) { return unsigned_16(a.v[i]) >> n.v[i]; });
}
// The upper half of the product of unsigned numbers.
inline I16 multiply_high(I16 a, I16 b) {
  return each_16([&](int i) { return unsigned_16(a.v[i]) * unsigned_16(b.v[i]) >> 16; });
}
// a * b / 2^15, rounded to nearest, half up; not for -32768 twice.
inline I16 multiply_round(I16 a, I16 b) {
  return each_16([&](int i) { return (a.v[i] * b.v[i] + (1 << 14)) >> 15; });
}
// acc + all 32, however they are spread over its lanes.
inline I32 add_pairs(I32 acc, I16 a) {
  return each<I32>([&](int i) { return wrap(wrap(acc.v[i]) + wrap(a.v[2 * i] + a.v[2 * i + 1])); });
}
// Of numbers that are not negative.
inline int32_t reduce_max(I16 a) {
  int32_t largest = 0;
  for (int16_t x : a.v) largest = x > largest ? x : largest;
  return largest;
}
// 64 numbers that were packed.
inline void store_u8(uint8_t* p, I16 a, I16 b) {
  for (int i = 0; i < 4 * kLanes; ++i) {
    const int16_t x = i < 2 * kLanes ? a.v[i] : b.v[i - 2 * kLanes];
    p[i] = static_cast<uint8_t>(x < 0 ? 0 : x > 255 ? 255 : x);
  }
}

// ---- bytes ----

inline Quads load_quads(const void* p) {
  Quads result;
  __builtin_memcpy(&result, p, sizeof result);
  return result;
}
inline void store_quads(void* p, Quads x) { __builtin_memcpy(p, &x, sizeof x); }
// The same 4 bytes in every lane.
inline Quads set1_quad(const void* p) {
  Quads result;
  for (int i = 0; i < kLanes; ++i) __builtin_memcpy(result.v + 4 * i, p, 4);
  return result;
}
inline I32 dot_us(I32 acc, Quads u, Quads s) {
  return each<I32>([&](int i) {
    int32_t sum = 0;
    for (int b = 4 * i; b < 4 * i + 4; ++b) sum += u.v[b] * static_cast<int8_t>(s.v[b]);
    return wrap(wrap(acc.v[i]) + wrap(sum));
  });
}
inline I32 dot_ss(I32 acc, Quads a, Quads b) {
  return each<I32>([&](int i) {
    int32_t sum = 0;
    for (int j = 4 * i; j < 4 * i + 4; ++j) sum += static_cast<int8_t>(a.v[j]) * static_cast<int8_t>(b.v[j]);
    return wrap(wrap(acc.v[i]) + wrap(sum));
  });
}
// The sums of 64 signed bytes, 32 together.
inline void sum_bytes(const int8_t* q, int32_t* sums) {
  for (int half = 0; half < 2; ++half) {
    sums[half] = 0;
    for (int i = 0; i < 32; ++i) sums[half] += q[32 * half + i];
  }
}
// Signed weights in the form that dot_weights() wants; activations are signed bytes.
inline Quads as_weights(Quads s) { return s; }
inline I32 dot_weights(I32 acc, Quads weights, Quads activations) { return dot_ss(acc, weights, activations); }

// Four lines of 64 bytes, byte by byte side by side within every 16 bytes: vector t has bytes 16 j + 4 t .. + 3 of
// each, j ascending, as lanes of four.
struct Interleaved {
  Quads v[4];
};
inline Interleaved interleave(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  Interleaved result;
  for (int t = 0; t < 4; ++t) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int byte = lane / 4 * 16 + 4 * t + lane % 4;
      uint8_t* quad = result.v[t].v + 4 * lane;
      quad[0] = a[byte], quad[1] = b[byte], quad[2] = c[byte], quad[3] = d[byte];
    }
  }
  return result;
}
// The low (half 0) or high (half 1) nibble of each byte.
template <int half>
inline Quads nibbles(Quads x) {
  for (uint8_t& b : x.v) b = half ? b >> 4 : b & 15;
  return x;
}

// ---- nibbles: 8 lines of 64 bytes, 64 columns of INT4 weights of 16 rows ----

struct Nibbles {
  const uint8_t* lines;
};
inline Nibbles load_nibbles(const uint8_t* lines) { return {lines}; }
// acc + the 32 columns of the low (half 0) or high (half 1) nibbles, q in 0..15, times signed activations.
template <int half>
inline I32 dot_nibbles(I32 acc, Nibbles block, const int8_t* activations) {
  for (int j = 0; j < 8; ++j) {
    Quads q = load_quads(block.lines + 64 * j);
    for (uint8_t& b : q.v) b = half ? b >> 4 : b & 15;
    acc = dot_us(acc, q, set1_quad(activations + 4 * j));
  }
  return acc;
}
// One half of a line as signed weights s * (q - 8); scale: 16 group scales s.
struct NibbleScale {
  I32 scale;
};
inline NibbleScale nibble_scale(const uint8_t* scale) { return {load_u8(scale)}; }
template <int half>
inline Quads scaled_nibbles(const uint8_t* line, NibbleScale s) {
  Quads q = load_quads(line);
  for (int i = 0; i < 4 * kLanes; ++i) {
    const int nibble = half ? q.v[i] >> 4 : q.v[i] & 15;
    q.v[i] = static_cast<uint8_t>((nibble - 8) * s.scale.v[i / 4]);
  }
  return q;
}
// Column `shift / 4` of a line of nibbles, seen as 16 lanes: q - 8 in FP32.
template <int shift>
inline F32 nibble_to_float(I32 line) {
  return each<F32>([&](int i) { return static_cast<float>((line.v[i] >> shift & 15) - 8); });
}
// Byte `index` of each lane, signed, in FP32.
template <int index>
inline F32 byte_to_float(I32 line) {
  return each<F32>([&](int i) { return static_cast<float>(static_cast<int8_t>(line.v[i] >> (8 * index))); });
}

// ---- octals: 3 lines of 64 bytes, 32 columns of INT3 weights of 16 rows ----
//
// Two codes lie in the six low bits of each line; the two bits above them, of the first and second line, are the low
// bits of the last two codes, and their high bits are the two bits above in the third.

struct Octals {
  Quads v[3];
};
inline Octals load_octals(const uint8_t* lines) {
  return {{load_quads(lines), load_quads(lines + 64), load_quads(lines + 128)}};
}
// Four columns of 16 rows: codes in 0..7.
template <int line>
inline Quads octal_line(const Octals& octals) {
  Quads q;
  for (int i = 0; i < 4 * kLanes; ++i) {
    const int together = octals.v[line / 2 % 3].v[i] >> 3 * (line % 2);
    const int apart = octals.v[line % 2].v[i] >> 6 | (octals.v[2].v[i] >> line & 1) << 2;
    q.v[i] = static_cast<uint8_t>(line < 6 ? together & 7 : apart);
  }
  return q;
}
template <int line = 0>
inline I32 dot_octals(I32 acc, const Octals& octals, const int8_t* activations) {
  acc = dot_us(acc, octal_line<line>(octals), set1_quad(activations + 4 * line));
  if constexpr (line < 7) acc = dot_octals<line + 1>(acc, octals, activations);
  return acc;
}
// A line as signed weights s * (q - 4); scale: 16 group scales s.
struct OctalScale {
  I32 scale;
};
inline OctalScale octal_scale(const uint8_t* scale) { return {load_s8(reinterpret_cast<const int8_t*>(scale))}; }
template <int line>
inline Quads scaled_octals(const Octals& octals, const OctalScale& s) {
  Quads q = octal_line<line>(octals);
  for (int i = 0; i < 4 * kLanes; ++i) q.v[i] = static_cast<uint8_t>((q.v[i] - 4) * s.scale.v[i / 4]);
  return q;
}

#include "lanes/group_sum.h"
