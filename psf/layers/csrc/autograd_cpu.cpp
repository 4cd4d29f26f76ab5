// Operators of training on a CPU as nodes of the autograd graph, and their registration: losses,
// attention, and blocks of a transformer, each with its residual and layer normalisation as one node.
// A block of a small model is a dozen calls of microseconds each, of which most is dispatch and
// bookkeeping, hence gradients that are written out. psf/layers/ decides what runs here.
//
// All in one file, since the headers of autograd take longer to compile than what stands here; the
// arithmetic is in the files that training_cpu.h declares, which do without them.
//
// Tensors are float32 or float64, those of blocks (N, Q, C).
#include "cpu_capability.h"
#include "ms_deform_attn_inputs.h"
#include "training_cpu.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>

namespace psf {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- losses and attention --------------------------------------------------------------------

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

std::tuple<Tensor, Tensor> attention_autograd(
    const Tensor& q, const Tensor& k, const Tensor& v, const optional<Tensor>& visible) {
  const variable_list results = Attention::apply(q, k, v, visible);
  return {results[0], results[1]};
}

class UpsampledDiceLoss : public torch::autograd::Function<UpsampledDiceLoss> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& maps,
      const Tensor& targets,
      bool sigmoid,
      double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [loss, overlap, norms] = dice_forward(maps, targets, sigmoid, eps);
    ctx->save_for_backward({maps, targets, overlap, norms});
    ctx->saved_data["sigmoid"] = sigmoid;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor grad = dice_backward(
        grad_outputs[0], saved[0], saved[1], saved[2], saved[3],
        ctx->saved_data["sigmoid"].toBool());
    return {grad, Tensor(), Tensor(), Tensor()};
  }
};

Tensor upsampled_dice_loss_cpu(
    const Tensor& maps, const Tensor& targets, bool sigmoid, double eps) {
  return std::get<0>(dice_forward(maps, targets, sigmoid, eps));
}

Tensor upsampled_dice_loss_autograd(
    const Tensor& maps, const Tensor& targets, bool sigmoid, double eps) {
  return UpsampledDiceLoss::apply(maps, targets, sigmoid, eps);
}

class CompareBoxes : public torch::autograd::Function<CompareBoxes> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& boxes, const Tensor& others) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [distance, iou, gradient] = compare_boxes(boxes, others, true);
    ctx->save_for_backward({boxes, others, gradient});
    return {distance, iou};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor gradient = compare_boxes_backward(
        grad_outputs[0], grad_outputs[1], saved[0], saved[1], saved[2]);
    return {gradient, Tensor()};
  }
};

std::tuple<Tensor, Tensor> compare_boxes_cpu(const Tensor& boxes, const Tensor& others) {
  const auto [distance, iou, _] = compare_boxes(boxes, others, false);
  return {distance, iou};
}

std::tuple<Tensor, Tensor> compare_boxes_autograd(const Tensor& boxes, const Tensor& others) {
  const variable_list outputs = CompareBoxes::apply(boxes, others);
  return {outputs[0], outputs[1]};
}

// ---- linear layers ---------------------------------------------------------------------------

Tensor rows_of(const Tensor& x) {
  return x.contiguous().view({-1, x.size(-1)});
}

struct Linear {
  Tensor weight;  // (C', C)
  Tensor bias;  // (C',)
  bool convolve;  // as a convolution over one pixel, see psf/layers/linear.py
};

struct LinearGradients {
  Tensor input;
  Tensor weight;
  Tensor bias;
};

constexpr int64_t kLeastConvolvedRows = 512;  // LEAST_ROWS of psf/layers/linear.py

bool convolves(const Linear& layer, const Tensor& rows) {
  return layer.convolve && rows.scalar_type() == at::kFloat &&
      rows.size(0) >= kLeastConvolvedRows;
}

Tensor as_pixels(const Tensor& rows) {
  return rows.view({1, 1, rows.size(0), rows.size(1)}).permute({0, 3, 1, 2});
}

// Contiguous, whatever the order in memory that the convolution chose.
Tensor as_rows(const Tensor& pixels) {
  return pixels.permute({0, 2, 3, 1}).contiguous().view({pixels.size(3), pixels.size(1)});
}

Tensor as_kernel(const Tensor& weight) {
  return weight.view({weight.size(0), weight.size(1), 1, 1});
}

