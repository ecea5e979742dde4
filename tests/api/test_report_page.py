"""The report card as a page."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from api.report.charts import BOTTOM, LEFT, LOOKS, RIGHT, TOP
from api.report.page import report_page
from store.records import Manifest, ReportCard
from trainer.asked import parse_spec
from trainer.spec import described

Json = dict[str, Any]
VOID = {"meta", "br", "hr", "img", "link", "input"}
STRANGE = "<script>alert('1') & \"2\"</script>"


def html(name: str, version: int, report: Json, manifest: Json) -> str:
    return report_page(name, version, ReportCard.read(report), Manifest.read(manifest))


class Page(HTMLParser):
    """What a browser would find; a tag that closes no open one is an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def plots(self) -> list[str]:
        """The headings of the plots, from what a screen reader says."""
        return [(value or "").partition(":")[0] for name, value in self.attributes if name == "aria-label"]


def manifest(classes: list[str]) -> Json:
    spec = {"method": "lora", "lora": {"rank": 4, "alpha": 8.0, "targets": ["dense1"]}, "l1": 1e-5, "seed": 12345}
    dataset = {"filename": f"{STRANGE}.zip", "images": 300, "classes": dict.fromkeys(classes, 30)}
    return {"classes": classes, "polarity": "light_on_dark", "base": "lenet5:1", "spec": spec, "dataset": dataset}


def quick_report(classes: list[str], epochs: int = 4) -> Json:
    """As it is when the version goes live: every class has five images, one of which is taken for its neighbour."""
    count = len(classes)
    score = {"precision": 0.8, "recall": 0.8, "f1-score": 0.8, "support": 5.0}
    matrix = [[4 if i == j else int(j == (i + 1) % count) for j in range(count)] for i in range(count)]
    validation = {"images": 5 * count, "accuracy": 0.8, "accuracy_interval": [0.61, 0.91], "cross_entropy": 0.5}
    terms = {"data_loss": 0.4, "adversarial_loss": 0.9, "l1": 0.0, "l2": 1e-9}
    shares = {"data_loss": 0.3, "adversarial_loss": 0.6, "l1": 0.0, "l2": 0.1}
    attacked = {"validation_accuracy_under_pgd": 0.3, "validation_accuracy_under_fgsm": 0.4}
    kept = {"validation_accuracy": 0.8, "validation_cross_entropy": 0.5}
    numbers = range(1, epochs + 1)
    return {
        "train": validation | {"accuracy": 0.9},
        "validation": validation
        | {
            "classification_report": {
                "classes": dict.fromkeys(classes, score), "accuracy": 0.8, "macro avg": score, "weighted avg": score
            },
            "confusion_matrix": matrix,
        },
        "generalization_gap": {"accuracy": 0.1, "cross_entropy": -0.02},
        "calibration": {
            "expected_calibration_error": 0.123,
            "bins": [
                {"lower": 0.0, "upper": 0.5, "images": 0},
                {"lower": 0.5, "upper": 1.0, "images": 5 * count, "confidence": 0.9, "accuracy": 0.8},
            ],
        },
        "robustness": {"attack": "fgsm", "epsilon": 0.1, "accuracy": 0.4},
        "regularization": {
            "epochs": [{"epoch": n, **{k: {"value": terms[k], "share": shares[k]} for k in terms}} for n in numbers],
            "warnings": [{"term": "l1", "kind": "negligible", "message": "l1 makes up 0 of the update"}],
        },
        "sparsity": {"zeros": 0.25, "by_layer": {"dense1": 0.0, "head": 0.5}},
        "parameters": {"trained": 5946, "total": 107786, "delta_bytes": 23784},
        "training": {"epochs": epochs, "kept_epoch": 3, "ended_by": "epochs", "overfitted_attack_in_epoch": None},
        "history": [{"epoch": n, **terms, **kept, **attacked} for n in numbers],
        "device": "CPU:0",
        "cost": {"seconds": {"training": 2.5}, "images_per_second": 3456, "peak_memory_bytes": 876843008},
    }  # fmt: skip


