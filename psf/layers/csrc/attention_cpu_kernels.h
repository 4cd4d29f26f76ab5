// Scaled dot-product attention, and its gradient; see training_cpu_kernels.h.
//
// Like "flash attention", a block of queries meets one block of keys after the other, so that no
// more than a block of the scores is ever in memory. Vectors run over the keys in products that have
// no sum over them, which keeps all lanes busy however few channels a head has.

namespace {

// Own functions for what <algorithm> has: a template of the library that is compiled here could be
// linked in place of one compiled for a lesser instruction set.
PSF_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

template <typename A>
PSF_INLINE void fill(A* array, int64_t size, A value) {
  for (int64_t i = 0; i < size; ++i) {
    array[i] = value;
  }
}

// The row is of whole vectors.
template <typename A>
PSF_INLINE void scale_row(A* row, int64_t size, A factor) {
  constexpr int kLanes = kFull<A>;
  for (int64_t i = 0; i < size; i += kLanes) {
    store<A, kLanes>(load<A, kLanes>(row + i) * splat<A, kLanes>(factor), row + i);
  }
}

template <typename A>
PSF_INLINE A* head_of(const Heads<A>& x, int64_t n, int64_t m) {
  return x.data + n * x.image + m * x.head;
}

// c (rows, columns) += a (rows, steps) times b (steps, columns), whose rows lie b_row and c_row
// apart. Element (i, l) of a lies at i * a_row + l * a_step.
template <typename A>
struct Product {
  int64_t steps;
  const A* a;
  int64_t a_row;
  int64_t a_step;
  const A* b;
  int64_t b_row;
  A* c;
  int64_t c_row;
};

template <bool kAdd, int kRows, int kVectors, typename A>
PSF_INLINE void multiply_tile(const Product<A>& product, int64_t row, int64_t column) {
  constexpr int kLanes = kFull<A>;
  using V = Vector<A, kLanes>;
  const A* a = product.a + row * product.a_row;
  const A* b = product.b + column;
  A* c = product.c + row * product.c_row + column;
  V sums[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      sums[i][j] = kAdd ? load<A, kLanes>(c + i * product.c_row + j * kLanes) : V{};
    }
  }
  for (int64_t l = 0; l < product.steps; ++l) {
    V factors[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      factors[j] = load<A, kLanes>(b + j * kLanes);
    }
    for (int i = 0; i < kRows; ++i) {
      const V factor = splat<A, kLanes>(a[i * product.a_row]);
      for (int j = 0; j < kVectors; ++j) {
        sums[i][j] += factor * factors[j];
      }
    }
    a += product.a_step;
    b += product.b_row;
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      store<A, kLanes>(sums[i][j], c + i * product.c_row + j * kLanes);
    }
  }
}

template <bool kAdd, int kVectors, typename A>
void multiply_columns(const Product<A>& product, int64_t rows, int64_t column) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    multiply_tile<kAdd, 4, kVectors>(product, row, column);
  }
  switch (rows - row) {
    case 3:
      return multiply_tile<kAdd, 3, kVectors>(product, row, column);
    case 2:
      return multiply_tile<kAdd, 2, kVectors>(product, row, column);
    case 1:
      return multiply_tile<kAdd, 1, kVectors>(product, row, column);
    default:
      return;
  }
}

// `columns` is filled up to whole vectors in b and c. Without kAdd, c is what comes out.
template <bool kAdd, typename A>
void multiply(const Product<A>& product, int64_t rows, int64_t columns) {
  constexpr int64_t kLanes = kFull<A>;
  int64_t column = 0;
  for (; column + kLanes < columns; column += 2 * kLanes) {
    multiply_columns<kAdd, 2>(product, rows, column);
  }
  if (column < columns) {
    multiply_columns<kAdd, 1>(product, rows, column);
  }
}

// Arrays of the scratch memory, one after the other.
template <typename A>
struct Scratch {
  A* next;

  A* take(int64_t size) {
    A* taken = next;
    next += size;
    return taken;
  }
};

// A block of keys: tokens [begin, end) of one head.
struct Block {
  int64_t begin;
  int64_t end;

  int64_t size() const {
    return end - begin;
  }
};

// (block, channels) to (channels, kBlockKeys), times `scale`, with zeros up to whole rows.
template <typename A>
void transpose(
    const A* from, int64_t stride, const Block& block, int64_t channels, A scale, A* to) {
  const int64_t filled = padded(block.size());
  for (int64_t d = 0; d < channels; ++d) {
    A* row = to + d * kBlockKeys;
    const A* column = from + block.begin * stride + d;
    for (int64_t s = 0; s < block.size(); ++s) {
      row[s] = column[s * stride] * scale;
    }
    for (int64_t s = block.size(); s < filled; ++s) {
      row[s] = 0;
    }
  }
}

