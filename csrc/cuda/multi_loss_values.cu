// What is small: the mask of the boxes, centres of planes, the scales of MS-SSIM, and the values from the blocks' sums.

#include <cmath>

#include "device.cuh"
#include "multi_loss.h"
#include "multi_loss_tiles.cuh"

namespace lid {
namespace cuda {
namespace {

constexpr int kMaskRows = 32;  // of a tile

// Which rows, or columns, have their centre in [from, to): the first one, and the one behind the last, within the image.
__device__ inline int first_centre(double from, int64_t side) {
  const double first = ceil(from - 0.5), most = static_cast<double>(side);
  return static_cast<int>(first < 0 ? 0 : first < most ? first : most);
}

// A block for each tile. Of 256 boxes at a time each thread looks whether one touches the tile, and then every pixel looks at
// those that do. Coordinates that aren't numbers touch nothing.
template <typename T>
__global__ void __launch_bounds__(kThreads) mask_kernel(MaskLaunch a) {
  LID_SHARED(int, scratch, kWarps);
  LID_SHARED(unsigned, touching, kWarps);  // a bit for each box
  LID_SHARED(int, ends, 4 * kThreads);     // of each that touches: first column, the one behind the last, and so for rows
  constexpr int kCount = kMaskRows / kWarps;
  const int axes = a.volume ? 3 : 2;
  const Tile tile = tile_of_block<kMaskRows>(a.height, a.width);
  const int image = static_cast<int>(tile.unit / a.depth), slice = static_cast<int>(tile.unit % a.depth);
  const int tile_left = static_cast<int>(tile.left), tile_top = static_cast<int>(tile.top);
  const int row = tile_top + tile.first_row, column = tile_left + tile.column;
  bool covered[kCount] = {};
  for (int64_t first = 0; first < a.boxes; first += kThreads) {
    unsigned bits = 0;
    if (first + threadIdx.x < a.boxes) {
      const T* box = static_cast<const T*>(a.rois) + (first + threadIdx.x) * (1 + 2 * axes);
      bool touches = box[0] == T(image);
      for (int axis = 0; axis < axes; ++axis) touches = touches && box[1 + axis] < box[1 + axes + axis];
      if (touches) {
        const int left = first_centre(box[1], a.width), right = first_centre(box[1 + axes], a.width);
        const int top = first_centre(box[2], a.height), bottom = first_centre(box[2 + axes], a.height);
        touches = left < tile_left + kColumns && right > tile_left && top < tile_top + kMaskRows && bottom > tile_top;
        if (a.volume) touches = touches && first_centre(box[3], a.depth) <= slice && slice < first_centre(box[6], a.depth);
        ends[4 * threadIdx.x] = left;
        ends[4 * threadIdx.x + 1] = right;
        ends[4 * threadIdx.x + 2] = top;
        ends[4 * threadIdx.x + 3] = bottom;
      }
      bits = static_cast<unsigned>(touches) << threadIdx.x % 32;
    }
    for (int offset = 16; offset > 0; offset /= 2) bits |= __shfl_down_sync(~0u, bits, offset);
    if (threadIdx.x % 32 == 0) touching[threadIdx.x / 32] = bits;
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) {
      for (unsigned rest = touching[warp]; rest != 0; rest &= rest - 1) {
        const int box = 4 * (32 * warp + __ffs(static_cast<int>(rest)) - 1);
        const bool beside = column < ends[box] || column >= ends[box + 1];
        const int top = ends[box + 2], bottom = ends[box + 3];
        LID_UNROLL for (int j = 0; j < kCount; ++j) covered[j] |= !beside && row + j >= top && row + j < bottom;
      }
    }
    __syncthreads();
  }
  int inside = 0;
  LID_UNROLL for (int j = 0; j < kCount; ++j) {
    if (row + j >= a.height || column >= a.width) continue;
    a.mask[(tile.unit * a.height + row + j) * a.width + column] = static_cast<uint8_t>(covered[j]);
    inside += covered[j];
  }
  const int sum = block_sum(inside, scratch);
  if (threadIdx.x == 0) a.inside[blockIdx.x] = sum;
}

// A block for each plane; the last one sums the weights instead.
template <typename S>
__global__ void __launch_bounds__(kThreads) prepare_kernel(PrepareLaunch a) {
  using T = Arithmetic<S>;
  LID_SHARED(double, scratch, kWarps);
  const Planes& planes = a.planes;
  const int64_t plane = blockIdx.x, pixels = planes.depth * planes.height * planes.width;
  if (plane == planes.count) {
    double inside = 0;
    for (int64_t i = threadIdx.x; a.inside && i < a.inside_count; i += kThreads) inside += a.inside[i];
    inside = block_sum(inside, scratch);
    if (threadIdx.x == 0) {
      *a.weight_sum = static_cast<double>(planes.count * pixels) + (a.roi_weight - 1) * inside * static_cast<double>(a.channels);
    }
  } else {
    constexpr int kGrid = 16;
    static_assert(kGrid * kGrid == kThreads, "a pixel of the grid for each thread");
    const int64_t rows = planes.depth * planes.height;
    const int64_t row = threadIdx.x * rows / kThreads, column = threadIdx.x % kGrid * planes.width / kGrid;
    const S* target = static_cast<const S*>(planes.target) + plane * pixels;
    const double sum = block_sum(static_cast<double>(load(target + row * planes.width + column)), scratch);
    if (threadIdx.x == 0) static_cast<T*>(a.centres)[plane] = std::isfinite(sum) ? static_cast<T>(sum / kThreads) : T(0);
  }
}

// Both images, each thread one pixel of the coarser scale.
template <typename S>
__global__ void __launch_bounds__(kThreads) pool_kernel(Planes planes, void* input, void* target) {
  using T = Arithmetic<S>;
  const int64_t height = pooled_side(planes.height), width = pooled_side(planes.width);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= planes.count * height * width) return;
  const int64_t plane = i / (height * width), top = pooling_start(i / width % height, planes.height);
  const int64_t left = pooling_start(i % width, planes.width);
  T sums[2] = {};
  for (int k = 0; k < 4; ++k) {
    const int64_t row = top + k / 2, column = left + k % 2;
    if (row < 0 || column < 0) continue;
    const int64_t at = (plane * planes.height + row) * planes.width + column;
    sums[0] += load(static_cast<const S*>(planes.input) + at);
    sums[1] += load(static_cast<const S*>(planes.target) + at);
  }
  static_cast<T*>(input)[i] = T(0.25) * sums[0];
  static_cast<T*>(target)[i] = T(0.25) * sums[1];
}

// A block for each plane.
template <typename T>
__global__ void __launch_bounds__(kThreads) scales_kernel(ScalesLaunch a) {
  LID_SHARED(double, scratch, kWarps);
  const int64_t plane = blockIdx.x;
  double means[kScales];
  LID_UNROLL for (int j = 0; j < kScales; ++j) {
    // 1 - contrast-structure counts at every scale but the last, where it is 1 - SSIM.
    const double* sums = a.sums[j] + (j < kScales - 1 ? a.blocks[j] : 0);
    const int64_t blocks = a.blocks[j] / a.planes;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < blocks; i += kThreads) sum += sums[plane * blocks + i];
    means[j] = 1 - block_sum(sum, scratch) / static_cast<double>(a.windows[j]);
  }
  if (threadIdx.x > 0) return;
  const double similarity = a.similarities[plane] = ms_ssim(means), planes = static_cast<double>(a.planes);
  LID_UNROLL for (int j = 0; j < kScales; ++j) {
    const double windows = static_cast<double>(a.windows[j]);
    static_cast<T*>(a.weights)[j * a.planes + plane] =
        static_cast<T>(ms_ssim_weight(j, a.coefficient, similarity, means[j], windows, planes));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) finish_kernel(FinishLaunch a) {
  LID_SHARED(double, scratch, kWarps);
  const auto sum_of = [&](const double* values, int64_t count) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += values[i];
    return block_sum(sum, scratch);
  };
  const auto swept = [&](SweepSum which) { return sum_of(a.sums + which * a.blocks, a.blocks); };
  double total = 0;
  for (int t = 0; t < a.count; ++t) {
    double value = 0;
    switch (a.terms[t]) {
      case Term::l1: value = swept(kSumL1) / *a.weight_sum; break;
      case Term::mse: value = swept(kSumMse) / *a.weight_sum; break;
      case Term::charbonnier: value = swept(kSumCharbonnier) / *a.weight_sum; break;
      case Term::ssim: value = sum_of(a.windows_sums, a.windows_blocks) / a.windows; break;
      case Term::ms_ssim: value = 1 - sum_of(a.similarities, a.planes) / static_cast<double>(a.planes); break;
      case Term::edge: value = swept(kSumEdge) / a.responses; break;
      case Term::tv:
        value = swept(kSumTvX) / a.columns_between;
        value += swept(kSumTvY) / a.rows_between;
        if (a.slices_between > 0) value += swept(kSumTvZ) / a.slices_between;
    }
    if (threadIdx.x == 0) static_cast<T*>(a.values)[t] = static_cast<T>(value);
    total += a.weights[t] * value;
  }
  if (threadIdx.x == 0) *static_cast<T*>(a.total) = static_cast<T>(total);
}

