"""How the C library handles the memory of tensors on a CPU."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """
    Make the C library keep freed memory for later allocations (glibc only).

    By default it returns the memory of freed tensors to the system, so the next iteration has
    thousands of page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)  # the most that glibc takes
