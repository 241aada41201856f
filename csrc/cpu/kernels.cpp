// Every CPU kernel, compiled once per ISA with -DKD_ISA=<name> and that ISA's flags. All of it lives in an anonymous namespace:
// the object exports its table and nothing else, so no other translation unit can end up with code that its CPU lacks.
#include <cstdint>
#if defined(__AVX2__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns about its own _mm512_undefined_ps (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#endif

#include "../core/gelu_curve.h"
#include "table.h"

#define KD_STRING_(x) #x
#define KD_STRING(x) KD_STRING_(x)

namespace kd::cpu::KD_ISA {
namespace {
#include "vec.h"
#include "pair.h"
#include "kd_loss.inl"
#include "kd_loss_narrow.inl"
#include "linear_kd_loss.inl"
#include "topk_kd_loss.inl"
#include "gemm.inl"
#include "transpose.inl"
#include "attention_pack.inl"
#include "attention_rows.inl"
#include "attention.inl"
#include "attention_mse.inl"
#include "attention_map.inl"
#include "hidden.inl"
#include "hidden_mse.inl"
#if defined(__AMX_BF16__)
#include "gemm_amx.inl"
#include "hidden_mse_products_amx.inl"
#else
#include "hidden_mse_products.inl"
#endif
#include "hidden_mse_projection.inl"
#include "quant_rows.inl"
#include "quant_unpack.inl"
#include "quant_gemm.inl"
#include "quant_linear.inl"
#include "varlen_attention_rows.inl"
#if defined(__AMX_BF16__)
#include "varlen_attention_products_amx.inl"
#include "varlen_attention_bf16_amx.inl"
#else
#include "varlen_attention_products.inl"
#endif
#include "varlen_attention.inl"
#include "encoder.inl"
#include "hidden_cosine.inl"
#include "moment_mse.inl"
#include "gram_mse_blocks.inl"
#if defined(__AMX_BF16__)
#include "gram_mse_products_amx.inl"
#else
#include "gram_mse_products.inl"
#endif
#include "gram_mse.inl"
}  // namespace

const Table table = {
    .isa = KD_STRING(KD_ISA),
#if defined(__AMX_BF16__)
    .exact = &avx512::table,
#endif
    .kd_loss_forward = kd_loss_forward,
    .kd_loss_backward = kd_loss_backward,
    .add_rows = add_rows,
    .topk_scratch = topk_scratch,
    .topk_forward = topk_forward,
    .topk_backward = topk_backward,
    .attention_scratch = attention_scratch,
    .attention_maps = attention_maps,
    .attention_scores_scratch = attention_scores_scratch,
    .attention_scores = attention_scores,
    .attention_scores_backward = attention_scores_backward,
    .attention_map_scratch = attention_map_scratch,
    .attention_map_forward = attention_map_forward,
    .attention_map_backward = attention_map_backward,
    .scaled_copy = scaled_copy,
    .hidden_forward = hidden_forward,
    .hidden_backward = hidden_backward,
    .projection_plan = projection_plan,
    .projection_pack = projection_pack,
    .projection_rows = projection_rows,
    .projection_weight = projection_weight,
    .quantize_rows = quantize_rows,
    .quant_linear_scratch = quant_linear_scratch,
    .quant_linear = quant_linear,
    .quant_linear_float_scratch = quant_linear_float_scratch,
    .quant_linear_float = quant_linear_float,
    .varlen_attention_scratch = varlen_attention_scratch,
    .varlen_attention = varlen_attention,
    .normalize_rows = normalize_rows,
    .hidden_cosine = hidden_cosine,
    .moment_forward = moment_forward,
    .moment_backward = moment_backward,
    .gram_block = gram_block,
    .gram_scratch = gram_scratch,
    .gram_tile = gram_tile,
};

}  // namespace kd::cpu::KD_ISA
