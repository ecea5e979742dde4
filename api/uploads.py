"""Uploaded data sets: received, prepared by `trainer.jobs.datasets` in a process of its own, and kept."""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shutil
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from fastapi import UploadFile

from store.errors import InvalidDataset, Overloaded
from store.settings import Settings

log = logging.getLogger("temper.gateway")

DECODERS, MAX_UPLOADS = 2, 32  # uploads that are decoded, and that may be under way, at a time


class Uploads:
    """Takes in so many uploads at a time and no more, with a decoder that waits for the next one already started."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._decoders = asyncio.Semaphore(DECODERS)
        self._under_way = 0
        self._spare: asyncio.Task[Process] | None = None

    async def __aenter__(self) -> Self:
        self._spare = asyncio.create_task(start_decoder())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._spare is not None:
            await _end(await self._spare)

    async def _take_decoder(self) -> Process:
        spare, self._spare = self._spare, asyncio.create_task(start_decoder())
        process = await spare if spare else await start_decoder()
        return process if process.returncode is None else await start_decoder()

    async def store(
        self, data: UploadFile, validation: UploadFile | None, check: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Prepare an upload and keep the result; what the job record says of it.

        Args:
            check: is told that; raises what speaks against it, and then nothing is kept.

        Raises:
            InvalidDataset: what is wrong with either file, or with the two together.
            Overloaded: too many others are under way.
        """
        if self._under_way >= MAX_UPLOADS:
            raise Overloaded(f"{MAX_UPLOADS} uploads are being read already")
        self._under_way += 1
        try:
            with contextlib.ExitStack() as leftovers:
                async with self._decoders:
                    dataset, path = await self._prepare(data, "data", 2, leftovers)
                    prepared = {path: dataset["id"]}
                    if validation is not None:
                        apart, path = await self._prepare(validation, "validation", 1, leftovers)
                        prepared[path] = apart["id"]
                        _check_apart(dataset, apart)
                        dataset["validation"] = apart
                check(dataset)
                for path, name in prepared.items():
                    path.rename(self._settings.datasets / f"{name}.npz")
        finally:
            self._under_way -= 1
        return dataset

    async def _prepare(
        self, upload: UploadFile, field: str, least: int, leftovers: contextlib.ExitStack
    ) -> tuple[dict[str, Any], Path]:
        """Describe the upload and say where its prepared form lies; `leftovers` removes that unless it is moved."""
        name = secrets.token_hex(8)
        raw, prepared = (self._settings.staging / f"{name}.{kind}" for kind in ("upload", "npz"))
        leftovers.callback(prepared.unlink, missing_ok=True)

        def keep() -> None:
            with raw.open("wb") as file:
                shutil.copyfileobj(upload.file, file)

        try:
            await asyncio.to_thread(keep)
            dataset = await prepare_upload(await self._take_decoder(), raw, prepared, self._settings, least)
        except InvalidDataset as exc:
            raise InvalidDataset(exc.message, param=field, details=exc.details) from exc
        finally:
            raw.unlink(missing_ok=True)
        return {"filename": upload.filename or "", **dataset}, prepared


def _check_apart(dataset: dict[str, Any], apart: dict[str, Any]) -> None:
    """Refuse validation images that tell nothing of the training images' classes, or that are those images."""
    unknown = sorted(set(apart["classes"]) - set(dataset["classes"]))
    if unknown:
        details = [{"class": name, "reason": "is no class of `data`"} for name in unknown]
        message = f"the validation images have classes that `data` has not: {', '.join(unknown[:5])}"
        raise InvalidDataset(message, param="validation", details=details)
    if apart["id"] == dataset["id"]:
        raise InvalidDataset("the validation images are those of `data`", param="validation")


async def start_decoder() -> Process:
    """A process that waits for an upload to read; it costs a quarter of a second to start."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "trainer.jobs.datasets",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parent.parent, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip


async def prepare_upload(
    process: Process, upload: Path, prepared: Path, settings: Settings, least: int = 2
) -> dict[str, Any]:
    """Have a decoder read `upload` and write the data set to `prepared`.

    Args:
        process: of `start_decoder`; it ends with this call.
        least: as in `trainer.jobs.datasets.read`.

    Returns:
        The data set as `Dataset.described` does.

    Raises:
        InvalidDataset: what is wrong with it, or that reading it took more time or memory than allowed.
    """
    task = {"upload": str(upload), "prepared": str(prepared), "least": least, "settings": settings.model_dump_json()}
    try:
        told = process.communicate(json.dumps(task).encode())
        output, complaint = await asyncio.wait_for(told, settings.decode_seconds)
    except TimeoutError as exc:
        raise InvalidDataset(f"reading the file takes more than {settings.decode_seconds} s", param="data") from exc
    finally:
        await _end(process)
    if process.returncode != 0:
        log.error("reading an upload ended with %s: %s", process.returncode, complaint.decode(errors="replace"))
        raise InvalidDataset("reading the file takes more memory or processor time than allowed", param="data")
    verdict: dict[str, Any] = json.loads(output)
    if "error" in verdict:
        raise InvalidDataset(**verdict["error"])
    return verdict


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()


def sweep(settings: Settings) -> None:
    """Remove what uploads have left behind whose gateway was killed."""
    for pattern in ("*.upload", "*.npz"):
        for path in settings.staging.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > settings.decode_seconds:
                    path.unlink()
