// The CPU kernels of training for x86-64 processors with AVX-512 F, DQ, BW and VL. setup.py gives this
// file their flags.
#ifdef PSF_X86_KERNELS
#define PSF_ISA avx512
#include "training_cpu_kernels.h"
#endif
