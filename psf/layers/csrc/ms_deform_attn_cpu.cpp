// The operators on a CPU: prepares the value rows, splits the work among threads and picks the
// instruction set. Results do not depend on the number of threads.
#include "ms_deform_attn_cpu.h"
#include "ms_deform_attn_inputs.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <type_traits>

namespace psf {
namespace {

using torch::stable::get_num_threads;
using torch::stable::parallel_for;

// ---- instruction sets ------------------------------------------------------------------------

enum Capability { kBaseline, kAvx2, kAvx512 };
constexpr std::array<const char*, 3> kCapabilities = {"baseline", "avx2", "avx512"};

Capability best_capability() {
#ifdef PSF_X86_KERNELS
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return kAvx512;
  }
  if (avx2) {
    return kAvx2;
  }
#endif
  return kBaseline;
}

Capability choose_capability() {
  const Capability best = best_capability();
  const char* wanted = std::getenv("PSF_CPU_CAPABILITY");
  if (wanted == nullptr) {
    return best;
  }
  const auto* found = std::find(kCapabilities.begin(), kCapabilities.end(), std::string(wanted));
  STD_TORCH_CHECK(
      found <= &kCapabilities[best],
      "PSF_CPU_CAPABILITY is '", wanted, "'; this machine runs baseline",
      best >= kAvx2 ? ", avx2" : "", best >= kAvx512 ? ", avx512" : "");
  return static_cast<Capability>(found - kCapabilities.begin());
}

// The best instruction set of the processor, or the lower one that PSF_CPU_CAPABILITY names.
Capability capability() {
  static const Capability chosen = choose_capability();
  return chosen;
}

// Calls NAME(...) of the chosen set; a macro, since templates cannot be passed.
#ifdef PSF_X86_KERNELS
#define PSF_CALL_KERNEL(NAME, ...)   \
  switch (capability()) {            \
    case kAvx512:                    \
      avx512::NAME(__VA_ARGS__);     \
      break;                         \
    case kAvx2:                      \
      avx2::NAME(__VA_ARGS__);       \
      break;                         \
    default:                         \
      baseline::NAME(__VA_ARGS__);   \
  }
#else
#define PSF_CALL_KERNEL(NAME, ...) baseline::NAME(__VA_ARGS__);
#endif

// ---- memory ----------------------------------------------------------------------------------

// Elements in memory that is not initialised. Vectors in it do not straddle cache lines.
template <typename T>
class Buffer {
 public:
  // Not aligned_alloc: the C library finds freed memory of the same size for malloc only.
  explicit Buffer(int64_t size)
      : memory_(static_cast<char*>(std::malloc(static_cast<size_t>(size) * sizeof(T) + kLine))) {
    if (memory_ == nullptr) {
      throw std::bad_alloc();
    }
  }

  T* data() const {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return reinterpret_cast<T*>(memory_.get() + (kLine - address % kLine));
  }

 private:
  static constexpr size_t kLine = 64;

  struct Free {
    void operator()(char* memory) const {
      std::free(memory);
    }
  };
  std::unique_ptr<char[], Free> memory_;
};

// ---- the inputs as kernels take them ---------------------------------------------------------

// Samples a task should have at least, to be worth a thread.
constexpr int64_t kGrainSamples = 4096;
// Queries of a task in the forward pass.
constexpr int64_t kQueryBlock = 128;
// Value rows are copied to head-major order when every row is used so many times or more: with
// heads interleaved, the rows of one head share few sets of the cache and many pages.
constexpr int64_t kSamplesPerRow = 2;

// The type of the arithmetic for values of type T.
template <typename T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// The arrays behind a SampleTable.
template <typename A>
struct Table {
  using Index = typename IndexOf<A>::Type;

  std::vector<A> width, height;
  std::vector<Index> index_width, index_height, start, padding, level;

