// torch.ops.psf.ms_deform_attn: schema, autograd and autocast rules. The kernels of each device are
// registered in its own file, the fake kernels in ms_deform_attn.py.
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

// Exists to refuse a second differentiation, which would otherwise silently give no gradient.
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
    TORCH_CHECK(false, "ms_deform_attn: second derivatives are not implemented");
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

}  // namespace

TORCH_LIBRARY(psf, m) {
  m.def(
      "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights, *, bool deterministic=False) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor sampling_locations, Tensor attention_weights, bool[3] output_mask, *, "
      "bool deterministic=False) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(psf, Autograd, m) {
  m.impl("ms_deform_attn", &forward_autograd);
  m.impl("ms_deform_attn_backward", &backward_autograd);
}

TORCH_LIBRARY_IMPL(psf, AutocastCPU, m) {
  m.impl("ms_deform_attn", &forward_autocast<at::kCPU>);
}

TORCH_LIBRARY_IMPL(psf, AutocastCUDA, m) {
  m.impl("ms_deform_attn", &forward_autocast<at::kCUDA>);
}

}  // namespace psf

// `import psf._C` has no names to offer: loading it runs the registrations above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
