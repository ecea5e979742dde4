"""Files that machines without a shared directory exchange through an object store (`TEMPER_OBJECTS`).

Data sets, versions and the epochs that jobs keep never change once they are complete. Whoever makes one shares it,
under the key that is its path in the home, and whoever needs one fetches it into the home of its own machine. Without
an object store all machines share the home, and nothing here does anything.
"""

import contextlib
import functools
import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from store.errors import ObjectStoreUnavailable, StorageFailed
from store.files import make_directory, move, remove_tree
from store.settings import Settings

COMPLETE = ".complete"  # the last object of a directory that is shared: a JSON list of its files
LEFT_S = 3600.0  # age at which what a process was fetching when it died is removed
CONNECT_S, READ_S = 5, 30


@functools.cache
def objects_of(settings: Settings) -> "Objects":
    """The object store that the settings name."""
    return Objects(settings)


class Objects:
    """Shares and fetches files and directories of the home.

    Every method raises `ObjectStoreUnavailable` while the object store cannot be reached, and `StorageFailed` if it
    refuses, or lacks part of what it should have.
    """

    def __init__(self, settings: Settings) -> None:
        self._home = settings.home.resolve()
        self._fetching = self._home / "fetching"
        self._root = (settings.objects or "").rstrip("/")
        self._shared: set[Path] = set()  # what is shared does not change

    @functools.cached_property
    def _store(self) -> Any:
        import fsspec  # here, as most installations need none

        config = {"connect_timeout": CONNECT_S, "read_timeout": READ_S}
        return fsspec.core.url_to_fs(self._root, config_kwargs=config, use_listings_cache=False)[0]

    def _key(self, path: Path) -> str:
        return f"{self._root}/{path.resolve().relative_to(self._home)}"

    def probe(self) -> None:
        """Write an object, read it and delete it again."""
        key = f"{self._root}/probe-{secrets.token_hex(8)}"
        with _translated():
            self._store.pipe_file(key, b"temper")
            self._store.cat_file(key)
            self._store.rm_file(key)

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
        self._shared.add(path)

    def is_shared(self, path: Path) -> bool:
        """Tell whether a file, or a complete directory, is in the object store."""
        if not self._root or path in self._shared:
            return bool(self._root)
        with _translated():
            found = any(self._store.isfile(key) for key in (f"{self._key(path)}/{COMPLETE}", self._key(path)))
        if found:
            self._shared.add(path)
        return found

    def share_missing(self, path: Path) -> None:
        """Share what is here and not shared yet: it was made before there was an object store."""
        if self._root and path.exists() and not self.is_shared(path):
            self.share(path)

    def fetch(self, path: Path) -> Path:
        """Have a file or directory here, if it is shared and not here yet; returns its path."""
        if not self._root or path.exists():
            return path
        make_directory(self._fetching)
        staged = self._fetching / secrets.token_hex(8)
        try:
            with _translated():
                if not self._download(path, staged):
                    return path
            make_directory(path.parent)
            move(staged, path)
        except OSError:
            if not path.exists():  # otherwise somebody else has fetched it meanwhile
                raise
        finally:
            _remove(staged)
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
        self._shared.discard(path)
        with _translated(), contextlib.suppress(FileNotFoundError):
            # First what says that a directory is complete, then its files.
            for key in (f"{self._key(path)}/{COMPLETE}", self._key(path)):
                if self._store.exists(key):
                    self._store.rm(key, recursive=True)

    def remove_if_older(self, path: Path, age_s: float) -> None:
        """Delete a file that was shared longer ago, and not again since it was listed."""
        with _translated(), contextlib.suppress(FileNotFoundError):
            if _age_s(self._store.info(self._key(path))) > age_s:
                self.remove(path)

    def listed(self, folder: Path) -> list[Path]:
        """Files and directories that are shared in a folder."""
        return [folder / Path(each["name"]).name for each in self._entries(folder)]

    def older_than(self, folder: Path, age_s: float) -> list[Path]:
        """Files of a folder that were shared longer ago."""
        files = (each for each in self._entries(folder) if each["type"] == "file")
        return [folder / Path(each["name"]).name for each in files if _age_s(each) > age_s]

    def _entries(self, folder: Path) -> list[dict[str, Any]]:
        if not self._root:
            return []
        with _translated():
            try:
                found: list[dict[str, Any]] = self._store.ls(self._key(folder), detail=True, refresh=True)
            except FileNotFoundError:
                return []
        return found

    def drop_cached(self, folder: Path, age_s: float) -> None:
        """Delete the files of a folder here that are older and shared: whoever needs one fetches it again."""
        if not self._root:
            return
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and time.time() - path.stat().st_mtime > age_s and self.is_shared(path):
                    path.unlink()

    def sweep(self) -> None:
        """Delete what processes were fetching when they died."""
        for path in self._fetching.iterdir() if self._fetching.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > LEFT_S:
                    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def _age_s(entry: dict[str, Any]) -> float:
    return float(time.time() - entry["LastModified"].timestamp())


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Raise errors of ours for whatever an object store raises."""
    try:
        yield
    except ImportError as exc:
        raise StorageFailed(f"TEMPER_OBJECTS: {exc}; pip install 'temper[s3]'") from exc
    except FileNotFoundError as exc:
        raise StorageFailed(f"the object store lacks what was asked for: {exc}") from exc
    except PermissionError as exc:
        raise StorageFailed("the object store refuses this key; its policy must allow to list, read and write") from exc
    except Exception as exc:
        if type(exc).__name__ in ("NoCredentialsError", "PartialCredentialsError"):  # botocore's, which may be absent
            raise StorageFailed("there is no key for the object store: set AWS_ACCESS_KEY_ID and its secret") from exc
        said = " ".join(str(exc).split()) or type(exc).__name__
        raise ObjectStoreUnavailable(f"the object store cannot be reached: {said}") from exc
