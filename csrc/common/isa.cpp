#include "common/isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace maskdm {
namespace {

int detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  int best = 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    best = 3;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = 4;
    }
  }
  const char* wanted = std::getenv("MASKDM_FAST_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int level = 2; level <= 4; ++level) {
    if (wanted[0] == 'v' && wanted[1] == '0' + level && wanted[2] == '\0') {
      if (level > best) {
        throw std::runtime_error("MASKDM_FAST_ISA=" + std::string(wanted) + ", but this processor has x86-64-v" +
                                 std::to_string(best) + " at most");
      }
      return level;
    }
  }
  throw std::runtime_error("MASKDM_FAST_ISA is '" + std::string(wanted) + "', want v2, v3 or v4");
#else
  return 0;
#endif
}

int64_t cpu_isa_level() { return isa_level(); }

bool cpu_is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

int isa_level() {
  static const int level = detect();
  return level;
}

}  // namespace maskdm

STABLE_TORCH_LIBRARY_FRAGMENT(maskdm_fast, m) {
  m.def("cpu_isa_level() -> int");
  m.def("cpu_is_intel() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(maskdm_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa_level", TORCH_BOX(&maskdm::cpu_isa_level));
  m.impl("cpu_is_intel", TORCH_BOX(&maskdm::cpu_is_intel));
}
