"""`python -m trainer`: a worker. It claims queued jobs and runs them, one at a time, until it is told to stop."""

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress

from serving.client import ModelServer
from serving.quiet import import_tensorflow
from serving.registry import Registry
from store.engine import connect
from store.errors import ModelServerError, TemperError
from store.settings import Settings, warn_of_unknown_variables
from trainer.jobs.records import Job, Jobs, LeaseLost

POLL_S = 0.1  # between looks for a job
RECOVER_S = 2.0  # between looks for jobs of dead workers
SWEEP_S = 60.0  # between looks for data sets that nothing needs
HEARTBEAT_S = 1.0  # between signs of life

log = logging.getLogger("temper.worker")


class Stopped(BaseException):
    """The process was asked to end. Raised in the main thread, wherever it is."""


def main() -> None:
    """Run a worker with the settings of the environment."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warn_of_unknown_variables(os.environ)
    settings = Settings()
    settings.make_home()
    os.nice(5)  # predictions come first

    def stop(*_: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with suppress(Stopped):
        Worker(settings).work()


class Worker:
    """A worker's loop. Its signs of life come from a thread, so that long work does not look like death."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.id = f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(3)}"
        engine = connect(settings.store_url)
        self.jobs, self.registry = Jobs(engine), Registry(engine)
        self.state = "warming"
        self.stopped = threading.Event()

    def work(self) -> None:
        """Until `Stopped` is raised."""
        signs = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        signs.start()
        try:
            self._work()
        finally:
            self.stopped.set()
            signs.join()
            self.jobs.forget_worker(self.id)

    def _beat(self) -> None:
        while True:
            try:
                self.jobs.heartbeat(self.id, self.state)
            except Exception:
                log.exception("worker %s cannot reach the store", self.id)
            if self.stopped.wait(HEARTBEAT_S):
                return

    def _work(self) -> None:
        import_tensorflow()
        import tensorflow as tf

        from trainer.worker.retention import retire_surplus, sweep_datasets
        from trainer.worker.run_job import clear_leftovers, publish_base

        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
            tf.config.experimental.enable_op_determinism()  # the same seed gives the same weights
        idle = threading.Event()
        with ExitStack() as stack:
            servers = [stack.enter_context(ModelServer(target)) for target in self.settings.server_addresses]
            while True:
                try:
                    publish_base(self.settings, self.registry, servers)
                    break
                except ModelServerError as exc:
                    log.info("worker %s waits for the model server: %s", self.id, exc)
                    idle.wait(0.2)
            self.state = "idle"
            look_for_lost = sweep = 0.0
            reports = self._complete_reports()
            log.info("worker %s ready", self.id)
            while True:
                if time.monotonic() >= look_for_lost:
                    look_for_lost = time.monotonic() + RECOVER_S
                    for lost in self.jobs.recover():
                        log.info("job %s %s: its worker died", lost.id, lost.status)
                        with suppress(ModelServerError):
                            clear_leftovers(lost, settings=self.settings, registry=self.registry, servers=servers)
                job = self.jobs.claim(self.id)
                if job is not None:
                    self.state = "busy"
                    self._attempt(job, servers)
                    retire_surplus(
                        job.model, settings=self.settings, jobs=self.jobs, registry=self.registry, servers=servers
                    )
                    self.state = "idle"
                elif time.monotonic() >= sweep:
                    sweep = time.monotonic() + SWEEP_S
                    sweep_datasets(self.settings, self.jobs, self.registry)
                elif not next(reports):
                    idle.wait(POLL_S)

    def _complete_reports(self) -> Iterator[bool]:
        """Work on open reports whenever asked for the next piece; false where there is none."""
        from trainer.worker.run_job import complete_report

        given_up: set[str] = set()
        while True:
            job = self.jobs.unreported(self.id, given_up)
            if job is None:
                yield False
                continue
            try:
                for _ in complete_report(job, settings=self.settings, jobs=self.jobs, registry=self.registry):
                    yield True
                log.info("job %s: report complete", job.id)
            except Exception:
                log.exception("job %s: the costly part of its report", job.id)
                given_up.add(job.id)

    def _attempt(self, job: Job, servers: Sequence[ModelServer]) -> None:
        """Run a job and write down how it ended."""
        from trainer.worker.run_job import run_job

        log.info("job %s begins: %s on %d images", job.id, job.model, job.dataset["images"])
        try:
            run_job(job, settings=self.settings, jobs=self.jobs, registry=self.registry, servers=servers)
        except LeaseLost:
            self.jobs.finish(job, "cancelled")
        except TemperError as exc:
            self.jobs.finish(job, "failed", error={"code": exc.code, "message": exc.message, "param": exc.param})
        except Stopped:
            self.jobs.requeue(job)
            raise
        except Exception:
            log.exception("job %s", job.id)
            message = "the trainer failed; the worker's log tells why"
            self.jobs.finish(job, "failed", error={"code": "internal_error", "message": message, "param": None})
        log.info("job %s %s", job.id, self.jobs.get(job.id).status)


if __name__ == "__main__":
    main()
