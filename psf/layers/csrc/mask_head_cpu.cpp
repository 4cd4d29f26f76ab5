// Masks from attention logits on a CPU: splits levels and maps among threads.
//
// Shapes: see mask_head_cpu.h; h_l and w_l are the sizes of a level without padding.
#include "cpu_capability.h"
#include "mask_head_cpu.h"
#include "training_cpu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

namespace psf {
namespace {

using at::IntArrayRef;
using at::Tensor;

// Tiles of a task at least, and tasks of an image at most (but for one more a level): each has a
// buffer of the queries' gradients, which are summed in the order of the tasks and so do not depend
// on the number of threads.
constexpr int64_t kTiles = 8;
constexpr int64_t kTasks = 32;
// Pixels that are worth a thread's while when maps are resized.
constexpr int64_t kPixels = 4096;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int64_t round_up(int64_t a) {
  return divide_up(a, kMaskTile) * kMaskTile;
}

struct Size {
  int64_t height;
  int64_t width;

  int64_t area() const {
    return height * width;
  }
};

struct Level {
  Size padded;
  Size valid;
  int64_t start;  // in S
  int64_t coarse_start;  // in the scores of all levels but the first
};

struct Levels {
  std::vector<Level> all;
  int64_t positions;  // S
  int64_t coarse;  // positions without padding of all levels but the first

  bool is_padded() const {
    return std::any_of(all.begin(), all.end(), [](const Level& level) {
      return level.valid.area() != level.padded.area();
    });
  }
};

Levels to_levels(IntArrayRef padded, IntArrayRef valid) {
  TORCH_CHECK(
      !padded.empty() && padded.size() % 2 == 0 && padded.size() == valid.size(),
      "mask_maps: padded and valid must be L pairs of height and width, got ", padded, " and ", valid);
  Levels levels{{}, 0, 0};
  for (size_t i = 0; i < padded.size(); i += 2) {
    const Level level{
        {padded[i], padded[i + 1]}, {valid[i], valid[i + 1]}, levels.positions, levels.coarse};
    TORCH_CHECK(
        0 < level.valid.height && level.valid.height <= level.padded.height &&
            0 < level.valid.width && level.valid.width <= level.padded.width,
        "mask_maps: valid sizes must be from 1 to the padded ones, got ", valid, " of ", padded);
    levels.positions += level.padded.area();
    levels.coarse += i == 0 ? 0 : level.valid.area();
    levels.all.push_back(level);
  }
  return levels;
}

void check(
    const Tensor& q,
    const Tensor& k,
    const Levels& levels,
    const Tensor& projection,
    const Tensor& bias,
    const Tensor& weight) {
  TORCH_CHECK(
      q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) && q.size(1) == k.size(1) &&
          q.size(3) == k.size(3) && k.size(2) == levels.positions && q.size(1) > 0 && q.size(3) > 0,
      "mask_maps: q must be (n, M, R, D) and k (n, M, S, D), S = ", levels.positions, ", got ",
      q.sizes(), " and ", k.sizes());
  const int64_t count = static_cast<int64_t>(levels.all.size());
  const int64_t heads = q.size(1);
  TORCH_CHECK(
      projection.sizes() == IntArrayRef({count, heads, heads}) &&
          bias.sizes() == IntArrayRef({count, heads}) &&
          weight.sizes() == IntArrayRef({count, heads}),
      "mask_maps: projection, bias and weight must be (L, M, M), (L, M) and (L, M) of L = ", count,
      " and M = ", heads, ", got ", projection.sizes(), ", ", bias.sizes(), " and ", weight.sizes());
  for (const Tensor* other : {&k, &projection, &bias, &weight}) {
    TORCH_CHECK(
        other->scalar_type() == q.scalar_type(), "mask_maps: all tensors must be ", q.scalar_type(),
        " as q is, got ", other->scalar_type());
  }
}

// Axis of `size` pixels that one of `coarse` is resized to, as F.interpolate with
// align_corners=False does, in its arithmetic.
template <typename A>
class Axis {
 public:
  Axis(int64_t coarse, int64_t size) : low_(size), high_(size), share_(size) {
    const A scale = static_cast<A>(coarse) / static_cast<A>(size);
    for (int64_t i = 0; i < size; ++i) {
      const A place = std::max(scale * (static_cast<A>(i) + A(0.5)) - A(0.5), A(0));
      low_[i] = std::min(static_cast<int64_t>(place), coarse - 1);
      high_[i] = std::min(low_[i] + 1, coarse - 1);
      share_[i] = std::min(std::max(place - static_cast<A>(low_[i]), A(0)), A(1));
    }
  }

