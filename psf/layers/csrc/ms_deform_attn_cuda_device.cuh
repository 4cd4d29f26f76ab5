// What the CUDA kernels share: the device's own instructions, the geometry of a launch, and the
// preparation of samples.
//
// A row is one head of one query, the D channels of its output. A group of kLanes threads of one
// warp works on a row, each with kVector channels of it at a time. A block has the rows of one tile
// of queries, for one head of one image: queries close to each other sample the same pixels, so
// that most of these come from the L1 cache. When the queries are the pixels (Q = S) a tile is a
// rectangle of a level, else it is a run of queries. Nothing but speed depends on the order.
//
// tests/layers/cuda_emulation.h stands in for the device when this is compiled as plain C++.
#pragma once

#include "ms_deform_attn_cuda.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef PSF_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace psf {
namespace {

#ifndef PSF_CUDA_EMULATION
constexpr int64_t kMaxGridY = 65535;

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ uint16_t float_to_half(float x) {
  return __half_as_ushort(__float2half_rn(x));
}

__device__ __forceinline__ uint16_t float_to_bfloat16(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// Four additions to a buffer in global memory, to is aligned to 16 bytes.
__device__ __forceinline__ void atomic_add4(float* to, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to),
               "f"(a),
               "f"(b),
               "f"(c),
               "f"(d)
               : "memory");
#else
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
  atomicAdd(to + 2, c);
  atomicAdd(to + 3, d);
#endif
}

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

template <typename... Parameters, typename... Arguments>
void launch(
    void (*kernel)(Parameters...),
    dim3 grid,
    unsigned threads,
    size_t shared,
    CUstream_st* stream,
    const Arguments&... arguments) {
  kernel<<<grid, threads, shared, stream>>>(arguments...);
}
#endif

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr size_t kSharedBytes = 48 << 10;  // what a block gets without asking for more
// Two blocks for every multiprocessor of an H100. Smaller launches take smaller blocks.
constexpr int64_t kEnoughBlocks = 264;

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <typename T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double widen(double x) {
  return x;
}

__device__ __forceinline__ float widen(float x) {
  return x;
}

__device__ __forceinline__ float widen(Half x) {
  return half_to_float(x.bits);
}

__device__ __forceinline__ float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

template <typename T>
__device__ __forceinline__ T narrow(Arithmetic<T> x) {
  if constexpr (std::is_same_v<T, Half>) {
    return {float_to_half(x)};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {float_to_bfloat16(x)};
  } else {
    return x;
  }
}

// The type that one instruction loads.
template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned int;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// kStreamed: read once, so leave the caches to what is read again.
template <bool kStreamed, int kVector, typename T>
__device__ __forceinline__ void load(const T* from, Arithmetic<T> (&to)[kVector]) {
  using Bits = typename Word<kVector * sizeof(T)>::Type;
  const Bits* address = reinterpret_cast<const Bits*>(from);
  const Bits bits = kStreamed ? __ldcs(address) : __ldg(address);
  T values[kVector];
  memcpy(values, &bits, sizeof(bits));
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    to[i] = widen(values[i]);
  }
}

template <int kVector, typename T>
__device__ __forceinline__ void store(const Arithmetic<T> (&from)[kVector], T* to) {
  using Bits = typename Word<kVector * sizeof(T)>::Type;
  T values[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    values[i] = narrow<T>(from[i]);
  }
  Bits bits;
  memcpy(&bits, values, sizeof(bits));
  __stcs(reinterpret_cast<Bits*>(to), bits);
}

// The same for tensors whose type is only known at run time: elements index * kVector and on.
template <int kVector, typename A>
__device__ __forceinline__ void load_any(
    const void* data, Scalar type, int64_t index, A (&to)[kVector]) {
  if constexpr (std::is_same_v<A, double>) {
    load<true>(static_cast<const double*>(data) + index * kVector, to);
  } else if (type == Scalar::kHalf) {
    load<true>(static_cast<const Half*>(data) + index * kVector, to);
  } else if (type == Scalar::kBFloat16) {
    load<true>(static_cast<const BFloat16*>(data) + index * kVector, to);
  } else {
    load<true>(static_cast<const float*>(data) + index * kVector, to);
  }
}

template <int kVector, typename A>
__device__ __forceinline__ void store_any(
    const A (&from)[kVector], void* data, Scalar type, int64_t index) {
  if constexpr (std::is_same_v<A, double>) {
    store(from, static_cast<double*>(data) + index * kVector);
  } else if (type == Scalar::kHalf) {
    store(from, static_cast<Half*>(data) + index * kVector);
  } else if (type == Scalar::kBFloat16) {
    store(from, static_cast<BFloat16*>(data) + index * kVector);
  } else {
    store(from, static_cast<float*>(data) + index * kVector);
  }
}

