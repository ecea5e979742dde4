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
import struct
import sys
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from store.disk import is_full
from store.errors import InvalidDataset, InvalidImage, enumerated, listed
from store.processes import end_with_parent
from store.records import DatasetCard, DatasetReport, Finding
from store.settings import Settings
from trainer.jobs.duplicates import copies_of
from trainer.jobs.images import FORMATS, SIDE, decode, is_dark_on_light, prepare
from trainer.jobs.layouts import MAX_PATH, PARTS, TEST, TRAIN, VALIDATION, check_apart, file_of, invalid, layout_of
from trainer.jobs.survey import Seen, is_faint, survey

IGNORED = re.compile(r"(^|/)(\.[^./][^/]*|__MACOSX|Thumbs\.db|desktop\.ini)(/|$)", re.IGNORECASE)
MAX_CLASSES = 1000
MAX_NAME = 100
MAX_UNPACKED_BYTES = 1 << 30


# Arrays of an `.npz`: what images and labels may be called for each part. The short names are those of Keras.
Arrays = Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
MOST_PAIRS = 50_000_000  # of images to measure on and to train on that an upload waits for, a second
ALL_COPIES = (
    "all {} validation images are near copies of images to train on, so nothing can be measured with them; leave them "
    "out, or give others"
)
ARRAYS: Arrays = {TRAIN: (("images", "x"), ("labels", "y"))}
ENDS = {TRAIN: ("train",), VALIDATION: ("val", "valid", "validation", "dev"), TEST: ("test",)}
KERAS: Arrays = {
    part: (tuple(f"x_{end}" for end in ends), tuple(f"y_{end}" for end in ends)) for part, ends in ENDS.items()
}

Names = tuple[str | int, ...]


@dataclass(frozen=True)
class Dataset:
    """Prepared images with their classes, in the order of the upload."""

    images: np.ndarray  # (n, 28, 28) uint8, in the polarity of the upload
    labels: np.ndarray  # (n,) int32, positions in `classes`
    classes: tuple[str, ...]
    names: Names = ()  # of each image, its file in the zip or its index in the array; positions if not given

    def __post_init__(self) -> None:
        if not self.names:
            object.__setattr__(self, "names", tuple(range(len(self.images))))

    @property
    def dark_on_light(self) -> bool:
        """The polarity that `auto` chooses."""
        return is_dark_on_light(self.images)

    def save(self, path: Path) -> None:
        """Write as an `.npz` without pickles."""
        names = np.frombuffer(json.dumps(self.names).encode(), np.uint8)  # long ones would widen an array of text
        with path.open("wb") as file:
            np.savez(file, images=self.images, labels=self.labels, classes=np.array(self.classes), names=names)

    @classmethod
    def load(cls, path: Path) -> "Dataset":
        """Read what `save` wrote, also in an earlier release, which kept no names."""
        with np.load(path, allow_pickle=False) as arrays:
            names = tuple(json.loads(arrays["names"].tobytes())) if "names" in arrays else ()
            return cls(arrays["images"], arrays["labels"], tuple(str(name) for name in arrays["classes"]), names)

    @staticmethod
    def images_in(path: Path) -> np.ndarray:
        """The images that `save` wrote, (n, 28, 28) uint8, which stay on the disk until they are looked at."""
        with zipfile.ZipFile(path) as archive, archive.open("images.npy") as member:
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            entry, header = archive.getinfo("images.npy"), member.tell()
        with path.open("rb") as file:
            file.seek(entry.header_offset + 26)  # of the lengths of the entry's name and of what follows it
            lengths = struct.unpack("<HH", file.read(4))
        offset = entry.header_offset + 30 + sum(lengths) + header
        return np.memmap(path, dtype, "r", offset, shape)

    def described(self) -> DatasetCard:
        """The data set as the API describes it.

        `id` is the SHA-256 of the content, without names. The same content with other names is the same data set in
        another file (`prepared`), so that nobody's names change with what others upload.
        """
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        digest.update(self.images.tobytes())
        digest.update(self.labels.tobytes())
        counts = np.bincount(self.labels, minlength=len(self.classes)).tolist()
        content = digest.hexdigest()
        digest.update(json.dumps(self.names).encode())
        return DatasetCard(
            id=content,
            prepared=content if self.names == tuple(range(len(self.images))) else digest.hexdigest(),
            images=len(self.images),
            classes=dict(zip(self.classes, counts, strict=True)),
            polarity="dark_on_light" if self.dark_on_light else "light_on_dark",
        )


