// The interface between the ops on gradients (gradients.cpp) and their inner loops, compiled once per instruction set.
#pragma once

#include <cstdint>

#include "instruction_sets.h"

namespace lid {

// Elements of each gradient that are worked on together. Fixed, so that no bit of a sum depends on the threads.
constexpr int64_t kGradientBlock = 1024;

// Element i of gradient t is data[t * stride + i].
struct GradientRows {
  const void* data;
  int64_t count, stride;
};

template <typename T>
struct GradientFunctions {
  // Adds the inner products of elements [first, first + length) to the upper triangle of gramian [count, count]; scratch has
  // count * kGradientBlock elements.
  void (*add_products)(const GradientRows& rows, int64_t first, int64_t length, T* scratch, double* gramian);
  // Writes the sum of coefficients[t] * gradient t over the same elements.
  void (*combine)(const GradientRows& rows, const T* coefficients, int64_t first, int64_t length, void* result);
};

#define LID_DECLARE_GRADIENTS(isa)                          \
  namespace isa {                                           \
  template <typename T>                                     \
  GradientFunctions<T> gradient_functions(Storage storage); \
  }
LID_DECLARE_GRADIENTS(baseline)
LID_DECLARE_GRADIENTS(avx2)
LID_DECLARE_GRADIENTS(avx512)
#undef LID_DECLARE_GRADIENTS

}  // namespace lid
