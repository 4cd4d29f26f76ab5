// The value gradient with few atomics: the samples of a tile of queries are sorted by pixel in
// shared memory, and what they add to a pixel is summed in registers first. The neighbouring
// queries of an encoder share most of their pixels; queries that sample at random share few.
#include "ms_deform_attn_cuda_samples.cuh"

namespace psf {
namespace {

constexpr int kThreads = 256;
constexpr int kEntries = 4 * kThreads;  // one sample, four pixels, for each thread
constexpr int kWindow = 32;             // side of the square of pixels that are sorted
constexpr int kBins = kWindow * kWindow;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxRows = 64;

struct alignas(16) FourFloats {
  float at[4];
};

// What a tile adds to one pixel: the weight times the output gradient of the row in a slot.
struct Sorting {
  int32_t starts[kBins + 1];  // counts of the pixels' entries, then where these begin
  int32_t slots[kEntries];
  float weights[kEntries];
  int32_t far_pixels[kEntries];  // of entries outside the window, which fill the end, backwards
  int32_t num_far;
  float x_sums[kWarps];
  float y_sums[kWarps];
  float inside_sums[kWarps];
  int32_t totals[kWarps];
};

constexpr size_t kSortingBytes = (sizeof(Sorting) + 15) / 16 * 16;

struct Corner {
  int32_t x;
  int32_t y;
};

// The window's first pixel, so that its middle is the mean of the block's samples. A barrier.
__device__ __forceinline__ Corner place_window(Sorting& sorting, const Sample<float>& sample) {
  const auto sum = [&](int32_t number) {
    const float addend = sample.inside ? static_cast<float>(number) : 0.0f;
    return reduce_group<32>(addend, [](float a, float b) { return a + b; });
  };
  const float x = sum(sample.x.index[0]);
  const float y = sum(sample.y.index[0]);
  const float inside = sum(1);
  if (threadIdx.x % 32 == 0) {
    sorting.x_sums[threadIdx.x / 32] = x;
    sorting.y_sums[threadIdx.x / 32] = y;
    sorting.inside_sums[threadIdx.x / 32] = inside;
  }
  __syncthreads();
  float x_sum = 0;
  float y_sum = 0;
  float inside_sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    x_sum += sorting.x_sums[warp];
    y_sum += sorting.y_sums[warp];
    inside_sum += sorting.inside_sums[warp];
  }
  const float count = inside_sum > 0 ? inside_sum : 1.0f;
  return {
      static_cast<int32_t>(x_sum / count) - kWindow / 2,
      static_cast<int32_t>(y_sum / count) - kWindow / 2};
}

// Counts to starts. Begins and ends with a barrier.
__device__ __forceinline__ void sum_counts(Sorting& sorting) {
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int32_t* own = sorting.starts + threadIdx.x * kBinsPerThread;
  int32_t total = 0;
  for (int i = 0; i < kBinsPerThread; ++i) {
    total += own[i];
  }
  int32_t up_to = total;  // sum of the lanes up to this one
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t before = __shfl_up_sync(kWholeWarp, up_to, step);
    up_to += lane >= step ? before : 0;
  }
  if (lane == 31) {
    sorting.totals[warp] = up_to;
  }
  __syncthreads();
  int32_t start = up_to - total;
  for (int i = 0; i < warp; ++i) {
    start += sorting.totals[i];
  }
  for (int i = 0; i < kBinsPerThread; ++i) {
    const int32_t count = own[i];
    own[i] = start;
    start += count;
  }
  if (threadIdx.x == kThreads - 1) {
    sorting.starts[kBins] = start;
  }
  __syncthreads();
}

