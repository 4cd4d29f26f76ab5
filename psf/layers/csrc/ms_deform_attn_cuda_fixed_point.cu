// The kernels before and after the deterministic backward: they find the bound that sets the units
// of its fixed point, and convert its sums.
#include "ms_deform_attn_cuda_fixed_point.cuh"

namespace psf {
namespace {

constexpr unsigned kThreads = 256;

// An upper bound of |x| as a power of two.
template <typename A>
__device__ __forceinline__ int32_t exponent_of(A x) {
  if (!std::isfinite(x)) {
    return kNotFinite;
  }
  int exponent = kNothing;
  if (x != A(0)) {
    std::frexp(x, &exponent);
  }
  return exponent;
}

// Raises *exponent to that of a bound of all products of weights in use and output gradients.
template <typename T, bool kFused>
__global__ void __launch_bounds__(kThreads) exponent_kernel(
    const __grid_constant__ Problem problem, const T* grad_output, int32_t* exponent) {
  using A = Arithmetic<T>;
  constexpr int kLanes = 8;
  const int lane = threadIdx.x % kLanes;
  const Row row = find_row<kLanes>(problem);
  const Softmax<A, kFused> softmax = row_softmax<A, kFused, kLanes>(problem, row, lane);
  const auto larger = [](int32_t a, int32_t b) { return a > b ? a : b; };
  int32_t of_grad = kNothing;
  int32_t of_weights = kNothing;
  const int32_t channels = row.live ? problem.channels : 0;
  for (int32_t channel = lane; channel < channels; channel += kLanes) {
    A grad[1];
    load<true>(grad_output + row.index * problem.channels + channel, grad);
    of_grad = larger(of_grad, exponent_of(grad[0]));
  }
  for (int32_t j = lane; j < problem.samples; j += kLanes) {
    const Sample<A> sample = load_sample(problem, row, j, softmax);
    of_weights = larger(of_weights, sample.inside ? exponent_of(sample.weight) : kNothing);
  }
  of_grad = reduce_group<kLanes>(of_grad, larger);
  of_weights = reduce_group<kLanes>(of_weights, larger);
  // A row that samples nothing adds nothing, whatever its gradient.
  const int32_t of_row = of_weights == kNothing ? 2 * kNothing : of_grad + of_weights;
  const int32_t of_warp = reduce_group<32>(of_row, larger);
  if (threadIdx.x % 32 == 0) {
    atomicMax(exponent, of_warp);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) from_fixed_point_kernel(
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

}  // namespace

void value_gradient_exponent_cuda(
    const CudaInputs& inputs, const void* grad_output, int32_t* exponent, CUstream_st* stream) {
  const unsigned threads = choose_threads(inputs.sizes, 8, kThreads);
  dispatch_type(inputs.type, [&](auto zero) {
    using T = decltype(zero);
    dispatch_fused(inputs, [&](auto fused) {
      const int64_t rows = threads / 8;
      for_all_tiles(inputs, rows, [&](dim3 grid, const Problem& problem) {
        launch(
            &exponent_kernel<T, decltype(fused)::value>,
            grid,
            threads,
            0,
            stream,
            problem,
            static_cast<const T*>(grad_output),
            exponent);
      });
    });
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
  dispatch_type(inputs.type, [&](auto zero) {
    using T = decltype(zero);
    launch(
        &from_fixed_point_kernel<T>,
        blocks_for(elements, kThreads),
        kThreads,
        0,
        stream,
        make_problem(inputs),
        elements,
        fixed_point,
        exponent,
        static_cast<T*>(grad_value));
  });
}

}  // namespace psf
