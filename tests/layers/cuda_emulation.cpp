// The emulated machine, and the functions of ms_deform_attn_cuda.h as the operator calls them: each
// declares the buffers of a call, runs the kernels and checks what they have done.
#include "cuda_emulation.h"

#include "ms_deform_attn_cuda.h"

namespace emulation {

Machine machine;

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kGuardBytes = 256;  // poisoned, after the shared memory

// A fiber runs its part of one block after the other.
void fiber_main() {
  for (;;) {
    machine.kernel();
    machine.yield(State::kDone);
  }
}

}  // namespace

void Machine::add_fiber() {
  auto fiber = std::make_unique<Fiber>();
  fiber->stack = std::make_unique<char[]>(kStackBytes);
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = fiber->stack.get();
  fiber->start.uc_stack.ss_size = kStackBytes;
  fiber->start.uc_link = nullptr;
  makecontext(&fiber->start, fiber_main, 0);
  fibers.push_back(std::move(fiber));
}

void Machine::run_block(size_t shared_bytes) {
  shared.assign(shared_bytes + kGuardBytes + 16, 0x7f);
  const uintptr_t unaligned = reinterpret_cast<uintptr_t>(shared.data());
  shared_begin = shared.data() + (16 - unaligned % 16) % 16;
  const unsigned threads = block_size.x;
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i]->state = State::kRunnable;
  }
  std::vector<unsigned> runnable;
  for (;;) {
    runnable.clear();
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers[i]->state == State::kRunnable) {
        runnable.push_back(i);
      }
    }
    if (runnable.empty()) {
      break;
    }
    std::shuffle(runnable.begin(), runnable.end(), random);
    for (const unsigned i : runnable) {
      resume(i);
    }
    for (unsigned warp = 0; warp < threads; warp += 32) {
      release(warp);
    }
  }
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i]->state != State::kDone) {
      fail("threads wait at different barriers, or for threads that have returned");
      fibers.clear();
      return;
    }
  }
  for (unsigned char* byte = shared_begin + shared_bytes; byte != &*shared.end(); ++byte) {
    if (*byte != 0x7f) {
      fail("write beyond the shared memory");
    }
  }
}

void Machine::run(dim3 grid, unsigned threads, size_t shared_bytes, std::function<void()> body) {
  if (threads % 32 != 0 || threads == 0 || threads > 1024 || shared_bytes > 48 << 10 ||
      grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff) {
    fail("impossible launch");
    return;
  }
  kernel = std::move(body);
  block_size = dim3(threads);
  grid_size = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x && error.empty(); ++x) {
        while (fibers.size() < threads) {
          add_fiber();
        }
        block = dim3(x, y, z);
        run_block(shared_bytes);
      }
    }
  }
}

}  // namespace emulation

// The kernels' own functions, which are compiled under these names.
namespace psf {

void kernels_forward(const CudaInputs&, void*, CUstream_st*);
void kernels_backward(const CudaInputs&, const void*, const CudaGradients&, CUstream_st*);
void kernels_exponent(const CudaInputs&, const void*, int32_t*, CUstream_st*);
void kernels_deterministic(
    const CudaInputs&, const void*, const int32_t*, const CudaGradients&, CUstream_st*);
void kernels_from_fixed_point(
    const CudaInputs&, const int64_t*, const int32_t*, void*, CUstream_st*);
void kernels_references(const CudaInputs&, const void*, void*, CUstream_st*);

}  // namespace psf

namespace {

using emulation::machine;
using emulation::Role;
using psf::CudaGradients;
using psf::CudaInputs;

void declare(const void* data, int64_t bytes, Role role) {
  if (data != nullptr) {
    const bool output = role == Role::kOutput;
    machine.buffers.push_back(
        {reinterpret_cast<uintptr_t>(data),
         static_cast<size_t>(bytes),
         role,
         std::vector<bool>(output ? bytes : 0)});
  }
}

int64_t bytes_of(psf::Scalar type) {
  return type == psf::Scalar::kDouble ? 8 : type == psf::Scalar::kFloat ? 4 : 2;
}

// One call: the buffers are declared from its beginning to its end.
struct Run {
  const CudaInputs& inputs;
  int64_t rows, samples, arithmetic, value_elements, reference_elements;

  explicit Run(const CudaInputs& inputs) : inputs(inputs) {
    const psf::Sizes& s = inputs.sizes;
    machine.buffers.clear();
    machine.error.clear();
    rows = s.images * s.queries * s.heads;
    samples = rows * s.levels * s.points;
    arithmetic = inputs.type == psf::Scalar::kDouble ? 8 : 4;
    value_elements = s.images * s.positions * s.heads * s.channels;
    reference_elements = s.images * s.queries * s.levels * inputs.coordinates;
    const int64_t last = (s.images - 1) * inputs.image_stride +
        (s.positions - 1) * inputs.position_stride + (s.heads - 1) * inputs.head_stride;
    const int64_t extent = value_elements > 0 ? last + s.channels : 0;
    declare(inputs.value, extent * bytes_of(inputs.type), Role::kInput);
    declare(inputs.positions, 2 * samples * bytes_of(inputs.positions_type), Role::kInput);
    declare(inputs.weights, samples * bytes_of(inputs.weights_type), Role::kInput);
    declare(inputs.references, reference_elements * arithmetic, Role::kInput);
  }

