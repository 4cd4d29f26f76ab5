// CPU kernels, for any processor.
#include "ms_deform_attn_inputs.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <torch/library.h>

#include <array>
#include <cstring>
#include <type_traits>

namespace psf {
namespace {

// Samples a thread should have at least, to be worth waking.
constexpr int64_t kGrainSamples = 2048;

// Vectors of kLanes values, by GCC's and clang's extension: left to themselves they compile short
// loops over channels to scalar code. Other compilers get vectors of one value.
#ifdef __GNUC__
constexpr int kVectorBytes = 16;  // what every x86-64 and ARM64 processor has

template <typename A, int kLanes>
struct Vector {
  typedef A Type __attribute__((vector_size(kLanes * sizeof(A))));
};

template <typename A>
struct Vector<A, 1> {
  using Type = A;
};
#else
constexpr int kVectorBytes = 1;

template <typename A, int kLanes>
struct Vector {
  using Type = A;
};
#endif

// The channels of one head, kLanes at a time: kChannels of them, or as many as given when kChannels
// is 0. The number is a multiple of kLanes.
template <typename ScalarType, int kChannelCount, int kLaneCount>
struct Channels {
  using A = ScalarType;
  using Lanes = typename Vector<A, kLaneCount>::Type;
  static constexpr int kChannels = kChannelCount;
  static constexpr int kLanes = kLaneCount;

  explicit Channels(int64_t channels) : count(channels) {
    if constexpr (kChannels == 0) {
      lanes.resize(channels / kLanes);
    }
  }

  int64_t size() const {
    return kChannels == 0 ? count : kChannels;
  }

  int64_t vectors() const {
    return size() / kLanes;
  }

