// The kernels of AMX and those of AVX512_BF16 in plain C++, tiles and all: how their ways are tested where there are
// none. Never selected unless they are asked for by name.
#include "channels.h"
#include "kernels.h"

namespace snello {
namespace emulated {
namespace {
#include "lanes/scalar.h"
#include "lanes/half_dots_emulated.h"
#include "lanes/tiles_emulated.h"

inline bool halves_on_tiles() { return true; }
inline bool half_dots_here() { return true; }

#include "kernels/table.inl"
#include "kernels/half_dots.inl"
#include "kernels/tiles.inl"
#include "kernels/attention_tiles.inl"

constexpr Kernels kPlain = table("amx-emulated");
}  // namespace
}  // namespace emulated

constinit const Kernels kAmxEmulatedKernels = emulated::with_tiles(emulated::kPlain);
constinit const Kernels kBf16EmulatedKernels = emulated::with_half_dots(emulated::table("bf16-emulated"));
}  // namespace snello
