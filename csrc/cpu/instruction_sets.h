// Which of the inner loops' instruction sets this machine runs.
#pragma once

#include <cstdlib>
#include <string_view>

namespace lid {

enum class Storage { float32, float16, bfloat16 };

// AVX2 with FMA and F16C; LIDNET_FAST_CPU=baseline in the environment chooses the portable loops all the same.
inline bool use_avx2() {
#if defined(__x86_64__)
  const char* chosen = std::getenv("LIDNET_FAST_CPU");
  return !(chosen && std::string_view(chosen) == "baseline") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

}  // namespace lid
