"""What keeps a process small, and its garbage collections short."""

import contextlib
import ctypes
import gc
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's mallopt
MADV_DONTNEED = 4


def give_memory_back() -> None:
    """Return freed blocks of 64 KiB and more to the system at once: bodies and tensors come and go."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 16)
        mallopt(M_ARENA_MAX, 2)
        mallopt(M_TRIM_THRESHOLD, 1 << 16)


def settle() -> None:
    """Once all is imported: drop what that has left over, and look at the rest in no later collection.

    A full collection over some hundred thousand objects of modules takes tens of milliseconds, inside of a request.
    """
    gc.collect()
    gc.freeze()
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        _let_go_of_code(libc)


def _let_go_of_code(libc: ctypes.CDLL) -> None:
    """Unmap the pages of libraries' code from memory; those that are still needed come back from the page cache.

    Only code: it is never written to, so nothing is lost. More than half of it has run for the start alone.
    """
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, _, _, _, *path = line.split()
        if permissions == "r-xp" and path and path[0].startswith("/"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(start, end - start, MADV_DONTNEED)
