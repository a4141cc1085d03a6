// What the inner loops need, to be included before an instruction set is chosen: see roi_perceptual_loops.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "roi_perceptual_block.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
