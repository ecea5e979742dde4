"""The registry: models, their versions with manifest and report card, and the labels that stand for versions.

A version is `publishing` from when its number is reserved until the model servers have proven that they serve it, then
`live`, and `removed` until its files are deleted. Numbers are never reused: a model server may refuse a number that has
failed once.

Every tenant has names of its own for its models. Here, in jobs, on disk and at the model servers a model goes by its
stored name: that of the model for the tenant `default`, and `tenant~model` for others. `~` is in neither name. What
clients see is the model's own name; messages of errors have it, too.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import sqlalchemy as sa

from store.changes import notify
from store.engine import insert_of, metadata, now, unpooled
from store.errors import GateFailed, InvalidRequest, ModelServerTimeout, UnknownModel, WrongState
from store.records import DEFAULT_TENANT, Abstention, Manifest, Override, ReportCard, owner_of, public_name
from store.validation import in_words
from store.webhooks import enqueue

BASE = "lenet5"  # the pretrained model, which every service has
STABLE = "stable"  # the label that a request without version or label follows
LABEL = in_words(r"^[a-z][a-z0-9_-]{0,63}$", "1 to 64 of the characters a-z, 0-9, '_' and '-', beginning with a letter")

models = sa.Table(
    "models",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("last_version", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("gate", sa.JSON(none_as_null=True)),  # conditions for its versions to get a label; null for the default
)
versions = sa.Table(
    "versions",
    metadata,
    sa.Column("model", sa.String, sa.ForeignKey("models.name"), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("live", sa.Boolean, nullable=False),
    sa.Column("removed", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("job_id", sa.String, index=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("manifest", sa.JSON, nullable=False),
)
_VERSION = ["versions.model", "versions.version"]
reports = sa.Table(
    "reports",
    metadata,
    sa.Column("model", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("report", sa.JSON, nullable=False),
    sa.ForeignKeyConstraint(["model", "version"], _VERSION, ondelete="CASCADE"),
)
labels = sa.Table(
    "labels",
    metadata,
    sa.Column("model", sa.String, primary_key=True),
    sa.Column("label", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("weight", sa.Float, nullable=False, server_default="0"),
    sa.ForeignKeyConstraint(["model", "version"], _VERSION),
)
revisions = sa.Table(  # one row, incremented by every change
    "revisions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("revision", sa.Integer, nullable=False),
)
_VERSIONS = (
    sa.select(*(column for column in versions.c if column is not versions.c.removed), reports.c.report)
    .join(reports)
    .order_by(versions.c.model, versions.c.version.desc())
)


def stored_name(tenant: str, model: str) -> str:
    """The name under which a tenant's model is stored. The base model is everyone's.

    No `model`, whatever a client has put into a URL, gives the stored name of another tenant's.
    """
    if model == BASE or (tenant == DEFAULT_TENANT and "~" not in model):
        return model
    return f"{tenant}~{model}"


def is_visible(tenant: str, stored: str) -> bool:
    """Tell whether a stored model is the tenant's, or everyone's."""
    return stored == stored_name(tenant, public_name(stored))


@dataclass(frozen=True)
class Version:
    """A version of a model. `manifest` is also in its directory; `report` is its report card."""

    model: str
    version: int
    live: bool
    job_id: str | None
    created_at: float  # unix seconds
    manifest: Manifest
    report: ReportCard


@dataclass(frozen=True)
class Label:
    """A version with a name, and its share of the requests that name neither version nor label."""

    version: int
    weight: float = 0.0  # in [0, 1]; `stable` gets what is left


@dataclass(frozen=True)
class Route:
    """Live versions of one model with their class names, and its labels."""

    classes: dict[int, tuple[str, ...]] = field(default_factory=dict)
    labels: dict[str, Label] = field(default_factory=dict)
    abstention: dict[int, Abstention] = field(default_factory=dict)  # of the versions that have a detector


# Called in the transaction of a change; raises to roll it back, because the caller may no longer make it.
Fence = Callable[[sa.Connection], object]


class Registry:
    """Reads and writes the registry's tables."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @contextmanager
    def _change(self, fence: Fence = lambda _: None) -> Iterator[sa.Connection]:
        """A transaction that changes the registry; transactions run one after another."""
        with self._engine.begin() as connection:
            connection.execute(_count(connection.dialect.name))  # locks the row until the transaction ends
            fence(connection)
            yield connection
            notify(connection, "registry")

    def revision(self) -> int:
        """A number that every change increments."""
        with self._engine.connect() as connection:
            return connection.execute(sa.select(revisions.c.revision)).scalar_one_or_none() or 0

    def exclusive(self, task: str, timeout_s: float | None) -> contextlib.AbstractContextManager[None] | None:
        """A lock that one process at a time holds; None for SQLite, which has none, and only one machine.

        Entering it raises `ModelServerTimeout` if it is not free within `timeout_s`.
        """
        return _Exclusive(self._engine, task, timeout_s) if self._engine.dialect.name == "postgresql" else None

    def clock(self) -> float:
        """The time that `created_at` is measured in, Unix seconds."""
        with self._engine.connect() as connection:
            return connection.execute(sa.select(now())).scalar_one()

    def reserve(
        self, model: str, job_id: str | None, manifest: Manifest, report: ReportCard, fence: Fence = lambda _: None
    ) -> int:
        """Record a new version as `publishing`; returns its number."""
        with self._change(fence) as connection:
            insert: Any = insert_of(connection.dialect.name)(models).values(
                name=model, last_version=1, created_at=now()
            )
            insert = insert.on_conflict_do_update(
                index_elements=["name"], set_={"last_version": models.c.last_version + 1}
            )
            number = connection.execute(insert.returning(models.c.last_version)).scalar_one()
            row = {"model": model, "version": number, "live": False, "job_id": job_id, "created_at": now()}
            connection.execute(versions.insert().values(**row, manifest=manifest.dump()))
            connection.execute(reports.insert().values(model=model, version=number, report=report.dump()))
        return int(number)

    def go_live(
        self, model: str, version: int, label: str = STABLE, *, report: ReportCard | None = None,
        takes_label: Callable[[int | None], bool] = lambda stable: True, fence: Fence = lambda _: None,
    ) -> None:  # fmt: skip
        """Make a proven version live and point `label` at it; a model's first version becomes `stable` too.

        Args:
            report: replaces its report card.
            takes_label: called in the transaction with the version that `stable` stands for, or None; tells whether
                the version gets labels, or raises to roll back.

        Raises:
            WrongState: the version has been withdrawn.
        """
        with self._change(fence) as connection:
            waiting = versions.update().where(_is(model, version), ~versions.c.removed)
            if not connection.execute(waiting.values(live=True)).rowcount:
                raise WrongState(f"{public_name(model)}:{version} has been withdrawn", param="version")
            if report:
                _put_report(connection, model, version, report)
            stable = _labels(connection, model).get(STABLE)
            if takes_label(stable.version if stable else None):
                _put_label(connection, model, label, version)
                if label != STABLE and stable is None:
                    _put_label(connection, model, STABLE, version)

    def set_report(self, model: str, version: int, report: ReportCard, fence: Fence = lambda _: None) -> None:
        """Replace the report card of a version, but for its gate, in which overrides may have been noted meanwhile."""
        with self._change(fence) as connection:
            if (before := _report_of(connection, model, version)) and before.gate:
                report = report.model_copy(update={"gate": before.gate})
            _put_report(connection, model, version, report)

    def put_label(
        self, model: str, label: str, version: int, weight: float | None = None, *, override: bool = False
    ) -> Label:
        """Point a label at a live version.

        Args:
            weight: its share of the requests that name neither version nor label; None keeps the one it has.
            override: also if the gate of the version has failed, which its report card then notes.

        Raises:
            UnknownModel: there is no such version.
            GateFailed: its gate has failed.
            InvalidRequest: the weights add up to more than 1, or `stable`, which gets what is left, was given one.
        """
        if weight and label == STABLE:
            raise InvalidRequest(f"weight: {STABLE!r} gets what the other labels leave; omit it", param="weight")
        with self._change() as connection:
            live = sa.select(versions.c.version).where(versions.c.model == model, versions.c.live)
            known = set(connection.execute(live).scalars())
            _check_version(model, version, known)
            before = _labels(connection, model).get(label)
            overrides = False
            if before is None or before.version != version:  # otherwise only the weight changes
                overrides = _pass_gate(connection, model, version, label, override)
            others = (other.weight for name, other in _labels(connection, model).items() if name != label)
            shares = (weight or 0.0) + sum(others)
            if shares > 1 + 1e-9:
                text = f"weight: the labels of {public_name(model)!r} would get {shares:g} of 1"
                raise InvalidRequest(text, param="weight")
            _put_label(connection, model, label, version, weight, overrides)
            return _labels(connection, model)[label]

    def drop_label(self, model: str, label: str) -> None:
        """Remove a label.

        Raises:
            UnknownModel: the model has no such label.
            WrongState: it is `stable`, which can only be moved.
        """
        if label == STABLE:
            raise WrongState(f"{STABLE!r} can only be moved", param="label")
        with self._change() as connection:
            row = (labels.c.model == model) & (labels.c.label == label)
            before = connection.execute(labels.delete().where(row).returning(labels.c.version)).scalar_one_or_none()
            if before is None:
                raise UnknownModel(f"model {public_name(model)!r} has no label {label!r}", param="label")
            _announce(connection, model, label, before, None)

    def retire(self, model: str, version: int | None = None, *, last_too: bool = False) -> list[int]:
        """Remove a live version that has no label, or all versions and labels of a model.

        Args:
            last_too: with the last live version the whole model goes, labels and all.

        Returns:
            The numbers of the removed versions, ascending.

        Raises:
            UnknownModel: there is no such model or version.
            WrongState: the version has a label, or the model is the base model.
        """
        if model == BASE:
            raise WrongState(f"{BASE!r} is what fine-tunes start from", param="model")
        with self._change() as connection:
            live = (versions.c.model == model) & versions.c.live
            known = set(connection.execute(sa.select(versions.c.version).where(live)).scalars())
            if not known:
                raise UnknownModel(f"there is no model {public_name(model)!r}", param="model")
            if version is None or (last_too and known == {version}):
                gone = _labels(connection, model)
                connection.execute(labels.delete().where(labels.c.model == model))
                connection.execute(models.update().where(models.c.name == model).values(gate=None))
                for name, label in gone.items():
                    _announce(connection, model, name, label.version, None)
            else:
                _check_version(model, version, known)
                names = [name for name, label in _labels(connection, model).items() if label.version == version]
                if names:
                    text = f"{public_name(model)}:{version} is labelled {' and '.join(names)}; move the label first"
                    raise WrongState(text, param="version")
                live &= versions.c.version == version
            connection.execute(versions.update().where(live).values(live=False, removed=True))
        return sorted(known if version is None else {version})

    def remove(self, model: str, version: int, fence: Fence = lambda _: None) -> None:
        """Mark a version that did not go live as removed."""
        with self._change(fence) as connection:
            row = _is(model, version) & ~versions.c.live
            connection.execute(versions.update().where(row).values(removed=True))

    def removed(self) -> list[tuple[str, int]]:
        """Removed versions whose files have not been deleted."""
        with self._engine.connect() as connection:
            query = sa.select(versions.c.model, versions.c.version).where(versions.c.removed)
            return [(row.model, row.version) for row in connection.execute(query)]

    def recorded(self) -> set[tuple[str, int]]:
        """All versions of which there is a record: see `is_recorded`."""
        with self._engine.connect() as connection:
            found = connection.execute(sa.select(versions.c.model, versions.c.version))
            return {(row.model, row.version) for row in found}

    def last_versions(self) -> dict[str, int]:
        """The highest number that a version of each model has ever had."""
        with self._engine.connect() as connection:
            found = connection.execute(sa.select(models.c.name, models.c.last_version))
            return {row.name: row.last_version for row in found}

    def is_recorded(self, model: str, version: int) -> bool:
        """Tell whether there is a record of a version: it is live or being published, or its files have to go."""
        with self._engine.connect() as connection:
            return connection.execute(sa.select(versions.c.version).where(_is(model, version))).first() is not None

    def forget(self, model: str, version: int) -> None:
        """Delete the record of a removed version after its files."""
        with self._change() as connection:
            connection.execute(versions.delete().where(_is(model, version), versions.c.removed))

    def surplus(self, model: str, keep: int) -> list[int]:
        """Live versions that have no label and are not among the newest `keep`."""
        route = self.routes().get(model, Route())
        labelled = {label.version for label in route.labels.values()}
        return [version for version in sorted(route.classes)[:-keep] if version not in labelled]

    def publishing(self) -> list[Version]:
        """Versions that are neither live nor removed, by model, newest first."""
        return self._select(~versions.c.live & ~versions.c.removed)

    def of_job(self, job_id: str) -> list[Version]:
        """Versions that a job has published or is publishing."""
        return self._select((versions.c.job_id == job_id) & ~versions.c.removed)

    def of_model(self, model: str) -> list[Version]:
        """Live versions of a model, newest first."""
        found = self._select((versions.c.model == model) & versions.c.live)
        if not found:
            raise UnknownModel(f"there is no model {public_name(model)!r}", param="model")
        return found

    def find(self, model: str, version: int | None = None) -> Version:
        """A live version, by default the one labelled `stable`."""
        if version is None:
            version = self.labels(model).get(STABLE, Label(0)).version
        found = self._select(_is(model, version) & versions.c.live)
        if not found:
            _check_version(model, version, {other.version for other in self.of_model(model)})
        return found[0]

    def labels(self, model: str) -> dict[str, Label]:
        """Labels of a model."""
        with self._engine.connect() as connection:
            return _labels(connection, model)

    def stable(self, model: str) -> Version | None:
        """The version labelled `stable`, if there is one."""
        labelled = sa.exists().where(
            labels.c.model == versions.c.model, labels.c.version == versions.c.version, labels.c.label == STABLE
        )
        return next(iter(self._select((versions.c.model == model) & labelled)), None)

    def gate(self, model: str) -> dict[str, Any] | None:
        """The gate of a model, as JSON values; None if it has none, or there is no such model."""
        with self._engine.connect() as connection:
            return connection.execute(sa.select(models.c.gate).where(models.c.name == model)).scalar_one_or_none()

    def set_gate(self, model: str, gate: dict[str, Any] | None) -> None:
        """Give a model a gate, as JSON values, or take it away. It is for the versions to come.

        Raises:
            UnknownModel: there is no such model.
        """
        live = sa.exists().where(versions.c.model == model, versions.c.live)
        with self._change() as connection:
            if not connection.execute(models.update().where(models.c.name == model, live).values(gate=gate)).rowcount:
                raise UnknownModel(f"there is no model {public_name(model)!r}", param="model")

    def has_live(self, model: str) -> bool:
        """Tell whether the model has a live version."""
        found = sa.select(sa.literal(1)).where((versions.c.model == model) & versions.c.live).limit(1)
        with self._engine.connect() as connection:
            return connection.execute(found).first() is not None

    def live(self) -> list[Version]:
        """Every live version, by model, newest first."""
        return self._select(versions.c.live)

    def creations(self) -> list[tuple[str, int, float]]:
        """Model, version and time of creation of every live version, newest first."""
        columns = (versions.c.model, versions.c.version, versions.c.created_at)
        query = sa.select(*columns).where(versions.c.live).order_by(versions.c.created_at.desc(), *columns[:2])
        with self._engine.connect() as connection:
            return [(row.model, row.version, row.created_at) for row in connection.execute(query)]

    def wanted(self) -> dict[str, list[int]]:
        """Versions that model servers should load, by model: the live ones and those being published.

        In the order in which they should be loaded: the base model before others, labelled versions before newer ones.
        """
        labelled = sa.exists().where(labels.c.model == versions.c.model, labels.c.version == versions.c.version)
        query = (
            sa.select(versions.c.model, versions.c.version)
            .where(~versions.c.removed)
            .order_by(versions.c.model != BASE, versions.c.model, ~labelled, versions.c.version.desc())
        )
        found: dict[str, list[int]] = {}
        with self._engine.connect() as connection:
            for model, version in connection.execute(query):
                found.setdefault(model, []).append(version)
        return found

    def routes(self) -> dict[str, Route]:
        """The route of every model that has a live version."""
        with self._engine.connect() as connection:
            # Labels first: a version that gets a label between the two queries is live, so the second one finds it.
            names = connection.execute(sa.select(labels)).all()
            about = (versions.c.manifest[name] for name in ("classes", "abstention"))
            columns = (versions.c.model, versions.c.version, *about)
            rows = connection.execute(sa.select(*columns).where(versions.c.live)).all()
        routes: dict[str, Route] = {}
        for model, version, classes, abstention in rows:
            route = routes.setdefault(model, Route())
            route.classes[version] = tuple(classes)
            if abstention:
                route.abstention[version] = Abstention.read(abstention)
        for model, label, version, weight in names:
            if model in routes and version in routes[model].classes:  # unless removed between the queries
                routes[model].labels[label] = Label(version, weight)
        return routes

    def _select(self, condition: Any) -> list[Version]:
        with self._engine.connect() as connection:
            rows = connection.execute(_VERSIONS.where(condition)).mappings().all()
        read = {"manifest": Manifest.read, "report": ReportCard.read}
        return [Version(**{**row, **{name: record(row[name]) for name, record in read.items()}}) for row in rows]