Tensor linear(const Linear& layer, const Tensor& rows) {
  if (!convolves(layer, rows)) {
    return at::addmm(layer.bias, rows, layer.weight.t());
  }
  return as_rows(at::convolution(
      as_pixels(rows), as_kernel(layer.weight), layer.bias, {1, 1}, {0, 0}, {1, 1}, false, {0, 0}, 1));
}

LinearGradients gradients(const Linear& layer, const Tensor& rows, const Tensor& grad) {
  if (!convolves(layer, rows)) {
    return {grad.mm(layer.weight), grad.t().mm(rows), grad.sum(0)};
  }
  const int64_t outputs = layer.weight.size(0);
  const auto [input, weight, bias] = at::convolution_backward(
      as_pixels(grad), as_pixels(rows), as_kernel(layer.weight), at::IntArrayRef{outputs}, {1, 1},
      {0, 0}, {1, 1}, false, {0, 0}, 1, {true, true, true});
  return {as_rows(input), weight.view_as(layer.weight), bias};
}

Tensor split_heads(const Tensor& x, int64_t heads) {
  return x.view({x.size(0), x.size(1), heads, x.size(2) / heads});
}

// ---- the blocks ------------------------------------------------------------------------------

void refuse_second_derivative() {
  TORCH_CHECK(
      !at::GradMode::is_enabled(), "psf: second derivatives of transformer blocks are not implemented");
}

// LayerNorm(x + W2 act(W1 x + b1) + b2).
class FeedForwardBlock : public torch::autograd::Function<FeedForwardBlock> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& x,
      const Tensor& weight1,
      const Tensor& bias1,
      const Tensor& weight2,
      const Tensor& bias2,
      const Tensor& norm_weight,
      const Tensor& norm_bias,
      double eps,
      bool gelu,
      bool convolve) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor rows = rows_of(x);
    Tensor first = linear({weight1, bias1, convolve}, rows);
    const Tensor hidden = gelu ? at::gelu(first) : first.relu_();
    const Tensor output = linear({weight2, bias2, convolve}, hidden);
    const LayerNorm norm = layer_norm(rows, output, norm_weight, norm_bias, eps);
    ctx->save_for_backward(
        {x, gelu ? first : Tensor(), hidden, norm.normalised, norm.inverse, weight1, weight2,
         norm_weight});
    ctx->saved_data["convolve"] = convolve;
    return norm.output.view(x.sizes());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    refuse_second_derivative();
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor rows = rows_of(saved[0]);
    const Tensor& before_gelu = saved[1];
    const Tensor& hidden = saved[2];
    const bool convolve = ctx->saved_data["convolve"].toBool();
    const LayerNormGradients norm =
        layer_norm_backward(rows_of(grad_outputs[0]), saved[3], saved[4], saved[7]);
    const LinearGradients second = gradients({saved[6], {}, convolve}, hidden, norm.input);
    const Tensor grad_linear = before_gelu.defined()
        ? at::gelu_backward(second.input, before_gelu)
        : at::threshold_backward(second.input, hidden, 0);
    LinearGradients first = gradients({saved[5], {}, convolve}, rows, grad_linear);
    return {
        first.input.add_(norm.input).view(grad_outputs[0].sizes()),
        first.weight, first.bias, second.weight, second.bias, norm.weight, norm.bias,
        Tensor(), Tensor(), Tensor()};
  }
};

// The gradient of a position, which may broadcast, from that of the rows of query + position.
Tensor position_gradient(const Tensor& grad_rows, const Tensor& position, at::IntArrayRef sizes) {
  return at::sum_to(grad_rows.view(sizes), position.sizes());
}

