// Short vectors for the CPU kernels: GCC's and clang's vector extension, which compiles to whatever
// the instruction set of the file offers, and plain arrays for other compilers.
//
// Included inside the namespace of an instruction set, so that no inline function compiled for one
// set can be linked in place of another's; vector_index.h, <cmath>, <cstring>, <utility> and,
// where there is AVX2, <immintrin.h> come before.

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // what every x86-64 and ARM64 processor has
#endif

// Lanes of a full vector.
template <typename A>
constexpr int kFull = kVectorBytes / static_cast<int>(sizeof(A));

#if defined(__GNUC__)
#define PSF_INLINE inline __attribute__((always_inline))
#define PSF_PREFETCH(address) __builtin_prefetch(address)
#define PSF_LAMBDA_INLINE __attribute__((always_inline))
#define PSF_UNROLL(turns) _Pragma(PSF_STRING(GCC unroll turns))
#define PSF_IN_REGISTER(pointer) asm("" : "+r"(pointer))
#define PSF_STRING(text) #text
#else
#define PSF_INLINE inline
#define PSF_PREFETCH(address) static_cast<void>(address)
#define PSF_LAMBDA_INLINE
#define PSF_UNROLL(turns)
#define PSF_IN_REGISTER(pointer) static_cast<void>(pointer)
#endif

#if defined(__GNUC__) && !defined(PSF_PLAIN_VECTORS)

template <typename A, int kLanes>
struct VectorOf {
  typedef A Type __attribute__((vector_size(kLanes * sizeof(A))));
};
template <typename A, int kLanes>
using Vector = typename VectorOf<A, kLanes>::Type;
template <typename A, int kLanes>
using IndexVector = Vector<typename IndexOf<A>::Type, kLanes>;

template <typename A, int kLanes>
PSF_INLINE Vector<A, kLanes> splat(A x) {
  return x - Vector<A, kLanes>{};  // unlike 0 + x, x - 0 is x for every x: nothing to compute
}

template <typename A, int kLanes>
PSF_INLINE Vector<A, kLanes> select(
    IndexVector<A, kLanes> mask, Vector<A, kLanes> yes, Vector<A, kLanes> no) {
  return mask ? yes : no;
}

template <typename A, int kLanes>
PSF_INLINE IndexVector<A, kLanes> select_index(
    IndexVector<A, kLanes> mask, IndexVector<A, kLanes> yes, IndexVector<A, kLanes> no) {
  return mask ? yes : no;
}

template <typename A, int kLanes>
PSF_INLINE IndexVector<A, kLanes> to_index(Vector<A, kLanes> x) {
  return __builtin_convertvector(x, IndexVector<A, kLanes>);
}

template <typename A, int kLanes>
PSF_INLINE Vector<A, kLanes> to_value(IndexVector<A, kLanes> x) {
  return __builtin_convertvector(x, Vector<A, kLanes>);
}

template <int... kIndices>
struct Indices {};

template <typename A, int kLanes, int... kIndices>
PSF_INLINE Vector<A, kLanes> shuffle(
    Vector<A, kLanes> a, Vector<A, kLanes> b, Indices<kIndices...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndices...);
#else
  return __builtin_shuffle(a, b, IndexVector<A, kLanes>{kIndices...});
#endif
}

// Lane i of the result is lane index[i] of a.
template <typename A, int kLanes>
PSF_INLINE Vector<A, kLanes> permute(Vector<A, kLanes> a, IndexVector<A, kLanes> index) {
#if defined(__clang__)
  Vector<A, kLanes> v;
  for (int i = 0; i < kLanes; ++i) {
    v[i] = a[index[i]];
  }
  return v;
#else
  return __builtin_shuffle(a, index);
#endif
}

#else

// Element by element; optimising compilers turn the loops into what they can.
template <typename A, int kLanes>
struct Vector {
  A lane[kLanes];

  A operator[](int i) const {
    return lane[i];
  }
  A& operator[](int i) {
    return lane[i];
  }
};
template <typename A, int kLanes>
using IndexVector = Vector<typename IndexOf<A>::Type, kLanes>;

