// What the ops on CUDA ask of tensors and of the device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "../floating.h"

// The tests register the emulated kernels beside the real ones' library, for tensors on the CPU.
#if defined(LID_EMULATED)
#define LID_CUDA_LIBRARY STABLE_TORCH_LIBRARY_IMPL(lidnet_fast_emulated, CPU, m)
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define LID_CUDA_LIBRARY STABLE_TORCH_LIBRARY_IMPL(lidnet_fast, CUDA, m)
#endif

namespace lid {
namespace cuda {

// The tensor's device and its current stream, for as long as this lives.
class OnDevice {
 public:
#if defined(LID_EMULATED)
  explicit OnDevice(const torch::stable::Tensor&) {}
#else
  explicit OnDevice(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    const int32_t error = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_);
    STD_TORCH_CHECK(error == 0, "no CUDA stream for device ", tensor.get_device_index());
  }
#endif
  void* stream() const { return stream_; }

 private:
#if !defined(LID_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

inline void check_launch(int error) { STD_TORCH_CHECK(error == 0, "a CUDA kernel couldn't be launched: error ", error); }

}  // namespace cuda
}  // namespace lid
