// Layer normalisation of a sum on a CPU: splits the rows among threads.
#include "cpu_capability.h"
#include "layer_norm_cpu.h"
#include "training_cpu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <tuple>

namespace psf {
namespace {

using at::Tensor;

// Rows of a task. What they add to the gradients of the parameters is summed in their order, which
// so does not depend on the number of threads.
constexpr int64_t kRows = 128;

int64_t tasks_of(int64_t rows) {
  return (rows + kRows - 1) / kRows;
}

template <typename F>
void for_rows(int64_t rows, const F& f) {
  at::parallel_for(0, tasks_of(rows), 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      f(task, task * kRows, std::min(rows, (task + 1) * kRows));
    }
  });
}

}  // namespace

LayerNorm layer_norm(
    const Tensor& x, const Tensor& y, const Tensor& weight_in, const Tensor& bias_in, double eps) {
  const Tensor weight = weight_in.contiguous(), bias = bias_in.contiguous();
  const int64_t channels = x.size(-1);
  TORCH_CHECK(
      x.sizes() == y.sizes() && weight.numel() == channels && bias.numel() == channels,
      "layer_norm: weight and bias must be (C,) for two (rows, C), got ", weight.sizes(), " and ",
      bias.sizes(), " for ", x.sizes(), " and ", y.sizes());
  const int64_t rows = channels == 0 ? 0 : x.numel() / channels;
  Tensor output = x.new_empty(x.sizes());
  Tensor normalised = output.new_empty(output.sizes());
  Tensor inverse = x.new_empty({rows});
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "add_layer_norm", [&] {
    const LayerNormCall<scalar_t> call{
        channels,
        eps,
        x.const_data_ptr<scalar_t>(),
        y.const_data_ptr<scalar_t>(),
        output.data_ptr<scalar_t>(),
        normalised.data_ptr<scalar_t>(),
        inverse.data_ptr<scalar_t>(),
        weight.const_data_ptr<scalar_t>(),
        bias.const_data_ptr<scalar_t>()};
    for_rows(rows, [&](int64_t, int64_t begin, int64_t end) {
      PSF_CALL_KERNEL(layer_norm, call, begin, end)
    });
  });
  return {output, normalised, inverse};
}

LayerNormGradients layer_norm_backward(
    const Tensor& grad_output,
    const Tensor& normalised,
    const Tensor& inverse,
    const Tensor& weight_in) {
  const Tensor weight = weight_in.contiguous();
  const int64_t channels = weight.numel();
  const int64_t rows = inverse.numel();
  Tensor grad_input = normalised.new_empty(normalised.sizes());
  // (tasks, 2, channels): what each task adds to the gradients of weight and bias.
  Tensor parts = normalised.new_zeros({tasks_of(rows), 2, channels});
  AT_DISPATCH_FLOATING_TYPES(normalised.scalar_type(), "add_layer_norm_backward", [&] {
    const LayerNormBackwardCall<scalar_t> call{
        channels,
        grad_output.const_data_ptr<scalar_t>(),
        normalised.const_data_ptr<scalar_t>(),
        inverse.const_data_ptr<scalar_t>(),
        weight.const_data_ptr<scalar_t>(),
        grad_input.data_ptr<scalar_t>()};
    scalar_t* sums = parts.data_ptr<scalar_t>();
    for_rows(rows, [&](int64_t task, int64_t begin, int64_t end) {
      scalar_t* own = sums + task * 2 * channels;
      PSF_CALL_KERNEL(layer_norm_backward, call, begin, end, own, own + channels)
    });
  });
  const Tensor sums = parts.sum(0);
  return {grad_input, sums[0], sums[1]};
}

}  // namespace psf
