// Like all that kernels include (see ms_deform_attn_cpu.h), this includes no torch header.
#pragma once

#include <cstdint>

namespace psf {

// The index type of vectors that hold A.
template <typename A>
struct IndexOf {
  using Type = int32_t;
};
template <>
struct IndexOf<double> {
  using Type = int64_t;
};
template <>
struct IndexOf<int64_t> {
  using Type = int64_t;
};

}  // namespace psf