struct DeviceLevel {
  int32_t height;
  int32_t width;
  int32_t start;
};

// A rectangle of queries cut into tiles.
struct TiledQueries {
  int32_t height;
  int32_t width;
  int32_t start;       // its first query
  int32_t columns;     // of tiles
  int32_t first_tile;  // of all tiles
};

// The inputs in the form that kernels take, by value: no table to copy to the device, and a launch
// that can be recorded in a CUDA graph.
struct Problem {
  const void* value;
  const void* positions;
  const void* weights;
  const void* references;
  int64_t image_stride;  // in elements
  int64_t head_stride;
  int32_t position_stride;
  Scalar positions_type;
  Scalar weights_type;
  int32_t coordinates;
  int32_t images;
  int32_t queries;
  int32_t positions_per_image;  // S
  int32_t heads;
  int32_t channels;
  int32_t num_levels;
  int32_t points;
  int32_t samples;      // L * P
  uint32_t per_points;  // 2^31 / P rounded up, to divide by multiplying
  int32_t num_tiled;
  int32_t tile_shift;   // log2 of a tile's width
  DeviceLevel levels[kMaxCudaLevels];
  TiledQueries tiled[kMaxCudaLevels];
};

// A group's row. The threads of rows beyond the queries stay, for the sake of warp-wide operations.
struct Row {
  bool live;
  int32_t image;
  int32_t head;
  int64_t query;  // n * Q + q
  int64_t index;  // (n * Q + q) * M + m
};

__device__ __forceinline__ Row
find_row(const Problem& problem, int32_t tile, int32_t head, int32_t slot, int32_t rows) {
  int part = 0;
  while (part + 1 < problem.num_tiled && tile >= problem.tiled[part + 1].first_tile) {
    ++part;
  }
  const TiledQueries& tiled = problem.tiled[part];
  const int32_t local = tile - tiled.first_tile;
  const int32_t tile_y = local / tiled.columns;
  const int32_t tile_x = local - tile_y * tiled.columns;
  const int32_t tile_height = rows >> problem.tile_shift;
  const int32_t in_width = slot & ((1 << problem.tile_shift) - 1);
  const int32_t x = (tile_x << problem.tile_shift) + in_width;
  const int32_t y = tile_y * tile_height + (slot >> problem.tile_shift);
  const int64_t image = blockIdx.z * kMaxGridY + blockIdx.y;
  Row row;
  row.live = image < problem.images && x < tiled.width && y < tiled.height;
  row.image = row.live ? image : 0;
  row.head = head;
  row.query = row.live
      ? image * problem.queries + tiled.start + static_cast<int64_t>(y) * tiled.width + x
      : 0;
  row.index = row.query * problem.heads + head;
  return row;
}

// The row of this thread's group of kLanes in a block of whole rows. Heads vary fastest, so that
// the blocks that run at a time read and write whole lines of memory.
template <int kLanes>
__device__ __forceinline__ Row find_row(const Problem& problem) {
  const int32_t tile = blockIdx.x / problem.heads;
  const int32_t head = blockIdx.x - tile * problem.heads;
  return find_row(problem, tile, head, threadIdx.x / kLanes, blockDim.x / kLanes);
}

// Adds (or otherwise joins) over the lanes of a group, the result in each. All lanes of the warp
// take part.
template <int kLanes, typename V, typename F>
__device__ __forceinline__ V reduce_group(V value, const F& join) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    value = join(value, __shfl_xor_sync(kWholeWarp, value, step));
  }
  return value;
}

// How a row's weights follow from what is stored: softmax of logits, or themselves.
template <typename A>
struct Softmax {
  bool used;
  A largest;
  A scale;

  __device__ __forceinline__ A operator()(A logit) const {
    return used ? std::exp(logit - largest) * scale : logit;
  }
};

template <typename A, int kLanes>
__device__ __forceinline__ Softmax<A> row_softmax(const Problem& problem, const Row& row, int lane) {
  Softmax<A> softmax = {problem.references != nullptr, -INFINITY, A(0)};
  if (!softmax.used) {
    return softmax;
  }
  const int32_t samples = row.live ? problem.samples : 0;
  for (int32_t j = lane; j < samples; j += kLanes) {
    A logit[1];
    load_any(problem.weights, problem.weights_type, row.index * problem.samples + j, logit);
    softmax.largest = std::fmax(softmax.largest, logit[0]);
  }
  softmax.largest =
      reduce_group<kLanes>(softmax.largest, [](A a, A b) { return std::fmax(a, b); });
  A sum = 0;
  for (int32_t j = lane; j < samples; j += kLanes) {
    A logit[1];
    load_any(problem.weights, problem.weights_type, row.index * problem.samples + j, logit);
    sum += std::exp(logit[0] - softmax.largest);
  }
  softmax.scale = A(1) / reduce_group<kLanes>(sum, [](A a, A b) { return a + b; });
  return softmax;
}

