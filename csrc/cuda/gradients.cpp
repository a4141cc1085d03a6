// gradient_gramian and combine_gradients on CUDA.

#include "gradients.h"

#include <vector>

#include "../gradients_arguments.h"
#include "tensors.h"

namespace lid {
namespace cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor gradient_gramian(Tensor gradients, bool per_sample) {
  check_gradients(gradients, per_sample ? 3 : 2);
  const OnDevice device(gradients);
  const Tensor dense = torch::stable::contiguous(gradients);
  const int64_t count = dense.size(0), samples = per_sample ? dense.size(1) : 1;
  const std::vector<int64_t> shape =
      per_sample ? std::vector<int64_t>{samples, count, count} : std::vector<int64_t>{count, count};
  Tensor result = torch::stable::new_empty(dense, shape, arithmetic_of(dense));
  if (samples == 0) return result;
  GramianLaunch launch{dense.const_data_ptr(), storage_of(dense), count, samples, dense.numel() / count / samples, nullptr,
                       result.mutable_data_ptr()};
  const Tensor partial =
      torch::stable::new_empty(dense, {samples, count, count, gramian_chunks(launch)}, ScalarType::Double);
  launch.partial = partial.mutable_data_ptr<double>();
  check_launch(launch_gramian(launch, device.stream()));
  return result;
}

Tensor combine_gradients(Tensor gradients, Tensor coefficients) {
  check_gradients(gradients, 2);
  check_coefficients(coefficients, gradients);
  const OnDevice device(gradients);
  const Tensor dense = torch::stable::contiguous(gradients), factors = torch::stable::contiguous(coefficients);
  Tensor result = torch::stable::new_empty(dense, dense.sizes().slice(1));
  if (result.numel() == 0) return result;
  const CombineLaunch launch{dense.const_data_ptr(), factors.const_data_ptr(), storage_of(dense), dense.size(0),
                             result.numel(),         result.mutable_data_ptr()};
  check_launch(launch_combine(launch, device.stream()));
  return result;
}

}  // namespace
}  // namespace cuda
}  // namespace lid

LID_CUDA_LIBRARY {
  m.impl("gradient_gramian", TORCH_BOX(&lid::cuda::gradient_gramian));
  m.impl("combine_gradients", TORCH_BOX(&lid::cuda::combine_gradients));
}