def _is(model: str, version: int) -> Any:
    return (versions.c.model == model) & (versions.c.version == version)


def _check_version(model: str, version: int, known: set[int]) -> None:
    if version not in known:
        if not known:
            raise UnknownModel(f"there is no model {public_name(model)!r}", param="model")
        raise UnknownModel(f"model {public_name(model)!r} has no version {version}", param="version")


def _labels(connection: sa.Connection, model: str) -> dict[str, Label]:
    rows = connection.execute(sa.select(labels).where(labels.c.model == model))
    return {row.label: Label(row.version, row.weight) for row in rows}


def _put_report(connection: sa.Connection, model: str, version: int, report: ReportCard) -> None:
    of_version = (reports.c.model == model) & (reports.c.version == version)
    connection.execute(reports.update().where(of_version).values(report=report.dump()))


def _report_of(connection: sa.Connection, model: str, version: int) -> ReportCard | None:
    of_version = (reports.c.model == model) & (reports.c.version == version)
    stored = connection.execute(sa.select(reports.c.report).where(of_version)).scalar_one_or_none()
    return None if stored is None else ReportCard.read(stored)


def _pass_gate(connection: sa.Connection, model: str, version: int, label: str, override: bool) -> bool:
    """Whether a label is given to a version only by an override, which is noted in its report card."""
    report = _report_of(connection, model, version)
    if report is None or report.gate is None or report.gate.passed:
        return False
    gate = report.gate
    if not override:
        raise GateFailed(
            f"the gate of {public_name(model)}:{version} has failed: {'; '.join(gate.reasons)}. To move {label!r} "
            "there all the same, send `override: true`",
            param="override", details=[{"condition": one.condition, "reason": one.message} for one in gate.conditions
                                       if not one.passed],
        )  # fmt: skip
    given = Override(label=label, at=connection.execute(sa.select(now())).scalar_one())
    noted = gate.model_copy(update={"overrides": [*gate.overrides, given]})
    _put_report(connection, model, version, report.model_copy(update={"gate": noted}))
    return True