// One sample. All but level is 0 for one that contributes nothing.
template <typename A>
struct Sample {
  bool inside;
  int32_t level;
  A weight;
  Axis<A, int32_t> x;
  Axis<A, int32_t> y;
};

template <typename A>
struct Point {
  A x;
  A y;
};

// Pixels per unit of the stored positions.
template <typename A>
__device__ __forceinline__ Point<A>
pixels_per_unit(const Problem& problem, const Row& row, int32_t level) {
  const A width = static_cast<A>(problem.levels[level].width);
  const A height = static_cast<A>(problem.levels[level].height);
  if (problem.references == nullptr) {
    return {width, height};
  }
  if (problem.coordinates == 2) {
    return {A(1), A(1)};
  }
  const A* box = static_cast<const A*>(problem.references) +
      (row.query * problem.num_levels + level) * problem.coordinates;
  const A part = A(0.5) / static_cast<A>(problem.points);
  return {__ldg(box + 2) * part * width, __ldg(box + 3) * part * height};
}

// Sets the axis of a sample at the coordinate position * unit + reference * size - 1/2, and returns
// whether it touches the level. The fraction of a pixel is as exact as for a coordinate near 0:
// it does not suffer from the digits that the whole pixels take.
template <typename A>
__device__ __forceinline__ bool
place_on_axis(A position, A unit, A reference, int32_t size, Axis<A, int32_t>& axis) {
  const A start = reference * static_cast<A>(size);
  const A start_error = std::fma(reference, static_cast<A>(size), -start);
  const A coordinate = std::fma(position, unit, start - A(0.5));
  if (!touches(coordinate, size)) {
    return false;
  }
  axis = bilinear_axis(coordinate, size);
  const A start_in_pixel = (start - std::floor(coordinate)) - A(0.5) + start_error;
  const A fraction = std::fma(position, unit, start_in_pixel);
  axis.weight[0] = -axis.slope[0] * (A(1) - fraction);
  axis.weight[1] = axis.slope[1] * fraction;
  return true;
}

// Sample j of the row: j = l * P + p. Beyond the row it is one that contributes nothing.
template <typename A>
__device__ __forceinline__ Sample<A>
load_sample(const Problem& problem, const Row& row, int32_t j, const Softmax<A>& softmax) {
  Sample<A> sample = {};
  if (!row.live || j >= problem.samples) {
    return sample;
  }
  sample.level = static_cast<int32_t>((static_cast<uint64_t>(j) * problem.per_points) >> 31);
  const DeviceLevel& level = problem.levels[sample.level];
  const int64_t index = row.index * problem.samples + j;
  A position[2];
  load_any(problem.positions, problem.positions_type, index, position);
  A weight[1];
  load_any(problem.weights, problem.weights_type, index, weight);
  const Point<A> unit = pixels_per_unit<A>(problem, row, sample.level);
  Point<A> reference = {};
  if (problem.references != nullptr) {
    const A* stored = static_cast<const A*>(problem.references) +
        (row.query * problem.num_levels + sample.level) * problem.coordinates;
    reference = {__ldg(stored), __ldg(stored + 1)};
  }
  Sample<A> inside = sample;
  inside.inside = place_on_axis(position[0], unit.x, reference.x, level.width, inside.x) &&
      place_on_axis(position[1], unit.y, reference.y, level.height, inside.y);
  inside.weight = softmax(weight[0]);
  return inside.inside ? inside : sample;
}

// What a group leaves in shared memory of a sample, for all its lanes: the four pixels around it,
// as positions of S, with the weights of their values. Index -1: nothing to do.
template <typename A>
struct alignas(16) Record {
  A weight[4];
  int32_t index[4];
};

// A group's records, one for each lane. 16 bytes more than these keep the groups of a warp in
// different banks.
template <typename A, int kLanes>
constexpr size_t kRecordBytes = kLanes * sizeof(Record<A>) + 16;

// kPixelsOutside: whether pixels outside the level get index -1. Otherwise they share that of a
// valid pixel, with weight 0, and only a sample that touches no pixel has -1.
template <bool kPixelsOutside, typename A>
__device__ __forceinline__ Record<A> make_record(const Problem& problem, const Sample<A>& sample) {
  Record<A> record;
  const DeviceLevel& level = problem.levels[sample.level];
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const int row = corner / 2;
    const int column = corner % 2;
    record.weight[corner] = sample.weight * sample.y.weight[row] * sample.x.weight[column];
    // The slope is 0 for the pixels outside, and 0 altogether for a sample outside.
    const bool wanted = kPixelsOutside
        ? sample.y.slope[row] != A(0) && sample.x.slope[column] != A(0)
        : sample.inside;
    record.index[corner] = wanted
        ? level.start + sample.y.index[row] * level.width + sample.x.index[column]
        : -1;
  }
  return record;
}

