"""How the files of a zip are laid out: which of them are images of which class, and in which part of the data set.

Known layouts: a CSV that names files and labels; `train/`, `val/` and `test/` with class folders inside; class folders
with these inside; and class folders alone.
"""

import csv
import io
import re
import stat
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.errors import InvalidDataset, InvalidImage, enumerated, listed
from store.records import DatasetCard, Finding

PARTS = TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPELLINGS = {
    "train": TRAIN, "training": TRAIN,
    "val": VALIDATION, "valid": VALIDATION, "validation": VALIDATION, "dev": VALIDATION, "eval": VALIDATION,
    "test": TEST, "testing": TEST, "holdout": TEST,
}  # fmt: skip
WHAT = re.compile(r"[ _-]?(set|data|images)$")  # may follow them, as in test_set
COLUMNS = {
    "file": ("file", "filename", "path", "image"),
    "label": ("label", "class", "target", "category"),
    "split": ("split", "set", "subset"),
}
SEPARATORS = ",;\t"
MOST_DETAILS = 1000  # offending files or lines that an error names
MAX_FILE_BYTES = 64 << 20  # one encoded image, or the CSV
MAX_PATH = 1000  # characters; some names are kept in the records of jobs


@dataclass(frozen=True)
class Place:
    """Where an image belongs."""

    part: str
    label: str


Layout = Callable[[zipfile.ZipInfo], Place]  # raises InvalidImage


def invalid(message: str, details: Sequence[dict[str, Any]] = ()) -> InvalidDataset:
    """The error about an upload."""
    return InvalidDataset(listed(message, details), param="data", details=list(details[:MOST_DETAILS]))


def file_of(prepared: Path, part: str) -> Path:
    """Where a part lies of the upload whose training images are in `prepared`."""
    return prepared if part == TRAIN else prepared.with_name(f"{prepared.name}.{part}")


def check_apart(dataset: DatasetCard, apart: DatasetCard, what: str, param: str) -> None:
    """Refuse images to measure on that do not belong to a data set.

    Raises:
        InvalidDataset: they are of classes that it lacks, or the training images.
    """
    unknown = sorted(set(apart.classes) - set(dataset.classes))
    if unknown:
        details = [{"class": name, "reason": "is not a class of the training images"} for name in unknown]
        message = f"{what} have classes that the training images lack: {enumerated(unknown)}"
        raise InvalidDataset(message, param=param, details=details)
    if apart.id == dataset.id:
        raise InvalidDataset(f"{what} are the same as those to train on", param=param)


def layout_of(
    entries: Sequence[zipfile.ZipInfo], unpacked: Callable[[zipfile.ZipInfo], bytes], most: int
) -> tuple[list[zipfile.ZipInfo], Layout, list[Finding]]:
    """Recognize a layout: the images of a zip, where each belongs, and what may be meant otherwise.

    Args:
        entries: the files of the zip.
        unpacked: reads one of them; raises InvalidImage.
        most: images of the data set.

    Raises:
        InvalidDataset: the CSV, or the folders, contradict themselves.
    """
    tables = [entry for entry in entries if entry.filename.lower().endswith(".csv")]
    if len(tables) > 1:
        details = [{"file": entry.filename, "reason": "is one of several"} for entry in tables]
        raise invalid(f"{len(tables)} CSV files; one may name the labels of all images", details)
    images = [entry for entry in entries if entry not in tables]
    paths = [_path(entry) for entry in images]
    if tables:
        layout, has_parts = _by_table(tables[0], images, unpacked, most)
        return images, layout, [] if has_parts else _trained_on(paths, f"{tables[0].filename} has no column `split`")
    inside = defaultdict[str, set[str]](set)  # folders in those at the top; "" where images lie in it directly
    for path in paths:
        if len(path) > 1:
            inside[path[0]].add(path[1] if len(path) > 2 else "")
    if _are_parts(inside):
        return images, _in_split, []
    tops = {path[0] for path in paths}
    if len(tops) == 1 and all(len(path) > 2 for path in paths):
        (top,) = tops
        if _part(top):
            raise invalid(f"all images are in {top}/, so there are none to train on")
        raise invalid(
            f"all images are inside one folder, {top!r}; the folders at the top of the zip are the classes, so zip "
            "what is inside it"
        )
    if _are_parts_in_classes(inside, paths):
        return images, _in_part_of_class, []
    doubts = _trained_on(paths, "not every image is in a part")
    alike = next(iter(inside.values()), set())
    if len(alike) > 1 and "" not in alike and len(inside) > 1 and all(names == alike for names in inside.values()):
        message = (
            f"The classes are the folders at the top, {enumerated(sorted(inside))}; each has the same folders inside: "
            f"{enumerated(sorted(alike))}. If these are the classes, put them at the top, or into train/, val/, test/."
        )
        doubts.append(Finding(kind="layout", message=message))
    return images, _in_class, doubts


