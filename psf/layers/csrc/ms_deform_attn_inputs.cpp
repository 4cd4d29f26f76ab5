#include "ms_deform_attn_inputs.h"

#include <initializer_list>
#include <limits>

namespace psf {
namespace {

// All kernels count axes in 32 bits.
constexpr int64_t kLargestSide = std::numeric_limits<int32_t>::max() - 1;

bool is_floating_point(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
      type == ScalarType::BFloat16;
}

void check_tensor(const Tensor& tensor, const char* name, int64_t dim, const Tensor& value) {
  STD_TORCH_CHECK(
      tensor.dim() == dim,
      "ms_deform_attn: ", name, " must have ", dim, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(
      is_floating_point(tensor.scalar_type()),
      "ms_deform_attn: ", name, " must be of 64, 32 or 16 bits of floating point");
  STD_TORCH_CHECK(
      tensor.device() == value.device(),
      "ms_deform_attn: ", name, " and value must be on one device");
}

void check_shape(
    const Tensor& tensor, const char* name, std::initializer_list<int64_t> expected) {
  STD_TORCH_CHECK(
      tensor.sizes().equals(expected),
      "ms_deform_attn: the shape of ", name, " does not fit that of the other tensors");
}

std::vector<Level> make_levels(const std::vector<int64_t>& spatial_shapes, int64_t positions) {
  STD_TORCH_CHECK(
      spatial_shapes.size() % 2 == 0,
      "ms_deform_attn: spatial_shapes must list H and W of every level");
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t i = 0; i < spatial_shapes.size(); i += 2) {
    const int64_t height = spatial_shapes[i];
    const int64_t width = spatial_shapes[i + 1];
    STD_TORCH_CHECK(
        height >= 0 && height <= kLargestSide && width >= 0 && width <= kLargestSide,
        "ms_deform_attn: H and W must be from 0 to ", kLargestSide, ", got ", height, ", ", width);
    // Before multiplying, which may overflow.
    STD_TORCH_CHECK(
        height == 0 || width <= (positions - start) / height,
        "ms_deform_attn: spatial_shapes have more than the S = ", positions, " positions of value");
    levels.push_back({height, width, start});
    start += height * width;
  }
  STD_TORCH_CHECK(
      start == positions,
      "ms_deform_attn: spatial_shapes have ", start, " positions, value has S = ", positions);
  return levels;
}

}  // namespace

Inputs check_inputs(
    const Tensor& value,
    const std::vector<int64_t>& spatial_shapes,
    const std::optional<Tensor>& references,
    const Tensor& positions,
    const Tensor& weights) {
  check_tensor(value, "value", 4, value);
  check_tensor(positions, references ? "sampling_offsets" : "sampling_locations", 6, value);
  check_tensor(weights, references ? "attention_logits" : "attention_weights", 5, value);
  std::vector<Level> levels = make_levels(spatial_shapes, value.size(1));
  const Sizes sizes = {
      value.size(0),
      positions.size(1),
      static_cast<int64_t>(levels.size()),
      value.size(1),
      value.size(2),
      value.size(3),
      positions.size(4)};
  const auto& [N, Q, L, S, M, D, P] = sizes;
  check_shape(positions, references ? "sampling_offsets" : "sampling_locations", {N, Q, M, L, P, 2});
  check_shape(weights, references ? "attention_logits" : "attention_weights", {N, Q, M, L, P});
  if (references) {
    check_tensor(*references, "reference_points", 4, value);
    check_shape(*references, "reference_points", {N, Q, L, references->size(3) == 4 ? 4 : 2});
  }
  return {sizes, std::move(levels), value, references, positions, weights};
}

void check_grad_output(const Tensor& grad_output, const Inputs& inputs) {
  const Sizes& sizes = inputs.sizes;
  check_tensor(grad_output, "grad_output", 3, inputs.value);
  check_shape(
      grad_output, "grad_output", {sizes.images, sizes.queries, sizes.heads * sizes.channels});
}

std::vector<int64_t> output_shape(const Sizes& sizes) {
  return {sizes.images, sizes.queries, sizes.heads * sizes.channels};
}

void check_mask(const std::vector<bool>& output_mask, size_t size) {
  STD_TORCH_CHECK(
      output_mask.size() == size, "ms_deform_attn: output_mask must have ", size, " flags");
}

ScalarType arithmetic_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor to_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

Tensor to_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor empty(IntHeaderOnlyArrayRef shape, ScalarType type, const Tensor& like) {
  return torch::stable::empty(shape, type, std::nullopt, like.device());
}

Tensor to_result(const std::optional<Tensor>& gradient, const Tensor& input) {
  return gradient ? to_type(*gradient, input.scalar_type())
                  : empty({0}, input.scalar_type(), input);
}

}  // namespace psf
