// What the inner loops need, to be included before an instruction set is chosen: what these headers define inline must not be
// compiled for one instruction set only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../target.h"
#include "gradients_blocks.h"
#include "multi_loss_sweep.h"
#include "roi_block.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
