"""Models: versions, labels, comparison and report cards, in a real Chromium in front of real services."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import Service, eventually
from tests.ui.conftest import Gateway, opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.slow

MODEL = "routed"
QUICK = {"epochs": 3}
CONFLICT = "status of 409"  # a browser notes every refusal in its console


@pytest.fixture(scope="module")
def tuned(service: Service, digits_zip: bytes) -> Service:
    """The shared service with three versions of a model, the last of which has failed its gate."""
    for number, spec in enumerate((QUICK, {**QUICK, "seed": 1}, {**QUICK, "gate": {"accuracy": 1.0}}), start=1):
        job = service.finetune(digits_zip, MODEL, json.dumps(spec)).json()["id"]
        assert service.finished(job)["version"] == number
    service.completed(job)
    return service


@pytest.fixture
def model(browser: "Browser", tuned: Service) -> Iterator["Page"]:
    """The model's view, with `stable` at version 2 and no other label."""
    for label in set(labels(tuned)) - {"stable"}:
        tuned.api.delete(f"/models/{MODEL}/labels/{label}")
    tuned.api.put(f"/models/{MODEL}/labels/stable", json={"version": 2})
    with opened(browser, f"{tuned.url}/#/models/{MODEL}", (CONFLICT,)) as page:
        chip(page, "stable", 2).wait_for()
        yield page


def labels(service: Service) -> dict[str, int]:
    found: dict[str, int] = service.api.get(f"/models/{MODEL}").json()["labels"]
    return found


def row(page: "Page", version: int) -> "Locator":
    return page.locator(f"[data-version='{version}']")


def chip(page: "Page", label: str, version: int) -> "Locator":
    """A label where it is shown: at a version."""
    return row(page, version).locator(".chip-label", has_text=label)


def drag(page: "Page", label: str, start: int, end: int) -> None:
    """Drag a label with the mouse from one version to another."""
    boxes = [place.bounding_box() for place in (chip(page, label, start), row(page, end))]
    places = [(box["x"] + 20, box["y"] + box["height"] / 2) for box in boxes if box]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=8)
    row(page, end).and_(page.locator(".target")).wait_for()
    page.mouse.up()


def test_a_label_dragged_to_a_version_moves_there_and_back(model: "Page", tuned: Service) -> None:
    drag(model, "stable", 2, 1)
    chip(model, "stable", 1).wait_for()
    assert labels(tuned) == {"stable": 1}
    model.get_by_role("button", name="Undo: back to 2").click()
    chip(model, "stable", 2).wait_for()
    assert labels(tuned) == {"stable": 2}


def test_a_label_of_ones_own_is_set(model: "Page", tuned: Service) -> None:
    model.get_by_text("Set a label of your own").click()
    model.get_by_role("textbox", name="Label").fill("night")
    model.locator("select[name=version]").select_option("1")
    model.get_by_role("button", name="Set", exact=True).click()
    eventually(lambda: "night" in tuned.api.get(f"/models/{MODEL}").json()["labels"], "the label is set")
    tuned.api.delete(f"/models/{MODEL}/labels/night")


def test_a_label_let_go_beside_the_versions_stays(model: "Page", tuned: Service) -> None:
    box = chip(model, "stable", 2).bounding_box()
    assert box is not None
    model.mouse.move(box["x"] + 10, box["y"] + 10)
    model.mouse.down()
    model.mouse.move(300, 5, steps=5)
    model.locator(".dragged").wait_for()
    model.mouse.up()
    model.locator(".dragged").wait_for(state="detached")
    assert labels(tuned) == {"stable": 2}


def test_the_keyboard_moves_a_label(model: "Page", tuned: Service) -> None:
    chip(model, "stable", 2).focus()
    model.keyboard.press("ArrowDown")
    row(model, 1).and_(model.locator(".target")).wait_for()
    model.keyboard.press("Escape")
    model.locator(".target").wait_for(state="detached")
    model.keyboard.press("ArrowDown")
    model.keyboard.press("Enter")
    chip(model, "stable", 1).wait_for()
    assert labels(tuned) == {"stable": 1}


def test_buttons_roll_back_and_promote(model: "Page", tuned: Service) -> None:
    model.get_by_role("button", name="Roll back to version 1").click()
    chip(model, "stable", 1).wait_for()
    model.get_by_role("button", name="Promote to version 2").click()
    chip(model, "stable", 2).wait_for()
    assert labels(tuned) == {"stable": 2}


def test_a_canary_gets_its_share_by_a_slider(model: "Page", tuned: Service) -> None:
    model.get_by_role("button", name="Make version 1 the canary").click()
    chip(model, "canary", 1).wait_for()
    share = model.locator("input[type=range]")
    share.focus()
    for _ in range(12):
        model.keyboard.press("ArrowRight")
    eventually(
        lambda: tuned.api.get(f"/models/{MODEL}").json()["weights"] == {"canary": 0.12}, "the canary has its share"
    )
    chip(model, "canary 12%", 1).wait_for()
    model.get_by_role("button", name="Remove the label canary").click()
    chip(model, "canary", 1).wait_for(state="detached")
    assert labels(tuned) == {"stable": 2}


