// The kernels on ARM's Advanced SIMD with products of small matrices of bytes (SMMLA). Compiled with those flags, so
// nothing here may have external linkage but the table.
#include <arm_neon.h>

#include "channels.h"
#include "kernels.h"

namespace snello {
namespace neon_i8mm {
namespace {
#include "lanes/neon.h"
#include "lanes/products_i8mm.h"

#include "kernels/table.inl"
#include "kernels/matrices.inl"
}  // namespace
}  // namespace neon_i8mm

constinit const Kernels kNeonI8mmKernels = neon_i8mm::with_matrices(neon_i8mm::table("neon-i8mm"));
}  // namespace snello
