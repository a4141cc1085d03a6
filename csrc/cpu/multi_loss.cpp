// multi_loss and multi_loss_jacobian on the CPU: what each term's sums are multiplied by, then sweeps over the planes (the
// channels of the images), strips of rows in parallel.

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include "../multi_loss_arguments.h"
#include "multi_loss_sweep.h"
#include "tensors.h"

namespace lid {
namespace {

using torch::headeronly::ScalarType;
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
  const InstructionSet set = instruction_set();
  if constexpr (std::is_same_v<T, double>) {
    return set == InstructionSet::avx512 ? avx512::double_sweep()
           : set == InstructionSet::avx2 ? avx2::double_sweep()
                                         : baseline::double_sweep();
  } else {
    return set == InstructionSet::avx512 ? avx512::float_sweep(storage)
           : set == InstructionSet::avx2 ? avx2::float_sweep(storage)
                                         : baseline::float_sweep(storage);
  }
}

using Sums = std::vector<double>;  // [planes, kSums]

// One pair of batches of images: what of it the terms share, and its sweeps.
template <typename T>
class Images {
 public:
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
  int64_t planes() const { return planes_; }

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
  std::vector<double> ssim_weights(double coefficient) const {
    return std::vector<double>(planes_, coefficient / (planes_ * full_.windows()));
  }

