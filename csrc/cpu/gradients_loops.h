// The inner loops of gradients.cpp.
#pragma once

#include "vector.h"

namespace lid {
namespace LID_ISA {
namespace {

// Values of so many gradients, kGradientBlock of each, and the memory that they come from.
template <typename S, typename T>
struct Block {
  const T* data;
  int64_t count, stride;
  const S* memory;
  int64_t memory_stride;
};

// Inner products of kRows rows of a block from `row` on with kOthers from `other` on, added to the Gramian. The first rows meet
// all others, and meanwhile fetch what is a block ahead, on a page that the processor doesn't foresee.
template <int kRows, int kOthers, typename S, typename T>
inline void multiply(const Block<S, T>& block, int64_t row, int64_t other, double* gramian) {
  const int64_t stride = block.stride;
  const T *rows = block.data + row * stride, *others = block.data + other * stride;
  const S* ahead = block.memory + other * block.memory_stride + kGradientBlock;
  Vec<T> sums[kRows * kOthers];
  LID_UNROLL for (int k = 0; k < kRows * kOthers; ++k) sums[k] = Vec<T>::zero();
  for (int64_t i = 0; i < kGradientBlock; i += Vec<T>::kLanes) {
    Vec<T> values[kOthers];
    LID_UNROLL for (int k = 0; k < kOthers; ++k) {
      values[k] = Vec<T>::load(others + k * stride + i);
      if (row == 0) __builtin_prefetch(ahead + k * block.memory_stride + i);
    }
    LID_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec<T> value = Vec<T>::load(rows + r * stride + i);
      LID_UNROLL for (int k = 0; k < kOthers; ++k) sums[r * kOthers + k] = sums[r * kOthers + k] + value * values[k];
    }
  }
  LID_UNROLL for (int r = 0; r < kRows; ++r) {
    double* products = gramian + (row + r) * block.count + other;
    LID_UNROLL for (int k = 0; k < kOthers; ++k) products[k] += sums[r * kOthers + k].sum();
  }
}

template <int kRows, typename S, typename T>
inline void multiply_rows(const Block<S, T>& block, int64_t t, double* gramian) {
  for (int64_t u = t; u < block.count; u += 4) {
    switch (block.count - u) {
      case 1: multiply<kRows, 1>(block, t, u, gramian); break;
      case 2: multiply<kRows, 2>(block, t, u, gramian); break;
      case 3: multiply<kRows, 3>(block, t, u, gramian); break;
      default: multiply<kRows, 4>(block, t, u, gramian);
    }
  }
}

template <typename S, typename T>
inline void multiply_all(const Block<S, T>& block, double* gramian) {
  for (int64_t t = 0; t + 1 < block.count; t += 2) multiply_rows<2>(block, t, gramian);
  if (block.count % 2) multiply_rows<1>(block, block.count - 1, gramian);
}

template <typename S, typename T>
void add_products(const GradientRows& rows, int64_t first, int64_t length, T* scratch, double* gramian) {
  const S* data = static_cast<const S*>(rows.data) + first;
  if constexpr (std::is_same_v<S, T>) {
    if (length == kGradientBlock) return multiply_all(Block<S, T>{data, rows.count, rows.stride, data, rows.stride}, gramian);
  }
  for (int64_t t = 0; t < rows.count; ++t) {
    const S* from = data + t * rows.stride;
    T* to = scratch + t * kGradientBlock;
    std::fill(to + length / Vec<T>::kLanes * Vec<T>::kLanes, to + kGradientBlock, T(0));
    for (int64_t i = 0; i < length; i += Vec<T>::kLanes) {
      Vec<T>::load_part(from + i, length - i).store(to + i);
    }
  }
  multiply_all(Block<S, T>{scratch, rows.count, kGradientBlock, data, rows.stride}, gramian);
}

template <typename S, typename T>
void combine(const GradientRows& rows, const T* coefficients, int64_t first, int64_t length, void* result) {
  const S* from = static_cast<const S*>(rows.data) + first;
  S* to = static_cast<S*>(result) + first;
  for (int64_t i = 0; i < length; i += Vec<T>::kLanes) {
    Vec<T> sum = Vec<T>::zero();
    for (int64_t t = 0; t < rows.count; ++t) {
      __builtin_prefetch(from + t * rows.stride + i + kGradientBlock);
      sum = sum + coefficients[t] * Vec<T>::load_part(from + t * rows.stride + i, length - i);
    }
    sum.store_part(to + i, length - i);
  }
}

}  // namespace

template <typename T>
GradientFunctions<T> gradient_functions(Storage storage) {
  return with_storage_of<T, Half, BFloat16>(storage, [](auto* stored) -> GradientFunctions<T> {
    using S = std::remove_pointer_t<decltype(stored)>;
    return {add_products<S, T>, combine<S, T>};
  });
}
template GradientFunctions<float> gradient_functions(Storage storage);
template GradientFunctions<double> gradient_functions(Storage storage);

}  // namespace LID_ISA
}  // namespace lid
