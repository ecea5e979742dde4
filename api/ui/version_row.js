// One version in the list of a model's: key figures, its labels, and what can be done to it.

import { Busy, Confirm, Notice, ago, html, percent, useMay, useState } from "./parts.js";
import { send } from "./api.js";
import { Interval, Spark } from "./spark.js";

/** What a sparkline of the training shows: accuracy if it was measured by epoch, else the loss. */
function historyOf({ history }) {
  const accuracy = history?.map((one) => one.validation_accuracy).filter((one) => one != null) ?? [];
  if (accuracy.length > 1) return ["Validation accuracy by epoch", accuracy];
  return ["Loss by epoch", history?.map((one) => one.data_loss).filter((one) => one != null) ?? []];
}

const Figure = ({ title, children }) => html`<div class="figure"><dt>${title}</dt><dd>${children}</dd></div>`;

function Figures({ report, low }) {
  const score = report.validation ?? report.test, robust = report.robustness, calibration = report.calibration;
  const [told, values] = historyOf(report);
  const plain = report.test_accuracy ?? report.accuracy;
  return html`<dl class="figures">
    ${score && html`<${Figure} title="Accuracy"><b>${percent(score.accuracy)}</b> <${Interval} value=${score.accuracy} interval=${score.accuracy_interval} low=${low} width=${90} /><//>`}
    ${!score && typeof plain === "number" && html`<${Figure} title="Accuracy"><b>${percent(plain)}</b><//>`}
    ${robust && html`<${Figure} title=${`Under attack, ε ${robust.epsilon}`}><b>${percent(robust.accuracy)}</b><//>`}
    ${calibration && html`<${Figure} title="Calibration error"><b>${percent(calibration.expected_calibration_error)}</b><//>`}
    ${values.length > 1 && html`<${Figure} title="Training"><${Spark} values=${values} label=${told} /><//>`}
  </dl>`;
}

const describe = ({ manifest, base }) => {
  const spec = manifest.resolved_spec ?? manifest.spec;
  return manifest.preview ? "a preview" : base ? `${spec?.method ?? "fine-tuned"}, from ${base}` : "pretrained";
};

function Verified({ found }) {
  return html`<aside class="notice ${found.proven ? "note" : "bad"}" role="status"><strong>${found.proven ? "It is what was trained." : "It is not what was trained."}</strong>
    <ul>${Object.entries(found.failures).map(([name, failure]) => html`<li key=${name}>${name === "files" ? "files" : name.split("/").at(-1)}: ${failure ?? "as trained"}</li>`)}</ul></aside>`;
}

export function VersionRow({ model, version: view, labels, isTarget, isCompared, onCompare, onPut, onChanged, chips, low }) {
  const { version, report } = view, path = `/models/${model}/versions/${version}`;
  const [state, setState] = useState({}), may = useMay("finetune");
  const named = Object.values(labels).includes(version), { stable } = labels;
  const act = (busy, work) => async () => {
    setState({ busy });
    try {
      setState(await work());
    } catch (error) {
      setState({ error });
    }
  };
  const verify = act("Verifying", async () => ({ verified: await send("POST", `${path}/verify`) }));
  const remove = act("Deleting", async () => (await send("DELETE", path), onChanged(), {}));
  const failed = report.gate?.passed === false;
  return html`<li class="version ${isTarget ? "target" : ""}" data-version=${version}>
    <div class="versionhead">
      <span class="number">${version}</span>
      <span class="what"><span class="chips">${chips}${failed && html`<span class="mark failed">gate failed</span>`}</span>
        <span class="quiet">${describe(view)}, ${ago(view.created_at)}</span></span>
      <${Figures} report=${report} low=${low} />
    </div>
    <div class="versionactions">
      <label class="compares"><input type="checkbox" checked=${isCompared} onChange=${() => onCompare(version)} />Compare</label>
      <span class="grow"></span>
      ${may && stable !== version && html`<button onClick=${() => onPut("stable", version)} aria-label=${`${version < stable ? "Roll back" : "Promote"} to version ${version}`}>${version < stable ? "Roll back to it" : "Promote"}</button>`}
      ${may && stable !== version && labels.canary !== version && html`<button onClick=${() => onPut("canary", version)} aria-label=${`Make version ${version} the canary`}>Canary</button>`}
      ${may && html`<button class="plain" onClick=${verify} aria-label=${`Verify version ${version}`}>Verify</button>`}
      ${may && !named && html`<button class="plain" onClick=${() => setState({ deletes: true })} aria-label=${`Delete version ${version}`}>Delete</button>`}
      <a class="button" href="#/models/${model}/${version}" aria-label=${`Report card of version ${version}`}>Report card</a>
    </div>
    ${state.busy && html`<${Busy} label=${state.busy} />`}
    ${state.verified && html`<${Verified} found=${state.verified} />`}
    ${state.error && html`<${Notice} kind="bad" title="That did not work." error=${state.error} />`}
    ${state.deletes && html`<${Confirm} title=${`Delete ${model}:${version}?`} onConfirm=${remove} onClose=${() => setState((old) => (old.deletes ? {} : old))}>
      <p>Its files and its report card go. This cannot be undone, and its number is not used again.</p><//>`}
  </li>`;
}
