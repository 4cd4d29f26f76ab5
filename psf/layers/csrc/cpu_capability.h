// Which of the instruction sets that the CPU kernels are compiled for runs.
#pragma once

namespace psf {

enum class Capability { kBaseline, kAvx2, kAvx512 };

// The best set of the processor, or the lower one that PSF_CPU_CAPABILITY names: for tests and
// benchmarks.
Capability capability();

// As PSF_CPU_CAPABILITY is written.
const char* name_of(Capability capability);

// Calls f(name) of the chosen set; `template` names cannot be values, hence the macro.
#ifdef PSF_X86_KERNELS
#define PSF_CALL_KERNEL(NAME, ...)       \
  switch (capability()) {                \
    case Capability::kAvx512:            \
      avx512::NAME(__VA_ARGS__);         \
      break;                             \
    case Capability::kAvx2:              \
      avx2::NAME(__VA_ARGS__);           \
      break;                             \
    default:                             \
      baseline::NAME(__VA_ARGS__);       \
  }
#else
#define PSF_CALL_KERNEL(NAME, ...) baseline::NAME(__VA_ARGS__);
#endif

}  // namespace psf
