// CPU features. __builtin_cpu_supports asks cpuid, and xgetbv whether the operating system saves the wider registers.
#include "cpu/isa.h"

namespace kd::cpu {

namespace {

Features detect() {
  Features f{};
#if defined(__x86_64__)
  __builtin_cpu_init();
  f.avx2 = __builtin_cpu_supports("avx2");
  f.fma = __builtin_cpu_supports("fma");
  f.f16c = __builtin_cpu_supports("f16c");
  f.avx512f = __builtin_cpu_supports("avx512f");
  f.avx512bw = __builtin_cpu_supports("avx512bw");
  f.avx512dq = __builtin_cpu_supports("avx512dq");
  f.avx512vl = __builtin_cpu_supports("avx512vl");
  f.avx512vnni = __builtin_cpu_supports("avx512vnni");
  f.avx512bf16 = __builtin_cpu_supports("avx512bf16");
#endif
  return f;
}

}  // namespace

const Features& features() {
  static const Features found = detect();
  return found;
}

bool supports_avx2() {
  const Features& f = features();
  return f.avx2 && f.fma && f.f16c;
}

bool supports_avx512() {
  const Features& f = features();
  return supports_avx2() && f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl && f.avx512vnni;
}

}  // namespace kd::cpu
