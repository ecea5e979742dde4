// Why a version did not get its label, and how to give it the label all the same.

import { Confirm, Notice, html, useMay, useState } from "./parts.js";

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
    <ul>${failed.map((one) => html`<li key=${one.condition}><b>${one.condition.replaceAll("_", " ")}</b>: ${one.message}</li>`)}</ul>
    ${may && html`<p><button onClick=${() => setState({ asks: true })}>Give it ${label} all the same…</button></p>`}
    ${state.asks && html`<${Confirm} title=${`Override the gate?`} action=${`Move ${label}`} onConfirm=${override} onClose=${() => setState((old) => ({ ...old, asks: false }))}>
      <p>Requests will be answered by a version that did not fulfil its conditions. Its report card will say that it got <b>${label}</b> by an override.</p><//>`}
    ${state.error && html`<${Notice} kind="bad" title="That did not work." error=${state.error} />`}
  </div>`;
}
