// Layer normalisation of a sum, and its gradient; see training_cpu_kernels.h.

template <typename A>
void layer_norm(const LayerNormCall<A>& call, int64_t begin, int64_t end) {
  const int64_t channels = call.channels;
  const A share = A(1) / static_cast<A>(channels);
  for (int64_t row = begin; row < end; ++row) {
    const A* x = call.x + row * channels;
    const A* y = call.y + row * channels;
    A* centred = call.normalised + row * channels;
    A* output = call.output + row * channels;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < channels; ++i) {
      centred[i] = x[i] + y[i];
      sum += centred[i];
    }
    const A mean = sum * share;
    A squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < channels; ++i) {
      centred[i] -= mean;
      squares += centred[i] * centred[i];
    }
    const A inverse = A(1) / std::sqrt(squares * share + static_cast<A>(call.eps));
    call.inverse_deviation[row] = inverse;
#pragma omp simd
    for (int64_t i = 0; i < channels; ++i) {
      centred[i] *= inverse;
      output[i] = centred[i] * call.weight[i] + call.bias[i];
    }
  }
}

template <typename A>
void layer_norm_backward(
    const LayerNormBackwardCall<A>& call,
    int64_t begin,
    int64_t end,
    A* grad_weight,
    A* grad_bias) {
  const int64_t channels = call.channels;
  const A share = A(1) / static_cast<A>(channels);
  const A* weight = call.weight;
  for (int64_t row = begin; row < end; ++row) {
    const A* grad = call.grad_output + row * channels;
    const A* normalised = call.normalised + row * channels;
    A* grad_input = call.grad_input + row * channels;
    A sum = 0;
    A product = 0;
#pragma omp simd reduction(+ : sum, product)
    for (int64_t i = 0; i < channels; ++i) {
      sum += grad[i] * weight[i];
      product += grad[i] * weight[i] * normalised[i];
    }
    const A mean = sum * share;
    const A slope = product * share;
    const A inverse = call.inverse_deviation[row];
#pragma omp simd
    for (int64_t i = 0; i < channels; ++i) {
      grad_input[i] = inverse * (grad[i] * weight[i] - mean - normalised[i] * slope);
      grad_weight[i] += grad[i] * normalised[i];
      grad_bias[i] += grad[i];
    }
  }
}

#define PSF_INSTANTIATE(A)                                                              \
  template void layer_norm<A>(const LayerNormCall<A>&, int64_t, int64_t);               \
  template void layer_norm_backward<A>(                                                 \
      const LayerNormBackwardCall<A>&, int64_t, int64_t, A*, A*);
PSF_INSTANTIATE(float)
PSF_INSTANTIATE(double)
#undef PSF_INSTANTIATE
