// Fine-tune: from a folder of images to a job. `#/finetune` prepares one and lists those there are, `#/finetune/<id>`
// follows one.

import { Busy, Notice, duration, html, useEffect, useResource, useState } from "./parts.js";
import { upload } from "./api.js";
import { DatasetReport } from "./dataset_report.js";
import { change, current, formOf, reset, useDraft } from "./draft.js";
import { Job, JobList } from "./job.js";
import { SpecForm, reasonsOf } from "./spec_form.js";
import { Kept, Upload } from "./upload.js";

const SETTLE_MS = 350; // after the last change, before the gateway is asked what it would make of it

/** What POST /finetune would do with the draft: {plan, error}, asked again after every change. */
function usePlan(draft) {
  const [state, setState] = useState({});
  const { dataset, excluded, automatic, given, model, label } = draft;
  useEffect(() => {
    if (!dataset || !model) return undefined;
    let ended = false;
    const timer = setTimeout(() => upload("/finetune", formOf(draft, { dry_run: "true" })).then(
      (plan) => !ended && setState({ plan }),
      (error) => !ended && setState((old) => ({ plan: old.plan, error })),
    ), state.plan ? SETTLE_MS : 0);
    return () => (ended = true, clearTimeout(timer));
  }, [dataset, excluded, automatic, given, model, label]);
  return state;
}

/** Names of the fields that a search would choose: those are "auto" in a plan that leaves everything to it. */
function useSearched(plan, isUntouched) {
  const [names, setNames] = useState(new Set());
  useEffect(() => {
    if (plan && isUntouched) setNames(new Set(Object.keys(plan.spec).filter((name) => plan.spec[name] === "auto")));
  }, [plan]);
  return names;
}

function Start({ draft, plan, error }) {
  const [state, setState] = useState({});
  const [models, labels] = [useResource("/models?limit=100").data?.data.map((each) => each.name) ?? [], ["stable", "canary"]];
  const reasons = { ...reasonsOf(error), ...reasonsOf(state.error) };
  const start = async (event) => {
    event.preventDefault();
    setState({ busy: true });
    try {
      const job = await upload("/finetune", formOf(current()));
      reset();
      location.hash = `#/finetune/${job.id}`;
    } catch (failure) {
      setState({ error: failure });
    }
  };
  const field = (name) => ({
    value: draft[name], onInput: (event) => change({ [name]: event.target.value }),
    "aria-invalid": Boolean(reasons[name]), "aria-describedby": `start-${name}`,
  });
  const exists = models.includes(draft.model), general = state.error ?? (error && !error.param?.match(/^(spec|model|label)/) && error);
  const { estimate } = plan ?? {};
  return html`<form class="start" onSubmit=${start}>
    <div class="field ${reasons.model ? "wrong" : ""}"><label for="start-model-input">Model</label>
      <input id="start-model-input" list="models" autocomplete="off" spellcheck="false" required ...${field("model")} />
      <datalist id="models">${models.map((name) => html`<option key=${name} value=${name} />`)}</datalist>
      <p id="start-model" class=${reasons.model ? "error" : "quiet"}>
        ${reasons.model ?? (exists ? "gets a new version" : "a new model")}</p></div>
    <div class="field ${reasons.label ? "wrong" : ""}"><label for="start-label-input">Label</label>
      <input id="start-label-input" list="labels" autocomplete="off" spellcheck="false" required ...${field("label")} />
      <datalist id="labels">${labels.map((name) => html`<option key=${name} value=${name} />`)}</datalist>
      <p id="start-label" class=${reasons.label ? "error" : "quiet"}>
        ${reasons.label ?? "moves to it if it passes its gate"}</p></div>
    <div class="go">
      <button class="primary big" disabled=${state.busy || !draft.model}>${state.busy ? "Starting…" : "Fine-tune"}</button>
      <p class="quiet" role="status">
        ${estimate ? `about ${duration(estimate.seconds)}${estimate.jobs ? "" : ", a first guess"}` : "…"}</p></div>
    ${general && html`<${Notice} kind="bad" title="It cannot start." error=${general} />`}
  </form>`;
}

function Prepare({ draft }) {
  const { plan, error } = usePlan(draft);
  const untouched = draft.automatic && !Object.keys(draft.given).length;
  const auto = useSearched(plan, untouched), excluded = draft.excluded.size;
  return html`<header class="viewhead"><div><h1>${draft.file?.name ?? (draft.dataset.filename || "Data set")}</h1>
      <p class="quiet">Look through it, or start at once: everything is automatic unless you say otherwise.</p></div>
      <button class="plain" onClick=${reset}>Other images</button></header>
    <${Start} draft=${draft} plan=${plan} error=${error} />
    <section class="step" aria-labelledby="images-title">
      <h2 id="images-title">Images${excluded > 0 && html` <span class="badge">${excluded} left out</span>`}</h2>
      <${DatasetReport} dataset=${draft.dataset} pictures=${draft.pictures} excluded=${draft.excluded}
        onExclude=${(names) => change({ excluded: names })} /></section>
    <section class="step" aria-labelledby="recipe-title"><h2 id="recipe-title">Recipe</h2>
      ${plan?.warnings.filter((text) => !isFinding(text, plan)).map((text) => html`<${Notice} key=${text} kind="poor">
        ${text}<//>`)}
      <${SpecForm} draft=${draft} auto=${auto} error=${error} /></section>`;
}

const isFinding = (text, plan) => (plan.dataset.findings ?? []).some((finding) => finding.message === text);

export default function Finetune({ parts }) {
  const draft = useDraft();
  if (parts[0]) return html`<${Job} key=${parts[0]} id=${parts[0]} />`;
  if (draft.dataset) return html`<div class="finetune"><${Prepare} draft=${draft} /></div>`;
  return html`<div class="finetune">
    <header class="viewhead"><div><h1>Fine-tune</h1>
      <p class="quiet">From labelled images to a model that answers, in about a minute.</p></div></header>
    <${Upload} /><${Kept} /><${JobList} /></div>`;
}
