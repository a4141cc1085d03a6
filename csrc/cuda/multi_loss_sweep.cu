// The sweep over the pixels: sums of the terms that look at a pixel and its neighbours, and the gradients.

#include "multi_loss.h"
#include "multi_loss_tiles.cuh"

namespace lid {
namespace cuda {
namespace {

constexpr int kMaps = 3;

template <typename T, bool kVolume>
constexpr int kSweepRows = kVolume || sizeof(T) == 8 ? kWarps : kTileRows<T>;

// What Sobel's filter along an axis weighs one of three pixels with: along that axis, and along the others.
__device__ constexpr int sobel(bool along, int i) { return along ? i - 1 : i == 1 ? 2 : 1; }

// sum over a 3 x 3 (x 3) neighbourhood of at(z, y, x), weighted by the filter along `axis` (0 is x).
template <bool kVolume, typename T, typename At>
__device__ __forceinline__ T respond(int axis, const At& at) {
  T sum = 0;
  LID_UNROLL for (int z = 0; z < (kVolume ? 3 : 1); ++z) {
    LID_UNROLL for (int y = 0; y < 3; ++y) {
      LID_UNROLL for (int x = 0; x < 3; ++x) {
        const int weight = (kVolume ? sobel(axis == 2, z) : 1) * sobel(axis == 1, y) * sobel(axis == 0, x);
        if (weight != 0) sum += T(weight) * at(z, y, x);
      }
    }
  }
  return sum;
}

// Signs of the Sobel responses of x - y around a tile, and what they give back to its pixels. A response belongs to the first of
// the pixels it is made from, so a tile needs the responses of two rows, columns and slices before it.
template <typename S, bool kVolume>
class Edges {
 public:
  using T = Arithmetic<S>;
  static constexpr int kAxes = kVolume ? 3 : 2;
  static constexpr int kRows = kSweepRows<T, kVolume>;
  static constexpr int kSlices = kVolume ? 3 : 1, kSignRows = kRows + 2, kSignColumns = kColumns + 2;
  static constexpr int kSigns = kSlices * kSignRows * kSignColumns;  // of an axis
  static constexpr int kInSlices = kVolume ? 5 : 1, kInRows = kRows + 4, kInColumns = kColumns + 4;
  static constexpr int kIn = kInSlices * kInRows * kInColumns;

  // Fills `signs` and returns this thread's share of the sum of |responses| that belong to the tile's pixels. All threads call it.
  template <typename Differences, typename Signs>
  __device__ static T respond_all(const Planes& planes, const Tile& tile, Differences& differences, Signs& signs) {
    const int64_t plane = tile.unit / planes.depth, slice = tile.unit % planes.depth;
    const int64_t pixels = planes.depth * planes.height * planes.width;
    const S *input = static_cast<const S*>(planes.input) + plane * pixels;
    const S *target = static_cast<const S*>(planes.target) + plane * pixels;
    for (int i = threadIdx.x; i < kIn; i += kThreads) {
      const int64_t z = slice + i / (kInRows * kInColumns) - (kVolume ? 2 : 0);
      const int64_t y = tile.top + i / kInColumns % kInRows - 2, x = tile.left + i % kInColumns - 2;
      const bool inside = z >= 0 && z < planes.depth && y >= 0 && y < planes.height && x >= 0 && x < planes.width;
      const int64_t at = (z * planes.height + y) * planes.width + x;
      differences[i] = inside ? load(input + at) - load(target + at) : T(0);
    }
    __syncthreads();
    T sum = 0;
    for (int i = threadIdx.x; i < kSigns; i += kThreads) {
      const int dz = i / (kSignRows * kSignColumns), dy = i / kSignColumns % kSignRows, dx = i % kSignColumns;
      const int64_t z = slice + dz - (kVolume ? 2 : 0), y = tile.top + dy - 2, x = tile.left + dx - 2;
      const bool inside = (!kVolume || (z >= 0 && z < planes.depth - 2)) && y >= 0 && y < planes.height - 2 && x >= 0 &&
                          x < planes.width - 2;
      const bool own = (!kVolume || dz == 2) && dy >= 2 && dx >= 2;
      LID_UNROLL for (int axis = 0; axis < kAxes; ++axis) {
        T response = 0;
        if (inside) {
          response = respond<kVolume, T>(axis, [&](int kz, int ky, int kx) {
            return T(differences[((dz + kz) * kInRows + dy + ky) * kInColumns + dx + kx]);
          });
        }
        if (own) sum += lid_abs(response);
        signs[axis * kSigns + i] = lid_sign(response);
      }
    }
    __syncthreads();
    return sum;
  }

