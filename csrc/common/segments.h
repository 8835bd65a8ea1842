// Where the tokens of each image are: K per image, or packed with cumulative counts.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/isa.h"

namespace maskdm {

struct Segments {
  int64_t num_images;
  int64_t tokens_per_image;   // used when cu_seqlens is null
  const int32_t* cu_seqlens;  // [num_images + 1], or null
};

namespace MASKDM_ISA {

inline int64_t segment_begin(const Segments& segments, int64_t image) {
  return segments.cu_seqlens != nullptr ? segments.cu_seqlens[image] : image * segments.tokens_per_image;
}

// The image that token t belongs to, for 0 <= t < all tokens.
inline int64_t image_of(const Segments& segments, int64_t t) {
  if (segments.cu_seqlens == nullptr) return t / segments.tokens_per_image;
  const int32_t* ends = segments.cu_seqlens + 1;
  return std::upper_bound(ends, ends + segments.num_images, t) - ends;
}

}  // namespace MASKDM_ISA
}  // namespace maskdm
