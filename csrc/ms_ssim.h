// MS-SSIM's pyramid, for the CPU and for CUDA: the images at five scales, and the gradient's way back through them.
#pragma once

#include <optional>
#include <vector>

#include "multi_loss.h"

namespace lid {

// `Images` does what is done at one scale:
//   full()                              the images themselves; their type is Images::Scale
//   pool(scale)                         the next `scale`, with the memory that it is in: an Images::Pooled
//   window_sums(scale)                  sums of dissimilarities over windows
//   similarities(scales, sums, by)      each plane's MS-SSIM, and the weights(scale) of ms_ssim_weight: an Images::Similarities
//   gradient(scale, structural, contrast, coarser)   in the pixels of a pooled scale, from weights of both dissimilarities of its
//                                       windows, empty for none, and from the next scale's gradient: Images::Values
template <typename Images>
class Pyramid {
 public:
  // For the gradient of coefficient * (1 - MS-SSIM).
  Pyramid(const Images& images, double coefficient)
      : images_(images), scales_{images.full()}, similarities_(measure(coefficient)) {}

  const typename Images::Similarities& similarities() const { return similarities_; }

  // In the pixels of the first pooled scale.
  typename Images::Values coarser_gradient() const {
    std::optional<typename Images::Values> coarser;
    for (int j = kScales - 1; j > 0; --j) {
      const typename Images::Weights by = similarities_.weights(j), none{};
      const bool last = j == kScales - 1;
      coarser = images_.gradient(scales_[j], last ? by : none, last ? none : by, coarser);
    }
    return *coarser;
  }

 private:
  typename Images::Similarities measure(double coefficient) {
    std::vector<typename Images::WindowSums> sums{images_.window_sums(scales_[0])};
    for (int j = 1; j < kScales; ++j) {
      pooled_.push_back(images_.pool(scales_.back()));
      scales_.push_back(pooled_.back().scale);
      sums.push_back(images_.window_sums(scales_.back()));
    }
    return images_.similarities(scales_, sums, coefficient);
  }

  const Images& images_;
  std::vector<typename Images::Scale> scales_;
  std::vector<typename Images::Pooled> pooled_;
  const typename Images::Similarities similarities_;
};

}  // namespace lid
