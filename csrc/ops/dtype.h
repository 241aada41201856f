// The element types that cross into a kernel.
#pragma once
#include <cstdint>

namespace kd {

enum class DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

}  // namespace kd
