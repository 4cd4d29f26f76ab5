// The operators on CUDA: tensors in, launches of the kernels in ms_deform_attn_cuda_*.cu. They allocate
// from torch's allocator, launch on its current stream, never wait for the device and so can be
// recorded in a CUDA graph.
#include "ms_deform_attn_cuda.h"
#include "ms_deform_attn_inputs.h"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace psf {
namespace {

constexpr uintptr_t kAlignment = 16;  // of the widest loads

// The inputs of an operator and the tensors that hold them.
struct Call {
  CudaInputs inputs;
  Inputs tensors;
};

// Makes the device of a tensor the current one, and knows its stream.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<CUstream_st*>(stream);
  }

  // Calls launch(arguments..., stream) and raises what CUDA says of the launch.
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*launch)(Parameters...), Arguments&&... arguments) const {
    launch(std::forward<Arguments>(arguments)..., stream_);
    char* error = nullptr;
    torch_c10_cuda_check_msg(launch_error_cuda(), __FILE__, __func__, __LINE__, true, &error);
    if (error != nullptr) {
      const std::string message(error);
      torch_c10_cuda_free_error_msg(error);
      throw std::runtime_error(message);
    }
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  CUstream_st* stream_;
};

Scalar scalar(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Scalar::kDouble;
    case ScalarType::Half:
      return Scalar::kHalf;
    case ScalarType::BFloat16:
      return Scalar::kBFloat16;
    default:
      return Scalar::kFloat;
  }
}

Tensor aligned(const Tensor& tensor) {
  const Tensor result = to_contiguous(tensor);
  const auto address = reinterpret_cast<uintptr_t>(result.const_data_ptr());
  return address % kAlignment == 0 ? result : torch::stable::clone(result);
}

// In a type that kernels take offsets, weights and logits in.
Tensor readable(const Tensor& tensor, ScalarType arithmetic) {
  const ScalarType type = tensor.scalar_type();
  const bool is_half = type == ScalarType::Half || type == ScalarType::BFloat16;
  return aligned(is_half && arithmetic == ScalarType::Float ? tensor : to_type(tensor, arithmetic));
}

void check_limits(const Sizes& sizes, bool fused) {
  const auto check = [](int64_t number, int64_t limit, const char* what) {
    STD_TORCH_CHECK(
        number <= limit, "ms_deform_attn: at most ", limit, " ", what, " on CUDA, got ", number);
  };
  check(sizes.positions, kMaxCudaPositions, "positions");
  check(sizes.queries, kMaxCudaPositions, "queries");
  check(sizes.heads, kMaxCudaRows / std::max<int64_t>(sizes.queries, 1), "heads of so many queries");
  check(
      sizes.channels,
      kMaxCudaPositions / std::max<int64_t>(sizes.heads, 1),
      "channels of so many heads");
  check(sizes.levels, kMaxCudaLevels, "levels");
  check(
      sizes.points,
      (fused ? kMaxCudaFusedSamples : kMaxCudaSamples) / std::max<int64_t>(sizes.levels, 1),
      "points of so many levels");
}

Call make_call(Inputs tensors) {
  const bool fused = tensors.references.has_value();
  const Sizes& sizes = tensors.sizes;
  check_limits(sizes, fused);
  const ScalarType arithmetic = arithmetic_type(tensors.value);
  const int64_t farthest = kMaxCudaStride / static_cast<int64_t>(tensors.value.element_size());
  if ((tensors.value.stride(3) != 1 && sizes.channels > 1) || tensors.value.stride(1) > farthest) {
    tensors.value = to_contiguous(tensors.value);
  }
  tensors.positions = fused ? readable(tensors.positions, arithmetic)
                            : aligned(to_type(tensors.positions, arithmetic));
  tensors.weights = readable(tensors.weights, arithmetic);
  if (fused) {
    tensors.references = aligned(to_type(*tensors.references, arithmetic));
  }
  // Of dimensions of size 1 anything may be the stride: not what vectors are aligned to.
  const auto stride = [&](int64_t dim) {
    return tensors.value.size(dim) > 1 ? tensors.value.stride(dim) : 0;
  };
  const CudaInputs inputs = {
      sizes,
      tensors.levels,
      scalar(tensors.value.scalar_type()),
      tensors.value.const_data_ptr(),
      stride(0),
      stride(1),
      stride(2),
      tensors.positions.const_data_ptr(),
      scalar(tensors.positions.scalar_type()),
      tensors.weights.const_data_ptr(),
      scalar(tensors.weights.scalar_type()),
      fused ? tensors.references->const_data_ptr() : nullptr,
      fused ? tensors.references->size(3) : 0};
  return {inputs, std::move(tensors)};
}

Tensor forward(Inputs checked) {
  const Launcher launch(checked.value);
  const Call call = make_call(std::move(checked));
  const Tensor& value = call.tensors.value;
  const Tensor output = empty(output_shape(call.inputs.sizes), value.scalar_type(), value);
  if (output.numel() > 0) {
    launch(ms_deform_attn_cuda, call.inputs, output.mutable_data_ptr());
  }
  return output;
}

// Gradients; one that is not wanted has no value.
struct GradientTensors {
  std::optional<Tensor> value, references, positions, weights;
};

