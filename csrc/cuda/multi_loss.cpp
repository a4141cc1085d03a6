// multi_loss and multi_loss_jacobian on CUDA: which kernels run on what, in the order of the current stream. Nothing waits for the
// device, so all of it can be captured in a CUDA graph.

#include "multi_loss.h"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../ms_ssim.h"
#include "../multi_loss_arguments.h"
#include "tensors.h"

namespace lid {
namespace cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One pair of batches of images: what of it the terms share, and the launches.
class Images {
 public:
  using Scale = Planes;
  using WindowSums = Tensor;
  using Weights = const void*;  // of each plane's windows, or null for 0
  using Values = Tensor;        // of each pixel of a scale

  struct Pooled {
    Tensor input, target;
    Planes scale;
  };

  struct Similarities {
    Tensor of_planes, of_scales;  // [planes], [kScales, planes]

    Weights weights(int scale) const {
      return static_cast<const char*>(of_scales.const_data_ptr()) + scale * of_planes.numel() * of_scales.element_size();
    }
  };

  explicit Images(const MultiLossArguments& a)
      : input_(torch::stable::contiguous(a.input)),
        target_(torch::stable::contiguous(a.target)),
        dtype_(arithmetic_of(input_)),
        device_(input_),
        full_(planes_of(input_, target_)),
        channels_(input_.size(1)),
        roi_weight_(a.roi_weight),
        c1_(kK1 * kK1 * a.data_range * a.data_range),
        c2_(kK2 * kK2 * a.data_range * a.data_range),
        centres_(empty({full_.count})),
        weight_sum_(empty({1}, ScalarType::Double)) {
    PrepareLaunch prepare{full_, nullptr, 0, channels_, roi_weight_, centres_.mutable_data_ptr(),
                          weight_sum_.mutable_data_ptr<double>()};
    std::optional<Tensor> inside;
    if (a.rois) {
      const Tensor rois = torch::stable::contiguous(*a.rois);
      mask_ = empty({full_.count / channels_, full_.depth, full_.height, full_.width}, ScalarType::Byte);
      MaskLaunch mask{rois.const_data_ptr(), rois.size(0), full_.storage, full_.volume, full_.count / channels_, full_.depth,
                      full_.height, full_.width, mask_->mutable_data_ptr<uint8_t>(), nullptr};
      prepare.inside_count = mask_blocks(mask);
      inside = empty({prepare.inside_count}, ScalarType::Int);
      mask.inside = inside->mutable_data_ptr<int>();
      prepare.inside = mask.inside;
      check_launch(launch_mask(mask, stream()));
    }
    check_launch(launch_prepare(prepare, stream()));
  }

  const Planes& full() const { return full_; }
  ScalarType dtype() const { return dtype_; }
  void* stream() const { return device_.stream(); }
  const double* weight_sum() const { return weight_sum_.const_data_ptr<double>(); }

  Tensor empty(const std::vector<int64_t>& shape) const { return empty(shape, dtype_); }
  Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) const {
    return torch::stable::new_empty(input_, shape, dtype);
  }

  // Places of a filter that is so much longer than one pixel along every axis, in all planes.
  double places(int64_t halo) const { return static_cast<double>(full_.count) * places_of(full_, halo); }
  double windows() const { return places(kHalo); }
  double columns_between() const { return count(full_.depth, full_.height, full_.width - 1); }
  double rows_between() const { return count(full_.depth, full_.height - 1, full_.width); }
  double slices_between() const { return full_.volume ? count(full_.depth - 1, full_.height, full_.width) : 0; }

  static double places_of(const Planes& planes, int64_t halo) {
    return static_cast<double>((planes.volume ? planes.depth - halo : 1) * (planes.height - halo) * (planes.width - halo));
  }

