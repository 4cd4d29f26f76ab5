// torch.ops.psf.ms_deform_attn: schema, input checks, autograd and autocast rules, and the entry of
// the CPU kernels. The fake kernels are registered in ms_deform_attn.py.
#include "ms_deform_attn.h"

#include <ATen/Dispatch.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <Python.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>

namespace psf {
namespace {

using at::Tensor;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Checked inputs in the form the kernels take: contiguous, locations and weights in the type of
// the arithmetic.
struct Inputs {
  Sizes sizes;
  std::vector<Level> levels;
  Tensor value;
  Tensor locations;
  Tensor weights;
};

void check_tensor(const Tensor& tensor, const char* name, const char* shape, int64_t dim) {
  TORCH_CHECK(
      tensor.dim() == dim,
      "ms_deform_attn: ", name, " must have shape ", shape, ", got ", tensor.sizes());
  TORCH_CHECK(
      tensor.is_floating_point(),
      "ms_deform_attn: ", name, " must be floating point, got ", tensor.scalar_type());
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
    levels.push_back({height, width, start});
    start += height * width;
  }
  TORCH_CHECK(
      start == positions,
      "ms_deform_attn: value has S = ", positions, " positions, but H * W of spatial_shapes ",
      spatial_shapes, " sum to ", start);
  return levels;
}

Inputs check_inputs(
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights) {
  check_tensor(value, "value", "(N, S, M, D)", 4);
  check_tensor(locations, "sampling_locations", "(N, Q, M, L, P, 2)", 6);
  check_tensor(weights, "attention_weights", "(N, Q, M, L, P)", 5);
  TORCH_CHECK(
      locations.device() == value.device() && weights.device() == value.device(),
      "ms_deform_attn: all tensors must be on one device, got value on ", value.device(),
      ", sampling_locations on ", locations.device(),
      ", attention_weights on ", weights.device());
  std::vector<Level> levels = make_levels(spatial_shapes, value.size(1));
  const Sizes sizes = {
      value.size(0),
      locations.size(1),
      static_cast<int64_t>(levels.size()),
      value.size(1),
      value.size(2),
      value.size(3),
      locations.size(4)};
  const std::array<int64_t, 6> expected = {
      sizes.images, sizes.queries, sizes.heads, sizes.levels, sizes.points, 2};
  TORCH_CHECK(
      locations.sizes().equals(expected),
      "ms_deform_attn: sampling_locations must have shape (N, Q, M, L, P, 2) = ",
      at::IntArrayRef(expected), " to match value ", value.sizes(), " and spatial_shapes ",
      spatial_shapes, ", got ", locations.sizes());
  TORCH_CHECK(
      weights.sizes().equals(locations.sizes().slice(0, 5)),
      "ms_deform_attn: attention_weights must have shape (N, Q, M, L, P) = ",
      locations.sizes().slice(0, 5), " to match sampling_locations, got ", weights.sizes());
  const auto type = value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return {
      sizes,
      std::move(levels),
      value.contiguous(),
      locations.to(type).contiguous(),
      weights.to(type).contiguous()};
}

// The CPU kernels are deterministic, so the flag changes nothing.
Tensor forward_cpu(
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights,
    bool /*deterministic*/) {
  const Inputs inputs = check_inputs(value, spatial_shapes, locations, weights);
  const Sizes& sizes = inputs.sizes;
  Tensor output =
      at::empty({sizes.images, sizes.queries, sizes.heads * sizes.channels}, value.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn", [&] {
        using A = Accumulator<scalar_t>;
        ms_deform_attn_cpu<scalar_t, A>(
            sizes,
            inputs.levels,
            inputs.value.const_data_ptr<scalar_t>(),
            inputs.locations.const_data_ptr<A>(),
            inputs.weights.const_data_ptr<A>(),
            output.mutable_data_ptr<scalar_t>());
      });
  return output;
}

// A gradient that is not asked for is returned as an empty tensor (0,), since the result of a
// dispatched operator should be a defined tensor.
Gradients backward_cpu(
    const Tensor& grad_output,
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights,
    std::array<bool, 3> output_mask,
    bool /*deterministic*/) {
  const Inputs inputs = check_inputs(value, spatial_shapes, locations, weights);
  const Sizes& sizes = inputs.sizes;
  const std::array<int64_t, 3> expected = {
      sizes.images, sizes.queries, sizes.heads * sizes.channels};
  TORCH_CHECK(
      grad_output.sizes().equals(expected),
      "ms_deform_attn_backward: grad_output must have shape (N, Q, M * D) = ",
      at::IntArrayRef(expected), ", got ", grad_output.sizes());
  const Tensor grad = grad_output.to(value.scalar_type()).contiguous();
  const auto options = inputs.locations.options();  // of the arithmetic
  const auto buffer = [&](bool wanted, const Tensor& like) {
    return wanted ? at::empty_like(like) : at::empty({0}, options);
  };
  Tensor grad_value = at::zeros(output_mask[0] ? value.sizes() : at::IntArrayRef({0}), options);
  Tensor grad_locations = buffer(output_mask[1], inputs.locations);
  Tensor grad_weights = buffer(output_mask[2], inputs.weights);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_backward", [&] {
        using A = Accumulator<scalar_t>;
        ms_deform_attn_backward_cpu<scalar_t, A>(
            sizes,
            inputs.levels,
            grad.const_data_ptr<scalar_t>(),
            inputs.value.const_data_ptr<scalar_t>(),
            inputs.locations.const_data_ptr<A>(),
            inputs.weights.const_data_ptr<A>(),
            output_mask[0] ? grad_value.mutable_data_ptr<A>() : nullptr,
            output_mask[1] ? grad_locations.mutable_data_ptr<A>() : nullptr,
            output_mask[2] ? grad_weights.mutable_data_ptr<A>() : nullptr);
      });
  return {
      grad_value.to(value.scalar_type()),
      grad_locations.to(locations.scalar_type()),
      grad_weights.to(weights.scalar_type())};
}

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

TORCH_LIBRARY_IMPL(psf, CPU, m) {
  m.impl("ms_deform_attn", &forward_cpu);
  m.impl("ms_deform_attn_backward", &backward_cpu);
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
