// Between the entry of the mask head (mask_head_cpu.cpp) and its kernels. No torch header: see
// ms_deform_attn_cpu.h.
//
// Shapes: n images, R queries, S positions, L levels, M heads, D channels a head.
#pragma once

#include <cstdint>

namespace psf {

// Positions that are worked on at a time, and the number that rows are filled up to with zeros:
// a multiple of the lanes of every vector.
constexpr int64_t kMaskTile = 16;
// Queries that share a load of the keys; their logits of a tile fit the first cache.
constexpr int64_t kMaskQueries = 12;

template <typename A>
struct MaskCall {
  int64_t heads;
  int64_t channels;
  int64_t padded_channels;  // channels, rounded up to kMaskTile
  int64_t queries;
  A scale;  // of the products of queries and keys
  const A* q;  // (n, M, R, padded_channels), zeros behind the channels
  const A* k;  // (n, M, S, D), the last dense
  int64_t k_image;  // strides
  int64_t k_head;
  int64_t k_position;
  A* grad_k;  // likewise; of the backward pass
  int64_t grad_k_image;
  int64_t grad_k_head;
  int64_t grad_k_position;
};

// One level, and its weights; positions of what is not padding count from 0.
template <typename A>
struct MaskLevel {
  int64_t start;  // in S
  int64_t padded_width;
  int64_t height;  // of what is not padding
  int64_t width;
  const A* projection;  // (M, M)
  const A* bias;  // (M,)
  const A* weight;  // (M,)
  A offset;  // of the scores
  A* scores;  // (n, R, height * width), or their gradients; the last dense
  int64_t score_map;  // stride of image * R + query
};

// Memory of a thread.
template <typename A>
struct MaskScratch {
  A* keys;  // (M, kMaskTile, padded_channels) of one tile, scaled
  A* transposed_keys;  // (M, padded_channels, kMaskTile)
  A* logits;  // (M, kMaskQueries * kMaskTile), or their gradients
  A* scores;  // (kMaskQueries * kMaskTile), or their gradients
  // The rest only of the backward pass.
  A* grad_keys;  // as keys
  A* passed;  // as logits: gradients that the rectifier lets through, over the heads' weights
  A* weighted;  // (M, M): projection by weights
  A* sums;  // (M, M + 2, kMaskTile): of projection, bias and weight, not yet summed over lanes
};

// Where the pixels of one axis of the finest level lie between those of another.
template <typename A>
struct MaskAxis {
  int64_t size;
  const int64_t* low;
  const int64_t* high;
  const A* share;  // of the higher; the lower has the rest
};

template <typename A>
struct MaskResize {
  int64_t height;  // of the coarser map
  int64_t width;
  MaskAxis<A> rows;
  MaskAxis<A> columns;
};

// mask_scores: positions [begin, end) of an image's level, all queries.
// mask_scores_backward: likewise, from the gradients of scores. Writes that of k; adds to grad_q,
//   (M, R, padded_channels), and to grad_parameters, (M, M + 2): a row of projection, bias, weight.
// mask_upsample: adds scores (height, width), resized, to a map; rows is scratch,
//   (height, columns.size), as it is for
// mask_downsample: the reverse; writes grad_scores.
#define PSF_DECLARE_KERNELS(ISA)                                                               \
  namespace ISA {                                                                              \
  template <typename A>                                                                        \
  void mask_scores(                                                                            \
      const MaskCall<A>&, const MaskLevel<A>&, int64_t image, int64_t begin, int64_t end,      \
      const MaskScratch<A>&);                                                                  \
  template <typename A>                                                                        \
  void mask_scores_backward(                                                                   \
      const MaskCall<A>&, const MaskLevel<A>&, int64_t image, int64_t begin, int64_t end,      \
      const MaskScratch<A>&, A* grad_q, A* grad_parameters);                                   \
  template <typename A>                                                                        \
  void mask_upsample(const MaskResize<A>&, const A* scores, A* rows, A* map);                  \
  template <typename A>                                                                        \
  void mask_downsample(const MaskResize<A>&, const A* grad_map, A* rows, A* grad_scores);      \
  }

PSF_DECLARE_KERNELS(baseline)
#ifdef PSF_X86_KERNELS
PSF_DECLARE_KERNELS(avx2)
PSF_DECLARE_KERNELS(avx512)
#endif
#undef PSF_DECLARE_KERNELS

}  // namespace psf
