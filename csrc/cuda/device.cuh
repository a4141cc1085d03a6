// What every CUDA kernel stands on. No header of torch is included by a .cu file: nvcc is slow on them. The tests compile the
// same kernels for the CPU, with LID_EMULATED, against an emulated block of threads (tests/kernels/cuda_emulation.h).
#pragma once

#if defined(LID_EMULATED)
#include "cuda_emulation.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LID_SHARED(type, name, count) __shared__ type name[count]
#define LID_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

#include <cstdint>

#include "../storage.h"
#include "../target.h"

namespace lid {
namespace cuda {

constexpr int kThreads = 256;

// Values as they are stored; the arithmetic is in float, of doubles in double.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename S>
struct ArithmeticOf {
  using Type = float;
};
template <>
struct ArithmeticOf<double> {
  using Type = double;
};
template <typename S>
using Arithmetic = typename ArithmeticOf<S>::Type;

__device__ inline float load(const float* from) { return *from; }
__device__ inline double load(const double* from) { return *from; }
__device__ inline float load(const BFloat16* from) {
  const uint32_t bits = static_cast<uint32_t>(from->bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
__device__ inline float load(const Half* from) {
  const uint16_t bits = from->bits;  // read at once; a memcpy from memory reads bytes
  __half value;
  memcpy(&value, &bits, sizeof value);
  return __half2float(value);
}

__device__ inline void store(float* to, float value) { *to = value; }
__device__ inline void store(double* to, double value) { *to = value; }
__device__ inline void store(BFloat16* to, float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  // To the nearest, ties to even; NaN stays NaN.
  to->bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
__device__ inline void store(Half* to, float value) {
  const __half half = __float2half(value);
  uint16_t bits;
  memcpy(&bits, &half, sizeof bits);
  to->bits = bits;
}

// The sum over the lanes of a warp, right in lane 0. All of its threads must call it.
template <typename T>
__device__ T warp_sum(T value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  return value;
}

// The sum over the threads of a block, right in thread 0; `scratch` has a value for each warp. All threads must call it.
template <typename T, typename Shared>
__device__ T block_sum(T value, Shared& scratch) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T sum = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += scratch[warp];
  }
  __syncthreads();
  return sum;
}

}  // namespace cuda
}  // namespace lid
