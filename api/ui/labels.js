// Labels to drag from version to version with a mouse, a finger or the arrow keys, and the shares of the traffic.

import { html, percent, useEffect, useRef, useState } from "./parts.js";

const NEAR = 4; // pixels that a pointer moves before it drags

export const LabelMark = ({ label, text = label }) => html`<span class="mark ${label === "stable" ? "stable" : ""}">${text}</span>`;

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
    state.over = versionAt(event.clientX, event.clientY);
    if (state.over !== target) aim(state.over);
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
    aria-label=${`Label ${label}${share}, of version ${version}`} style=${offset && { transform: `translate(${offset[0]}px, ${offset[1]}px)` }}
    onPointerDown=${down} onPointerMove=${move} onPointerUp=${() => end(Boolean(drag.current?.far))} onPointerCancel=${() => end(false)}
    onKeyDown=${press} onBlur=${() => target !== null && end(false)}><span class="grip" aria-hidden="true"></span>${label}${share}</button>`;
}

/** A slider for the share of a label; the share changes when the slider is let go. */
function Share({ label, version, weight, most, onShare, onDrop }) {
  const [value, setValue] = useState(weight), id = `share-${label}`;
  useEffect(() => setValue(weight), [weight]);
  return html`<li class="share"><label for=${id}><${LabelMark} label=${label} text=${`${label} ${version}`} /></label>
    <input id=${id} type="range" min="0" max="100" step="1" value=${Math.round(100 * value)} aria-valuetext=${percent(value, 0)}
      onInput=${(event) => setValue(Math.min(most, event.target.value / 100))} onChange=${() => value !== weight && onShare(label, version, value)} />
    <output for=${id}>${percent(value, 0)}</output>
    ${onDrop && html`<button class="plain" onClick=${() => onDrop(label)} aria-label=${`Remove the label ${label}`}>Remove</button>`}</li>`;
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
      ${others.filter(([label]) => weights[label]).map(([label]) => html`<span key=${label} style=${{ flexGrow: weights[label] }}></span>`)}</div>
    <ul class="shares">
      ${labels.stable && html`<li class="share"><${LabelMark} label="stable" text=${`stable ${labels.stable}`} /><span class="quiet">everything else</span><output>${percent(Math.max(0, 1 - taken), 0)}</output></li>`}
      ${others.map(([label, version]) => may ? html`<${Share} key=${label} label=${label} version=${version} weight=${weights[label] ?? 0}
          most=${1 - taken + (weights[label] ?? 0)} onShare=${onShare} onDrop=${onDrop} />`
        : html`<li key=${label} class="share"><${LabelMark} label=${label} text=${`${label} ${version}`} /><span></span><output>${percent(weights[label] ?? 0, 0)}</output></li>`)}
    </ul>
    ${may && html`<details class="more"><summary>Set a label of your own</summary><form class="newlabel" onSubmit=${add}>
      <label>Label <input name="label" required pattern="[a-z0-9][a-z0-9._\\-]*" autocomplete="off" placeholder="canary" /></label>
      <label>Version <select name="version">${versions.map((version) => html`<option key=${version}>${version}</option>`)}</select></label>
      <button>Set</button></form></details>`}
  </section>`;
}
