// Stands in for torch's CUDA headers when ms_deform_attn_cuda.cpp is compiled for the emulation:
// one device, the CPU, without streams. Kernels run as they are launched.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <string>

struct CUstream_st;

std::string emulation_error();

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(c10::Device /*device*/) {}
};

struct CUDAStream {
  CUstream_st* stream() const {
    return nullptr;
  }
};

inline CUDAStream getCurrentCUDAStream() {
  return {};
}

}  // namespace c10::cuda

#define C10_CUDA_KERNEL_LAUNCH_CHECK() \
  TORCH_CHECK(emulation_error().empty(), "emulation: ", emulation_error())
