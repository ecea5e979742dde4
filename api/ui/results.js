// What a job has found. While it searches: every recipe that was tried, the best so far, and which were dropped. Then: the
// version, whether it has its label, and what the training has found out about the images.

import { Notice, count, html, percent, useEffect, useMay, useResource, useState } from "./parts.js";
import { get, send } from "./api.js";
import { Findings } from "./dataset_report.js";
import { change } from "./upload.js";
import { GateRefusal } from "./labels.js";
import { galleryOf } from "./report.js";

const WIDTH = 720, HEIGHT = 220, LEFT = 44, BOTTOM = 26, TOP = 12, RIGHT = 12;

/** What is known of each recipe: its last figures, and whether it went no further. */
export function recipesOf(events) {
  const found = new Map(), dropped = new Set(events.flatMap((event) => event.dropped ?? []));
  for (const event of events) found.set(event.trial, { ...event, recipe: event.recipe?.replaceAll("`", "") });
  return [...found.values()].map((one) => ({ ...one, dropped: dropped.has(one.trial) }));
}

function Plot({ events, chosen, recipes }) {
  const scored = events.filter((event) => event.cross_entropy != null);
  if (scored.length < 2) return null;
  const logs = scored.map((event) => Math.log10(Math.max(event.cross_entropy, 1e-3)));
  const [low, high] = [Math.min(...logs) - 0.05, Math.max(...logs) + 0.05];
  const x = (at) => LEFT + ((at + 0.5) / scored.length) * (WIDTH - LEFT - RIGHT);
  const y = (log) => HEIGHT - BOTTOM - ((log - low) / (high - low)) * (HEIGHT - BOTTOM - TOP);
  const out = new Set(recipes.filter((one) => one.dropped).map((one) => one.trial));
  let best = Infinity, round = null, path = "";
  scored.forEach((event, at) => {
    best = event.round === round ? Math.min(best, logs[at]) : logs[at]; // rounds train longer, so they are apart
    path += event.round === round ? `H${x(at)}V${y(best)}` : `M${x(at)} ${y(best)}`;
    round = event.round;
  });
  const ticks = [low + 0.05, (low + high) / 2, high - 0.05];
  const starts = scored.flatMap((event, at) => (at === 0 || event.round !== scored[at - 1].round ? [[event.round, at]] : []));
  return html`<svg class="searchplot" viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img"
    aria-label=${`Held-out loss of ${scored.length} runs; the best is ${(10 ** Math.min(...logs)).toFixed(3)} nats`}>
    ${ticks.map((tick) => html`<g key=${tick}><path class="gridline" d="M${LEFT} ${y(tick)}H${WIDTH - RIGHT}" />
      <text x=${LEFT - 8} y=${y(tick) + 4} class="end">${Number((10 ** tick).toPrecision(2))}</text></g>`)}
    ${starts.map(([number, at]) => html`<text key=${number} x=${x(at) - 6} y=${HEIGHT - 6}>round ${number}</text>`)}
    <path class="bestline" d=${path} />
    ${scored.map((event, at) => html`<circle key=${at} cx=${x(at)} cy=${y(logs[at])} r=${event.trial === chosen ? 6 : 4.5}
      class=${event.trial === chosen ? "chosen" : out.has(event.trial) ? "dropped" : "going"}><title>
        ${event.recipe?.replaceAll("`", "")}: ${event.cross_entropy.toFixed(3)} nats, ${percent(event.accuracy)}
        </title></circle>`)}
  </svg>`;
}

/** `trials` are the events of the search, `resolved` the spec that was chosen. */
export function SearchView({ trials, job, resolved }) {
  const { data } = useResource(job.version ? `/models/${job.model}/versions/${job.version}` : null);
  if (!trials.length) return null;
  const last = trials.at(-1), { best } = last, card = data?.report.search;
  const chosen = card?.chosen ?? best.trial, recipes = recipesOf(trials), cards = new Map((card?.trials ?? []).map((one) => [one.trial, one]));
  const isGoing = job.stage === "searching";
  const [least, most] = best.accuracy_interval;
  const rank = (one) => (one.trial === chosen ? -1 : Number(one.dropped));
  const order = [...recipes].sort((a, b) => rank(a) - rank(b) || (a.cross_entropy ?? 0) - (b.cross_entropy ?? 0));
  const gone = recipes.filter((one) => one.dropped).length;
  const outcome = (one) => {
    if (one.trial === chosen) return resolved || card ? "chosen" : "best so far";
    return cards.get(one.trial)?.dropped ?? (one.dropped ? "dropped" : isGoing ? "in the race" : "");
  };
  return html`<section class="search" aria-labelledby="search-title">
    <header><h2 id="search-title">Search <span class="quiet" role="status">
      ${isGoing ? `round ${last.round}, ${last.tried} of ${last.trials} recipes` : `${count(recipes.length)} recipes`}${gone > 0 && `, ${gone} dropped`}</span></h2></header>
    <p class="sentence">${card?.sentence ? card.sentence.replaceAll("`", "") : html`${resolved ? "Chosen" : "Best so far"}: recipe ${best.trial},${" "}
      <b>${percent(best.accuracy)}</b> of the images held out (${percent(least)} to ${percent(most)}).`}</p>
    ${isGoing && html`<progress value=${last.tried} max=${last.trials}
      aria-label="Recipes tried in this round"></progress>`}
    <${Plot} events=${trials} chosen=${chosen} recipes=${recipes} />
    <details class="group" open=${isGoing}><summary>Recipes, one by one<span class="quiet">
      ${count(recipes.length)} tried</span></summary>
      <div class="scroll" tabindex="0"><table class="recipes"><thead><tr><th scope="col">recipe</th>
        <th scope="col">accuracy</th><th scope="col">loss</th><th scope="col">outcome</th></tr></thead>
        <tbody>${order.map((one) => html`<tr key=${one.trial}
          class=${one.trial === chosen ? "chosen" : one.dropped ? "dropped" : ""}>
          <th scope="row"><span class="quiet">${one.trial}
            </span> ${one.recipe ?? cards.get(one.trial)?.recipe.replaceAll("`", "") ?? ""}</th>
          <td>${percent(one.accuracy)}</td><td>${one.cross_entropy?.toFixed(3) ?? "–"}</td><td>${outcome(one)}</td>
            </tr>`)}</tbody></table></div>
    </details>
  </section>`;
}

