// The answers of several versions to one picture, side by side.

import { ApiError, get, send } from "./api.js";
import { Bars, Notice, html, percent, useEffect, useLayoutEffect, useReachable, useRef, useState } from "./parts.js";
import { seen } from "./strokes.js";

export const MOST = 4;
const AGAIN_MS = 2000; // after which a picture is sent again that the service could not answer
const GAP_MS = 40; // times the number of targets: between two requests for one of them while the pen moves

/** A target is "model@label" or "model:version". */
export function parse(target) {
  const [, model, kind, name] = target.match(/^(.+?)([:@])(.+)$/);
  return kind === ":" ? { model, version: Number(name) } : { model, label: name };
}

/** A target in words: "digits stable", "digits version 3". */
export const nameOf = (target) => target.replace("@", " ").replace(":", " version ");

/** The query of a prediction by a target. */
export const queryOf = (target, more = {}) => new URLSearchParams({ ...parse(target), ...more }).toString();

const polarities = new Map(); // by model and version: a version never changes

/** Whether a version learned dark figures on light ground. */
async function isDarkOnLight(target, models) {
  const { model, version = models.find((each) => each.name === model)?.labels[parse(target).label] } = parse(target);
  const path = `/models/${model}/versions/${version}`;
  if (!polarities.has(path)) polarities.set(path, get(path).then((found) => found.manifest.polarity === "dark_on_light"));
  return polarities.get(path).catch((failure) => {
    polarities.delete(path);
    throw failure;
  });
}

/** The body for a picture: a file as it is, a drawing as 784 bytes, in the polarity that the target's version learned. */
export async function bodyFor(picture, target, models) {
  if (picture.file) return picture.file;
  const isDark = await isDarkOnLight(target, models);
  return seen(picture).map((value) => (isDark ? 255 - value : value));
}

async function answerTo(target, picture, models, from) {
  try {
    const answer = await send("POST", `/predict?${queryOf(target)}`, await bodyFor(picture, target, models));
    return { answer, error: null, at: picture.at, ms: performance.now() - from };
  } catch (error) {
    return { error, at: picture.at, answer: null };
  }
}

/**
 * The latest answer of every target: {answer, error, ms, at}, of the picture of that time. While the pen moves, one request for each target is under way
 * at a time, and only the newest drawing is sent when it is back. When the pen lifts, nothing is waited for.
 */
export function useAnswers(picture, targets, models) {
  const [answers, setAnswers] = useState({});
  const lanes = useRef({}); // by target: {busy, next}
  const current = useRef(null), last = useRef(null); // the picture now, and before
  const fresh = useRef([]); // [target, what has come] since the last frame
  const reachable = useReachable();
  current.current = picture;

  const answer = async (target, asked, from = asked.at) => {
    const found = await answerTo(target, asked, models, from);
    if (found.error?.status >= 500) setTimeout(() => current.current === asked && answer(target, asked, performance.now()), AGAIN_MS);
    if (fresh.current.push([target, found]) === 1) requestAnimationFrame(show); // all that come before it at once
  };
  const show = () => {
    const some = fresh.current;
    fresh.current = [];
    if (!current.current) return; // it has been cleared meanwhile
    setAnswers((old) => some.reduce((all, [target, found]) =>
      (all[target]?.at > found.at ? all : { ...all, [target]: { ...all[target], ...found } }), old));
  };
  const follow = async (target, asked) => {
    const lane = (lanes.current[target] ??= { busy: false, next: null });
    lane.next = asked;
    if (lane.busy) return;
    lane.busy = true;
    for (let newest; (newest = lane.next); ) {
      lane.next = null;
      await Promise.all([answer(target, newest), new Promise((done) => setTimeout(done, GAP_MS * targets.length))]);
    }
    lane.busy = false;
  };
  const ask = (target) => {
    if (!picture.final) return follow(target, picture);
    if (lanes.current[target]) lanes.current[target].next = null;
    return answer(target, picture, last.current === picture ? performance.now() : picture.at); // new targets, old picture
  };

  useEffect(() => targets.forEach((target) => isDarkOnLight(target, models).catch(() => {})), [targets.join(), models.length]);
  useLayoutEffect(() => { // not after the next frame, as useEffect would
    if (!picture) {
      for (const lane of Object.values(lanes.current)) lane.next = null;
      setAnswers({});
    } else {
      if (models.length && reachable) targets.forEach(ask);
      last.current = picture;
    }
  }, [picture, targets.join(), models.length, reachable]);
  return picture ? answers : {};
}

function Choice({ target, models, onChange, label }) {
  return html`<select class="choice" aria-label=${label} value=${target} onChange=${(event) => onChange(event.target.value)}>
    ${!target && html`<option value="">Compare with…</option>`}
    ${models.map(({ name, labels, versions }) => html`<optgroup key=${name} label=${name}>
      ${Object.entries(labels).map(([each, version]) => html`<option value="${name}@${each}">${name} ${each} (version ${version})</option>`)}
      ${versions.map((version) => html`<option value="${name}:${version}">${name} version ${version}</option>`)}
    </optgroup>`)}
  </select>`;
}

export const AddTarget = ({ models, onAdd }) => html`<label class="add">
  <${Choice} target="" models=${models} label="Compare with another version" onChange=${(value) => value && onAdd(value)} />
</label>`;

function Verdict({ found, classes }) {
  if (found?.error) {
    const { error } = found;
    if (!(error instanceof ApiError && error.status === 0)) return html`<${Notice} kind="bad" error=${error} />`;
  }
  const prediction = found?.answer?.predictions[0];
  if (!prediction) return html`<p class="verdict idle"><span class="class" aria-hidden="true">?</span></p>`;
  const most = Math.max(...prediction.probabilities);
  return html`<div class="verdict">
    <span class="class ${prediction.label.length > 3 ? "long" : ""}">${prediction.label}</span>
    <span class="sure"><b>${percent(most)}</b><span class="quiet">version ${found.answer.version}, ${Math.max(1, Math.round(found.ms))} ms</span></span>
  </div>
  ${prediction.none_of_these && html`<p class="flag">Unlike the images it learned from.</p>`}
  ${prediction.set?.length > 1 && html`<p class="quiet">Plausible: ${prediction.set.join(", ")}</p>`}`;
}

/** One target's answer. */
export function Answer({ target, found, models, onChange, onRemove, children }) {
  const model = models.find((each) => each.name === parse(target).model);
  const answer = found?.answer;
  const classes = answer?.classes ?? model?.classes ?? [];
  const prediction = answer?.predictions[0];
  return html`<article class="answer card" aria-label="Answer of ${nameOf(target)}">
    <header>
      <${Choice} target=${target} models=${models} onChange=${onChange} label="Version that answers" />
      ${onRemove && html`<button class="plain close" aria-label="Remove ${nameOf(target)}" onClick=${onRemove}>×</button>`}
    </header>
    <${Verdict} found=${found} />
    <${Bars} classes=${classes} probabilities=${prediction?.probabilities ?? classes.map(() => 0)} best=${prediction?.label} most=${10} />
    ${children}
  </article>`;
}
