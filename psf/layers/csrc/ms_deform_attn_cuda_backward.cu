// The backward kernels that visit every sample: gradients by positions and weights, and, for the
// value gradient, one addition for every sample and pixel.
#include "ms_deform_attn_cuda_device.cuh"

namespace psf {
namespace {

constexpr unsigned kBackwardThreads = 256;
// Exponent of something infinite or NaN: above the sum of any two others.
constexpr int32_t kNotFinite = 1 << 20;

// Where gradients go. Pointers are null where one is not wanted.
struct Gradients {
  void* value;
  void* positions;
  void* weights;
  void* locations;
  void* softmax;
  const int32_t* exponent;  // of the fixed point of the value gradient
};

// An upper bound of |x| as a power of two.
template <typename A>
__device__ __forceinline__ int32_t exponent_of(A x) {
  if (!std::isfinite(x)) {
    return kNotFinite;
  }
  int exponent = kSmallestExponent / 2;
  if (x != A(0)) {
    std::frexp(x, &exponent);
  }
  return exponent;
}

// Units of the fixed point are 2^-result, so that the sum of all samples, Q * P of a level at most
// in one pixel, stays below 2^61 if each is below 2^exponent.
__device__ __forceinline__ int32_t fixed_point_scale(const Problem& problem, int32_t exponent) {
  const int64_t samples = static_cast<int64_t>(problem.queries) * problem.points;
  const int32_t sum_exponent = 64 - __clzll(samples);
  const int32_t scale = 61 - sum_exponent - exponent;
  return scale < 1000 ? scale : 1000;  // 2^scale must be a double
}

// A lane's part of a value gradient.
template <typename A, bool kFixedPoint>
struct Adder {
  using Element = std::conditional_t<kFixedPoint, unsigned long long, A>;

  double scale;

  __device__ __forceinline__ Adder(const Problem& problem, const Gradients& gradients) : scale(0) {
    if constexpr (kFixedPoint) {
      scale = std::ldexp(1.0, fixed_point_scale(problem, __ldg(gradients.exponent)));
    }
  }

  template <int kVector>
  __device__ __forceinline__ void operator()(
      Element* to, A weight, const A (&grad_output)[kVector]) const {
    if constexpr (kFixedPoint) {
      const double scaled = weight * scale;
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        const long long addend = std::llrint(scaled * grad_output[c]);
        atomicAdd(to + c, static_cast<unsigned long long>(addend));
      }
    } else if constexpr (kVector == 4) {
      atomic_add4(
          to,
          weight * grad_output[0],
          weight * grad_output[1],
          weight * grad_output[2],
          weight * grad_output[3]);
    } else {
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        atomicAdd(to + c, weight * grad_output[c]);
      }
    }
  }
};

// One step of the sums of 2 * kStep samples' four products over lanes: a lane keeps the half of the
// samples whose number has its own bit kStep, and gives the other half to the lane across.
template <int kStep, int kBatch, typename A>
__device__ __forceinline__ void transpose_add(A (&products)[kBatch][4], int lane) {
  const bool upper = lane & kStep;
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const A low = products[i][corner];
      const A high = products[i + kStep][corner];
      products[i][corner] =
          (upper ? high : low) + __shfl_xor_sync(kWholeWarp, upper ? low : high, kStep);
    }
  }
}

// Leaves in products[0] of each lane the sums over the group for sample lane % kBatch.
template <int kLanes, int kBatch, typename A>
__device__ __forceinline__ void sum_products(A (&products)[kBatch][4], int lane) {
  if constexpr (kBatch == 8) {
    transpose_add<4>(products, lane);
  }
  transpose_add<2>(products, lane);
  transpose_add<1>(products, lane);
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
    for (int step = kBatch; step < kLanes; step *= 2) {
      products[0][corner] += __shfl_xor_sync(kWholeWarp, products[0][corner], step);
    }
  }
}

