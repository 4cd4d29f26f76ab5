// Pillow's bilinear resize (libImaging/Resample.c), bit by bit: a triangle filter, widened where the
// image shrinks, in fixed point; the rows are filtered first and rounded to bytes, then the columns.
#include "image.h"

#include <algorithm>
#include <cmath>
#include <vector>

// The loops below are for the compiler to vectorise. Where it can choose at run time, as the
// baseline of x86-64 has no product of four 32-bit integers.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define PSF_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define PSF_CLONES
#endif

namespace psf {
namespace {

constexpr int kPrecision = 32 - 8 - 2;  // bits of a weight
constexpr int32_t kHalf = 1 << (kPrecision - 1);
constexpr size_t kChannels = 3;

// What each pixel of a window of the result is made of, along one axis.
struct Filter {
  struct Taps {
    size_t first;  // source pixel
    size_t count;
  };
  std::vector<Taps> taps;
  std::vector<int32_t> weights;  // `stride` a pixel
  size_t stride;

  Filter(size_t size, size_t new_size, size_t begin, size_t count) {
    const double scale = static_cast<double>(size) / static_cast<double>(new_size);
    const double support = std::max(scale, 1.0);  // of the triangle, on either side
    const double inverse = 1.0 / support;
    stride = static_cast<size_t>(std::ceil(support)) * 2 + 1;
    taps.reserve(count);
    weights.assign(count * stride, 0);
    std::vector<double> exact(stride);
    for (size_t i = 0; i < count; i++) {
      const double center = (static_cast<double>(begin + i) + 0.5) * scale;
      const auto first = static_cast<size_t>(std::max(0.0, center - support + 0.5));
      const size_t last = std::min(size, static_cast<size_t>(center + support + 0.5));
      double sum = 0;
      for (size_t j = first; j < last; j++) {
        const double distance = std::abs((static_cast<double>(j) - center + 0.5) * inverse);
        exact[j - first] = distance < 1.0 ? 1.0 - distance : 0.0;
        sum += exact[j - first];
      }
      for (size_t j = 0; j < last - first; j++) {
        const double weight = sum != 0.0 ? exact[j] / sum : exact[j];
        weights[i * stride + j] = static_cast<int32_t>(0.5 + weight * (1 << kPrecision));
      }
      taps.push_back({first, last - first});
    }
  }
  size_t begin() const { return taps.front().first; }
  size_t end() const { return taps.back().first + taps.back().count; }
};

// Filters along a row: (.., 3) -> (taps, 3).
void filter_row(const uint8_t* row, const Filter& filter, uint8_t* out) {
  const int32_t* weights = filter.weights.data();
  for (const auto [first, count] : filter.taps) {
    const uint8_t* p = row + kChannels * first;
    int32_t a = kHalf, b = kHalf, c = kHalf;
    for (size_t j = 0; j < count; j++, p += kChannels) {
      a += p[0] * weights[j];
      b += p[1] * weights[j];
      c += p[2] * weights[j];
    }
    // No weight is negative and they add up to 1 within rounding: the sums stay below 256.
    out[0] = static_cast<uint8_t>(a >> kPrecision);
    out[1] = static_cast<uint8_t>(b >> kPrecision);
    out[2] = static_cast<uint8_t>(c >> kPrecision);
    out += kChannels;
    weights += filter.stride;
  }
}

PSF_CLONES void mix_two_rows(
    const uint8_t* first, const uint8_t* second, int32_t a, int32_t b, size_t size, uint8_t* out) {
  for (size_t i = 0; i < size; i++) {
    out[i] = static_cast<uint8_t>((first[i] * a + second[i] * b + kHalf) >> kPrecision);
  }
}

PSF_CLONES void add_row(const uint8_t* row, int32_t weight, size_t size, int32_t* sums) {
  for (size_t i = 0; i < size; i++) sums[i] += row[i] * weight;
}

PSF_CLONES void round_sums(const int32_t* sums, size_t size, uint8_t* out) {
  for (size_t i = 0; i < size; i++) out[i] = static_cast<uint8_t>(sums[i] >> kPrecision);
}

}  // namespace

void resize_bilinear(const uint8_t* image, Size size, Size new_size, Window window, uint8_t* out) {
  const size_t row_size = kChannels * size.width;
  const size_t out_size = kChannels * window.width;
  const Filter vertical(size.height, new_size.height, window.y, window.height);
  const size_t top = vertical.begin();
  const size_t num_rows = vertical.end() - top;
  // An axis that keeps its size is not filtered: the filter would not change it.
  const uint8_t* rows = image + top * row_size + kChannels * window.x;
  size_t rows_stride = row_size;
  std::vector<uint8_t> filtered;
  if (new_size.width != size.width) {
    const Filter horizontal(size.width, new_size.width, window.x, window.width);
    filtered.resize(num_rows * out_size);
    for (size_t y = 0; y < num_rows; y++) {
      filter_row(image + (top + y) * row_size, horizontal, filtered.data() + y * out_size);
    }
    rows = filtered.data();
    rows_stride = out_size;
  }
  std::vector<int32_t> sums(out_size);
  for (size_t y = 0; y < window.height; y++, out += out_size) {
    const auto [first, count] = vertical.taps[y];
    const int32_t* weights = vertical.weights.data() + y * vertical.stride;
    const uint8_t* row = rows + (first - top) * rows_stride;
    if (count <= 2) {
      const uint8_t* next = count == 2 ? row + rows_stride : row;
      mix_two_rows(row, next, weights[0], count == 2 ? weights[1] : 0, out_size, out);
      continue;
    }
    std::fill(sums.begin(), sums.end(), kHalf);
    for (size_t j = 0; j < count; j++) {
      add_row(row + j * rows_stride, weights[j], out_size, sums.data());
    }
    round_sums(sums.data(), out_size, out);
  }
}

}  // namespace psf
