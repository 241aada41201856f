// The part of CUDA that csrc/cuda uses, on the CPU, for tests: with this folder first on the include path the sources of the
// kernels compile with the host compiler and run there.
//
// Blocks run one after the other. The threads of a block are fibers: a warp runs to its next __syncthreads before the next warp
// starts, the most uneven progress that barriers allow, so that a missing one shows; within a warp all lanes meet at every shuffle,
// vote, ldmatrix and mma. What a GPU would turn into a hang or into garbage is an error here: a barrier that some threads of the
// block never reach, an instruction of a warp that misses lanes, shared memory read before it was written (when a block starts it
// holds kUnwritten: NaN of every type, and no data that a test would make), races of warps for it (cuda_shared.h), and, with
// -fsanitize=undefined, misaligned vector loads and indices out of bounds. Behind dynamic shared memory lies a page that nobody may touch.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "cuda_shared.h"

#ifndef CUDA_HOST_ARCH  // the GPU whose instructions and limits the kernels find: 900 for sm_90
#define CUDA_HOST_ARCH 900
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define __noinline__ __attribute__((noinline))
#define __shared__ static __attribute__((section("cuda_shared")))

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9;
constexpr cudaError_t cudaErrorNoKernelImageForDevice = 209, cudaErrorInvalidResourceHandle = 400, cudaErrorLaunchFailure = 719;
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;
inline bool host_threads_reversed = false;

namespace cuda_host {

constexpr unsigned kWarp = 32, kStackBytes = 128 << 10;

constexpr size_t kPage = 4096, kDefaultDynamic = 48 << 10, kMostDynamic = (CUDA_HOST_ARCH >= 800 ? 227 : 64) << 10;

enum class State { kReady, kAtBlockBarrier, kAtWarp, kDone, kFailed };

struct Copy {
  void* to;
  uint4 data;
};

struct Fiber {
  ucontext_t entry;
  jmp_buf here;  // where it goes on: unlike swapcontext, a jump asks nothing of the system
  bool started;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  const char* instruction;  // of the warp, that the lane waits at
  unsigned meetings;        // so far; the parity chooses the slot, so that a fast lane cannot overwrite what a slow one reads
  char offers[2][32];
  std::vector<std::vector<Copy>> copies;  // of cp.async: groups under way, the last not committed yet
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline const char* failure = "no error";
inline cudaStream_t stream = nullptr;   // that every launch must be on
inline char* dynamic_shared = nullptr;  // of the block
inline size_t dynamic_bytes = 0;
inline std::map<const void*, size_t> dynamic_limits;  // of kernels that were allowed more than the default

inline Fiber& current() { return fibers[threadIdx.x]; }

inline void wait(State state) {
  current().state = state;
  if (_setjmp(current().here) == 0) _longjmp(scheduler, 1);
}

// Runs the current fiber until it waits.
inline void resume() {
  Fiber& fiber = current();
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.entry);
}

// Ends the launch with an error.
inline void fail(const char* why) {
  failure = why;
  wait(State::kFailed);
}

inline void run_fiber() {
  body();
  if (current().copies.size() > 1 || !current().copies.back().empty()) fail("a thread returned before its cp.async had arrived");
  wait(State::kDone);
}

// Every lane's offer to the others of its warp.
template <class T>
struct Offers {
  unsigned slot;

  const char* at(unsigned lane) const { return fibers[threadIdx.x / kWarp * kWarp + lane].offers[slot]; }

