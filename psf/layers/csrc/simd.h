// Vectors for the CPU kernels, in the vector extension of GCC and Clang, which compiles to whatever the
// instruction set of the file offers.
//
// Included inside the namespace of an instruction set, so that no inline function compiled for one
// set can be linked in place of another's. The including file has included all headers needed.

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // what every x86-64 and ARM64 processor has
#endif

#define PSF_INLINE inline __attribute__((always_inline))
#define PSF_LAMBDA_INLINE __attribute__((always_inline))
#define PSF_UNROLL(turns) _Pragma(PSF_STRING(GCC unroll turns))
#define PSF_STRING(text) #text
// Makes the compiler forget how a vector was computed.
#if defined(__aarch64__)
#define PSF_OPAQUE(vector) asm("" : "+w"(vector))
#else
#define PSF_OPAQUE(vector) asm("" : "+v"(vector))
#endif

template <typename A>
constexpr int kLanesOf = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A, int kBytes = kVectorBytes>
struct VectorOf {
  typedef A Type __attribute__((vector_size(kBytes)));
};
template <typename A>
using Vector = typename VectorOf<A>::Type;
// Of indices, and of the masks that comparisons give: all bits of a lane are set, or none.
template <typename A>
using IndexVector = Vector<typename IndexOf<A>::Type>;

template <typename A>
PSF_INLINE Vector<A> splat(A x) {
  return x - Vector<A>{};  // unlike 0 + x, x - 0 is x for every x: nothing to compute
}

// Loads and stores, unaligned.
template <typename A>
PSF_INLINE Vector<A> load(const A* from) {
  Vector<A> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename V, typename A>
PSF_INLINE void store(V v, A* to) {
  static_assert(std::is_same_v<V, Vector<A>>);
  std::memcpy(to, &v, sizeof(v));
}

template <typename A>
PSF_INLINE IndexVector<A> to_index(Vector<A> x) {
  return __builtin_convertvector(x, IndexVector<A>);
}

template <typename A>
PSF_INLINE Vector<A> to_value(IndexVector<A> x) {
  return __builtin_convertvector(x, Vector<A>);
}

template <int... kIndices>
using Indices = std::integer_sequence<int, kIndices...>;
template <typename A>
using LanesOf = std::make_integer_sequence<int, kLanesOf<A>>;

// Lanes of a and b, counted through.
template <typename A, int... kIndices>
PSF_INLINE Vector<A> shuffle(Vector<A> a, Vector<A> b, Indices<kIndices...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndices...);
#else
  return __builtin_shuffle(a, b, IndexVector<A>{kIndices...});
#endif
}

// Lane i of the result is lane index[i] of a.
template <typename A>
PSF_INLINE Vector<A> permute(Vector<A> a, IndexVector<A> index) {
#if defined(__clang__)
  Vector<A> v;
  for (int i = 0; i < kLanesOf<A>; ++i) {
    v[i] = a[index[i]];
  }
  return v;
#else
  return __builtin_shuffle(a, index);
#endif
}

// The product of a and b; rest is what its rounding took: a * b - product, exact.
template <typename A>
PSF_INLINE Vector<A> multiply(Vector<A> a, Vector<A> b, Vector<A>& rest) {
  Vector<A> product = a * b;
#if defined(__FMA__) || defined(__aarch64__)
  // One fused instruction, since neither product is known to be that of a and b.
  PSF_OPAQUE(product);
  PSF_OPAQUE(a);
  rest = a * b - product;
#else
  // Dekker's product of Veltkamp's halves.
  const A split = sizeof(A) == 4 ? A(4097) : A(134217729);  // 2^12 + 1, 2^27 + 1
  const Vector<A> scaled_a = split * a;
  const Vector<A> scaled_b = split * b;
  const Vector<A> high_a = scaled_a - (scaled_a - a);
  const Vector<A> high_b = scaled_b - (scaled_b - b);
  const Vector<A> low_a = a - high_a;
  const Vector<A> low_b = b - high_b;
  rest = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b;
#endif
  return product;
}

