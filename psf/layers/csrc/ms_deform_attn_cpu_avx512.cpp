// The CPU kernels for x86-64 processors with AVX-512 (F, DQ, BW, VL). setup.py gives this file their
// flags.
#ifdef PSF_X86_KERNELS
#define PSF_ISA avx512
#include "ms_deform_attn_cpu_kernels.h"
#endif
