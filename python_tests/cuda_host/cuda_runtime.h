// The part of CUDA that csrc/cuda uses, on the CPU, for tests: with this folder first on the include path the sources of the
// kernels compile with the host compiler and run there.
//
// Blocks run one after the other. The threads of a block are fibers: a warp runs to its next __syncthreads before the next warp
// starts, the most uneven progress that barriers allow, so that a missing one shows. What a GPU would turn into a hang or into
// garbage is an error here: a barrier that some threads of the block never reach, a shuffle that misses lanes, shared memory read
// before it was written (it holds NaN when a block starts), and, with -fsanitize=undefined, misaligned vector loads and indices
// out of bounds.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719;
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;
inline bool host_threads_reversed = false;

// Bounds of the section that holds every __shared__ variable; absent where a program has none.
extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

namespace cuda_host {

constexpr unsigned kWarp = 32, kStackBytes = 128 << 10;

enum class State { kReady, kAtBlockBarrier, kAtShuffle, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  unsigned shuffles;  // so far; the parity chooses the slot, so that a fast lane cannot overwrite what a slow one reads
  uint64_t shuffled[2];
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline const char* failure = "no error";

inline Fiber& current() { return fibers[threadIdx.x]; }

inline void wait(State state) {
  current().state = state;
  swapcontext(&current().context, &scheduler);
}

inline void run_fiber() {
  body();
  wait(State::kDone);
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
    swapcontext(&scheduler, &current().context);
    progress = true;
  }
  if (all(warp * kWarp, (warp + 1) * kWarp, State::kAtShuffle)) release(warp * kWarp, (warp + 1) * kWarp);
  return progress;
}

// Runs one block to its end; false if its threads can never meet again.
inline bool run_block() {
  const unsigned threads = blockDim.x, warps = threads / kWarp;
  memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.state = State::kReady;
    fiber.shuffles = 0;
    makecontext(&fiber.context, run_fiber, 0);
  }
  while (true) {
    for (unsigned i = 0; i < warps; ++i) {
      while (step_warp(host_threads_reversed ? warps - 1 - i : i)) {
      }
    }
    if (all(0, threads, State::kDone)) return true;
    if (!all(0, threads, State::kAtBlockBarrier)) {
      failure = "threads of one block wait at different barriers, or some have returned";
      return false;
    }
    release(0, threads);
  }
}

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::wait(cuda_host::State::kAtBlockBarrier); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  if (mask != 0xffffffffu) std::abort();  // partial masks are not supported here
  cuda_host::Fiber& fiber = cuda_host::current();
  const unsigned slot = fiber.shuffles++ % 2, partner = threadIdx.x ^ static_cast<unsigned>(lane_mask);
  memcpy(&fiber.shuffled[slot], &value, sizeof value);
  cuda_host::wait(cuda_host::State::kAtShuffle);
  memcpy(&value, &cuda_host::fibers[partner].shuffled[slot], sizeof value);
  return value;
}

// A product that the compiler may not fuse into a following addition.
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;
  return product;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), P... args) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (gridDim.x == 0 || blockDim.x == 0 || blockDim.x > 1024 || blockDim.x % cuda_host::kWarp != 0) {
    return cudaErrorInvalidConfiguration;
  }
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
    default: return cuda_host::failure;
  }
}
