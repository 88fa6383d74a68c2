// The transcendental functions of docs/numerics.md on lanes: fixed sequences of FP32 operations, the same everywhere.
#pragma once

// 2^n for integral n in [-149, 128], in two factors so that neither exponent leaves the normal range.
inline F32 scale_by_power(F32 x, F32 n) {
  const I32 exponent = to_int(n), half = shift_right<1>(exponent);
  const I32 bias = set1(127);
  const F32 first_factor = as_float(shift_left<23>(add(half, bias)));
  const F32 second_factor = as_float(shift_left<23>(add(sub(exponent, half), bias)));
  return mul(mul(x, first_factor), second_factor);
}

// e^x = p 2^n with p about 1.
struct Exponential {
  F32 p, n;
};
inline Exponential split_exp(F32 x) {
  const F32 n = round_even(mul(x, set1(0x1.715476p+0f)));
  F32 f = fms(x, set1(0x1.715476p+0f), n);
  f = fma(x, set1(0x1.4ae0c0p-26f), f);
  F32 p = set1(0x1.41fbb8p-13f);
  p = fma(p, f, set1(0x1.5f3e54p-10f));
  p = fma(p, f, set1(0x1.3b2d4cp-7f));
  p = fma(p, f, set1(0x1.c6aee8p-5f));
  p = fma(p, f, set1(0x1.ebfbdcp-3f));
  p = fma(p, f, set1(0x1.62e430p-1f));
  return {fma(p, f, set1(1.0f)), n};
}

// Error under 1 unit in the last place. Below -87.3: 0; above 88.7: infinity; NaN stays.
inline F32 exp(F32 x) {
  const Exponential e = split_exp(x);
  F32 y = scale_by_power(e.p, e.n);
  y = select(less(x, set1(-87.3f)), set1(0.0f), y);
  y = select(less(set1(88.7f), x), set1(__builtin_inff()), y);
  return select(is_nan(x), x, y);
}

// The same number for x up to 0, where one factor does: half of what a probability costs.
inline F32 exp_of_negative(F32 x) {
  const Exponential e = split_exp(x);
  return select(less(x, set1(-87.3f)), set1(0.0f), times_power(e.p, e.n));
}

// e^x of x kept within [-87, 87], where one factor does as well; NaN stays.
inline F32 exp_within(F32 x) {
  const Exponential e = split_exp(max(set1(-87.0f), min(set1(87.0f), x)));
  return times_power(e.p, e.n);
}

// 2^(-y / 2048) in units of 2^-15, to a relative error of 1.3e-4 and the last unit: for what is rounded to a byte. y in
// 0..32768, which as a number of 16 bits is -32768; from 15 powers on 0.
inline I16 power_of_half(I16 y) {
  const I16 f = shift_left<5>(y);  // of a power, in units of 2^-16
  I16 p = sub(set1_16(7561), multiply_high(f, set1_16(1288)));
  p = sub(set1_16(22658), multiply_high(f, p));
  p = sub(set1_16(32767), multiply_high(f, p));
  return shift_right_logical(p, shift_right_logical<11>(y));
}

inline F32 sigmoid(F32 x) { return div(set1(1.0f), add(set1(1.0f), exp_within(negate(x)))); }

inline F32 tanh(F32 x) {
  const F32 e = exp_within(add(x, x));
  const F32 y = sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
  const F32 one = as_float(bit_or(bit_and(as_int(x), set1(INT32_MIN)), as_int(set1(1.0f))));
  return select(less(set1(9.0f), abs(x)), one, y);
}

// x + x P(x^2) below 1, 1 - exp(-(x + x Q(x))) above, where 4 already gives 1. Error under 1e-7.
inline F32 erf(F32 x) {
  const F32 t = min(abs(x), set1(4.0f)), s = mul(t, t);
  F32 p = set1(-0x1.273fa6p-11f);
  p = fma(p, s, set1(0x1.4246d0p-8f));
  p = fma(p, s, set1(-0x1.b5a35cp-6f));
  p = fma(p, s, set1(0x1.ce0942p-4f));
  p = fma(p, s, set1(-0x1.812674p-2f));
  p = fma(p, s, set1(0x1.06eba2p-3f));
  F32 q = set1(-0x1.b8c8f6p-13f);
  q = fma(q, t, set1(0x1.a137d8p-9f));
  q = fma(q, t, set1(-0x1.7553d4p-6f));
  q = fma(q, t, set1(0x1.ae79dep-4f));
  q = fma(q, t, set1(0x1.458da8p-1f));
  q = fma(q, t, set1(0x1.071e34p-3f));
  const F32 near = fma(t, p, t), far = sub(set1(1.0f), exp_within(negate(fma(t, q, t))));
  const F32 y = select(less(t, set1(1.0f)), near, far);
  const F32 signed_y = as_float(bit_or(as_int(y), bit_and(as_int(x), set1(INT32_MIN))));
  return select(is_nan(x), x, signed_y);
}
