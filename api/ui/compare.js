// Two versions of a model side by side: figures with intervals, matrices, robustness, the search, and where they differ.

import { html, percent, useEffect, useRef } from "./parts.js";
import { Chart, Interval, lowest } from "./curves.js";
import { Disagreements } from "./report.js";

const points = (difference) => `${difference > 0 ? "+" : difference < 0 ? "−" : "±"}${Math.abs(100 * difference).toFixed(1)}`;
const nats = (value) => (value == null ? "–" : value.toFixed(3));

/** [title, figure of a report, its interval, is more better, how it is shown]. */
const FIGURES = [
  ["Accuracy", (report) => report.validation?.accuracy, (report) => report.validation?.accuracy_interval, true],
  ["Test accuracy", (report) => report.test?.accuracy, (report) => report.test?.accuracy_interval, true],
  ["Cross-entropy", (report) => report.validation?.cross_entropy, null, false, nats],
  ["Generalization gap", (report) => report.generalization_gap?.accuracy, null, false],
  ["Calibration error", (report) => report.calibration?.expected_calibration_error, null, false],
  ["Under attack", (report) => report.robustness?.accuracy, null, true],
  ["Worst case", (report) => report.robustness?.curve?.find((one) => one.epsilon === report.robustness.epsilon)?.worst, null, true],
  ["Classes in a set", (report) => report.abstention?.mean_size, null, false, (value) => (value == null ? "–" : value.toFixed(2))],
  ["Zeros in the kernels", (report) => report.sparsity?.zeros, null, true],
  ["Forgotten of the base", (report) => report.forgetting?.lost, null, false],
];

function FigureRow({ figure: [title, of, interval, more, shown = percent], reports: [a, b], low }) {
  const [first, second] = [of(a), of(b)];
  if (first == null && second == null) return null;
  const difference = first != null && second != null ? second - first : null;
  const [one, other] = interval ? [interval(a), interval(b)] : [];
  const apart = one && other && (one[1] < other[0] || other[1] < one[0]);
  const tone = !difference || Math.abs(difference) < 5e-4 ? "" : difference > 0 === more ? "better" : "worse";
  const cell = (value, range) => html`<td><b>${shown(value)}</b>${range && html`<br />
    <${Interval} value=${value} interval=${range} low=${low} /><br /><span class="quiet">
    ${percent(range[0])} to ${percent(range[1])}</span>`}</td>`;
  return html`<tr><th scope="row">${title}</th>${cell(first, one)}${cell(second, other)}
    <td class=${tone}>${difference == null ? "" : shown === percent ? `${points(difference)} pp` : `${difference > 0 ? "+" : "−"}${Math.abs(difference).toFixed(3)}`}
      ${interval && difference != null && html`<br /><span class="quiet">
        ${apart ? "intervals apart" : "intervals overlap"}</span>`}</td></tr>`;
}

function Robustness({ versions }) {
  const curves = versions.map((one) => one.report.robustness?.curve ?? []);
  if (!curves.some((curve) => curve.length)) return null;
  const x = [...new Set(curves.flat().map((one) => one.epsilon))].sort((a, b) => a - b);
  const series = versions.map((one, at) => ({
    label: `version ${one.version}`, colour: at ? "blue" : "ink", dash: at ? undefined : [6, 4],
    values: x.map((epsilon) => curves[at].find((point) => point.epsilon === epsilon)?.worst ?? null),
  }));
  return html`<${Chart} title="Robustness" note="worst case of FGSM, PGD and Square" x=${x} series=${series}
    format="percent" range=${[0, 1]} xLabel="ε" />`;
}

