// The tiles interface, stated in plain C++: eight two-dimensional registers of at most 16 rows of 64 bytes.
//
// kernels/tiles.inl is written once over these names; lanes/tiles_amx.h gives the same names on AMX. Which
// tile holds what is in rows_of_tile().
//
//   begin_tiles(top, bottom)   gives the tiles their rows, 0 to 16 each, and forgets what was in them
//   end_tiles()                forgets tiles and shapes
//   zero_tile<t>()  load_tile<t>(from, stride)  store_tile<t>(to, stride): the stride is in bytes
//   dot_tiles<c, a, b>(): c[m][n] += sum over the 64 columns k of a[m][k] * b[k / 4][4 n + k % 4], signed bytes
//   dot_tiles_us<c, a, b>(): the same, a unsigned
//   dot_tiles_bf16<c, a, b>(): c[m][n] += the sum over even columns k plus that over odd ones, each a chain of fused
//     multiply-adds of a[m][k] * b[k / 2][2 n + k % 2], BF16, over the 32 columns; operands and sums are not subnormal
#pragma once

struct Tile {
  int rows;
  uint8_t bytes[kTileRows][kTileColumns];
};
struct TileState {
  Tile tile[8];
};
inline TileState& tiles() {
  static thread_local TileState state{};
  return state;
}

inline void end_tiles() { tiles() = {}; }
inline void begin_tiles(int top_rows, int bottom_rows) {
  end_tiles();
  for (int tile = 0; tile < 8; ++tile) tiles().tile[tile].rows = rows_of_tile(tile, top_rows, bottom_rows);
}

template <int tile>
inline void zero_tile() {
  __builtin_memset(tiles().tile[tile].bytes, 0, sizeof(Tile::bytes));
}
template <int tile>
inline void load_tile(const void* p, int64_t stride) {
  Tile& t = tiles().tile[tile];
  for (int m = 0; m < t.rows; ++m) __builtin_memcpy(t.bytes[m], static_cast<const uint8_t*>(p) + m * stride, 64);
}
template <int tile>
inline void load_tile_once(const void* p, int64_t stride) {
  load_tile<tile>(p, stride);
}
template <int tile>
inline void store_tile(void* p, int64_t stride) {
  const Tile& t = tiles().tile[tile];
  for (int m = 0; m < t.rows; ++m) __builtin_memcpy(static_cast<uint8_t*>(p) + m * stride, t.bytes[m], 64);
}
template <class Dot>
inline void dot_emulated(Tile& c, const Tile& a, const Tile& b, Dot dot) {
  for (int m = 0; m < c.rows; ++m) {
    I32 sum = load(reinterpret_cast<const int32_t*>(c.bytes[m]));
    for (int line = 0; line < kTileRows; ++line)
      sum = dot(sum, set1_quad(a.bytes[m] + 4 * line), load_quads(b.bytes[line]));
    store(reinterpret_cast<int32_t*>(c.bytes[m]), sum);
  }
}
template <int sums, int rows, int weights>
inline void dot_tiles() {
  Tile(&t)[8] = tiles().tile;
  dot_emulated(t[sums], t[rows], t[weights], [](I32 sum, Quads a, Quads b) { return dot_ss(sum, b, a); });
}
template <int sums, int rows, int weights>
inline void dot_tiles_bf16() {
  Tile& c = tiles().tile[sums];
  const Tile &a = tiles().tile[rows], &b = tiles().tile[weights];
  for (int m = 0; m < c.rows; ++m) {
    F32 even = set1(0.0f), odd = set1(0.0f);
    for (int line = 0; line < kTileRows; ++line) {
      int32_t two;
      __builtin_memcpy(&two, a.bytes[m] + 4 * line, sizeof two);
      const I32 x = set1(two), w = load(reinterpret_cast<const int32_t*>(b.bytes[line]));
      even = fma(low_bf16(x), low_bf16(w), even);
      odd = fma(high_bf16(x), high_bf16(w), odd);
    }
    float* sum = reinterpret_cast<float*>(c.bytes[m]);
    store(sum, add(load(sum), add(even, odd)));
  }
}
template <int sums, int rows, int weights>
inline void dot_tiles_us() {
  Tile(&t)[8] = tiles().tile;
  dot_emulated(t[sums], t[rows], t[weights], [](I32 sum, Quads a, Quads b) { return dot_us(sum, a, b); });
}
