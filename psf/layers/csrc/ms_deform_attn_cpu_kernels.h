// The CPU kernels, for the instruction set that the including file is compiled for. The file defines
// PSF_ISA, the namespace of that set.
//
// A query's samples of one head are prepared kPrepared lanes at a time: coordinates, the four
// interpolation weights, the offsets of the four value rows. Then the rows are summed, channels in
// the lanes. The next query is prepared before one is summed, so that neither waits for the other.
// In the backward pass the dot products of the output's gradient with the rows are reduced kLanes at a
// time, by a transposing tree. No step depends on how the work is split among threads.
#include "ms_deform_attn_cpu.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

namespace psf {
namespace PSF_ISA {
namespace {

#include "simd.h"

// ---- value rows in 16 bits -------------------------------------------------------------------

PSF_INLINE void narrow(float x, BFloat16* to) {
  *to = to_bfloat16(x);
}
PSF_INLINE void narrow(float x, float* to) {
  *to = x;
}
PSF_INLINE void narrow(double x, double* to) {
  *to = x;
}

// kLanes elements of a value row.
template <typename A, int kLanes, typename V>
PSF_INLINE Vector<A, kLanes> load_row(const V* from) {
  if constexpr (std::is_same_v<V, A>) {
    return load<A, kLanes>(from);
  } else {
    Vector<uint16_t, kLanes> bits;  // of BFloat16
    std::memcpy(&bits, from, sizeof(bits));
    const auto wide = __builtin_convertvector(bits, Vector<uint32_t, kLanes>) << 16;
    Vector<A, kLanes> v;
    std::memcpy(&v, &wide, sizeof(v));
    return v;
  }
}

// The first `count` of kLanes elements to an output row.
template <typename A, int kLanes, typename O>
PSF_INLINE void store_row(Vector<A, kLanes> v, O* to, int64_t count) {
  if (std::is_same_v<O, A> && count >= kLanes) {
    std::memcpy(to, &v, sizeof(v));
    return;
  }
  A lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  O narrowed[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    narrow(lanes[i], &narrowed[i]);
  }
  for (int i = 0; i < kLanes && i < count; ++i) {
    to[i] = narrowed[i];
  }
}

// The first `count` of kLanes elements of an output row, zeros after them.
template <typename A, int kLanes, typename O>
PSF_INLINE Vector<A, kLanes> load_partial(const O* from, int64_t count) {
  if (count >= kLanes) {
    return load_row<A, kLanes>(from);
  }
  O narrowed[kLanes] = {};
  std::memcpy(narrowed, from, static_cast<size_t>(count) * sizeof(O));
  return load_row<A, kLanes>(narrowed);
}

// ---- preparing the samples -------------------------------------------------------------------

// (x0, y0, x1, y1, ...) to (x0, x1, ...) and (y0, y1, ...).
template <typename A, int kLanes, int... kIndices>
PSF_INLINE void split_pairs(
    Vector<A, kLanes> first,
    Vector<A, kLanes> second,
    Vector<A, kLanes>& even,
    Vector<A, kLanes>& odd,
    std::integer_sequence<int, kIndices...>) {
  even = shuffle<A, kLanes>(first, second, Indices<2 * kIndices...>{});
  odd = shuffle<A, kLanes>(first, second, Indices<(2 * kIndices + 1)...>{});
}

// The inverse of split_pairs.
template <typename A, int kLanes, int... kIndices>
PSF_INLINE void join_pairs(
    Vector<A, kLanes> even,
    Vector<A, kLanes> odd,
    Vector<A, kLanes>& first,
    Vector<A, kLanes>& second,
    std::integer_sequence<int, kIndices...>) {
  first = shuffle<A, kLanes>(even, odd, Indices<(kIndices / 2 + kIndices % 2 * kLanes)...>{});
  second = shuffle<A, kLanes>(
      even, odd, Indices<((kIndices + kLanes) / 2 + kIndices % 2 * kLanes)...>{});
}

// Softmax of `count` logits. Whole vectors are read and written; padding masks what is no logit,
// whose weights become 0.
template <typename A>
PSF_INLINE void softmax(
    const A* logits, const typename IndexOf<A>::Type* padding, A* weights, int64_t count) {
  constexpr int kLanes = kFull<A>;
  using F = Vector<A, kLanes>;
  const F least = splat<A, kLanes>(-std::numeric_limits<A>::infinity());
  const F nothing = splat<A, kLanes>(A(0));
  F largest = least;
  for (int64_t i = 0; i < count; i += kLanes) {
    const F x = select<A, kLanes>(
        load_index<A, kLanes>(padding + i), least, load<A, kLanes>(logits + i));
    largest = select<A, kLanes>(x > largest, x, largest);
  }
  largest = combine_lanes<A, kLanes>(
      largest,
      [](F a, F b) PSF_LAMBDA_INLINE { return select<A, kLanes>(a > b, a, b); });
  F sum = nothing;
  for (int64_t i = 0; i < count; i += kLanes) {
    const F e = select<A, kLanes>(
        load_index<A, kLanes>(padding + i),
        nothing,
        exponential<A, kLanes>(load<A, kLanes>(logits + i) - largest));
    store<A, kLanes>(e, weights + i);
    sum += e;
  }
  const F scale = splat<A, kLanes>(A(1)) / sum_of_lanes<A, kLanes>(sum);
  for (int64_t i = 0; i < count; i += kLanes) {
    store<A, kLanes>(load<A, kLanes>(weights + i) * scale, weights + i);
  }
}

// From the gradient of the weights to that of the logits, in place; whole vectors, of which the
// weights in the padding are 0.
template <typename A>
PSF_INLINE void softmax_gradient(const A* weights, A* grad, int64_t count) {
  constexpr int kLanes = kFull<A>;
  using F = Vector<A, kLanes>;
  F sum = splat<A, kLanes>(A(0));
  for (int64_t i = 0; i < count; i += kLanes) {
    sum += load<A, kLanes>(weights + i) * load<A, kLanes>(grad + i);
  }
  sum = sum_of_lanes<A, kLanes>(sum);
  for (int64_t i = 0; i < count; i += kLanes) {
    store<A, kLanes>(
        load<A, kLanes>(weights + i) * (load<A, kLanes>(grad + i) - sum), grad + i);
  }
}

// The samples of one query and head, in scratch memory: each function gives an array.
template <typename A>
struct Samples {
  using Index = typename IndexOf<A>::Type;

