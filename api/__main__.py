"""`python -m api`: the gateway."""

import contextlib
import ctypes
import logging
import os

import uvicorn

from serving.settings import Settings

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's mallopt


def give_memory_back() -> None:
    """Return freed blocks of 64 KiB and more to the system at once: bodies and tensors come and go."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 16)
        mallopt(M_ARENA_MAX, 2)
        mallopt(M_TRIM_THRESHOLD, 1 << 16)


def main() -> None:
    """Serve the HTTP API with the settings of the environment."""
    give_memory_back()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = Settings()
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # its children exec at once; read when gRPC is imported
    from api.app import create_app

    uvicorn.run(
        create_app(settings), host=settings.host, port=settings.port, access_log=False, log_level="warning",
        timeout_graceful_shutdown=5, loop="uvloop", http="httptools", ws="none",
    )  # fmt: skip


if __name__ == "__main__":
    main()
