// The backward kernels that visit every sample: gradients by positions and weights, and, for the
// value gradient, one addition for every sample and pixel.
#include "ms_deform_attn_cuda_fixed_point.cuh"

namespace psf {
namespace {

constexpr unsigned kBackwardThreads = 256;
// Blocks of the main kernel that a multiprocessor should hold: for three, float spills a few of its
// registers, once for eight samples; double would spill ten times as many.
template <typename A>
constexpr int kBackwardBlocks = std::is_same_v<A, double> ? 2 : 3;

// Where gradients go. Pointers are null where one is not wanted.
struct Gradients {
  void* value;
  char* positions;
  char* weights;
  void* locations;
  const int32_t* exponent;  // of the fixed point of the value gradient
};

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

// The lane's part of the products of the output gradient with a sample's four pixels.
template <typename T, int kVector, typename A>
__device__ __forceinline__ void multiply(
    const Problem& problem,
    const Record<A>& record,
    const T* value,
    const A (&grad)[kVector],
    A (&products)[4]) {
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    products[corner] = 0;
  }
  if (record.index[0] < 0) {
    return;
  }
  A pixels[4][kVector];
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    load<false>(
        offset(value, record.index[corner], problem.position_stride_bytes), pixels[corner]);
  }
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
      products[corner] += grad[c] * pixels[corner][c];
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

// Stores the gradients of one sample, as far as they do not need the rest of the row, given the
// products of the output gradient with its four pixels. Returns the gradient by the weight, which
// may need it.
template <bool kFused, typename A>
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
    const DeviceAxis<A>& x = sample.x;
    const DeviceAxis<A>& y = sample.y;
    by_weight = y.weight[0] * (x.weight[0] * products[0] + x.weight[1] * products[1]) +
        y.weight[1] * (x.weight[0] * products[2] + x.weight[1] * products[3]);
    // Pixels outside stand for zeros.
    const auto slope = [](const DeviceAxis<A>& axis, A low, A high) {
      return (axis.inside[1] ? high : A(0)) - (axis.inside[0] ? low : A(0));
    };
    by_pixels.x = sample.weight *
        (y.weight[0] * slope(x, products[0], products[1]) +
         y.weight[1] * slope(x, products[2], products[3]));
    by_pixels.y = sample.weight *
        (x.weight[0] * slope(y, products[0], products[2]) +
         x.weight[1] * slope(y, products[1], products[3]));
  }
  if (gradients.positions != nullptr) {
    const Point<A> unit = pixels_per_unit<A, kFused>(problem, row, sample.level);
    const A result[2] = {by_pixels.x * unit.x, by_pixels.y * unit.y};
    char* to = gradients.positions + index * problem.position_bytes;
    if constexpr (kFused) {
      store_any(result, to, problem.positions_type);
    } else {
      store(result, reinterpret_cast<A*>(to));
    }
  }
  if (kFused && gradients.locations != nullptr) {
    const DeviceLevel& level = problem.levels[sample.level];
    const A result[2] = {by_pixels.x * level.width, by_pixels.y * level.height};
    store(result, static_cast<A*>(gradients.locations) + 2 * index);
  }
  if (!kFused && gradients.weights != nullptr) {
    const A result[1] = {by_weight};
    store_any(result, gradients.weights + index * problem.weight_bytes, problem.weights_type);
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
    const Softmax<A, true>& softmax,
    const A* by_weights) {
  const int32_t samples = row.live ? problem.samples : 0;
  A sum = 0;
  for (int32_t j = lane; j < samples; j += kLanes) {
    sum += softmax(load_weight<A>(problem, row, j)) * by_weights[j];
  }
  sum = reduce_group<kLanes>(sum, [](A a, A b) { return a + b; });
  for (int32_t j = lane; j < samples; j += kLanes) {
    const int64_t index = row.index * problem.samples + j;
    const A weight = softmax(load_weight<A>(problem, row, j));
    const A result[1] = {weight * (by_weights[j] - sum)};
    store_any(result, gradients.weights + index * problem.weight_bytes, problem.weights_type);
  }
}

