// Entry of the CPU kernels: prepares the value rows, splits the work, picks the instruction set.
#include "cpu_capability.h"
#include "ms_deform_attn_cpu.h"
#include "ms_deform_attn_inputs.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace psf {
namespace {

using at::Tensor;

// ---- the call --------------------------------------------------------------------------------

// Rows of at most so many channels are padded to a multiple of kLeastLanes, others to one of 16.
constexpr int64_t kShortRow = 8;
constexpr int64_t kRowMultiple = 16;
// Samples a task should have at least, to be worth a thread.
constexpr int64_t kGrainSamples = 4096;
// Queries of a task in the forward pass.
constexpr int64_t kQueryBlock = 128;
// Value rows are copied to head-major order when every row is used so many times or more: with
// heads interleaved, the rows of one head share few sets of the cache and many pages.
constexpr int64_t kSamplesPerRow = 2;

// The type in which a kernel sees elements of T.
template <typename T>
struct StorageOf {
  using Type = T;
};
template <>
struct StorageOf<c10::BFloat16> {
  using Type = BFloat16;
};
template <>
struct StorageOf<c10::Half> {
  using Type = Float16;
};
template <typename T>
using Storage = typename StorageOf<T>::Type;

// The arrays behind a SampleTable.
template <typename A>
struct Table {
  using Index = typename IndexOf<A>::Type;

  std::vector<A> values[2];
  std::vector<Index> indices[5];

  Table(const Inputs& inputs, int64_t padded) {
    for (auto& array : values) {
      array.assign(padded, A(1));
    }
    for (auto& array : indices) {
      array.assign(padded, Index(0));
    }
    std::fill(indices[0].begin(), indices[0].end(), Index(1));
    std::fill(indices[1].begin(), indices[1].end(), Index(1));
    std::fill(indices[3].begin(), indices[3].end(), Index(-1));
    int64_t j = 0;
    for (size_t l = 0; l < inputs.levels.size(); ++l) {
      const Level& level = inputs.levels[l];
      for (int64_t p = 0; p < inputs.sizes.points; ++p, ++j) {
        values[0][j] = static_cast<A>(level.width);
        values[1][j] = static_cast<A>(level.height);
        // No place is inside an empty level, also not half a pixel off.
        const bool empty = level.width * level.height == 0;
        indices[0][j] = empty ? std::numeric_limits<Index>::min() : static_cast<Index>(level.width);
        indices[1][j] = static_cast<Index>(level.height);
        indices[2][j] = static_cast<Index>(level.start);
        indices[3][j] = 0;
        indices[4][j] = static_cast<Index>(2 * l);
      }
    }
  }

  SampleTable<A> view() const {
    return {
        values[0].data(),
        values[1].data(),
        indices[0].data(),
        indices[1].data(),
        indices[2].data(),
        indices[3].data(),
        indices[4].data()};
  }
};

// The arrays behind Origins, of reference points (N, Q, L, 2) or boxes (N, Q, L, 4).
template <typename A>
struct OriginArrays {
  using Index = typename IndexOf<A>::Type;

  std::vector<Index> whole;
  std::vector<A> part;
  std::vector<A> unit;

  OriginArrays(const Inputs& inputs, const Tensor& reference) {
    if (!reference.defined()) {
      return;
    }
    const int64_t coordinates = reference.size(3);
    const int64_t levels = inputs.sizes.levels;
    const int64_t count = reference.numel() / coordinates;  // (N, Q, L)
    whole.resize(2 * count + kSamplePadding);
    part.resize(2 * count + kSamplePadding);
    unit.resize(coordinates == 4 ? 2 * count + kSamplePadding : 0);
    const A* from = reference.const_data_ptr<A>();
    const double share = 0.5 / static_cast<double>(inputs.sizes.points);  // of a box's size
    at::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Level& level = inputs.levels[i % levels];
        const double size[2] = {
            static_cast<double>(level.width), static_cast<double>(level.height)};
        for (int64_t axis = 0; axis < 2; ++axis) {
          const double place = from[i * coordinates + axis] * size[axis] - 0.5;
          const bool near = place > -kFar && place < kFar;  // not for NaN
          const double low = near ? std::floor(place) : 0.0;
          whole[2 * i + axis] = static_cast<Index>(low);
          part[2 * i + axis] =
              near ? static_cast<A>(place - low) : std::numeric_limits<A>::quiet_NaN();
          if (coordinates == 4) {
            unit[2 * i + axis] =
                static_cast<A>(from[i * coordinates + 2 + axis] * size[axis] * share);
          }
        }
      }
    });
  }
};

