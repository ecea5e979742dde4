"""Fine-tune: from a folder of images to a live version, in a real Chromium in front of a real service."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.conftest import Service, eventually, npz, png, zipped
from tests.ui.conftest import opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow

Digits = tuple[np.ndarray, np.ndarray]
ZIPS = "input[accept='.zip,.npz']"
FOLDERS = "input[webkitdirectory]"
REFUSED = "status of 422"  # a browser notes every refusal in its console
DROP = """async ({ name, content }) => {
  const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name));
  for (const type of ["dragenter", "dragover", "drop"]) {
    const event = new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true });
    document.querySelector(".dropzone").dispatchEvent(event);
  }
}"""


@pytest.fixture
def tuning(browser: "Browser", service: Service) -> Iterator["Page"]:
    """The view, before anything is uploaded. Errors of the console fail the test, refusals excepted."""
    with opened(browser, f"{service.url}/#/finetune", (REFUSED,)) as page:
        page.locator(".dropzone").wait_for()
        yield page


def choose(page: "Page", name: str, content: bytes, model: str = "") -> None:
    """Choose a file, and wait for its report."""
    page.set_input_files(ZIPS, {"name": name, "mimeType": "application/zip", "buffer": content})
    page.locator(".dataset").wait_for()
    if model:
        page.get_by_label("Model", exact=True).fill(model)


def start(page: "Page", **spec: Any) -> str:
    """Start with a recipe of our own; returns the job's id."""
    page.get_by_label("Use my recipe").check()
    for group in ("Training", "Evaluation"):
        page.locator("summary", has_text=group).click()
    for label, value in spec.items():
        page.get_by_label(label.replace("_", " ").capitalize(), exact=True).fill(str(value))
        page.keyboard.press("Tab")
    page.get_by_role("button", name="Fine-tune").click()
    page.wait_for_url("**/finetune/ftjob-*")
    return page.url.rpartition("/")[2]


def points(page: "Page") -> int:
    return int(page.locator(".chart").first.get_attribute("data-points") or 0)


def test_an_upload_becomes_a_live_version_while_its_curves_grow(
    tuning: "Page", service: Service, digits_zip: bytes
) -> None:
    choose(tuning, "digits.zip", digits_zip, "grown")
    assert tuning.locator(".classes li").count() == 10
    eventually(lambda: tuning.locator(".classes .strip img").count() >= 50, "pictures of each class are shown")
    tuning.locator(".start .go", has_text="about").wait_for()
    job = start(tuning, epochs=40)
    tuning.locator(".chart").first.wait_for()
    assert tuning.locator(".stages li", has_text="searching").count() == 0  # nothing is left to a search
    before = points(tuning)
    eventually(lambda: points(tuning) > before, "the curve grows")
    assert tuning.locator(".plotarea canvas").count() >= 2
    tuning.get_by_role("heading", name="grown:1 is live").wait_for(timeout=120_000)
    assert points(tuning) == 40
    assert service.api.get(f"/finetune/{job}").json()["status"] == "succeeded"
    assert tuning.get_by_role("link", name="Draw with it").get_attribute("href") == "#/draw?model=grown"
    tuning.get_by_role("link", name="Report card").click()
    tuning.locator(".report svg").first.wait_for()


def test_a_file_that_is_no_image_is_named_and_left_out_on_request(
    tuning: "Page", service: Service, digits: Digits
) -> None:
    images, labels = digits
    files = {f"{labels[at]}/{at}.png": png(images[at]) for at in range(200, 300)}
    broken = zipped({**files, "4/broken.png": b"\x89PNG but no more", "7/empty.png": b""})
    tuning.set_input_files(ZIPS, {"name": "some.zip", "mimeType": "application/zip", "buffer": broken})
    refusal = tuning.locator(".refusal")
    refusal.get_by_text("2 files cannot be used").wait_for()
    for name in ("4/broken.png", "7/empty.png"):
        assert refusal.get_by_role("row", name=name).is_visible()
    refusal.get_by_role("button", name="Leave them out and go on with 100 files").click()
    tuning.locator(".dataset").wait_for()
    assert tuning.locator(".tiles b").first.inner_text() == "100"


