// The inner loops of gradients.cpp. Included once per instruction set, with LID_ISA naming its namespace, after isa_headers.h.

// Arrays of vectors stay in registers only where the loops over them are unrolled.
#define LID_UNROLL _Pragma("GCC unroll 4")

namespace lid {
namespace LID_ISA {
namespace gradients {
namespace {

using c10::BFloat16;
using c10::Half;

#include "vector.h"

// Inner products of one row with kRows others, all of kGradientBlock elements.
template <int kRows, typename T>
inline void multiply(const T* row, const T* others, double* products) {
  Vec8<T> sums[kRows];
  LID_UNROLL for (int k = 0; k < kRows; ++k) sums[k] = Vec8<T>::zero();
  for (int64_t i = 0; i < kGradientBlock; i += 8) {
    const Vec8<T> value = Vec8<T>::load(row + i);
    LID_UNROLL for (int k = 0; k < kRows; ++k) {
      sums[k] = sums[k] + value * Vec8<T>::load(others + k * kGradientBlock + i);
    }
  }
  LID_UNROLL for (int k = 0; k < kRows; ++k) products[k] += sums[k].sum();
}

template <typename S, typename T>
void add_products(const GradientRows& rows, int64_t first, int64_t length, T* scratch, double* gramian) {
  for (int64_t t = 0; t < rows.count; ++t) {
    const S* from = static_cast<const S*>(rows.data) + t * rows.stride + first;
    T* to = scratch + t * kGradientBlock;
    std::fill(to + length / 8 * 8, to + kGradientBlock, T(0));
    for (int64_t i = 0; i < length; i += 8) {
      __builtin_prefetch(from + i + kGradientBlock);  // the next block, on a page that the processor doesn't foresee
      Vec8<T>::load_part(from + i, length - i).store(to + i);
    }
  }
  for (int64_t t = 0; t < rows.count; ++t) {
    for (int64_t u = t; u < rows.count; u += 4) {
      const T *row = scratch + t * kGradientBlock, *others = scratch + u * kGradientBlock;
      double* products = gramian + t * rows.count + u;
      switch (rows.count - u) {
        case 1: multiply<1>(row, others, products); break;
        case 2: multiply<2>(row, others, products); break;
        case 3: multiply<3>(row, others, products); break;
        default: multiply<4>(row, others, products);
      }
    }
  }
}

template <typename S, typename T>
void combine(const GradientRows& rows, const T* coefficients, int64_t first, int64_t length, void* result) {
  const S* from = static_cast<const S*>(rows.data) + first;
  S* to = static_cast<S*>(result) + first;
  for (int64_t i = 0; i < length; i += 8) {
    Vec8<T> sum = Vec8<T>::zero();
    for (int64_t t = 0; t < rows.count; ++t) {
      sum = sum + coefficients[t] * Vec8<T>::load_part(from + t * rows.stride + i, length - i);
    }
    sum.store_part(to + i, length - i);
  }
}

template <typename S, typename T>
GradientFunctions<T> functions() {
  return {add_products<S, T>, combine<S, T>};
}

}  // namespace
}  // namespace gradients

GradientFunctions<float> float_gradients(Storage storage) {
  switch (storage) {
    case Storage::float32: return gradients::functions<float, float>();
    case Storage::float16: return gradients::functions<c10::Half, float>();
    default: return gradients::functions<c10::BFloat16, float>();
  }
}

GradientFunctions<double> double_gradients() { return gradients::functions<double, double>(); }

}  // namespace LID_ISA
}  // namespace lid

#undef LID_UNROLL
