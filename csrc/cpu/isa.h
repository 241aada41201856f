// What the CPU and the operating system can run. Compiled with baseline flags: it runs before anything is known of the CPU.
#pragma once

namespace kd::cpu {

struct Features {
  bool avx2, fma, f16c;
  bool avx512f, avx512bw, avx512dq, avx512vl, avx512vnni, avx512bf16;
};

const Features& features();

// Every instruction set that the kernel object of that name was compiled with (CMakeLists.txt, isa_flags_*).
bool supports_avx2();
bool supports_avx512();

}  // namespace kd::cpu
