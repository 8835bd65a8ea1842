#include "linear/linear.h"

#include "common/simd.h"

namespace maskdm::MASKDM_ISA {
namespace {

constexpr int kStep = kLanes<float>;
constexpr int64_t kStrip = 128 / sizeof(float);  // two cache lines of a row: the second comes with the first

// A column adds up in blocks of kStep rows, then groups of 16 blocks, so that a long one loses little.
struct ColumnSums {
  vfloat total{}, group{};
  int blocks = 0;
  void add(vfloat block) {
    group += block;
    if (++blocks == 16) total += group, group = vfloat{}, blocks = 0;
  }
  vfloat sum() const { return total + group; }
};

void run_vectors(const TransposeArgs& a, int64_t column) {
  ColumnSums sums;
  int64_t r = 0;
  for (; r + kStep <= a.rows; r += kStep) {
    const float* from = a.from + r * a.columns + column;
    transpose(from, a.columns, kStep, kStep, a.out + column * a.rows + r, a.rows);
    vfloat block{};
    for (int i = 0; i < kStep; ++i) block += load(from + i * a.columns);
    sums.add(block);
  }
  vfloat rest{};
  for (; r < a.rows; ++r) {
    const float* from = a.from + r * a.columns + column;
    for (int i = 0; i < kStep; ++i) a.out[(column + i) * a.rows + r] = from[i];
    rest += load(from);
  }
  if (a.sums != nullptr) store(a.sums + column, sums.sum() + rest);
}

void run_column(const TransposeArgs& a, int64_t column) {
  double sum = 0;
  for (int64_t r = 0; r < a.rows; ++r) {
    const float value = a.from[r * a.columns + column];
    a.out[column * a.rows + r] = value;
    sum += value;
  }
  if (a.sums != nullptr) a.sums[column] = static_cast<float>(sum);
}

void run(const TransposeArgs& a, int64_t item_begin, int64_t item_end) {
  const int64_t end = item_end * kStrip < a.columns ? item_end * kStrip : a.columns;
  int64_t column = item_begin * kStrip;
  for (; column + kStep <= end; column += kStep) run_vectors(a, column);
  for (; column < end; ++column) run_column(a, column);
}

}  // namespace

const LinearKernels linear_kernels = {kStrip, run};

}  // namespace maskdm::MASKDM_ISA
