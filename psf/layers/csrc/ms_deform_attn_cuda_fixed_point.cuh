// The fixed point in which the deterministic value gradient is added up: int64_t, in units of a
// power of two that follows from a bound of what is added. The sum does not depend on the order.
#pragma once

#include "ms_deform_attn_cuda_samples.cuh"

namespace psf {
namespace {

// Exponent of something infinite or NaN: above the sum of any two others.
constexpr int32_t kNotFinite = 1 << 20;
// Exponent of 0: the sum of two is the smallest.
constexpr int32_t kNothing = kSmallestExponent / 2;

// Units of the fixed point are 2^-result, so that the sum of all samples, Q * P of a level at most
// in one pixel, stays below 2^61 if each is below 2^exponent.
__device__ __forceinline__ int32_t fixed_point_scale(const Problem& problem, int32_t exponent) {
  const int64_t samples = static_cast<int64_t>(problem.queries) * problem.points;
  const int32_t sum_exponent = 64 - __clzll(samples);
  const int32_t scale = 61 - sum_exponent - exponent;
  return scale < 1000 ? scale : 1000;  // 2^scale must be a double
}

}  // namespace
}  // namespace psf