// LayerNorm(x + attention of x + position to itself, with values x).
class SelfAttentionBlock : public torch::autograd::Function<SelfAttentionBlock> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& query,
      const optional<Tensor>& position,
      const Tensor& in_weight,
      const Tensor& in_bias,
      const Tensor& out_weight,
      const Tensor& out_bias,
      const Tensor& norm_weight,
      const Tensor& norm_bias,
      double eps,
      int64_t heads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const int64_t images = query.size(0);
    const int64_t queries = query.size(1);
    const int64_t dim = query.size(2);
    const Tensor rows = rows_of(query);
    const Tensor placed = position ? rows_of(at::add(query, *position)) : rows;
    const auto part = [&](int64_t start, int64_t size, const Tensor& x) {
      return at::addmm(in_bias.narrow(0, start, size), x, in_weight.narrow(0, start, size).t());
    };
    const Tensor qk = part(0, 2 * dim, placed).view({images, queries, 2, heads, dim / heads});
    const Tensor v = part(2 * dim, dim, rows).view({images, queries, heads, dim / heads});
    const auto [attended, log_sum] =
        attention_forward(qk.select(2, 0), qk.select(2, 1), v, std::nullopt);
    const Tensor output = linear({out_weight, out_bias, false}, rows_of(attended));
    const LayerNorm norm = layer_norm(rows, output, norm_weight, norm_bias, eps);
    ctx->save_for_backward(
        {query, position ? placed : Tensor(), position.value_or(Tensor()), qk, v, attended,
         log_sum, norm.normalised, norm.inverse, in_weight, out_weight, norm_weight});
    return norm.output.view(query.sizes());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    refuse_second_derivative();
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor rows = rows_of(saved[0]);
    const Tensor& position = saved[2];
    const Tensor& placed = position.defined() ? saved[1] : rows;
    const Tensor& qk = saved[3];
    const Tensor& v = saved[4];
    const Tensor& in_weight = saved[9];
    const int64_t dim = rows.size(1);
    const LayerNormGradients norm =
        layer_norm_backward(rows_of(grad_outputs[0]), saved[7], saved[8], saved[11]);
    const LinearGradients out =
        gradients({saved[10], {}, false}, rows_of(saved[5]), norm.input);
    const auto [grad_q, grad_k, grad_v] = attention_backward(
        out.input.view(saved[5].sizes()), qk.select(2, 0), qk.select(2, 1), v, std::nullopt,
        saved[5], saved[6]);
    const Tensor grad_qk = at::cat({grad_q.view(rows.sizes()), grad_k.view(rows.sizes())}, 1);
    const Tensor grad_values = grad_v.view(rows.sizes());
    Tensor grad_weight = at::empty_like(in_weight);
    Tensor grad_weight_qk = grad_weight.narrow(0, 0, 2 * dim);
    Tensor grad_weight_v = grad_weight.narrow(0, 2 * dim, dim);
    at::mm_out(grad_weight_qk, grad_qk.t(), placed);
    at::mm_out(grad_weight_v, grad_values.t(), rows);
    const Tensor grad_placed = grad_qk.mm(in_weight.narrow(0, 0, 2 * dim));
    const Tensor grad_query =
        at::addmm(norm.input, grad_values, in_weight.narrow(0, 2 * dim, dim)).add_(grad_placed);
    return {
        grad_query.view(grad_outputs[0].sizes()),
        position.defined() ? position_gradient(grad_placed, position, grad_outputs[0].sizes())
                           : Tensor(),
        grad_weight, at::cat({grad_qk.sum(0), grad_values.sum(0)}),
        out.weight, out.bias, norm.weight, norm.bias, Tensor(), Tensor()};
  }
};

