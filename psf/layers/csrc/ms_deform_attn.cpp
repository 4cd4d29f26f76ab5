// torch.ops.psf.ms_deform_attn: schema, autograd and autocast rules. The kernels of each device are
// registered in its own file, the fake kernels in ms_deform_attn.py.
#include "cpu_capability.h"
#include "ms_deform_attn_inputs.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <Python.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>

namespace psf {
namespace {

using at::Tensor;

// ---- calls through the dispatcher ------------------------------------------------------------

Tensor call_forward(
    const Tensor& value,
    c10::SymIntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights,
    bool deterministic) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("psf::ms_deform_attn", "")
          .typed<Tensor(
              const Tensor&, c10::SymIntArrayRef, const Tensor&, const Tensor&, bool)>();
  return op.call(value, spatial_shapes, locations, weights, deterministic);
}

Gradients call_backward(
    const Tensor& grad_output,
    const Tensor& value,
    c10::SymIntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights,
    std::array<bool, 3> output_mask,
    bool deterministic) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("psf::ms_deform_attn_backward", "")
                             .typed<Gradients(
                                 const Tensor&,
                                 const Tensor&,
                                 c10::SymIntArrayRef,
                                 const Tensor&,
                                 const Tensor&,
                                 std::array<bool, 3>,
                                 bool)>();
  return op.call(
      grad_output, value, spatial_shapes, locations, weights, output_mask, deterministic);
}

Tensor call_fused(
    const Tensor& value,
    c10::SymIntArrayRef spatial_shapes,
    const Tensor& reference_points,
    const Tensor& sampling_offsets,
    const Tensor& attention_logits,
    bool deterministic) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("psf::ms_deform_attn_fused", "")
                             .typed<Tensor(
                                 const Tensor&,
                                 c10::SymIntArrayRef,
                                 const Tensor&,
                                 const Tensor&,
                                 const Tensor&,
                                 bool)>();
  return op.call(
      value, spatial_shapes, reference_points, sampling_offsets, attention_logits, deterministic);
}

FusedGradients call_fused_backward(
    const Tensor& grad_output,
    const Tensor& value,
    c10::SymIntArrayRef spatial_shapes,
    const Tensor& reference_points,
    const Tensor& sampling_offsets,
    const Tensor& attention_logits,
    std::array<bool, 4> output_mask,
    bool deterministic) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("psf::ms_deform_attn_fused_backward", "")
                             .typed<FusedGradients(
                                 const Tensor&,
                                 const Tensor&,
                                 c10::SymIntArrayRef,
                                 const Tensor&,
                                 const Tensor&,
                                 const Tensor&,
                                 std::array<bool, 4>,
                                 bool)>();
  return op.call(
      grad_output,
      value,
      spatial_shapes,
      reference_points,
      sampling_offsets,
      attention_logits,
      output_mask,
      deterministic);
}

// ---- autograd --------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class MSDeformAttnFunction : public torch::autograd::Function<MSDeformAttnFunction> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& value,
      c10::SymIntArrayRef spatial_shapes,
      const Tensor& locations,
      const Tensor& weights,
      bool deterministic) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({value, locations, weights});
    ctx->saved_data["spatial_shapes"] = spatial_shapes;
    ctx->saved_data["deterministic"] = deterministic;
    return call_forward(value, spatial_shapes, locations, weights, deterministic);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const std::array<bool, 3> mask = {
        ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
    const auto [grad_value, grad_locations, grad_weights] = call_backward(
        grad_outputs[0],
        saved[0],
        ctx->saved_data["spatial_shapes"].toSymIntVector(),
        saved[1],
        saved[2],
        mask,
        ctx->saved_data["deterministic"].toBool());
    const Tensor none;
    return {
        mask[0] ? grad_value : none,
        none,
        mask[1] ? grad_locations : none,
        mask[2] ? grad_weights : none,
        none};
  }
};

class FusedFunction : public torch::autograd::Function<FusedFunction> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& value,
      c10::SymIntArrayRef spatial_shapes,
      const Tensor& reference_points,
      const Tensor& sampling_offsets,
      const Tensor& attention_logits,
      bool deterministic) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({value, reference_points, sampling_offsets, attention_logits});
    ctx->saved_data["spatial_shapes"] = spatial_shapes;
    ctx->saved_data["deterministic"] = deterministic;
    return call_fused(
        value, spatial_shapes, reference_points, sampling_offsets, attention_logits,
        deterministic);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const std::array<bool, 4> mask = {
        ctx->needs_input_grad(0),
        ctx->needs_input_grad(1),
        ctx->needs_input_grad(2),
        ctx->needs_input_grad(3)};
    const auto [grad_value, grad_reference, grad_offsets, grad_logits] = call_fused_backward(
        grad_outputs[0],
        saved[0],
        ctx->saved_data["spatial_shapes"].toSymIntVector(),
        saved[1],
        saved[2],
        saved[3],
        mask,
        ctx->saved_data["deterministic"].toBool());
    const Tensor none;
    return {
        mask[0] ? grad_value : none,
        none,
        mask[1] ? grad_reference : none,
        mask[2] ? grad_offsets : none,
        mask[3] ? grad_logits : none,
        none};
  }
};

// The functions of the backward operators exist to refuse a second differentiation, which would
// otherwise silently give no gradient.
void refuse_second_derivative() {
  TORCH_CHECK(false, "ms_deform_attn: second derivatives are not implemented");
}