// Sorts one sample of every thread. Begins with a barrier (in place_window) and ends with one.
__device__ __forceinline__ void sort_samples(
    Sorting& sorting,
    const Sample<float>& sample,
    const Record<float>& record,
    int32_t slot,
    Corner window) {
  int32_t bins[4];
  int32_t ranks[4];
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const int32_t x = sample.x.index[corner % 2] - window.x;
    const int32_t y = sample.y.index[corner / 2] - window.y;
    const bool in_window = x >= 0 && x < kWindow && y >= 0 && y < kWindow;
    bins[corner] = sample.inside && in_window ? y * kWindow + x : -1;
    if (bins[corner] >= 0) {
      ranks[corner] = atomicAdd(&sorting.starts[bins[corner]], 1);
    } else if (sample.inside) {
      const int32_t entry = kEntries - 1 - atomicAdd(&sorting.num_far, 1);
      sorting.slots[entry] = slot;
      sorting.weights[entry] = record.weight[corner];
      sorting.far_pixels[entry] = record.index[corner];
    }
  }
  sum_counts(sorting);
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    if (bins[corner] >= 0) {
      const int32_t entry = sorting.starts[bins[corner]] + ranks[corner];
      sorting.slots[entry] = slot;
      sorting.weights[entry] = record.weight[corner];
    }
  }
  __syncthreads();
}

// The output gradients of a tile's rows, (rows, D) in shared memory; 0 for rows beyond the queries.
struct TileGradients {
  const char* grad_output;
  Scalar type;
  int32_t bytes;  // of one number
  int32_t rows;
};

__device__ __forceinline__ void load_gradients(
    const Problem& problem, const TileGradients& tile, int32_t head, FourFloats* grads) {
  const int32_t vectors = problem.channels / 4;
  for (int32_t i = threadIdx.x; i < tile.rows * vectors; i += kThreads) {
    const Row row = find_row(problem, head, i / vectors, tile.rows);
    FourFloats grad = {};
    if (row.live) {
      const int64_t index = row.index * problem.channels + i % vectors * 4;
      load_any(tile.grad_output + index * tile.bytes, tile.type, grad.at);
    }
    grads[i] = grad;
  }
}

// Adds the sum of the entries [begin, end) to a pixel: four channels a thread of a group of kLanes.
template <int kLanes>
__device__ __forceinline__ void add_entries(
    const Sorting& sorting,
    const FourFloats* grads,
    int32_t begin,
    int32_t end,
    int32_t channels,
    float* pixel) {
  const int32_t vectors = channels / 4;
  for (int32_t vector = threadIdx.x % kLanes; vector < vectors; vector += kLanes) {
    FourFloats sum = {};
    for (int32_t entry = begin; entry < end; ++entry) {
      const FourFloats grad = grads[sorting.slots[entry] * vectors + vector];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sum.at[c] += sorting.weights[entry] * grad.at[c];
      }
    }
    atomic_add4(pixel + 4 * vector, sum.at[0], sum.at[1], sum.at[2], sum.at[3]);
  }
}

// Adds what has been sorted, every group of kLanes a pixel at a time, to one head of an image.
template <int kLanes>
__device__ __forceinline__ void add_sorted(
    const Problem& problem,
    const Sorting& sorting,
    const FourFloats* grads,
    const DeviceLevel& level,
    Corner window,
    float* grad_head) {
  constexpr int kGroups = kThreads / kLanes;
  const int group = threadIdx.x / kLanes;
  const int64_t stride = problem.heads * problem.channels;
  for (int32_t bin = group; bin < kBins; bin += kGroups) {
    const int32_t begin = sorting.starts[bin];
    const int32_t end = sorting.starts[bin + 1];
    if (begin < end) {
      const int32_t x = window.x + bin % kWindow;
      const int32_t y = window.y + bin / kWindow;
      float* pixel = grad_head + stride * (level.start + y * level.width + x);
      add_entries<kLanes>(sorting, grads, begin, end, problem.channels, pixel);
    }
  }
  for (int32_t i = group; i < sorting.num_far; i += kGroups) {
    const int32_t entry = kEntries - 1 - i;
    float* pixel = grad_head + stride * sorting.far_pixels[entry];
    add_entries<kLanes>(sorting, grads, entry, entry + 1, problem.channels, pixel);
  }
}

