// The kernels on AMX: products of quantized rows on tiles, of BF16 rows too where the processor has AMX BF16, all else
// as on AVX-512 with VNNI. Compiled with those flags, so nothing here may have external linkage but the table and the
// tests of the tiles.
#include <immintrin.h>
#include <time.h>

#include "channels.h"
#include "kernels.h"

namespace snello {
namespace amx {
namespace {
#include "lanes/avx512.h"
#include "lanes/tiles_amx.h"

inline bool halves_on_tiles() { return trust_in_bf16_tiles(); }

#include "kernels/table.inl"
#include "kernels/tiles.inl"
#include "kernels/attention_tiles.inl"
#include "kernels/half_trial.inl"

double seconds_now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

constexpr int kProducts = 256;  // on top of each other, so that tiles are almost always full

constexpr Kernels kPlain = table("amx");

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

// Two tiles of products on top of some sums, and the same on vectors.
bool bf16_product_agrees(uint32_t* state) {
  constexpr int kSteps = 2;
  alignas(64) uint16_t rows[kSteps][kTileRows][kHalfColumns], weights[kSteps][kTileRows][kHalfColumns];
  alignas(64) float sums[kTileRows][kPanel];
  fill_halves(state, rows[0][0], kSteps * kTileRows * kHalfColumns);
  fill_halves(state, weights[0][0], kSteps * kTileRows * kHalfColumns);
  begin_tiles(kTileRows, 0);
  zero_tile<0>();
  for (int step = 0; step < kSteps; ++step) {
    load_tile<4>(rows[step], kTileColumns);
    load_tile<6>(weights[step], kTileColumns);
    dot_tiles_bf16<0, 4, 6>();
  }
  store_tile<0>(sums, kPanel * sizeof(float));
  end_tiles();
  for (int m = 0; m < kTileRows; ++m) {
    F32 sum = set1(0.0f);
    for (int step = 0; step < kSteps; ++step) {
      HalfSums<1, 1> part;
      for (int line = 0; line < kTileRows; ++line) {
        int32_t two;
        __builtin_memcpy(&two, rows[step][m] + 2 * line, sizeof two);
        const I32 x = set1(two), w = load(reinterpret_cast<const int32_t*>(weights[step][line]));
        part.even[0][0] = fma(low_bf16(x), low_bf16(w), part.even[0][0]);
        part.odd[0][0] = fma(high_bf16(x), high_bf16(w), part.odd[0][0]);
      }
      sum = add(sum, part.sum(0, 0));
    }
    float expected[kPanel];
    store(expected, sum);
    if (__builtin_memcmp(expected, sums[m], sizeof expected) != 0) return false;
  }
  return true;
}
}  // namespace
}  // namespace amx

bool bf16_tiles_agree() {
  uint32_t state = 1;
  for (int i = 0; i < 64; ++i)
    if (!amx::bf16_product_agrees(&state)) return false;
  return true;
}

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

constinit const Kernels kAmxKernels = amx::with_tiles(amx::kPlain);
}  // namespace snello
