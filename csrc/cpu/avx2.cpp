#if defined(__x86_64__)
#define LID_ISA avx2
#define LID_AVX2
#include "isa_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "gradients_loops.h"
#include "multi_loss_loops.h"
#include "roi_align_loops.h"
#include "roi_perceptual_loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
