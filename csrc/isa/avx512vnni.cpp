// The kernels on AVX-512 F, BW, VL, DQ and VNNI, and on BF16's dot products where the processor has them. Compiled with
// the flags of the former, so nothing here may have external linkage but the tables and the trial of the latter.
#include <immintrin.h>

#include "channels.h"
#include "kernels.h"

namespace snello {
namespace avx512vnni {
namespace {
#include "lanes/avx512.h"
#include "lanes/half_dots_avx512.h"

inline bool half_dots_here() { return trust_in_half_dots(); }

#include "kernels/table.inl"
#include "kernels/half_dots.inl"
#include "kernels/half_trial.inl"

// Chains of dot products, and the same of fused multiply-adds.
bool chain_of_dots_agrees(uint32_t* state) {
  constexpr int kDots = 16;
  alignas(64) uint16_t rows[kDots][2 * kPanel], weights[kDots][2 * kPanel];
  fill_halves(state, rows[0], kDots * 2 * kPanel);
  fill_halves(state, weights[0], kDots * 2 * kPanel);
  F32 sum = set1(0.0f), expected = set1(0.0f);
  for (int i = 0; i < kDots; ++i) {
    const I32 x = load(reinterpret_cast<const int32_t*>(rows[i]));
    const I32 w = load(reinterpret_cast<const int32_t*>(weights[i]));
    sum = dot_halves(sum, x, w);
    expected = fma(low_bf16(x), low_bf16(w), fma(high_bf16(x), high_bf16(w), expected));
    float found[kLanes], meant[kLanes];
    store(found, sum);
    store(meant, expected);
    if (__builtin_memcmp(found, meant, sizeof found) != 0) return false;
  }
  return true;
}
}  // namespace
}  // namespace avx512vnni

bool half_dots_agree() {
  uint32_t state = 1;
  for (int i = 0; i < 256; ++i)
    if (!avx512vnni::chain_of_dots_agrees(&state)) return false;
  return true;
}

constinit const Kernels kAvx512VnniKernels = avx512vnni::with_half_dots(avx512vnni::table("avx512vnni"));
constinit const Kernels kAvx512VnniFmaKernels = avx512vnni::table("avx512vnni-fma");
}  // namespace snello
