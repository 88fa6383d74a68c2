// The kernels on AVX2, FMA and F16C. Compiled with those flags, so nothing here may have external linkage but the
// table.
#include <immintrin.h>

#include "channels.h"
#include "kernels.h"

namespace snello {
namespace avx2 {
namespace {
#include "lanes/avx2.h"
#include "lanes/products_avx2.h"

#include "kernels/table.inl"
#include "kernels/pairs.inl"
}  // namespace
}  // namespace avx2

constinit const Kernels kAvx2Kernels = avx2::with_pairs(avx2::table("avx2"));
}  // namespace snello
