// Sums of the Dice loss of upsampled maps, and their gradient; see training_cpu_kernels.h. Rows are
// resized along x first, once for all rows of the output that lie between them, as ATen does.

// The row of the output's width between those of the map.
template <typename A>
PSF_INLINE void resize_row(const ResizeAxis<A>& axis, const A* from, A* to) {
#pragma omp simd
  for (int64_t x = 0; x < axis.output_size; ++x) {
    to[x] = (A(1) - axis.weight[x]) * from[axis.low[x]] + axis.weight[x] * from[axis.high[x]];
  }
}

// Its transpose: adds to the map's row what each place of the output's hands on.
template <typename A>
PSF_INLINE void add_row_gradient(const ResizeAxis<A>& axis, const A* grad, A* to) {
  A from_before = 0;
  for (int64_t i = 0; i < axis.input_size; ++i) {
    A own = from_before;
    A next = 0;
    for (int64_t x = axis.start[i]; x < axis.start[i + 1]; ++x) {
      own += (A(1) - axis.weight[x]) * grad[x];
      next += axis.weight[x] * grad[x];
    }
    to[i] += own;
    from_before = next;
  }
  to[axis.input_size - 1] += from_before;
}

// 1 / (1 + e^-x), by the power that does not overflow; NaN stays.
template <typename A, int kLanes>
PSF_INLINE Vector<A, kLanes> sigmoid(Vector<A, kLanes> x) {
  const auto zero = splat<A, kLanes>(A(0));
  const auto one = splat<A, kLanes>(A(1));
  const auto power = exponential<kLanes>(select<A, kLanes>(x > zero, zero - x, x));
  return select<A, kLanes>(x > zero, one, power) / (one + power);
}

// Calls f(x, mask, target) for the vectors of a row of masks, between two rows of the output's
// width. What lies behind the end of the row comes as zeros.
template <bool kSigmoid, typename A, typename F>
PSF_INLINE void for_masks(
    const A* low, const A* high, A weight, const A* target, int64_t width, const F& f) {
  constexpr int kLanes = kFull<A>;
  const auto weight_high = splat<A, kLanes>(weight);
  const auto weight_low = splat<A, kLanes>(A(1) - weight);
  const auto mask_at = [&](int64_t x) PSF_LAMBDA_INLINE {
    const auto value =
        weight_low * load<A, kLanes>(low + x) + weight_high * load<A, kLanes>(high + x);
    if constexpr (kSigmoid) {
      return sigmoid<A, kLanes>(value);
    } else {
      return value;
    }
  };
  int64_t x = 0;
  for (; x + kLanes <= width; x += kLanes) {
    f(x, mask_at(x), load<A, kLanes>(target + x));
  }
  if (x < width) {
    auto mask = splat<A, kLanes>(A(0));
    auto rest = mask;
    const auto all = mask_at(x);
    for (int i = 0; x + i < width; ++i) {
      mask[i] = all[i];
      rest[i] = target[x + i];
    }
    f(x, mask, rest);
  }
}

// Calls f(y, low, high) for the rows y of the output, which lie between rows i and i + 1 of the
// map: these are low and high once resized; and done(i) after the last y of an i. rows is room for
// both.
template <typename A, typename F, typename Done>
PSF_INLINE void for_rows(
    const DiceCall<A>& call, int64_t map, A* rows, const F& f, const Done& done) {
  const int64_t height = call.rows.input_size;
  const int64_t width = call.columns.input_size;
  const A* from = call.maps + map * height * width;
  A* low = rows;
  A* high = rows + padded_row(call.columns.output_size);
  resize_row(call.columns, from, low);
  for (int64_t i = 0; i < height; ++i) {
    resize_row(call.columns, from + std::min(i + 1, height - 1) * width, high);
    for (int64_t y = call.rows.start[i]; y < call.rows.start[i + 1]; ++y) {
      f(y, low, high);
    }
    done(i);
    std::swap(low, high);
  }
}

