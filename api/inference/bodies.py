"""Readers of prediction bodies other than JSON: raw bytes, .npy, one image, many images in a form or a zip."""

import asyncio
import io
import time
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from api.inference.json_body import PIXELS, SHAPES, as_images, check_range
from store.errors import InvalidImage, InvalidInstances, Overloaded, TooLarge
from store.settings import Settings

FORM, ZIP = "multipart/form-data", "application/zip"
IMAGES = ("image/png", "image/jpeg", "image/webp", "image/bmp")
KINDS = ("application/octet-stream", "application/x-npy", *IMAGES, ZIP, FORM)
MAX_DECODING = 64  # requests whose images are being decoded or wait for it


def from_bytes(body: bytes) -> np.ndarray:
    """Raw images of 784 bytes, row by row, as (n, 784) uint8."""
    if not body:
        raise InvalidInstances("the body is empty; send 784 bytes for each image", param="body")
    if len(body) % PIXELS:
        raise InvalidInstances(
            f"the length of {len(body)} bytes is not a multiple of {PIXELS}, the bytes of an image", param="body"
        )
    return np.frombuffer(body, np.uint8).reshape(-1, PIXELS)


def from_npy(body: bytes) -> np.ndarray:
    """Images in an .npy of uint8 (0 to 255) or floats (0 to 1) whose last axes are 28x28, 28x28x1 or 784."""
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
        shape, fortran, dtype = read(file)
    except Exception as exc:  # NumPy evaluates the header, so broken bytes can raise nearly anything
        raise InvalidInstances("the body is not an .npy file of version 1 or 2", param="body") from exc
    if dtype != np.uint8 and dtype.kind != "f":
        raise InvalidInstances(f"the array is of {dtype}; send uint8 or floats", param="body")
    ends = [end for end in SHAPES if shape[-len(end) :] == end]
    if fortran:
        raise InvalidInstances("the array is in Fortran order; save np.ascontiguousarray(array)", param="body")
    if not ends or len(shape) > 1 + len(ends[0]) or 0 in shape:
        wanted = "(n, 28, 28), (n, 28, 28, 1) or (n, 784)"
        raise InvalidInstances(f"the array has shape {shape}; send {wanted}", param="body")
    values = body[file.tell() :]
    if len(values) != np.prod(shape, dtype=object) * dtype.itemsize:
        raise InvalidInstances(
            f"{len(values)} bytes of data do not fill shape {shape} of {dtype} as the header says", param="body"
        )
    pixels = np.frombuffer(values, dtype).reshape(-1, PIXELS)
    top = 255.0 if pixels.dtype == np.uint8 else 1.0
    check_range(pixels, "body", top)
    return as_images(pixels, top)


class ImageDecoder:
    """Decodes images in two threads of its own: they take turns at the memory that large images need."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(2, "decode")
        self._requests = 0

    async def decode(self, files: Iterable[tuple[str, bytes]]) -> np.ndarray:
        """Image files as (n, 784) uint8.

        Args:
            files: name and content of each.

        Raises:
            InvalidImage: with the name and the reason of every file that is not an image.
            InvalidInstances: there is no file.
            TooLarge: there are too many, or decoding them takes too long.
            Overloaded: too many other requests are being decoded.
        """
        if self._requests >= MAX_DECODING:
            raise Overloaded("too many images are being decoded; try again")
        self._requests += 1
        try:
            deadline = time.monotonic() + self._settings.predict_timeout_s
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, files, deadline)
        finally:
            self._requests -= 1

    def _decode(self, files: Iterable[tuple[str, bytes]], deadline: float) -> np.ndarray:
        from trainer.jobs.images import decode  # Pillow is loaded by gateways that get images, and by no others

        most, max_pixels = self._settings.max_instances, self._settings.max_pixels
        if time.monotonic() > deadline:
            raise Overloaded("too many images are being decoded; try again")
        pixels: list[np.ndarray] = []
        wrong: list[dict[str, Any]] = []
        for name, content in files:
            if len(pixels) + len(wrong) >= most:
                raise TooLarge(f"more than {most} images", param="body")
            if time.monotonic() > deadline:
                seconds = self._settings.predict_timeout_s
                raise TooLarge(f"decoding takes longer than {seconds:g} s; send fewer or smaller images", param="body")
            try:
                pixels.append(decode(content, max_pixels).reshape(PIXELS))
            except InvalidImage as exc:
                wrong.append({"file": name, "reason": f"is {exc.message}"})
            except MemoryError:
                wrong.append({"file": name, "reason": "takes too much memory to decode"})
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise InvalidImage(f"{wrong[0]['file']} {wrong[0]['reason']}{more}", param="body", details=wrong)
        if not pixels:
            raise InvalidInstances("the body contains no image", param="body")
        return np.stack(pixels)


def unzipped(body: bytes, most_bytes: int) -> list[tuple[str, bytes]]:
    """Name and content of the files in a zip, by name, without those that file managers add."""
    from trainer.jobs.datasets import IGNORED

    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            wanted = sorted((e for e in entries if not IGNORED.search(e.filename)), key=lambda e: e.filename)
            if sum(entry.file_size for entry in wanted) > most_bytes:
                raise TooLarge(f"the files in the zip add up to more than {most_bytes} bytes", param="body")
            return [(entry.filename, archive.read(entry)) for entry in wanted]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError, ValueError) as exc:
        raise InvalidInstances(f"the zip is broken: {exc}", param="body") from exc
