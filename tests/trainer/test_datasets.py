"""Uploads: what is read, and how each bad one is refused."""

import asyncio
import io
import re
import signal
import struct
import zipfile
import zlib
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
from trainer.jobs.datasets import Dataset, read
from trainer.jobs.images import decode, is_dark_on_light, prepare

RNG = np.random.default_rng(0)
DOT = np.zeros((28, 28), np.uint8)
DOT[10:18, 10:18] = 255
GOOD = {f"{name}/{i}.png": png(DOT) for name in "ab" for i in range(2)}


def reading(tmp_path: Path, content: bytes, **limits: int) -> Dataset:
    path = tmp_path / "upload"
    path.write_bytes(content)
    return read(path, **{"max_pixels": 1 << 24, "max_images": 1000, **limits})[0]


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
        "both names": (npz(**good_npz, x=good_npz["images"]), "both", []),
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
    assert verdict == Dataset.load(tmp_path / "prepared").described()
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
