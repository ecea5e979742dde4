"""Data sets that clients keep apart from jobs: uploaded once, used by id, and deleted when nobody wants them any more.

A row is what a client knows of one; `datasets/<prepared>.npz` has the prepared images of a part,
`datasets/<upload>.upload` the bytes as they were sent. Both are named by their SHA-256, so rows share them. Whoever
keeps a data set moves its files into place first and adds its row afterwards; files that no row and no job needs are
swept by the worker, once they are an hour old.
"""

import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from store.engine import metadata, now
from store.errors import UnknownDataset, WrongState
from store.records import DEFAULT_TENANT, DatasetCard, DatasetReport
from trainer.jobs.records import needed_cards

datasets = sa.Table(
    "datasets",
    metadata,
    sa.Column("tenant", sa.String, primary_key=True, server_default=DEFAULT_TENANT),
    sa.Column("id", sa.String, primary_key=True),  # that of the content, or `file-…`
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Column("upload", sa.String, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),  # of the upload
    sa.Column("dataset", sa.JSON, nullable=False),
    sa.Column("report", sa.JSON, nullable=False),
)


@dataclass(frozen=True)
class Upload:
    """An upload whose files are in their place."""

    sha256: str  # of its bytes
    size_bytes: int
    dataset: DatasetCard
    report: DatasetReport


@dataclass(frozen=True)
class KeptDataset:
    """A data set that a client keeps. Times are Unix seconds."""

    id: str
    created_at: float
    expires_at: float | None
    upload: str  # SHA-256 of the bytes as they were uploaded
    size_bytes: int
    dataset: DatasetCard
    report: DatasetReport

    def card(self) -> DatasetCard:
        """The data set as a job's record names it."""
        return self.dataset.model_copy(update={"kept": self.id})


Also = Callable[[sa.Connection, KeptDataset, bool], None]


class Library:
    """Reads and writes the data sets that clients keep. What has expired is not there."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def keep(
        self, tenant: str, upload: Upload, *, anew: bool = False, expires_after_s: float | None = None,
        also: Also = lambda connection, kept, created: None,
    ) -> KeptDataset:  # fmt: skip
        """Keep an upload whose files are in their place.

        Args:
            anew: under an id of its own, `file-…`, which sorts by creation time. Otherwise the id is that of the
                content, and a data set that is kept already stays as it is, also the names of its images.
            also: called in the same transaction with the data set and whether it is new; raises to roll it back.
        """
        while True:
            try:
                with self._engine.begin() as connection:
                    return self._keep(connection, tenant, upload, anew, expires_after_s, also)
            except sa.exc.IntegrityError:  # another gateway has just kept the same content
                continue

    def _keep(
        self, connection: sa.Connection, tenant: str, upload: Upload, anew: bool, expires_after_s: float | None,
        also: Also,
    ) -> KeptDataset:  # fmt: skip
        content = (datasets.c.tenant == tenant) & (datasets.c.id == upload.dataset.content)
        # An update, as it locks the row until the transaction ends.
        found = datasets.update().where(content).values(id=datasets.c.id).returning(*_COLUMNS)
        row = None if anew else connection.execute(found).mappings().first()
        if row is not None:
            kept, created = _kept(row), False
        else:
            at = connection.execute(sa.select(now())).scalar_one()
            kept, created = KeptDataset(
                id=f"file-{int(at * 1000):011x}{secrets.token_hex(5)}" if anew else upload.dataset.content,
                created_at=at, expires_at=expires_after_s and at + expires_after_s, upload=upload.sha256,
                size_bytes=upload.size_bytes, dataset=upload.dataset, report=upload.report,
            ), True  # fmt: skip
            records = {"dataset": kept.dataset.dump(), "report": kept.report.dump()}
            connection.execute(datasets.insert().values(**{**vars(kept), **records}, tenant=tenant))
        also(connection, kept, created)
        return kept

    def get(self, tenant: str, id: str, param: str = "id") -> KeptDataset:
        """Return a data set.

        Raises:
            UnknownDataset: there is none with this id; `param` is to blame.
        """
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(*_COLUMNS).where(_is(tenant, id))).mappings().first()
        if row is None:
            raise _unknown(id, param)
        return _kept(row)

    def page(
        self, tenant: str, *, after: str | None, limit: int, oldest_first: bool = False
    ) -> tuple[list[KeptDataset], bool]:
        """Return up to `limit` data sets, newest first, that come after the one `after`; and whether there are more.

        Raises:
            UnknownDataset: there is none with the id `after`.
        """
        place = sa.tuple_(datasets.c.created_at, datasets.c.id)
        order = (datasets.c.created_at, datasets.c.id)
        query = sa.select(*_COLUMNS).where(datasets.c.tenant == tenant, _alive())
        query = query.order_by(*(column if oldest_first else column.desc() for column in order)).limit(limit + 1)
        if after is not None:
            last = self.get(tenant, after, "after")
            at = sa.tuple_(sa.literal(last.created_at), sa.literal(last.id))
            query = query.where(place > at if oldest_first else place < at)
        with self._engine.connect() as connection:
            found = [_kept(row) for row in connection.execute(query).mappings()]
        return found[:limit], len(found) > limit

    def delete(self, tenant: str, id: str) -> None:
        """Forget a data set; its files go when nothing else needs them.

        Raises:
            UnknownDataset: there is none with this id.
            WrongState: a job needs it.
        """
        with self._engine.begin() as connection:
            # First the deletion, which waits for jobs that are being created with it (`hold`), then the look at them.
            if not connection.execute(datasets.delete().where(_is(tenant, id))).rowcount:
                raise _unknown(id, "id")
            if any(part.kept == id for card in needed_cards(connection, tenant) for part in card.parts):
                raise WrongState("a job needs it whose report is not complete; wait for it or cancel it", param="id")

    def hold(self, connection: sa.Connection, tenant: str, ids: Collection[str]) -> None:
        """Make sure, in the transaction that creates a job with them, that data sets are still there at its end.

        Raises:
            UnknownDataset: one has been deleted meanwhile.
        """
        for name in ids:
            held = sa.select(datasets.c.id).where(_is(tenant, name)).with_for_update()
            if connection.execute(held).first() is None:
                raise _unknown(name, "dataset")

    def files(self) -> set[str]:
        """Return the names of the files in `datasets/` that are kept, and forget the data sets that have expired."""
        with self._engine.begin() as connection:
            connection.execute(datasets.delete().where(~_alive()))
            rows = connection.execute(sa.select(datasets.c.upload, datasets.c.dataset)).all()
        prepared = {part.file for row in rows for part in DatasetCard.read(row.dataset).parts}
        return prepared | {f"{row.upload}.upload" for row in rows}


_COLUMNS = [column for column in datasets.c if column is not datasets.c.tenant]


def _alive() -> sa.ColumnElement[bool]:
    return sa.or_(datasets.c.expires_at.is_(None), datasets.c.expires_at > now())


def _is(tenant: str, id: str) -> sa.ColumnElement[bool]:
    return (datasets.c.tenant == tenant) & (datasets.c.id == id) & _alive()


def _kept(row: Any) -> KeptDataset:
    return KeptDataset(
        **{**row, "dataset": DatasetCard.read(row["dataset"]), "report": DatasetReport.read(row["report"])}
    )


def _unknown(id: str, param: str) -> UnknownDataset:
    return UnknownDataset(f"there is no data set {id!r}", param=param)
