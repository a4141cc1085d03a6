// Lanes of float or double on GCC's and Clang's vector types. LID_AVX2 says that AVX2 and F16C are there, LID_AVX512 that AVX-512
// is: compilers don't define their own macros by a pragma.
#pragma once

#include "isa_headers.h"

namespace lid {
namespace LID_ISA {
namespace {

using c10::BFloat16;
using c10::Half;

// As many as the widest registers hold, and at least eight.
template <typename T>
#ifdef LID_AVX512
constexpr int kVectorLanes = 64 / sizeof(T);
#else
constexpr int kVectorLanes = 8;
#endif

// These aren't templates: GCC would compile their instances for the instruction set in force at the end of the file, which
// doesn't know the intrinsics. They work on the lanes of one vector.
inline void load_half(const Half* from, float* to) {
#if defined(LID_AVX512)
  _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(LID_AVX2)
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  for (int i = 0; i < 8; ++i) to[i] = static_cast<float>(from[i]);
#endif
}

inline void store_half(const float* from, Half* to) {
#if defined(LID_AVX512)
  const __m256i bits = _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
#elif defined(LID_AVX2)
  const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bits);
#else
  for (int i = 0; i < 8; ++i) to[i] = static_cast<Half>(from[i]);
#endif
}

inline void square_roots(float* values) {
#if defined(LID_AVX512)
  _mm512_storeu_ps(values, _mm512_sqrt_ps(_mm512_loadu_ps(values)));
#elif defined(LID_AVX2)
  _mm256_storeu_ps(values, _mm256_sqrt_ps(_mm256_loadu_ps(values)));
#else
  for (int i = 0; i < 8; ++i) values[i] = std::sqrt(values[i]);
#endif
}
inline void square_roots(double* values) {
  for (int i = 0; i < 8; ++i) values[i] = std::sqrt(values[i]);
}

template <typename T, int kCount>
struct VectorType {
  typedef T Type __attribute__((vector_size(kCount * sizeof(T))));
};

template <typename T, int kCount = kVectorLanes<T>>
struct Vec {
  static constexpr int kLanes = kCount;
  using Word = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  using Lanes = typename VectorType<T, kLanes>::Type;
  using Words = typename VectorType<Word, kLanes>::Type;
  Lanes lanes;

  static inline Vec zero() { return {Lanes{}}; }

  template <typename S>
  static inline Vec load(const S* from) {
    Vec result;
    if constexpr (std::is_same_v<S, T>) {
      std::memcpy(&result.lanes, from, sizeof(Lanes));
    } else if constexpr (std::is_same_v<S, BFloat16>) {
      typename VectorType<uint16_t, kLanes>::Type bits;
      std::memcpy(&bits, from, sizeof(bits));
      const auto words = __builtin_convertvector(bits, Words) << 16;
      std::memcpy(&result.lanes, &words, sizeof(words));
    } else {
      load_half(from, reinterpret_cast<float*>(&result.lanes));
    }
    return result;
  }

  template <typename S>
  inline void store(S* to) const {
    if constexpr (std::is_same_v<S, T>) {
      std::memcpy(to, &lanes, sizeof(Lanes));
    } else if constexpr (std::is_same_v<S, Half>) {
      store_half(reinterpret_cast<const float*>(&lanes), to);
    } else if constexpr (std::is_same_v<S, BFloat16>) {
      // To nearest, ties to even; the mantissa of a NaN mustn't carry into its sign.
      typename VectorType<uint32_t, kLanes>::Type bits;
      std::memcpy(&bits, &lanes, sizeof(bits));
      const auto rounded = bits + 0x7fff + ((bits >> 16) & 1);
      const auto kept = (lanes == lanes ? rounded : rounded * 0 + 0x7fc00000) >> 16;
      const auto halves = __builtin_convertvector(kept, typename VectorType<uint16_t, kLanes>::Type);
      std::memcpy(to, &halves, sizeof(halves));
    } else {
      for (int i = 0; i < kLanes; ++i) to[i] = static_cast<S>(lanes[i]);
    }
  }

  // The first `count` values, and 0 in the other lanes: for the end of a row.
  template <typename S>
  static inline Vec load_part(const S* from, int64_t count) {
    if (count >= kLanes) return load(from);
    S values[kLanes] = {};
    std::copy_n(from, count, values);
    return load(values);
  }

  template <typename S>
  inline void store_part(S* to, int64_t count) const {
    if (count >= kLanes) return store(to);
    S values[kLanes];
    store(values);
    std::copy_n(values, count, to);
  }