int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

int64_t padded_channels(int64_t channels) {
  return round_up(channels, channels <= kShortRow ? kLeastLanes : kRowMultiple);
}

// Whether to copy the value rows: where the kernels need padding, and where it pays, since the samples
// of the queries outnumber the rows.
bool must_pack(const Sizes& sizes) {
  return sizes.channels % kLeastLanes != 0 ||
      sizes.queries * sizes.levels * sizes.points * 4 >= kSamplesPerRow * sizes.positions;
}

// Memory whose vectors do not straddle lines of the cache, from which they could not be read back
// at once.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(bytes + kLine) {}

  char* data() {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + (kLine - address % kLine) % kLine;
  }

 private:
  static constexpr int64_t kLine = 64;
  std::vector<char> memory_;
};

// Runs f(task, scratch) for all tasks on the threads of torch.
template <typename A, typename F>
void for_tasks(int64_t tasks, int64_t samples_per_task, int64_t padded_samples, const F& f) {
  const int64_t grain = kGrainSamples / (samples_per_task + 1) + 1;
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(scratch_bytes<A>(padded_samples));
    for (int64_t task = begin; task < end; ++task) {
      f(task, scratch.data());
    }
  });
}

// Copies `size` elements from row to row; whole blocks without a call of memcpy.
template <typename From, typename To>
inline void copy_row(const From* from, To* to, int64_t size) {
  constexpr int64_t kBlock = 16;
  int64_t i = 0;
  for (; i + kBlock <= size; i += kBlock) {
    for (int64_t j = 0; j < kBlock; ++j) {
      to[i + j] = static_cast<To>(from[i + j]);
    }
  }
  for (; i < size; ++i) {
    to[i] = static_cast<To>(from[i]);
  }
}

// Rows that are fetched ahead of a copy: those of one head are apart, which processors do not foresee.
constexpr int64_t kCopyAhead = 16;

// Fetches the first 128 bytes of a row: 32 channels in single precision.
template <typename T>
inline void prefetch(const T* row) {
#if defined(__GNUC__)
  __builtin_prefetch(row);
  __builtin_prefetch(reinterpret_cast<const char*>(row) + 64);
#else
  static_cast<void>(row);
#endif
}

constexpr int64_t kCopyBlock = 256;  // positions that a thread copies at least

// The value rows (S, D) of heads [begin, end) of N * M, from (N, S, M, D) of any strides with D
// contiguous to (end - begin, S, channels), zeros from D on.
template <typename T, typename A>
void pack(const Tensor& value, int64_t begin, int64_t end, int64_t channels, A* packed) {
  const int64_t positions = value.size(1);
  const int64_t heads = value.size(2);
  const int64_t size = value.size(3);
  const T* from = value.const_data_ptr<T>();
  const auto strides = value.strides();
  at::parallel_for(0, positions, kCopyBlock, [&](int64_t first, int64_t last) {
    for (int64_t head = begin; head < end; ++head) {
      const T* row = from + head / heads * strides[0] + first * strides[1] +
          head % heads * strides[2];
      A* to = packed + ((head - begin) * positions + first) * channels;
      for (int64_t s = first; s < last; ++s, row += strides[1], to += channels) {
        if (last - s > kCopyAhead) {
          prefetch(row + kCopyAhead * strides[1]);
        }
        copy_row(row, to, size);
        std::fill(to + size, to + channels, A(0));
      }
    }
  });
}

