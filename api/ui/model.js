// A model: its versions with their key figures, and the labels that say which of them answers.

import { Busy, Confirm, Notice, html, plural, useMay, useResource, useState } from "./parts.js";
import { send } from "./api.js";
import { Compare } from "./compare.js";
import { GateRefusal } from "./gate.js";
import { LabelChip, Traffic } from "./labels.js";
import { lowest } from "./spark.js";
import { VersionRow } from "./version_row.js";

const BASE = "lenet5"; // everyone's, so it is not deleted
const EVERY_MS = 5000;

export function Model({ name, query }) {
  const path = `/models/${name}`, { data, error, reload } = useResource(path, EVERY_MS);
  const [target, setTarget] = useState(null), [state, setState] = useState({}), may = useMay("finetune"), mayPredict = useMay("predict");
  const compared = (query.get("compare") ?? "").split(",").map(Number).filter(Boolean);
  if (!data) return error ? html`<${Notice} kind="bad" title="There is nothing to show." error=${error} />` : html`<${Busy} />`;
  const numbers = data.versions.map((one) => one.version), { labels, weights } = data, low = lowest(data.versions);

  /** Change a label, and say what to do about it: undo it, or override the gate that refused it. */
  const put = async (label, version, more = {}, isUndo = false) => {
    const before = labels[label];
    try {
      await send("PUT", `${path}/labels/${label}`, { version, ...more });
      const moved = before !== version;
      setState(moved ? { moved: { label, version, before: isUndo ? null : before } } : {});
    } catch (failure) {
      const gate = data.versions.find((one) => one.version === version)?.report.gate;
      setState(failure.code === "gate_failed" ? { refused: { label, version, gate, message: failure.message } } : { error: failure });
    }
    reload();
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
    ? html`<${LabelChip} key=${label} label=${label} version=${version} versions=${numbers} weight=${weights[label]} onTarget=${setTarget} onMove=${put} />`
    : html`<span key=${label} class="mark ${label === "stable" ? "stable" : ""}">${label}</span>`);
  const { moved, refused } = state;
  return html`<header class="viewhead"><div><p class="crumbs"><a href="#/models">Models</a></p><h1>${name}</h1>
      <p class="quiet">${plural(numbers.length, "version")}</p></div>
      <p class="headactions">${mayPredict && html`<a class="button primary" href="#/draw?model=${name}">Draw with it</a>`}
        ${may && name !== BASE && html`<button class="plain" onClick=${() => setState({ deletes: true })}>Delete the model</button>`}</p></header>
    <p id="label-help" class="sr-only">Drag it to another version, or press the up and down arrow keys and then Enter.</p>
    <p class="sr-only" role="status">${target ? `Move ${target.label} to version ${target.version}: press Enter` : ""}</p>
    ${moved && html`<aside class="notice note" role="status"><strong>${moved.label}</strong> now stands for version ${moved.version}.
      ${moved.before && html` <button class="plain" onClick=${() => put(moved.label, moved.before, {}, true)}>Undo: back to ${moved.before}</button>`}</aside>`}
    ${refused && html`<${GateRefusal} gate=${refused.gate ?? { conditions: [{ condition: "gate", message: refused.message }] }} label=${refused.label}
      onOverride=${() => put(refused.label, refused.version, { override: true })} />`}
    ${state.error && html`<${Notice} kind="bad" title="That did not work." error=${state.error} />`}
    ${state.deletes && html`<${Confirm} title=${`Delete ${name}?`} action="Delete everything" onConfirm=${remove} onClose=${() => setState({})}>
      <p>${plural(numbers.length, "version")} and all labels go. Requests for ${name} fail from then on. This cannot be undone.</p><//>`}
    <${Traffic} labels=${labels} weights=${weights} versions=${numbers} may=${may} onShare=${(label, version, weight) => put(label, version, { weight })} onMove=${put} onDrop=${dropLabel} />
    <section aria-labelledby="versions-title"><h2 id="versions-title">Versions${compared.length === 1 && html` <span class="quiet">choose another one to compare</span>`}</h2>
    <ul class="versions">${data.versions.map((version) => html`<${VersionRow} key=${version.version} model=${name} version=${version} labels=${labels}
      isTarget=${target?.version === version.version} isCompared=${compared.includes(version.version)} onCompare=${choose} onPut=${put} onChanged=${reload}
      low=${low} chips=${chips(version.version)} />`)}</ul></section>
    ${compared.length === 2 && compared.every((one) => numbers.includes(one)) && html`<${Compare} key=${compared} model=${name} versions=${compared.map((one) => data.versions.find((each) => each.version === one))} />`}`;
}
