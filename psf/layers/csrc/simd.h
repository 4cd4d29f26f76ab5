// Short vectors for the CPU kernels, in the vector extension of GCC and Clang, which compiles to
// whatever the instruction set of the file offers.
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

// Lanes of a full vector.
template <typename A>
constexpr int kFull = kVectorBytes / static_cast<int>(sizeof(A));

#define PSF_INLINE inline __attribute__((always_inline))
#define PSF_LAMBDA_INLINE __attribute__((always_inline))
#define PSF_UNROLL(turns) _Pragma(PSF_STRING(GCC unroll turns))
#define PSF_STRING(text) #text

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

// Makes the compiler forget how a vector was computed.
#if defined(__aarch64__)
#define PSF_OPAQUE(vector) asm("" : "+w"(vector))
#else
#define PSF_OPAQUE(vector) asm("" : "+v"(vector))
#endif

// The product of a and b; rest is what its rounding took: a * b - product, exact.
template <typename A, int kLanes>
PSF_INLINE Vector<A, kLanes> multiply(
    Vector<A, kLanes> a, Vector<A, kLanes> b, Vector<A, kLanes>& rest) {
  Vector<A, kLanes> product = a * b;
#if defined(__FMA__) || defined(__aarch64__)
  // One fused instruction, since neither product is known to be that of a and b.
  PSF_OPAQUE(product);
  PSF_OPAQUE(a);
  rest = a * b - product;
#else
  // Dekker's product of Veltkamp's halves.
  const Vector<A, kLanes> split = splat<A, kLanes>(sizeof(A) == 4 ? A(4097) : A(134217729));
  const Vector<A, kLanes> scaled_a = split * a;
  const Vector<A, kLanes> scaled_b = split * b;
  const Vector<A, kLanes> high_a = scaled_a - (scaled_a - a);
  const Vector<A, kLanes> high_b = scaled_b - (scaled_b - b);
  const Vector<A, kLanes> low_a = a - high_a;
  const Vector<A, kLanes> low_b = b - high_b;
  rest = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b;
#endif
  return product;
}

// The largest integer not above x, for |x| < 2^30.
template <typename A, int kLanes>
PSF_INLINE Vector<A, kLanes> floor(Vector<A, kLanes> x) {
#if defined(__SSE4_1__) || defined(__aarch64__)
  A lanes[kLanes];  // the compiler makes one instruction of this loop
  std::memcpy(lanes, &x, sizeof(x));
  for (int i = 0; i < kLanes; ++i) {
    lanes[i] = std::floor(lanes[i]);
  }
  std::memcpy(&x, lanes, sizeof(x));
  return x;
#else
  const Vector<A, kLanes> truncated = to_value<A, kLanes>(to_index<A, kLanes>(x));
  return truncated + to_value<A, kLanes>(x < truncated);  // a mask is -1
#endif
}

template <typename A, int kLanes>
PSF_INLINE IndexVector<A, kLanes> splat_index(int64_t x) {
  using Index = typename IndexOf<A>::Type;
  return splat<Index, kLanes>(static_cast<Index>(x));
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

// e^x for x <= 0, within 2 units in the last place; nearly 0 below kLeast.
template <typename A, int kLanes>
PSF_INLINE Vector<A, kLanes> exponential(Vector<A, kLanes> x) {
  using Type = ExponentialOf<A>;
  using F = Vector<A, kLanes>;
  const auto constant = [](A value) { return splat<A, kLanes>(value); };
  // Not max(): a NaN must stay.
  const F bounded = select<A, kLanes>(x < constant(Type::kLeast), constant(Type::kLeast), x);
  // x = n log 2 + r with |r| <= log(2) / 2.
  const auto n = to_index<A, kLanes>(bounded * constant(A(1.4426950408889634)) - constant(A(0.5)));
  const F whole = to_value<A, kLanes>(n);  // rounded, since truncation is upwards for x <= 0
  const F r = (bounded - whole * constant(Type::kHigh)) - whole * constant(Type::kLow);
  F p = constant(1);
  PSF_UNROLL(16)
  for (int k = Type::kDegree; k > 0; --k) {
    p = p * (r * constant(A(1) / A(k))) + constant(1);
  }
  const auto bits = (n + Type::kBias) << Type::kMantissa;
  F power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
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

// Whether every lane of a mask is set.
template <typename A, int kLanes>
PSF_INLINE bool all_set(IndexVector<A, kLanes> mask) {
  using Index = typename IndexOf<A>::Type;
  return combine_lanes<Index, kLanes>(
      mask, [](auto a, auto b) PSF_LAMBDA_INLINE { return a & b; })[0] != 0;
}
