// Threads that compute a step together.
//
// A task runs on every thread of the team at once, from beginning to end; inside it the threads meet at barriers and
// share out work. A step of a model is one task, so nobody sleeps between two layers.
#pragma once

#include <atomic>
#include <memory>
#include <type_traits>

namespace tp {

class Pool;

// One thread's view of the team, valid inside a task.
class Team {
 public:
  Team(Pool& pool, int thread, int threads) : pool_(pool), thread(thread), threads(threads) {}

  // All threads have come here before any goes on; what they wrote is seen by all.
  void barrier();

  // Calls body(item) for 0 <= item < items, each once, on whichever thread is free; ends with a barrier.
  // Every thread of the team makes the same calls in the same order.
  template <class Body>
  void share(int items, Body&& body) {
    if (threads == 1) {
      for (int item = 0; item < items; ++item) body(item);
      return;
    }
    for (int item = take(); item < items; item = take()) body(item);
    barrier();
  }

 private:
  Pool& pool_;
  int take();

 public:
  const int thread;   // 0 is the caller's
  const int threads;
};

class Pool {
 public:
  using Task = void (*)(void* context, Team& team);

  // threads counts the caller. cpus[threads]: the CPU each is bound to, or null to leave that to the system. Not so the
  // caller's own thread, which is the first: it stays as it is, and tp_set_threads binds it.
  Pool(int threads, const int* cpus);
  ~Pool();
  Pool(const Pool&) = delete;

  // Runs the task on all threads and returns when the last has ended. Not for two callers at once.
  void run(Task task, void* context);

  template <class Body>
  void run(Body&& body) {
    using Function = std::remove_reference_t<Body>;
    run([](void* context, Team& team) { (*static_cast<Function*>(context))(team); }, &body);
  }

  // The same, unless `alone`: then on the calling thread only, for what is over before another thread has woken.
  template <class Body>
  void run_small(bool alone, Body&& body) {
    if (!alone) return run(body);
    Team self(*this, 0, 1);
    body(self);
  }

  int size() const;

 private:
  friend class Team;
  struct State;
  std::unique_ptr<State> state_;
};

// The pool that the C interface computes with.
Pool& pool();

}  // namespace tp
