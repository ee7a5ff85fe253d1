#include "team.h"

#include <linux/futex.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "stop.h"
#include "tokenplane_cpu.h"

namespace tp {
namespace {

// How long a thread looks before it gives its core away: a step's pieces are much shorter, the pause between two
// steps of a busy engine mostly is.
constexpr int kSpins = 1 << 13;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A value that threads wait on: they look for a while, then sleep until its upper 32 bits change.
template <class T>
struct Word {
  std::atomic<T> value{0};
  std::atomic<int> sleepers{0};

  // Returns when done(value) holds; that value.
  template <class Done>
  T wait(Done&& done) {
    for (int i = 0; i < kSpins; ++i) {
      const T now = value.load(std::memory_order_acquire);
      if (done(now)) return now;
      pause();
    }
    // Someone is not running: the machine has other work, too. To sleep is to be back on a core soon after the wake.
    sleepers.fetch_add(1);
    T now = value.load();
    for (; !done(now); now = value.load()) futex(FUTEX_WAIT_PRIVATE, uint32_t(now >> (8 * sizeof(T) - 32)));
    sleepers.fetch_sub(1);
    return now;
  }

  // To be called after a change.
  void wake() {
    if (sleepers.load() > 0) futex(FUTEX_WAKE_PRIVATE, INT32_MAX);
  }

 private:
  void futex(int operation, uint32_t value_or_count) {
    static_assert(sizeof value == sizeof(T) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the upper half comes last");
    uint32_t* upper = reinterpret_cast<uint32_t*>(&value) + sizeof(T) / 4 - 1;
    syscall(SYS_futex, upper, operation, value_or_count, nullptr, nullptr, 0);
  }
};

constexpr uint32_t kClosed = 1u << 31;

}  // namespace

struct Pool::State {
  int threads;
  std::vector<std::thread> workers;
  // Each on its own cache line: threads spin on one while others write the next.
  alignas(64) Word<uint64_t> ticket;         // upper half: the operation under way; lower half: its next item
  alignas(64) std::atomic<int> num_done{0};  // of its items
  alignas(64) Word<uint32_t> inside;         // workers in the task; with kClosed: none may enter any more
  alignas(64) Word<uint32_t> tasks;          // counts tasks begun, and may start again at 0
  Task task = nullptr;
  void* context = nullptr;
  std::atomic<bool> stopping{false};

  void open(Task new_task, void* new_context) {
    task = new_task, context = new_context;
    ticket.value.store(uint64_t(1) << 32, std::memory_order_relaxed);
    inside.value.store(0, std::memory_order_release);
    tasks.value.fetch_add(1);
    tasks.wake();
  }

  // What the task points to is the caller's, who goes on after this.
  void close() {
    inside.value.fetch_or(kClosed);
    inside.wait([](uint32_t now) { return now == kClosed; });
  }

  bool enter() {
    uint32_t now = inside.value.load(std::memory_order_acquire);
    while (!(now & kClosed))
      if (inside.value.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) return true;
    return false;
  }

  void leave() {
    inside.value.fetch_sub(1);
    inside.wake();
  }
};

// Half of a thread's share of what is left, so that all are done at nearly the same time.
// Source: guided self-scheduling (Polychronopoulos and Kuck, IEEE Transactions on Computers, 1987).
Team::Items Team::take(int items) {
  std::atomic<uint64_t>& ticket = pool_.state_->ticket.value;
  uint64_t now = ticket.load(std::memory_order_acquire);
  while (now >> 32 == operation_ && int(uint32_t(now)) < items) {
    const int first = int(uint32_t(now)), count = std::max(1, (items - first) / (2 * threads));
    if (ticket.compare_exchange_weak(now, now + count, std::memory_order_acq_rel)) return {first, first + count};
  }
  return {0, 0};
}

void Team::did(int count, int items) {
  Pool::State& state = *pool_.state_;
  if (state.num_done.fetch_add(count, std::memory_order_acq_rel) + count < items) return;
  state.num_done.store(0, std::memory_order_relaxed);
  state.ticket.value.store(uint64_t(operation_ + 1) << 32);
  state.ticket.wake();
}

void Team::wait_for_others() {
  pool_.state_->ticket.wait([this](uint64_t now) { return now >> 32 > operation_; });
}

Pool::Pool(int threads) : state_(new State) {
  state_->threads = std::max(1, threads);
  state_->inside.value.store(kClosed);
  const auto work = [this](int thread) {
    for (uint32_t seen = 0;;) {
      seen = state_->tasks.wait([seen](uint32_t now) { return now != seen; });
      if (state_->stopping.load(std::memory_order_acquire)) return;
      if (!state_->enter()) continue;
      Team team(*this, thread, state_->threads);
      state_->task(state_->context, team);
      state_->leave();
    }
  };
  try {
    for (int i = 1; i < state_->threads; ++i) state_->workers.emplace_back(work, i);
  } catch (const std::system_error& error) {
    stop("the system starts no more threads", error.what());
  }
}

Pool::~Pool() {
  state_->stopping.store(true, std::memory_order_release);
  state_->tasks.value.fetch_add(1);
  state_->tasks.wake();
  for (auto& worker : state_->workers) worker.join();
}

void Pool::run(Task task, void* context) {
  Team team(*this, 0, state_->threads);
  if (state_->threads > 1) state_->open(task, context);
  task(context, team);
  if (state_->threads > 1) state_->close();
}

int Pool::size() const { return state_->threads; }

namespace {
std::unique_ptr<Pool> the_pool;
}

Pool& pool() {
  if (!the_pool) the_pool.reset(new Pool(1));
  return *the_pool;
}

}  // namespace tp

extern "C" TP_API void tp_set_threads(int threads) {
  tp::the_pool.reset();
  tp::the_pool.reset(new tp::Pool(threads));
}
