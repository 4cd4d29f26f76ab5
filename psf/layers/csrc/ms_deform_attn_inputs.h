// What the entries of all devices share: inputs whose shapes, types and devices have been checked, as
// far as kernels rely on them to stay inside the tensors. The errors that users see come from
// ms_deform_attn.py, which checks the same before.
#pragma once

#include "ms_deform_attn.h"
#include "old_libraries.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace psf {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Gradients = std::tuple<Tensor, Tensor, Tensor>;
using FusedGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The inputs of the plain operator, or of the fused one, where there are references.
struct Inputs {
  Sizes sizes;
  std::vector<Level> levels;
  Tensor value;
  std::optional<Tensor> references;  // (N, Q, L, 2) points or (N, Q, L, 4) boxes
  Tensor positions;  // locations or, in the fused operator, offsets
  Tensor weights;  // or logits
};

Inputs check_inputs(
    const Tensor& value,
    const std::vector<int64_t>& spatial_shapes,
    const std::optional<Tensor>& references,
    const Tensor& positions,
    const Tensor& weights);

// Checks that the gradient of the output has the output's shape and device.
void check_grad_output(const Tensor& grad_output, const Inputs& inputs);

// Of the output.
std::vector<int64_t> output_shape(const Sizes& sizes);

// Which gradients to compute: those of value, references, positions and weights.
struct Wanted {
  bool value;
  bool references;
  bool positions;
  bool weights;
};

// From the output_mask of either backward operator.
Wanted to_wanted(const std::vector<bool>& output_mask, bool fused);

// The type of the arithmetic for a value: double for double, float for everything else.
ScalarType arithmetic_type(const Tensor& value);

// The tensor itself if it has the type.
Tensor to_type(const Tensor& tensor, ScalarType type);

// The tensor itself if it is contiguous.
Tensor to_contiguous(const Tensor& tensor);

// On the device of another tensor.
Tensor empty(IntHeaderOnlyArrayRef shape, ScalarType type, const Tensor& like);

// A gradient as an operator returns it: in the type of its input, and (0,) where it is not wanted,
// since the result of a dispatched operator must be a defined tensor.
Tensor to_result(const std::optional<Tensor>& gradient, const Tensor& input);

}  // namespace psf