// LayerNorm(query + attention to the features), and the projected queries and keys.
class CrossAttentionBlock : public torch::autograd::Function<CrossAttentionBlock> {
 public:
  static variable_list forward(
      AutogradContext* ctx,
      const Tensor& query,
      const Tensor& features,
      const optional<Tensor>& visible,
      const Tensor& q_weight,
      const Tensor& q_bias,
      const Tensor& k_weight,
      const Tensor& k_bias,
      const Tensor& v_weight,
      const Tensor& v_bias,
      const Tensor& out_weight,
      const Tensor& out_bias,
      const Tensor& norm_weight,
      const Tensor& norm_bias,
      double eps,
      int64_t heads,
      bool convolve) {
    TORCH_CHECK(
        query.dim() == 3 && features.dim() == 3 && query.size(0) == features.size(0) &&
            query.size(2) == features.size(2),
        "cross_attention_block: query must be (N, Q, C) and features (N, S, C), got ", query.sizes(),
        " and ", features.sizes());
    TORCH_CHECK(
        !visible || visible->sizes() == features.sizes().slice(0, 2),
        "cross_attention_block: visible must be (N, S) = ", features.sizes().slice(0, 2), ", got ",
        visible ? visible->sizes() : at::IntArrayRef());
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    const Tensor rows = rows_of(query);
    const Tensor keys = rows_of(features);
    const Tensor q = linear({q_weight, q_bias, false}, rows).view(query.sizes());
    const Tensor k = linear({k_weight, k_bias, convolve}, keys).view(features.sizes());
    const Tensor v = linear({v_weight, v_bias, convolve}, keys).view(features.sizes());
    const auto [attended, log_sum] = attention_forward(
        split_heads(q, heads), split_heads(k, heads), split_heads(v, heads), visible);
    const Tensor output = linear({out_weight, out_bias, false}, rows_of(attended));
    const LayerNorm norm = layer_norm(rows, output, norm_weight, norm_bias, eps);
    ctx->save_for_backward(
        {query, features, q, k, v, attended, log_sum, norm.normalised, norm.inverse,
         q_weight, k_weight, v_weight, out_weight, norm_weight,
         visible.value_or(Tensor())});
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["convolve"] = convolve;
    return {norm.output.view(query.sizes()), q, k};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    refuse_second_derivative();
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor rows = rows_of(saved[0]);
    const Tensor keys = rows_of(saved[1]);
    const Tensor& q = saved[2];
    const Tensor& k = saved[3];
    const int64_t heads = ctx->saved_data["heads"].toInt();
    const bool convolve = ctx->saved_data["convolve"].toBool();
    const Tensor grad_output =
        grad_outputs[0].defined() ? rows_of(grad_outputs[0]) : at::zeros_like(rows);
    const LayerNormGradients norm =
        layer_norm_backward(grad_output, saved[7], saved[8], saved[13]);
    const LinearGradients out =
        gradients({saved[12], {}, false}, rows_of(saved[5]), norm.input);
    const optional<Tensor> visible = saved[14].defined() ? optional<Tensor>(saved[14]) : std::nullopt;
    auto [grad_q, grad_k, grad_v] = attention_backward(
        out.input.view(saved[5].sizes()), split_heads(q, heads), split_heads(k, heads),
        split_heads(saved[4], heads), visible, saved[5], saved[6]);
    // What the masks made of the projections adds.
    if (grad_outputs[1].defined()) {
      grad_q.view(q.sizes()).add_(grad_outputs[1]);
    }
    if (grad_outputs[2].defined()) {
      grad_k.view(k.sizes()).add_(grad_outputs[2]);
    }
    LinearGradients by_q = gradients({saved[9], {}, false}, rows, grad_q.view(rows.sizes()));
    LinearGradients by_k = gradients({saved[10], {}, convolve}, keys, grad_k.view(keys.sizes()));
    const LinearGradients by_v = gradients({saved[11], {}, convolve}, keys, grad_v.view(keys.sizes()));
    return {
        by_q.input.add_(norm.input).view(q.sizes()),
        by_k.input.add_(by_v.input).view(k.sizes()),
        Tensor(),
        by_q.weight, by_q.bias, by_k.weight, by_k.bias, by_v.weight, by_v.bias,
        out.weight, out.bias, norm.weight, norm.bias, Tensor(), Tensor(), Tensor()};
  }
};

Tensor sample(
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& reference_points,
    const Tensor& offsets,
    const Tensor& logits) {
  using Signature =
      Tensor(const Tensor&, at::IntArrayRef, const Tensor&, const Tensor&, const Tensor&, bool);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("psf::ms_deform_attn_fused", "")
                             .typed<Signature>();
  return op.call(value, spatial_shapes, reference_points, offsets, logits, false);
}

FusedGradients sample_gradients(
    const Tensor& grad,
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& reference_points,
    const Tensor& offsets,
    const Tensor& logits,
    bool by_reference) {
  using Signature = FusedGradients(
      const Tensor&, const Tensor&, at::IntArrayRef, const Tensor&, const Tensor&, const Tensor&,
      std::array<bool, 4>, bool);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("psf::ms_deform_attn_fused_backward", "")
                             .typed<Signature>();
  return op.call(
      grad, value, spatial_shapes, reference_points, offsets, logits,
      {true, by_reference, true, true}, false);
}

