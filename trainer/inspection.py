"""What held-out predictions say about the data: wrong labels, copies, strangers, classes that overlap, hard images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer import evaluate
from trainer.evaluate import log_softmax

WRONG = 0.4  # chance that a label is wrong from which on it is listed
MOST = 0.5  # share of labels that can be wrong; if more seem to be, nothing is said of any
FEWEST = 20  # images without which nothing is said about labels
TOO_FEW, NOT_LEARNED = f"fewer than {FEWEST} images", "the networks have learned too little to tell"
SAMPLE = 5000  # images that the share of wrong labels is estimated on
LISTED, GROUPS, IN_GROUP, SHOWN = 500, 20, 10, 24  # most that are listed
NEAR = 0.02  # distance that is nothing
OVERLAP, OVERLAPPING = 0.1, 3  # share and number of images that two classes must confuse to be named
FENCES = 3.0  # interquartile ranges above the upper quartile from which on a distance is far out (Tukey 1977)
TEMPERATURES, SHARES = np.exp(np.linspace(-1.5, 1.0, 51)), np.linspace(0, 0.45, 91)


@dataclass(frozen=True)
class Labels:
    """How far labels can be trusted."""

    share: float  # of wrong labels, estimated
    wrong: np.ndarray  # chance of each that it is wrong, (n,)
    likelier: np.ndarray  # the most probable other class of each image, (n,) int
    unknown: str = ""  # why nothing can be said of them


def doubted(predictions: Sequence[np.ndarray], labels: np.ndarray) -> Labels:
    """Find wrong labels by confident learning on out-of-fold predictions (after Northcutt et al. 2021).

    Their counts of confident disagreements also count images that are merely hard, half of those on Fashion-MNIST. Here
    the noise is part of the likelihood instead: with a share s of wrong labels, each equally likely one of the k - 1
    other classes, a label has the probability (1 - s) p + s / (k - 1) (1 - p), where p is what the network gives that
    class, at a temperature. The temperature and s that make the labels most likely are found on a grid; the chance that
    a label is wrong follows from Bayes' rule.

    Args:
        predictions: logits (n, classes) of several networks, none of which was trained on the image. They are averaged:
            what one has learned of a wrong label, others have not.
        labels: (n,) int32, as they were uploaded.
    """
    n, classes = predictions[0].shape
    each = np.arange(n)
    mean = np.zeros((n, classes))
    for logits in predictions:
        mean += np.exp(log_softmax(logits / np.float32(evaluate.temperature(logits, labels)))) / len(predictions)
    scores = np.log(np.maximum(mean, 1e-12))
    others = np.where(labels[:, None] == np.arange(classes), -np.inf, scores).argmax(axis=1)
    if n < FEWEST:
        return Labels(0.0, np.zeros(n), others, TOO_FEW)

    def chances(share: Any, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each label, to be what it is: because it is right, and because it is wrong."""
        return (1 - share) * own, share / (classes - 1) * (1 - own)

    some = np.random.default_rng(0).permutation(n)[:SAMPLE]
    best = (np.inf, 1.0, 0.0)
    for temperature in TEMPERATURES:
        own = np.exp(log_softmax(scores[some] / temperature)[np.arange(len(some)), labels[some]])
        surprise = -np.log(sum(chances(SHARES, own[:, None])) + 1e-12).sum(axis=0)
        best = min(best, (surprise.min(), temperature, SHARES[surprise.argmin()]))
    _, temperature, share = best
    right, wrong = chances(share, np.exp(log_softmax(scores / temperature)[each, labels]))
    found = wrong / (right + wrong + 1e-12)
    if _guessed(scores.argmax(axis=1), labels) or (found > WRONG).mean() > MOST:
        return Labels(0.0, np.zeros(n), others, NOT_LEARNED)
    return Labels(float(share), found, others)


def _guessed(predicted: np.ndarray, labels: np.ndarray) -> bool:
    """Tell whether as many predictions as these agree with labels by chance (Cohen 1960)."""
    n, classes = len(labels), int(max(predicted.max(), labels.max())) + 1
    shares = [np.bincount(found, minlength=classes) / n for found in (labels, predicted)]
    chance = float(shares[0] @ shares[1])
    several = np.count_nonzero(shares[0]) > 1  # of one class alone, right and by chance are the same
    return bool(several and (predicted == labels).mean() <= chance + 2 * np.sqrt(chance * (1 - chance) / n))