  T operator[](unsigned lane) const {
    T offer;
    memcpy(&offer, at(lane), sizeof offer);
    return offer;
  }
};

// Waits for all lanes of the warp to come to the same instruction.
template <class T>
Offers<T> meet(const char* instruction, const T& offer) {
  static_assert(sizeof(T) <= sizeof(Fiber::offers[0]));
  Fiber& fiber = current();
  const unsigned slot = fiber.meetings++ % 2;
  memcpy(fiber.offers[slot], &offer, sizeof offer);
  fiber.instruction = instruction;
  wait(State::kAtWarp);
  return {slot};
}

// Of shared memory, as an instruction or a plain load reads it.
inline void check_read(const void* p, size_t bytes) {
  if (const char* wrong = wrong_read(p, bytes, threadIdx.x / kWarp)) fail(wrong);
}

template <class T>
T load_shared(const void* p) {
  check_read(p, sizeof(T));
  return *static_cast<const T*>(p);
}

inline bool all(unsigned first, unsigned end, State state) {
  for (unsigned i = first; i < end; ++i) {
    if (fibers[i].state != state) return false;
  }
  return true;
}

inline void release(unsigned first, unsigned end) {
  for (unsigned i = first; i < end; ++i) fibers[i].state = State::kReady;
}

// Runs the lanes of one warp that can run; false if none could.
inline bool step_warp(unsigned warp) {
  bool progress = false;
  for (unsigned i = 0; i < kWarp; ++i) {
    threadIdx.x = warp * kWarp + (host_threads_reversed ? kWarp - 1 - i : i);
    if (current().state != State::kReady) continue;
    resume();
    if (current().state == State::kFailed) return false;
    progress = true;
  }
  const unsigned first = warp * kWarp, end = first + kWarp;
  if (!all(first, end, State::kAtWarp)) return progress;
  for (unsigned i = first; i < end; ++i) {
    if (strcmp(fibers[i].instruction, fibers[first].instruction) != 0) {
      failure = "lanes of one warp wait at different instructions";
      fibers[i].state = State::kFailed;
      return false;
    }
  }
  release(first, end);
  return progress;
}

inline bool any_failed() {
  for (const Fiber& fiber : fibers) {
    if (fiber.state == State::kFailed) return true;
  }
  return false;
}

// Runs one block to its end; false if its threads can never meet again.
inline bool run_block() {
  const unsigned threads = blockDim.x, warps = threads / kWarp;
  static_memory.begin_block(__start_cuda_shared, __stop_cuda_shared - __start_cuda_shared);
  dynamic_memory.begin_block(dynamic_shared, dynamic_bytes);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = kStackBytes;
    fiber.started = false;
    fiber.state = State::kReady;
    fiber.meetings = 0;
    fiber.copies.assign(1, {});
    makecontext(&fiber.entry, run_fiber, 0);
  }
  while (true) {
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned warp = host_threads_reversed ? warps - 1 - i : i;
      while (step_warp(warp)) {
      }
      if (any_failed()) return false;
      if (!static_memory.wrote(warp) || !dynamic_memory.wrote(warp)) {
        failure = kRace;
        return false;
      }
    }
    if (all(0, threads, State::kDone)) return true;
    if (!all(0, threads, State::kAtBlockBarrier)) {
      failure = "threads of one block wait at different barriers, or some have returned";
      return false;
    }
    release(0, threads);
    static_memory.begin_epoch();
    dynamic_memory.begin_epoch();
  }
}

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::wait(cuda_host::State::kAtBlockBarrier); }

namespace cuda_host {

template <class T>
T shuffle(unsigned mask, const char* instruction, T value, unsigned from) {
  if (mask != 0xffffffffu) std::abort();  // partial masks are not supported here
  return meet(instruction, value)[from % kWarp];
}

}  // namespace cuda_host

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return cuda_host::shuffle(mask, "shfl.bfly", value, threadIdx.x ^ static_cast<unsigned>(lane_mask));
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_host::shuffle(mask, "shfl.idx", value, static_cast<unsigned>(lane));
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  if (mask != 0xffffffffu) std::abort();
  const auto votes = cuda_host::meet("vote.ballot", vote);
  unsigned all = 0;
  for (unsigned lane = 0; lane < cuda_host::kWarp; ++lane) all |= unsigned(votes[lane]) << lane;
  return all;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }

// A product that the compiler may not fuse into a following addition.
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;
  return product;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

constexpr int cudaDevAttrComputeCapabilityMajor = 75, cudaFuncAttributeMaxDynamicSharedMemorySize = 8;

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  if (attribute != cudaDevAttrComputeCapabilityMajor) return cudaErrorInvalidValue;
  return *value = CUDA_HOST_ARCH / 100, cudaSuccess;
}

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), int attribute, int value) {
  const bool possible = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && size_t(value) <= cuda_host::kMostDynamic;
  if (possible) cuda_host::dynamic_limits[reinterpret_cast<const void*>(kernel)] = value;
  return possible ? cudaSuccess : cudaErrorInvalidValue;
}

namespace cuda_host {

// Dynamic shared memory of one launch, 128-byte aligned, up to a page that faults.
struct Dynamic {
  size_t bytes, pages;
  char* base;

  explicit Dynamic(size_t wanted) : bytes((wanted + 127) / 128 * 128), pages((bytes + kPage - 1) / kPage * kPage) {
    base = static_cast<char*>(mmap(nullptr, pages + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED || mprotect(base + pages, kPage, PROT_NONE) != 0) std::abort();
    dynamic_shared = base + pages - bytes;
    dynamic_bytes = wanted;
  }
  Dynamic(const Dynamic&) = delete;
  ~Dynamic() { munmap(base, pages + kPage); }
};

}  // namespace cuda_host

template <class... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), P... args) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (gridDim.x == 0 || blockDim.x == 0 || blockDim.x > 1024 || blockDim.x % cuda_host::kWarp != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (config->stream != cuda_host::stream) return cudaErrorInvalidResourceHandle;
  const auto limit = cuda_host::dynamic_limits.find(reinterpret_cast<const void*>(kernel));
  if (config->dynamicSmemBytes > (limit == cuda_host::dynamic_limits.end() ? cuda_host::kDefaultDynamic : limit->second)) {
    return cudaErrorInvalidValue;
  }
  const cuda_host::Dynamic dynamic(config->dynamicSmemBytes);
  cuda_host::fibers = std::vector<cuda_host::Fiber>(blockDim.x);
  cuda_host::body = [=] { kernel(args...); };
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    if (!cuda_host::run_block()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    default: return cuda_host::failure;
  }
}
