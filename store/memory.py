"""What keeps a process small, and its garbage collections short."""

import contextlib
import ctypes
import gc


def allocator_environment() -> dict[str, str]:
    """Variables for a process with short-lived bodies and tensors: glibc returns freed blocks to the system at once.

    glibc reads them when a process starts (mallopt(3)), so whoever starts it has to set them. Not for TensorFlow, whose
    steps would map and fault in their tensors anew each time.
    """
    return {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": str(1 << 16), "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}


def settle() -> None:
    """Call when everything is imported: collect start-up garbage, then freeze the survivors.

    A full collection over some hundred thousand objects of modules takes tens of milliseconds, in the middle of a
    request.
    """
    gc.collect()
    gc.freeze()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