def test_copies_are_shown_and_can_be_left_out(tuning: "Page", service: Service, digits: Digits) -> None:
    images, labels = digits
    files = {f"{labels[at]}/{at}.png": png(images[at]) for at in range(300, 400)}
    copy = f"{labels[300]}/copy.png"
    choose(tuning, "copies.zip", zipped({**files, copy: png(images[300])}), "without-copies")
    findings = tuning.locator(".findings", has_text="Copies")
    eventually(lambda: findings.locator("img").count() == 2, "both are shown")
    findings.get_by_role("button", name="Leave out 1 copy").click()
    assert findings.locator("[aria-pressed=true]", has_text=copy).is_visible()
    tuning.get_by_text("1 left out").wait_for()
    job = start(tuning, epochs=1)
    assert service.api.get(f"/finetune/{job}").json()["dataset"]["images"] == 100
    service.finished(job)


def test_arrays_are_drawn_without_asking_the_gateway(tuning: "Page", digits: Digits) -> None:
    images, labels = digits
    names = np.array(["a", "übrig"])[labels[:60] % 2]  # text
    strips = tuning.locator(".classes .strip img[src^='data:image/png']")
    for given, least in ((labels[:60], 30), (names, 10)):
        choose(tuning, "arrays.npz", npz(images=images[:60], labels=given))
        strips.nth(least - 1).wait_for(state="attached")
        tuning.get_by_role("button", name="Other images").click()


def test_the_images_of_a_class_with_folders_of_its_own_are_shown(tuning: "Page", digits: Digits) -> None:
    images, labels = digits
    choose(tuning, "deep.zip", zipped({f"{labels[at]}/some/{at}.png": png(images[at]) for at in range(60)}))
    eventually(lambda: tuning.locator(".classes .strip img").count() >= 30, "the pictures are shown")


def test_a_folder_is_packed_in_the_browser(tuning: "Page", tmp_path: Path, digits: Digits) -> None:
    images, labels = digits
    for at in range(400, 460):
        place = tmp_path / "stamps" / f"class {labels[at]}" / f"{at}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(images[at]))
    (tmp_path / "stamps" / ".DS_Store").write_bytes(b"nothing")
    tuning.set_input_files(FOLDERS, tmp_path / "stamps")
    tuning.locator(".dataset").wait_for()
    assert tuning.locator(".tiles b").first.inner_text() == "60"
    assert tuning.locator(".classes .name").first.inner_text() == "class 0"
    assert tuning.get_by_label("Model", exact=True).input_value() == "stamps"


def test_a_file_can_be_dropped(tuning: "Page", digits: Digits) -> None:
    images, labels = digits
    content = npz(images=images[60:120], labels=labels[60:120])
    tuning.evaluate(DROP, {"name": "dropped.npz", "content": base64.b64encode(content).decode()})
    tuning.get_by_role("heading", name="dropped.npz").wait_for()


def test_the_keyboard_opens_the_choice_of_files(tuning: "Page") -> None:
    with tuning.expect_file_chooser():  # which takes effect before the focus has moved
        tuning.get_by_role("button", name="Choose a zip or npz").focus()
        tuning.keyboard.press("Enter")


def test_a_job_pauses_goes_on_and_asks_before_it_is_cancelled(
    tuning: "Page", service: Service, digits_zip: bytes
) -> None:
    choose(tuning, "digits.zip", digits_zip, "steered")
    job = start(tuning, epochs=1000)
    status = tuning.locator(".jobline .status")
    tuning.locator(".chart").first.wait_for()
    tuning.get_by_role("button", name="Pause").click()
    status.get_by_text("paused").wait_for(timeout=60_000)
    tuning.get_by_role("button", name="Resume").click()
    status.get_by_text("running").wait_for(timeout=60_000)
    tuning.get_by_role("button", name="Cancel").click()
    dialog = tuning.get_by_role("dialog", name="Cancel this fine-tune?")
    dialog.get_by_role("button", name="Let it go on").click()
    assert service.api.get(f"/finetune/{job}").json()["cancel_requested"] is False
    tuning.get_by_role("button", name="Cancel").click()
    dialog.get_by_role("button", name="Cancel the fine-tune").click()
    status.get_by_text("cancelled").wait_for()
    assert service.api.get(f"/finetune/{job}").json()["status"] == "cancelled"


