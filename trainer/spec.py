"""The fine-tuning spec: one model, with bounds and meaning on every field, for the API, the command and the trainer."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from serving.errors import InvalidSpec

MODEL_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Target = Literal["conv1", "conv2", "dense1", "dense2"]


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) != len(values):
        raise ValueError("names a layer twice")
    return values


class Strict(BaseModel):
    """No unknown fields, no conversions, no change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Lora(Strict):
    """Low-rank adaptation (Hu et al. 2021): W = W0 + alpha / rank * A B."""

    rank: int = Field(4, ge=1, le=64, description="Rank of the update of each target layer.")
    alpha: float = Field(8.0, gt=0, le=1024, description="Scale of the update, divided by the rank.")
    targets: Annotated[tuple[Target, ...], AfterValidator(_distinct)] = Field(
        ("conv2", "dense1", "dense2"), min_length=1, strict=False, description="Layers that get an update."
    )


class Adversarial(Strict):
    """Training on adversarial examples mixed with the clean ones."""

    attack: Literal["fgsm"] = Field("fgsm", description="`fgsm`: one step from a random start (Wong et al. 2020).")
    epsilon: float = Field(0.1, gt=0, le=1, description="Largest change of a pixel, in units of [0, 1].")
    weight: float = Field(0.5, gt=0, le=1, description="Share of the adversarial loss; the rest is the clean loss.")


class EarlyStopping(Strict):
    """Stop when the validation loss no longer falls, and keep the best weights."""

    patience: int = Field(5, ge=1, le=1000, description="Epochs without improvement before stopping.")
    min_delta: float = Field(0.0, ge=0, description="Smallest fall of the validation loss that counts.")


class Spec(Strict):
    """How to fine-tune. Every field has a default; zero or null switches an effect off."""

    method: Literal["full", "head", "lora"] = Field(
        "lora", description="What is trained: everything, the classifier, or low-rank updates and the classifier."
    )
    lora: Lora | None = Field(None, description="Options of `lora`; only with that method.")
    base: str = Field(
        "lenet5",
        pattern=r"^[a-z0-9][a-z0-9._-]{0,63}(:[1-9][0-9]{0,8})?$",
        description="Published model to start from, `name` or `name:version`.",
    )
    l1: float = Field(0.0, ge=0, le=1, description="Lasso: lambda * sum |w| on the effective kernels, no biases.")
    l2: float = Field(1e-4, ge=0, le=10, description="Ridge: alpha / 2 * sum w^2 on the effective kernels, no biases.")
    dropout: float = Field(0.2, ge=0, le=0.9, description="Share of the dense units set to zero in training.")
    adversarial: Adversarial | None = Field(None, description="Adversarial training, or null.")
    epochs: int = Field(20, ge=1, le=1000, description="Passes over the training images.")
    batch_size: int = Field(
        64, ge=1, le=4096, description="Most images of a step; a small set still takes twenty steps an epoch."
    )
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Peak rate of Adam; it falls to zero as a cosine.")
    validation_split: float = Field(
        0.2, ge=0.05, le=0.5, description="Share of every class held out for the report; at least one image of each."
    )
    early_stopping: EarlyStopping | None = Field(None, description="Stop early and keep the best weights, or null.")
    polarity: Literal["auto", "light_on_dark", "dark_on_light"] = Field(
        "auto", description="Is the writing lighter or darker than its ground? `auto` decides from the borders."
    )
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="`gpu` fails where there is none.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Everything random follows from it.")

    @model_validator(mode="after")
    def _options_of_the_method(self) -> "Spec":
        if self.method == "lora":
            object.__setattr__(self, "lora", self.lora or Lora())
        elif self.lora is not None:
            raise ValueError(f"lora: options of `lora` with method {self.method!r}")
        return self


def parse_spec(text: str | None) -> Spec:
    """The spec in a JSON text; all defaults for None.

    Raises:
        InvalidSpec: with the path of every offending field.
    """
    try:
        return Spec() if text is None else Spec.model_validate_json(text)
    except ValidationError as exc:
        raise invalid_spec(exc) from exc


def invalid_spec(exc: ValidationError) -> InvalidSpec:
    """The error that names every field that pydantic has refused."""
    details: list[dict[str, Any]] = []
    for error in exc.errors(include_url=False, include_input=False, include_context=False):
        location: Sequence[int | str] = ("spec", *error["loc"])
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "value_error" and not error["loc"]:  # the validator across fields names its field itself
            field, _, message = message.partition(": ")
            location = ("spec", field)
        details.append({"field": ".".join(map(str, location)), "reason": message})
    summary = "; ".join(f"{detail['field']}: {detail['reason']}" for detail in details)
    return InvalidSpec(f"the spec is invalid: {summary}", param=details[0]["field"], details=details)


def described(spec: Spec) -> dict[str, Any]:
    """The spec as JSON values."""
    result: dict[str, Any] = json.loads(spec.model_dump_json())
    return result
