"""What there is to say of a network before it is published: its report, and what that says about the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from store.records import Abstention
from store.settings import Settings
from trainer import evaluate, inspection, report
from trainer.abstention import isolation
from trainer.fit import Fitted, Split, Start
from trainer.lenet import Arrays
from trainer.network import Network
from trainer.report import HeldOut
from trainer.search import Found
from trainer.spec import Spec, regularizes
from trainer.worker.job_data import JobData

LISTED = 100  # corrections that a report lists


@dataclass(frozen=True)
class Trained:
    """A network, and with folds what others, trained in the same way, make of images that they have not seen."""

    fitted: Fitted
    across: HeldOut | None

    def held_out(self, train: Split, validation: Split | None) -> HeldOut:
        """What its report rests on."""
        if validation is None and self.across:
            return self.across
        return HeldOut.apart(self.fitted, train, validation or train)


@dataclass(frozen=True)
class Evaluation:
    """Evaluates networks that were trained on a job's data."""

    data: JobData
    settings: Settings
    device: str

    def figures(
        self, spec: Spec, start: Start, fitted: Fitted, train: Split, held_out: HeldOut, *, attack_well: bool = False
    ) -> dict[str, Any]:  # fmt: skip
        """The part of a report that one network and the images held out for it give."""
        card = report.quick(
            fitted, train, held_out, self.data.classes, spec, base=None if start.new else start.params,
            attack_images=self.settings.attack_images, attack_well=attack_well,
        )  # fmt: skip
        card["abstention"] = report.abstention(held_out, spec.coverage)
        if (test := self.data.unseen) is not None:
            card["test"] = report.on_test(fitted, train, test, Abstention.rule(card["abstention"]))
        return card | {"device": self.device.removeprefix("/")}

    def report(
        self, spec: Spec, start: Start, trained: Trained, train: Split, validation: Split | None,
        searched: Found | None, twin: Trained | None, *, attack_well: bool,
    ) -> tuple[Fitted, HeldOut, dict[str, Any]]:  # fmt: skip
        """The network as it will be served, calibrated, what its report rests on, and the report."""
        fitted, across, held_out = trained.fitted, trained.across, trained.held_out(train, validation)
        logits, labels = held_out.logits, held_out.split.labels
        temperature, unfitted = 1.0, logits
        if spec.calibrate:
            temperature = evaluate.serving_temperature(logits, labels)
            unfitted = evaluate.cross_fitted(logits, labels)
            fitted, held_out = fitted.cooled(temperature), held_out.cooled(temperature)
            across = across and across.cooled(temperature)
        card = self.figures(spec, start, fitted, train, held_out, attack_well=attack_well)
        card["calibration"] = {**evaluate.calibration(unfitted, labels), "temperature": temperature}
        if across:
            card["cross_validation"] = report.cross_validation(across, self.data.folds(spec))
        if twin:
            beside = twin.fitted, twin.held_out(train, validation)
            card["twin"] = report.beside_twin((fitted, held_out), beside, train, spec, self.settings.attack_images)
        elif spec.twin:
            why = "could not be trained: it diverged" if regularizes(spec) else "is the same network"
            card["warnings"].append(f"its unregularized twin {why}")
        predictions = [*([across.logits] if across else ()), *(searched.predictions if searched else ())]
        card["inspection"] = self._inspected(spec, fitted.params, held_out, predictions)
        if self.data.corrections:
            learned = across.logits if across else None
            card["corrections"], card["inspection"]["corrections"] = self._corrected(fitted.params, learned)
        card["warnings"] += inspection.warnings(card["inspection"])
        return fitted, held_out, card

    def _corrected(self, params: Arrays, across: np.ndarray | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What a network makes of the images that users have corrected, and what an earlier version made of them.

        Args:
            across: out-of-fold logits of all images; without them the network has been trained on what it classifies.
        """
        everything, before = self.data.everything, self.data.corrections
        numbers = np.arange(len(everything.labels) - len(before), len(everything.labels))
        images = tf.gather(self.data.all.images, numbers)
        logits = Network(params).logits(images) if across is None else across[numbers]
        classes, answers = self.data.classes, logits.argmax(axis=1)
        listed = [
            {**everything.named(number), "class": classes[everything.labels[number]], "before": earlier,
             "predicted": classes[answer]}
            for number, earlier, answer in zip(numbers.tolist(), before, answers.tolist(), strict=True)
        ]  # fmt: skip
        figures = {
            "images": len(before),
            "right": sum(one["predicted"] == one["class"] for one in listed),
            "right_before": sum(one["before"] == one["class"] for one in listed),
            "out_of_fold": across is not None,
        }
        return figures, listed[:LISTED]

    def _inspected(
        self, spec: Spec, params: Arrays, held_out: HeldOut, predictions: Sequence[np.ndarray]
    ) -> dict[str, Any]:  # fmt: skip
        """What the network, and predictions on held-out images, say about the data.

        Args:
            predictions: out-of-fold logits of all images, if there are any.
        """
        data, classes = self.data, self.data.classes
        everything, measured = data.everything, data.measured(spec)
        isolated = isolation(params, data.all.images)
        looked_at = everything if predictions else measured
        doubted = inspection.doubted(predictions or [held_out.logits], looked_at.labels)
        return {
            "label_errors": inspection.label_errors(doubted, looked_at.labels, classes, looked_at.named),
            "copies": inspection.copies(data.groups, data.all.labels, classes, everything.named),
            "leaks": data.leaks(),
            "strangers": inspection.strangers(isolated, everything.labels, classes, everything.named),
            "overlaps": inspection.overlaps(held_out.logits, measured.labels, classes),
            **inspection.hard_images(held_out.logits, measured.labels, classes, measured.named),
        }
