// gram_mse: two Gram matrices of each sequence, X_0 X_1^T of the student and of the teacher, compared entry by entry. Over tokens a row
// of X is a token and its depth the features; over the hidden axis a row is a feature and its depth the real tokens.
#pragma once
#include "hidden.h"

namespace kd {

// One factor of a product. The student's and the teacher's have as many rows.
struct GramFactor {
  StatesView states;
  int64_t features;
};

struct GramMse {
  GramFactor s0, s1, t0, t1;
  int64_t tokens;
  bool over_token, symmetric;  // symmetric: s1 is s0 and t1 is t0
  const int64_t* real;         // [first[batch]] which of the batch * tokens are real, in order
  const int64_t* first;        // [batch + 1] where a sequence starts in `real`
  int64_t batch, block, blocks;  // lines of a block, and blocks of the longer factor
  double weight;               // d(loss) / d(sum of squares)
  double* partial;             // [blocks (rounds), batch, blocks]: sums of squares

  // [batch, tokens, features], for an upstream gradient of 1, zeros before; all null: not wanted. grad_1 counts where not symmetric.
  float *grad_0, *grad_1;
};

}  // namespace kd
