"""Mutated files as uploads and as predict bodies: an answer that says what is wrong, in bounded time and memory."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import Service, npz, png, zipped
from tests.trainer.test_datasets import DOT

LONGEST_S = 20.0  # an answer takes, on a busy machine
MOST_BYTES = 256 << 20  # by which the gateway grows meanwhile


def _saved(image: np.ndarray, format: str) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, format)
    return encoded.getvalue()


def _npy(array: np.ndarray) -> bytes:
    encoded = io.BytesIO()
    np.save(encoded, array)
    return encoded.getvalue()


_JPEG, _IMAGES = _saved(DOT, "JPEG"), np.stack([DOT] * 6)
UPLOADS = [
    zipped({f"{name}/{i}.png": png(DOT) for name in "ab" for i in range(3)}),
    zipped({f"{name}/{i}.jpg": _JPEG for name in "ab" for i in range(3)}),
    npz(images=_IMAGES, labels=np.arange(6) % 2),
    zipped({f"{i}.png": png(DOT) for i in range(6)} | {
        "labels.csv": "\n".join(["file,label,split", *(f"{i}.png,{i % 2},train" for i in range(6))]).encode()
    }),
    zipped({f"{top}/{name}/{i}.png": png(DOT) for top in ("train", "test") for name in "ab" for i in range(2)}),
]  # fmt: skip
BODIES = [
    ("application/zip", zipped({"1.png": png(DOT), "2.jpg": _JPEG})),
    ("application/x-npy", _npy(_IMAGES)),
    ("image/png", png(DOT)),
    ("image/jpeg", _JPEG),
    ("application/octet-stream", _IMAGES.tobytes()),
]
# Lengths, counts and offsets that a format may hold, in either byte order.
_NUMBERS = [n.to_bytes(4, order) for n in (0, 1, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1) for order in ("little", "big")]


@st.composite
def mutated(draw: st.DrawFn, whole: bytes) -> bytes:
    """The file after one to eight edits: bytes are overwritten, inserted, repeated or cut out, mostly in its head."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 8))):
        near = draw(st.sampled_from([64, 256, len(data) + 1]))
        at = min(draw(st.integers(0, near)), len(data))
        if draw(st.booleans()):  # zips and npz have their directory at the end
            at = len(data) - at
        length = draw(st.integers(1, 64))
        match draw(st.sampled_from(["number", "bytes", "insert", "repeat", "cut", "end"])):
            case "number":
                data[at : at + 4] = draw(st.sampled_from(_NUMBERS))
            case "bytes":
                new = draw(st.binary(min_size=1, max_size=8))
                data[at : at + len(new)] = new
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=64))
            case "repeat":
                data[at:at] = data[at : at + length] * draw(st.integers(1, 50))
            case "cut":
                del data[at : at + length]
            case "end":
                del data[at:]
    return bytes(data)


class Watched:
    """A service whose answers are checked against its OpenAPI document."""

    def __init__(self, service: Service) -> None:
        self.api = service.api
        self._paths: dict[str, Any] = service.api.get("/openapi.json").json()["paths"]
        (self._pid,) = service.children("api")

    def check(self, path: str, answer: httpx.Response) -> None:
        documented = self._paths[path]["post"]["responses"]
        assert answer.elapsed.total_seconds() < LONGEST_S
        assert str(answer.status_code) in documented, answer.text
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert error["message"]
            assert "Traceback" not in answer.text
            assert error["param"] or answer.status_code == 400, answer.text

    def peak_bytes(self) -> int:
        """The most memory that the gateway has had since `forget_peak`."""
        status = Path(f"/proc/{self._pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")


def _fuzz(service: Service, path: str, send: Callable[[httpx.Client, Any], httpx.Response], cases: Any, n: int) -> None:
    watched = Watched(service)
    watched.forget_peak()
    before = watched.peak_bytes()

    @settings(
        max_examples=n, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(cases)
    def run(case: Any) -> None:
        watched.check(path, send(watched.api, case))

    run()
    assert watched.peak_bytes() - before < MOST_BYTES
    answer = service.api.post("/predict", json={"model": "lenet5", "instances": [[0] * 784]})
    assert answer.status_code == 200, answer.text


@pytest.mark.exhaustive
def test_a_mutated_upload_is_taken_or_refused_with_its_field(service: Service) -> None:
    def send(api: httpx.Client, data: bytes) -> httpx.Response:
        return api.post("/finetune", files={"data": ("d", data)}, data={"model": "fuzz", "dry_run": "true"})

    _fuzz(service, "/finetune", send, st.sampled_from(UPLOADS).flatmap(mutated), n=20)


def test_a_mutated_predict_body_is_answered_or_refused_with_its_field(service: Service) -> None:
    def send(api: httpx.Client, case: tuple[str, bytes]) -> httpx.Response:
        kind, body = case
        return api.post("/predict", params={"model": "lenet5"}, content=body, headers={"Content-Type": kind})

    def changed(case: tuple[str, bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
        return st.tuples(st.just(case[0]), mutated(case[1]))

    _fuzz(service, "/predict", send, st.sampled_from(BODIES).flatmap(changed), n=150)
