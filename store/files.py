"""Files that outlast a power failure: a name that is visible stands for content that is complete and on disk."""

import os
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Write a file's content, or a directory's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Move a complete file or directory to its place: first its content is on disk, then its name.

    Replaces a file of that name. A directory of that name must be empty.
    """
    for folder, _, names in os.walk(source, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
    if not source.is_dir():
        sync(source)
    os.rename(source, target)
    sync(target.parent)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, unless they are there; their names are on disk."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory with all it holds, as far as that is possible; that it is gone is on disk."""
    shutil.rmtree(path, ignore_errors=True)
    if path.parent.is_dir():
        sync(path.parent)
