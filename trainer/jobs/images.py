"""Preparation of images: one function for what is uploaded and what is predicted."""

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
LARGE = 1 << 22  # pixels; images beyond are decoded one at a time
_one_large = threading.Lock()
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # what Pillow may decode, for uploads and predictions alike
OVERSAMPLING = 8  # a JPEG is decoded at the smallest scale that leaves so many pixels for each of the 28
Image.MAX_IMAGE_PIXELS = None  # `decode` has its own bound, which refuses instead of warning


def decode(body: bytes, max_pixels: int) -> np.ndarray:
    """An encoded image as (28, 28) uint8.

    Orientation from EXIF is applied, transparency is laid on white, and of several frames the first is taken.

    Raises:
        InvalidImage: not an image, truncated, or of more than `max_pixels` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about odd metadata
            with Image.open(io.BytesIO(body), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise InvalidImage(f"{width}x{height} pixels, more than the limit of {max_pixels}")
                scale = min(1.0, OVERSAMPLING * SIDE / max(width, height))
                image.draft("L", (math.ceil(width * scale), math.ceil(height * scale)))  # concerns JPEG alone
                with _one_large if image.width * image.height > LARGE else contextlib.nullcontext():
                    ImageOps.exif_transpose(image, in_place=True)
                    return prepare(_grey(image))
    except (InvalidImage, MemoryError):
        raise
    except UnidentifiedImageError as exc:
        raise InvalidImage(f"not an image in one of the formats {', '.join(FORMATS)}") from exc
    except Exception as exc:  # Pillow's decoders raise nearly anything on broken bytes
        raise InvalidImage(f"a broken image ({exc})") from exc


def _grey(image: Image.Image) -> Image.Image:
    """Luminance, 8 bits."""
    if image.mode in ("I", "F"):
        raise InvalidImage("an image of 32 bits a pixel, whose range is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = np.empty(values.shape, np.uint8)
        for at in range(0, len(values), STRIP):  # the wider numbers of a whole photo would take 400 MB
            grey[at : at + STRIP] = (values[at : at + STRIP].astype(np.uint32) + 128) // 257
        return Image.fromarray(grey)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        if image.mode not in ("RGBA", "LA"):
            image = image.convert("RGBA")
        opaque = Image.new("L", image.size, 255)
        opaque.paste(image.convert("L"), mask=image.getchannel("A"))
        return opaque
    return image.convert("L")


def prepare(image: Image.Image) -> np.ndarray:
    """A grey image of any size as (28, 28) uint8.

    The longer side becomes 28 pixels; the shorter is filled up on both sides with the median of the border, which is
    the ground that the writing stands on.
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
    """Tell whether the ground of these (n, 28, 28) uint8 images is lighter than what stands on it.

    Decided once for a data set: by the median over the images of the border's mean less the inner mean.
    """
    inner = images[:, 1:-1, 1:-1].reshape(len(images), -1)
    return bool(np.median(border(images).mean(axis=1) - inner.mean(axis=1)) > 0)
