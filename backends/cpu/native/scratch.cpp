#include "scratch.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>

#include "stop.h"

namespace tp {

void Scratch::allocate(size_t bytes) {
  release();
  bytes_ = std::max<size_t>(bytes, 1);
  memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  // Mostly it is address space that is short; memory, too, where the system promises no more than it has
  // (vm.overcommit_memory=2), for MAP_NORESERVE means nothing then.
  if (memory_ == MAP_FAILED) stop("no memory for a program", strerror(errno));
}

Scratch::~Scratch() { release(); }

void Scratch::release() {
  if (memory_) munmap(memory_, bytes_);
}

}  // namespace tp
