// Between the entry of the fused layer normalisation (layer_norm_cpu.cpp) and its kernels. No torch
// header: see ms_deform_attn_cpu.h.
#pragma once

#include <cstdint>

namespace psf {

// Rows of a layer normalisation of x + y; all arrays but the last three are (rows, channels).
template <typename A>
struct LayerNormCall {
  int64_t channels;
  double eps;
  const A* x;
  const A* y;
  A* output;
  A* normalised;  // (x + y - mean) / deviation
  A* inverse_deviation;  // (rows,)
  const A* weight;  // (channels,)
  const A* bias;  // (channels,)
};

template <typename A>
struct LayerNormBackwardCall {
  int64_t channels;
  const A* grad_output;
  const A* normalised;
  const A* inverse_deviation;  // (rows,)
  const A* weight;  // (channels,)
  A* grad_input;  // of x and of y
};

// layer_norm: rows [begin, end).
// layer_norm_backward: likewise, with what these rows add to the gradients of weight and bias, each
// (channels,), which come in as zeros.
#define PSF_DECLARE_KERNELS(ISA)                                                              \
  namespace ISA {                                                                             \
  template <typename A>                                                                       \
  void layer_norm(const LayerNormCall<A>&, int64_t begin, int64_t end);                       \
  template <typename A>                                                                       \
  void layer_norm_backward(                                                                   \
      const LayerNormBackwardCall<A>&, int64_t begin, int64_t end, A* grad_weight, A* grad_bias); \
  }

PSF_DECLARE_KERNELS(baseline)
#ifdef PSF_X86_KERNELS
PSF_DECLARE_KERNELS(avx2)
PSF_DECLARE_KERNELS(avx512)
#endif
#undef PSF_DECLARE_KERNELS

}  // namespace psf
