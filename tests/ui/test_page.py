"""The page: how it is served, who may see what, and that everybody can use it."""

import gzip
import hashlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest

from api.http.keys import scope_of
from api.routes.page import files
from store.records import SCOPES
from tests.conftest import Service
from tests.ui.conftest import UI, Gateway, answer, draw, opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

VIEWS = {
    "draw": ".pad",
    "finetune": "main h1",
    "models": "main h1",
    "now": "main h1",
}  # and what shows that one is there
SCREENS = [
    (1280, "light"), (360, "dark"),
    *(pytest.param(screen, marks=pytest.mark.slow) for screen in ((1280, "dark"), (360, "light"))),
]  # fmt: skip
WEIGHT = 100_000  # bytes over the wire, all files together
LINES = 200
FORBIDDEN = re.compile(r"\beval\(|new Function|\.(inner|outer)HTML|insertAdjacentHTML|document\.write|localStorage")


# ---- how it is served


def test_the_page_is_open_to_everybody_and_nothing_else_is(guarded: Gateway) -> None:
    with httpx.Client(base_url=guarded.url) as api:
        for path in ("/", *(f"/ui/{name}" for name in files())):
            assert api.get(path).status_code == 200, path
        for path in ("/key", "/models", "/docs", "/metrics", "/ui/../models", "/uix"):
            assert api.get(path).status_code == 401, path
        assert api.post("/ui/app.js").status_code == 401
    assert scope_of("GET", "/ui/app.js") is None


