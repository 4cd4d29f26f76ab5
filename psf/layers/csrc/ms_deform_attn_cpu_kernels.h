// The CPU kernels, for the instruction set that the including file is compiled for. The file defines
// PSF_ISA, the namespace of that set.
//
// A query's samples of one head are prepared a vector at a time: coordinates, the four interpolation
// weights, the offsets of the four value rows. Then the rows are summed, channels in the lanes. The
// next query is prepared before one is summed, so that neither waits for the other. In the backward
// pass the dot products of the output's gradient with the rows are reduced a vector at a time, by a
// transposing tree. No step depends on how the work is split among threads.
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

// ---- value and output rows -------------------------------------------------------------------

PSF_INLINE void narrow(float x, BFloat16* to) {
  *to = to_bfloat16(x);
}
PSF_INLINE void narrow(float x, float* to) {
  *to = x;
}
PSF_INLINE void narrow(double x, double* to) {
  *to = x;
}

// A vector of a row.
template <typename A>
PSF_INLINE Vector<A> load_row(const A* from) {
  return load(from);
}
template <typename A>
PSF_INLINE Vector<A> load_row(const BFloat16* from) {
  typename VectorOf<uint16_t, kVectorBytes / 2>::Type bits;
  std::memcpy(&bits, from, sizeof(bits));
  const auto wide = __builtin_convertvector(bits, Vector<uint32_t>) << 16;
  Vector<A> v;
  std::memcpy(&v, &wide, sizeof(v));
  return v;
}

// The first `count` elements of a vector to an output row.
template <typename A, typename O>
PSF_INLINE void store_row(Vector<A> v, O* to, int64_t count) {
  if constexpr (std::is_same_v<O, A>) {
    if (count >= kLanesOf<A>) {
      return store(v, to);
    }
  }
  A lanes[kLanesOf<A>];
  store(v, lanes);
  for (int i = 0; i < kLanesOf<A> && i < count; ++i) {
    narrow(lanes[i], &to[i]);
  }
}

// The first `count` elements of an output row, zeros after them.
template <typename A, typename O>
PSF_INLINE Vector<A> load_partial(const O* from, int64_t count) {
  if (count >= kLanesOf<A>) {
    return load_row<A>(from);
  }
  O lanes[kLanesOf<A>] = {};
  std::memcpy(lanes, from, static_cast<size_t>(count > 0 ? count : 0) * sizeof(O));
  return load_row<A>(lanes);
}

// ---- softmax ---------------------------------------------------------------------------------

// Softmax of `count` logits. Whole vectors are read and written; padding masks what is no logit,
// whose weights become 0.
template <typename A>
PSF_INLINE void softmax(
    const A* logits, const typename IndexOf<A>::Type* padding, A* weights, int64_t count) {
  using F = Vector<A>;
  const F least = splat(-std::numeric_limits<A>::infinity());
  F largest = least;
  for (int64_t i = 0; i < count; i += kLanesOf<A>) {
    const F x = load(padding + i) ? least : load(logits + i);
    largest = x > largest ? x : largest;
  }
  largest = combine_lanes<A>(
      largest, [](F a, F b) PSF_LAMBDA_INLINE -> F { return a > b ? a : b; });
  F sum = {};
  for (int64_t i = 0; i < count; i += kLanesOf<A>) {
    const F e = load(padding + i) ? F{} : exponential<A>(load(logits + i) - largest);
    store(e, weights + i);
    sum += e;
  }
  const F scale = A(1) / sum_of_lanes<A>(sum);
  for (int64_t i = 0; i < count; i += kLanesOf<A>) {
    store(load(weights + i) * scale, weights + i);
  }
}

// From the gradient of the weights to that of the logits, in place; whole vectors, of which the
// weights in the padding are 0.
template <typename A>
PSF_INLINE void softmax_gradient(const A* weights, A* grad, int64_t count) {
  Vector<A> sum = {};
  for (int64_t i = 0; i < count; i += kLanesOf<A>) {
    sum += load(weights + i) * load(grad + i);
  }
  sum = sum_of_lanes<A>(sum);
  for (int64_t i = 0; i < count; i += kLanesOf<A>) {
    store(load(weights + i) * (load(grad + i) - sum), grad + i);
  }
}

