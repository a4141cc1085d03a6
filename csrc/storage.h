// How the values of floating tensors are stored.
#pragma once

#include <type_traits>

namespace lid {

enum class Storage { float32, float64, float16, bfloat16 };

// Calls function(a null pointer to the stored type), with the target's own types of half precision.
template <typename Half, typename BFloat16, typename Function>
void with_storage(Storage storage, const Function& function) {
  switch (storage) {
    case Storage::float32: return function(static_cast<float*>(nullptr));
    case Storage::float64: return function(static_cast<double*>(nullptr));
    case Storage::float16: return function(static_cast<Half*>(nullptr));
    case Storage::bfloat16: return function(static_cast<BFloat16*>(nullptr));
  }
}

// The same where it is known that the arithmetic is in T, for what a function returns.
template <typename T, typename Half, typename BFloat16, typename Function>
auto with_storage_of(Storage storage, const Function& function) {
  if constexpr (std::is_same_v<T, double>) {
    return function(static_cast<double*>(nullptr));
  } else {
    return storage == Storage::float32   ? function(static_cast<float*>(nullptr))
           : storage == Storage::float16 ? function(static_cast<Half*>(nullptr))
                                         : function(static_cast<BFloat16*>(nullptr));
  }
}

}  // namespace lid