  Samples(char* scratch, int64_t padded_samples)
      : base(reinterpret_cast<A*>(scratch)), size(array_size(padded_samples)), any(false) {}

  A* array(int number) const {
    return base + number * size;
  }

  // Of the corners (y, x) = 00, 01, 10, 11. One outside the level has weight 0 and the row of
  // another corner. The weights are those of the interpolation times the attention.
  A* weight(int corner) const {
    return array(corner);
  }
  Index* offset(int corner) const {  // of the value rows, in elements
    return reinterpret_cast<Index*>(array(4 + corner));
  }
  Index* corner(int number) const {  // masks: whether the corner is inside the level
    return reinterpret_cast<Index*>(array(8 + number));
  }
  A* dot(int corner) const {  // of the value rows with the output's gradient
    return array(12 + corner);
  }
  A* fraction(int axis) const {
    return array(16 + axis);
  }
  A* attention() const {  // 0 for a sample that does not count
    return array(18);
  }
  Index* inside() const {  // mask: whether the sample counts
    return reinterpret_cast<Index*>(array(19));
  }
  A* softmax() const {
    return array(20);
  }
  A* points() const {  // 2 arrays: a copy of inputs that cannot be read in place
    return array(21);
  }
  A* grad() const {  // of the weights
    return array(23);
  }

