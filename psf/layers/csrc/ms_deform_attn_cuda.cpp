// The operators' CUDA entries: tensors in, launches of the kernels in ms_deform_attn_cuda_*.cu.
// They allocate from torch's allocator, launch on its current stream, never wait for the device and
// so can be recorded in a CUDA graph.
#include "ms_deform_attn_cuda.h"
#include "ms_deform_attn_inputs.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <utility>

namespace psf {
namespace {

using at::Tensor;

constexpr uintptr_t kAlignment = 16;  // of the widest loads

struct Wanted {
  bool value;
  bool references;
  bool positions;
  bool weights;
};

// An operator's inputs and the tensors that hold them.
struct Call {
  CudaInputs inputs;
  Tensor value;
  Tensor positions;
  Tensor weights;
  Tensor references;  // undefined unless fused
};

Scalar scalar(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Scalar::kDouble;
    case at::kFloat:
      return Scalar::kFloat;
    case at::kHalf:
      return Scalar::kHalf;
    case at::kBFloat16:
      return Scalar::kBFloat16;
    default:
      TORCH_CHECK(false, "ms_deform_attn: no CUDA kernel for values of type ", type);
  }
}

Tensor aligned(const Tensor& tensor) {
  const Tensor result = tensor.contiguous();
  const auto address = reinterpret_cast<uintptr_t>(result.const_data_ptr());
  return address % kAlignment == 0 ? result : result.clone();
}

// In a type that kernels take offsets, weights and logits in.
Tensor readable(const Tensor& tensor, at::ScalarType arithmetic) {
  const at::ScalarType type = tensor.scalar_type();
  const bool is_half = type == at::kHalf || type == at::kBFloat16;
  const bool as_it_is = type == arithmetic || (arithmetic == at::kFloat && is_half);
  return aligned(as_it_is ? tensor : tensor.to(arithmetic));
}

void check_limits(const Sizes& sizes, bool fused) {
  const auto check = [](int64_t number, int64_t limit, const char* what) {
    TORCH_CHECK(
        number <= limit, "ms_deform_attn: at most ", limit, " ", what, " on CUDA, got ", number);
  };
  check(sizes.positions, kMaxCudaPositions, "positions");
  check(sizes.queries, kMaxCudaPositions, "queries");
  check(sizes.queries * sizes.heads, kMaxCudaRows, "queries * heads");
  check(sizes.heads * sizes.channels, kMaxCudaPositions, "heads * channels");
  check(sizes.levels, kMaxCudaLevels, "levels");
  check(sizes.levels * sizes.points, kMaxCudaSamples, "levels * points");
  if (fused) {
    check(sizes.levels * sizes.points, kMaxCudaFusedSamples, "levels * points of fused attention");
  }
}

Call make_call(
    Inputs checked,
    const Tensor& value,
    const Tensor& references,
    const Tensor& positions,
    const Tensor& weights) {
  const bool fused = references.defined();
  check_limits(checked.sizes, fused);
  const at::ScalarType arithmetic = accumulator_type(value);
  const bool rows_are_dense = value.stride(3) == 1 || value.size(3) <= 1;
  const bool is_near = value.stride(1) <= kMaxCudaStride / value.element_size();
  Call call;
  call.value = rows_are_dense && is_near ? value : value.contiguous();
  call.positions = fused ? readable(positions, arithmetic) : aligned(positions.to(arithmetic));
  call.weights = readable(weights, arithmetic);
  if (fused) {
    call.references = aligned(references.to(arithmetic));
  }
  // Of dimensions of size 1 anything may be the stride: not what vectors are aligned to.
  const auto stride = [&](int64_t dim) {
    return call.value.size(dim) > 1 ? call.value.stride(dim) : 0;
  };
  call.inputs = {
      checked.sizes,
      std::move(checked.levels),
      scalar(value.scalar_type()),
      call.value.const_data_ptr(),
      stride(0),
      stride(1),
      stride(2),
      call.positions.const_data_ptr(),
      scalar(call.positions.scalar_type()),
      call.weights.const_data_ptr(),
      scalar(call.weights.scalar_type()),
      fused ? call.references.const_data_ptr() : nullptr,
      fused ? references.size(3) : 0};
  return call;
}

Tensor forward(const Call& call) {
  const Sizes& sizes = call.inputs.sizes;
  Tensor output =
      at::empty({sizes.images, sizes.queries, sizes.heads * sizes.channels}, call.value.options());
  if (output.numel() > 0) {
    ms_deform_attn_cuda(
        call.inputs, output.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream().stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return output;
}

void* pointer(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

// Returns the value gradient, added up so that its bits do not depend on the order.
Tensor deterministic_backward(
    const Call& call, const Tensor& grad, CudaGradients gradients, CUstream_st* stream) {
  const at::TensorOptions options = call.value.options();
  const Tensor exponent = at::full({1}, kSmallestExponent, options.dtype(at::kInt));
  value_gradient_exponent_cuda(
      call.inputs, grad.const_data_ptr(), exponent.mutable_data_ptr<int32_t>(), stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const Tensor fixed_point = at::zeros(call.value.sizes(), options.dtype(at::kLong));
  gradients.value = fixed_point.mutable_data_ptr();
  ms_deform_attn_deterministic_backward_cuda(
      call.inputs, grad.const_data_ptr(), exponent.const_data_ptr<int32_t>(), gradients, stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  Tensor grad_value = at::empty(call.value.sizes(), options);
  value_gradient_from_fixed_point_cuda(
      call.inputs,
      fixed_point.const_data_ptr<int64_t>(),
      exponent.const_data_ptr<int32_t>(),
      grad_value.mutable_data_ptr(),
      stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_value;
}

// Gradients by value, references, positions and weights; undefined where not wanted.
FusedGradients backward(
    const Call& call, const Tensor& grad_output, const Wanted& wanted, bool deterministic) {
  const Sizes& sizes = call.inputs.sizes;
  check_grad_output(grad_output, call.value, sizes);
  const Tensor grad = aligned(grad_output.to(call.value.scalar_type()));
  const at::TensorOptions wide = call.value.options().dtype(accumulator_type(call.value));
  const bool has_rows = sizes.images * sizes.queries * sizes.heads > 0;
  if (!wanted.value || !has_rows) {
    deterministic = false;
  }
  Tensor grad_value, grad_references, grad_positions, grad_weights, grad_locations;
  if (wanted.value && !deterministic) {
    grad_value = at::zeros(call.value.sizes(), wide);
  }
  if (wanted.positions) {
    grad_positions = at::empty_like(call.positions);
  }
  if (wanted.weights) {
    grad_weights = at::empty_like(call.weights);
  }
  if (wanted.references) {
    grad_references = at::zeros(call.references.sizes(), wide);
    grad_locations = at::empty(call.positions.sizes(), wide);
  }
  if (!has_rows) {
    return {grad_value, grad_references, grad_positions, grad_weights};
  }
  CUstream_st* stream = c10::cuda::getCurrentCUDAStream().stream();
  const CudaGradients gradients = {
      pointer(grad_value),
      pointer(grad_positions),
      pointer(grad_weights),
      pointer(grad_locations)};
  if (deterministic) {
    grad_value = deterministic_backward(call, grad, gradients, stream);
  } else {
    ms_deform_attn_backward_cuda(call.inputs, grad.const_data_ptr(), gradients, stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (wanted.references) {
    reference_gradient_cuda(
        call.inputs, grad_locations.const_data_ptr(), grad_references.mutable_data_ptr(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {grad_value, grad_references, grad_positions, grad_weights};
}

// The result of a dispatched operator should be a defined tensor: (0,) where not wanted.
Tensor as_result(const Tensor& grad, const Tensor& input) {
  return grad.defined() ? grad.to(input.scalar_type()) : at::empty({0}, input.options());
}

bool choose_sum(bool deterministic) {
  return deterministic || at::globalContext().deterministicAlgorithms();
}

// The forward kernels are deterministic, so the flag changes nothing.
Tensor forward_cuda(
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights,
    bool /*deterministic*/) {
  const c10::cuda::CUDAGuard guard(value.device());
  return forward(make_call(
      check_inputs(value, spatial_shapes, locations, weights), value, {}, locations, weights));
}

Tensor forward_fused_cuda(
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& references,
    const Tensor& offsets,
    const Tensor& logits,
    bool /*deterministic*/) {
  const c10::cuda::CUDAGuard guard(value.device());
  Inputs checked = check_fused_inputs(value, spatial_shapes, references, offsets, logits);
  return forward(make_call(std::move(checked), value, references, offsets, logits));
}

Gradients backward_with(
    bool sum,
    const Tensor& grad_output,
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights,
    std::array<bool, 3> output_mask) {
  const c10::cuda::CUDAGuard guard(value.device());
  const Call call = make_call(
      check_inputs(value, spatial_shapes, locations, weights), value, {}, locations, weights);
  const auto [grad_value, no_references, grad_locations, grad_weights] =
      backward(call, grad_output, {output_mask[0], false, output_mask[1], output_mask[2]}, sum);
  return {
      as_result(grad_value, value),
      as_result(grad_locations, locations),
      as_result(grad_weights, weights)};
}

FusedGradients backward_fused_with(
    bool sum,
    const Tensor& grad_output,
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& references,
    const Tensor& offsets,
    const Tensor& logits,
    std::array<bool, 4> output_mask) {
  const c10::cuda::CUDAGuard guard(value.device());
  Inputs checked = check_fused_inputs(value, spatial_shapes, references, offsets, logits);
  const Call call = make_call(std::move(checked), value, references, offsets, logits);
  const auto [grad_value, grad_references, grad_offsets, grad_logits] = backward(
      call, grad_output, {output_mask[0], output_mask[1], output_mask[2], output_mask[3]}, sum);
  return {
      as_result(grad_value, value),
      as_result(grad_references, references),
      as_result(grad_offsets, offsets),
      as_result(grad_logits, logits)};
}

Gradients backward_cuda(
    const Tensor& grad_output,
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights,
    std::array<bool, 3> output_mask,
    bool deterministic) {
  return backward_with(
      choose_sum(deterministic),
      grad_output,
      value,
      spatial_shapes,
      locations,
      weights,
      output_mask);
}

FusedGradients backward_fused_cuda(
    const Tensor& grad_output,
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& references,
    const Tensor& offsets,
    const Tensor& logits,
    std::array<bool, 4> output_mask,
    bool deterministic) {
  return backward_fused_with(
      choose_sum(deterministic),
      grad_output,
      value,
      spatial_shapes,
      references,
      offsets,
      logits,
      output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(psf, CUDA, m) {
  m.impl("ms_deform_attn", &forward_cuda);
  m.impl("ms_deform_attn_backward", &backward_cuda);
  m.impl("ms_deform_attn_fused", &forward_fused_cuda);
  m.impl("ms_deform_attn_fused_backward", &backward_fused_cuda);
}

}  // namespace psf