// Gradients of one sample from the products of the output gradient with its four pixels (0 for
// pixels outside), as far as they do not need the rest of the row. Returns that by the weight.
template <typename A>
__device__ __forceinline__ A finish_sample(
    const Problem& problem,
    const Gradients& gradients,
    const Row& row,
    int32_t j,
    const Sample<A>& sample,
    const A (&products)[4]) {
  const int64_t index = row.index * problem.samples + j;
  A by_weight = 0;
  Point<A> by_pixels = {};
  if (sample.inside) {
    const A top = products[0] * sample.x.weight[0] + products[1] * sample.x.weight[1];
    const A bottom = products[2] * sample.x.weight[0] + products[3] * sample.x.weight[1];
    const A left = products[2] - products[0];
    const A right = products[3] - products[1];
    by_weight = top * sample.y.weight[0] + bottom * sample.y.weight[1];
    by_pixels.x = sample.weight *
        (sample.y.weight[0] * (products[1] - products[0]) +
         sample.y.weight[1] * (products[3] - products[2]));
    by_pixels.y = sample.weight * (sample.x.weight[0] * left + sample.x.weight[1] * right);
  }
  if (gradients.positions != nullptr) {
    const Point<A> unit = pixels_per_unit<A>(problem, row, sample.level);
    const A result[2] = {by_pixels.x * unit.x, by_pixels.y * unit.y};
    store_any(result, gradients.positions, problem.positions_type, index);
  }
  if (gradients.locations != nullptr) {
    const DeviceLevel& level = problem.levels[sample.level];
    const A result[2] = {by_pixels.x * level.width, by_pixels.y * level.height};
    store(result, static_cast<A*>(gradients.locations) + 2 * index);
  }
  return by_weight;
}

// The softmax's part of the row's gradients, once those by its weights wait in shared memory. Every
// lane reads those it wrote.
template <int kLanes, typename A>
__device__ __forceinline__ void finish_softmax(
    const Problem& problem,
    const Gradients& gradients,
    const Row& row,
    int lane,
    const Softmax<A>& softmax,
    const A* by_weights) {
  const auto load_weight = [&](int32_t j) {
    A logit[1];
    load_any(problem.weights, problem.weights_type, row.index * problem.samples + j, logit);
    return softmax(logit[0]);
  };
  const int32_t samples = row.live ? problem.samples : 0;
  A sum = 0;
  for (int32_t j = lane; j < samples; j += kLanes) {
    sum += load_weight(j) * by_weights[j];
  }
  sum = reduce_group<kLanes>(sum, [](A a, A b) { return a + b; });
  for (int32_t j = lane; j < samples; j += kLanes) {
    const int64_t index = row.index * problem.samples + j;
    const A weight[1] = {load_weight(j)};
    if (gradients.weights != nullptr) {
      const A result[1] = {weight[0] * (by_weights[j] - sum)};
      store_any(result, gradients.weights, problem.weights_type, index);
    }
    if (gradients.softmax != nullptr) {
      store(weight, static_cast<A*>(gradients.softmax) + index);
    }
  }
}