// The way back.
template <typename A>
void transpose_back(
    const A* from, int64_t channels, A scale, const Block& block, A* to, int64_t stride) {
  for (int64_t s = 0; s < block.size(); ++s) {
    A* row = to + (block.begin + s) * stride;
    for (int64_t d = 0; d < channels; ++d) {
      row[d] = from[d * kBlockKeys + s] * scale;
    }
  }
}

// (block, channels) to (padded block, padded channels), times `scale`, with zeros beside.
template <typename A>
void copy_padded(
    const A* from, int64_t stride, const Block& block, int64_t channels, A scale, A* to) {
  const int64_t columns = padded(channels);
  for (int64_t s = 0; s < padded(block.size()); ++s) {
    A* row = to + s * columns;
    const int64_t filled = s < block.size() ? channels : 0;
    const A* own = from + (block.begin + s) * stride;
    for (int64_t d = 0; d < filled; ++d) {
      row[d] = own[d] * scale;
    }
    for (int64_t d = filled; d < columns; ++d) {
      row[d] = 0;
    }
  }
}

// What is added to the scores of each key: -inf for those that are not seen or fill up the block.
template <typename A>
void hide(const bool* visible, const Block& block, A* bias) {
  constexpr A kHidden = -std::numeric_limits<A>::infinity();
  for (int64_t s = 0; s < block.size(); ++s) {
    bias[s] = visible == nullptr || visible[block.begin + s] ? A(0) : kHidden;
  }
  for (int64_t s = block.size(); s < padded(block.size()); ++s) {
    bias[s] = kHidden;
  }
}

// e^x for x <= 0, within 2 units in the last place; 0 below -87.7. Unlike exponential() it has no
// long chain of operations that wait for each other, since a row is often of few vectors.
template <int kLanes>
PSF_INLINE Vector<float, kLanes> weight_of(Vector<float, kLanes> x) {
  using F = Vector<float, kLanes>;
  const auto constant = [](float value) { return splat<float, kLanes>(value); };
  // Not max(): a NaN must stay.
  const F bounded = select<float, kLanes>(x < constant(-88.0f), constant(-88.0f), x);
  // x = n log 2 + r. This sum has units of 1, so that it is rounded to n; its last bits are n + 127.
  constexpr float kUnits = 12582912.0f + 127.0f;  // 1.5 * 2^23
  const F rounded = bounded * constant(1.44269504f) + constant(kUnits);
  const F n = rounded - constant(kUnits);
  const F r = (bounded - n * constant(0.693359375f)) + n * constant(2.12194440e-4f);
  // Taylor's polynomial of degree 7, by halves.
  const F r2 = r * r;
  const F low = (constant(1.0f) + r) + (constant(0.5f) + r * constant(1.0f / 6)) * r2;
  const F high = (constant(1.0f / 24) + r * constant(1.0f / 120)) +
      (constant(1.0f / 720) + r * constant(1.0f / 5040)) * r2;
  uint32_t bits[kLanes];
  std::memcpy(bits, &rounded, sizeof(rounded));
  for (int i = 0; i < kLanes; ++i) {
    bits[i] <<= 23;  // the exponent of 2^n, which is 0 for n = -127
  }
  F power;
  std::memcpy(&power, bits, sizeof(power));
  return (low + high * (r2 * r2)) * power;
}

template <int kLanes>
PSF_INLINE Vector<double, kLanes> weight_of(Vector<double, kLanes> x) {
  return exponential<kLanes>(x);
}

template <typename A>
PSF_INLINE Vector<A, kFull<A>> larger(Vector<A, kFull<A>> a, Vector<A, kFull<A>> b) {
  return select<A, kFull<A>>(b > a, b, a);
}

// Running softmax of one query.
template <typename A>
struct Softmax {
  A* maximum;  // of the scores of all keys so far
  A* sum;  // of the exponentials of scores less the maximum
};

