// The C interface: all that Python calls. Plain pointers, sizes and structs, so that it needs no headers of anyone's.
//
// Functions compute with the threads of tp_set_threads and may not be called by two threads at once. Unless said
// otherwise arrays are dense and row-major; bf16 is passed as uint16_t.
#pragma once

#include <stdint.h>

#define TP_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// Best tier of instruction sets that this machine and operating system can run: "generic", "avx2", "avx512",
// "avx512_bf16" or "amx".
TP_API const char* tp_best_isa(void);

// The tier in use; at first the best one.
TP_API const char* tp_isa(void);

// Use another tier, for tests. 0, or -1 if this machine cannot run it or does not know it.
TP_API int tp_set_isa(const char* name);

// Compute with that many threads, the caller's included. cpus[threads] binds each to a CPU, the calling thread to
// cpus[0]; null binds nothing. Ends the threads of an earlier call.
TP_API void tp_set_threads(int threads, const int* cpus);

#ifdef __cplusplus
}
#endif