// Does a group's kLanes samples for the kVector channels of each lane: adds to the value gradient,
// where that is not null, and to the lane's own four products of pixels and output gradient, which
// are those of the sample that the lane has prepared.
template <int kLanes, typename T, int kVector, typename A, bool kFixedPoint>
__device__ __forceinline__ void visit_samples(
    const Problem& problem,
    const Record<A>* records,
    const T* value,
    typename Adder<A, kFixedPoint>::Element* grad_value,
    const A (&grad)[kVector],
    const Adder<A, kFixedPoint>& add,
    A (&own)[4]) {
  constexpr int kBatch = kLanes < 8 ? kLanes : 8;  // samples whose products fit the registers
  const uint32_t grad_stride_bytes = problem.heads * problem.channels * sizeof(*grad_value);
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int batch = 0; batch < kLanes; batch += kBatch) {
    A products[kBatch][4];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const Record<A> record = records[batch + i];
      multiply(problem, record, value, grad, products[i]);
      if (grad_value != nullptr && record.index[0] >= 0) {
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          add(offset(grad_value, record.index[corner], grad_stride_bytes),
              record.weight[corner],
              grad);
        }
      }
    }
    sum_products<kLanes>(products, lane);
    if (lane / kBatch * kBatch == batch) {
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        own[corner] += products[0][corner];
      }
    }
  }
}

// As in the forward kernel, each lane prepares a sample and all lanes gather the pixels of each.
// The products of pixels and output gradient are then summed so that each lane ends with the sums
// of the sample it has prepared, and can finish its gradients.
template <typename T, bool kFused, int kLanes, int kVector, bool kFixedPoint>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<Arithmetic<T>>) backward_kernel(
    const __grid_constant__ Problem problem,
    const T* grad_output,
    const __grid_constant__ Gradients gradients) {
  using A = Arithmetic<T>;
  using Element = typename Adder<A, kFixedPoint>::Element;
  const int lane = threadIdx.x % kLanes;
  const int slot = threadIdx.x / kLanes;
  const Row row = find_row<kLanes>(problem);
  Record<A>* records =
      reinterpret_cast<Record<A>*>(shared_memory() + slot * kRecordBytes<A, kLanes>);
  // Gradients by the softmax's weights, fused only.
  A* by_weights =
      reinterpret_cast<A*>(shared_memory() + blockDim.x / kLanes * kRecordBytes<A, kLanes>) +
      slot * problem.samples;
  const Softmax<A, kFused> softmax = row_softmax<A, kFused, kLanes>(problem, row, lane);
  const Adder<A, kFixedPoint> add(problem, gradients);
  const bool wants_value = gradients.value != nullptr;
  const T* value_row = keep(
      static_cast<const T*>(problem.value) + row.image * problem.image_stride +
      row.head * problem.head_stride);
  Element* grad_row = keep(
      static_cast<Element*>(gradients.value) +
      (static_cast<int64_t>(row.image) * problem.positions_per_image * problem.heads + row.head) *
          problem.channels);
  A grad[kVector] = {};
  int32_t loaded = -1;  // the channels in grad
  for (int32_t chunk = 0; chunk < problem.samples; chunk += kLanes) {
    const int32_t j = chunk + lane;
    const Sample<A> sample = load_sample(problem, row, j, softmax);
    records[lane] = make_record(problem, sample);
    __syncwarp();
    A own[4] = {};
    for (int32_t first = 0; first < problem.channels; first += kLanes * kVector) {
      const bool active = first + lane * kVector < problem.channels;
      // Lanes without channels multiply channel 0 by a gradient of 0, and add nothing.
      const int32_t channel = active ? first + lane * kVector : 0;
      if (row.live && loaded != first) {
        load<true>(grad_output + row.index * problem.channels + channel, grad);
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
          grad[c] = active ? grad[c] : A(0);
        }
        loaded = first;
      }
      visit_samples<kLanes>(
          problem,
          records,
          value_row + channel,
          wants_value && active ? grad_row + channel : nullptr,
          grad,
          add,
          own);
    }
    if (row.live && j < problem.samples) {
      const A by_weight = finish_sample<kFused>(problem, gradients, row, j, sample, own);
      if constexpr (kFused) {
        by_weights[j] = by_weight;
      }
    }
    __syncwarp();  // all have read the records; shuffles alone do not order memory
  }
  if constexpr (kFused) {
    if (gradients.weights != nullptr) {
      finish_softmax<kLanes>(problem, gradients, row, lane, softmax, by_weights);
    }
  }
}

