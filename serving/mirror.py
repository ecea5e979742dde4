"""`temper mirror`: keeps the files of published versions on a model server's machine that shares no directory.

Where versions are exchanged through an object store (`TEMPER_OBJECTS`), workers publish into it, and a model server
reads a directory. A mirror beside the model server fetches what the registry names, also versions that are about to be
proven, and deletes what it no longer names.
"""

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
    mirroring, revision = Notice("mirroring"), -1
    log.info("mirrors", objects=settings.objects, models=str(settings.models))
    while True:
        try:
            now = registry.revision()
            if now != revision:
                with translated():
                    complete = mirror(settings, registry)
                revision = now if complete else -1  # a version that is not shared yet is about to be
            mirroring.worked()
        except (*PASSING_FAILURES, StorageFailed, StorageFull) as exc:
            mirroring.failed(exc)
            time.sleep(1.0)
        time.sleep(LOOK_S)


def mirror(settings: Settings, registry: Registry) -> bool:
    """Fetch the versions that the registry names and delete the others; False if one could not be had yet."""
    named = {(model, version) for model, versions in registry.wanted().items() for version in versions}
    named |= {(version.model, version.version) for version in registry.publishing()}
    for model, version in sorted(named):
        objects_of(settings).fetch(settings.version(model, version))
    remove_others(settings, registry)
    return all(settings.version(model, version).is_dir() for model, version in named)


def remove_others(settings: Settings, registry: Registry) -> None:
    """Delete the files of versions of which there is no record any more."""
    for place in settings.models.glob("*/[0-9]*"):
        if not registry.is_recorded(place.parent.name, int(place.name)):
            remove_tree(place)


if __name__ == "__main__":
    main()
