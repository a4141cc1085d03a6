// Eight lanes of float or double on GCC's and Clang's vector types. Included inside lid::LID_ISA, so that every instruction
// set has its own. LID_AVX2 says that AVX2 and F16C are there: compilers don't define their own macros by a pragma.

// These three aren't templates: GCC would compile their instances for the instruction set in force at the end of the file,
// which doesn't know the intrinsics.
inline void load_half(const Half* from, float* to) {
#ifdef LID_AVX2
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  for (int i = 0; i < 8; ++i) to[i] = static_cast<float>(from[i]);
#endif
}

inline void store_half(const float* from, Half* to) {
#ifdef LID_AVX2
  const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bits);
#else
  for (int i = 0; i < 8; ++i) to[i] = static_cast<Half>(from[i]);
#endif
}

inline void square_roots(float* values) {
#ifdef LID_AVX2
  _mm256_storeu_ps(values, _mm256_sqrt_ps(_mm256_loadu_ps(values)));
#else
  for (int i = 0; i < 8; ++i) values[i] = std::sqrt(values[i]);
#endif
}
inline void square_roots(double* values) {
  for (int i = 0; i < 8; ++i) values[i] = std::sqrt(values[i]);
}

template <typename T>
struct Vec8 {
  typedef T Lanes __attribute__((vector_size(8 * sizeof(T))));
  Lanes lanes;

  static inline Vec8 zero() { return {Lanes{}}; }

  template <typename S>
  static inline Vec8 load(const S* from) {
    Vec8 result;
    if constexpr (std::is_same_v<S, T>) {
      std::memcpy(&result.lanes, from, sizeof(Lanes));
    } else if constexpr (std::is_same_v<S, BFloat16>) {
      typedef uint16_t Half __attribute__((vector_size(16)));
      typedef uint32_t Word __attribute__((vector_size(32)));
      Half bits;
      std::memcpy(&bits, from, sizeof(bits));
      const Word words = __builtin_convertvector(bits, Word) << 16;
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
    } else {
      for (int i = 0; i < 8; ++i) to[i] = static_cast<S>(lanes[i]);
    }
  }

  // The first `count` values, and 0 in the other lanes: for the end of a row.
  template <typename S>
  static inline Vec8 load_part(const S* from, int64_t count) {
    if (count >= 8) return load(from);
    S values[8] = {};
    std::copy_n(from, count, values);
    return load(values);
  }

  template <typename S>
  inline void store_part(S* to, int64_t count) const {
    if (count >= 8) return store(to);
    S values[8];
    store(values);
    std::copy_n(values, count, to);
  }

  // 0 in all lanes but the first `count`, whatever they hold.
  inline Vec8 keep(int64_t count) const {
    using Word = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef Word Words __attribute__((vector_size(8 * sizeof(T))));
    const Words lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return {lane < static_cast<Word>(count) ? lanes : Lanes{}};
  }

  inline T sum() const {
    const T* l = reinterpret_cast<const T*>(&lanes);
    return ((l[0] + l[1]) + (l[2] + l[3])) + ((l[4] + l[5]) + (l[6] + l[7]));
  }

  friend inline Vec8 operator+(Vec8 a, Vec8 b) { return {a.lanes + b.lanes}; }
  friend inline Vec8 operator+(Vec8 a, T b) { return {a.lanes + b}; }
  friend inline Vec8 operator-(Vec8 a, Vec8 b) { return {a.lanes - b.lanes}; }
  friend inline Vec8 operator-(Vec8 a, T b) { return {a.lanes - b}; }
  friend inline Vec8 operator-(T a, Vec8 b) { return {a - b.lanes}; }
  friend inline Vec8 operator*(Vec8 a, Vec8 b) { return {a.lanes * b.lanes}; }
  friend inline Vec8 operator*(T a, Vec8 b) { return {a * b.lanes}; }
  friend inline Vec8 operator/(Vec8 a, Vec8 b) { return {a.lanes / b.lanes}; }
  friend inline Vec8 operator/(T a, Vec8 b) { return {a / b.lanes}; }

  friend inline Vec8 lid_max(Vec8 a, Vec8 b) { return {a.lanes > b.lanes ? a.lanes : b.lanes}; }
  friend inline Vec8 lid_abs(Vec8 a) { return {a.lanes < 0 ? -a.lanes : a.lanes}; }
  friend inline Vec8 lid_sign(Vec8 a) {
    const Lanes one = Lanes{} + 1;
    return {a.lanes > 0 ? one : a.lanes < 0 ? -one : a.lanes};
  }
};

template <typename T>
inline Vec8<T> lid_sqrt(Vec8<T> a) {
  square_roots(reinterpret_cast<T*>(&a.lanes));
  return a;
}

// Turns an 8 x 8 tile: row r, lane c becomes row c, lane r.
template <typename T>
inline void transpose(Vec8<T> (&rows)[8]) {
  using Lanes = typename Vec8<T>::Lanes;
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