// ---- preparing the samples -------------------------------------------------------------------

// (x0, y0, x1, y1, ...) to (x0, x1, ...) and (y0, y1, ...).
template <typename A, int... kIndices>
PSF_INLINE void split_pairs(const A* pairs, Vector<A> (&xy)[2], Indices<kIndices...>) {
  const Vector<A> first = load(pairs);
  const Vector<A> second = load(pairs + kLanesOf<A>);
  xy[0] = shuffle<A>(first, second, Indices<2 * kIndices...>{});
  xy[1] = shuffle<A>(first, second, Indices<(2 * kIndices + 1)...>{});
}

// The inverse, of which the first `count` numbers are stored.
template <typename A, int... kIndices>
PSF_INLINE void join_pairs(
    Vector<A> x, Vector<A> y, A* pairs, int64_t count, Indices<kIndices...>) {
  constexpr int kLanes = kLanesOf<A>;
  using First = Indices<(kIndices / 2 + kIndices % 2 * kLanes)...>;
  using Second = Indices<((kIndices + kLanes) / 2 + kIndices % 2 * kLanes)...>;
  store_row<A>(shuffle<A>(x, y, First{}), pairs, count);
  store_row<A>(shuffle<A>(x, y, Second{}), pairs + kLanes, count - kLanes);
}

// The samples of one query and head, in scratch memory: each function gives an array of kSize elements,
// or of as many as the constructor is told where that is 0. A known size makes all arrays reachable
// from one pointer, which is worth 3 % of the forward pass.
template <typename A, int kSize>
struct Samples {
  using Index = typename IndexOf<A>::Type;

  Samples(char* scratch, int64_t padded_samples)
      : base(reinterpret_cast<A*>(scratch)), size(array_size(padded_samples)), any(false) {}

