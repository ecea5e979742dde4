"""The gateway's side of `trainer.datasets`: a process for each upload, with an end."""

import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from serving.errors import InvalidDataset
from serving.settings import Settings

log = logging.getLogger("temper.gateway")


async def prepare_upload(upload: Path, prepared: Path, settings: Settings) -> dict[str, Any]:
    """Read `upload` in a process of its own and write the data set to `prepared`.

    Returns:
        The data set as `Dataset.described` does.

    Raises:
        InvalidDataset: what is wrong with it, or that reading it took more time or memory than allowed.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "trainer.datasets", str(upload), str(prepared), settings.model_dump_json(),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parent.parent, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        output, complaint = await asyncio.wait_for(process.communicate(), settings.decode_seconds)
    except TimeoutError as exc:
        raise InvalidDataset(f"reading the file takes more than {settings.decode_seconds} s", param="data") from exc
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        log.error("reading an upload ended with %s: %s", process.returncode, complaint.decode(errors="replace"))
        raise InvalidDataset("reading the file takes more memory or processor time than allowed", param="data")
    verdict: dict[str, Any] = json.loads(output)
    if "error" in verdict:
        raise InvalidDataset(**verdict["error"])
    return verdict
