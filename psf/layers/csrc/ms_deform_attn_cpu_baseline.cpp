// The CPU kernels for any processor of the platform.
#define PSF_ISA baseline
#include "ms_deform_attn_cpu_kernels.h"
