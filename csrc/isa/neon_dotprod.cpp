// The kernels on ARM's Advanced SIMD with dot products of bytes (SDOT). Compiled with those flags, so nothing here may
// have external linkage but the table.
#include <arm_neon.h>

#include "channels.h"
#include "kernels.h"

namespace snello {
namespace neon_dotprod {
namespace {
#include "lanes/neon.h"
#include "lanes/products_dotprod.h"

#include "kernels/table.inl"
#include "kernels/quads.inl"
}  // namespace
}  // namespace neon_dotprod

constinit const Kernels kNeonDotprodKernels = neon_dotprod::with_quads(neon_dotprod::table("neon-dotprod"));
}  // namespace snello
