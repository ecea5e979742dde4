"""The page in a real Chromium, in front of real services."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from serving.publishing import seal
from serving.registry import BASE
from store.keys import Keys
from store.processes import free_port
from tests.conftest import Place, Service, eventually

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
SEVEN = [(0.3, 0.27), (0.7, 0.25), (0.45, 0.78)]  # corners, in sides of the pad


@pytest.fixture(scope="module")  # while it runs, no other test of this process could use asyncio
def browser() -> Iterator["Browser"]:
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: "Browser", url: str, expected: tuple[str, ...] = (), **options: Any) -> Iterator["Page"]:
    """The page at a URL, in a context of its own; fails if its console has shown an error.

    Args:
        expected: what errors that are no failure contain: of requests that the test wants to be refused.
        options: of the browser's context.
    """
    problems: list[str] = []

    def note(message: "ConsoleMessage") -> None:
        where = message.location["url"]
        text = f"{message.text} {where}"
        if message.type in ("error", "warning") and not any(e in text for e in expected):
            problems.append(text)

    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    try:
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", note)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        yield page
        assert not problems, problems
    finally:
        context.close()


def draw(page: "Page", corners: list[tuple[float, float]] = SEVEN) -> None:
    """Draw a line with the mouse."""
    box = page.locator(".pad canvas").bounding_box()
    assert box is not None
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=12)
    page.mouse.up()


def answer(page: "Page", label: str, at: int = 0) -> None:
    """Wait until an answer names a class."""
    page.locator(".answer").nth(at).locator(".verdict .class", has_text=label).wait_for()


class Gateway:
    """A gateway that can be killed and started again under the same address, in front of real models."""

    def __init__(self, place: Place, **environment: str) -> None:
        self.place, self._port, self._environment = place, free_port(), environment
        self.url = f"http://127.0.0.1:{self._port}"
        self.keys = Keys(place.engine)
        self.start()

    def start(self) -> None:
        environment = {
            **os.environ, "TEMPER_HOME": str(self.place.settings.home), "TEMPER_PORT": str(self._port),
            "TEMPER_MODEL_SERVER": str(self.place.settings.model_server), **self._environment,
        }  # fmt: skip
        self._process = subprocess.Popen([sys.executable, "-m", "api"], env=environment)
        eventually(lambda: httpx.get(f"{self.url}/readyz").status_code == 200, "the gateway is ready")

    def stop(self, how: int = signal.SIGKILL) -> None:
        self._process.send_signal(how)
        self._process.wait()

    def publish(self, model: str, **manifest: Any) -> int:
        """A copy of the base with changes to its manifest, as the next version of a model, labelled stable."""
        registry, settings = self.place.registry, self.place.settings
        base = registry.find(BASE)
        version = registry.reserve(model, None, base.manifest.model_copy(update=manifest), base.report)
        folder = settings.version(model, version)
        shutil.copytree(settings.version(BASE, 1), folder)
        seal(folder)
        registry.go_live(model, version)
        registry.put_label(model, "stable", version)
        eventually(lambda: self._answers(model, version), f"{model}:{version} answers")
        return version

    def _answers(self, model: str, version: int) -> bool:
        body = {"model": model, "version": version, "instances": [[0] * 784]}
        return httpx.post(f"{self.url}/predict", json=body).status_code == 200


@pytest.fixture(scope="module")
def studio(
    tmp_path_factory: pytest.TempPathFactory, model_server: str, digits: tuple[np.ndarray, np.ndarray]
) -> Iterator[Gateway]:
    """A gateway without keys and its models: the base, two versions of `digits`, and `paper`, dark on light."""
    place = Place(tmp_path_factory.mktemp("studio"), model_server, digits)
    gateway = Gateway(place)
    try:
        gateway.publish("digits")
        gateway.publish("digits")
        gateway.publish("paper", polarity="dark_on_light")
        yield gateway
    finally:
        gateway.stop(signal.SIGTERM)
        place.servers[0].reload(place.settings.home, {})
        place.engine.dispose()


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, model_server: str, digits: tuple[np.ndarray, np.ndarray]
) -> Iterator[Gateway]:
    """A gateway that requires keys."""
    place = Place(tmp_path_factory.mktemp("guarded"), model_server, digits)
    gateway = Gateway(place, TEMPER_KEYS="required")
    yield gateway
    gateway.stop(signal.SIGTERM)
    place.servers[0].reload(place.settings.home, {})
    place.engine.dispose()


@pytest.fixture
def page(browser: "Browser", service: Service) -> Iterator["Page"]:
    """The page of the shared service."""
    with opened(browser, service.url) as page:
        yield page


ROOT = Path(__file__).parent.parent.parent
UI = ROOT / "api" / "ui"
