// The drawing pad: mouse, touch, pen and keyboard become strokes.

import { html, useEffect, useLayoutEffect, useRef, useState } from "./parts.js";
import { handwritten, paint } from "./strokes.js";

const STEP = 1 / 40; // of the keyboard's pen
const ARROWS = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };
const inside = (value) => Math.min(0.98, Math.max(0.02, value));

/**
 * `picture` is {strokes, final} or {file, url} or null; `onPicture` gets a new one for every change, `final` when the
 * pen has lifted. `hint` is shown on the empty pad.
 */
export function Pad({ picture, onPicture, hint }) {
  const canvas = useRef(null);
  const strokes = useRef([]);
  const frame = useRef(0);
  const [pen, setPen] = useState(null); // the keyboard's: {x, y, down}

  const show = () => {
    const { current: node } = canvas;
    const side = Math.round(node.clientWidth * devicePixelRatio);
    if (node.width !== side) node.width = node.height = side;
    const context = node.getContext("2d");
    context.clearRect(0, 0, side, side);
    context.strokeStyle = getComputedStyle(node).color;
    paint(context, strokes.current, side);
  };
  const raise = () => setPen((old) => old && { ...old, down: false });
  useLayoutEffect(() => { // not at every render: the pen may be ahead of the picture
    strokes.current = picture?.strokes ?? [];
    if (!strokes.current.length) raise();
    show();
  }, [picture]);
  useEffect(() => {
    const resized = new ResizeObserver(show);
    resized.observe(canvas.current);
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    scheme.addEventListener("change", show);
    return () => (resized.disconnect(), scheme.removeEventListener("change", show), cancelAnimationFrame(frame.current));
  }, []);

  /** Tell of the strokes: at once when the pen lifts, else once for each frame. */
  const tell = (final) => {
    cancelAnimationFrame(frame.current);
    const now = () => onPicture({ strokes: strokes.current, final, at: performance.now() });
    if (final) now();
    else frame.current = requestAnimationFrame(now);
  };
  const begin = (point) => (strokes.current = [...strokes.current, [point]]);
  const extend = (points) => (strokes.current.length ? strokes.current.at(-1).push(...points) : (strokes.current = [points]));

  const pointOf = ({ clientX, clientY }) => {
    const box = canvas.current.getBoundingClientRect();
    return [inside((clientX - box.left) / box.width), inside((clientY - box.top) / box.height)];
  };
  const down = (event) => {
    if (!event.isPrimary || event.button !== 0) return;
    canvas.current.setPointerCapture(event.pointerId);
    setPen(null);
    begin(pointOf(event));
    tell(false);
  };
  const drawing = (event) => event.isPrimary && canvas.current.hasPointerCapture(event.pointerId);
  const move = (event) => {
    if (!drawing(event)) return;
    const between = event.getCoalescedEvents?.() ?? [];
    extend((between.length ? between : [event]).map(pointOf));
    tell(false);
  };
  const lift = (event) => {
    if (!drawing(event)) return;
    canvas.current.releasePointerCapture(event.pointerId);
    tell(true);
  };

  const pressed = (event) => {
    const { key } = event;
    const { x, y, down: isDown } = pen ?? { x: 0.5, y: 0.3, down: false };
    if (key in ARROWS) {
      const to = { x: inside(x + ARROWS[key][0]), y: inside(y + ARROWS[key][1]), down: isDown };
      setPen(to);
      if (isDown) extend([[to.x, to.y]]), tell(false);
    } else if (key === " " || key === "Enter") {
      setPen({ x, y, down: !isDown });
      if (!isDown) begin([x, y]);
      tell(isDown);
    } else if (key === "Delete" || key === "Backspace") {
      setPen(null);
      onPicture(null);
    } else if (/^[0-9]$/.test(key) && !event.ctrlKey && !event.metaKey && !event.altKey) {
      raise();
      strokes.current = handwritten(Number(key));
      tell(true);
    } else return;
    event.preventDefault();
  };

  return html`<div class="pad">
    <canvas ref=${canvas} tabindex="0" role="application" aria-label="Drawing pad" aria-describedby="pad-keys"
      onPointerDown=${down} onPointerMove=${move} onPointerUp=${lift} onPointerCancel=${lift} onKeyDown=${pressed}></canvas>
    ${picture?.url && html`<img class="given" src=${picture.url} alt="The image that you brought" />`}
    ${!picture && html`<div class="hint" aria-hidden="true"><b>${hint}</b><span>or drop, paste or open an image</span></div>`}
    ${pen && html`<span class="pen ${pen.down ? "down" : ""}" style=${{ left: `${100 * pen.x}%`, top: `${100 * pen.y}%` }}></span>`}
    <p id="pad-keys" class="sr-only">Arrow keys move a pen, Space puts it down and lifts it, Delete clears, and a digit is
      written for you when you press its key.</p>
  </div>`;
}

/** Write a digit as if by hand, stroke by stroke; returns how to stop. */
export function demonstrate(onPicture) {
  const whole = handwritten(Math.floor(10 * Math.random()));
  const points = whole.flatMap((stroke, at) => stroke.map((point) => [at, point]));
  const began = performance.now();
  const lasts = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 700;
  let frame = 0;
  const next = (now) => {
    const share = lasts ? Math.min(1, Math.max(0, now - began) / lasts) : 1;
    const strokes = [];
    for (const [at, point] of points.slice(0, Math.max(1, Math.round(share * points.length)))) (strokes[at] ??= []).push(point);
    onPicture({ strokes, final: share === 1, at: performance.now() });
    if (share < 1) frame = requestAnimationFrame(next);
  };
  frame = requestAnimationFrame(next);
  return () => cancelAnimationFrame(frame);
}
