// The kernels on AVX2 with VNNI in 256 bits, which most laptops have and few servers. Compiled with those flags, so
// nothing here may have external linkage but the table.
#include <immintrin.h>

#include "channels.h"
#include "kernels.h"

namespace snello {
namespace avxvnni {
namespace {
#include "lanes/avx2.h"
LANES __m256i dpbusd(__m256i acc, __m256i u, __m256i s) { return _mm256_dpbusd_avx_epi32(acc, u, s); }
#include "lanes/products_avxvnni.h"

#include "kernels/table.inl"
}  // namespace
}  // namespace avxvnni

constinit const Kernels kAvxVnniKernels = avxvnni::table("avxvnni");
}  // namespace snello
