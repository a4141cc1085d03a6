// Scratch memory of the inner loops.
#pragma once

#include "isa_headers.h"

namespace lid {
namespace LID_ISA {
namespace {

// Zeros at first, aligned for the widest vectors.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : values_(count > 0 ? count + kAlignment / sizeof(T) : 0) {}
  bool empty() const { return values_.empty(); }
  void clear() { std::fill(values_.begin(), values_.end(), T(0)); }
  T* data() {
    const uintptr_t address = reinterpret_cast<uintptr_t>(values_.data());
    return reinterpret_cast<T*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  static constexpr size_t kAlignment = 64;
  std::vector<T> values_;
};

}  // namespace
}  // namespace LID_ISA
}  // namespace lid
