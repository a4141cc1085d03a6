// The arguments of multi_loss and multi_loss_jacobian, after checks of what would read or write outside a tensor.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "floating.h"
#include "multi_loss.h"

namespace lid {

// A value for every term, by the term's number; 0 for those that nobody asked for.
struct PerTerm {
  double values[kTerms] = {};
  double& operator[](Term term) { return values[static_cast<int>(term)]; }
  double operator[](Term term) const { return values[static_cast<int>(term)]; }
};

inline Term term_of(const std::string& name) {
  constexpr const char* kNames[kTerms] = {"l1", "mse", "charbonnier", "ssim", "ms_ssim", "edge", "tv"};
  const auto found = std::find(kNames, kNames + kTerms, name);
  STD_TORCH_CHECK(found != kNames + kTerms, "terms must be of l1, mse, charbonnier, ssim, ms_ssim, edge, tv, got ", name);
  return static_cast<Term>(found - kNames);
}

// The shortest side of an image that a term has a value for.
inline int64_t least_side(Term term) {
  switch (term) {
    case Term::ssim: return kWindow;
    case Term::ms_ssim: return kHalo * 16 + 1;
    case Term::edge: return 3;
    case Term::tv: return 2;
    default: return 1;
  }
}

struct MultiLossArguments {
  torch::stable::Tensor input, target;
  std::optional<torch::stable::Tensor> rois;
  double roi_weight, data_range;
  std::vector<Term> terms;

  MultiLossArguments(const torch::stable::Tensor& input, const torch::stable::Tensor& target,
                     const std::vector<std::string>& names, const std::optional<torch::stable::Tensor>& rois,
                     double roi_weight, double data_range)
      : input(input), target(target), rois(rois), roi_weight(roi_weight), data_range(data_range) {
    const int64_t dimensions = input.dim(), axes = dimensions - 2;
    check_floating(input, "input");
    STD_TORCH_CHECK(dimensions == 4 || dimensions == 5, "input must have 4 or 5 dimensions, got ", dimensions);
    STD_TORCH_CHECK(target.dim() == dimensions && target.scalar_type() == input.scalar_type(),
                    "target must have the shape and dtype of input");
    STD_TORCH_CHECK(target.device() == input.device() && (!rois || rois->device() == input.device()),
                    "target and rois must be on the device of input");
    STD_TORCH_CHECK(input.numel() > 0, "input must hold at least one pixel");
    for (int64_t d = 0; d < dimensions; ++d) {
      STD_TORCH_CHECK(target.size(d) == input.size(d), "target must have the shape of input, differs in dimension ", d);
    }
    if (rois) {
      STD_TORCH_CHECK(rois->dim() == 2 && rois->size(1) == 1 + 2 * axes, "rois must have shape [K, ", 1 + 2 * axes, "]");
      STD_TORCH_CHECK(rois->scalar_type() == arithmetic_of(input), "rois must be float64 for float64 images, else float32");
    }
    STD_TORCH_CHECK(names.size() <= kTerms, "terms must name each term once at most, got ", names.size(), " names");
    for (const std::string& name : names) {
      const Term term = term_of(name);
      for (int64_t d = 2; d < dimensions; ++d) {
        STD_TORCH_CHECK(input.size(d) >= least_side(term), "term ", name, " needs images of at least ", least_side(term),
                        " pixels a side, got ", input.size(d), " in dimension ", d);
      }
      STD_TORCH_CHECK(term != Term::ms_ssim || axes == 2, "term ms_ssim has no kernel for volumes");
      terms.push_back(term);
    }
  }

  bool has(Term term) const { return std::find(terms.begin(), terms.end(), term) != terms.end(); }
};

}  // namespace lid