  // Sums over the windows of `planes`; the derivatives' maps as the sweep takes them, where they are wanted.
  struct Windows {
    Tensor sums;
    std::optional<Tensor> maps;
  };
  Windows windows(const Planes& planes, bool with_maps, double structural, Weights structural_added, Weights contrast) const {
    WindowsLaunch launch{};
    launch.planes = planes;
    launch.centres = centres_.const_data_ptr();
    launch.c1 = c1_;
    launch.c2 = c2_;
    launch.structural = structural;
    launch.structural_added = structural_added;
    launch.contrast = contrast;
    Windows result{empty({2, windows_blocks(planes)}, ScalarType::Double), std::nullopt};
    launch.sums = result.sums.mutable_data_ptr<double>();
    if (planes.volume) {
      if (with_maps) result.maps = empty({3, planes.count, window_slices(planes), planes.height, planes.width});
      launch_slabs(launch, result.maps);
      return result;
    }
    if (with_maps) {
      result.maps = empty({3, planes.count, planes.height - kHalo, planes.width - kHalo});
      launch.maps = result.maps->mutable_data_ptr();
    }
    launch.slab = {0, planes.count};
    check_launch(launch_windows(launch, stream()));
    return result;
  }

  // What a sweep of the full images starts from.
  SweepLaunch sweep(const std::optional<Tensor>& maps) const {
    SweepLaunch launch{};
    launch.planes = full_;
    launch.mask = mask_ ? mask_->const_data_ptr<uint8_t>() : nullptr;
    launch.channels = channels_;
    launch.roi_weight = roi_weight_;
    launch.weight_sum = weight_sum();
    launch.centres = centres_.const_data_ptr();
    launch.maps = maps ? maps->const_data_ptr() : nullptr;
    return launch;
  }

  // Its sums, after the launch.
  Tensor launch(SweepLaunch launch) const {
    const Tensor sums = empty({kSweepSums, sweep_blocks(launch.planes)}, ScalarType::Double);
    launch.sums = sums.mutable_data_ptr<double>();
    check_launch(launch_sweep(launch, stream()));
    return sums;
  }

  // The gradient of sum of coefficient * term; what it is written to has the images' shape.
  SweepGradient gradient(const PerTerm& by, void* data) const {
    // The counts of terms that aren't asked for may be 0.
    const auto over = [](double weight, double count) { return weight == 0 ? 0 : weight / count; };
    return {data,
            by[Term::l1],
            by[Term::mse],
            by[Term::charbonnier],
            over(by[Term::edge], places(2)),
            over(by[Term::tv], columns_between()),
            over(by[Term::tv], rows_between()),
            full_.volume ? over(by[Term::tv], slices_between()) : 0,
            by[Term::ssim] != 0 || by[Term::ms_ssim] != 0};
  }

  // For Pyramid, see ms_ssim.h.
  Pooled pool(const Planes& finer) const {
    const int64_t height = pooled_side(finer.height), width = pooled_side(finer.width);
    const Tensor input = empty({finer.count, height, width}), target = empty({finer.count, height, width});
    check_launch(launch_pool(finer, input.mutable_data_ptr(), target.mutable_data_ptr(), stream()));
    return {input, target,
            {input.const_data_ptr(), target.const_data_ptr(), storage_of(input), false, finer.count, 1, height, width}};
  }

  Tensor window_sums(const Planes& planes) const { return windows(planes, false, 0, nullptr, nullptr).sums; }

  Similarities similarities(const std::vector<Planes>& scales, const std::vector<Tensor>& sums, double coefficient) const {
    const Similarities result{empty({full_.count}, ScalarType::Double), empty({kScales, full_.count})};
    ScalesLaunch launch{};
    for (int j = 0; j < kScales; ++j) {
      launch.sums[j] = sums[j].const_data_ptr<double>();
      launch.blocks[j] = windows_blocks(scales[j]);
      launch.windows[j] = static_cast<int64_t>(places_of(scales[j], kHalo));
    }
    launch.planes = full_.count;
    launch.wide = dtype_ == ScalarType::Double;
    launch.coefficient = coefficient;
    launch.similarities = result.of_planes.mutable_data_ptr<double>();
    launch.weights = result.of_scales.mutable_data_ptr();
    check_launch(launch_scales(launch, stream()));
    return result;
  }

