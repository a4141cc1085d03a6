// What the ops on the CPU ask of tensors.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "../floating.h"
#include "instruction_sets.h"

namespace lid {

// Fresh memory for a large gradient costs more page faults than a kernel costs time: ask for huge pages. From the first
// page on that has a byte of it: behind malloc's header, the rest of the first huge page would come in small ones.
inline void ask_for_huge_pages(const torch::stable::Tensor& tensor) {
#if defined(__linux__)
  constexpr int64_t kHugePage = int64_t(2) << 20;
  const int64_t bytes = tensor.numel() * tensor.element_size();
  const uintptr_t page = sysconf(_SC_PAGESIZE), data = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = data / page * page, last = (data + bytes + page - 1) / page * page;
  if (bytes >= 2 * kHugePage) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace lid
