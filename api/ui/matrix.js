// Confusion matrices: of a version, and how they differ between two.

import { html } from "./parts.js";

const CELL = 26, MANY = 16; // classes from which on cells have no numbers

/**
 * `matrix` has a row for each true class. With `before`, cells show by how many images it differs: blue where that is
 * better, more on the diagonal or fewer beside it, red where it is worse.
 */
export function Matrix({ title, matrix, before, classes }) {
  const size = matrix.length, cell = size > MANY ? Math.max(4, (CELL * MANY) / size) : CELL, left = size > MANY ? 4 : 56, side = cell * size;
  const cells = matrix.flatMap((row, y) => row.map((images, x) => {
    const number = before ? images - before[y][x] : images;
    const good = before ? (x === y) === number > 0 : x === y;
    const share = Math.abs(number) / Math.max(1, row.reduce((sum, one) => sum + one, 0));
    return { x, y, number, good, strength: 0.14 + 0.7 * Math.min(1, before ? 2 * share : share) };
  })).filter(({ number }) => number !== 0);
  const short = (name) => (name.length > 7 ? `${name.slice(0, 6)}…` : name);
  const right = matrix.reduce((sum, row, at) => sum + row[at], 0), all = matrix.flat().reduce((sum, one) => sum + one, 0);
  return html`<figure class="matrix"><figcaption><h3>${title}</h3></figcaption>
    <svg viewBox="0 0 ${left + side + 2} ${side + 24}" width=${left + side + 2} role="img" aria-label=${before ? `${title}: ${cells.length} cells differ` : `${title}: ${right} of ${all} images on the diagonal`}>
      <rect class="frame" x=${left} y="0" width=${side} height=${side} />
      ${cells.map(({ x, y, number, good, strength }) => html`<g key=${`${x} ${y}`}><rect class=${good ? "good" : "worse"} opacity=${strength} x=${left + x * cell + 1} y=${y * cell + 1} width=${cell - 2} height=${cell - 2} rx="3">
          <title>${`${classes[y]} taken for ${classes[x]}: ${before && number > 0 ? "+" : ""}${number}`}</title></rect>
        ${size <= MANY && html`<text class="middle ${strength > 0.6 ? "strong" : "number"}" x=${left + (x + 0.5) * cell} y=${(y + 0.5) * cell + 4}>${before && number > 0 ? "+" : ""}${number}</text>`}</g>`)}
      ${size <= MANY && classes.map((name, at) => html`<g key=${name}><text class="end" x=${left - 6} y=${(at + 0.5) * cell + 4}>${short(name)}</text>
        <text class="middle" x=${left + (at + 0.5) * cell} y=${side + 16}>${name.length > 3 ? name.slice(0, 3) : name}</text></g>`)}
    </svg></figure>`;
}