#define PSF_LANEWISE(OPERATOR)                                                      \
  template <typename A, int kLanes>                                                 \
  inline Vector<A, kLanes> operator OPERATOR(Vector<A, kLanes> a, Vector<A, kLanes> b) { \
    for (int i = 0; i < kLanes; ++i) {                                              \
      a[i] = static_cast<A>(a[i] OPERATOR b[i]);                                    \
    }                                                                               \
    return a;                                                                       \
  }
PSF_LANEWISE(+)
PSF_LANEWISE(-)
PSF_LANEWISE(*)
PSF_LANEWISE(/)
PSF_LANEWISE(&)
PSF_LANEWISE(|)
#undef PSF_LANEWISE

#define PSF_COMPARISON(OPERATOR)                                                          \
  template <typename A, int kLanes>                                                       \
  inline IndexVector<A, kLanes> operator OPERATOR(Vector<A, kLanes> a, Vector<A, kLanes> b) { \
    IndexVector<A, kLanes> mask;                                                          \
    for (int i = 0; i < kLanes; ++i) {                                                    \
      mask[i] = a[i] OPERATOR b[i] ? -1 : 0;                                              \
    }                                                                                     \
    return mask;                                                                          \
  }
PSF_COMPARISON(<)
PSF_COMPARISON(>)
PSF_COMPARISON(>=)
#undef PSF_COMPARISON

template <typename A, int kLanes>
inline Vector<A, kLanes>& operator+=(Vector<A, kLanes>& a, Vector<A, kLanes> b) {
  a = a + b;
  return a;
}

template <typename A, int kLanes>
inline Vector<A, kLanes> splat(A x) {
  Vector<A, kLanes> v;
  for (int i = 0; i < kLanes; ++i) {
    v[i] = x;
  }
  return v;
}

template <typename A, int kLanes>
inline Vector<A, kLanes> select(
    IndexVector<A, kLanes> mask, Vector<A, kLanes> yes, Vector<A, kLanes> no) {
  for (int i = 0; i < kLanes; ++i) {
    no[i] = mask[i] ? yes[i] : no[i];
  }
  return no;
}

template <typename A, int kLanes>
inline IndexVector<A, kLanes> select_index(
    IndexVector<A, kLanes> mask, IndexVector<A, kLanes> yes, IndexVector<A, kLanes> no) {
  for (int i = 0; i < kLanes; ++i) {
    no[i] = mask[i] ? yes[i] : no[i];
  }
  return no;
}

template <typename A, int kLanes>
inline IndexVector<A, kLanes> to_index(Vector<A, kLanes> x) {
  IndexVector<A, kLanes> v;
  for (int i = 0; i < kLanes; ++i) {
    v[i] = static_cast<typename IndexOf<A>::Type>(x[i]);
  }
  return v;
}

template <typename A, int kLanes>
inline Vector<A, kLanes> to_value(IndexVector<A, kLanes> x) {
  Vector<A, kLanes> v;
  for (int i = 0; i < kLanes; ++i) {
    v[i] = static_cast<A>(x[i]);
  }
  return v;
}

template <int... kIndices>
struct Indices {};

template <typename A, int kLanes, int... kIndices>
inline Vector<A, kLanes> shuffle(Vector<A, kLanes> a, Vector<A, kLanes> b, Indices<kIndices...>) {
  const int index[] = {kIndices...};
  Vector<A, kLanes> v;
  for (int i = 0; i < kLanes; ++i) {
    v[i] = index[i] < kLanes ? a[index[i]] : b[index[i] - kLanes];
  }
  return v;
}

template <typename A, int kLanes>
inline Vector<A, kLanes> permute(Vector<A, kLanes> a, IndexVector<A, kLanes> index) {
  Vector<A, kLanes> v;
  for (int i = 0; i < kLanes; ++i) {
    v[i] = a[index[i]];
  }
  return v;
}

#endif

