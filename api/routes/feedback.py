"""Corrections: users name the right class of an answer, and a fine-tune learns from it."""

import asyncio
from typing import Annotated, Literal, Self

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from api.gateway import Gateway, gateway_of, stored, tenant_of
from api.http.openapi import After, CorrectionId, Limit, errors
from api.inference.options import ModelName
from api.inference.pictures import grey, png
from api.inference.service import Prediction
from store.errors import FeedbackOff, TooLarge, UnknownCorrection
from store.records import public_name
from store.validation import TEXT
from trainer.jobs.feedback import IMAGES, Correction

router = APIRouter(tags=["feedback"])


class NewCorrection(BaseModel):
    """What a prediction should have said."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[str, Field(max_length=100, pattern=TEXT)] = Field(
        description="The `id` of a prediction that was asked for with `feedback`, within the last hour."
    )
    index: Annotated[int, Field(ge=0, lt=IMAGES)] = Field(0, description="Which image of the prediction, from 0.")
    label: Annotated[str, Field(max_length=200)] = Field(description="The right class.")


class CorrectionView(BaseModel):
    """An image whose class a user has named, to learn from."""

    id: str = Field(description="Name of the correction.")
    object: Literal["correction"] = Field("correction", description="Kind of this object.")
    model: str = Field(description="The model.")
    version: int = Field(description="The version that answered.")
    predicted: str = Field(description="Its answer.")
    label: str = Field(description="The right class.")
    created_at: float = Field(description="Unix seconds.")
    image: str = Field(description="The image, a PNG in a data URL.")

    @classmethod
    def of(cls, correction: Correction) -> Self:
        """The public face of a correction."""
        found = {**vars(correction), "model": public_name(correction.model), "image": png(correction.image)}
        return cls(**found)


class CorrectionList(BaseModel):
    """Corrections of a model, the oldest first."""

    object: Literal["list"] = Field("list", description="Kind of this object.")
    data: list[CorrectionView] = Field(description="The corrections.")
    has_more: bool = Field(description="Are there more? Ask with `after` = the last id.")


class CorrectionDeleted(BaseModel):
    """A correction that is gone."""

    id: str = Field(description="Its name.")
    deleted: Literal[True] = Field(True, description="Always true.")


async def keep(gateway: Gateway, tenant: str, found: Prediction, images: np.ndarray) -> str:
    """Keep the images of a prediction for an hour, so that its answers can be corrected; returns its id.

    Args:
        images: as for `InferenceService.predict`.

    """
    pixels = images if images.dtype == np.uint8 else grey(images)
    labels = [found.classes[top] for top in found.outputs["probabilities"].argmax(axis=1).tolist()]
    return await asyncio.to_thread(
        gateway.feedback.keep, tenant, found.servable.name, found.version, found.classes, labels,
        pixels.reshape(len(pixels), -1),
    )  # fmt: skip


def check_feedback(gateway: Gateway, images: int = 0) -> None:
    """Refuse what cannot be kept.

    Raises:
        FeedbackOff: nothing is kept here.
        TooLarge: these are too many images of a prediction.
    """
    if images > IMAGES:
        raise TooLarge(f"{images} images, more than the {IMAGES} of a prediction with `feedback`", param="body")
    if not gateway.settings.feedback:
        raise FeedbackOff("feedback is off: TEMPER_FEEDBACK is 0")


@router.post("/feedback", status_code=201, responses=errors(400, 404, 409, 422, 429, 503, 507))
def correct(request: Request, correction: NewCorrection, response: Response) -> CorrectionView:
    """Name the right class of an image that was predicted with `feedback`; another time replaces it."""
    gateway = gateway_of(request)
    check_feedback(gateway)
    found = gateway.feedback.correct(tenant_of(request), correction.id, correction.index, correction.label)
    response.headers["Location"] = f"/feedback/{found.id}"
    return CorrectionView.of(found)


@router.get("/feedback", responses=errors(404, 422, 503))
def list_corrections(
    request: Request,
    model: Annotated[ModelName, Query(description="The model that was corrected.")],
    after: After = None,
    limit: Limit = 20,
) -> CorrectionList:
    """The corrections of a model, which a fine-tune with `corrections` learns from."""
    found = gateway_of(request).feedback.of_model(tenant_of(request), stored(request, model))
    ids = [one.id for one in found]
    if after is not None and after not in ids:
        raise UnknownCorrection(f"there is no correction {after!r}", param="after")
    later = found if after is None else found[ids.index(after) + 1 :]
    return CorrectionList(data=[CorrectionView.of(one) for one in later[:limit]], has_more=len(later) > limit)


@router.delete("/feedback/{id}", responses=errors(404, 422, 503))
def delete_correction(request: Request, id: CorrectionId) -> CorrectionDeleted:
    """Delete a correction."""
    gateway_of(request).feedback.delete(tenant_of(request), id)
    return CorrectionDeleted(id=id)
