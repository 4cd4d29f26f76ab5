// The emulated machine, and what the test calls through ctypes.
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
      release(warp, warp + 32, State::kAtWarpBarrier);
    }
    release(0, threads, State::kAtBlockBarrier);
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

namespace {

using emulation::machine;

void begin(unsigned seed) {
  machine.buffers.clear();
  machine.error.clear();
  machine.random.seed(seed);
}

template <typename T>
T* declare(T* data, int64_t bytes, emulation::Role role) {
  if (data != nullptr) {
    machine.buffers.push_back(
        {reinterpret_cast<uintptr_t>(data),
         static_cast<size_t>(bytes),
         role,
         std::vector<bool>(role == emulation::Role::kOutput ? bytes : 0)});
  }
  return data;
}

// What happened since begin(): an empty string if all went well.
const char* end() {
  for (const emulation::Buffer& buffer : machine.buffers) {
    for (const bool written : buffer.written) {
      if (!written) {
        machine.fail("element not written");
      }
    }
  }
  machine.buffers.clear();
  return machine.error.c_str();
}

int64_t element_bytes(psf::Scalar type) {
  return type == psf::Scalar::kDouble ? 8 : type == psf::Scalar::kFloat ? 4 : 2;
}

}  // namespace

// For the operators' CUDA entries.
std::string emulation_error() {
  return machine.error;
}

extern "C" {

// As the test fills it; the same order there.
struct Problem {
  int64_t images, queries, levels, positions, heads, channels, points;
  const int64_t* shapes;  // (L, 2)
  int64_t type, positions_type, weights_type;
  const void* value;
  int64_t value_bytes, image_stride, position_stride, head_stride;
  const void* locations;
  const void* weights;
  const void* references;
  int64_t coordinates;
};

struct Wanted {
  void* value;
  void* positions;
  void* weights;
  void* locations;
  void* softmax;
};

}  // extern "C"

namespace {

struct Declared {
  psf::CudaInputs inputs;
  int64_t rows, samples, arithmetic_bytes;
};

Declared declare_inputs(const Problem& p, unsigned seed) {
  using emulation::Role;
  begin(seed);
  Declared result;
  psf::CudaInputs& inputs = result.inputs;
  inputs.sizes = {p.images, p.queries, p.levels, p.positions, p.heads, p.channels, p.points};
  int64_t start = 0;
  for (int64_t l = 0; l < p.levels; ++l) {
    inputs.levels.push_back({p.shapes[2 * l], p.shapes[2 * l + 1], start});
    start += p.shapes[2 * l] * p.shapes[2 * l + 1];
  }
  inputs.type = static_cast<psf::Scalar>(p.type);
  inputs.positions_type = static_cast<psf::Scalar>(p.positions_type);
  inputs.weights_type = static_cast<psf::Scalar>(p.weights_type);
  result.rows = p.images * p.queries * p.heads;
  result.samples = result.rows * p.levels * p.points;
  result.arithmetic_bytes = inputs.type == psf::Scalar::kDouble ? 8 : 4;
  inputs.value = declare(p.value, p.value_bytes, Role::kInput);
  inputs.image_stride = p.image_stride;
  inputs.position_stride = p.position_stride;
  inputs.head_stride = p.head_stride;
  inputs.positions = declare(
      p.locations, 2 * result.samples * element_bytes(inputs.positions_type), Role::kInput);
  inputs.weights =
      declare(p.weights, result.samples * element_bytes(inputs.weights_type), Role::kInput);
  inputs.references = declare(
      p.references,
      p.images * p.queries * p.levels * p.coordinates * result.arithmetic_bytes,
      Role::kInput);
  inputs.coordinates = p.coordinates;
  return result;
}

int64_t value_elements(const Problem& p) {
  return p.images * p.positions * p.heads * p.channels;
}

psf::CudaGradients declare_gradients(const Declared& d, const Wanted& w, int64_t value_bytes) {
  using emulation::Role;
  const int64_t bytes = d.samples * d.arithmetic_bytes;
  const int64_t positions = 2 * d.samples * element_bytes(d.inputs.positions_type);
  const int64_t weights = d.samples * element_bytes(d.inputs.weights_type);
  return {
      declare(w.value, value_bytes, Role::kSum),
      declare(w.positions, positions, Role::kOutput),
      declare(w.weights, weights, Role::kOutput),
      declare(w.locations, 2 * bytes, Role::kOutput),
      declare(w.softmax, bytes, Role::kOutput)};
}

const void* declare_grad_output(const Problem& p, const Declared& d, const void* grad_output) {
  return declare(
      grad_output,
      d.rows * p.channels * element_bytes(d.inputs.type),
      emulation::Role::kInput);
}

}  // namespace