/** Pictures by the names of their images, from the galleries of the version's report card. */
function usePictures(path, isWanted) {
  const [pictures, setPictures] = useState(null);
  useEffect(() => {
    if (!isWanted) return;
    galleryOf(path).then((images) => {
      const urls = new Map(images.map((image) => [image.name, image.url]));
      setPictures({ url: async (name) => urls.get(typeof name === "number" ? `image ${name}` : name) ?? null });
    }).catch(() => {}); // the names will do
  }, [path, isWanted]);
  return pictures;
}

function LabelErrors({ job, path, errors }) {
  const pictures = usePictures(path, errors.listed.length > 0), [excluded, setExcluded] = useState(new Set());
  const [state, setState] = useState({});
  const canRepeat = Boolean(job.dataset.kept);
  const again = async () => {
    try {
      const dataset = await get(`/datasets/${job.dataset.kept}`);
      change({ dataset, file: null, pictures, excluded, automatic: true, given: {}, model: job.model, label: job.label });
      location.hash = "#/finetune";
    } catch (error) {
      setState({ error });
    }
  };
  return html`<div class="labelerrors">
    <${Findings} title="Labels that are probably wrong" images=${errors.listed} pictures=${pictures}
      excluded=${excluded} onExclude=${canRepeat ? setExcluded : null}
      say=${(image) => html`labelled <b>${image.class}</b>, rather <b>${image.suggested}
        </b> (${percent(image.probability, 0)})`}
      note=${`By networks that had not seen them; about ${percent(errors.estimated_share)} of ${errors.checked} labels may be wrong.`} />
    ${canRepeat && excluded.size > 0 && html`<p>
      <button class="primary" onClick=${again}>Fine-tune again without ${excluded.size === 1 ? "it" : `these ${excluded.size}`}</button></p>`}
    ${state.error && html`<${Notice} kind="bad" title="The data set cannot be taken." error=${state.error} />`}
  </div>`;
}

export function Live({ job }) {
  const path = `/models/${job.model}/versions/${job.version}`;
  const { data, error } = useResource(path, job.report_status === "complete" ? 0 : 3000);
  const mayPredict = useMay("predict"), [given, setGiven] = useState(null);
  const report = data?.report, passed = given || job.gate?.passed !== false;
  const validation = report?.validation, robust = report?.robustness, errors = report?.inspection?.label_errors;
  if (error?.status === 404) return html`<${Notice} title=${`Version ${job.version} has been deleted since.`} />`;
  return html`<section class="live ${passed ? "" : "held"}" aria-labelledby="live-title">
    <div class="livehead"><span class="beacon" aria-hidden="true"></span><div>
      <h2 id="live-title">${job.model}:${job.version} is live</h2>
      <p>${passed ? html`It answers as <b>${given ?? job.label}</b>${validation && html`, and got <b>
        ${percent(validation.accuracy)}</b> of ${validation.images} images right that it had never seen`}.`
        : html`It answers when asked for by number; <b>${job.label}
          </b> does not lead to it, because it failed its gate.`}</p></div></div>
    <p class="actions">
      ${mayPredict && html`<a class="button primary"
        href=${passed ? `#/draw?model=${job.model}` : `#/draw?on=${job.model}:${job.version}`}>Draw with it</a>`}
      <a class="button" href="#/models/${job.model}/${job.version}">Report card</a>
      <a class="button" href="#/models/${job.model}">All versions</a></p>
    ${validation && html`<dl class="tiles">
      <div><dt>Accuracy</dt><dd><b>${percent(validation.accuracy)}
        </b> ${percent(validation.accuracy_interval[0])} to ${percent(validation.accuracy_interval[1])}</dd></div>
      ${report.base && html`<div><dt>The base, before</dt><dd><b>${percent(report.base.accuracy)}
        </b> on the same images</dd></div>`}
      ${robust && html`<div><dt>Under attack, ε = ${robust.epsilon}</dt><dd><b>${percent(robust.accuracy)}
        </b> ${robust.attack.toUpperCase()}</dd></div>`}
      ${report.calibration && html`<div><dt>Calibration error</dt><dd><b>
        ${percent(report.calibration.expected_calibration_error)}</b> confidence against accuracy</dd></div>`}
    </dl>`}
    ${!passed && html`<${GateRefusal} gate=${job.gate} label=${job.label}
      onOverride=${() => send("PUT", `/models/${job.model}/labels/${job.label}`, { version: job.version, override: true }).then(() => setGiven(job.label))} />`}
    ${report?.warnings?.length > 0 && html`<${Notice} kind="poor" title="Before you rely on it">
      ${report.warnings.length > 1 ? html`<ul>${report.warnings.map((one) => html`<li key=${one}>${one}</li>`)}
      </ul>` : report.warnings[0]}<//>`}
    ${errors?.listed.length > 0 && html`<${LabelErrors} job=${job} path=${path} errors=${errors} />`}
  </section>`;
}