@dataclass(frozen=True)
class Prepared:
    """What was made of an upload."""

    parts: Mapping[str, Dataset]  # `train`, and `validation` and `test` where the upload has them apart
    report: DatasetReport
    findings: list[Finding]
    excluded: int = 0

    def described(self) -> DatasetCard:
        """All of it as the API describes it."""
        cards = {part: dataset.described() for part, dataset in self.parts.items()}
        more = {"excluded": self.excluded} if self.excluded else {}
        return cards.pop(TRAIN).model_copy(update={**cards, "findings": self.findings, **more})


@dataclass(frozen=True)
class _Upload:
    """A part of an upload, before its classes are checked."""

    images: np.ndarray  # (n, 28, 28) uint8
    labels: list[str]
    names: Names
    sizes: list[tuple[int, int]]  # width and height in pixels, before it was prepared
    blank: list[bool]  # whether it showed something until its transparency became white


class _Exclusion:
    """Images to leave out, by file, or by index in an array."""

    def __init__(self, names: Sequence[str | int]) -> None:
        self._wanted = {_plain(name): name for name in names}
        self._found = set[str]()
        self.images = 0

    def has(self, name: str | int) -> bool:
        """Tell whether to leave out an image of the upload."""
        if found := _plain(name) in self._wanted:
            self._found.add(_plain(name))
            self.images += 1
        return found

    def check(self) -> None:
        """Refuse names that the upload does not have."""
        unknown = [name for plain, name in self._wanted.items() if plain not in self._found]
        if unknown:
            details = [{**_shown(name), "reason": "is not in the data set"} for name in unknown]
            raise InvalidDataset(listed("there is nothing to exclude", details), param="exclude", details=details)


def _plain(name: str | int) -> str:
    return unicodedata.normalize("NFC", str(name)).removeprefix("./")


def read(
    path: Path, *, max_pixels: int, max_images: int, least: int = 2, exclude: Sequence[str | int] = ()
) -> Prepared:
    """Read the data set in a zip or an `.npz`, and say what is worth knowing of it.

    Args:
        max_pixels: most pixels of one image.
        max_images: most images of the data set.
        least: fewest classes, and fewest images of each: two to train on, one to validate on.
        exclude: images of any part to leave out unread: files of the zip, or names of `Dataset.names` for arrays.

    Raises:
        InvalidDataset: with every offending file or index in its details.
    """
    excluded = _Exclusion(exclude)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            unpacked = sum(entry.file_size for entry in entries)
            if unpacked > MAX_UNPACKED_BYTES:
                raise invalid(f"the file unpacks to {unpacked} bytes; at most {MAX_UNPACKED_BYTES} are allowed")
            if entries and all(entry.filename.endswith(".npy") for entry in entries):
                uploads, doubts = _read_npz(archive, entries, max_pixels, max_images, excluded), _unread(entries)
            else:
                uploads, doubts = _read_zip(archive, entries, max_pixels, max_images, excluded)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, RuntimeError, ValueError) as exc:
        if isinstance(exc, OSError) and exc.errno not in (None, errno.EINVAL):  # of a seek to where a zip points
            raise  # the disk's fault, not the upload's
        empty = "it is empty" if path.stat().st_size == 0 else str(exc)
        raise invalid(f"the file is neither a zip of class folders nor an .npz: {empty}") from exc
    if least == 1 and len(uploads) > 1:
        raise invalid("images to validate on have no parts of their own; upload only these")
    parts = {part: _indexed(upload, least if part == TRAIN else 1) for part, upload in uploads.items()}
    whole = parts[TRAIN].described()
    for part, dataset in parts.items():
        if part != TRAIN:
            check_apart(whole, dataset.described(), f"the {part} images", "data")
    copied = _copied(parts)
    if VALIDATION in copied and copied[VALIDATION].all():
        raise invalid(ALL_COPIES.format(len(copied[VALIDATION])))
    report, findings = _surveyed(uploads, parts, copied)
    return Prepared(parts, report, [*findings, *doubts], excluded.images)


