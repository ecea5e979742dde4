// Draw: a picture on the left, the answers of up to four versions on the right, the reasons below.

import { get } from "./api.js";
import { AddTarget, Answer, MOST, nameOf, parse, useAnswers } from "./answers.js";
import { Correct, Explain } from "./explain.js";
import { Pad, demonstrate } from "./pad.js";
import { BASE, Busy, Notice, Pixels, html, useEffect, useMay, useRef, useResource, useState } from "./parts.js";
import { seen } from "./strokes.js";

const exists = (models, target) => {
  const { model, version, label } = parse(target) ?? {};
  const found = models.find((each) => each.name === model);
  return found && (label ? Object.hasOwn(found.labels, label) : found.versions.includes(version));
};

/** What to ask without being told: the first model of the user's own, or else the base. */
function usual(models, wanted) {
  const first = models.find((each) => each.name === wanted) ?? models.find((each) => each.name !== BASE) ?? models[0];
  if (!first) return [];
  return [first.labels.stable ? `${first.name}@stable` : `${first.name}:${first.versions[0]}`];
}

/** The targets, which the address remembers: #/draw?on=digits@stable,digits:3. #/draw?model=digits takes its usual one. */
function useTargets(query, models) {
  const [chosen, setChosen] = useState(() => (query.get("on") ?? "").split(",").filter((each) => /.[:@]./.test(each)).slice(0, MOST));
  const wanted = query.get("on");
  useEffect(() => wanted && setChosen(wanted.split(",").filter((each) => /.[:@]./.test(each)).slice(0, MOST)), [wanted]);
  const valid = chosen.filter((each) => exists(models, each));
  const choose = (targets) => {
    const unique = [...new Set(targets)];
    setChosen(unique);
    history.replaceState(null, "", `#/draw?on=${unique.join(",")}`);
  };
  const model = query.get("model"), own = useRef({}); // what was taken without being told stays, whatever comes
  if (own.current.model !== model || !own.current.targets.length || !own.current.targets.every((each) => exists(models, each))) {
    own.current = { model, targets: usual(models, model) };
  }
  return [valid.length ? valid : own.current.targets, choose];
}

/** Take images that are dropped or pasted anywhere on the page. */
function useBrought(onFile) {
  const [over, setOver] = useState(false);
  const take = useRef(onFile);
  take.current = onFile;
  useEffect(() => {
    const first = (files) => [...(files ?? [])].find((file) => file.type.startsWith("image/"));
    const dragged = (event) => event.dataTransfer?.types.includes("Files") && (event.preventDefault(), setOver(true));
    const left = (event) => event.relatedTarget || setOver(false);
    const dropped = (event) => (event.preventDefault(), setOver(false), take.current(first(event.dataTransfer.files)));
    const pasted = (event) => first(event.clipboardData?.files) && take.current(first(event.clipboardData.files));
    const handlers = { dragover: dragged, dragleave: left, drop: dropped, paste: pasted };
    for (const [name, handler] of Object.entries(handlers)) addEventListener(name, handler);
    return () => Object.entries(handlers).forEach(([name, handler]) => removeEventListener(name, handler));
  }, []);
  return over;
}

/** The picture in 28×28 pixels. */
function Seen({ picture }) {
  return html`<${Pixels} image=${picture && (picture.url ?? seen(picture))} size=${84} className="network" alt="The picture at 28 by 28 pixels" />`;
}

/** The models by name, up to a thousand. */
async function listed(path, options) {
  for (const data = []; ;) {
    const page = await get(`${path}&after=${data.at(-1)?.name ?? ""}`, options);
    data.push(...page.data);
    if (!page.has_more || data.length >= 1000) return { data };
  }
}

