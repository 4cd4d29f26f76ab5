// What the transformer blocks of blocks_cpu.cpp are made of. All rows are contiguous, (rows, C).
#pragma once

#include <ATen/core/Tensor.h>

namespace psf {

struct LayerNorm {
  at::Tensor output;
  at::Tensor normalised;  // (x + y - mean) / deviation
  at::Tensor inverse;  // (rows,) 1 / deviation
};

struct LayerNormGradients {
  at::Tensor input;  // of x and of y
  at::Tensor weight;
  at::Tensor bias;
};

// Layer normalisation of x + y.
LayerNorm layer_norm(
    const at::Tensor& x,
    const at::Tensor& y,
    const at::Tensor& weight,
    const at::Tensor& bias,
    double eps);

LayerNormGradients layer_norm_backward(
    const at::Tensor& grad_output,
    const at::Tensor& normalised,
    const at::Tensor& inverse,
    const at::Tensor& weight);

}  // namespace psf
