// What this machine can do at best, measured: the denominators of every "percent of the roofline".
#pragma once
#include <vector>

namespace kd::native {

// One ceiling: `run` does a chunk of work that takes about a millisecond or less and returns how many operations or bytes it was.
struct Ceiling {
  const char* name;   // fp32, fp64, bf16, int8: operations, two for a multiply-add; read, copy: bytes that cross to memory
  const char* isa;    // the instructions that it uses; empty for bandwidths
  bool available;     // on this CPU
  double (*run)(char* buffer, long bytes);
  bool needs_memory;
};

const std::vector<Ceiling>& ceilings();

// 1e9 operations or bytes per second over `threads` threads: the best of `repeats` runs of `seconds` each.
double measure(const Ceiling& ceiling, int threads, double seconds, int repeats);

}  // namespace kd::native