  Table(const Inputs& inputs, int64_t padded)
      : width(padded, 1),
        height(padded, 1),
        index_width(padded, 1),
        index_height(padded, 1),
        start(padded, 0),
        padding(padded, -1),
        level(padded, 0) {
    for (int64_t j = 0; j < inputs.sizes.levels * inputs.sizes.points; ++j) {
      const int64_t l = j / inputs.sizes.points;
      const Level& of = inputs.levels[l];
      // No place is inside an empty level: not between -1 and -1, nor an index below the least.
      const bool empty = of.width * of.height == 0;
      width[j] = static_cast<A>(empty ? -1 : of.width);
      height[j] = static_cast<A>(empty ? -1 : of.height);
      constexpr Index kLeast = std::numeric_limits<Index>::min();
      index_width[j] = empty ? kLeast : static_cast<Index>(of.width);
      index_height[j] = empty ? kLeast : static_cast<Index>(of.height);
      start[j] = static_cast<Index>(of.start);
      padding[j] = 0;
      level[j] = static_cast<Index>(2 * l);
    }
  }

  SampleTable<A> view() const {
    return {
        width.data(),
        height.data(),
        index_width.data(),
        index_height.data(),
        start.data(),
        padding.data(),
        level.data()};
  }
};

// The arrays behind Origins, of references (N, Q, L, 2) or (N, Q, L, 4).
template <typename A>
struct OriginArrays {
  std::vector<typename IndexOf<A>::Type> whole;
  std::vector<A> part, unit;

  explicit OriginArrays(const Inputs& inputs) {
    if (!inputs.references) {
      return;
    }
    const int64_t levels = inputs.sizes.levels;
    const int64_t queries = inputs.sizes.images * inputs.sizes.queries;
    const int64_t coordinates = inputs.references->size(3);
    const int64_t size = queries * levels * 2 + kSamplePadding;
    whole.resize(size);
    part.resize(size);
    unit.resize(coordinates == 4 ? size : 0);
    const auto* references = static_cast<const A*>(inputs.references->const_data_ptr());
    const double share = 0.5 / static_cast<double>(inputs.sizes.points);  // of a box's size
    const auto set = [&](int64_t i, const A* reference, int64_t level_size) {
      const auto pixels = static_cast<double>(level_size);
      const double place = reference[0] * pixels - 0.5;
      const bool near = place > -kFar && place < kFar;  // not for NaN
      const double low = near ? std::floor(place) : 0.0;
      whole[i] = static_cast<typename IndexOf<A>::Type>(low);
      part[i] = near ? static_cast<A>(place - low) : std::numeric_limits<A>::quiet_NaN();
      if (coordinates == 4) {
        unit[i] = static_cast<A>(reference[2] * pixels * share);
      }
    };
    parallel_for(0, queries, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t query = begin; query < end; ++query) {
        for (int64_t l = 0; l < levels; ++l) {
          const int64_t i = query * levels + l;
          const A* reference = references + i * coordinates;
          set(2 * i, reference, inputs.levels[l].width);
          set(2 * i + 1, reference + 1, inputs.levels[l].height);
        }
      }
    });
  }
};

// The inputs in the types of the kernels. There is none for half precision: it becomes single.
Inputs in_kernel_types(Inputs inputs) {
  const ScalarType arithmetic = arithmetic_type(inputs.value);
  const auto readable = [&](const Tensor& tensor) {
    return to_contiguous(to_type(tensor, arithmetic));
  };
  if (inputs.value.scalar_type() == ScalarType::Half) {
    inputs.value = to_type(inputs.value, ScalarType::Float);
  }
  if (inputs.value.stride(3) != 1) {
    inputs.value = to_contiguous(inputs.value);
  }
  inputs.positions = readable(inputs.positions);
  inputs.weights = readable(inputs.weights);
  if (inputs.references) {
    inputs.references = readable(*inputs.references);
  }
  return inputs;
}

// Whether nothing is sampled, or there is nobody to sample.
bool is_empty(const Sizes& sizes) {
  return sizes.images == 0 || sizes.queries == 0 || sizes.heads == 0 || sizes.channels == 0 ||
      sizes.levels == 0 || sizes.points == 0 || sizes.positions == 0;
}

// ---- value rows ------------------------------------------------------------------------------

inline float convert(BFloat16 x, float /*to*/) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline BFloat16 convert(float x, BFloat16 /*to*/) {
  return to_bfloat16(x);
}

