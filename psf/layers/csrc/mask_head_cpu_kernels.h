// Scores of the mask head from queries and keys, and their gradients; see training_cpu_kernels.h.
//
// All products are of small matrices whose columns are lanes of vectors. What a tile of positions
// needs stays in a cache while all queries pass by.

// A matrix of any strides, read one number at a time.
template <typename A>
struct MaskOperand {
  const A* data;
  int64_t row;
  int64_t column;
};

// Rows of a product that are computed at a time: 12 sums of two vectors hide the latency of the
// instruction, and there are 16 registers.
constexpr int64_t kProductRows = 6;

// f(number of rows as a constant, first row) for blocks of nearly equal numbers of rows.
template <typename F>
PSF_INLINE void in_blocks(int64_t rows, const F& f) {
  int64_t blocks = (rows + kProductRows - 1) / kProductRows;
  for (int64_t first = 0; first < rows; --blocks) {
    const int64_t own = (rows - first + blocks - 1) / blocks;
    switch (own) {
      case 1:
        f(std::integral_constant<int, 1>{}, first);
        break;
      case 2:
        f(std::integral_constant<int, 2>{}, first);
        break;
      case 3:
        f(std::integral_constant<int, 3>{}, first);
        break;
      case 4:
        f(std::integral_constant<int, 4>{}, first);
        break;
      case 5:
        f(std::integral_constant<int, 5>{}, first);
        break;
      default:
        f(std::integral_constant<int, 6>{}, first);
    }
    first += own;
  }
}

// f(number of vectors as a constant, first column): two at a time, and a last one.
template <typename A, typename F>
PSF_INLINE void in_vectors(int64_t columns, const F& f) {
  int64_t first = 0;
  for (; first + 2 * kFull<A> <= columns; first += 2 * kFull<A>) {
    f(std::integral_constant<int, 2>{}, first);
  }
  if (first < columns) {
    f(std::integral_constant<int, 1>{}, first);
  }
}

// sums += a (kRows, inner) by b (inner, kVectors vectors), whose rows are b_row apart.
template <typename A, int kRows, int kVectors>
PSF_INLINE void add_product(
    int64_t inner,
    MaskOperand<A> a,
    const A* b,
    int64_t b_row,
    Vector<A, kFull<A>> (&sums)[kRows][kVectors]) {
  for (int64_t i = 0; i < inner; ++i) {
    Vector<A, kFull<A>> columns[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      columns[v] = load<A, kFull<A>>(b + i * b_row + v * kFull<A>);
    }
    for (int r = 0; r < kRows; ++r) {
      const auto factor = splat<A, kFull<A>>(a.data[r * a.row + i * a.column]);
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] += factor * columns[v];
      }
    }
  }
}

// out (rows, columns) = a (rows, inner) by b (inner, columns), or that added to it. The rows of b
// and out are b_row and out_row apart; columns is a multiple of the lanes.
template <typename A>
void multiply(
    int64_t rows,
    int64_t inner,
    int64_t columns,
    MaskOperand<A> a,
    const A* b,
    int64_t b_row,
    A* out,
    int64_t out_row,
    bool add) {
  in_vectors<A>(columns, [&](auto vectors, int64_t column) PSF_LAMBDA_INLINE {
    in_blocks(rows, [&](auto block, int64_t row) PSF_LAMBDA_INLINE {
      constexpr int kRows = decltype(block)::value;
      constexpr int kVectors = decltype(vectors)::value;
      A* to = out + row * out_row + column;
      Vector<A, kFull<A>> sums[kRows][kVectors] = {};
      if (add) {
        for (int r = 0; r < kRows; ++r) {
          for (int v = 0; v < kVectors; ++v) {
            sums[r][v] = load<A, kFull<A>>(to + r * out_row + v * kFull<A>);
          }
        }
      }
      const MaskOperand<A> own{a.data + row * a.row, a.row, a.column};
      add_product<A, kRows, kVectors>(inner, own, b + column, b_row, sums);
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          store<A, kFull<A>>(sums[r][v], to + r * out_row + v * kFull<A>);
        }
      }
    });
  });
}

// One step of a transposition: swaps the lanes of a that have the bit kBit with those of b, kBit
// rows further, that lack it.
template <typename A, int kBit, int... kLane>
PSF_INLINE void swap_blocks(
    Vector<A, kFull<A>>& a, Vector<A, kFull<A>>& b, std::integer_sequence<int, kLane...>) {
  const auto upper = shuffle<A, kFull<A>>(
      a, b, Indices<((kLane & kBit) ? kFull<A> + (kLane ^ kBit) : kLane)...>{});
  b = shuffle<A, kFull<A>>(
      a, b, Indices<((kLane & kBit) ? kFull<A> + kLane : (kLane ^ kBit))...>{});
  a = upper;
}

