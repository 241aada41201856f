// Which ISA runs: chosen once, by what the CPU and its operating system support. Compiled with baseline flags.
#include "table.h"

#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <string>

namespace kd::cpu {
namespace {

bool supports_generic() { return true; }

}  // namespace

const Candidate candidates[] = {
#if defined(__x86_64__)
    {"amx", supports_amx, &amx::table},
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
  std::string error;
};

Choice choose() {
  const char* forced = std::getenv("KDKERNELS_CPU_ISA");
  if (forced && !*forced) forced = nullptr;
  std::string accepted;
  for (const Candidate& candidate : candidates) {
    if (!candidate.supported()) continue;
    if (!forced) return {candidate.table, "the best this CPU runs", ""};
    if (std::strcmp(forced, candidate.name) == 0) return {candidate.table, "forced by KDKERNELS_CPU_ISA", ""};
    accepted += (accepted.empty() ? "" : ", ") + std::string(candidate.name);
  }
  return {nullptr, "", "KDKERNELS_CPU_ISA must name an ISA that this CPU runs (" + accepted + "), got '" + forced + "'"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Table* table() { return choice().table; }
const char* isa_error() { return choice().error.c_str(); }
const char* isa_reason() { return choice().reason; }

}  // namespace kd::cpu