// One number of grad_references: the sum over heads and points of the gradients by locations, times
// what the location has of a box's side where that is meant.
template <typename A>
__device__ __forceinline__ A
sum_for_reference(const Problem& problem, int64_t element, const A* grad_locations) {
  const int32_t coordinate = element % problem.coordinates;
  const int64_t query_level = element / problem.coordinates;
  const int32_t level = query_level % problem.num_levels;
  const int64_t query = query_level / problem.num_levels;
  const int axis = coordinate % 2;
  A sum = 0;
  for (int32_t m = 0; m < problem.heads; ++m) {
    for (int32_t p = 0; p < problem.points; ++p) {
      const int64_t index =
          ((query * problem.heads + m) * problem.num_levels + level) * problem.points + p;
      A factor = 1;
      if (coordinate >= 2) {
        A offsets[2];
        load_any(
            problem.positions + index * problem.position_bytes, problem.positions_type, offsets);
        factor = offsets[axis] * (A(0.5) / static_cast<A>(problem.points));
      }
      // Not 0 * factor, which is NaN for the infinite offset of a sample outside.
      const A grad = __ldg(grad_locations + 2 * index + axis);
      sum += grad == A(0) ? A(0) : grad * factor;
    }
  }
  return sum;
}

template <typename A>
__global__ void __launch_bounds__(kBackwardThreads) reference_kernel(
    const __grid_constant__ Problem problem,
    int64_t elements,
    const A* grad_locations,
    A* grad_references) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < elements;
       i += threads) {
    __stcs(grad_references + i, sum_for_reference(problem, i, grad_locations));
  }
}

template <typename T, int kLanes, int kVector, bool kFixedPoint>
void launch_backward(
    const CudaInputs& inputs,
    const void* grad_output,
    const Gradients& gradients,
    CUstream_st* stream) {
  using A = Arithmetic<T>;
  const Sizes& sizes = inputs.sizes;
  dispatch_fused(inputs, [&](auto fused) {
    constexpr bool kFused = decltype(fused)::value;
    const size_t by_weights = kFused ? sizes.levels * sizes.points * sizeof(A) : 0;
    const size_t row_bytes = kRecordBytes<A, kLanes> + by_weights;
    unsigned threads = choose_threads(sizes, kLanes, kBackwardThreads);
    while (threads > 32 && threads / kLanes * row_bytes > kSharedBytes) {
      threads /= 2;
    }
    const unsigned rows = threads / kLanes;
    for_all_tiles(inputs, rows, [&](dim3 grid, const Problem& problem) {
      launch(
          &backward_kernel<T, kFused, kLanes, kVector, kFixedPoint>,
          grid,
          threads,
          rows * row_bytes,
          stream,
          problem,
          static_cast<const T*>(grad_output),
          gradients);
    });
  });
}

Gradients to_gradients(const CudaGradients& wanted, const int32_t* exponent) {
  return {
      wanted.value,
      static_cast<char*>(wanted.positions),
      static_cast<char*>(wanted.weights),
      wanted.locations,
      exponent};
}

}  // namespace

void ms_deform_attn_backward_cuda(
    const CudaInputs& inputs,
    const void* grad_output,
    const CudaGradients& wanted,
    CUstream_st* stream) {
  const Gradients gradients = to_gradients(wanted, nullptr);
  dispatch_type(inputs.type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>) {
      const int64_t vectors = inputs.sizes.channels / 4;
      if (loads_vectors(inputs, 4, sizeof(T))) {
        return vectors <= 4
            ? launch_backward<T, 4, 4, false>(inputs, grad_output, gradients, stream)
            : vectors <= 8
            ? launch_backward<T, 8, 4, false>(inputs, grad_output, gradients, stream)
            : launch_backward<T, 16, 4, false>(inputs, grad_output, gradients, stream);
      }
    }
    launch_backward<T, 8, 1, false>(inputs, grad_output, gradients, stream);
  });
}

void ms_deform_attn_deterministic_backward_cuda(
    const CudaInputs& inputs,
    const void* grad_output,
    const int32_t* exponent,
    const CudaGradients& wanted,
    CUstream_st* stream) {
  const Gradients gradients = to_gradients(wanted, exponent);
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

void reference_gradient_cuda(
    const CudaInputs& inputs,
    const void* grad_locations,
    void* grad_references,
    CUstream_st* stream) {
  const Sizes& sizes = inputs.sizes;
  const int64_t elements = sizes.images * sizes.queries * sizes.levels * inputs.coordinates;
  if (elements == 0) {
    return;
  }
  const auto launch_it = [&](auto zero) {
    using A = decltype(zero);
    launch(
        &reference_kernel<A>,
        blocks_for(elements, kBackwardThreads),
        kBackwardThreads,
        0,
        stream,
        make_problem(inputs),
        elements,
        static_cast<const A*>(grad_locations),
        static_cast<A*>(grad_references));
  };
  inputs.type == Scalar::kDouble ? launch_it(double()) : launch_it(float());
}

}  // namespace psf