def _copied(parts: Mapping[str, Dataset]) -> dict[str, np.ndarray]:
    """Whether images to measure on are near copies of some to train on, (n,) bool by part; none where it takes long."""
    images = parts[TRAIN].images
    return {
        part: copies_of(one.images, images) >= 0
        if part != TRAIN and len(one.images) * len(images) <= MOST_PAIRS else np.zeros(len(one.images), bool)
        for part, one in parts.items()
    }  # fmt: skip


def _surveyed(
    uploads: Mapping[str, _Upload], parts: Mapping[str, Dataset], copied: Mapping[str, np.ndarray]
) -> tuple[DatasetReport, list[Finding]]:
    """What is worth knowing of all parts together."""
    seen = [
        Seen(name, dataset.classes[label], part, size, blank)
        for part, dataset in parts.items()
        for name, label, size, blank in zip(
            dataset.names, dataset.labels, uploads[part].sizes, uploads[part].blank, strict=True
        )
    ]
    images = [dataset.images for dataset in parts.values()]
    copies = np.flatnonzero(np.concatenate([*copied.values()])).tolist()
    return survey(np.concatenate(images) if len(images) > 1 else images[0], seen, copies)


def _indexed(upload: _Upload, least: int) -> Dataset:
    """Sort the classes, numerically if all are numbers, and turn labels into positions; refuse unfit classes."""
    labels = _normalized(upload.labels)
    counts = Counter(labels)
    numeric = all(re.fullmatch(r"-?\d{1,18}", name) for name in counts)
    classes = tuple(sorted(counts, key=lambda name: (int(name), name)) if numeric else sorted(counts))
    if len(classes) < least:
        found = f"only {classes[0]!r}" if classes else "none"
        raise invalid(f"at least two classes are needed, found {found}")
    if len(classes) > MAX_CLASSES:
        raise invalid(f"{len(classes)} classes, more than the {MAX_CLASSES} allowed")
    wrong = [
        {"class": name, "reason": f"a class name has 1 to {MAX_NAME} printable characters"}
        for name in classes
        if not 0 < len(name) <= MAX_NAME or not name.isprintable()
    ]
    wrong += [{"class": name, "reason": "has only one image"} for name in classes if counts[name] < least]
    if wrong:
        raise invalid("every class needs a name and at least two images", wrong)
    positions = {name: position for position, name in enumerate(classes)}
    return Dataset(upload.images, np.array([positions[label] for label in labels], np.int32), classes, upload.names)


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
        raise invalid("class names differ only in the space around them", wrong)
    return [composed[label].strip() for label in labels]


def _read_zip(
    archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], max_pixels: int, max_images: int, excluded: _Exclusion
) -> tuple[dict[str, _Upload], list[Finding]]:
    """Images and labels as the CSV or the folders of a zip say, and what of these may be meant otherwise."""
    entries = [entry for entry in entries if not IGNORED.search(entry.filename)]
    entries, place, doubts = layout_of(entries, lambda entry: _unpacked(archive, entry), max_images)
    entries = [entry for entry in entries if not excluded.has(entry.filename)]
    excluded.check()
    if not entries:
        raise invalid("no image is left" if excluded.images else "the zip has no images")
    if len(entries) > max_images:
        raise invalid(f"{len(entries)} files, more than the {max_images} allowed")
    found: dict[str, list[tuple[np.ndarray, str, str, tuple[int, int], bool]]] = {TRAIN: []}
    wrong = []
    for entry in entries:
        try:
            where, body = place(entry), _unpacked(archive, entry)
            pixels = decode(body, max_pixels)
            with Image.open(io.BytesIO(body), formats=FORMATS) as image:
                size = image.size
            blank = bool(is_faint(pixels)) and not is_faint(decode(body, max_pixels, ground=0))
            found.setdefault(where.part, []).append((pixels, where.label, entry.filename, size, blank))
        except InvalidImage as exc:
            wrong.append({"file": entry.filename, "reason": exc.message})
        except MemoryError:
            wrong.append({"file": entry.filename, "reason": "decoding it takes too much memory"})
    if wrong:
        raise invalid(f"{len(wrong)} of {len(entries)} files cannot be used", wrong)
    if not found[TRAIN]:
        raise invalid("at least two classes are needed, and no image to train on is left")
    uploads = {}
    for part, images in sorted(found.items(), key=lambda item: PARTS.index(item[0])):
        pixels, labels, names, sizes, blank = zip(*images, strict=True)
        uploads[part] = _Upload(np.stack(pixels), list(labels), names, list(sizes), list(blank))
    return uploads, doubts


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(entry)
    except MemoryError:
        raise
    except Exception as exc:  # zipfile and zlib raise nearly anything on broken archives
        if isinstance(exc, OSError) and exc.errno not in (None, errno.EINVAL):
            raise
        raise InvalidImage(f"cannot be unpacked ({exc})") from exc


