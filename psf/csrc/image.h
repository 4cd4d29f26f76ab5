// psf._image: what loading images spends its time on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace psf {

// Writes R + 256 G + 65536 B of every pixel of an 8-bit RGB PNG, not interlaced, of the given size.
// Throws std::runtime_error with the reason when the data are damaged.
void decode_panoptic_png(
    const uint8_t* png, size_t png_size, uint32_t* ids, size_t height, size_t width);

// Writes the pixels (height, width, 3) of an 8-bit RGB PNG, not interlaced, of the given size, as RGB
// or BGR. Throws std::runtime_error with the reason when the data are damaged, or have a chunk that
// may change what is shown: transparency, animation, EXIF, or anything unknown.
void decode_plain_png(
    const uint8_t* png, size_t png_size, uint8_t* pixels, size_t height, size_t width, bool bgr);

struct Size {
  size_t height, width;
};

struct Window {
  size_t y, x, height, width;
};

// Resizes an RGB image (height, width, 3) with the bits of Pillow's bilinear filter, but computes a
// window of the result only, which is written to `out` (window.height, window.width, 3).
void resize_bilinear(const uint8_t* image, Size size, Size new_size, Window window, uint8_t* out);

}  // namespace psf
