// CPU features. __builtin_cpu_supports asks cpuid, and xgetbv whether the operating system saves the wider registers.
#include "cpu/isa.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
  f.amx_tile = __builtin_cpu_supports("amx-tile");
  f.amx_bf16 = __builtin_cpu_supports("amx-bf16");
  f.amx_int8 = __builtin_cpu_supports("amx-int8");
#endif
  return f;
}

// Tiles are 8 KiB more to save for each thread that uses them, so Linux gives them to a process that asks, for all its threads.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
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

bool supports_amx() {
  const Features& f = features();
  static const bool granted = supports_avx512() && f.avx512bf16 && f.amx_tile && f.amx_bf16 && f.amx_int8 && may_use_tiles();
  return granted;
}

}  // namespace kd::cpu
