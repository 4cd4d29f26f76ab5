// The CUDA kernels as ms_deform_attn_cuda.cpp calls them: raw pointers, no torch header, so that
// nvcc compiles them quickly and any test harness can call them.
//
// Shapes: N images, Q queries, L levels, S = sum_l H_l * W_l positions, M heads, D channels per head,
// P sampling points. A is the type of the arithmetic: double for double values, else float.
#pragma once

#include "ms_deform_attn.h"

#include <cstdint>
#include <vector>

struct CUstream_st;  // what a cudaStream_t points to

namespace psf {

enum class Scalar : int32_t { kDouble, kFloat, kHalf, kBFloat16 };

// What the kernels count in 32 bits, with room for the rounding up to whole tiles.
constexpr int64_t kMaxCudaPositions = int64_t{1} << 30;  // S and Q
constexpr int64_t kMaxCudaRows = int64_t{1} << 30;       // Q * M
constexpr int64_t kMaxCudaLevels = 64;                   // the level table travels with each launch
constexpr int64_t kMaxCudaSamples = int64_t{1} << 15;    // L * P
constexpr int64_t kMaxCudaFusedSamples = 1024;  // L * P: a row's gradients wait in shared memory
constexpr int64_t kMaxCudaStride = (int64_t{1} << 31) - 1;  // bytes between positions

// Inputs of the operator (references is null) or of its fused variant. All but value are
// contiguous and aligned to 16 bytes. Locations have type A; offsets, weights and logits too or,
// where that is float, also half or bfloat16.
struct CudaInputs {
  Sizes sizes;
  std::vector<Level> levels;
  Scalar type;  // of value, output and the output's gradient
  const void* value;  // (N, S, M, D), the channels of a head contiguous
  int64_t image_stride;  // in elements, like the next two
  int64_t position_stride;
  int64_t head_stride;
  const void* positions;  // (N, Q, M, L, P, 2): locations, or offsets
  Scalar positions_type;
  const void* weights;  // (N, Q, M, L, P): weights, or logits
  Scalar weights_type;
  const void* references;  // (N, Q, L, coordinates) of A, or null
  int64_t coordinates;     // 2: points, 4: boxes
};

// Gradients to compute; null where one is not wanted. positions and weights are of the type of the
// input they belong to.
struct CudaGradients {
  void* value;      // (N, S, M, D), contiguous, zeros: A, or int64_t for the deterministic sums
  void* positions;  // (N, Q, M, L, P, 2)
  void* weights;    // (N, Q, M, L, P)
  void* locations;  // (N, Q, M, L, P, 2) of A, fused only: by locations that span [0, 1]
};

// What CUDA says of the last launch, a cudaError_t.
int32_t launch_error_cuda();

// Every element of the output, (N, Q, M * D), is written. Needs N * Q * M * D > 0.
void ms_deform_attn_cuda(const CudaInputs& inputs, void* output, CUstream_st* stream);

// The gradients, that by value added up with floating-point atomics. Needs N * Q * M > 0, as do
// the functions below.
void ms_deform_attn_backward_cuda(
    const CudaInputs& inputs,
    const void* grad_output,
    const CudaGradients& gradients,
    CUstream_st* stream);

// The same with bits that do not depend on the order of additions: the value gradient is added up
// in int64_t, in units of a power of two that the first call finds from the inputs and the last
// converts back. exponent is one int32_t, set to kSmallestExponent before. If an output gradient
// or a weight in use is not finite, then the whole value gradient becomes NaN.
constexpr int32_t kSmallestExponent = -4096;
void value_gradient_exponent_cuda(
    const CudaInputs& inputs, const void* grad_output, int32_t* exponent, CUstream_st* stream);
void ms_deform_attn_deterministic_backward_cuda(
    const CudaInputs& inputs,
    const void* grad_output,
    const int32_t* exponent,
    const CudaGradients& gradients,
    CUstream_st* stream);
void value_gradient_from_fixed_point_cuda(
    const CudaInputs& inputs,
    const int64_t* fixed_point,
    const int32_t* exponent,
    void* grad_value,  // (N, S, M, D) of type
    CUstream_st* stream);

// Fused: sums the gradient by locations over heads and points, in a fixed order.
void reference_gradient_cuda(
    const CudaInputs& inputs,
    const void* grad_locations,
    void* grad_references,  // (N, Q, L, coordinates) of A
    CUstream_st* stream);

}  // namespace psf
