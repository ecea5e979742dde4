"""Feedback of users: predictions whose images are kept for an hour, and corrections to learn from.

A correction is an image with the class that a version named and the right one. Each model keeps a bounded number.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa

from store.engine import insert_of, metadata, now
from store.errors import InvalidRequest, UnknownCorrection, UnknownPrediction

KEPT_S = 3600.0  # how long the images of a prediction are kept
MOST = 1000  # of a tenant's predictions
IMAGES = 16  # of a prediction that can be corrected

predictions = sa.Table(
    "predictions",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("model", sa.String, nullable=False),  # stored name
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("images", sa.LargeBinary, nullable=False),  # n times 784 bytes
    sa.Column("labels", sa.JSON, nullable=False),  # the answers
    sa.Column("classes", sa.JSON, nullable=False),
    sa.Index("ix_predictions_tenant", "tenant", "created_at"),
)
corrections = sa.Table(
    "corrections",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("predicted", sa.String, nullable=False),
    sa.Column("label", sa.String, nullable=False),
    sa.Column("image", sa.LargeBinary, nullable=False),
    sa.Index("ix_corrections_model", "model", "tenant", "created_at"),
)


@dataclass(frozen=True)
class Correction:
    """An image that was taken for another class."""

    id: str
    model: str  # stored name
    version: int
    created_at: float  # Unix seconds
    predicted: str
    label: str
    image: np.ndarray  # (28, 28) uint8


class Feedback:
    """Reads and writes predictions and corrections.

    Args:
        most: corrections of a model that a tenant keeps; the oldest are deleted.
    """

    def __init__(self, engine: sa.Engine, most: int) -> None:
        self._engine, self._most = engine, most

    def keep(
        self, tenant: str, model: str, version: int, classes: Sequence[str], labels: Sequence[str], images: np.ndarray
    ) -> str:
        """Keep a prediction for an hour, so that it can be corrected; returns its id.

        Args:
            model: its stored name.
            labels: the answers.
            images: (n, 784) uint8.
        """
        name = f"pred-{secrets.token_hex(10)}"
        of_tenant = predictions.c.tenant == tenant
        newest = (
            sa.select(predictions.c.created_at).where(of_tenant).order_by(predictions.c.created_at.desc())
            .offset(MOST - 1).limit(1)
        )  # fmt: skip
        with self._engine.begin() as connection:
            at = connection.execute(sa.select(now())).scalar_one()
            least = max(at - KEPT_S, connection.execute(newest).scalar() or 0.0)
            connection.execute(predictions.delete().where(of_tenant, predictions.c.created_at <= least))
            connection.execute(
                predictions.insert().values(
                    id=name, tenant=tenant, model=model, version=version, created_at=at, images=images.tobytes(),
                    labels=list(labels), classes=list(classes),
                )
            )  # fmt: skip
        return name

    def correct(self, tenant: str, prediction: str, index: int, label: str) -> Correction:
        """Note the right class of an image of a prediction, in place of an earlier correction of it.

        Raises:
            UnknownPrediction: there is none with this id, or not any more.
            InvalidRequest: it has no such image, or its version no such class.
        """
        query = sa.select(predictions).where(
            predictions.c.id == prediction, predictions.c.tenant == tenant, predictions.c.created_at > now() - KEPT_S
        )
        with self._engine.begin() as connection:
            row = connection.execute(query).first()
            if row is None:
                text = f"there is no prediction {prediction!r}; ask with `feedback`, and correct it within an hour"
                raise UnknownPrediction(text, param="id")
            if index >= len(row.labels):
                raise InvalidRequest(f"index: the prediction has {len(row.labels)} images", param="index")
            if label not in row.classes:
                raise InvalidRequest(f"label: {label!r} is not one of {', '.join(row.classes)}", param="label")
            found = {
                "id": f"fb-{prediction.removeprefix('pred-')}-{index}", "model": row.model, "version": row.version,
                "created_at": connection.execute(sa.select(now())).scalar_one(), "predicted": row.labels[index],
                "label": label, "image": row.images[784 * index : 784 * (index + 1)],
            }  # fmt: skip
            insert = insert_of(connection.dialect.name)(corrections).values(tenant=tenant, **found)
            again = {"label": label, "created_at": found["created_at"]}
            connection.execute(insert.on_conflict_do_update(index_elements=["id"], set_=again))
            same = _of(tenant, row.model) & (corrections.c.image == found["image"]) & (corrections.c.id != found["id"])
            connection.execute(corrections.delete().where(same))  # another prediction of the same image
            surplus = (
                sa.select(corrections.c.id).where(_of(tenant, row.model))
                .order_by(corrections.c.created_at.desc(), corrections.c.id).offset(self._most)
            )  # fmt: skip
            connection.execute(corrections.delete().where(corrections.c.id.in_(surplus)))
        return _correction(found)

    def of_model(self, tenant: str, model: str) -> list[Correction]:
        """A tenant's corrections of a model by its stored name, the oldest first; the base is corrected by several."""
        query = sa.select(*_COLUMNS).where(_of(tenant, model))
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(corrections.c.created_at, corrections.c.id)).mappings()
            return [_correction(row) for row in rows]

    def delete(self, tenant: str, id: str) -> None:
        """Forget a correction.

        Raises:
            UnknownCorrection: there is none with this id.
        """
        with self._engine.begin() as connection:
            found = corrections.delete().where(corrections.c.id == id, corrections.c.tenant == tenant)
            if not connection.execute(found).rowcount:
                raise UnknownCorrection(f"there is no correction {id!r}", param="id")

    def sweep(self, has_live: Callable[[str], bool]) -> None:
        """Forget predictions that have expired, and corrections of models that are gone."""
        with self._engine.begin() as connection:
            connection.execute(predictions.delete().where(predictions.c.created_at <= now() - KEPT_S))
            models = connection.execute(sa.select(corrections.c.model).distinct()).scalars().all()
        for model in models:
            if not has_live(model):
                self.forget(model)

    def forget(self, model: str) -> None:
        """Forget all that is kept of a model, by its stored name."""
        with self._engine.begin() as connection:
            for table in (predictions, corrections):
                connection.execute(table.delete().where(table.c.model == model))


def _of(tenant: str, model: str) -> sa.ColumnElement[bool]:
    return (corrections.c.tenant == tenant) & (corrections.c.model == model)


_COLUMNS = [column for column in corrections.c if column is not corrections.c.tenant]


def _correction(row: Any) -> Correction:
    return Correction(**{**row, "image": np.frombuffer(row["image"], np.uint8).reshape(28, 28)})