// Turns the scores (columns,) of a query into weights, relative to the new maximum. Returns what
// everything that was summed before is to be multiplied with.
template <typename A>
PSF_INLINE A softmax_step(const Softmax<A>& state, const A* bias, int64_t columns, A* scores) {
  constexpr int kLanes = kFull<A>;
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  using V = Vector<A, kLanes>;
  V most = splat<A, kLanes>(*state.maximum);
  for (int64_t s = 0; s < columns; s += kLanes) {
    const V biased = load<A, kLanes>(scores + s) + load<A, kLanes>(bias + s);
    store<A, kLanes>(biased, scores + s);
    most = larger<A>(most, biased);
  }
  most = combine_lanes<A, kLanes>(most, [](V a, V b) PSF_LAMBDA_INLINE { return larger<A>(a, b); });
  const A old = *state.maximum;
  *state.maximum = most[0];
  const A shift = most[0] == kNone ? A(0) : most[0];  // while no key is seen, -inf - -inf is NaN
  V sums = splat<A, kLanes>(A(0));
  for (int64_t s = 0; s < columns; s += kLanes) {
    const V weight = weight_of<kLanes>(load<A, kLanes>(scores + s) - splat<A, kLanes>(shift));
    store<A, kLanes>(weight, scores + s);
    sums += weight;
  }
  const A factor = old == kNone ? A(0) : std::exp(old - shift);
  *state.sum = *state.sum * factor + sum_of_lanes<A, kLanes>(sums)[0];
  return factor;
}

}  // namespace

template <typename A>
void attention(const AttentionCall<A>& call, int64_t n, int64_t m, int64_t first, A* scratch) {
  const int64_t channels = call.channels;
  const int64_t width = padded(channels);
  const int64_t queries = smaller(kTaskQueries, call.queries - first);
  const A scale = A(1) / std::sqrt(static_cast<A>(channels));
  const A* q = head_of(call.q, n, m) + first * call.q.token;
  const bool* visible = call.visible == nullptr ? nullptr : call.visible + n * call.keys;
  Scratch<A> memory{scratch};
  A* keys = memory.take(channels * kBlockKeys);
  A* values = memory.take(kBlockKeys * width);
  A* bias = memory.take(kBlockKeys);
  A* weights = memory.take(kBlockQueries * kBlockKeys);
  A* attended = memory.take(kTaskQueries * width);
  A* maxima = memory.take(kTaskQueries);
  A* sums = memory.take(kTaskQueries);
  fill(attended, queries * width, A(0));
  fill(maxima, queries, -std::numeric_limits<A>::infinity());
  fill(sums, queries, A(0));

  for (int64_t begin = 0; begin < call.keys; begin += kBlockKeys) {
    const Block block{begin, smaller(call.keys, begin + kBlockKeys)};
    const int64_t columns = padded(block.size());
    transpose(head_of(call.k, n, m), call.k.token, block, channels, scale, keys);
    copy_padded(head_of(call.v, n, m), call.v.token, block, channels, A(1), values);
    hide(visible, block, bias);
    for (int64_t start = 0; start < queries; start += kBlockQueries) {
      const int64_t rows = smaller(kBlockQueries, queries - start);
      A* own = attended + start * width;
      multiply<false>(
          Product<A>{
              channels, q + start * call.q.token, call.q.token, 1, keys, kBlockKeys, weights,
              kBlockKeys},
          rows, columns);
      for (int64_t i = 0; i < rows; ++i) {
        const Softmax<A> state{maxima + start + i, sums + start + i};
        const A factor = softmax_step(state, bias, columns, weights + i * kBlockKeys);
        scale_row(own + i * width, width, factor);
      }
      multiply<true>(
          Product<A>{block.size(), weights, kBlockKeys, 1, values, width, own, width}, rows,
          channels);
    }
  }

  A* log_sum = call.log_sum + (n * call.heads + m) * call.queries + first;
  for (int64_t i = 0; i < queries; ++i) {
    const bool sees_none = sums[i] == 0;
    const A inverse = sees_none ? A(0) : A(1) / sums[i];
    A* output = head_of(call.output, n, m) + (first + i) * call.output.token;
    for (int64_t d = 0; d < channels; ++d) {
      output[d] = attended[i * width + d] * inverse;
    }
    log_sum[i] = sees_none ? A(0) : maxima[i] + std::log(sums[i]);
  }
}

namespace {

// Weights and gradients of the scores of one query, in place of scores and gradients of weights.
template <typename A>
PSF_INLINE void softmax_backward(
    const A* bias, A log_sum, A mean_gradient, int64_t columns, A* weights, A* gradients) {
  constexpr int kLanes = kFull<A>;
  using V = Vector<A, kLanes>;
  for (int64_t s = 0; s < columns; s += kLanes) {
    const V biased = load<A, kLanes>(weights + s) + load<A, kLanes>(bias + s);
    const V weight = weight_of<kLanes>(biased - splat<A, kLanes>(log_sum));
    const V gradient = load<A, kLanes>(gradients + s) - splat<A, kLanes>(mean_gradient);
    store<A, kLanes>(weight, weights + s);
    store<A, kLanes>(weight * gradient, gradients + s);
  }
}

}  // namespace

