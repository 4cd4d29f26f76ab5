// Runs the CUDA kernels on the CPU, for tests: stands in for CUDA's keywords and built-in functions
// when the .cu files are compiled as C++ with -DPSF_CUDA_EMULATION.
//
// Every thread of a block is a fiber. Between two barriers of a warp (shuffles are such barriers) the
// threads run one after the other in a random order, which differs from launch to launch: a missing
// barrier shows as a wrong result or as a read of poisoned shared memory. Every access to global
// memory is checked against the buffers that cuda_emulation.cpp has declared: bounds, alignment,
// nothing written twice or never, nothing written that is to be read.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
  alignas(8) uint32_t x;
  uint32_t y;
};

struct uint4 {
  alignas(16) uint32_t x;
  uint32_t y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

// What kernels may do with a buffer.
enum class Role { kInput, kOutput, kSum };

struct Buffer {
  uintptr_t begin;
  size_t bytes;
  Role role;
  std::vector<bool> written;
};

enum class State { kRunnable, kAtBarrier, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started = false;
  State state = State::kDone;
  unsigned shuffles = 0;
  uint64_t slots[2];  // what it gives away in a shuffle; the next may begin before all have read
};

// The whole machine, one block at a time.
struct Machine {
  std::vector<Buffer> buffers;
  std::string error;
  std::mt19937 random;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<unsigned char> shared;
  unsigned char* shared_begin = nullptr;
  std::function<void()> kernel;
  jmp_buf scheduler;
  unsigned current = 0;
  dim3 thread, block, block_size, grid_size;

  void fail(const std::string& message) {
    if (error.empty()) {
      error = message + " in block " + std::to_string(block.x) + ", " + std::to_string(block.y) +
          ", " + std::to_string(block.z) + ", thread " + std::to_string(thread.x);
    }
  }

  // Whether the access is allowed; fails otherwise.
  bool check(const void* address, size_t bytes, size_t alignment, Role role) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    if (begin % alignment != 0) {
      fail("misaligned access of " + std::to_string(bytes) + " bytes");
      return false;
    }
    for (Buffer& buffer : buffers) {
      if (begin < buffer.begin || begin + bytes > buffer.begin + buffer.bytes) {
        continue;
      }
      if (buffer.role != role) {
        fail("access that does not fit the role of the buffer");
        return false;
      }
      if (role == Role::kOutput) {
        for (size_t i = begin - buffer.begin; i < begin - buffer.begin + bytes; ++i) {
          if (buffer.written[i]) {
            fail("element written twice");
          }
          buffer.written[i] = true;
        }
      }
      return true;
    }
    fail("access out of bounds, " + std::to_string(bytes) + " bytes");
    return false;
  }

  void yield(State state) {
    Fiber& fiber = *fibers[current];
    fiber.state = state;
    if (_setjmp(fiber.resume) == 0) {
      _longjmp(scheduler, 1);
    }
  }

  void resume(unsigned index) {
    Fiber& fiber = *fibers[index];
    current = index;
    thread = dim3(index, 0, 0);
    if (_setjmp(scheduler) == 0) {
      if (fiber.started) {
        _longjmp(fiber.resume, 1);
      }
      fiber.started = true;
      setcontext(&fiber.start);
    }
  }

  // Frees the 32 threads of a warp if all wait at the barrier.
  void release(unsigned warp) {
    for (unsigned i = warp; i < warp + 32; ++i) {
      if (fibers[i]->state != State::kAtBarrier) {
        return;
      }
    }
    for (unsigned i = warp; i < warp + 32; ++i) {
      fibers[i]->state = State::kRunnable;
    }
  }

  void add_fiber();
  void run_block(size_t shared_bytes);
  void run(dim3 grid, unsigned threads, size_t shared_bytes, std::function<void()> body);
};

extern Machine machine;

