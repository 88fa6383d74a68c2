// Which instruction sets this processor and its operating system run, and which one the process uses.
//
// The selection is one atomic pointer: the first use selects the best set, snello_isa_select replaces it. Kernels read
// it once per operation, so a change between steps is safe and a change during one is merely pointless.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace snello {
namespace {

#if defined(__x86_64__)
struct Cpuid {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  Cpuid(uint32_t leaf, uint32_t subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

bool bit(uint32_t word, int index) { return (word >> index & 1) != 0; }

// The register states that the operating system saves (XCR0); 0 where it saves none.
uint64_t saved_states() {
  constexpr int kOsxsave = 27;
  if (!bit(Cpuid(1, 0).ecx, kOsxsave)) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool runs_avx2() {
  constexpr uint64_t kYmmState = 0x6;
  const Cpuid one(1, 0), seven(7, 0);
  constexpr int kFma = 12, kAvx = 28, kF16c = 29, kAvx2 = 5;
  return bit(one.ecx, kFma) && bit(one.ecx, kAvx) && bit(one.ecx, kF16c) && bit(seven.ebx, kAvx2) &&
         (saved_states() & kYmmState) == kYmmState;
}

bool runs_avxvnni() {
  constexpr int kAvxVnni = 4;
  return runs_avx2() && bit(Cpuid(7, 1).eax, kAvxVnni);
}

bool runs_avx512vnni() {
  constexpr uint64_t kZmmState = 0xe6;
  const Cpuid seven(7, 0);
  constexpr int kF = 16, kDq = 17, kBw = 30, kVl = 31, kVnni = 11;
  return runs_avx2() && bit(seven.ebx, kF) && bit(seven.ebx, kDq) && bit(seven.ebx, kBw) && bit(seven.ebx, kVl) &&
         bit(seven.ecx, kVnni) && (saved_states() & kZmmState) == kZmmState;
}

bool runs_avx512bf16() {
  constexpr int kBf16 = 5;
  return runs_avx512vnni() && bit(Cpuid(7, 1).eax, kBf16);
}
#endif

#if defined(__aarch64__)
// Linux's numbers (asm/hwcap.h), which headers older than a processor do not name.
bool runs_dotprod() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }
bool runs_i8mm() { return runs_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }
#endif

#if defined(__x86_64__)
bool runs_amx() { return runs_avx512vnni() && trust_in_amx() == Amx::kTrusted; }
#endif
bool always() { return true; }

struct Candidate {
  const Kernels* kernels;
  bool (*runs)();
  bool listed = true;  // others are for tests: they run only where they are named
};

// Best first.
constexpr Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&kAmxKernels, runs_amx},
    {&kAvx512VnniKernels, runs_avx512vnni},
    {&kAvxVnniKernels, runs_avxvnni},
    {&kAvx2Kernels, runs_avx2},
#elif defined(__aarch64__)
    {&kNeonI8mmKernels, runs_i8mm},
    {&kNeonDotprodKernels, runs_dotprod},
#endif
    {&kScalarKernels, always},
#if defined(__x86_64__)
    {&kAvx512VnniFmaKernels, runs_avx512vnni, false},
    {&kAvxVnniEvexKernels, runs_avx512vnni, false},
#endif
    {&kAmxEmulatedKernels, always, false},
    {&kBf16EmulatedKernels, always, false},
};

std::atomic<const Kernels*> selected{nullptr};

const Kernels* best() {
  for (const Candidate& candidate : kCandidates)
    if (candidate.runs()) return candidate.kernels;
  return &kScalarKernels;
}

struct Names {
  char text[128] = "";
  Names() {
    for (const Candidate& candidate : kCandidates) {
      if (!candidate.listed || !candidate.runs()) continue;
      if (text[0]) std::strcat(text, ",");
      std::strcat(text, candidate.kernels->name);
    }
  }
};

}  // namespace

bool trust_in_half_dots() {
#if defined(__x86_64__)
  static const bool found = runs_avx512bf16() && half_dots_agree();
  return found;
#else
  return false;
#endif
}

const Kernels& kernels() {
  const Kernels* chosen = selected.load(std::memory_order_acquire);
  if (chosen) return *chosen;
  const Kernels* none = nullptr;
  selected.compare_exchange_strong(none, best(), std::memory_order_acq_rel);
  return *selected.load(std::memory_order_acquire);
}

const char* available_isas() {
  static const Names names;
  return names.text;
}

const char* select_isa(const char* name) {
  if (!name) name = std::getenv("SNELLO_ISA");
  if (!name || !name[0]) {
    selected.store(best(), std::memory_order_release);
    return kernels().name;
  }
  for (const Candidate& candidate : kCandidates) {
    if (std::strcmp(candidate.kernels->name, name) != 0) continue;
    if (!candidate.runs()) {
      fail("this CPU cannot run the instruction set '%s'; it runs %s", name, available_isas());
      return nullptr;
    }
    selected.store(candidate.kernels, std::memory_order_release);
    return candidate.kernels->name;
  }
  fail("unknown instruction set '%s'; this CPU runs %s", name, available_isas());
  return nullptr;
}

}  // namespace snello

extern "C" {
const char* snello_isa_select(const char* name) { return snello::select_isa(name); }
const char* snello_isa_available(void) { return snello::available_isas(); }
int32_t snello_multiplies_bf16(void) {
  const snello::Kernels& k = snello::kernels();
  return k.multiplies_halves != nullptr && k.multiplies_halves() ? 1 : 0;
}
}