  // Of the output's gradient, and of the gradients with elements of the value gradient so large.
  void gradients(const void* grad_output, const CudaGradients& to, int64_t value_bytes) const {
    declare(grad_output, output_bytes(), Role::kInput);
    declare(to.value, value_elements * value_bytes, Role::kSum);
    declare(to.positions, 2 * samples * bytes_of(inputs.positions_type), Role::kOutput);
    declare(to.weights, samples * bytes_of(inputs.weights_type), Role::kOutput);
    declare(to.locations, 2 * samples * arithmetic, Role::kOutput);
  }

  int64_t output_bytes() const {
    return rows * inputs.sizes.channels * bytes_of(inputs.type);
  }

  ~Run() {
    for (const emulation::Buffer& buffer : machine.buffers) {
      for (const bool written : buffer.written) {
        if (!written) {
          machine.fail("element not written");
        }
      }
    }
    machine.buffers.clear();
  }
};

}  // namespace

// What of LibTorch the operator asks about a device, for the emulated one: a launch has failed if the
// kernels did what they must not.
extern "C" {

int32_t aoti_torch_create_device_guard(int32_t /*index*/, void** guard) {
  *guard = nullptr;
  return 0;
}

int32_t aoti_torch_delete_device_guard(void* /*guard*/) {
  return 0;
}

int32_t aoti_torch_get_current_cuda_stream(int32_t /*index*/, void** stream) {
  *stream = nullptr;
  return 0;
}

int32_t torch_c10_cuda_check_msg(
    int32_t /*error*/,
    const char* /*file*/,
    const char* /*function*/,
    uint32_t /*line*/,
    bool /*include_device_assertions*/,
    char** message) {
  *message = machine.error.empty() ? nullptr : machine.error.data();
  return 0;
}

void torch_c10_cuda_free_error_msg(char* /*message*/) {}

}  // extern "C"

namespace psf {

void ms_deform_attn_cuda(const CudaInputs& inputs, void* output, CUstream_st* stream) {
  const Run run(inputs);
  declare(output, run.output_bytes(), Role::kOutput);
  kernels_forward(inputs, output, stream);
}

void ms_deform_attn_backward_cuda(
    const CudaInputs& inputs,
    const void* grad_output,
    const CudaGradients& gradients,
    CUstream_st* stream) {
  const Run run(inputs);
  run.gradients(grad_output, gradients, run.arithmetic);
  kernels_backward(inputs, grad_output, gradients, stream);
}

void value_gradient_exponent_cuda(
    const CudaInputs& inputs, const void* grad_output, int32_t* exponent, CUstream_st* stream) {
  const Run run(inputs);
  declare(grad_output, run.output_bytes(), Role::kInput);
  declare(exponent, sizeof(*exponent), Role::kSum);
  kernels_exponent(inputs, grad_output, exponent, stream);
}

void ms_deform_attn_deterministic_backward_cuda(
    const CudaInputs& inputs,
    const void* grad_output,
    const int32_t* exponent,
    const CudaGradients& gradients,
    CUstream_st* stream) {
  const Run run(inputs);
  run.gradients(grad_output, gradients, sizeof(int64_t));
  declare(exponent, sizeof(*exponent), Role::kInput);
  kernels_deterministic(inputs, grad_output, exponent, gradients, stream);
}

void value_gradient_from_fixed_point_cuda(
    const CudaInputs& inputs,
    const int64_t* fixed_point,
    const int32_t* exponent,
    void* grad_value,
    CUstream_st* stream) {
  const Run run(inputs);
  declare(fixed_point, run.value_elements * 8, Role::kInput);
  declare(exponent, sizeof(*exponent), Role::kInput);
  declare(grad_value, run.value_elements * bytes_of(inputs.type), Role::kOutput);
  kernels_from_fixed_point(inputs, fixed_point, exponent, grad_value, stream);
}

void reference_gradient_cuda(
    const CudaInputs& inputs,
    const void* grad_locations,
    void* grad_references,
    CUstream_st* stream) {
  const Run run(inputs);
  declare(grad_locations, 2 * run.samples * run.arithmetic, Role::kInput);
  declare(grad_references, run.reference_elements * run.arithmetic, Role::kOutput);
  kernels_references(inputs, grad_locations, grad_references, stream);
}

}  // namespace psf
