// Images on which two versions disagree: the telling ones of both report cards, answered by both versions.

import { Busy, Notice, Pixels, html, percent, plural, useEffect, useMay, useState } from "./parts.js";
import { send } from "./api.js";
import { pixelsAt } from "./pictures.js";
import { galleryOf } from "./report.js";

const MOST = 200;

async function answersOf(model, versions) {
  const galleries = await Promise.all(versions.map(({ version }) => galleryOf(`/models/${model}/versions/${version}`)));
  const images = [...new Map(galleries.flat().map((one) => [one.url, one])).values()].slice(0, MOST);
  if (!images.length) return { looked: 0, found: [] };
  const instances = await Promise.all(images.map(({ url }) => pixelsAt(url)));
  const answers = await Promise.all(versions.map(({ version }) => send("POST", "/predict", { model, version, range: "byte", instances })));
  const found = images.map((image, at) => ({ ...image, answers: answers.map((answer) => {
    const { label, probabilities } = answer.predictions[at];
    return { label, probability: Math.max(...probabilities) };
  }) })).filter(({ answers: [a, b] }) => a.label !== b.label);
  return { looked: images.length, found };
}

/** `versions` are two of GET /models/<name>. */
export function Disagreements({ model, versions }) {
  const [state, setState] = useState({}), may = useMay("predict");
  useEffect(() => {
    let ended = false;
    if (may) answersOf(model, versions).then((found) => !ended && setState({ found }), (error) => !ended && setState({ error }));
    return () => (ended = true);
  }, []);
  if (!may) return null;
  const { found, error } = state;
  return html`<section class="disagree" aria-labelledby="disagree-title"><h3 id="disagree-title">Where they disagree</h3>
    ${error ? html`<${Notice} kind="bad" title="They could not be asked." error=${error} />` : !found ? html`<${Busy} label="Asking both" />`
      : html`<p class="quiet">${found.looked === 0 ? "Their report cards show no images to ask them about." : `Of the ${plural(found.looked, "image")} that their report cards show, they answer ${found.found.length ? `${found.found.length} differently` : "all alike"}.`}</p>
        <ul class="thumbs">${found.found.map((one) => html`<li key=${one.url}><span class="thumbcard"><${Pixels} image=${one.url} alt="" size=${56} />
          <span class="file" title=${one.name}>${one.name}</span>
          ${one.answers.map((answer, at) => html`<span key=${at}><span class="quiet">${versions[at].version}:</span> <b>${answer.label}</b> ${percent(answer.probability, 0)}</span>`)}</span></li>`)}</ul>`}
  </section>`;
}