  A* base;
  int64_t size;
  bool any;  // whether any sample counts
};

// What a table (L, 2) says of the levels of a vector of samples; `level` holds 2 l of each. If all
// levels fit a vector, one is read from the table.
template <typename A, int kLanes, typename Index>
PSF_INLINE Vector<A, kLanes> look_up(const A* table, const Index* level, int axis, bool fits) {
  if (fits) {
    return permute<A, kLanes>(
        load<A, kLanes>(table),
        load<Index, kLanes>(level) + splat<Index, kLanes>(static_cast<Index>(axis)));
  }
  Vector<A, kLanes> v;
  for (int i = 0; i < kLanes; ++i) {
    v[i] = table[level[i] + axis];
  }
  return v;
}

// Gives those of samples [begin, end) that do not count the rows of one that does, so that what is
// read for them, times 0, is nothing that the output does not depend on. From outside that range no
// row will do: the backward pass also adds to it, and it may be another thread's.
template <typename A>
PSF_INLINE void replace_outside(
    Samples<A>& samples, int64_t begin, int64_t end) {
  constexpr int kLanes = kFull<A>;
  int64_t first = begin;
  while (first < end && !samples.inside()[first]) {
    ++first;
  }
  samples.any = first < end;
  if (!samples.any) {
    return;
  }
  for (int corner = 0; corner < 4; ++corner) {
    auto* offset = samples.offset(corner);
    const auto other = splat_index<A, kLanes>(offset[first]);
    for (int64_t j = begin; j < end; j += kLanes) {
      const auto own = load_index<A, kLanes>(offset + j);
      const auto inside = load_index<A, kLanes>(samples.inside() + j);
      store_index<A, kLanes>(select_index<A, kLanes>(inside, own, other), offset + j);
    }
  }
}

// Prepares the samples of query `query` (n * Q + q) and head m, of which [begin, end) will be used.
// What only the backward pass needs is left out on request.
template <bool kBackward, bool kFused, typename V, typename O, typename A>
PSF_INLINE void prepare_samples(
    const Call<V, O, A>& call,
    int64_t query,
    int64_t m,
    int64_t begin,
    int64_t end,
    Samples<A>& samples) {
  constexpr int kLanes = kFull<A>;
  using F = Vector<A, kLanes>;
  using I = IndexVector<A, kLanes>;
  using Sequence = std::make_integer_sequence<int, kLanes>;
  const SampleTable<A>& table = call.table;
  const int64_t count = call.samples;
  const int64_t row = query * call.sizes.heads + m;
  const A* points = call.points + row * 2 * count;
  const A* attention = call.weights + row * count;
  const int64_t rows = call.sizes.images * call.sizes.queries * call.sizes.heads;
  if ((rows - row) * count < call.padded_samples) {  // whole vectors would pass the tensors' end
    std::memcpy(samples.points(), points, static_cast<size_t>(2 * count) * sizeof(A));
    std::memcpy(samples.softmax(), attention, static_cast<size_t>(count) * sizeof(A));
    points = samples.points();
    attention = samples.softmax();
  }
  const int64_t origin = query * call.sizes.levels * 2;
  const bool fits = 2 * call.sizes.levels <= kLanes;
  if constexpr (kFused) {
    softmax(attention, table.padding, samples.softmax(), count);
    attention = samples.softmax();
  }
  const F nothing = splat<A, kLanes>(A(0));
  const F one = splat<A, kLanes>(A(1));
  const F minus_one = splat<A, kLanes>(A(-1));
  const I zero = splat_index<A, kLanes>(0);
  const I next = splat_index<A, kLanes>(1);
  const I row_size = splat_index<A, kLanes>(call.row_stride);
  I counted = splat_index<A, kLanes>(-1);
  for (int64_t j = 0; j < count; j += kLanes) {
    F place[2];
    split_pairs<A, kLanes>(
        load<A, kLanes>(points + 2 * j),
        load<A, kLanes>(points + 2 * j + kLanes),
        place[0],
        place[1],
        Sequence{});
    const F size[2] = {load<A, kLanes>(table.width + j), load<A, kLanes>(table.height + j)};
    const I index_size[2] = {
        load_index<A, kLanes>(table.index_width + j), load_index<A, kLanes>(table.index_height + j)};
    I within[2];
    I pixel[2];
    F fraction[2];
    PSF_UNROLL(2)
    for (int axis = 0; axis < 2; ++axis) {
      if constexpr (kFused) {
        const F far = splat<A, kLanes>(static_cast<A>(kFar));
        const auto* level = table.level + j;
        F offset = place[axis];
        if (!call.in_pixels) {
          offset = offset * look_up<A, kLanes>(call.origins.unit + origin, level, axis, fits);
        }
        const F part = look_up<A, kLanes>(call.origins.part + origin, level, axis, fits);
        const F sum = offset + part;
        const I near = (sum > nothing - far) & (sum < far);  // not for NaN
        offset = select<A, kLanes>(near, offset, nothing);
        // Whole pixels go before the parts are added, which a large offset would round away.
        const F offset_low = floor<A, kLanes>(offset);
        const F parts = select<A, kLanes>(near, (offset - offset_low) + part, nothing);
        const F carry = floor<A, kLanes>(parts);
        fraction[axis] = parts - carry;
        const I low = to_index<A, kLanes>(offset_low) + to_index<A, kLanes>(carry);
        pixel[axis] = low +
            look_up<typename IndexOf<A>::Type, kLanes>(
                          call.origins.whole + origin, level, axis, fits);
        // Above -1 and below the size; at -1 itself the fraction is 0.
        within[axis] = near & (pixel[axis] < index_size[axis]) &
            ((pixel[axis] >= zero) | ((pixel[axis] + next >= zero) & (fraction[axis] > nothing)));
        pixel[axis] = select_index<A, kLanes>(within[axis], pixel[axis], zero);
      } else {
        // The rounding of this product is the largest error of single precision: put it back.
        F rest;
        const F product = multiply<A, kLanes>(place[axis], size[axis], rest);
        const F centred = product - splat<A, kLanes>(A(0.5));
        within[axis] = (centred > minus_one) & (centred < size[axis]);
        const F inside_place = select<A, kLanes>(within[axis], centred, nothing);
        const F low = floor<A, kLanes>(inside_place);
        pixel[axis] = to_index<A, kLanes>(low);
        fraction[axis] = (inside_place - low) + select<A, kLanes>(within[axis], rest, nothing);
      }
    }
    const I inside = within[0] & within[1];
    counted &= inside | load_index<A, kLanes>(table.padding + j);
    const I column = pixel[0];
    const I line = pixel[1];
    const F fx = fraction[0];
    const F fy = fraction[1];
    // The weight of what does not count may be NaN.
    const F a = select<A, kLanes>(inside, load<A, kLanes>(attention + j), nothing);
    const I left = column >= zero;
    const I top = line >= zero;
    const I right = column + next < index_size[0];
    const I bottom = line + next < index_size[1];
    const F low = a * fy;
    const F share_top = select<A, kLanes>(top, a - low, nothing);
    const F share_bottom = select<A, kLanes>(bottom, low, nothing);
    const F share_left = select<A, kLanes>(left, one - fx, nothing);
    const F share_right = select<A, kLanes>(right, fx, nothing);
    const I x0 = select_index<A, kLanes>(left, column, zero);
    const I x1 = select_index<A, kLanes>(right, column + next, column);
    const I start = load_index<A, kLanes>(table.start + j);
    const I line0 = start + select_index<A, kLanes>(top, line, zero) * index_size[0];
    const I line1 = start + select_index<A, kLanes>(bottom, line + next, line) * index_size[0];
    store<A, kLanes>(share_top * share_left, samples.weight(0) + j);
    store<A, kLanes>(share_top * share_right, samples.weight(1) + j);
    store<A, kLanes>(share_bottom * share_left, samples.weight(2) + j);
    store<A, kLanes>(share_bottom * share_right, samples.weight(3) + j);
    store_index<A, kLanes>((line0 + x0) * row_size, samples.offset(0) + j);
    store_index<A, kLanes>((line0 + x1) * row_size, samples.offset(1) + j);
    store_index<A, kLanes>((line1 + x0) * row_size, samples.offset(2) + j);
    store_index<A, kLanes>((line1 + x1) * row_size, samples.offset(3) + j);
    store_index<A, kLanes>(inside, samples.inside() + j);
    if constexpr (kBackward) {
      store_index<A, kLanes>(top & left, samples.corner(0) + j);
      store_index<A, kLanes>(top & right, samples.corner(1) + j);
      store_index<A, kLanes>(bottom & left, samples.corner(2) + j);
      store_index<A, kLanes>(bottom & right, samples.corner(3) + j);
      store<A, kLanes>(fx, samples.fraction(0) + j);
      store<A, kLanes>(fy, samples.fraction(1) + j);
      store<A, kLanes>(a, samples.attention() + j);
    }
  }
  samples.any = count > 0;
  if (!all_set<A, kLanes>(counted)) {
    replace_outside(samples, begin, end);
  }
}

// The same, of whichever operator, for the backward pass.
template <typename V, typename O, typename A>
PSF_INLINE void prepare_backward(
    const Call<V, O, A>& call,
    int64_t query,
    int64_t m,
    int64_t begin,
    int64_t end,
    Samples<A>& samples) {
  if (call.origins.part) {
    prepare_samples<true, true>(call, query, m, begin, end, samples);
  } else {
    prepare_samples<true, false>(call, query, m, begin, end, samples);
  }
}

constexpr int64_t kCacheLine = 64;

// Fetches kLines lines of the cache.
template <int kLines, typename A>
PSF_INLINE void prefetch_lines(const A* array) {
  constexpr int64_t kLine = kCacheLine / static_cast<int64_t>(sizeof(A));
  for (int i = 0; i < kLines; ++i) {
    __builtin_prefetch(array + i * kLine);
  }
}

// Fetches an array of count elements.
template <typename A>
PSF_INLINE void prefetch_array(const A* array, int64_t count) {
  for (int64_t i = 0; i < count; i += kCacheLine / static_cast<int64_t>(sizeof(A))) {
    prefetch_lines<1>(array + i);
  }
}

// How many queries ahead the inputs of the samples are fetched: those of one head are apart, which
// processors do not foresee.
constexpr int64_t kQueriesAhead = 8;

// Fetches the inputs of the samples of a query to come, if it does.
template <typename V, typename O, typename A>
PSF_INLINE void prefetch_inputs(const Call<V, O, A>& call, int64_t query, int64_t m) {
  if (query < call.sizes.images * call.sizes.queries) {
    const int64_t row = query * call.sizes.heads + m;
    prefetch_array(call.points + row * 2 * call.samples, 2 * call.samples);
    prefetch_array(call.weights + row * call.samples, call.samples);
    if (call.grad_output) {
      prefetch_array(call.grad_output + row * call.sizes.channels, call.sizes.channels);
    }
  }
}

// Fetches the output row of a query to come, if it does: stores are done in order, so one that waits
// for its line holds up the stores of the samples behind it.
template <typename V, typename O, typename A>
PSF_INLINE void prefetch_output(const Call<V, O, A>& call, int64_t query, int64_t m) {
  if (query < call.sizes.images * call.sizes.queries) {
    prefetch_array(
        call.output + (query * call.sizes.heads + m) * call.sizes.channels, call.sizes.channels);
  }
}

// Fetches the rows of prepared samples: of values, or of their gradient.
template <typename V, typename A>
PSF_INLINE void prefetch_rows(
    const Samples<A>& samples, const V* rows, int64_t channels, int64_t count) {
  if (!samples.any) {
    return;
  }
  const int64_t bytes = channels * static_cast<int64_t>(sizeof(V));
  for (int corner = 0; corner < 4; ++corner) {
    const auto* offset = samples.offset(corner);
    if (bytes == 2 * kCacheLine) {  // the most usual row, of 32 channels
      for (int64_t j = 0; j < count; ++j) {
        prefetch_lines<2>(rows + offset[j]);
      }
    } else if (bytes <= kCacheLine) {
      for (int64_t j = 0; j < count; ++j) {
        prefetch_lines<1>(rows + offset[j]);
      }
    } else {
      for (int64_t j = 0; j < count; ++j) {
        prefetch_array(rows + offset[j], channels);
      }
    }
  }
}

// ---- forward ---------------------------------------------------------------------------------

// Sums the value rows of a query's samples over kVectors vectors of channels.
template <int kLanes, int kVectors, typename V, typename A>
PSF_INLINE void sum_rows(
    const Samples<A>& samples, const V* value, int64_t count, Vector<A, kLanes>* sum) {
  // Several sums for each vector, so that additions need not wait for each other.
  constexpr int kSums = kVectors >= 4 ? 2 : 4;
  Vector<A, kLanes> partial[kSums][kVectors] = {};
  asm("" : "+r"(value));  // one sum for each row instead of one for each of its vectors
  for (int64_t j = 0; j < count; ++j) {
    for (int corner = 0; corner < 4; ++corner) {
      const Vector<A, kLanes> weight = splat<A, kLanes>(samples.weight(corner)[j]);
      const V* row = value + samples.offset(corner)[j];
      for (int v = 0; v < kVectors; ++v) {
        Vector<A, kLanes>& to = partial[corner % kSums][v];
        to = weight * load_row<A, kLanes>(row + v * kLanes) + to;
      }
    }
  }
  PSF_UNROLL(4)
  for (int v = 0; v < kVectors; ++v) {
    sum[v] = partial[0][v] + partial[1][v];
    if constexpr (kSums == 4) {
      sum[v] = sum[v] + (partial[2][v] + partial[3][v]);
    }
  }
}

template <int kLanes, int kVectors, typename V, typename O, typename A>
PSF_INLINE void forward_block(
    const Samples<A>& samples,
    const V* value,
    int64_t count,
    int64_t channels,
    O* output) {
  Vector<A, kLanes> sum[kVectors] = {};
  if (samples.any) {
    sum_rows<kLanes, kVectors>(samples, value, count, sum);
  }
  PSF_UNROLL(4)
  for (int v = 0; v < kVectors; ++v) {
    if (v * kLanes < channels) {
      store_row<A, kLanes>(sum[v], output + v * kLanes, channels - v * kLanes);
    }
  }
}

// Calls block<kVectors>(first channel) for blocks of 4, 2 and 1 vectors that make up the channels.
template <int kLanes, typename F>
PSF_INLINE void for_blocks(int64_t channels, const F& block) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) {
    block(std::integral_constant<int, 4>{}, c);
  }
  if (c + 2 * kLanes <= channels) {
    block(std::integral_constant<int, 2>{}, c);
    c += 2 * kLanes;
  }
  if (c < channels) {
    block(std::integral_constant<int, 1>{}, c);
  }
}

template <int kLanes, bool kFused, typename V, typename O, typename A>
void forward_queries(
    const Call<V, O, A>& call,
    const Head<V, A>& head,
    int64_t q_begin,
    int64_t q_end,
    char* scratch) {
  const int64_t count = call.samples;
  const int64_t channels = call.sizes.channels;
  const int64_t half = scratch_bytes<A>(call.padded_samples) / 2;
  using Buffer = Samples<A>;
  Buffer buffers[2] = {
      Buffer(scratch, call.padded_samples), Buffer(scratch + half, call.padded_samples)};
  const V* value = head.value;
  const int64_t m = head.head;
  const int64_t first = head.image * call.sizes.queries;
  prepare_samples<false, kFused>(call, first + q_begin, m, 0, count, buffers[q_begin % 2]);
  for (int64_t q = q_begin; q < q_end; ++q) {
    if (q + 1 < q_end) {
      prepare_samples<false, kFused>(call, first + q + 1, m, 0, count, buffers[(q + 1) % 2]);
      // The rows themselves are not fetched: out-of-order processors hide what reading them from the
      // second cache takes, and as many fetches as reads cost 10 % here. The backward pass, which
      // also writes, gains from them.
      prefetch_inputs(call, first + q + kQueriesAhead, m);
      prefetch_output(call, first + q + kQueriesAhead, m);
    }
    const Buffer& samples = buffers[q % 2];
    O* output = call.output + ((first + q) * call.sizes.heads + m) * channels;
    for_blocks<kLanes>(call.channels, [&](auto vectors, int64_t c) {
      forward_block<kLanes, vectors()>(samples, value + c, count, channels - c, output + c);
    });
  }
}

// ---- backward --------------------------------------------------------------------------------

// Sums of 2 kHalf lanes: of a in the lower half of each group, of b in the upper half.
template <typename A, int kLanes, int kHalf, int... kIndices>
PSF_INLINE Vector<A, kLanes> fold(
    Vector<A, kLanes> a, Vector<A, kLanes> b, std::integer_sequence<int, kIndices...>) {
  return shuffle<A, kLanes>(
             a,
             b,
             Indices<(
                 kIndices % (2 * kHalf) < kHalf ? kIndices : kIndices - kHalf + kLanes)...>{}) +
      shuffle<A, kLanes>(
             a,
             b,
             Indices<(
                 kIndices % (2 * kHalf) < kHalf ? kIndices + kHalf : kIndices + kLanes)...>{});
}

// Lane i of the result is the sum of the lanes of rows[i].
template <typename A, int kLanes>
PSF_INLINE Vector<A, kLanes> sums_of_lanes(Vector<A, kLanes>* rows) {
  using Sequence = std::make_integer_sequence<int, kLanes>;
  if constexpr (kLanes >= 16) {
    for (int i = 0; i < 8; ++i) {
      rows[i] = fold<A, kLanes, 8>(rows[i], rows[i + 8], Sequence{});
    }
  }
  if constexpr (kLanes >= 8) {
    for (int i = 0; i < 4; ++i) {
      rows[i] = fold<A, kLanes, 4>(rows[i], rows[i + 4], Sequence{});
    }
  }
  if constexpr (kLanes >= 4) {
    for (int i = 0; i < 2; ++i) {
      rows[i] = fold<A, kLanes, 2>(rows[i], rows[i + 2], Sequence{});
    }
  }
  if constexpr (kLanes >= 2) {
    rows[0] = fold<A, kLanes, 1>(rows[0], rows[1], Sequence{});
  }
  return rows[0];
}

// Samples [begin, end) of a query in kVectors vectors of channels: adds to the gradient of the value
// rows, and stores (or, from the second block on, adds) the dot products with the value rows.
template <int kLanes, int kVectors, typename V, typename O, typename A>
PSF_INLINE void backward_block(
    const Samples<A>& samples,
    const V* value,
    A* grad_value,
    const O* grad_output,
    int64_t channels,
    int64_t begin,
    int64_t end,
    bool dots,
    bool first_block) {
  Vector<A, kLanes> grad[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t left = channels - v * kLanes;
    grad[v] = left > 0 ? load_partial<A, kLanes>(grad_output + v * kLanes, left)
                       : Vector<A, kLanes>{};
  }
  for (int64_t group = begin; group < end; group += kLanes) {
    const int size = static_cast<int>(end - group < kLanes ? end - group : kLanes);
    for (int corner = 0; corner < 4; ++corner) {
      const typename IndexOf<A>::Type* offset = samples.offset(corner) + group;
      if (dots) {
        Vector<A, kLanes> products[kLanes] = {};
        const auto product = [&](int j) PSF_LAMBDA_INLINE {
          const V* row = value + offset[j];
          // From 0, lest the compiler fuse one or the other of the first two products with their sum,
          // not the same in both of the loops below.
          Vector<A, kLanes> sum = {};
          for (int v = 0; v < kVectors; ++v) {
            sum = grad[v] * load_row<A, kLanes>(row + v * kLanes) + sum;
          }
          products[j] = sum;
        };
        if (size == kLanes) {  // a number of turns that the compiler knows
          for (int j = 0; j < kLanes; ++j) {
            product(j);
          }
        } else {
          for (int j = 0; j < size; ++j) {
            product(j);
          }
        }
        A* to = samples.dot(corner) + group;
        Vector<A, kLanes> sums = sums_of_lanes<A, kLanes>(products);
        store<A, kLanes>(first_block ? sums : sums + load<A, kLanes>(to), to);
      }
      if (grad_value) {
        for (int j = 0; j < size; ++j) {
          const Vector<A, kLanes> weight = splat<A, kLanes>(samples.weight(corner)[group + j]);
          A* row = grad_value + offset[j];
          for (int v = 0; v < kVectors; ++v) {
            store<A, kLanes>(
                weight * grad[v] + load<A, kLanes>(row + v * kLanes), row + v * kLanes);
          }
        }
      }
    }
  }
}

// Copies an array of count elements from scratch memory; whole vectors are read.
template <typename A>
PSF_INLINE void store_array(const A* from, A* to, int64_t count) {
  constexpr int kLanes = kFull<A>;
  for (int64_t i = 0; i < count; i += kLanes) {
    store_row<A, kLanes>(load<A, kLanes>(from + i), to + i, count - i);
  }
}

// From the dot products of samples [begin, end) to the gradients of their places and weights.
template <typename V, typename O, typename A>
PSF_INLINE void sample_gradients(
    const Call<V, O, A>& call,
    const Samples<A>& samples,
    int64_t row,
    int64_t begin,
    int64_t end) {
  constexpr int kLanes = kFull<A>;
  using F = Vector<A, kLanes>;
  using Sequence = std::make_integer_sequence<int, kLanes>;
  const F nothing = splat<A, kLanes>(A(0));
  for (int64_t j = begin; j < end; j += kLanes) {
    F dot[4];
    for (int corner = 0; corner < 4; ++corner) {
      dot[corner] = select<A, kLanes>(
          load_index<A, kLanes>(samples.corner(corner) + j),
          load<A, kLanes>(samples.dot(corner) + j),
          nothing);
    }
    const auto inside = load_index<A, kLanes>(samples.inside() + j);
    const F fx = load<A, kLanes>(samples.fraction(0) + j);
    const F fy = load<A, kLanes>(samples.fraction(1) + j);
    const F step_top = dot[1] - dot[0];
    const F step_bottom = dot[3] - dot[2];
    const F top = fx * step_top + dot[0];
    const F bottom = fx * step_bottom + dot[2];
    const int64_t size = end - j < kLanes ? end - j : kLanes;
    if (call.grad_weights) {
      const F grad = select<A, kLanes>(inside, fy * (bottom - top) + top, nothing);
      store<A, kLanes>(grad, samples.grad() + j);
    }
    if (call.grad_points) {
      const F attention = load<A, kLanes>(samples.attention() + j);
      F x = attention * (fy * (step_bottom - step_top) + step_top);
      F y = attention * (bottom - top);
      if (!call.in_pixels) {
        x = x * load<A, kLanes>(call.table.width + j);
        y = y * load<A, kLanes>(call.table.height + j);
      }
      x = select<A, kLanes>(inside, x, nothing);
      y = select<A, kLanes>(inside, y, nothing);
      F pairs[2];
      join_pairs<A, kLanes>(x, y, pairs[0], pairs[1], Sequence{});
      A* to = call.grad_points + (row * call.samples + j) * 2;
      store_row<A, kLanes>(pairs[0], to, 2 * size);
      if (2 * size > kLanes) {
        store_row<A, kLanes>(pairs[1], to + kLanes, 2 * size - kLanes);
      }
    }
  }
}

template <int kLanes, typename V, typename O, typename A>
void backward_queries(
    const Call<V, O, A>& call,
    const Head<V, A>& head,
    int64_t l_begin,
    int64_t l_end,
    char* scratch) {
  const Sizes& sizes = call.sizes;
  const int64_t begin = l_begin * sizes.points;
  const int64_t end = l_end * sizes.points;
  const bool dots = call.grad_points || call.grad_weights;
  const bool all_levels = l_begin == 0 && l_end == sizes.levels;
  const int64_t half = scratch_bytes<A>(call.padded_samples) / 2;
  using Buffer = Samples<A>;
  Buffer buffers[2] = {
      Buffer(scratch, call.padded_samples), Buffer(scratch + half, call.padded_samples)};
  const V* value = head.value;
  A* grad_value = head.grad_value;
  const int64_t m = head.head;
  const int64_t first = head.image * sizes.queries;
  prepare_backward(call, first, m, begin, end, buffers[0]);
  for (int64_t q = 0; q < sizes.queries; ++q) {
    if (q + 1 < sizes.queries) {
      prepare_backward(call, first + q + 1, m, begin, end, buffers[(q + 1) % 2]);
      prefetch_rows(buffers[(q + 1) % 2], value, sizes.channels, call.samples);
      if (grad_value) {
        prefetch_rows(buffers[(q + 1) % 2], grad_value, sizes.channels, call.samples);
      }
      prefetch_inputs(call, first + q + kQueriesAhead, m);
    }
    const Buffer& samples = buffers[q % 2];
    const int64_t row = (first + q) * sizes.heads + m;
    const O* grad_output = call.grad_output + row * sizes.channels;
    if (samples.any) {
      for_blocks<kLanes>(call.channels, [&](auto vectors, int64_t c) {
        backward_block<kLanes, vectors()>(
            samples,
            value + c,
            grad_value ? grad_value + c : nullptr,
            grad_output + c,
            sizes.channels - c,
            begin,
            end,
            dots,
            c == 0);
      });
    }
    if (dots) {
      sample_gradients(call, samples, row, begin, end);
    }
    if (call.grad_weights) {
      if (call.origins.part && all_levels) {
        softmax_gradient(samples.softmax(), samples.grad(), call.samples);
      }
      store_array(samples.grad() + begin, call.grad_weights + row * call.samples + begin, end - begin);
    }
  }
}

// Calls f with the lanes that the value rows of a call divide into.
template <typename V, typename O, typename A, typename F>
void with_lanes(const Call<V, O, A>& call, const F& f) {
  if (call.channels % kFull<A> == 0) {
    f(std::integral_constant<int, kFull<A>>{});
  } else if constexpr (kFull<A> > kLeastLanes) {
    f(std::integral_constant<int, kLeastLanes>{});
  }
}

}  // namespace

