"""Why a version gives its answers: what its own graph computes, for people and programs."""

import asyncio
import math
from typing import Any, Literal

import numpy as np

from api.inference.neighbours import Neighbours
from api.inference.pictures import grey, overlay, png
from api.inference.server_pool import ServerPool
from api.inference.service import Prediction
from store.errors import InvalidRequest, ModelServerTimeout, Overloaded, TooLarge
from store.records import GREY_28

EXPLAIN = "serving_explain"
MOST = 16  # images of a request; each takes the model server as long as hundreds of predictions
AT_A_TIME = 2  # of them that this gateway asks for at once
MAX_WAITING = 64  # of all requests
PATIENCE_S = 30.0  # for all that a request asks for

Pictures = Literal["numbers", "png"]


class Explanations:
    """Asks for explanations, a few at a time."""

    def __init__(self, pool: ServerPool, neighbours: Neighbours) -> None:
        self._pool, self._neighbours = pool, neighbours
        self._calls, self._waiting = asyncio.Semaphore(AT_A_TIME), 0

    async def explain(
        self, found: Prediction, images: np.ndarray, target: str | None, pictures: Pictures,
        timeout_s: float | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """An explanation of each answer, as JSON (see `Explanation` of `api.routes.predict`).

        Args:
            found: the answers.
            images: that they are about, as for `InferenceService.predict`.
            target: the class to explain instead of the answers.
            timeout_s: `PATIENCE_S` unless this is shorter.

        Raises:
            InvalidRequest: there is no such class.
            NotExplainable: the version was exported by an earlier release.
            TooLarge: these are too many images.
            Overloaded: too many wait already.
            ModelServerError: the model servers failed.
        """
        if len(images) > MOST:
            raise TooLarge(f"{len(images)} images, more than the {MOST} that can be explained at once", param="body")
        if target is not None and target not in found.classes:
            raise InvalidRequest(f"class: {target!r} is not a class of {found.model}:{found.version}", param="class")
        if images.dtype == np.uint8:
            images = images.astype(np.float32).reshape(-1, *GREY_28.shape) / np.float32(255)
        number = -1 if target is None else found.classes.index(target)
        if self._waiting + len(images) > MAX_WAITING:
            raise Overloaded("too many explanations are waiting")
        self._waiting += len(images)
        limit_s = PATIENCE_S if timeout_s is None else min(timeout_s, PATIENCE_S)
        tasks = [asyncio.create_task(self._one(found, image, number, pictures, limit_s)) for image in images]
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.gather(*tasks)
        except TimeoutError as exc:
            raise ModelServerTimeout(f"no explanation within {limit_s:g} s") from exc
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._waiting -= len(images)

    async def _one(
        self, found: Prediction, image: np.ndarray, target: int, pictures: Pictures, limit_s: float
    ) -> dict[str, Any]:
        servable, targets = found.servable, np.array([target], np.int32)
        async with self._calls:
            rows = await self._pool.ask(
                *servable,
                lambda predictor, left_s: predictor.run(*servable, EXPLAIN, left_s, image=image[None], target=targets),
                limit_s, hedge=False,
            )  # fmt: skip
            near = await self._neighbours.nearest(servable, rows["hidden"][0], limit_s)
        return await asyncio.to_thread(explanation, found.classes, image[..., 0], rows, target, near, pictures)


def explanation(
    classes: tuple[str, ...], image: np.ndarray, rows: dict[str, np.ndarray], target: int,
    near: list[dict[str, Any]] | str, pictures: Pictures,
) -> dict[str, Any]:  # fmt: skip
    """The outputs of `serving_explain` for one image (28, 28) as JSON.

    Args:
        target: the number of the explained class; the answer if it is none.
        near: what `Neighbours.nearest` found.
    """
    as_png = pictures == "png"

    def picture(pixels: np.ndarray) -> Any:
        return png(grey(pixels)) if as_png else np.ascontiguousarray(pixels, np.float32)

    def signed(values: np.ndarray) -> Any:
        return png(overlay(image, values)) if as_png else np.ascontiguousarray(values)

    answer = int(rows["logits"][0].argmax())
    explained = answer if target < 0 else target
    epsilons = [0.0, *rows["epsilons"].tolist()]
    probabilities = [rows["probabilities"][0], *rows["adversarial_probabilities"][0]]
    points = [image, *rows["adversarial"][0, ..., 0]]
    smallest = float(rows["smallest_epsilon"][0])
    path = [
        {
            "epsilon": round(epsilon, 6), "label": classes[int(row.argmax())], "probability": row.max(),
            "probabilities": row, "image": picture(point),
        }
        for epsilon, row, point in zip(epsilons, probabilities, points, strict=True)
    ]  # fmt: skip
    fallen = next((one["label"] for one in path if one["label"] != classes[answer]), None)
    return {
        "class": classes[explained],
        "image": picture(image),
        "integrated_gradients": {
            "picture": signed(rows["integrated_gradients"][0, ..., 0]), "logit": rows["logits"][0, explained],
            "baseline_logit": rows["baseline_logits"][0, explained],
        },
        "smooth_grad": signed(rows["smooth_grad"][0, ..., 0]),
        "stability": {
            "epsilon": round(smallest, 6) if math.isfinite(smallest) else None, "label": fallen,
            "limit": round(epsilons[-1], 6),
        },
        "adversarial": path,
        "nearest": None if isinstance(near, str) else [
            {**one, "image": picture(one["image"] / np.float32(255))} for one in near
        ],
        "nearest_reason": near if isinstance(near, str) else None,
    }  # fmt: skip