template <typename T>
inline T convert(T x, T /*to*/) {
  return x;
}

// Copies `size` elements from row to row; whole blocks without a call of memcpy.
template <typename From, typename To>
inline void copy_row(const From* from, To* to, int64_t size) {
  constexpr int64_t kBlock = 16;
  int64_t i = 0;
  for (; i + kBlock <= size; i += kBlock) {
    for (int64_t j = 0; j < kBlock; ++j) {
      to[i + j] = convert(from[i + j], To());
    }
  }
  for (; i < size; ++i) {
    to[i] = convert(from[i], To());
  }
}

// Rows that are fetched ahead of a copy: those of one head are apart, which processors do not foresee.
constexpr int64_t kCopyAhead = 16;
constexpr int64_t kCopyBlock = 256;  // positions that a thread copies at least

// The value rows (S, D) of heads [begin, end) of N * M, from (N, S, M, D) of any strides with D
// contiguous to (end - begin, S, channels), zeros from D on.
template <typename T, typename A>
void pack(const Tensor& value, int64_t begin, int64_t end, int64_t channels, A* packed) {
  const auto sizes = value.sizes();
  const auto strides = value.strides();
  const auto* from = static_cast<const T*>(value.const_data_ptr());
  parallel_for(0, sizes[1], kCopyBlock, [&](int64_t first, int64_t last) {
    for (int64_t head = begin; head < end; ++head) {
      const T* row = from + head / sizes[2] * strides[0] + first * strides[1] +
          head % sizes[2] * strides[2];
      A* to = packed + ((head - begin) * sizes[1] + first) * channels;
      for (int64_t s = first; s < last; ++s, row += strides[1], to += channels) {
        if (last - s > kCopyAhead) {  // 32 channels in single precision
          const auto* next = reinterpret_cast<const char*>(row + kCopyAhead * strides[1]);
          __builtin_prefetch(next);
          __builtin_prefetch(next + 64);
        }
        copy_row(row, to, sizes[3]);
        std::fill(to + sizes[3], to + channels, A(0));
      }
    }
  });
}

// The inverse for a contiguous value, without the padding.
template <typename T, typename A>
void unpack(
    const A* packed, int64_t begin, int64_t end, int64_t channels, const Sizes& sizes, T* to) {
  parallel_for(0, sizes.positions, kCopyBlock, [&](int64_t first, int64_t last) {
    for (int64_t head = begin; head < end; ++head) {
      const A* row = packed + ((head - begin) * sizes.positions + first) * channels;
      const int64_t position = head / sizes.heads * sizes.positions + first;
      T* next = to + (position * sizes.heads + head % sizes.heads) * sizes.channels;
      for (int64_t s = first; s < last; ++s) {
        copy_row(row, next, sizes.channels);
        row += channels;
        next += sizes.heads * sizes.channels;
      }
    }
  });
}

// The value rows of heads [begin, end) of N * M: packed (end - begin, S, channels), or where they lie
// in (N, S, M, D). Gradients of the rows are laid out alike.
template <typename V>
struct Group {
  int64_t begin;
  int64_t end;
  const V* value;
  bool packed;
  bool in_thread;  // whether a thread works on it alone
};

template <typename V, typename O, typename A>
Head<V, A> head_of(const Call<V, O, A>& call, const Group<V>& group, int64_t head, A* grad_rows) {
  const Sizes& sizes = call.sizes;
  const int64_t image = head / sizes.heads;
  const int64_t offset = group.packed
      ? (head - group.begin) * sizes.positions * call.channels
      : (image * sizes.positions * sizes.heads + head % sizes.heads) * call.channels;
  return {
      image, head % sizes.heads, group.value + offset, grad_rows ? grad_rows + offset : nullptr};
}

// ---- groups of heads -------------------------------------------------------------------------

// Whether to copy the value rows: where the kernels need padding, and where it pays, since the samples
// of the queries outnumber the rows.
bool must_pack(const Sizes& sizes) {
  return sizes.channels % kRowMultiple != 0 ||
      sizes.queries * sizes.levels * sizes.points * 4 >= kSamplesPerRow * sizes.positions;
}

