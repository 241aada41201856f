// The encoder on CUDA: all its blocks queued on a stream; a status out (0, or a cudaError_t). Nothing here waits for the device.
//
// Rows are room for tokens: how many there are says cu_seqlens[sequences], on the device. Rows from there on are neither read nor written.
#pragma once
#include "../ops/encoder.h"
#include "../ops/varlen_attention.h"

namespace kd::cuda {

struct Encoder {
  const EncoderBlock* blocks;
  int64_t count;
  const void* x;  // [rows, features], contiguous
  int64_t rows, features;
  DType dtype;                // of x, of out and of everything between that is not in codes
  VarlenAttention attention;  // its sequences and heads; the rest is filled in
  void* out;                  // [rows, features] behind the last block, or behind each: [count, rows, features]
  bool all_states;
};

// Of memory that begins at a multiple of 64 bytes.
int64_t encoder_workspace_bytes(const Encoder& op);
int encoder(const Encoder& op, void* workspace, void* stream);

}  // namespace kd::cuda