  int64_t count;
  std::conditional_t<kChannels == 0, std::vector<Lanes>, std::array<Lanes, kChannels / kLanes>>
      lanes;
};

// Calls f with a Channels type (as a null pointer) that fits the number of channels.
template <typename A, typename F>
void specialise_channels(int64_t channels, const F& f) {
  constexpr int kLanes = kVectorBytes < sizeof(A) ? 1 : kVectorBytes / sizeof(A);
  switch (channels) {
    case 8:
      return f(static_cast<Channels<A, 8, kLanes>*>(nullptr));
    case 12:
      return f(static_cast<Channels<A, 12, kLanes>*>(nullptr));
    case 16:
      return f(static_cast<Channels<A, 16, kLanes>*>(nullptr));
    case 32:
      return f(static_cast<Channels<A, 32, kLanes>*>(nullptr));
    case 64:
      return f(static_cast<Channels<A, 64, kLanes>*>(nullptr));
    default:
      return channels % kLanes == 0 ? f(static_cast<Channels<A, 0, kLanes>*>(nullptr))
                                    : f(static_cast<Channels<A, 0, 1>*>(nullptr));
  }
}

template <typename C, typename T>
typename C::Lanes load(const T* from) {
  typename C::Lanes lanes;
  if constexpr (std::is_same_v<T, typename C::A>) {
    std::memcpy(&lanes, from, sizeof(lanes));  // from may be unaligned
  } else {
    typename C::A converted[C::kLanes];
    for (int i = 0; i < C::kLanes; ++i) {
      converted[i] = static_cast<typename C::A>(from[i]);
    }
    std::memcpy(&lanes, converted, sizeof(lanes));
  }
  return lanes;
}

template <typename C, typename T>
void store(const typename C::Lanes& lanes, T* to) {
  typename C::A values[C::kLanes];
  std::memcpy(values, &lanes, sizeof(lanes));
  for (int i = 0; i < C::kLanes; ++i) {
    to[i] = static_cast<T>(values[i]);
  }
}

// The four pixels around a sample in one head's value rows, and their interpolation weights.
template <typename A>
struct Corners {
  std::array<int64_t, 4> offset;  // of the first channel, from the head's first position
  std::array<A, 4> weight;
};

template <typename A>
Corners<A> corners(const Axis<A>& y, const Axis<A>& x, const Level& level, int64_t stride) {
  const int64_t rows[2] = {
      (level.start + y.index[0] * level.width) * stride,
      (level.start + y.index[1] * level.width) * stride};
  const int64_t columns[2] = {x.index[0] * stride, x.index[1] * stride};
  Corners<A> result;
  for (int i = 0; i < 4; ++i) {
    result.offset[i] = rows[i / 2] + columns[i % 2];
    result.weight[i] = y.weight[i / 2] * x.weight[i % 2];
  }
  return result;
}

template <typename C, typename T>
typename C::A dot(const C& a, const T* b) {
  typename C::Lanes products{};
  for (int64_t i = 0; i < a.vectors(); ++i) {
    products += a.lanes[i] * load<C>(b + i * C::kLanes);
  }
  typename C::A values[C::kLanes];
  store<C>(products, values);
  typename C::A sum = values[0];
  for (int i = 1; i < C::kLanes; ++i) {
    sum += values[i];
  }
  return sum;
}

template <typename C, typename T, typename A>
void forward_rows(
    const Sizes& sizes,
    const std::vector<Level>& levels,
    const T* value,
    const A* locations,
    const A* weights,
    T* output,
    int64_t begin,
    int64_t end) {
  C sum(sizes.channels);
  const int64_t channels = sum.size();
  const int64_t stride = sizes.heads * channels;
  for (int64_t row = begin; row < end; ++row) {  // (n, q, m)
    const int64_t n = row / (sizes.queries * sizes.heads);
    const int64_t m = row % sizes.heads;
    const T* head = value + n * sizes.positions * stride + m * channels;
    for (typename C::Lanes& lanes : sum.lanes) {
      lanes = typename C::Lanes{};
    }
    int64_t sample = row * sizes.levels * sizes.points;
    for (const Level& level : levels) {
      for (int64_t p = 0; p < sizes.points; ++p, ++sample) {
        const A x = to_pixels(locations[2 * sample], level.width);
        const A y = to_pixels(locations[2 * sample + 1], level.height);
        if (!touches(x, level.width) || !touches(y, level.height)) {
          continue;
        }
        const Corners<A> at = corners(
            bilinear_axis(y, level.height), bilinear_axis(x, level.width), level, stride);
        const A w0 = weights[sample] * at.weight[0];
        const A w1 = weights[sample] * at.weight[1];
        const A w2 = weights[sample] * at.weight[2];
        const A w3 = weights[sample] * at.weight[3];
        const T* v0 = head + at.offset[0];
        const T* v1 = head + at.offset[1];
        const T* v2 = head + at.offset[2];
        const T* v3 = head + at.offset[3];
        for (int64_t i = 0; i < sum.vectors(); ++i) {
          const int64_t d = i * C::kLanes;
          sum.lanes[i] += (w0 * load<C>(v0 + d) + w1 * load<C>(v1 + d)) +
              (w2 * load<C>(v2 + d) + w3 * load<C>(v3 + d));
        }
      }
    }
    for (int64_t i = 0; i < sum.vectors(); ++i) {
      store<C>(sum.lanes[i], output + row * channels + i * C::kLanes);
    }
  }
}

// All queries of one (image, head, level): what a thread owns, so that no two threads ever add to
// the same element.
template <typename C, typename T, typename A>
void backward_level(
    const Sizes& sizes,
    const Level& level,
    int64_t n,
    int64_t m,
    int64_t l,
    const T* grad_output,
    const T* value,
    const A* locations,
    const A* weights,
    A* grad_value,
    A* grad_locations,
    A* grad_weights) {
  C grad(sizes.channels);
  const int64_t channels = grad.size();
  const int64_t stride = sizes.heads * channels;
  const int64_t head = n * sizes.positions * stride + m * channels;
  for (int64_t q = 0; q < sizes.queries; ++q) {
    const int64_t row = (n * sizes.queries + q) * sizes.heads + m;
    for (int64_t i = 0; i < grad.vectors(); ++i) {
      grad.lanes[i] = load<C>(grad_output + row * channels + i * C::kLanes);
    }
    for (int64_t p = 0; p < sizes.points; ++p) {
      const int64_t sample = (row * sizes.levels + l) * sizes.points + p;
      const A location_x = to_pixels(locations[2 * sample], level.width);
      const A location_y = to_pixels(locations[2 * sample + 1], level.height);
      A grad_x = 0;
      A grad_y = 0;
      A grad_weight = 0;
      if (touches(location_x, level.width) && touches(location_y, level.height)) {
        const Axis<A> x = bilinear_axis(location_x, level.width);
        const Axis<A> y = bilinear_axis(location_y, level.height);
        const Corners<A> at = corners(y, x, level, stride);
        if (grad_value) {
          for (int corner = 0; corner < 4; ++corner) {
            const A weight = weights[sample] * at.weight[corner];
            A* pixel = grad_value + head + at.offset[corner];
            for (int64_t i = 0; i < grad.vectors(); ++i) {
              A* to = pixel + i * C::kLanes;
              store<C>(load<C>(to) + weight * grad.lanes[i], to);
            }
          }
        }
        if (grad_locations || grad_weights) {
          for (int i = 0; i < 4; ++i) {
            const A product = dot(grad, value + head + at.offset[i]);
            grad_weight += at.weight[i] * product;
            grad_x += y.weight[i / 2] * x.slope[i % 2] * product;
            grad_y += y.slope[i / 2] * x.weight[i % 2] * product;
          }
          grad_x *= weights[sample] * static_cast<A>(level.width);
          grad_y *= weights[sample] * static_cast<A>(level.height);
        }
      }
      if (grad_locations) {
        grad_locations[2 * sample] = grad_x;
        grad_locations[2 * sample + 1] = grad_y;
      }
      if (grad_weights) {
        grad_weights[sample] = grad_weight;
      }
    }
  }
}

}  // namespace

template <typename T, typename A>
void ms_deform_attn_cpu(
    const Sizes& sizes,
    const std::vector<Level>& levels,
    const T* value,
    const A* locations,
    const A* weights,
    T* output) {
  const int64_t rows = sizes.images * sizes.queries * sizes.heads;
  const int64_t samples = sizes.levels * sizes.points;
  const int64_t grain = kGrainSamples / (samples + 1) + 1;
  specialise_channels<A>(sizes.channels, [&](auto* channels) {
    using C = std::remove_pointer_t<decltype(channels)>;
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      forward_rows<C, T, A>(
          sizes, levels, value, locations, weights, output, begin, end);
    });
  });
}