// The inverse for a contiguous value, without the padding.
template <typename T, typename A>
void unpack(
    const A* packed, int64_t begin, int64_t end, int64_t channels, const Sizes& sizes, T* to) {
  const int64_t positions = sizes.positions;
  const int64_t heads = sizes.heads;
  const int64_t size = sizes.channels;
  at::parallel_for(0, positions, kCopyBlock, [&](int64_t first, int64_t last) {
    for (int64_t head = begin; head < end; ++head) {
      const A* row = packed + ((head - begin) * positions + first) * channels;
      T* next = to + ((head / heads * positions + first) * heads + head % heads) * size;
      for (int64_t s = first; s < last; ++s, row += channels, next += heads * size) {
        copy_row(row, next, size);
      }
    }
  });
}

// What the plain and the fused operator have in common, as tensors.
struct Arguments {
  Inputs inputs;
  Tensor value;
  Tensor points;
  Tensor weights;
  Tensor reference;  // undefined in the plain operator
};

Tensor in_arithmetic(const Tensor& tensor, const Tensor& value) {
  return tensor.to(accumulator_type(value)).contiguous();
}

bool is_empty(const Sizes& sizes) {
  return sizes.images * sizes.queries * sizes.heads * sizes.channels * sizes.levels *
      sizes.points * sizes.positions == 0;
}

template <typename V, typename O, typename A>
Call<V, O, A> make_call(
    const Arguments& arguments,
    const Table<A>& table,
    const OriginArrays<A>& origins,
    int64_t padded_samples) {
  const Sizes& sizes = arguments.inputs.sizes;
  Call<V, O, A> call{};
  call.sizes = sizes;
  call.table = table.view();
  call.samples = sizes.levels * sizes.points;
  call.padded_samples = padded_samples;
  call.points = arguments.points.const_data_ptr<A>();
  call.weights = arguments.weights.const_data_ptr<A>();
  if (arguments.reference.defined()) {
    call.origins = {origins.whole.data(), origins.part.data(), origins.unit.data()};
    call.in_pixels = arguments.reference.size(3) == 2;
  }
  return call;
}

// Whether the rows of one head can be counted in 32 bits, as the kernels do.
template <typename A>
bool fits(const Sizes& sizes, int64_t row_stride) {
  return sizeof(A) == sizeof(double) ||
      sizes.positions * row_stride <= std::numeric_limits<int32_t>::max();
}

// Heads that are packed together: enough to fill the threads, and caches of about this size.
constexpr int64_t kGroupBytes = 4 << 20;

template <typename A>
int64_t heads_in_group(const Sizes& sizes, int64_t channels) {
  const int64_t bytes = sizes.positions * channels * static_cast<int64_t>(sizeof(A));
  const int64_t heads = std::max<int64_t>(kGroupBytes / bytes, at::get_num_threads());
  return std::min(heads, sizes.images * sizes.heads);
}

// The value rows of heads [begin, end) of N * M: packed (end - begin, S, channels), or where they lie
// in (N, S, M, D).
template <typename V>
struct Group {
  int64_t begin;
  int64_t end;
  bool packed;
  const V* value;

  // Where the rows of a head begin, in values and in gradients laid out alike.
  int64_t offset(const Sizes& sizes, int64_t channels, int64_t head) const {
    if (packed) {
      return (head - begin) * sizes.positions * channels;
    }
    return (head / sizes.heads * sizes.positions * sizes.heads + head % sizes.heads) * channels;
  }

  // Elements of gradients laid out alike.
  int64_t size(const Sizes& sizes, int64_t channels) const {
    return (end - begin) * sizes.positions * channels;
  }
};

// Whether threads should take whole heads, from the copy of the rows on: what a thread then reads it
// has written itself, and no thread waits for another. It needs heads enough to share out evenly.
bool a_head_a_thread(int64_t heads) {
  const int64_t threads = at::get_num_threads();
  return heads % threads == 0 || heads >= 4 * threads;
}

