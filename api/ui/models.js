// Models: `#/models` lists them; `#/models/<name>` shows one, its versions with their key figures and the labels that say
// which of them answers, and with `?compare=3,2` two side by side; `#/models/<name>/<version>` is a report card.

import { BASE, Busy, Confirm, Notice, ago, html, percent, plural, useMay, useResource, useState } from "./parts.js";
import { send } from "./api.js";
import { Corrections } from "./explain.js";
import { Compare } from "./compare.js";
import { Spark, lowest } from "./curves.js";
import { GateRefusal, LabelChip, LabelMark, Traffic } from "./labels.js";
import { Figures, Report, accuracyOf } from "./report.js";

const EVERY_MS = 5000;

const describe = ({ manifest, base }) => {
  const spec = manifest.resolved_spec ?? manifest.spec;
  return manifest.preview ? "a preview" : base ? `${spec?.method ?? "fine-tuned"}, from ${base}` : "pretrained";
};

function Verified({ found }) {
  return html`<aside class="notice ${found.proven ? "note" : "bad"}" role="status"><strong>
    ${found.proven ? "It is what was trained." : "It is not what was trained."}</strong>
    <ul>${Object.entries(found.failures).map(([name, failure]) => html`<li key=${name}>
      ${name === "files" ? "files" : name.split("/").at(-1)}: ${failure ?? "as trained"}</li>`)}</ul></aside>`;
}

