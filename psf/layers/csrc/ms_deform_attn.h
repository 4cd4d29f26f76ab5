// Multi-scale deformable attention: what all kernels share. No torch header, so that any compiler
// (also nvcc) takes it quickly.
//
// Shapes: N images, Q queries, L levels, S = sum_l H_l * W_l positions, M heads, D channels a head,
// P sampling points. All tensors are contiguous:
//   value (N, S, M, D), locations (N, Q, M, L, P, 2), weights (N, Q, M, L, P), output (N, Q, M * D).
// T is the type of value and output; A the type of the arithmetic, of locations and of weights:
// double for double, float for everything else.
#pragma once

#include <cstdint>
#include <vector>

#ifdef __CUDACC__
#define PSF_HOST_DEVICE __host__ __device__
#else
#define PSF_HOST_DEVICE
#endif

namespace psf {

struct Level {
  int64_t height;
  int64_t width;
  int64_t start;  // of the level's pixels among the S positions
};

struct Sizes {
  int64_t images;     // N
  int64_t queries;    // Q
  int64_t levels;     // L
  int64_t positions;  // S
  int64_t heads;      // M
  int64_t channels;   // D
  int64_t points;     // P
};

// One axis of a bilinear sample: the two pixels it lies between, their weights, and the derivatives
// of the weights by the coordinate. A pixel outside the level has weight and slope 0, and its index
// is that of the other, valid, pixel: a NaN in a pixel that is not sampled is never read.
template <typename A>
struct Axis {
  int64_t index[2];
  A weight[2];
  A slope[2];
};

// Whether a sample at this coordinate (in pixels, pixel centres at integers) touches a pixel of an
// axis of the given size. False for NaN and infinities, and always for an empty axis.
template <typename A>
PSF_HOST_DEVICE inline bool touches(A coordinate, int64_t size) {
  return size > 0 && coordinate > A(-1) && coordinate < static_cast<A>(size);
}

// Only for a coordinate that touches the axis.
template <typename A>
PSF_HOST_DEVICE inline Axis<A> bilinear_axis(A coordinate, int64_t size) {
  // Levels have fewer than 2^31 pixels a side, and int32 converts faster than int64.
  int32_t low = static_cast<int32_t>(coordinate);
  low -= coordinate < static_cast<A>(low);  // truncation to floor
  const A fraction = coordinate - static_cast<A>(low);
  const A has_low = static_cast<A>(low >= 0);
  const A has_high = static_cast<A>(low + 1 < size);
  return {
      {low >= 0 ? low : 0, low + 1 < size ? low + 1 : low},
      {has_low * (A(1) - fraction), has_high * fraction},
      {-has_low, has_high},
  };
}

// Pixel coordinate of a location that spans [0, 1] over an axis.
template <typename A>
PSF_HOST_DEVICE inline A to_pixels(A location, int64_t size) {
  return location * static_cast<A>(size) - A(0.5);
}

}  // namespace psf
