// Comparisons of boxes on a CPU, which are two dozen small operations in PyTorch: the losses of
// matched pairs with their gradient, and the matching cost of all pairs.
#include "training_cpu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

namespace psf {
namespace {

using at::Tensor;

// Least union and least hull, see generalized_box_iou in psf/layers/boxes.py.
constexpr double kLeastArea = 1e-6;

// One side of two boxes.
template <typename A>
struct Sides {
  // Of the axis of centre box[axis] and size box[axis + 2].
  Sides(const A* box, const A* other, int axis)
      : low(box[axis] - box[axis + 2] / 2),
        high(box[axis] + box[axis + 2] / 2),
        other_low(other[axis] - other[axis + 2] / 2),
        other_high(other[axis] + other[axis + 2] / 2),
        overlap(std::min(high, other_high) - std::max(low, other_low)),
        hull(std::max(high, other_high) - std::min(low, other_low)) {}

  A low, high, other_low, other_high, overlap, hull;
};

// A value that is at least some bound, and whether it is above by itself. NaN stays.
template <typename A>
struct AtLeast {
  AtLeast(A x, A bound) : value(x < bound ? bound : x), passes(x >= bound) {}

  A value;
  bool passes;
};

// 1 where x < y, 1/2 where they are equal: how autograd divides the gradient of a minimum.
template <typename A>
A share(A x, A y) {
  return x < y ? A(1) : x == y ? A(0.5) : A(0);
}

// The generalised IoU of two boxes (cx, cy, w, h) and, unless null, its gradient by the first.
template <typename A>
A generalized_iou(const A* box, const A* other, A* gradient) {
  const Sides<A> sides[2] = {{box, other, 0}, {box, other, 1}};
  const AtLeast<A> overlaps[2] = {{sides[0].overlap, 0}, {sides[1].overlap, 0}};
  const AtLeast<A> hulls[2] = {{sides[0].hull, 0}, {sides[1].hull, 0}};
  A areas[2] = {1, 1};
  for (const Sides<A>& side : sides) {
    areas[0] *= side.high - side.low;
    areas[1] *= side.other_high - side.other_low;
  }
  const A overlap = overlaps[0].value * overlaps[1].value;
  const AtLeast<A> whole(areas[0] + areas[1] - overlap, A(kLeastArea));  // the union
  const AtLeast<A> hull(hulls[0].value * hulls[1].value, A(kLeastArea));
  if (gradient) {
    const A by_whole =
        whole.passes ? 1 / hull.value - overlap / (whole.value * whole.value) : A(0);
    const A by_overlap = 1 / whole.value - by_whole;
    const A by_hull = hull.passes ? -whole.value / (hull.value * hull.value) : A(0);
    for (int axis = 0; axis < 2; ++axis) {
      const Sides<A>& side = sides[axis];
      const Sides<A>& across = sides[1 - axis];
      const A by_length = by_whole * (across.high - across.low);
      const A by_own_overlap =
          overlaps[axis].passes ? by_overlap * overlaps[1 - axis].value : A(0);
      const A by_own_hull = hulls[axis].passes ? by_hull * hulls[1 - axis].value : A(0);
      const A by_high = by_length + by_own_overlap * share(side.high, side.other_high) +
          by_own_hull * share(side.other_high, side.high);
      const A by_low = by_length + by_own_overlap * share(side.other_low, side.low) +
          by_own_hull * share(side.low, side.other_low);  // negative
      gradient[axis] = by_high - by_low;
      gradient[axis + 2] = (by_high + by_low) / 2;
    }
  }
  return overlap / whole.value - (hull.value - whole.value) / hull.value;
}

template <typename A>
A l1_distance(const A* box, const A* other) {
  A sum = 0;
  for (int i = 0; i < 4; ++i) sum += std::abs(box[i] - other[i]);
  return sum;
}

void check_types(const Tensor& tensor, const Tensor& expected, const char* name) {
  TORCH_CHECK(
      tensor.scalar_type() == expected.scalar_type(), name, ": all must be ",
      expected.scalar_type(), " as the first is, got ", tensor.scalar_type());
}

void check_pairs(const Tensor& boxes, const Tensor& others) {
  TORCH_CHECK(
      boxes.sizes() == others.sizes() && boxes.dim() > 0 && boxes.size(-1) == 4,
      "compare_boxes: both must be (..., 4), got ", boxes.sizes(), " and ", others.sizes());
  check_types(others, boxes, "compare_boxes");
}

// See focal_cost in psf/modeling/losses.py; its gamma is 2.
template <typename A>
A focal_cost(A logit, A alpha) {
  const A small = std::exp(-std::abs(logit));
  const A rest = std::log1p(small);
  const A likely = 1 / (1 + small), unlikely = small / (1 + small);
  const A yes = logit < 0 ? unlikely : likely;
  const A no = logit < 0 ? likely : unlikely;
  const A positive = no * no * (std::max(-logit, A(0)) + rest);
  const A negative = yes * yes * (std::max(logit, A(0)) + rest);
  return alpha * positive - (1 - alpha) * negative;
}

// The things of one image.
template <typename A>
struct Things {
  const int64_t* labels;
  const A* boxes;
  int64_t count;
};

void check_things(
    const Tensor& logits, const Tensor& boxes, at::TensorList labels, at::TensorList gt_boxes) {
  TORCH_CHECK(
      logits.dim() == 4 && boxes.dim() == 4 && boxes.size(3) == 4 &&
          logits.sizes().slice(0, 3) == boxes.sizes().slice(0, 3),
      "things_cost: logits must be (layers, N, Q, K) and boxes (layers, N, Q, 4), got ",
      logits.sizes(), " and ", boxes.sizes());
  check_types(boxes, logits, "things_cost");
  const auto count = static_cast<size_t>(logits.size(1));
  TORCH_CHECK(
      labels.size() == count && gt_boxes.size() == count, "things_cost: expected the things of ",
      count, " images, got labels of ", labels.size(), " and boxes of ", gt_boxes.size());
  for (size_t i = 0; i < count; ++i) {
    TORCH_CHECK(
        labels[i].is_cpu() && labels[i].scalar_type() == at::kLong && labels[i].dim() == 1 &&
            gt_boxes[i].is_cpu() && gt_boxes[i].dim() == 2 && gt_boxes[i].size(1) == 4 &&
            gt_boxes[i].size(0) == labels[i].size(0),
        "things_cost: labels must be (G,) int64 and their boxes (G, 4), got ",
        labels[i].scalar_type(), " ", labels[i].sizes(), " and ", gt_boxes[i].sizes());
    check_types(gt_boxes[i], logits, "things_cost");
    const int64_t* label = labels[i].contiguous().const_data_ptr<int64_t>();
    for (int64_t thing = 0; thing < labels[i].size(0); ++thing) {
      TORCH_CHECK_INDEX(
          label[thing] >= 0 && label[thing] < logits.size(3), "things_cost: label ", label[thing],
          " of ", logits.size(3), " classes");
    }
  }
}

// Queries of a task.
constexpr int64_t kQueries = 64;

}  // namespace

std::tuple<Tensor, Tensor, Tensor> compare_boxes(
    const Tensor& boxes_in, const Tensor& others_in, bool needs_gradient) {
  check_pairs(boxes_in, others_in);
  const Tensor boxes = boxes_in.contiguous(), others = others_in.contiguous();
  Tensor distance = boxes.new_empty(boxes.sizes().slice(0, boxes.dim() - 1));
  Tensor iou = distance.new_empty(distance.sizes());
  Tensor gradient = needs_gradient ? boxes.new_empty(boxes.sizes()) : Tensor();
  AT_DISPATCH_FLOATING_TYPES(boxes.scalar_type(), "compare_boxes", [&] {
    const auto* box = boxes.const_data_ptr<scalar_t>();
    const auto* other = others.const_data_ptr<scalar_t>();
    auto* distances = distance.data_ptr<scalar_t>();
    auto* ious = iou.data_ptr<scalar_t>();
    auto* gradients = needs_gradient ? gradient.data_ptr<scalar_t>() : nullptr;
    for (int64_t i = 0; i < distance.numel(); ++i) {
      distances[i] = l1_distance(box + 4 * i, other + 4 * i);
      ious[i] = generalized_iou(
          box + 4 * i, other + 4 * i, needs_gradient ? gradients + 4 * i : nullptr);
    }
  });
  return {distance, iou, gradient};
}

Tensor compare_boxes_backward(
    const Tensor& by_distance_in,
    const Tensor& by_iou_in,
    const Tensor& boxes_in,
    const Tensor& others_in,
    const Tensor& iou_gradient) {
  const Tensor by_distance = by_distance_in.contiguous(), by_iou = by_iou_in.contiguous();
  const Tensor boxes = boxes_in.contiguous(), others = others_in.contiguous();
  Tensor gradient = boxes.new_empty(boxes.sizes());
  AT_DISPATCH_FLOATING_TYPES(boxes.scalar_type(), "compare_boxes_backward", [&] {
    const auto* box = boxes.const_data_ptr<scalar_t>();
    const auto* other = others.const_data_ptr<scalar_t>();
    const auto* distances = by_distance.const_data_ptr<scalar_t>();
    const auto* ious = by_iou.const_data_ptr<scalar_t>();
    const auto* iou_gradients = iou_gradient.const_data_ptr<scalar_t>();
    auto* gradients = gradient.data_ptr<scalar_t>();
    for (int64_t i = 0; i < boxes.numel(); ++i) {
      const scalar_t sign = static_cast<scalar_t>((box[i] > other[i]) - (box[i] < other[i]));
      gradients[i] = distances[i / 4] * sign + ious[i / 4] * iou_gradients[i];
    }
  });
  return gradient;
}

Tensor things_cost(
    const Tensor& logits,
    const Tensor& boxes,
    at::TensorList labels,
    at::TensorList gt_boxes,
    double class_weight,
    double l1_weight,
    double iou_weight,
    double alpha) {
  check_things(logits, boxes, labels, gt_boxes);
  const Tensor own_logits = logits.contiguous(), own_boxes = boxes.contiguous();
  const int64_t num_images = logits.size(1), num_queries = logits.size(2);
  const int64_t num_classes = logits.size(3);
  std::vector<Tensor> held;  // what the pointers below point to
  int64_t most = 0;
  for (const Tensor& image : labels) most = std::max(most, image.size(0));
  Tensor cost = logits.new_zeros({logits.size(0), num_images, num_queries * most});
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "things_cost", [&] {
    std::vector<Things<scalar_t>> things;
    for (int64_t image = 0; image < num_images; ++image) {
      const Tensor label = held.emplace_back(labels[image].contiguous());
      const Tensor box = held.emplace_back(gt_boxes[image].contiguous());
      things.push_back(
          {label.const_data_ptr<int64_t>(), box.const_data_ptr<scalar_t>(), label.size(0)});
    }
    const auto* logit = own_logits.const_data_ptr<scalar_t>();
    const auto* box = own_boxes.const_data_ptr<scalar_t>();
    auto* costs = cost.data_ptr<scalar_t>();
    const auto by_class = static_cast<scalar_t>(class_weight);
    const auto by_distance = static_cast<scalar_t>(l1_weight);
    const auto by_iou = static_cast<scalar_t>(iou_weight);
    const int64_t count = logits.size(0) * num_images * num_queries;
    at::parallel_for(0, count, kQueries, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = i / num_queries, query = i % num_queries;
        const Things<scalar_t>& image = things[row % num_images];
        scalar_t* out = costs + row * num_queries * most + query * image.count;
        for (int64_t thing = 0; thing < image.count; ++thing) {
          const scalar_t* other = image.boxes + 4 * thing;
          const scalar_t own = logit[i * num_classes + image.labels[thing]];
          out[thing] = by_class * focal_cost(own, static_cast<scalar_t>(alpha)) +
              by_distance * l1_distance(box + 4 * i, other) -
              by_iou * generalized_iou<scalar_t>(box + 4 * i, other, nullptr);
        }
      }
    });
  });
  return cost;
}

}  // namespace psf