template <typename V, typename O, typename A>
void forward(
    const Call<V, O, A>& call,
    const Head<V, A>& head,
    int64_t q_begin,
    int64_t q_end,
    char* scratch) {
  with_lanes(call, [&](auto lanes) {
    // Not one function for both operators: each leaves the other too few registers.
    if (call.origins.part) {
      forward_queries<lanes(), true>(call, head, q_begin, q_end, scratch);
    } else {
      forward_queries<lanes(), false>(call, head, q_begin, q_end, scratch);
    }
  });
}

template <typename V, typename O, typename A>
void backward(
    const Call<V, O, A>& call,
    const Head<V, A>& head,
    int64_t l_begin,
    int64_t l_end,
    char* scratch) {
  with_lanes(call, [&](auto lanes) {
    backward_queries<lanes()>(call, head, l_begin, l_end, scratch);
  });
}

template <typename A>
void softmax_backward(
    const SampleTable<A>& table, const A* logits, A* grad, int64_t samples, char* scratch) {
  // In scratch memory, since whole vectors are read and written.
  const int64_t padded = (samples + kSamplePadding - 1) / kSamplePadding * kSamplePadding;
  Samples<A> row(scratch, padded);
  std::memcpy(row.softmax(), logits, static_cast<size_t>(samples) * sizeof(A));
  std::memcpy(row.grad(), grad, static_cast<size_t>(samples) * sizeof(A));
  softmax(row.softmax(), table.padding, row.softmax(), samples);
  softmax_gradient(row.softmax(), row.grad(), samples);
  std::memcpy(grad, row.grad(), static_cast<size_t>(samples) * sizeof(A));
}

#define PSF_INSTANTIATE(V, O, A)                                                                \
  template void forward(const Call<V, O, A>&, const Head<V, A>&, int64_t, int64_t, char*); \
  template void backward(const Call<V, O, A>&, const Head<V, A>&, int64_t, int64_t, char*);

PSF_INSTANTIATE(double, double, double)
PSF_INSTANTIATE(float, float, float)
PSF_INSTANTIATE(float, BFloat16, float)
PSF_INSTANTIATE(BFloat16, BFloat16, float)
template void softmax_backward(
    const SampleTable<float>&, const float*, float*, int64_t, char*);
template void softmax_backward(
    const SampleTable<double>&, const double*, double*, int64_t, char*);
#undef PSF_INSTANTIATE

}  // namespace PSF_ISA
}  // namespace psf
