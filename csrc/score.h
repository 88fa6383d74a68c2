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
  double series = 0.0;
  for (int k = 10; k >= 1; --k) series = (series + 1.0 / (2 * k + 1)) * z2;
  const double e = static_cast<double>(exponent);
  return e * kLn2High + (2.0 * (z + z * series) + e * kLn2Low);
}

// e to the x for x <= 0: 2^n times the Taylor series at |r| <= ln(2) / 2. Below -700 it is 0.
inline double natural_exp(double x) {
  constexpr double kLog2E = 0x1.71547652b82fep+0, kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  if (!(x > -700.0)) return 0.0;
  const double n = std::nearbyint(x * kLog2E);
  const double r = (x - n * kLn2High) - n * kLn2Low;
  double series = 1.0;
  for (int k = 13; k >= 1; --k) series = 1.0 + series * (r / k);
  return series * std::bit_cast<double>(static_cast<uint64_t>(1023 + static_cast<int64_t>(n)) << 52);
}

// What one pass over a row of logits tells.
struct LogitRow {
  float maximum, sum;   // sum of exp(x - maximum)
  int argmax;           // the first of equals
  double log_sum_exp;   // NaN if any logit is NaN, or none is finite, or one is +inf

  bool finite() const { return std::isfinite(log_sum_exp); }
  float log_probability(float logit) const { return static_cast<float>(static_cast<double>(logit) - log_sum_exp); }
};

LogitRow logit_row(const float* logits, int vocabulary);

}  // namespace snello
