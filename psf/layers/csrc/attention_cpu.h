// Between the entry of attention (attention_cpu.cpp) and its kernels. No torch header: see
// ms_deform_attn_cpu.h.
#pragma once

#include <cstdint>

namespace psf {

// Queries that a task of the forward pass attends with.
constexpr int64_t kTaskQueries = 128;

// (images, tokens, heads, channels), with the channels of a head adjacent.
template <typename A>
struct Heads {
  A* data;
  int64_t image;  // strides
  int64_t token;
  int64_t head;
};

template <typename A>
struct AttentionCall {
  int64_t heads;
  int64_t queries;
  int64_t keys;
  int64_t channels;
  Heads<const A> q;
  Heads<const A> k;
  Heads<const A> v;
  const bool* visible;  // (images, keys), or null: every key is
  Heads<A> output;
  A* log_sum;  // (images, heads, queries)
};

template <typename A>
struct AttentionBackwardCall {
  int64_t heads;
  int64_t queries;
  int64_t keys;
  int64_t channels;
  Heads<const A> q;
  Heads<const A> k;
  Heads<const A> v;
  const bool* visible;
  Heads<const A> output;
  const A* log_sum;
  Heads<const A> grad_output;
  Heads<A> grad_q;
  Heads<A> grad_k;
  Heads<A> grad_v;
};

// attention: kTaskQueries queries from `first` on, of head m of image n.
// attention_backward: head m of image n.
//
// Both use what `scratch` points to, aligned to 64 bytes, of as many numbers as the functions named
// so say for a call of this size.
#define PSF_DECLARE_KERNELS(ISA)                                                            \
  namespace ISA {                                                                           \
  template <typename A>                                                                     \
  void attention(const AttentionCall<A>&, int64_t n, int64_t m, int64_t first, A* scratch); \
  template <typename A>                                                                     \
  void attention_backward(const AttentionBackwardCall<A>&, int64_t n, int64_t m, A* scratch); \
  }

PSF_DECLARE_KERNELS(baseline)
#ifdef PSF_X86_KERNELS
PSF_DECLARE_KERNELS(avx2)
PSF_DECLARE_KERNELS(avx512)
#endif
#undef PSF_DECLARE_KERNELS

// Rows of scratch memory are filled up to this many numbers: the lanes of the longest vector.
constexpr int64_t kRowUnit = 16;

// Keys, and queries, whose scores are in memory at a time.
constexpr int64_t kBlockKeys = 128;
constexpr int64_t kBlockQueries = 32;

// Internal linkage (static): each instruction set has a copy of its own of what is not inlined.
static inline int64_t padded(int64_t size) {
  return (size + kRowUnit - 1) / kRowUnit * kRowUnit;
}

static inline int64_t attention_scratch(int64_t channels) {
  return channels * kBlockKeys + kBlockKeys * padded(channels) + kBlockKeys +
      kBlockQueries * kBlockKeys + kTaskQueries * (padded(channels) + 2);
}

static inline int64_t attention_backward_scratch(int64_t channels, int64_t queries) {
  return 4 * channels * kBlockKeys + kBlockKeys * padded(channels) + kBlockKeys +
      2 * kBlockQueries * kBlockKeys + padded(queries) + queries * padded(channels);
}

}  // namespace psf
