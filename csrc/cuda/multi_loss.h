// The interface between the op (multi_loss.cpp) and its kernels, in plain C++. Launches return the CUDA error, 0 for none; they
// wait for nothing and allocate nothing. Pointers are to device memory. What isn't an image (`storage`) is in the dtype of the
// arithmetic, double for double and else float, unless said otherwise.
#pragma once

#include <cstdint>

#include "../multi_loss.h"
#include "../storage.h"

namespace lid {
namespace cuda {

// A batch of planes (channels of images or of volumes) at one scale. An image's depth is 1.
struct Planes {
  const void* input;
  const void* target;
  Storage storage;
  bool volume;
  int64_t count, depth, height, width;
};

// Whether each pixel's centre is in a box of its image, and in how many pixels of each tile it is.
struct MaskLaunch {
  const void* rois;  // [K, 5] or [K, 7], of the arithmetic
  int64_t boxes;
  Storage storage;  // of the images
  bool volume;
  int64_t images, depth, height, width;
  uint8_t* mask;  // [images, depth, height, width]
  int* inside;    // [mask_blocks()]
};
int64_t mask_blocks(const MaskLaunch& launch);
int launch_mask(const MaskLaunch& launch, void* stream);

// About the mean of each plane of the target, and the sum of the pixels' weights.
struct PrepareLaunch {
  Planes planes;
  const int* inside;  // as of MaskLaunch, or null without boxes
  int64_t inside_count;
  int64_t channels;
  double roi_weight;
  void* centres;       // [planes]
  double* weight_sum;  // one
};
int launch_prepare(const PrepareLaunch& launch, void* stream);

// Images, or slices of windows of volumes, that are worked on together: `count` from `first` on, of all planes' one after the
// other.
struct Slab {
  int64_t first, count;
};
int64_t window_slices(const Planes& planes);  // of a plane; 1 of an image
// Fields and maps of so many bytes are made at once for volumes, at least those of one slice: half of an H100's second-level
// cache, where the next kernel finds them. The tests set less.
inline int64_t slab_bytes = int64_t{24} << 20;

// Sums of 1 - SSIM and of 1 - contrast-structure over windows, and the derivatives of their weighted sum in the windows' means.
// A volume's windows come summed along z by launch_sum_slices.
struct WindowsLaunch {
  Planes planes;
  Slab slab;           // all of the images, if they are no volumes
  const void* fields;  // of a volume: [4, slab, height, width]
  const void* centres;
  double c1, c2;
  double structural;             // weight of every window's 1 - SSIM
  const void* structural_added;  // [planes], added to it, or null
  const void* contrast;          // [planes], weights of 1 - contrast-structure, or null for 0
  void* maps;                    // [3, slab, window rows, window columns], or null
  double* sums;                  // [2, windows_blocks()], of all slabs; a plane's blocks follow each other
};
int64_t windows_blocks(const Planes& planes);
int launch_windows(const WindowsLaunch& launch, void* stream);

int launch_sum_slices(const Planes& planes, const Slab& slab, const void* centres, void* fields, void* stream);
// Of volumes, within each slice: maps [3, slab, window rows, window columns] -> spread [3, planes, window slices, height, width].
int launch_spread_slices(const Planes& planes, const Slab& slab, const void* maps, void* spread, void* stream);

enum SweepSum { kSumL1, kSumMse, kSumCharbonnier, kSumEdge, kSumTvX, kSumTvY, kSumTvZ, kSweepSums };

// A gradient of a weighted sum of those, and of the windows' if `similarity`.
struct SweepGradient {
  void* data;                     // [planes, depth, height, width]
  double l1, mse, charbonnier;    // before the division by the weights' sum
  double edge, tv_x, tv_y, tv_z;  // after the division by the counts
  bool similarity;
};

struct SweepLaunch {
  Planes planes;
  bool pixel, charbonnier, edge, tv;  // which sums and gradients are wanted
  const uint8_t* mask;                // or null
  int64_t channels;
  double roi_weight;
  const double* weight_sum;
  const void* centres;
  const void* maps;  // of WindowsLaunch; of a volume after launch_spread_slices
  SweepGradient gradients[kTerms];
  int gradient_count;
  const void* coarser;  // [planes, pooled height, pooled width]: added to the first gradient through the pooling; or null
  double* sums;         // [kSweepSums, sweep_blocks()]
};
int64_t sweep_blocks(const Planes& planes);
int launch_sweep(const SweepLaunch& launch, void* stream);

// Both images pooled to the next scale of MS-SSIM, in the dtype of the arithmetic.
int launch_pool(const Planes& planes, void* input, void* target, void* stream);

// MS-SSIM of each plane from its windows' sums at every scale, and the windows' weights in the gradient of coefficient * ms_ssim.
struct ScalesLaunch {
  const double* sums[kScales];  // of WindowsLaunch
  int64_t blocks[kScales];      // windows_blocks() of each scale
  int64_t windows[kScales];     // of a plane
  int64_t planes;
  bool wide;  // the arithmetic is in double
  double coefficient;
  double* similarities;  // [planes]
  void* weights;         // [kScales, planes]
};
int launch_scales(const ScalesLaunch& launch, void* stream);

// The terms' values and their weighted sum.
struct FinishLaunch {
  Term terms[kTerms];
  double weights[kTerms];
  int count;
  bool wide;
  int64_t planes;
  const double* weight_sum;
  const double* sums;  // of SweepLaunch, or null
  int64_t blocks;
  double responses, columns_between, rows_between, slices_between;  // counts; slices_between is 0 for images
  const double* windows_sums;                                       // of WindowsLaunch, or null
  int64_t windows_blocks;
  double windows;              // of all planes
  const double* similarities;  // of ScalesLaunch, or null
  void* total;                 // one
  void* values;                // [count]
};
int launch_finish(const FinishLaunch& launch, void* stream);

}  // namespace cuda
}  // namespace lid
