// What the ops on the CPU ask of tensors.
#pragma once

#include <cstdint>
#include <iterator>
#include <list>
#include <mutex>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../floating.h"
#include "instruction_sets.h"

#if defined(__linux__)
// Of PyTorch 2.11; null with 2.10, which has no tensors of memory that says when it is free again.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(void* data, int64_t dimensions, const int64_t* sizes,
                                                                const int64_t* strides, int64_t storage_offset,
                                                                int32_t dtype, int32_t device_type,
                                                                int32_t device_index, AtenTensorHandle* result,
                                                                int32_t layout, const uint8_t* opaque_metadata,
                                                                int64_t opaque_metadata_size,
                                                                void (*deleter)(void* data, void* context),
                                                                void* context);
#endif

namespace lid {

#if defined(__linux__)
// Memory of large results that are gone, for the next ones of their size. malloc returns it to the kernel, and a virtual
// machine's kernel to its host: a training step's gradient then costs more page faults than a kernel costs time.
//
// Nobody waits for the mutex, but does without the pool: a process that was forked while another thread had it would wait
// for ever.
class ResultPool {
 public:
  static constexpr size_t kLarge = size_t(4) << 20;   // bytes of a result that comes from here
  static constexpr size_t kKept = size_t(256) << 20;  // most bytes that are kept, the latest

  static ResultPool& shared() {
    static ResultPool* pool = new ResultPool;  // never destroyed: tensors may outlive statics
    return *pool;
  }

  // Null if the kernel has none. In huge pages, where it has these.
  void* take(size_t bytes) {
    if (const Lock lock(mutex_, std::try_to_lock); lock.owns_lock()) {
      for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
        if (block->bytes != bytes) continue;
        void* data = block->data;
        kept_ -= bytes;
        blocks_.erase(block);
        return data;
      }
    }
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
    madvise(data, bytes, MADV_HUGEPAGE);
    return data;
  }

  void give_back(void* data, size_t bytes) {
    std::list<Block> dropped{{data, bytes}};
    if (const Lock lock(mutex_, std::try_to_lock); lock.owns_lock() && bytes <= kKept) {
      blocks_.splice(blocks_.begin(), dropped);
      for (kept_ += bytes; kept_ > kKept;) {
        kept_ -= blocks_.back().bytes;
        dropped.splice(dropped.end(), blocks_, std::prev(blocks_.end()));
      }
    }
    for (const Block& block : dropped) munmap(block.data, block.bytes);
  }

 private:
  using Lock = std::unique_lock<std::mutex>;

  struct Block {
    void* data;
    size_t bytes;
  };

  std::mutex mutex_;
  std::list<Block> blocks_;  // the latest first
  size_t kept_ = 0;
};
#endif

// A tensor to be written whole; `channels_last` of its order in memory.
inline torch::stable::Tensor new_result(const std::vector<int64_t>& shape, bool channels_last,
                                        torch::headeronly::ScalarType dtype, const torch::stable::Tensor& like) {
  using torch::headeronly::MemoryFormat;
  const size_t dimensions = shape.size();
#if defined(__linux__)
  using torch::headeronly::ScalarType;
  std::vector<int64_t> strides(dimensions);
  int64_t values = 1;
  const auto lay_out = [&](size_t dimension) {
    strides[dimension] = values;
    values *= shape[dimension];
  };
  if (channels_last) lay_out(1);
  for (size_t d = dimensions; d-- > 0;) {
    if (!channels_last || d != 1) lay_out(d);
  }
  const int64_t bytes = values * (dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2);
  if (torch_from_blob && bytes >= static_cast<int64_t>(ResultPool::kLarge)) {
    if (void* data = ResultPool::shared().take(bytes)) {
      AtenTensorHandle handle;
      const auto give_back = [](void* data, void* bytes) {
        ResultPool::shared().give_back(data, reinterpret_cast<size_t>(bytes));
      };
      STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
          data, dimensions, shape.data(), strides.data(), 0,
          torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), aoti_torch_device_type_cpu(), -1,
          &handle, aoti_torch_layout_strided(), nullptr, 0, give_back, reinterpret_cast<void*>(bytes)));
      return torch::stable::Tensor(handle);
    }
  }
#endif
  const MemoryFormat form = !channels_last ? MemoryFormat::Contiguous
                            : dimensions == 4 ? MemoryFormat::ChannelsLast
                                              : MemoryFormat::ChannelsLast3d;
  return torch::stable::empty(shape, dtype, std::nullopt, like.device(), std::nullopt, form);
}

}  // namespace lid
