// Machine ceilings. The arithmetic loops are whole asm blocks, so that no compiler can spill or drop an accumulator: with two
// units and a latency of four or five cycles, ten independent chains are the least that keep the units busy; here are twelve or more.
#include "native/ceilings.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>

#include "cpu/isa.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kd::native {

namespace {

constexpr long kIterations = 20000;

#if defined(__x86_64__)

#define KD_12(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12)
#define KD_24(X) KD_12(X) X(13) X(14) X(15) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23) X(24)
#define KD_CLOBBERS \
  "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

// All registers are zero: the speed does not depend on the values, and zeros raise no exceptions. xmm16 and up are unknown to
// baseline code and need no clobber.
#define KD_LOOP(name, chains, zero, body, finish, operations)                                                   \
  double name(char*, long) {                                                                                    \
    long n = kIterations;                                                                                       \
    asm volatile(zero(0) chains(zero) "1:\n" chains(body) "dec %0\n jnz 1b\n" finish : "+r"(n)::KD_CLOBBERS);   \
    return static_cast<double>(kIterations) * (0 chains(KD_ONE)) * (operations);                                \
  }
#define KD_ONE(i) +1

#define KD_ZERO_X(i) "xorps %%xmm" #i ", %%xmm" #i "\n"
#define KD_ZERO_Y(i) "vxorps %%ymm" #i ", %%ymm" #i ", %%ymm" #i "\n"
#define KD_ZERO_Z(i) "vpxord %%zmm" #i ", %%zmm" #i ", %%zmm" #i "\n"
#define KD_END "vzeroupper\n"

// Baseline x86-64 has no fused multiply-add; its multiplications and additions are counted one by one.
#define KD_PS_X(i) "mulps %%xmm0, %%xmm" #i "\n addps %%xmm0, %%xmm" #i "\n"
#define KD_PD_X(i) "mulpd %%xmm0, %%xmm" #i "\n addpd %%xmm0, %%xmm" #i "\n"
KD_LOOP(fp32_generic, KD_12, KD_ZERO_X, KD_PS_X, "", 8)
KD_LOOP(fp64_generic, KD_12, KD_ZERO_X, KD_PD_X, "", 4)

#define KD_PS_Y(i) "vfmadd231ps %%ymm0, %%ymm0, %%ymm" #i "\n"
#define KD_PD_Y(i) "vfmadd231pd %%ymm0, %%ymm0, %%ymm" #i "\n"
#define KD_I8_Y(i) \
  "vpmaddubsw %%ymm0, %%ymm0, %%ymm13\n vpmaddwd %%ymm0, %%ymm13, %%ymm13\n vpaddd %%ymm13, %%ymm" #i ", %%ymm" #i "\n"
KD_LOOP(fp32_avx2, KD_12, KD_ZERO_Y, KD_PS_Y, KD_END, 16)
KD_LOOP(fp64_avx2, KD_12, KD_ZERO_Y, KD_PD_Y, KD_END, 8)
KD_LOOP(int8_avx2, KD_12, KD_ZERO_Y, KD_I8_Y, KD_END, 64)

#define KD_PS_Z(i) "vfmadd231ps %%zmm0, %%zmm0, %%zmm" #i "\n"
#define KD_PD_Z(i) "vfmadd231pd %%zmm0, %%zmm0, %%zmm" #i "\n"
#define KD_I8_Z(i) "vpdpbusd %%zmm0, %%zmm0, %%zmm" #i "\n"
#define KD_BF16_Z(i) "vdpbf16ps %%zmm0, %%zmm0, %%zmm" #i "\n"
KD_LOOP(fp32_avx512, KD_24, KD_ZERO_Z, KD_PS_Z, KD_END, 32)
KD_LOOP(fp64_avx512, KD_24, KD_ZERO_Z, KD_PD_Z, KD_END, 16)
KD_LOOP(int8_avx512, KD_24, KD_ZERO_Z, KD_I8_Z, KD_END, 128)
KD_LOOP(bf16_avx512, KD_24, KD_ZERO_Z, KD_BF16_Z, KD_END, 64)

// Tiles of 16 lines of 64 bytes: 16 x 32 by 32 x 16 bf16, or 16 x 64 by 64 x 16 int8. Two of the eight are operands.
#define KD_6(X) X(0) X(1) X(2) X(3) X(4) X(5)
#define KD_ZERO_T(i) "tilezero %%tmm" #i "\n"
#define KD_BF16_T(i) "tdpbf16ps %%tmm7, %%tmm6, %%tmm" #i "\n"
#define KD_I8_T(i) "tdpbusd %%tmm7, %%tmm6, %%tmm" #i "\n"
KD_LOOP(bf16_tiles, KD_6, KD_ZERO_T, KD_BF16_T, "tilerelease\n", 16 * 16 * 32 * 2)
KD_LOOP(int8_tiles, KD_6, KD_ZERO_T, KD_I8_T, "tilerelease\n", 16 * 16 * 64 * 2)

void configure_tiles() {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" : : "m"(config));  // sets them to 0
}

double bf16_amx(char* buffer, long bytes) {
  configure_tiles();
  return bf16_tiles(buffer, bytes);
}

double int8_amx(char* buffer, long bytes) {
  configure_tiles();
  return int8_tiles(buffer, bytes);
}

#endif

double read(char* buffer, long bytes) {
  typedef long long vec __attribute__((vector_size(16)));
  const vec* p = reinterpret_cast<const vec*>(buffer);
  vec a{}, b{}, c{}, d{};
  for (long i = 0; i < bytes / 16; i += 4) {
    a ^= p[i];
    b ^= p[i + 1];
    c ^= p[i + 2];
    d ^= p[i + 3];
  }
  a ^= b ^ c ^ d;
  asm volatile("" : : "r"(a[0] ^ a[1]));  // the sum counts as used
  return static_cast<double>(bytes);
}

// Half the buffer to the other half: every byte is read once and written once. Streaming stores, since an ordinary store first
// reads the line that it is to overwrite.
double copy(char* buffer, long bytes) {
#if defined(__x86_64__)
  const __m128i* from = reinterpret_cast<const __m128i*>(buffer);
  __m128i* to = reinterpret_cast<__m128i*>(buffer + bytes / 2);
  for (long i = 0; i < bytes / 32; ++i) _mm_stream_si128(to + i, _mm_load_si128(from + i));
  _mm_sfence();
#else
  std::memcpy(buffer + bytes / 2, buffer, bytes / 2);
  asm volatile("" : : "r"(buffer) : "memory");
#endif
  return static_cast<double>(bytes);
}

// Larger than any last-level cache that a thread could have for itself, in huge pages where there are any: with small ones the
// loops would measure page walks.
constexpr long kBufferBytes = 256L << 20, kHugePage = 2L << 20;

char* new_buffer() {
  void* memory = std::aligned_alloc(kHugePage, kBufferBytes);
  if (!memory) throw std::bad_alloc();
#if defined(__linux__)
  madvise(memory, kBufferBytes, MADV_HUGEPAGE);  // a hint: failing changes nothing
#endif
  return static_cast<char*>(memory);
}

}  // namespace

