"""How a CPU run keeps its memory: freed buffers are used again, not given back."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Tell glibc to keep the memory of large tensors that are freed.

    By default every tensor above 32 MB is mapped anew and unmapped again in every step, and the
    kernel hands out its pages one by one: a quarter of the time of a small model's step
    (docs/performance.md). The process then holds its peak until it ends.

    Returns:
        Whether it took effect: on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False  # another C library
    return bool(mallopt(_M_MMAP_THRESHOLD, 2**30) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
