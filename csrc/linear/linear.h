// The gradient of a weight is g^T x, and PyTorch's products want that left operand with its rows in one piece:
//
//   out[c, r] = from[r, c],    sums[c] = sum_r from[r, c]
//
// One pass: 1 read and 1 write per value. The sums over rows, which are the gradient of a bias, cost no pass of their own.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace maskdm {

struct TransposeArgs {
  int64_t rows, columns;
  const float* from;  // [rows, columns]
  float* out;         // [columns, rows]
  float* sums;        // [columns], or null
};

struct LinearKernels {
  int64_t columns_per_item;
  // Items are strips of that many columns, so that one item adds up a column alone.
  void (*run)(const TransposeArgs&, int64_t item_begin, int64_t item_end);
};

MASKDM_DECLARE_KERNELS(LinearKernels, linear_kernels)

}  // namespace maskdm