def test_the_gate_refuses_and_is_overridden_only_when_asked_twice(model: "Page", tuned: Service) -> None:
    row(model, 3).get_by_text("gate failed").wait_for()
    model.get_by_role("button", name="Promote to version 3").click()
    refusal = model.get_by_role("alert")
    refusal.get_by_text("accuracy").first.wait_for()
    assert labels(tuned) == {"stable": 2}
    refusal.get_by_role("button", name="all the same").click()
    model.get_by_role("dialog").get_by_role("button", name="Move stable").click()
    chip(model, "stable", 3).wait_for()
    assert labels(tuned) == {"stable": 3}


def test_a_version_is_verified(model: "Page") -> None:
    model.get_by_role("button", name="Verify version 2").click()
    model.get_by_text("It is what was trained.").wait_for()


def test_a_deletion_asks_first(model: "Page", tuned: Service, digits_zip: bytes) -> None:
    job = tuned.finetune(digits_zip, MODEL, json.dumps({**QUICK, "gate": {"accuracy": 1.0}})).json()["id"]
    version = tuned.finished(job)["version"]
    row(model, version).wait_for()
    model.get_by_role("button", name=f"Delete version {version}").click()
    dialog = model.get_by_role("dialog", name=f"Delete {MODEL}:{version}?")
    dialog.wait_for()
    model.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    assert row(model, version).is_visible()
    model.get_by_role("button", name=f"Delete version {version}").click()
    dialog.get_by_role("button", name="Delete", exact=True).click()
    row(model, version).wait_for(state="detached")
    assert version not in [one["version"] for one in tuned.api.get(f"/models/{MODEL}").json()["versions"]]
    assert model.get_by_role("button", name="Delete version 2").count() == 0  # it has a label


def test_two_versions_are_compared(model: "Page", tuned: Service) -> None:
    row(model, 1).get_by_label("Compare").check()
    asked: list[str] = []
    model.on("request", lambda request: asked.append(f"{request.method} {request.url.rpartition('/')[2]}"))
    row(model, 3).get_by_label("Compare").check()
    compare = model.locator(".compare")
    compare.get_by_role("heading", name="Version 1 and version 3").wait_for()
    report = tuned.api.get(f"/models/{MODEL}/versions/1").json()["report"]
    accuracy = compare.get_by_role("row", name="Accuracy").first
    assert f"{100 * report['validation']['accuracy']:.1f}%" in accuracy.inner_text()
    assert "intervals" in accuracy.inner_text()
    assert compare.locator(".matrix").count() == 3
    compare.locator(".disagree p.quiet", has_text="that their report cards show").wait_for()
    polls = asked.count(f"GET {MODEL}")
    eventually(lambda: model.evaluate("1") and asked.count(f"GET {MODEL}") >= polls + 2, "it is asked for again")
    assert (asked.count("GET report"), sum("predict" in one for one in asked)) == (2, 2)  # and not with every poll
    compare.get_by_role("link", name="Close").click()
    compare.wait_for(state="detached")


def test_the_report_card_is_part_of_the_page(model: "Page", tuned: Service, tmp_path: Path) -> None:
    model.get_by_role("link", name="Report card of version 2").click()
    card = model.locator("article.report")
    card.locator("svg.plot").first.wait_for()
    assert card.locator("img[src^='data:image/png']").count() > 0
    assert model.locator(".report b").first.evaluate("(one) => getComputedStyle(one).fontSize") == "22px"
    with model.expect_download() as download:
        model.get_by_role("button", name="Download").click()
    download.value.save_as(tmp_path / "card.html")
    assert (tmp_path / "card.html").read_bytes() == tuned.api.get(f"/models/{MODEL}/versions/2/report").content
    card.get_by_role("link", name=f"previous: {MODEL}:1").click()
    model.get_by_role("heading", name=f"{MODEL}:1").wait_for()
    assert model.url.endswith(f"#/models/{MODEL}/1")


def test_a_key_that_may_only_predict_is_shown_nothing_that_it_may_not_do(browser: "Browser", guarded: Gateway) -> None:
    _, token = guarded.keys.create("reader", scopes=["predict"])
    with opened(browser, f"{guarded.url}/#/models/lenet5", ("401",)) as page:
        page.get_by_label("API key").fill(token)
        page.keyboard.press("Enter")
        page.locator(".version").wait_for()
        assert page.get_by_role("link", name="Draw with it").is_visible()
        assert page.locator("main button").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_of_a_model_is_accessible_and_fits_a_phone(browser: "Browser", tuned: Service, scheme: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    options = {"viewport": {"width": 360, "height": 800}, "color_scheme": scheme, "reduced_motion": "reduce"}
    job = tuned.api.get("/finetune", params={"model": MODEL}).json()["data"][-1]["id"]
    views = {
        "models": ".card.model", f"models/{MODEL}": ".version",
        f"models/{MODEL}?compare=1,3": ".disagree p.quiet", f"models/{MODEL}/3": ".report svg.plot",
        f"finetune/{job}": ".live .tiles",
    }  # fmt: skip
    with opened(browser, tuned.url, **options) as page:
        for view, sign in views.items():
            page.goto(f"{tuned.url}/#/{view}")
            page.locator(sign).first.wait_for()
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0, f"{view} is {wide} pixels too wide"
            violations = axe.Axe().run(page).response["violations"]
            serious = [each for each in violations if each["impact"] in ("serious", "critical")]
            assert not serious, (view, [(each["id"], [node["target"] for node in each["nodes"]]) for each in serious])