template <typename A, int kBit>
PSF_INLINE void transpose_steps(Vector<A, kFull<A>> (&rows)[kFull<A>]) {
  if constexpr (kBit > 0) {
    for (int i = 0; i < kFull<A>; ++i) {
      if ((i & kBit) == 0) {
        swap_blocks<A, kBit>(
            rows[i], rows[i + kBit], std::make_integer_sequence<int, kFull<A>>{});
      }
    }
    transpose_steps<A, kBit / 2>(rows);
  }
}

// to (columns, rows) = from (rows, columns), both dense; multiples of the lanes.
template <typename A>
void transpose(const A* from, int64_t rows, int64_t columns, A* to) {
  constexpr int kLanes = kFull<A>;
  for (int64_t row = 0; row < rows; row += kLanes) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      Vector<A, kLanes> block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = load<A, kLanes>(from + (row + i) * columns + column);
      }
      transpose_steps<A, kLanes / 2>(block);
      for (int i = 0; i < kLanes; ++i) {
        store<A, kLanes>(block[i], to + (column + i) * rows + row);
      }
    }
  }
}

// Where in S a position lies that counts what is not padding only.
template <typename A>
PSF_INLINE int64_t in_keys(const MaskLevel<A>& level, int64_t position) {
  const int64_t y = position / level.width;
  return level.start + y * level.padded_width + (position - y * level.width);
}

// The keys of positions [begin, begin + count), scaled; zeros behind.
template <typename A>
void load_keys(
    const MaskCall<A>& call,
    const MaskLevel<A>& level,
    int64_t image,
    int64_t begin,
    int64_t count,
    const MaskScratch<A>& scratch) {
  const int64_t padded = call.padded_channels;
  for (int64_t i = 0; i < kMaskTile; ++i) {
    const int64_t channels = i < count ? call.channels : 0;
    const int64_t position = i < count ? in_keys(level, begin + i) : 0;
    const A* from = call.k + image * call.k_image + position * call.k_position;
    for (int64_t head = 0; head < call.heads; ++head) {
      const A* k = from + head * call.k_head;
      A* to = scratch.keys + (head * kMaskTile + i) * padded;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        to[c] = call.scale * k[c];
      }
      for (int64_t c = channels; c < padded; ++c) {
        to[c] = 0;
      }
    }
  }
  for (int64_t head = 0; head < call.heads; ++head) {
    const int64_t own = head * kMaskTile * padded;
    transpose(scratch.keys + own, kMaskTile, padded, scratch.transposed_keys + own);
  }
}

// The reverse, of gradients: writes grad_k.
template <typename A>
void store_grad_keys(
    const MaskCall<A>& call,
    const MaskLevel<A>& level,
    int64_t image,
    int64_t begin,
    int64_t count,
    const A* grad_keys) {
  for (int64_t i = 0; i < count; ++i) {
    A* to = call.grad_k + image * call.grad_k_image +
        in_keys(level, begin + i) * call.grad_k_position;
    for (int64_t head = 0; head < call.heads; ++head) {
      const A* from = grad_keys + (head * kMaskTile + i) * call.padded_channels;
      A* own = to + head * call.grad_k_head;
#pragma omp simd
      for (int64_t c = 0; c < call.channels; ++c) {
        own[c] = call.scale * from[c];
      }
    }
  }
}

// Queries [first, first + count) of an image and head.
template <typename A>
PSF_INLINE const A* queries_of(
    const MaskCall<A>& call, int64_t image, int64_t head, int64_t first) {
  return call.q + ((image * call.heads + head) * call.queries + first) * call.padded_channels;
}

// logits (M, count * kMaskTile) of the tile whose keys are loaded.
template <typename A>
void mask_logits(
    const MaskCall<A>& call,
    int64_t image,
    int64_t first,
    int64_t count,
    const MaskScratch<A>& scratch) {
  for (int64_t head = 0; head < call.heads; ++head) {
    const MaskOperand<A> q{queries_of(call, image, head, first), call.padded_channels, 1};
    multiply<A>(
        count, call.channels, kMaskTile, q,
        scratch.transposed_keys + head * kMaskTile * call.padded_channels, kMaskTile,
        scratch.logits + head * count * kMaskTile, kMaskTile, false);
  }
}

