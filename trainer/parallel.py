"""Several runs at once, one to a core. TensorFlow releases the interpreter while it computes."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import tensorflow as tf

CHECK_S = 0.5
T = TypeVar("T")
R = TypeVar("R")
Check = Callable[[], None]


class Unwanted(Exception):
    """Raised in a run that is no longer wanted."""


def at_once() -> int:
    """Runs that keep the current device busy."""
    return 1 if "GPU" in tf.constant(0.0).device else cores()


def cores() -> int:
    """Processors that this process may use, also where a container has a share of them (cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return max(1, min(cores, round(int(quota) / int(period))))  # "max" is no number: there is no quota
    return cores


def side_by_side(
    work: Callable[[T, Check], R], tasks: Iterable[T], check: Check = lambda: None
) -> Iterator[tuple[T, R]]:
    """Work on several tasks at once, on the current device; yields each with its result as it finishes.

    An exception, of `work` or of `check`, ends all of them.

    Args:
        work: called with a task and with a function to call now and then, which raises `Unwanted` after a failure.
        tasks: begun in this order.
        check: called about twice a second.
    """
    device, stopped = tf.constant(0.0).device, threading.Event()

    def go_on() -> None:
        if stopped.is_set():
            raise Unwanted

    def begin(task: T) -> R:
        go_on()
        with tf.device(device):  # each thread has its own
            return work(task, go_on)

    with ThreadPoolExecutor(at_once(), "run") as pool:
        left = {pool.submit(begin, task): task for task in tasks}
        try:
            while left:
                check()
                done, _ = wait(left, timeout=CHECK_S, return_when=FIRST_COMPLETED)
                for future in [future for future in left if future in done]:
                    yield left.pop(future), future.result()
        finally:
            stopped.set()
            for future in left:
                future.cancel()
