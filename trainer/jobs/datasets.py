"""Data sets: from an untrusted upload to prepared arrays with class names.

`python -m trainer.jobs.datasets` reads an upload in a process of its own, with limits on memory and time: it takes a
task and prints a verdict, both as JSON. The gateway calls it through `api.uploads`.
"""

import errno
import hashlib
import io
import json
import os
import re
import resource
import signal
import stat
import sys
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from store.disk import is_full
from store.errors import InvalidDataset, InvalidImage, listed
from store.processes import end_with_parent
from store.records import DatasetCard, DatasetReport
from store.settings import Settings
from trainer.jobs.images import FORMATS, SIDE, decode, is_dark_on_light, prepare
from trainer.jobs.survey import survey

IGNORED = re.compile(r"(^|/)(\.[^./][^/]*|__MACOSX|Thumbs\.db|desktop\.ini)(/|$)", re.IGNORECASE)
MAX_CLASSES = 1000
MAX_NAME = 100
MAX_FILE_BYTES = 64 << 20  # one encoded image
MAX_UNPACKED_BYTES = 1 << 30


@dataclass(frozen=True)
class Dataset:
    """Prepared images with their classes."""

    images: np.ndarray  # (n, 28, 28) uint8, in the polarity of the upload
    labels: np.ndarray  # (n,) int32, positions in `classes`
    classes: tuple[str, ...]

    @property
    def dark_on_light(self) -> bool:
        """The polarity that `auto` chooses."""
        return is_dark_on_light(self.images)

    def save(self, path: Path) -> None:
        """Write as an `.npz` without pickles."""
        with path.open("wb") as file:
            np.savez(file, images=self.images, labels=self.labels, classes=np.array(self.classes))

    @classmethod
    def load(cls, path: Path) -> "Dataset":
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["images"], arrays["labels"], tuple(str(name) for name in arrays["classes"]))

    def described(self) -> DatasetCard:
        """The data set as the API describes it. `id` is the SHA-256 of the content."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        digest.update(self.images.tobytes())
        digest.update(self.labels.tobytes())
        counts = np.bincount(self.labels, minlength=len(self.classes)).tolist()
        return DatasetCard(
            id=digest.hexdigest(),
            images=len(self.images),
            classes=dict(zip(self.classes, counts, strict=True)),
            polarity="dark_on_light" if self.dark_on_light else "light_on_dark",
        )


@dataclass(frozen=True)
class _Upload:
    """What an upload holds, before its classes are checked."""

    images: np.ndarray  # (n, 28, 28) uint8
    labels: list[str]
    names: Sequence[str | int]  # files, or positions in the array
    sizes: list[tuple[int, int]]  # width and height in pixels, before it was prepared


def read(path: Path, *, max_pixels: int, max_images: int, least: int = 2) -> tuple[Dataset, DatasetReport]:
    """Read the data set in a zip of class folders or an `.npz`, and say what is worth knowing of it.

    Args:
        max_pixels: most pixels of one image.
        max_images: most images of the data set.
        least: fewest classes, and fewest images of each: two to train on, one to validate on.

    Raises:
        InvalidDataset: with every offending file or index in its details.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            unpacked = sum(entry.file_size for entry in entries)
            if unpacked > MAX_UNPACKED_BYTES:
                raise _invalid(f"the file unpacks to {unpacked} bytes; at most {MAX_UNPACKED_BYTES} are allowed")
            if entries and all(entry.filename.endswith(".npy") for entry in entries):
                upload = _read_npz(archive, entries, max_pixels, max_images)
            else:
                upload = _read_folders(archive, entries, max_pixels, max_images)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, RuntimeError, ValueError) as exc:
        if isinstance(exc, OSError) and exc.errno not in (None, errno.EINVAL):  # of a seek to where a zip points
            raise  # the disk's fault, not the upload's
        empty = "it is empty" if path.stat().st_size == 0 else str(exc)
        raise _invalid(f"the file is neither a zip of class folders nor an .npz: {empty}") from exc
    dataset = _indexed(upload.images, upload.labels, least)
    labels = [dataset.classes[position] for position in dataset.labels]
    return dataset, survey(upload.images, labels, upload.names, upload.sizes)


def _invalid(message: str, details: list[dict[str, Any]] | None = None) -> InvalidDataset:
    return InvalidDataset(listed(message, details or []), param="data", details=details or [])