// As in the forward kernel, each lane prepares a sample and all lanes gather the pixels of each.
// The products of pixels and output gradient are then summed so that each lane ends with the sums
// of the sample it has prepared, and can finish its gradients.
template <typename T, int kLanes, int kVector, bool kFixedPoint>
__global__ void __launch_bounds__(kBackwardThreads) backward_kernel(
    const __grid_constant__ Problem problem,
    const T* grad_output,
    const __grid_constant__ Gradients gradients) {
  using A = Arithmetic<T>;
  using Element = typename Adder<A, kFixedPoint>::Element;
  constexpr int kBatch = kLanes < 8 ? kLanes : 8;  // samples whose products fit the registers
  const int lane = threadIdx.x % kLanes;
  const int slot = threadIdx.x / kLanes;
  const int rows = blockDim.x / kLanes;
  const Row row = find_row<kLanes>(problem);
  Record<A>* records =
      reinterpret_cast<Record<A>*>(shared_memory() + slot * kRecordBytes<A, kLanes>);
  A* by_weights = reinterpret_cast<A*>(shared_memory() + rows * kRecordBytes<A, kLanes>) +
      slot * problem.samples;
  const Softmax<A> softmax = row_softmax<A, kLanes>(problem, row, lane);
  const Adder<A, kFixedPoint> add(problem, gradients);
  const bool wants_value = gradients.value != nullptr;
  const bool wants_samples = gradients.positions != nullptr || gradients.weights != nullptr ||
      gradients.locations != nullptr;
  const int32_t grad_stride = problem.heads * problem.channels;
  A grad[kVector] = {};
  int32_t loaded = -1;  // the channels in grad
  for (int32_t chunk = 0; chunk < problem.samples; chunk += kLanes) {
    const int32_t j = chunk + lane;
    const Sample<A> sample = load_sample<A>(problem, row, j, softmax);
    records[lane] = make_record<true>(problem, sample);
    __syncwarp();
    A own[4] = {};
    for (int32_t first = 0; first < problem.channels; first += kLanes * kVector) {
      const int32_t channel = first + lane * kVector;
      const bool active = row.live && channel < problem.channels;
      if (active && loaded != first) {
        load<true>(grad_output + row.index * problem.channels + channel, grad);
        loaded = first;
      }
      const T* value = static_cast<const T*>(problem.value) + row.image * problem.image_stride +
          row.head * problem.head_stride + channel;
      Element* grad_value = static_cast<Element*>(gradients.value) +
          static_cast<int64_t>(row.image) * problem.positions_per_image * grad_stride +
          row.head * problem.channels + channel;
#pragma unroll
      for (int batch = 0; batch < kLanes; batch += kBatch) {
        A products[kBatch][4];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const Record<A> record = records[batch + i];
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            const int64_t index = record.index[corner];
            A product = 0;
            if (active && index >= 0) {
              if (wants_samples) {
                A pixel[kVector];
                load<false>(value + index * problem.position_stride, pixel);
#pragma unroll
                for (int c = 0; c < kVector; ++c) {
                  product += grad[c] * pixel[c];
                }
              }
              if (wants_value) {
                add(grad_value + index * grad_stride, record.weight[corner], grad);
              }
            }
            products[i][corner] = product;
          }
        }
        if (wants_samples) {
          sum_products<kLanes>(products, lane);
        }
        if (lane / kBatch * kBatch == batch) {
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            own[corner] += products[0][corner];
          }
        }
      }
    }
    if (wants_samples && row.live && j < problem.samples) {
      const A by_weight = finish_sample(problem, gradients, row, j, sample, own);
      if (softmax.used) {
        by_weights[j] = by_weight;
      } else if (gradients.weights != nullptr) {
        const A result[1] = {by_weight};
        store_any(
            result, gradients.weights, problem.weights_type, row.index * problem.samples + j);
      }
    }
    __syncwarp();
  }
  if (softmax.used && (gradients.weights != nullptr || gradients.softmax != nullptr)) {
    finish_softmax<kLanes>(problem, gradients, row, lane, softmax, by_weights);
  }
}

// Raises *exponent to that of a bound of all products of weights in use and output gradients.
template <typename T>
__global__ void __launch_bounds__(kBackwardThreads) exponent_kernel(
    const __grid_constant__ Problem problem, const T* grad_output, int32_t* exponent) {
  using A = Arithmetic<T>;
  constexpr int kLanes = 8;
  const int lane = threadIdx.x % kLanes;
  const Row row = find_row<kLanes>(problem);
  const Softmax<A> softmax = row_softmax<A, kLanes>(problem, row, lane);
  int32_t of_grad = kSmallestExponent / 2;
  int32_t of_weights = kSmallestExponent / 2;
  const int32_t channels = row.live ? problem.channels : 0;
  for (int32_t channel = lane; channel < channels; channel += kLanes) {
    A grad[1];
    load<true>(grad_output + row.index * problem.channels + channel, grad);
    const int32_t candidate = exponent_of(grad[0]);
    of_grad = candidate > of_grad ? candidate : of_grad;
  }
  for (int32_t j = lane; j < problem.samples; j += kLanes) {
    const Sample<A> sample = load_sample<A>(problem, row, j, softmax);
    const int32_t candidate = exponent_of(sample.weight);
    of_weights = candidate > of_weights ? candidate : of_weights;
  }
  const auto larger = [](int32_t a, int32_t b) { return a > b ? a : b; };
  of_grad = reduce_group<kLanes>(of_grad, larger);
  of_weights = reduce_group<kLanes>(of_weights, larger);
  // A row that samples nothing adds nothing, whatever its gradient.
  const bool samples_nothing = of_weights == kSmallestExponent / 2;
  int32_t result = samples_nothing ? kSmallestExponent : of_grad + of_weights;
  result = reduce_group<32>(result, larger);
  if (threadIdx.x % 32 == 0) {
    atomicMax(exponent, result);
  }
}

