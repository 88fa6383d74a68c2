// The kernels of AMX in plain C++, tiles and all: how the way over tiles is tested where there are none. Never selected
// unless it is asked for by name.
#include "channels.h"
#include "kernels.h"

namespace snello {
namespace amx_emulated {
namespace {
#include "lanes/scalar.h"
#include "lanes/tiles_emulated.h"

inline bool halves_on_tiles() { return true; }

#include "kernels/table.inl"
#include "kernels/tiles.inl"
#include "kernels/attention_tiles.inl"

constexpr Kernels kPlain = table("amx-emulated");
}  // namespace
}  // namespace amx_emulated

constinit const Kernels kAmxEmulatedKernels = amx_emulated::with_tiles(amx_emulated::kPlain);
}  // namespace snello
