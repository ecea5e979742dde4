// Why each version answers as it does, and how little would change its mind.

import { send } from "./api.js";
import { Busy, Notice, Pixels, html, percent, useEffect, useMemo, useReachable, useState } from "./parts.js";
import { bodyFor, nameOf, queryOf } from "./answers.js";

const CALM_MS = 350; // without a new stroke, after which explanations are worth their time
let missing = null; // why this service explains nothing; asking again for every drawing would not change it

const reasonOf = (error) => {
  if (error.code === "not_explainable") return "This version was made before versions could be explained.";
  if (error.code === "not_found") return (missing = "Nothing is explained here.");
  return error.status ? error.message : null; // when the service is back, it is asked again
};

/** The explanation of each target: {explanation, label, reason}; of the picture at `at`. */
function useExplanations(picture, targets, models) {
  const [found, setFound] = useState({ picture: null });
  const reachable = useReachable();
  useEffect(() => {
    if (!picture?.final || missing || !models.length || !reachable) return undefined;
    const aborting = new AbortController();
    const explain = async (target) => {
      try {
        const path = `/explain?${queryOf(target, { pictures: "png" })}`;
        const { predictions: [first], version } = await send("POST", path, await bodyFor(picture, target, models), { signal: aborting.signal });
        return { explanation: first.explanation, label: first.label, version };
      } catch (error) {
        return { reason: aborting.signal.aborted ? null : reasonOf(error) };
      }
    };
    const timer = setTimeout(async () => {
      const first = await explain(targets[0]); // alone: if there is no such route, one request tells
      if (missing || aborting.signal.aborted) return setFound({ picture });
      const others = await Promise.all(targets.slice(1).map(explain));
      if (!aborting.signal.aborted) setFound({ picture, of: Object.fromEntries([first, ...others].map((each, at) => [targets[at], each])) });
    }, CALM_MS);
    return () => (clearTimeout(timer), aborting.abort());
  }, [picture, targets.join(), models.length, reachable]);
  return found;
}

/** The last point of an adversarial path that is not beyond ε. */
const pointAt = (path, epsilon) => path.findLast((point) => point.epsilon <= epsilon + 1e-9) ?? path[0];

const shown = (epsilon) => epsilon.toFixed(3);

function Firmness({ stability, label }) {
  if (stability.epsilon == null) return html`<p><b>Holds</b> <span class="quiet">up to ε = ${shown(stability.limit)}</span></p>`;
  return html`<p><b>Falls at ε = ${shown(stability.epsilon)}</b> <span class="quiet">where ${label} turns into ${stability.label}</span></p>`;
}

function Why({ target, found, epsilon }) {
  if (found.reason || !found.explanation) return html`<article class="why"><h3>${nameOf(target)}</h3><p class="quiet">${found.reason}</p></article>`;
  const { explanation, label } = found;
  const point = pointAt(explanation.adversarial, epsilon);
  const fallen = point.label !== label;
  return html`<article class="why ${fallen ? "fallen" : ""}" aria-label="Explanation of ${nameOf(target)}">
    <header><h3>${nameOf(target)}</h3><${Firmness} stability=${explanation.stability} label=${label} /></header>
    <div class="evidence">
      <figure><${Pixels} image=${point.image} size=${112} alt="The picture, changed by at most ε = ${shown(epsilon)}" />
        <figcaption class="now"><b>${point.label}</b> ${percent(point.probability, 0)}</figcaption></figure>
      <figure><${Pixels} image=${explanation.integrated_gradients.picture} size=${112} alt="Which pixels speak for and against ${explanation.class}" />
        <figcaption>What speaks for ${explanation.class}, and against</figcaption></figure>
      ${explanation.nearest?.length > 0 && html`<figure class="nearest"><ul>${explanation.nearest.slice(0, 5).map((each) => html`
        <li><${Pixels} image=${each.image} size=${48} alt="Labelled ${each.label}" /><span>${each.label}</span></li>`)}</ul>
        <figcaption>The most similar images that it learned from</figcaption></figure>`}
      ${explanation.nearest_reason && html`<p class="quiet">${explanation.nearest_reason}</p>`}
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

export function Explain({ picture, targets, models }) {
  const found = useExplanations(picture, targets, models);
  const [epsilon, setEpsilon] = useState(0);
  useEffect(() => setEpsilon(0), [picture]);
  const explained = useMemo(() => targets.filter((target) => found.of?.[target]?.explanation), [found, targets.join()]);
  if (!picture) return null;
  const stale = found.picture !== picture;
  let content = html`<${Busy} label="Looking for the reasons" />`;
  if (missing) content = html`<p class="quiet">${missing}</p>`;
  else if (found.of) {
    const of = (target) => found.of[target].explanation;
    const limit = Math.max(...explained.map((target) => of(target).stability.limit));
    const falls = explained.map((target) => [target, of(target).stability.epsilon]).filter(([, at]) => at != null);
    const described = explained.map((target) => `${nameOf(target)} says ${pointAt(of(target).adversarial, epsilon).label}`).join(", ");
    content = html`
      ${explained.length > 0 && html`<${Slider} epsilon=${epsilon} limit=${limit} falls=${falls} onChange=${setEpsilon} described="ε ${shown(epsilon)}: ${described}" />`}
      <div class="whys ${stale ? "stale" : ""}">
        ${targets.filter((target) => found.of[target]).map((target) => html`<${Why} key=${target} target=${target} found=${found.of[target]} epsilon=${epsilon} />`)}
      </div>`;
  }
  return html`<section class="explain" aria-labelledby="explain-title">
    <h2 id="explain-title">Why, and how firmly</h2>${content}</section>`;
}