// A sample with its weight as stored, also in the fused variant: there the softmax is stored.
template <bool kFused>
__device__ __forceinline__ Sample<float>
load_weighted_sample(const Problem& problem, const Row& row, int32_t j) {
  Sample<float> sample = load_sample(problem, row, j, Softmax<float, kFused>{0, 0});
  if (kFused && row.live && j < problem.samples) {
    sample.weight = load_weight<float>(problem, row, j);
  }
  return sample;
}

// A block has one level's samples of the rows of a tile, kThreads of them at a time.
template <bool kFused, int kLanes>
__global__ void __launch_bounds__(kThreads) by_pixel_kernel(
    const __grid_constant__ Problem problem,
    const __grid_constant__ TileGradients tile,
    float* grad_value) {
  Sorting& sorting = *reinterpret_cast<Sorting*>(shared_memory());
  FourFloats* grads = reinterpret_cast<FourFloats*>(shared_memory() + kSortingBytes);
  const int32_t level = blockIdx.x / problem.heads;
  const int32_t head = blockIdx.x - level * problem.heads;
  const int64_t image = problem.first_image + static_cast<int32_t>(blockIdx.z);
  float* grad_head = grad_value +
      (image * problem.positions_per_image * problem.heads + head) * problem.channels;
  load_gradients(problem, tile, head, grads);
  for (int32_t first = 0; first < tile.rows * problem.points; first += kThreads) {
    const int32_t number = first + static_cast<int32_t>(threadIdx.x);
    const int32_t slot = number / problem.points;
    const int32_t point = number - slot * problem.points;
    Row row = find_row(problem, head, slot, tile.rows);
    row.live = row.live && slot < tile.rows;
    const Sample<float> sample =
        load_weighted_sample<kFused>(problem, row, level * problem.points + point);
    for (int i = threadIdx.x; i < kBins; i += kThreads) {
      sorting.starts[i] = 0;
    }
    if (threadIdx.x == 0) {
      sorting.num_far = 0;
    }
    const Corner window = place_window(sorting, sample);
    sort_samples(sorting, sample, make_record(problem, sample), slot, window);
    add_sorted<kLanes>(problem, sorting, grads, problem.levels[level], window, grad_head);
    __syncthreads();
  }
}

template <int kLanes>
void launch_by_pixel(
    const CudaInputs& inputs, const void* grad_output, float* grad_value, CUstream_st* stream) {
  const Sizes& sizes = inputs.sizes;
  const size_t row_bytes = sizes.channels * sizeof(float);
  int64_t rows = kMaxRows;
  while (rows > 1 &&
         (rows * sizes.points > kThreads || kSortingBytes + rows * row_bytes > kSharedBytes)) {
    rows /= 2;
  }
  const TileGradients tile = {
      static_cast<const char*>(grad_output),
      inputs.type,
      static_cast<int32_t>(bytes_of(inputs.type)),
      static_cast<int32_t>(rows)};
  const int64_t width = sizes.levels * sizes.heads;
  dispatch_fused(inputs, [&](auto fused) {
    for_all_tiles(inputs, rows, width, [&](dim3 grid, const Problem& problem) {
      launch(
          &by_pixel_kernel<decltype(fused)::value, kLanes>,
          grid,
          kThreads,
          kSortingBytes + rows * row_bytes,
          stream,
          problem,
          tile,
          grad_value);
    });
  });
}

}  // namespace

void value_gradient_by_pixel_cuda(
    const CudaInputs& inputs, const void* grad_output, float* grad_value, CUstream_st* stream) {
  if (inputs.sizes.levels == 0 || inputs.sizes.channels == 0) {
    return;
  }
  const int64_t vectors = inputs.sizes.channels / 4;
  return vectors <= 4 ? launch_by_pixel<4>(inputs, grad_output, grad_value, stream)
      : vectors <= 8  ? launch_by_pixel<8>(inputs, grad_output, grad_value, stream)
                      : launch_by_pixel<16>(inputs, grad_output, grad_value, stream);
}

}  // namespace psf