def _indexed(images: np.ndarray, labels: list[str], least: int) -> Dataset:
    """Sort the classes, numerically if all are numbers, and turn labels into positions; refuse unfit classes."""
    labels = _normalized(labels)
    counts = Counter(labels)
    numeric = all(re.fullmatch(r"-?\d{1,18}", name) for name in counts)
    classes = tuple(sorted(counts, key=lambda name: (int(name), name)) if numeric else sorted(counts))
    if len(classes) < least:
        found = f"only {classes[0]!r}" if classes else "none"
        raise _invalid(f"at least two classes are needed, found {found}")
    if len(classes) > MAX_CLASSES:
        raise _invalid(f"{len(classes)} classes, more than the {MAX_CLASSES} allowed")
    wrong = [
        {"class": name, "reason": f"a class name has 1 to {MAX_NAME} printable characters"}
        for name in classes
        if not 0 < len(name) <= MAX_NAME or not name.isprintable()
    ]
    wrong += [{"class": name, "reason": "has only one image"} for name in classes if counts[name] < least]
    if wrong:
        raise _invalid("every class needs a name and at least two images", wrong)
    positions = {name: position for position, name in enumerate(classes)}
    return Dataset(images, np.array([positions[label] for label in labels], np.int32), classes)


def _normalized(labels: list[str]) -> list[str]:
    """Class names in Unicode's composed form (NFC), as file systems differ in it, and without space around them."""
    composed = {name: unicodedata.normalize("NFC", name) for name in set(labels)}
    spellings: dict[str, set[str]] = defaultdict(set)
    for name in composed.values():
        spellings[name.strip()].add(name)
    wrong = [
        {"class": name, "reason": f"is written {' and '.join(map(repr, sorted(found)))}; rename all but one"}
        for name, found in sorted(spellings.items())
        if len(found) > 1
    ]
    if wrong:
        raise _invalid("class names differ only in the space around them", wrong)
    return [composed[label].strip() for label in labels]


def _read_folders(
    archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], max_pixels: int, max_images: int
) -> _Upload:
    """Images and labels of `class/.../image.ext`."""
    entries = [entry for entry in entries if not IGNORED.search(entry.filename)]
    if not entries:
        raise _invalid("the zip has no images")
    if len(entries) > max_images:
        raise _invalid(f"{len(entries)} files, more than the {max_images} allowed")
    images, labels, sizes, wrong = [], [], [], []
    for entry in entries:
        try:
            label, body = _class_of(entry), _unpacked(archive, entry)
            images.append(decode(body, max_pixels))
            labels.append(label)
            with Image.open(io.BytesIO(body), formats=FORMATS) as image:
                sizes.append(image.size)
        except InvalidImage as exc:
            wrong.append({"file": entry.filename, "reason": exc.message})
        except MemoryError:
            wrong.append({"file": entry.filename, "reason": "decoding it takes too much memory"})
    if wrong:
        raise _invalid(f"{len(wrong)} of {len(entries)} files cannot be used", wrong)
    if len(set(labels)) == 1 and all(entry.filename.count("/") > 1 for entry in entries):
        raise _invalid(
            f"all images are inside one folder, {labels[0]!r}; the folders at the top of the zip are the classes, "
            "so zip what is inside it"
        )
    return _Upload(np.stack(images), labels, [entry.filename for entry in entries], sizes)


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(entry)
    except MemoryError:
        raise
    except Exception as exc:  # zipfile and zlib raise nearly anything on broken archives
        if isinstance(exc, OSError) and exc.errno not in (None, errno.EINVAL):
            raise
        raise InvalidImage(f"cannot be unpacked ({exc})") from exc


def _class_of(entry: zipfile.ZipInfo) -> str:
    """The top-level folder of an entry; refuses names that could escape the archive."""
    name = entry.filename.removeprefix("./")
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise InvalidImage("the path leaves the archive or uses backslashes")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise InvalidImage("is a symbolic link")
    if entry.file_size > MAX_FILE_BYTES:
        raise InvalidImage(f"unpacks to {entry.file_size} bytes, more than the {MAX_FILE_BYTES} allowed")
    if len(parts) < 2:
        raise InvalidImage("is not in a class folder")
    return parts[0]


def _read_npz(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], max_pixels: int, max_images: int) -> _Upload:
    """Images and labels of `images` (or `x`) and `labels` (or `y`)."""
    names = {entry.filename.removesuffix(".npy"): entry for entry in entries}
    found = []
    for long, short in (("images", "x"), ("labels", "y")):
        if (long in names) == (short in names):
            both = "both" if long in names else "neither"
            raise _invalid(f"one array must be named {long!r} or {short!r}; the file has {both}: {sorted(names)}")
        name = long if long in names else short
        found.append(_read_array(archive, names[name], name, max_pixels))
    images, labels = found
    if images.ndim == 0 or labels.ndim == 0 or len(images) != len(labels):
        raise _invalid(f"images and labels differ in length: shapes {images.shape} and {labels.shape}")
    if len(images) > max_images:
        raise _invalid(f"{len(images)} images, more than the {max_images} allowed")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iuUS":
        raise _invalid(f"labels must be (n,) integers or strings, not {labels.shape} {labels.dtype}")
    height, width = (SIDE, SIDE) if images.ndim == 2 else images.shape[1:3]
    return _Upload(_prepared(images), _names(labels), range(len(images)), [(width, height)] * len(images))


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str, max_pixels: int) -> np.ndarray:
    """One array; refuses pickles and headers that promise more than the file contains."""
    with archive.open(entry) as file:
        try:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
        except ValueError as exc:
            raise _invalid(f"the header of array {name!r} cannot be read") from exc
    if dtype.hasobject:
        raise _invalid(f"array {name!r} contains pickled Python objects; save plain numbers or strings")
    if name in ("images", "x"):
        _check_images(shape, dtype, max_pixels)
    if any(length < 0 for length in shape) or int(np.prod(shape, dtype=object)) * dtype.itemsize > entry.file_size:
        raise _invalid(f"array {name!r} has shape {shape} {dtype} in its header, but the file is shorter")
    try:
        # Read it whole, not streamed: NumPy's reader allocates what the header promises.
        array: np.ndarray = np.lib.format.read_array(io.BytesIO(archive.read(entry)), allow_pickle=False)
    except MemoryError:
        raise
    except Exception as exc:  # a damaged archive: zlib.error, BadZipFile, ValueError, ...
        raise _invalid(f"array {name!r} cannot be read: {exc}") from exc
    return array