  MaskAxis<A> view() const {
    return {static_cast<int64_t>(low_.size()), low_.data(), high_.data(), share_.data()};
  }

 private:
  std::vector<int64_t> low_;
  std::vector<int64_t> high_;
  std::vector<A> share_;
};

// How a level is resized to the first.
template <typename A>
struct Resize {
  Resize(const Level& level, const Size& target)
      : level(level),
        rows(level.valid.height, target.height),
        columns(level.valid.width, target.width) {}

  MaskResize<A> view() const {
    return {level.valid.height, level.valid.width, rows.view(), columns.view()};
  }

  Level level;
  Axis<A> rows;
  Axis<A> columns;
};

template <typename A>
std::vector<Resize<A>> to_resizes(const Levels& levels) {
  std::vector<Resize<A>> resizes;
  for (size_t i = 1; i < levels.all.size(); ++i) {
    resizes.emplace_back(levels.all[i], levels.all[0].valid);
  }
  return resizes;
}

// f(resize, map, rows) for every map and every level but the first; the maps in parallel. rows is
// the scratch that the kernels want.
template <typename A, typename F>
void for_resizes(const Levels& levels, int64_t maps, const F& f) {
  const std::vector<Resize<A>> resizes = to_resizes<A>(levels);
  const Size target = levels.all[0].valid;
  int64_t height = 0;
  for (const auto& resize : resizes) {
    height = std::max(height, resize.level.valid.height);
  }
  const int64_t grain = std::max<int64_t>(1, kPixels / target.area());
  at::parallel_for(0, maps, grain, [&](int64_t first, int64_t last) {
    const std::unique_ptr<A[]> rows(new A[height * target.width]);
    for (int64_t map = first; map < last; ++map) {
      for (const auto& resize : resizes) {
        f(resize, map, rows.get());
      }
    }
  });
}

// Positions [begin, end) of a level of an image.
struct Task {
  int64_t image;
  int64_t level;
  int64_t begin;
  int64_t end;
};

// In the order of images.
std::vector<Task> to_tasks(const Levels& levels, int64_t images) {
  int64_t tiles = 0;
  for (const Level& level : levels.all) {
    tiles += divide_up(level.valid.area(), kMaskTile);
  }
  const int64_t own = std::max(kTiles, divide_up(tiles, kTasks)) * kMaskTile;
  std::vector<Task> tasks;
  for (int64_t image = 0; image < images; ++image) {
    for (size_t level = 0; level < levels.all.size(); ++level) {
      const int64_t area = levels.all[level].valid.area();
      for (int64_t begin = 0; begin < area; begin += own) {
        tasks.push_back({image, static_cast<int64_t>(level), begin, std::min(area, begin + own)});
      }
    }
  }
  return tasks;
}

// f(task, its index, scratch), in parallel.
template <typename A, typename F>
void for_tasks(const std::vector<Task>& tasks, const MaskCall<A>& call, bool backward, const F& f) {
  const int64_t heads = call.heads;
  const int64_t keys = heads * kMaskTile * call.padded_channels;
  const int64_t scores = kMaskQueries * kMaskTile;
  const int64_t sums = heads * (heads + 2) * kMaskTile;
  const int64_t forward_size = 2 * keys + (heads + 1) * scores;
  const int64_t backward_size = keys + heads * scores + heads * heads + sums;
  const int64_t size = forward_size + (backward ? backward_size : 0);
  at::parallel_for(0, tasks.size(), 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<A[]> memory(new A[size]);
    A* next = memory.get();
    const auto take = [&](int64_t count) {
      A* own = next;
      next += count;
      return own;
    };
    MaskScratch<A> scratch{};
    scratch.keys = take(keys);
    scratch.transposed_keys = take(keys);
    scratch.logits = take(heads * scores);
    scratch.scores = take(scores);
    if (backward) {
      scratch.grad_keys = take(keys);
      scratch.passed = take(heads * scores);
      scratch.weighted = take(heads * heads);
      scratch.sums = take(sums);
    }
    for (int64_t i = first; i < last; ++i) {
      f(tasks[i], i, scratch);
    }
  });
}

