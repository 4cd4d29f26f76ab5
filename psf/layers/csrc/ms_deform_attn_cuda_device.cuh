// The device as the CUDA kernels see it: its own instructions, its number types, loads and stores.
// tests/layers/cuda_emulation.h stands in for it when the kernels are compiled as plain C++.
#pragma once

#include "ms_deform_attn_cuda.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef PSF_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace psf {
namespace {

#ifndef PSF_CUDA_EMULATION
constexpr int64_t kMaxGridSide = 65535;  // in y and z

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ uint16_t float_to_half(float x) {
  return __half_as_ushort(__float2half_rn(x));
}

__device__ __forceinline__ uint16_t float_to_bfloat16(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// Four additions to a buffer in global memory, to is aligned to 16 bytes.
__device__ __forceinline__ void atomic_add4(float* to, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to),
               "f"(a),
               "f"(b),
               "f"(c),
               "f"(d)
               : "memory");
#else
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
  atomicAdd(to + 2, c);
  atomicAdd(to + 3, d);
#endif
}

// Makes the compiler hold an address in registers, where it would otherwise save them and compute
// it again at every use, at ten and more instructions.
template <typename T>
__device__ __forceinline__ T* keep(T* address) {
  asm volatile("" : "+l"(address));
  return address;
}

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

template <typename... Parameters, typename... Arguments>
void launch(
    void (*kernel)(Parameters...),
    dim3 grid,
    unsigned threads,
    size_t shared,
    CUstream_st* stream,
    const Arguments&... arguments) {
  kernel<<<grid, threads, shared, stream>>>(arguments...);
}
#endif

constexpr unsigned kWholeWarp = 0xffffffffu;

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <typename T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double widen(double x) {
  return x;
}

__device__ __forceinline__ float widen(float x) {
  return x;
}

__device__ __forceinline__ float widen(Half x) {
  return half_to_float(x.bits);
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) {
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

__device__ __forceinline__ float widen(BFloat16 x) {
  return bits_to_float(static_cast<uint32_t>(x.bits) << 16);
}

template <typename T>
__device__ __forceinline__ T narrow(Arithmetic<T> x) {
  if constexpr (std::is_same_v<T, Half>) {
    return {float_to_half(x)};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {float_to_bfloat16(x)};
  } else {
    return x;
  }
}

// The type that one instruction loads.
template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned int;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// kStreamed: read once, so leave the caches to what is read again.
template <bool kStreamed, int kVector, typename T>
__device__ __forceinline__ void load(const T* from, Arithmetic<T> (&to)[kVector]) {
  using Bits = typename Word<kVector * sizeof(T)>::Type;
  const Bits* address = reinterpret_cast<const Bits*>(from);
  const Bits bits = kStreamed ? __ldcs(address) : __ldg(address);
  if constexpr (std::is_same_v<T, BFloat16> && kVector % 2 == 0) {
    // Faster than one by one: the upper of two is a float once the lower is cleared.
    uint32_t pairs[kVector / 2];
    memcpy(pairs, &bits, sizeof(bits));
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      to[2 * i] = bits_to_float(pairs[i] << 16);
      to[2 * i + 1] = bits_to_float(pairs[i] & 0xffff0000u);
    }
  } else {
    T values[kVector];
    memcpy(values, &bits, sizeof(bits));
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      to[i] = widen(values[i]);
    }
  }
}

template <int kVector, typename T>
__device__ __forceinline__ void store(const Arithmetic<T> (&from)[kVector], T* to) {
  using Bits = typename Word<kVector * sizeof(T)>::Type;
  T values[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    values[i] = narrow<T>(from[i]);
  }
  Bits bits;
  memcpy(&bits, values, sizeof(bits));
  __stcs(reinterpret_cast<Bits*>(to), bits);
}

// The same for tensors whose type is only known at run time.
template <int kVector, typename A>
__device__ __forceinline__ void load_any(const char* from, Scalar type, A (&to)[kVector]) {
  if constexpr (std::is_same_v<A, double>) {
    load<true>(reinterpret_cast<const double*>(from), to);
  } else if (type == Scalar::kFloat) {
    load<true>(reinterpret_cast<const float*>(from), to);
  } else if (type == Scalar::kBFloat16) {
    load<true>(reinterpret_cast<const BFloat16*>(from), to);
  } else {
    load<true>(reinterpret_cast<const Half*>(from), to);
  }
}

template <int kVector, typename A>
__device__ __forceinline__ void store_any(const A (&from)[kVector], char* to, Scalar type) {
  if constexpr (std::is_same_v<A, double>) {
    store(from, reinterpret_cast<double*>(to));
  } else if (type == Scalar::kFloat) {
    store(from, reinterpret_cast<float*>(to));
  } else if (type == Scalar::kBFloat16) {
    store(from, reinterpret_cast<BFloat16*>(to));
  } else {
    store(from, reinterpret_cast<Half*>(to));
  }
}

// Address of an element; index and stride are 32 bits each, and their product is one instruction.
template <typename T>
__device__ __forceinline__ T* offset(T* base, int32_t index, uint32_t stride_bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  const uint64_t bytes = static_cast<uint64_t>(static_cast<uint32_t>(index)) * stride_bytes;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(base) + bytes);
}

// Calls f with a zero of the device type of the inputs' values.
template <typename F>
void dispatch_type(Scalar type, const F& f) {
  switch (type) {
    case Scalar::kDouble:
      return f(double());
    case Scalar::kFloat:
      return f(float());
    case Scalar::kHalf:
      return f(Half());
    case Scalar::kBFloat16:
      return f(BFloat16());
  }
}

}  // namespace
}  // namespace psf
