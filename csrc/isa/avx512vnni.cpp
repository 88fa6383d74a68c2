// The kernels on AVX-512 F, BW, VL, DQ and VNNI. Compiled with those flags, so nothing here may have external linkage
// but the table.
#include <immintrin.h>

#include "channels.h"
#include "kernels.h"

namespace snello {
namespace avx512vnni {
namespace {
#include "lanes/avx512.h"

#include "kernels/table.inl"
}  // namespace
}  // namespace avx512vnni

constinit const Kernels kAvx512VnniKernels = avx512vnni::table("avx512vnni");
}  // namespace snello
