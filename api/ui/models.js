// Models: `#/models` lists them, `#/models/<name>` shows the versions of one, `?compare=3,2` two of them side by side,
// and `#/models/<name>/<version>` a report card.

import { Busy, Notice, html, percent, plural, useMay, useResource } from "./parts.js";
import { LabelMark } from "./labels.js";
import { Model } from "./model.js";
import { Report } from "./report.js";
import { Spark } from "./spark.js";

/** On held-out images; of the base, which has another card, on its own test. */
const accuracyOf = ({ report }) => report.validation?.accuracy ?? report.test_accuracy;

function ModelCard({ model }) {
  const { data } = useResource(`/models/${model.name}`);
  const accuracies = [...(data?.versions ?? [])].reverse().map(accuracyOf).filter((one) => one != null);
  const named = Object.entries(model.labels).sort(([a], [b]) => (a === "stable" ? -1 : b === "stable" ? 1 : a.localeCompare(b)));
  const stable = data?.versions.find((one) => one.version === model.labels.stable), accuracy = stable && accuracyOf(stable);
  return html`<li><a class="card model" href="#/models/${model.name}">
    <span class="modelname"><strong>${model.name}</strong><span class="quiet">${plural(model.versions.length, "version")}, ${plural(model.classes.length, "class", "classes")}</span></span>
    <span class="figure"><b>${accuracy == null ? "" : percent(accuracy)}</b>${accuracy != null && html`<span class="quiet">accuracy</span>`}</span>
    <${Spark} values=${accuracies} label=${`Accuracy of ${plural(accuracies.length, "version")}, from ${percent(accuracies[0])} to ${percent(accuracies.at(-1))}`} />
    <span class="marks">${named.map(([label, version]) => html`<${LabelMark} key=${label} label=${label} text=${`${label} ${version}`} />`)}</span>
  </a></li>`;
}

function List() {
  const { data, error } = useResource("/models?limit=100", 10_000), mayTune = useMay("finetune");
  if (error && !data) return html`<${Notice} kind="bad" title="The models cannot be listed." error=${error} />`;
  if (!data) return html`<${Busy} />`;
  return html`<header class="viewhead"><div><h1>Models</h1><p class="quiet">Requests follow the label stable, and the shares that other labels have.</p></div>
      ${mayTune && html`<a class="button primary" href="#/finetune">Fine-tune a model</a>`}</header>
    ${data.data.length ? html`<ul class="cards models">${data.data.map((model) => html`<${ModelCard} key=${model.name} model=${model} />`)}</ul>`
      : html`<p class="empty">There is no model yet. The base model appears a moment after the service has started.</p>`}
    ${data.has_more && html`<p class="quiet">Only the first hundred are shown.</p>`}`;
}

export default function Models({ parts: [name, version], query }) {
  if (version) return html`<${Report} key=${`${name}/${version}`} model=${name} version=${version} />`;
  if (name) return html`<${Model} key=${name} name=${name} query=${query} />`;
  return html`<${List} />`;
}
