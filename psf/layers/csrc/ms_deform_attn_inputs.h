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

// Which gradients to compute.
struct Wanted {
  bool value;
  bool references;
  bool positions;
  bool weights;
};

// Gradients; one that is not wanted has no value.
struct GradientTensors {
  std::optional<Tensor> value;
  std::optional<Tensor> references;
  std::optional<Tensor> positions;
  std::optional<Tensor> weights;
};

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

void check_mask(const std::vector<bool>& output_mask, size_t size);

// The four operators of a device, which has a forward and a backward pass for either set of inputs.
template <
    Tensor (*kForward)(const Inputs&),
    GradientTensors (*kBackward)(const Inputs&, const Tensor&, const Wanted&, bool)>
struct Operators {
  static Tensor forward(
      const Tensor& value,
      std::vector<int64_t> spatial_shapes,
      const Tensor& locations,
      const Tensor& weights) {
    return kForward(check_inputs(value, spatial_shapes, std::nullopt, locations, weights));
  }

  static Gradients backward(
      const Tensor& grad_output,
      const Tensor& value,
      std::vector<int64_t> spatial_shapes,
      const Tensor& locations,
      const Tensor& weights,
      std::vector<bool> mask,
      bool deterministic) {
    check_mask(mask, 3);
    const Inputs inputs = check_inputs(value, spatial_shapes, std::nullopt, locations, weights);
    check_grad_output(grad_output, inputs);
    const GradientTensors grads =
        kBackward(inputs, grad_output, {mask[0], false, mask[1], mask[2]}, deterministic);
    return {
        to_result(grads.value, value),
        to_result(grads.positions, locations),
        to_result(grads.weights, weights)};
  }

  static Tensor fused_forward(
      const Tensor& value,
      std::vector<int64_t> spatial_shapes,
      const Tensor& references,
      const Tensor& offsets,
      const Tensor& logits) {
    return kForward(check_inputs(value, spatial_shapes, references, offsets, logits));
  }

  static FusedGradients fused_backward(
      const Tensor& grad_output,
      const Tensor& value,
      std::vector<int64_t> spatial_shapes,
      const Tensor& references,
      const Tensor& offsets,
      const Tensor& logits,
      std::vector<bool> mask,
      bool deterministic) {
    check_mask(mask, 4);
    const Inputs inputs = check_inputs(value, spatial_shapes, references, offsets, logits);
    check_grad_output(grad_output, inputs);
    const GradientTensors grads =
        kBackward(inputs, grad_output, {mask[0], mask[1], mask[2], mask[3]}, deterministic);
    return {
        to_result(grads.value, value),
        to_result(grads.references, references),
        to_result(grads.positions, offsets),
        to_result(grads.weights, logits)};
  }

  static void add_to(torch::stable::detail::StableLibrary& library) {
    library.impl("ms_deform_attn", TORCH_BOX(&forward));
    library.impl("ms_deform_attn_backward", TORCH_BOX(&backward));
    library.impl("ms_deform_attn_fused", TORCH_BOX(&fused_forward));
    library.impl("ms_deform_attn_fused_backward", TORCH_BOX(&fused_backward));
  }
};

}  // namespace psf
