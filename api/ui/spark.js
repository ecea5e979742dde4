// Drawings so small that they stand in a line of text.

import { html } from "./parts.js";

/** A line without axes. */
export function Spark({ values, label, width = 96, height = 28, colour = "blue" }) {
  if (!values || values.length < 2) return html`<span class="spark" style=${{ width: `${width}px` }}></span>`;
  const least = Math.min(...values), span = Math.max(...values) - least || 1;
  const places = values.map((value, at) => [3 + (at / (values.length - 1)) * (width - 6), height - 4 - ((value - least) / span) * (height - 8)]);
  const [x, y] = places.at(-1);
  return html`<svg class="spark" width=${width} height=${height} role="img" aria-label=${label}>
    <path class=${`stroke-${colour}`} d=${`M${places.map((place) => place.map((one) => one.toFixed(1)).join(" ")).join("L")}`} />
    <circle class=${`fill-${colour}`} cx=${x} cy=${y} r="2.5" /></svg>`;
}

/** Where an axis for the accuracies of these versions and their intervals begins. */
export function lowest(versions) {
  const bounds = versions.flatMap(({ report }) => [report.validation, report.test].map((score) => score?.accuracy_interval[0] ?? 1));
  return Math.max(0, Math.floor(10 * Math.min(0.95, ...bounds)) / 10);
}

/** A share with its interval on a line from `low` to 1. */
export function Interval({ value, interval, low = 0, width = 120, colour = "blue" }) {
  const x = (share) => 4 + (Math.max(0, share - low) / (1 - low)) * (width - 8);
  if (value == null) return null;
  const [from, to] = interval ?? [value, value];
  return html`<svg class="interval" width=${width} height="14" aria-hidden="true"><path class="gridline" d=${`M4 7H${width - 4}`} />
    <path class=${`band stroke-${colour}`} d=${`M${x(from)} 7H${x(to)}`} /><circle class=${`fill-${colour}`} cx=${x(value)} cy="7" r="4" /></svg>`;
}
