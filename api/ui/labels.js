// Labels to drag from version to version with a mouse, a finger or the arrow keys, the shares of the traffic, and what the
// gate says.

import { Confirm, Notice, html, percent, useEffect, useMay, useRef, useState } from "./parts.js";

const NEAR = 4; // pixels that a pointer moves before it drags
const REST_MS = 350; // after which a slider has come to rest

export const LabelMark = ({ label, text = label }) => html`<span class="mark ${label === "stable" ? "stable" : ""}">
  ${text}</span>`;

const versionAt = (x, y) => {
  const row = document.elementsFromPoint(x, y).map((element) => element.closest("[data-version]")).find(Boolean);
  return row ? Number(row.dataset.version) : null;
};

/**
 * A label that can be moved. `versions` are in the order in which they are shown; `onTarget` hears which one it would
 * move to (null: none), `onMove` where it is let go.
 */
export function LabelChip({ label, version, versions, weight, onTarget, onMove }) {
  const [offset, setOffset] = useState(null), [target, setTarget] = useState(null);
  const drag = useRef(null);
  const aim = (next) => (setTarget(next), onTarget(next !== null && next !== version ? { label, version: next } : null));
  const end = (moves) => {
    const to = moves ? drag.current?.over ?? target : null;
    drag.current = null;
    setOffset(null);
    aim(null);
    if (to !== null && to !== version) onMove(label, to);
  };
  const down = (event) => {
    if (event.button) return;
    event.currentTarget.setPointerCapture(event.pointerId);
    drag.current = { x: event.clientX, y: event.clientY, over: null, far: false };
  };
  const move = (event) => {
    const state = drag.current;
    if (!state) return;
    const [x, y] = [event.clientX - state.x, event.clientY - state.y];
    state.far ||= Math.hypot(x, y) > NEAR;
    if (!state.far) return;
    setOffset([x, y]);
    const over = versionAt(event.clientX, event.clientY);
    if (over !== state.over) aim((state.over = over));
  };
  const press = (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (step) {
      event.preventDefault();
      const at = versions.indexOf(target ?? version) + step;
      if (versions[at] !== undefined) aim(versions[at]);
    } else if (event.key === "Enter" && target !== null) (event.preventDefault(), end(true));
    else if (event.key === "Escape" && target !== null) (event.preventDefault(), end(false));
  };
  const share = weight ? ` ${percent(weight, 0)}` : "";
  return html`<button class="mark chip-label ${label === "stable" ? "stable" : ""} ${offset ? "dragged" : ""}" aria-describedby="label-help"
    aria-label=${`Label ${label}${share}, of version ${version}`}
      style=${offset && { transform: `translate(${offset[0]}px, ${offset[1]}px)` }}
    onPointerDown=${down} onPointerMove=${move} onPointerUp=${() => end(Boolean(drag.current?.far))}
      onPointerCancel=${() => end(false)}
    onKeyDown=${press} onBlur=${() => target !== null && end(false)}><span class="grip" aria-hidden="true"></span>
      ${label}${share}</button>`;
}

/** A slider for the share of a label, which changes a moment after the slider came to rest. */
function Share({ label, version, weight, most, onShare, onDrop }) {
  const [value, setValue] = useState(weight), id = `share-${label}`, timer = useRef(null);
  useEffect(() => timer.current === null && setValue(weight), [weight]);
  const slide = (event) => {
    const next = Math.min(most, event.target.value / 100);
    event.target.value = Math.round(100 * next);
    setValue(next);
    clearTimeout(timer.current);
    const mine = setTimeout(async () => {
      const done = await onShare(label, version, next);
      if (timer.current !== mine) return;
      timer.current = null;
      if (!done) setValue(weight);
    }, REST_MS);
    timer.current = mine;
  };
  return html`<li class="share"><label for=${id}><${LabelMark} label=${label} text=${`${label} ${version}`} /></label>
    <input id=${id} type="range" min="0" max="100" step="1" value=${Math.round(100 * value)}
      aria-valuetext=${percent(value, 0)}
      onInput=${slide} />
    <output for=${id}>${percent(value, 0)}</output>
    ${onDrop && html`<button class="plain" onClick=${() => onDrop(label)}
      aria-label=${`Remove the label ${label}`}>Remove</button>`}</li>`;
}

/** Who answers requests that name neither version nor label. */
export function Traffic({ labels, weights, versions, may, onShare, onMove, onDrop }) {
  const others = Object.entries(labels).filter(([label]) => label !== "stable").sort();
  const taken = Object.values(weights).reduce((sum, weight) => sum + weight, 0);
  const add = (event) => {
    event.preventDefault();
    const form = new FormData(event.target);
    onMove(form.get("label"), Number(form.get("version")));
    event.target.reset();
  };
  return html`<section class="traffic" aria-labelledby="traffic-title"><h2 id="traffic-title">Traffic</h2>
    <div class="split" aria-hidden="true"><span class="stable" style=${{ flexGrow: Math.max(0, 1 - taken) }}></span>
      ${others.filter(([label]) => weights[label]).map(([label]) => html`<span key=${label}
        style=${{ flexGrow: weights[label] }}></span>`)}</div>
    <ul class="shares">
      ${labels.stable && html`<li class="share"><${LabelMark} label="stable" text=${`stable ${labels.stable}`} />
        <span class="quiet">everything else</span><output>${percent(Math.max(0, 1 - taken), 0)}</output></li>`}
      ${others.map(([label, version]) => may ? html`<${Share} key=${label} label=${label} version=${version}
        weight=${weights[label] ?? 0}
          most=${1 - taken + (weights[label] ?? 0)} onShare=${onShare} onDrop=${onDrop} />`
        : html`<li key=${label} class="share"><${LabelMark} label=${label} text=${`${label} ${version}`} /><span>
          </span><output>${percent(weights[label] ?? 0, 0)}</output></li>`)}
    </ul>
    ${may && html`<details class="more"><summary>Set a label of your own</summary><form class="newlabel" onSubmit=${add}>
      <label>Label <input name="label" required pattern="[a-z0-9][a-z0-9._\\-]*" autocomplete="off"
        placeholder="canary" /></label>
      <label>Version <select name="version">${versions.map((version) => html`<option key=${version} value=${version}>${version}</option>`)}</select></label>
      <button>Set</button></form></details>`}
  </section>`;
}

/** The conditions that failed: `gate` is a job's or a report card's. `onOverride` moves the label; it may throw. */
export function GateRefusal({ gate, label, onOverride }) {
  const [state, setState] = useState({}), may = useMay("finetune");
  const failed = (gate?.conditions ?? []).filter((one) => !one.passed);
  const override = async () => {
    try {
      await onOverride();
      setState({});
    } catch (error) {
      setState({ error });
    }
  };
  return html`<div class="notice bad" role="alert"><strong>The gate refused it.</strong>
    <ul>${failed.map((one) => html`<li key=${one.condition}><b>${one.condition.replaceAll("_", " ")}
      </b>: ${one.message}</li>`)}</ul>
    ${may && html`<p><button onClick=${() => setState({ asks: true })}>Give it ${label} all the same…</button></p>`}
    ${state.asks && html`<${Confirm} title=${`Override the gate?`} action=${`Move ${label}`}
      onConfirm=${override} onClose=${() => setState((old) => ({ ...old, asks: false }))}>
      <p>Requests will be answered by a version that did not fulfil its conditions. Its report card will say that it got <b>${label}</b> by an override.</p><//>`}
    ${state.error && html`<${Notice} kind="bad" title="That did not work." error=${state.error} />`}
  </div>`;
}
