// What the CUDA kernels share: the geometry of a launch, and the preparation of samples.
//
// A row is one head of one query, the D channels of its output. A group of kLanes threads of one
// warp works on a row, each with kVector channels of it at a time. A block has the rows of one tile
// of queries, for one head of one image: queries close to each other sample the same pixels, so
// that most of these come from the L1 cache. When the queries are the pixels (Q = S) a tile is a
// rectangle of a level, else it is a run of queries. Nothing but speed depends on the order.
#pragma once

#include "ms_deform_attn_cuda_device.cuh"

namespace psf {
namespace {

constexpr size_t kSharedBytes = 48 << 10;  // what a block gets without asking for more
// Two blocks for every multiprocessor of an H100. Smaller launches take smaller blocks.
constexpr int64_t kEnoughBlocks = 264;

struct DeviceLevel {
  int32_t height;
  int32_t width;
  int32_t start;
};

// A rectangle of queries cut into tiles.
struct TiledQueries {
  int32_t height;
  int32_t width;
  int32_t start;        // its first query
  int32_t first_tile;   // of all tiles
  uint32_t columns;     // of tiles
  uint32_t per_column;  // 2^32 / columns rounded down, to divide by multiplying
};

// The inputs in the form that kernels take, by value: no table to copy to the device, and a launch
// that can be recorded in a CUDA graph.
struct Problem {
  const void* value;
  const char* positions;
  const char* weights;
  const void* references;
  int64_t image_stride;  // in elements
  int64_t head_stride;
  uint32_t position_stride_bytes;
  Scalar positions_type;
  Scalar weights_type;
  uint32_t position_bytes;  // of a pair of coordinates
  uint32_t weight_bytes;
  int32_t coordinates;
  int32_t queries;
  int32_t positions_per_image;  // S
  int32_t heads;
  int32_t channels;
  int32_t num_levels;
  int32_t points;
  int32_t samples;      // L * P
  uint32_t per_points;  // 2^31 / P rounded up, to divide by multiplying
  int32_t first_image;  // of this launch
  int32_t first_tile;   // of this launch
  int32_t num_tiled;
  int32_t tile_shift;  // log2 of a tile's width
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
  const char* positions;  // of its samples
  const char* weights;
};

// The row of this thread's group of kLanes in the block of head blockIdx.x, tile blockIdx.y and image
// blockIdx.z. Heads vary fastest, so that blocks running at the same time read and write whole
// lines of memory.
template <int kLanes>
__device__ __forceinline__ Row find_row(const Problem& problem) {
  const int32_t slot = threadIdx.x / kLanes;
  const int32_t rows = blockDim.x / kLanes;
  const int32_t tile = problem.first_tile + static_cast<int32_t>(blockIdx.y);
  int part = 0;
  while (part + 1 < problem.num_tiled && tile >= problem.tiled[part + 1].first_tile) {
    ++part;
  }
  const TiledQueries& tiled = problem.tiled[part];
  const uint32_t local = tile - tiled.first_tile;
  uint32_t tile_y = (static_cast<uint64_t>(local) * tiled.per_column) >> 32;
  uint32_t tile_x = local - tile_y * tiled.columns;
  if (tile_x >= tiled.columns) {  // the quotient was rounded down
    ++tile_y;
    tile_x -= tiled.columns;
  }
  const int32_t tile_height = rows >> problem.tile_shift;
  const int32_t in_tile = slot & ((1 << problem.tile_shift) - 1);
  const int32_t x = (tile_x << problem.tile_shift) + in_tile;
  const int32_t y = tile_y * tile_height + (slot >> problem.tile_shift);
  Row row;
  row.live = x < tiled.width && y < tiled.height;
  row.image = problem.first_image + static_cast<int32_t>(blockIdx.z);
  row.head = blockIdx.x;
  row.query = static_cast<int64_t>(row.image) * problem.queries +
      (row.live ? tiled.start + y * tiled.width + x : 0);
  row.index = row.query * problem.heads + row.head;
  const int64_t first_sample = row.index * problem.samples;
  row.positions = keep(problem.positions + first_sample * problem.position_bytes);
  row.weights = keep(problem.weights + first_sample * problem.weight_bytes);
  return row;
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

// The stored weight, or logit, of a sample.
template <typename A>
__device__ __forceinline__ A load_weight(const Problem& problem, const Row& row, int32_t j) {
  A weight[1];
  load_any(offset(row.weights, j, problem.weight_bytes), problem.weights_type, weight);
  return weight[0];
}

// How a row's weights follow from what is stored: softmax of logits, or themselves.
template <typename A, bool kFused>
struct Softmax {
  A largest;
  A scale;

  __device__ __forceinline__ A operator()(A stored) const {
    return kFused ? std::exp(stored - largest) * scale : stored;
  }
};

template <typename A, bool kFused, int kLanes>
__device__ __forceinline__ Softmax<A, kFused>
row_softmax(const Problem& problem, const Row& row, int lane) {
  Softmax<A, kFused> softmax = {-INFINITY, A(0)};
  if constexpr (kFused) {
    const int32_t samples = row.live ? problem.samples : 0;
    for (int32_t j = lane; j < samples; j += kLanes) {
      softmax.largest = std::fmax(softmax.largest, load_weight<A>(problem, row, j));
    }
    softmax.largest =
        reduce_group<kLanes>(softmax.largest, [](A a, A b) { return std::fmax(a, b); });
    A sum = 0;
    for (int32_t j = lane; j < samples; j += kLanes) {
      sum += std::exp(load_weight<A>(problem, row, j) - softmax.largest);
    }
    softmax.scale = A(1) / reduce_group<kLanes>(sum, [](A a, A b) { return a + b; });
  }
  return softmax;
}

// One axis of a bilinear sample, as in ms_deform_attn.h but with indices of 32 bits. A pixel
// outside the level has weight 0 and the index of the other.
template <typename A>
struct DeviceAxis {
  bool touches;  // whether the sample touches a pixel of the axis; nothing else counts if not
  bool inside[2];
  int32_t index[2];
  A weight[2];
};

// The axis of a sample at the coordinate position * unit + reference * size - 1/2. The fraction of
// a pixel is as exact as for a coordinate near 0: the whole pixels take none of its digits.
template <typename A, bool kFused>
__device__ __forceinline__ DeviceAxis<A>
place_on_axis(A position, A unit, A reference, int32_t size) {
  const A start = kFused ? reference * static_cast<A>(size) : A(0);
  const A coordinate = std::fma(position, unit, start - A(0.5));
  DeviceAxis<A> axis;
  axis.touches = size > 0 && coordinate > A(-1) && coordinate < static_cast<A>(size);
  const A whole = std::floor(axis.touches ? coordinate : A(0));
  A start_in_pixel = A(-0.5) - whole;
  if constexpr (kFused) {
    const A lost = std::fma(reference, static_cast<A>(size), -start);
    start_in_pixel = (start - whole) - A(0.5) + lost;
  }
  const A fraction = std::fma(position, unit, start_in_pixel);
  const int32_t low = static_cast<int32_t>(whole);
  const int32_t high = low + 1;
  axis.inside[0] = low >= 0;
  axis.inside[1] = high < size;
  axis.index[0] = axis.inside[0] ? low : high;
  axis.index[1] = axis.inside[1] ? high : low;
  axis.weight[0] = axis.inside[0] ? A(1) - fraction : A(0);
  axis.weight[1] = axis.inside[1] ? fraction : A(0);
  return axis;
}

template <typename A>
struct Sample {
  bool inside;  // whether it touches a pixel; weight, x and y do not count if not
  int32_t level;
  A weight;
  DeviceAxis<A> x;
  DeviceAxis<A> y;
};

template <typename A>
struct Point {
  A x;
  A y;
};

template <typename A>
__device__ __forceinline__ const A*
find_reference(const Problem& problem, const Row& row, int32_t level) {
  return static_cast<const A*>(problem.references) +
      (row.query * problem.num_levels + level) * problem.coordinates;
}

// Pixels per unit of the stored positions.
template <typename A, bool kFused>
__device__ __forceinline__ Point<A>
pixels_per_unit(const Problem& problem, const Row& row, int32_t level) {
  if (kFused && problem.coordinates == 2) {
    return {A(1), A(1)};
  }
  Point<A> unit = {
      static_cast<A>(problem.levels[level].width), static_cast<A>(problem.levels[level].height)};
  if constexpr (kFused) {
    const A* box = find_reference<A>(problem, row, level);
    const A part = A(0.5) / static_cast<A>(problem.points);
    unit.x *= __ldg(box + 2) * part;
    unit.y *= __ldg(box + 3) * part;
  }
  return unit;
}

// Sample j of the row: j = l * P + p. Beyond the row it is one that touches nothing.
template <bool kFused, typename A>
__device__ __forceinline__ Sample<A> load_sample(
    const Problem& problem, const Row& row, int32_t j, const Softmax<A, kFused>& softmax) {
  const bool exists = row.live && j < problem.samples;
  const uint64_t number = static_cast<uint32_t>(exists ? j : 0);
  Sample<A> sample;
  sample.level = static_cast<int32_t>((number * problem.per_points) >> 31);
  sample.weight = 0;
  const DeviceLevel level = problem.levels[sample.level];
  Point<A> unit = {static_cast<A>(level.width), static_cast<A>(level.height)};
  Point<A> reference = {};
  A position[2] = {NAN, NAN};
  if (exists) {
    const char* positions = offset(row.positions, j, problem.position_bytes);
    if constexpr (kFused) {
      load_any(positions, problem.positions_type, position);
      const A* stored = find_reference<A>(problem, row, sample.level);
      reference = {__ldg(stored), __ldg(stored + 1)};
      unit = pixels_per_unit<A, kFused>(problem, row, sample.level);
    } else {
      load<true>(reinterpret_cast<const A*>(positions), position);
    }
    sample.weight = load_weight<A>(problem, row, j);
  }
  sample.weight = softmax(sample.weight);
  sample.x = place_on_axis<A, kFused>(position[0], unit.x, reference.x, level.width);
  sample.y = place_on_axis<A, kFused>(position[1], unit.y, reference.y, level.height);
  sample.inside = sample.x.touches && sample.y.touches;
  return sample;
}

// What a group leaves in shared memory of a sample, for all its lanes: the four pixels around it,
// as positions of S, with the weights of their values. A pixel outside the level has weight 0 and
// the index of a valid one: what is added for it is 0, and nothing is read that is not sampled.
// The first index is -1 for a sample that touches no pixel.
template <typename A>
struct alignas(16) Record {
  A weight[4];
  int32_t index[4];
};

// A group's records, one for each lane. 16 bytes more than these keep the groups of a warp in
// different banks.
template <typename A, int kLanes>
constexpr size_t kRecordBytes = kLanes * sizeof(Record<A>) + 16;

template <typename A>
__device__ __forceinline__ Record<A> make_record(const Problem& problem, const Sample<A>& sample) {
  Record<A> record;
  const DeviceLevel level = problem.levels[sample.level];
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const int row = corner / 2;
    const int column = corner % 2;
    record.weight[corner] = sample.weight * sample.y.weight[row] * sample.x.weight[column];
    record.index[corner] =
        level.start + sample.y.index[row] * level.width + sample.x.index[column];
  }
  record.index[0] = sample.inside ? record.index[0] : -1;
  return record;
}

inline int log2_of(int64_t power_of_two) {
  int result = 0;
  while ((int64_t{1} << result) < power_of_two) {
    ++result;
  }
  return result;
}

inline uint32_t bytes_of(Scalar type) {
  return type == Scalar::kDouble ? 8 : type == Scalar::kFloat ? 4 : 2;
}

// Cuts the queries into tiles of the given number of rows, a power of two. Returns their number.
inline int64_t cut_into_tiles(const Sizes& sizes, int64_t rows, Problem& problem) {
  const bool queries_are_pixels = sizes.queries == sizes.positions;
  problem.tile_shift = queries_are_pixels ? (log2_of(rows) + 1) / 2 : log2_of(rows);
  problem.num_tiled = queries_are_pixels ? problem.num_levels : 1;
  const int64_t tile_width = int64_t{1} << problem.tile_shift;
  const int64_t tile_height = rows / tile_width;
  int64_t tiles = 0;
  for (int32_t i = 0; i < problem.num_tiled; ++i) {
    const DeviceLevel whole =
        queries_are_pixels ? problem.levels[i] : DeviceLevel{1, problem.queries, 0};
    const int64_t columns = (whole.width + tile_width - 1) / tile_width;
    const int64_t lines = (whole.height + tile_height - 1) / tile_height;
    const int64_t per_column = (int64_t{1} << 32) / (columns > 0 ? columns : 1);
    problem.tiled[i] = {
        whole.height,
        whole.width,
        whole.start,
        static_cast<int32_t>(tiles),
        static_cast<uint32_t>(columns),
        static_cast<uint32_t>(columns > 1 ? per_column : per_column - 1)};
    tiles += columns * lines;
  }
  return tiles;
}

inline Problem make_problem(const CudaInputs& inputs) {
  const Sizes& sizes = inputs.sizes;
  Problem problem = {};
  problem.value = inputs.value;
  problem.positions = static_cast<const char*>(inputs.positions);
  problem.weights = static_cast<const char*>(inputs.weights);
  problem.references = inputs.references;
  problem.image_stride = inputs.image_stride;
  problem.head_stride = inputs.head_stride;
  problem.position_stride_bytes =
      static_cast<uint32_t>(inputs.position_stride * bytes_of(inputs.type));
  problem.positions_type = inputs.positions_type;
  problem.weights_type = inputs.weights_type;
  problem.position_bytes = 2 * bytes_of(inputs.positions_type);
  problem.weight_bytes = bytes_of(inputs.weights_type);
  problem.coordinates = static_cast<int32_t>(inputs.coordinates);
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
  return problem;
}

// Calls launch_part(grid, problem) so that a block is launched for every head, tile and image: once,
// unless the grid has too many tiles or images.
template <typename F>
void for_all_tiles(
    const CudaInputs& inputs, int64_t rows, const F& launch_part) {
  Problem problem = make_problem(inputs);
  const int64_t tiles = cut_into_tiles(inputs.sizes, rows, problem);
  const auto side = [](int64_t left) { return left < kMaxGridSide ? left : kMaxGridSide; };
  for (int64_t image = 0; image < inputs.sizes.images; image += kMaxGridSide) {
    for (int64_t tile = 0; tile < tiles; tile += kMaxGridSide) {
      problem.first_image = static_cast<int32_t>(image);
      problem.first_tile = static_cast<int32_t>(tile);
      const dim3 grid(
          static_cast<unsigned>(inputs.sizes.heads),
          static_cast<unsigned>(side(tiles - tile)),
          static_cast<unsigned>(side(inputs.sizes.images - image)));
      launch_part(grid, problem);
    }
  }
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

// Blocks for one thread per element; each has more elements to do where that are too many.
inline dim3 blocks_for(int64_t elements, unsigned threads) {
  const int64_t blocks = (elements + threads - 1) / threads;
  return dim3(static_cast<unsigned>(blocks < kMaxGridSide ? blocks : kMaxGridSide));
}

// Whether the channels of value can be loaded kVector at a time.
inline bool loads_vectors(const CudaInputs& inputs, int vector, int element_bytes) {
  return inputs.sizes.channels % vector == 0 && inputs.image_stride % vector == 0 &&
      inputs.position_stride % vector == 0 && inputs.head_stride % vector == 0 &&
      reinterpret_cast<uintptr_t>(inputs.value) % (vector * element_bytes) == 0;
}

// Calls f with whether the inputs are those of the fused operator, as a constant.
template <typename F>
void dispatch_fused(const CudaInputs& inputs, const F& f) {
  if (inputs.references != nullptr) {
    f(std::true_type());
  } else {
    f(std::false_type());
  }
}

}  // namespace
}  // namespace psf