template <typename T>
__global__ void __launch_bounds__(kBackwardThreads) from_fixed_point_kernel(
    const __grid_constant__ Problem problem,
    int64_t elements,
    const int64_t* fixed_point,
    const int32_t* exponent,
    T* grad_value) {
  using A = Arithmetic<T>;
  const int32_t bound = __ldg(exponent);
  const double unit =
      bound >= kNotFinite / 2 ? NAN : std::ldexp(1.0, -fixed_point_scale(problem, bound));
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < elements;
       i += threads) {
    const double sum = __ldcs(reinterpret_cast<const long long*>(fixed_point) + i) * unit;
    const A result[1] = {static_cast<A>(sum)};
    store(result, grad_value + i);
  }
}

// One thread for each number of grad_references.
template <typename A>
__global__ void __launch_bounds__(kBackwardThreads) reference_kernel(
    const __grid_constant__ Problem problem, const A* grad_locations, A* grad_references) {
  const int64_t count = static_cast<int64_t>(problem.images) * problem.queries *
      problem.num_levels * problem.coordinates;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) {
    return;
  }
  const int32_t coordinate = i % problem.coordinates;
  const int64_t query_level = i / problem.coordinates;
  const int32_t level = query_level % problem.num_levels;
  const int64_t query = query_level / problem.num_levels;
  const bool is_size = coordinate >= 2;
  const int axis = coordinate % 2;
  A sum = 0;
  for (int32_t m = 0; m < problem.heads; ++m) {
    for (int32_t p = 0; p < problem.points; ++p) {
      const int64_t index =
          ((query * problem.heads + m) * problem.num_levels + level) * problem.points + p;
      A factor = 1;
      if (is_size) {
        A offset[2];
        load_any(problem.positions, problem.positions_type, index, offset);
        factor = offset[axis] * (A(0.5) / static_cast<A>(problem.points));
      }
      // Not factor * 0, which is NaN for the infinite offset of a sample outside.
      const A grad = __ldg(grad_locations + 2 * index + axis);
      sum += grad == A(0) ? A(0) : grad * factor;
    }
  }
  __stcs(grad_references + i, sum);
}

template <typename T, int kLanes, int kVector, bool kFixedPoint>
void launch_backward(
    const CudaInputs& inputs,
    const void* grad_output,
    const Gradients& gradients,
    CUstream_st* stream) {
  using A = Arithmetic<T>;
  const Sizes& sizes = inputs.sizes;
  const size_t by_weights =
      inputs.references != nullptr ? sizes.levels * sizes.points * sizeof(A) : 0;
  const size_t row_bytes = kRecordBytes<A, kLanes> + by_weights;
  unsigned threads = choose_threads(sizes, kLanes, kBackwardThreads);
  while (threads > 32 && threads / kLanes * row_bytes > kSharedBytes) {
    threads /= 2;
  }
  const unsigned rows = threads / kLanes;
  const Launch geometry = make_launch(inputs, rows);
  launch(
      &backward_kernel<T, kLanes, kVector, kFixedPoint>,
      make_grid(geometry.tiles * sizes.heads, sizes.images),
      threads,
      rows * row_bytes,
      stream,
      geometry.problem,
      static_cast<const T*>(grad_output),
      gradients);
}

}  // namespace