def _trained_on(paths: Sequence[Sequence[str]], why: str) -> list[Finding]:
    """The finding that images in folders called after a part are trained on, if there are any."""
    found = [path for path in paths if any(_part(folder) not in ("", TRAIN) for folder in path[:-1])]
    if not found:
        return []
    example = "/".join(found[0])
    return [
        Finding(
            kind="layout", images=len(found),
            message=f"{len(found)} images in folders to validate or test on are trained on, such as {example}: {why}.",
        )
    ]  # fmt: skip


def _path(entry: zipfile.ZipInfo) -> list[str]:
    """The folders and the name of an entry, unchecked."""
    root, *path = entry.filename.split("/")
    return [*([root] if root != "." or not path else ()), *(name for name in path if name not in ("", "."))]


def steps(entry: zipfile.ZipInfo) -> list[str]:
    """The folders and the name of an entry; refuses what could escape the archive."""
    found = _path(entry)
    name = "/".join(found)
    if name.startswith("/") or "\\" in name or ".." in found or re.match(r"[A-Za-z]:", name):
        raise InvalidImage("the path leaves the archive or uses backslashes")
    if len(name) > MAX_PATH:
        raise InvalidImage(f"the path has more than {MAX_PATH} characters")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise InvalidImage("is a symbolic link")
    if entry.file_size > MAX_FILE_BYTES:
        raise InvalidImage(f"unpacks to {entry.file_size} bytes, more than the {MAX_FILE_BYTES} allowed")
    return found


def _in_class(entry: zipfile.ZipInfo) -> Place:
    """`class/.../image.ext`."""
    top, *rest = steps(entry)
    if not rest:
        raise InvalidImage("is not in a class folder")
    return Place(TRAIN, top)


def _are_parts_in_classes(inside: Mapping[str, set[str]], paths: Sequence[Sequence[str]]) -> bool:
    """Tell whether the class folders consist of parts, because one of them has several.

    Raises:
        InvalidDataset: only some images are in a part, or none are to train on.
    """
    parts = {top: {part for name in names if (part := _part(name))} for top, names in inside.items()}
    split = next((top for top, found in sorted(parts.items()) if len(found) > 1), None)
    if split is None:
        return False
    found = " and ".join(f"{split}/{part}/" for part in PARTS if part in parts[split])
    if strays := ["/".join(path) for path in paths if len(path) < 3 or not _part(path[1])]:
        details = [{"file": name, "reason": "is in no part"} for name in strays]
        raise invalid(f"{found} are parts of a data set, so every image has to be in one", details)
    if TRAIN not in set[str]().union(*parts.values()):
        raise invalid(f"{found} are parts of a data set, and {split}/train/ is missing")
    return True


def _in_part_of_class(entry: zipfile.ZipInfo) -> Place:
    """`class/train/.../image.ext`."""
    top, part, *_ = steps(entry)
    return Place(_part(part), top)


