"""The worker's main loop: it leases queued jobs and runs them one at a time, and works on reports in between."""

import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress

import click
import sqlalchemy as sa
import structlog

from serving.client import ModelServer
from serving.quiet import import_tensorflow
from serving.registry import Registry
from store import logging, traces
from store.disk import translated
from store.engine import PASSING_FAILURES, connect, reason
from store.errors import (
    ModelServerError,
    ObjectStoreUnavailable,
    StorageFailed,
    StorageFull,
    StoreUnavailable,
    TemperError,
)
from store.files import remove_tree
from store.health import Notice
from store.records import public_name
from store.settings import Settings, from_environment, warn_of_unknown_variables
from trainer.jobs import records
from trainer.jobs.feedback import Feedback
from trainer.jobs.kept import sweep_kept
from trainer.jobs.library import Library
from trainer.jobs.records import Job, Jobs, LeaseLost, WorkerState

POLL_S = 0.1  # between looks for a job
RECOVER_S = 2.0  # between looks for jobs of dead workers
SWEEP_S = 60.0  # between looks for unused data sets
HEARTBEAT_S = 1.0
STORE_PAUSE_S = 1.0  # after a failure of the store
OBJECTS_PAUSE_S = 5.0  # after one of the object store
REPORT_PAUSE_S = 10.0  # before a report that failed is tried again
REPORT_ATTEMPTS = 3
COMMAND = "python -m trainer"

log: structlog.stdlib.BoundLogger = structlog.get_logger("temper.worker")


class Stopped(BaseException):
    """The process was asked to end. Raised in the main thread, wherever it is."""


