"""The registry: which models and versions exist, which of them is current, and what is known of each.

A version is `publishing` from the moment its number is given until the model server has proven that it serves it,
then `live`. Numbers are never given twice, for a model server may refuse a number that has failed once.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from serving.errors import UnknownModel
from serving.store import metadata

BASE = "lenet5"  # the pretrained model, which every service has
STABLE = "stable"  # the label that a request without version or label follows

models = sa.Table(
    "models",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("last_version", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)
versions = sa.Table(
    "versions",
    metadata,
    sa.Column("model", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("live", sa.Boolean, nullable=False),
    sa.Column("job_id", sa.String, index=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("manifest", sa.JSON, nullable=False),
    sa.Column("report", sa.JSON, nullable=False),
)
labels = sa.Table(
    "labels",
    metadata,
    sa.Column("model", sa.String, primary_key=True),
    sa.Column("label", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
)


@dataclass(frozen=True)
class Version:
    """A version of a model. `manifest` is also in its directory; `report` says how good it is."""

    model: str
    version: int
    live: bool
    job_id: str | None
    created_at: float  # unix seconds
    manifest: dict[str, Any]
    report: dict[str, Any]


class Registry:
    """Reads and writes the registry's tables."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def reserve(self, model: str, job_id: str | None, manifest: Mapping[str, Any], report: Mapping[str, Any]) -> int:
        """Number of a new version, which is `publishing` from now on."""
        now = time.time()
        with self._engine.begin() as connection:
            insert: Any = _insert(connection)(models).values(name=model, last_version=1, created_at=now)
            insert = insert.on_conflict_do_update(
                index_elements=["name"], set_={"last_version": models.c.last_version + 1}
            )
            number = connection.execute(insert.returning(models.c.last_version)).scalar_one()
            row = {"model": model, "version": number, "live": False, "job_id": job_id, "created_at": now}
            connection.execute(versions.insert().values(**row, manifest=dict(manifest), report=dict(report)))
        return int(number)

    def go_live(self, model: str, version: int) -> None:
        """The version is proven: requests that name none get it from now on."""
        with self._engine.begin() as connection:
            row = (versions.c.model == model) & (versions.c.version == version)
            connection.execute(versions.update().where(row).values(live=True))
            label: Any = _insert(connection)(labels).values(model=model, label=STABLE, version=version)
            connection.execute(
                label.on_conflict_do_update(index_elements=["model", "label"], set_={"version": version})
            )

    def set_report(self, model: str, version: int, report: Mapping[str, Any]) -> None:
        """What is known of a version by now."""
        with self._engine.begin() as connection:
            row = (versions.c.model == model) & (versions.c.version == version)
            connection.execute(versions.update().where(row).values(report=dict(report)))

    def withdraw(self, model: str, version: int) -> None:
        """Forget a version that did not go live."""
        with self._engine.begin() as connection:
            row = (versions.c.model == model) & (versions.c.version == version) & ~versions.c.live
            connection.execute(versions.delete().where(row))

    def of_job(self, job_id: str) -> list[Version]:
        """Versions that a job has made, live or not."""
        return self._select(versions.c.job_id == job_id)

    def of_model(self, model: str) -> list[Version]:
        """Live versions of a model, newest first."""
        found = self._select((versions.c.model == model) & versions.c.live)
        if not found:
            raise UnknownModel(f"there is no model {model!r}", param="model")
        return found

    def find(self, model: str, version: int | None = None) -> Version:
        """A live version; without a number the one labelled `stable`."""
        number = self.labels(model).get(STABLE) if version is None else version
        for candidate in self.of_model(model):
            if candidate.version == number:
                return candidate
        raise UnknownModel(f"model {model!r} has no version {number}", param="version")

    def labels(self, model: str) -> dict[str, int]:
        """Labels of a model and the versions that they stand for."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(labels.c.label, labels.c.version).where(labels.c.model == model))
            return {row.label: row.version for row in rows}

    def has_live(self, model: str) -> bool:
        """Tell whether the model has a live version."""
        return any(version.live for version in self._select(versions.c.model == model))

    def live(self) -> list[Version]:
        """Every live version, by model, newest first."""
        return self._select(versions.c.live)

    def all(self) -> list[Version]:
        """Every version that a model server has to load: the live ones and those being published."""
        return self._select(sa.true())

    def routes(self) -> dict[str, "Route"]:
        """Where predictions go, for every model."""
        with self._engine.connect() as connection:
            # Labels first: what they stand for is live by then, and stays so until the versions are read.
            names = connection.execute(sa.select(labels)).all()
            columns = (versions.c.model, versions.c.version, versions.c.manifest["classes"])
            rows = connection.execute(sa.select(*columns).where(versions.c.live)).all()
        routes: dict[str, Route] = {}
        for model, version, classes in rows:
            routes.setdefault(model, Route({}, {})).classes[version] = tuple(classes)
        for model, label, version in names:
            routes[model].labels[label] = version
        return routes

    def _select(self, condition: Any) -> list[Version]:
        query = sa.select(versions).where(condition).order_by(versions.c.model, versions.c.version.desc())
        with self._engine.connect() as connection:
            return [Version(**row) for row in connection.execute(query).mappings()]


@dataclass(frozen=True)
class Route:
    """Live versions of one model with their class names, and its labels."""

    classes: dict[int, tuple[str, ...]]
    labels: dict[str, int]


def _insert(connection: sa.Connection) -> Any:
    """The dialect's INSERT that knows ON CONFLICT."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as postgresql

        return postgresql
    from sqlalchemy.dialects.sqlite import insert as sqlite

    return sqlite