template <typename T>
T load(const T* from) {
  T value;
  memset(&value, 0x7f, sizeof(value));
  if (machine.check(from, sizeof(T), sizeof(T), Role::kInput)) {
    memcpy(&value, from, sizeof(value));
  }
  return value;
}

template <typename T>
void store(T* to, const T& value) {
  if (machine.check(to, sizeof(T), sizeof(T), Role::kOutput)) {
    memcpy(to, &value, sizeof(value));
  }
}

template <typename T, typename F>
T update(T* to, const F& f) {
  if (!machine.check(to, sizeof(T), sizeof(T), Role::kSum)) {
    return T();
  }
  const T before = *to;
  *to = f(before);
  return before;
}

template <typename V>
V shuffle(V value, unsigned source_lane) {
  static_assert(sizeof(V) <= sizeof(uint64_t), "one register pair");
  Machine& m = machine;
  const unsigned self = m.current;
  const unsigned parity = m.fibers[self]->shuffles++ % 2;
  memcpy(&m.fibers[self]->slots[parity], &value, sizeof(value));
  m.yield(State::kAtBarrier);
  V result;
  memcpy(&result, &m.fibers[self / 32 * 32 + source_lane]->slots[parity], sizeof(result));
  return result;
}

}  // namespace emulation

#define threadIdx emulation::machine.thread
#define blockIdx emulation::machine.block
#define blockDim emulation::machine.block_size
#define gridDim emulation::machine.grid_size

inline void __syncwarp() {
  emulation::machine.yield(emulation::State::kAtBarrier);
}

template <typename V>
V __shfl_xor_sync(unsigned /*mask*/, V value, int lanes) {
  return emulation::shuffle(value, (threadIdx.x % 32) ^ static_cast<unsigned>(lanes));
}

template <typename T>
T __ldg(const T* from) {
  return emulation::load(from);
}

template <typename T>
T __ldcs(const T* from) {
  return emulation::load(from);
}

template <typename T>
void __stcs(T* to, T value) {
  emulation::store(to, value);
}

template <typename T>
T atomicAdd(T* to, T addend) {
  return emulation::update(to, [&](T before) { return before + addend; });
}

template <typename T>
T atomicMax(T* to, T other) {
  return emulation::update(to, [&](T before) { return before > other ? before : other; });
}

inline int cudaGetLastError() {
  return 0;
}

inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}

struct CUstream_st;

namespace psf {
namespace {

constexpr int64_t kMaxGridSide = 3;  // small, so that tests reach it

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const float fraction = static_cast<float>(bits & 1023) / 1024;
  float magnitude = std::ldexp(1 + fraction, exponent - 15);
  if (exponent == 0) {
    magnitude = std::ldexp(fraction, -14);
  } else if (exponent == 31) {
    magnitude = fraction == 0 ? INFINITY : NAN;
  }
  return bits >> 15 ? -magnitude : magnitude;
}

uint16_t float_to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) {
    return 0x7fff;
  }
  if (magnitude >= 65520) {  // halfway to what would be the next number
    return sign | 0x7c00;
  }
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  // In units of the last place; a carry runs into the exponent as it should.
  const auto units = static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return sign | (((exponent + 14) << 10) + units);
}

uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (std::isnan(x)) {
    return 0x7fff;
  }
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

[[maybe_unused]] void atomic_add4(float* to, float a, float b, float c, float d) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) {
    emulation::machine.fail("misaligned vector addition");
  }
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
  atomicAdd(to + 2, c);
  atomicAdd(to + 3, d);
}

template <typename T>
T* keep(T* address) {
  return address;
}

[[maybe_unused]] unsigned char* shared_memory() {
  return emulation::machine.shared_begin;
}

template <typename... Parameters, typename... Arguments>
void launch(
    void (*kernel)(Parameters...),
    dim3 grid,
    unsigned threads,
    size_t shared,
    CUstream_st* /*stream*/,
    const Arguments&... arguments) {
  emulation::machine.run(grid, threads, shared, [&] { kernel(arguments...); });
}

}  // namespace
}  // namespace psf
