#include "ms_deform_attn_inputs.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <limits>
#include <utility>

namespace psf {
namespace {

using at::Tensor;

// Axes are counted in 32 bits by all kernels.
constexpr int64_t kLargestSide = std::numeric_limits<int32_t>::max() - 1;

void check_tensor(const Tensor& tensor, const char* name, const char* shape, int64_t dim) {
  TORCH_CHECK(
      tensor.dim() == dim,
      "ms_deform_attn: ", name, " must have shape ", shape, ", got ", tensor.sizes());
  TORCH_CHECK(
      tensor.is_floating_point(),
      "ms_deform_attn: ", name, " must be floating point, got ", tensor.scalar_type());
}

void check_device(const Tensor& tensor, const char* name, const Tensor& value) {
  TORCH_CHECK(
      tensor.device() == value.device(),
      "ms_deform_attn: all tensors must be on one device, got value on ", value.device(), " and ",
      name, " on ", tensor.device());
}

std::vector<Level> make_levels(at::IntArrayRef spatial_shapes, int64_t positions) {
  TORCH_CHECK(
      spatial_shapes.size() % 2 == 0,
      "ms_deform_attn: spatial_shapes must list H and W of every level, got ",
      spatial_shapes.size(), " numbers: ", spatial_shapes);
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t i = 0; i < spatial_shapes.size(); i += 2) {
    const int64_t height = spatial_shapes[i];
    const int64_t width = spatial_shapes[i + 1];
    TORCH_CHECK(
        height >= 0 && width >= 0,
        "ms_deform_attn: spatial_shapes must not be negative, got ", spatial_shapes);
    TORCH_CHECK(
        height <= kLargestSide && width <= kLargestSide,
        "ms_deform_attn: spatial_shapes must be at most ", kLargestSide, ", got ", spatial_shapes);
    levels.push_back({height, width, start});
    start += height * width;
  }
  TORCH_CHECK(
      start == positions,
      "ms_deform_attn: value has S = ", positions, " positions, but H * W of spatial_shapes ",
      spatial_shapes, " sum to ", start);
  return levels;
}

Inputs check_value_and_samples(
    const Tensor& value, at::IntArrayRef spatial_shapes, const Tensor& samples, const char* name) {
  std::vector<Level> levels = make_levels(spatial_shapes, value.size(1));
  const Sizes sizes = {
      value.size(0),
      samples.size(1),
      static_cast<int64_t>(levels.size()),
      value.size(1),
      value.size(2),
      value.size(3),
      samples.size(4)};
  const std::array<int64_t, 6> expected = {
      sizes.images, sizes.queries, sizes.heads, sizes.levels, sizes.points, 2};
  TORCH_CHECK(
      samples.sizes().equals(expected),
      "ms_deform_attn: ", name, " must have shape (N, Q, M, L, P, 2) = ",
      at::IntArrayRef(expected), " to match value ", value.sizes(), " and spatial_shapes ",
      spatial_shapes, ", got ", samples.sizes());
  return {sizes, std::move(levels)};
}

}  // namespace

