"""How the C library handles the memory of tensors on a CPU."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """
    Have the C library keep freed memory for the next allocation (glibc; elsewhere nothing changes).

    By default it returns what an iteration frees to the system, which hands it out again, zeroed
    page by page, in the next one: thousands of page faults an iteration for small images.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)  # the most that glibc takes