def _in_split(entry: zipfile.ZipInfo) -> Place:
    """`train/class/.../image.ext`."""
    top, *rest = steps(entry)
    if len(rest) < 2:
        where = f"{top}/class/{rest[0]}" if rest else f"train/class/{top}"
        raise InvalidImage(f"is not in a class folder, as in {where}")
    return Place(_part(top), rest[0])


def _part(folder: str) -> str:
    """The part that a folder is called after, or ""."""
    return SPELLINGS.get(WHAT.sub("", folder.strip().lower()), "")


def _are_parts(inside: Mapping[str, set[str]]) -> bool:
    """Tell whether the folders at the top are the parts of a data set; if not, they are classes.

    Args:
        inside: the folders in each of them, and "" if it has images itself.

    Raises:
        InvalidDataset: they are parts, but not as parts should be.
    """
    roles = {top: _part(top) for top in sorted(inside)}
    named, others = [top for top in roles if roles[top]], [top for top in roles if not roles[top]]
    classes = {top: inside[top] - {""} for top in roles}  # if it is a part
    found = ", ".join(f"{top}/" for top in named)
    if others:
        several = len(named) > 1 and TRAIN in roles.values() and all(classes[top] for top in named)
        if several or any(classes[top] & {*others} for top in named):
            details = [{"file": f"{top}/", "reason": "is none of train/, val/ and test/"} for top in others]
            are = "are parts" if len(named) > 1 else "looks like a part"
            raise invalid(
                f"{found} {are} of a data set; put classes into train/, val/ and test/, and nothing beside them. If a "
                "class has such a name, put its images directly into its folder", details,
            )  # fmt: skip
        return False
    if not roles or (len(roles) == 1 and (not classes[named[0]] or TRAIN not in roles.values())):
        return False
    if len(set(roles.values())) < len(roles):
        raise invalid(f"several folders for one part of the data set: {found}; rename or merge them")
    if flat := [top for top in named if not classes[top]]:
        details = [{"file": f"{top}/", "reason": "has images but no class folders"} for top in flat]
        raise invalid(
            f"{found} are parts of a data set, so each needs class folders, as in {flat[0]}/cat/1.png", details
        )
    if TRAIN not in roles.values():
        raise invalid(f"{found} are parts of a data set, and train/ is missing")
    return True


@dataclass(frozen=True)
class _Row:
    """What a line of the CSV says."""

    line: int
    file: str
    label: str
    split: str


def _by_table(
    table: zipfile.ZipInfo, images: Sequence[zipfile.ZipInfo], unpacked: Callable[[zipfile.ZipInfo], bytes], most: int
) -> tuple[Layout, bool]:
    """Each image has the label, and perhaps the part, that the CSV says; folders mean nothing.

    Returns:
        Where each image belongs, and whether the CSV has a column for that.
    """
    try:
        folder = "/".join(steps(table)[:-1])
        text = unpacked(table).decode("utf-8-sig")
    except InvalidImage as exc:
        raise invalid("the CSV cannot be read", [{"file": table.filename, "reason": exc.message}]) from exc
    except UnicodeDecodeError as exc:
        reason = f"is not UTF-8 (byte {exc.start})"
        raise invalid("the CSV cannot be read", [{"file": table.filename, "reason": reason}]) from exc
    known: dict[str, list[zipfile.ZipInfo]] = defaultdict(list)
    for entry in images:
        known[_plain(entry.filename)].append(entry)

    def find(file: str) -> str | None:
        """The plain name of an entry, relative to the CSV or to the top of the zip."""
        names = (_plain(f"{folder}/{file}") if folder else _plain(file), _plain(file))
        return next((name for name in names if name in known), None)

    places, lines, wrong = dict[str, Place](), dict[str, int](), list[dict[str, Any]]()
    rows, has_parts = _rows(table.filename, text, most, lambda file: find(file) is not None)
    for row in rows:
        name, reason = find(row.file), ""
        part = _part(row.split)
        if name is None:
            reason = "is not in the zip"
        elif name in lines:
            reason = f"is named in line {lines[name]} already"
        elif not row.label:
            reason = "has no label"
        elif not part:
            reason = f"its split is {row.split!r}; it can be train, val or test"
        else:
            places[name] = Place(part, row.label)
        if reason:
            wrong.append({"file": row.file, "line": row.line, "reason": f"{reason} (line {row.line})"})
        if name is not None:
            lines.setdefault(name, row.line)
    wrong += [
        {"file": entry.filename, "reason": "is in the zip, and the CSV does not name it"}
        for name, entries in known.items() if name not in lines
        for entry in entries
    ]  # fmt: skip
    wrong += [
        {"file": entries[-1].filename, "reason": "is in the zip more than once"}
        for entries in known.values() if len(entries) > 1
    ]  # fmt: skip
    if wrong:
        raise invalid(f"{table.filename} is taken for the labels, and does not fit the images", wrong)
    if not any(place.part == TRAIN for place in places.values()):
        raise invalid(f"{table.filename} names no images to train on")

    def place(entry: zipfile.ZipInfo) -> Place:
        steps(entry)
        return places[_plain(entry.filename)]

    return place, has_parts


