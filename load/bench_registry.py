"""`python -m load.bench_registry`: what a registry with many models costs, which every gateway keeps in memory.

For 10 to 10,000 models of two versions each: the time to read all routes, which a gateway does after every change, the
list that a model server is configured with, and the change of a label. Without `--store` a SQLite file of its own.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import sqlalchemy as sa

from serving.pb import model_server_pb2 as pb
from serving.registry import Registry, labels, models, reports, versions
from store.engine import connect
from store.records import Manifest, ReportCard

ROUNDS = 5
SIZES = (10, 100, 1_000, 10_000)


@click.command()
@click.option("--store", help="URL of an empty database, such as one of PostgreSQL.  [default: SQLite]")
@click.option("--rounds", type=click.IntRange(1), default=ROUNDS, show_default=True)
def main(store: str | None, rounds: int) -> None:
    """Measure the registry with more and more models."""
    with tempfile.TemporaryDirectory() as folder:
        engine = connect(store or f"sqlite:///{Path(folder) / 'temper.db'}")
        registry = Registry(engine)
        with engine.connect() as connection:
            if connection.execute(sa.select(sa.func.count()).select_from(models)).scalar_one():
                raise click.ClickException("--store: there are models in it; this needs an empty database")
        print(
            "| models | read all routes | configure a model server | request of | move a label |\n|---|---|---|---|---|"
        )
        before = 0
        for size in SIZES:
            _fill(engine, before, size)
            before = size
            routes_s = _median_s(registry.routes, rounds)
            configured_s = _median_s(lambda: _configuration(registry), rounds)
            moved_s = _median_s(lambda: registry.put_label("m1", "canary", 1), rounds)
            size_kb = _configuration(registry).ByteSize() / 1e3
            print(
                f"| {size:,} | {1e3 * routes_s:.1f} ms | {1e3 * configured_s:.1f} ms | {size_kb:,.0f} KB "
                f"| {1e3 * moved_s:.1f} ms |", flush=True,
            )  # fmt: skip
        engine.dispose()


def _fill(engine: sa.Engine, begin: int, end: int) -> None:
    """Add live models of two versions."""
    manifest, report = Manifest(classes=tuple("0123456789")).dump(), ReportCard().dump()
    new = [f"m{number}" for number in range(begin, end)]
    both = [{"model": model, "version": version} for model in new for version in (1, 2)]
    with engine.begin() as connection:
        connection.execute(models.insert(), [{"name": name, "last_version": 2, "created_at": 0.0} for name in new])
        live = {"live": True, "created_at": 0.0, "manifest": manifest}
        connection.execute(versions.insert(), [{**each, **live} for each in both])
        connection.execute(reports.insert(), [{**each, "report": report} for each in both])
        connection.execute(labels.insert(), [{"model": name, "label": "stable", "version": 2} for name in new])


def _configuration(registry: Registry) -> "pb.ReloadConfigRequest":
    """What a model server is told when something changes."""
    request = pb.ReloadConfigRequest()
    for model, wanted in registry.wanted().items():
        config = request.config.model_config_list.config.add(
            name=model, base_path=f"/var/lib/temper/models/{model}", model_platform="tensorflow"
        )
        config.model_version_policy.specific.versions.extend(wanted)
    return request


def _median_s(call: Callable[[], object], rounds: int) -> float:
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return median(found)


if __name__ == "__main__":
    main()