// Calls f(call, group, grad_rows) for groups of heads: packed where that pays or must be, else all in
// one group where they lie. Each thread that calls it brings a tensor of its own for the gradient of
// the rows, to be kept from group to group.
template <typename T, typename F>
void for_groups(const Arguments& arguments, const F& f) {
  using A = Accumulator<T>;
  const Sizes& sizes = arguments.inputs.sizes;
  const int64_t heads = sizes.images * sizes.heads;
  const int64_t padded_samples = round_up(sizes.levels * sizes.points, kSamplePadding);
  const Table<A> table(arguments.inputs, padded_samples);
  const OriginArrays<A> origins(arguments.inputs, arguments.reference);
  if (!must_pack(sizes) && fits<A>(sizes, sizes.heads * sizes.channels)) {
    const Tensor value = arguments.value.contiguous();
    auto call = make_call<Storage<T>, Storage<T>, A>(arguments, table, origins, padded_samples);
    call.channels = sizes.channels;
    call.row_stride = sizes.heads * sizes.channels;
    const auto* rows = reinterpret_cast<const Storage<T>*>(value.const_data_ptr<T>());
    Tensor grad_rows;
    f(call, Group<Storage<T>>{0, heads, false, rows}, grad_rows);
    return;
  }
  const int64_t channels = padded_channels(sizes.channels);
  TORCH_CHECK(
      fits<A>(sizes, channels),
      "ms_deform_attn: value has S * D = ", sizes.positions, " * ", sizes.channels,
      " elements a head, more than 2^31: split it by channels");
  const auto run = [&](int64_t first, int64_t last, int64_t group) {
    auto call = make_call<A, Storage<T>, A>(arguments, table, origins, padded_samples);
    call.channels = channels;
    call.row_stride = channels;
    const Tensor packed =
        at::empty({group * sizes.positions * channels}, arguments.points.options());
    A* rows = packed.mutable_data_ptr<A>();
    Tensor grad_rows;
    for (int64_t begin = first; begin < last; begin += group) {
      const int64_t end = std::min(begin + group, last);
      pack<T, A>(arguments.value, begin, end, channels, rows);
      f(call, Group<A>{begin, end, true, rows}, grad_rows);
    }
  };
  const int64_t work = sizes.queries * sizes.levels * sizes.points;
  if (a_head_a_thread(heads)) {
    at::parallel_for(0, heads, kGrainSamples / (work + 1) + 1, [&](int64_t first, int64_t last) {
      run(first, last, 1);
    });
  } else {
    run(0, heads, heads_in_group<A>(sizes, channels));
  }
}

// One head of a group; grad_rows is laid out like the group's values, or null.
template <typename V, typename O, typename A>
Head<V, A> head_of(const Call<V, O, A>& call, const Group<V>& group, int64_t head, A* grad_rows) {
  const int64_t offset = group.offset(call.sizes, call.channels, head);
  return {
      head / call.sizes.heads,
      head % call.sizes.heads,
      group.value + offset,
      grad_rows ? grad_rows + offset : nullptr};
}

template <typename V, typename O, typename A>
void forward_group(const Call<V, O, A>& call, const Group<V>& group) {
  const int64_t queries = call.sizes.queries;
  const int64_t blocks = (queries + kQueryBlock - 1) / kQueryBlock;
  const int64_t samples = std::min(queries, kQueryBlock) * call.samples;
  const int64_t tasks = (group.end - group.begin) * blocks;
  for_tasks<A>(tasks, samples, call.padded_samples, [&](int64_t task, char* scratch) {
    const auto head =
        head_of(call, group, group.begin + task / blocks, static_cast<A*>(nullptr));
    const int64_t begin = task % blocks * kQueryBlock;
    const int64_t end = std::min(begin + kQueryBlock, queries);
    PSF_CALL_KERNEL(forward, call, head, begin, end, scratch)
  });
}

