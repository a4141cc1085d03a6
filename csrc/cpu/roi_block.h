// The interface between the ops on boxes (roi_align.cpp, roi_perceptual.cpp) and their inner loops, which are compiled once
// per instruction set.
#pragma once

#include <cstdint>

#include "../roi_align.h"
#include "../roi_perceptual.h"
#include "instruction_sets.h"

namespace lid {

// The maps of one level: dense, channels first or last. Null are the target where an op has none, the gradient in the
// forward, and an input that isn't read.
struct FeatureLevel {
  const void* input;
  const void* target;
  void* gradient;
  int64_t channels, depth, height, width;
  bool channels_last;
};

template <typename T>
struct BoxTables {
  AxisTable<T> z, y, x;
  int64_t row;  // of the result

  int64_t bins() const { return z.bins * y.bins * x.bins; }
};

// The boxes of one image on one level. For scratch memory, the most cells that a box reads along x, and the most rows that
// all bins of a box read together.
template <typename T>
struct ImageBoxes {
  const BoxTables<T>* boxes;
  int64_t count;
  int64_t most_x, most_rows;
};

// Channels of a block. Fixed, so that sums, and with them every bit of the result, don't depend on the threads.
// Planar channels are worked on one after the other; channels that come last together, two cache lines of them.
constexpr int64_t kPlanarBlock = 8;
constexpr int64_t kChannelsLastLanes = 32;

constexpr int64_t block_channels(bool channels_last) { return channels_last ? kChannelsLastLanes : kPlanarBlock; }

// What is done with one block of channels of one image.
template <typename T>
struct PoolFunctions {
  // Pools the boxes' bins [boxes, channels, bins] from the input.
  void (*forward)(const FeatureLevel& level, const ImageBoxes<T>& boxes, int64_t image, int64_t block, void* pooled);
  // Writes the gradient, every cell of it, from that of the bins.
  void (*backward)(const FeatureLevel& level, const ImageBoxes<T>& boxes, int64_t image, int64_t block,
                   const void* grad_pooled);
};

// The slopes of a criterion at the pooled differences, [boxes, channels, bins]; null where they aren't kept.
template <typename Pointer>
struct Slopes {
  Pointer values;
  int64_t channels;
};

// The same of the losses.
template <typename T>
struct LossesFunctions {
  // Adds each box's sum of the criterion over the block's pooled differences to losses[row * stride], and keeps its slopes.
  void (*forward)(const FeatureLevel& level, const ImageBoxes<T>& boxes, int64_t image, int64_t block, Criterion criterion,
                  T* losses, int64_t stride, Slopes<T*> slopes);
  // Writes the gradient, every cell of it; `scales`, per row, multiply the slopes.
  void (*backward)(const FeatureLevel& level, const ImageBoxes<T>& boxes, int64_t image, int64_t block,
                   Slopes<const T*> slopes, const T* scales);
};

#define LID_DECLARE_BLOCKS(isa)                                             \
  namespace isa {                                                           \
  template <typename T>                                                     \
  PoolFunctions<T> pool_functions(Storage storage, bool channels_last);     \
  template <typename T>                                                     \
  LossesFunctions<T> losses_functions(Storage storage, bool channels_last); \
  }
LID_DECLARE_BLOCKS(baseline)
LID_DECLARE_BLOCKS(avx2)
#undef LID_DECLARE_BLOCKS

}  // namespace lid
