// Fine-tune: from a folder of images to a job. `#/finetune` prepares one, with a form made from the JSON schema of the spec
// in which everything may stay automatic, and lists those there are; `#/finetune/<id>` follows one.

import { Notice, duration, html, plural, useEffect, useMemo, useReachable, useResource, useState } from "./parts.js";
import { send } from "./api.js";
import { DatasetReport } from "./dataset_report.js";
import { Job, JobList } from "./job.js";
import { Field, Fields, fieldOf, grouped, withValue } from "./spec_fields.js";
import { Kept, Upload, change, current, formOf, reset, specOf, useDraft } from "./upload.js";

const SETTLE_MS = 350; // after the last change, before the gateway is asked what it would make of it

/** What POST /finetune would do with the draft: {plan, error}, asked again after every change. */
function usePlan(draft) {
  const [state, setState] = useState({}), reachable = useReachable();
  const { dataset, excluded, automatic, given, model, label } = draft;
  useEffect(() => {
    if (!dataset || !model || !reachable) return undefined;
    let ended = false;
    const timer = setTimeout(() => send("POST", "/finetune", formOf(draft, { dry_run: "true" })).then(
      (plan) => !ended && setState({ plan }),
      (error) => !ended && setState((old) => ({ plan: old.plan, error })),
    ), state.plan ? SETTLE_MS : 0);
    return () => (ended = true, clearTimeout(timer));
  }, [dataset, excluded, automatic, given, model, label, reachable]);
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

/** Reasons by the path of their field, `l2` or `search.trials`, of an error of the API. */
function reasonsOf(error) {
  const found = {};
  for (const { field, reason } of error?.details ?? []) if (field) found[field.replace(/^spec\./, "")] = reason;
  if (error?.param && !Object.keys(found).length) found[error.param.replace(/^spec\./, "")] = error.message;
  return found;
}

const covers = (name, path) => path === name || path.startsWith(`${name}.`);

/** `auto` has the names of fields that are searched unless they are given. */
function SpecForm({ draft, auto, error }) {
  const { data } = useResource("/openapi.json");
  const schemas = data?.components.schemas, errors = useMemo(() => reasonsOf(error), [error]);
  const setMode = (automatic) => () => {
    const { search, ...given } = draft.given;
    change({ automatic, given });
  };
  // A few fields are "auto" by default without being searched.
  const searched = draft.automatic && schemas ? new Set([...auto].filter((name) => schemas.Spec.properties[name]?.default !== "auto")) : new Set();
  const form = { given: draft.given, auto: searched, errors, schemas, onValue: (path, value) => change({ given: withValue(current().given, path, value) }) };
  const spec = specOf(draft);
  const groups = schemas ? grouped(schemas.Spec).filter(([title]) => draft.automatic || title !== "Search") : [];
  return html`<div class="specform">
    <div class="modes" role="radiogroup" aria-label="How the recipe is found">
      ${[
        [true, "Find the best recipe", "Tries recipes on your images, scores each by images it has not seen, and trains the best of the simplest. What you fix below stays fixed."],
        [false, "Use my recipe", "Trains once, as the fields below say. Fields you leave empty have their defaults."],
      ].map(([automatic, title, text]) => html`<label key=${title} class="mode">
        <input type="radio" name="mode" checked=${draft.automatic === automatic} onChange=${setMode(automatic)} />
        <span><strong>${title}</strong><small>${text}</small></span></label>`)}
    </div>
    ${groups.map(([title, names]) => {
      const wrong = Object.keys(errors).filter((path) => names.some((name) => covers(name, path)));
      const given = names.filter((name) => draft.given[name] !== undefined);
      return html`<details key=${title} class="group" ref=${(node) => node && wrong.length && (node.open = true)}>
        <summary>${title}<span class="quiet">
          ${wrong.length ? plural(wrong.length, "problem") : given.length ? `${given.length} set` : names.some((name) => searched.has(name)) ? "automatic" : ""}</span></summary>
        <div class="fields">${names.map((name) => name === "search"
          ? html`<${Fields} key=${name} schema=${fieldOf(schemas.Spec.properties.search, schemas).schema}
            path=${["search"]} form=${form} />`
          : isShown(name, draft) && html`<${Field} key=${name} name=${name} path=${[name]}
            schema=${schemas.Spec.properties[name]} form=${form} />`)}
        </div></details>`;
    })}
    ${spec && Object.keys(spec).length > 0 && html`<details class="group">
      <summary>As JSON<span class="quiet">what will be sent</span></summary>
      <pre tabindex="0">${JSON.stringify(spec, null, 2)}</pre>
      <p><button class="plain" onClick=${() => change({ given: {} })}>Back to ${draft.automatic ? "automatic" : "the defaults"}</button></p></details>`}
  </div>`;
}

const OWNERS = { lora: "method", bias: "method", ia3: "method", adapter: "method", momentum: "optimizer", weight_decay: "optimizer" };
const CHOSEN = { momentum: "sgd", weight_decay: "adamw" };

/** Options of a method or an optimizer are shown with that one alone, as the gateway takes them with that one alone. */
function isShown(name, { given, automatic }) {
  const owner = OWNERS[name];
  if (!owner || given[name] !== undefined) return true;
  return (given[owner] ?? (owner === "method" && !automatic ? "lora" : null)) === (CHOSEN[name] ?? name);
}

function Start({ draft, plan, error }) {
  const [state, setState] = useState({});
  const [models, labels] = [useResource("/models?limit=100").data?.data.map((each) => each.name) ?? [], ["stable", "canary"]];
  const reasons = { ...reasonsOf(error), ...reasonsOf(state.error) };
  const start = async (event) => {
    event.preventDefault();
    setState({ busy: true });
    try {
      const job = await send("POST", "/finetune", formOf(current()));
      reset();
      location.hash = `#/finetune/${job.id}`;
    } catch (failure) {
      setState({ error: failure });
    }
  };
  const field = (name) => ({
    value: draft[name], onInput: (event) => (setState({}), change({ [name]: event.target.value })),
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
