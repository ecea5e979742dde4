"""Uploaded data sets: streamed to disk, prepared by `trainer.jobs.datasets` in a process of its own, and kept."""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import time
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Self
from urllib.parse import parse_qsl

import numpy as np
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from serving.publishing import file_lock
from serving.registry import BASE
from store.disk import translated
from store.errors import (
    InvalidDataset,
    InvalidRequest,
    MalformedRequest,
    NotFound,
    Overloaded,
    StorageFull,
    TemperError,
    UnknownJob,
    UnsupportedMediaType,
    WrongState,
)
from store.files import move
from store.objects import objects_of
from store.processes import ROOT, module_command
from store.records import DEFAULT_TENANT, DatasetCard, DatasetReport
from store.settings import Settings
from trainer.jobs.datasets import Dataset
from trainer.jobs.feedback import Correction
from trainer.jobs.layouts import PARTS, TEST, TRAIN, VALIDATION, check_apart, file_of
from trainer.jobs.library import KeptDataset, Upload
from trainer.jobs.records import FINISHED, Jobs

log = logging.getLogger("temper.gateway")

DECODERS, MAX_UPLOADS = 2, 32  # uploads that are decoded, and that may be under way, at a time
SPARE_UPLOADS = 8  # of them, for tenants that have none under way
IDLE_S, LONGEST_S = 60.0, 1800.0  # after which an upload that sends nothing, or little, gives its place to another
MAX_TEXT_BYTES = 1 << 20  # of a form field that is no file
WRITE_BYTES = 1 << 20  # that are collected before they are written
LOCK = "lock"
URLENCODED = "application/x-www-form-urlencoded"


MOST_CORRECTED = 50_000  # images of a data set that is copied to add corrections; they take 100 MB


