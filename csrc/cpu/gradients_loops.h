// The inner loops of gradients.cpp. Included once per instruction set, with LID_ISA naming its namespace, after isa_headers.h.

// Arrays of vectors stay in registers only where the loops over them are unrolled.
#define LID_UNROLL _Pragma("GCC unroll 8")

namespace lid {
namespace LID_ISA {
namespace gradients {
namespace {

using c10::BFloat16;
using c10::Half;

#include "vector.h"

// Inner products of kRows rows with kOthers others, all of kGradientBlock elements, added to products[row * stride + other].
template <int kRows, int kOthers, typename T>
inline void multiply(const T* rows, const T* others, double* products, int64_t stride) {
  Vec<T> sums[kRows * kOthers];
  LID_UNROLL for (int k = 0; k < kRows * kOthers; ++k) sums[k] = Vec<T>::zero();
  for (int64_t i = 0; i < kGradientBlock; i += Vec<T>::kLanes) {
    Vec<T> values[kOthers];
    LID_UNROLL for (int k = 0; k < kOthers; ++k) values[k] = Vec<T>::load(others + k * kGradientBlock + i);
    LID_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec<T> value = Vec<T>::load(rows + r * kGradientBlock + i);
      LID_UNROLL for (int k = 0; k < kOthers; ++k) sums[r * kOthers + k] = sums[r * kOthers + k] + value * values[k];
    }
  }
  LID_UNROLL for (int r = 0; r < kRows; ++r) {
    LID_UNROLL for (int k = 0; k < kOthers; ++k) products[r * stride + k] += sums[r * kOthers + k].sum();
  }
}

template <int kRows, typename T>
inline void multiply_rows(const T* scratch, int64_t t, int64_t count, double* gramian) {
  const T* rows = scratch + t * kGradientBlock;
  for (int64_t u = t; u < count; u += 4) {
    const T* others = scratch + u * kGradientBlock;
    double* products = gramian + t * count + u;
    switch (count - u) {
      case 1: multiply<kRows, 1>(rows, others, products, count); break;
      case 2: multiply<kRows, 2>(rows, others, products, count); break;
      case 3: multiply<kRows, 3>(rows, others, products, count); break;
      default: multiply<kRows, 4>(rows, others, products, count);
    }
  }
}

template <typename S, typename T>
void add_products(const GradientRows& rows, int64_t first, int64_t length, T* scratch, double* gramian) {
  for (int64_t t = 0; t < rows.count; ++t) {
    const S* from = static_cast<const S*>(rows.data) + t * rows.stride + first;
    T* to = scratch + t * kGradientBlock;
    std::fill(to + length / 8 * 8, to + kGradientBlock, T(0));
    for (int64_t i = 0; i < length; i += Vec<T>::kLanes) {
      __builtin_prefetch(from + i + kGradientBlock);  // the next block, on a page that the processor doesn't foresee
      Vec<T>::load_part(from + i, length - i).store(to + i);
    }
  }
  for (int64_t t = 0; t + 1 < rows.count; t += 2) multiply_rows<2>(scratch, t, rows.count, gramian);
  if (rows.count % 2) multiply_rows<1>(scratch, rows.count - 1, rows.count, gramian);
}

template <typename S, typename T>
void combine(const GradientRows& rows, const T* coefficients, int64_t first, int64_t length, void* result) {
  const S* from = static_cast<const S*>(rows.data) + first;
  S* to = static_cast<S*>(result) + first;
  for (int64_t i = 0; i < length; i += Vec<T>::kLanes) {
    Vec<T> sum = Vec<T>::zero();
    for (int64_t t = 0; t < rows.count; ++t) {
      sum = sum + coefficients[t] * Vec<T>::load_part(from + t * rows.stride + i, length - i);
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
