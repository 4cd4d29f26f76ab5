// All CPU kernels of training, for the instruction set that the including file is compiled for. The
// file defines PSF_ISA, the namespace of that set, into which the kernels are included.
#include "attention_cpu.h"
#include "dice_cpu.h"
#include "layer_norm_cpu.h"
#include "mask_head_cpu.h"
#include "vector_index.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace psf {
namespace PSF_ISA {
namespace {
#include "simd.h"
}  // namespace

#include "attention_cpu_kernels.h"
#include "dice_cpu_kernels.h"
#include "layer_norm_cpu_kernels.h"
#include "mask_head_cpu_kernels.h"

}  // namespace PSF_ISA
}  // namespace psf