template <bool kSigmoid, typename A>
void sums_of_map(const DiceCall<A>& call, int64_t map, A* rows, double (&sums)[3]) {
  constexpr int kLanes = kFull<A>;
  const int64_t width = call.columns.output_size;
  const A* target = call.targets + map % call.num_segments * call.rows.output_size * width;
  for_rows(
      call, map, rows,
      [&](int64_t y, const A* low, const A* high) PSF_LAMBDA_INLINE {
        auto overlap = splat<A, kLanes>(A(0));
        auto mask_square = overlap;
        auto target_square = overlap;
        for_masks<kSigmoid>(
            low, high, call.rows.weight[y], target + y * width, width,
            [&](int64_t, Vector<A, kLanes> mask, Vector<A, kLanes> expected) PSF_LAMBDA_INLINE {
              overlap += mask * expected;
              mask_square += mask * mask;
              target_square += expected * expected;
            });
        // Row by row in double: float sums of the pixels of a large mask would lose digits.
        sums[0] += sum_of_lanes<A, kLanes>(overlap)[0];
        sums[1] += sum_of_lanes<A, kLanes>(mask_square)[0];
        sums[2] += sum_of_lanes<A, kLanes>(target_square)[0];
      },
      [](int64_t) {});
}

template <bool kSigmoid, typename A>
void gradient_of_map(
    const DiceCall<A>& call, int64_t map, A by_target, A by_mask, A* rows, A* grad_map) {
  constexpr int kLanes = kFull<A>;
  const int64_t width = call.columns.output_size;
  const int64_t map_width = call.columns.input_size;
  const int64_t room = padded_row(width);
  const A* target = call.targets + map % call.num_segments * call.rows.output_size * width;
  A* grad_low = rows + 2 * room;  // of the resized rows i and i + 1 of the map
  A* grad_high = rows + 3 * room;
  const auto target_factor = splat<A, kLanes>(by_target);
  const auto mask_factor = splat<A, kLanes>(by_mask);
  for_rows(
      call, map, rows,
      [&](int64_t y, const A* low, const A* high) PSF_LAMBDA_INLINE {
        const auto weight_high = splat<A, kLanes>(call.rows.weight[y]);
        const auto weight_low = splat<A, kLanes>(A(1) - call.rows.weight[y]);
        for_masks<kSigmoid>(
            low, high, call.rows.weight[y], target + y * width, width,
            [&](int64_t x, Vector<A, kLanes> mask, Vector<A, kLanes> expected) PSF_LAMBDA_INLINE {
              auto grad = target_factor * expected + mask_factor * mask;
              if constexpr (kSigmoid) {
                grad = grad * (mask - mask * mask);
              }
              store<A, kLanes>(load<A, kLanes>(grad_low + x) + weight_low * grad, grad_low + x);
              store<A, kLanes>(load<A, kLanes>(grad_high + x) + weight_high * grad, grad_high + x);
            });
      },
      [&](int64_t i) PSF_LAMBDA_INLINE {
        add_row_gradient(call.columns, grad_low, grad_map + i * map_width);
        std::memset(grad_low, 0, room * sizeof(A));
        std::swap(grad_low, grad_high);
      });
  // What the last rows gave to their upper neighbour, which is the last row itself.
  add_row_gradient(call.columns, grad_low, grad_map + (call.rows.input_size - 1) * map_width);
  std::memset(grad_low, 0, room * sizeof(A));  // for the next map
}

template <typename A>
void dice_sums(const DiceCall<A>& call, int64_t map, A* rows, double (&sums)[3]) {
  call.sigmoid ? sums_of_map<true>(call, map, rows, sums)
               : sums_of_map<false>(call, map, rows, sums);
}

template <typename A>
void dice_backward(
    const DiceCall<A>& call, int64_t map, A by_target, A by_mask, A* rows, A* grad_map) {
  call.sigmoid ? gradient_of_map<true>(call, map, by_target, by_mask, rows, grad_map)
               : gradient_of_map<false>(call, map, by_target, by_mask, rows, grad_map);
}

#define PSF_INSTANTIATE(A)                                                             \
  template void dice_sums<A>(const DiceCall<A>&, int64_t, A*, double (&)[3]);          \
  template void dice_backward<A>(const DiceCall<A>&, int64_t, A, A, A*, A*);
PSF_INSTANTIATE(float)
PSF_INSTANTIATE(double)
#undef PSF_INSTANTIATE