/** Trials of both searches by loss and accuracy, in the last round that each reached. */
function Searches({ versions }) {
  const found = versions.map((one) => (one.report.search?.trials ?? []).filter((trial) => trial.scores.length)
    .map((trial) => ({ ...trial.scores.at(-1), recipe: trial.recipe, chosen: trial.trial === one.report.search.chosen })));
  const all = found.flat();
  if (!all.length) return null;
  const [width, height, left] = [420, 230, 48], losses = all.map((one) => Math.log10(one.cross_entropy)), accuracies = all.map((one) => one.accuracy);
  const scale = (values, low, high) => (value) => low + ((value - Math.min(...values)) / (Math.max(...values) - Math.min(...values) || 1)) * (high - low);
  const [x, y] = [scale(losses, left + 12, width - 14), scale(accuracies, height - 40, 16)];
  return html`<figure class="frontier"><figcaption><h3>Search</h3>
    <span class="quiet">recipes by held-out loss and accuracy; large: chosen</span></figcaption>
    <svg viewBox="0 0 ${width} ${height}" role="img" aria-label="Recipes of both searches by loss and accuracy">
      ${[Math.min(...accuracies), Math.max(...accuracies)].map((tick) => html`<g key=${tick}>
        <path class="gridline" d=${`M${left} ${y(tick)}H${width}`} /><text class="end" x=${left - 6} y=${y(tick) + 4}>
        ${percent(tick, 0)}</text></g>`)}
      ${[Math.min(...losses), Math.max(...losses)].map((tick) => html`<text key=${tick}
        class=${tick === Math.max(...losses) ? "end" : "middle"} x=${x(tick)} y=${height - 18}>${nats(10 ** tick)}</text>`)}
      <text class="middle" x=${(left + width) / 2} y=${height - 3}>loss in nats, log scale</text>
      ${found.flatMap((trials, at) => trials.map((one, number) => html`<circle key=${`${at} ${number}`}
        class=${at ? "second" : "first"} cx=${x(Math.log10(one.cross_entropy))} cy=${y(one.accuracy)}
        r=${one.chosen ? 7 : 4}>
        <title>${`version ${versions[at].version}, ${one.recipe.replaceAll("`", "")}: ${nats(one.cross_entropy)} nats, ${percent(one.accuracy)}`}</title></circle>`))}
    </svg>
    <ul class="chartlegend">${versions.map((one, at) => found[at].length > 0 && html`<li key=${one.version}>
      <svg width="12" height="12" aria-hidden="true"><circle class=${at ? "second" : "first"} cx="6" cy="6" r="5" />
      </svg> version ${one.version}</li>`)}</ul>
  </figure>`;
}

const CELL = 26, MANY = 16; // classes from which on cells have no numbers

/**
 * `matrix` has a row for each true class. With `before`, cells show by how many images it differs: blue where that is
 * better, more on the diagonal or fewer beside it, red where it is worse.
 */
function Matrix({ title, matrix, before, classes }) {
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
    <svg viewBox="0 0 ${left + side + 2} ${side + 24}" width=${left + side + 2} role="img"
      aria-label=${before ? `${title}: ${cells.length} cells differ` : `${title}: ${right} of ${all} images on the diagonal`}>
      <rect class="frame" x=${left} y="0" width=${side} height=${side} />
      ${cells.map(({ x, y, number, good, strength }) => html`<g key=${`${x} ${y}`}>
        <rect class=${good ? "good" : "worse"} opacity=${strength} x=${left + x * cell + 1} y=${y * cell + 1}
          width=${cell - 2} height=${cell - 2} rx="3">
          <title>${`${classes[y]} taken for ${classes[x]}: ${before && number > 0 ? "+" : ""}${number}`}</title></rect>
        ${size <= MANY && html`<text class="middle ${strength > 0.6 ? "strong" : "number"}"
          x=${left + (x + 0.5) * cell} y=${(y + 0.5) * cell + 4}>${before && number > 0 ? "+" : ""}${number}</text>`}</g>`)}
      ${size <= MANY && classes.map((name, at) => html`<g key=${name}>
        <text class="end" x=${left - 6} y=${(at + 0.5) * cell + 4}>${short(name)}</text>
        <text class="middle" x=${left + (at + 0.5) * cell} y=${side + 16}>
          ${name.length > 3 ? name.slice(0, 3) : name}</text></g>`)}
    </svg></figure>`;
}

/** `versions` are two of GET /models/<name>, in the order in which they were chosen. */
export function Compare({ model, versions: chosen }) {
  const versions = [...chosen].sort((a, b) => a.version - b.version), [a, b] = versions;
  const reports = versions.map((one) => one.report), heading = useRef(null);
  useEffect(() => heading.current.scrollIntoView({ block: "start", behavior: "smooth" }), []);
  const matrices = reports.map((report) => report.validation?.confusion_matrix);
  const sizes = (matrix) => matrix.map((row) => row.reduce((sum, one) => sum + one, 0)).join();
  const comparable = matrices[0] && matrices[1] && a.classes.join() === b.classes.join() && sizes(matrices[0]) === sizes(matrices[1]);
  const sameImages = a.manifest.dataset?.id && a.manifest.dataset.id === b.manifest.dataset?.id;
  return html`<section class="compare" aria-labelledby="compare-title"><header>
    <h2 id="compare-title" ref=${heading}>Version ${a.version} and version ${b.version}</h2>
      <a href="#/models/${model}">Close</a></header>
    <p class="quiet">${sameImages ? "Both learned from the same images." : "They learned from different images, so each is measured on its own."}</p>
    <div class="scroll" tabindex="0"><table class="figurestable"><thead><tr><th scope="col"></th>
      <th scope="col">version ${a.version}</th><th scope="col">version ${b.version}</th>
      <th scope="col">difference</th></tr></thead>
      <tbody>${FIGURES.map((figure) => html`<${FigureRow} key=${figure[0]} figure=${figure} reports=${reports}
        low=${lowest(versions)} />`)}</tbody></table></div>
    <div class="matrices">${matrices.map((matrix, at) => matrix && html`<${Matrix} key=${versions[at].version}
      title=${`Version ${versions[at].version}`} matrix=${matrix} classes=${versions[at].classes} />`)}
      ${comparable && html`<${Matrix} title=${`What ${b.version} changed`} matrix=${matrices[1]}
        before=${matrices[0]} classes=${b.classes} />`}</div>
    <div class="charts"><${Robustness} versions=${versions} /><${Searches} versions=${versions} /></div>
    <${Disagreements} model=${model} versions=${versions} />
  </section>`;
}