template <typename A>
void attention_backward(
    const AttentionBackwardCall<A>& call, int64_t n, int64_t m, A* scratch) {
  const int64_t channels = call.channels;
  const int64_t width = padded(channels);
  const A scale = A(1) / std::sqrt(static_cast<A>(channels));
  const A* q = head_of(call.q, n, m);
  const A* grad_output = head_of(call.grad_output, n, m);
  const A* log_sum = call.log_sum + (n * call.heads + m) * call.queries;
  const bool* visible = call.visible == nullptr ? nullptr : call.visible + n * call.keys;
  Scratch<A> memory{scratch};
  A* keys = memory.take(channels * kBlockKeys);
  A* values = memory.take(channels * kBlockKeys);
  A* grad_keys = memory.take(channels * kBlockKeys);
  A* grad_values = memory.take(channels * kBlockKeys);
  A* key_rows = memory.take(kBlockKeys * width);
  A* bias = memory.take(kBlockKeys);
  A* weights = memory.take(kBlockQueries * kBlockKeys);
  A* gradients = memory.take(kBlockQueries * kBlockKeys);
  A* mean_gradients = memory.take(padded(call.queries));
  A* grad_queries = memory.take(call.queries * width);
  fill(grad_queries, call.queries * width, A(0));

  // The gradient of a score is its weight times how far that of the weight is above the mean over
  // the keys, by weight, which is the product of the output and its gradient.
  for (int64_t i = 0; i < call.queries; ++i) {
    const A* output = head_of(call.output, n, m) + i * call.output.token;
    A sum = 0;
    for (int64_t d = 0; d < channels; ++d) {
      sum += output[d] * grad_output[i * call.grad_output.token + d];
    }
    mean_gradients[i] = sum;
  }

  for (int64_t begin = 0; begin < call.keys; begin += kBlockKeys) {
    const Block block{begin, smaller(call.keys, begin + kBlockKeys)};
    const int64_t columns = padded(block.size());
    transpose(head_of(call.k, n, m), call.k.token, block, channels, scale, keys);
    transpose(head_of(call.v, n, m), call.v.token, block, channels, A(1), values);
    copy_padded(head_of(call.k, n, m), call.k.token, block, channels, scale, key_rows);
    hide(visible, block, bias);
    fill(grad_keys, channels * kBlockKeys, A(0));
    fill(grad_values, channels * kBlockKeys, A(0));
    for (int64_t start = 0; start < call.queries; start += kBlockQueries) {
      const int64_t rows = smaller(kBlockQueries, call.queries - start);
      const A* own_q = q + start * call.q.token;
      const A* own_grad = grad_output + start * call.grad_output.token;
      multiply<false>(
          Product<A>{channels, own_q, call.q.token, 1, keys, kBlockKeys, weights, kBlockKeys},
          rows, columns);
      multiply<false>(
          Product<A>{
              channels, own_grad, call.grad_output.token, 1, values, kBlockKeys, gradients,
              kBlockKeys},
          rows, columns);
      for (int64_t i = 0; i < rows; ++i) {
        softmax_backward(
            bias, log_sum[start + i], mean_gradients[start + i], columns, weights + i * kBlockKeys,
            gradients + i * kBlockKeys);
      }
      A* own_grad_queries = grad_queries + start * width;
      multiply<true>(
          Product<A>{
              block.size(), gradients, kBlockKeys, 1, key_rows, width, own_grad_queries, width},
          rows, channels);
      multiply<true>(
          Product<A>{
              rows, own_q, 1, call.q.token, gradients, kBlockKeys, grad_keys, kBlockKeys},
          channels, columns);
      multiply<true>(
          Product<A>{
              rows, own_grad, 1, call.grad_output.token, weights, kBlockKeys, grad_values,
              kBlockKeys},
          channels, columns);
    }
    transpose_back(grad_keys, channels, scale, block, head_of(call.grad_k, n, m), call.grad_k.token);
    transpose_back(grad_values, channels, A(1), block, head_of(call.grad_v, n, m), call.grad_v.token);
  }

  for (int64_t i = 0; i < call.queries; ++i) {
    A* grad_q = head_of(call.grad_q, n, m) + i * call.grad_q.token;
    for (int64_t d = 0; d < channels; ++d) {
      grad_q[d] = grad_queries[i * width + d];
    }
  }
}

#define PSF_INSTANTIATE(A)                                                                  \
  template void attention<A>(const AttentionCall<A>&, int64_t, int64_t, int64_t, A*);       \
  template void attention_backward<A>(const AttentionBackwardCall<A>&, int64_t, int64_t, A*);
PSF_INSTANTIATE(float)
PSF_INSTANTIATE(double)
#undef PSF_INSTANTIATE
