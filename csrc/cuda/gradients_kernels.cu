#include "gradients.h"

#include <algorithm>
#include <type_traits>

#include "device.cuh"

namespace lid {
namespace cuda {
namespace {

// Blocks that a gradient is divided among, so that all of a GPU works on it, and the fewest values of a block.
constexpr int64_t kBlocks = 256, kLeastValues = 8 * kThreads;

int64_t groups(int64_t count, int64_t size) { return (count + size - 1) / size; }

// A block multiplies a group of kGroup gradients with another one, over a chunk of so many values of one sample; every thread
// keeps all the products of its values in registers.
template <typename S, int kGroup>
__global__ void __launch_bounds__(kThreads) multiply_kernel(GramianLaunch a, int64_t chunks, int64_t values) {
  using T = Arithmetic<S>;
  constexpr int kWarps = kThreads / 32, kProducts = kGroup * kGroup;
  LID_SHARED(T, of_warps, kWarps * kProducts);
  const int64_t sides = (a.count + kGroup - 1) / kGroup, chunk = blockIdx.x % chunks, sample = blockIdx.x / chunks % a.samples;
  const int64_t pair = blockIdx.x / (chunks * a.samples), first = pair / sides * kGroup, other = pair % sides * kGroup;
  if (first > other) return;  // the result is symmetric
  const S* gradients = static_cast<const S*>(a.gradients) + sample * a.length;
  const int64_t stride = a.samples * a.length, end = (chunk + 1) * values < a.length ? (chunk + 1) * values : a.length;
  T products[kGroup][kGroup] = {};
  for (int64_t i = chunk * values + threadIdx.x; i < end; i += kThreads) {
    T of_first[kGroup], of_other[kGroup];
    LID_UNROLL for (int k = 0; k < kGroup; ++k) {
      of_first[k] = first + k < a.count ? load(gradients + (first + k) * stride + i) : T(0);
      of_other[k] = first == other ? of_first[k] : other + k < a.count ? load(gradients + (other + k) * stride + i) : T(0);
    }
    LID_UNROLL for (int j = 0; j < kGroup; ++j) {
      LID_UNROLL for (int k = 0; k < kGroup; ++k) products[j][k] += of_first[j] * of_other[k];
    }
  }
  LID_UNROLL for (int j = 0; j < kGroup; ++j) {
    LID_UNROLL for (int k = 0; k < kGroup; ++k) {
      const T sum = warp_sum(products[j][k]);
      if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32 * kProducts + j * kGroup + k] = sum;
    }
  }
  __syncthreads();
  // Each thread one product.
  const int64_t row = first + threadIdx.x / kGroup, column = other + threadIdx.x % kGroup;
  if (threadIdx.x >= kProducts || row >= a.count || column >= a.count) return;
  T sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += of_warps[warp * kProducts + threadIdx.x];
  double* partial = a.partial + sample * a.count * a.count * chunks + chunk;
  partial[(row * a.count + column) * chunks] = sum;
  if (first != other) partial[(column * a.count + row) * chunks] = sum;
}

// Each warp one entry of the result.
template <typename T>
__global__ void __launch_bounds__(kThreads) add_chunks_kernel(GramianLaunch a, int64_t chunks) {
  const int64_t entry = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (entry >= a.samples * a.count * a.count) return;
  double sum = 0;
  for (int64_t chunk = threadIdx.x % 32; chunk < chunks; chunk += 32) sum += a.partial[entry * chunks + chunk];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) static_cast<T*>(a.result)[entry] = static_cast<T>(sum);
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

int64_t gramian_chunks(const GramianLaunch& launch) {
  return std::min(groups(launch.length, kLeastValues), groups(kBlocks, launch.samples));
}

int launch_gramian(const GramianLaunch& launch, void* stream) {
  const int64_t chunks = gramian_chunks(launch);
  const bool few = launch.count <= 4;
  const int64_t sides = groups(launch.count, few ? 4 : 6);
  with_storage<Half, BFloat16>(launch.storage, [&](auto* stored) {
    using S = std::remove_pointer_t<decltype(stored)>;
    const auto multiply = few ? multiply_kernel<S, 4> : multiply_kernel<S, 6>;
    if (chunks > 0) {
      const int64_t values = groups(groups(launch.length, chunks), kThreads) * kThreads;
      LID_LAUNCH(multiply, sides * sides * launch.samples * chunks, kThreads, stream, launch, chunks, values);
    }
    const auto add = add_chunks_kernel<Arithmetic<S>>;
    LID_LAUNCH(add, groups(launch.samples * launch.count * launch.count, kThreads / 32), kThreads, stream, launch, chunks);
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
