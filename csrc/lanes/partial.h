// The first n of 16 values, where no instruction loads or stores so few: a lanes/*.h includes this after what loads and
// stores all.
#pragma once

// A tail goes through 16 values on the stack: no byte outside the n is touched.
template <class T>
struct Tail {
  alignas(64) T values[kLanes];
  Tail() {}
  Tail(const T* p, int n, T fill) {
    for (int i = 0; i < kLanes; ++i) values[i] = i < n ? p[i] : fill;
  }
  void copy_to(T* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = values[i];
  }
};
LANES F32 load_partial(const float* p, int n, float fill = 0) { return load(Tail<float>(p, n, fill).values); }
LANES I32 load_partial(const int32_t* p, int n, int32_t fill = 0) { return load(Tail<int32_t>(p, n, fill).values); }
template <class T, class Store, class Value>
LANES void store_tail(T* p, Value x, int n, Store store_all) {
  Tail<T> tail;
  store_all(tail.values, x);
  tail.copy_to(p, n);
}
LANES void store_partial(float* p, F32 x, int n) {
  store_tail(p, x, n, [](float* q, F32 y) { store(q, y); });
}
LANES void store_partial(int32_t* p, I32 x, int n) {
  store_tail(p, x, n, [](int32_t* q, I32 y) { store(q, y); });
}

LANES F32 load_f16_partial(const uint16_t* p, int n) { return load_f16(Tail<uint16_t>(p, n, 0).values); }
LANES F32 load_bf16_partial(const uint16_t* p, int n) { return load_bf16(Tail<uint16_t>(p, n, 0).values); }
LANES void store_f16_partial(uint16_t* p, F32 x, int n) {
  store_tail(p, x, n, [](uint16_t* q, F32 y) { store_f16(q, y); });
}
LANES void store_bf16_partial(uint16_t* p, F32 x, int n) {
  store_tail(p, x, n, [](uint16_t* q, F32 y) { store_bf16(q, y); });
}
LANES I32 load_s8_partial(const int8_t* p, int n) { return load_s8(Tail<int8_t>(p, n, 0).values); }
LANES I32 load_u8_partial(const uint8_t* p, int n) { return load_u8(Tail<uint8_t>(p, n, 0).values); }
LANES void store_s8_partial(int8_t* p, I32 x, int n) {
  store_tail(p, x, n, [](int8_t* q, I32 y) { store_s8(q, y); });
}
