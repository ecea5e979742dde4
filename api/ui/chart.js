// A line chart on uPlot, in the colours of the page, light and dark. Its legend is HTML, so that it can be read aloud.

import { html, loadPlot, useEffect, useRef, useState } from "./parts.js";

const HEIGHT = 230, WIDE = 6;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

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
    label, stroke: colour(name), width: stacked ? 1 : 2, dash, fill: stacked ? `${colour(name)}b3` : undefined, spanGaps: true, points: { show: series[0].values.length < 3 && !stacked, size: 5 },
  }));
  const shown = FORMATS[format];
  const round = (_, ticks) => ticks.map((tick) => ([1, 2, 5].includes(Math.round(tick / 10 ** Math.floor(Math.log10(tick) + 1e-9))) ? tick : null));
  const bands = stacked ? series.slice(1).map((_, at) => ({ series: [at + 1, at + 2] })) : undefined;
  return {
    width, height: HEIGHT, legend: { show: false }, cursor: { show: true, drag: { x: false, y: false }, points: { size: 6 } },
    padding: [8, 8, 0, 0],
    bands, scales: { x: { time: false }, y: { distr: log ? 3 : 1, range: log ? (_, low, high) => [low / 1.15, high * 1.15] : range } },
    axes: [axis(xLabel, { size: 26, space: 60, ...(xLabel === "epoch" && { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500] }) }), axis("", {
      size: 48, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : shown(tick))),
      ...(log && { filter: round, grid: { stroke: colour("rule"), width: 1, filter: round } }),
    })],
    series: [{}, ...lines],
  };
}

/** Values drawn on one another: the last series reaches the sum of all, and is drawn first. */
const stack = (series) => series.map((_, at) => series[0].values.map((__, index) => series.slice(0, series.length - at).reduce((sum, one) => sum + (one.values[index] ?? 0), 0)));

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
  const shape = `${log} ${drawn.map(({ label }) => label)} ${scheme} ${x.length < 3}`;
  useEffect(() => {
    let ended = false, observer = null;
    loadPlot().then((Plot) => {
      if (ended) return;
      const options = optionsOf({ series: drawn, log, format, range, stacked, xLabel }, place.current.clientWidth);
      options.hooks = { setCursor: [({ cursor }) => setAt(cursor.idx ?? null)] };
      plot.current = new Plot(options, data(), place.current);
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
  const shown = FORMATS[format], index = at ?? x.length - 1;
  const last = ({ values }) => values[index] ?? values.findLast((value) => value != null);
  const told = series.map((one) => `${one.label} ${last(one) == null ? "–" : one.label && (format === "percent" ? `${(100 * last(one)).toFixed(1)}%` : Number(last(one).toPrecision(3)))}`);
  return html`<figure class="chart" data-points=${x.length}>
    <figcaption><h3>${title}</h3><span class="quiet">${note}${log && ", log scale"}</span></figcaption>
    <div ref=${place} class="plotarea" role="img" aria-label=${`${title}: ${told.join(", ")}`} style=${{ height: `${HEIGHT}px` }}></div>
    <ul class="chartlegend">${series.map((one, number) => html`<li key=${one.label}>
      <svg width="22" height="10" aria-hidden="true">${stacked ? html`<rect x="4" width="12" height="10" rx="2" class=${`fill-${one.colour}`} />`
        : html`<path d="M0 5H22" class=${`stroke-${one.colour}`} stroke-dasharray=${one.dash?.join(" ")} />`}</svg>
      ${told[number].slice(0, one.label.length)} <b>${told[number].slice(one.label.length + 1)}</b></li>`)}
      ${at !== null && html`<li class="quiet">${xLabel} ${x[at]}</li>`}</ul>
  </figure>`;
}