def test_its_policy_allows_only_what_the_service_itself_serves(service: Service) -> None:
    for path in ("/", "/ui/app.js", "/ui/page.css"):
        policy = service.api.get(path).headers["Content-Security-Policy"]
        assert policy.split("; ") == [
            "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data: blob:",
            "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        ]  # fmt: skip
    assert "<script>" not in service.api.get("/").text


def test_all_of_it_weighs_at_most_100_kb_over_the_wire(service: Service) -> None:
    sizes = {}
    for name in files():
        answer = service.api.get(f"/ui/{name}")
        assert answer.headers["Content-Encoding"] == "gzip"
        sizes[name] = int(answer.headers["Content-Length"])
    assert sum(sizes.values()) <= WEIGHT, sizes


def test_a_browser_asks_each_time_and_gets_what_has_changed(service: Service) -> None:
    first = service.api.get("/ui/app.js")
    written = (UI / "app.js").read_text(encoding="utf-8")
    assert len(first.text) < len(written)  # comments stay behind
    assert (first.headers["Cache-Control"], first.headers["Vary"]) == ("no-cache", "Accept-Encoding")
    again = service.api.get("/ui/app.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    plain = service.api.get("/ui/app.js", headers={"Accept-Encoding": "identity"})
    assert "Content-Encoding" not in plain.headers
    assert plain.content == first.content
    assert service.api.get("/ui/app.js", headers={"If-None-Match": 'W/"another"'}).status_code == 200


def test_no_path_leads_out_of_the_page(service: Service) -> None:
    for path in ("/ui/", "/ui/none.js", "/ui/%2e%2e/app.py", "/ui//etc/passwd", "/ui/vendor/README.md"):
        answer = service.api.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path


def test_vendored_files_are_those_that_were_published() -> None:
    table = (UI / "vendor" / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|$", table, re.MULTILINE))
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (UI / "vendor").iterdir()}
    found.pop("README.md")
    assert found == listed


def test_modules_are_short_and_write_no_code_and_no_markup_at_run_time() -> None:
    for path in UI.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") < LINES, path.name
        assert not FORBIDDEN.search(text), (path.name, FORBIDDEN.search(text))


def test_the_key_route_tells_what_a_key_may_do(guarded: Gateway, service: Service) -> None:
    everything = {"object": "key", "required": False, "name": None, "tenant": "default", "scopes": list(SCOPES)}
    assert service.api.get("/key").json() == everything
    _, token = guarded.keys.create("shop", "acme", ["predict", "finetune"])
    found = httpx.get(f"{guarded.url}/key", headers={"X-API-Key": token}).json()
    assert found == {
        "object": "key", "required": True, "name": "shop", "tenant": "acme", "scopes": ["predict", "finetune"]
    }  # fmt: skip
    _, token = guarded.keys.create("operator", scopes=["admin"])
    assert httpx.get(f"{guarded.url}/key", headers={"X-API-Key": token}).json()["scopes"] == list(SCOPES)


# ---- for everybody


@pytest.fixture(params=SCREENS, ids=lambda screen: f"{screen[0]}-{screen[1]}")
def screen(request: pytest.FixtureRequest, browser: "Browser", service: Service) -> Iterator["Page"]:
    width, scheme = request.param
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme, "has_touch": width < 500}
    with opened(browser, service.url, **options) as page:
        yield page


def test_every_view_works_without_errors_and_is_accessible_and_fits(screen: "Page", service: Service) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    for view, sign in VIEWS.items():
        screen.goto(f"{service.url}/#/{view}")
        screen.locator(f"nav a[href='#/{view}'][aria-current=page]").wait_for()
        screen.locator(sign).first.wait_for()
        screen.wait_for_function("() => !document.querySelector('main .busy')")
        if view == "draw":
            draw(screen)
            answer(screen, "7")
        wide = screen.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{view} is {wide} pixels too wide"
        violations = axe.Axe().run(screen).response["violations"]
        serious = [each for each in violations if each["impact"] in ("serious", "critical")]
        assert not serious, [(each["id"], [node["target"] for node in each["nodes"]]) for each in serious]


def test_odd_addresses_lead_to_a_view_that_works(browser: "Browser", service: Service) -> None:
    with opened(browser, service.url, expected=("/models/nope",)) as page:
        for odd in (
            "#/%",
            "#/models/..%2F..%2Fkey",
            "#/models/../../key",
            "#/nowhere",
            "#/constructor",
            "#/models/nope",
        ):
            page.goto(f"{service.url}/{odd}")
            page.get_by_role("main").wait_for()
        page.get_by_text("There is nothing to show.").wait_for()
        page.get_by_role("link", name="Now").click()
        page.get_by_role("heading", name="Now").wait_for()


def test_the_keyboard_alone_draws_and_goes_everywhere(page: "Page") -> None:
    page.locator(".pad").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Drawing pad"
    page.keyboard.press("Space")
    for _ in range(18):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    answer(page, "1")
    page.keyboard.press("Delete")
    page.locator(".pad .hint").wait_for()
    page.keyboard.press("7")
    answer(page, "7")
    for title in ("Fine-tune", "Models", "Now"):
        while page.evaluate("document.activeElement.textContent") != title:
            page.keyboard.press("Shift+Tab" if title == "Fine-tune" else "Tab")
        page.keyboard.press("Enter")
        page.wait_for_function("title => document.title === `${title} · Temper`", arg=title)


# ---- keys


def test_a_wrong_key_is_refused_and_a_right_one_lets_in(browser: "Browser", guarded: Gateway) -> None:
    _, token = guarded.keys.create("visitor", scopes=["admin"])
    with opened(browser, guarded.url, expected=("401",)) as page:
        field = page.get_by_label("API key")
        field.fill(token[:-1] + ("0" if token[-1] != "0" else "1"))
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("alert").filter(has_text="unknown or revoked").wait_for()
        assert page.locator(".pad").count() == 0
        field.fill(token)
        field.press("Enter")
        page.locator(".pad").wait_for()
        draw(page)
        answer(page, "7")
        page.get_by_role("button", name="Sign out").click()
        page.get_by_label("API key").wait_for()


def test_the_key_is_in_memory_only(browser: "Browser", guarded: Gateway) -> None:
    _, token = guarded.keys.create("careful", scopes=["predict"])
    with opened(browser, guarded.url, expected=("401",)) as page:
        sign_in(page, token)
        kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
        assert token not in kept
        page.reload()
        page.get_by_label("API key").wait_for()


@pytest.mark.slow
def test_a_key_sees_only_what_it_may_do(browser: "Browser", guarded: Gateway) -> None:
    shown = {}
    for scope in SCOPES:
        _, token = guarded.keys.create(f"only {scope}", scopes=[scope])
        with opened(browser, guarded.url, expected=("401",)) as page:  # and 403 for nothing
            sign_in(page, token)
            page.locator("nav a[aria-current=page]").wait_for()
            shown[scope] = page.locator("header nav a").all_inner_texts()
            if scope == "predict":
                draw(page)
                answer(page, "7")
                assert page.get_by_role("button", name="Wrong answer?").count() == 0
                page.goto(f"{guarded.url}/#/finetune")  # by hand: not there either
                page.locator(".pad").wait_for()
            page.get_by_role("link", name="Now").click()
            page.get_by_role("heading", name="Parts").wait_for()
            assert page.get_by_role("heading", name="Fine-tunes").count() == (scope != "predict")
            assert page.get_by_text("need a key with the scope admin").count() == (scope != "admin")
    assert shown == {
        "predict": ["Draw", "Models", "Now"],
        "finetune": ["Fine-tune", "Models", "Now"],
        "admin": ["Draw", "Fine-tune", "Models", "Now"],
    }


def test_a_view_that_loads_late_does_not_take_the_place_of_the_one_that_was_asked_for_then(
    browser: "Browser", service: Service
) -> None:
    held: list[Route] = []
    with opened(browser, service.url) as page:
        page.route("**/ui/models.js", lambda route: held.append(route))
        page.get_by_role("link", name="Models").click()
        page.get_by_text("Loading…").wait_for()
        page.get_by_role("link", name="Now").click()
        page.get_by_role("heading", name="Fine-tunes").wait_for()
        with page.expect_response("**/ui/models.js"):
            held[0].continue_()
        page.evaluate("import('/ui/models.js')")  # which comes after it
        assert page.get_by_role("heading", name="Fine-tunes").count() == 1


@pytest.mark.slow
def test_a_key_that_is_revoked_leads_back_to_the_sign_in(browser: "Browser", guarded: Gateway) -> None:
    key, token = guarded.keys.create("short-lived", scopes=["predict"])
    with opened(browser, guarded.url, expected=("401", "404")) as page:
        sign_in(page, token)
        page.locator(".pad").wait_for()
        page.evaluate("window.left = true")
        page.goto(f"{guarded.url}/#/models/secret")
        guarded.keys.revoke(key.id)
        page.get_by_label("API key").wait_for()
        page.get_by_text("Your key is not valid any more.").wait_for()
        assert not page.evaluate("window.left")  # nothing of this tenant is left for the next one
        assert "secret" not in page.url


def sign_in(page: "Page", token: str) -> None:
    page.get_by_label("API key").fill(token)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("button", name="Sign out").wait_for()


# ---- when the service goes away


@pytest.mark.slow
def test_the_page_recovers_by_itself_when_the_gateway_is_killed_and_comes_back(
    browser: "Browser", guarded: Gateway
) -> None:
    _, token = guarded.keys.create("patient", scopes=["admin"])
    with opened(browser, guarded.url, expected=("401", "ERR_CONNECTION", "ERR_EMPTY_RESPONSE", "ERR_SOCKET")) as page:
        sign_in(page, token)
        page.evaluate("window.notReloaded = true")
        draw(page)
        answer(page, "7")
        guarded.stop()
        page.get_by_text("The service does not answer.").wait_for()
        page.get_by_role("button", name="Clear").click()
        draw(page, [(0.5, 0.25), (0.5, 0.75)])
        guarded.start()
        page.get_by_text("The service does not answer.").wait_for(state="detached")
        answer(page, "1")  # what was drawn meanwhile
        assert page.evaluate("window.notReloaded")
        assert page.get_by_role("button", name="Sign out").count() == 1


def test_what_travels_unpacked_is_what_is_packed() -> None:
    for name, file in files().items():
        assert gzip.decompress(file.packed) == file.plain, name
