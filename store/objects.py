"""Files that machines without a shared directory exchange through an object store (`TEMPER_OBJECTS`).

Data sets and versions never change once they are complete. Whoever makes one shares it, under the key that is its path
in the home, and whoever needs one fetches it; each machine's home keeps what it has fetched until it is no longer
needed. Without an object store all machines share the home, and nothing here does anything.
"""

import contextlib
import functools
import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from store.errors import StorageFailed
from store.files import make_directory, move, remove_tree
from store.settings import Settings

COMPLETE = ".complete"  # the last object of a directory that is shared: a JSON list of its files


@functools.cache
def objects_of(settings: Settings) -> "Objects":
    """The object store that the settings name."""
    return Objects(settings)


class Objects:
    """Shares and fetches files and directories of the home.

    Every method raises `StorageFailed` if the object store cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._home, self._staging = settings.home.resolve(), settings.staging
        self._root = (settings.objects or "").rstrip("/")
        self._known: set[Path] = set()  # is there; what is shared does not change

    @functools.cached_property
    def _store(self) -> Any:
        with _translated():
            import fsspec  # here, as most installations need none

            return fsspec.core.url_to_fs(self._root)[0]

    def _key(self, path: Path) -> str:
        return f"{self._root}/{path.resolve().relative_to(self._home)}"

    def share(self, path: Path) -> None:
        """Share a file, or a directory with all its files."""
        if not self._root:
            return
        with _translated():
            if path.is_dir():
                names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
                for name in names:
                    self._store.put_file(str(path / name), f"{self._key(path)}/{name}")
                self._store.pipe_file(f"{self._key(path)}/{COMPLETE}", json.dumps(names).encode())
            else:
                self._store.put_file(str(path), self._key(path))
        self._known.add(path)

    def has(self, path: Path) -> bool:
        """Tell whether a file or directory is here or can be fetched."""
        if path.exists() or path in self._known:
            return True
        if not self._root:
            return False
        with _translated():
            found = any(self._store.exists(key) for key in (f"{self._key(path)}/{COMPLETE}", self._key(path)))
        if found:
            self._known.add(path)
        return found

    def fetch(self, path: Path) -> Path:
        """Have a file or directory here, if it is shared and not here yet; returns its path."""
        if not self._root or path.exists():
            return path
        staged = self._staging / f"fetched-{secrets.token_hex(8)}"
        try:
            with _translated():
                if not self._download(path, staged):
                    return path
            make_directory(path.parent)
            with contextlib.suppress(OSError) if path.exists() else contextlib.nullcontext():
                move(staged, path)
        except OSError:
            if not path.exists():  # otherwise somebody else has fetched it meanwhile
                raise
        finally:
            staged.unlink(missing_ok=True) if staged.is_file() else remove_tree(staged)
        return path

    def _download(self, path: Path, staged: Path) -> bool:
        """Download to a place of its own; False if it is not shared."""
        key = self._key(path)
        try:
            names = json.loads(self._store.cat_file(f"{key}/{COMPLETE}"))
        except FileNotFoundError:
            try:
                self._store.get_file(key, str(staged))
            except FileNotFoundError:
                return False
            return True
        for name in names:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            self._store.get_file(f"{key}/{name}", str(staged / name))
        return True

    def remove(self, path: Path) -> None:
        """Delete a file or directory from the object store."""
        if not self._root:
            return
        self._known.discard(path)
        with _translated(), contextlib.suppress(FileNotFoundError):
            # First what says that a directory is complete, then its files.
            for key in (f"{self._key(path)}/{COMPLETE}", self._key(path)):
                if self._store.exists(key):
                    self._store.rm(key, recursive=True)

    def older_than(self, folder: Path, age_s: float) -> list[Path]:
        """Shared files of a folder that were shared longer ago."""
        if not self._root:
            return []
        with _translated():
            self._store.invalidate_cache()
            try:
                found = self._store.ls(self._key(folder), detail=True)
            except FileNotFoundError:
                return []
        return [
            folder / Path(each["name"]).name
            for each in found
            if each["type"] == "file" and time.time() - each["LastModified"].timestamp() > age_s
        ]


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Raise `StorageFailed` for whatever an object store raises."""
    try:
        yield
    except ImportError as exc:
        raise StorageFailed(f"TEMPER_OBJECTS: {exc}; pip install 'temper[s3]'") from exc
    except FileNotFoundError as exc:
        raise StorageFailed(f"the object store lacks {exc}") from exc
    except Exception as exc:
        raise StorageFailed("the object store cannot be used") from exc