// f(row, vectors) with every row of the projected logits, before they are rectified, of as many
// columns as kVectors have lanes. The rows of logits are `columns` apart.
template <typename A, int kVectors, typename F>
PSF_INLINE void project(
    const MaskLevel<A>& level,
    int64_t heads,
    const A* logits,
    int64_t columns,
    const F& f) {
  in_blocks(heads, [&](auto block, int64_t row) PSF_LAMBDA_INLINE {
    constexpr int kRows = decltype(block)::value;
    Vector<A, kFull<A>> sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = splat<A, kFull<A>>(level.bias[row + r]);
      }
    }
    add_product<A, kRows, kVectors>(
        heads, MaskOperand<A>{level.projection + row * heads, heads, 1}, logits, columns, sums);
    for (int r = 0; r < kRows; ++r) {
      f(row + r, sums[r]);
    }
  });
}

// Unlike a maximum, keeps NaN.
template <typename A>
PSF_INLINE Vector<A, kFull<A>> rectified(Vector<A, kFull<A>> x) {
  const auto zero = splat<A, kFull<A>>(0);
  return select<A, kFull<A>>(x < zero, zero, x);
}

// scores (columns) of logits (M, columns).
template <typename A>
void logits_to_scores(
    const MaskLevel<A>& level, int64_t heads, const A* logits, int64_t columns, A* scores) {
  in_vectors<A>(columns, [&](auto vectors, int64_t column) PSF_LAMBDA_INLINE {
    constexpr int kVectors = decltype(vectors)::value;
    Vector<A, kFull<A>> score[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      score[v] = splat<A, kFull<A>>(level.offset);
    }
    project<A, kVectors>(
        level, heads, logits + column, columns,
        [&](int64_t row, const Vector<A, kFull<A>>(&hidden)[kVectors]) PSF_LAMBDA_INLINE {
          const auto weight = splat<A, kFull<A>>(level.weight[row]);
          for (int v = 0; v < kVectors; ++v) {
            score[v] += weight * rectified<A>(hidden[v]);
          }
        });
    for (int v = 0; v < kVectors; ++v) {
      store<A, kFull<A>>(score[v], scores + column + v * kFull<A>);
    }
  });
}

// f(first query, number of queries) for groups of nearly equal numbers.
template <typename F>
PSF_INLINE void in_groups(int64_t queries, const F& f) {
  int64_t groups = (queries + kMaskQueries - 1) / kMaskQueries;
  for (int64_t first = 0; first < queries; --groups) {
    const int64_t own = (queries - first + groups - 1) / groups;
    f(first, own);
    first += own;
  }
}

// f(first position, number of positions) for the tiles of [begin, end).
template <typename F>
PSF_INLINE void in_tiles(int64_t begin, int64_t end, const F& f) {
  for (int64_t first = begin; first < end; first += kMaskTile) {
    f(first, end - first < kMaskTile ? end - first : kMaskTile);
  }
}

template <typename A>
PSF_INLINE A* scores_of(
    const MaskCall<A>& call, const MaskLevel<A>& level, int64_t image, int64_t query) {
  return level.scores + (image * call.queries + query) * level.score_map;
}

template <typename A>
void mask_scores(
    const MaskCall<A>& call,
    const MaskLevel<A>& level,
    int64_t image,
    int64_t begin,
    int64_t end,
    const MaskScratch<A>& scratch) {
  in_tiles(begin, end, [&](int64_t tile, int64_t positions) {
    load_keys(call, level, image, tile, positions, scratch);
    in_groups(call.queries, [&](int64_t first, int64_t count) {
      mask_logits(call, image, first, count, scratch);
      logits_to_scores(level, call.heads, scratch.logits, count * kMaskTile, scratch.scores);
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(
            scores_of(call, level, image, first + i) + tile, scratch.scores + i * kMaskTile,
            positions * sizeof(A));
      }
    });
  });
}

// passed (M, columns) of logits and the gradients of scores; adds to the sums of bias and weight.
template <typename A>
void through_rectifier(
    const MaskLevel<A>& level, int64_t heads, int64_t columns, const MaskScratch<A>& scratch) {
  in_vectors<A>(columns, [&](auto vectors, int64_t column) PSF_LAMBDA_INLINE {
    constexpr int kVectors = decltype(vectors)::value;
    Vector<A, kFull<A>> grad[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      grad[v] = load<A, kFull<A>>(scratch.scores + column + v * kFull<A>);
    }
    project<A, kVectors>(
        level, heads, scratch.logits + column, columns,
        [&](int64_t row, const Vector<A, kFull<A>>(&hidden)[kVectors]) PSF_LAMBDA_INLINE {
          const auto zero = splat<A, kFull<A>>(0);
          A* sums = scratch.sums + (row * (heads + 2) + heads) * kMaskTile;
          auto bias = load<A, kFull<A>>(sums);
          auto weight = load<A, kFull<A>>(sums + kMaskTile);
          for (int v = 0; v < kVectors; ++v) {
            const auto passed = select<A, kFull<A>>(hidden[v] > zero, grad[v], zero);
            store<A, kFull<A>>(
                passed, scratch.passed + row * columns + column + v * kFull<A>);
            bias += passed;
            weight += rectified<A>(hidden[v]) * grad[v];
          }
          store<A, kFull<A>>(bias, sums);
          store<A, kFull<A>>(weight, sums + kMaskTile);
        });
  });
}