  // The derivative of the sum of |responses| in the pixel at (row, column) of the tile.
  template <typename Signs>
  __device__ static T derivative(Signs& signs, int row, int column) {
    T sum = 0;
    LID_UNROLL for (int axis = 0; axis < kAxes; ++axis) {
      sum += respond<kVolume, T>(axis, [&](int kz, int ky, int kx) {
        const int z = kVolume ? 2 - kz : 0, y = row + 2 - ky, x = column + 2 - kx;
        return T(signs[axis * kSigns + (z * kSignRows + y) * kSignColumns + x]);
      });
    }
    return sum;
  }
};

// What the windows give back to the pixels of this thread, one for each of the three maps.
template <bool kVolume, int kRows, typename T>
__device__ void spread(const SweepLaunch& a, const Tile& tile, T (&sums)[kMaps][kRows / kWarps]) {
  const Planes& planes = a.planes;
  const T* maps = static_cast<const T*>(a.maps);
  if (kVolume) {
    const int64_t slices = planes.depth - kHalo, slice = planes.height * planes.width, map = planes.count * slices * slice;
    const int64_t plane = tile.unit / planes.depth, z = tile.unit % planes.depth;
    const int64_t row = tile.top + tile.first_row, column = tile.left + tile.column;
    const bool inside = row < planes.height && column < planes.width;
    LID_UNROLL for (int m = 0; m < kMaps; ++m) {
      T sum = 0;
      LID_UNROLL for (int k = 0; k < kWindow; ++k) {
        const int64_t of = z - k;
        if (inside && of >= 0 && of < slices) {
          sum += T(window_weight(k)) * maps[m * map + (plane * slices + of) * slice + row * planes.width + column];
        }
      }
      sums[m][0] = sum;
    }
  } else {
    const int64_t rows = planes.height - kHalo, columns = planes.width - kHalo;
    LID_UNROLL for (int m = 0; m < kMaps; ++m) {
      const T* from = maps + (m * planes.count + tile.unit) * rows * columns;
      spread_windows<kRows>(
          tile,
          [&](int64_t row, int64_t column) {
            return row >= 0 && row < rows && column >= 0 && column < columns ? from[row * columns + column] : T(0);
          },
          sums[m]);
    }
  }
}

template <typename S, bool kVolume>
__global__ void __launch_bounds__(kThreads) sweep_kernel(SweepLaunch a) {
  using T = Arithmetic<S>;
  constexpr int kRows = kSweepRows<T, kVolume>, kCount = kRows / kWarps;
  LID_SHARED(T, differences, (Edges<S, kVolume>::kIn));
  LID_SHARED(T, signs, (Edges<S, kVolume>::kAxes * Edges<S, kVolume>::kSigns));
  LID_SHARED(T, scratch, kWarps);

  const Planes& planes = a.planes;
  const int64_t height = planes.height, width = planes.width, slice_pixels = height * width;
  const Tile tile = tile_of_block<kRows>(height, width);
  const int64_t plane = tile.unit / planes.depth, slice = tile.unit % planes.depth;
  const S *input = static_cast<const S*>(planes.input) + tile.unit * slice_pixels;
  const S *target = static_cast<const S*>(planes.target) + tile.unit * slice_pixels;
  const uint8_t* mask = a.mask ? a.mask + (plane / a.channels * planes.depth + slice) * slice_pixels : nullptr;

  T of_windows[kMaps][kCount] = {};
  if (a.maps) spread<kVolume, kRows>(a, tile, of_windows);
  T sums[kSweepSums] = {};
  if (a.edge) sums[kSumEdge] = Edges<S, kVolume>::respond_all(planes, tile, differences, signs);

  const T twice_centre = a.maps ? T(2) * static_cast<const T*>(a.centres)[plane] : T(0);
  const T per_weight = a.pixel ? T(1 / *a.weight_sum) : T(0);
  LID_UNROLL for (int j = 0; j < kCount; ++j) {
    const int64_t row = tile.top + tile.first_row + j, column = tile.left + tile.column;
    if (row >= height || column >= width) continue;
    const int64_t at = row * width + column;
    const T x = load(input + at), y = load(target + at), d = x - y;
    const T weight = mask && mask[at] ? T(a.roi_weight) : T(1);
    if (a.pixel) {
      sums[kSumL1] += weight * lid_abs(d);
      sums[kSumMse] += weight * (d * d);
      if (a.charbonnier) {
        sums[kSumCharbonnier] += weight * charbonnier(d, T(kCharbonnierEps * kCharbonnierEps));
      }
    }
    T by_x = 0, by_y = 0, by_z = 0;
    if (a.tv) {
      // The difference with the next pixel along an axis counts; the one before gives back as well.
      const auto differ = [&](int64_t index, int64_t side, int64_t stride, T& sum) {
        const T after = index + 1 < side ? load(input + at + stride) - x : T(0);
        const T before = index > 0 ? x - load(input + at - stride) : T(0);
        sum += lid_abs(after);
        return lid_sign(before) - lid_sign(after);
      };
      by_x = differ(column, width, 1, sums[kSumTvX]);
      by_y = differ(row, height, width, sums[kSumTvY]);
      if (kVolume) by_z = differ(slice, planes.depth, slice_pixels, sums[kSumTvZ]);
    }
    if (a.gradient_count == 0) continue;
    const T by_edge = a.edge ? Edges<S, kVolume>::derivative(signs, tile.first_row + j, tile.column) : T(0);
    const T by_windows = of_windows[0][j] + T(2) * ((x + y - twice_centre) * of_windows[1][j] + d * of_windows[2][j]);
    for (int g = 0; g < a.gradient_count; ++g) {
      const SweepGradient& gradient = a.gradients[g];
      T value = gradient.similarity ? by_windows : T(0);
      if (a.pixel) {
        const PixelCoefficients<T> by{T(gradient.l1) * per_weight, T(gradient.mse) * per_weight,
                                      T(gradient.charbonnier) * per_weight};
        value += weight * (gradient.charbonnier != 0 ? pixel_derivative<true>(d, by) : pixel_derivative<false>(d, by));
      }
      if (gradient.edge != 0) value += T(gradient.edge) * by_edge;
      if (gradient.tv_x != 0) value += T(gradient.tv_x) * by_x + T(gradient.tv_y) * by_y;
      if (gradient.tv_z != 0) value += T(gradient.tv_z) * by_z;
      if (a.coarser && g == 0) {
        const int64_t coarse = plane * pooled_side(height) + (row + height % 2) / 2;
        value += T(0.25) * static_cast<const T*>(a.coarser)[coarse * pooled_side(width) + (column + width % 2) / 2];
      }
      static_cast<T*>(gradient.data)[tile.unit * slice_pixels + at] = value;
    }
  }
  for (int s = 0; s < kSweepSums; ++s) {
    const T sum = block_sum(sums[s], scratch);
    if (threadIdx.x == 0) a.sums[static_cast<int64_t>(s) * gridDim.x + blockIdx.x] = sum;
  }
}

int sweep_rows(const Planes& planes) {
  if (planes.volume) return kSweepRows<float, true>;
  return planes.storage == Storage::float64 ? kSweepRows<double, false> : kSweepRows<float, false>;
}

}  // namespace

int64_t sweep_blocks(const Planes& planes) {
  return planes.count * planes.depth * tiles_across(planes.width) * tiles_down(planes.height, sweep_rows(planes));
}

int launch_sweep(const SweepLaunch& launch, void* stream) {
  with_storage<Half, BFloat16>(launch.planes.storage, [&](auto* stored) {
    using S = std::remove_pointer_t<decltype(stored)>;
    const auto kernel = launch.planes.volume ? sweep_kernel<S, true> : sweep_kernel<S, false>;
    LID_LAUNCH(kernel, sweep_blocks(launch.planes), kThreads, stream, launch);
  });
  return static_cast<int>(cudaGetLastError());
}

}  // namespace cuda
}  // namespace lid
