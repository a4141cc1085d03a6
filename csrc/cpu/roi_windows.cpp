// roi_windows on the CPU: rows of pixels copied out of images, and added back in the order of the windows.

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include "tensors.h"

namespace lid {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Images [N, C, D, H, W], D 1 for those of two dimensions, and where windows of one size lie in them.
struct Windows {
  int64_t images, channels, count;
  int64_t side[3], size[3];
  std::vector<int64_t> corners;  // [count, 4], of the image, the slice, the row and the column

  int64_t plane() const { return side[0] * side[1] * side[2]; }
  int64_t rows() const { return size[0] * size[1]; }
  // The first pixel of a window's row, in its channel.
  int64_t pixel(int64_t window, int64_t row) const {
    const int64_t* corner = corners.data() + 4 * window;
    return ((corner[1] + row / size[1]) * side[1] + corner[2] + row % size[1]) * side[2] + corner[3];
  }
};

Windows windows_of(const std::vector<int64_t>& shape, const Tensor& corners, const std::vector<int64_t>& size) {
  const int64_t axes = static_cast<int64_t>(shape.size()) - 2;
  STD_TORCH_CHECK(axes == 2 || axes == 3, "images must have 4 or 5 dimensions");
  STD_TORCH_CHECK(static_cast<int64_t>(size.size()) == axes, "size must have one number per axis");
  STD_TORCH_CHECK(corners.dim() == 2 && corners.size(1) == axes + 1 && corners.scalar_type() == ScalarType::Long,
                  "corners must be int64 [windows, 1 + axes]");
  Windows windows{shape[0], shape[1], corners.size(0), {1, 1, 1}, {1, 1, 1}, {}};
  for (int64_t a = 0; a < axes; ++a) {
    windows.side[3 - axes + a] = shape[2 + a];
    windows.size[3 - axes + a] = size[a];
    STD_TORCH_CHECK(size[a] >= 1 && size[a] <= shape[2 + a], "size must be within the images");
  }
  STD_TORCH_CHECK(windows.count == 0 || windows.images > 0, "there are windows but no images");
  const Tensor dense = torch::stable::contiguous(corners);
  const int64_t* given = dense.const_data_ptr<int64_t>();
  windows.corners.assign(4 * windows.count, 0);
  for (int64_t k = 0; k < windows.count; ++k) {
    int64_t* corner = windows.corners.data() + 4 * k;
    corner[0] = std::clamp<int64_t>(given[k * (axes + 1)], 0, windows.images - 1);
    for (int64_t a = 3 - axes; a < 3; ++a) {
      corner[1 + a] =
          std::clamp<int64_t>(given[k * (axes + 1) + a - 2 + axes], 0, windows.side[a] - windows.size[a]);
    }
  }
  return windows;
}

Tensor roi_windows(Tensor images, Tensor corners, std::vector<int64_t> size) {
  check_floating(images, "images");
  const Windows windows = windows_of(images.sizes().vec(), corners, size);
  std::vector<int64_t> result_shape{windows.count, windows.channels};
  result_shape.insert(result_shape.end(), size.begin(), size.end());
  Tensor result = torch::stable::new_empty(images, result_shape);
  const Tensor dense = torch::stable::contiguous(images);
  const int64_t item = images.element_size(), bytes = windows.size[2] * item, rows = windows.rows();
  const char* from = static_cast<const char*>(dense.const_data_ptr());
  char* to = static_cast<char*>(result.mutable_data_ptr());
  torch::stable::parallel_for(0, windows.count * windows.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t window = i / windows.channels, channel = i % windows.channels;
      const char* plane = from + (windows.corners[4 * window] * windows.channels + channel) * windows.plane() * item;
      for (int64_t row = 0; row < rows; ++row) {
        std::memcpy(to + (i * rows + row) * bytes, plane + windows.pixel(window, row) * item, bytes);
      }
    }
  });
  return result;
}

// A is the arithmetic: sums of half-precision gradients are kept in float32 until they are complete.
template <typename T, typename A>
void scatter(const Tensor& grad_windows, const Windows& windows, Tensor& gradient) {
  const T* from = grad_windows.const_data_ptr<T>();
  T* to = gradient.mutable_data_ptr<T>();
  const int64_t plane = windows.plane(), rows = windows.rows(), width = windows.size[2];
  torch::stable::parallel_for(0, windows.images * windows.channels, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> kept(std::is_same_v<T, A> ? 0 : plane);
    for (int64_t i = begin; i < end; ++i) {
      A* sum;
      if constexpr (std::is_same_v<T, A>) {
        sum = to + i * plane;
      } else {
        sum = kept.data();
      }
      std::fill(sum, sum + plane, A(0));
      for (int64_t k = 0; k < windows.count; ++k) {
        if (windows.corners[4 * k] != i / windows.channels) continue;
        const T* window = from + (k * windows.channels + i % windows.channels) * rows * width;
        for (int64_t row = 0; row < rows; ++row) {
          A* pixels = sum + windows.pixel(k, row);
          for (int64_t x = 0; x < width; ++x) pixels[x] += static_cast<A>(window[row * width + x]);
        }
      }
      if constexpr (!std::is_same_v<T, A>) {
        std::transform(sum, sum + plane, to + i * plane, [](A value) { return static_cast<T>(value); });
      }
    }
  });
}

Tensor roi_windows_backward(Tensor grad_windows, Tensor corners, std::vector<int64_t> shape) {
  check_floating(grad_windows, "grad_windows");
  STD_TORCH_CHECK(grad_windows.dim() == static_cast<int64_t>(shape.size()), "grad_windows must have the images' axes");
  const std::vector<int64_t> of_windows = grad_windows.sizes().vec();
  const Windows windows = windows_of(shape, corners, {of_windows.begin() + 2, of_windows.end()});
  STD_TORCH_CHECK(of_windows[0] == windows.count && of_windows[1] == windows.channels,
                  "grad_windows must have the windows' number and the images' channels");
  Tensor gradient = new_result(shape, false, grad_windows.scalar_type(), grad_windows);
  const Tensor dense = torch::stable::contiguous(grad_windows);
  with_storage<torch::headeronly::Half, torch::headeronly::BFloat16>(storage_of(dense), [&](auto* stored) {
    using T = std::remove_pointer_t<decltype(stored)>;
    scatter<T, std::conditional_t<std::is_same_v<T, double>, double, float>>(dense, windows, gradient);
  });
  return gradient;
}

}  // namespace
}  // namespace lid

STABLE_TORCH_LIBRARY_IMPL(lidnet_fast, CPU, m) {
  m.impl("roi_windows", TORCH_BOX(&lid::roi_windows));
  m.impl("roi_windows_backward", TORCH_BOX(&lid::roi_windows_backward));
}
