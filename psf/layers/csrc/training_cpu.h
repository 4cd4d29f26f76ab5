// What the operators of training on a CPU (autograd_cpu.cpp) are made of: functions of tensors without
// a graph. Each splits its work among threads and calls the kernels of the chosen
// instruction set; none depends on the number of threads.
//
// Tensors are float32 or float64, all of one type, and any strides will do unless said otherwise. Sizes
// and types that do not fit raise an error.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace psf {

// ---- scaled dot-product attention ------------------------------------------------------------

// q (N, Q, M, D), k and v (N, S, M, D), copied where the channels D of a head are not adjacent;
// visible (N, S) bool, false where nothing attends to, or none. Any size may be 0.
//
// Returns the output, contiguous (N, Q, M * D), and the logarithms of the sums of the exponentials
// of the scores, (N, M, Q), which the gradient needs. A query that sees no key gives 0 in both, as
// in torch's scaled_dot_product_attention.
std::tuple<at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const std::optional<at::Tensor>& visible);

// The gradients of q, k and v, contiguous in the shapes of these, from that of the output.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_output,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const std::optional<at::Tensor>& visible,
    const at::Tensor& output,
    const at::Tensor& log_sum);

// ---- layer normalisation of a sum ------------------------------------------------------------

// All rows are contiguous, (rows, C).
struct LayerNorm {
  at::Tensor output;
  at::Tensor normalised;  // (x + y - mean) / deviation
  at::Tensor inverse;  // (rows,) 1 / deviation
};

struct LayerNormGradients {
  at::Tensor input;  // of x and of y
  at::Tensor weight;
  at::Tensor bias;
};

// Layer normalisation of x + y.
LayerNorm layer_norm(
    const at::Tensor& x,
    const at::Tensor& y,
    const at::Tensor& weight,
    const at::Tensor& bias,
    double eps);

LayerNormGradients layer_norm_backward(
    const at::Tensor& grad_output,
    const at::Tensor& normalised,
    const at::Tensor& inverse,
    const at::Tensor& weight);

// ---- Dice loss of upsampled maps -------------------------------------------------------------

// maps (layers, G, h, w), targets (G, H, W). Returns the loss, twice the sum of mask * target, and
// the squared sums, each (layers, G).
std::tuple<at::Tensor, at::Tensor, at::Tensor> dice_forward(
    const at::Tensor& maps, const at::Tensor& targets, bool sigmoid, double eps);

// The gradient of the maps, from that of the loss.
at::Tensor dice_backward(
    const at::Tensor& grad,
    const at::Tensor& maps,
    const at::Tensor& targets,
    const at::Tensor& overlap,
    const at::Tensor& norms,
    bool sigmoid);

// ---- comparisons of boxes --------------------------------------------------------------------

// Two (..., 4) of (cx, cy, w, h). Returns L1 distances and generalised IoUs, both (...), and the
// IoUs' gradient by the boxes, or no tensor if it is not needed.
std::tuple<at::Tensor, at::Tensor, at::Tensor> compare_boxes(
    const at::Tensor& boxes, const at::Tensor& others, bool needs_gradient);

// The gradient by the boxes, from those by distances and IoUs.
at::Tensor compare_boxes_backward(
    const at::Tensor& by_distance,
    const at::Tensor& by_iou,
    const at::Tensor& boxes,
    const at::Tensor& others,
    const at::Tensor& iou_gradient);

// Matching costs of logits (layers, N, Q, K) and boxes (layers, N, Q, 4) with the things of N images,
// labels (G,) int64 and boxes (G, 4) each. Returns (layers, N, Q * most things of an image): every row
// begins with the (Q, G) costs of an image.
at::Tensor things_cost(
    const at::Tensor& logits,
    const at::Tensor& boxes,
    at::TensorList labels,
    at::TensorList gt_boxes,
    double class_weight,
    double l1_weight,
    double iou_weight,
    double alpha);

// ---- masks from attention logits -------------------------------------------------------------

// q (n, M, R, D), keys (n, M, S, D); heights and widths of L levels, with padding and without it;
// projection (L, M, M), bias (L, M), weight (L, M), mask_bias (1,). Returns (n, R, h, w) of the first
// level without padding.
at::Tensor mask_maps(
    const at::Tensor& q,
    const at::Tensor& keys,
    at::IntArrayRef padded,
    at::IntArrayRef valid,
    const at::Tensor& projection,
    const at::Tensor& bias,
    const at::Tensor& weight,
    const at::Tensor& mask_bias);

// The gradients of q, keys, projection, bias, weight and mask_bias.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> mask_maps_backward(
    const at::Tensor& grad_maps,
    const at::Tensor& q,
    const at::Tensor& keys,
    at::IntArrayRef padded,
    at::IntArrayRef valid,
    const at::Tensor& projection,
    const at::Tensor& bias,
    const at::Tensor& weight);

// ---- gradients -------------------------------------------------------------------------------

// The 2-norm of all elements of dense tensors, at least one, as a scalar of their type.
at::Tensor total_norm(at::TensorList tensors);

}  // namespace psf
