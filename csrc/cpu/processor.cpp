#include "processor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fusedrnn {
namespace {

// The family of a processor by AMD; 0 of any other.
unsigned amd_family() {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
  return (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
#else
  return 0;
#endif
}

}  // namespace

bool multiplies_512_bits() {
  // Of Zen 3 and 4, which are of one family, only Zen 4 has AVX-512. The bit that says how wide the data path is (FP512
  // of leaf 0x8000001a) is hidden from guests.
  static const bool result = amd_family() != 0x19;
  return result;
}

bool rereads_slowly() {
  static const bool result = amd_family() == 0x1a;
  return result;
}

}  // namespace fusedrnn
