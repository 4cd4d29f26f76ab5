// Multi-scale deformable attention: what all kernels share. No torch header, so that any compiler
// (also nvcc) takes it quickly.
//
// Shapes: N images, Q queries, L levels, S = sum_l H_l * W_l positions, M heads, D channels per head,
// P sampling points:
//   value (N, S, M, D), locations (N, Q, M, L, P, 2), weights (N, Q, M, L, P), output (N, Q, M * D).
// T is the type of value and output; A the type of the arithmetic, of locations and of weights:
// double for double, float for everything else.
#pragma once

#include <cstdint>

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

}  // namespace psf
