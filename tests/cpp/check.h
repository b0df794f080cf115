// All the test framework there is: failed checks are printed and counted, and main returns whether there were any.
#pragma once

#include <cstdio>

namespace check {

inline int failures = 0;

// The first failures tell the story; a broken kernel would otherwise print one line per element.
constexpr int printed = 20;

inline int result() {
  if (failures > printed) std::printf("... and %d more\n", failures - printed);
  std::printf(failures ? "FAILED: %d checks\n" : "passed\n", failures);
  return failures ? 1 : 0;
}

}  // namespace check

// CHECK(condition, format, ...): the rest is printed where the condition does not hold.
#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition) && ++check::failures <= check::printed) {    \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (false)
