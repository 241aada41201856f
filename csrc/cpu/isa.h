// What the CPU and the operating system can run. Compiled with baseline flags: it runs before anything is known of the CPU.
#pragma once

namespace kd::cpu {

struct Features {
  bool avx2, fma, f16c;
  bool avx512f, avx512bw, avx512dq, avx512vl, avx512vnni, avx512bf16;
  bool amx_tile, amx_bf16, amx_int8;
};

const Features& features();

// Every instruction set that the kernel object of that name was compiled with (CMakeLists.txt, isa_flags_*). The first question about
// AMX asks Linux for the tiles, for this process and all its threads.
bool supports_avx2();
bool supports_avx512();
bool supports_amx();

}  // namespace kd::cpu
