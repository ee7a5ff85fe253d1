// Memory that a program works in.
#pragma once

#include <stddef.h>

namespace tp {

// Memory that is committed when first used, freed with the object or when other memory is allocated.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch();
  void allocate(size_t bytes);  // what it had is lost; without memory the process stops with a message
  size_t bytes() const { return bytes_; }

  template <class T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  void release();

  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace tp