void ms_deform_attn_backward_cuda(
    const CudaInputs& inputs,
    const void* grad_output,
    const CudaGradients& wanted,
    CUstream_st* stream) {
  const Gradients gradients = {
      wanted.value, wanted.positions, wanted.weights, wanted.locations, wanted.softmax, nullptr};
  dispatch_type(inputs.type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>) {
      const int64_t vectors = inputs.sizes.channels / 4;
      if (loads_vectors(inputs, 4, sizeof(T))) {
        return vectors <= 4 ? launch_backward<T, 4, 4, false>(inputs, grad_output, gradients, stream)
            : vectors <= 8
            ? launch_backward<T, 8, 4, false>(inputs, grad_output, gradients, stream)
            : launch_backward<T, 16, 4, false>(inputs, grad_output, gradients, stream);
      }
    }
    launch_backward<T, 8, 1, false>(inputs, grad_output, gradients, stream);
  });
}

void value_gradient_exponent_cuda(
    const CudaInputs& inputs, const void* grad_output, int32_t* exponent, CUstream_st* stream) {
  const unsigned threads = choose_threads(inputs.sizes, 8, kBackwardThreads);
  const Launch geometry = make_launch(inputs, threads / 8);
  dispatch_type(inputs.type, [&](auto zero) {
    using T = decltype(zero);
    launch(
        &exponent_kernel<T>,
        make_grid(geometry.tiles * inputs.sizes.heads, inputs.sizes.images),
        threads,
        0,
        stream,
        geometry.problem,
        static_cast<const T*>(grad_output),
        exponent);
  });
}

void ms_deform_attn_deterministic_backward_cuda(
    const CudaInputs& inputs,
    const void* grad_output,
    const int32_t* exponent,
    const CudaGradients& wanted,
    CUstream_st* stream) {
  const Gradients gradients = {
      wanted.value, wanted.positions, wanted.weights, wanted.locations, wanted.softmax, exponent};
  dispatch_type(inputs.type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>) {
      if (loads_vectors(inputs, 4, sizeof(T))) {
        return launch_backward<T, 8, 4, true>(inputs, grad_output, gradients, stream);
      }
    }
    launch_backward<T, 8, 1, true>(inputs, grad_output, gradients, stream);
  });
}

void value_gradient_from_fixed_point_cuda(
    const CudaInputs& inputs,
    const int64_t* fixed_point,
    const int32_t* exponent,
    void* grad_value,
    CUstream_st* stream) {
  const Sizes& sizes = inputs.sizes;
  const int64_t elements = sizes.images * sizes.positions * sizes.heads * sizes.channels;
  if (elements == 0) {
    return;
  }
  const int64_t blocks = (elements + kBackwardThreads - 1) / kBackwardThreads;
  const Launch geometry = make_launch(inputs, 1);
  dispatch_type(inputs.type, [&](auto zero) {
    using T = decltype(zero);
    launch(
        &from_fixed_point_kernel<T>,
        dim3(static_cast<unsigned>(blocks < 65536 ? blocks : 65536)),
        kBackwardThreads,
        0,
        stream,
        geometry.problem,
        elements,
        fixed_point,
        exponent,
        static_cast<T*>(grad_value));
  });
}

void reference_gradient_cuda(
    const CudaInputs& inputs,
    const void* grad_locations,
    void* grad_references,
    CUstream_st* stream) {
  const Sizes& sizes = inputs.sizes;
  const int64_t count = sizes.images * sizes.queries * sizes.levels * inputs.coordinates;
  if (count == 0) {
    return;
  }
  const int64_t blocks = (count + kBackwardThreads - 1) / kBackwardThreads;
  const Launch geometry = make_launch(inputs, 1);
  const auto launch_it = [&](auto zero) {
    using A = decltype(zero);
    launch(
        &reference_kernel<A>,
        dim3(static_cast<unsigned>(blocks)),
        kBackwardThreads,
        0,
        stream,
        geometry.problem,
        static_cast<const A*>(grad_locations),
        static_cast<A*>(grad_references));
  };
  inputs.type == Scalar::kDouble ? launch_it(double()) : launch_it(float());
}

}  // namespace psf
