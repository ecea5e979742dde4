"""The registry: versions, labels and what goes, on SQLite and on PostgreSQL."""

import threading

import pytest
import sqlalchemy as sa

from serving.registry import Label, Registry
from store.errors import GateFailed, InvalidRequest, UnknownModel, WrongState
from store.records import Condition, GateCard, Manifest, ReportCard


@pytest.fixture
def registry(engine: sa.Engine) -> Registry:
    """With versions 1 to 4 of `m`, all live."""
    registry = Registry(engine)
    for number in (1, 2, 3, 4):
        assert registry.reserve("m", f"job{number}", Manifest(classes=("a", "b")), ReportCard()) == number
        registry.go_live("m", number)
    return registry


def test_version_numbers_are_never_given_twice(engine: sa.Engine) -> None:
    registry = Registry(engine)
    numbers: list[int] = []

    def reserve() -> None:
        numbers.extend(registry.reserve("m", None, Manifest(classes=("a",)), ReportCard()) for _ in range(10))

    threads = [threading.Thread(target=reserve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 31))
    registry.remove("m", 30)
    registry.forget("m", 30)
    assert registry.reserve("m", None, Manifest(classes=("a",)), ReportCard()) == 31


def test_only_live_versions_are_routed_and_stable_is_the_last_to_go_live(engine: sa.Engine) -> None:
    registry = Registry(engine)
    for number in (1, 2, 3):
        assert registry.reserve("m", f"job{number}", Manifest(classes=("a", "b")), ReportCard()) == number
    with pytest.raises(UnknownModel):
        registry.find("m")
    assert registry.routes() == {}
    registry.go_live("m", 2)
    registry.go_live("m", 1)
    assert registry.find("m").version == 1
    routes = registry.routes()
    assert routes["m"].classes == {1: ("a", "b"), 2: ("a", "b")}
    assert routes["m"].labels == {"stable": Label(1)}
    registry.remove("m", 1)  # a live version is no longer to be given up
    assert registry.find("m", 1).live
    with pytest.raises(UnknownModel, match="no version 3"):
        registry.find("m", 3)


def test_a_label_moves_back_and_forth_and_only_to_live_versions(registry: Registry) -> None:
    registry.put_label("m", "stable", 2)
    assert registry.find("m").version == 2
    registry.put_label("m", "stable", 4)
    assert registry.find("m").version == 4
    registry.reserve("m", None, Manifest(classes=("a",)), ReportCard())
    with pytest.raises(UnknownModel, match="no version 5"):
        registry.put_label("m", "stable", 5)
    with pytest.raises(UnknownModel, match="no model 'n'"):
        registry.put_label("n", "stable", 1)
    assert registry.labels("m") == {"stable": Label(4)}


def test_shares_of_the_traffic_are_at_most_one_and_none_is_of_stable(registry: Registry) -> None:
    registry.put_label("m", "canary", 3, 0.7)
    registry.put_label("m", "other", 2, 0.3)
    with pytest.raises(InvalidRequest, match=r"would get 1\.1 of 1"):
        registry.put_label("m", "other", 2, 0.4)
    with pytest.raises(InvalidRequest, match="what the other labels leave"):
        registry.put_label("m", "stable", 2, 0.1)
    assert registry.routes()["m"].labels["other"] == Label(2, 0.3)


def test_a_version_published_as_canary_keeps_the_canarys_share(registry: Registry) -> None:
    registry.put_label("m", "canary", 3, 0.2)
    registry.go_live("m", registry.reserve("m", None, Manifest(classes=("a",)), ReportCard()), "canary")
    assert registry.labels("m") == {"stable": Label(4), "canary": Label(5, 0.2)}
    registry.go_live("new", registry.reserve("new", None, Manifest(classes=("a",)), ReportCard()), "canary")
    assert registry.labels("new") == {"stable": Label(1), "canary": Label(1)}


def test_only_versions_without_label_can_be_retired(registry: Registry) -> None:
    registry.put_label("m", "canary", 3)
    for version, label in ((4, "stable"), (3, "canary")):
        with pytest.raises(WrongState, match=f"m:{version} is labelled {label}"):
            registry.retire("m", version)
    assert registry.retire("m", 1) == [1]
    with pytest.raises(UnknownModel, match="no version 1"):
        registry.retire("m", 1)
    assert registry.wanted() == {"m": [4, 3, 2]}
    assert registry.removed() == [("m", 1)]
    registry.forget("m", 1)
    assert registry.removed() == []
    with pytest.raises(WrongState):
        registry.retire("lenet5")


def test_model_servers_load_the_base_and_the_labelled_versions_first(registry: Registry) -> None:
    registry.go_live("lenet5", registry.reserve("lenet5", None, Manifest(classes=("a",)), ReportCard()))
    registry.go_live("a", registry.reserve("a", None, Manifest(classes=("a",)), ReportCard()))
    registry.put_label("m", "stable", 2)
    wanted = registry.wanted()
    assert list(wanted) == ["lenet5", "a", "m"]
    assert wanted["m"] == [2, 4, 3, 1]


