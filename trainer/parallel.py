"""Several runs at once, one to a core. TensorFlow releases the interpreter while it computes."""

import contextlib
import contextvars
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


class Paused(Exception):
    """Raised by a check to pause all runs; each raises it at its next check."""


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

    An exception, of `work` or of `check`, ends all of them. After `Paused` they are waited for, and those that finish
    all the same are yielded; others are raised at once, so that no client who cancels waits for an epoch or a
    compilation, and the runs end, unheeded, at their next check.

    Args:
        work: called with a task and with a function to call now and then, which raises `Unwanted` after a failure.
        tasks: begun in this order.
        check: called about twice a second.
    """
    device, paused, stopped = tf.constant(0.0).device, threading.Event(), threading.Event()

    def go_on() -> None:
        if stopped.is_set():
            raise Unwanted
        if paused.is_set():
            raise Paused

    def begin(task: T) -> R:
        go_on()
        with tf.device(device):  # each thread has its own
            return work(task, go_on)

    pool = ThreadPoolExecutor(at_once(), "run")
    # With a copy of our context each, so that their log lines name the job.
    left = {pool.submit(contextvars.copy_context().run, begin, task): task for task in tasks}
    try:
        while left:
            check()
            done, _ = wait(left, timeout=CHECK_S, return_when=FIRST_COMPLETED)
            for future in [future for future in left if future in done]:
                yield left.pop(future), future.result()
    except Paused:
        paused.set()
        running = [future for future in left if not future.cancel()]
        while wait(running, timeout=CHECK_S).not_done:
            with contextlib.suppress(Paused):
                check()
        for future in running:
            if future.exception() is None:
                yield left[future], future.result()
        raise
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)


def watched(work: Callable[[Check], R], check: Check) -> R:
    """What one piece of work returns; like `side_by_side` with a single task."""
    ((_, result),) = side_by_side(lambda _, go_on: work(go_on), [None], check)
    return result
