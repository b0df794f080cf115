#include "processor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fusedrnn {
namespace {

bool is_zen4() {
#if defined(__x86_64__)
  // Of AMD's family 0x19, Zen 3 and 4, only Zen 4 has AVX-512. The bit that says how wide the data path is (FP512 of
  // leaf 0x8000001a) is hidden from guests.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
  return family == 0x19;
#else
  return false;
#endif
}

}  // namespace

bool multiplies_512_bits() {
  static const bool result = !is_zen4();
  return result;
}

}  // namespace fusedrnn
