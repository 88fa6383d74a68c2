// Threads: see pool.h. What makes it correct without a lock per job is that a chunk is claimed by one compare-and-swap
// on (job number, chunks left), so nothing of a job is read before a chunk of that very job is owned, and the leader
// changes the job only after all its chunks are finished.
#include "pool.h"

#include <chrono>
#include <exception>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace snello {
namespace {

constexpr std::chrono::microseconds kSpin{50};
constexpr int kMaxThreads = 1024;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `done()` holds, for at most kSpin. The clock is read rarely: reading it costs more than a pause.
template <typename Done>
bool spin_until(Done done) {
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() - start < kSpin);
  return done();
}

#if defined(__x86_64__)
constexpr uint32_t kIeee = 0x1F80;         // exceptions masked, nearest, no FTZ, no DAZ
constexpr uint32_t kStickyFlags = 0x003F;  // what has happened, not how to compute
#endif

}  // namespace

#if defined(__x86_64__)
FloatEnvironment::FloatEnvironment() noexcept : saved_(_mm_getcsr()), changed_((saved_ & ~kStickyFlags) != kIeee) {
  if (changed_) _mm_setcsr(kIeee);
}
FloatEnvironment::~FloatEnvironment() {
  if (changed_) _mm_setcsr(static_cast<uint32_t>(saved_));
}
#elif defined(__aarch64__)
FloatEnvironment::FloatEnvironment() noexcept {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  changed_ = saved_ != 0;
  if (changed_) asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
}
FloatEnvironment::~FloatEnvironment() {
  if (changed_) asm volatile("msr fpcr, %0" : : "r"(saved_));
}
#else
FloatEnvironment::FloatEnvironment() noexcept : saved_(0), changed_(false) {}
FloatEnvironment::~FloatEnvironment() {}
#endif

Pool::Pool(int num_threads) {
  threads_.reserve(static_cast<size_t>(num_threads - 1));
  try {
    for (int worker = 1; worker < num_threads; ++worker) threads_.emplace_back([this, worker] { serve(worker); });
  } catch (...) {  // the machine has no more threads to give: end those that it gave
    stop_.store(true);
    signal_.fetch_add(1);
    signal_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    throw;
  }
}

Pool::~Pool() {
  stop_.store(true);
  signal_.fetch_add(1);
  signal_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Pool::wake() noexcept {
  if (threads_.empty() || sleepers_.load() == 0) return;
  signal_.fetch_add(1);
  signal_.notify_all();
}

void Pool::run(Job job, void* context, int64_t num_items, int64_t chunk, int64_t first) noexcept {
  const FloatEnvironment environment;
  if (num_items <= 0) return;
  if (threads_.empty() || num_items <= chunk) return job(context, 0, 0, num_items);
  job_ = job;
  context_ = context;
  num_items_ = num_items;
  chunk_ = chunk;
  first_ = first;
  const int64_t later = std::max<int64_t>(0, num_items - first * num_threads());
  num_chunks_ =
      static_cast<uint32_t>(later > 0 ? num_threads() + (later + chunk - 1) / chunk : (num_items + first - 1) / first);
  pending_.store(num_chunks_, std::memory_order_relaxed);
  cursor_.store(static_cast<uint64_t>(++epoch_) << 32 | num_chunks_, std::memory_order_release);
  signal_.fetch_add(1);  // sequentially consistent, as the count of sleepers is: one of the two sides sees the other
  if (sleepers_.load() != 0) signal_.notify_all();
  help(0);
  if (spin_until([this] { return pending_.load(std::memory_order_acquire) == 0; })) return;
  while (const uint32_t left = pending_.load(std::memory_order_acquire)) pending_.wait(left);
}

// Claims chunks until none is left. Finished chunks are reported together: until then the job cannot change.
void Pool::help(int worker) noexcept {
  uint32_t finished = 0;
  uint64_t state = cursor_.load(std::memory_order_acquire);
  while (const uint32_t left = static_cast<uint32_t>(state)) {
    if (!cursor_.compare_exchange_weak(state, state - 1, std::memory_order_acq_rel, std::memory_order_acquire))
      continue;
    const int64_t claim = num_chunks_ - left, long_claims = std::min<int64_t>(claim, num_threads());
    const int64_t begin = long_claims * first_ + (claim - long_claims) * chunk_;
    const int64_t end = begin + (claim < num_threads() ? first_ : chunk_);
    job_(context_, worker, begin, std::min(end, num_items_));
    ++finished;
    state = cursor_.load(std::memory_order_acquire);
  }
  if (finished == 0) return;
  if (pending_.fetch_sub(finished, std::memory_order_acq_rel) == finished && worker != 0) pending_.notify_one();
}

void Pool::serve(int worker) noexcept {
  const FloatEnvironment environment;
  while (true) {
    const uint32_t seen = signal_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_acquire)) return;
    help(worker);
    await_signal(seen);
  }
}

void Pool::await_signal(uint32_t seen) noexcept {
  if (spin_until([this, seen] { return signal_.load(std::memory_order_acquire) != seen; })) return;
  sleepers_.fetch_add(1);
  while (signal_.load() == seen) signal_.wait(seen);
  sleepers_.fetch_sub(1);
}

}  // namespace snello

extern "C" {

snello_pool* snello_pool_create(int32_t num_threads) {
  if (num_threads < 1 || num_threads > snello::kMaxThreads) {
    snello::fail("num_threads is %d: it must be 1 to %d", num_threads, snello::kMaxThreads);
    return nullptr;
  }
  try {
    return new snello_pool(num_threads);
  } catch (const std::exception& error) {
    snello::fail("cannot start %d threads: %s", num_threads, error.what());
    return nullptr;
  }
}

void snello_pool_destroy(snello_pool* pool) { delete pool; }

}  // extern "C"