Tensor zeros(IntHeaderOnlyArrayRef shape, ScalarType type, const Tensor& like) {
  return torch::stable::new_zeros(like, shape, type);
}

// Returns the value gradient, added up so that its bits do not depend on the order.
Tensor deterministic_backward(
    const Call& call, const Tensor& grad, CudaGradients gradients, const Launcher& launch) {
  const Tensor& value = call.tensors.value;
  const Tensor exponent = empty({1}, ScalarType::Int, value);
  torch::stable::fill_(exponent, kSmallestExponent);
  auto* exponent_data = static_cast<int32_t*>(exponent.mutable_data_ptr());
  const void* grad_data = grad.const_data_ptr();
  launch(value_gradient_exponent_cuda, call.inputs, grad_data, exponent_data);
  const Tensor fixed_point = zeros(value.sizes(), ScalarType::Long, value);
  gradients.value = fixed_point.mutable_data_ptr();
  launch(
      ms_deform_attn_deterministic_backward_cuda,
      call.inputs,
      grad_data,
      exponent_data,
      gradients);
  const Tensor grad_value = empty(value.sizes(), value.scalar_type(), value);
  launch(
      value_gradient_from_fixed_point_cuda,
      call.inputs,
      static_cast<const int64_t*>(fixed_point.const_data_ptr()),
      exponent_data,
      grad_value.mutable_data_ptr());
  return grad_value;
}

GradientTensors backward(
    Inputs checked, const Tensor& grad_output, const Wanted& wanted, bool deterministic) {
  check_grad_output(grad_output, checked);
  const Launcher launch(checked.value);
  const Call call = make_call(std::move(checked));
  const Sizes& sizes = call.inputs.sizes;
  const Tensor& value = call.tensors.value;
  const Tensor grad = aligned(to_type(grad_output, value.scalar_type()));
  const ScalarType wide = arithmetic_type(value);
  const bool has_rows = sizes.images > 0 && sizes.queries > 0 && sizes.heads > 0;
  deterministic = deterministic && wanted.value && has_rows;
  GradientTensors to;
  std::optional<Tensor> grad_locations;
  const auto like = [](const Tensor& tensor) {
    return empty(tensor.sizes(), tensor.scalar_type(), tensor);
  };
  if (wanted.value && !deterministic) {
    to.value = zeros(value.sizes(), wide, value);
  }
  if (wanted.positions) {
    to.positions = like(call.tensors.positions);
  }
  if (wanted.weights) {
    to.weights = like(call.tensors.weights);
  }
  if (wanted.references) {
    to.references = zeros(call.tensors.references->sizes(), wide, value);
    grad_locations = empty(call.tensors.positions.sizes(), wide, value);
  }
  if (!has_rows) {
    return to;
  }
  const auto pointer = [](const std::optional<Tensor>& tensor) {
    return tensor ? tensor->mutable_data_ptr() : nullptr;
  };
  const CudaGradients gradients = {
      pointer(to.value), pointer(to.positions), pointer(to.weights), pointer(grad_locations)};
  if (deterministic) {
    to.value = deterministic_backward(call, grad, gradients, launch);
  } else {
    launch(ms_deform_attn_backward_cuda, call.inputs, grad.const_data_ptr(), gradients);
  }
  if (wanted.references) {
    launch(
        reference_gradient_cuda,
        call.inputs,
        grad_locations->const_data_ptr(),
        to.references->mutable_data_ptr());
  }
  return to;
}

// ---- the operators ---------------------------------------------------------------------------

Tensor forward_cuda(
    const Tensor& value,
    std::vector<int64_t> spatial_shapes,
    const Tensor& locations,
    const Tensor& weights) {
  return forward(check_inputs(value, spatial_shapes, std::nullopt, locations, weights));
}

Gradients backward_cuda(
    const Tensor& grad_output,
    const Tensor& value,
    std::vector<int64_t> spatial_shapes,
    const Tensor& locations,
    const Tensor& weights,
    std::vector<bool> output_mask,
    bool deterministic) {
  const GradientTensors grads = backward(
      check_inputs(value, spatial_shapes, std::nullopt, locations, weights),
      grad_output,
      to_wanted(output_mask, false),
      deterministic);
  return {
      to_result(grads.value, value),
      to_result(grads.positions, locations),
      to_result(grads.weights, weights)};
}

Tensor forward_fused_cuda(
    const Tensor& value,
    std::vector<int64_t> spatial_shapes,
    const Tensor& references,
    const Tensor& offsets,
    const Tensor& logits) {
  return forward(check_inputs(value, spatial_shapes, references, offsets, logits));
}

FusedGradients backward_fused_cuda(
    const Tensor& grad_output,
    const Tensor& value,
    std::vector<int64_t> spatial_shapes,
    const Tensor& references,
    const Tensor& offsets,
    const Tensor& logits,
    std::vector<bool> output_mask,
    bool deterministic) {
  const GradientTensors grads = backward(
      check_inputs(value, spatial_shapes, references, offsets, logits),
      grad_output,
      to_wanted(output_mask, true),
      deterministic);
  return {
      to_result(grads.value, value),
      to_result(grads.references, references),
      to_result(grads.positions, offsets),
      to_result(grads.weights, logits)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(psf, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&forward_cuda));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&backward_cuda));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&forward_fused_cuda));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&backward_fused_cuda));
}

}  // namespace psf
