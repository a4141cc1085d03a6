// The dtypes of tensors that CUDA kernels read.
#pragma once

namespace lid {
namespace cuda {

enum class Scalar { float32, float64, float16, bfloat16 };

}  // namespace cuda
}  // namespace lid