// grad_rows is laid out like the group's values and added to, or null.
template <typename V, typename O, typename A>
void backward_group(const Call<V, O, A>& call, const Group<V>& group, A* grad_rows) {
  // A task owns the value rows it adds to, so nothing is added atomically and the order of
  // additions never changes: one head, or one level of it when there are threads to spare.
  const Sizes& sizes = call.sizes;
  const int64_t heads = group.end - group.begin;
  const bool alone = at::in_parallel_region() || heads >= at::get_num_threads();
  const int64_t parts = alone ? 1 : sizes.levels;
  const int64_t samples = sizes.queries * call.samples / parts;
  for_tasks<A>(heads * parts, samples, call.padded_samples, [&](int64_t task, char* scratch) {
    const auto head = head_of(call, group, group.begin + task / parts, grad_rows);
    const int64_t begin = parts == 1 ? 0 : task % parts;
    const int64_t end = parts == 1 ? sizes.levels : begin + 1;
    PSF_CALL_KERNEL(backward, call, head, begin, end, scratch)
  });
  if (parts == 1 || !call.origins.part || !call.grad_weights) {
    return;
  }
  // Of tasks for single levels, none could go from the weights to the logits.
  for_tasks<A>(
      heads * sizes.queries, call.samples, call.padded_samples, [&](int64_t task, char* scratch) {
        const int64_t head = group.begin + task / sizes.queries;
        const int64_t query = head / sizes.heads * sizes.queries + task % sizes.queries;
        const int64_t row = (query * sizes.heads + head % sizes.heads) * call.samples;
        PSF_CALL_KERNEL(
            softmax_backward,
            call.table,
            call.weights + row,
            call.grad_weights + row,
            call.samples,
            scratch)
      });
}

Tensor forward_of(const Arguments& arguments) {
  const Sizes& sizes = arguments.inputs.sizes;
  const std::array<int64_t, 3> shape = {
      sizes.images, sizes.queries, sizes.heads * sizes.channels};
  if (is_empty(sizes)) {
    return at::zeros(shape, arguments.value.options());
  }
  Tensor output = at::empty(shape, arguments.value.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, output.scalar_type(), "ms_deform_attn", [&] {
        auto* to = reinterpret_cast<Storage<scalar_t>*>(output.mutable_data_ptr<scalar_t>());
        for_groups<scalar_t>(arguments, [&](auto& call, const auto& group, Tensor& /*grad_rows*/) {
          call.output = to;
          forward_group(call, group);
        });
      });
  return output;
}

// Gradients of value, points and weights (logits); an empty tensor (0,) for one that is not wanted,
// since the result of a dispatched operator should be a defined tensor.
Gradients backward_of(
    const Arguments& arguments, const Tensor& grad_output, std::array<bool, 3> output_mask) {
  const Sizes& sizes = arguments.inputs.sizes;
  check_grad_output(grad_output, arguments.value, sizes);
  const bool empty = is_empty(sizes);
  const auto buffer = [&](bool wanted, const Tensor& like) {
    return !wanted ? at::empty({0}, like.options())
        : empty    ? at::zeros(like.sizes(), like.options())
                   : at::empty(like.sizes(), like.options());
  };
  Tensor grad_value = buffer(output_mask[0], arguments.value);
  Tensor grad_points = buffer(output_mask[1], arguments.points);
  Tensor grad_weights = buffer(output_mask[2], arguments.weights);
  if (empty) {
    return {grad_value, grad_points, grad_weights};
  }
  const Tensor grad = grad_output.to(arguments.value.scalar_type()).contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad_value.scalar_type(), "ms_deform_attn_backward", [&] {
        using A = Accumulator<scalar_t>;
        scalar_t* value_to = output_mask[0] ? grad_value.mutable_data_ptr<scalar_t>() : nullptr;
        A* points_to = output_mask[1] ? grad_points.mutable_data_ptr<A>() : nullptr;
        A* weights_to = output_mask[2] ? grad_weights.mutable_data_ptr<A>() : nullptr;
        const auto* from =
            reinterpret_cast<const Storage<scalar_t>*>(grad.const_data_ptr<scalar_t>());
        for_groups<scalar_t>(arguments, [&](auto& call, const auto& group, Tensor& grad_rows) {
          call.grad_output = from;
          call.grad_points = points_to;
          call.grad_weights = weights_to;
          if (!output_mask[0]) {
            backward_group(call, group, static_cast<A*>(nullptr));
            return;
          }
          const int64_t size = group.size(sizes, call.channels);
          if (!grad_rows.defined()) {  // the first group is the largest
            grad_rows = at::empty({size}, arguments.points.options());
          }
          A* grad_row = grad_rows.mutable_data_ptr<A>();
          at::parallel_for(0, size, 1 << 16, [&](int64_t begin, int64_t end) {
            std::fill(grad_row + begin, grad_row + end, A(0));
          });
          backward_group(call, group, grad_row);
          if (group.packed) {
            unpack<scalar_t, A>(
                grad_row, group.begin, group.end, call.channels, sizes, value_to);
          } else {
            grad_value.copy_(grad_rows.view(grad_value.sizes()));
          }
        });
      });
  return {grad_value, grad_points, grad_weights};
}

