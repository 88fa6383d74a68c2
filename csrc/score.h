// From logits to log-probabilities. The logarithm and the exponential of doubles are written out here in plain IEEE
// operations, since a library's may differ in the last bit from machine to machine, and a drawn token must not.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace snello {

// Natural logarithm of a positive normal number: 2 artanh((m - 1) / (m + 1)) over the mantissa m in [0.7, 1.4].
inline double natural_log(double x) {
  constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  const int64_t exponent = static_cast<int64_t>(bits - kSqrtHalf) >> 52;
  const double m = std::bit_cast<double>(bits - (static_cast<uint64_t>(exponent) << 52));
  const double z = (m - 1.0) / (m + 1.0), z2 = z * z;
  constexpr double kOdd[] = {1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13,
                             1.0 / 11, 1.0 / 9,  1.0 / 7,  1.0 / 5,  1.0 / 3};
  double series = 0.0;
  for (const double coefficient : kOdd) series = (series + coefficient) * z2;
  const double e = static_cast<double>(exponent);
  return e * kLn2High + (2.0 * (z + z * series) + e * kLn2Low);
}

// e to the x for x <= 0: 2^n times the Taylor series at |r| <= ln(2) / 2. Below -700 it is 0.
inline double natural_exp(double x) {
  constexpr double kLog2E = 0x1.71547652b82fep+0, kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  if (!(x > -700.0)) return 0.0;
  constexpr double kRound = 0x1.8p52;  // adding it rounds to an integer, which is then in the low bits
  const double shifted = x * kLog2E + kRound, n = shifted - kRound;
  const double r = (x - n * kLn2High) - n * kLn2Low;
  constexpr double kInverseFactorials[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0,         1.0};
  double series = 1.0 / 6227020800;
  for (const double coefficient : kInverseFactorials) series = series * r + coefficient;
  return series * std::bit_cast<double>((std::bit_cast<uint64_t>(shifted) + 1023) << 52);
}

// What one pass over a row of logits tells.
struct LogitRow {
  float maximum, sum;  // sum of exp(x - maximum)
  int argmax;          // the first of equals
  double log_sum_exp;  // NaN if any logit is NaN, or none is finite, or one is +inf

  bool finite() const { return std::isfinite(log_sum_exp); }
  float log_probability(float logit) const { return static_cast<float>(static_cast<double>(logit) - log_sum_exp); }
};

LogitRow logit_row(const float* logits, int vocabulary);

}  // namespace snello
