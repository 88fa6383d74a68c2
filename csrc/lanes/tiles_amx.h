// Tiles (see lanes/tiles_emulated.h) on AMX. Every instruction says that it touches memory: a compiler that does
// not know tiles would otherwise move ordinary stores past the loads that need them.
#pragma once

// The operand of LDTILECFG.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  void shape(int tile, int num_rows) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = num_rows > 0 ? kTileColumns : 0;
  }
};

inline void begin_tiles(int top_rows, int bottom_rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.shape(tile, rows_of_tile(tile, top_rows, bottom_rows));
  __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}
inline void end_tiles() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int tile>
LANES void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile) : "memory");
}
template <int tile>
LANES void load_tile(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}
// A hint: from the second cache it goes past the first.
template <int tile>
LANES void load_tile_once(const void* p, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
LANES void store_tile(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int sums, int rows, int weights>
LANES void dot_tiles() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(rows), "i"(weights) : "memory");
}
template <int sums, int rows, int weights>
LANES void dot_tiles_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(rows), "i"(weights) : "memory");
}
template <int sums, int rows, int weights>
LANES void dot_tiles_us() {
  __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(rows), "i"(weights) : "memory");
}
