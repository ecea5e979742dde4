"""APGD beside that of the Adversarial Robustness Toolbox (Nicolae et al. 2018): `make test-art`."""

import functools
import importlib.util
import json
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer import evaluate, report
from trainer.asked import parse_spec
from trainer.fit import Split, begin, fit
from trainer.lenet import logits
from trainer.network import Network
from trainer.worker.pretrained import pretrained

MISSING = "adversarial-robustness-toolbox is not installed: `make test-art` runs this in an environment of its own"
IMAGES = 200

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("art") is None, reason=MISSING),
    pytest.mark.filterwarnings("ignore"),  # ART warns of PyTorch's absence
]


class Loss:
    """Cross-entropy with the switch of reduction that ART expects; it turns it by names that Keras 3 has dropped."""

    reduction = "none"

    def __call__(self, targets: Any, scores: Any) -> Any:
        losses = tf.nn.softmax_cross_entropy_with_logits(targets, scores)
        return losses if self.reduction == "none" else tf.reduce_mean(losses)


class Ratio:
    """The difference of logits ratio, written independently of ours."""

    reduction = "none"

    def __call__(self, targets: Any, scores: Any) -> Any:
        ranked = tf.sort(scores, axis=1, direction="DESCENDING")
        own = tf.reduce_sum(targets * scores, axis=1)
        other = tf.where(own == ranked[:, 0], ranked[:, 1], ranked[:, 0])
        losses = (other - own) / (ranked[:, 0] - ranked[:, 2] + 1e-12)
        return losses if self.reduction == "none" else tf.reduce_mean(losses)


def withstood_art(params: dict[str, np.ndarray], split: Split, epsilon: float, loss: Any) -> np.ndarray:
    """Which images are still classified correctly after ART's APGD, 100 steps from one random start."""
    from art.attacks.evasion import AutoProjectedGradientDescent
    from art.estimators.classification import TensorFlowV2Classifier

    network = tf.function(functools.partial(logits, params), reduce_retracing=True)
    classifier = TensorFlowV2Classifier(
        model=lambda x, training=False: network(tf.cast(x, tf.float32)),
        nb_classes=10,
        input_shape=(28, 28, 1),
        loss_object=loss,
        clip_values=(0.0, 1.0),
    )
    attack = AutoProjectedGradientDescent(
        classifier, norm=np.inf, eps=epsilon, eps_step=2 * epsilon, max_iter=report.PGD_STEPS, nb_random_init=1,
        batch_size=len(split.labels), verbose=False,
    )  # fmt: skip
    np.random.seed(0)
    images = attack.generate(split.images.numpy(), y=np.eye(10, dtype=np.float32)[split.labels])
    assert np.abs(images - split.images.numpy()).max() <= epsilon + 1e-5
    return evaluate.right(Network(params).logits(images), split.labels)


@pytest.mark.parametrize(
    ("spec", "epsilon"),
    [
        ({"adversarial": {"attack": "fgsm", "epsilon": 0.1}}, 0.03),
        ({"method": "full", "learning_rate": 3e-3, "adversarial": {"attack": "free", "epsilon": 0.1}}, 0.1),
    ],
    ids=["fgsm", "free"],
)
def test_what_apgd_leaves_is_within_a_point_of_what_arts_leaves(
    spec: dict[str, Any], epsilon: float, digits: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tf.keras.losses, "Reduction", Reduction, raising=False)
    images, labels = digits

    def part(first: int, last: int) -> Split:
        return Split(tf.constant(images[first:last, ..., None] / np.float32(255)), labels[first:last].astype(np.int32))

    parsed = parse_spec(json.dumps({"epochs": 10, **spec}))
    start = begin(parsed, pretrained()[0], classes=10, same_classes=True)
    params = fit(parsed, start, part(0, 240), part(240, 300), classes=10).params
    split = part(300, 300 + IMAGES)
    *_, ours = report.withstood_pgd(functools.partial(Network, params), split, epsilon)
    theirs = withstood_art(params, split, epsilon, Loss()) & withstood_art(params, split, epsilon, Ratio())
    print(f"APGD leaves {ours.mean():.1%}, ART's {theirs.mean():.1%}")
    assert 0.05 < ours.mean() < 0.95
    assert ours.mean() == pytest.approx(theirs.mean(), abs=0.01)


class Reduction:
    """Names that ART sets, which Keras 3 has dropped."""

    NONE, SUM, SUM_OVER_BATCH_SIZE = "none", "sum", "sum_over_batch_size"
