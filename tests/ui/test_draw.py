"""Drawing, and the answers of several versions to it."""

import base64
import itertools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.conftest import eventually, png
from tests.ui.conftest import SEVEN, Gateway, answer, draw, opened
from trainer.jobs.images import decode

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FilePayload, Page, Route


def test_a_seven_drawn_with_the_mouse_is_answered_with_version_and_class(browser: "Browser", studio: Gateway) -> None:
    with opened(browser, f"{studio.url}/#/draw?on=digits@stable") as page:
        draw(page)
        answer(page, "7")
        page.locator(".sure", has_text="version 2").wait_for()
        best = page.locator(".bars .best")
        assert best.locator(".name").inner_text() == "7"
        assert float(best.locator(".value").inner_text().rstrip("%")) > 50
        page.get_by_role("status").filter(has_text="digits stable says 7").wait_for(state="attached")


def test_a_finger_draws_as_well(browser: "Browser", studio: Gateway) -> None:
    size = {"width": 360, "height": 740}
    with opened(browser, studio.url, viewport=size, has_touch=True, is_mobile=True) as page:
        box = page.locator(".pad canvas").bounding_box()
        assert box is not None
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in between(SEVEN)]
        touch = page.context.new_cdp_session(page)
        for kind, (x, y) in zip(["touchStart", *["touchMove"] * (len(places) - 1)], places, strict=True):
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        answer(page, "7")
        assert page.evaluate("scrollY") == 0


def between(corners: list[tuple[float, float]]) -> list[tuple[float, float]]:
    found = []
    for start, end in itertools.pairwise(corners):
        found += [tuple(np.add(start, np.subtract(end, start) * share)) for share in np.linspace(0, 1, 10)]
    return found


def test_answers_come_while_the_pen_moves_and_when_it_lifts(browser: "Browser", studio: Gateway) -> None:
    with opened(browser, f"{studio.url}/#/draw?on=digits@stable") as page:
        box = page.locator(".pad canvas").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.2 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.8 * box["height"], steps=15)
        answer(page, "1")  # the pen is still down
        page.mouse.up()
        page.locator(".correct button").wait_for()  # which is for finished drawings
        assert page.locator(".sure .quiet").inner_text().endswith(" ms")  # since the pen has lifted


@pytest.mark.slow
def test_up_to_four_versions_answer_side_by_side_and_the_address_remembers_them(
    browser: "Browser", studio: Gateway
) -> None:
    with opened(browser, f"{studio.url}/#/draw?on=digits@stable") as page:
        draw(page)
        for choice in ("digits:1", "paper@stable", "lenet5:1"):
            page.get_by_label("Compare with another version").select_option(choice)
        for at, version in enumerate((2, 1, 1, 1)):
            page.locator(".answer").nth(at).locator(".sure", has_text=f"version {version}").wait_for()
        for at in (0, 1, 3):  # `paper` is a copy whose graph does not invert
            answer(page, "7", at)
        assert page.get_by_label("Compare with another version").count() == 0
        page.reload()
        page.locator(".answer").nth(3).wait_for()
        page.get_by_role("button", name="Remove paper stable").click()
        assert page.url.endswith("#/draw?on=digits@stable,digits:1,lenet5:1")


def test_the_longest_names_fit_a_phone(browser: "Browser", studio: Gateway) -> None:
    name = "n" * 64
    studio.publish(name)
    with opened(browser, f"{studio.url}/#/draw?on={name}@stable", viewport={"width": 360, "height": 800}) as page:
        page.locator(".answer").wait_for()
        page.locator("option", has_text=name).first.wait_for(state="attached")
        for view in ("draw", "models", f"models/{name}"):
            page.goto(f"{studio.url}/#/{view}")
            page.get_by_role("main").wait_for()
            page.get_by_text(name).first.wait_for(state="attached")
            assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0, (
                view
            )


def test_a_drawing_is_prepared_exactly_as_an_upload_is(browser: "Browser", studio: Gateway) -> None:
    with opened(browser, f"{studio.url}/#/draw?on=digits@stable") as page:
        for digit in range(10):
            sent, url = page.evaluate(
                """async (digit) => {
                    const { canvasOf, handwritten, seen } = await import("/ui/strokes.js");
                    const strokes = handwritten(digit);
                    return [[...seen({ strokes })], canvasOf(strokes).toDataURL()];
                }""",
                digit,
            )
            prepared = decode(base64.b64decode(url.partition(",")[2]), 10**6)
            assert prepared.max() > 100
            assert sent == prepared.ravel().tolist(), digit
        page.locator(".pad canvas").focus()
        (body,) = bodies(page, lambda: page.keyboard.press("8"))
        shown = page.evaluate(
            """() => [...document.querySelector("canvas.network").getContext("2d").getImageData(0, 0, 28, 28).data]
                .filter((_, at) => at % 4 === 0)"""
        )
        assert body == bytes(shown)


