"""What the service does at the moment, as the page shows it."""

import re
from typing import TYPE_CHECKING

import pytest

from tests.conftest import Service, eventually
from tests.ui.conftest import opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow

NONE = "\N{EN DASH}"
BODY = {"model": "lenet5", "instances": [[0] * 784] * 3}


def test_traffic_shows_within_seconds(browser: "Browser", service: Service) -> None:
    with opened(browser, f"{service.url}/#/now") as page:
        page.locator(".traffic-figure").first.wait_for()

        def shown() -> bool:
            for _ in range(5):
                service.api.post("/predict", json=BODY).raise_for_status()
            page.wait_for_timeout(50)  # lets the page work: this process drives it
            rate = page.locator(".traffic-figure", has_text="Predictions a second").locator("b").inner_text()
            latency = page.locator(".traffic-figure", has_text="Latency").locator("b").inner_text()
            return rate not in (NONE, "0.0") and re.fullmatch(r"[\d.]+ m?s", latency) is not None

        eventually(shown, "rate and latency show the predictions")
        row = page.locator("table tr", has_text="lenet5:1")
        row.wait_for()
        assert page.locator(".traffic-figure", has_text="Images in a call").locator("b").inner_text() != NONE
        page.locator(".trend path.over").nth(2).wait_for()


def test_the_parts_of_the_service_show_their_state(browser: "Browser", service: Service) -> None:
    with opened(browser, f"{service.url}/#/now") as page:
        for name, state in (("Service", "ready"), ("Store", "ok"), ("Disk", "ok"), ("Model server", "ok")):
            page.locator(".states li", has_text=name).first.filter(has_text=state).wait_for()
        assert page.locator(".states li", has_text="Worker").count() == 1


def test_events_show_as_they_come(browser: "Browser", service: Service, digits_zip: bytes) -> None:
    with opened(browser, f"{service.url}/#/now") as page:
        page.get_by_role("heading", name="Events").wait_for()
        job = service.finetune(digits_zip, "seen-now", '{"epochs": 2}').json()
        page.set_default_timeout(120_000)
        page.locator(".feed li", has_text="seen-now").filter(has_text="epoch 2 of 2").wait_for()
        page.locator(".feed li", has_text="seen-now").filter(has_text="version 1 is live").wait_for()
        assert page.locator(".feed li", has_text="seen-now").filter(has_text="epoch").count() == 1  # the newest
        page.locator(f".feed a[href='#/finetune/{job['id']}']").first.click()
        page.wait_for_url("**/#/finetune/ftjob-*")
        service.completed(job["id"])


@pytest.mark.exhaustive
def test_a_model_server_that_is_lost_shows(browser: "Browser", service: Service) -> None:
    with opened(browser, f"{service.url}/#/now", expected=("503",)) as page:
        server = page.locator(".states li", has_text="Model server").first
        server.filter(has_text="ok").wait_for()
        page.evaluate(
            """() => {
                window.seen = [];
                const states = document.querySelector(".states");
                const note = () => window.seen.push(states.innerText);
                new MutationObserver(note).observe(states, { subtree: true, characterData: true, childList: true });
            }"""
        )
        service.kill("serving")
        page.wait_for_function("() => seen.some((text) => text.includes('unavailable'))")
        server.filter(has_text="ok").wait_for()
        eventually(service.ready, "the service is ready again")
