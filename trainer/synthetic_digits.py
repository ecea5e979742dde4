"""Synthetic digits that look like MNIST: a sample of the base model's task that needs no data.

Each digit is a few pen strokes with jittered points. The drawing is rotated, slanted, thickened and scaled at random,
and centred by its mass in 28x28 pixels, as MNIST's digits are.
"""

import numpy as np
from PIL import Image, ImageDraw

from store.records import GREY_28

Points = list[tuple[float, float]]


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float, steps: int = 14) -> Points:
    """Points of an ellipse between two angles in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(start, end, steps))
    return [(cx + rx * float(np.cos(a)), cy + ry * float(np.sin(a))) for a in angles]


# Strokes in the unit square, y downwards. Some digits have several forms.
STROKES: dict[int, list[list[Points]]] = {
    0: [[_arc(0.5, 0.5, 0.28, 0.42, -90, 270, 24)]],
    1: [[[(0.5, 0.08), (0.5, 0.92)]], [[(0.36, 0.25), (0.52, 0.08), (0.52, 0.92)]]],
    2: [[[*_arc(0.48, 0.3, 0.26, 0.22, -170, 40), (0.25, 0.9), (0.78, 0.9)]]],
    3: [[[*_arc(0.45, 0.29, 0.24, 0.2, -150, 85), *_arc(0.45, 0.7, 0.27, 0.22, -85, 150)]]],
    4: [
        [[(0.3, 0.1), (0.24, 0.55), (0.76, 0.55)], [(0.68, 0.12), (0.64, 0.92)]],
        [[(0.6, 0.08), (0.2, 0.62), (0.8, 0.62)], [(0.6, 0.08), (0.6, 0.92)]],
    ],
    5: [[[(0.74, 0.1), (0.34, 0.1), (0.31, 0.45), *_arc(0.47, 0.67, 0.26, 0.24, -110, 140)]]],
    6: [[[(0.64, 0.08), (0.42, 0.3), (0.29, 0.6), *_arc(0.5, 0.69, 0.22, 0.22, 180, -180, 20)]]],
    7: [[[(0.22, 0.12), (0.77, 0.12), (0.42, 0.92)]]],
    8: [[_arc(0.5, 0.29, 0.2, 0.2, 90, 450, 20), _arc(0.5, 0.7, 0.24, 0.22, -90, 270, 20)]],
    9: [[[*_arc(0.47, 0.32, 0.22, 0.22, 0, -360, 20), (0.68, 0.4), (0.6, 0.92)]]],
}
SIZE, WIDE = GREY_28.height, 112  # pixels of the result, and of the canvas


def synthetic_digits(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, 28, 28, 1) float32 in [0, 1], light on dark, and labels (count,) int32, balanced."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % 10
    return np.stack([_draw(int(label), rng) for label in labels])[..., None], labels


def _draw(digit: int, rng: np.random.Generator) -> np.ndarray:
    forms = STROKES[digit]
    rotation, slant = rng.normal(0, 0.1), rng.normal(0.15, 0.15)
    scale = 20 / SIZE * WIDE * rng.uniform(0.85, 1.0) * np.array([rng.uniform(0.85, 1.15), 1.0])
    cos, sin = np.cos(rotation), np.sin(rotation)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ [[1, -slant], [0, 1]]
    pen = int(rng.uniform(1.8, 3.2) / SIZE * WIDE)
    canvas = Image.new("L", (WIDE, WIDE))
    draw = ImageDraw.Draw(canvas)
    for stroke in forms[rng.integers(len(forms))]:
        points = np.array(stroke) - 0.5 + rng.normal(0, 0.012, (len(stroke), 2))
        places = (points * scale) @ matrix.T + WIDE / 2
        draw.line([(float(x), float(y)) for x, y in places], fill=255, width=pen, joint="curve")
        for x, y in places[[0, -1]]:
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)
    weight = np.asarray(canvas, np.float64)
    line = np.arange(WIDE) + 0.5
    dx, dy = ((weight.sum(axis) @ line) / weight.sum() - WIDE / 2 for axis in (0, 1))
    centred = canvas.transform((WIDE, WIDE), Image.Transform.AFFINE, (1, 0, dx, 0, 1, dy))
    small = centred.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255
