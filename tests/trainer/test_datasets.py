"""Uploads: what is read, and how each bad one is refused."""

import asyncio
import io
import re
import signal
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from api.uploads import prepare_upload, start_decoder
from store.errors import InvalidDataset, InvalidImage, StorageFull, TemperError
from store.records import DatasetCard
from store.settings import Settings
from tests.conftest import npz, png, zipped
from trainer.jobs.datasets import Dataset, Prepared, read
from trainer.jobs.images import decode, is_dark_on_light, prepare

RNG = np.random.default_rng(0)
DOT = np.zeros((28, 28), np.uint8)
DOT[10:18, 10:18] = 255
GOOD = {f"{name}/{i}.png": png(DOT) for name in "ab" for i in range(2)}


def reading(tmp_path: Path, content: bytes, **limits: Any) -> Dataset:
    path = tmp_path / "upload"
    path.write_bytes(content)
    return prepared(path, **limits).parts["train"]


def prepared(path: Path, **limits: Any) -> Prepared:
    return read(path, **{"max_pixels": 1 << 24, "max_images": 1000, **limits})


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def huge_png(side: int) -> bytes:
    """A PNG of a few kilobytes that promises side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 10_000_000)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_zip_of_class_folders_is_read_in_numeric_order_of_its_classes(tmp_path: Path) -> None:
    files = {f"{name}/deep/{i}.png": png(DOT) for name in ("10", "9", "-1") for i in range(2)}
    junk = {"__MACOSX/9/._0.png": b"?", "9/.DS_Store": b"?", "Thumbs.db": b"?", "10/Thumbs.db": b"?"}
    dataset = reading(tmp_path, zipped(files | junk))
    assert dataset.classes == ("-1", "9", "10")
    assert dataset.labels.tolist() == [2, 2, 1, 1, 0, 0]
    assert (dataset.images == DOT).all()


@pytest.mark.parametrize(
    "images",
    [
        np.stack([DOT] * 4),
        np.stack([DOT] * 4)[..., None],
        np.stack([DOT] * 4).reshape(4, 784),
        np.stack([DOT] * 4).astype(np.int64),
        np.stack([DOT] * 4) > 0,
        np.stack([DOT] * 4).astype(np.float32) / 255,
        np.stack([DOT] * 4).astype(np.float64) / 255,
        np.repeat(np.stack([DOT] * 4)[..., None], 3, axis=-1),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y")], ids="/".join)
def test_an_npz_is_read_in_every_form(tmp_path: Path, images: np.ndarray, names: tuple[str, str]) -> None:
    dataset = reading(tmp_path, npz(**{names[0]: images, names[1]: np.array(["b", "b", "a", "a"])}))
    assert (dataset.images == DOT).all()
    assert dataset.classes == ("a", "b")
    assert dataset.labels.tolist() == [1, 1, 0, 0]


def test_other_sizes_are_resized_with_their_aspect_kept() -> None:
    wide = np.full((20, 40), 200, np.uint8)
    wide[5:15, 5:35] = 10
    found = prepare(Image.fromarray(wide))
    assert found.shape == (28, 28)
    assert (found[:7] == 200).all()  # filled up with the ground
    assert (found[21:] == 200).all()
    assert found[14, 14] == 10


def test_transparency_is_laid_on_white_and_orientation_is_applied() -> None:
    clear = Image.new("LA", (28, 28), (0, 0))
    assert (decode(encoded(clear, "PNG"), 10_000) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 14, axis=0).repeat(28, axis=1))
    turned = decode(encoded(half, "JPEG", exif=exif, quality=95), 10_000)
    assert turned[:10].min() > 240
    assert turned[18:].max() < 15


def test_sixteen_bit_greys_keep_their_range() -> None:
    deep = Image.fromarray(np.full((28, 28), 65535, np.uint16))
    assert (decode(encoded(deep, "PNG"), 10_000) == 255).all()


def test_polarity_is_that_of_the_ground() -> None:
    assert not is_dark_on_light(np.stack([DOT] * 3))
    assert is_dark_on_light(np.stack([255 - DOT] * 3))


def bad_uploads() -> dict[str, tuple[bytes, str, list[str]]]:
    """Name: (upload, what the message says, the files or indices in the details)."""
    good_npz = {"images": np.stack([DOT] * 4), "labels": np.array([0, 0, 1, 1])}
    encrypted = bytearray(zipped(GOOD))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.find(signature) + offset] |= 1
    link = io.BytesIO(zipped(GOOD))
    with zipfile.ZipFile(link, "a") as archive:
        entry = zipfile.ZipInfo("a/link.png")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/0.png", "b/0.png"):
            with archive.open(name, "w") as file:
                for _ in range(600):
                    file.write(bytes(1 << 20))
    damaged = bytearray(zipped({"a/noise.png": png(RNG.integers(0, 255, (28, 28), np.uint8)), **GOOD}))
    damaged[60] ^= 255
    short = io.BytesIO()
    with zipfile.ZipFile(short, "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 28, 28)}
        )
        archive.writestr("images.npy", header.getvalue())
        archive.writestr("labels.npy", b"")
    floats = np.stack([DOT] * 4).astype(np.float32) / 255
    nan, large = floats.copy(), floats.copy()
    nan[[1, 3], 5, 5] = np.nan, np.inf
    large[2] *= 255
    return {
        "empty file": (b"", "empty", []),
        "garbage": (b"hello", "neither a zip", []),
        "truncated zip": (zipped(GOOD)[:200], "neither a zip", []),
        "damaged entry": (bytes(damaged), "1 of 5", ["a/noise.png"]),
        "no images": (zipped({".DS_Store": b"?"}), "no images", []),
        "zip bomb": (bomb.getvalue(), "unpacks to", []),
        "path tricks": (
            zipped({**GOOD, "../../x/1.png": png(DOT), "/etc/1.png": png(DOT), "a\\b/1.png": png(DOT)}),
            "leaves the archive or uses backslashes",
            ["../../x/1.png", "/etc/1.png", "a\\b/1.png"],
        ),
        "symbolic link": (link.getvalue(), "symbolic link", ["a/link.png"]),
        "encrypted": (bytes(encrypted), "encrypted", ["a/0.png"]),
        "no folder": (zipped({**GOOD, "lost.png": png(DOT)}), "not in a class folder", ["lost.png"]),
        "huge image": (zipped({**GOOD, "a/big.png": huge_png(60_000)}), "60000x60000", ["a/big.png"]),
        "truncated images": (
            zipped({**GOOD, "a/t.png": png(DOT)[:60], "b/t.png": png(DOT)[:-30]}), "broken", ["a/t.png", "b/t.png"],
        ),
        "no image": (zipped({**GOOD, "a/hi.txt": b"hi", "b/x.svg": b"<svg/>"}), "2 of 6", ["a/hi.txt", "b/x.svg"]),
        "one class": (zipped({f"a/{i}.png": png(DOT) for i in range(5)}), "two classes", []),
        "wrapped": (zipped({f"all/{name}": content for name, content in GOOD.items()}), "zip what is inside", []),
        "lone image": (zipped({**GOOD, "c/0.png": png(DOT)}), "only one image", ["c"]),
        "other length": (npz(images=good_npz["images"], labels=np.arange(3)), "differ in length", []),
        "no labels": (npz(images=good_npz["images"]), "'labels' or 'y'", []),
        "both names": (npz(**good_npz, x=good_npz["images"]), "the file has 'images' and 'x'", []),
        "NaN": (npz(images=nan, labels=good_npz["labels"]), "NaN", ["1", "3"]),
        "bytes as floats": (npz(images=large, labels=good_npz["labels"]), "must be integers", ["2"]),
        "out of range": (npz(images=np.full((4, 28, 28), 300), labels=good_npz["labels"]), "0 to 255", list("0123")),
        "pickled": (npz(images=np.array([DOT, None, 1, 2], object), labels=good_npz["labels"]), "pickle", []),
        "float labels": (npz(images=good_npz["images"], labels=np.array([0.5, 0.5, 1, 1])), "integers or strings", []),
        "wrong rank": (npz(images=np.zeros((4, 28)), labels=good_npz["labels"]), "must be (n", []),
        "complex": (npz(images=np.zeros((4, 28, 28), complex), labels=good_npz["labels"]), "integers or floats", []),
        "short array": (short.getvalue(), "the file is shorter", []),
        "empty class name": (npz(images=good_npz["images"], labels=np.array(["", "", "b", "b"])), "printable", [""]),
    }  # fmt: skip


BAD = bad_uploads()


@pytest.mark.parametrize("case", BAD)
def test_a_bad_upload_is_refused_with_all_that_is_wrong(tmp_path: Path, case: str) -> None:
    content, says, named = BAD[case]
    with pytest.raises(InvalidDataset, match=re.escape(says)) as caught:
        reading(tmp_path, content)
    found = [str(detail.get("file", detail.get("index", detail.get("class")))) for detail in caught.value.details]
    assert found == named
    assert caught.value.param == "data"


def test_too_many_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match="more than the 3 allowed"):
        reading(tmp_path, zipped(GOOD), max_images=3)


def test_a_data_set_survives_being_saved(tmp_path: Path) -> None:
    dataset = reading(tmp_path, zipped(GOOD))
    dataset.save(tmp_path / "kept.npz")
    again = Dataset.load(tmp_path / "kept.npz")
    assert again.classes == dataset.classes
    assert again.described() == dataset.described()


@pytest.mark.parametrize("body", [b"", b"GIF89a", png(DOT)[:50], b"\xff\xd8\xff\xe0", b"<svg/>"], ids=range(5))
def test_broken_images_are_refused_whatever_pillow_raises(body: bytes) -> None:
    with pytest.raises(InvalidImage):
        decode(body, 10_000)


def decoded(folder: Path, settings: Settings) -> DatasetCard:
    async def decode() -> DatasetCard:
        return (await prepare_upload(await start_decoder(), folder / "upload", folder / "prepared", settings))[0]

    return asyncio.run(decode())


def test_the_decoding_process_is_ended_when_its_time_is_up(tmp_path: Path) -> None:
    """24 images of 16 million pixels, and one second."""
    noise = png(RNG.integers(0, 255, (4000, 4000), np.uint8))
    content = zipped({f"{name}/{i}.png": noise for name in "ab" for i in range(12)})
    (tmp_path / "upload").write_bytes(content)
    settings = Settings(home=tmp_path, decode_seconds=1)
    with pytest.raises(InvalidDataset, match="more than the 1 s allowed"):
        decoded(tmp_path, settings)
    assert not (tmp_path / "prepared").exists()


def test_the_decoding_process_is_bounded_in_memory(tmp_path: Path) -> None:
    noise = np.zeros((2, 13_000, 20_000), np.uint8)
    (tmp_path / "upload").write_bytes(npz(images=noise, labels=np.arange(2)))
    settings = Settings(home=tmp_path, decode_memory_bytes=1 << 28, max_pixels=1 << 30)
    with pytest.raises(InvalidDataset, match="memory"):
        decoded(tmp_path, settings)


def test_a_good_upload_passes_through_the_process(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(zipped(GOOD))
    verdict = decoded(tmp_path, Settings(home=tmp_path))
    dataset = Dataset.load(tmp_path / "prepared").described()
    assert (verdict.id, verdict.file, verdict.polarity) == (dataset.id, dataset.file, dataset.polarity)
    assert verdict.classes == {"a": 2, "b": 2}


def test_a_full_disk_and_a_crash_of_the_decoder_are_not_blamed_on_the_upload(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(zipped(GOOD))
    (tmp_path / "prepared").symlink_to("/dev/full")
    with pytest.raises(StorageFull, match="no space"):
        decoded(tmp_path, Settings(home=tmp_path))
    (tmp_path / "prepared").unlink()
    (tmp_path / "upload").unlink()  # as if it were a bug of ours
    with pytest.raises(TemperError, match="internal error") as caught:
        decoded(tmp_path, Settings(home=tmp_path))
    assert type(caught.value) is TemperError


def test_processor_time_is_a_limit_that_the_answer_names(tmp_path: Path) -> None:
    async def killed() -> None:
        process = await start_decoder()
        process.send_signal(signal.SIGXCPU)
        await process.wait()
        await prepare_upload(process, tmp_path / "upload", tmp_path / "prepared", Settings(home=tmp_path))

    with pytest.raises(InvalidDataset, match="more than the 120 s allowed"):
        asyncio.run(killed())


def test_composed_and_decomposed_names_are_one_class_and_space_around_a_name_is_cut(tmp_path: Path) -> None:
    images = np.stack([DOT] * 4)
    assert reading(tmp_path, npz(images=images, labels=np.array(["é", "e\u0301", " o", " o"]))).classes == ("o", "é")
    with pytest.raises(InvalidDataset, match="'A' and 'A '") as caught:
        reading(tmp_path, zipped({f"{name}/{i}.png": png(DOT) for name in ("A", "A ", "B") for i in range(2)}))
    assert [detail["class"] for detail in caught.value.details] == ["A"]


def test_class_names_may_be_anything_that_prints_and_bytes_must_be_utf8(tmp_path: Path) -> None:
    images = np.stack([DOT] * 4)
    assert reading(tmp_path, npz(images=images, labels=np.array(["é".encode()] * 2 + [b"o"] * 2))).classes == ("o", "é")
    with pytest.raises(InvalidDataset, match="not UTF-8") as caught:
        reading(tmp_path, npz(images=images, labels=np.array([b"caf\xe9", b"caf\xe8", b"o", b"o"])))
    assert [detail["index"] for detail in caught.value.details] == [0, 1]


def test_an_array_is_refused_by_its_header_before_it_takes_memory(tmp_path: Path) -> None:
    content = npz(images=np.zeros((4, 28, 28, 8), np.uint8), labels=np.arange(4))
    with pytest.raises(InvalidDataset, match="must be"):
        reading(tmp_path, content.replace(b"(4, 28, 28, 8)", b"(9, 28, 28, 8)"))  # the data would be too short


def shade(value: int) -> bytes:
    """An image of which every test can have several that differ."""
    image = DOT.copy()
    image[12:16, 12:16] = value
    return png(image)


def split(*tops: str, classes: Iterable[str] = "ab") -> dict[str, bytes]:
    """Two images of every class in each of some folders."""
    return {
        f"{top}/{name}/{i}.png": shade(100 * number + 10 * ord(name[0]) % 97 + i)
        for number, top in enumerate(tops) for name in classes for i in range(2)
    }  # fmt: skip


def read_zip(tmp_path: Path, files: dict[str, bytes], **limits: Any) -> Prepared:
    (tmp_path / "upload").write_bytes(zipped(files))
    return prepared(tmp_path / "upload", **limits)


def refused(tmp_path: Path, files: dict[str, bytes], says: str, **limits: Any) -> list[dict[str, Any]]:
    """The details of the refusal of a zip."""
    with pytest.raises(InvalidDataset, match=re.escape(says)) as caught:
        read_zip(tmp_path, files, **limits)
    assert caught.value.param == "data"
    return caught.value.details


@pytest.mark.parametrize("validation", ["val", "valid", "Validation", "dev_set", "eval", "valdata", "val "])
def test_train_val_and_test_folders_are_the_parts_of_a_data_set(tmp_path: Path, validation: str) -> None:
    found = read_zip(tmp_path, split("TRAIN", validation, "test") | {"test/b/.DS_Store": b"?"})
    assert list(found.parts) == ["train", "validation", "test"]
    assert {dataset.classes for dataset in found.parts.values()} == {("a", "b")}
    assert found.parts["validation"].names == tuple(f"{validation}/{name}/{i}.png" for name in "ab" for i in range(2))
    card = found.described()
    assert card.classes == {"a": 2, "b": 2}
    assert card.validation
    assert card.test
    assert [part.images for part in card.parts] == [4, 4, 4]
    assert (found.report.images, found.report.validation_images, found.report.test_images) == (4, 4, 4)


def test_train_and_test_alone_leave_validation_to_the_training_images(tmp_path: Path) -> None:
    card = read_zip(tmp_path, split("train", "testing")).described()
    assert card.validation is None
    assert card.test
    assert list(read_zip(tmp_path, split("train")).parts) == ["train"]
    lone = read_zip(tmp_path, split("train") | {"test/b/0.png": shade(250)})  # one class and one image are enough
    assert lone.parts["test"].classes == ("b",)


def test_split_names_beside_other_folders_are_classes(tmp_path: Path) -> None:
    flat = {f"{top}/{i}.png": shade(10 * at + i) for at, top in enumerate(("train", "ship")) for i in range(2)}
    assert reading(tmp_path, zipped(flat)).classes == ("ship", "train")
    assert reading(tmp_path, zipped(split("train", classes=["steam"]) | split("ship"))).classes == ("ship", "train")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_part_beside_folders_of_its_classes_is_refused(tmp_path: Path, part: str) -> None:
    files = split(part) | {f"{name}/{i}.png": shade(90 + i) for name in "ab" for i in range(2)}
    named = refused(
        tmp_path, files, f"{part}/ looks like a part of a data set; put classes into train/, val/ and test/"
    )
    assert [detail["file"] for detail in named] == ["a/", "b/"]


def test_near_copies_of_training_images_are_named_and_validation_needs_others(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (8, 28, 28)).astype(np.uint8)
    other = rng.integers(0, 200, (2, 28, 28)).astype(np.uint8)
    arrays = {"x_train": images, "y_train": np.arange(8) % 2, "x_val": np.concatenate([images[:2] + 9, other]),
              "y_val": [0, 1, 0, 1], "x_test": images[4:6] + 9, "y_test": [0, 1]}  # fmt: skip
    (tmp_path / "upload").write_bytes(npz(**arrays))
    (leak,) = prepared(tmp_path / "upload", least=2).findings
    assert (leak.kind, leak.images) == ("leak", 4)
    assert [one["file"] for one in leak.listed] == ["x_val[0]", "x_val[1]", "x_test[0]", "x_test[1]"]
    (tmp_path / "upload").write_bytes(npz(**arrays | {"x_val": images[:2] + 9, "y_val": [0, 1]}))
    with pytest.raises(InvalidDataset, match="all 2 validation images are near copies"):
        prepared(tmp_path / "upload")


def findings(tmp_path: Path, files: dict[str, bytes]) -> list[str]:
    return [one.message for one in read_zip(tmp_path, files).findings if one.kind == "layout"]


def test_folders_that_may_be_meant_otherwise_are_named(tmp_path: Path) -> None:
    (alike,) = findings(tmp_path, split("batch1", "batch2"))
    assert "are the folders at the top, 'batch1', 'batch2'; each has the same folders inside: 'a', 'b'" in alike
    assert len(findings(tmp_path, split("train", "later"))) == 1
    assert findings(tmp_path, split("cat", classes="ab") | split("dog", classes="bc")) == []
    (trained_on,) = findings(tmp_path, split("a", "b", classes=["test"]) | {"a/9.png": shade(99)})
    assert "4 images in folders to validate or test on are trained on, such as a/test/0.png: not every" in trained_on
    table = "file,label\n" + "".join(f"{name},{name.split('/')[1]}\n" for name in split("train", "test"))
    (by_csv,) = findings(tmp_path, split("train", "test") | {"labels.csv": table.encode()})
    assert "4 images" in by_csv
    assert "labels.csv has no column `split`" in by_csv
    assert findings(tmp_path, split("train", "test")) == []


def test_paths_may_be_written_with_dots_and_double_slashes(tmp_path: Path) -> None:
    found = read_zip(tmp_path, {f"./train//{name}/./{i}.png": shade(10 + i) for name in "ab" for i in range(2)})
    assert found.parts["train"].classes == ("a", "b")


def test_parts_may_be_folders_in_the_class_folders(tmp_path: Path) -> None:
    found = read_zip(tmp_path, split("car", "boat", classes=["Train", "test"]))
    assert {part: dataset.classes for part, dataset in found.parts.items()} == dict.fromkeys(
        ("train", "test"), ("boat", "car")
    )
    assert found.parts["test"].names == tuple(f"{name}/test/{i}.png" for name in ("car", "boat") for i in range(2))
    strays = {"car/0.png": shade(9), "ship/notes/0.png": shade(8)}
    named = refused(tmp_path, split("car", "boat", classes=["train", "test"]) | strays, "every image has to be in one")
    assert [detail["file"] for detail in named] == list(strays)
    refused(tmp_path, split("car", "boat", classes=["val", "test"]), "boat/train/ is missing")
    assert list(read_zip(tmp_path, split("car", "boat", classes=["train"])).parts) == ["train"]


@pytest.mark.parametrize(
    ("files", "says", "named"),
    [
        (
            {f"{top}/{i}.png": shade(i) for top in ("train", "test") for i in range(2)},
            "test/, train/ are parts of a data set, so each needs class folders, as in test/cat/1.png",
            ["test/", "train/"],
        ),
        (split("train") | {"test/0.png": shade(9)}, "needs class folders", ["test/"]),
        (split("train", "test") | {"train/0.png": shade(9)}, "train/class/0.png", ["train/0.png"]),
        (split("train", "test") | {"notes.txt": b"?"}, "not in a class folder", ["notes.txt"]),
        (split("val", "test"), "train/ is missing", []),
        (split("train", "test", "ship"), "nothing beside them", ["ship/"]),
        (split("train", "val", "valid"), "several folders for one part", []),
        (split("train") | split("test", classes="abx"), "classes that the training images lack: 'x'", ["x"]),
        ({**split("train"), **{f"val/{name[6:]}": body for name, body in split("train").items()}}, "are the same", []),
        (split("train", classes="a") | split("test"), "two classes", []),
        (split("all/train", "all/test"), "zip what is inside", []),
        (split("test"), "all images are in test/, so there are none to train on", []),
        (split("train") | {"labels.csv": b""}, "labels.csv names no files", []),
        (split("train") | {"labels.csv": b"file,label"}, "labels.csv names no files", []),
    ],
    ids=range(14),
)
def test_split_folders_that_do_not_make_a_data_set_are_refused(
    tmp_path: Path, files: dict[str, bytes], says: str, named: list[str]
) -> None:
    assert [detail.get("file", detail.get("class")) for detail in refused(tmp_path, files, says)] == named


def test_images_to_validate_on_have_no_parts(tmp_path: Path) -> None:
    assert refused(tmp_path, split("train", "test"), "no parts of their own", least=1) == []


def test_the_arrays_of_keras_are_parts_too(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (6, 28, 28)).astype(np.uint8)
    names = {"x_train": images[:4], "y_train": np.array([[0], [0], [1], [1]]), "x_test": images[4:], "y_test": [1, 0]}
    (tmp_path / "upload").write_bytes(npz(**names))
    found = prepared(tmp_path / "upload")
    assert list(found.parts) == ["train", "test"]
    assert found.parts["train"].names == (0, 1, 2, 3)
    assert (found.parts["test"].names, found.parts["test"].labels.tolist()) == (("x_test[0]", "x_test[1]"), [1, 0])
    for end in ("val", "valid", "validation"):
        (tmp_path / "upload").write_bytes(npz(**names, **{f"x_{end}": images[4:5], f"y_{end}": [1]}))
        assert list(prepared(tmp_path / "upload").parts) == ["train", "validation", "test"]
    for bad, says in (
        ({**names, "y_test": [1, 2]}, "classes that the training images lack: '2'"),
        ({**names, "y_test": [1]}, "differ in length"),
        ({name: array for name, array in names.items() if name != "y_test"}, "must be named 'y_test'"),
        ({**names, "x_test": images[4:].astype(float)}, "2 of 2 images"),
    ):
        (tmp_path / "upload").write_bytes(npz(**bad))
        with pytest.raises(InvalidDataset, match=re.escape(says)):
            prepared(tmp_path / "upload")
    (tmp_path / "upload").write_bytes(npz(**names))
    with pytest.raises(InvalidDataset, match="6 images, more than the 5 allowed"):
        prepared(tmp_path / "upload", max_images=5)


@pytest.mark.parametrize("names", [("images", "labels"), ("x_train", "y_train")])
def test_arrays_that_are_not_read_are_named(tmp_path: Path, names: tuple[str, str]) -> None:
    arrays = {names[0]: np.stack([DOT // k for k in range(1, 5)]), names[1]: [0, 0, 1, 1]}
    (tmp_path / "upload").write_bytes(npz(**arrays, x_tset=[0], groups=[1]))
    (finding,) = prepared(tmp_path / "upload").findings
    assert (finding.kind, finding.images, finding.listed) == ("unread", 0, [])
    assert finding.message == "Arrays that are not read: 'groups', 'x_tset'."
    (tmp_path / "upload").write_bytes(npz(**arrays, **{"__MACOSX/._images": [1], "\x1b[2J": [2], "a" * 900: [3]}))
    (finding,) = prepared(tmp_path / "upload").findings
    assert "\x1b" not in finding.message
    assert "MACOSX" not in finding.message
    (tmp_path / "upload").write_bytes(npz(**arrays, **{"a" * 2000: [1]}))
    with pytest.raises(InvalidDataset, match="the name of an array has more than 1000 characters"):
        prepared(tmp_path / "upload")


FLAT = {f"{i}.png": shade(i) for i in range(4)}


@pytest.mark.parametrize(
    "table",
    [
        "0.png,cat\n1.png,cat\n2.png,dog\n3.png,dog\n",
        "\ufeffFilename;Label\r\n0.png; cat\r\n\r\n1.png;cat\r\n2.png;dog\r\n./3.png;dog",
        "\tclass\tpath\n0\tcat\t0.png\n1\tcat\t1.png\n2\tdog\t2.png\n3\tdog\t3.png\n",
        'image,target\n"0.png","cat"\n"1.png","cat"\n"2.png","dog"\n"3.png","dog"\n',
    ],
    ids=["plain", "semicolons", "tabs", "quoted"],
)
@pytest.mark.parametrize("folder", ["", "data/"])
def test_a_csv_says_which_class_each_file_has(tmp_path: Path, table: str, folder: str) -> None:
    files = {f"{folder}{name}": body for name, body in FLAT.items()} | {f"{folder}Labels.CSV": table.encode()}
    dataset = reading(tmp_path, zipped(files | {"__MACOSX/labels.csv": b"?"}))
    assert dataset.classes == ("cat", "dog")
    assert dict(zip(dataset.names, dataset.labels.tolist(), strict=True)) == {
        f"{folder}{i}.png": i // 2 for i in range(4)
    }


def test_paths_of_a_csv_may_begin_at_the_top_and_its_split_makes_parts(tmp_path: Path) -> None:
    files = {f"train/{name}": body for name, body in FLAT.items()} | {"train/caf\u00e9.png": shade(9)}
    rows = [f"train/{i}.png,{'ab'[i // 2]},Train" for i in range(4)] + ["train\\cafe\u0301.png,b,test"]
    found = read_zip(tmp_path, files | {"meta/l.csv": "\n".join(["file,label,subset", *rows]).encode()})
    assert found.parts["train"].names == tuple(f"train/{i}.png" for i in range(4))
    assert found.parts["test"].names == ("train/caf\u00e9.png",)
    assert found.parts["test"].classes == ("b",)


ROWS = [f"{i}.png,{'ab'[i // 2]}" for i in range(4)]


@pytest.mark.parametrize(
    ("table", "says", "named"),
    [
        ("\n".join([*ROWS, "3.png,a"]), "is named in line 4 already", [("3.png", 5)]),
        ("\n".join([*ROWS, "9.png,a", "8.png,a"]), "is not in the zip", [("9.png", 5), ("8.png", 6)]),
        ("\n".join(ROWS[:3]), "the CSV does not name it", [("3.png", None)]),
        ("\n".join([*ROWS[:3], "3.png, "]), "has no label (line 4)", [("3.png", 4)]),
        ("\n".join([*ROWS[:3], "3.png"]), "line 4 has 1 of the columns", [("l.csv", 4)]),
        ("\n".join(["file,digit", *ROWS]), "the header has 'file', 'digit'", [("l.csv", 1)]),
        ("\n".join(["file,label,class", *(f"{row},x" for row in ROWS)]), "one for the label", [("l.csv", 1)]),
        ("\n".join(f"{row},train" for row in ROWS), "no header that names them", [("l.csv", 1)]),
        ("0.png 1.png", "one column for the file", [("l.csv", 1)]),
        ("\n".join(["file,label,set", "0.png,a,old", *(f"{row},test" for row in ROWS[1:])]), "'old'", [("0.png", 2)]),
        ("file,label,split\n" + "\n".join(f"{row},test" for row in ROWS), "no images to train on", []),
        ('"' + "x" * 200_000, "field larger than", [("l.csv", 1)]),
        ("", "l.csv names no files", []),
    ],
    ids=range(13),
)  # fmt: skip
def test_a_csv_that_does_not_fit_is_refused_with_its_lines(
    tmp_path: Path, table: str, says: str, named: list[tuple[str, int | None]]
) -> None:
    details = refused(tmp_path, FLAT | {"l.csv": table.encode()}, says)
    assert [(detail["file"], detail.get("line")) for detail in details] == named


def test_a_csv_that_is_not_one_readable_file_is_refused(tmp_path: Path) -> None:
    table = "\n".join(ROWS).encode()
    assert len(refused(tmp_path, FLAT | {"l.csv": table, "m/n.csv": table}, "2 CSV files")) == 2
    refused(tmp_path, FLAT | {"l.csv": table.replace(b"a", b"\xe9")}, "is not UTF-8 (byte 6)")
    refused(tmp_path, {"../0.png": shade(0), "l.csv": b"../0.png,a"}, "leaves the archive")
    refused(tmp_path, FLAT | {"l.csv": table}, "more than the 3", max_images=3)
    refused(tmp_path, FLAT | {"l.csv": table + b"\n" + table}, "more than the 4 images allowed", max_images=4)


def test_names_are_kept_and_are_no_part_of_the_id(tmp_path: Path) -> None:
    dataset = reading(tmp_path, zipped(GOOD))
    assert dataset.names == tuple(GOOD)
    dataset.save(tmp_path / "kept.npz")
    assert Dataset.load(tmp_path / "kept.npz").names == dataset.names
    renamed = reading(tmp_path, zipped({name.replace("png", "x"): body for name, body in GOOD.items()}))
    cards = dataset.described(), renamed.described()
    assert cards[0].id == cards[1].id
    assert cards[0].file != cards[1].file  # or one upload would rename the images of another
    np.savez(tmp_path / "old.npz", images=dataset.images, labels=dataset.labels, classes=np.array(dataset.classes))
    old = Dataset.load(tmp_path / "old.npz")
    assert old.names == (0, 1, 2, 3)
    assert old.described().file == f"{cards[0].id}.npz"


def drawn(mode: str, ground: tuple[int, ...], ink: tuple[int, ...]) -> bytes:
    """A square of one colour on a ground of another."""
    image = Image.new(mode, (28, 28), ground)
    image.paste(ink, (10, 10, 18, 18))
    return encoded(image, "PNG")


def test_each_image_that_something_is_wrong_with_is_named_once_for_its_worst_fault(tmp_path: Path) -> None:
    other = png(np.random.default_rng(0).integers(0, 255, (28, 28)).astype(np.uint8))
    flat, strokes = png(np.full((28, 28), 9, np.uint8)), drawn("RGBA", (0, 0, 0, 0), (255, 255, 255, 255))
    found = read_zip(tmp_path, {
        "train/a/1.png": shade(1), "train/a/2.png": shade(1), "train/b/3.png": shade(1),
        "train/a/4.png": shade(4), "train/b/5.png": shade(5), "train/b/6.png": shade(5),
        "train/a/7.png": flat, "train/b/8.png": flat, "train/a/9.png": strokes,
        "test/a/1.png": shade(4), "test/b/2.png": other, "test/b/3.png": other,
    })  # fmt: skip
    assert {finding.kind: [image["file"] for image in finding.listed] for finding in found.findings} == {
        "conflict": ["train/a/1.png", "train/b/3.png", "train/a/2.png"],  # one of each class first
        "leak": ["test/a/1.png"],
        "blank_after_alpha": ["train/a/9.png"],
        "constant": ["train/a/7.png", "train/b/8.png"],
        "duplicate": ["train/b/6.png", "test/b/3.png"],  # without the one to keep
    }
    assert [finding.images for finding in found.findings] == [3, 1, 1, 2, 2]
    assert found.findings[1].listed == [{"file": "test/a/1.png", "class": "a", "part": "test"}]
    assert found.findings[0].message.startswith(
        "3 images equal to one of another class: train/a/1.png (a), train/b/3.png (b), train/a/2.png (a)."
    )
    assert found.described().warnings == [finding.message for finding in found.findings]
    assert (found.report.near_constant, found.report.blank_after_alpha) == (3, 1)
    assert found.report.blank_after_alpha_images == [{"file": "train/a/9.png", "class": "a"}]


def test_a_finding_lists_twenty_images_and_names_three(tmp_path: Path) -> None:
    found = read_zip(tmp_path, {f"{name}/{i:02}.png": shade(i) for name in "ab" for i in range(30)})
    (finding,) = found.findings
    assert (finding.kind, finding.images, len(finding.listed)) == ("conflict", 60, 20)
    assert "a/00.png (a), b/00.png (b), a/01.png (a) and 57 more." in finding.message


@pytest.mark.parametrize(
    ("image", "kinds"),
    [
        (drawn("RGBA", (0, 0, 0, 0), (255, 255, 255, 255)), ["blank_after_alpha"]),
        (drawn("LA", (255, 0), (255, 255)), ["blank_after_alpha"]),
        (drawn("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), []),  # dark strokes show
        (drawn("RGBA", (0, 0, 0, 255), (255, 255, 255, 255)), []),  # light ones too, on an opaque ground
        (drawn("RGBA", (0, 0, 0, 0), (9, 9, 9, 0)), ["constant"]),  # nothing shows on any ground
        (drawn("L", (255,), (255,)), ["constant"]),
        (drawn("L", (255,), (250,)), ["constant"]),
    ],
    ids=range(7),
)
def test_an_image_that_transparency_makes_blank_is_told_from_one_that_was_blank(
    tmp_path: Path, image: bytes, kinds: list[str]
) -> None:
    found = read_zip(tmp_path, {f"{name}/{i}.png": shade(2 * ord(name) + i) for name in "ab" for i in range(2)} | {
        "a/odd.png": image
    })  # fmt: skip
    assert [finding.kind for finding in found.findings] == kinds
    assert all(finding.listed == [{"file": "a/odd.png", "class": "a"}] for finding in found.findings)


def test_findings_of_arrays_name_indices(tmp_path: Path) -> None:
    images = np.stack([DOT, DOT // 2, DOT, DOT // 3])
    (tmp_path / "upload").write_bytes(npz(images=images, labels=[0, 0, 1, 1]))
    (finding,) = prepared(tmp_path / "upload").findings
    assert finding.listed == [{"index": 0, "class": "0"}, {"index": 2, "class": "1"}]
    assert "2 images equal to one of another class: 0 (0), 2 (1)." in finding.message


def test_excluded_images_are_left_out_unread_of_every_part(tmp_path: Path) -> None:
    files = split("train", "test") | {"train/a/broken.png": b"?", "test/a/caf\u00e9.png": shade(9)}
    names = ["train/a/broken.png", "./train/b/0.png", "test/a/cafe\u0301.png"]
    assert "broken.png" in str(refused(tmp_path, files, "1 of 10 files"))
    enough = {f"train/b/{i}.png": shade(200 + i) for i in (7, 8)}
    found = read_zip(tmp_path, files | enough, exclude=names)
    assert not {"train/a/broken.png", "train/b/0.png"} & set(found.parts["train"].names)
    assert len(found.parts["train"].names) == 5
    assert found.parts["test"].names == tuple(split("test"))
    assert (found.described().excluded, found.report.images) == (3, 5)
    assert "excluded" not in read_zip(tmp_path, split("train")).described().dump()
    whole = read_zip(tmp_path, split("train", "test"), exclude=list(split("test")))
    assert list(whole.parts) == ["train"]


def test_what_exclusion_leaves_must_be_a_data_set_and_every_name_must_be_there(tmp_path: Path) -> None:
    assert refused(tmp_path, GOOD, "has only one image", exclude=["a/0.png"])[0]["class"] == "a"
    refused(tmp_path, GOOD, "found only 'b'", exclude=["a/0.png", "a/1.png"])
    refused(tmp_path, split("train", "test"), "no image to train on is left", exclude=list(split("train")))
    refused(tmp_path, GOOD, "no image is left", exclude=list(GOOD))
    with pytest.raises(InvalidDataset, match=r"a/9\.png: is not in the data set") as caught:
        read_zip(tmp_path, GOOD, exclude=["a/9.png", "a/0.png", 3])
    assert caught.value.param == "exclude"
    assert [detail.get("file", detail.get("index")) for detail in caught.value.details] == ["a/9.png", 3]


def test_excluded_images_of_arrays_leave_the_indices_of_the_others_as_they_were(tmp_path: Path) -> None:
    images = np.stack([DOT // k for k in range(1, 9)]).astype(np.int64)
    images[3] = 999
    arrays = {"x_train": images[:6], "y_train": [0, 0, 0, 1, 1, 1], "x_test": images[6:], "y_test": [0, 1]}
    (tmp_path / "upload").write_bytes(npz(**arrays))
    found = prepared(tmp_path / "upload", exclude=[3, "0", "x_test[1]"])
    assert found.parts["train"].names == (1, 2, 4, 5)
    assert found.parts["train"].labels.tolist() == [0, 0, 1, 1]
    assert (found.parts["train"].images == images[[1, 2, 4, 5]]).all()
    assert found.parts["test"].names == ("x_test[0]",)
    found.parts["train"].save(tmp_path / "kept.npz")
    assert Dataset.load(tmp_path / "kept.npz").names == (1, 2, 4, 5)
    with pytest.raises(InvalidDataset, match="has values") as caught:
        prepared(tmp_path / "upload", exclude=[0])
    assert caught.value.details[0]["index"] == 3
    assert list(prepared(tmp_path / "upload", exclude=[3, "x_test[0]", "x_test[1]"]).parts) == ["train"]
    with pytest.raises(InvalidDataset, match="no image is left"):
        prepared(tmp_path / "upload", exclude=list(range(6)))


def test_a_csv_may_name_what_is_excluded(tmp_path: Path) -> None:
    files = FLAT | {"9.png": b"?", "l.csv": "\n".join([*ROWS, "9.png,a"]).encode()}
    refused(tmp_path, files, "1 of 5 files")
    assert read_zip(tmp_path, files, exclude=["9.png"]).parts["train"].names == tuple(FLAT)