// LayerNorm(query + deformable attention of query + position to the features).
class DeformableAttentionBlock : public torch::autograd::Function<DeformableAttentionBlock> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& query,
      const Tensor& position,
      const Tensor& reference_points,
      const Tensor& features,
      at::IntArrayRef spatial_shapes,
      const optional<Tensor>& padding_mask,
      const Tensor& offset_weight,
      const Tensor& offset_bias,
      const Tensor& logit_weight,
      const Tensor& logit_bias,
      const Tensor& value_weight,
      const Tensor& value_bias,
      const Tensor& out_weight,
      const Tensor& out_bias,
      const Tensor& norm_weight,
      const Tensor& norm_bias,
      double eps,
      int64_t heads,
      bool convolve) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const int64_t images = query.size(0);
    const int64_t queries = query.size(1);
    const int64_t levels = static_cast<int64_t>(spatial_shapes.size()) / 2;
    const int64_t points = logit_weight.size(0) / (heads * levels);
    const Tensor rows = rows_of(query);
    const Tensor placed = rows_of(at::add(query, position));
    Tensor value = split_heads(
        linear({value_weight, value_bias, convolve}, rows_of(features)).view(features.sizes()), heads);
    if (padding_mask) {
      value.masked_fill_(padding_mask->unsqueeze(-1).unsqueeze(-1), 0);
    }
    const Tensor offsets = linear({offset_weight, offset_bias, convolve}, placed)
                               .view({images, queries, heads, levels, points, 2});
    const Tensor logits = linear({logit_weight, logit_bias, convolve}, placed)
                              .view({images, queries, heads, levels, points});
    const Tensor sampled = sample(value, spatial_shapes, reference_points, offsets, logits);
    const Tensor output = linear({out_weight, out_bias, convolve}, rows_of(sampled));
    const LayerNorm norm = layer_norm(rows, output, norm_weight, norm_bias, eps);
    ctx->save_for_backward(
        {placed, position, reference_points, features, value, offsets, logits, sampled,
         norm.normalised, norm.inverse, offset_weight, logit_weight, value_weight, out_weight,
         norm_weight, padding_mask.value_or(Tensor())});
    ctx->saved_data["spatial_shapes"] = spatial_shapes;
    ctx->saved_data["convolve"] = convolve;
    return norm.output.view(query.sizes());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    refuse_second_derivative();
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& placed = saved[0];
    const Tensor feature_rows = rows_of(saved[3]);
    const Tensor& value = saved[4];
    const int64_t dim = placed.size(1);
    const bool convolve = ctx->saved_data["convolve"].toBool();
    const LayerNormGradients norm =
        layer_norm_backward(rows_of(grad_outputs[0]), saved[8], saved[9], saved[14]);
    const LinearGradients out =
        gradients({saved[13], {}, convolve}, saved[7].view({-1, dim}), norm.input);
    auto [grad_value, grad_reference, grad_offsets, grad_logits] = sample_gradients(
        out.input.view(saved[7].sizes()), value, ctx->saved_data["spatial_shapes"].toIntVector(),
        saved[2], saved[5], saved[6], ctx->needs_input_grad(2));
    if (saved[15].defined()) {
      grad_value.masked_fill_(saved[15].unsqueeze(-1).unsqueeze(-1), 0);
    }
    const auto as_rows_of = [](const Tensor& grad, const Tensor& weight) {
      return grad.reshape({-1, weight.size(0)});
    };
    LinearGradients by_offset =
        gradients({saved[10], {}, convolve}, placed, as_rows_of(grad_offsets, saved[10]));
    const LinearGradients by_logit =
        gradients({saved[11], {}, convolve}, placed, as_rows_of(grad_logits, saved[11]));
    const LinearGradients by_value =
        gradients({saved[12], {}, convolve}, feature_rows, as_rows_of(grad_value, saved[12]));
    const Tensor grad_placed = by_offset.input.add_(by_logit.input);
    const auto sizes = grad_outputs[0].sizes();
    return {
        at::add(grad_placed, norm.input).view(sizes),
        position_gradient(grad_placed, saved[1], sizes),
        ctx->needs_input_grad(2) ? grad_reference : Tensor(),
        by_value.input.view({value.size(0), value.size(1), dim}),
        Tensor(), Tensor(),
        by_offset.weight, by_offset.bias, by_logit.weight, by_logit.bias,
        by_value.weight, by_value.bias, out.weight, out.bias, norm.weight, norm.bias,
        Tensor(), Tensor(), Tensor()};
  }
};

// ---- registration ----------------------------------------------------------------------------

// The function that an operator is registered as: Block::apply with the arguments of Block::forward.
template <typename Block, typename... Args>
auto operator_of(Tensor (*)(AutogradContext*, Args...)) {
  return +[](Args... args) -> Tensor { return Block::apply(args...); };
}

