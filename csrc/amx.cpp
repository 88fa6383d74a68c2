// Whether AMX can be trusted. Linux gives the tiles to a process that asks; some virtual machines then lose them when
// the processor is taken away for a moment, without a sign or with a fault. So before the first use some children of
// this process, more than they have processors, multiply tiles beside each other and check every product. A child that
// faults takes nothing with it.
#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <initializer_list>

#include "children.h"

namespace snello {
namespace {

constexpr int kChildren = 4, kProcessors = 2;
constexpr double kTestSeconds = 0.02;  // some time slices
constexpr int kMostWait = 2000;        // milliseconds

constexpr uint32_t kBf16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25;
bool has(uint32_t features) {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & features) == features;
}

// Asks the kernel for the tiles' state, for all threads of this process and its children.
bool permitted() {
  constexpr long kRequestState = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
}

bool hold_in_child(int processor) {
  for (int number : {SIGILL, SIGSEGV, SIGBUS, SIGFPE}) signal(number, SIG_DFL);  // nobody's handler is to speak
  const rlimit none{0, 0};
  setrlimit(RLIMIT_CORE, &none);
  cpu_set_t all, one;
  CPU_ZERO(&one);
  if (sched_getaffinity(0, sizeof all, &all) == 0) {
    int found = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE && found <= processor; ++cpu)
      if (CPU_ISSET(cpu, &all) && found++ == processor) CPU_SET(cpu, &one);
    if (CPU_COUNT(&one) == 1) sched_setaffinity(0, sizeof one, &one);
  }
  return tiles_hold(kTestSeconds);
}

bool tiles_hold_under_load() {
  return all_children_say_yes(kChildren, kMostWait, [](int number) { return hold_in_child(number % kProcessors); });
}

Amx find_out() {
  if (!has(kTiles | kInt8)) return Amx::kAbsent;
  if (!permitted()) return Amx::kRefused;
  return tiles_hold_under_load() ? Amx::kTrusted : Amx::kFailed;
}

}  // namespace

Amx trust_in_amx() {
  static const Amx found = find_out();
  return found;
}

// Tiles have been trusted by then, so nothing here can fault or be lost.
bool trust_in_bf16_tiles() {
  static const bool found = trust_in_amx() == Amx::kTrusted && has(kBf16) && bf16_tiles_agree();
  return found;
}

}  // namespace snello
#else
snello::Amx snello::trust_in_amx() { return Amx::kAbsent; }
bool snello::trust_in_bf16_tiles() { return false; }
#endif

extern "C" const char* snello_amx(void) {
  switch (snello::trust_in_amx()) {
    case snello::Amx::kAbsent: return "absent";
    case snello::Amx::kRefused: return "refused";
    case snello::Amx::kFailed: return "failed";
    case snello::Amx::kTrusted: return "trusted";
  }
  return "absent";
}
