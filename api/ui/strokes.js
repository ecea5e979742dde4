// Drawings as lists of strokes, each a list of points [x, y] from 0 to 1; how they become pixels.

const SIDE = 280; // of a drawing: ten pixels for each of the network's
const SEEN = 28;
const WIDTH = 0.078; // of a stroke, in sides: about two of the network's pixels, as in MNIST

/** Draw strokes in the context's `strokeStyle`, smoothed through the midpoints of their points. */
export function paint(context, strokes, side) {
  Object.assign(context, { lineWidth: WIDTH * side, lineCap: "round", lineJoin: "round" });
  for (const points of strokes) {
    context.beginPath();
    context.moveTo(points[0][0] * side, points[0][1] * side);
    for (let at = 1; at < points.length - 1; at++) {
      const [[x, y], [nextX, nextY]] = [points[at], points[at + 1]];
      context.quadraticCurveTo(x * side, y * side, ((x + nextX) / 2) * side, ((y + nextY) / 2) * side);
    }
    const [x, y] = points.at(-1);
    context.lineTo(x * side, y * side);
    context.stroke();
  }
}

/** The strokes in white on a black canvas. */
export function canvasOf(strokes) {
  const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillRect(0, 0, SIDE, SIDE);
  context.strokeStyle = "#fff";
  paint(context, strokes, SIDE);
  return canvas;
}

const prepared = new WeakMap(); // by picture

/** A drawing as the network sees it, 784 bytes: what the service would make of its canvas, to the bit. */
export function seen(picture) {
  if (!prepared.has(picture)) prepared.set(picture, scaled(canvasOf(picture.strokes)));
  return prepared.get(picture);
}

/** A canvas in 28×28 pixels. One direction after the other, each rounded to bytes, as Pillow does. */
function scaled(canvas) {
  const { data } = canvas.getContext("2d").getImageData(0, 0, SIDE, SIDE);
  const across = new Uint8Array(SIDE * SEEN), pixels = new Uint8Array(SEEN * SEEN);
  const sum = (source, start, step, { weights }) => {
    let total = 1 << (BITS - 1);
    for (let at = 0; at < weights.length; at++) total += weights[at] * source[start + at * step];
    return total >> BITS;
  };
  for (let y = 0; y < SIDE; y++) for (let x = 0; x < SEEN; x++)
    across[y * SEEN + x] = sum(data, 4 * (y * SIDE + WEIGHTS[x].first), 4, WEIGHTS[x]);
  for (let y = 0; y < SEEN; y++) for (let x = 0; x < SEEN; x++)
    pixels[y * SEEN + x] = sum(across, WEIGHTS[y].first * SEEN + x, SEEN, WEIGHTS[y]);
  return pixels;
}

// Pillow's bilinear filter: a triangle over twice the scale, in fixed point.
const BITS = 22;
const WEIGHTS = Array.from({ length: SEEN }, (_, at) => {
  const scale = SIDE / SEEN, centre = (at + 0.5) * scale, first = Math.max(0, centre - scale), weights = [];
  for (let from = first; from < Math.min(SIDE, centre + scale); from++) weights.push(1 - Math.abs(from + 0.5 - centre) / scale);
  const total = weights.reduce((sum, weight) => sum + weight);
  return { first, weights: weights.map((weight) => Math.round((weight / total) * 2 ** BITS)) };
});

/** An ellipse's arc from one angle to another, in degrees clockwise from the right. */
const arc = (x, y, width, height, from, to) => Array.from({ length: 25 }, (_, step) => {
  const angle = ((from + ((to - from) * step) / 24) * Math.PI) / 180;
  return [x + width * Math.cos(angle), y + height * Math.sin(angle)];
});
const line = (...corners) => corners.slice(1).flatMap(([x, y], at) => Array.from({ length: 12 }, (_, step) => {
  const [fromX, fromY] = corners[at];
  return [fromX + ((x - fromX) * step) / 11, fromY + ((y - fromY) * step) / 11];
}));

// How a hand would write each digit.
const DIGITS = [
  [arc(0.5, 0.5, 0.19, 0.28, -90, -450)],
  [line([0.47, 0.27], [0.52, 0.21], [0.51, 0.79])],
  [[...arc(0.5, 0.36, 0.17, 0.15, -160, 40), ...line([0.61, 0.48], [0.33, 0.76], [0.7, 0.76])]],
  [[...arc(0.48, 0.36, 0.16, 0.14, -150, 80), ...arc(0.48, 0.64, 0.19, 0.15, -80, 150)]],
  [line([0.44, 0.22], [0.31, 0.56], [0.7, 0.56]), line([0.6, 0.38], [0.57, 0.8])],
  [[...line([0.66, 0.23], [0.4, 0.23], [0.37, 0.47]), ...arc(0.49, 0.61, 0.18, 0.17, -130, 145)]],
  [[...line([0.6, 0.22], [0.42, 0.4]), ...arc(0.5, 0.62, 0.17, 0.17, 190, -170)]],
  [line([0.32, 0.25], [0.69, 0.25], [0.45, 0.79])],
  [[...arc(0.5, 0.36, 0.14, 0.14, 50, -230), ...arc(0.5, 0.65, 0.17, 0.15, -140, 220), [0.6, 0.46]]],
  [[...arc(0.5, 0.37, 0.16, 0.15, 0, -350), ...line([0.66, 0.36], [0.6, 0.79])]],
];

/** Strokes of a digit as a hand might write it: a little different each time. */
export function handwritten(digit) {
  const vary = (most) => (2 * Math.random() - 1) * most;
  const [slant, stretch, right, down] = [vary(0.14), 1 + vary(0.08), vary(0.04), vary(0.03)];
  return DIGITS[digit].map((stroke) => stroke.map(([x, y]) =>
    [0.5 + (x - 0.5) * stretch - (y - 0.5) * slant + right, 0.5 + (y - 0.5) * stretch + down]));
}
