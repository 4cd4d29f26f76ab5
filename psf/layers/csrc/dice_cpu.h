// Between the entry of the Dice loss of upsampled maps (dice_cpu.cpp) and its kernels. No torch
// header: see ms_deform_attn_cpu.h.
#pragma once

#include <cstdint>

namespace psf {

// One direction of a bilinear resize: place x of the output lies between the input's low[x] and
// high[x] (its neighbour or, at the end, itself), as (1 - weight[x]) and weight[x].
template <typename A>
struct ResizeAxis {
  int64_t input_size;
  int64_t output_size;
  const int32_t* low;  // (output_size,), ascending
  const int32_t* high;  // (output_size,)
  const A* weight;  // (output_size,)
  const int32_t* start;  // (input_size + 1,): low is i at the places [start[i], start[i + 1])
};

// h x w maps that are resized to H x W and then activated, compared with targets of that size.
template <typename A>
struct DiceCall {
  ResizeAxis<A> rows;  // h to H
  ResizeAxis<A> columns;  // w to W
  int64_t num_segments;
  bool sigmoid;  // the activation; else the maps count as they are
  const A* maps;  // (layers, num_segments, h, w)
  const A* targets;  // (num_segments, H, W)
};

// Numbers that hold a row of the output, for vectors of up to 64 bytes.
inline int64_t padded_row(int64_t width) {
  return (width + 15) / 16 * 16;
}

// dice_sums: of a map, numbered layer by layer, the sums over the pixels of mask * target, of
// mask^2 and of target^2. rows is room for 2 padded_row(W), zeros before the first map.
// dice_backward: the gradient (h, w) of a map from that of its pixels, which is
// by_target * target + by_mask * mask, added to grad_map. rows is room for 4 padded_row(W), zeros
// before the first map.
#define PSF_DECLARE_KERNELS(ISA)                                                           \
  namespace ISA {                                                                          \
  template <typename A>                                                                    \
  void dice_sums(const DiceCall<A>&, int64_t map, A* rows, double (&sums)[3]);             \
  template <typename A>                                                                    \
  void dice_backward(                                                                      \
      const DiceCall<A>&, int64_t map, A by_target, A by_mask, A* rows, A* grad_map);      \
  }

PSF_DECLARE_KERNELS(baseline)
#ifdef PSF_X86_KERNELS
PSF_DECLARE_KERNELS(avx2)
PSF_DECLARE_KERNELS(avx512)
#endif
#undef PSF_DECLARE_KERNELS

}  // namespace psf
