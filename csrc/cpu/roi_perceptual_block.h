// The interface between the op (roi_perceptual.cpp) and its inner loops, which are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "../roi_perceptual.h"
#include "instruction_sets.h"

namespace lid {

// A pair of feature maps and the gradient, null in the forward: dense, channels first or last.
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
  T gradient_scale;  // what multiplies the criterion's derivative; unused in the forward
  int64_t row;       // of the result
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

// One block of channels of one image. In the forward each box's sum of the criterion over the block's pooled differences goes
// to losses[row * stride]; in the backward the block of the gradient is written, every cell of it.
template <typename T>
using BlockFunction = void (*)(const FeatureLevel& level, const ImageBoxes<T>& boxes, int64_t image, int64_t block,
                               Criterion criterion, T* losses, int64_t stride);

#define LID_DECLARE_BLOCKS(isa)                                          \
  namespace isa {                                                        \
  BlockFunction<float> float_block(Storage storage, bool channels_last); \
  BlockFunction<double> double_block(bool channels_last);                \
  }
LID_DECLARE_BLOCKS(baseline)
LID_DECLARE_BLOCKS(avx2)
#undef LID_DECLARE_BLOCKS

}  // namespace lid
