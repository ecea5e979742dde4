"""Preparation of images: which formats are decoded, how, and what that takes."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from store.errors import InvalidImage
from tests.trainer.test_datasets import DOT
from trainer.jobs.images import decode, prepare

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_only_formats_on_the_list_are_decoded() -> None:
    image = Image.fromarray(DOT)
    for kind in ("PNG", "WEBP", "BMP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        np.testing.assert_array_equal(decode(encoded(image, kind, **options), 10_000), DOT)
    assert decode(encoded(image, "JPEG"), 10_000).shape == (28, 28)
    for kind in ("TIFF", "GIF", "PPM", "ICO", "TGA"):
        with pytest.raises(InvalidImage, match="PNG, JPEG, WEBP, BMP"):
            decode(encoded(image, kind), 10_000)


def test_transparent_pixels_are_white_and_16_bits_become_8() -> None:
    values = RNG.integers(0, 256, (28, 28, 4), np.uint8)
    alpha = values[..., 3:] / 255
    over_white = Image.fromarray(np.round(values[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)).convert("L")
    found = decode(encoded(Image.fromarray(values), "PNG"), 10_000).astype(int)
    assert np.abs(found - np.asarray(over_white)).max() <= 1
    deep = RNG.integers(0, 1 << 16, (28, 28), np.uint16)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(deep), "PNG"), 10_000), np.round(deep / 257))


def test_a_phone_photo_takes_little_memory_and_looks_as_if_decoded_in_full(tmp_path: Path) -> None:
    rows, columns = 80 * np.sin(np.arange(4000)[:, None] / 300), 40 * np.cos(np.arange(6000) / 500)
    photo = Image.fromarray((127 + rows + columns).astype(np.uint8))
    path = tmp_path / "photo.jpg"
    photo.convert("RGB").save(path, quality=90)
    code = (
        "import re, sys; from trainer.jobs.images import decode\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "body = open(sys.argv[1], 'rb').read(); before = peak(); decode(body, 50_000_000); print(peak() - before)"
    )
    grown = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=True, capture_output=True, text=True)
    assert int(grown.stdout) < 16_000  # kilobytes; in full it is 24 million pixels
    small = decode(path.read_bytes(), 50_000_000).astype(int)
    assert np.abs(small - prepare(photo)).max() <= 3
    with pytest.raises(InvalidImage, match="6000x4000 pixels, more than the limit of 1000000"):
        decode(path.read_bytes(), 1_000_000)
