// CPU kernels. Portable C++: the loops over channels are written for the compiler's vectoriser.
#include "ms_deform_attn.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <array>
#include <type_traits>

namespace psf {
namespace {

// Samples a thread should have at least, to be worth waking.
constexpr int64_t kGrainSamples = 2048;

// Calls f with the number of channels as a compile-time constant for the common ones, else with 0.
template <typename F>
void specialise_channels(int64_t channels, const F& f) {
  switch (channels) {
    case 8:
      return f(std::integral_constant<int, 8>());
    case 12:
      return f(std::integral_constant<int, 12>());
    case 16:
      return f(std::integral_constant<int, 16>());
    case 32:
      return f(std::integral_constant<int, 32>());
    case 64:
      return f(std::integral_constant<int, 64>());
    default:
      return f(std::integral_constant<int, 0>());
  }
}

// The channels of one head: kChannels of them, or as many as given when kChannels is 0.
template <typename A, int kChannels>
class Channels {
 public:
  explicit Channels(int64_t channels) : channels_(channels) {
    if constexpr (kChannels == 0) {
      data_.resize(channels);
    }
  }

  int64_t size() const {
    return kChannels == 0 ? channels_ : kChannels;
  }

  A& operator[](int64_t d) {
    return data_[d];
  }

  A operator[](int64_t d) const {
    return data_[d];
  }

 private:
  int64_t channels_;
  std::conditional_t<kChannels == 0, std::vector<A>, std::array<A, kChannels>> data_;
};

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

// Sum of products in a fixed order that a vectoriser can follow: kLanes partial sums.
template <typename A, typename T, int kChannels>
A dot(const Channels<A, kChannels>& a, const T* b) {
  constexpr int kLanes = kChannels % 8 == 0 && kChannels > 0 ? 8 : 4;
  const int64_t whole = a.size() / kLanes * kLanes;
  std::array<A, kLanes> partial{};
  for (int64_t d = 0; d < whole; d += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      partial[lane] += a[d + lane] * static_cast<A>(b[d + lane]);
    }
  }
  A sum = 0;
  for (int64_t d = whole; d < a.size(); ++d) {
    sum += a[d] * static_cast<A>(b[d]);
  }
  for (const A lane : partial) {
    sum += lane;
  }
  return sum;
}

template <typename T, typename A, int kChannels>
void forward_rows(
    const Sizes& sizes,
    const std::vector<Level>& levels,
    const T* value,
    const A* locations,
    const A* weights,
    T* output,
    int64_t begin,
    int64_t end) {
  Channels<A, kChannels> sum(sizes.channels);
  const int64_t channels = sum.size();
  const int64_t stride = sizes.heads * channels;
  for (int64_t row = begin; row < end; ++row) {  // (n, q, m)
    const int64_t n = row / (sizes.queries * sizes.heads);
    const int64_t m = row % sizes.heads;
    const T* head = value + n * sizes.positions * stride + m * channels;
    for (int64_t d = 0; d < channels; ++d) {
      sum[d] = 0;
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
        for (int64_t d = 0; d < channels; ++d) {
          sum[d] += (w0 * static_cast<A>(v0[d]) + w1 * static_cast<A>(v1[d])) +
              (w2 * static_cast<A>(v2[d]) + w3 * static_cast<A>(v3[d]));
        }
      }
    }
    for (int64_t d = 0; d < channels; ++d) {
      output[row * channels + d] = static_cast<T>(sum[d]);
    }
  }
}

// All queries of one (image, head, level): what a thread owns, so that no two threads ever add to
// the same element.
template <typename T, typename A, int kChannels>
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
  Channels<A, kChannels> grad(sizes.channels);
  const int64_t channels = grad.size();
  const int64_t stride = sizes.heads * channels;
  const int64_t head = n * sizes.positions * stride + m * channels;
  for (int64_t q = 0; q < sizes.queries; ++q) {
    const int64_t row = (n * sizes.queries + q) * sizes.heads + m;
    for (int64_t d = 0; d < channels; ++d) {
      grad[d] = static_cast<A>(grad_output[row * channels + d]);
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
          for (int i = 0; i < 4; ++i) {
            const A weight = weights[sample] * at.weight[i];
            A* pixel = grad_value + head + at.offset[i];
            for (int64_t d = 0; d < channels; ++d) {
              pixel[d] += weight * grad[d];
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
  specialise_channels(sizes.channels, [&](auto channels) {
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      forward_rows<T, A, decltype(channels)::value>(
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
  specialise_channels(sizes.channels, [&](auto channels) {
    at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t l = task % sizes.levels;
        const int64_t m = task / sizes.levels % sizes.heads;
        const int64_t n = task / (sizes.levels * sizes.heads);
        backward_level<T, A, decltype(channels)::value>(
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

}  // namespace psf