  A* array(int number) const {
    return base + number * (kSize == 0 ? size : kSize);
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
template <typename A, typename Index>
PSF_INLINE Vector<A> look_up(const A* table, const Index* level, Index axis, bool fits) {
  if (fits) {
    return permute<A>(load(table), load(level) + axis);
  }
  Vector<A> v;
  for (int i = 0; i < kLanesOf<A>; ++i) {
    v[i] = table[level[i] + axis];
  }
  return v;
}

// Where a vector of samples lies on one axis of its levels, from the pixel before on.
template <typename A>
struct Place {
  IndexVector<A> within;  // mask: whether it touches a pixel; the others are 0 where not
  IndexVector<A> pixel;
  Vector<A> fraction;
};

// Of locations that span [0, 1].
template <typename A>
PSF_INLINE Place<A> place_location(Vector<A> location, Vector<A> size) {
  // The rounding of this product is the largest error of single precision: put it back.
  Vector<A> rest;
  const Vector<A> centred = multiply<A>(location, size, rest) - A(0.5);
  Place<A> place;
  place.within = (centred > A(-1)) & (centred < size);
  const Vector<A> inside = place.within ? centred : Vector<A>{};
  const Vector<A> low = floor<A>(inside);
  place.pixel = to_index<A>(low);
  place.fraction = (inside - low) + (place.within ? rest : Vector<A>{});
  return place;
}

// Of an offset in pixels from whole + part.
template <typename A>
PSF_INLINE Place<A> place_offset(
    Vector<A> offset, IndexVector<A> whole, Vector<A> part, IndexVector<A> size) {
  constexpr A kLimit = static_cast<A>(kFar);
  const Vector<A> sum = offset + part;
  const IndexVector<A> near = (sum > -kLimit) & (sum < kLimit);  // not for NaN
  // Whole pixels go before the parts are added, which a large offset would round away.
  offset = near ? offset : Vector<A>{};
  const Vector<A> low = floor<A>(offset);
  const Vector<A> parts = near ? (offset - low) + part : Vector<A>{};
  const Vector<A> carry = floor<A>(parts);
  Place<A> place;
  place.fraction = parts - carry;
  place.pixel = to_index<A>(low) + to_index<A>(carry) + whole;
  // Above -1 and below the size; at -1 itself the fraction is 0.
  place.within = near & (place.pixel < size) &
      ((place.pixel >= 0) | ((place.pixel >= -1) & (place.fraction > A(0))));
  place.pixel = place.within ? place.pixel : IndexVector<A>{};
  return place;
}

// Gives those of samples [begin, end) that do not count the rows of one that does, so that what is
// read for them, times 0, is nothing that the output does not depend on. From outside that range no
// row will do: the backward pass also adds to it, and it may be another thread's.
template <typename A, int kSize>
PSF_INLINE void replace_outside(Samples<A, kSize>& samples, int64_t begin, int64_t end) {
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
    const auto other = splat(offset[first]);
    for (int64_t j = begin; j < end; j += kLanesOf<A>) {
      store(load(samples.inside() + j) ? load(offset + j) : other, offset + j);
    }
  }
}

// Prepares the samples of query `query` (n * Q + q) and head m, of which [begin, end) will be used.
// What only the backward pass needs is left out on request.
template <bool kBackward, bool kFused, typename V, typename O, typename A, int kSize>
PSF_INLINE void prepare_samples(
    const Call<V, O, A>& call,
    int64_t query,
    int64_t m,
    int64_t begin,
    int64_t end,
    Samples<A, kSize>& samples) {
  using F = Vector<A>;
  using I = IndexVector<A>;
  using Index = typename IndexOf<A>::Type;
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
  const bool fits = 2 * call.sizes.levels <= kLanesOf<A>;
  if constexpr (kFused) {
    softmax(attention, table.padding, samples.softmax(), count);
    attention = samples.softmax();
  }
  const auto row_size = static_cast<Index>(call.row_stride);
  I counted = splat<Index>(-1);
  for (int64_t j = 0; j < count; j += kLanesOf<A>) {
    F xy[2];
    split_pairs(points + 2 * j, xy, LanesOf<A>{});
    const F size[2] = {load(table.width + j), load(table.height + j)};
    const I index_size[2] = {load(table.index_width + j), load(table.index_height + j)};
    Place<A> place[2];
    PSF_UNROLL(2)
    for (Index axis = 0; axis < 2; ++axis) {
      if constexpr (kFused) {
        const Index* level = table.level + j;
        const F unit =
            call.in_pixels ? splat<A>(1) : look_up(call.origins.unit + origin, level, axis, fits);
        place[axis] = place_offset<A>(
            xy[axis] * unit,
            look_up(call.origins.whole + origin, level, axis, fits),
            look_up(call.origins.part + origin, level, axis, fits),
            index_size[axis]);
      } else {
        place[axis] = place_location<A>(xy[axis], size[axis]);
      }
    }
    const I inside = place[0].within & place[1].within;
    counted &= inside | load(table.padding + j);
    const I column = place[0].pixel;
    const I line = place[1].pixel;
    const F fx = place[0].fraction;
    const F fy = place[1].fraction;
    const F a = inside ? load(attention + j) : F{};  // what does not count may be NaN
    const I left = column >= 0;
    const I top = line >= 0;
    const I right = column + 1 < index_size[0];
    const I bottom = line + 1 < index_size[1];
    const F low = a * fy;
    const F share_top = top ? a - low : F{};
    const F share_bottom = bottom ? low : F{};
    const F share_left = left ? A(1) - fx : F{};
    const F share_right = right ? fx : F{};
    const I x0 = left ? column : I{};
    const I x1 = right ? column + 1 : column;
    const I start = load(table.start + j);
    const I line0 = start + (top ? line : I{}) * index_size[0];
    const I line1 = start + (bottom ? line + 1 : line) * index_size[0];
    store(share_top * share_left, samples.weight(0) + j);
    store(share_top * share_right, samples.weight(1) + j);
    store(share_bottom * share_left, samples.weight(2) + j);
    store(share_bottom * share_right, samples.weight(3) + j);
    store((line0 + x0) * row_size, samples.offset(0) + j);
    store((line0 + x1) * row_size, samples.offset(1) + j);
    store((line1 + x0) * row_size, samples.offset(2) + j);
    store((line1 + x1) * row_size, samples.offset(3) + j);
    store(inside, samples.inside() + j);
    if constexpr (kBackward) {
      store(top & left, samples.corner(0) + j);
      store(top & right, samples.corner(1) + j);
      store(bottom & left, samples.corner(2) + j);
      store(bottom & right, samples.corner(3) + j);
      store(fx, samples.fraction(0) + j);
      store(fy, samples.fraction(1) + j);
      store(a, samples.attention() + j);
    }
  }
  samples.any = count > 0;
  if (!all_set<A>(counted)) {
    replace_outside(samples, begin, end);
  }
}

// ---- prefetching -----------------------------------------------------------------------------

// Fetches an array of count elements.
template <typename T>
PSF_INLINE void prefetch(const T* array, int64_t count) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < count; i += kLine) {
    __builtin_prefetch(array + i);
  }
}

