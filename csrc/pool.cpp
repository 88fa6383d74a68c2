// Threads: see pool.h. What makes it correct without a lock per job is that chunks are claimed by one compare-and-swap
// on (job number, chunks left of a share), so nothing of a job is read before a chunk of that very job is owned, and
// the leader changes the job only after all its chunks are finished.
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
constexpr int64_t kMaxChunks = 0xffff;

// Chunks [begin, end) of a job's share.
struct Left {
  uint32_t epoch, begin, end;
};
uint64_t packed(Left left) { return uint64_t{left.epoch} << 32 | left.begin << 16 | left.end; }
Left unpacked(uint64_t state) {
  const auto low = static_cast<uint32_t>(state);
  return {static_cast<uint32_t>(state >> 32), low >> 16, low & 0xffff};
}

// The owner's claims reach to `end`, or as far as nobody else has claimed; returns how far.
uint32_t claim_up_to(uint32_t end, std::atomic<uint64_t>* share) {
  uint64_t state = share->load(std::memory_order_acquire);
  while (true) {
    const Left left = unpacked(state);
    const uint32_t reached = std::min(end, left.end);
    if (reached <= left.begin) return left.begin;
    if (share->compare_exchange_weak(state, packed({left.epoch, reached, left.end}), std::memory_order_acq_rel,
                                     std::memory_order_acquire))
      return reached;
  }
}

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

Pool::Pool(int num_threads)
    : num_threads_(num_threads), shares_(std::make_unique<Share[]>(static_cast<size_t>(num_threads))) {
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
  chunk = std::max(chunk, (num_items + kMaxChunks - 1) / kMaxChunks);
  const auto num_chunks = static_cast<uint32_t>((num_items + chunk - 1) / chunk);
  const auto threads = static_cast<uint32_t>(num_threads());
  job_ = job;
  context_ = context;
  num_items_ = num_items;
  chunk_ = chunk;
  first_ = static_cast<uint32_t>(std::clamp<int64_t>(first / chunk, 1, num_chunks));
  ++epoch_;
  pending_.store(num_chunks, std::memory_order_relaxed);
  for (uint32_t t = 0; t < threads; ++t) {
    const Left share{epoch_, num_chunks * t / threads, num_chunks * (t + 1) / threads};
    shares_[t].left.store(packed(share), std::memory_order_release);
  }
  signal_.fetch_add(1);  // sequentially consistent, as the count of sleepers is: one of the two sides sees the other
  if (sleepers_.load() != 0) signal_.notify_all();
  help(0);
  if (spin_until([this] { return pending_.load(std::memory_order_acquire) == 0; })) return;
  while (const uint32_t left = pending_.load(std::memory_order_acquire)) pending_.wait(left);
}

// Claims chunks until none is left. Finished chunks are reported together: until then the job cannot change.
void Pool::help(int worker) noexcept {
  uint32_t finished = work_off(worker);
  for (int i = 1; i < num_threads(); ++i) {
    const int victim = (worker + i) % num_threads();
    while (const uint32_t taken = take_from(victim, worker)) finished += taken;
  }
  if (finished == 0) return;
  if (pending_.fetch_sub(finished, std::memory_order_acq_rel) == finished && worker != 0) pending_.notify_one();
}

// One's own share, from its beginning.
uint32_t Pool::work_off(int worker) noexcept {
  std::atomic<uint64_t>& share = shares_[static_cast<size_t>(worker)].left;
  uint32_t finished = 0;
  uint64_t state = share.load(std::memory_order_acquire);
  for (Left left = unpacked(state); left.begin < left.end; left = unpacked(state)) {
    // How long a first claim is belongs to the job, which is not to be read before something of it is owned.
    if (!share.compare_exchange_weak(state, packed({left.epoch, left.begin + 1, left.end}), std::memory_order_acq_rel,
                                     std::memory_order_acquire))
      continue;
    const uint32_t end = finished == 0 ? claim_up_to(left.begin + first_, &share) : left.begin + 1;
    do_chunks(worker, left.begin, end);
    finished += end - left.begin;
    state = share.load(std::memory_order_acquire);
  }
  return finished;
}

// Half of what is left of another's share, from its end: 0 if nothing is.
uint32_t Pool::take_from(int victim, int worker) noexcept {
  std::atomic<uint64_t>& share = shares_[static_cast<size_t>(victim)].left;
  uint64_t state = share.load(std::memory_order_acquire);
  for (Left left = unpacked(state); left.begin < left.end; left = unpacked(state)) {
    const uint32_t begin = left.end - (left.end - left.begin + 1) / 2;
    if (!share.compare_exchange_weak(state, packed({left.epoch, left.begin, begin}), std::memory_order_acq_rel,
                                     std::memory_order_acquire))
      continue;
    do_chunks(worker, begin, left.end);
    return left.end - begin;
  }
  return 0;
}

void Pool::do_chunks(int worker, uint32_t begin, uint32_t end) noexcept {
  job_(context_, worker, begin * chunk_, std::min(end * chunk_, num_items_));
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
