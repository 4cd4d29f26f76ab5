// What the entries of all devices share: checked inputs in the form that kernels take.
#pragma once

#include "ms_deform_attn.h"

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>
#include <type_traits>
#include <vector>

namespace psf {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using FusedGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The type of the arithmetic for values of type T.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The type of the arithmetic for a value tensor: double for double, float for everything else.
at::ScalarType accumulator_type(const at::Tensor& value);

struct Inputs {
  Sizes sizes;
  std::vector<Level> levels;
};

// Checks devices, shapes and types of the operator's inputs; raises errors that name them.
Inputs check_inputs(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& locations,
    const at::Tensor& weights);

// The same for the fused operator. reference_points is (N, Q, L, 2) or (N, Q, L, 4).
Inputs check_fused_inputs(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& reference_points,
    const at::Tensor& sampling_offsets,
    const at::Tensor& attention_logits);

// Checks that the gradient of the output has the output's shape and device.
void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value, const Sizes& sizes);

// Gradients of reference points and offsets of the fused operator, each an empty tensor (0,) unless
// wanted. grad_points (N, Q, M, L, P, 2) is the gradient of the offsets for reference points, that of
// the locations for boxes.
std::tuple<at::Tensor, at::Tensor> point_gradients(
    const Inputs& inputs,
    const at::Tensor& reference_points,
    const at::Tensor& sampling_offsets,
    const at::Tensor& grad_points,
    std::array<bool, 2> output_mask);

}  // namespace psf