int64_t blocks_for(int64_t count) { return (count + kThreads - 1) / kThreads; }

}  // namespace

int64_t mask_blocks(const MaskLaunch& launch) {
  return launch.images * launch.depth * tiles_across(launch.width) * tiles_down(launch.height, kMaskRows);
}

int launch_mask(const MaskLaunch& launch, void* stream) {
  const auto kernel = launch.storage == Storage::float64 ? mask_kernel<double> : mask_kernel<float>;
  LID_LAUNCH(kernel, mask_blocks(launch), kThreads, stream, launch);
  return static_cast<int>(cudaGetLastError());
}

int launch_prepare(const PrepareLaunch& launch, void* stream) {
  with_storage<Half, BFloat16>(launch.planes.storage, [&](auto* stored) {
    using S = std::remove_pointer_t<decltype(stored)>;
    const auto kernel = prepare_kernel<S>;
    LID_LAUNCH(kernel, launch.planes.count + 1, kThreads, stream, launch);
  });
  return static_cast<int>(cudaGetLastError());
}

int launch_pool(const Planes& planes, void* input, void* target, void* stream) {
  with_storage<Half, BFloat16>(planes.storage, [&](auto* stored) {
    using S = std::remove_pointer_t<decltype(stored)>;
    const auto kernel = pool_kernel<S>;
    LID_LAUNCH(kernel, blocks_for(planes.count * pooled_side(planes.height) * pooled_side(planes.width)), kThreads, stream,
               planes, input, target);
  });
  return static_cast<int>(cudaGetLastError());
}

int launch_scales(const ScalesLaunch& launch, void* stream) {
  const auto kernel = launch.wide ? scales_kernel<double> : scales_kernel<float>;
  LID_LAUNCH(kernel, launch.planes, kThreads, stream, launch);
  return static_cast<int>(cudaGetLastError());
}

int launch_finish(const FinishLaunch& launch, void* stream) {
  const auto kernel = launch.wide ? finish_kernel<double> : finish_kernel<float>;
  LID_LAUNCH(kernel, 1, kThreads, stream, launch);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace cuda
}  // namespace lid
