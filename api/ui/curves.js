// Line charts on uPlot, in the colours of the page, light and dark, with legends in HTML, which can be read aloud; and the
// curves of a training while it runs: losses, accuracy, and how much of the loss each penalty is. Also drawings so small that
// they stand in a line of text.

import { html, loadPlot, percent, useEffect, useMemo, useRef, useState } from "./parts.js";

const HEIGHT = 230, WIDE = 6;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const fill = (name) => ({ fill: `var(--${name})` }), stroke = (name) => ({ stroke: `var(--${name})` });

const FORMATS = {
  percent: (value) => `${(100 * value).toFixed(0)}%`,
  plain: (value) => (value >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(2)))),
};

function optionsOf({ series, log, format, range, stacked, xLabel }, width) {
  const axis = (label, values) => ({
    stroke: colour("quiet"), font: "12px system-ui", labelFont: "12px system-ui", label, labelSize: label ? 20 : 0, labelGap: 0,
    grid: { stroke: colour("rule"), width: 1 }, ticks: { show: false }, ...values,
  });
  const lines = series.map(({ label, colour: name, dash }) => ({
    label, stroke: colour(name), width: stacked ? 1 : 2, dash, fill: stacked ? `${colour(name)}b3` : undefined, spanGaps: true,
    points: { show: series[0].values.length < 3 && !stacked, size: 5 },
  }));
  const shown = FORMATS[format];
  const round = (_, ticks) => ticks.map((tick) => ([1, 2, 5].includes(Math.round(tick / 10 ** Math.floor(Math.log10(tick) + 1e-9))) ? tick : null));
  const bands = stacked ? series.slice(1).map((_, at) => ({ series: [at + 1, at + 2] })) : undefined;
  return {
    width, height: HEIGHT, legend: { show: false }, cursor: { show: true, drag: { x: false, y: false }, points: { size: 6 } },
    padding: [8, 12, 0, 0],
    bands, scales: { x: { time: false }, y: { distr: log ? 3 : 1, range: log ? (_, low, high) => [low / 1.15, high * 1.15] : range } },
    axes: [axis(xLabel, { size: 26, space: 60, ...(xLabel === "epoch" && { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500] }) }), axis("", {
      size: 48, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : shown(tick))),
      ...(log && { filter: round, grid: { stroke: colour("rule"), width: 1, filter: round } }),
    })],
    series: [{}, ...lines],
  };
}

/** Values drawn on one another: the last series reaches the sum of all, and is drawn first. */
const stack = (series) => series.map((_, at) => series[0].values.map((__, index) =>
  series.slice(0, series.length - at).reduce((sum, one) => sum + (one.values[index] ?? 0), 0)));

/** Whether values are so far apart that a log scale shows them better. */
function isWide(series) {
  const values = series.flatMap((one) => one.values).filter((value) => value > 0);
  return Math.max(...values) > WIDE * Math.min(...values);
}

/**
 * `series` are {label, colour (name of a token), dash, values}, `x` their positions. `log` puts y on a log scale
 * where that shows more; zeros are not drawn there. `stacked` makes areas of shares.
 */
export function Chart({ title, note, x, series, log: wantsLog = false, format = "plain", range, stacked = false, xLabel = "epoch" }) {
  const place = useRef(null), plot = useRef(null), [at, setAt] = useState(null), [scheme, setScheme] = useState(0);
  const log = wantsLog && isWide(series), drawn = stacked ? [...series].reverse() : series;
  const data = () => [x, ...(stacked ? stack(series) : series.map(({ values }) => values.map((value) => (value == null || (log && value <= 0) ? null : value))))];
  const latest = useRef(data); // uPlot may come later than newer values
  latest.current = data;
  const shape = `${log} ${drawn.map(({ label }) => label)} ${scheme} ${x.length < 3}`;
  useEffect(() => {
    let ended = false, observer = null;
    loadPlot().then((Plot) => {
      if (ended) return;
      const options = optionsOf({ series: drawn, log, format, range, stacked, xLabel }, place.current.clientWidth);
      options.hooks = { setCursor: [({ cursor }) => setAt(cursor.idx ?? null)] };
      plot.current = new Plot(options, latest.current(), place.current);
      observer = new ResizeObserver(() => plot.current.setSize({ width: place.current.clientWidth, height: HEIGHT }));
      observer.observe(place.current);
    });
    return () => (ended = true, observer?.disconnect(), plot.current?.destroy(), plot.current = null);
  }, [shape]);
  useEffect(() => plot.current?.setData(data()), [x, series]);
  useEffect(() => {
    const media = matchMedia("(prefers-color-scheme: dark)"), look = () => setScheme((old) => old + 1);
    media.addEventListener("change", look);
    return () => media.removeEventListener("change", look);
  }, []);
  const index = at ?? x.length - 1;
  const last = ({ values }) => values[index] ?? values.findLast((value) => value != null);
  const said = (value) => (value == null ? "–" : format === "percent" ? percent(value) : Number(value.toPrecision(3)));
  const told = series.map((one) => `${one.label} ${said(last(one))}`);
  return html`<figure class="chart" data-points=${x.length}>
    <figcaption><h3>${title}</h3><span class="quiet">${note}${log && ", log scale"}</span></figcaption>
    <div ref=${place} class="plotarea" role="img" aria-label=${`${title}: ${told.join(", ")}`}
      style=${{ height: `${HEIGHT}px` }}></div>
    <ul class="chartlegend">${series.map((one, number) => html`<li key=${one.label}>
      <svg width="22" height="10" aria-hidden="true">
        ${stacked ? html`<rect x="4" width="12" height="10" rx="2" style=${fill(one.colour)} />`
        : html`<path d="M0 5H22" class="thin" style=${stroke(one.colour)} stroke-dasharray=${one.dash?.join(" ")} />`}</svg>
      ${told[number].slice(0, one.label.length)} <b>${told[number].slice(one.label.length + 1)}</b></li>`)}
      ${at !== null && html`<li class="quiet">${xLabel} ${x[at]}</li>`}</ul>
  </figure>`;
}