const std::vector<Ceiling>& ceilings() {
  static const std::vector<Ceiling> all = {
#if defined(__x86_64__)
      {"fp32", "generic", true, fp32_generic, false},
      {"fp64", "generic", true, fp64_generic, false},
      {"fp32", "avx2", cpu::supports_avx2(), fp32_avx2, false},
      {"fp64", "avx2", cpu::supports_avx2(), fp64_avx2, false},
      {"int8", "avx2", cpu::supports_avx2(), int8_avx2, false},
      {"fp32", "avx512", cpu::supports_avx512(), fp32_avx512, false},
      {"fp64", "avx512", cpu::supports_avx512(), fp64_avx512, false},
      {"int8", "avx512", cpu::supports_avx512(), int8_avx512, false},
      {"bf16", "avx512", cpu::supports_avx512() && cpu::features().avx512bf16, bf16_avx512, false},
      {"bf16", "amx", cpu::supports_amx(), bf16_amx, false},
      {"int8", "amx", cpu::supports_amx(), int8_amx, false},
#endif
      {"read", "", true, read, true},
      {"copy", "", true, copy, true},
  };
  return all;
}

double measure(const Ceiling& ceiling, int threads, double seconds, int repeats) {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  std::vector<std::unique_ptr<char, decltype(&std::free)>> buffers;
  for (int t = 0; t < threads; ++t) buffers.emplace_back(ceiling.needs_memory ? new_buffer() : nullptr, std::free);
  for (int repeat = 0; repeat < repeats; ++repeat) {
    std::atomic<int> waiting{threads};
    std::vector<double> rates(threads);
    auto work = [&](int t) {
      if (buffers[t]) std::memset(buffers[t].get(), 1, kBufferBytes);  // the pages come to be, nearest to this thread
      ceiling.run(buffers[t].get(), kBufferBytes);  // clocks and caches settle
      for (--waiting; waiting > 0;) std::this_thread::yield();
      const auto start = Clock::now();
      double done = 0, elapsed = 0;
      do {
        done += ceiling.run(buffers[t].get(), kBufferBytes);
        elapsed = std::chrono::duration<double>(Clock::now() - start).count();
      } while (elapsed < seconds);
      rates[t] = done / elapsed;
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
    work(0);
    for (std::thread& other : others) other.join();
    double total = 0;
    for (double rate : rates) total += rate;
    best = std::max(best, total);
  }
  return best * 1e-9;
}

}  // namespace kd::native
