// The curves of a training while it runs: losses, accuracy, and how much of the loss each penalty is.

import { html, useMemo, useState } from "./parts.js";
import { Chart } from "./chart.js";

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

/** `runs` are the trainings so far, see follow.js; the one that is under way is shown unless another is chosen. */
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
    <header><h2 id="curves-title">Training <span class="quiet" role="status">epoch ${shown.epochs.at(-1).epoch} of ${shown.total}</span></h2>
      ${runs.length > 1 && html`<div class="chips" role="group" aria-label="Trainings">${runs.map((run) => html`<button key=${nameOf(run)} class="chip"
        aria-pressed=${run === shown} onClick=${() => setChosen(nameOf(run))}>${nameOf(run)}</button>`)}</div>`}
    </header>
    <div class="charts">
      <${Chart} title="Loss" note="nats" x=${drawn.x} series=${drawn.losses} log />
      ${drawn.accuracies.length > 0 && html`<${Chart} key=${range[0]} title="Accuracy" note="on images held out" x=${drawn.x} series=${drawn.accuracies} format="percent" range=${range} />`}
      ${drawn.shares.length > 1 && html`<${Chart} title="Share of the loss" note="each penalty beside the data" x=${drawn.x} series=${drawn.shares} format="percent" range=${[0, 1]} stacked />`}
    </div>
  </section>`;
}