@click.command()
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Run a worker here, or keep a pool of them on a Ray cluster.",
)
@click.option("--address", default="auto", show_default=True, help="The cluster: host:port of its head, or ray://…")
@click.option("--workers", type=click.IntRange(1), help="Most workers in the pool.  [default: what the cluster fits]")
@click.option("--cpus", type=click.FloatRange(0.1), default=1.0, show_default=True, help="CPUs of each.")
@click.option("--gpus", type=click.FloatRange(0.0), default=0.0, show_default=True, help="GPUs of each, or a share.")
@click.option("--gpu-memory", type=click.IntRange(0), default=0, help="MiB of a GPU for each.  [default: its share]")
def main(engine: str, address: str, workers: int | None, cpus: float, gpus: float, gpu_memory: int) -> None:
    """Claim queued jobs and run them. Settings are read from TEMPER_* environment variables."""
    logging.configure("worker")
    warn_of_unknown_variables(os.environ)
    try:
        settings = from_environment()
        traces.configure("worker", settings.traces)
    except ValueError as exc:
        logging.fail(COMMAND, str(exc))
    if engine == "local" and (workers or cpus != 1.0 or gpus or gpu_memory):
        raise click.UsageError("--workers, --cpus, --gpus and --gpu-memory are of --engine ray; start several workers")
    if engine == "ray":
        _run_pool(settings, address, workers, cpus, gpus, gpu_memory)
        return
    os.nice(5)  # predictions come first

    def stop(*_: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with suppress(Stopped):
        try:
            settings.make_home()
            worker = Worker(settings)
        except OSError as exc:
            logging.fail(COMMAND, f"cannot use TEMPER_HOME: {exc}")
        except StoreUnavailable as exc:
            logging.fail(COMMAND, exc.message)
        try:
            worker.run()
        except sa.exc.DatabaseError as exc:  # damaged, for example: nothing that waiting would mend
            logging.fail(COMMAND, f"the store failed: {reason(exc)}")


def _run_pool(settings: Settings, address: str, workers: int | None, cpus: float, gpus: float, gpu_memory: int) -> None:
    try:
        from trainer.worker import ray_pool
    except ImportError as exc:
        logging.fail(COMMAND, f"--engine ray: {exc}; pip install 'temper[ray]'")
    try:
        ray_pool.run(address, settings, ray_pool.Size(cpus, gpus, gpu_memory), workers)
    except (ConnectionError, TimeoutError) as exc:
        logging.fail(COMMAND, f"--address {address}: {exc}")
    except ValueError as exc:
        logging.fail(COMMAND, f"--engine ray: {exc}")


class Worker:
    """One worker. A thread sends its heartbeats, so that a long computation does not look like death."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.id = f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(3)}"
        engine = connect(settings.store_url)
        self.jobs, self.registry, self.library = Jobs(engine), Registry(engine), Library(engine)
        self.feedback = Feedback(engine, settings.feedback)
        self.state: WorkerState = "warming"
        self._stopped = threading.Event()
        self._contact = _StoreContact()
        self._report: tuple[Job, Iterator[None]] | None = None  # under way
        self._failed_reports: dict[str, tuple[int, float]] = {}  # how often, and when to try again
        self._sweeping = Notice("deleting what is not needed")

    def run(self) -> None:
        """Work until `Stopped` is raised."""
        heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        pulse = threading.Thread(target=self._touch, name="pulse", daemon=True)
        heartbeat.start()
        pulse.start()
        try:
            self._run()
        finally:
            self._stopped.set()
            heartbeat.join()
            pulse.join()
            self.settings.pulse_file(os.getpid()).unlink(missing_ok=True)
            with suppress(sa.exc.DatabaseError, sa.exc.InterfaceError):
                self.jobs.forget_worker(self.id)

    def _beat(self) -> None:
        reachable = True
        while True:
            try:
                self.jobs.heartbeat(self.id, self.state)
            except Exception as exc:
                if reachable:
                    log.warning("cannot reach the store; trying again", worker=self.id, reason=reason(exc))
                reachable = False
            else:
                if not reachable:
                    log.info("the store answers again", worker=self.id)
                reachable = True
                self._contact.beat()
            if self._stopped.wait(HEARTBEAT_S):
                return

    def _touch(self) -> None:
        """Show the supervisor that this process runs. Importing TensorFlow may hold the interpreter for long."""
        while not self._stopped.wait(HEARTBEAT_S):
            if self.state != "warming":
                self._show_pulse()

    def _show_pulse(self) -> None:
        with suppress(OSError):  # a full disk
            self.settings.pulse_file(os.getpid()).touch()

    def _run(self) -> None:
        # After the engine has imported psycopg. The other way round, psycopg's OpenSSL mixes with the one within
        # TensorFlow, and TLS to PostgreSQL crashes the process.
        import_tensorflow()
        import tensorflow as tf

        from trainer.worker.pretrained import publish_base

        for gpu in tf.config.list_physical_devices("GPU"):
            if limit_mb := self.settings.gpu_memory_mb:
                part = tf.config.LogicalDeviceConfiguration(memory_limit=limit_mb)
                tf.config.set_logical_device_configuration(gpu, [part])
            else:
                tf.config.experimental.set_memory_growth(gpu, True)
            tf.config.experimental.enable_op_determinism()  # the same seed gives the same weights
        with ExitStack() as stack:
            tls = self.settings.model_server_tls
            servers = [stack.enter_context(ModelServer(target, tls)) for target in self.settings.server_addresses]
            while True:
                try:
                    publish_base(self.settings, self.registry, servers)
                    break
                except ModelServerError as exc:
                    log.info("waiting for the model server", worker=self.id, reason=exc.message)
                    time.sleep(0.2)
                except PASSING_FAILURES as exc:
                    log.warning("waiting for the store", worker=self.id, reason=reason(exc))
                    time.sleep(STORE_PAUSE_S)
            self._show_pulse()  # from here on the supervisor notices when it freezes
            self.state = "idle"
            log.info("ready", worker=self.id)
            self._loop(servers)

    def _loop(self, servers: Sequence[ModelServer]) -> None:
        from trainer.worker.retention import (
            retire_surplus,
            sweep_checkpoints,
            sweep_datasets,
            sweep_feedback,
            sweep_leftovers,
            sweep_versions,
        )

        recover_at = sweep_at = 0.0
        while True:
            try:
                if time.monotonic() >= recover_at:
                    self._recover(servers)
                    recover_at = time.monotonic() + RECOVER_S
                job = self.jobs.claim(self.id)
                if job is not None:
                    self.state = "busy"
                    with structlog.contextvars.bound_contextvars(job=job.id, model=public_name(job.model)):
                        self._traced(job, servers)
                    retire_surplus(
                        job.model, settings=self.settings, jobs=self.jobs, registry=self.registry, servers=servers
                    )
                elif time.monotonic() >= sweep_at:
                    sweep_at = time.monotonic() + SWEEP_S
                    try:
                        sweep_versions(self.settings, self.registry)
                        sweep_datasets(self.settings, self.jobs, self.registry, self.library)
                        sweep_checkpoints(self.settings, self.jobs)
                        sweep_kept(self.settings, self.jobs, self.registry)
                        sweep_leftovers(self.settings, self.jobs, self.registry, servers)
                        sweep_feedback(self.feedback, self.registry)
                        self._sweeping.worked()
                    except (StorageFailed, StorageFull) as exc:
                        self._sweeping.failed(exc)
                elif not self._continue_report():
                    self.state = "idle"
                    time.sleep(POLL_S)
            except PASSING_FAILURES as exc:
                # Whether a claim or the end of a job has been stored is unknown: look for jobs of ours first.
                log.warning("the store failed; trying again", worker=self.id, reason=reason(exc))
                self.state, recover_at = "idle", 0.0
                time.sleep(STORE_PAUSE_S)

    def _recover(self, servers: Sequence[ModelServer]) -> None:
        """Requeue or end the jobs that nobody works on. This worker runs none now, so also those that are its own."""
        from trainer.worker.run_job import clear_leftovers

        for job in self.jobs.recover(self.id, others=self._contact.is_steady()):
            log.warning("job ended: its worker died", job=job.id, status=job.status)
            with suppress(TemperError):  # whoever reconciles next does so
                clear_leftovers(job, settings=self.settings, registry=self.registry, servers=servers)

    def _traced(self, job: Job, servers: Sequence[ModelServer]) -> None:
        """Attempt a job within a span, which belongs to the trace of the request that created the job."""
        attributes: traces.Attributes = {
            "temper.job": job.id,
            "temper.model": public_name(job.model),
            "temper.attempt": job.attempts,
        }
        with traces.span("job", "consumer", parent=job.trace, attributes=attributes) as span:
            status = self._attempt(job, servers)
            if span:
                span.set_attribute("temper.status", status)
                if status == "failed":
                    traces.fail(span)

    def _attempt(self, job: Job, servers: Sequence[ModelServer]) -> str:
        """Run a job, store how it ended, and return its status.

        A failure of the store goes up to the loop. The job is still ours then, and `_recover` requeues it.
        """
        from trainer.parallel import Paused
        from trainer.worker.run_job import run_job

        bound = log.bind(job=job.id)
        bound.info("job starts", images=job.dataset.images, attempt=job.attempts)
        try:
            with translated():
                run_job(job, settings=self.settings, jobs=self.jobs, registry=self.registry, servers=servers)
        except LeaseLost:
            self.jobs.finish(job, "cancelled")
        except ObjectStoreUnavailable as exc:  # which is waited for, as the store is
            bound.warning("the object store failed; trying again", reason=str(exc.__cause__))
            self.jobs.requeue(job)
            time.sleep(OBJECTS_PAUSE_S)
        except TemperError as exc:
            if isinstance(exc, StorageFull | StorageFailed):
                bound.error("the disk failed", reason=str(exc.__cause__))
            self.jobs.finish(job, "failed", error={"code": exc.code, "message": exc.message, "param": exc.param})
        except Paused:
            self.jobs.requeue(job)
        except Stopped:
            with suppress(*PASSING_FAILURES):  # then it looks like that of a dead worker, which it is
                self.jobs.requeue(job)
            raise
        except PASSING_FAILURES:
            raise
        except Exception:
            bound.exception("job crashed")
            message = "the trainer crashed; see the worker's log"
            self.jobs.finish(job, "failed", error={"code": "internal_error", "message": message, "param": None})
        status = self.jobs.get(job.id).status
        bound.info("job ended" if status in records.FINISHED else "job put back", status=status)
        if status in records.FINISHED:
            remove_tree(self.settings.checkpoints / job.id)
        return status

    def _continue_report(self) -> bool:
        """Work on an open report for a moment; False if there is none."""
        from trainer.worker.complete_report import complete_report

        if self._report is None:
            now = time.monotonic()
            resting = [job_id for job_id, (_, again_at) in self._failed_reports.items() if now < again_at]
            job = self.jobs.unreported(self.id, resting)
            if job is None:
                return False
            pieces = complete_report(job, settings=self.settings, jobs=self.jobs, registry=self.registry)
            self._report = job, pieces
        job, pieces = self._report
        bound = log.bind(job=job.id, model=public_name(job.model))
        self.state = "reporting"
        try:
            next(pieces)
        except StopIteration:
            self._report = None
            bound.info("report complete")
        except LeaseLost:
            self._report = None
            bound.info("another worker has taken over the report")
        except PASSING_FAILURES as exc:
            self._report = None
            bound.warning("the store failed; the report starts again", reason=reason(exc))
            self._failed_reports[job.id] = (0, time.monotonic() + STORE_PAUSE_S)
        except Exception:
            self._report = None
            failures = self._failed_reports.get(job.id, (0, 0.0))[0] + 1
            pause_s = REPORT_PAUSE_S if failures < REPORT_ATTEMPTS else float("inf")
            bound.exception("report crashed", attempt=failures, gives_up=failures >= REPORT_ATTEMPTS)
            self._failed_reports[job.id] = (failures, time.monotonic() + pause_s)
        return True


class _StoreContact:
    """Whether this worker's heartbeats have reached the store without a gap.

    When the store has been away, the heartbeats of all workers are old, and none of them need be dead.
    """

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._steady_since = float("-inf")

    def beat(self) -> None:
        if not self._recent():
            self._steady_since = time.monotonic()
        self._last = time.monotonic()

    def is_steady(self) -> bool:
        return self._recent() and time.monotonic() - self._steady_since > records.LOST_AFTER_S

    def _recent(self) -> bool:
        return time.monotonic() - self._last < records.LOST_AFTER_S / 2
