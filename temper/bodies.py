"""Images as the service takes them: uploads to train on, and bodies to predict on."""

import errno
import io
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, Union

from temper.errors import InvalidDataset, InvalidImage

if TYPE_CHECKING:
    import numpy as np

PathOrBytes: TypeAlias = str | os.PathLike[str] | bytes
# To train on: the path of a directory of class folders (perhaps in train/, val/ and test/) or of images with a CSV of
# their labels, of a zip of one or of an .npz; the content of such a file; or images, (n, height, width[, channels])
# uint8 or floats in [0, 1], with the label of each.
Data: TypeAlias = Union[PathOrBytes, "tuple[np.ndarray, np.ndarray | Sequence[int] | Sequence[str]]"]
# To predict on: a file (image, .npy or zip of images) by path or content; or (28, 28), (n, 28, 28), (n, 28, 28, 1) or
# (n, 784) uint8, or floats in [0, 1].
Image: TypeAlias = Union[PathOrBytes, "np.ndarray"]

KINDS = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"BM": "image/bmp",
    b"PK\x03\x04": "application/zip",
    b"\x93NUMPY": "application/x-npy",
}


def upload(data: Data) -> tuple[str, IO[bytes]]:
    """A file name and an open file that the caller closes.

    Raises:
        OSError: it cannot be read.
        InvalidDataset: a directory has neither files in class folders nor a CSV.
    """
    if isinstance(data, tuple):
        import numpy as np  # which whoever has arrays has already imported

        images, labels = data
        packed = io.BytesIO()
        np.savez(packed, allow_pickle=False, images=images, labels=np.asarray(labels))
        return "arrays.npz", packed
    if isinstance(data, bytes):
        return "data", io.BytesIO(data)
    path = Path(data)
    return path.name, _zipped(path) if path.is_dir() else path.open("rb")


def _zipped(folder: Path) -> IO[bytes]:
    """A temporary zip of a directory."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not any(len(file.relative_to(folder).parts) > 1 or file.suffix.lower() == ".csv" for file in files):
        text = (
            f"{folder} has no images in class folders: make one folder per class, as in {folder}/cat, or add a CSV of "
            "files and labels"
        )
        raise InvalidDataset(text, code="invalid_dataset", param="data")
    packed = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with zipfile.ZipFile(packed, "w", strict_timestamps=False) as archive:
        for file in files:
            archive.write(file, file.relative_to(folder))
    return packed


def prediction(image: Image) -> tuple[str, bytes]:
    """The media type and the body of images to predict on.

    Raises:
        OSError: the file cannot be read.
        InvalidImage: it is of no kind that the service reads.
    """
    if isinstance(image, bytes):
        name, content = "the content", image
    elif isinstance(image, str | os.PathLike):
        name, content = str(image), Path(image).read_bytes()
    else:
        return "application/x-npy", _npy(image)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp", content
    for beginning, kind in KINDS.items():
        if content.startswith(beginning):
            return kind, content
    text = f"{name} is not a PNG, JPEG, WebP or BMP image, nor an .npy or a zip of images"
    raise InvalidImage(text, code="invalid_image", param="image")


def _npy(array: Any) -> bytes:
    import numpy as np

    packed = io.BytesIO()
    np.save(packed, np.ascontiguousarray(array), allow_pickle=False)
    return packed.getvalue()


def saved_as(to: str | os.PathLike[str], name: str) -> Path:
    """Where a file is saved: at a path, or under this name in a directory. A link is followed.

    Raises:
        OSError: what is there is not a file, but a device or a pipe perhaps, which a file would replace.
    """
    target = Path(to) / name if Path(to).is_dir() else Path(to)
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "exists and is not a file", str(target))
    return target
