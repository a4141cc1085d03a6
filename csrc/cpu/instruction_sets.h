// Which of the inner loops' instruction sets this machine runs.
#pragma once

#include <cstdlib>
#include <string_view>

#include "../storage.h"

namespace lid {

// avx2 means AVX2 with FMA and F16C, avx512 AVX-512 F, BW, DQ and VL as well; what runs anywhere is baseline.
enum class InstructionSet { baseline, avx2, avx512 };

// The best that is there; LIDNET_FAST_CPU=avx2 or =baseline in the environment chooses a lesser one.
inline InstructionSet instruction_set() {
#if defined(__x86_64__)
  static const InstructionSet chosen = [] {
    const char* variable = std::getenv("LIDNET_FAST_CPU");
    const std::string_view name = variable ? variable : "";
    if (name == "baseline" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c")) {
      return InstructionSet::baseline;
    }
    if (name == "avx2" || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
      return InstructionSet::avx2;
    }
    return InstructionSet::avx512;
  }();
  return chosen;
#else
  return InstructionSet::baseline;
#endif
}

}  // namespace lid