const LOSSES = [
  ["data_loss", "data loss", "blue"], ["adversarial_loss", "adversarial loss", "red", [8, 3]],
  ["validation_cross_entropy", "validation cross-entropy", "ink"],
];
const ACCURACIES = [
  ["validation_accuracy", "validation", "ink"], ["validation_accuracy_under_fgsm", "under FGSM", "ochre", [8, 3]],
  ["validation_accuracy_under_pgd", "under PGD", "red", [2, 3]],
];
const TERMS = [
  ["data_loss", "data loss", "blue"], ["adversarial_loss", "adversarial loss", "red"], ["l1", "L1", "green"],
  ["l2", "L2", "purple"], ["l2_sp", "L2-SP", "ochre"],
];

/** The series that the epochs have. */
function seriesOf(epochs, looks) {
  return looks.map(([name, label, colour, dash]) => ({ label, colour, dash, values: epochs.map((one) => one[name] ?? null) }))
    .filter(({ values }) => values.some((value) => value !== null && value !== 0));
}

function sharesOf(epochs) {
  const series = seriesOf(epochs, TERMS);
  const sums = epochs.map((_, at) => series.reduce((sum, { values }) => sum + (values[at] ?? 0), 0) || 1);
  return series.map((one) => ({ ...one, values: one.values.map((value, at) => (value ?? 0) / sums[at]) }));
}

const nameOf = (run) => (run.fold === null ? "all images" : `fold ${run.fold} of ${run.of}`);

/** `runs` are the trainings so far, as job.js has them; the one that is under way is shown unless another is chosen. */
export function Curves({ runs, isOpen }) {
  const [chosen, setChosen] = useState(null);
  const shown = runs.find((run) => nameOf(run) === chosen) ?? (isOpen ? runs.at(-1) : runs.find((run) => run.fold === null) ?? runs[0]);
  const drawn = useMemo(() => shown && {
    x: shown.epochs.map((one) => one.epoch), losses: seriesOf(shown.epochs, LOSSES),
    accuracies: seriesOf(shown.epochs, ACCURACIES), shares: sharesOf(shown.epochs),
  }, [shown]);
  if (!shown) return null;
  const lowest = Math.min(...drawn.accuracies.flatMap(({ values }) => values.filter((value) => value !== null)));
  const range = [Math.max(0, Math.floor(10 * Math.min(lowest, 0.9)) / 10), 1];
  return html`<section class="curves" aria-labelledby="curves-title">
    <header><h2 id="curves-title">Training <span class="quiet"
      role="status">epoch ${shown.epochs.at(-1).epoch} of ${shown.total}</span></h2>
      ${runs.length > 1 && html`<div class="chips" role="group" aria-label="Trainings">
        ${runs.map((run) => html`<button key=${nameOf(run)} class="chip"
        aria-pressed=${run === shown} onClick=${() => setChosen(nameOf(run))}>${nameOf(run)}</button>`)}</div>`}
    </header>
    <div class="charts">
      <${Chart} title="Loss" note="nats" x=${drawn.x} series=${drawn.losses} log />
      ${drawn.accuracies.length > 0 && html`<${Chart} key=${range[0]} title="Accuracy" note="on images held out"
        x=${drawn.x} series=${drawn.accuracies} format="percent" range=${range} />`}
      ${drawn.shares.length > 1 && html`<${Chart} title="Share of the loss" note="each penalty beside the data"
        x=${drawn.x} series=${drawn.shares} format="percent" range=${[0, 1]} stacked />`}
    </div>
  </section>`;
}

/** A line without axes. */
export function Spark({ values, label, width = 96, height = 28, tint = "blue" }) {
  if (!values || values.length < 2) return html`<span class="spark" style=${{ width: `${width}px` }}></span>`;
  const least = Math.min(...values), span = Math.max(...values) - least || 1;
  const places = values.map((value, at) => [3 + (at / (values.length - 1)) * (width - 6), height - 4 - ((value - least) / span) * (height - 8)]);
  const [x, y] = places.at(-1);
  return html`<svg class="spark" width=${width} height=${height} role="img" aria-label=${label}>
    <path class="thin" style=${stroke(tint)}
      d=${`M${places.map((place) => place.map((one) => one.toFixed(1)).join(" ")).join("L")}`} />
    <circle style=${fill(tint)} cx=${x} cy=${y} r="2.5" /></svg>`;
}

/** Where an axis for the accuracies of these versions and their intervals begins. */
export function lowest(versions) {
  const bounds = versions.flatMap(({ report }) => [report.validation, report.test].map((score) => score?.accuracy_interval[0] ?? 1));
  return Math.max(0, Math.floor(10 * Math.min(0.95, ...bounds)) / 10);
}

/** A share with its interval on a line from `low` to 1. */
export function Interval({ value, interval, low = 0, width = 120, tint = "blue" }) {
  const x = (share) => 4 + (Math.max(0, share - low) / (1 - low)) * (width - 8);
  if (value == null) return null;
  const [from, to] = interval ?? [value, value];
  return html`<svg class="interval" width=${width} height="14" aria-hidden="true">
    <path class="gridline" d=${`M4 7H${width - 4}`} />
    <path class="band" style=${stroke(tint)} d=${`M${x(from)} 7H${x(to)}`} />
      <circle style=${fill(tint)} cx=${x(value)} cy="7" r="4" /></svg>`;
}