class MSDeformAttnBackwardFunction
    : public torch::autograd::Function<MSDeformAttnBackwardFunction> {
 public:
  static variable_list forward(
      AutogradContext* /*ctx*/,
      const Tensor& grad_output,
      const Tensor& value,
      c10::SymIntArrayRef spatial_shapes,
      const Tensor& locations,
      const Tensor& weights,
      std::array<bool, 3> output_mask,
      bool deterministic) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [grad_value, grad_locations, grad_weights] = call_backward(
        grad_output, value, spatial_shapes, locations, weights, output_mask, deterministic);
    return {grad_value, grad_locations, grad_weights};
  }

  static variable_list backward(AutogradContext* /*ctx*/, const variable_list& /*grads*/) {
    refuse_second_derivative();
    return {};
  }
};

class FusedBackwardFunction : public torch::autograd::Function<FusedBackwardFunction> {
 public:
  static variable_list forward(
      AutogradContext* /*ctx*/,
      const Tensor& grad_output,
      const Tensor& value,
      c10::SymIntArrayRef spatial_shapes,
      const Tensor& reference_points,
      const Tensor& sampling_offsets,
      const Tensor& attention_logits,
      std::array<bool, 4> output_mask,
      bool deterministic) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [grad_value, grad_reference, grad_offsets, grad_logits] = call_fused_backward(
        grad_output,
        value,
        spatial_shapes,
        reference_points,
        sampling_offsets,
        attention_logits,
        output_mask,
        deterministic);
    return {grad_value, grad_reference, grad_offsets, grad_logits};
  }

  static variable_list backward(AutogradContext* /*ctx*/, const variable_list& /*grads*/) {
    refuse_second_derivative();
    return {};
  }
};

Tensor forward_autograd(
    const Tensor& value,
    c10::SymIntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights,
    bool deterministic) {
  return MSDeformAttnFunction::apply(value, spatial_shapes, locations, weights, deterministic);
}

Gradients backward_autograd(
    const Tensor& grad_output,
    const Tensor& value,
    c10::SymIntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights,
    std::array<bool, 3> output_mask,
    bool deterministic) {
  const variable_list grads = MSDeformAttnBackwardFunction::apply(
      grad_output, value, spatial_shapes, locations, weights, output_mask, deterministic);
  return {grads[0], grads[1], grads[2]};
}

Tensor fused_autograd(
    const Tensor& value,
    c10::SymIntArrayRef spatial_shapes,
    const Tensor& reference_points,
    const Tensor& sampling_offsets,
    const Tensor& attention_logits,
    bool deterministic) {
  return FusedFunction::apply(
      value, spatial_shapes, reference_points, sampling_offsets, attention_logits, deterministic);
}

FusedGradients fused_backward_autograd(
    const Tensor& grad_output,
    const Tensor& value,
    c10::SymIntArrayRef spatial_shapes,
    const Tensor& reference_points,
    const Tensor& sampling_offsets,
    const Tensor& attention_logits,
    std::array<bool, 4> output_mask,
    bool deterministic) {
  const variable_list grads = FusedBackwardFunction::apply(
      grad_output,
      value,
      spatial_shapes,
      reference_points,
      sampling_offsets,
      attention_logits,
      output_mask,
      deterministic);
  return {grads[0], grads[1], grads[2], grads[3]};
}

// ---- autocast --------------------------------------------------------------------------------

// Coordinates stay in single precision: bfloat16 ones would be wrong by half a pixel and more.
template <at::DeviceType kDevice>
Tensor forward_autocast(
    const Tensor& value,
    c10::SymIntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights,
    bool deterministic) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  return call_forward(
      at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), value, kDevice),
      spatial_shapes,
      at::autocast::cached_cast(at::kFloat, locations, kDevice),
      weights,
      deterministic);
}

// Offsets and logits come as the layers before gave them, and count in single precision.
template <at::DeviceType kDevice>
Tensor fused_autocast(
    const Tensor& value,
    c10::SymIntArrayRef spatial_shapes,
    const Tensor& reference_points,
    const Tensor& sampling_offsets,
    const Tensor& attention_logits,
    bool deterministic) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  return call_fused(
      at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), value, kDevice),
      spatial_shapes,
      at::autocast::cached_cast(at::kFloat, reference_points, kDevice),
      sampling_offsets,
      attention_logits,
      deterministic);
}

}  // namespace

TORCH_LIBRARY(psf, m) {
  m.def("cpu_capability() -> str", [] { return std::string(name_of(capability())); });
  m.def(
      "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights, *, bool deterministic=False) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor sampling_locations, Tensor attention_weights, bool[3] output_mask, *, "
      "bool deterministic=False) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ms_deform_attn_fused(Tensor value, SymInt[] spatial_shapes, Tensor reference_points, "
      "Tensor sampling_offsets, Tensor attention_logits, *, bool deterministic=False) -> Tensor");
  m.def(
      "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, "
      "bool[4] output_mask, *, bool deterministic=False) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(psf, Autograd, m) {
  m.impl("ms_deform_attn", &forward_autograd);
  m.impl("ms_deform_attn_backward", &backward_autograd);
  m.impl("ms_deform_attn_fused", &fused_autograd);
  m.impl("ms_deform_attn_fused_backward", &fused_backward_autograd);
}

TORCH_LIBRARY_IMPL(psf, AutocastCPU, m) {
  m.impl("ms_deform_attn", &forward_autocast<at::kCPU>);
  m.impl("ms_deform_attn_fused", &fused_autocast<at::kCPU>);
}

TORCH_LIBRARY_IMPL(psf, AutocastCUDA, m) {
  m.impl("ms_deform_attn", &forward_autocast<at::kCUDA>);
  m.impl("ms_deform_attn_fused", &fused_autocast<at::kCUDA>);
}

}  // namespace psf

// `import psf._C` has no names to offer: loading it runs the registrations above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