def full_report(classes: list[str]) -> Json:
    """As it is when the costly part has run."""
    point = {"fgsm": 0.4, "pgd": 0.3, "square": 0.35, "worst": 0.288}
    found = {
        "images": 50, "curve": [{"epsilon": size, **point} for size in (0.0, 0.05, 0.1, 0.2)],
        "settings": {"pgd_steps": 40}, "accuracy_at_epsilon_1": 0.0, "gradient_masking": [], "trusted": True,
    }  # fmt: skip
    report = quick_report(classes)
    forgetting = {"sample": "synthetic digits", "images": 500, "base": 0.994, "accuracy": 0.964, "lost": 0.03}
    return report | {"robustness": report["robustness"] | found, "forgetting": forgetting}


def shown(report: Json, classes: list[str]) -> Page:
    return Page(html("digits", 3, report, manifest(classes)))


def test_what_is_wrong_with_the_data_is_on_the_page() -> None:
    about = manifest(DIGITS)
    assert "About the data" not in html("digits", 3, full_report(DIGITS), about)
    about["dataset"]["findings"] = [{"kind": "conflict", "message": f"2 images {STRANGE}", "images": 2, "listed": []}]
    page = html("digits", 3, full_report(DIGITS), about)
    assert "About the data" in Page(page).texts
    assert f"2 images {STRANGE}" in " ".join(Page(page).texts)
    assert STRANGE not in page


DIGITS = [str(digit) for digit in range(10)]
PLOTS = [
    "Loss by epoch",
    "Accuracy by epoch",
    "Share of each term in the update",
    "Robustness",
    "Reliability",
    "Confusion matrix",
]


def test_a_full_report_has_every_figure_plot_and_table() -> None:
    page = shown(full_report(DIGITS), DIGITS)
    assert page.plots() == PLOTS
    for text in (
        "digits:3",
        "80.0%",
        "61.0% to 91.0%",
        "+10.0 pp",
        "12.3%",
        "28.8%",
        "5,946",
        "96.4%",
        "12345",
        "877 MB",
    ):
        assert text in page.text
    for heading in ("Classes", "Calibration", "Sparsity", "Forgetting", "Cost", "Spec"):
        assert heading in page.text
    assert "not measured yet" not in page.text.lower()


@pytest.mark.parametrize("method", ["full", "head", "bias", "lora", "adapter", "ia3"])
def test_every_method_has_a_page(method: str) -> None:
    spec = described(parse_spec(json.dumps({"method": method})))
    page = Page(html("digits", 3, full_report(DIGITS), manifest(DIGITS) | {"spec": spec}))
    assert f"by {method}" in page.text


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = html("digits", 3, full_report(DIGITS), manifest(DIGITS))
    assert not re.search(r"https?:|//\w|@import|url\(", page)
    assert not {"script", "link", "img", "iframe"} & set(Page(page).tags)


@pytest.mark.parametrize("count", [2, 30, 31, 50])
def test_names_from_outside_are_only_ever_text(count: int) -> None:
    classes = [STRANGE, *(f"{n} {STRANGE} with a name as long as a name may be" for n in range(1, count))]
    report = full_report(classes) | {"device": STRANGE}
    report["regularization"]["warnings"][0]["message"] = report["forgetting"]["sample"] = STRANGE
    page = shown(report, classes)
    assert "script" not in page.tags
    assert page.text.count(STRANGE) >= count + 4  # in the table; file, device, warning, sample


def test_few_classes_have_numbers_in_the_matrix_and_many_do_not() -> None:
    for count, numbered in ((30, True), (31, False)):
        classes = [f"class {n}" for n in range(count)]
        page = html("digits", 3, quick_report(classes), manifest(classes))
        assert len(re.findall(r'<text class="middle (?:strong|number)"', page)) == (2 * count if numbered else 0)
        assert "4 of 5 images of class 7: class 7" in page


