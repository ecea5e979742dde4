"""The spec as options of a command: one for every plain field, made from the schema, and `--spec` for all of it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import click

from trainer.spec import ATTACK_NAMES, SEARCHED, Fgsm, Spec

# Options for the most used fields of parts: name -> (part, field).
PARTS = {
    "rank": ("lora", "rank"),
    "attack": ("adversarial", "attack"),
    "epsilon": ("adversarial", "epsilon"),
    "patience": ("early_stopping", "patience"),
    "trials": ("search", "trials"),
    "seconds": ("search", "seconds"),
}


class NumberOrAuto(click.ParamType):  # type: ignore[type-arg]
    """A number, or the word `auto`."""

    def __init__(self, number: click.types.IntParamType | click.types.FloatParamType) -> None:
        self.name = f"{number.name}|auto"
        self._number = number

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number or the word."""
        return value if value == "auto" else self._number.convert(value, param, ctx)


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for every plain field of the spec, and for the most used fields of its parts."""
    for name, field in reversed(Spec.model_fields.items()):
        kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not NoneType]
        choices = [choice for kind in kinds for choice in (get_args(kind) or (kind,))]
        option = f"--{name.replace('_', '-')}"
        accepted: Any
        if all(isinstance(choice, str) for choice in choices):
            accepted = click.Choice((*choices, "auto") if name in SEARCHED else choices)
        elif kinds == [bool]:
            option, accepted = f"{option}/--no-{option[2:]}", None
        elif len(kinds) == 1 and kinds[0] in (int, float, str):
            kind = kinds[0]
            accepted = kind
            if kind is not str and name in SEARCHED:
                accepted = NumberOrAuto(click.INT if kind is int else click.FLOAT)
        else:
            continue
        command = click.option(option, type=accepted, default=None, help=field.description)(command)
    extra = (
        click.option("--rank", type=int, help="Rank of LoRA."),
        click.option("--attack", type=click.Choice(ATTACK_NAMES), help="Train against this attack."),
        click.option(
            "--epsilon",
            type=NumberOrAuto(click.FLOAT),
            help=f"Of the attack. {Fgsm.model_fields['epsilon'].description}",
        ),
        click.option("--trials", type=int, help="Search with so many recipes whatever is not given."),
        click.option("--seconds", type=float, help="Time for that search and the training of its choice."),
        click.option("--patience", type=int, help="Stop early after this many epochs without improvement."),
        click.option(
            "--spec", "spec_json", help="A whole spec as JSON, or @FILE with one; the other options override it."
        ),
    )
    for one in extra:
        command = one(command)
    return command


def spec_of(given: dict[str, Any]) -> dict[str, Any] | None:
    """The spec in the options that were given; None if there were none.

    Raises:
        click.ClickException: `--spec` is no JSON object, or a part of it that an option belongs to is none.
    """
    spec = json_object(given.pop("spec_json") or "{}", "--spec")
    for name, value in given.items():
        if value is None:
            continue
        if name in PARTS:
            part, key = PARTS[name]
            inner = spec.get(part) or {}
            if not isinstance(inner, dict):
                raise click.ClickException(f"--spec: {part} must be a JSON object")
            spec[part] = {**inner, key: value}
        else:
            spec[name] = value
    return spec or None


def json_object(text: str, option: str) -> dict[str, Any]:
    """The JSON object in the text of an option, or in the `@FILE` that it names.

    Raises:
        click.ClickException: there is none.
    """
    try:
        found = json.loads(Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text)
    except ValueError as exc:
        raise click.ClickException(f"{option} is not valid JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise click.ClickException(f"{option} must be a JSON object")
    return found
