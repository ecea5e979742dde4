"""Reasons, ε and corrections in the page, with versions that were trained for it."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.conftest import Service, npz, png
from tests.ui.conftest import opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow

Digits = tuple[np.ndarray, np.ndarray]
SPECS: dict[str, dict[str, Any]] = {
    "undefended": {"method": "full", "epochs": 12, "learning_rate": 0.003},
    "defended": {
        "method": "full", "epochs": 12, "learning_rate": 0.003,
        "adversarial": {"attack": "pgd", "epsilon": 0.2, "weight": 1.0},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(service: Service, digits: Digits) -> Service:
    """A model that was trained without attacks, and one that was trained under them."""
    upload = npz(images=digits[0][:400], labels=digits[1][:400])
    for model, spec in SPECS.items():
        form = {"model": model, "spec": json.dumps(spec)}
        job = service.api.post("/finetune", data=form, files={"data": upload}).json()
        assert service.finished(job["id"])["status"] == "succeeded"
    return service


def recognized(service: Service, digits: Digits) -> np.ndarray:
    """An image that neither model has seen and both know."""
    known = np.ones(40, bool)
    for model in SPECS:
        body = {"model": model, "range": "byte", "instances": digits[0][400:440].tolist()}
        answers = [int(one["label"]) for one in service.api.post("/predict", json=body).json()["predictions"]]
        known &= np.array(answers) == digits[1][400:440]
    image: np.ndarray = digits[0][400 + int(known.argmax())]
    return image


def open_image(page: "Page", image: np.ndarray) -> None:
    page.set_input_files("input[type=file]", {"name": "digit.png", "mimeType": "image/png", "buffer": png(image)})


def test_the_slider_flips_an_undefended_model_before_a_defended_one(
    browser: "Browser", models: Service, digits: Digits
) -> None:
    with opened(browser, f"{models.url}/#/draw?on=undefended@stable,defended@stable") as page:
        open_image(page, recognized(models, digits))
        page.locator(".why").nth(1).wait_for()
        slider, said = page.get_by_label("Worst-case change of each pixel"), page.locator(".why .now b")
        right = said.all_inner_texts()
        falls: dict[str, float] = {}
        for step in range(201):
            slider.fill(f"{step / 400:g}")
            for model, before, now in zip(SPECS, right, said.all_inner_texts(), strict=True):
                if now != before:
                    falls.setdefault(model, step / 400)
        assert falls["undefended"] < falls.get("defended", 1.0)
        assert page.locator(".nearest img, .nearest canvas").count() > 0


def test_a_correction_is_one_click_from_a_fine_tune(browser: "Browser", models: Service, digits: Digits) -> None:
    with opened(browser, f"{models.url}/#/draw?on=undefended@stable") as page:
        open_image(page, recognized(models, digits))
        page.get_by_role("button", name="Wrong answer?").click()
        page.get_by_role("group", name="What is it really?").get_by_role("button").first.click()
        page.get_by_role("button", name="Fine-tune with 1 correction").click()
        page.wait_for_url("**/#/finetune/ftjob-*")
        job = models.api.get(f"/finetune/{page.url.rpartition('/')[2]}").json()
        assert (job["model"], job["dataset"]["images"]) == ("undefended", 401)
        models.api.post(f"/finetune/{job['id']}/cancel")
        page.goto(f"{models.url}/#/models/undefended")
        corrections = page.get_by_role("region", name="Corrections")
        corrections.get_by_role("button", name="Fine-tune with 1 correction").wait_for()
        corrections.get_by_role("button", name="Remove correction 1").click()
        corrections.wait_for(state="detached")
    assert models.api.get("/feedback", params={"model": "undefended"}).json()["data"] == []