// Adds passed (M, columns) by the transposed logits (M, columns) to the sums of the projection.
template <typename A>
void add_to_projection(int64_t heads, int64_t columns, const MaskScratch<A>& scratch) {
  constexpr int kOthers = 2;  // heads of the logits at a time
  using V = Vector<A, kFull<A>>;
  const auto add = [&](auto block, auto others, int64_t row, int64_t other) PSF_LAMBDA_INLINE {
    constexpr int kRows = decltype(block)::value;
    constexpr int kColumns = decltype(others)::value;
    V sums[kRows][kColumns] = {};
    const A* passed = scratch.passed + row * columns;
    const A* logits = scratch.logits + other * columns;
    for (int64_t c = 0; c < columns; c += kFull<A>) {
      V right[kColumns];
      for (int j = 0; j < kColumns; ++j) {
        right[j] = load<A, kFull<A>>(logits + j * columns + c);
      }
      for (int i = 0; i < kRows; ++i) {
        const V left = load<A, kFull<A>>(passed + i * columns + c);
        for (int j = 0; j < kColumns; ++j) {
          sums[i][j] += left * right[j];
        }
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        A* to = scratch.sums + ((row + i) * (heads + 2) + other + j) * kMaskTile;
        store<A, kFull<A>>(load<A, kFull<A>>(to) + sums[i][j], to);
      }
    }
  };
  in_blocks(heads, [&](auto block, int64_t row) PSF_LAMBDA_INLINE {
    int64_t other = 0;
    for (; other + kOthers <= heads; other += kOthers) {
      add(block, std::integral_constant<int, kOthers>{}, row, other);
    }
    if (other < heads) {
      add(block, std::integral_constant<int, 1>{}, row, other);
    }
  });
}

// Gradients of the scores of one tile; zeros behind its positions.
template <typename A>
void load_grad_scores(
    const MaskCall<A>& call,
    const MaskLevel<A>& level,
    int64_t image,
    int64_t first,
    int64_t count,
    int64_t tile,
    int64_t positions,
    A* to) {
  for (int64_t i = 0; i < count; ++i) {
    A* own = to + i * kMaskTile;
    std::memcpy(
        own, scores_of(call, level, image, first + i) + tile, positions * sizeof(A));
    for (int64_t j = positions; j < kMaskTile; ++j) {
      own[j] = 0;
    }
  }
}

// From the gradients of logits (M, count * kMaskTile) of a group of queries: writes those of the
// tile's keys with its first group, adds with the others; adds to those of the queries.
template <typename A>
void logits_backward(
    const MaskCall<A>& call,
    int64_t image,
    int64_t first,
    int64_t count,
    const MaskScratch<A>& scratch,
    A* grad_q) {
  const int64_t padded = call.padded_channels;
  for (int64_t head = 0; head < call.heads; ++head) {
    const A* grad_logits = scratch.logits + head * count * kMaskTile;
    const int64_t own = head * kMaskTile * padded;
    multiply<A>(
        count, kMaskTile, padded, MaskOperand<A>{grad_logits, kMaskTile, 1}, scratch.keys + own,
        padded, grad_q + (head * call.queries + first) * padded, padded, true);
    multiply<A>(
        kMaskTile, count, padded, MaskOperand<A>{grad_logits, 1, kMaskTile},
        queries_of(call, image, head, first), padded, scratch.grad_keys + own, padded, first > 0);
  }
}

// The sums over lanes, by the heads' weights where the chain rule wants them.
template <typename A>
void add_sums(const MaskLevel<A>& level, int64_t heads, const A* sums, A* grad_parameters) {
  for (int64_t row = 0; row < heads; ++row) {
    for (int64_t column = 0; column < heads + 2; ++column) {
      const int64_t i = row * (heads + 2) + column;
      const auto sum = sum_of_lanes<A, kFull<A>>(load<A, kFull<A>>(sums + i * kMaskTile));
      grad_parameters[i] += column <= heads ? level.weight[row] * sum[0] : sum[0];
    }
  }
}