// ---- the operators ---------------------------------------------------------------------------
// The CPU kernels are deterministic, so the flag changes nothing.

Arguments plain_arguments(
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights) {
  Inputs inputs = check_inputs(value, spatial_shapes, locations, weights);
  return {
      std::move(inputs),
      value.stride(3) == 1 ? value : value.contiguous(),
      in_arithmetic(locations, value),
      in_arithmetic(weights, value),
      Tensor()};
}

Tensor forward_cpu(
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights,
    bool /*deterministic*/) {
  return forward_of(plain_arguments(value, spatial_shapes, locations, weights));
}

Gradients backward_cpu(
    const Tensor& grad_output,
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights,
    std::array<bool, 3> output_mask,
    bool /*deterministic*/) {
  auto [grad_value, grad_locations, grad_weights] = backward_of(
      plain_arguments(value, spatial_shapes, locations, weights), grad_output, output_mask);
  return {
      grad_value,
      grad_locations.to(locations.scalar_type()),
      grad_weights.to(weights.scalar_type())};
}

Arguments fused_arguments(
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& reference_points,
    const Tensor& sampling_offsets,
    const Tensor& attention_logits) {
  Inputs inputs = check_fused_inputs(
      value, spatial_shapes, reference_points, sampling_offsets, attention_logits);
  return {
      std::move(inputs),
      value.stride(3) == 1 ? value : value.contiguous(),
      in_arithmetic(sampling_offsets, value),
      in_arithmetic(attention_logits, value),
      in_arithmetic(reference_points, value)};
}

Tensor forward_fused_cpu(
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& reference_points,
    const Tensor& sampling_offsets,
    const Tensor& attention_logits,
    bool /*deterministic*/) {
  return forward_of(fused_arguments(
      value, spatial_shapes, reference_points, sampling_offsets, attention_logits));
}

FusedGradients backward_fused_cpu(
    const Tensor& grad_output,
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& reference_points,
    const Tensor& sampling_offsets,
    const Tensor& attention_logits,
    std::array<bool, 4> output_mask,
    bool /*deterministic*/) {
  const Arguments arguments = fused_arguments(
      value, spatial_shapes, reference_points, sampling_offsets, attention_logits);
  auto [grad_value, grad_points, grad_logits] = backward_of(
      arguments, grad_output, {output_mask[0], output_mask[1] || output_mask[2], output_mask[3]});
  auto [grad_reference, grad_offsets] = point_gradients(
      arguments.inputs,
      arguments.reference,
      arguments.points,
      grad_points,
      {output_mask[1], output_mask[2]});
  return {
      grad_value,
      grad_reference.to(reference_points.scalar_type()),
      grad_offsets.to(sampling_offsets.scalar_type()),
      grad_logits.to(attention_logits.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(psf, CPU, m) {
  m.impl("ms_deform_attn", &forward_cpu);
  m.impl("ms_deform_attn_backward", &backward_cpu);
  m.impl("ms_deform_attn_fused", &forward_fused_cpu);
  m.impl("ms_deform_attn_fused_backward", &backward_fused_cpu);
}

}  // namespace psf
