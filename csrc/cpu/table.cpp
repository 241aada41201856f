// Which ISA runs: chosen once, by what the CPU and its operating system support. Compiled with baseline flags.
#include "table.h"

#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace kd::cpu {
namespace {

bool supports_generic() { return true; }

}  // namespace

const Candidate candidates[] = {
#if defined(__x86_64__)
    {"avx512", supports_avx512, &avx512::table},
    {"avx2", supports_avx2, &avx2::table},
#endif
    {"generic", supports_generic, &generic::table},
};
const int num_candidates = sizeof(candidates) / sizeof(candidates[0]);

namespace {

struct Choice {
  const Table* table = nullptr;
  const char* reason = "";
  const char* error = "";
};

Choice choose() {
  const char* forced = std::getenv("KDKERNELS_CPU_ISA");
  for (const Candidate& candidate : candidates) {
    if (forced && *forced && std::strcmp(forced, candidate.name) != 0) continue;
    if (candidate.supported()) return {candidate.table, forced && *forced ? "forced by KDKERNELS_CPU_ISA" : "the best this CPU runs", ""};
    if (forced && *forced) return {nullptr, "", "KDKERNELS_CPU_ISA names an ISA that this CPU lacks"};
  }
  return {nullptr, "", "KDKERNELS_CPU_ISA must be generic, avx2 or avx512"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Table* table() { return choice().table; }
const char* isa_error() { return choice().error; }
const char* isa_reason() { return choice().reason; }

}  // namespace kd::cpu
