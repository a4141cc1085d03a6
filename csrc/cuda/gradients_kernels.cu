#include "gradients.h"

#include <type_traits>

#include "device.cuh"

namespace lid {
namespace cuda {
namespace {

constexpr int64_t kChunk = 64 * kThreads;  // values of each gradient that a block works on

int64_t groups(int64_t count, int64_t size) { return (count + size - 1) / size; }

// A block multiplies a group of kGroup gradients with another one, over a chunk of one sample; every thread keeps all the
// products of its values in registers.
template <typename S, int kGroup>
__global__ void __launch_bounds__(kThreads) multiply_kernel(GramianLaunch a, int64_t chunks) {
  using T = Arithmetic<S>;
  LID_SHARED(T, scratch, kThreads / 32);
  const int64_t sides = (a.count + kGroup - 1) / kGroup, chunk = blockIdx.x % chunks, sample = blockIdx.x / chunks % a.samples;
  const int64_t pair = blockIdx.x / (chunks * a.samples), first = pair / sides * kGroup, other = pair % sides * kGroup;
  if (first > other) return;  // the result is symmetric
  const S* gradients = static_cast<const S*>(a.gradients) + sample * a.length;
  const int64_t stride = a.samples * a.length, end = chunk * kChunk + kChunk < a.length ? chunk * kChunk + kChunk : a.length;
  T products[kGroup][kGroup] = {};
  for (int64_t i = chunk * kChunk + threadIdx.x; i < end; i += kThreads) {
    T of_first[kGroup], of_other[kGroup];
    LID_UNROLL for (int k = 0; k < kGroup; ++k) {
      of_first[k] = first + k < a.count ? load(gradients + (first + k) * stride + i) : T(0);
      of_other[k] = first == other ? of_first[k] : other + k < a.count ? load(gradients + (other + k) * stride + i) : T(0);
    }
    LID_UNROLL for (int j = 0; j < kGroup; ++j) {
      LID_UNROLL for (int k = 0; k < kGroup; ++k) products[j][k] += of_first[j] * of_other[k];
    }
  }
  double* partial = a.partial + (chunk * a.samples + sample) * a.count * a.count;
  LID_UNROLL for (int j = 0; j < kGroup; ++j) {
    LID_UNROLL for (int k = 0; k < kGroup; ++k) {
      const T sum = block_sum(products[j][k], scratch);
      if (threadIdx.x == 0 && first + j < a.count && other + k < a.count) {
        partial[(first + j) * a.count + other + k] = sum;
        partial[(other + k) * a.count + first + j] = sum;
      }
    }
  }
}

// Each thread one entry of the result.
template <typename T>
__global__ void __launch_bounds__(kThreads) add_chunks_kernel(GramianLaunch a, int64_t chunks) {
  const int64_t entries = a.samples * a.count * a.count, i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= entries) return;
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += a.partial[chunk * entries + i];
  static_cast<T*>(a.result)[i] = static_cast<T>(sum);
}

template <typename S>
__global__ void __launch_bounds__(kThreads) combine_kernel(CombineLaunch a) {
  using T = Arithmetic<S>;
  const S* gradients = static_cast<const S*>(a.gradients);
  const T* coefficients = static_cast<const T*>(a.coefficients);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.length) return;
  T sum = 0;
  for (int64_t t = 0; t < a.count; ++t) sum += coefficients[t] * load(gradients + t * a.length + i);
  store(static_cast<S*>(a.result) + i, sum);
}

}  // namespace

int64_t gramian_chunks(const GramianLaunch& launch) { return groups(launch.length, kChunk); }

int launch_gramian(const GramianLaunch& launch, void* stream) {
  const int64_t chunks = gramian_chunks(launch);
  const bool few = launch.count <= 4;
  const int64_t sides = groups(launch.count, few ? 4 : 6);
  with_storage<Half, BFloat16>(launch.storage, [&](auto* stored) {
    using S = std::remove_pointer_t<decltype(stored)>;
    const auto multiply = few ? multiply_kernel<S, 4> : multiply_kernel<S, 6>;
    if (chunks > 0) LID_LAUNCH(multiply, sides * sides * launch.samples * chunks, kThreads, stream, launch, chunks);
    const auto add = add_chunks_kernel<Arithmetic<S>>;
    LID_LAUNCH(add, groups(launch.samples * launch.count * launch.count, kThreads), kThreads, stream, launch, chunks);
  });
  return static_cast<int>(cudaGetLastError());
}

int launch_combine(const CombineLaunch& launch, void* stream) {
  with_storage<Half, BFloat16>(launch.storage, [&](auto* stored) {
    using S = std::remove_pointer_t<decltype(stored)>;
    const auto kernel = combine_kernel<S>;
    LID_LAUNCH(kernel, groups(launch.length, kThreads), kThreads, stream, launch);
  });
  return static_cast<int>(cudaGetLastError());
}

}  // namespace cuda
}  // namespace lid
