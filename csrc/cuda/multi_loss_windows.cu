// SSIM's windows: their sums, and the derivatives that the sweep hands on to the pixels.

#include "multi_loss.h"
#include "multi_loss_tiles.cuh"

namespace lid {
namespace cuda {
namespace {

constexpr int kFields = 4, kMaps = 3;

// Blocks work on tiles of windows. The fields s, d, s^2 and d^2 (multi_loss_pixels.h) of an image are made from two tiles of it;
// a volume's come as four tiles, summed along z. Both kinds of sums have a place for each block.
template <typename S, bool kVolume>
__global__ void __launch_bounds__(kThreads) windows_kernel(WindowsLaunch a, double* structural_sums, double* contrast_sums) {
  using T = Arithmetic<S>;
  constexpr int kRows = kTileRows<T>, kCount = kRows / kWarps, kAcross = (kRows + kHalo) * kAcrossStride;
  LID_SHARED(T, first, (kRows + kHalo) * kHaloStride);
  LID_SHARED(T, second, (kRows + kHalo) * kHaloStride);
  LID_SHARED(T, across, kFields * kAcross);
  LID_SHARED(T, scratch, kWarps);

  const int64_t height = a.planes.height, width = a.planes.width;
  const int64_t rows = height - kHalo, columns = width - kHalo, slices = kVolume ? a.planes.depth - kHalo : 1;
  const Tile tile = tile_of_block<kRows>(rows, columns);
  const int64_t plane = kVolume ? (a.slab.first + tile.unit) / slices : tile.unit, field = a.slab.count * height * width;
  const T twice_centre = T(2) * static_cast<const T*>(a.centres)[plane];
  const int64_t corner = (tile.unit * height + tile.top) * width + tile.left;  // of the image, or of the slab's slice

  for (int pass = 0; pass < (kVolume ? 2 : 1); ++pass) {
    for (int i = threadIdx.x; i < (kRows + kHalo) * kHaloColumns; i += kThreads) {
      const int row = i / kHaloColumns, column = i % kHaloColumns;
      const bool inside = tile.top + row < height && tile.left + column < width;
      const int64_t at = corner + row * width + column;
      T one = 0, other = 0;
      if (inside && kVolume) {
        const T* fields = static_cast<const T*>(a.fields) + 2 * pass * field;
        one = fields[at];
        other = fields[field + at];
      } else if (inside) {
        const T x = load(static_cast<const S*>(a.planes.input) + at), y = load(static_cast<const S*>(a.planes.target) + at);
        one = x + y - twice_centre;
        other = x - y;
      }
      first[row * kHaloStride + column] = one;
      second[row * kHaloStride + column] = other;
    }
    __syncthreads();
    const int to = 2 * pass * kAcross;
    sum_across<kRows, !kVolume, T>(first, across, to, to + 2 * kAcross);
    sum_across<kRows, !kVolume, T>(second, across, to + kAcross, to + 3 * kAcross);
    __syncthreads();
  }

  T means[kFields][kCount];
  LID_UNROLL for (int f = 0; f < kFields; ++f) {
    window_sums<T>(
        [&](int n) { return T(across[f * kAcross + (tile.first_row + n) * kAcrossStride + tile.column]); }, means[f]);
  }

  T structural_weight = static_cast<T>(a.structural), contrast_weight = 0;
  if (a.structural_added) structural_weight += static_cast<const T*>(a.structural_added)[plane];
  if (a.contrast) contrast_weight = static_cast<const T*>(a.contrast)[plane];
  const SimilarityConstants<T> constants{twice_centre, static_cast<T>(a.c1), static_cast<T>(a.c2)};
  const int64_t map = a.slab.count * rows * columns;
  T structural = 0, contrast = 0;
  LID_UNROLL for (int j = 0; j < kCount; ++j) {
    const int64_t row = tile.top + tile.first_row + j, column = tile.left + tile.column;
    if (row < rows && column < columns) {
      const WindowMeans<T> window{means[0][j], means[1][j], means[2][j], means[3][j]};
      const Dissimilarity<T> found = dissimilarity(window, constants);
      structural += found.structural();
      contrast += found.contrast;
      if (a.maps) {
        const WindowDerivatives<T> slopes = derivatives(window, found, structural_weight, contrast_weight);
        T* to = static_cast<T*>(a.maps) + (tile.unit * rows + row) * columns + column;
        to[0] = slopes.mean;
        to[map] = slopes.sum_square;
        to[2 * map] = slopes.difference_square;
      }
    }
  }
  structural = block_sum(structural, scratch);
  contrast = block_sum(contrast, scratch);
  if (threadIdx.x == 0) {
    structural_sums[blockIdx.x] = structural;
    contrast_sums[blockIdx.x] = contrast;
  }
}

// The fields of a volume summed along z, each thread one window slice of one column.
template <typename S>
__global__ void __launch_bounds__(kThreads) sum_slices_kernel(Planes planes, Slab slab, const void* centres, void* fields) {
  using T = Arithmetic<S>;
  const int64_t slice = planes.height * planes.width, slices = planes.depth - kHalo, field = slab.count * slice;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= field) return;
  const int64_t unit = slab.first + i / slice, plane = unit / slices, z = unit % slices;
  const int64_t from = (plane * planes.depth + z) * slice + i % slice;
  const T twice_centre = T(2) * static_cast<const T*>(centres)[plane];
  T sums[kFields] = {};
  LID_UNROLL for (int k = 0; k < kWindow; ++k) {
    const T x = load(static_cast<const S*>(planes.input) + from + k * slice);
    const T y = load(static_cast<const S*>(planes.target) + from + k * slice);
    const T s = x + y - twice_centre, d = x - y, weight = T(window_weight(k));
    sums[0] += weight * s;
    sums[1] += weight * d;
    sums[2] += weight * (s * s);
    sums[3] += weight * (d * d);
  }
  for (int f = 0; f < kFields; ++f) static_cast<T*>(fields)[f * field + i] = sums[f];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) spread_slices_kernel(Planes planes, Slab slab, const void* maps, void* spread) {
  constexpr int kRows = kTileRows<T>, kCount = kRows / kWarps;
  const int64_t height = planes.height, width = planes.width, rows = height - kHalo, columns = width - kHalo;
  const int64_t units = planes.count * (planes.depth - kHalo);
  const Tile tile = tile_of_block<kRows>(height, width);
  for (int m = 0; m < kMaps; ++m) {
    const T* from = static_cast<const T*>(maps) + (m * slab.count + tile.unit) * rows * columns;
    T sums[kCount];
    spread_windows<kRows>(
        tile,
        [&](int64_t row, int64_t column) {
          return row >= 0 && row < rows && column >= 0 && column < columns ? from[row * columns + column] : T(0);
        },
        sums);
    T* to = static_cast<T*>(spread) + (m * units + slab.first + tile.unit) * height * width;
    for (int j = 0; j < kCount; ++j) {
      const int64_t row = tile.top + tile.first_row + j, column = tile.left + tile.column;
      if (row < height && column < width) to[row * width + column] = sums[j];
    }
  }
}

int64_t tiles(const Planes& planes, int64_t height, int64_t width) {
  return tiles_across(width) * tiles_down(height, planes.storage == Storage::float64 ? kTileRows<double> : kTileRows<float>);
}
int64_t blocks_of_slice(const Planes& planes) { return tiles(planes, planes.height - kHalo, planes.width - kHalo); }

}  // namespace

int64_t window_slices(const Planes& planes) { return planes.volume ? planes.depth - kHalo : 1; }
int64_t windows_blocks(const Planes& planes) { return planes.count * window_slices(planes) * blocks_of_slice(planes); }

int launch_windows(const WindowsLaunch& launch, void* stream) {
  const int64_t of_slice = blocks_of_slice(launch.planes);
  double* const sums = launch.sums + launch.slab.first * of_slice;
  with_storage<Half, BFloat16>(launch.planes.storage, [&](auto* stored) {
    using S = std::remove_pointer_t<decltype(stored)>;
    const auto kernel = launch.planes.volume ? windows_kernel<S, true> : windows_kernel<S, false>;
    LID_LAUNCH(kernel, launch.slab.count * of_slice, kThreads, stream, launch, sums, sums + windows_blocks(launch.planes));
  });
  return static_cast<int>(cudaGetLastError());
}

int launch_sum_slices(const Planes& planes, const Slab& slab, const void* centres, void* fields, void* stream) {
  const int64_t count = slab.count * planes.height * planes.width;
  with_storage<Half, BFloat16>(planes.storage, [&](auto* stored) {
    using S = std::remove_pointer_t<decltype(stored)>;
    const auto kernel = sum_slices_kernel<S>;
    LID_LAUNCH(kernel, (count + kThreads - 1) / kThreads, kThreads, stream, planes, slab, centres, fields);
  });
  return static_cast<int>(cudaGetLastError());
}

int launch_spread_slices(const Planes& planes, const Slab& slab, const void* maps, void* spread, void* stream) {
  const int64_t blocks = slab.count * tiles(planes, planes.height, planes.width);
  const auto kernel = planes.storage == Storage::float64 ? spread_slices_kernel<double> : spread_slices_kernel<float>;
  LID_LAUNCH(kernel, blocks, kThreads, stream, planes, slab, maps, spread);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace cuda
}  // namespace lid
