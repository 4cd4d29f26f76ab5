// Scaled dot-product attention on a CPU for the other operators of the extension: the arithmetic of
// psf::attention, without its graph.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace psf {

// q (N, Q, M, D), k and v (N, S, M, D), float32 or float64, with any strides (copied where the
// channels D of a head are not adjacent); visible (N, S) bool, false where nothing attends to, or
// none. Any size may be 0.
//
// Returns the output, contiguous (N, Q, M * D), and the logarithms of the sums of the exponentials
// of the scores, (N, M, Q), which the gradient needs. A query that sees no key gives 0 in both, as
// in torch's scaled_dot_product_attention.
std::tuple<at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const std::optional<at::Tensor>& visible);

// The gradients of q, k and v, contiguous in the shapes of these, from that of the output, which may
// have any strides. Neither they nor the output depend on the number of threads.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_output,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const std::optional<at::Tensor>& visible,
    const at::Tensor& output,
    const at::Tensor& log_sum);

}  // namespace psf
