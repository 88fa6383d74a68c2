// What products of BF16 are tried on before they are trusted: numbers of any sign and mantissa, of the exponents that
// the core's products take: 2^-56 and up, zeros among them.
#pragma once

inline void fill_halves(uint32_t* state, uint16_t* to, int count) {
  for (int i = 0; i < count; ++i) {
    const uint32_t random = *state = *state * 1664525 + 1013904223, exponent = 71 + (random >> 8) % 110;
    to[i] = random % 16 == 0 ? uint16_t{0} : static_cast<uint16_t>((random >> 16 & 0x807f) | exponent << 7);
  }
}