at::ScalarType accumulator_type(const Tensor& value) {
  return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Inputs check_inputs(
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights) {
  check_tensor(value, "value", "(N, S, M, D)", 4);
  check_tensor(locations, "sampling_locations", "(N, Q, M, L, P, 2)", 6);
  check_tensor(weights, "attention_weights", "(N, Q, M, L, P)", 5);
  check_device(locations, "sampling_locations", value);
  check_device(weights, "attention_weights", value);
  Inputs inputs = check_value_and_samples(value, spatial_shapes, locations, "sampling_locations");
  TORCH_CHECK(
      weights.sizes().equals(locations.sizes().slice(0, 5)),
      "ms_deform_attn: attention_weights must have shape (N, Q, M, L, P) = ",
      locations.sizes().slice(0, 5), " to match sampling_locations, got ", weights.sizes());
  return inputs;
}

Inputs check_fused_inputs(
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& reference_points,
    const Tensor& sampling_offsets,
    const Tensor& attention_logits) {
  check_tensor(value, "value", "(N, S, M, D)", 4);
  check_tensor(reference_points, "reference_points", "(N, Q, L, 2) or (N, Q, L, 4)", 4);
  check_tensor(sampling_offsets, "sampling_offsets", "(N, Q, M, L, P, 2)", 6);
  check_tensor(attention_logits, "attention_logits", "(N, Q, M, L, P)", 5);
  check_device(reference_points, "reference_points", value);
  check_device(sampling_offsets, "sampling_offsets", value);
  check_device(attention_logits, "attention_logits", value);
  Inputs inputs =
      check_value_and_samples(value, spatial_shapes, sampling_offsets, "sampling_offsets");
  TORCH_CHECK(
      attention_logits.sizes().equals(sampling_offsets.sizes().slice(0, 5)),
      "ms_deform_attn: attention_logits must have shape (N, Q, M, L, P) = ",
      sampling_offsets.sizes().slice(0, 5), " to match sampling_offsets, got ",
      attention_logits.sizes());
  const Sizes& sizes = inputs.sizes;
  const std::array<int64_t, 3> expected = {sizes.images, sizes.queries, sizes.levels};
  const int64_t coordinates = reference_points.size(3);
  TORCH_CHECK(
      reference_points.sizes().slice(0, 3).equals(expected) &&
          (coordinates == 2 || coordinates == 4),
      "ms_deform_attn: reference_points must be (N, Q, L, 2) or (N, Q, L, 4) with (N, Q, L) = ",
      at::IntArrayRef(expected), " to match sampling_offsets, got ", reference_points.sizes());
  return inputs;
}

void check_grad_output(const Tensor& grad_output, const Tensor& value, const Sizes& sizes) {
  const std::array<int64_t, 3> expected = {
      sizes.images, sizes.queries, sizes.heads * sizes.channels};
  TORCH_CHECK(
      grad_output.sizes().equals(expected),
      "ms_deform_attn_backward: grad_output must have shape (N, Q, M * D) = ",
      at::IntArrayRef(expected), ", got ", grad_output.sizes());
  check_device(grad_output, "grad_output", value);
}

std::tuple<Tensor, Tensor> point_gradients(
    const Inputs& inputs,
    const Tensor& reference_points,
    const Tensor& sampling_offsets,
    const Tensor& grad_points,
    std::array<bool, 2> output_mask) {
  const auto none = [&] { return at::empty({0}, grad_points.options()); };
  const std::array<int64_t, 2> heads_and_points = {2, 4};  // dimensions of (N, Q, M, L, P, 2)
  if (reference_points.size(3) == 2) {
    Tensor grad_reference = none();
    if (output_mask[0]) {
      // location = reference + offset / (W, H)
      std::vector<double> sizes;
      for (const Level& level : inputs.levels) {
        sizes.push_back(static_cast<double>(level.width));
        sizes.push_back(static_cast<double>(level.height));
      }
      const Tensor size = at::tensor(sizes, grad_points.options()).view({-1, 2});  // (L, 2)
      grad_reference = grad_points.sum(heads_and_points).mul_(size);
    }
    return {grad_reference, output_mask[1] ? grad_points : none()};
  }
  // location = centre + offset * size / 2 P
  const double unit = 0.5 / static_cast<double>(std::max<int64_t>(inputs.sizes.points, 1));
  Tensor grad_reference = none();
  if (output_mask[0]) {
    grad_reference = at::cat(
        std::vector<Tensor>{
            grad_points.sum(heads_and_points),
            grad_points.mul(sampling_offsets).sum(heads_and_points).mul_(unit)},
        -1);
  }
  if (!output_mask[1]) {
    return {grad_reference, none()};
  }
  const Tensor size = reference_points.slice(3, 2).unsqueeze(2).unsqueeze(4);  // (N, Q, 1, L, 1, 2)
  return {grad_reference, grad_points.mul(size.mul(unit))};
}

}  // namespace psf