extern "C" {

const char* emulate_forward(const Problem* p, unsigned seed, void* output) {
  const Declared d = declare_inputs(*p, seed);
  const int64_t bytes = d.rows * p->channels * element_bytes(d.inputs.type);
  psf::ms_deform_attn_cuda(
      d.inputs, declare(output, bytes, emulation::Role::kOutput), nullptr);
  return end();
}

const char* emulate_backward(
    const Problem* p, unsigned seed, const void* grad_output, const Wanted* wanted) {
  const Declared d = declare_inputs(*p, seed);
  psf::ms_deform_attn_backward_cuda(
      d.inputs,
      declare_grad_output(*p, d, grad_output),
      declare_gradients(d, *wanted, value_elements(*p) * d.arithmetic_bytes),
      nullptr);
  return end();
}

const char* emulate_value_gradient_exponent(
    const Problem* p, unsigned seed, const void* grad_output, int32_t* exponent) {
  const Declared d = declare_inputs(*p, seed);
  *exponent = psf::kSmallestExponent;
  psf::value_gradient_exponent_cuda(
      d.inputs,
      declare_grad_output(*p, d, grad_output),
      declare(exponent, sizeof(int32_t), emulation::Role::kSum),
      nullptr);
  return end();
}

const char* emulate_deterministic_backward(
    const Problem* p,
    unsigned seed,
    const void* grad_output,
    const int32_t* exponent,
    const Wanted* wanted) {
  const Declared d = declare_inputs(*p, seed);
  psf::ms_deform_attn_deterministic_backward_cuda(
      d.inputs,
      declare_grad_output(*p, d, grad_output),
      declare(exponent, sizeof(int32_t), emulation::Role::kInput),
      declare_gradients(d, *wanted, value_elements(*p) * 8),
      nullptr);
  return end();
}

const char* emulate_value_gradient_from_fixed_point(
    const Problem* p,
    unsigned seed,
    const int64_t* fixed_point,
    const int32_t* exponent,
    void* grad_value) {
  const Declared d = declare_inputs(*p, seed);
  const int64_t elements = value_elements(*p);
  psf::value_gradient_from_fixed_point_cuda(
      d.inputs,
      declare(fixed_point, elements * 8, emulation::Role::kInput),
      declare(exponent, sizeof(int32_t), emulation::Role::kInput),
      declare(grad_value, elements * element_bytes(d.inputs.type), emulation::Role::kOutput),
      nullptr);
  return end();
}

const char* emulate_value_gradient_by_pixel(
    const Problem* p, unsigned seed, const void* grad_output, float* grad_value) {
  const Declared d = declare_inputs(*p, seed);
  psf::value_gradient_by_pixel_cuda(
      d.inputs,
      declare_grad_output(*p, d, grad_output),
      declare(grad_value, value_elements(*p) * 4, emulation::Role::kSum),
      nullptr);
  return end();
}

const char* emulate_reference_gradient(
    const Problem* p, unsigned seed, const void* grad_locations, void* grad_references) {
  const Declared d = declare_inputs(*p, seed);
  const int64_t references = p->images * p->queries * p->levels * p->coordinates;
  psf::reference_gradient_cuda(
      d.inputs,
      declare(grad_locations, 2 * d.samples * d.arithmetic_bytes, emulation::Role::kInput),
      declare(grad_references, references * d.arithmetic_bytes, emulation::Role::kOutput),
      nullptr);
  return end();
}

}  // extern "C"