// (n, M, R, padded channels), zeros behind the channels.
template <typename A>
Tensor pad_channels(const Tensor& q) {
  const int64_t channels = q.size(3);
  const int64_t padded = round_up(channels);
  const Tensor dense = q.contiguous();
  if (padded == channels) {
    return dense;
  }
  Tensor result = q.new_zeros({q.size(0), q.size(1), q.size(2), padded});
  const A* from = dense.const_data_ptr<A>();
  A* to = result.data_ptr<A>();
  for (int64_t row = 0; row < q.numel() / channels; ++row) {
    std::copy_n(from + row * channels, channels, to + row * padded);
  }
  return result;
}

Tensor with_dense_rows(const Tensor& k) {
  return k.stride(3) == 1 ? k : k.contiguous();
}

template <typename A>
MaskCall<A> to_call(const Tensor& padded_q, const Tensor& k) {
  MaskCall<A> call{};
  call.heads = k.size(1);
  call.channels = k.size(3);
  call.padded_channels = padded_q.size(3);
  call.queries = padded_q.size(2);
  call.scale = A(1) / std::sqrt(static_cast<A>(k.size(3)));
  call.q = padded_q.const_data_ptr<A>();
  call.k = k.const_data_ptr<A>();
  call.k_image = k.stride(0);
  call.k_head = k.stride(1);
  call.k_position = k.stride(2);
  return call;
}

// Levels whose scores lie in `finest` (n, R, h_0, w_0) and `coarse` (n, R, all others).
template <typename A>
std::vector<MaskLevel<A>> to_calls(
    const Levels& levels,
    const Tensor& projection,
    const Tensor& bias,
    const Tensor& weight,
    A* finest,
    A* coarse) {
  const int64_t heads = weight.size(1);
  std::vector<MaskLevel<A>> calls;
  for (size_t i = 0; i < levels.all.size(); ++i) {
    const Level& level = levels.all[i];
    MaskLevel<A> call{};
    call.start = level.start;
    call.padded_width = level.padded.width;
    call.height = level.valid.height;
    call.width = level.valid.width;
    call.projection = projection.const_data_ptr<A>() + i * heads * heads;
    call.bias = bias.const_data_ptr<A>() + i * heads;
    call.weight = weight.const_data_ptr<A>() + i * heads;
    call.scores = i == 0 ? finest : coarse + level.coarse_start;
    call.score_map = i == 0 ? level.valid.area() : levels.coarse;
    calls.push_back(call);
  }
  return calls;
}

}  // namespace

