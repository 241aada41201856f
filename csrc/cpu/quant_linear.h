// quant_linear: how weights lie for the CPU kernels, how the work is cut into items, and the memory a worker needs.
#pragma once
#include <cstdint>

#include "../core/packed.h"
#include "../ops/quant_linear.h"

namespace kd::cpu {

constexpr int64_t kGroupRows = 16;       // output features whose weights lie together: a vector of sums
constexpr int64_t kPanelRows = 64;       // output features of a panel, which an item multiplies
constexpr int64_t kPanelGroups = kPanelRows / kGroupRows;
constexpr int64_t kDepthAlign = 64;      // columns are padded to it: a tile of AMX
constexpr int64_t kQuantizedRows = 4;    // rows of activations that one item quantises
constexpr int64_t kQuantizedTogether = 32;  // such items in turn, at most: rows come from memory, whose prefetchers follow long runs
constexpr int64_t kQuantChunk = 256;     // columns whose 8-bit weights, 16 KB a panel, stay in the first-level cache

// Blocks of rows, one of which an item multiplies with a panel. A block's codes, 512 KB, stay in the second-level cache while all panels
// pass; but unpacking a panel costs as much as multiplying some eight rows with it, so low bits take no fewer than 240 rows.
static inline int64_t quant_row_blocks(const QuantLinear& op) {
  const int64_t least = op.weights.bits == 8 ? 48 : 240, fitting = (512 << 10) / op.weights.depth;
  const int64_t most = fitting > least ? fitting : least;
  return (op.rows + most - 1) / most;
}

static inline int64_t quant_row_block(const QuantLinear& op) {
  const int64_t blocks = quant_row_blocks(op), even = blocks > 0 ? (op.rows + blocks - 1) / blocks : 0;
  return (even + 47) / 48 * 48;  // whole tiles of 6 and of 16 rows
}

// Bytes of the quantised activations: whole groups of 16 rows, a tile's.
static inline int64_t quant_code_bytes(const QuantLinear& op) { return (op.rows + 15) / 16 * 16 * op.weights.depth; }

// Neighbours share their rows and read neighbouring panels.
static inline int64_t quant_linear_items(const QuantLinear& op) { return op.weights.panels * quant_row_blocks(op); }

// How many neighbours a worker takes in turn: while it multiplies a panel it asks for the next, if that is its own.
static inline int64_t quant_linear_together(const QuantLinear& op, int64_t workers) {
  const int64_t share = quant_linear_items(op) / (2 * workers);
  return share < 1 ? 1 : share < 6 ? share : 6;
}

// Weights from the packed format to the layout of `QuantWeights`: one run of bytes with a header, 64-byte aligned sections.
int64_t quant_prepared_bytes(const Packed& packed);
void quant_prepare(const Packed& packed, uint8_t* prepared);  // which is 64-byte aligned

// The way back, to the bit: the sections of `packed`, which has its header, are written from weights that were prepared from it. Whether
// they can have been is for quant_prepared_from to say.
bool quant_prepared_from(const Packed& packed, const QuantWeights& weights);
void quant_restore(const QuantWeights& weights, const Packed& packed);

// The weights in a prepared run of bytes, or null and what is wrong with it.
const char* quant_weights(const uint8_t* prepared, int64_t size, QuantWeights& weights);

}  // namespace kd::cpu
