// Pages of keys and values: sizes, memory, copies. See cache.h.
#include "cache.h"

#include <cstring>
#include <exception>
#include <new>

namespace snello {
namespace {

constexpr uint64_t kLine = 64;

struct HeadBytes {
  uint64_t key, value;
};

HeadBytes head_bytes(const snello_cache_layer& layer) {
  const uint64_t head_dim = static_cast<uint64_t>(layer.head_dim);
  if (layer.format == SNELLO_INT8) {
    const uint64_t key_panel = kPanel * sizeof(float) + kPanel * round_up(head_dim, kPanel);
    return {kPage / kPanel * key_panel, kPage * sizeof(float) + kPage * round_up(head_dim, kPanel)};
  }
  const uint64_t element = layer.format == SNELLO_F32 ? 4 : 2;
  const uint64_t block = round_up(kPage * head_dim * element, kLine);
  return {block, block};
}

uint64_t layer_bytes(const snello_cache_layer& layer) {
  if (layer.state_rows > 0)
    return round_up(static_cast<uint64_t>(layer.state_rows) * static_cast<uint64_t>(layer.head_dim) * 4, kLine);
  const HeadBytes bytes = head_bytes(layer);
  return static_cast<uint64_t>(layer.num_kv_heads) * (bytes.key + bytes.value);
}

bool valid_state(const snello_cache_layer& layer, int l) {
  const int rows = layer.state_rows;
  if (rows < 1 || rows > kPage || (rows & (rows - 1)) != 0)
    return fail("cache layer %d: state of %d rows: a power of two up to %d", l, rows, kPage), false;
  if (layer.format != SNELLO_F32 || layer.num_kv_heads != 1)
    return fail("cache layer %d: state is FP32 and has no heads", l), false;
  if (layer.head_dim < 1 || layer.head_dim > kMaxStateWidth)
    return fail("cache layer %d: state rows of %d values: 1 to %d", l, layer.head_dim, kMaxStateWidth), false;
  return true;
}

bool valid(const snello_cache_layer* layers, int num_layers) {
  if (layers == nullptr || num_layers < 1) return fail("a cache needs at least one layer"), false;
  for (int l = 0; l < num_layers; ++l) {
    const snello_cache_layer& layer = layers[l];
    if (layer.state_rows != 0) {
      if (!valid_state(layer, l)) return false;
      continue;
    }
    if (layer.format < SNELLO_F32 || layer.format > SNELLO_INT8)
      return fail("cache layer %d: format %d holds no keys and values", l, layer.format), false;
    if (layer.num_kv_heads < 1 || layer.num_kv_heads > 4096)
      return fail("cache layer %d: %d kv heads", l, layer.num_kv_heads), false;
    if (layer.head_dim < 1 || layer.head_dim > kMaxHeadDim)
      return fail("cache layer %d: head_dim is %d: it must be 1 to %d", l, layer.head_dim, kMaxHeadDim), false;
  }
  return true;
}

uint64_t total_bytes(const snello_cache_layer* layers, int num_layers) {
  uint64_t bytes = 0;
  for (int l = 0; l < num_layers; ++l) bytes += layer_bytes(layers[l]);
  return bytes;
}

// Throws std::bad_alloc where no address reaches that far.
uint64_t bytes_of_pages(uint64_t page_bytes, int pages) {
  constexpr uint64_t kMost = uint64_t{1} << 62;
  if (page_bytes > kMost / static_cast<uint64_t>(pages)) throw std::bad_alloc();
  return page_bytes * static_cast<uint64_t>(pages);
}

}  // namespace
}  // namespace snello

snello_cache::snello_cache(const snello_cache_layer* given, int num_layers, int pages)
    : memory(snello::bytes_of_pages(snello::total_bytes(given, num_layers), pages)),
      page_bytes(snello::total_bytes(given, num_layers)),
      num_pages(pages) {
  uint8_t* data = memory.data();
  for (int l = 0; l < num_layers; ++l) {
    const snello::HeadBytes bytes = snello::head_bytes(given[l]);
    snello::CacheLayer layer{};
    layer.data = data;
    layer.page_stride = static_cast<int64_t>(page_bytes);
    layer.head_stride = static_cast<int64_t>(bytes.key + bytes.value);
    layer.value_offset = static_cast<int64_t>(bytes.key);
    layer.num_kv_heads = given[l].num_kv_heads;
    layer.head_dim = given[l].head_dim;
    layer.format = given[l].format;
    layer.state_rows = given[l].state_rows;
    layers.push_back(layer);
    data += snello::layer_bytes(given[l]);
  }
}

extern "C" {

snello_cache* snello_cache_create(const snello_cache_layer* layers, int32_t num_layers, int32_t num_pages) {
  if (!snello::valid(layers, num_layers)) return nullptr;
  if (num_pages < 1) return snello::fail("a cache needs at least one page, not %d", num_pages), nullptr;
  try {
    return new snello_cache(layers, num_layers, num_pages);
  } catch (const std::exception&) {
    const uint64_t bytes = snello::total_bytes(layers, num_layers);
    snello::fail("cannot map %d pages of keys and values, %llu bytes each", num_pages,
                 static_cast<unsigned long long>(bytes));
    return nullptr;
  }
}

void snello_cache_destroy(snello_cache* cache) { delete cache; }

uint64_t snello_cache_page_bytes(const snello_cache_layer* layers, int32_t num_layers) {
  return snello::valid(layers, num_layers) ? snello::total_bytes(layers, num_layers) : 0;
}

int32_t snello_cache_copy_page(snello_cache* cache, int32_t destination, int32_t source) {
  if (cache == nullptr) return snello::fail("no cache");
  for (const int32_t page : {destination, source})
    if (page < 0 || page >= cache->num_pages) return snello::fail("page %d of %d", page, cache->num_pages);
  if (destination == source) return 0;
  uint8_t* data = cache->memory.data();
  std::memcpy(data + static_cast<uint64_t>(destination) * cache->page_bytes,
              data + static_cast<uint64_t>(source) * cache->page_bytes, cache->page_bytes);
  return 0;
}

void* snello_cache_page(snello_cache* cache, int32_t page) {
  if (cache == nullptr) return snello::fail("no cache"), nullptr;
  if (page < 0 || page >= cache->num_pages) return snello::fail("page %d of %d", page, cache->num_pages), nullptr;
  return cache->memory.data() + static_cast<uint64_t>(page) * cache->page_bytes;
}

}  // extern "C"
