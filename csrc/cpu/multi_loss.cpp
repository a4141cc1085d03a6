// multi_loss and multi_loss_jacobian on the CPU: what each term's sums are multiplied by, and the sweeps that this takes.

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../ms_ssim.h"
#include "multi_loss_images.h"
#include "tensors.h"

namespace lid {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
  const ScalarType dtype = arithmetic_of(a.input);
  Tensor gradient = torch::stable::new_empty(a.input, {0}, dtype);
  PerTerm by;
  for (size_t t = 0; t < a.terms.size(); ++t) by[a.terms[t]] += weights[t];
  std::vector<Gradient<T>> gradients;
  if (with_gradient) {
    gradient = new_result(a.input.sizes().vec(), false, dtype, a.input);
    gradients.push_back(images.gradient(by, gradient.mutable_data_ptr<T>()));
  }
  std::optional<Pyramid<Images<T>>> pyramid;
  std::vector<double> contrast;
  if (a.has(Term::ms_ssim)) {
    pyramid.emplace(images, by[Term::ms_ssim]);
    contrast = pyramid->similarities().weights(0);
  }
  Plane<T> wanted = wanted_sums<T>(a);
  wanted.similarity = wanted.similarity || (with_gradient && by[Term::ms_ssim] != 0);
  PerTerm values =
      images.values(images.sweep(images.full(), wanted, gradients, images.ssim_weights(by[Term::ssim]), contrast));
  if (pyramid) {
    values[Term::ms_ssim] = 1 - pyramid->similarities().mean();
    if (with_gradient && by[Term::ms_ssim] != 0) {
      images.unpool(pyramid->coarser_gradient(), images.full(), gradients[0].data);
    }
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
  Tensor result = new_result(shape, false, arithmetic_of(a.input), a.input);
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
    const Pyramid<Images<T>> pyramid(images, 1);
    images.sweep(images.full(), images.similarity_alone(), {images.gradient(one, row)}, {}, pyramid.similarities().weights(0));
    images.unpool(pyramid.coarser_gradient(), images.full(), row);
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
