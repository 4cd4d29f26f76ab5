#include "cpu_capability.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

namespace psf {

const char* name_of(Capability capability) {
  switch (capability) {
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

namespace {

Capability of_processor() {
#ifdef PSF_X86_KERNELS
  __builtin_cpu_init();
  // F16C came before AVX2, and the compiler's list of features lacks it.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return Capability::kAvx512;
  }
  if (avx2) {
    return Capability::kAvx2;
  }
#endif
  return Capability::kBaseline;
}

Capability choose_capability() {
  const Capability best = of_processor();
  const char* wanted = std::getenv("PSF_CPU_CAPABILITY");
  if (wanted == nullptr) {
    return best;
  }
  for (const auto capability : {Capability::kBaseline, Capability::kAvx2, Capability::kAvx512}) {
    if (wanted == std::string(name_of(capability)) && capability <= best) {
      return capability;
    }
  }
  TORCH_CHECK(
      false, "PSF_CPU_CAPABILITY is '", wanted, "'; this machine runs baseline",
      best >= Capability::kAvx2 ? ", avx2" : "", best >= Capability::kAvx512 ? ", avx512" : "");
}

}  // namespace

Capability capability() {
  static const Capability chosen = choose_capability();
  return chosen;
}

}  // namespace psf