def test_a_quick_report_says_what_is_not_measured_yet() -> None:
    for report in (quick_report(DIGITS), quick_report(DIGITS) | {"forgetting": None}):
        page = shown(report, DIGITS)
        assert page.plots() == [plot for plot in PLOTS if plot != "Robustness"]
        assert "Worst case, ε = 0.1 … not measured yet" in page.text
        assert "Not measured yet Accuracy under PGD and Square" in page.text
        assert "Forgetting Not measured yet" in page.text


def test_forgetting_that_nothing_can_measure_is_not_announced() -> None:
    page = shown(full_report(DIGITS) | {"forgetting": None}, DIGITS)
    assert "not measured yet" not in page.text.lower()
    assert "There is no data left to measure it on" in page.text


@pytest.mark.parametrize("part", sorted(full_report(DIGITS)))
def test_any_part_may_be_missing(part: str) -> None:
    report = full_report(DIGITS)
    shown({name: value for name, value in report.items() if name != part}, DIGITS)
    shown(report | {part: None}, DIGITS)
    shown({part: report[part]}, DIGITS)


def test_masked_gradients_take_the_trust_from_every_robustness_figure() -> None:
    report = full_report(DIGITS)
    assert "do not trust" not in shown(report, DIGITS).text.lower()
    report["robustness"] |= {"trusted": False, "gradient_masking": ["Square beats PGD at epsilon 0.05"]}
    text = shown(report, DIGITS).text
    assert "Do not trust the robustness figures: gradients are masked Square beats PGD at epsilon 0.05" in text
    assert text.lower().count("do not trust") == 4  # the warning, both figures, the curve


def test_what_ended_training_is_said_with_its_epochs() -> None:
    report = full_report(DIGITS)
    report["training"] |= {"ended_by": "catastrophic_overfitting", "overfitted_attack_in_epoch": 4}
    text = shown(report, DIGITS).text
    assert "Catastrophic overfitting" in text
    assert "in epoch 4" in text
    assert "epoch 3 are kept" in text
    report["training"] |= {"ended_by": "early_stopping", "overfitted_attack_in_epoch": None}
    assert "Early stopping Training ended after epoch 4; the weights of epoch 3 are kept" in shown(report, DIGITS).text


def test_kernels_without_a_promise_of_zeros_are_named() -> None:
    report = full_report(DIGITS)
    assert "promised" not in shown(report, DIGITS).text
    report["sparsity"] |= {"exact_zeros_in": ["head"], "shrunk_without_zeros": ["dense1"]}
    assert "L1 promised no exact zeros in dense1" in shown(report, DIGITS).text


def test_folds_are_shown() -> None:
    folds = {
        "folds": [0.9, 1.0],
        "images": 150,
        "accuracy": 0.955,
        "accuracy_interval": [0.9, 0.98],
        "cross_entropy": 0.2,
    }
    text = shown(full_report(DIGITS) | {"cross_validation": folds}, DIGITS).text
    assert "fold 1 90.0% fold 2 100.0% all images 95.5% (90.0% to 98.0%)" in text


@pytest.mark.parametrize("epochs", [1, 2, 61, 1000])
def test_every_line_stays_inside_its_plot(epochs: int) -> None:
    report = quick_report(DIGITS, epochs)
    report["history"][-1] |= {"data_loss": 1e-30, "adversarial_loss": 1e4}
    page = html("digits", 3, report, manifest(DIGITS))
    plots = re.findall(r'<svg class="plot".*?</svg>', page, re.DOTALL)
    lines = [line for plot in plots for line in re.findall(r'<path class="line [^>]* d="M([\d.L -]+)"', plot)]
    places = [[float(number) for number in place.split()] for line in lines for place in line.split("L")]
    assert len(places) == 8 * epochs + 2  # five losses, three accuracies, and the diagonal
    assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in places)


def test_every_colour_of_a_plot_has_its_class_in_the_style_sheet() -> None:
    style = (Path(report_page.__code__.co_filename).parent / "templates/report.css").read_text(encoding="utf-8")
    for colour in {colour for _, colour, _ in LOOKS.values()}:
        assert f".report .{colour} {{ color: var(--{colour}) }}" in style
        assert f"--{colour}:" in style


