// Vectors of one register, written with the vector extensions of GCC and Clang, and the few functions of them that the
// kernels need. Every operation is portable C++; the instruction set is the one that the file is compiled for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

#if defined(__AVX512F__)
#define MASKDM_VECTOR_BYTES 64
#elif defined(__AVX__)
#define MASKDM_VECTOR_BYTES 32
#else
#define MASKDM_VECTOR_BYTES 16
#endif

#define MASKDM_INLINE inline __attribute__((always_inline))

namespace maskdm::MASKDM_ISA {

typedef float vfloat __attribute__((vector_size(MASKDM_VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(MASKDM_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(MASKDM_VECTOR_BYTES)));
typedef uint64_t vulong __attribute__((vector_size(MASKDM_VECTOR_BYTES)));

template <class T>
struct vector_of;
template <>
struct vector_of<float> {
  using type = vfloat;
};
template <>
struct vector_of<double> {
  using type = vdouble;
};
template <>
struct vector_of<uint64_t> {
  using type = vulong;
};
template <class T>
using vector_t = typename vector_of<T>::type;

template <class T>
constexpr int kLanes = MASKDM_VECTOR_BYTES / sizeof(T);

template <class T>
constexpr int64_t round_up_to_lanes(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <class T>
MASKDM_INLINE vector_t<T> load(const T* p) {
  vector_t<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
MASKDM_INLINE void store(T* p, vector_t<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T>
MASKDM_INLINE vector_t<T> splat(T x) {
  return x - vector_t<T>{};
}
template <class V>
MASKDM_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}

// The lanes of a and b in turns, a[0] b[0] a[1] b[1] ..: the first half of that sequence, or the second.
#if defined(__clang__)
#define MASKDM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MASKDM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, mask_of_t<decltype(a)>{__VA_ARGS__})
template <class V>
using mask_of_t = decltype(V{} == V{});
#endif
template <class V>
MASKDM_INLINE V interleave_low(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  if constexpr (lanes == 2) return MASKDM_SHUFFLE(a, b, 0, 2);
  if constexpr (lanes == 4) return MASKDM_SHUFFLE(a, b, 0, 4, 1, 5);
  if constexpr (lanes == 8) return MASKDM_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  if constexpr (lanes == 16) return MASKDM_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
template <class V>
MASKDM_INLINE V interleave_high(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  if constexpr (lanes == 2) return MASKDM_SHUFFLE(a, b, 1, 3);
  if constexpr (lanes == 4) return MASKDM_SHUFFLE(a, b, 2, 6, 3, 7);
  if constexpr (lanes == 8) return MASKDM_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  if constexpr (lanes == 16) {
    return MASKDM_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

// to[c, r] = from[r, c] for rows x columns elements, both multiples of the lanes.
template <class T>
inline void transpose(const T* from, int64_t from_row, int64_t rows, int64_t columns, T* to, int64_t to_row) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < rows; r += L) {
    for (int64_t c = 0; c < columns; c += L) {
      vector_t<T> v[L], w[L];
      for (int i = 0; i < L; ++i) v[i] = load(from + (r + i) * from_row + c);
      // Interleaving the first half of the rows with the second rotates the bits of the pair (row, lane) by one place;
      // after log2(L) times row and lane have changed places.
      for (int step = 1; step < L; step *= 2) {
        for (int i = 0; i < L / 2; ++i) {
          w[2 * i] = interleave_low(v[i], v[i + L / 2]);
          w[2 * i + 1] = interleave_high(v[i], v[i + L / 2]);
        }
        for (int i = 0; i < L; ++i) v[i] = w[i];
      }
      for (int i = 0; i < L; ++i) store(to + (c + i) * to_row + r, v[i]);
    }
  }
}

MASKDM_INLINE vint as_int(vfloat x) {
  vint i;
  std::memcpy(&i, &x, sizeof i);
  return i;
}
MASKDM_INLINE vfloat as_float(vint i) {
  vfloat x;
  std::memcpy(&x, &i, sizeof x);
  return x;
}

// The product of the low 32-bit words of each lane. One instruction, which compilers do not find in a 64-bit product.
MASKDM_INLINE vulong multiply_low_words(vulong a, uint32_t b) {
#if defined(__AVX512F__)
  return (vulong)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (vulong)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__)
  return (vulong)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// The nearest integer, for |x| < 2^22: adding 1.5 * 2^23 pushes the fraction out of the mantissa.
MASKDM_INLINE vfloat round_to_int(vfloat x) {
  const vfloat shifted = x + 12582912.0f;
  return shifted - 12582912.0f;
}

// e^x to 1.5 ulp for x in [-87.3, 88.3]; clamped outside, so exp_of(-inf) is e^-87.3 = 1.2e-38. NaN stays NaN.
MASKDM_INLINE vfloat exp_of(vfloat x) {
  x = x < splat(-87.3f) ? splat(-87.3f) : x;
  x = x > splat(88.3f) ? splat(88.3f) : x;
  const vfloat n = round_to_int(x * 1.44269504f);
  const vfloat r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts, so that n * high is exact
  // Taylor coefficients 1/k!; |r| <= 0.347, so the first omitted term is below 2e-8.
  vfloat p = splat(1.0f / 5040.0f);
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * as_float((__builtin_convertvector(n, vint) + 127) << 23);
}
MASKDM_INLINE vdouble exp_of(vdouble x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// ln x to 2 ulp for normal x in (0, 1).
MASKDM_INLINE vfloat log_of(vfloat x) {
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(s), s = (m - 1) / (m + 1).
  const vint offset = as_int(x) - 0x3f3504f3;
  const vint e = offset >> 23;
  const vfloat m = as_float((offset & 0x007fffff) + 0x3f3504f3);
  const vfloat f = m - 1.0f;
  const vfloat s = f / (f + 2.0f), s2 = s * s;
  vfloat p = splat(1.0f / 9.0f);
  p = p * s2 + 1.0f / 7.0f;
  p = p * s2 + 1.0f / 5.0f;
  p = p * s2 + 1.0f / 3.0f;
  const vfloat exponent = __builtin_convertvector(e, vfloat);
  // 2 s = f - s f exactly, so the large term f enters without the rounding of the division.
  return exponent * 0.693145752f + ((f - s * (f - 2.0f * s2 * p)) + exponent * 1.42860677e-6f);
}

// sin and cos of 2 pi u for u in [0, 1].
MASKDM_INLINE void sincos_2pi(vfloat u, vfloat& sine, vfloat& cosine) {
  const vfloat quarter_turns = round_to_int(u * 4.0f);
  const vfloat a = (u - quarter_turns * 0.25f) * 6.28318531f;  // the difference is exact, |a| <= pi / 4
  const vint quadrant = __builtin_convertvector(quarter_turns, vint);
  const vfloat a2 = a * a;
  vfloat s = splat(1.0f / 362880.0f);
  s = s * a2 - 1.0f / 5040.0f;
  s = s * a2 + 1.0f / 120.0f;
  s = s * a2 - 1.0f / 6.0f;
  s = s * a2 * a + a;
  vfloat c = splat(1.0f / 40320.0f);
  c = c * a2 - 1.0f / 720.0f;
  c = c * a2 + 1.0f / 24.0f;
  c = c * a2 - 0.5f;
  c = c * a2 + 1.0f;
  const vint swap = (quadrant & 1) != 0;
  const vfloat sin_magnitude = swap ? c : s, cos_magnitude = swap ? s : c;
  sine = as_float(as_int(sin_magnitude) ^ ((quadrant & 2) << 30));
  cosine = as_float(as_int(cos_magnitude) ^ (((quadrant + 1) & 2) << 30));
}

MASKDM_INLINE vfloat sqrt_of(vfloat x) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX__)
  return (vfloat)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (vfloat)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

}  // namespace maskdm::MASKDM_ISA
