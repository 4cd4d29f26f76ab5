// The CPU kernels of training for any processor of the platform.
#define PSF_ISA baseline
#include "training_cpu_kernels.h"