def test_the_search_is_shown_as_it_happens(tuning: "Page", service: Service, digits_zip: bytes) -> None:
    choose(tuning, "digits.zip", digits_zip, "searched")
    tuning.locator("summary", has_text="Search").click()
    tuning.get_by_label("Trials", exact=True).fill("12")
    tuning.keyboard.press("Tab")
    tuning.get_by_role("button", name="Fine-tune").click()
    tuning.wait_for_url("**/finetune/ftjob-*")
    search = tuning.locator(".search")
    search.get_by_text("Best so far").first.wait_for(timeout=120_000)
    eventually(lambda: search.locator("circle").count() >= 3, "recipes are drawn")
    assert search.locator(".recipes tbody tr").count() >= 3
    tuning.get_by_text("Version 1 is live already").wait_for()
    eventually(lambda: search.locator("tr.dropped").count() > 0, "some are dropped", 120)
    job = tuning.url.rpartition("/")[2]
    service.api.post(f"/finetune/{job}/cancel")
    tuning.locator(".jobline .status", has_text="cancelled").wait_for()


def test_what_is_refused_is_said_at_its_field(tuning: "Page", digits_zip: bytes) -> None:
    choose(tuning, "digits.zip", digits_zip, "Not A Name")
    tuning.locator("#start-model.error", has_text="1 to 64").wait_for()
    tuning.get_by_label("Model", exact=True).fill("named")
    tuning.locator("#start-model.quiet").wait_for()
    tuning.locator("summary", has_text="Regularization").click()
    ridge = tuning.get_by_label("L2 (ridge)")
    ridge.fill("99")
    ridge.press("Tab")
    field = tuning.locator(".field.wrong", has=ridge)
    field.get_by_text("must be at most 10").wait_for()
    assert ridge.get_attribute("aria-invalid") == "true"
    ridge.fill("1e-3")
    ridge.press("Tab")
    field.wait_for(state="detached")


def test_only_what_was_set_is_sent_and_the_rest_is_searched(tuning: "Page", digits_zip: bytes) -> None:
    choose(tuning, "digits.zip", digits_zip, "asked")
    tuning.locator("summary", has_text="Regularization").click()
    assert tuning.get_by_label("Dropout").get_attribute("placeholder") == "automatic"
    tuning.get_by_label("Dropout").fill("0.3")
    tuning.get_by_label("Augmentation").select_option("on")
    tuning.get_by_label("Shift").fill("2")
    tuning.keyboard.press("Tab")
    tuning.locator("summary", has_text="As JSON").click()
    sent = json.loads(tuning.locator(".specform pre").inner_text())
    assert sent == {"dropout": 0.3, "augmentation": {"shift": 2}, "search": {}}


def test_what_was_prepared_survives_a_look_at_another_view(tuning: "Page", digits_zip: bytes) -> None:
    choose(tuning, "digits.zip", digits_zip, "kept-draft")
    tuning.get_by_role("link", name="Models").click()
    tuning.get_by_role("heading", name="Models").wait_for()
    tuning.get_by_role("link", name="Fine-tune", exact=True).click()
    assert tuning.get_by_label("Model", exact=True).input_value() == "kept-draft"
    eventually(lambda: tuning.locator(".classes .strip img").count() >= 50, "its pictures are there again")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_prepared_fine_tune_is_accessible_and_fits_a_phone(
    browser: "Browser", service: Service, digits_zip: bytes, scheme: Any
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    options = {"viewport": {"width": 360, "height": 800}, "color_scheme": scheme, "reduced_motion": "reduce"}
    with opened(browser, f"{service.url}/#/finetune", (REFUSED,), **options) as page:
        page.locator(".dropzone").wait_for()
        choose(page, "digits.zip", digits_zip)
        page.locator(".specform details").first.wait_for()
        page.evaluate("document.querySelectorAll('.specform details').forEach((one) => (one.open = true))")
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        violations = axe.Axe().run(page).response["violations"]
        serious = [each for each in violations if each["impact"] in ("serious", "critical")]
        assert not serious, [(each["id"], [node["target"] for node in each["nodes"]]) for each in serious]
