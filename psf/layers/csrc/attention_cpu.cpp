// Scaled dot-product attention of few channels a head on a CPU: the operator and its gradient.
#include "attention_cpu.h"
#include "attention_cpu_entry.h"
#include "cpu_capability.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace psf {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// With the channels of a head adjacent.
Tensor packed(const Tensor& x) {
  return x.stride(-1) == 1 ? x : x.contiguous();
}

template <typename A>
Heads<const A> heads_of(const Tensor& x) {
  return {x.const_data_ptr<A>(), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename A>
Heads<A> mutable_heads_of(Tensor& x) {
  return {x.data_ptr<A>(), x.stride(0), x.stride(1), x.stride(2)};
}

// The mask in one piece, or an undefined tensor.
Tensor mask_of(const optional<Tensor>& visible) {
  return visible.has_value() ? visible->contiguous() : Tensor();
}

const bool* pointer_of(const Tensor& mask) {
  return mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
}

// Calls f(task, scratch) for every task, each thread with scratch memory of `size` numbers.
template <typename A, typename F>
void for_tasks(int64_t tasks, int64_t size, const F& f) {
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    const at::DataPtr scratch =
        c10::GetCPUAllocator()->allocate(static_cast<size_t>(size) * sizeof(A));
    for (int64_t task = first; task < last; ++task) {
      f(task, static_cast<A*>(scratch.get()));
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const optional<Tensor>& visible) {
  const Tensor q = packed(q_in), k = packed(k_in), v = packed(v_in);
  const Tensor mask = mask_of(visible);
  const int64_t images = q.size(0), queries = q.size(1), heads = q.size(2), channels = q.size(3);
  Tensor output = at::empty({images, queries, heads * channels}, q.options());
  Tensor log_sum = at::empty({images, heads, queries}, q.options());
  const int64_t blocks = (queries + kTaskQueries - 1) / kTaskQueries;
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "attention", [&] {
    const AttentionCall<scalar_t> call{
        heads,
        queries,
        k.size(1),
        channels,
        heads_of<scalar_t>(q),
        heads_of<scalar_t>(k),
        heads_of<scalar_t>(v),
        pointer_of(mask),
        {output.data_ptr<scalar_t>(), queries * heads * channels, heads * channels, channels},
        log_sum.data_ptr<scalar_t>()};
    for_tasks<scalar_t>(
        images * heads * blocks, attention_scratch(channels), [&](int64_t task, scalar_t* scratch) {
          const int64_t head = task / blocks;
          const int64_t first = task % blocks * kTaskQueries;
          PSF_CALL_KERNEL(attention, call, head / heads, head % heads, first, scratch)
        });
  });
  return {output, log_sum};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_output_in,
    const Tensor& q_in,
    const Tensor& k_in,
    const Tensor& v_in,
    const optional<Tensor>& visible,
    const Tensor& output,
    const Tensor& log_sum) {
  const Tensor q = packed(q_in), k = packed(k_in), v = packed(v_in);
  const Tensor mask = mask_of(visible);
  const Tensor grad_output = grad_output_in.contiguous();
  const int64_t images = q.size(0), queries = q.size(1), heads = q.size(2), channels = q.size(3);
  Tensor grad_q = at::empty(q.sizes(), q.options());
  Tensor grad_k = at::empty(k.sizes(), k.options());
  Tensor grad_v = at::empty(v.sizes(), v.options());
  const int64_t image = queries * heads * channels, token = heads * channels;
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "attention_backward", [&] {
    const AttentionBackwardCall<scalar_t> call{
        heads,
        queries,
        k.size(1),
        channels,
        heads_of<scalar_t>(q),
        heads_of<scalar_t>(k),
        heads_of<scalar_t>(v),
        pointer_of(mask),
        {output.const_data_ptr<scalar_t>(), image, token, channels},
        log_sum.const_data_ptr<scalar_t>(),
        {grad_output.const_data_ptr<scalar_t>(), image, token, channels},
        mutable_heads_of<scalar_t>(grad_q),
        mutable_heads_of<scalar_t>(grad_k),
        mutable_heads_of<scalar_t>(grad_v)};
    for_tasks<scalar_t>(
        images * heads, attention_backward_scratch(channels, queries),
        [&](int64_t task, scalar_t* scratch) {
          PSF_CALL_KERNEL(attention_backward, call, task / heads, task % heads, scratch)
        });
  });
  return {grad_q, grad_k, grad_v};
}

namespace {

class Attention : public torch::autograd::Function<Attention> {
 public:
  static variable_list forward(
      AutogradContext* ctx,
      const Tensor& q,
      const Tensor& k,
      const Tensor& v,
      const optional<Tensor>& visible) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [output, log_sum] = attention_forward(q, k, v, visible);
    ctx->save_for_backward({q, k, v, visible.value_or(Tensor()), output, log_sum});
    ctx->mark_non_differentiable({log_sum});
    return {output, log_sum};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const optional<Tensor> visible = saved[3].defined() ? optional<Tensor>(saved[3]) : std::nullopt;
    const auto [grad_q, grad_k, grad_v] = attention_backward(
        grad_outputs[0], saved[0], saved[1], saved[2], visible, saved[4], saved[5]);
    return {grad_q, grad_k, grad_v, Tensor()};
  }
};

void check(const Tensor& q, const Tensor& k, const Tensor& v, const optional<Tensor>& visible) {
  TORCH_CHECK(
      q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && q.size(0) == k.size(0) &&
          q.size(2) == k.size(2) && q.size(3) == k.size(3),
      "attention: q must be (N, Q, M, D), k and v (N, S, M, D), got ", q.sizes(), ", ", k.sizes(),
      " and ", v.sizes());
  for (const Tensor* other : {&k, &v}) {
    TORCH_CHECK(
        other->scalar_type() == q.scalar_type(), "attention: all tensors must be ", q.scalar_type(),
        " as q is, got ", other->scalar_type());
  }
  if (visible.has_value()) {
    TORCH_CHECK(
        visible->dim() == 2 && visible->size(0) == k.size(0) && visible->size(1) == k.size(1) &&
            visible->scalar_type() == at::kBool,
        "attention: visible must be (N, S) = (", k.size(0), ", ", k.size(1), ") bool, got ",
        visible->sizes(), " ", visible->scalar_type());
  }
}

std::tuple<Tensor, Tensor> attention_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const optional<Tensor>& visible) {
  check(q, k, v, visible);
  return attention_forward(q, k, v, visible);
}

std::tuple<Tensor, Tensor> attention_autograd(
    const Tensor& q, const Tensor& k, const Tensor& v, const optional<Tensor>& visible) {
  check(q, k, v, visible);
  const variable_list results = Attention::apply(q, k, v, visible);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(psf, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? visible) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_output, Tensor q, Tensor k, Tensor v, Tensor? visible, "
      "Tensor output, Tensor log_sum) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(psf, CPU, m) {
  m.impl("attention", &attention_cpu);
  m.impl("attention_backward", &attention_backward);
}

TORCH_LIBRARY_IMPL(psf, AutogradCPU, m) {
  m.impl("attention", &attention_autograd);
}

}  // namespace psf
