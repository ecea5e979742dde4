"""Data augmentation."""

import tensorflow as tf

from store.records import GREY_28
from trainer.lenet import Tensor

SIDE = GREY_28.width


def affine(images: Tensor, shift: Tensor, rotate: Tensor, scale: Tensor, seed: Tensor) -> Tensor:
    """Shift, rotate and scale each (28, 28, 1) image at random; bilinear, with zeros outside.

    Args:
        shift: largest shift along each axis, pixels.
        rotate: largest rotation, radians.
        scale: largest relative change of scale along each axis.
        seed: (2,) int32.
    """
    u = tf.random.stateless_uniform((tf.shape(images)[0], 5), seed, -1.0, 1.0)
    angle = rotate * u[:, 0]
    cos, sin = tf.cos(angle), tf.sin(angle)
    sx, sy = 1.0 + scale * u[:, 1], 1.0 + scale * u[:, 2]
    centre = 13.5
    a, b, d, e = cos / sx, -sin / sx, sin / sy, cos / sy
    tx = centre - a * centre - b * centre + shift * u[:, 3]
    ty = centre - d * centre - e * centre + shift * u[:, 4]
    nought = tf.zeros_like(a)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images, transforms=tf.stack([a, b, tx, d, e, ty, nought, nought], axis=1),
        output_shape=tf.shape(images)[1:3], interpolation="BILINEAR", fill_mode="CONSTANT", fill_value=0.0,
    )  # fmt: skip


def flipped(images: Tensor, probability: Tensor, seed: Tensor) -> Tensor:
    """Mirror each image with this probability, left to right."""
    heads = tf.random.stateless_uniform((tf.shape(images)[0], 1, 1, 1), seed) < probability
    return tf.where(heads, tf.reverse(images, [2]), images)


def contrasted(images: Tensor, size: Tensor, seed: Tensor) -> Tensor:
    """Change contrast around the middle grey by a factor in 1 +- `size`, and brightness by up to `size` / 2."""
    u = tf.random.stateless_uniform((2, tf.shape(images)[0], 1, 1, 1), seed, -size, size)
    return tf.clip_by_value((images - 0.5) * (1.0 + u[0]) + 0.5 + 0.5 * u[1], 0.0, 1.0)


def cut_out(images: Tensor, side: Tensor, seed: Tensor) -> Tensor:
    """Blank a square of `side` pixels around a random pixel of each image (DeVries & Taylor 2017)."""
    at = tf.floor(tf.random.stateless_uniform((2, tf.shape(images)[0], 1), seed, maxval=float(SIDE)))
    near = tf.abs(tf.range(float(SIDE)) - at) * 2.0 < side  # (2, n, 28): rows and columns
    blank = tf.logical_and(near[0][:, :, None], near[1][:, None, :])[..., None]
    return tf.where(blank, tf.zeros_like(images), images)


def mixed(images: Tensor, targets: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Mixup, share * a_i + (1 - share) * a_{i-1} of images and targets in a shuffled batch (Zhang et al. 2018)."""
    return tuple(share * array + (1.0 - share) * tf.roll(array, 1, axis=0) for array in (images, targets))
