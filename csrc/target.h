// What the same code for several targets is written with: for the instruction sets of the CPU, for CUDA, and for its emulation
// in the tests.
#pragma once

// The target's namespace, so that the linker doesn't take one target's code for another's.
#if defined(__CUDACC__) || defined(LID_EMULATED)
#define LID_ISA cuda
#elif !defined(LID_ISA)
#define LID_ISA baseline
#endif

#if defined(__CUDACC__)
#define LID_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LID_HOST_DEVICE inline
#endif

// Before a loop of known length. Arrays stay in registers only where all loops over them are unrolled; the longest has 26 turns.
#if defined(__CUDACC__)
#define LID_UNROLL _Pragma("unroll")
#elif defined(LID_EMULATED)
#define LID_UNROLL
#else
#define LID_UNROLL _Pragma("GCC unroll 26")
#endif
