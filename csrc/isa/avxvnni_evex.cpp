// The same kernels as avxvnni.cpp with the encoding that AVX-512 machines have: how that set is tested on them. Never
// selected unless it is asked for by name.
#include <immintrin.h>

#include "channels.h"
#include "kernels.h"

namespace snello {
namespace avxvnni_evex {
namespace {
#include "lanes/avx2.h"
LANES __m256i dpbusd(__m256i acc, __m256i u, __m256i s) { return _mm256_dpbusd_epi32(acc, u, s); }
#include "lanes/products_avxvnni.h"

#include "kernels/table.inl"
}  // namespace
}  // namespace avxvnni_evex

constinit const Kernels kAvxVnniEvexKernels = avxvnni_evex::table("avxvnni-evex");
}  // namespace snello
