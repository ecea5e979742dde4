"""Bodies of predictions that are no JSON: raw bytes, .npy, one image, many in a form or a zip."""

import io
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request

from api.http.errors import invalid_request
from api.inference.json_body import PIXELS, SHAPES, as_images, check_range
from api.routes.schemas import ImageOptions
from store.errors import InvalidImage, InvalidInstances, InvalidRequest, TooLarge

IMAGE_PIXELS = 1 << 22  # of an image to predict on: its decoding shares the gateway's memory
FORM, ZIP = "multipart/form-data", "application/zip"
KINDS = ("application/octet-stream", "application/x-npy", "image/png", "image/jpeg", ZIP, FORM)


def options_of(given: Iterable[tuple[str, str]]) -> ImageOptions:
    """Model, version, label and top_k, of query parameters or form fields.

    Raises:
        InvalidRequest: one is missing, unknown, wrong or there twice.
    """
    fields: dict[str, str] = {}
    for name, value in given:
        if fields.setdefault(name, value) != value:
            raise InvalidRequest(f"{name}: given twice", param=name)
    try:
        return ImageOptions.model_validate(fields)
    except ValidationError as exc:
        raise invalid_request(exc.errors(include_url=False), ImageOptions) from exc


def from_bytes(body: bytes) -> np.ndarray:
    """Images of 784 bytes each, row by row, as (n, 784) uint8."""
    if not body or len(body) % PIXELS:
        raise InvalidInstances(f"{len(body)} bytes are no images of {PIXELS} bytes each", param="body")
    return np.frombuffer(body, np.uint8).reshape(-1, PIXELS)


def from_npy(body: bytes) -> np.ndarray:
    """An .npy of uint8 from 0 to 255 or of floats from 0 to 1, whose last axes are 28x28, 28x28x1 or 784."""
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
        shape, fortran, dtype = read(file)
    except (ValueError, KeyError, EOFError, SyntaxError) as exc:
        raise InvalidInstances("the body is no .npy file of version 1 or 2", param="body") from exc
    if dtype != np.uint8 and dtype.kind != "f":
        raise InvalidInstances(f"an array of {dtype}, where uint8 or floats should be", param="body")
    ends = [end for end in SHAPES if shape[-len(end) :] == end]
    if fortran:
        raise InvalidInstances("an array in Fortran order; save np.ascontiguousarray of it", param="body")
    if not ends or len(shape) > 1 + len(ends[0]) or 0 in shape:
        wanted = "(n, 28, 28), (n, 28, 28, 1) or (n, 784)"
        raise InvalidInstances(f"an array {shape}, where {wanted} should be", param="body")
    values = body[file.tell() :]
    if len(values) != np.prod(shape, dtype=object) * dtype.itemsize:
        raise InvalidInstances(f"{len(values)} bytes are not the {shape} of {dtype} that the header says", param="body")
    pixels = np.frombuffer(values, dtype).reshape(-1, PIXELS)
    top = 255.0 if pixels.dtype == np.uint8 else 1.0
    check_range(pixels, "body", top)
    return as_images(pixels, top)


def from_images(files: Iterable[tuple[str, bytes]], most: int) -> np.ndarray:
    """PNG and JPEG files as (n, 784) uint8.

    Raises:
        InvalidImage: with the name and the reason of every file that is none.
        TooLarge: there are more than `most`.
    """
    from trainer.jobs.images import decode  # Pillow is for gateways that get images

    pixels: list[np.ndarray] = []
    wrong: list[dict[str, Any]] = []
    for name, content in files:
        if len(pixels) + len(wrong) >= most:
            raise TooLarge(f"more than {most} images", param="body")
        try:
            pixels.append(decode(content, IMAGE_PIXELS).reshape(PIXELS))
        except InvalidImage as exc:
            wrong.append({"file": name, "reason": f"is {exc.message}"})
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InvalidImage(f"{wrong[0]['file']} {wrong[0]['reason']}{more}", param="body", details=wrong)
    if not pixels:
        raise InvalidInstances("there is no image", param="body")
    return np.stack(pixels)


def unzipped(body: bytes, most_bytes: int) -> list[tuple[str, bytes]]:
    """The files of a zip, by name, but for what file managers add to it."""
    from trainer.jobs.datasets import IGNORED

    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            wanted = sorted((e for e in entries if not IGNORED.search(e.filename)), key=lambda e: e.filename)
            if sum(entry.file_size for entry in wanted) > most_bytes:
                raise TooLarge(f"the zip holds more than {most_bytes} bytes", param="body")
            return [(entry.filename, archive.read(entry)) for entry in wanted]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as exc:
        raise InvalidInstances(f"the body is a broken zip: {exc}", param="body") from exc


async def read_form(request: Request, most: int) -> tuple[ImageOptions, list[tuple[str, bytes]]]:
    """Options and files of a multipart form; query parameters count as fields."""
    files: list[tuple[str, bytes]] = []
    fields = list(request.query_params.multi_items())
    async with request.form(max_files=most + 1, max_fields=16) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.append((value.filename or name, await value.read()))
            else:
                fields.append((name, value))
    return options_of(fields), files
