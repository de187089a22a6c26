// What the C++ tests need of a framework: CHECK, and a count of failures for main to return.
#pragma once

#include <cstdio>

namespace squat::test {

inline int failures = 0;

inline bool check(bool ok, const char* what, const char* file, int line) {
  if (!ok) {
    ++failures;
    std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
  }
  return ok;
}

inline int report(const char* program) {
  std::printf("%s: %s\n", program, failures == 0 ? "passed" : "FAILED");
  return failures == 0 ? 0 : 1;
}

}  // namespace squat::test

#define CHECK(condition) ::squat::test::check((condition), #condition, __FILE__, __LINE__)