def bodies(page: "Page", act: Callable[[], object]) -> list[bytes]:
    """The bodies of predictions that are asked for while something is done."""
    found: list[bytes] = []

    def note(route: "Route") -> None:
        found.append(route.request.post_data_buffer or b"")
        route.continue_()

    def look() -> list[bytes]:
        page.wait_for_timeout(20)  # in which Playwright calls `note`
        return found

    page.route("**/predict?*", note)
    act()
    eventually(look, "a prediction is asked for")
    page.unroute("**/predict?*")
    return found


@pytest.mark.slow
def test_a_version_gets_its_picture_as_it_learned_them(browser: "Browser", studio: Gateway) -> None:
    grounds = {}
    for target in ("digits@stable", "paper@stable"):
        with opened(browser, f"{studio.url}/#/draw?on={target}") as page:
            page.locator(".pad").wait_for()
            sent = bodies(page, lambda: draw(page))
            grounds[target] = int(np.median(np.frombuffer(sent[0], np.uint8)))
    assert grounds == {"digits@stable": 0, "paper@stable": 255}


@pytest.mark.slow
def test_an_image_is_opened_pasted_or_dropped_and_goes_as_it_is(
    browser: "Browser", studio: Gateway, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    at = int(np.flatnonzero(digits[1] == 3)[0])
    image = png(digits[0][at])
    give = """([name, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "three.png", { type: "image/png" }));
        const event = name === "paste" ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
            : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
        document.body.dispatchEvent(event);
    }"""
    with opened(browser, f"{studio.url}/#/draw?on=lenet5@stable", expected=("422", "ERR_FILE_NOT_FOUND")) as page:
        page.locator(".pad").wait_for()
        upload: FilePayload = {"name": "three.png", "mimeType": "image/png", "buffer": image}
        ways = (
            lambda: page.set_input_files("input[type=file]", upload),
            lambda: page.evaluate(give, ["paste", list(image)]),
            lambda: page.evaluate(give, ["drop", list(image)]),
        )
        for way in ways:
            assert bodies(page, way) == [image]
            answer(page, "3")
            assert page.locator(".pad .given").count() == 1
            page.get_by_role("button", name="Clear").click()
            page.locator(".pad .hint").wait_for()
        page.set_input_files("input[type=file]", {**upload, "buffer": b"no image"})
        page.get_by_role("alert").filter(has_text="not an image").wait_for()


@pytest.mark.slow
def test_versions_that_cannot_be_explained_say_so(browser: "Browser", studio: Gateway) -> None:
    refusal = {"error": {"code": "not_explainable", "message": "it was exported by a release without explanations"}}
    with opened(browser, f"{studio.url}/#/draw?on=digits@stable", expected=("/explain",)) as page:
        page.route("**/explain?*", lambda route: route.fulfill(status=409, body=json.dumps(refusal)))
        draw(page)
        page.get_by_text("This version was made before versions could be explained.").wait_for()


PICTURE = f"data:image/png;base64,{base64.b64encode(png(np.zeros((28, 28), np.uint8))).decode()}"


def explained(falls: float | None) -> dict[str, Any]:
    """What POST /explain answers for a seven that turns into a one at an ε."""
    path: list[dict[str, Any]] = [
        {"epsilon": at / 32, "label": "1" if falls is not None and at / 32 >= falls else "7", "probability": 0.9,
         "probabilities": [], "image": PICTURE}
        for at in range(17)
    ]  # fmt: skip
    explanation = {
        "class": "7", "image": PICTURE, "smooth_grad": PICTURE, "adversarial": path, "nearest": None,
        "integrated_gradients": {"picture": PICTURE, "logit": 9.0, "baseline_logit": 0.0},
        "nearest_reason": "The training images are not kept.",
        "stability": {"epsilon": falls, "label": None if falls is None else "1", "limit": 0.5},
    }  # fmt: skip
    return {"model": "digits", "version": 1, "classes": [], "predictions": [{"label": "7", "explanation": explanation}]}


def test_the_slider_shows_when_each_version_falls(browser: "Browser", studio: Gateway) -> None:
    """The page's part of it: the answers of /explain are made up, as the studio's versions are copies of each other."""
    with opened(browser, f"{studio.url}/#/draw?on=digits:1,digits:2") as page:
        for version, falls in ((1, 0.1), (2, None)):  # between two points of the path
            body = json.dumps(explained(falls))
            page.route(f"**/explain?*version={version}&*", lambda route, _, body=body: route.fulfill(body=body))
        draw(page)
        page.get_by_text("Falls at ε = 0.100").wait_for()
        page.get_by_text("up to ε = 0.500").wait_for()
        page.get_by_text("The training images are not kept.").first.wait_for()
        slider = page.get_by_label("Worst-case change of each pixel")
        for epsilon, labels in (("0.095", ["7", "7"]), ("0.1", ["1", "7"]), ("0.2", ["1", "7"]), ("0.5", ["1", "7"])):
            slider.fill(epsilon)
            assert page.locator(".why .now b").all_inner_texts() == labels, epsilon
        assert page.locator(".why.fallen").count() == 1
        assert "digits version 1 says 1" in (slider.get_attribute("aria-valuetext") or "")
        assert page.locator(".fall").count() == 1


def test_a_picture_that_got_no_answer_does_not_get_that_of_an_earlier_one(browser: "Browser", studio: Gateway) -> None:
    with opened(browser, f"{studio.url}/#/draw?on=digits@stable", expected=("status of 503",)) as page:
        draw(page)
        answer(page, "7")
        page.locator(".correct button").wait_for()
        error = {"error": {"code": "model_server_unavailable", "message": "no server answers"}}
        page.route("**/predict?*", lambda route: route.fulfill(status=503, body=json.dumps(error)))
        draw(page, [(0.2, 0.2), (0.2, 0.8)])
        page.get_by_text("No server answers").wait_for()
        assert page.locator(".bars .best").count() == 0
        assert page.get_by_role("button", name="Wrong answer?").count() == 0
        assert page.get_by_role("status").filter(has_text="says").count() == 0
        page.unroute("**/predict?*")
        page.locator(".bars .best").wait_for()  # it asks again by itself


def test_the_version_that_answers_stays_when_another_model_appears(browser: "Browser", studio: Gateway) -> None:
    def more(route: "Route") -> None:
        found = route.fetch().json()
        found["data"].insert(0, {**found["data"][0], "name": "another"})
        route.fulfill(body=json.dumps(found))

    with opened(browser, studio.url) as page:
        draw(page)
        answer(page, "7")
        page.route("**/models?*", more)
        page.locator("optgroup[label='another']").first.wait_for(state="attached")
        assert page.get_by_label("Version that answers").input_value() == "digits@stable"


def test_only_images_are_opened(browser: "Browser", studio: Gateway) -> None:
    with opened(browser, f"{studio.url}/#/draw?on=digits@stable") as page:
        file: FilePayload = {"name": "digits.zip", "mimeType": "application/zip", "buffer": b"PK"}
        page.set_input_files("input[type=file]", file)
        page.get_by_text("That is not an image.").wait_for()


def test_a_correction_is_noted_under_its_own_picture_only(browser: "Browser", studio: Gateway) -> None:
    held: list[Route] = []
    with opened(browser, f"{studio.url}/#/draw?on=digits@stable") as page:
        page.route("**/feedback", lambda route: held.append(route))
        page.route("**/feedback?*", lambda route: route.fulfill(body=json.dumps({"data": [], "has_more": False})))
        draw(page)
        page.get_by_role("button", name="Wrong answer?").click()
        with page.expect_request("**/feedback"):
            page.get_by_role("group", name="What is it really?").get_by_role("button", name="1", exact=True).click()
        draw(page, [(0.2, 0.2), (0.2, 0.8)])
        with page.expect_response("**/feedback?*"):
            eventually(lambda: bool(held), "the correction is sent")
            held[0].fulfill(body=json.dumps({"id": "correction"}))
        page.get_by_role("button", name="Wrong answer?").wait_for()
        assert page.get_by_text("Noted:").count() == 0


def test_the_keyboards_pen_goes_on_after_the_pad_was_cleared(browser: "Browser", studio: Gateway) -> None:
    with opened(browser, f"{studio.url}/#/draw?on=digits@stable") as page:
        pad = page.locator(".pad canvas")
        for way in ("Clear", "Undo"):
            pad.focus()
            page.keyboard.press("Space")
            for _ in range(12):
                page.keyboard.press("ArrowDown")
            answer(page, "")
            page.get_by_role("button", name=way).click()
            assert page.locator(".pen.down").count() == 0
            pad.focus()
            page.keyboard.press("ArrowUp")  # which draws nothing
            page.get_by_text("Draw a digit").wait_for()


@pytest.mark.slow
def test_where_corrections_are_off_the_page_says_so(browser: "Browser", studio: Gateway) -> None:
    gateway = Gateway(studio.place, TEMPER_FEEDBACK="0")
    try:
        with opened(browser, f"{gateway.url}/#/draw?on=digits@stable", expected=("feedback",)) as page:
            draw(page)
            page.get_by_role("button", name="Wrong answer?").click()
            page.get_by_role("group", name="What is it really?").get_by_role("button", name="1", exact=True).click()
            page.get_by_text("Corrections are switched off").wait_for()
    finally:
        gateway.stop()


def test_the_demonstration_writes_a_digit_that_is_recognized(browser: "Browser", studio: Gateway) -> None:
    with opened(browser, f"{studio.url}/#/draw?on=digits@stable") as page:
        page.locator(".pad canvas").focus()
        for digit in "0123456789":
            page.keyboard.press(digit)
            answer(page, digit)
        page.get_by_role("button", name="Show me").click()
        page.locator(".correct button").wait_for()