struct Launch {
  Problem problem;
  int64_t tiles;
};

inline int log2_of(int64_t power_of_two) {
  int result = 0;
  while ((int64_t{1} << result) < power_of_two) {
    ++result;
  }
  return result;
}

// The problem with its queries in tiles of the given number of rows, a power of two.
inline Launch make_launch(const CudaInputs& inputs, int64_t rows) {
  const Sizes& sizes = inputs.sizes;
  Launch result = {};
  Problem& problem = result.problem;
  problem.value = inputs.value;
  problem.positions = inputs.positions;
  problem.weights = inputs.weights;
  problem.references = inputs.references;
  problem.image_stride = inputs.image_stride;
  problem.head_stride = inputs.head_stride;
  problem.position_stride = static_cast<int32_t>(inputs.position_stride);
  problem.positions_type = inputs.positions_type;
  problem.weights_type = inputs.weights_type;
  problem.coordinates = static_cast<int32_t>(inputs.coordinates);
  problem.images = static_cast<int32_t>(sizes.images);
  problem.queries = static_cast<int32_t>(sizes.queries);
  problem.positions_per_image = static_cast<int32_t>(sizes.positions);
  problem.heads = static_cast<int32_t>(sizes.heads);
  problem.channels = static_cast<int32_t>(sizes.channels);
  problem.num_levels = static_cast<int32_t>(sizes.levels);
  problem.points = static_cast<int32_t>(sizes.points);
  problem.samples = static_cast<int32_t>(sizes.levels * sizes.points);
  problem.per_points =
      sizes.points > 0 ? static_cast<uint32_t>(((int64_t{1} << 31) - 1) / sizes.points + 1) : 0;
  for (int64_t l = 0; l < sizes.levels; ++l) {
    const Level& level = inputs.levels[l];
    problem.levels[l] = {
        static_cast<int32_t>(level.height),
        static_cast<int32_t>(level.width),
        static_cast<int32_t>(level.start)};
  }
  const bool queries_are_pixels = sizes.queries == sizes.positions;
  problem.tile_shift = queries_are_pixels ? (log2_of(rows) + 1) / 2 : log2_of(rows);
  problem.num_tiled = queries_are_pixels ? problem.num_levels : 1;
  const int64_t tile_width = int64_t{1} << problem.tile_shift;
  const int64_t tile_height = rows / tile_width;
  for (int32_t i = 0; i < problem.num_tiled; ++i) {
    const DeviceLevel whole = queries_are_pixels
        ? problem.levels[i]
        : DeviceLevel{1, static_cast<int32_t>(sizes.queries), 0};
    const int64_t columns = (whole.width + tile_width - 1) / tile_width;
    const int64_t lines = (whole.height + tile_height - 1) / tile_height;
    problem.tiled[i] = {
        whole.height,
        whole.width,
        whole.start,
        static_cast<int32_t>(columns),
        static_cast<int32_t>(result.tiles)};
    result.tiles += columns * lines;
  }
  return result;
}

// Threads for blocks of whole rows, at most largest.
inline unsigned choose_threads(const Sizes& sizes, int lanes, unsigned largest) {
  const int64_t threads = sizes.images * sizes.queries * sizes.heads * lanes;
  unsigned result = largest;
  while (result > 64 && threads / result < kEnoughBlocks) {
    result /= 2;
  }
  return result;
}

inline dim3 make_grid(int64_t blocks_per_image, int64_t images) {
  const int64_t y = images < kMaxGridY ? images : kMaxGridY;
  return dim3(
      static_cast<unsigned>(blocks_per_image),
      static_cast<unsigned>(y),
      static_cast<unsigned>((images + y - 1) / y));
}

// Whether the channels of value can be loaded kVector at a time.
inline bool loads_vectors(const CudaInputs& inputs, int vector, int element_bytes) {
  return inputs.sizes.channels % vector == 0 && inputs.image_stride % vector == 0 &&
      inputs.position_stride % vector == 0 && inputs.head_stride % vector == 0 &&
      reinterpret_cast<uintptr_t>(inputs.value) % (vector * element_bytes) == 0;
}

// Calls f with a value of the device type of the inputs' values.
template <typename F>
void dispatch_type(Scalar type, const F& f) {
  switch (type) {
    case Scalar::kDouble:
      return f(double());
    case Scalar::kFloat:
      return f(float());
    case Scalar::kHalf:
      return f(Half());
    case Scalar::kBFloat16:
      return f(BFloat16());
  }
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

}  // namespace
}  // namespace psf
