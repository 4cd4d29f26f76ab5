// Lets the library load with a glibc and a libstdc++ older than those it was built with: those of
// manylinux_2_28. old_libraries.cpp has what is needed once.
#pragma once

#include <cstdlib>

#if defined(__x86_64__) && defined(__GLIBC__)
// Which torch's headers call, by the version that every glibc has.
asm(".symver dlsym, dlsym@GLIBC_2.2.5");
// Shared pointers read this variable of newer ones: there may be several threads.
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
