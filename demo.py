"""`make demo`: what Temper does, from start to finish, on real images.

Starts a service in a temporary home, with the embedded model server. Fine-tunes the pretrained LeNet-5, which knows
MNIST, on 300 of scikit-learn's handwritten digits (8x8 scans by 43 other people), with the regularization that a search
of 15 seconds finds for them. Predicts the other 1,497 digits over HTTP before and after; neither training nor any
choice of settings has seen them. Exits with 0 only if every step worked and the held-out accuracy is at least 93%.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import httpx
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from cli.show import console, print_image, print_report, progress
from store.processes import free_port
from temper import Client, JobFailed

TRAINING_IMAGES = 300
GOAL = 0.93
SPEC = {"search": {"seconds": 15}}  # all the rest is found in this time
KEPT = Path("var/demo")  # the upload and an image, for the reader to try next


@click.command()
def main() -> None:
    """Fine-tune on 300 handwritten digits, and predict 1,497 others with the result."""
    began = time.monotonic()
    digits = load_digits()
    images = np.rint(digits.images / 16 * 255).astype(np.uint8)  # (1797, 8, 8)
    order = np.random.default_rng(0).permutation(len(images))
    chosen, held_out = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    KEPT.mkdir(parents=True, exist_ok=True)
    upload, sample = KEPT / "digits.zip", KEPT / "sample.png"
    upload.write_bytes(class_folders(images[chosen], digits.target[chosen]))
    sample.write_bytes(png(images[held_out[0]]))

    with service() as api, Client(str(api.base_url)) as temper:
        say(1, f"fine-tune on {TRAINING_IMAGES} of scikit-learn's digits; {len(held_out):,} are held out")
        before = accuracy(temper, "lenet5", images[held_out], digits.target[held_out])
        try:
            with progress() as tell:
                job = temper.finetune(upload, "digits", SPEC, wait=True, on_progress=tell)
        except JobFailed as exc:
            sys.exit(f"the job {exc.job.status}: {exc.message}")

        say(2, "the report card, measured out of fold: each of the 300 by a network that had not seen it")
        print_report(temper.report("digits", job.version))

        say(3, f"predict the {len(held_out):,} held-out digits with POST /predict")
        after = accuracy(temper, "digits", images[held_out], digits.target[held_out])
        console.print(f"accuracy [bold]{before:.1%}[/] before, [bold green]{after:.1%}[/] after")

        seen = temper.predict(sample, "digits")
        print_image(Image.open(sample).resize((28, 28), Image.Resampling.BILINEAR))
        top = seen.predictions[0]
        console.print(
            f"this is a {digits.target[held_out[0]]}; digits:{seen.version} predicts [bold]{top.label}[/] "
            f"({max(top.probabilities):.1%})"
        )
    console.print(
        f"\ndone in {time.monotonic() - began:.0f} s. To go on, run [bold]make serve[/], and in a second terminal"
    )
    for command in (
        f"finetune {upload} --model digits --wait",
        f"predict {sample} --model digits",
        "models",
    ):
        console.print(f"  .venv/bin/temper {command}", style="bold", soft_wrap=True)
    if after < GOAL:
        sys.exit(f"held-out accuracy {after:.1%} is below {GOAL:.0%}")


def say(step: int, text: str) -> None:
    """Print a headline."""
    console.print(f"\n[bold blue]{step}[/] {text}")


def class_folders(images: np.ndarray, labels: np.ndarray) -> bytes:
    """Zip images, (n, h, w) uint8, as `label/number.png`."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            archive.writestr(f"{label}/{number:04}.png", png(image))
    return packed.getvalue()


def png(image: np.ndarray) -> bytes:
    """Encode an image, (h, w) uint8."""
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG")
    return encoded.getvalue()


def accuracy(temper: Client, model: str, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of (n, 8, 8) uint8 images that the service classifies correctly."""
    big = [np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BILINEAR)) for image in images]
    right = 0
    for at in range(0, len(big), 500):
        found = temper.predict(np.stack(big[at : at + 500]), model).labels
        right += sum(name == str(label) for name, label in zip(found, labels[at : at + 500], strict=True))
    return right / len(labels)


@contextlib.contextmanager
def service() -> Iterator[httpx.Client]:
    """Run a service in a temporary home; yield a client once it is ready and its worker idle."""
    port = free_port()
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "TEMPER_HOME": home, "TEMPER_MODEL_SERVER": "embedded"}
        for name in ("STORE", "MODEL_ROOT", "HOST", "KEYS", "TLS_CERT", "TLS_KEY"):
            environment.pop(f"TEMPER_{name}", None)
        command = [sys.executable, "-m", "cli", "serve", "--port", str(port)]
        with (Path(home) / "log").open("w+") as log:
            server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            try:
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as api:
                    with console.status("starting the service"):
                        wait_until_ready(api, server)
                    yield api
            except BaseException:
                log.seek(0)
                sys.stderr.write(log.read())
                raise
            finally:
                server.send_signal(signal.SIGTERM)
                server.wait(30)


def wait_until_ready(api: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    """Wait until the model server answers and a worker is idle, for at most two minutes."""
    for _ in range(600):
        if server.poll() is not None:
            sys.exit("the service ended before it was ready")
        with contextlib.suppress(httpx.TransportError):
            if "idle" in api.get("/readyz").json()["workers"].values():
                return
        time.sleep(0.2)
    sys.exit("the service was not ready within two minutes")


if __name__ == "__main__":
    main()
