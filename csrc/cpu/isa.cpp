#include "isa.h"

#include <atomic>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace qwen3_fp8_ascend::cpu {
namespace {

#if defined(__x86_64__)

struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Cpuid cpuid(unsigned leaf, unsigned subleaf = 0) {
  Cpuid r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool has_bits(unsigned word, std::initializer_list<int> bits) {
  for (const int bit : bits) {
    if ((word >> bit & 1u) == 0) return false;
  }
  return true;
}

// Cores that differ in what is cheap.
enum class Cores { intel, zen4, other };

Cores find_cores() {
  const auto is_named = [name = cpuid(0)](unsigned ebx, unsigned edx, unsigned ecx) {
    return name.ebx == ebx && name.edx == edx && name.ecx == ecx;
  };
  if (is_named(0x756e6547, 0x49656e69, 0x6c65746e)) return Cores::intel;  // "GenuineIntel"
  const unsigned eax = cpuid(1).eax;
  const unsigned family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
  // "AuthenticAMD"; Zen 3 is of that family too, and has no AVX-512.
  return is_named(0x68747541, 0x69746e65, 0x444d4163) && family == 0x19 ? Cores::zen4 : Cores::other;
}

Cores cores() {
  static const Cores found = find_cores();
  return found;
}

// The register states that the operating system saves (XCR0).
unsigned saved_states() {
  unsigned low = 0;
  unsigned high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Linux gives a process the AMX tile state only on request.
bool request_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  // Bit numbers are those of the Intel SDM, volume 2, CPUID.
  const Cpuid basic = cpuid(1);
  if (!has_bits(basic.ecx, {12 /* FMA */, 27 /* OSXSAVE */, 28 /* AVX */, 29 /* F16C */})) return Isa::portable;
  const unsigned states = saved_states();
  const Cpuid extended = cpuid(7);
  if (!has_bits(states, {1, 2}) || !has_bits(extended.ebx, {5 /* AVX2 */})) return Isa::portable;
  const Cpuid more = cpuid(7, 1);
  const bool avx512f =
      has_bits(states, {5, 6, 7}) && has_bits(extended.ebx, {16 /* F */, 17 /* DQ */, 30 /* BW */, 31 /* VL */});
  if (!avx512f) return Isa::avx2;
  const bool avx512 = has_bits(extended.ecx, {1 /* VBMI */, 6 /* VBMI2 */}) && has_bits(more.eax, {5 /* BF16 */});
  if (!avx512) return Isa::avx512f;
  const bool amx =
      has_bits(states, {17, 18}) && has_bits(extended.edx, {22 /* AMX-BF16 */, 24 /* AMX-TILE */}) && request_tiles();
  if (amx) return Isa::amx;
  // Intel's cores, where it was measured, do twice as many fp32 multiply-adds in a second as products of bf16 pairs.
  return cores() == Cores::intel ? Isa::avx512f : Isa::avx512;
}

const Kernels& avx512_kernels(Cores cores) {
  switch (cores) {
    case Cores::intel: return kAvx512IntelKernels;
    case Cores::zen4: return kAvx512Zen4Kernels;
    case Cores::other: break;
  }
  return kAvx512Kernels;
}

#elif defined(__aarch64__)

// What -march=armv8.2-a+bf16 lets a compiler use. NEON itself belongs to AArch64.
bool has_bf16() {
#if defined(__linux__)
  // Bit numbers are those of Linux's arch/arm64/include/uapi/asm/hwcap.h, which older headers lack.
  constexpr unsigned long kArmv82 = 1ul << 7 /* CRC32 */ | 1ul << 8 /* ATOMICS */ | 1ul << 12 /* ASIMDRDM */;
  constexpr unsigned long kBf16 = 1ul << 14;
  return (getauxval(AT_HWCAP) & kArmv82) == kArmv82 && (getauxval(AT_HWCAP2) & kBf16) != 0;
#else
  return false;
#endif
}

Isa detect() { return has_bf16() ? Isa::neon_bf16 : Isa::neon; }

#else

Isa detect() { return Isa::portable; }

#endif

std::atomic<int>& current() {
  static std::atomic<int> level{static_cast<int>(best_isa())};
  return level;
}

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa current_isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

void set_isa(Isa isa) { current().store(static_cast<int>(isa), std::memory_order_relaxed); }

const Kernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::amx: return kAmxKernels;
    case Isa::avx512: return avx512_kernels(cores());
    case Isa::avx512f: return kAvx512fKernels;
    case Isa::avx2: return cores() == Cores::intel ? kAvx2IntelKernels : kAvx2Kernels;
    case Isa::portable: break;
  }
#elif defined(__aarch64__)
  switch (isa) {
    case Isa::neon_bf16: return kNeonBf16Kernels;
    case Isa::neon: return kNeonKernels;
    case Isa::portable: break;
  }
#else
  (void)isa;
#endif
  return kPortableKernels;
}

}  // namespace qwen3_fp8_ascend::cpu