// The largest integer not above x, for |x| < 2^30.
template <typename A>
PSF_INLINE Vector<A> floor(Vector<A> x) {
#if defined(__SSE4_1__) || defined(__aarch64__)
  A lanes[kLanesOf<A>];  // the compiler makes one instruction of this loop
  store(x, lanes);
  for (int i = 0; i < kLanesOf<A>; ++i) {
    lanes[i] = std::floor(lanes[i]);
  }
  return load(lanes);
#else
  const Vector<A> truncated = to_value<A>(to_index<A>(x));
  return truncated + to_value<A>(x < truncated);  // a mask is -1
#endif
}

// What exponential() needs to know of a type: log(2) in two parts, of which the first times a whole
// number is exact; the x below which it stays at its smallest; the degree of Taylor's polynomial that
// is exact for |r| <= log(2) / 2; bits and offset of the exponent.
template <typename A>
struct ExponentialOf {
  static constexpr float kHigh = 0.693359375f, kLow = -2.12194440e-4f, kLeast = -87.0f;
  static constexpr int kDegree = 7, kMantissa = 23, kBias = 127;
};
template <>
struct ExponentialOf<double> {
  static constexpr double kHigh = 6.93147180369123816490e-01, kLow = 1.90821492927058770002e-10,
                          kLeast = -708.0;
  static constexpr int kDegree = 13, kMantissa = 52, kBias = 1023;
};

template <typename A>
constexpr A over_factorial(int k) {
  return k == 0 ? A(1) : over_factorial<A>(k - 1) / A(k);
}

// e^x for x <= 0, within 2 units in the last place; nearly 0 below kLeast.
template <typename A>
PSF_INLINE Vector<A> exponential(Vector<A> x) {
  using Type = ExponentialOf<A>;
  const Vector<A> least = splat<A>(Type::kLeast);
  const Vector<A> bounded = x < least ? least : x;  // not max(): a NaN must stay
  // x = n log 2 + r with |r| <= log(2) / 2.
  const auto n = to_index<A>(bounded * A(1.4426950408889634) - A(0.5));
  const Vector<A> whole = to_value<A>(n);  // rounded, since truncation is upwards for x <= 0
  const Vector<A> r = (bounded - whole * Type::kHigh) - whole * Type::kLow;
  Vector<A> p = splat(over_factorial<A>(Type::kDegree));
  PSF_UNROLL(16)
  for (int k = Type::kDegree - 1; k >= 0; --k) {
    p = p * r + over_factorial<A>(k);
  }
  const auto bits = (n + Type::kBias) << Type::kMantissa;
  Vector<A> power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

// Lane i of the result is lane i xor kDistance.
template <typename A, int kDistance, int... kIndices>
PSF_INLINE Vector<A> swap_lanes(Vector<A> v, Indices<kIndices...>) {
  return shuffle<A>(v, v, Indices<(kIndices ^ kDistance)...>{});
}

// The combination of all lanes, in every lane.
template <typename A, int kDistance = kLanesOf<A> / 2, typename F>
PSF_INLINE Vector<A> combine_lanes(Vector<A> v, const F& combine) {
  if constexpr (kDistance == 0) {
    return v;
  } else {
    return combine_lanes<A, kDistance / 2>(
        combine(v, swap_lanes<A, kDistance>(v, LanesOf<A>{})), combine);
  }
}

template <typename A>
PSF_INLINE Vector<A> sum_of_lanes(Vector<A> v) {
  return combine_lanes<A>(v, [](auto a, auto b) PSF_LAMBDA_INLINE { return a + b; });
}

// Whether every lane of a mask is set.
template <typename A>
PSF_INLINE bool all_set(IndexVector<A> mask) {
  using Index = typename IndexOf<A>::Type;
  return combine_lanes<Index>(mask, [](auto a, auto b) PSF_LAMBDA_INLINE { return a & b; })[0] != 0;
}