export default function Draw({ query }) {
  const { data, error, loading } = useResource("/models?limit=100", 5000, listed);
  const models = data?.data ?? [];
  const [targets, setTargets] = useTargets(query, models);
  const [picture, setPicture] = useState(null);
  const [problem, setProblem] = useState(null);
  const stop = useRef(() => {});
  const answers = useAnswers(picture, targets, models);
  const mayTrain = useMay("finetune");

  const show = (next) => {
    stop.current(); // of a demonstration, when the user takes over
    setProblem(null);
    setPicture((old) => (old?.url && URL.revokeObjectURL(old.url), next));
  };
  const bring = (file) => /^image\/(png|jpeg|webp|bmp)$/.test(file?.type)
    ? show({ file, url: URL.createObjectURL(file), final: true, at: performance.now() })
    : setProblem("That is not an image. PNG, JPEG, WebP and BMP work.");
  const over = useBrought(bring);
  const undo = () => show(picture?.strokes?.length > 1 ? { strokes: picture.strokes.slice(0, -1), final: true, at: performance.now() } : null);
  const watch = () => (show(null), (stop.current = demonstrate(setPicture)));
  useEffect(() => {
    const pressed = (event) => event.key === "z" && (event.ctrlKey || event.metaKey) && !event.target.closest("input, textarea")
      && (event.preventDefault(), undo());
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  });

  if (loading) return html`<${Busy} label="Looking for models" />`;
  if (error && !data) return html`<${Notice} kind="bad" title="No list of models." error=${error} />`;
  if (!targets.length) return html`<${Notice} title="No model yet." ><span>The base model appears here a moment after the first worker has started.</span><//>`;

  const classes = models.find((each) => each.name === parse(targets[0]).model)?.classes ?? [];
  const hint = classes.every((name) => /^\d$/.test(name)) ? "Draw a digit" : "Draw something";
  const answerOf = (target) => (answers[target]?.at === picture?.at ? answers[target]?.answer : null); // to this picture, no earlier one
  const spoken = targets.map((target) => answerOf(target) && `${nameOf(target)} says ${answerOf(target).predictions[0].label}`).filter(Boolean);
  return html`<h1 class="sr-only">Draw</h1><div class="draw ${over ? "over" : ""}">
    <section class="desk" aria-label="Picture">
      <${Pad} picture=${picture} onPicture=${show} hint=${hint} />
      <div class="tools">
        <button onClick=${() => show(null)} disabled=${!picture}>Clear</button>
        <button onClick=${undo} disabled=${!picture?.strokes}>Undo</button>
        <label class="button file"><span>Open<span class="wide-only"> image</span></span><input type="file" class="sr-only" accept="image/png,image/jpeg,image/webp,image/bmp"
          onChange=${(event) => event.target.files[0] && (bring(event.target.files[0]), (event.target.value = ""))} /></label>
        <button class="plain" onClick=${watch}>Show me</button>
      </div>
      ${problem && html`<${Notice} kind="poor">${problem}<//>`}
    </section>
    <div class="seen"><${Seen} picture=${picture} />
      <p class="quiet">What the network sees: 28×28 pixels of grey. Whatever you bring is scaled to that.</p></div>
    <section class="answers" aria-label="Answers">
      <div class="grid count-${targets.length}">
        ${targets.map((target, at) => html`<${Answer} key=${target} target=${target} found=${answers[target]} models=${models}
          onChange=${(value) => setTargets(targets.with(at, value))}
          onRemove=${targets.length > 1 ? () => setTargets(targets.filter((each) => each !== target)) : null}>
          ${mayTrain && html`<${Correct} target=${target} picture=${picture} answer=${answerOf(target)} models=${models} />`}
        <//>`)}
      </div>
      ${targets.length < MOST && html`<${AddTarget} models=${models} onAdd=${(value) => setTargets([...targets, value])} />`}
      <p class="sr-only" role="status">${picture?.final ? spoken.join(", ") : ""}</p>
    </section>
  </div>
  <${Explain} picture=${picture} targets=${targets} models=${models} hold=${targets.some((each) => answers[each]?.error?.status >= 500)} />`;
}
