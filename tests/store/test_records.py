"""Records that processes share."""

import pytest

from store.records import GREY_28, Manifest, Progress, ReportCard


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        (Progress, {}),
        (Progress, {"epoch": 3, "epochs": 20, "l1": 0.0, "data_loss": 0.25, "publishing": {"staged": 1.5}}),
        (Manifest, {"classes": ["a", "b"], "base": None, "settings": {"rate": 0.1}}),
        (ReportCard, {"model": "LeNet-5", "settings": {"shift": 2.0}, "test_accuracy": 0.995}),
        (ReportCard, {"base": None, "robustness": {"attack": "pgd", "epsilon": 0.1}, "forgetting": None}),
    ],
)
def test_a_record_comes_back_as_it_was_stored(
    kind: type[Progress | Manifest | ReportCard], stored: dict[str, object]
) -> None:
    assert kind.read(stored).dump() == stored


def test_a_record_of_another_release_loses_only_what_cannot_be_read() -> None:
    found = Manifest.read({"classes": ["a"], "dataset": "an id", "colour": "grey"})
    assert found.classes == ("a",)
    assert found.dataset is None
    assert found.dump() == {"classes": ["a"], "colour": "grey"}


def test_one_unreadable_value_leaves_its_neighbours() -> None:
    found = Manifest.read({"dataset": {"id": "d", "images": 4, "validation": {"id": "v", "images": "many"}}})
    assert found.dataset is not None
    assert found.dataset.dump() == {"id": "d", "images": 4, "validation": {"id": "v"}}
    card = ReportCard.read({"history": [{"epoch": 1}, {"epoch": "two"}], "robustness": {"curve": [{"pgd": None}]}})
    assert card.dump() == {"history": [{"epoch": 1}, {}], "robustness": {"curve": [{}]}}


def test_the_input_form_is_28_by_28_grey() -> None:
    assert (GREY_28.shape, GREY_28.pixels) == ((28, 28, 1), 784)