// Whether the rows of one head can be counted in 32 bits, as the kernels do.
template <typename A>
bool fits(const Sizes& sizes, int64_t row_stride) {
  return sizeof(A) == sizeof(double) ||
      sizes.positions <= std::numeric_limits<int32_t>::max() / row_stride;
}

// Heads that are packed together: enough to fill the threads, and caches of about this size.
constexpr int64_t kGroupBytes = 4 << 20;

int64_t heads_in_group(int64_t heads, int64_t head_bytes) {
  return std::min(std::max<int64_t>(kGroupBytes / head_bytes, get_num_threads()), heads);
}

// Whether threads should take whole heads, from the copy of the rows on: what a thread then reads it
// has written itself, and no thread waits for another. It needs heads enough to share out evenly.
bool a_head_a_thread(int64_t heads) {
  const int64_t threads = get_num_threads();
  return heads % threads == 0 || heads >= 4 * threads;
}

template <typename V, typename O, typename A>
Call<V, O, A> make_call(const Inputs& inputs, const Table<A>& table, const OriginArrays<A>& origins) {
  Call<V, O, A> call{};
  call.sizes = inputs.sizes;
  call.table = table.view();
  call.samples = inputs.sizes.levels * inputs.sizes.points;
  call.padded_samples = static_cast<int64_t>(table.level.size());
  call.points = static_cast<const A*>(inputs.positions.const_data_ptr());
  call.weights = static_cast<const A*>(inputs.weights.const_data_ptr());
  if (inputs.references) {
    call.origins = {origins.whole.data(), origins.part.data(), origins.unit.data()};
    call.in_pixels = inputs.references->size(3) == 2;
  }
  return call;
}

// Calls f(call, group) for groups of heads: packed where that pays or must be, else all in one group
// where they lie.
template <typename T, typename F>
void for_groups(const Inputs& inputs, const F& f) {
  using A = Arithmetic<T>;
  const Sizes& sizes = inputs.sizes;
  const int64_t heads = sizes.images * sizes.heads;
  const Table<A> table(inputs, round_up(sizes.levels * sizes.points, kSamplePadding));
  const OriginArrays<A> origins(inputs);
  if (!must_pack(sizes) && fits<A>(sizes, sizes.heads * sizes.channels)) {
    const Tensor value = to_contiguous(inputs.value);
    auto call = make_call<T, T, A>(inputs, table, origins);
    call.channels = sizes.channels;
    call.row_stride = sizes.heads * sizes.channels;
    f(call, Group<T>{0, heads, static_cast<const T*>(value.const_data_ptr()), false, false});
    return;
  }
  auto call = make_call<A, T, A>(inputs, table, origins);
  call.channels = round_up(sizes.channels, kRowMultiple);
  call.row_stride = call.channels;
  STD_TORCH_CHECK(
      fits<A>(sizes, call.channels),
      "ms_deform_attn: value has S * D = ", sizes.positions, " * ", sizes.channels,
      " elements per head, more than 2^31: split it by channels");
  const int64_t head_size = sizes.positions * call.channels;
  const auto run = [&](int64_t first, int64_t last, int64_t group, bool in_thread) {
    const Buffer<A> rows(group * head_size);
    for (int64_t begin = first; begin < last; begin += group) {
      const int64_t end = std::min(begin + group, last);
      pack<T, A>(inputs.value, begin, end, call.channels, rows.data());
      f(call, Group<A>{begin, end, rows.data(), true, in_thread});
    }
  };
  if (a_head_a_thread(heads)) {
    const int64_t grain = kGrainSamples / (sizes.queries * call.samples + 1) + 1;
    parallel_for(0, heads, grain, [&](int64_t first, int64_t last) { run(first, last, 1, true); });
  } else {
    run(0, heads, heads_in_group(heads, head_size * static_cast<int64_t>(sizeof(A))), false);
  }
}

