// Filters of SSIM's window over tiles of a plane in shared memory: across a row in runs of eight, then down the columns. A block
// has 256 threads, a tile 32 columns, and every thread some rows of one column of it.
#pragma once

#include "../multi_loss_pixels.h"
#include "device.cuh"

namespace lid {
namespace cuda {

constexpr int kColumns = 32, kWarps = kThreads / kColumns;
// Strides of rows in shared memory are odd, so that lanes that walk along different rows use different banks.
constexpr int kHaloColumns = kColumns + kHalo, kHaloStride = kHaloColumns + 1, kAcrossStride = kColumns + 1;
constexpr int kRun = 8;  // sums of neighbours that share what they read

// Rows of a tile; doubles have half as many, for the same shared memory.
template <typename T>
constexpr int kTileRows = sizeof(T) == 4 ? 32 : 16;

inline int64_t tiles_across(int64_t width) { return (width + kColumns - 1) / kColumns; }
inline int64_t tiles_down(int64_t height, int rows) { return (height + rows - 1) / rows; }

// What a block works on.
struct Tile {
  int64_t unit;  // an image or a slice
  int64_t top, left;
  int column, first_row;  // of this thread, in the tile
};

template <int kRows>
__device__ Tile tile_of_block(int64_t height, int64_t width) {
  const int64_t across = (width + kColumns - 1) / kColumns, down = (height + kRows - 1) / kRows;
  const int64_t block = blockIdx.x;
  return {block / (across * down), block / across % down * kRows, block % across * kColumns,
          static_cast<int>(threadIdx.x % kColumns), static_cast<int>(threadIdx.x / kColumns) * (kRows / kWarps)};
}

// Fills `halo`, (kRows + kHalo) rows of kHaloStride, with at(row, column).
template <int kRows, typename Shared, typename At>
__device__ void fill_halo(Shared& halo, const At& at) {
  for (int i = threadIdx.x; i < (kRows + kHalo) * kHaloColumns; i += kThreads) {
    const int row = i / kHaloColumns, column = i % kHaloColumns;
    halo[row * kHaloStride + column] = at(row, column);
  }
}

// Sums across the rows of `halo` into `across`, (kRows + kHalo) rows of kAcrossStride; with kSquares those of the squares go to
// `squares`. Each thread takes runs of eight columns.
template <int kRows, bool kSquares, typename T, typename From, typename To>
__device__ void sum_across(From& halo, To& across, int to, int squares_to) {
  constexpr int kHaloRows = kRows + kHalo;
  for (int i = threadIdx.x; i < kHaloRows * (kColumns / kRun); i += kThreads) {
    const int row = i % kHaloRows, column = i / kHaloRows * kRun;
    T values[kRun + kHalo], sums[kRun];
    LID_UNROLL for (int n = 0; n < kRun + kHalo; ++n) values[n] = halo[row * kHaloStride + column + n];
    window_sums<T>([&](int n) { return values[n]; }, sums);
    LID_UNROLL for (int j = 0; j < kRun; ++j) across[to + row * kAcrossStride + column + j] = sums[j];
    if (kSquares) {
      window_sums<T>([&](int n) { return values[n] * values[n]; }, sums);
      LID_UNROLL for (int j = 0; j < kRun; ++j) across[squares_to + row * kAcrossStride + column + j] = sums[j];
    }
  }
}

// The transposed filter within a plane: sums of what the windows over each pixel of the tile give it. at(row, column) of the
// plane's windows gives 0 outside of them. All threads must call it.
template <int kRows, typename T, typename At>
__device__ void spread_windows(const Tile& tile, const At& at, T (&sums)[kRows / kWarps]) {
  LID_SHARED(T, halo, (kRows + kHalo) * kHaloStride);
  LID_SHARED(T, across, (kRows + kHalo) * kAcrossStride);
  fill_halo<kRows>(halo, [&](int row, int column) { return at(tile.top + row - kHalo, tile.left + column - kHalo); });
  __syncthreads();
  sum_across<kRows, false, T>(halo, across, 0, 0);
  __syncthreads();
  window_sums<T>([&](int n) { return T(across[(tile.first_row + n) * kAcrossStride + tile.column]); }, sums);
}

}  // namespace cuda
}  // namespace lid
