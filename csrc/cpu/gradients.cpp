// gradient_gramian and combine_gradients on the CPU: every gradient is read once.

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "../gradients_arguments.h"
#include "gradients_blocks.h"
#include "tensors.h"

namespace lid {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
GradientFunctions<T> gradient_functions(Storage storage) {
  switch (instruction_set()) {
    case InstructionSet::avx512: return avx512::gradient_functions<T>(storage);
    case InstructionSet::avx2: return avx2::gradient_functions<T>(storage);
    default: return baseline::gradient_functions<T>(storage);
  }
}

template <typename T>
Tensor gramian(const Tensor& gradients, bool per_sample, ScalarType dtype) {
  const int64_t count = gradients.size(0), samples = per_sample ? gradients.size(1) : 1, entries = count * count;
  const int64_t stride = gradients.numel() / count, length = samples > 0 ? stride / samples : 0;
  const int64_t blocks = (length + kGradientBlock - 1) / kGradientBlock;
  const int64_t item = gradients.element_size();
  const GradientFunctions<T> functions = gradient_functions<T>(storage_of(gradients));
  // Runs of blocks have sums of their own, so that what is kept stays small and doesn't depend on the threads.
  constexpr int64_t kRun = 16;
  const int64_t runs = (blocks + kRun - 1) / kRun;
  std::vector<double> sums(samples * runs * entries);
  torch::stable::parallel_for(0, samples * runs, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(count * kGradientBlock);
    for (int64_t i = begin; i < end; ++i) {
      const char* data = static_cast<const char*>(gradients.const_data_ptr()) + i / runs * length * item;
      const GradientRows rows{data, count, stride};
      const int64_t last = std::min((i % runs + 1) * kRun, blocks);
      for (int64_t b = i % runs * kRun; b < last; ++b) {
        const int64_t first = b * kGradientBlock;
        functions.add_products(rows, first, std::min(kGradientBlock, length - first), scratch.data(),
                               sums.data() + i * entries);
      }
    }
  });
  Tensor result = torch::stable::new_empty(
      gradients, per_sample ? std::vector<int64_t>{samples, count, count} : std::vector<int64_t>{count, count}, dtype);
  T* to = result.mutable_data_ptr<T>();
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = i; j < count; ++j) {
        double sum = 0;
        for (int64_t r = 0; r < runs; ++r) sum += sums[(n * runs + r) * entries + i * count + j];
        to[n * entries + i * count + j] = to[n * entries + j * count + i] = static_cast<T>(sum);
      }
    }
  }
  return result;
}

template <typename T>
void combine(const Tensor& gradients, const Tensor& coefficients, Tensor& result) {
  const int64_t length = result.numel(), blocks = (length + kGradientBlock - 1) / kGradientBlock;
  const GradientRows rows{gradients.const_data_ptr(), gradients.size(0), length};
  const GradientFunctions<T> functions = gradient_functions<T>(storage_of(gradients));
  torch::stable::parallel_for(0, blocks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kGradientBlock;
      functions.combine(rows, coefficients.const_data_ptr<T>(), first, std::min(kGradientBlock, length - first),
                        result.mutable_data_ptr());
    }
  });
}

Tensor gradient_gramian(Tensor gradients, bool per_sample) {
  check_gradients(gradients, per_sample ? 3 : 2);
  const Tensor dense = torch::stable::contiguous(gradients);
  return dense.scalar_type() == ScalarType::Double ? gramian<double>(dense, per_sample, ScalarType::Double)
                                                   : gramian<float>(dense, per_sample, ScalarType::Float);
}

Tensor combine_gradients(Tensor gradients, Tensor coefficients) {
  check_gradients(gradients, 2);
  check_coefficients(coefficients, gradients);
  const Tensor dense = torch::stable::contiguous(gradients), factors = torch::stable::contiguous(coefficients);
  Tensor result = new_result(dense.sizes().slice(1).vec(), false, dense.scalar_type(), dense);
  dense.scalar_type() == ScalarType::Double ? combine<double>(dense, factors, result)
                                            : combine<float>(dense, factors, result);
  return result;
}

}  // namespace
}  // namespace lid

STABLE_TORCH_LIBRARY_IMPL(lidnet_fast, CPU, m) {
  m.impl("gradient_gramian", TORCH_BOX(&lid::gradient_gramian));
  m.impl("combine_gradients", TORCH_BOX(&lid::combine_gradients));
}
