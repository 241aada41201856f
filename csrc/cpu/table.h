// The kernels of one ISA as a table of functions; each ISA's object exports exactly one symbol, its table.
#pragma once
#include <cstdint>

#include "../ops/attention.h"
#include "../ops/encoder.h"
#include "../ops/gram_mse.h"
#include "../ops/moment_mse.h"
#include "attention_map.h"
#include "hidden.h"
#include "hidden_mse.h"
#include "kd_loss.h"
#include "linear_kd_loss.h"
#include "quant_linear.h"
#include "topk_kd_loss.h"
#include "varlen_attention.h"

namespace kd::cpu {

// A kernel computes work item `item` of an op; no two items write the same output. `scratch` is 64-byte aligned memory of the
// worker that runs the item, as large as the op's *_scratch function says (in floats).
struct Table {
  const char* isa;

  // What runs instead where a loss of the functions marked below is not finite: null, or the ISA whose products are fp32 alone.
  const Table* exact = nullptr;

  // One item = kd_rows_per_item(op) rows.
  void (*kd_loss_forward)(const KdLoss&, int64_t item);
  void (*kd_loss_backward)(const KdLoss&, const KdWeights&, int64_t item);

  void (*add_rows)(const AddRows&);

  // One item = topk_rows_per_item(op) rows.
  int64_t (*topk_scratch)(const TopkKdLoss&);
  void (*topk_forward)(const TopkKdLoss&, int64_t item, float* scratch);
  void (*topk_backward)(const TopkKdLoss&, const KdWeights&, int64_t item, float* scratch);

  // One item = one (batch, head).
  int64_t (*attention_scratch)(const Attention&);
  void (*attention_maps)(const Attention&, int64_t item, float* scratch);
  int64_t (*attention_scores_scratch)(const Attention&);
  void (*attention_scores)(const Attention&, int64_t item, float* scratch);  // MSE of scores by Gram matrices
  void (*attention_scores_backward)(const Attention&, int64_t item, float* scratch);

  // One item = map_rows_per_item() rows of one map.
  int64_t (*attention_map_scratch)(const AttentionMap&);
  void (*attention_map_forward)(const AttentionMap&, int64_t item, float* scratch);
  void (*attention_map_backward)(const AttentionMap&, int64_t item, float* scratch);

  // out[first, first + n) = a * x[first, first + n): how backward applies the upstream gradient to a gradient of forward.
  void (*scaled_copy)(const float* x, float a, void* out, DType dtype, int64_t first, int64_t n);

  // Without a projection. One item = hidden_tokens_per_item() tokens of one layer.
  void (*hidden_forward)(const HiddenMse&, int64_t item, float* scratch);
  void (*hidden_backward)(const HiddenMse&, int64_t item, float* scratch);

  // With a projection, in this order. One item = the plan's block of rows of the weight, real tokens (at least one item), or rows of the
  // weight's gradient. Subject to `exact`.
  ProjectionPlan (*projection_plan)(const HiddenProjection&);
  void (*projection_pack)(const HiddenProjection&, int64_t item, float* scratch);
  void (*projection_rows)(const HiddenProjection&, int64_t item, float* scratch);
  void (*projection_weight)(const HiddenProjection&, int64_t item, float* scratch);

  // One item = kQuantizedRows rows of activations (scratch: the weights' depth), then a panel of weights times a block of rows, of these
  // or, weight-only, of the activations as they are.
  void (*quantize_rows)(const QuantLinear&, int64_t item, float* scratch);
  int64_t (*quant_linear_scratch)(const QuantLinear&);
  void (*quant_linear)(const QuantLinear&, int64_t item, float* scratch);
  int64_t (*quant_linear_float_scratch)(const QuantLinear&);
  void (*quant_linear_float)(const QuantLinear&, int64_t item, float* scratch);

  int64_t (*varlen_attention_scratch)(const VarlenAttention&);
  void (*varlen_attention)(const VarlenAttention&, int64_t item, float* scratch);
  void (*normalize_rows)(const NormalizeRows&, int64_t item);  // one item = kQuantizedRows rows

  // Items as without a projection.
  void (*hidden_cosine)(const HiddenLayers&, int64_t item, float* scratch);
  void (*moment_forward)(const MomentMse&, int64_t item, float* scratch);
  void (*moment_backward)(const MomentMse&, int64_t item, float* scratch);

  // One item = what one block of op.block lines meets in one round, item = (round * batch + sequence) * blocks + block; a round at a
  // time. Subject to `exact`.
  int64_t (*gram_block)(int64_t batch, int64_t lines);  // the lines of a block; lines: of the longest sequence
  int64_t (*gram_scratch)(const GramMse&);
  void (*gram_tile)(const GramMse&, int64_t item, float* scratch);
};

namespace generic { extern const Table table; }
namespace avx2 { extern const Table table; }
namespace avx512 { extern const Table table; }
namespace amx { extern const Table table; }

// Every ISA of this build, best first.
struct Candidate {
  const char* name;
  bool (*supported)();  // by this CPU and its operating system
  const Table* table;
};
extern const Candidate candidates[];
extern const int num_candidates;

// The best table that this CPU runs, or the one that KDKERNELS_CPU_ISA names. Null if it names one that does not exist or that
// this CPU lacks; `isa_error()` then says so.
const Table* table();
const char* isa_error();
const char* isa_reason();

}  // namespace kd::cpu
