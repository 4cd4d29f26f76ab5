// Lets a library that was built with a newer glibc load with 2.28 too (manylinux_2_28): dlsym, which
// torch's headers call, by the version that every glibc has, and, in place of a variable of newer ones
// that shared pointers read, the answer that there may be several threads.
#pragma once

#include <cstdlib>

#if defined(__x86_64__) && defined(__GLIBC__)
asm(".symver dlsym, dlsym@GLIBC_2.2.5");
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
