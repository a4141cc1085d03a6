// What multi_loss on the CPU does with a pair of batches of images: sweeps over the planes (the channels of the images), strips of
// rows in parallel.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include "../multi_loss_arguments.h"
#include "multi_loss_sweep.h"

namespace lid {

using torch::stable::Tensor;

// The planes of the input and the target at one scale.
struct Scale {
  const void* input;
  const void* target;
  Storage storage;
  bool volume;
  int64_t depth, height, width;

  int64_t pixels() const { return depth * height * width; }
  int64_t units(int64_t strip) const { return volume ? depth : strips_of(height, strip); }
  // Places of a filter that is so much longer than one pixel along every axis.
  double places(int64_t halo) const {
    return static_cast<double>((volume ? depth - halo : 1) * (height - halo) * (width - halo));
  }
  double windows() const { return places(kHalo); }
};

template <typename T>
SweepFunction<T> sweep_function(Storage storage) {
  switch (instruction_set()) {
    case InstructionSet::avx512: return avx512::sweep_function<T>(storage);
    case InstructionSet::avx2: return avx2::sweep_function<T>(storage);
    default: return baseline::sweep_function<T>(storage);
  }
}

using Sums = std::vector<double>;  // [planes, kSums]

// One pair of batches of images: what of it the terms share, and its sweeps.
template <typename T>
class Images {
 public:
  using Scale = lid::Scale;
  using WindowSums = Sums;
  using Weights = std::vector<double>;  // of each plane's windows, or none for 0
  using Values = std::vector<T>;        // of each pixel of a scale

  struct Pooled {
    Values input, target;
    Scale scale;
  };

  struct Similarities {
    std::vector<double> of_planes;
    std::vector<Weights> of_scales;

    double mean() const {
      return std::accumulate(of_planes.begin(), of_planes.end(), 0.0) / static_cast<double>(of_planes.size());
    }
    const Weights& weights(int scale) const { return of_scales[scale]; }
  };

  Images(const Tensor& input, const Tensor& target, const std::optional<Tensor>& rois, double roi_weight,
         double data_range)
      : input_(torch::stable::contiguous(input)),
        target_(torch::stable::contiguous(target)),
        full_{input_.const_data_ptr(),
              target_.const_data_ptr(),
              storage_of(input_),
              input_.dim() == 5,
              input_.dim() == 5 ? input_.size(2) : 1,
              input_.size(input_.dim() - 2),
              input_.size(input_.dim() - 1)},
        channels_(input_.size(1)),
        planes_(input_.size(0) * channels_),
        roi_weight_(roi_weight),
        c1_(kK1 * kK1 * data_range * data_range),
        c2_(kK2 * kK2 * data_range * data_range),
        weight_sum_(static_cast<double>(planes_ * full_.pixels())) {
    if (rois) read_boxes(*rois);
    find_centres();
  }

  const Scale& full() const { return full_; }

  // The value of each term but ms_ssim.
  PerTerm values(const Sums& sums) const {
    double s[kSums] = {};
    for (size_t i = 0; i < sums.size(); ++i) s[i % kSums] += sums[i];
    PerTerm values;
    values[Term::l1] = s[kL1] / weight_sum_;
    values[Term::mse] = s[kMse] / weight_sum_;
    values[Term::charbonnier] = s[kCharbonnier] / weight_sum_;
    values[Term::ssim] = s[kStructural] / (planes_ * full_.windows());
    values[Term::edge] = s[kEdge] / responses();
    values[Term::tv] = s[kTvX] / columns_between() + s[kTvY] / rows_between();
    if (full_.volume) values[Term::tv] += s[kTvZ] / slices_between();
    return values;
  }

  // The gradient of sum of coefficient * term; what it is written to has the images' shape.
  Gradient<T> gradient(const PerTerm& by, T* data) const {
    // The counts of terms that aren't asked for may be 0.
    const auto over = [](double weight, double count) { return weight == 0 ? T(0) : static_cast<T>(weight / count); };
    return {data,
            {over(by[Term::l1], weight_sum_), over(by[Term::mse], weight_sum_), over(by[Term::charbonnier], weight_sum_)},
            over(by[Term::edge], responses()),
            over(by[Term::tv], columns_between()),
            over(by[Term::tv], rows_between()),
            full_.volume ? over(by[Term::tv], slices_between()) : T(0),
            by[Term::ssim] != 0 || by[Term::ms_ssim] != 0};
  }

  // What the sum of each plane's 1 - SSIM is multiplied by in the gradient of coefficient * ssim.
  Weights ssim_weights(double coefficient) const { return Weights(planes_, coefficient / (planes_ * full_.windows())); }

