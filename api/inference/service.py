"""The predict core: arrays and options in, named outputs out. It knows nothing of HTTP."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from api.inference.batcher import MicroBatcher
from api.inference.router import Router, Servable, Target
from store.errors import InvalidRequest
from store.records import DEFAULT_TENANT, Abstention


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a version says of n images."""

    model: str
    version: int
    servable: Servable
    classes: tuple[str, ...]
    outputs: dict[str, np.ndarray]  # by name; `logits` and `probabilities` (n, classes), `distance` (n,) float32
    abstention: Abstention | None = None  # when this version should rather not name one class


class InferenceService:
    """Finds the version that is meant and has a model server predict."""

    def __init__(self, router: Router, batcher: MicroBatcher, timeout_s: float) -> None:
        self._router = router
        self._batcher = batcher
        self._timeout_s = timeout_s

    async def predict(
        self,
        images: np.ndarray,
        model: str,
        version: int | None = None,
        label: str | None = None,
        *,
        tenant: str = DEFAULT_TENANT,
        sticky_key: bytes | None = None,
        timeout_s: float | None = None,
        on_resolved: Callable[[Target], None] | None = None,
    ) -> Prediction:
        """Have one version classify images.

        Args:
            images: (n, 28, 28, 1) float32 in [0, 1], or (n, 784) uint8.
            model: its stored name.
            tenant: who asks; tenants take turns.
            version: or `label`; without both, the label that gets the request (see `Router.resolve`).
            sticky_key: requests with the same one follow the same label.
            timeout_s: the configured limit, unless this is shorter.
            on_resolved: called with the version before it is asked, so that failures can name it.

        Raises:
            InvalidRequest: both version and label are given.
            UnknownModel: there is no such model, version or label.
            Overloaded: too much is waiting already.
            ModelServerError: the model servers failed.
            ModelServerTimeout: there was no answer in time.
        """
        if version is not None and label is not None:
            raise InvalidRequest("give a version or a label, not both", param="label")
        target = await self._router.resolve(model, version, label, sticky_key)
        if on_resolved is not None:
            on_resolved(target)
        limit_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        outputs = await self._batcher.predict(target.servable, images, limit_s, tenant)
        return Prediction(
            target.model, target.version, target.servable, target.classes, outputs, target.abstention
        )  # fmt: skip
