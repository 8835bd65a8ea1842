// Checks of values that only the data can show. Shapes and dtypes are checked in Python.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "common/segments.h"

namespace maskdm {

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// cu_seqlens must start at 0, never fall and end at the number of packed tokens.
inline void check_segments(const char* op, const Segments& segments, int64_t num_tokens) {
  if (segments.cu_seqlens == nullptr) return;
  const int32_t* cu = segments.cu_seqlens;
  if (cu[0] != 0) fail(op, ": cu_seqlens[0] is ", cu[0], ", want 0");
  for (int64_t b = 0; b < segments.num_images; ++b) {
    if (cu[b + 1] < cu[b]) fail(op, ": cu_seqlens falls from ", cu[b], " to ", cu[b + 1], " at ", b + 1);
  }
  if (cu[segments.num_images] != num_tokens) {
    fail(op, ": cu_seqlens ends at ", cu[segments.num_images], ", want the number of packed tokens, ", num_tokens);
  }
}

// 0 <= id < num_tokens; `distinct` asks too that no image names a token twice.
inline void check_ids(const char* op, const int64_t* ids, const Segments& segments, int64_t num_tokens, bool distinct) {
  std::vector<int64_t> last_image(distinct ? num_tokens : 0, -1);
  for (int64_t b = 0; b < segments.num_images; ++b) {
    const int64_t begin = MASKDM_ISA::segment_begin(segments, b), end = MASKDM_ISA::segment_begin(segments, b + 1);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t id = ids[t];
      if (id < 0 || id >= num_tokens) {
        fail(op, ": ids_keep of image ", b, " holds ", id, " at ", t - begin, ", want 0 <= id < ", num_tokens);
      }
      if (distinct) {
        if (last_image[id] == b) fail(op, ": ids_keep of image ", b, " holds ", id, " twice, want distinct ids");
        last_image[id] = b;
      }
    }
  }
}

}  // namespace maskdm