template <typename A>
void mask_scores_backward(
    const MaskCall<A>& call,
    const MaskLevel<A>& level,
    int64_t image,
    int64_t begin,
    int64_t end,
    const MaskScratch<A>& scratch,
    A* grad_q,
    A* grad_parameters) {
  const int64_t heads = call.heads;
  for (int64_t i = 0; i < heads * (heads + 2) * kMaskTile; ++i) {
    scratch.sums[i] = 0;
  }
  for (int64_t i = 0; i < heads * heads; ++i) {
    scratch.weighted[i] = level.weight[i / heads] * level.projection[i];
  }
  in_tiles(begin, end, [&](int64_t tile, int64_t positions) {
    load_keys(call, level, image, tile, positions, scratch);
    in_groups(call.queries, [&](int64_t first, int64_t count) {
      const int64_t columns = count * kMaskTile;
      mask_logits(call, image, first, count, scratch);
      load_grad_scores(
          call, level, image, first, count, tile, positions, scratch.scores);
      through_rectifier(level, heads, columns, scratch);
      add_to_projection(heads, columns, scratch);
      multiply<A>(
          heads, heads, columns, MaskOperand<A>{scratch.weighted, 1, heads}, scratch.passed,
          columns, scratch.logits, columns, false);
      logits_backward(call, image, first, count, scratch, grad_q);
    });
    store_grad_keys(call, level, image, tile, positions, scratch.grad_keys);
  });
  add_sums(level, heads, scratch.sums, grad_parameters);
}

template <typename A>
void mask_upsample(const MaskResize<A>& resize, const A* scores, A* rows, A* map) {
  // Along the rows first: there are fewer of them, and along columns vectors do the work.
  const MaskAxis<A>& columns = resize.columns;
  const int64_t width = columns.size;
  for (int64_t y = 0; y < resize.height; ++y) {
    const A* from = scores + y * resize.width;
    A* to = rows + y * width;
    for (int64_t x = 0; x < width; ++x) {
      const A share = columns.share[x];
      to[x] = (1 - share) * from[columns.low[x]] + share * from[columns.high[x]];
    }
  }
  for (int64_t y = 0; y < resize.rows.size; ++y) {
    const A share = resize.rows.share[y];
    const A* low = rows + resize.rows.low[y] * width;
    const A* high = rows + resize.rows.high[y] * width;
    A* to = map + y * width;
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) {
      to[x] += (1 - share) * low[x] + share * high[x];
    }
  }
}

template <typename A>
void mask_downsample(const MaskResize<A>& resize, const A* grad_map, A* rows, A* grad_scores) {
  const MaskAxis<A>& columns = resize.columns;
  const int64_t width = columns.size;
  for (int64_t i = 0; i < resize.height * width; ++i) {
    rows[i] = 0;
  }
  for (int64_t y = 0; y < resize.rows.size; ++y) {
    const A share = resize.rows.share[y];
    const A* from = grad_map + y * width;
    A* low = rows + resize.rows.low[y] * width;
    A* high = rows + resize.rows.high[y] * width;
    if (low == high) {  // at the last row
#pragma omp simd
      for (int64_t x = 0; x < width; ++x) {
        low[x] += from[x];
      }
      continue;
    }
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) {
      low[x] += (1 - share) * from[x];
      high[x] += share * from[x];
    }
  }
  for (int64_t i = 0; i < resize.height * resize.width; ++i) {
    grad_scores[i] = 0;
  }
  for (int64_t y = 0; y < resize.height; ++y) {
    const A* from = rows + y * width;
    A* to = grad_scores + y * resize.width;
    for (int64_t x = 0; x < width; ++x) {
      const A share = columns.share[x];
      to[columns.low[x]] += (1 - share) * from[x];
      to[columns.high[x]] += share * from[x];
    }
  }
}

#define PSF_INSTANTIATE(A)                                                                      \
  template void mask_scores<A>(                                                                 \
      const MaskCall<A>&, const MaskLevel<A>&, int64_t, int64_t, int64_t,                       \
      const MaskScratch<A>&);                                                                   \
  template void mask_scores_backward<A>(                                                        \
      const MaskCall<A>&, const MaskLevel<A>&, int64_t, int64_t, int64_t,                       \
      const MaskScratch<A>&, A*, A*);                                                           \
  template void mask_upsample<A>(const MaskResize<A>&, const A*, A*, A*);                       \
  template void mask_downsample<A>(const MaskResize<A>&, const A*, A*, A*);
PSF_INSTANTIATE(float)
PSF_INSTANTIATE(double)
#undef PSF_INSTANTIATE