Tensor mask_maps(
    const Tensor& q,
    const Tensor& keys,
    IntArrayRef padded,
    IntArrayRef valid,
    const Tensor& projection,
    const Tensor& bias,
    const Tensor& weight,
    const Tensor& mask_bias) {
  const Levels levels = to_levels(padded, valid);
  check(q, keys, levels, projection, bias, weight);
  TORCH_CHECK(
      mask_bias.numel() == 1 && mask_bias.scalar_type() == q.scalar_type(),
      "mask_maps: mask_bias must be one number of type ", q.scalar_type(), ", got ",
      mask_bias.sizes(), " ", mask_bias.scalar_type());
  const Size target = levels.all[0].valid;
  const int64_t count = q.size(0) * q.size(2);
  Tensor maps = q.new_empty({q.size(0), q.size(2), target.height, target.width});
  if (count == 0) {
    return maps;
  }
  const Tensor k = with_dense_rows(keys);
  const Tensor own_projection = projection.contiguous();
  const Tensor own_bias = bias.contiguous();
  const Tensor own_weight = weight.contiguous();
  Tensor coarse = q.new_empty({count, levels.coarse});
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "mask_maps", [&] {
    const Tensor padded_q = pad_channels<scalar_t>(q);
    const MaskCall<scalar_t> call = to_call<scalar_t>(padded_q, k);
    scalar_t* finest = maps.data_ptr<scalar_t>();
    scalar_t* scores = coarse.data_ptr<scalar_t>();
    auto calls =
        to_calls<scalar_t>(levels, own_projection, own_bias, own_weight, finest, scores);
    calls[0].offset = *mask_bias.const_data_ptr<scalar_t>();
    for_tasks(
        to_tasks(levels, q.size(0)), call, false,
        [&](const Task& task, int64_t, const MaskScratch<scalar_t>& scratch) {
          PSF_CALL_KERNEL(
              mask_scores, call, calls[task.level], task.image, task.begin, task.end, scratch)
        });
    for_resizes<scalar_t>(
        levels, count, [&](const Resize<scalar_t>& resize, int64_t map, scalar_t* rows) {
          const scalar_t* from = scores + map * levels.coarse + resize.level.coarse_start;
          scalar_t* to = finest + map * target.area();
          PSF_CALL_KERNEL(mask_upsample, resize.view(), from, rows, to)
        });
  });
  return maps;
}

namespace {

// The sum of (count, height, width), rows first so that little is lost; maps in order.
template <typename A>
A sum_of(const A* maps, int64_t rows, int64_t width) {
  A total = 0;
  for (int64_t row = 0; row < rows; ++row) {
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t x = 0; x < width; ++x) {
      sum += maps[row * width + x];
    }
    total += sum;
  }
  return total;
}

// grad_q (n, M, R, D), dense, from what each task has for its image (tasks, M, R, padded channels).
template <typename A>
void sum_queries(
    const std::vector<Task>& tasks, const MaskCall<A>& call, const A* parts, int64_t images, A* grad_q) {
  const int64_t own = static_cast<int64_t>(tasks.size()) / images;  // tasks of an image
  const int64_t rows = call.heads * call.queries;  // of an image
  const int64_t padded = call.padded_channels;
  at::parallel_for(
      0, images * rows, std::max<int64_t>(1, kPixels / padded), [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
          const A* from = parts + (row / rows * own * rows + row % rows) * padded;
          A* to = grad_q + row * call.channels;
          std::copy_n(from, call.channels, to);
          for (int64_t task = 1; task < own; ++task) {
            from += rows * padded;
#pragma omp simd
            for (int64_t c = 0; c < call.channels; ++c) {
              to[c] += from[c];
            }
          }
        }
      });
}

