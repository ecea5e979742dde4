// Naming the right class of a picture that was answered wrongly, and training with these corrections.

import { get, send } from "./api.js";
import { Notice, html, plural, useEffect, useState } from "./parts.js";
import { bodyFor, parse, queryOf } from "./answers.js";

const focus = (node) => node?.focus();
const OFF = "Corrections are switched off on this service.";

export function Correct({ target, picture, answer, models }) {
  const [open, setOpen] = useState(false);
  const [state, setState] = useState({}); // {label, number, error, busy}
  const predicted = answer?.predictions[0].label;
  const { model } = parse(target);
  useEffect(() => (setOpen(false), setState({})), [picture]);

  const say = async (label) => {
    setState({ busy: true });
    try {
      // Asked once more, now with `feedback`: only pictures that are corrected are kept, not every stroke.
      const asked = await send("POST", `/predict?${queryOf(target, { feedback: true })}`, await bodyFor(picture, target, models));
      const { id } = await send("POST", "/feedback", { id: asked.id, index: 0, label });
      const kept = await get(`/feedback?limit=100&model=${model}`);
      setState({ id, label, number: kept.data.length, more: kept.has_more });
    } catch (error) {
      setState({ error: error.code === "feedback_off" ? { message: OFF } : error });
    }
  };
  const undo = () => send("DELETE", `/feedback/${state.id}`).then(() => setState({}), (error) => setState({ ...state, error }));
  const train = async () => {
    setState({ ...state, busy: true });
    const form = new FormData();
    form.set("model", model);
    form.set("corrections", "true");
    try {
      location.hash = `#/finetune/${(await send("POST", "/finetune", form)).id}`;
    } catch (error) {
      setState({ ...state, error, busy: false });
    }
  };

  if (!picture?.final || !answer) return html`<div class="correct"></div>`;
  if (state.label) {
    return html`<div class="correct" role="status"><p>Noted: <b>${state.label}</b>, not ${predicted}. <button class="plain" ref=${focus} onClick=${undo}>Undo</button></p>
      ${model !== "lenet5" && html`<button class="primary" disabled=${state.busy} onClick=${train}>Fine-tune with ${plural(state.number, "correction")}${state.more ? " or more" : ""}</button>`}
      ${state.error && html`<${Notice} kind="bad" error=${state.error} />`}</div>`;
  }
  return html`<div class="correct">
    <button class="plain" aria-expanded=${open} onClick=${() => setOpen(!open)}>Wrong answer?</button>
    ${open && html`<fieldset disabled=${state.busy}><legend>What is it really?</legend>
      ${answer.classes.filter((label) => label !== predicted).map((label) => html`
        <button key=${label} type="button" class="chip" onClick=${() => say(label)}>${label}</button>`)}</fieldset>`}
    ${state.error && html`<${Notice} kind="poor" error=${state.error} />`}
  </div>`;
}
