// Pieces of one memory, for what a kernel works in.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace tp {
namespace {  // see isa.h

// Pieces begin at multiples of 64 bytes. Without memory it gives null, and `used` says how much is needed.
struct Arena {
  uint8_t* memory;
  size_t used = 0;

  template <class T>
  T* take(size_t count) {
    uint8_t* at = memory ? memory + used : nullptr;
    used += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }
};

}  // namespace
}  // namespace tp