// How many queries ahead the inputs of the samples are fetched: those of one head are apart, which
// processors do not foresee.
constexpr int64_t kQueriesAhead = 8;

// Fetches what is read and written of a query to come, if it comes: inputs of the samples and output
// or its gradient. Stores are done in order, so one that waits for its line holds up those behind it.
template <typename V, typename O, typename A>
PSF_INLINE void prefetch_query(const Call<V, O, A>& call, int64_t query, int64_t m) {
  query += kQueriesAhead;
  if (query < call.sizes.images * call.sizes.queries) {
    const int64_t row = query * call.sizes.heads + m;
    prefetch(call.points + row * 2 * call.samples, 2 * call.samples);
    prefetch(call.weights + row * call.samples, call.samples);
    const O* output = call.output ? call.output : call.grad_output;
    prefetch(output + row * call.sizes.channels, call.sizes.channels);
  }
}

// Fetches the rows of prepared samples: of values, or of their gradient.
template <typename V, typename A, int kSize>
PSF_INLINE void prefetch_rows(
    const Samples<A, kSize>& samples, const V* rows, int64_t channels, int64_t count) {
  constexpr int64_t kUsual = 32;  // channels, whose lines the compiler can count
  for (int corner = 0; samples.any && corner < 4; ++corner) {
    const auto* offset = samples.offset(corner);
    if (channels == kUsual) {
      for (int64_t j = 0; j < count; ++j) {
        prefetch(rows + offset[j], kUsual);
      }
    } else {
      for (int64_t j = 0; j < count; ++j) {
        prefetch(rows + offset[j], channels);
      }
    }
  }
}

// ---- forward ---------------------------------------------------------------------------------

