"""`temper mirror`: keeps the files of published versions on a model server's machine that shares no directory.

Where versions are exchanged through an object store (`TEMPER_OBJECTS`), workers publish into it, and a model server
reads a directory. A mirror beside the model server fetches what the registry names, also versions that are about to be
proven, and deletes what it no longer names.
"""

import importlib.util
import os
import signal
import time
from contextlib import suppress

import click
import structlog

from serving.registry import Registry
from store import logging
from store.disk import translated
from store.engine import PASSING_FAILURES, connect
from store.errors import StorageFailed, StorageFull, StoreUnavailable
from store.files import remove_tree
from store.health import Notice
from store.objects import objects_of
from store.settings import Settings, from_environment, warn_of_unknown_variables

LOOK_S = 0.2  # a publication waits for this
LONGEST_PAUSE_S = 5.0  # after failures

log: structlog.stdlib.BoundLogger = structlog.get_logger("temper.mirror")


class Stopped(BaseException):
    """The process was asked to end."""


@click.command()
def main() -> None:
    """Keep published versions on this machine's disk. Settings are read from TEMPER_* environment variables."""
    logging.configure("mirror")
    warn_of_unknown_variables(os.environ)
    try:
        settings = from_environment()
        if not settings.objects:
            raise ValueError("TEMPER_OBJECTS is not set: all machines share the home, and there is nothing to mirror")
        if importlib.util.find_spec("s3fs") is None:
            raise ValueError("TEMPER_OBJECTS needs s3fs: pip install 'temper[s3]'")
        settings.make_home()
        registry = Registry(connect(settings.store_url))
    except (ValueError, OSError) as exc:
        logging.fail("temper mirror", str(exc))
    except StoreUnavailable as exc:
        logging.fail("temper mirror", exc.message)

    def stop(*_: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with suppress(Stopped):
        run(settings, registry)


def run(settings: Settings, registry: Registry) -> None:
    """Mirror until `Stopped` is raised."""
    reading, fetching = Notice("reading the registry"), Notice("fetching versions")
    log.info("mirrors", objects=settings.objects, models=str(settings.models))
    revision, missing, pause_s = -1, set[tuple[str, int]](), LOOK_S
    while True:
        try:
            now = registry.revision()
            if now != revision:
                missing = {(model, version) for model, versions in registry.wanted().items() for version in versions}
                remove_others(settings, registry)
                objects_of(settings).sweep()
                revision, pause_s = now, LOOK_S
            reading.worked()
        except PASSING_FAILURES as exc:
            reading.failed(exc)
        failures = fetch(settings, missing)
        if failures:
            model, version = min(failures)
            fetching.failed(type(failures[model, version])(f"{model}:{version}: {failures[model, version]}"))
        else:
            fetching.worked()
        # What is about to be published is not shared yet, and soon will be: with the next change at the latest.
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S if failures else 1.0) if missing else LOOK_S
        time.sleep(pause_s)


def fetch(settings: Settings, missing: set[tuple[str, int]]) -> dict[tuple[str, int], StorageFailed | StorageFull]:
    """Fetch versions, and take those that are here now out of `missing`; what is wrong with the others, if anything."""
    failures: dict[tuple[str, int], StorageFailed | StorageFull] = {}
    for model, version in sorted(missing):
        place = settings.version(model, version)
        try:
            with translated():
                if objects_of(settings).fetch(place).is_dir():
                    missing.discard((model, version))
        except (StorageFailed, StorageFull) as exc:
            failures[model, version] = exc
    return failures


def remove_others(settings: Settings, registry: Registry) -> None:
    """Delete the files of versions that this registry has had and that it has no record of any more."""
    found = [(place.parent.name, place) for place in settings.models.glob("*/[0-9]*") if place.name.isdecimal()]
    recorded, last = registry.recorded(), registry.last_versions()
    for model, place in found:
        # A number above the last one, or a model without any, is of another registry: somebody else's to delete.
        if (model, int(place.name)) not in recorded and int(place.name) <= last.get(model, 0):
            remove_tree(place)


if __name__ == "__main__":
    main()
