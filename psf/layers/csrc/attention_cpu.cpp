// Scaled dot-product attention of few channels a head on a CPU: splits queries and heads among
// threads.
#include "attention_cpu.h"
#include "cpu_capability.h"
#include "training_cpu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

namespace psf {
namespace {

using at::Tensor;
using std::optional;

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

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const optional<Tensor>& visible) {
  check(q_in, k_in, v_in, visible);
  const Tensor q = packed(q_in), k = packed(k_in), v = packed(v_in);
  const Tensor mask = mask_of(visible);
  const int64_t images = q.size(0), queries = q.size(1), heads = q.size(2), channels = q.size(3);
  Tensor output = q.new_empty({images, queries, heads * channels});
  Tensor log_sum = q.new_empty({images, heads, queries});
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
  Tensor grad_q = q.new_empty(q.sizes());
  Tensor grad_k = k.new_empty(k.sizes());
  Tensor grad_v = v.new_empty(v.sizes());
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

}  // namespace psf
