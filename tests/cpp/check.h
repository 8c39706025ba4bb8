// What every test program shares: a failed CHECK is printed, and makes the program return 1.
#pragma once
#include <cstdio>

namespace check {

inline int failures = 0;

inline int result() {
  if (failures) std::printf("%d checks failed\n", failures);
  return failures != 0;
}

}  // namespace check

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);          \
      std::printf(" " __VA_ARGS__);                                        \
      std::printf("\n");                                                   \
      ++check::failures;                                                   \
    }                                                                      \
  } while (0)