// Gradients of projection, bias and weight, which are zeros, from those of each task.
template <typename A>
void sum_parameters(
    const std::vector<Task>& tasks,
    int64_t heads,
    const A* parts,
    A* projection,
    A* bias,
    A* weight) {
  for (const Task& task : tasks) {
    for (int64_t row = task.level * heads; row < (task.level + 1) * heads; ++row) {
      for (int64_t column = 0; column < heads; ++column) {
        projection[row * heads + column] += parts[column];
      }
      bias[row] += parts[heads];
      weight[row] += parts[heads + 1];
      parts += heads + 2;
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mask_maps_backward(
    const Tensor& grad_maps,
    const Tensor& q,
    const Tensor& keys,
    IntArrayRef padded,
    IntArrayRef valid,
    const Tensor& projection,
    const Tensor& bias,
    const Tensor& weight) {
  const Levels levels = to_levels(padded, valid);
  check(q, keys, levels, projection, bias, weight);
  const Size target = levels.all[0].valid;
  TORCH_CHECK(
      grad_maps.sizes() == IntArrayRef({q.size(0), q.size(2), target.height, target.width}) &&
          grad_maps.scalar_type() == q.scalar_type(),
      "mask_maps_backward: the gradient must be as the maps, got ", grad_maps.sizes(), " ",
      grad_maps.scalar_type());
  const int64_t count = q.size(0) * q.size(2);
  Tensor grad_q = q.new_empty(q.sizes());
  const Tensor k = with_dense_rows(keys);
  // As k, so that the gradient of a transposed view is dense for what it is a view of; but the
  // kernels want its last dimension dense.
  Tensor grad_k = k.is_non_overlapping_and_dense() ? k.new_empty_strided(k.sizes(), k.strides())
                                                   : k.new_empty(k.sizes());
  if (levels.is_padded() || count == 0) {
    grad_k.zero_();
  }
  Tensor grad_projection = projection.new_zeros(projection.sizes());
  Tensor grad_bias = bias.new_zeros(bias.sizes());
  Tensor grad_weight = weight.new_zeros(weight.sizes());
  Tensor grad_mask_bias = q.new_zeros({1});
  if (count == 0) {
    return {grad_q, grad_k, grad_projection, grad_bias, grad_weight, grad_mask_bias};
  }
  const Tensor grad = grad_maps.contiguous();
  const Tensor own_projection = projection.contiguous();
  const Tensor own_bias = bias.contiguous();
  const Tensor own_weight = weight.contiguous();
  const std::vector<Task> tasks = to_tasks(levels, q.size(0));
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  const int64_t heads = q.size(1);
  Tensor coarse = q.new_empty({count, levels.coarse});
  Tensor parameter_parts = q.new_zeros({num_tasks, heads, heads + 2});
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "mask_maps_backward", [&] {
    const Tensor padded_q = pad_channels<scalar_t>(q);
    MaskCall<scalar_t> call = to_call<scalar_t>(padded_q, k);
    call.grad_k = grad_k.data_ptr<scalar_t>();
    call.grad_k_image = grad_k.stride(0);
    call.grad_k_head = grad_k.stride(1);
    call.grad_k_position = grad_k.stride(2);
    // The kernels of the backward pass only read the scores' gradients.
    scalar_t* finest = const_cast<scalar_t*>(grad.const_data_ptr<scalar_t>());
    scalar_t* scores = coarse.data_ptr<scalar_t>();
    const auto calls =
        to_calls<scalar_t>(levels, own_projection, own_bias, own_weight, finest, scores);
    for_resizes<scalar_t>(
        levels, count, [&](const Resize<scalar_t>& resize, int64_t map, scalar_t* rows) {
          const scalar_t* from = finest + map * target.area();
          scalar_t* to = scores + map * levels.coarse + resize.level.coarse_start;
          PSF_CALL_KERNEL(mask_downsample, resize.view(), from, rows, to)
        });
    Tensor query_parts = q.new_zeros({num_tasks, heads, call.queries, call.padded_channels});
    scalar_t* own_queries = query_parts.data_ptr<scalar_t>();
    scalar_t* own_parameters = parameter_parts.data_ptr<scalar_t>();
    for_tasks(
        tasks, call, true,
        [&](const Task& task, int64_t i, const MaskScratch<scalar_t>& scratch) {
          PSF_CALL_KERNEL(
              mask_scores_backward, call, calls[task.level], task.image, task.begin, task.end,
              scratch, own_queries + i * query_parts.stride(0),
              own_parameters + i * parameter_parts.stride(0))
        });
    sum_queries(tasks, call, own_queries, q.size(0), grad_q.data_ptr<scalar_t>());
    sum_parameters(
        tasks, heads, own_parameters, grad_projection.data_ptr<scalar_t>(),
        grad_bias.data_ptr<scalar_t>(), grad_weight.data_ptr<scalar_t>());
    *grad_mask_bias.data_ptr<scalar_t>() =
        sum_of(grad.const_data_ptr<scalar_t>(), count * target.height, target.width);
  });
  return {grad_q, grad_k, grad_projection, grad_bias, grad_weight, grad_mask_bias};
}

}  // namespace psf