def label_errors(found: Labels, labels: np.ndarray, classes: Sequence[str], named: Callable[[int], Any]) -> Any:
    """The images whose label is probably wrong, the surest first."""
    suspects = [int(index) for index in np.argsort(-found.wrong, kind="stable") if found.wrong[index] > WRONG]
    return {
        "images": len(suspects), "checked": 0 if found.unknown else len(labels), "estimated_share": found.share,
        "unknown": found.unknown or None,
        "listed": [
            {**named(index), "class": classes[labels[index]], "suggested": classes[found.likelier[index]],
             "probability": round(float(found.wrong[index]), 3)}
            for index in suspects[:LISTED]
        ],
    }  # fmt: skip


def copies(groups: np.ndarray, labels: np.ndarray, classes: Sequence[str], named: Callable[[int], Any]) -> Any:
    """Images that are near copies of one another, the groups of several classes first.

    Args:
        groups: (n,) int; near copies have the same number.
    """
    order = np.argsort(groups, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    several = [part for part in parts if len(part) > 1]
    several.sort(key=lambda part: (len(set(labels[part].tolist())) < 2, -len(part)))
    return {
        "images": sum(map(len, several)), "groups": len(several),
        "of_several_classes": sum(len(set(labels[part].tolist())) > 1 for part in several),
        "listed": [
            [{**named(int(index)), "class": classes[labels[index]]} for index in part[:IN_GROUP]]
            for part in several[:GROUPS]
        ],
    }  # fmt: skip


def strangers(distances: np.ndarray, labels: np.ndarray, classes: Sequence[str], named: Callable[[int], Any]) -> Any:
    """Images far from all others, the farthest first.

    Args:
        distances: of each image to others, (n,).
    """
    low, high = np.quantile(distances, [0.25, 0.75])
    far = [int(index) for index in np.argsort(-distances) if distances[index] > high + max(FENCES * (high - low), NEAR)]
    return {
        "images": len(far),
        "listed": [
            {**named(index), "class": classes[labels[index]], "isolation": round(float(distances[index]), 4)}
            for index in far[:LISTED]
        ],
    }  # fmt: skip


def overlaps(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Pairs of classes that are often taken for each other, the worst first, with the share of their images."""
    predicted = logits.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    pairs = np.sort(np.stack([labels[wrong], predicted[wrong]], axis=1), axis=1)
    found = []
    for (one, other), count in zip(*np.unique(pairs, axis=0, return_counts=True), strict=True):
        share = count / int(np.isin(labels, (one, other)).sum())
        if count >= OVERLAPPING and share >= OVERLAP:
            found.append({"classes": [classes[one], classes[other]], "images": int(count), "share": float(share)})
    return sorted(found, key=lambda pair: -pair["share"])


def warnings(found: Mapping[str, Any]) -> list[str]:
    """What of it to know before relying on the version."""
    texts = []
    if leaks := found["leaks"]["listed"]:
        first = leaks[0].get("file", leaks[0].get("index"))
        texts.append(
            f"{found['leaks']['images']} of the images to measure on are near copies of images that were trained on, "
            f"such as {first}; they are left out of all figures"
        )
    if several := found["copies"]["of_several_classes"]:
        groups = "1 group of near copies spans" if several == 1 else f"{several} groups of near copies span"
        texts.append(f"{groups} several classes: keep each picture in one class")
    errors = found["label_errors"]
    if errors["unknown"] == NOT_LEARNED:
        texts.append(f"labels could not be checked: {NOT_LEARNED}")
    if errors["images"]:
        texts.append(
            f"about {errors['estimated_share']:.0%} of the labels may be wrong; {errors['images']} images are listed, "
            "to be corrected or excluded"
        )
    return texts


def hard_images(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], named: Callable[[int], Any]
) -> dict[str, list[dict[str, Any]]]:
    """The images that are misclassified with the most confidence, and those right ones that are the least certain."""
    sure = np.exp(log_softmax(logits))
    predicted, right = logits.argmax(axis=1), evaluate.right(logits, labels)
    top = sure.max(axis=1)

    def listed(order: np.ndarray) -> list[dict[str, Any]]:
        return [
            {**named(int(index)), "class": classes[labels[index]], "predicted": classes[predicted[index]],
             "probability": round(float(top[index]), 4)}
            for index in order[:SHOWN]
        ]  # fmt: skip

    wrong, hits = np.flatnonzero(~right), np.flatnonzero(right)
    return {
        "misclassified": listed(wrong[np.argsort(-top[wrong], kind="stable")]),
        "least_certain": listed(hits[np.argsort(top[hits], kind="stable")]),
    }