  // Sweeps all planes. `wanted` has the flags of the sums; the similarity's weights are one for each plane, or none for 0.
  Sums sweep(const Scale& scale, const Plane<T>& wanted, const std::vector<Gradient<T>>& gradients,
             const Weights& structural, const Weights& contrast) const {
    const SweepFunction<T> function = sweep_function<T>(scale.storage);
    const int64_t units = scale.units(function.strip), pixels = scale.pixels();
    Sums of_units(planes_ * units * kSums), sums(planes_ * kSums);
    const int64_t item = scale.storage == Storage::float64 ? 8 : scale.storage == Storage::float32 ? 4 : 2;
    // A share of less than this isn't worth a thread.
    const int64_t least = std::max<int64_t>(1, (int64_t(1) << 14) * units / pixels);
    torch::stable::parallel_for(0, planes_ * units, least, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const int64_t p = i / units, last = std::min(end, (p + 1) * units), image = p / channels_;
        Plane<T> plane = wanted;
        plane.input = static_cast<const char*>(scale.input) + p * pixels * item;
        plane.target = static_cast<const char*>(scale.target) + p * pixels * item;
        plane.volume = scale.volume;
        plane.depth = scale.depth;
        plane.height = scale.height;
        plane.width = scale.width;
        plane.boxes = boxes_.empty() ? nullptr : boxes_.data() + first_box_[image];
        plane.box_count = boxes_.empty() ? 0 : first_box_[image + 1] - first_box_[image];
        plane.roi_weight = static_cast<T>(roi_weight_);
        plane.constants = {static_cast<T>(2 * centres_[p]), static_cast<T>(c1_), static_cast<T>(c2_)};
        plane.structural_weight = static_cast<T>(structural.empty() ? 0 : structural[p]);
        plane.contrast_weight = static_cast<T>(contrast.empty() ? 0 : contrast[p]);
        std::vector<Gradient<T>> of_plane = gradients;
        for (Gradient<T>& gradient : of_plane) gradient.data += p * pixels;
        plane.gradients = of_plane.data();
        plane.gradient_count = static_cast<int64_t>(of_plane.size());
        function.run(plane, i - p * units, last - p * units, of_units.data() + i * kSums);
        i = last;
      }
    });
    for (int64_t i = 0; i < planes_ * units; ++i) {
      for (int s = 0; s < kSums; ++s) sums[i / units * kSums + s] += of_units[i * kSums + s];
    }
    return sums;
  }

  // For Pyramid, see ms_ssim.h.
  Pooled pool(const Scale& scale) const {
    Pooled result{pooled(scale.input, scale), pooled(scale.target, scale), {}};
    result.scale = {result.input.data(), result.target.data(), std::is_same_v<T, double> ? Storage::float64 : Storage::float32,
                    false, 1, pooled_side(scale.height), pooled_side(scale.width)};
    return result;
  }

  Sums window_sums(const Scale& scale) const { return sweep(scale, similarity_alone(), {}, {}, {}); }

  Similarities similarities(const std::vector<Scale>& scales, const std::vector<Sums>& sums, double coefficient) const {
    Similarities result{Weights(planes_), std::vector<Weights>(kScales, Weights(planes_))};
    for (int64_t p = 0; p < planes_; ++p) {
      double means[kScales];
      for (int j = 0; j < kScales; ++j) {
        means[j] = 1 - sums[j][p * kSums + (j < kScales - 1 ? kContrast : kStructural)] / scales[j].windows();
      }
      result.of_planes[p] = ms_ssim(means);
      for (int j = 0; j < kScales; ++j) {
        result.of_scales[j][p] = ms_ssim_weight(j, coefficient, result.of_planes[p], means[j], scales[j].windows(),
                                                static_cast<double>(planes_));
      }
    }
    return result;
  }

  Values gradient(const Scale& scale, const Weights& structural, const Weights& contrast,
                  const std::optional<Values>& coarser) const {
    Values result(planes_ * scale.pixels());
    sweep(scale, similarity_alone(), {{result.data(), {}, 0, 0, 0, 0, true}}, structural, contrast);
    if (coarser) unpool(*coarser, scale, result.data());
    return result;
  }

  static Plane<T> similarity_alone() {
    Plane<T> wanted{};
    wanted.similarity = true;
    return wanted;
  }

  // The transpose of the pooling to the next scale, added to what is there.
  void unpool(const Values& coarse, const Scale& scale, T* fine) const {
    const int64_t height = pooled_side(scale.height), width = pooled_side(scale.width);
    torch::stable::parallel_for(0, planes_ * scale.height, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = (i % scale.height + scale.height % 2) / 2;
        const T* from = coarse.data() + (i / scale.height * height + row) * width;
        for (int64_t c = 0; c < scale.width; ++c) fine[i * scale.width + c] += T(0.25) * from[(c + scale.width % 2) / 2];
      }
    });
  }

 private:
  Values pooled(const void* data, const Scale& scale) const {
    const int64_t height = pooled_side(scale.height), width = pooled_side(scale.width);
    Values result(planes_ * height * width);
    with_storage<c10::Half, c10::BFloat16>(scale.storage, [&](auto* stored) {
      const auto* from = static_cast<const std::remove_pointer_t<decltype(stored)>*>(data);
      torch::stable::parallel_for(0, planes_ * height, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t top = pooling_start(i % height, scale.height);
          const auto* lower = from + (i / height * scale.height + top + 1) * scale.width;
          const auto* upper = lower - (top < 0 ? 0 : scale.width);
          const T of_upper = top < 0 ? T(0) : T(0.25);
          for (int64_t c = 0; c < width; ++c) {
            const int64_t right = pooling_start(c, scale.width) + 1, left = std::max<int64_t>(right - 1, 0);
            const T of_left = right == 0 ? T(0) : T(1);
            const T above = static_cast<T>(upper[right]) + of_left * static_cast<T>(upper[left]);
            const T below = static_cast<T>(lower[right]) + of_left * static_cast<T>(lower[left]);
            result[i * width + c] = of_upper * above + T(0.25) * below;
          }
        }
      });
    });
    return result;
  }

  double responses() const { return planes_ * full_.places(2); }
  double columns_between() const { return static_cast<double>(planes_ * full_.depth * full_.height * (full_.width - 1)); }
  double rows_between() const { return static_cast<double>(planes_ * full_.depth * (full_.height - 1) * full_.width); }
  double slices_between() const { return static_cast<double>(planes_ * (full_.depth - 1) * full_.height * full_.width); }

  void read_boxes(const Tensor& rois_tensor) {
    const Tensor dense = torch::stable::contiguous(rois_tensor);
    const T* rois = dense.const_data_ptr<T>();
    const int64_t count = dense.size(0), images = planes_ / channels_;
    std::vector<std::vector<PixelBox>> of_image(images);
    const int64_t axes = full_.volume ? 3 : 2;
    for (int64_t k = 0; k < count; ++k) {
      const T* box = rois + (1 + 2 * axes) * k;
      STD_TORCH_CHECK(box[0] >= T(0) && box[0] < static_cast<T>(images) && box[0] == std::floor(box[0]), "boxes[", k,
                      "] must have an integer batch index in [0, ", images, "), got ", box[0]);
      // The first pixel whose centre isn't before an edge; NaN is before everything.
      const auto pixel = [](T edge, int64_t side) {
        const double first = std::ceil(static_cast<double>(edge) - 0.5);
        return first > 0 ? static_cast<int64_t>(std::min(first, static_cast<double>(side))) : 0;
      };
      const T *lower = box + 1, *upper = lower + axes;  // x, y, and z in volumes
      of_image[static_cast<int64_t>(box[0])].push_back(
          {full_.volume ? pixel(lower[2], full_.depth) : 0, full_.volume ? pixel(upper[2], full_.depth) : 1,
           pixel(lower[1], full_.height), pixel(upper[1], full_.height), pixel(lower[0], full_.width),
           pixel(upper[0], full_.width)});
    }
    first_box_.push_back(0);
    int64_t inside = 0;
    std::vector<char> covered(full_.width);
    for (const std::vector<PixelBox>& boxes : of_image) {
      for (int64_t i = 0; i < full_.depth * full_.height && !boxes.empty(); ++i) {
        const int64_t slice = i / full_.height, row = i % full_.height;
        std::fill(covered.begin(), covered.end(), 0);
        for (const PixelBox& box : boxes) {
          if (slice >= box.front && slice < box.back && row >= box.top && row < box.bottom && box.left < box.right) {
            std::fill(covered.begin() + box.left, covered.begin() + box.right, 1);
          }
        }
        inside += std::count(covered.begin(), covered.end(), 1);
      }
      boxes_.insert(boxes_.end(), boxes.begin(), boxes.end());
      first_box_.push_back(static_cast<int64_t>(boxes_.size()));
    }
    weight_sum_ += (roi_weight_ - 1) * static_cast<double>(inside * channels_);
  }

  // About the mean of each plane of the target, from a coarse grid: what SSIM's window means are taken relative to.
  void find_centres() {
    constexpr int64_t kGrid = 16;
    const int64_t rows = full_.depth * full_.height;
    centres_.resize(planes_);
    with_storage<c10::Half, c10::BFloat16>(full_.storage, [&](auto* stored) {
      const auto* target = static_cast<const std::remove_pointer_t<decltype(stored)>*>(full_.target);
      for (int64_t p = 0; p < planes_; ++p) {
        double sum = 0;
        for (int64_t i = 0; i < kGrid * kGrid; ++i) {
          const int64_t row = i / kGrid * rows / kGrid, column = i % kGrid * full_.width / kGrid;
          sum += static_cast<double>(target[(p * rows + row) * full_.width + column]);
        }
        centres_[p] = std::isfinite(sum) ? sum / (kGrid * kGrid) : 0;
      }
    });
  }

  Tensor input_, target_;
  Scale full_;
  int64_t channels_, planes_;
  double roi_weight_, c1_, c2_, weight_sum_;
  std::vector<double> centres_;
  std::vector<PixelBox> boxes_;
  std::vector<int64_t> first_box_;
};

}  // namespace lid
