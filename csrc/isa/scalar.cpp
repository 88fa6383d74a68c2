// The kernels in plain C++: the portable statement of docs/numerics.md, and the only set of processors that have none
// of the others.
#include "channels.h"
#include "kernels.h"

namespace snello {
namespace scalar {
namespace {
#include "lanes/scalar.h"

#include "kernels/table.inl"
}  // namespace
}  // namespace scalar

constinit const Kernels kScalarKernels = scalar::table("scalar");
}  // namespace snello
