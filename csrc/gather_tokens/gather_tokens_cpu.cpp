#include "gather_tokens/gather_tokens.h"

#include <cstring>

namespace maskdm::MASKDM_ISA {
namespace {

void gather(const GatherArgs& a, int64_t image_begin, int64_t image_end) {
  for (int64_t b = image_begin; b < image_end; ++b) {
    const char* image = a.x + b * a.x_image_bytes;
    const int64_t end = segment_begin(a.segments, b + 1);
    for (int64_t t = segment_begin(a.segments, b); t < end; ++t) {
      std::memcpy(a.out + t * a.row_bytes, image + a.ids[t] * a.x_token_bytes, a.row_bytes);
    }
  }
}

void scatter(const ScatterArgs& a, int64_t* source, int64_t image_begin, int64_t image_end) {
  for (int64_t b = image_begin; b < image_end; ++b) {
    for (int64_t n = 0; n < a.num_tokens; ++n) source[n] = -1;
    const int64_t end = segment_begin(a.segments, b + 1);
    for (int64_t t = segment_begin(a.segments, b); t < end; ++t) source[a.ids[t]] = t;
    char* out = a.out + b * a.num_tokens * a.row_bytes;
    const char* base = a.base != nullptr ? a.base + b * a.base_image_bytes : nullptr;
    const bool base_contiguous = a.base_token_bytes == a.row_bytes;
    for (int64_t n = 0; n < a.num_tokens;) {
      if (source[n] >= 0) {
        if (a.x != nullptr) {
          std::memcpy(out + n * a.row_bytes, a.x + source[n] * a.row_bytes, a.row_bytes);
        } else {
          std::memset(out + n * a.row_bytes, 0, a.row_bytes);
        }
        ++n;
        continue;
      }
      // Neighbouring rows at once: long fills and copies need not read what they overwrite.
      int64_t end_of_run = n + 1;
      while (end_of_run < a.num_tokens && source[end_of_run] < 0 && (base == nullptr || base_contiguous)) ++end_of_run;
      const int64_t bytes = (end_of_run - n) * a.row_bytes;
      if (base != nullptr) {
        std::memcpy(out + n * a.row_bytes, base + n * a.base_token_bytes, bytes);
      } else {
        std::memset(out + n * a.row_bytes, 0, bytes);
      }
      n = end_of_run;
    }
  }
}

}  // namespace

const GatherTokensKernels gather_tokens_kernels = {gather, scatter};

}  // namespace maskdm::MASKDM_ISA
