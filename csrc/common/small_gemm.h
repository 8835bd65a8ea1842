// C[M, N] = A[M, L] B[L, N] for matrices that fit in cache: registers hold a tile of C, A is read one scalar at a time
// through any strides, B in vectors along N. N is a multiple of the lanes; the padding columns of B must be readable.
#pragma once

#include "common/simd.h"

namespace maskdm::MASKDM_ISA {

template <class T>
struct ConstMatrix {
  const T* data;
  int64_t row, column;  // strides
};

// Rows x (Vectors * lanes) of C. With Add, C is added to instead of overwritten.
template <class T, int Rows, int Vectors, bool Add>
MASKDM_INLINE void gemm_tile(int64_t depth, ConstMatrix<T> a, const T* b, int64_t b_row, T* c, int64_t c_row) {
  using V = vector_t<T>;
  V sum[Rows][Vectors];
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Vectors; ++j) sum[i][j] = Add ? load(c + i * c_row + j * kLanes<T>) : V{};
  }
  for (int64_t l = 0; l < depth; ++l) {
    V right[Vectors];
    for (int j = 0; j < Vectors; ++j) right[j] = load(b + l * b_row + j * kLanes<T>);
    for (int i = 0; i < Rows; ++i) {
      const T left = a.data[i * a.row + l * a.column];
      for (int j = 0; j < Vectors; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Vectors; ++j) store(c + i * c_row + j * kLanes<T>, sum[i][j]);
  }
}

template <class T, int Vectors, bool Add, int Rows>
void gemm_tile_of(int64_t rows, int64_t depth, ConstMatrix<T> a, const T* b, int64_t b_row, T* c, int64_t c_row) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return gemm_tile_of<T, Vectors, Add, Rows - 1>(rows, depth, a, b, b_row, c, c_row);
  }
  gemm_tile<T, Rows, Vectors, Add>(depth, a, b, b_row, c, c_row);
}

// The rows in tiles of nearly equal height, at most MaxRows: a low last tile would leave the multipliers waiting.
template <class T, int Vectors, bool Add, int MaxRows>
void gemm_rows(int64_t rows, int64_t depth, ConstMatrix<T> a, const T* b, int64_t b_row, T* c, int64_t c_row) {
  for (int64_t tiles = (rows + MaxRows - 1) / MaxRows; tiles > 0; --tiles) {
    const int64_t height = (rows + tiles - 1) / tiles;
    gemm_tile_of<T, Vectors, Add, MaxRows>(height, depth, a, b, b_row, c, c_row);
    rows -= height;
    a.data += height * a.row;
    c += height * c_row;
  }
}

// Tiles are as large as the register file allows: 32 vector registers with AVX-512 and NEON, 16 otherwise.
template <class T, bool Add>
void gemm(int64_t rows, int64_t columns, int64_t depth, ConstMatrix<T> a, const T* b, int64_t b_row, T* c,
          int64_t c_row) {
  int64_t j = 0;
#if defined(__AVX512F__) || defined(__aarch64__)
  for (; columns - j >= 4 * kLanes<T>; j += 4 * kLanes<T>) {
    gemm_rows<T, 4, Add, 6>(rows, depth, a, b + j, b_row, c + j, c_row);
  }
  constexpr int kRows = 12;
#else
  constexpr int kRows = 6;
#endif
  for (; columns - j >= 2 * kLanes<T>; j += 2 * kLanes<T>) {
    gemm_rows<T, 2, Add, kRows>(rows, depth, a, b + j, b_row, c + j, c_row);
  }
  for (; j < columns; j += kLanes<T>) gemm_rows<T, 1, Add, 12>(rows, depth, a, b + j, b_row, c + j, c_row);
}

}  // namespace maskdm::MASKDM_ISA
