"""Recipes: values of the fields that may be searched."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trainer.asked import Asked
from trainer.spec import Spec, described

Recipe = Mapping[str, Any]  # values of searched fields, as in a spec

SMALL = {"shift": 1.0, "rotate": 3.0, "scale": 0.05}
LARGE = {"shift": 2.0, "rotate": 10.0, "scale": 0.15}
OFF: Recipe = {
    "l1": 0.0, "l2_sp": 0.0, "label_smoothing": 0.0, "mixup": 0.0, "augmentation": None, "ema": 0.0, "min_steps": 20,
}  # fmt: skip
LORA: Recipe = {
    **OFF, "method": "lora", "head": "keep", "learning_rate": 1e-3, "epochs": 20, "schedule": "cosine", "l2": 1e-4,
    "dropout": 0.2,
}  # fmt: skip
FULL: Recipe = {
    **OFF, "method": "full", "head": "new", "learning_rate": 1e-2, "epochs": 60, "schedule": "one_cycle", "l2": 5e-3,
    "dropout": 0.2, "min_steps": 10,
}  # fmt: skip
TUNED: Recipe = {**FULL, "head": "keep", "learning_rate": 2e-3}  # for data that look like the base's
SMOOTH: Recipe = {**FULL, "label_smoothing": 0.1}
RECIPES: tuple[Recipe, ...] = (
    {**SMOOTH, "augmentation": SMALL},  # the first is the fallback
    {**SMOOTH, "augmentation": LARGE},
    SMOOTH,
    {**SMOOTH, "augmentation": {**SMALL, "flip": True}},
    {**SMOOTH, "augmentation": {**LARGE, "cutout": 8}},
    {**LORA, "epochs": 60, "augmentation": LARGE},
)
SAME_CLASSES: tuple[Recipe, ...] = (LORA, {**TUNED, "augmentation": LARGE})  # tried first if the classes are the base's
PRIOR: Mapping[str, Sequence[Any]] = {
    "learning_rate": (0.5, 0.7, 1.4),  # times that of the recipe
    "l1": (1e-6, 1e-5),
    "l2": (1e-3, 1e-2),
    "l2_sp": (1e-3,),
    "dropout": (0.1, 0.3, 0.4),
    "label_smoothing": (0.0, 0.05),
    "mixup": (0.2,),
    "augmentation": (None, SMALL, LARGE, {**SMALL, "flip": True}, {**SMALL, "cutout": 8}, {**SMALL, "contrast": 0.3}),
    "ema": (0.98,),
}
STRENGTHS = (0.02, 0.05, 0.1, 0.2, 0.3)  # of an attack, as epsilon, where that is searched
SPARSE = (1e-5, 1e-4, 1e-3)  # of l1, where sparsity is an objective
PREVIEWED = 6000  # images that a preview sees, at most 10 times each; a second on two cores
ENOUGH = 300  # images for which the recipes' epochs are enough
OFTEN = ("learning_rate", "l2", "dropout", "label_smoothing", "augmentation")  # three times as often varied


def known(same_classes: bool, images: int) -> list[Recipe]:
    """The recipes that are tried first. Fewer images than `ENOUGH` are seen more often, up to twice as often."""
    longer = min(2.0, max(1.0, ENOUGH / images))
    good = [*SAME_CLASSES, *RECIPES] if same_classes else [{**recipe, "head": "new"} for recipe in RECIPES]
    return [{**recipe, "epochs": math.ceil(longer * recipe["epochs"])} for recipe in good]


def candidates(
    asked: Asked, same_classes: bool, images: int, earlier: Iterable[Recipe] = ()
) -> Iterator[tuple[str, Spec]]:
    """What to try, with its origin: what was chosen for earlier versions, the known good recipes, and samples around
    these.
    """
    bounds = asked.fixed.search
    assert bounds is not None
    good = known(same_classes, images)
    rng = np.random.default_rng(bounds.seed)
    seen: list[Spec] = []

    def recipes() -> Iterator[tuple[str, Recipe]]:
        yield from (("earlier", recipe) for recipe in earlier)
        yield from (("recipe", recipe) for recipe in good)
        for _ in range(20 * bounds.trials):
            yield "sampled", sampled(good[int(rng.integers(len(good)))], rng)

    for origin, recipe in recipes():
        spec = asked.resolve(recipe)
        if not same_classes:  # there is no classifier to keep
            spec = spec.model_copy(update={"head": "new"})
        if spec not in seen:
            seen.append(spec)
            yield origin, spec
        if len(seen) == bounds.trials:
            return


def variants(asked: Asked, chosen: Spec) -> Iterator[tuple[str, Spec]]:
    """Variants of the chosen recipe: strengths of an attack, and what serves other objectives."""
    bounds = asked.fixed.search
    assert bounds is not None
    recipe, changes = recipe_of(chosen), list[Recipe]()
    if "epsilon" in asked.auto:
        changes += [{"epsilon": epsilon} for epsilon in STRENGTHS]
    if "adversarial" in asked.auto:
        sizes = (bounds.epsilon / 2, bounds.epsilon)
        changes += [{"adversarial": {"attack": "pgd", "steps": 5, "epsilon": size, "weight": 0.5}} for size in sizes]
        changes += [{"adversarial": {"attack": "pgd", "steps": 5, "epsilon": bounds.epsilon}}]
    if "l1" in asked.auto and "sparsity" in bounds.objective and chosen.method == "full":
        changes += [{"l1": strength} for strength in SPARSE]
    for change in changes:
        yield "variant", asked.resolve({**recipe, **change})


def sampled(recipe: Recipe, rng: np.random.Generator) -> Recipe:
    """A recipe in which two fields, or one, have other values."""
    weights = np.array([3.0 if name in OFTEN else 1.0 for name in PRIOR])
    varied = rng.choice(list(PRIOR), 2, replace=False, p=weights / weights.sum())
    values: dict[str, Any] = {}
    for name in varied:
        value = PRIOR[name][int(rng.integers(len(PRIOR[name])))]
        if name == "learning_rate":
            value *= recipe[name]
        values[str(name)] = value
    return {**recipe, **values}


def augmentation_kind(spec: Spec) -> str:
    """What an augmentation makes of an image: nothing, nearly the same, something else, or its mirror image."""
    if spec.augmentation is None:
        return "none"
    if spec.augmentation.flip:
        return "mirrored"
    return "large" if any(getattr(spec.augmentation, name) >= size for name, size in LARGE.items()) else "small"


def fallback(same_classes: bool) -> Recipe:
    """The recipe for data that are too few to compare any."""
    return LORA if same_classes else RECIPES[0]


def recipe_of(spec: Spec) -> Recipe:
    """The values of a spec that may be searched."""
    return described(spec) | {"epsilon": spec.adversarial.epsilon if spec.adversarial else 0.0}


def preview_recipe(same_classes: bool, images: int) -> Recipe:
    """A recipe for at most `PREVIEWED` images, which is trained in a moment."""
    recipe, epochs = (LORA, 5) if same_classes else (FULL, 10)
    return {**recipe, "epochs": max(1, min(epochs, PREVIEWED // images))}


def counted(number: int, unit: str) -> str:
    """A number with its unit, in the singular or the plural."""
    return f"{number} {unit}" + ("s" if number != 1 else "")


def phrase(spec: Spec) -> str:
    """The searched fields of a spec that are not off, as a phrase."""
    options = getattr(spec, spec.method, None)
    rank = f" of rank {options.rank}" if spec.lora and options else ""
    head = "the base's classifier" if spec.head == "keep" else "a new classifier"
    parts = [
        f"`{spec.method}`{rank} from {head}, {counted(spec.epochs, 'epoch')}, learning rate {spec.learning_rate:g}"
    ]
    for name in ("l1", "l2", "l2_sp", "dropout", "label_smoothing", "mixup", "ema"):
        if value := getattr(spec, name):
            parts.append(f"{name} {value:g}")
    moves = spec.augmentation.model_dump(exclude_defaults=True) if spec.augmentation else {}
    said = [name if value is True else f"{name} {value:g}" for name, value in moves.items()]
    if spec.adversarial:
        parts.append(f"trained against `{spec.adversarial.attack}` of {spec.adversarial.epsilon:g}")
    return ", ".join(parts) + (f", augmentation ({', '.join(said)})" if said else ", no augmentation")
