"""`python -m docs.screenshots`: the pictures of the page in docs/page, of a service of its own with real models.

Needs a Chromium. The service learns scikit-learn's digits twice, without defences and under attack, and shows them.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
from playwright.sync_api import Browser, sync_playwright

from demo import service
from quality.digits import all_digits
from tests.conftest import npz
from tests.ui.conftest import CHROMIUM, SEVEN, draw

FOLDER = Path(__file__).parent / "page"
SPECS: dict[str, dict[str, Any]] = {
    "plain": {"method": "full", "epochs": 20, "learning_rate": 0.003},
    "digits": {
        "method": "full", "epochs": 20, "learning_rate": 0.003,
        "adversarial": {"attack": "pgd", "epsilon": 0.15, "weight": 0.7},
    },
}  # fmt: skip


@click.command()
def main() -> None:
    """Write the pictures of every view, light and dark, to docs/page."""
    FOLDER.mkdir(exist_ok=True)
    images, labels = all_digits()
    order = np.random.default_rng(1).permutation(len(labels))[:600]
    upload = npz(images=images[order], labels=labels[order])
    chromium = next(filter(None, map(shutil.which, CHROMIUM)))
    with service() as api, sync_playwright() as driver:
        for model, spec in SPECS.items():
            fine_tune(api, upload, model, spec)
        searching = api.post("/finetune", data={"model": "digits"}, files={"data": upload}).json()["id"]
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            take(browser, str(api.base_url).rstrip("/"), scheme, searching)
        browser.close()


def fine_tune(api: httpx.Client, upload: bytes, model: str, spec: dict[str, Any]) -> None:
    """Wait until a model has its version and the version its complete report."""
    job = api.post("/finetune", data={"model": model, "spec": json.dumps(spec)}, files={"data": upload}).json()
    while True:
        job = api.get(f"/finetune/{job['id']}").json()
        if job["status"] not in ("queued", "running") and job["report_status"] == "complete":
            return
        time.sleep(0.5)


def take(browser: Browser, url: str, scheme: Any, job: str) -> None:
    """Every view in a colour scheme."""
    context = browser.new_context(viewport={"width": 1280, "height": 860}, color_scheme=scheme)
    page = context.new_page()

    def shown(path: str, until: str) -> None:
        page.goto(f"{url}/#/{path}")
        page.locator(until).first.wait_for()

    def save(name: str) -> None:
        page.wait_for_timeout(1500)  # bars and curves move to their places
        page.screenshot(path=FOLDER / f"{name}-{scheme}.png", full_page=name != "report")

    shown(f"finetune/{job}", "canvas")
    save("finetune")
    shown("draw?on=plain@stable,digits:1", ".pad canvas")
    draw(page, SEVEN)
    page.locator(".why").nth(1).wait_for()
    page.get_by_label("Worst-case change of each pixel").fill("0.12")
    save("draw")
    for name, path, until in (
        ("models", "models/digits", "main"), ("report", "models/digits/1", ".report .tiles"), ("now", "now", "main"),
    ):  # fmt: skip
        shown(path, until)
        save(name)
    context.close()


if __name__ == "__main__":
    main()
