// Between the entry of the CPU kernels (ms_deform_attn_cpu.cpp) and the kernels, which are compiled
// once for each instruction set. No torch header: what the kernels' files include is compiled with
// instructions that other processors lack, so inline functions of others must not come in.
#pragma once

#include "ms_deform_attn.h"

#include <cstring>

namespace psf {

// The index type of vectors that hold A.
template <typename A>
struct IndexOf {
  using Type = int32_t;
};
template <>
struct IndexOf<double> {
  using Type = int64_t;
};
template <>
struct IndexOf<int64_t> {
  using Type = int64_t;
};

struct BFloat16 {
  uint16_t bits;
};

// To nearest, ties to even.
static inline BFloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}

// What a sample's place among the L * P of a query and head says about it. All arrays are padded to
// kSamplePadding, with levels of one pixel.
constexpr int64_t kSamplePadding = 16;

template <typename A>
struct SampleTable {
  using Index = typename IndexOf<A>::Type;
  const A* width;
  const A* height;
  const Index* index_width;
  const Index* index_height;
  const Index* start;  // of the level, in positions
  const Index* padding;  // all bits set from L * P on
  const Index* level;  // 2 l, for Origins
};

// Where the offsets of the fused operator start and what they are counted in: a sample lies at whole +
// part + offset * unit, in pixels from the centre of the level's first pixel, with 0 <= part < 1. In
// one number, single precision would lose what an offset says beyond the rounding of a large one.
// Each array is (N, Q, L, 2) with room for a vector after it; NaN as part is a place nowhere.
template <typename A>
struct Origins {
  const typename IndexOf<A>::Type* whole;
  const A* part;
  const A* unit;
};

// Channels of the value rows that kernels take are a multiple of this, which fills every vector.
constexpr int64_t kRowMultiple = 16;

// Places farther than this, in pixels, are nowhere: they would not fit an index.
constexpr double kFar = 1 << 30;

// One call of the operator. V is the type of the value rows, O that of the output and its gradient,
// A that of the arithmetic. A value row holds `channels` elements, at least D and a multiple of
// kRowMultiple, which are zero from D on; the rows of one image and head are row_stride elements apart.
template <typename V, typename O, typename A>
struct Call {
  Sizes sizes;
  SampleTable<A> table;
  int64_t samples;  // L * P
  int64_t padded_samples;  // a multiple of kSamplePadding

  int64_t channels;
  int64_t row_stride;

  // Plain operator: points are the locations, weights the attention weights. Fused operator
  // (origins has arrays): points are the offsets, weights the attention logits.
  const A* points;  // (N, Q, M, L, P, 2)
  const A* weights;  // (N, Q, M, L, P)
  Origins<A> origins;
  bool in_pixels;  // the unit of the offsets is a pixel

  O* output;  // (N, Q, M * D)

  // Backward. A null gradient is not computed. The gradient of the points is that of the locations
  // (plain operator and boxes) or that of the offsets (fused operator with reference points).
  const O* grad_output;  // (N, Q, M * D)
  A* grad_points;
  A* grad_weights;  // of the logits in the fused operator, if the call is for all levels
};

// Elements of an array of samples in scratch memory: a vector may be stored at any sample.
constexpr int64_t array_size(int64_t padded_samples) {
  return padded_samples + kSamplePadding;
}

// Bytes of scratch memory that a thread needs: two sets of up to 32 arrays.
template <typename A>
constexpr int64_t scratch_bytes(int64_t padded_samples) {
  return 2 * 32 * array_size(padded_samples) * static_cast<int64_t>(sizeof(A));
}

// One image and head, and where its value rows lie.
template <typename V, typename A>
struct Head {
  int64_t image;
  int64_t head;
  const V* value;
  A* grad_value;  // rows like those of value, added to; null: not computed
};

// forward: the output of queries [q_begin, q_end).
// backward: the gradients of all queries in levels [l_begin, l_end).
// softmax_backward: turns the gradients of the weights of one row of samples into those of the logits.
#define PSF_DECLARE_KERNELS(ISA)                                                              \
  namespace ISA {                                                                             \
  template <typename V, typename O, typename A>                                               \
  void forward(                                                                               \
      const Call<V, O, A>&, const Head<V, A>&, int64_t q_begin, int64_t q_end, char* scratch); \
  template <typename V, typename O, typename A>                                               \
  void backward(                                                                              \
      const Call<V, O, A>&, const Head<V, A>&, int64_t l_begin, int64_t l_end, char* scratch); \
  template <typename A>                                                                       \
  void softmax_backward(                                                                      \
      const SampleTable<A>&, const A* logits, A* grad, int64_t samples, char* scratch);       \
  }

PSF_DECLARE_KERNELS(baseline)
#ifdef PSF_X86_KERNELS
PSF_DECLARE_KERNELS(avx2)
PSF_DECLARE_KERNELS(avx512)
#endif
#undef PSF_DECLARE_KERNELS

}  // namespace psf