// Runs f(task, scratch) for all tasks on the threads of torch.
template <typename A, typename F>
void for_tasks(int64_t tasks, int64_t samples_per_task, int64_t padded_samples, const F& f) {
  const int64_t grain = kGrainSamples / (samples_per_task + 1) + 1;
  parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    const int64_t bytes = scratch_bytes<A>(padded_samples);
    const Buffer<char> scratch(bytes);
    std::memset(scratch.data(), 0, bytes);  // sums over whole vectors meet what was never written
    for (int64_t task = begin; task < end; ++task) {
      f(task, scratch.data());
    }
  });
}

// ---- forward ---------------------------------------------------------------------------------

template <typename V, typename O, typename A>
void forward_group(const Call<V, O, A>& call, const Group<V>& group) {
  const int64_t queries = call.sizes.queries;
  const int64_t blocks = (queries + kQueryBlock - 1) / kQueryBlock;
  const int64_t samples = std::min(queries, kQueryBlock) * call.samples;
  const int64_t tasks = (group.end - group.begin) * blocks;
  for_tasks<A>(tasks, samples, call.padded_samples, [&](int64_t task, char* scratch) {
    A* const none = nullptr;
    const auto head = head_of(call, group, group.begin + task / blocks, none);
    const int64_t begin = task % blocks * kQueryBlock;
    const int64_t end = std::min(begin + kQueryBlock, queries);
    PSF_CALL_KERNEL(forward, call, head, begin, end, scratch)
  });
}

template <typename T>
void forward_as(const Inputs& inputs, const Tensor& output) {
  for_groups<T>(inputs, [&](auto call, const auto& group) {
    call.output = static_cast<T*>(output.mutable_data_ptr());
    forward_group(call, group);
  });
}

// Calls f with a zero of the type in which kernels see the elements of value.
template <typename F>
void dispatch(const Tensor& value, const F& f) {
  switch (value.scalar_type()) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::BFloat16:
      return f(BFloat16());
    default:
      return f(float());
  }
}

Tensor forward(const Inputs& given) {
  const std::vector<int64_t> shape = output_shape(given.sizes);
  const ScalarType type = given.value.scalar_type();
  if (is_empty(given.sizes)) {
    return torch::stable::new_zeros(given.value, shape);
  }
  const Inputs inputs = in_kernel_types(given);
  const Tensor output = empty(shape, inputs.value.scalar_type(), inputs.value);
  dispatch(inputs.value, [&](auto zero) { forward_as<decltype(zero)>(inputs, output); });
  return to_type(output, type);
}

// ---- backward --------------------------------------------------------------------------------

// grad_rows is laid out like the group's values and added to, or null.
template <typename V, typename O, typename A>
void backward_group(const Call<V, O, A>& call, const Group<V>& group, A* grad_rows) {
  // A task owns the value rows it adds to, so nothing is added atomically and the order of
  // additions never changes: one head, or one level of it when there are threads to spare.
  const Sizes& sizes = call.sizes;
  const int64_t heads = group.end - group.begin;
  const int64_t parts = group.in_thread || heads >= get_num_threads() ? 1 : sizes.levels;
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

// Goes from the gradient of the points, which is that of locations for boxes and that of offsets else,
// to that of references, unless it is null, and to that of offsets, in place.
template <typename A>
void references_backward(const Inputs& inputs, A* grad_points, A* grad_references) {
  const Sizes& sizes = inputs.sizes;
  const int64_t coordinates = inputs.references->size(3);
  const auto* offsets = static_cast<const A*>(inputs.positions.const_data_ptr());
  const auto* references = static_cast<const A*>(inputs.references->const_data_ptr());
  const A share = A(0.5) / static_cast<A>(sizes.points);  // of a box's size
  const auto do_level = [&](int64_t i) {  // of N * Q * L
    const int64_t query = i / sizes.levels;
    const int64_t l = i % sizes.levels;
    const A* reference = references + i * coordinates;
    A sum[4] = {};
    for (int64_t m = 0; m < sizes.heads; ++m) {
      const int64_t first =
          ((query * sizes.heads + m) * sizes.levels + l) * sizes.points * 2;
      for (int64_t j = first; j < first + 2 * sizes.points; ++j) {
        const int64_t axis = j % 2;
        sum[axis] += grad_points[j];
        if (coordinates == 4) {
          // Not 0 * offset, which is NaN for the infinite offset of a sample outside.
          sum[2 + axis] += grad_points[j] == A(0) ? A(0) : grad_points[j] * offsets[j] * share;
          grad_points[j] *= reference[2 + axis] * share;
        }
      }
    }
    if (coordinates == 2) {
      sum[0] *= static_cast<A>(inputs.levels[l].width);
      sum[1] *= static_cast<A>(inputs.levels[l].height);
    }
    if (grad_references) {
      std::copy(sum, sum + coordinates, grad_references + i * coordinates);
    }
  };
  const int64_t grain = kGrainSamples / (sizes.heads * sizes.points) + 1;
  parallel_for(0, sizes.images * sizes.queries * sizes.levels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      do_level(i);
    }
  });
}

