// Naming the right class of a picture that was answered wrongly; what was named so far, and training with it.

import { get, send } from "./api.js";
import { BASE, Notice, Pixels, html, plural, useEffect, useResource, useState } from "./parts.js";
import { bodyFor, parse, queryOf } from "./answers.js";

const focus = (node) => node?.focus();
const OFF = "Corrections are switched off on this service.";

export function Correct({ target, picture, answer, models }) {
  const [open, setOpen] = useState(false);
  const [state, setState] = useState({}); // {label, kept, error, busy}
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
      setState({ id, label, kept });
    } catch (error) {
      setState({ error: error.code === "feedback_off" ? { message: OFF } : error });
    }
  };
  const undo = () => send("DELETE", `/feedback/${state.id}`).then(() => setState({}), (error) => setState({ ...state, error }));

  if (!picture?.final || !answer || model === BASE) return html`<div class="correct"></div>`;
  if (state.label) {
    return html`<div class="correct" role="status"><p>Noted: <b>${state.label}</b>, not ${predicted}. <button class="plain" ref=${focus} onClick=${undo}>Undo</button></p>
      <${Train} model=${model} kept=${state.kept} />
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

function Train({ model, kept: { data, has_more: isMore } }) {
  const [state, setState] = useState({});
  const train = async () => {
    setState({ busy: true });
    const form = new FormData();
    form.set("model", model);
    form.set("corrections", "true");
    try {
      location.hash = `#/finetune/${(await send("POST", "/finetune", form)).id}`;
    } catch (error) {
      setState({ error });
    }
  };
  return html`<button class="primary" disabled=${state.busy} onClick=${train}>Fine-tune with ${plural(data.length, "correction")}${isMore ? " or more" : ""}</button>
    ${state.error && html`<${Notice} kind="bad" error=${state.error} />`}`;
}

/** The corrections of a model. Each can be taken back. */
export function Corrections({ model }) {
  const { data: kept, reload } = useResource(`/feedback?limit=100&model=${model}`), [error, setError] = useState(null);
  if (!kept?.data.length) return null;
  const remove = (id) => send("DELETE", `/feedback/${id}`).then(() => setError(null), setError).then(reload);
  return html`<section aria-labelledby="corrections-title"><h2 id="corrections-title">Corrections</h2>
    <ul class="thumbs">${kept.data.map(({ id, image, label, predicted }) => html`<li key=${id}><span class="thumbcard">
      <${Pixels} image=${image} alt="" size=${56} /><span><b>${label}</b>, not ${predicted}</span>
      <button class="plain" aria-label=${`Remove the correction to ${label}`} onClick=${() => remove(id)}>Remove</button></span></li>`)}</ul>
    ${error && html`<${Notice} kind="bad" error=${error} />`}
    <p class="jobactions"><${Train} model=${model} kept=${kept} /></p></section>`;
}