def _read_npz(
    archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], max_pixels: int, max_images: int, excluded: _Exclusion
) -> dict[str, _Upload]:
    """Images and labels of `images` (or `x`) and `labels` (or `y`), or of `x_train`, `y_train`, `x_test`, …."""
    if any(len(entry.filename) > MAX_PATH for entry in entries):
        raise invalid(f"the name of an array has more than {MAX_PATH} characters")
    arrays = {entry.filename.removesuffix(".npy"): entry for entry in entries}
    parts = _arrays_of(arrays)
    uploads, count = {}, 0
    for part, wanted in parts.items():
        if part != TRAIN and not any(name in arrays for names in wanted for name in names):
            continue
        found = []
        for names in wanted:
            present = [name for name in names if name in arrays]
            if len(present) != 1:
                has = " and ".join(map(repr, present)) or enumerated(sorted(arrays))
                raise invalid(f"one array must be named {' or '.join(map(repr, names))}; the file has {has}")
            found.append((present[0], _read_array(archive, arrays[present[0]], present[0], max_pixels)))
        (name, images), (_, labels) = found
        if images.ndim == 0 or labels.ndim == 0 or len(images) != len(labels):
            raise invalid(f"images and labels differ in length: shapes {images.shape} and {labels.shape}")
        count += len(images)
        if count > max_images:
            raise invalid(f"{count} images, more than the {max_images} allowed")
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.ndim != 1 or labels.dtype.kind not in "iuUS":
            raise invalid(f"labels must be (n,) integers or strings, not {labels.shape} {labels.dtype}")
        height, width = (SIDE, SIDE) if images.ndim == 2 else images.shape[1:3]
        indices: Names = tuple(i if part == TRAIN else f"{name}[{i}]" for i in range(len(images)))
        kept = [i for i, index in enumerate(indices) if not excluded.has(index)]
        if len(kept) < len(indices):
            images, labels, indices = images[kept], labels[kept], tuple(indices[i] for i in kept)
        if not kept and part == TRAIN:
            raise invalid("no image is left")
        if not kept:
            continue
        uploads[part] = _Upload(
            _prepared(images, indices), _labels(labels, indices), indices,
            [(width, height)] * len(images), [False] * len(images),
        )  # fmt: skip
    excluded.check()
    return uploads


def _arrays_of(names: Container[str]) -> Arrays:
    """What images and labels of each part may be called in an `.npz` with arrays of these names."""
    return KERAS if "x_train" in names or "y_train" in names else ARRAYS