def _plain(path: str) -> str:
    """A path as it is compared: file systems differ in composed characters, CSVs in separators."""
    path = re.sub(r"/(\./)+", "/", path.replace("\\", "/")).removeprefix("./")
    return unicodedata.normalize("NFC", path)


def _rows(name: str, text: str, most: int, exists: Callable[[str], bool]) -> tuple[list[_Row], bool]:
    """The lines of a CSV whose header names its columns; without a header, the file and the label.

    Args:
        exists: tells whether a file is in the zip.
    """
    separator = max(SEPARATORS, key=text.lstrip().partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    rows, wrong = list[_Row](), list[dict[str, Any]]()
    columns: dict[str, int] | None = None
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if columns is None:
                columns, header = _columns(name, cells, exists)
                if header:
                    continue
            if len(cells) <= max(columns.values()):
                reason = f"line {reader.line_num} has {len(cells)} of the columns"
                wrong.append({"file": name, "line": reader.line_num, "reason": reason})
                if len(wrong) == MOST_DETAILS:
                    break
                continue
            if len(rows) == most:
                raise invalid(f"{name} names more than the {most} images allowed")
            split = cells[columns["split"]] if "split" in columns else TRAIN
            rows.append(_Row(reader.line_num, cells[columns["file"]], cells[columns["label"]], split))
    except csv.Error as exc:
        wrong.append({"file": name, "line": reader.line_num, "reason": f"line {reader.line_num}: {exc}"})
    if wrong:
        raise invalid("the CSV cannot be read", wrong)
    if columns is None or not rows:
        raise invalid(f"{name} names no files")
    return rows, "split" in columns


def _columns(name: str, first: Sequence[str], exists: Callable[[str], bool]) -> tuple[dict[str, int], bool]:
    """Which columns are the file, the label and the split, by the first line; and whether that is a header."""
    if not exists(first[0]):
        names = [cell.lower() for cell in first]
        found = {role: [at for at, cell in enumerate(names) if cell in known] for role, known in COLUMNS.items()}
        if len(found["file"]) == len(found["label"]) == 1 and len(found["split"]) <= 1:
            return {role: places[0] for role, places in found.items() if places}, True
        if any(found.values()):
            raise _wrong_columns(name, f"the header has {', '.join(map(repr, first))}")
    if len(first) != 2:
        raise _wrong_columns(name, f"line 1 has {len(first)}, and no header that names them")
    return {"file": 0, "label": 1}, False


def _wrong_columns(name: str, found: str) -> InvalidDataset:
    expected = "one column for the file ({}), one for the label ({}) and perhaps one for the part ({})"
    text = expected.format(*(", ".join(names) for names in COLUMNS.values()))
    return invalid(f"a CSV needs {text}", [{"file": name, "line": 1, "reason": found}])