  Tensor gradient(const Planes& planes, Weights structural, Weights contrast, const std::optional<Tensor>& coarser) const {
    const std::optional<Tensor> maps = windows(planes, true, 0, structural, contrast).maps;
    const Tensor result = empty({planes.count, planes.height, planes.width});
    SweepLaunch launch = sweep(maps);
    launch.planes = planes;
    launch.mask = nullptr;
    launch.gradients[0] = {result.mutable_data_ptr(), 0, 0, 0, 0, 0, 0, 0, true};
    launch.gradient_count = 1;
    launch.coarser = coarser ? coarser->const_data_ptr() : nullptr;
    this->launch(launch);
    return result;
  }

 private:
  // The windows of volumes slab by slab, each in the same memory; `spread`, if there, gets their maps within each slice.
  void launch_slabs(WindowsLaunch launch, const std::optional<Tensor>& spread) const {
    const Planes& planes = launch.planes;
    const int64_t rows = planes.height - kHalo, columns = planes.width - kHalo, all = planes.count * window_slices(planes);
    const int64_t values = 4 * planes.height * planes.width + (spread ? 3 * rows * columns : 0);
    const int64_t most = std::max<int64_t>(slab_bytes / (values * centres_.element_size()), 1);
    const int64_t slabs = (all + most - 1) / most, slices = (all + slabs - 1) / slabs;
    const Tensor fields = empty({4, slices, planes.height, planes.width});
    const Tensor maps = spread ? empty({3, slices, rows, columns}) : empty({0});
    launch.fields = fields.const_data_ptr();
    if (spread) launch.maps = maps.mutable_data_ptr();
    for (int64_t first = 0; first < all; first += slices) {
      launch.slab = {first, std::min(slices, all - first)};
      check_launch(launch_sum_slices(planes, launch.slab, launch.centres, fields.mutable_data_ptr(), stream()));
      check_launch(launch_windows(launch, stream()));
      if (spread) {
        check_launch(launch_spread_slices(planes, launch.slab, launch.maps, spread->mutable_data_ptr(), stream()));
      }
    }
  }

  static Planes planes_of(const Tensor& input, const Tensor& target) {
    const bool volume = input.dim() == 5;
    return {input.const_data_ptr(),
            target.const_data_ptr(),
            storage_of(input),
            volume,
            input.size(0) * input.size(1),
            volume ? input.size(2) : 1,
            input.size(input.dim() - 2),
            input.size(input.dim() - 1)};
  }
  double count(int64_t depth, int64_t height, int64_t width) const {
    return static_cast<double>(full_.count * depth * height * width);
  }

  const Tensor input_, target_;
  const ScalarType dtype_;
  const OnDevice device_;
  const Planes full_;
  const int64_t channels_;
  const double roi_weight_, c1_, c2_;
  const Tensor centres_, weight_sum_;
  std::optional<Tensor> mask_;
};

void want(SweepLaunch& sweep, const MultiLossArguments& a) {
  sweep.charbonnier = a.has(Term::charbonnier);
  sweep.pixel = sweep.charbonnier || a.has(Term::l1) || a.has(Term::mse);
  sweep.edge = a.has(Term::edge);
  sweep.tv = a.has(Term::tv);
}