// Whether every lane of a mask is set.
template <typename A, int kLanes>
PSF_INLINE bool all_set(IndexVector<A, kLanes> mask) {
#if defined(__AVX512DQ__) && !defined(PSF_PLAIN_VECTORS)
  if constexpr (sizeof(mask) == 64) {
    const __m512i bits = reinterpret_cast<const __m512i&>(mask);
    return sizeof(A) == 4 ? _mm512_movepi32_mask(bits) == 0xffff
                          : _mm512_movepi64_mask(bits) == 0xff;
  }
#endif
#if defined(__AVX2__) && !defined(PSF_PLAIN_VECTORS)
  if constexpr (sizeof(mask) == 32) {
    return _mm256_movemask_epi8(reinterpret_cast<const __m256i&>(mask)) == -1;
  }
#endif
  typename IndexOf<A>::Type common = mask[0];
  for (int i = 1; i < kLanes; ++i) {
    common &= mask[i];
  }
  return common != 0;
}

// Loads and stores, unaligned.
template <typename A, int kLanes>
PSF_INLINE Vector<A, kLanes> load(const A* from) {
  Vector<A, kLanes> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename A, int kLanes>
PSF_INLINE IndexVector<A, kLanes> load_index(const typename IndexOf<A>::Type* from) {
  IndexVector<A, kLanes> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename A, int kLanes>
PSF_INLINE void store(Vector<A, kLanes> v, A* to) {
  std::memcpy(to, &v, sizeof(v));
}

template <typename A, int kLanes>
PSF_INLINE void store_index(IndexVector<A, kLanes> v, typename IndexOf<A>::Type* to) {
  std::memcpy(to, &v, sizeof(v));
}

// What rounding took from the product p = a * b: a * b - p, exact.
template <typename A, int kLanes>
PSF_INLINE Vector<A, kLanes> product_error(
    Vector<A, kLanes> a, Vector<A, kLanes> b, Vector<A, kLanes> p) {
  Vector<A, kLanes> error;
  // By name where there is one: GCC takes the loop below apart, lane by lane.
#if defined(__AVX512F__) && !defined(PSF_PLAIN_VECTORS)
  if constexpr (sizeof(a) == 64 && sizeof(A) == 4) {
    const __m512 x = reinterpret_cast<const __m512&>(a);
    const __m512 exact = _mm512_fmsub_ps(
        x, reinterpret_cast<const __m512&>(b), reinterpret_cast<const __m512&>(p));
    std::memcpy(&error, &exact, sizeof(error));
    return error;
  }
#elif defined(__AVX2__) && defined(__FMA__) && !defined(PSF_PLAIN_VECTORS)
  if constexpr (sizeof(a) == 32 && sizeof(A) == 4) {
    const __m256 x = reinterpret_cast<const __m256&>(a);
    const __m256 exact = _mm256_fmsub_ps(
        x, reinterpret_cast<const __m256&>(b), reinterpret_cast<const __m256&>(p));
    std::memcpy(&error, &exact, sizeof(error));
    return error;
  }
#endif
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  for (int i = 0; i < kLanes; ++i) {
    error[i] = std::fma(a[i], b[i], -p[i]);
  }
#else
  // Without fused multiplication: Dekker's product of Veltkamp's halves.
  const A split = sizeof(A) == 4 ? A(4097) : A(134217729);  // 2^12 + 1, 2^27 + 1
  for (int i = 0; i < kLanes; ++i) {
    const A scaled_a = split * a[i];
    const A scaled_b = split * b[i];
    const A high_a = scaled_a - (scaled_a - a[i]);
    const A high_b = scaled_b - (scaled_b - b[i]);
    const A low_a = a[i] - high_a;
    const A low_b = b[i] - high_b;
    error[i] = ((high_a * high_b - p[i]) + high_a * low_b + low_a * high_b) + low_a * low_b;
  }
#endif
  return error;
}

// The largest integer not above x, for |x| < 2^30.
template <typename A, int kLanes>
PSF_INLINE IndexVector<A, kLanes> floor_index(Vector<A, kLanes> x) {
#if defined(__AVX512F__) && !defined(PSF_PLAIN_VECTORS)
  if constexpr (sizeof(x) == 64 && sizeof(A) == 4) {
    const __m512i low = _mm512_maskz_cvt_roundps_epi32(
        0xffff, reinterpret_cast<const __m512&>(x), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    IndexVector<A, kLanes> index;
    std::memcpy(&index, &low, sizeof(index));
    return index;
  }
#endif
  const IndexVector<A, kLanes> truncated = to_index<A, kLanes>(x);
  return truncated + (x < to_value<A, kLanes>(truncated));  // a mask is -1
}

template <typename A, int kLanes>
PSF_INLINE IndexVector<A, kLanes> splat_index(int64_t x) {
  using Index = typename IndexOf<A>::Type;
  return splat<Index, kLanes>(static_cast<Index>(x));
}

// e^x for x <= 0, within 2 units in the last place; about 1e-38 below -87.
template <int kLanes>
PSF_INLINE Vector<float, kLanes> exponential(Vector<float, kLanes> x) {
  using F = Vector<float, kLanes>;
  const auto constant = [](float value) { return splat<float, kLanes>(value); };
  // Not max(): a NaN must stay.
  const F bounded = select<float, kLanes>(x < constant(-87.0f), constant(-87.0f), x);
  // x = n log 2 + r with |r| <= log(2) / 2; log 2 in two parts, so that n log 2 is exact.
  const auto n = to_index<float, kLanes>(bounded * constant(1.44269504f) - constant(0.5f));
  const F whole = to_value<float, kLanes>(n);  // rounded, since truncation is upwards for x <= 0
  const F r = (bounded - whole * constant(0.693359375f)) + whole * constant(2.12194440e-4f);
  // Taylor's polynomial of degree 7: the remainder is below 2^-26 for such r.
  F p = constant(1.0f / 5040) * r + constant(1.0f / 720);
  p = p * r + constant(1.0f / 120);
  p = p * r + constant(1.0f / 24);
  p = p * r + constant(1.0f / 6);
  p = p * r + constant(0.5f);
  p = p * r + constant(1.0f);
  p = p * r + constant(1.0f);
  uint32_t bits[kLanes];
  std::memcpy(bits, &n, sizeof(n));
  for (int i = 0; i < kLanes; ++i) {
    bits[i] = (bits[i] + 127) << 23;
  }
  F power;
  std::memcpy(&power, bits, sizeof(power));
  return p * power;
}

template <int kLanes>
PSF_INLINE Vector<double, kLanes> exponential(Vector<double, kLanes> x) {
  for (int i = 0; i < kLanes; ++i) {
    x[i] = std::exp(x[i]);
  }
  return x;
}

// Lane i of the result is lane i xor kDistance.
template <typename A, int kLanes, int kDistance, int... kIndices>
PSF_INLINE Vector<A, kLanes> swap_lanes(
    Vector<A, kLanes> v, std::integer_sequence<int, kIndices...>) {
  return shuffle<A, kLanes>(v, v, Indices<(kIndices ^ kDistance)...>{});
}

// The combination of all lanes, in every lane.
template <typename A, int kLanes, int kDistance = kLanes / 2, typename F>
PSF_INLINE Vector<A, kLanes> combine_lanes(Vector<A, kLanes> v, const F& combine) {
  if constexpr (kDistance == 0) {
    return v;
  } else {
    using Sequence = std::make_integer_sequence<int, kLanes>;
    return combine_lanes<A, kLanes, kDistance / 2>(
        combine(v, swap_lanes<A, kLanes, kDistance>(v, Sequence{})), combine);
  }
}

template <typename A, int kLanes>
PSF_INLINE Vector<A, kLanes> sum_of_lanes(Vector<A, kLanes> v) {
  return combine_lanes<A, kLanes>(
      v, [](Vector<A, kLanes> a, Vector<A, kLanes> b) PSF_LAMBDA_INLINE { return a + b; });
}