def _unread(entries: Sequence[zipfile.ZipInfo]) -> list[Finding]:
    """The finding that names arrays which mean nothing, if there are any."""
    names = {entry.filename.removesuffix(".npy") for entry in entries if not IGNORED.search(entry.filename)}
    known = {name for images, labels in _arrays_of(names).values() for name in images + labels}
    if not (unread := sorted(names - known)):
        return []
    return [Finding(kind="unread", message=f"Arrays that are not read: {enumerated(unread)}.")]


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str, max_pixels: int) -> np.ndarray:
    """One array; refuses pickles and headers that promise more than the file contains."""
    with archive.open(entry) as file:
        try:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
        except ValueError as exc:
            raise invalid(f"the header of array {name!r} cannot be read") from exc
    if dtype.hasobject:
        raise invalid(f"array {name!r} contains pickled Python objects; save plain numbers or strings")
    if name.startswith(("images", "x")):
        _check_images(shape, dtype, max_pixels)
    if any(length < 0 for length in shape) or int(np.prod(shape, dtype=object)) * dtype.itemsize > entry.file_size:
        raise invalid(f"array {name!r} has shape {shape} {dtype} in its header, but the file is shorter")
    try:
        # Read it whole, not streamed: NumPy's reader allocates what the header promises.
        array: np.ndarray = np.lib.format.read_array(io.BytesIO(archive.read(entry)), allow_pickle=False)
    except MemoryError:
        raise
    except Exception as exc:  # a damaged archive: zlib.error, BadZipFile, ValueError, ...
        raise invalid(f"array {name!r} cannot be read: {exc}") from exc
    return array


def _shown(name: str | int) -> dict[str, Any]:
    """An image in the details of an error: its file, or its index in an array."""
    return {"file" if isinstance(name, str) else "index": name}


def _labels(labels: np.ndarray, indices: Names) -> list[str]:
    """Labels as text; byte strings are UTF-8."""
    names, wrong = [], []
    for index, label in zip(indices, labels.tolist(), strict=True):
        try:
            names.append(label.decode() if isinstance(label, bytes) else str(label))
        except UnicodeDecodeError:
            wrong.append({**_shown(index), "reason": f"label {label!r} is not UTF-8"})
    if wrong:
        raise invalid(f"{len(wrong)} of {len(labels)} labels cannot be read", wrong)
    return names


def _check_images(shape: tuple[int, ...], dtype: np.dtype[Any], max_pixels: int) -> None:
    """Refuse an array of images by its header, before it is read into memory."""
    flat = len(shape) == 2 and shape[1] == SIDE * SIDE
    grey = len(shape) == 3 or (len(shape) == 4 and shape[-1] in (1, 3))
    if not (flat or grey) or 0 in shape:
        raise invalid(f"images must be (n, height, width[, 1 or 3]) or (n, 784), not {shape}")
    if grey and shape[1] * shape[2] > max_pixels:
        raise invalid(f"images of {shape[1]}x{shape[2]} pixels; at most {max_pixels} are allowed")
    if dtype.kind not in "biuf":
        raise invalid(f"images must be integers or floats, not {dtype}")


def _prepared(images: np.ndarray, indices: Names) -> np.ndarray:
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
            wrong.append({**_shown(indices[index]), "reason": reason})
            continue
        grey = image if image.dtype == np.uint8 else np.rint(image.astype(np.float64) * (255 / top)).astype(np.uint8)
        prepared[index] = prepare(Image.fromarray(grey).convert("L"))
    if wrong:
        raise invalid(f"{len(wrong)} of {len(images)} images cannot be used", wrong)
    return prepared


def _main(upload: Path, prepared: Path, least: int, exclude: Sequence[str | int], settings: Settings) -> dict[str, Any]:
    """The verdict: `dataset` and `report`, `error` with what is wrong with the upload, or `full` if the disk is.

    Whatever else goes wrong ends the process with a traceback, and SIGXCPU ends it when its time is up.
    """
    os.nice(10)  # predictions come first
    memory, seconds = settings.decode_memory_bytes, settings.decode_seconds
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # SIGKILL, at the second, would not say why
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        found = read(
            upload, max_pixels=settings.max_pixels, max_images=settings.max_images, least=least, exclude=exclude
        )
        for part, dataset in found.parts.items():
            dataset.save(file_of(prepared, part))
        return {"dataset": found.described().dump(), "report": found.report.dump()}
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
    verdict = _main(Path(task["upload"]), Path(task["prepared"]), task["least"], task["exclude"], given)
    json.dump(verdict, sys.stdout)
