// Threads that compute a step together.
//
// A task runs on the threads of the team at once, from beginning to end; inside it they share out the items of one
// operation after the other. A step of a model is one task, so nobody sleeps between two layers. Nobody waits for a
// thread that the system does not run just then, unless it holds an item: an operation is over when its items are done,
// and a thread that comes later passes it by. A server's other threads want the cores, too.
#pragma once

#include <stdint.h>

#include <memory>
#include <type_traits>

namespace tp {

class Pool;

// One thread's view of the team, valid inside a task.
class Team {
 public:
  Team(Pool& pool, int thread, int threads) : pool_(pool), thread(thread), threads(threads) {}

  // Calls body(item) for 0 <= item < items, each once, on whichever thread is free. All are done when it returns, and
  // what they wrote is seen by all. Every thread of the team makes the same calls in the same order; one that is behind
  // the others finds nothing left to do, and between two calls it must write nothing that others read.
  template <class Body>
  void share(int items, Body&& body) {
    if (threads == 1) {
      for (int item = 0; item < items; ++item) body(item);
      return;
    }
    if (items <= 0) return;
    ++operation_;
    for (Items some = take(items); some.first < some.last; some = take(items)) {
      for (int item = some.first; item < some.last; ++item) body(item);
      did(some.last - some.first, items);
    }
    wait_for_others();
  }

 private:
  struct Items {
    int first, last;
  };

  Items take(int items);  // none if there are none left
  void did(int count, int items);
  void wait_for_others();

  Pool& pool_;
  uint32_t operation_ = 0;  // of the task, from 1 on

 public:
  const int thread;   // 0 is the caller's
  const int threads;
};

class Pool {
 public:
  using Task = void (*)(void* context, Team& team);

  explicit Pool(int threads);  // counts the caller's, which is the first
  ~Pool();
  Pool(const Pool&) = delete;

  // Runs the task on the caller's thread and on those others that come in time; returns when all have left it. Not for
  // two callers at once.
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
