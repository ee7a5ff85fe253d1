#include "team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "stop.h"
#include "tokenplane_cpu.h"

namespace tp {
namespace {

// How long a thread looks before it gives its core away: a step's pieces are much shorter, the pause between two
// steps of a busy engine mostly is.
constexpr int kBarrierSpins = 1 << 13;
constexpr int kIdleSpins = 1 << 13;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void bind_to(int cpu) {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  CPU_SET(cpu, &cpus);
  pthread_setaffinity_np(pthread_self(), sizeof cpus, &cpus);  // a hint: without it the system places the thread
}

long futex(std::atomic<unsigned>* word, int operation, unsigned value) {
  static_assert(sizeof(std::atomic<unsigned>) == sizeof(uint32_t), "a futex has 32 bits");
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, nullptr, nullptr, 0);
}

}  // namespace

struct Pool::State {
  int threads;
  std::vector<std::thread> workers;
  // Each on its own cache line: threads spin on one while others write the next.
  alignas(64) std::atomic<unsigned> generation{0};  // counts barriers, and may start again at 0
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> next_item{0};
  alignas(64) std::atomic<int> sleepers{0};  // at the barrier
  alignas(64) std::atomic<unsigned> tasks{0};  // counts tasks begun; a worker waits for it to change
  Task task = nullptr;
  void* context = nullptr;
  std::atomic<bool> stopping{false};
  std::mutex mutex;
  std::condition_variable wake;
  int asleep = 0;

  void meet() {
    const unsigned now = generation.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived.store(0, std::memory_order_relaxed);
      next_item.store(0, std::memory_order_relaxed);
      generation.store(now + 1);
      if (sleepers.load() > 0) futex(&generation, FUTEX_WAKE_PRIVATE, unsigned(threads));
      return;
    }
    for (int spins = 0; spins < kBarrierSpins; ++spins) {
      if (generation.load(std::memory_order_acquire) != now) return;
      pause();
    }
    // Someone is not running: the machine has other work, too. To sleep is to be back on a core soon after the wake.
    sleepers.fetch_add(1);
    while (generation.load() == now) futex(&generation, FUTEX_WAIT_PRIVATE, now);
    sleepers.fetch_sub(1);
  }

  unsigned wait_for_task(unsigned seen) {
    for (int spins = 0; spins < kIdleSpins; ++spins) {
      const unsigned now = tasks.load(std::memory_order_acquire);
      if (now != seen) return now;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex);
    ++asleep;
    wake.wait(lock, [&] { return tasks.load(std::memory_order_acquire) != seen; });
    --asleep;
    return tasks.load(std::memory_order_acquire);
  }
};

void Team::barrier() {
  if (threads > 1) pool_.state_->meet();
}

int Team::take() { return pool_.state_->next_item.fetch_add(1, std::memory_order_relaxed); }

Pool::Pool(int threads, const int* cpus) : state_(new State) {
  state_->threads = std::max(1, threads);
  const auto work = [this](int thread, int cpu) {
    if (cpu >= 0) bind_to(cpu);
    Team team(*this, thread, state_->threads);
    for (unsigned seen = 0;;) {
      seen = state_->wait_for_task(seen);
      if (state_->stopping.load(std::memory_order_acquire)) return;
      state_->task(state_->context, team);
      team.barrier();
    }
  };
  try {
    for (int i = 1; i < state_->threads; ++i) state_->workers.emplace_back(work, i, cpus ? cpus[i] : -1);
  } catch (const std::system_error& error) {
    stop("the system starts no more threads", error.what());
  }
}

Pool::~Pool() {
  state_->stopping.store(true, std::memory_order_release);
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->tasks.fetch_add(1, std::memory_order_release);
  }
  state_->wake.notify_all();
  for (auto& worker : state_->workers) worker.join();
}

void Pool::run(Task task, void* context) {
  Team team(*this, 0, state_->threads);
  if (state_->threads > 1) {
    state_->task = task;
    state_->context = context;
    bool someone_sleeps;
    {
      std::lock_guard<std::mutex> lock(state_->mutex);
      state_->tasks.fetch_add(1, std::memory_order_release);
      someone_sleeps = state_->asleep > 0;
    }
    if (someone_sleeps) state_->wake.notify_all();
  }
  task(context, team);
  team.barrier();
}

int Pool::size() const { return state_->threads; }

namespace {
std::unique_ptr<Pool> the_pool;
}

Pool& pool() {
  if (!the_pool) the_pool.reset(new Pool(1, nullptr));
  return *the_pool;
}

}  // namespace tp

extern "C" TP_API void tp_set_threads(int threads, const int* cpus) {
  tp::the_pool.reset();
  tp::the_pool.reset(new tp::Pool(threads, cpus));
  if (cpus) tp::bind_to(cpus[0]);
}
