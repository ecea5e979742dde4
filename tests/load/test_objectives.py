import json
from typing import Any

import pytest

from load.kit import LabelView
from load.objectives import judge, skewed
from load.samples import Outcome, Recorder, Samples
from load.settings import read_settings, variables
from load.summary import Run, csv_text, page, seconds, text


def samples(*outcomes: Outcome) -> Samples:
    recorder = Recorder()
    for outcome in outcomes:
        recorder.add(outcome)
    return recorder.samples()


def answer(at: float, version: int, latency_s: float = 0.01, wanted: int = 0) -> Outcome:
    return Outcome("r", at, 0.0, latency_s, model="m", version=version, wanted=wanted, is_predict=True)


def view(at: float, *versions: int) -> LabelView:
    return LabelView(at - 0.05, at, {"m": frozenset(versions)})


BEFORE, MOVED = [view(0.0, 1), view(9.5, 1)], [view(10.0, 2), view(30.0, 2)]


@pytest.mark.parametrize(
    ("outcome", "is_skewed"),
    [
        (answer(5, 1), False),
        (answer(5, 2), True),  # long before the label moves
        (answer(9.6, 2), False),  # between the looks
        (answer(9.6, 1), False),
        (answer(11.9, 1), False),  # within the tolerance
        (answer(12.1, 1), True),
        (answer(9.0, 1, latency_s=10), False),  # it started before, however long it took
        (answer(12.1, 2), False),
        (answer(5, 1, wanted=2), True),  # it named version 2
        (answer(5, 2, wanted=2), False),
    ],
)
def test_an_old_version_is_skew_once_the_tolerance_after_a_move_is_over(outcome: Outcome, is_skewed: bool) -> None:
    settings = read_settings({"skew_s": 2})
    assert bool(skewed(samples(outcome), BEFORE + MOVED, settings)) == is_skewed


def test_versions_that_share_the_traffic_are_no_skew() -> None:
    both = [view(0.0, 1, 2), view(9.0, 1, 2)]
    assert skewed(samples(answer(1, 1), answer(2, 2)), both, read_settings()) == []
    (found,) = skewed(samples(answer(3, 3)), both, read_settings())
    assert found == "m: version 3 answered, not 1, 2"


def test_dropped_arrivals_count_as_errors() -> None:
    recorder = Recorder()
    for number in range(99):
        recorder.add(answer(float(number), 1))
    recorder.drop(99.0)
    objectives = {one.name: one for one in judge(recorder.samples(), BEFORE, read_settings({"error_share": 0.009}))}
    assert objectives["errors"].value == pytest.approx(0.01)
    assert not objectives["errors"].is_kept


def test_what_was_not_measured_is_not_kept() -> None:
    objectives = {one.name: one for one in judge(samples(), [], read_settings({"accuracy": 0.5, "requests": 0}))}
    assert [name for name, one in objectives.items() if one.is_kept] == ["requests", "version skew"]
    assert objectives["p99"].record()["value"] is None


def test_workers_samples_are_merged_with_their_texts() -> None:
    one, other, master = Recorder(), Recorder(), Recorder()
    one.add(Outcome("b", 2.0, 0.0, 0.2, "late", "m"))
    other.add(Outcome("a", 1.0, 0.0, 0.1, "", "n"))
    other.drop(3.0)
    other.tick(7, 1.0, 0.5)
    for recorder in (one, other, other):  # the last has nothing more
        master.merge(recorder.take())
    found = master.samples()
    assert found.text("name").tolist() == ["a", "b"]
    assert found.text("error").tolist() == ["", "late"]
    assert found.text("model").tolist() == ["n", "m"]
    assert (found.dropped_s.tolist(), found.cpu.tolist()) == ([3.0], [[7, 1.0, 0.5]])


def finished_run(**given: Any) -> Run:
    recorder = Recorder()
    for number in range(50):
        error = "503 <overloaded>" if number == 20 else ""
        recorder.add(Outcome("POST /predict json", 100 + number / 10, 0.001, 0.1 + number / 1000, error, "m", "clean",
                             1, 0, 1, 1, is_predict=True))  # fmt: skip
    recorder.drop(102.5)
    found = recorder.samples()
    settings = read_settings({"api_key": "secret-key", **given})
    return Run("mixed", settings, found, 100.0, 105.0, judge(found, [], settings), None)


def test_the_csv_has_a_row_for_each_second() -> None:
    rows = seconds(finished_run())
    assert [row["due"] for row in rows] == [10, 10, 11, 10, 10]
    assert [row["errors"] for row in rows] == [0, 0, 1, 0, 0]
    assert [row["dropped"] for row in rows] == [0, 0, 1, 0, 0]
    assert rows[4]["p99_ms"] == pytest.approx(149)
    assert csv_text(finished_run()).splitlines()[0] == "second,due,p50_ms,p95_ms,p99_ms,errors,dropped"


def test_reports_escape_what_they_show_and_keep_the_key_to_themselves() -> None:
    run = finished_run()
    shown = page(run)
    assert "503 &lt;overloaded&gt;" in shown
    assert "<overloaded>" not in shown
    assert "//" not in shown.replace("http://www.w3.org", "")  # nothing is loaded from elsewhere
    for output in (shown, text(run), json.dumps(run.record())):
        assert "secret-key" not in output


def test_a_saturated_generator_makes_a_run_invalid_whatever_else_was_measured() -> None:
    kept = finished_run(error_share=1, requests=1)
    assert (kept.verdict, kept.exit_code) == ("kept", 0)
    invalid = finished_run(error_share=1, requests=1, lag_share=0.001)
    assert (invalid.verdict, invalid.exit_code) == ("invalid", 4)
    assert invalid.record()["generator_saturated"] is True
    missed = finished_run(requests=1)
    assert (missed.verdict, missed.exit_code) == ("missed", 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"forms": "json=1,xml=2"}, "--forms json=1,xml=2: 'xml' is none of json, png, bytes"),
        ({"kinds": "clean=x"}, "--kinds clean=x: 'x', the weight of clean, is not a number"),
        ({"kinds": "clean=0"}, "--kinds clean=0: all weights are 0"),
        ({"url": "localhost:8080"}, "--url localhost:8080: 'localhost:8080' does not begin with http:// or https://"),
        ({"rate": 0}, "--rate 0: Input should be greater than 0"),
        ({"models": "a,,b"}, "--models a,,b: 'a,,b' has an empty name"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^--") as caught:
        read_settings(given)
    assert str(caught.value) == message


def test_workers_read_the_settings_that_the_master_has(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read_settings({"api_key": "k", "rate": 7.5, "kinds": "noisy=1", "version": 3})
    for name, value in variables(settings).items():
        monkeypatch.setenv(name, value)
    assert read_settings() == settings
