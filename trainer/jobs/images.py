"""Decode and prepare images; the same code serves uploads and predictions."""

import contextlib
import io
import math
import threading
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from store.errors import InvalidImage
from store.records import GREY_28

SIDE = GREY_28.height  # and width
STRIP = 64  # rows
LARGE = 1 << 22  # pixels; larger images are decoded one at a time, to bound memory
_one_large = threading.Lock()
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # that Pillow may decode
OVERSAMPLING = 8  # a JPEG is decoded at the smallest scale that leaves this many pixels for each output pixel
Image.MAX_IMAGE_PIXELS = None  # `decode` has a limit of its own, which raises instead of warning


def decode(body: bytes, max_pixels: int, ground: int = 255) -> np.ndarray:
    """An encoded image as (28, 28) uint8.

    Applies the EXIF orientation, puts transparent images on a `ground`, white, and takes the first of several frames.

    Raises:
        InvalidImage: not an image in one of `FORMATS`, truncated, or larger than `max_pixels` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from Pillow, about odd metadata
            with Image.open(io.BytesIO(body), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise InvalidImage(f"{width}x{height} pixels, more than the limit of {max_pixels}")
                scale = min(1.0, OVERSAMPLING * SIDE / max(width, height))
                image.draft("L", (math.ceil(width * scale), math.ceil(height * scale)))  # only JPEG supports it
                with _one_large if image.width * image.height > LARGE else contextlib.nullcontext():
                    ImageOps.exif_transpose(image, in_place=True)
                    return prepare(_grey(image, ground))
    except (InvalidImage, MemoryError):
        raise
    except UnidentifiedImageError as exc:
        raise InvalidImage(f"not an image in one of the formats {', '.join(FORMATS)}") from exc
    except Exception as exc:  # Pillow's decoders raise almost anything on broken input
        raise InvalidImage(f"a broken image ({exc})") from exc


def _grey(image: Image.Image, ground: int) -> Image.Image:
    """As 8-bit luminance (mode L)."""
    if image.mode in ("I", "F"):
        raise InvalidImage("an image with 32 bits per pixel, whose range is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = np.empty(values.shape, np.uint8)
        for at in range(0, len(values), STRIP):  # 32-bit values of a whole photo would take 400 MB
            grey[at : at + STRIP] = (values[at : at + STRIP].astype(np.uint32) + 128) // 257
        return Image.fromarray(grey)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        if image.mode not in ("RGBA", "LA"):
            image = image.convert("RGBA")
        opaque = Image.new("L", image.size, ground)
        opaque.paste(image.convert("L"), mask=image.getchannel("A"))
        return opaque
    return image.convert("L")


def prepare(image: Image.Image) -> np.ndarray:
    """A grey image of any size as (28, 28) uint8.

    The longer side is scaled to 28 pixels; the shorter one is padded on both sides with the median of the border, the
    background colour.
    """
    if image.size == (SIDE, SIDE):
        return np.asarray(image)
    scale = SIDE / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    scaled = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    if scaled.shape == (SIDE, SIDE):
        return scaled
    filled = np.full((SIDE, SIDE), int(np.median(border(scaled[None]))), np.uint8)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    filled[top : top + height, left : left + width] = scaled
    return filled


def border(images: np.ndarray) -> np.ndarray:
    """The outermost pixels of (n, h, w) images, (n, k)."""
    sides = (images[:, 0, :], images[:, -1, :], images[:, :, 0], images[:, :, -1])
    return np.concatenate(sides, axis=1)


def is_dark_on_light(images: np.ndarray) -> bool:
    """Tell whether the background of these (n, 28, 28) uint8 images is lighter than the foreground.

    Decided for the data set as a whole: by the median over its images of the border's mean minus the interior's.
    """
    inner = images[:, 1:-1, 1:-1].reshape(len(images), -1)
    return bool(np.median(border(images).mean(axis=1) - inner.mean(axis=1)) > 0)