def _put_label(
    connection: sa.Connection, model: str, label: str, version: int, weight: float | None = None,
    overrides: bool = False,
) -> None:  # fmt: skip
    """Move a label; without a weight it keeps the one that it has."""
    before = _labels(connection, model).get(label)
    row: Any = insert_of(connection.dialect.name)(labels).values(
        model=model, label=label, version=version, weight=weight or 0.0
    )
    moved = {"version": version} | ({} if weight is None else {"weight": weight})
    connection.execute(row.on_conflict_do_update(index_elements=["model", "label"], set_=moved))
    _announce(connection, model, label, before.version if before else None, version, overrides)


def _announce(
    connection: sa.Connection, model: str, label: str, old: int | None, new: int | None, overrides: bool = False
) -> None:
    """Tell the endpoints that a label stands for another version; None for none."""
    if old != new:
        data = {"model": public_name(model), "label": label, "from": old, "to": new}
        data |= {"override": True} if overrides else {}
        enqueue(connection, "model.label.moved", data, owner_of(model))


class _Exclusive:
    """An advisory lock of PostgreSQL, which ends with its transaction or its process."""

    def __init__(self, engine: sa.Engine, task: str, timeout_s: float | None) -> None:
        self._engine, self._task, self._timeout_s = engine, task, timeout_s

    def __enter__(self) -> None:
        # Outside the pool: whoever holds the lock needs connections that those who wait for it must not have.
        self._connection = unpooled(self._engine).connect()
        try:
            number = int.from_bytes(sha256(self._task.encode()).digest()[:8], signed=True)
            self._connection.execute(sa.text(f"SET LOCAL lock_timeout = {int(1000 * (self._timeout_s or 0))}"))
            self._connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.cast(number, sa.BigInteger))))
        except sa.exc.DBAPIError as exc:
            self._connection.close()
            if getattr(exc.orig, "sqlstate", None) == "55P03":
                text = f"{self._task}: another process has held the lock for {self._timeout_s:g} s"
                raise ModelServerTimeout(text) from exc
            raise
        except BaseException:
            self._connection.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._connection.close()


@functools.cache
def _count(dialect: str) -> Any:
    """The statement that increments the revision, or begins it."""
    first = insert_of(dialect)(revisions).values(id=1, revision=1)
    return first.on_conflict_do_update(index_elements=["id"], set_={"revision": revisions.c.revision + 1})
