"""`python -m load.bench_page`: how soon the page is there, and how soon it answers once the pen lifts.

In a headless Chromium on this machine, in front of a service of its own: the first contentful paint of a page that is
loaded anew, and the time from the end of a stroke until the answers of one, two and four versions are there.
"""

import shutil
from statistics import median

import click
import httpx
from playwright.sync_api import Browser, sync_playwright

from demo import service
from load.bench_served import answer, complete, wait
from load.figures import note
from quality.digits import all_digits
from tests.conftest import npz
from tests.ui.conftest import CHROMIUM, draw

PAINT_MS, ANSWER_MS = 300.0, 50.0  # goals
SETTLED_MS = 300.0


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
def main(rounds: int) -> None:
    """Measure, and print medians beside the goals."""
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        raise click.ClickException("no Chromium on this machine (Debian: apt-get install chromium)")
    with service() as api, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        url = str(api.base_url).rstrip("/")
        targets = [f"digits:{version}" for version in versions(api, 4)]
        rows = {
            "first contentful paint": ([paint(browser, url) for _ in range(rounds)], PAINT_MS),
            **{
                f"{number} answer{'s' * (number > 1)} after the pen lifts": (
                    answers(browser, f"{url}/#/draw?on={','.join(targets[:number])}", rounds), ANSWER_MS,
                )
                for number in (1, 2, 4)
            },
        }  # fmt: skip
        browser.close()
    click.echo(f"{'':<28}{'median':>8}{'lowest':>8}{'highest':>9}{'goal':>9}")
    for name, (values, goal) in rows.items():
        note("The page", name, values, "ms")
        click.echo(f"{name:<28}{median(values):>5.0f} ms{min(values):>5.0f} ms{max(values):>6.0f} ms{goal:>7.0f} ms")


def versions(api: httpx.Client, number: int) -> list[int]:
    """Versions of a model of digits, fine-tuned at the same time."""
    images, labels = all_digits()
    spec, upload = '{"method": "head", "epochs": 1}', npz(images=images[:200], labels=labels[:200])
    form = {"model": "digits", "spec": spec}
    ids = [answer(api.post("/finetune", data=form, files={"data": upload}))["id"] for _ in range(number)]
    found = [int(wait(api, job, "version")["version"]) for job in ids]
    for job in ids:
        complete(api, job)
    return found


def paint(browser: Browser, url: str) -> float:
    """Milliseconds from the request to the first contentful paint, with nothing in the cache."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(url)
    page.locator(".pad").wait_for()
    found = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    context.close()
    return float(found)


def answers(browser: Browser, url: str, rounds: int) -> list[float]:
    """Milliseconds that the slowest answer says it took after a stroke has ended."""
    page = browser.new_page()
    page.goto(url)
    page.locator(".pad canvas").wait_for()
    found = []
    for _ in range(rounds):
        draw(page)
        page.locator(".correct button").last.wait_for()  # which is for finished drawings
        page.wait_for_timeout(SETTLED_MS)  # until then there may be answers to what was drawn before the pen lifted
        texts = page.locator(".sure .quiet").all_inner_texts()
        found.append(max(float(text.rpartition(",")[2].removesuffix("ms")) for text in texts))
        page.get_by_role("button", name="Clear").click()
    page.close()
    return found


if __name__ == "__main__":
    main()