  // Sweeps all planes. `wanted` has the flags of the sums; the similarity's weights are one for each plane, or none for 0.
  Sums sweep(const Scale& scale, const Plane<T>& wanted, const std::vector<Gradient<T>>& gradients,
             const std::vector<double>& structural, const std::vector<double>& contrast) const {
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

 private:
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

// MS-SSIM: the images at five scales, and the weights of their similarities in a gradient.
template <typename T>
class Pyramid {
 public:
  explicit Pyramid(const Images<T>& images) : images_(images), scales_{images.full()}, similarities_(images.planes(), 1.0) {
    for (int j = 1; j < kScales; ++j) {
      const Scale& finer = scales_.back();
      pooled_.push_back(pool(finer.input, finer));
      pooled_.push_back(pool(finer.target, finer));
      scales_.push_back({pooled_[pooled_.size() - 2].data(), pooled_.back().data(),
                         std::is_same_v<T, double> ? Storage::float64 : Storage::float32, false, 1,
                         pooled_side(finer.height), pooled_side(finer.width)});
    }
    Plane<T> wanted{};
    wanted.similarity = true;
    for (int j = 0; j < kScales; ++j) {
      const Sums sums = images_.sweep(scales_[j], wanted, {}, {}, {});
      means_.emplace_back();
      for (int64_t p = 0; p < images_.planes(); ++p) {
        means_[j].push_back(1 - sums[p * kSums + (j < kScales - 1 ? kContrast : kStructural)] / scales_[j].windows());
        similarities_[p] *= std::pow(means_[j][p] <= 0 ? 0 : means_[j][p], scale_exponent(j));
      }
    }
  }

  double value() const {
    double sum = 0;
    for (const double similarity : similarities_) sum += similarity;
    return 1 - sum / static_cast<double>(images_.planes());
  }

  // What the sum of a plane's dissimilarities at a scale is multiplied by in the gradient of coefficient * value().
  std::vector<double> weights(int scale, double coefficient) const {
    std::vector<double> weights(images_.planes());
    for (int64_t p = 0; p < images_.planes(); ++p) {
      if (similarities_[p] == 0) continue;
      weights[p] = coefficient * similarities_[p] * scale_exponent(scale) /
                   (means_[scale][p] * scales_[scale].windows() * static_cast<double>(images_.planes()));
    }
    return weights;
  }

  // Adds the gradient of coefficient * value() that comes by way of the coarser scales.
  void add_coarser(double coefficient, T* gradient) const {
    std::vector<T> coarser, finer;
    Plane<T> wanted{};
    wanted.similarity = true;
    for (int j = kScales - 1; j > 0; --j) {
      finer.resize(images_.planes() * scales_[j].height * scales_[j].width);
      const std::vector<Gradient<T>> to{{finer.data(), {}, 0, 0, 0, 0, true}};
      const std::vector<double> by = weights(j, coefficient), none;
      const bool last = j == kScales - 1;
      images_.sweep(scales_[j], wanted, to, last ? by : none, last ? none : by);
      if (!last) unpool(coarser, scales_[j], finer.data());
      std::swap(coarser, finer);
    }
    unpool(coarser, scales_[0], gradient);
  }

 private:
  std::vector<T> pool(const void* data, const Scale& scale) const {
    const int64_t height = pooled_side(scale.height), width = pooled_side(scale.width);
    std::vector<T> result(images_.planes() * height * width);
    with_storage<c10::Half, c10::BFloat16>(scale.storage, [&](auto* stored) {
      const auto* from = static_cast<const std::remove_pointer_t<decltype(stored)>*>(data);
      torch::stable::parallel_for(0, images_.planes() * height, 64, [&](int64_t begin, int64_t end) {
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

  // The transpose of `pool`, added to what is there.
  void unpool(const std::vector<T>& coarse, const Scale& scale, T* fine) const {
    const int64_t height = pooled_side(scale.height), width = pooled_side(scale.width);
    torch::stable::parallel_for(0, images_.planes() * scale.height, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = (i % scale.height + scale.height % 2) / 2;
        const T* from = coarse.data() + (i / scale.height * height + row) * width;
        for (int64_t c = 0; c < scale.width; ++c) fine[i * scale.width + c] += T(0.25) * from[(c + scale.width % 2) / 2];
      }
    });
  }

  const Images<T>& images_;
  std::vector<Scale> scales_;
  std::vector<std::vector<T>> pooled_;
  std::vector<std::vector<double>> means_;  // of each scale: a plane's mean similarity
  std::vector<double> similarities_;        // of each plane: their product
};

template <typename T>
Plane<T> wanted_sums(const MultiLossArguments& a) {
  Plane<T> wanted{};
  wanted.charbonnier = a.has(Term::charbonnier);
  wanted.pixel = wanted.charbonnier || a.has(Term::l1) || a.has(Term::mse);
  wanted.similarity = a.has(Term::ssim);
  wanted.edge = a.has(Term::edge);
  wanted.tv = a.has(Term::tv);
  return wanted;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> total(const MultiLossArguments& a, const std::vector<double>& weights, bool with_gradient) {
  const Images<T> images(a.input, a.target, a.rois, a.roi_weight, a.data_range);
  const ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  Tensor gradient = torch::stable::new_empty(a.input, {0}, dtype);
  PerTerm by;
  for (size_t t = 0; t < a.terms.size(); ++t) by[a.terms[t]] += weights[t];
  std::vector<Gradient<T>> gradients;
  if (with_gradient) {
    gradient = torch::stable::new_empty(a.input, a.input.sizes(), dtype);
    ask_for_huge_pages(gradient);
    gradients.push_back(images.gradient(by, gradient.mutable_data_ptr<T>()));
  }
  std::optional<Pyramid<T>> pyramid;
  std::vector<double> contrast;
  if (a.has(Term::ms_ssim)) {
    pyramid.emplace(images);
    contrast = pyramid->weights(0, by[Term::ms_ssim]);
  }
  Plane<T> wanted = wanted_sums<T>(a);
  wanted.similarity = wanted.similarity || (with_gradient && by[Term::ms_ssim] != 0);
  PerTerm values =
      images.values(images.sweep(images.full(), wanted, gradients, images.ssim_weights(by[Term::ssim]), contrast));
  if (pyramid) {
    values[Term::ms_ssim] = pyramid->value();
    if (with_gradient && by[Term::ms_ssim] != 0) pyramid->add_coarser(by[Term::ms_ssim], gradients[0].data);
  }
  const int64_t count = static_cast<int64_t>(a.terms.size());
  Tensor sum = torch::stable::new_empty(a.input, {}, dtype), of_terms = torch::stable::new_empty(a.input, {count}, dtype);
  double weighted = 0;
  for (int64_t t = 0; t < count; ++t) {
    of_terms.mutable_data_ptr<T>()[t] = static_cast<T>(values[a.terms[t]]);
    weighted += weights[t] * values[a.terms[t]];
  }
  *sum.mutable_data_ptr<T>() = static_cast<T>(weighted);
  return {sum, of_terms, gradient};
}

template <typename T>
Tensor jacobian(const MultiLossArguments& a) {
  const Images<T> images(a.input, a.target, a.rois, a.roi_weight, a.data_range);
  std::vector<int64_t> shape = a.input.sizes().vec();
  shape.insert(shape.begin(), static_cast<int64_t>(a.terms.size()));
  Tensor result = torch::stable::new_empty(a.input, shape, std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float);
  ask_for_huge_pages(result);
  std::vector<Gradient<T>> gradients;
  for (size_t t = 0; t < a.terms.size(); ++t) {
    T* row = result.mutable_data_ptr<T>() + t * a.input.numel();
    PerTerm one;
    one[a.terms[t]] = 1;
    if (a.terms[t] != Term::ms_ssim) {
      gradients.push_back(images.gradient(one, row));
      continue;
    }
    // Its windows' derivatives are other ones than ssim's, so it takes a sweep of its own.
    const Pyramid<T> pyramid(images);
    Plane<T> wanted{};
    wanted.similarity = true;
    images.sweep(images.full(), wanted, {images.gradient(one, row)}, {}, pyramid.weights(0, 1));
    pyramid.add_coarser(1, row);
  }
  if (!gradients.empty()) images.sweep(images.full(), wanted_sums<T>(a), gradients, images.ssim_weights(1), {});
  return result;
}

std::tuple<Tensor, Tensor, Tensor> multi_loss(Tensor input, Tensor target, std::vector<std::string> names,
                                              std::vector<double> weights, std::optional<Tensor> rois,
                                              double roi_weight, double data_range, bool with_gradient) {
  STD_TORCH_CHECK(weights.size() == names.size(), "weights must have one value per term");
  const MultiLossArguments arguments(input, target, names, rois, roi_weight, data_range);
  return input.scalar_type() == ScalarType::Double ? total<double>(arguments, weights, with_gradient)
                                                   : total<float>(arguments, weights, with_gradient);
}

Tensor multi_loss_jacobian(Tensor input, Tensor target, std::vector<std::string> names, std::optional<Tensor> rois,
                           double roi_weight, double data_range) {
  const MultiLossArguments arguments(input, target, names, rois, roi_weight, data_range);
  return input.scalar_type() == ScalarType::Double ? jacobian<double>(arguments) : jacobian<float>(arguments);
}

}  // namespace
}  // namespace lid

STABLE_TORCH_LIBRARY_IMPL(lidnet_fast, CPU, m) {
  m.impl("multi_loss", TORCH_BOX(&lid::multi_loss));
  m.impl("multi_loss_jacobian", TORCH_BOX(&lid::multi_loss_jacobian));
}
