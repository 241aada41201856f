// Shared memory of the block that runs, and what is wrong with an access to it: beside it, misaligned, of what was not written, or a race.
//
// A race is two warps at the same byte, one of them writing, with no barrier between them. What a warp wrote is what differs from a copy
// when it comes to a barrier, so a write that changes nothing does not show, nor what lanes of one warp do to each other; reads are those
// of load_shared and ldmatrix.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

// Bounds of the section that holds every __shared__ variable; absent where a program has none.
extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

namespace cuda_host {

// What shared memory holds until it is written: 16 bytes that repeat.
constexpr uint16_t kUnwritten[8] = {0xfff9, 0xfff2, 0xfffc, 0xfff5, 0xfffe, 0xfff7, 0xfff3, 0xfffb};

inline void unwrite(void* begin, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {  // by the address: the pattern repeats across what is unwritten at different times
    char* p = static_cast<char*>(begin) + i;
    *p = reinterpret_cast<const char*>(kUnwritten)[reinterpret_cast<uintptr_t>(p) % sizeof kUnwritten];
  }
}

// Whether all bytes, each 4 at a multiple of 4, were written since they were `unwrite`n.
inline bool written(const void* begin, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 4) {
    const char* p = static_cast<const char*>(begin) + i;
    if (memcmp(p, reinterpret_cast<const char*>(kUnwritten) + reinterpret_cast<uintptr_t>(p) % sizeof kUnwritten, 4) == 0) return false;
  }
  return true;
}

// A run of shared memory, and which warps read and wrote each byte since the last barrier.
class Shared {
 public:
  void begin_block(char* begin, size_t bytes) {
    begin_ = begin;
    unwrite(begin, bytes);
    copy_.assign(begin, begin + bytes);
    begin_epoch();
  }

  // Behind a barrier.
  void begin_epoch() {
    readers_.assign(copy_.size(), kNone);
    writers_.assign(copy_.size(), kNone);
  }

  bool has(const void* p, size_t bytes) const { return p >= begin_ && static_cast<const char*>(p) + bytes <= begin_ + copy_.size(); }

  // Notes a read of the warp's; false if another warp has written there.
  bool read(const void* p, size_t bytes, unsigned warp) {
    const size_t at = static_cast<const char*>(p) - begin_;
    for (size_t i = at; i < at + bytes; ++i) {
      if (writers_[i] != kNone && writers_[i] != warp) return false;
      readers_[i] = readers_[i] == kNone || readers_[i] == warp ? warp : kSeveral;
    }
    return true;
  }

  // Notes what the warp, which has run since this was last called, has written; false if another has been there.
  bool wrote(unsigned warp) {
    for (size_t i = 0; i < copy_.size(); ++i) {
      if (i % kStep == 0 && i + kStep <= copy_.size() && memcmp(&copy_[i], begin_ + i, kStep) == 0) {
        i += kStep - 1;
        continue;
      }
      if (copy_[i] == begin_[i]) continue;
      copy_[i] = begin_[i];
      if ((writers_[i] != kNone && writers_[i] != warp) || (readers_[i] != kNone && readers_[i] != warp)) return false;
      writers_[i] = warp;
    }
    return true;
  }

 private:
  static constexpr size_t kStep = 256;
  static constexpr uint8_t kNone = 255, kSeveral = 254;  // a block has 32 warps at most

  char* begin_ = nullptr;
  std::vector<char> copy_;
  std::vector<uint8_t> readers_, writers_;
};

inline Shared static_memory, dynamic_memory;

inline Shared* memory_of(const void* p, size_t bytes) {
  return static_memory.has(p, bytes) ? &static_memory : dynamic_memory.has(p, bytes) ? &dynamic_memory : nullptr;
}

constexpr char kBeside[] = "shared memory is accessed out of bounds", kMisaligned[] = "shared memory is accessed at a misaligned address",
               kNotWritten[] = "shared memory is read before it was written",
               kRace[] = "two warps are at the same shared memory, one of them writing, without a barrier between them";

// What is wrong with an access of `bytes`, which must lie at a multiple of them; null: nothing.
inline const char* wrong_access(const void* p, size_t bytes) {
  if (memory_of(p, bytes) == nullptr) return kBeside;
  return reinterpret_cast<uintptr_t>(p) % bytes != 0 ? kMisaligned : nullptr;
}

// And with a read by the warp.
inline const char* wrong_read(const void* p, size_t bytes, unsigned warp) {
  if (const char* wrong = wrong_access(p, bytes)) return wrong;
  const size_t within = reinterpret_cast<uintptr_t>(p) % 4;
  if (!written(static_cast<const char*>(p) - within, within + bytes)) return kNotWritten;
  return memory_of(p, bytes)->read(p, bytes, warp) ? nullptr : kRace;
}

}  // namespace cuda_host
