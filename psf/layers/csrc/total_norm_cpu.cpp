// The norm of all gradients of a model on a CPU: one operator, however many tensors they are.
#include "training_cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace psf {
namespace {

using at::Tensor;

// Elements of a task. Sums of tasks are added in their order, which so does not depend on the
// number of threads.
constexpr int64_t kElements = 1 << 15;

// Elements whose squares are added side by side.
constexpr int64_t kLanes = 16;

// Part of a tensor.
template <typename A>
struct Part {
  const A* data;
  int64_t size;
};

// In double precision: it holds the square of any float, and the sum of millions of them to more
// digits than a float has.
template <typename A>
double sum_of_squares(const Part<A>& part) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= part.size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double value = part.data[i + lane];
      lanes[lane] += value * value;
    }
  }
  for (; i < part.size; ++i) {
    const double value = part.data[i];
    lanes[0] += value * value;
  }
  return std::accumulate(lanes, lanes + kLanes, 0.0);
}

// Tensors are read in the order of their memory.
template <typename A>
double norm_of(const std::vector<Tensor>& tensors) {
  std::vector<Part<A>> parts;
  for (const Tensor& tensor : tensors) {
    const A* data = tensor.const_data_ptr<A>();
    for (int64_t i = 0; i < tensor.numel(); i += kElements) {
      parts.push_back({data + i, std::min(kElements, tensor.numel() - i)});
    }
  }
  std::vector<double> sums(parts.size());
  const auto count = static_cast<int64_t>(parts.size());
  at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) sums[i] = sum_of_squares(parts[i]);
  });
  return std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0));
}

}  // namespace

Tensor total_norm(at::TensorList tensors) {
  const at::ScalarType type = tensors[0].scalar_type();  // there is one, or it would not come here
  TORCH_CHECK(
      type == at::kFloat || type == at::kDouble, "total_norm: tensors must be float or double, got ",
      type);
  std::vector<Tensor> dense;
  dense.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    TORCH_CHECK(
        tensor.is_cpu() && tensor.layout() == at::kStrided && tensor.scalar_type() == type,
        "total_norm: all tensors must be dense ", type, " on the CPU as the first is, got ",
        tensor.toString());
    dense.push_back(tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous());
  }
  const double norm = type == at::kFloat ? norm_of<float>(dense) : norm_of<double>(dense);
  return tensors[0].new_full({}, norm);
}

}  // namespace psf