def _names(labels: np.ndarray) -> list[str]:
    """Labels as text; byte strings are UTF-8."""
    names, wrong = [], []
    for index, label in enumerate(labels.tolist()):
        try:
            names.append(label.decode() if isinstance(label, bytes) else str(label))
        except UnicodeDecodeError:
            wrong.append({"index": index, "reason": f"label {label!r} is not UTF-8"})
    if wrong:
        raise _invalid(f"{len(wrong)} of {len(labels)} labels cannot be read", wrong)
    return names


def _check_images(shape: tuple[int, ...], dtype: np.dtype[Any], max_pixels: int) -> None:
    """Refuse an array of images by its header, before it is read into memory."""
    flat = len(shape) == 2 and shape[1] == SIDE * SIDE
    grey = len(shape) == 3 or (len(shape) == 4 and shape[-1] in (1, 3))
    if not (flat or grey) or 0 in shape:
        raise _invalid(f"images must be (n, height, width[, 1 or 3]) or (n, 784), not {shape}")
    if grey and shape[1] * shape[2] > max_pixels:
        raise _invalid(f"images of {shape[1]}x{shape[2]} pixels; at most {max_pixels} are allowed")
    if dtype.kind not in "biuf":
        raise _invalid(f"images must be integers or floats, not {dtype}")


def _prepared(images: np.ndarray) -> np.ndarray:
    """Grey or colour images, integers from 0 to 255 or floats from 0 to 1, as (n, 28, 28) uint8."""
    if images.ndim == 2:
        images = images.reshape(-1, SIDE, SIDE)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    top = 1 if images.dtype.kind in "bf" else 255
    reason = f"has values that are NaN or outside 0 to {top}"
    if images.dtype.kind == "f":
        reason += " (values of 0 to 255 must be integers)"
    wrong = []
    prepared = np.empty((len(images), SIDE, SIDE), np.uint8)
    for index, image in enumerate(images):
        if not (image.min() >= 0 and image.max() <= top):  # also where a comparison with NaN is false
            wrong.append({"index": index, "reason": reason})
            continue
        grey = image if image.dtype == np.uint8 else np.rint(image.astype(np.float64) * (255 / top)).astype(np.uint8)
        prepared[index] = prepare(Image.fromarray(grey).convert("L"))
    if wrong:
        raise _invalid(f"{len(wrong)} of {len(images)} images cannot be used", wrong)
    return prepared


def _main(upload: Path, prepared: Path, least: int, settings: Settings) -> dict[str, Any]:
    """The verdict: `dataset` and `report`, `error` with what is wrong with the upload, or `full` if the disk is.

    Whatever else goes wrong ends the process with a traceback, and SIGXCPU ends it when its time is up.
    """
    os.nice(10)  # predictions come first
    memory, seconds = settings.decode_memory_bytes, settings.decode_seconds
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # SIGKILL, at the second, would not say why
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        dataset, report = read(upload, max_pixels=settings.max_pixels, max_images=settings.max_images, least=least)
        dataset.save(prepared)
        return {"dataset": dataset.described().dump(), "report": report.dump()}
    except InvalidDataset as exc:
        return {"error": {"message": exc.message, "param": exc.param, "details": exc.details}}
    except MemoryError:
        message = f"reading the file takes more than the {memory} bytes of memory allowed"
        return {"error": {"message": message, "param": "data"}}
    except OSError as exc:
        if is_full(exc):
            return {"full": True}
        raise


if __name__ == "__main__":
    end_with_parent(signal.SIGKILL)
    task = json.load(sys.stdin)
    given = Settings.model_validate_json(task["settings"])
    json.dump(_main(Path(task["upload"]), Path(task["prepared"]), task["least"], given), sys.stdout)