function VersionRow({ model, version: view, labels, isTarget, isCompared, onCompare, onPut, onChanged, chips, low }) {
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
      ${may && stable !== version && html`<button onClick=${() => onPut("stable", version)}
        aria-label=${`${version < stable ? "Roll back" : "Promote"} to version ${version}`}>${version < stable ? "Roll back to it" : "Promote"}</button>`}
      ${may && stable !== version && labels.canary !== version && html`<button
        onClick=${() => onPut("canary", version)} aria-label=${`Make version ${version} the canary`}>Canary</button>`}
      ${may && html`<button class="plain" onClick=${verify} aria-label=${`Verify version ${version}`}>Verify</button>`}
      ${may && !named && html`<button class="plain" onClick=${() => setState({ deletes: true })}
        aria-label=${`Delete version ${version}`}>Delete</button>`}
      <a class="button" href="#/models/${model}/${version}" aria-label=${`Report card of version ${version}`}>Report card</a>
    </div>
    ${state.busy && html`<${Busy} label=${state.busy} />`}
    ${state.verified && html`<${Verified} found=${state.verified} />`}
    ${state.error && html`<${Notice} kind="bad" title="That did not work." error=${state.error} />`}
    ${state.deletes && html`<${Confirm} title=${`Delete ${model}:${version}?`} onConfirm=${remove}
      onClose=${() => setState((old) => (old.deletes ? {} : old))}>
      <p>Its files and its report card go. This cannot be undone, and its number is not used again.</p><//>`}
  </li>`;
}

function Model({ name, query }) {
  const path = `/models/${name}`, { data, error, reload } = useResource(path, EVERY_MS);
  const [target, setTarget] = useState(null), [state, setState] = useState({}), may = useMay("finetune"), mayPredict = useMay("predict");
  const compared = (query.get("compare") ?? "").split(",").map(Number).filter(Boolean);
  if (!data) return error ? html`<${Notice} kind="bad" title="There is nothing to show."
    error=${error} />` : html`<${Busy} />`;
  const numbers = data.versions.map((one) => one.version), { labels, weights } = data, low = lowest(data.versions);

  /** Change a label, and say what to do about it: undo it, or override the gate that refused it. Whether it changed. */
  const put = async (label, version, more = {}, isUndo = false) => {
    const before = labels[label];
    try {
      await send("PUT", `${path}/labels/${label}`, { version, ...more });
      const moved = before !== version;
      setState(moved ? { moved: { label, version, before: isUndo ? null : before } } : {});
      return true;
    } catch (failure) {
      const gate = data.versions.find((one) => one.version === version)?.report.gate;
      setState(failure.code === "gate_failed" ? { refused: { label, version, gate, message: failure.message } } : { error: failure });
      return false;
    } finally {
      reload();
    }
  };
  const dropLabel = async (label) => {
    try {
      await send("DELETE", `${path}/labels/${label}`);
      setState({});
    } catch (failure) {
      setState({ error: failure });
    }
    reload();
  };
  const remove = async () => {
    try {
      await send("DELETE", path);
      location.hash = "#/models";
    } catch (failure) {
      setState({ error: failure });
    }
  };
  const choose = (version) => {
    const next = compared.includes(version) ? compared.filter((one) => one !== version) : [...compared, version].slice(-2);
    location.hash = `#/models/${name}${next.length ? `?compare=${next}` : ""}`;
  };
  const chips = (version) => Object.entries(labels).filter(([, at]) => at === version).map(([label]) => may
    ? html`<${LabelChip} key=${label} label=${label} version=${version} versions=${numbers}
      weight=${weights[label]} onTarget=${setTarget} onMove=${put} />`
    : html`<span key=${label} class="mark ${label === "stable" ? "stable" : ""}">${label}</span>`);
  const { moved, refused } = state;
  return html`<header class="viewhead"><div><p class="crumbs"><a href="#/models">Models</a></p><h1>${name}</h1>
      <p class="quiet">${plural(numbers.length, "version")}</p></div>
      <p class="headactions">${mayPredict && html`<a class="button primary" href="#/draw?model=${name}">Draw with it</a>`}
        ${may && name !== BASE && html`<button class="plain" onClick=${() => setState({ deletes: true })}>Delete the model</button>`}</p></header>
    <p id="label-help" class="sr-only">Drag it to another version, or press the up and down arrow keys and then Enter.</p>
    <p class="sr-only" role="status">${target ? `Move ${target.label} to version ${target.version}: press Enter` : ""}</p>
    ${moved && html`<aside class="notice note" role="status"><strong>${moved.label}
      </strong> now stands for version ${moved.version}.
      ${moved.before && html` <button class="plain"
        onClick=${() => put(moved.label, moved.before, {}, true)}>Undo: back to ${moved.before}</button>`}</aside>`}
    ${refused && html`<${GateRefusal}
      gate=${refused.gate ?? { conditions: [{ condition: "gate", message: refused.message }] }} label=${refused.label}
      onOverride=${() => put(refused.label, refused.version, { override: true })} />`}
    ${state.error && html`<${Notice} kind="bad" title="That did not work." error=${state.error} />`}
    ${state.deletes && html`<${Confirm} title=${`Delete ${name}?`} action="Delete everything" onConfirm=${remove} onClose=${() => setState({})}>
      <p>${plural(numbers.length, "version")} and all labels go. Requests for ${name} fail from then on. This cannot be undone.</p><//>`}
    <${Traffic} labels=${labels} weights=${weights} versions=${numbers} may=${may}
      onShare=${(label, version, weight) => put(label, version, { weight })} onMove=${put} onDrop=${dropLabel} />
    <section aria-labelledby="versions-title">
      <h2 id="versions-title">Versions${compared.length === 1 && html` <span
        class="quiet">choose another one to compare</span>`}</h2>
    <ul class="versions">${data.versions.map((version) => html`<${VersionRow} key=${version.version}
      model=${name} version=${version} labels=${labels}
      isTarget=${target?.version === version.version} isCompared=${compared.includes(version.version)}
        onCompare=${choose} onPut=${put} onChanged=${reload}
      low=${low} chips=${chips(version.version)} />`)}</ul></section>
    ${may && name !== BASE && html`<${Corrections} model=${name} />`}
    ${compared.length === 2 && compared.every((one) => numbers.includes(one)) && html`<${Compare}
      key=${compared.join()} model=${name}
      versions=${compared.map((one) => data.versions.find((each) => each.version === one))} />`}`;
}

function ModelCard({ model }) {
  const { data } = useResource(`/models/${model.name}`);
  const accuracies = [...(data?.versions ?? [])].reverse().map(accuracyOf).filter((one) => one != null);
  const named = Object.entries(model.labels).sort(([a], [b]) => (a === "stable" ? -1 : b === "stable" ? 1 : a.localeCompare(b)));
  const stable = data?.versions.find((one) => one.version === model.labels.stable), accuracy = stable && accuracyOf(stable);
  return html`<li><a class="card model" href="#/models/${model.name}">
    <span class="modelname"><strong>${model.name}</strong><span class="quiet">
      ${plural(model.versions.length, "version")}, ${plural(model.classes.length, "class", "classes")}</span></span>
    <span class="figure"><b>${accuracy == null ? "" : percent(accuracy)}</b>
      ${accuracy != null && html`<span class="quiet">accuracy</span>`}</span>
    <${Spark} values=${accuracies}
      label=${`Accuracy of ${plural(accuracies.length, "version")}, from ${percent(accuracies[0])} to ${percent(accuracies.at(-1))}`} />
    <span class="marks">${named.map(([label, version]) => html`<${LabelMark} key=${label} label=${label}
      text=${`${label} ${version}`} />`)}</span>
  </a></li>`;
}

function List() {
  const { data, error } = useResource("/models?limit=100", 10_000), mayTune = useMay("finetune");
  if (error && !data) return html`<${Notice} kind="bad" title="The models cannot be listed." error=${error} />`;
  if (!data) return html`<${Busy} />`;
  return html`<header class="viewhead"><div><h1>Models</h1>
    <p class="quiet">Requests follow the label stable, and the shares that other labels have.</p></div>
      ${mayTune && html`<a class="button primary" href="#/finetune">Fine-tune a model</a>`}</header>
    ${data.data.length ? html`<ul class="cards models">
      ${data.data.map((model) => html`<${ModelCard} key=${model.name} model=${model} />`)}</ul>`
      : html`<p class="empty">There is no model yet. The base model appears a moment after the service has started.</p>`}
    ${data.has_more && html`<p class="quiet">Only the first hundred are shown.</p>`}`;
}

export default function Models({ parts: [name, version], query }) {
  if (version) return html`<${Report} key=${`${name}/${version}`} model=${name} version=${version} />`;
  if (name) return html`<${Model} key=${name} name=${name} query=${query} />`;
  return html`<${List} />`;
}
