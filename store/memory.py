"""What keeps a process small and its garbage collections short, and how much memory is left."""

import contextlib
import ctypes
import gc
import re
from pathlib import Path


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


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that new processes here can take without swapping; what the kernel can drop of its caches is included.

    That is what the machine has left, or less where a control group (version 1 or 2) bounds this process.

    Args:
        root: where /proc and /sys are.
    """
    left = [1024 * _field(root / "proc/meminfo", "MemAvailable:")]
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limit, usage, cache = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, usage = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        top = root / "sys/fs/cgroup" / mount
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # in a container the group itself may not be visible, but its top is
            with contextlib.suppress(OSError, ValueError):  # a group without a limit has none of the files, or "max"
                used = int((folder / usage).read_text(encoding="ascii")) - _field(folder / "memory.stat", cache)
                left.append(int((folder / limit).read_text(encoding="ascii")) - used)
            if folder == top:
                break
    return max(0, min(left))


def _field(file: Path, name: str) -> int:
    """The number that follows a name at the beginning of a line.

    Raises:
        ValueError: there is no such line.
    """
    found = re.search(rf"^{name}\s+(\d+)", file.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise ValueError(f"{file} has no {name}")
    return int(found[1])
