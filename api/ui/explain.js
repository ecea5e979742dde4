// Why each version answers as it does, and how little would change its mind. And what is right where it is wrong: naming the
// class of a picture, what was named so far, and training with it.

import { get, send } from "./api.js";
import { BASE, Busy, Notice, Pixels, html, percent, plural, useEffect, useMemo, useReachable, useRef, useResource, useState } from "./parts.js";
import { bodyFor, nameOf, parse, queryOf } from "./answers.js";

const CALM_MS = 350; // without a new stroke, after which explanations are worth their time

const reasonOf = (error) => {
  if (error.code === "not_explainable") return "This version was made before versions could be explained.";
  return error.status ? error.message : null; // when the service is back, it is asked again
};

/** The explanation of each target: {explanation, label, reason}, and the picture. */
function useExplanations(picture, targets, models, hold) {
  const [found, setFound] = useState({ picture: null });
  const canAsk = useReachable() && !hold;
  useEffect(() => {
    if (!picture?.final || !models.length || !canAsk) return undefined;
    const aborting = new AbortController();
    const explain = async (target) => {
      try {
        const path = `/explain?${queryOf(target, { pictures: "png" })}`;
        const { predictions: [first] } = await send("POST", path, await bodyFor(picture, target, models), { signal: aborting.signal });
        return { explanation: first.explanation, label: first.label };
      } catch (error) {
        return { reason: reasonOf(error) };
      }
    };
    const timer = setTimeout(async () => {
      const all = await Promise.all(targets.map(explain));
      if (!aborting.signal.aborted) setFound({ picture, of: Object.fromEntries(all.map((each, at) => [targets[at], each])) });
    }, CALM_MS);
    return () => (clearTimeout(timer), aborting.abort());
  }, [picture, targets.join(), models.length, canAsk]);
  return found;
}

/** The last point of an adversarial path that is not beyond ε; where a smaller ε was found to be enough, the first that has fallen. */
function pointAt({ adversarial: path, stability }, epsilon) {
  const at = path.findLast((point) => point.epsilon <= epsilon + 1e-9) ?? path[0];
  const hasFallen = stability.epsilon != null && epsilon >= stability.epsilon - 1e-9;
  return (hasFallen && path.find((point) => point.label !== path[0].label && point.epsilon >= at.epsilon)) || at;
}

const shown = (epsilon) => epsilon.toFixed(3);

function Firmness({ stability, label }) {
  if (stability.epsilon == null) return html`<p><b>Holds</b> <span class="quiet">up to ε = ${shown(stability.limit)}</span></p>`;
  return html`<p><b>Falls at ε = ${shown(stability.epsilon)}</b> <span class="quiet">where ${label} turns into ${stability.label}</span></p>`;
}

function Why({ target, found, epsilon }) {
  if (found.reason || !found.explanation) return html`<article class="why"><h3>${nameOf(target)}</h3><p class="quiet">${found.reason}</p></article>`;
  const { explanation, label } = found;
  const point = pointAt(explanation, epsilon);
  const fallen = point.label !== label;
  return html`<article class="why ${fallen ? "fallen" : ""}" aria-label="Explanation of ${nameOf(target)}">
    <header><h3>${nameOf(target)}</h3><${Firmness} stability=${explanation.stability} label=${label} /></header>
    <div class="evidence">
      <figure><${Pixels} image=${point.image} size=${112} alt="The picture, changed by at most ε = ${shown(point.epsilon)}" />
        <figcaption class="now"><b>${point.label}</b> ${percent(point.probability, 0)}</figcaption></figure>
      <figure><${Pixels} image=${explanation.integrated_gradients.picture} size=${112} alt="Which pixels speak for and against ${explanation.class}" />
        <figcaption>What speaks for ${explanation.class}, and against</figcaption></figure>
      ${explanation.nearest?.length > 0 && html`<figure class="nearest"><ul>${explanation.nearest.slice(0, 5).map((each) => html`
        <li><${Pixels} image=${each.image} size=${48} alt="Labelled ${each.label}" /><span>${each.label}</span></li>`)}</ul>
        <figcaption>The most similar images that it learned from</figcaption></figure>`}
      ${explanation.nearest_reason && html`<p class="quiet">No similar images: ${explanation.nearest_reason}</p>`}
    </div>
  </article>`;
}

function Slider({ epsilon, limit, falls, onChange, described }) {
  return html`<div class="epsilon">
    <label for="epsilon">Worst-case change of each pixel: ε = <output for="epsilon">${shown(epsilon)}</output></label>
    <div class="scale">
      <input id="epsilon" type="range" min="0" max=${limit} step=${limit / 200} value=${epsilon} aria-valuetext=${described}
        onInput=${(event) => onChange(Number(event.target.value))} />
      ${falls.map(([target, at]) => html`<span key=${target} class="fall" style=${{ "--at": at / limit }} title="${nameOf(target)} falls" aria-hidden="true"></span>`)}
    </div>
  </div>`;
}

