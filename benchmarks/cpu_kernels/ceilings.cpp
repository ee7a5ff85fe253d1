// What this machine can do at best: reading memory, and multiplying bf16 or f32 in registers. ceilings.py compiles it.
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace {

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Runs body(thread) on all threads at once; seconds from a common start to the last end.
template <class Body>
double timed(int threads, Body body) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i)
    all.emplace_back([&, i] {
      ++ready;
      while (!go) _mm_pause();
      body(i);
    });
  while (ready < threads) _mm_pause();
  const double start = now_s();
  go = true;
  for (auto& thread : all) thread.join();
  return now_s() - start;
}

volatile float sink;

__attribute__((target("avx512f,avx512dq"))) void read_all(const char* from, size_t bytes) {
  __m512 sums[4] = {};
  for (size_t i = 0; i < bytes; i += 256) {
    _mm_prefetch(from + i + 2048, _MM_HINT_T0);
    for (int j = 0; j < 4; ++j) sums[j] = _mm512_or_ps(sums[j], _mm512_loadu_ps(from + i + 64 * j));
  }
  sink = _mm512_reduce_add_ps(_mm512_or_ps(_mm512_or_ps(sums[0], sums[1]), _mm512_or_ps(sums[2], sums[3])));
}

// Ten sums that do not wait for each other. Written out, because a compiler moves such loops' sums to memory.
#define TP_TEN(op)                                                                                              \
  op " %%zmm31, %%zmm31, %%zmm0\n" op " %%zmm31, %%zmm31, %%zmm1\n" op " %%zmm31, %%zmm31, %%zmm2\n"            \
  op " %%zmm31, %%zmm31, %%zmm3\n" op " %%zmm31, %%zmm31, %%zmm4\n" op " %%zmm31, %%zmm31, %%zmm5\n"            \
  op " %%zmm31, %%zmm31, %%zmm6\n" op " %%zmm31, %%zmm31, %%zmm7\n" op " %%zmm31, %%zmm31, %%zmm8\n"            \
  op " %%zmm31, %%zmm31, %%zmm9\n"
#define TP_CHANGED "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9"

void multiply_bf16(long times) {
  for (long i = 0; i < times; ++i) asm volatile(TP_TEN("vdpbf16ps") ::: TP_CHANGED);
}

void multiply_f32(long times) {
  for (long i = 0; i < times; ++i) asm volatile(TP_TEN("vfmadd231ps") ::: TP_CHANGED);
}

}  // namespace

extern "C" {

// Bytes per second of reading memory [bytes], each byte once, a share for each thread.
double read_bandwidth(const char* memory, size_t bytes, int threads) {
  const size_t share = bytes / threads / 256 * 256;
  return share * threads / timed(threads, [=](int i) { read_all(memory + i * share, share); });
}

constexpr long kTimes = 50000;  // some milliseconds

// Floating-point operations per second (a multiply-add is two).
double bf16_peak(int threads) {
  if (!__builtin_cpu_supports("avx512bf16")) return 0;
  return 64.0 * 10 * kTimes * threads / timed(threads, [](int) { multiply_bf16(kTimes); });
}

double f32_peak(int threads) {
  if (!__builtin_cpu_supports("avx512f")) return 0;
  return 32.0 * 10 * kTimes * threads / timed(threads, [](int) { multiply_f32(kTimes); });
}
}
