// Pages of keys and values. A page holds 128 positions of one sequence for all layers and kv heads together, so that a
// page is what is allocated, shared and copied; docs/numerics.md (Attention) states what is inside.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "memory.h"

struct snello_cache {
  snello_cache(const snello_cache_layer* layers, int num_layers, int num_pages);

  snello::Memory memory;
  std::vector<snello::CacheLayer> layers;
  uint64_t page_bytes;
  int32_t num_pages;
};

namespace snello {

constexpr int kMaxHeadDim = 512;
constexpr int kMaxStateWidth = 131072;

}  // namespace snello
