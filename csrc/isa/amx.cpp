// The kernels on AMX INT8: quantized products of many rows on tiles, all else as on AVX-512 with VNNI. Compiled with
// those flags, so nothing here may have external linkage but the table and the test of the tiles.
#include <immintrin.h>
#include <time.h>

#include "channels.h"
#include "kernels.h"

namespace snello {
namespace amx {
namespace {
#include "lanes/avx512.h"
#include "lanes/tiles_amx.h"

#include "kernels/table.inl"
#include "kernels/tiles.inl"
#include "kernels/attention_tiles.inl"

double seconds_now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

constexpr int kProducts = 256;  // on top of each other, so that tiles are almost always full

bool product_holds(const int8_t (*rows)[kTileColumns], const int8_t (*weights)[kTileColumns]) {
  alignas(64) int32_t sums[kTileRows][kPanel];
  begin_tiles(kTileRows, 0);
  zero_tile<0>();
  load_tile<4>(rows, kTileColumns);
  load_tile<6>(weights, kTileColumns);
  for (int i = 0; i < kProducts; ++i) dot_tiles<0, 4, 6>();
  store_tile<0>(sums, kPanel * sizeof(int32_t));
  end_tiles();
  for (int m = 0; m < kTileRows; ++m) {
    for (int n = 0; n < kPanel; ++n) {
      int32_t sum = 0;
      for (int k = 0; k < kTileColumns; ++k) sum += rows[m][k] * weights[k / 4][4 * n + k % 4];
      if (sums[m][n] != kProducts * sum) return false;
    }
  }
  return true;
}
}  // namespace
}  // namespace amx

bool tiles_hold(double seconds) {
  alignas(64) int8_t rows[kTileRows][kTileColumns], weights[kTileRows][kTileColumns];
  uint32_t state = 1;
  const double end = amx::seconds_now() + seconds;
  do {
    for (int i = 0; i < kTileRows * kTileColumns; ++i) {
      state = state * 1664525 + 1013904223;
      rows[i / kTileColumns][i % kTileColumns] = static_cast<int8_t>(state >> 24);
      weights[i / kTileColumns][i % kTileColumns] = static_cast<int8_t>(state >> 16);
    }
    if (!amx::product_holds(rows, weights)) return false;
  } while (amx::seconds_now() < end);
  return true;
}

constinit const Kernels kAmxKernels = amx::with_tiles(amx::table("amx"));
}  // namespace snello
