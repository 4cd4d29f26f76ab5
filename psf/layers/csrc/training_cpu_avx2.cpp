// The CPU kernels of training for x86-64 processors with AVX2, FMA and F16C. setup.py gives this
// file their flags.
#ifdef PSF_X86_KERNELS
#define PSF_ISA avx2
#include "training_cpu_kernels.h"
#endif