template <typename T, typename A>
void ms_deform_attn_backward_cpu(
    const Sizes& sizes,
    const std::vector<Level>& levels,
    const T* grad_output,
    const T* value,
    const A* locations,
    const A* weights,
    A* grad_value,
    A* grad_locations,
    A* grad_weights) {
  const int64_t tasks = sizes.images * sizes.heads * sizes.levels;
  const int64_t grain = kGrainSamples / (sizes.queries * sizes.points + 1) + 1;
  specialise_channels<A>(sizes.channels, [&](auto* channels) {
    using C = std::remove_pointer_t<decltype(channels)>;
    at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t l = task % sizes.levels;
        const int64_t m = task / sizes.levels % sizes.heads;
        const int64_t n = task / (sizes.levels * sizes.heads);
        backward_level<C, T, A>(
            sizes,
            levels[l],
            n,
            m,
            l,
            grad_output,
            value,
            locations,
            weights,
            grad_value,
            grad_locations,
            grad_weights);
      }
    });
  });
}

#define PSF_INSTANTIATE(T, A)            \
  template void ms_deform_attn_cpu<T, A>( \
      const Sizes&, const std::vector<Level>&, const T*, const A*, const A*, T*); \
  template void ms_deform_attn_backward_cpu<T, A>( \
      const Sizes&, \
      const std::vector<Level>&, \
      const T*, \
      const T*, \
      const A*, \
      const A*, \
      A*, \
      A*, \
      A*);

PSF_INSTANTIATE(double, double)
PSF_INSTANTIATE(float, float)
PSF_INSTANTIATE(c10::BFloat16, float)
PSF_INSTANTIATE(c10::Half, float)

namespace {

using at::Tensor;

// The CPU kernels are deterministic, so the flag changes nothing.
Tensor forward_cpu(
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights,
    bool /*deterministic*/) {
  const Inputs inputs = check_inputs(value, spatial_shapes, locations, weights);
  const Sizes& sizes = inputs.sizes;
  const Tensor v = value.contiguous();
  const Tensor x = locations.to(accumulator_type(value)).contiguous();
  const Tensor w = weights.to(accumulator_type(value)).contiguous();
  Tensor output =
      at::empty({sizes.images, sizes.queries, sizes.heads * sizes.channels}, value.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn", [&] {
        using A = Accumulator<scalar_t>;
        ms_deform_attn_cpu<scalar_t, A>(
            sizes,
            inputs.levels,
            v.const_data_ptr<scalar_t>(),
            x.const_data_ptr<A>(),
            w.const_data_ptr<A>(),
            output.mutable_data_ptr<scalar_t>());
      });
  return output;
}

// A gradient that is not asked for is returned as an empty tensor (0,), since the result of a
// dispatched operator should be a defined tensor.
Gradients backward_cpu(
    const Tensor& grad_output,
    const Tensor& value,
    at::IntArrayRef spatial_shapes,
    const Tensor& locations,
    const Tensor& weights,
    std::array<bool, 3> output_mask,
    bool /*deterministic*/) {
  const Inputs inputs = check_inputs(value, spatial_shapes, locations, weights);
  const Sizes& sizes = inputs.sizes;
  check_grad_output(grad_output, value, sizes);
  const Tensor v = value.contiguous();
  const Tensor x = locations.to(accumulator_type(value)).contiguous();
  const Tensor w = weights.to(accumulator_type(value)).contiguous();
  const Tensor grad = grad_output.to(value.scalar_type()).contiguous();
  const auto options = x.options();  // of the arithmetic
  const auto buffer = [&](bool wanted, const Tensor& like) {
    return wanted ? at::empty_like(like) : at::empty({0}, options);
  };
  Tensor grad_value = at::zeros(output_mask[0] ? value.sizes() : at::IntArrayRef({0}), options);
  Tensor grad_locations = buffer(output_mask[1], x);
  Tensor grad_weights = buffer(output_mask[2], w);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_backward", [&] {
        using A = Accumulator<scalar_t>;
        ms_deform_attn_backward_cpu<scalar_t, A>(
            sizes,
            inputs.levels,
            grad.const_data_ptr<scalar_t>(),
            v.const_data_ptr<scalar_t>(),
            x.const_data_ptr<A>(),
            w.const_data_ptr<A>(),
            output_mask[0] ? grad_value.mutable_data_ptr<A>() : nullptr,
            output_mask[1] ? grad_locations.mutable_data_ptr<A>() : nullptr,
            output_mask[2] ? grad_weights.mutable_data_ptr<A>() : nullptr);
      });
  return {
      grad_value.to(value.scalar_type()),
      grad_locations.to(locations.scalar_type()),
      grad_weights.to(weights.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(psf, CPU, m) {
  m.impl("ms_deform_attn", &forward_cpu);
  m.impl("ms_deform_attn_backward", &backward_cpu);
}

}  // namespace psf
