// Products of unsigned codes with signed activations on their way to the group's scale: sums of 32 bits. A lanes/*.h
// includes this after its dot_us(), unless it has sums of its own (see products_avx2.h).
#pragma once

struct GroupSum {
  static constexpr int kMostColumns = 128;  // that one sum has room for
  I32 v;
  LANES static GroupSum start(int32_t x) { return {set1(x)}; }
  LANES void take(Quads codes, Quads activations) { v = dot_us(v, codes, activations); }
  LANES static I32 scale(I32 s) { return s; }
  LANES I32 scaled(I32 acc, I32 scale) const { return add(acc, mul(v, scale)); }
};