  // 0 in all lanes but the first `count`, whatever they hold.
  inline Vec keep(int64_t count) const {
    Words lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return {lane < static_cast<Word>(count) ? lanes : Lanes{}};
  }

  inline T sum() const {
    T sums[kLanes];
    store(sums);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sums[0];
  }

  friend inline Vec operator+(Vec a, Vec b) { return {a.lanes + b.lanes}; }
  friend inline Vec operator+(Vec a, T b) { return {a.lanes + b}; }
  friend inline Vec operator-(Vec a, Vec b) { return {a.lanes - b.lanes}; }
  friend inline Vec operator-(Vec a, T b) { return {a.lanes - b}; }
  friend inline Vec operator-(T a, Vec b) { return {a - b.lanes}; }
  friend inline Vec operator*(Vec a, Vec b) { return {a.lanes * b.lanes}; }
  friend inline Vec operator*(T a, Vec b) { return {a * b.lanes}; }
  friend inline Vec operator/(Vec a, Vec b) { return {a.lanes / b.lanes}; }
  friend inline Vec operator/(T a, Vec b) { return {a / b.lanes}; }

  friend inline Vec lid_max(Vec a, Vec b) { return {a.lanes > b.lanes ? a.lanes : b.lanes}; }
  friend inline Vec lid_abs(Vec a) { return {a.lanes < 0 ? -a.lanes : a.lanes}; }
  friend inline Vec lid_sign(Vec a) {
    const Lanes one = Lanes{} + 1;
    return {a.lanes > 0 ? one : a.lanes < 0 ? -one : a.lanes};
  }
};

template <typename T>
using Vec8 = Vec<T, 8>;

template <typename T>
inline Vec<T> lid_sqrt(Vec<T> a) {
  square_roots(reinterpret_cast<T*>(&a.lanes));
  return a;
}

// Turns an 8 x 8 tile: row r, lane c becomes row c, lane r.
template <typename T>
inline void transpose(Vec<T, 8> (&rows)[8]) {
  using Lanes = typename Vec<T, 8>::Lanes;
  Lanes pairs[8], quads[8];
  for (int r = 0; r < 8; r += 2) {
    pairs[r] = __builtin_shufflevector(rows[r].lanes, rows[r + 1].lanes, 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[r + 1] = __builtin_shufflevector(rows[r].lanes, rows[r + 1].lanes, 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int r = 0; r < 8; r += 4) {
    for (int i = 0; i < 2; ++i) {
      quads[r + 2 * i] = __builtin_shufflevector(pairs[r + i], pairs[r + 2 + i], 0, 1, 8, 9, 4, 5, 12, 13);
      quads[r + 2 * i + 1] = __builtin_shufflevector(pairs[r + i], pairs[r + 2 + i], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int r = 0; r < 4; ++r) {
    rows[r].lanes = __builtin_shufflevector(quads[r], quads[r + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    rows[r + 4].lanes = __builtin_shufflevector(quads[r], quads[r + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// The same of a 16 x 16 tile: fours of lanes first, then four rows of each.
template <typename T>
inline void transpose(Vec<T, 16> (&rows)[16]) {
  using Lanes = typename Vec<T, 16>::Lanes;
  Lanes pairs[16], quads[16];
  LID_UNROLL for (int r = 0; r < 16; r += 2) {
    const Lanes a = rows[r].lanes, b = rows[r + 1].lanes;
    pairs[r] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    pairs[r + 1] = __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  LID_UNROLL for (int r = 0; r < 16; r += 4) {
    LID_UNROLL for (int i = 0; i < 2; ++i) {
      const Lanes a = pairs[r + i], b = pairs[r + 2 + i];
      quads[r + 2 * i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      quads[r + 2 * i + 1] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  }
  const auto lower = [](Lanes a, Lanes b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  };
  const auto upper = [](Lanes a, Lanes b) {
    return __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  const auto even = [](Lanes a, Lanes b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  };
  const auto odd = [](Lanes a, Lanes b) {
    return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  };
  LID_UNROLL for (int r = 0; r < 4; ++r) {
    const Lanes first = lower(quads[r], quads[r + 4]), second = upper(quads[r], quads[r + 4]);
    const Lanes third = lower(quads[r + 8], quads[r + 12]), fourth = upper(quads[r + 8], quads[r + 12]);
    rows[r].lanes = even(first, third);
    rows[r + 4].lanes = odd(first, third);
    rows[r + 8].lanes = even(second, fourth);
    rows[r + 12].lanes = odd(second, fourth);
  }
}

}  // namespace
}  // namespace LID_ISA
}  // namespace lid
