// Anonymous memory by the page: zero until written, backed by huge pages where the system allows, given back at the
// end. Keys and values, the arena of a program and the probes' buffers live here, never in the heap.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <utility>

namespace snello {

class Memory {
 public:
  static constexpr uint64_t kHugePage = uint64_t{2} << 20;
  static constexpr uint64_t kPage = 4096;

  Memory() = default;
  // Throws std::bad_alloc. Nothing is touched, so nothing is resident yet.
  explicit Memory(uint64_t bytes) {
    const uint64_t slack = bytes >= kHugePage ? kHugePage : 0;  // to start at a huge page
    mapped_bytes_ = bytes + slack;
    mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
    const uint64_t begin = reinterpret_cast<uint64_t>(mapped_);
    data_ = reinterpret_cast<uint8_t*>(slack ? (begin + slack - 1) / slack * slack : begin);
    bytes_ = bytes;
#if defined(MADV_HUGEPAGE)
    if (slack) madvise(data_, bytes_, MADV_HUGEPAGE);  // advice: a refusal costs speed alone
#endif
  }
  ~Memory() {
    if (mapped_ != MAP_FAILED) munmap(mapped_, mapped_bytes_);
  }
  Memory(Memory&& other) noexcept
      : mapped_(std::exchange(other.mapped_, MAP_FAILED)),
        mapped_bytes_(other.mapped_bytes_),
        bytes_(other.bytes_),
        data_(other.data_) {}
  Memory& operator=(Memory&&) = delete;

  uint8_t* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }
  // Makes [0, bytes) resident, so that no page fault falls into a step.
  void touch(uint64_t bytes) const {
    for (uint64_t at = 0; at < bytes; at += kPage) static_cast<volatile uint8_t*>(data_)[at] = 0;
  }

 private:
  void* mapped_ = MAP_FAILED;
  uint64_t mapped_bytes_ = 0, bytes_ = 0;
  uint8_t* data_ = nullptr;
};

inline uint64_t round_up(uint64_t value, uint64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace snello