template <typename Block, typename... Args>
auto operator_of(variable_list (*)(AutogradContext*, Args...)) {
  return +[](Args... args) -> std::tuple<Tensor, Tensor, Tensor> {
    const variable_list outputs = Block::apply(args...);
    return {outputs[0], outputs[1], outputs[2]};
  };
}

void register_blocks(torch::Library& m) {
  m.impl("feed_forward_block", operator_of<FeedForwardBlock>(&FeedForwardBlock::forward));
  m.impl("self_attention_block", operator_of<SelfAttentionBlock>(&SelfAttentionBlock::forward));
  m.impl("cross_attention_block", operator_of<CrossAttentionBlock>(&CrossAttentionBlock::forward));
  m.impl("deformable_attention_block", operator_of<DeformableAttentionBlock>(&DeformableAttentionBlock::forward));
}

std::string cpu_capability() {
  return name_of(capability());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(psf, m) {
  m.def("cpu_capability() -> str", &cpu_capability);
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? visible) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_output, Tensor q, Tensor k, Tensor v, Tensor? visible, "
      "Tensor output, Tensor log_sum) -> (Tensor, Tensor, Tensor)");
  m.def("upsampled_dice_loss(Tensor maps, Tensor targets, bool sigmoid, float eps) -> Tensor");
  m.def("compare_boxes(Tensor boxes, Tensor others) -> (Tensor, Tensor)");
  m.def(
      "things_cost(Tensor logits, Tensor boxes, Tensor[] labels, Tensor[] gt_boxes, "
      "float class_weight, float l1_weight, float iou_weight, float alpha) -> Tensor");
  m.def(
      "mask_maps(Tensor q, Tensor k, int[] padded, int[] valid, Tensor projection, Tensor bias, "
      "Tensor weight, Tensor mask_bias) -> Tensor");
  m.def(
      "mask_maps_backward(Tensor grad, Tensor q, Tensor k, int[] padded, int[] valid, "
      "Tensor projection, Tensor bias, Tensor weight) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("total_norm(Tensor[] tensors) -> Tensor");
  m.def(
      "feed_forward_block(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
      "Tensor norm_weight, Tensor norm_bias, float eps, bool gelu, bool convolve) -> Tensor");
  m.def(
      "self_attention_block(Tensor query, Tensor? position, Tensor in_weight, Tensor in_bias, "
      "Tensor out_weight, Tensor out_bias, Tensor norm_weight, Tensor norm_bias, float eps, "
      "int heads) -> Tensor");
  m.def(
      "cross_attention_block(Tensor query, Tensor features, Tensor? visible, Tensor q_weight, "
      "Tensor q_bias, Tensor k_weight, Tensor k_bias, Tensor v_weight, Tensor v_bias, "
      "Tensor out_weight, Tensor out_bias, Tensor norm_weight, Tensor norm_bias, float eps, "
      "int heads, bool convolve) -> (Tensor, Tensor, Tensor)");
  m.def(
      "deformable_attention_block(Tensor query, Tensor position, Tensor reference_points, "
      "Tensor features, int[] spatial_shapes, Tensor? padding_mask, Tensor offset_weight, "
      "Tensor offset_bias, Tensor logit_weight, Tensor logit_bias, Tensor value_weight, "
      "Tensor value_bias, Tensor out_weight, Tensor out_bias, Tensor norm_weight, "
      "Tensor norm_bias, float eps, int heads, bool convolve) -> Tensor");
}

TORCH_LIBRARY_IMPL(psf, CPU, m) {
  m.impl("attention", &attention_forward);
  m.impl("attention_backward", &attention_backward);
  m.impl("upsampled_dice_loss", &upsampled_dice_loss_cpu);
  m.impl("compare_boxes", &compare_boxes_cpu);
  m.impl("things_cost", &things_cost);
  m.impl("mask_maps", &mask_maps);
  m.impl("mask_maps_backward", &mask_maps_backward);
  m.impl("total_norm", &total_norm);
  register_blocks(m);  // tensors of torch.inference_mode
}

TORCH_LIBRARY_IMPL(psf, AutogradCPU, m) {
  m.impl("attention", &attention_autograd);
  m.impl("upsampled_dice_loss", &upsampled_dice_loss_autograd);
  m.impl("compare_boxes", &compare_boxes_autograd);
  register_blocks(m);
}

}  // namespace psf
