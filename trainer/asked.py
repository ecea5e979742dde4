"""What a client asks for: a spec in which any searched field may be "auto", and the errors about it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import ValidationError

from store.errors import InvalidSpec, enumerated, listed
from store.validation import reason
from trainer.spec import ATTACK_NAMES, OPTIONS, SEARCHED, Gate, Spec, described

LEAST_S, LEAST_S_PER_IMAGE = 1.0, 4e-3  # of a search, on a fast machine


@dataclass(frozen=True)
class Asked:
    """A spec as a client gives it: the fields in `auto` are searched, and have their defaults in `fixed`.

    `epsilon` in `auto` is that of the attack.
    """

    fixed: Spec
    auto: frozenset[str] = frozenset()

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """What JSON values ask for.

        Raises:
            ValidationError: of the fields that are not searched.
            InvalidSpec: a search without anything to search, or the reverse.
        """
        auto = {name for name in (*SEARCHED, "adversarial") if given.get(name) == "auto"}
        attack = given.get("adversarial")
        bounds = given.get("search")
        objective = bounds.get("objective") if isinstance(bounds, Mapping) else ()
        robust = isinstance(objective, list) and "robust_accuracy" in objective
        if "adversarial" in auto and not robust:
            raise refused(
                "adversarial", "is 'auto', which needs 'robust_accuracy' in search.objective; give an attack or null"
            )
        if isinstance(attack, Mapping) and attack.get("epsilon") == "auto":
            if attack.get("attack") == "vat":
                raise refused(
                    "adversarial.epsilon", "cannot be 'auto' for vat, whose sizes are of another kind; give a number"
                )
            auto.add("epsilon")
            given = {**given, "adversarial": {name: value for name, value in attack.items() if name != "epsilon"}}
        if given.get("search") is not None and not auto:
            auto = set(SEARCHED) - set(given)
            if robust and "adversarial" not in given:
                auto.add("adversarial")
            if not auto:
                raise refused("search", "every field that can be searched is given; leave one out or make it 'auto'")
        if auto and "search" in given and given["search"] is None:
            raise refused("search", f"is null, but {min(auto)} is 'auto'")
        fixed = {name: value for name, value in given.items() if name not in auto}
        if auto:
            fixed.setdefault("search", {})
        for name in OPTIONS:
            if "method" in auto and fixed.get(name) is not None:
                raise refused(name, f"is an option of method {name!r}, but the method is 'auto'; leave it out")
        asked = cls(Spec.model_validate_json(json.dumps(fixed)), frozenset(auto))
        asked._check_held_out()
        return asked

    def _check_held_out(self) -> None:
        """Refuse what needs held-out images in training where all images are trained on."""
        if self.auto:
            for name in ("folds", "validation_split"):
                if getattr(self.fixed, name) != Spec.model_fields[name].default:
                    raise refused(name, "leave it out: the search holds out every image once; `search.folds` says how")
            if self.fixed.early_stopping:
                raise refused("early_stopping", "leave it out: all images are trained on, so there are none to stop by")

    def described(self) -> dict[str, Any]:
        """As JSON values, with "auto" for what is searched."""
        values = described(self.fixed) | dict.fromkeys(sorted(self.auto - {"epsilon"}), "auto")
        if "method" in self.auto:
            values |= dict.fromkeys(OPTIONS)
        if "epsilon" in self.auto:
            values["adversarial"]["epsilon"] = "auto"
        return values

    def resolve(self, recipe: Mapping[str, Any], **more: Any) -> Spec:
        """The spec with the searched fields taken from a recipe, JSON values; the rest of the recipe is ignored."""
        chosen = {name: value for name, value in recipe.items() if name in self.auto and name != "epsilon"}
        if "method" in self.auto:
            chosen |= {name: recipe.get(name) for name in OPTIONS}
        values = described(self.fixed) | chosen | {"search": None} | more
        if "epsilon" in self.auto and "epsilon" in recipe:
            values["adversarial"]["epsilon"] = recipe["epsilon"]
        return Spec.model_validate_json(json.dumps(values))


def parse_asked(text: str | None) -> Asked:
    """What the spec in a JSON text asks for; without a text everything is searched.

    Raises:
        InvalidSpec: with the path of every offending field.
    """
    if text is None:
        return Asked.of({"search": {}})
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = None  # pydantic says why
    try:
        asked = Asked.of(given) if isinstance(given, dict) else Asked(Spec.model_validate_json(text))
    except ValidationError as exc:
        raise invalid_spec(exc) from exc
    repeated = _repeated(json.loads(text, object_pairs_hook=tuple), "spec")
    if repeated:
        raise _refused("the spec is invalid", dict.fromkeys(repeated, "given twice"))
    return asked


def parse_spec(text: str) -> Spec:
    """A spec in a JSON text that leaves nothing to be searched.

    Raises:
        InvalidSpec: as above.
    """
    asked = parse_asked(text)
    if asked.auto:
        raise refused(min(asked.auto), "must be given: nothing is searched here")
    return asked.fixed


def _repeated(value: Any, path: str) -> list[str]:
    """Paths of the keys that an object has twice, in JSON whose objects are tuples of pairs."""
    found: list[str] = []
    if isinstance(value, tuple):
        names = [name for name, _ in value]
        found += [f"{path}.{name}" for name in dict.fromkeys(names) if names.count(name) > 1]
        for name, inner in value:
            found += _repeated(inner, f"{path}.{name}")
    return found


def invalid_spec(exc: ValidationError) -> InvalidSpec:
    """Translate a `ValidationError` into an error that names every refused field."""
    reasons: dict[str, str] = {}
    for error in exc.errors(include_url=False):
        location: Sequence[int | str] = ("spec", *(part for part in error["loc"] if part != "[key]"))
        message = reason(error, Spec)
        if location[1:2] and location[1] in SEARCHED and error["type"].endswith(("_type", "_parsing", "literal_error")):
            message = message.replace(", not ", ", or 'auto', not ", 1)
        if location[1:] == ("search",) and error["type"] == "value_error" and ": " in message:
            field, _, message = message.partition(": ")  # a validator across fields names its field itself
            location = (*location, field)
        if location[1:2] == ("adversarial",):
            location = (*location[:2], *location[3:])  # without the name of the attack, which is no field
            if error["type"] == "union_tag_invalid":
                names = ", ".join(map(repr, ATTACK_NAMES))
                location, message = (*location, "attack"), f"must be one of {names}, not {error['ctx']['tag']!r}"
            elif error["type"] == "union_tag_not_found":
                message = "must be an object with an attack and its options, or null"
            elif error["type"] == "value_error" and ": " in message:  # a validator across fields names its field itself
                field, _, message = message.partition(": ")
                location = (*location, field)
        reasons.setdefault(".".join(map(str, location)), message)
    return _refused("the spec is invalid", reasons)


def check_dataset(
    asked: Asked, classes: Mapping[str, int], *, held_out: bool, models_gate: Gate | None = None
) -> None:  # fmt: skip
    """Refuse a spec that the data set does not allow.

    Args:
        models_gate: what holds where the spec has no gate.
        classes: images of each class.
        held_out: validation images were uploaded separately, so none are split off.

    Raises:
        InvalidSpec: with the field's path, and every class in question.
    """
    spec, wrong = asked.fixed, dict[str, str]()
    given = spec.validation_split != Spec.model_fields["validation_split"].default  # which holds out one of each class
    empty = [name for name, count in classes.items() if round(spec.validation_split * count) == 0]
    if held_out and given and spec.validation_split:
        wrong["validation_split"] = "leave it out: with a `validation` upload nothing is split off"
    elif not spec.validation_split and not (held_out or spec.folds):
        wrong["validation_split"] = "is 0, so nothing is measured; add `folds` or upload `validation` images"
    elif empty and given and not (held_out or spec.folds):
        wrong["validation_split"] = f"leaves none of {enumerated(empty)} to validate on; raise it or add images"
    folds = ("search.folds", spec.search.folds) if spec.search else ("folds", spec.folds)
    few = [name for name, count in classes.items() if count < (folds[1] or 0)]
    least_s = LEAST_S + LEAST_S_PER_IMAGE * sum(classes.values())
    if spec.search and spec.search.seconds is not None and spec.search.seconds < least_s:
        wrong["search.seconds"] = (
            f"{spec.search.seconds:g} s are too few for even one trial; give at least {least_s:.1f}"
        )
    gate = spec.gate or models_gate
    if gate and isinstance(gate.class_recall, dict):
        unknown = [name for name in gate.class_recall if name not in classes]
        if unknown:
            if spec.gate:
                wrong["gate.class_recall"] = f"names {enumerated(unknown)}, of which the data has no images"
            else:
                wrong["gate"] = (
                    f"the model's gate has a limit for {enumerated(unknown)}, of which the data has no images; change "
                    "it, or give a gate here"
                )
    if spec.early_stopping and not (held_out or spec.validation_split):
        wrong["early_stopping"] = "leave it out: all images are trained on, so there are none to stop by"
    if spec.folds and held_out:
        wrong["folds"] = "leave it out: with a `validation` upload there is nothing to cross-validate"
    elif few:
        wrong[folds[0]] = f"needs {folds[1]} images of every class; too few are of {enumerated(few)}"
    if wrong:
        raise _refused("the spec does not fit the data", {f"spec.{field}": why for field, why in wrong.items()})


def default_folds(images: int) -> int:
    """Folds of a search on this many images: the more there are, the less it matters to train on fewer of them."""
    return 5 if images < 200 else 3


def refused(field: str, why: str) -> InvalidSpec:
    """The error about one field, given as a path within the spec."""
    return _refused("the spec is invalid", {f"spec.{field}": why})


def _refused(summary: str, reasons: Mapping[str, str]) -> InvalidSpec:
    details = [{"field": field, "reason": reason} for field, reason in reasons.items()]
    return InvalidSpec(listed(summary, details), param=details[0]["field"], details=details)