template <typename A>
void fill_zeros(A* array, int64_t size) {
  parallel_for(0, size, 1 << 16, [&](int64_t begin, int64_t end) {
    std::fill(array + begin, array + end, A(0));
  });
}

// Writes the gradients; that of references needs that of positions.
template <typename T>
void backward_as(const Inputs& inputs, const Tensor& grad_output, const GradientTensors& to) {
  using A = Arithmetic<T>;
  const auto pointer = [](const std::optional<Tensor>& tensor, auto zero) {
    return tensor ? static_cast<decltype(zero)*>(tensor->mutable_data_ptr()) : nullptr;
  };
  T* grad_value = pointer(to.value, T());
  for_groups<T>(inputs, [&](auto call, const auto& group) {
    call.grad_output = static_cast<const T*>(grad_output.const_data_ptr());
    call.grad_points = pointer(to.positions, A());
    call.grad_weights = pointer(to.weights, A());
    if (grad_value == nullptr) {
      backward_group(call, group, static_cast<A*>(nullptr));
      return;
    }
    const int64_t size = (group.end - group.begin) * call.sizes.positions * call.channels;
    if constexpr (std::is_same_v<T, A>) {
      if (!group.packed) {  // the rows of the gradient itself
        fill_zeros(grad_value, size);
        backward_group(call, group, grad_value);
        return;
      }
    }
    const Buffer<A> rows(size);
    fill_zeros(rows.data(), size);
    backward_group(call, group, rows.data());
    if (group.packed) {
      unpack(rows.data(), group.begin, group.end, call.channels, call.sizes, grad_value);
    } else {
      parallel_for(0, size, 1 << 16, [&](int64_t begin, int64_t end) {
        copy_row(rows.data() + begin, grad_value + begin, end - begin);
      });
    }
  });
  if (to.references || (to.positions && inputs.references && inputs.references->size(3) == 4)) {
    references_backward(inputs, pointer(to.positions, A()), pointer(to.references, A()));
  }
}

// The kernels are deterministic in any case.
GradientTensors backward(
    const Inputs& given, const Tensor& grad_output, const Wanted& wanted, bool /*deterministic*/) {
  const bool empty_call = is_empty(given.sizes);
  const Inputs inputs = empty_call ? given : in_kernel_types(given);
  const auto buffer = [&](bool is_wanted, const Tensor& like) -> std::optional<Tensor> {
    if (!is_wanted) {
      return std::nullopt;
    }
    return empty_call ? torch::stable::new_zeros(like, like.sizes())
                      : empty(like.sizes(), like.scalar_type(), like);
  };
  GradientTensors to = {
      buffer(wanted.value, inputs.value),
      wanted.references ? buffer(true, *inputs.references) : std::nullopt,
      buffer(wanted.positions || wanted.references, inputs.positions),
      buffer(wanted.weights, inputs.weights)};
  if (!empty_call) {
    const Tensor grad = to_contiguous(to_type(grad_output, inputs.value.scalar_type()));
    dispatch(inputs.value, [&](auto zero) { backward_as<decltype(zero)>(inputs, grad, to); });
  }
  if (!wanted.positions) {
    to.positions = std::nullopt;
  }
  return to;
}

std::string cpu_capability() {
  return kCapabilities[capability()];
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(psf, CPU, m) {
  Operators<&forward, &backward>::add_to(m);
}

STABLE_TORCH_LIBRARY_IMPL(psf, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace psf