std::tuple<Tensor, Tensor, Tensor> multi_loss(Tensor input, Tensor target, std::vector<std::string> names,
                                              std::vector<double> weights, std::optional<Tensor> rois,
                                              double roi_weight, double data_range, bool with_gradient) {
  STD_TORCH_CHECK(weights.size() == names.size(), "weights must have one value per term");
  const MultiLossArguments a(input, target, names, rois, roi_weight, data_range);
  const Images images(a);
  PerTerm by;
  for (size_t t = 0; t < a.terms.size(); ++t) by[a.terms[t]] += weights[t];
  Tensor gradient = images.empty({0});
  if (with_gradient) gradient = torch::stable::new_empty(a.input, a.input.sizes(), images.dtype());

  std::optional<Pyramid<Images>> pyramid;
  std::optional<Tensor> coarser;
  if (a.has(Term::ms_ssim)) pyramid.emplace(images, by[Term::ms_ssim]);
  std::optional<Images::Windows> windows;
  const bool of_scales = with_gradient && by[Term::ms_ssim] != 0;
  if (a.has(Term::ssim) || of_scales) {
    windows = images.windows(images.full(), with_gradient, by[Term::ssim] / images.windows(), nullptr,
                             of_scales ? pyramid->similarities().weights(0) : nullptr);
  }
  SweepLaunch sweep = images.sweep(windows ? windows->maps : std::nullopt);
  want(sweep, a);
  if (with_gradient) {
    sweep.gradients[0] = images.gradient(by, gradient.mutable_data_ptr());
    sweep.gradient_count = 1;
    if (of_scales) coarser = pyramid->coarser_gradient();
    if (coarser) sweep.coarser = coarser->const_data_ptr();
  }
  const Tensor sums = images.launch(sweep);

  const int64_t count = static_cast<int64_t>(a.terms.size());
  const Tensor total = images.empty({}), values = images.empty({count});
  FinishLaunch finish{};
  for (int64_t t = 0; t < count; ++t) {
    finish.terms[t] = a.terms[t];
    finish.weights[t] = weights[t];
  }
  finish.count = static_cast<int>(count);
  finish.wide = images.dtype() == ScalarType::Double;
  finish.planes = images.full().count;
  finish.weight_sum = images.weight_sum();
  finish.sums = sums.const_data_ptr<double>();
  finish.blocks = sweep_blocks(images.full());
  finish.responses = images.places(2);
  finish.columns_between = images.columns_between();
  finish.rows_between = images.rows_between();
  finish.slices_between = images.slices_between();
  if (a.has(Term::ssim)) {
    finish.windows_sums = windows->sums.const_data_ptr<double>();
    finish.windows_blocks = windows_blocks(images.full());
    finish.windows = images.windows();
  }
  if (pyramid) finish.similarities = pyramid->similarities().of_planes.const_data_ptr<double>();
  finish.total = total.mutable_data_ptr();
  finish.values = values.mutable_data_ptr();
  check_launch(launch_finish(finish, images.stream()));
  return {total, values, gradient};
}

Tensor multi_loss_jacobian(Tensor input, Tensor target, std::vector<std::string> names, std::optional<Tensor> rois,
                           double roi_weight, double data_range) {
  const MultiLossArguments a(input, target, names, rois, roi_weight, data_range);
  const Images images(a);
  std::vector<int64_t> shape = a.input.sizes().vec();
  shape.insert(shape.begin(), static_cast<int64_t>(a.terms.size()));
  Tensor result = images.empty(shape);
  std::optional<Tensor> maps;
  if (a.has(Term::ssim)) maps = images.windows(images.full(), true, 1 / images.windows(), nullptr, nullptr).maps;
  SweepLaunch all = images.sweep(maps);
  want(all, a);
  for (size_t t = 0; t < a.terms.size(); ++t) {
    void* row = static_cast<char*>(result.mutable_data_ptr()) + t * a.input.numel() * result.element_size();
    PerTerm one;
    one[a.terms[t]] = 1;
    if (a.terms[t] != Term::ms_ssim) {
      all.gradients[all.gradient_count++] = images.gradient(one, row);
      continue;
    }
    // Its windows' derivatives are other ones than ssim's, so it takes a sweep of its own.
    const Pyramid<Images> pyramid(images, 1);
    const Tensor coarser = pyramid.coarser_gradient();
    const auto windows = images.windows(images.full(), true, 0, nullptr, pyramid.similarities().weights(0));
    SweepLaunch sweep = images.sweep(windows.maps);
    sweep.gradients[0] = images.gradient(one, row);
    sweep.gradient_count = 1;
    sweep.coarser = coarser.const_data_ptr();
    images.launch(sweep);
  }
  if (all.gradient_count > 0) images.launch(all);
  return result;
}

}  // namespace
}  // namespace cuda
}  // namespace lid

LID_CUDA_LIBRARY {
  m.impl("multi_loss", TORCH_BOX(&lid::cuda::multi_loss));
  m.impl("multi_loss_jacobian", TORCH_BOX(&lid::cuda::multi_loss_jacobian));
}
