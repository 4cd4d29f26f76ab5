// Dice loss of upsampled maps on a CPU: splits the maps among threads. Nothing of the upsampled size
// is stored but the targets.
#include "cpu_capability.h"
#include "dice_cpu.h"
#include "training_cpu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <tuple>
#include <vector>

namespace psf {
namespace {

using at::Tensor;

// What a ResizeAxis points to.
template <typename A>
struct AxisTables {
  AxisTables(int64_t input_size, int64_t output_size)
      : low(output_size), high(output_size), start(input_size + 1), weight(output_size) {
    // ATen's arithmetic, with align_corners=False and no scale factor given.
    const A scale = static_cast<A>(input_size) / static_cast<A>(output_size);
    for (int64_t x = 0; x < output_size; ++x) {
      const A source = std::max(scale * (static_cast<A>(x) + A(0.5)) - A(0.5), A(0));
      const int64_t below = std::min(static_cast<int64_t>(source), input_size - 1);
      low[x] = static_cast<int32_t>(below);
      high[x] = static_cast<int32_t>(std::min(below + 1, input_size - 1));
      weight[x] = std::min(source - static_cast<A>(below), A(1));
    }
    for (int64_t i = 0; i <= input_size; ++i) {
      start[i] = static_cast<int32_t>(std::lower_bound(low.begin(), low.end(), i) - low.begin());
    }
  }

  ResizeAxis<A> axis() const {
    return {
        static_cast<int64_t>(start.size()) - 1,
        static_cast<int64_t>(low.size()),
        low.data(),
        high.data(),
        weight.data(),
        start.data()};
  }

  std::vector<int32_t> low, high, start;
  std::vector<A> weight;
};

// Calls f(call, map, rows) for every map, rows being room for num_rows rows of the output.
template <typename A, typename F>
void for_maps(
    const Tensor& maps, const Tensor& targets, bool sigmoid, int64_t num_rows, const F& f) {
  const AxisTables<A> rows(maps.size(2), targets.size(1));
  const AxisTables<A> columns(maps.size(3), targets.size(2));
  const DiceCall<A> call{
      rows.axis(),
      columns.axis(),
      maps.size(1),
      sigmoid,
      maps.const_data_ptr<A>(),
      targets.const_data_ptr<A>()};
  at::parallel_for(0, maps.size(0) * maps.size(1), 1, [&](int64_t first, int64_t last) {
    std::vector<A> room(num_rows * padded_row(targets.size(2)));
    for (int64_t map = first; map < last; ++map) {
      f(call, map, room.data());
    }
  });
}

void check(const Tensor& maps, const Tensor& targets) {
  TORCH_CHECK(
      maps.dim() == 4 && targets.dim() == 3 && maps.size(1) == targets.size(0),
      "upsampled_dice_loss: maps must be (layers, G, h, w) and targets (G, H, W), got ",
      maps.sizes(), " and ", targets.sizes());
  for (const int64_t size : {maps.size(2), maps.size(3), targets.size(1), targets.size(2)}) {
    TORCH_CHECK(
        size > 0 && size < (int64_t(1) << 31), "upsampled_dice_loss: sides must be in [1, 2^31), got ",
        maps.sizes(), " and ", targets.sizes());
  }
  TORCH_CHECK(
      maps.scalar_type() == targets.scalar_type(), "upsampled_dice_loss: targets must be ",
      maps.scalar_type(), " as the maps are, got ", targets.scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> dice_forward(
    const Tensor& maps_in, const Tensor& targets_in, bool sigmoid, double eps) {
  check(maps_in, targets_in);
  const Tensor maps = maps_in.contiguous(), targets = targets_in.contiguous();
  Tensor loss = maps.new_empty({maps.size(0), maps.size(1)});
  Tensor overlap = loss.new_empty(loss.sizes());
  Tensor norms = loss.new_empty(loss.sizes());
  AT_DISPATCH_FLOATING_TYPES(maps.scalar_type(), "upsampled_dice_loss", [&] {
    scalar_t* losses = loss.data_ptr<scalar_t>();
    scalar_t* overlaps = overlap.data_ptr<scalar_t>();
    scalar_t* norm = norms.data_ptr<scalar_t>();
    for_maps<scalar_t>(
        maps, targets, sigmoid, 2,
        [&](const DiceCall<scalar_t>& call, int64_t map, scalar_t* rows) {
          double sums[3] = {0, 0, 0};
          PSF_CALL_KERNEL(dice_sums, call, map, rows, sums)
          overlaps[map] = static_cast<scalar_t>(2 * sums[0]);
          norm[map] = static_cast<scalar_t>(sums[1] + eps + sums[2] + eps);
          losses[map] = 1 - overlaps[map] / norm[map];
        });
  });
  return {loss, overlap, norms};
}

Tensor dice_backward(
    const Tensor& grad_in,
    const Tensor& maps_in,
    const Tensor& targets_in,
    const Tensor& overlap,
    const Tensor& norms,
    bool sigmoid) {
  const Tensor grad = grad_in.contiguous();
  const Tensor maps = maps_in.contiguous(), targets = targets_in.contiguous();
  Tensor grad_maps = maps.new_zeros(maps.sizes());
  AT_DISPATCH_FLOATING_TYPES(maps.scalar_type(), "upsampled_dice_loss_backward", [&] {
    const scalar_t* grads = grad.const_data_ptr<scalar_t>();
    const scalar_t* overlaps = overlap.const_data_ptr<scalar_t>();
    const scalar_t* norm = norms.const_data_ptr<scalar_t>();
    scalar_t* grads_of_maps = grad_maps.data_ptr<scalar_t>();
    const int64_t size = maps.size(2) * maps.size(3);
    for_maps<scalar_t>(
        maps, targets, sigmoid, 4,
        [&](const DiceCall<scalar_t>& call, int64_t map, scalar_t* rows) {
          const scalar_t by_target = -2 * grads[map] / norm[map];
          const scalar_t by_mask = 2 * grads[map] * overlaps[map] / (norm[map] * norm[map]);
          PSF_CALL_KERNEL(
              dice_backward, call, map, by_target, by_mask, rows, grads_of_maps + map * size)
        });
  });
  return grad_maps;
}

}  // namespace psf
