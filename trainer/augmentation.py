"""Data augmentation."""

import tensorflow as tf

from trainer.lenet import Tensor


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


def mixed(images: Tensor, targets: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Mixup, share * a_i + (1 - share) * a_{i-1} of images and targets in a shuffled batch (Zhang et al. 2018)."""
    return tuple(share * array + (1.0 - share) * tf.roll(array, 1, axis=0) for array in (images, targets))
