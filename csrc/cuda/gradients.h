// The interface between the ops (gradients.cpp) and their kernels. Pointers are to device memory.
#pragma once

#include <cstdint>

#include "../storage.h"

namespace lid {
namespace cuda {

// Inner products of `count` gradients, in each of `samples` parts of `length` values: result[sample, i, j]. A gradient's parts
// follow each other, and so do the gradients.
struct GramianLaunch {
  const void* gradients;
  Storage storage;
  int64_t count, samples, length;
  double* partial;  // [samples, count, count, gramian_chunks()]
  void* result;     // of the arithmetic
};
int64_t gramian_chunks(const GramianLaunch& launch);
int launch_gramian(const GramianLaunch& launch, void* stream);

// result = sum of coefficients[t] * gradients[t]
struct CombineLaunch {
  const void* gradients;
  const void* coefficients;  // of the arithmetic
  Storage storage;
  int64_t count, length;
  void* result;  // as the gradients
};
int launch_combine(const CombineLaunch& launch, void* stream);

}  // namespace cuda
}  // namespace lid