@dataclass
class Form:
    """A multipart form, its files on disk."""

    texts: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # file names as the client gave them, by field
    hashes: dict[str, str] = field(default_factory=dict)  # SHA-256 of each file, by field

    def discard(self) -> None:
        """Remove the files."""
        for path in self.files.values():
            path.unlink(missing_ok=True)

    def digest(self) -> str:
        """Return the SHA-256 of what the form says, whatever its boundary and the order of its fields."""
        said = json.dumps([self.texts, self.names, self.hashes], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()


@dataclass(frozen=True)
class _Source:
    """A file to prepare."""

    path: Path
    filename: str  # as the client gave it
    kept: str | None = None  # id of the data set that is kept of it


class Uploads:
    """Takes in a bounded number of uploads at a time, with a decoder that waits for the next one already started.

    Unfinished files lie in a directory of this gateway alone, which it holds a lock on: a gateway that starts removes
    the directories that nobody holds.
    """

    def __init__(self, settings: Settings, jobs: Jobs) -> None:
        self._settings = settings
        self._jobs = jobs
        self._staging = settings.staging / f"uploads-{secrets.token_hex(4)}"
        self._lock: IO[bytes] | None = None
        self._decoders = asyncio.Semaphore(DECODERS)
        self._under_way: Counter[str] = Counter()  # by tenant
        self._spare: asyncio.Task[Process] | None = None

    async def __aenter__(self) -> Self:
        try:
            await asyncio.to_thread(self._take_place)
        except StorageFull as exc:  # predictions and deletions work all the same
            log.error("uploads are refused: %s", exc.message)
        self._spare = asyncio.create_task(start_decoder())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._spare is not None:
            await _end(await self._spare)
        shutil.rmtree(self._staging, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def _take_place(self) -> None:
        """Make this gateway's directory, unless another upload has just done so."""
        with translated(), file_lock(self._settings, "staging"):
            if self._lock is not None:
                return
            remove_leftovers(self._settings, self._jobs)
            self._staging.mkdir(exist_ok=True)
            self._lock = (self._staging / LOCK).open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    @contextlib.contextmanager
    def admitted(self, tenant: str) -> Iterator[None]:
        """Count a request among those under way. The last places are for tenants that have none.

        Raises:
            Overloaded: there are too many already.
        """
        places = MAX_UPLOADS - (SPARE_UPLOADS if self._under_way[tenant] else 0)
        if self._under_way.total() >= places:
            raise Overloaded(f"{self._under_way.total()} uploads are in progress; try again later")
        self._under_way[tenant] += 1
        try:
            yield
        finally:
            self._under_way[tenant] -= 1
            if not self._under_way[tenant]:
                del self._under_way[tenant]

    @contextlib.asynccontextmanager
    async def receive(
        self, request: Request, texts: set[str], files: set[str], tenant: str = DEFAULT_TENANT
    ) -> AsyncIterator[Form]:
        """Stream a form to disk; its files go when the context ends. A form without files may be URL-encoded.

        Args:
            texts: names of the fields that hold text.
            files: names of those that hold a file.

        Raises:
            Overloaded: too many uploads are under way; nothing of this one was read.
            UnsupportedMediaType, MalformedRequest: it is no form.
            InvalidRequest: a field is unknown, given twice, or of the wrong kind.
            StorageFull: no space is left.
        """
        content_type = request.headers.get("content-type", "")
        with self.admitted(tenant), contextlib.ExitStack() as stack:
            if content_type.partition(";")[0].strip().lower() == URLENCODED:
                form = await _receive_texts(request, texts, files)
                stack.callback(form.discard)  # files that are made for it
                yield form
                return
            receiver = _Receiver(content_type, self._staging, texts, files)
            stack.callback(receiver.discard)
            if self._lock is None:  # the disk was full when the gateway started
                await asyncio.to_thread(self._take_place)
            async for chunk in _pieces(request):
                receiver.feed(chunk)
                if receiver.waiting >= WRITE_BYTES:
                    await asyncio.to_thread(receiver.write)
            await asyncio.to_thread(receiver.finish)
            yield receiver.form

    def add_corrections(self, form: Form, card: DatasetCard, corrections: Sequence[Correction]) -> None:
        """Make a data set with corrected images at its end the file `data` of a form.

        Those that it was given in an earlier fine-tune are replaced.

        Raises:
            InvalidRequest: a correction is of a class that the data set lacks, or the data set is too large.
            WrongState: its images are not kept any more.
            StorageFull: no space is left.
        """
        if strange := sorted({one.label for one in corrections} - card.classes.keys()):
            raise InvalidRequest(f"corrections: the data set has no class {strange[0]!r}", param="corrections")
        if card.images > MOST_CORRECTED:
            text = f"corrections: the data set has {card.images} images, more than the {MOST_CORRECTED} that are copied"
            raise InvalidRequest(text, param="corrections")
        if self._lock is None:  # the disk was full when the gateway started
            self._take_place()
        fetch, folder = objects_of(self._settings).fetch, self._settings.datasets
        arrays: dict[str, np.ndarray] = {}
        try:
            for name, part in (("train", card), ("val", card.validation), ("test", card.test)):
                if part:
                    data = Dataset.load(fetch(folder / part.file))
                    arrays |= {f"x_{name}": data.images, f"y_{name}": np.array(data.classes)[data.labels]}
        except FileNotFoundError as exc:
            text = "the images of the data set are not kept any more; upload them to /datasets, and give `dataset`"
            raise WrongState(text, param="dataset") from exc
        own = len(arrays["x_train"]) - len(card.corrections)
        arrays["x_train"] = np.concatenate([arrays["x_train"][:own], [one.image for one in corrections]])
        arrays["y_train"] = np.concatenate([arrays["y_train"][:own], [one.label for one in corrections]])
        path = form.files.setdefault("data", self._staging / f"{secrets.token_hex(8)}.upload")
        form.names["data"] = f"{plain_name(card.filename)} with {len(corrections)} corrections"
        with translated(), path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # NumPy's stubs take them for its own options

    async def _take_decoder(self) -> Process:
        spare, self._spare = self._spare, asyncio.create_task(start_decoder())
        process = await spare if spare else await start_decoder()
        return process if process.returncode is None else await start_decoder()

    async def store(
        self, form: Form, check: Callable[[DatasetCard], None],
        kept: Mapping[str, KeptDataset] = MappingProxyType({}), *, exclude: Sequence[str | int] = (), keep: bool = True,
    ) -> DatasetCard:  # fmt: skip
        """Prepare the files of a form and keep the result; returns what the job record says of it.

        Args:
            check: called with that; raises to reject it, and then nothing is kept.
            kept: data sets that are stored already and take the place of the file `data` or `validation`.
            exclude: images of `data` to leave out.
            keep: false to keep nothing in any case.

        Raises:
            InvalidDataset: what is wrong with either file, or with the two together, or that `exclude` names an image
                which is not there.
            StorageFull: no space is left.
        """
        sources = {name: _Source(path, form.names[name]) for name, path in form.files.items()}
        if exclude and "data" in kept:
            sources["data"] = await self._again(kept["data"])
        places: dict[Path, str] = {}
        with contextlib.ExitStack() as leftovers:
            async with self._decoders if sources else contextlib.nullcontext():
                cards = {name: one.card() for name, one in kept.items()}
                for name, least, without in (("data", 2, exclude), ("validation", 1, ())):
                    if name in sources:
                        cards[name], _, found = await self._prepare(sources[name], name, least, leftovers, without)
                        places |= found
            dataset = with_validation(
                cards["data"], cards.get("validation"), "validation_dataset" if "validation" in kept else "validation"
            )
            check(dataset)
            if keep:
                await asyncio.to_thread(self._move, places)
        return dataset

    async def keep(self, form: Form, name: str) -> Upload:
        """Prepare a file of a form, and keep both the result and the file.

        Raises:
            InvalidDataset: what is wrong with it.
            StorageFull: no space is left.
        """
        raw, sha256 = form.files[name], form.hashes[name]
        with contextlib.ExitStack() as leftovers:
            async with self._decoders:
                dataset, report, places = await self._prepare(_Source(raw, form.names[name]), name, 2, leftovers)
            size_bytes = raw.stat().st_size
            await asyncio.to_thread(self._move, {**places, raw: f"{sha256}.upload"})
        return Upload(sha256, size_bytes, dataset, report)

    def _move(self, places: Mapping[Path, str]) -> None:
        with translated():
            for path, name in places.items():
                move(path, self._settings.datasets / name)
                objects_of(self._settings).share(self._settings.datasets / name)

    async def _again(self, kept: KeptDataset) -> "_Source":
        """The bytes of a data set that is kept, to be read again without some of its images."""
        if self._lock is None:  # the disk was full when the gateway started
            await asyncio.to_thread(self._take_place)
        fetch = objects_of(self._settings).fetch
        path = await asyncio.to_thread(fetch, self._settings.datasets / f"{kept.upload}.upload")
        if not await asyncio.to_thread(path.is_file):
            raise NotFound(f"the content of {kept.id} is gone from the disk; upload it again", param="dataset")
        return _Source(path, kept.dataset.filename, kept.id)

    async def _prepare(
        self, source: "_Source", name: str, least: int, leftovers: contextlib.ExitStack,
        exclude: Sequence[str | int] = (),
    ) -> tuple[DatasetCard, DatasetReport, dict[Path, str]]:  # fmt: skip
        """Describe a file and say where the prepared form of each part lies, and what it is called when it is kept.

        `leftovers` removes what is not moved.
        """
        prepared = self._staging / f"{secrets.token_hex(8)}.npz"
        for part in PARTS:
            leftovers.callback(file_of(prepared, part).unlink, missing_ok=True)
        try:
            dataset, report = await prepare_upload(
                await self._take_decoder(), source.path, prepared, self._settings, least, exclude
            )
        except InvalidDataset as exc:
            field = "dataset" if source.kept else name
            param = field if exc.param == "data" else exc.param
            raise InvalidDataset(exc.message, param=param, details=exc.details) from exc
        parts = {TRAIN: dataset, VALIDATION: dataset.validation, TEST: dataset.test}
        places = {file_of(prepared, part): card.file for part, card in parts.items() if card}
        named = {"filename": source.filename} | ({"kept": source.kept} if source.kept else {})
        return dataset.model_copy(update=named), report, places


def plain_name(filename: str) -> str:
    """A data set's file name without the corrections that it was given."""
    return re.sub(r" with \d+ corrections$", "", filename) or "data set"


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """A body as it arrives, unless it stops arriving or takes too long."""
    stream, until = request.stream(), time.monotonic() + LONGEST_S
    while True:
        if time.monotonic() > until:
            raise MalformedRequest(f"the upload took longer than {LONGEST_S:g} s")
        try:
            yield await asyncio.wait_for(anext(stream), IDLE_S)
        except StopAsyncIteration:
            return
        except TimeoutError as exc:
            raise MalformedRequest(f"the upload stalled: nothing arrived for {IDLE_S:g} s") from exc


async def _receive_texts(request: Request, texts: set[str], files: set[str]) -> Form:
    """A URL-encoded form."""
    body = bytearray()
    async for piece in _pieces(request):
        body += piece
        if len(body) > MAX_TEXT_BYTES:
            raise InvalidRequest(f"a URL-encoded form must have at most {MAX_TEXT_BYTES} bytes", param="body")
    form = Form()
    try:
        fields = parse_qsl(body.decode(), keep_blank_values=True, errors="strict")
    except ValueError as exc:
        raise MalformedRequest("the URL-encoded form is not UTF-8") from exc
    for name, value in fields:
        _check_field(name, texts, files, form.texts, is_file=False)
        form.texts[name] = value
    return form


def _check_field(name: str, texts: set[str], files: set[str], seen: Collection[str], *, is_file: bool) -> None:
    """Refuse a field that the form does not have, has had, or has of the other kind."""
    if name not in texts | files:
        known = ", ".join(sorted(texts | files))
        raise InvalidRequest(f"{name}: unknown form field; known are {known}", param=name)
    if name in seen:
        raise InvalidRequest(f"{name}: given twice", param=name)
    if is_file != (name in files):
        reason = "must be a file, with a filename" if name in files else "must be text, not a file"
        raise InvalidRequest(f"{name}: {reason}", param=name)


class _Receiver:
    """Parses a multipart body as it arrives. Files go to disk as they come; `write` blocks, `feed` does not."""

    def __init__(self, content_type: str, folder: Path, texts: set[str], files: set[str]) -> None:
        kind, options = parse_options_header(content_type)
        if kind.decode("latin-1").lower() not in ("", "multipart/form-data"):
            raise UnsupportedMediaType(f"Content-Type {kind.decode('latin-1')!r}: send multipart/form-data")
        if kind.lower() != b"multipart/form-data":
            name = min(files)
            raise InvalidRequest(f"{name}: is required; send the fields as multipart/form-data", param=name)
        if b"boundary" not in options:
            raise MalformedRequest("Content-Type: multipart/form-data needs a boundary")
        self.form = Form()
        self.waiting = 0  # bytes that are not written yet
        self._folder, self._texts, self._files = folder, texts, files
        self._name, self._seen, self._complete = "", set[str](), False
        self._headers: dict[str, bytearray] = {}
        self._header, self._value = bytearray(), bytearray()
        self._text: bytearray | None = None  # of the part that is being read, unless it is a file
        self._pending: list[tuple[str, bytes]] = []
        self._open: dict[str, IO[bytes]] = {}
        self._hashes: dict[str, Any] = {}  # hashlib's, of each file
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._on_part,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._on_header,
                    "on_headers_finished": self._on_headers,
                    "on_part_data": self._on_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as exc:
            raise MalformedRequest(f"the multipart body cannot be parsed: {exc}") from exc

    def feed(self, chunk: bytes) -> None:
        """Take in a piece of the body."""
        try:
            self._parser.write(chunk)
        except FormParserError as exc:
            raise MalformedRequest(f"the multipart body cannot be parsed: {exc}") from exc

    def write(self) -> None:
        """Write to disk what has been taken in."""
        with translated():
            for name, data in self._pending:
                if name not in self._open:
                    self.form.files[name] = self._folder / f"{secrets.token_hex(8)}.upload"
                    self._open[name] = self.form.files[name].open("xb", buffering=0)
                    self._hashes[name] = hashlib.sha256()
                self._hashes[name].update(data)
                view = memoryview(data)
                while view:
                    view = view[self._open[name].write(view) :]
        self._pending.clear()
        self.waiting = 0

    def finish(self) -> None:
        """Write the rest of a body that has ended."""
        if not self._complete:
            raise MalformedRequest("the multipart body ends before its closing boundary")
        self.write()
        self.form.hashes = {name: digest.hexdigest() for name, digest in self._hashes.items()}
        self._close()

    def discard(self) -> None:
        """Remove the files."""
        self._close()
        self.form.discard()

    def _close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _on_part(self) -> None:
        self._headers.clear()

    def _on_header(self) -> None:
        self._headers[self._header.decode("latin-1").lower()] = self._value
        self._header, self._value = bytearray(), bytearray()

    def _on_headers(self) -> None:
        _, options = parse_options_header(bytes(self._headers.get("content-disposition", b"")))
        if b"name" not in options:
            raise MalformedRequest("a part of the form has no name in its Content-Disposition")
        name, is_file = _decoded(options[b"name"]), b"filename" in options
        _check_field(name, self._texts, self._files, self._seen, is_file=is_file)
        self._name = name
        self._seen.add(name)
        self._text = None if is_file else bytearray()
        if is_file:
            self.form.names[name] = _decoded(options[b"filename"])
            if "\0" in self.form.names[name]:  # which PostgreSQL does not store
                raise InvalidRequest(f"{name}: its file name contains NUL", param=name)
            self._pending.append((name, b""))  # also an empty file is one

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._text is None:
            self._pending.append((self._name, data[start:end]))
            self.waiting += end - start
        elif len(self._text) + end - start > MAX_TEXT_BYTES:
            raise InvalidRequest(f"{self._name}: must have at most {MAX_TEXT_BYTES} bytes", param=self._name)
        else:
            self._text += data[start:end]

    def _on_part_end(self) -> None:
        if self._text is not None:
            try:
                self.form.texts[self._name] = self._text.decode()
            except UnicodeDecodeError as exc:
                raise InvalidRequest(f"{self._name}: must be UTF-8", param=self._name) from exc

    def _on_end(self) -> None:
        self._complete = True


def _decoded(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("latin-1")


def with_validation(dataset: DatasetCard, apart: DatasetCard | None, param: str = "validation") -> DatasetCard:
    """The data set with the images to validate on, if there are any.

    Args:
        param: the field that gives them.

    Raises:
        InvalidDataset: these are of classes that it lacks, or the training images, or either has parts of its own.
    """
    if apart is None:
        return dataset
    if len(apart.parts) > 1:
        raise InvalidDataset("images to validate on have no parts of their own; give only these", param=param)
    if dataset.validation is not None:
        raise InvalidDataset("the data set has images to validate on already; leave one of them out", param=param)
    check_apart(dataset, apart, "the validation images", param)
    return dataset.model_copy(update={"validation": apart})


async def start_decoder() -> Process:
    """A process that waits for an upload to read; it costs a quarter of a second to start."""
    return await asyncio.create_subprocess_exec(
        *module_command("trainer.jobs.datasets"),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        cwd=ROOT, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip


async def prepare_upload(
    process: Process,
    upload: Path,
    prepared: Path,
    settings: Settings,
    least: int = 2,
    exclude: Sequence[str | int] = (),
) -> tuple[DatasetCard, DatasetReport]:
    """Have a decoder read `upload` and write the data set to `prepared`, other parts of it beside (`file_of`).

    Args:
        process: of `start_decoder`; it ends with this call.
        least, exclude: as in `trainer.jobs.datasets.read`.

    Returns:
        What was prepared, and what is worth knowing of it.

    Raises:
        InvalidDataset: what is wrong with it, or that reading it took more time or memory than allowed.
        StorageFull: no space is left for the prepared form.
        TemperError: the decoder failed for a reason that is not the upload's fault; the log has it.
    """
    too_long = InvalidDataset(f"reading the file takes more than the {settings.decode_seconds} s allowed", param="data")
    task = {
        "upload": str(upload), "prepared": str(prepared), "least": least, "exclude": list(exclude),
        "settings": settings.model_dump_json(),
    }  # fmt: skip
    try:
        told = process.communicate(json.dumps(task).encode())
        output, complaint = await asyncio.wait_for(told, settings.decode_seconds)
    except TimeoutError as exc:
        raise too_long from exc
    finally:
        await _end(process)
    if process.returncode == -signal.SIGXCPU:
        raise too_long
    if process.returncode != 0:
        log.error("the decoder ended with %s: %s", process.returncode, complaint.decode(errors="replace"))
        raise TemperError("the upload could not be read because of an internal error; the gateway's log has the cause")
    verdict: dict[str, Any] = json.loads(output)
    if "full" in verdict:
        raise StorageFull("no space is left on the disk for the data set; delete models or free space")
    if "error" in verdict:
        raise InvalidDataset(**verdict["error"])
    return DatasetCard.model_validate(verdict["dataset"]), DatasetReport.model_validate(verdict["report"])


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()


def remove_leftovers(settings: Settings, jobs: Jobs) -> None:
    """Remove from `staging` what killed processes have left, but nothing that a living one may be working on."""
    for path in settings.staging.iterdir():
        if path.name == BASE or _is_of_open_job(path.name, jobs) or _is_locked(path / LOCK):
            continue
        log.warning("removing %s, which a process that was killed has left", path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_of_open_job(name: str, jobs: Jobs) -> bool:
    """Tell whether a worker exports this job there, or will."""
    try:
        return jobs.get(name.partition(".")[0]).status not in FINISHED  # the rest is the number of its lease
    except UnknownJob:
        return False


def _is_locked(path: Path) -> bool:
    """Tell whether the gateway that made this directory lives."""
    try:
        with path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