/** `hold`: the service cannot answer at the moment. */
export function Explain({ picture, targets, models, hold }) {
  const found = useExplanations(picture, targets, models, hold);
  const [epsilon, setEpsilon] = useState(0);
  useEffect(() => setEpsilon(0), [picture]);
  const explained = useMemo(() => targets.filter((target) => found.of?.[target]?.explanation), [found, targets.join()]);
  if (!picture) return null;
  const stale = found.picture !== picture;
  let content = html`<${Busy} label="Looking for the reasons" />`;
  if (found.of) {
    const of = (target) => found.of[target].explanation;
    const limit = Math.max(...explained.map((target) => of(target).stability.limit));
    const falls = explained.map((target) => [target, of(target).stability.epsilon]).filter(([, at]) => at != null);
    const described = explained.map((target) => `${nameOf(target)} says ${pointAt(of(target), epsilon).label}`).join(", ");
    content = html`
      ${explained.length > 0 && html`<${Slider} epsilon=${epsilon} limit=${limit} falls=${falls} onChange=${setEpsilon} described="ε ${shown(epsilon)}: ${described}" />`}
      <div class="whys ${stale ? "stale" : ""}">
        ${targets.filter((target) => found.of[target]).map((target) => html`<${Why} key=${target} target=${target} found=${found.of[target]} epsilon=${epsilon} />`)}
      </div>`;
  }
  return html`<section class="explain" aria-labelledby="explain-title">
    <h2 id="explain-title">Why, and how firmly</h2>${content}</section>`;
}

const focus = (node) => node?.focus();
const OFF = "Corrections are switched off on this service.";

export function Correct({ target, picture, answer, models }) {
  const [open, setOpen] = useState(false);
  const [state, setState] = useState({}); // {label, kept, error, busy}
  const predicted = answer?.predictions[0].label;
  const { model } = parse(target), shown = useRef(null);
  shown.current = picture;
  const settle = (next) => shown.current === picture && setState(next); // another picture may have come meanwhile
  useEffect(() => (setOpen(false), setState({})), [picture]);

  const say = async (label) => {
    setState({ busy: true });
    try {
      // Asked once more, now with `feedback`: only pictures that are corrected are kept, not every stroke.
      const asked = await send("POST", `/predict?${queryOf(target, { feedback: true })}`, await bodyFor(picture, target, models));
      const { id } = await send("POST", "/feedback", { id: asked.id, index: 0, label });
      const kept = await get(`/feedback?limit=100&model=${model}`);
      settle({ id, label, kept });
    } catch (error) {
      settle({ error: error.code === "feedback_off" ? { message: OFF } : error });
    }
  };
  const undo = () => {
    setState({ ...state, busy: true });
    send("DELETE", `/feedback/${state.id}`).then(() => settle({}), (error) => settle({ ...state, error }));
  };

  if (!picture?.final || !answer || model === BASE) return html`<div class="correct"></div>`;
  if (state.label) {
    return html`<div class="correct" role="status"><p>Noted: <b>${state.label}</b>, not ${predicted}. <button class="plain" ref=${focus} disabled=${state.busy} onClick=${undo}>Undo</button></p>
      <${Train} model=${model} count=${state.kept.has_more ? null : state.kept.data.length} />
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

function Train({ model, count }) {
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
  return html`<button class="primary" disabled=${state.busy} onClick=${train}>Fine-tune with ${count ? plural(count, "correction") : "all corrections"}</button>
    ${state.error && html`<${Notice} kind="bad" error=${state.error} />`}`;
}

/** The corrections of a model, the oldest first, a page at a time. Each can be taken back. */
export function Corrections({ model }) {
  const [after, setAfter] = useState(""), [failure, setFailure] = useState(null), title = useRef(null);
  const { data: kept, error, reload } = useResource(`/feedback?limit=100&model=${model}${after && `&after=${after}`}`);
  const problem = failure ?? error;
  if (!kept?.data.length && !after && !problem) return null;
  const some = kept?.data ?? [], isAll = kept && !after && !kept.has_more;
  const remove = async (id) => {
    await send("DELETE", `/feedback/${id}`).then(() => setFailure(null), setFailure);
    title.current?.focus();
    reload();
  };
  return html`<section aria-labelledby="corrections-title"><h2 id="corrections-title" tabindex="-1" ref=${title}>Corrections</h2>
    <ul class="thumbs">${some.map(({ id, image, label, predicted }, at) => html`<li key=${id}><span class="thumbcard">
      <${Pixels} image=${image} alt="" size=${56} /><span><b>${label}</b>, not ${predicted}</span>
      <button class="plain" aria-label=${`Remove correction ${at + 1}, ${label}, not ${predicted}`} onClick=${() => remove(id)}>Remove</button></span></li>`)}</ul>
    ${problem && html`<${Notice} kind="bad" error=${problem} />`}
    <p class="jobactions"><${Train} model=${model} count=${isAll ? some.length : null} />
      ${kept?.has_more && html`<button onClick=${() => setAfter(some.at(-1).id)}>Show the next</button>`}
      ${after && html`<button onClick=${() => setAfter("")}>Show the first</button>`}</p></section>`;
}
