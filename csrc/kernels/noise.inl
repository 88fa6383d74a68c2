// What a draw over a vocabulary needs of all its tokens: their logits by the temperature, where the large ones are, and
// the random words that they are drawn with: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
// 3", 2011), 16 counters at a time.
#pragma once

constexpr int kDrawBlock = 4 * kLanes;

// to = from / divisor, unless `to` is null, and the largest of every 64 of them.
inline void by_temperature(const float* from, float divisor, int n, float* to, float* maxima) {
  for (int begin = 0; begin < n; begin += kDrawBlock) {
    F32 highest = set1(-__builtin_inff());
    for (int i = begin; i < n && i < begin + kDrawBlock; i += kLanes) {
      F32 x = n - i < kLanes ? load_partial(from + i, n - i, -__builtin_inff()) : load(from + i);
      if (to) x = div(x, set1(divisor));
      if (to && n - i >= kLanes) store(to + i, x);
      if (to && n - i < kLanes) store_partial(to + i, x, n - i);
      highest = max(x, highest);
    }
    *maxima++ = reduce_max(highest);
  }
}

// Of the 64 tokens 4 * quad and on: words[w][lane] is that of token 4 * (quad + lane) + w. Returns which of them have
// at least `least` in their upper 24 bits: bit 16 * w + lane.
inline uint64_t noise(uint64_t seed, uint32_t quad, uint64_t position, uint32_t least, uint32_t* words) {
  const auto lower = [](uint64_t x) { return static_cast<int32_t>(static_cast<uint32_t>(x)); };
  const I32 first = set1(lower(0xD2511F53u)), second = set1(lower(0xCD9E8D57u));
  I32 c[4] = {add(load(kAscending), set1(lower(quad))), set1(lower(position)), set1(lower(position >> 32)), set1(0)};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    const Wide p0 = multiply_wide(c[0], first), p1 = multiply_wide(c[2], second);
    c[0] = bit_xor(bit_xor(p1.high, c[1]), set1(lower(key0)));
    c[1] = p1.low;
    c[2] = bit_xor(bit_xor(p0.high, c[3]), set1(lower(key1)));
    c[3] = p0.low;
  }
  uint64_t some = 0;
  for (int w = 0; w < 4; ++w) {
    store(reinterpret_cast<int32_t*>(words) + w * kLanes, c[w]);
    const Mask enough = mask_not(less(shift_right_logical<8>(c[w]), set1(lower(least))));
    some |= uint64_t{bits(enough)} << (w * kLanes);
  }
  return some;
}