def test_nothing_less_than_all_is_called_100_percent() -> None:
    report = full_report(DIGITS)
    report["validation"]["accuracy"] = 0.9996
    assert "Validation accuracy 99.96%" in shown(report, DIGITS).text


def test_the_base_model_has_its_card_and_nothing_else() -> None:
    card = json.loads((Path(__file__).parents[2] / "trainer/base/lenet5.json").read_text(encoding="utf-8"))
    page = Page(html("lenet5", 1, copy.deepcopy(card), {"classes": DIGITS, "base": None, **card}))
    assert "svg" not in page.tags
    assert "not measured" not in page.text.lower()
    for text in ("lenet5:1", card["model"], card["command"], "settings: learning rate 0.0015", "test accuracy 0.995"):
        assert text in page.text


def test_a_doubt_of_the_gate_is_among_what_to_know_before_relying_on_it() -> None:
    condition = {"condition": "not_worse", "limit": None, "value": 0.0, "interval": None, "passed": True}
    conditions = [{**condition, "doubt": doubt, "message": f"a doubt: {doubt}"} for doubt in (True, False)]
    report = full_report(DIGITS) | {"warnings": [], "gate": {"passed": True, "conditions": conditions, "overrides": []}}
    text = shown(report, DIGITS).text
    assert text.index("Before you rely on it") < text.index("a doubt: True") < text.index("a doubt: False")
    report["gate"]["conditions"] = conditions[1:]
    assert "Before you rely on it" not in shown(report, DIGITS).text


def test_images_that_are_worth_a_look_are_shown_with_their_names_escaped() -> None:
    named = {"position": 1, "file": STRANGE, "class": STRANGE}
    inspection = {
        "label_errors": {
            "images": 30, "checked": 100, "estimated_share": 0.1,
            "listed": 30 * [{**named, "suggested": "b", "probability": 0.9}],
        },
        "copies": {"images": 2, "groups": 1, "of_several_classes": 1, "listed": [[named, named]]},
        "leaks": {"images": 1, "listed": [{**named, "part": "test", "copy_of": {"position": 0, "index": 0}}]},
        "strangers": {"images": 1, "listed": [{**named, "isolation": 0.5}]},
        "overlaps": [{"classes": ["a", "b"], "images": 5, "share": 0.2}],
        "misclassified": [{**named, "predicted": "b", "probability": 0.8}],
        "least_certain": [{**named, "predicted": "a", "probability": 0.4, "position": 7}],
    }  # fmt: skip
    twin = {
        "accuracy": 0.8, "generalization_gap": 0.2, "expected_calibration_error": 0.1, "robust_accuracy": 0.1,
        "differences": {"accuracy": {"value": 0.05, "interval": [0.01, 0.09]}},
    }  # fmt: skip
    abstention = {
        "coverage": 0.95, "coverage_interval": [0.9, 0.99], "images": 100, "mean_size": 1.2, "single": 0.8,
        "empty": 0.0, "false_alarms": 0.02,
    }  # fmt: skip
    report = {"inspection": inspection, "twin": twin, "abstention": abstention, "warnings": []}
    manifest = {"base": "lenet5:1", "classes": ["a", "b"], "resolved_spec": {"method": "lora"}}
    images = {"": np.zeros((2, 28, 28), np.uint8), "test": np.zeros((2, 28, 28), np.uint8)}
    html = report_page(
        "m", 2, ReportCard.read(report), Manifest.read(manifest), created_at=0, versions=[1, 2, 3], images=images
    )
    page = Page(html)
    assert page.tags.count("img") == 24 + 2 + 1 + 1 + 1  # the first labels; none of the image that is gone
    assert "<script>" not in html
    assert "6 more are in the JSON" in page.text
    for text in ("85.0% 80.0% +5.0 (+1.0 to +9.0)", "95.0% of the time (90.0% to 99.0%)", "01 January 1970"):
        assert text in page.text
    links = [value for name, value in page.attributes if name == "href"]
    assert links == [f"/models/{path}/report" for path in ("m/versions/1", "m/versions/3", "lenet5/versions/1")]