// Sums the value rows of a query's samples over kVectors vectors of channels.
template <int kVectors, typename V, typename A, int kSize>
PSF_INLINE void sum_rows(
    const Samples<A, kSize>& samples, const V* value, int64_t count, Vector<A>* sum) {
  // Several sums for each vector, so that additions need not wait for each other.
  constexpr int kSums = kVectors >= 4 ? 2 : 4;
  Vector<A> partial[kSums][kVectors] = {};
  asm("" : "+r"(value));  // one sum for each row instead of one for each of its vectors
  for (int64_t j = 0; j < count; ++j) {
    for (int corner = 0; corner < 4; ++corner) {
      const Vector<A> weight = splat(samples.weight(corner)[j]);
      const V* row = value + samples.offset(corner)[j];
      for (int v = 0; v < kVectors; ++v) {
        Vector<A>& to = partial[corner % kSums][v];
        to = weight * load_row<A>(row + v * kLanesOf<A>) + to;
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

template <int kVectors, typename V, typename O, typename A, int kSize>
PSF_INLINE void forward_block(
    const Samples<A, kSize>& samples, const V* value, int64_t count, int64_t channels, O* output) {
  Vector<A> sum[kVectors] = {};
  if (samples.any) {
    sum_rows<kVectors>(samples, value, count, sum);
  }
  PSF_UNROLL(4)
  for (int v = 0; v < kVectors; ++v) {
    store_row<A>(sum[v], output + v * kLanesOf<A>, channels - v * kLanesOf<A>);
  }
}

// Calls block<kVectors>(first channel) for blocks of 4, 2 and 1 vectors that make up the channels.
template <typename A, typename F>
PSF_INLINE void for_blocks(int64_t channels, const F& block) {
  constexpr int kLanes = kLanesOf<A>;
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

// Two sets of samples: those of the query at work and those of the next.
template <typename A, int kSize>
struct Buffers {
  Samples<A, kSize> sets[2];

  Buffers(char* scratch, int64_t padded_samples)
      : sets{
            {scratch, padded_samples},
            {scratch + scratch_bytes<A>(padded_samples) / 2, padded_samples}} {}

  Samples<A, kSize>& operator[](int64_t query) {
    return sets[query % 2];
  }
};

template <int kSize, bool kFused, typename V, typename O, typename A>
void forward_queries(
    const Call<V, O, A>& call,
    const Head<V, A>& head,
    int64_t q_begin,
    int64_t q_end,
    char* scratch) {
  const int64_t count = call.samples;
  const int64_t channels = call.sizes.channels;
  Buffers<A, kSize> buffers(scratch, call.padded_samples);
  const V* value = head.value;
  const int64_t m = head.head;
  const int64_t first = head.image * call.sizes.queries;
  prepare_samples<false, kFused>(call, first + q_begin, m, 0, count, buffers[q_begin]);
  for (int64_t q = q_begin; q < q_end; ++q) {
    if (q + 1 < q_end) {
      prepare_samples<false, kFused>(call, first + q + 1, m, 0, count, buffers[q + 1]);
      // The rows themselves are not fetched: out-of-order processors hide what reading them from the
      // second cache takes, and as many fetches as reads cost 10 % here. The backward pass, which
      // also writes, gains from them.
      prefetch_query(call, first + q, m);
    }
    const Samples<A, kSize>& samples = buffers[q];
    O* output = call.output + ((first + q) * call.sizes.heads + m) * channels;
    for_blocks<A>(call.channels, [&](auto vectors, int64_t c) {
      forward_block<vectors()>(samples, value + c, count, channels - c, output + c);
    });
  }
}

// ---- backward --------------------------------------------------------------------------------

// Sums of 2 kHalf lanes: of a in the lower half of each group, of b in the upper half.
template <typename A, int kHalf, int... kIndices>
PSF_INLINE Vector<A> fold(Vector<A> a, Vector<A> b, Indices<kIndices...>) {
  constexpr int kToB = kLanesOf<A>;
  using Lower = Indices<(
      kIndices % (2 * kHalf) < kHalf ? kIndices : kIndices - kHalf + kToB)...>;
  using Upper = Indices<(
      kIndices % (2 * kHalf) < kHalf ? kIndices + kHalf : kIndices + kToB)...>;
  return shuffle<A>(a, b, Lower{}) + shuffle<A>(a, b, Upper{});
}

// Lane i of the result is the sum of the lanes of rows[i].
template <typename A, int kHalf = kLanesOf<A> / 2>
PSF_INLINE Vector<A> sums_of_lanes(Vector<A>* rows) {
  if constexpr (kHalf == 0) {
    return rows[0];
  } else {
    for (int i = 0; i < kHalf; ++i) {
      rows[i] = fold<A, kHalf>(rows[i], rows[i + kHalf], LanesOf<A>{});
    }
    return sums_of_lanes<A, kHalf / 2>(rows);
  }
}

// Samples [begin, end) of a query in kVectors vectors of channels: adds to the gradient of the value
// rows, and stores (or, from the second block on, adds) the dot products with the value rows.
template <int kVectors, typename V, typename O, typename A, int kSize>
PSF_INLINE void backward_block(
    const Samples<A, kSize>& samples,
    const V* value,
    A* grad_value,
    const O* grad_output,
    int64_t channels,
    int64_t begin,
    int64_t end,
    bool dots,
    bool first_block) {
  constexpr int kLanes = kLanesOf<A>;
  Vector<A> grad[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    grad[v] = load_partial<A>(grad_output + v * kLanes, channels - v * kLanes);
  }
  for (int64_t group = begin; group < end; group += kLanes) {
    const int size = static_cast<int>(end - group < kLanes ? end - group : kLanes);
    for (int corner = 0; corner < 4; ++corner) {
      const auto* offset = samples.offset(corner) + group;
      if (dots) {
        Vector<A> products[kLanes] = {};
        const auto product = [&](int j) PSF_LAMBDA_INLINE {
          const V* row = value + offset[j];
          // From 0, lest the compiler fuse one or the other of the first two products with their sum,
          // not the same in both of the loops below.
          Vector<A> sum = {};
          for (int v = 0; v < kVectors; ++v) {
            sum = grad[v] * load_row<A>(row + v * kLanes) + sum;
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
        const Vector<A> sums = sums_of_lanes<A>(products);
        store(first_block ? sums : sums + load(to), to);
      }
      if (grad_value) {
        for (int j = 0; j < size; ++j) {
          const Vector<A> weight = splat(samples.weight(corner)[group + j]);
          A* row = grad_value + offset[j];
          for (int v = 0; v < kVectors; ++v) {
            store(weight * grad[v] + load(row + v * kLanes), row + v * kLanes);
          }
        }
      }
    }
  }
}

// From the dot products of samples [begin, end) to the gradients of their places and weights.
template <typename V, typename O, typename A, int kSize>
PSF_INLINE void sample_gradients(
    const Call<V, O, A>& call,
    const Samples<A, kSize>& samples,
    int64_t row,
    int64_t begin,
    int64_t end) {
  using F = Vector<A>;
  for (int64_t j = begin; j < end; j += kLanesOf<A>) {
    F dot[4];
    for (int corner = 0; corner < 4; ++corner) {
      dot[corner] = load(samples.corner(corner) + j) ? load(samples.dot(corner) + j) : F{};
    }
    const IndexVector<A> inside = load(samples.inside() + j);
    const F fx = load(samples.fraction(0) + j);
    const F fy = load(samples.fraction(1) + j);
    const F step_top = dot[1] - dot[0];
    const F step_bottom = dot[3] - dot[2];
    const F top = fx * step_top + dot[0];
    const F bottom = fx * step_bottom + dot[2];
    if (call.grad_weights) {
      const F grad = fy * (bottom - top) + top;
      store(inside ? grad : F{}, samples.grad() + j);
    }
    if (call.grad_points) {
      const F attention = load(samples.attention() + j);
      F x = attention * (fy * (step_bottom - step_top) + step_top);
      F y = attention * (bottom - top);
      if (!call.in_pixels) {
        x = x * load(call.table.width + j);
        y = y * load(call.table.height + j);
      }
      A* to = call.grad_points + (row * call.samples + j) * 2;
      join_pairs<A>(inside ? x : F{}, inside ? y : F{}, to, 2 * (end - j), LanesOf<A>{});
    }
  }
}

// The samples of either operator, for the backward pass.
template <typename V, typename O, typename A, int kSize>
PSF_INLINE void prepare_backward(
    const Call<V, O, A>& call,
    int64_t query,
    int64_t m,
    int64_t begin,
    int64_t end,
    Samples<A, kSize>& samples) {
  if (call.origins.part) {
    prepare_samples<true, true>(call, query, m, begin, end, samples);
  } else {
    prepare_samples<true, false>(call, query, m, begin, end, samples);
  }
}

template <int kSize, typename V, typename O, typename A>
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
  Buffers<A, kSize> buffers(scratch, call.padded_samples);
  const V* value = head.value;
  A* grad_value = head.grad_value;
  const int64_t m = head.head;
  const int64_t first = head.image * sizes.queries;
  prepare_backward(call, first, m, begin, end, buffers[0]);
  for (int64_t q = 0; q < sizes.queries; ++q) {
    if (q + 1 < sizes.queries) {
      prepare_backward(call, first + q + 1, m, begin, end, buffers[q + 1]);
      prefetch_rows(buffers[q + 1], value, sizes.channels, call.samples);
      if (grad_value) {
        prefetch_rows(buffers[q + 1], grad_value, sizes.channels, call.samples);
      }
      prefetch_query(call, first + q, m);
    }
    const Samples<A, kSize>& samples = buffers[q];
    const int64_t row = (first + q) * sizes.heads + m;
    const O* grad_output = call.grad_output + row * sizes.channels;
    if (samples.any) {
      for_blocks<A>(call.channels, [&](auto vectors, int64_t c) {
        backward_block<vectors()>(
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
      A* to = call.grad_weights + row * call.samples;
      for (int64_t i = begin; i < end; i += kLanesOf<A>) {
        store_row<A>(load(samples.grad() + i), to + i, end - i);
      }
    }
  }
}

// Calls f with the size of the arrays of samples, or with 0 if it is not the usual one.
template <typename V, typename O, typename A, typename F>
void with_size(const Call<V, O, A>& call, const F& f) {
  if constexpr (std::is_same_v<V, A>) {  // rows in bfloat16 are of few queries: not worth the code
    if (call.padded_samples == kSamplePadding) {
      return f(std::integral_constant<int, static_cast<int>(array_size(kSamplePadding))>{});
    }
  }
  f(std::integral_constant<int, 0>{});
}

}  // namespace

template <typename V, typename O, typename A>
void forward(
    const Call<V, O, A>& call,
    const Head<V, A>& head,
    int64_t q_begin,
    int64_t q_end,
    char* scratch) {
  with_size(call, [&](auto size) {
    // Not one function for both operators: each leaves the other too few registers.
    if (call.origins.part) {
      forward_queries<size(), true>(call, head, q_begin, q_end, scratch);
    } else {
      forward_queries<size(), false>(call, head, q_begin, q_end, scratch);
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
  with_size(call, [&](auto size) {
    backward_queries<size()>(call, head, l_begin, l_end, scratch);
  });
}

template <typename A>
void softmax_backward(
    const SampleTable<A>& table, const A* logits, A* grad, int64_t samples, char* scratch) {
  // In scratch memory, since whole vectors are read and written.
  const int64_t padded = (samples + kSamplePadding - 1) / kSamplePadding * kSamplePadding;
  Samples<A, 0> row(scratch, padded);
  std::memcpy(row.softmax(), logits, static_cast<size_t>(samples) * sizeof(A));
  std::memcpy(row.grad(), grad, static_cast<size_t>(samples) * sizeof(A));
  softmax(row.softmax(), table.padding, row.softmax(), samples);
  softmax_gradient(row.softmax(), row.grad(), samples);
  std::memcpy(grad, row.grad(), static_cast<size_t>(samples) * sizeof(A));
}

#define PSF_INSTANTIATE(V, O, A)                                                           \
  template void forward(const Call<V, O, A>&, const Head<V, A>&, int64_t, int64_t, char*); \
  template void backward(const Call<V, O, A>&, const Head<V, A>&, int64_t, int64_t, char*);

PSF_INSTANTIATE(double, double, double)
PSF_INSTANTIATE(float, float, float)
PSF_INSTANTIATE(float, BFloat16, float)
PSF_INSTANTIATE(BFloat16, BFloat16, float)
#undef PSF_INSTANTIATE
template void softmax_backward(
    const SampleTable<float>&, const float*, float*, int64_t, char*);
template void softmax_backward(
    const SampleTable<double>&, const double*, double*, int64_t, char*);

}  // namespace PSF_ISA
}  // namespace psf
