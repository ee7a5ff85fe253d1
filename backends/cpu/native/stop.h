// The end of the process with a word: the C interface has no way to tell of an error, and none may cross it silently.
#pragma once

#include <stdio.h>
#include <stdlib.h>

namespace tp {

// Prints one line to standard error and aborts.
[[noreturn]] inline void stop(const char* what, const char* why) {
  fprintf(stderr, "tokenplane-cpu: %s: %s\n", what, why);
  abort();
}

inline void require(bool holds, const char* what, const char* why) {
  if (!holds) stop(what, why);
}

}  // namespace tp
