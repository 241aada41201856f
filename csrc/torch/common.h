// What the torch side of every CPU op needs: tensors to views, and work items to torch's threads. Stable ABI only.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "../cpu/table.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kd {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::kF32;
    case ScalarType::BFloat16: return DType::kBF16;
    case ScalarType::Half: return DType::kF16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

inline const cpu::Table& table() {
  const cpu::Table* chosen = cpu::table();
  STD_TORCH_CHECK(chosen, cpu::isa_error());
  return *chosen;
}

inline const bool* mask_of(const std::optional<Tensor>& mask, int64_t numel) {
  if (!mask) return nullptr;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() == numel,
                  "mask must be contiguous bool with one value per row");
  return static_cast<const bool*>(mask->const_data_ptr());
}

inline int64_t count_real(const bool* mask, int64_t n) {
  if (!mask) return n;
  int64_t real = 0;
  for (int64_t i = 0; i < n; ++i) real += mask[i];
  return real;
}

constexpr int64_t kHugePage = 2 << 20;

inline int64_t round_up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Takes fresh memory into use with all threads, before a kernel writes to it: malloc returns large tensors to the system when they are
// freed, and gets untouched pages for the next. Huge pages where the system grants them: faulting 62 MB, the gradient of kd_loss at
// 512 x 30522, in by 4 KiB pages takes two threads 13 ms. One thread touches a page; two that fault in the same both zero it. And
// zeros written in passing push out the rows being read (forward and backward of that case: 16 -> 13 ms).
inline void take_into_use(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  unsigned char in_use = 0;
  if (last <= first || mincore(reinterpret_cast<void*>(first), kPage, &in_use) != 0 || in_use & 1) return;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: failing changes nothing
  const uintptr_t floor = begin / kHugePage * kHugePage;
  torch::stable::parallel_for(0, (end - floor + kHugePage - 1) / kHugePage, 1, [&](int64_t from, int64_t to) {
    const uintptr_t stop = std::min<uintptr_t>(end, floor + to * kHugePage);
    for (uintptr_t p = std::max<uintptr_t>(begin, floor + from * kHugePage); p < stop; p += kPage)
      *reinterpret_cast<volatile char*>(p) = 0;
  });
#endif
}

// As torch::stable::new_empty, which looks its operator up by name and boxes the arguments: 0.5 us of the 6 of a small kd_loss, each time.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType dtype) {
  int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_aten_new_empty(like.get(), size.data(), static_cast<int64_t>(size.size()), &type, nullptr, nullptr, 0, nullptr, &out));
  return Tensor(out);
}

// A fresh tensor on `like`'s device, for a kernel to fill.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType dtype) {
  Tensor out = allocate(like, size, dtype);
  take_into_use(out.data_ptr(), out.numel() * out.element_size());
  return out;
}

// Whether a gradient goes past the caches: those of a core complex, 16 MB and more in servers, do not keep it and what was read
// for it until somebody reads it. Smaller ones do stay in cache for the next operator.
inline bool past_cache(int64_t bytes) { return bytes > 16 << 20; }

// Runs fn(item, scratch) for every item on torch's threads. A worker takes items of its own part of them, which it finds in its caches
// when an op comes again, and then what others have left of theirs, because items differ in cost (padding). Each writes its own output, so
// which thread runs it does not show. `scratch` is a worker's own.
// `together`: how many neighbours a worker takes at once at most. Small items that stream through memory are faster in longer runs.
template <typename F>
void run_items(int64_t items, int64_t scratch_floats, const F& fn, int64_t together = 1) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t workers = items < threads ? items : threads;
  if (workers == 0) return;
  const size_t bytes = (scratch_floats * sizeof(float) + 4095) / 4096 * 4096;  // a page apart: no false sharing
  std::unique_ptr<void, decltype(&std::free)> scratch(bytes ? std::aligned_alloc(4096, bytes * workers) : nullptr, std::free);
  STD_TORCH_CHECK(!bytes || scratch, "out of memory: ", bytes * workers, " bytes of workspace");
  const int64_t share = std::max<int64_t>(1, std::min(together, items / (2 * workers)));
  const int64_t shares = (items + share - 1) / share;
  struct alignas(128) Taken {  // two lines, which are fetched together
    std::atomic<int64_t> shares{0};
  };
  std::vector<Taken> taken(workers);
  const auto work = [&](int64_t worker) {
    float* mine = reinterpret_cast<float*>(static_cast<char*>(scratch.get()) + worker * bytes);
    for (int64_t i = 0; i < workers; ++i) {
      const int64_t part = (worker + i) % workers, begin = part * shares / workers, end = (part + 1) * shares / workers;
      for (int64_t at = begin + taken[part].shares++; at < end; at = begin + taken[part].shares++)
        for (int64_t item = at * share; item < std::min((at + 1) * share, items); ++item) fn(item, mine);
    }
  };
  if (workers == 1) return work(0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work(worker);
  });
}

// A gradient that a kernel writes for x, contiguous; float32 where it is kept for backward.
inline Tensor new_gradient(const Tensor& x, ScalarType dtype) {
  return new_tensor(x, x.sizes(), dtype);
}

// The upstream gradient of a scalar loss.
inline float upstream_of(const Tensor& grad) {
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.numel() == 1, "grad must be a float32 scalar");
  return *static_cast<const float*>(grad.const_data_ptr());
}

// a * saved, in x's dtype and shape.
inline Tensor scaled(float a, const Tensor& saved, const Tensor& x) {
  STD_TORCH_CHECK(saved.is_contiguous() && saved.numel() == x.numel(), "the saved gradient must have its input's shape");
  Tensor out = new_gradient(x, x.scalar_type());
  const float* from = static_cast<const float*>(saved.const_data_ptr());
  void* to = out.mutable_data_ptr();
  const DType dtype = dtype_of(x, "the input");
  const cpu::Table& kernels = table();
  constexpr int64_t kChunk = 1 << 16;
  const int64_t n = saved.numel();
  run_items((n + kChunk - 1) / kChunk, 0, [&](int64_t item, float*) {
    kernels.scaled_copy(from, a, to, dtype, item * kChunk, std::min(kChunk, n - item * kChunk));
  });
  return out;
}

// Backward where forward has left the gradient for an upstream of 1.
inline Tensor scale_gradient(const Tensor& grad, const Tensor& saved, const Tensor& x) { return scaled(upstream_of(grad), saved, x); }

inline Tensor new_scalar(const Tensor& like, double value) {
  Tensor out = allocate(like, {}, ScalarType::Float);
  *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(value);
  return out;
}

}  // namespace kd