def test_a_retired_model_is_gone_with_its_labels_and_its_numbers_are_not_given_again(registry: Registry) -> None:
    assert registry.retire("m") == [1, 2, 3, 4]
    assert registry.routes() == {}
    assert registry.labels("m") == {}
    with pytest.raises(UnknownModel):
        registry.retire("m")
    assert registry.reserve("m", None, Manifest(classes=("a",)), ReportCard()) == 5


def test_what_is_surplus_is_old_and_without_label(registry: Registry) -> None:
    registry.put_label("m", "canary", 1)
    assert registry.surplus("m", 2) == [2]
    assert registry.surplus("m", 9) == []
    assert registry.surplus("nobody", 2) == []


def test_a_label_can_go_but_for_stable(registry: Registry) -> None:
    registry.put_label("m", "canary", 1)
    registry.drop_label("m", "canary")
    with pytest.raises(UnknownModel, match="no label 'canary'"):
        registry.drop_label("m", "canary")
    with pytest.raises(WrongState, match="can only be moved"):
        registry.drop_label("m", "stable")


def test_every_change_changes_the_revision(registry: Registry) -> None:
    seen = {registry.revision()}
    for change in (
        lambda: registry.put_label("m", "canary", 1),
        lambda: registry.drop_label("m", "canary"),
        lambda: registry.retire("m", 1),
        lambda: registry.forget("m", 1),
        lambda: registry.reserve("m", None, Manifest(classes=("a",)), ReportCard()),
        lambda: registry.go_live("m", 5),
    ):
        change()
        seen.add(registry.revision())
    assert len(seen) == 7


def failing(registry: Registry) -> int:
    """A live version that has failed its gate."""
    conditions = [Condition(condition="accuracy", passed=False, message="accuracy is 1%")]
    card = ReportCard(gate=GateCard(passed=False, conditions=conditions))
    number = registry.reserve("m", None, Manifest(classes=("a", "b")), card)
    registry.go_live("m", number, takes_label=lambda stable: False)
    return number


def test_a_version_that_failed_its_gate_gets_a_label_only_by_an_override_which_is_recorded(registry: Registry) -> None:
    number = failing(registry)
    assert registry.labels("m") == {"stable": Label(4)}
    before = registry.revision()
    with pytest.raises(GateFailed, match="the gate of m:5 has failed: accuracy is 1%"):
        registry.put_label("m", "canary", number)
    assert registry.revision() == before
    registry.put_label("m", "canary", number, override=True)
    registry.put_label("m", "canary", number, 0.5)  # which moves nothing
    registry.put_label("m", "stable", 4, override=True)  # which needs none
    gate = registry.find("m", number).report.gate
    assert gate is not None
    (override,) = gate.overrides
    assert (override.label, gate.passed) == ("canary", False)
    assert abs(override.at - registry.clock()) < 60
    assert registry.find("m", 4).report.gate is None


def test_an_override_that_is_refused_leaves_no_record(registry: Registry) -> None:
    number = failing(registry)
    with pytest.raises(InvalidRequest):
        registry.put_label("m", "stable", number, 0.5, override=True)
    registry.put_label("m", "canary", 3, 0.7)
    with pytest.raises(InvalidRequest):
        registry.put_label("m", "other", number, 0.7, override=True)
    gate = registry.find("m", number).report.gate
    assert gate is not None
    assert gate.overrides == []


def test_a_first_version_that_takes_no_label_is_live_without_any(engine: sa.Engine) -> None:
    registry = Registry(engine)
    seen: list[int | None] = []

    def takes(stable: int | None) -> bool:
        seen.append(stable)
        return False

    for label in ("stable", "canary"):
        number = registry.reserve("m", None, Manifest(classes=("a",)), ReportCard())
        registry.go_live("m", number, label, takes_label=takes)
    assert registry.labels("m") == {}
    assert registry.stable("m") is None
    assert [version.version for version in registry.of_model("m")] == [2, 1]
    registry.put_label("m", "stable", 1)
    stable = registry.stable("m")
    assert stable is not None
    assert (stable.version, seen) == (1, [None, None])


def test_a_model_keeps_its_gate_until_it_is_deleted(registry: Registry) -> None:
    assert registry.gate("m") is None
    registry.set_gate("m", {"accuracy": 0.5})
    registry.reserve("m", None, Manifest(classes=("a",)), ReportCard())
    assert registry.gate("m") == {"accuracy": 0.5}
    registry.set_gate("m", None)
    assert registry.gate("m") is None
    registry.set_gate("m", {"accuracy": 0.5})
    registry.retire("m")
    assert registry.gate("m") is None
    for nobody in ("m", "n"):
        with pytest.raises(UnknownModel, match=f"no model '{nobody}'"):
            registry.set_gate(nobody, {})
