// The forward kernel.
#include "ms_deform_attn_cuda_samples.cuh"

namespace psf {
namespace {

constexpr unsigned kForwardThreads = 512;

// Each lane prepares one sample of its row at a time, kLanes together, and leaves it in shared
// memory; then all lanes gather the four pixels of each and add them up in registers. Where a row
// has more channels than the group has room for (kManyRounds) all this is done again for the rest.
template <typename T, bool kFused, int kLanes, int kVector, bool kManyRounds>
__global__ void __launch_bounds__(kForwardThreads)
    forward_kernel(const __grid_constant__ Problem problem, T* output) {
  using A = Arithmetic<T>;
  const int lane = threadIdx.x % kLanes;
  const Row row = find_row<kLanes>(problem);
  Record<A>* records = reinterpret_cast<Record<A>*>(
      shared_memory() + threadIdx.x / kLanes * kRecordBytes<A, kLanes>);
  const Softmax<A, kFused> softmax = row_softmax<A, kFused, kLanes>(problem, row, lane);
  int32_t first = 0;
  do {
    const int32_t channel = first + lane * kVector;
    const bool active = channel < problem.channels;
    // Lanes without channels gather channel 0 and drop it.
    const T* value =
        keep(static_cast<const T*>(problem.value) + row.image * problem.image_stride +
             row.head * problem.head_stride + (active ? channel : 0));
    A sum[kVector] = {};
    for (int32_t chunk = 0; chunk < problem.samples; chunk += kLanes) {
      records[lane] = make_record(problem, load_sample(problem, row, chunk + lane, softmax));
      __syncwarp();
#pragma unroll 4
      for (int i = 0; i < kLanes; ++i) {
        const Record<A> record = records[i];
        if (record.index[0] >= 0) {
          A pixels[4][kVector];
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            load<false>(
                offset(value, record.index[corner], problem.position_stride_bytes),
                pixels[corner]);
          }
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
            for (int c = 0; c < kVector; ++c) {
              sum[c] += record.weight[corner] * pixels[corner][c];
            }
          }
        }
      }
      __syncwarp();
    }
    if (row.live && active) {
      store(sum, output + row.index * problem.channels + channel);
    }
    first += kLanes * kVector;
  } while (kManyRounds && first < problem.channels);
}

template <typename T, int kLanes, int kVector, bool kManyRounds>
void launch_forward(const CudaInputs& inputs, void* output, CUstream_st* stream) {
  const unsigned threads = choose_threads(inputs.sizes, kLanes, kForwardThreads);
  const unsigned rows = threads / kLanes;
  const size_t shared = rows * kRecordBytes<Arithmetic<T>, kLanes>;
  dispatch_fused(inputs, [&](auto fused) {
    for_all_tiles(inputs, rows, [&](dim3 grid, const Problem& problem) {
      launch(
          &forward_kernel<T, decltype(fused)::value, kLanes, kVector, kManyRounds>,
          grid,
          threads,
          shared,
          stream,
          problem,
          static_cast<T*>(output));
    });
  });
}

}  // namespace

int32_t launch_error_cuda() {
  return static_cast<int32_t>(cudaGetLastError());
}

void ms_deform_attn_cuda(const CudaInputs& inputs, void* output, CUstream_st* stream) {
  dispatch_type(inputs.type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>) {
      constexpr int kVector = 16 / sizeof(T);
      const int64_t vectors = inputs.sizes.channels / kVector;
      if (loads_vectors(inputs, kVector, sizeof(T))) {
        return vectors <= 2 ? launch_forward<T, 2, kVector, false>(inputs, output, stream)
            : vectors <= 4  ? launch_forward<T, 4, kVector, false>(inputs, output, stream)
            : vectors <= 8  ? launch_forward<T, 8, kVector, false>(inputs, output, stream)
                            : launch_forward<T, 16, kVector, true>(inputs, output, stream);
      }
    }
    launch_forward<T, 8, 1, true>(inputs, output, stream);
  });
}

}  // namespace psf
