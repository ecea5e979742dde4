// The report card of a version inside the page: the gateway's own HTML, without its style sheet, which the page has; and
// the images that two of them show, on which their versions disagree, and the key figures of one.

import { Busy, Notice, Pixels, html, percent, plural, useEffect, useLayoutEffect, useMay, useRef, useResource, useState } from "./parts.js";
import { download, send, text } from "./api.js";
import { pixelsAt } from "./archive.js";
import { Interval, Spark } from "./curves.js";

const LINK = /^\/models\/([^/]+)\/versions\/(\d+)\/report$/;
const load = (path, options) => text(path, "text/html", options);

/** The body of a report page without its style sheet, which the policy of this page would refuse. */
const bodyOf = (page) => new DOMParser().parseFromString(page.replace(/<style>[\s\S]*?<\/style>/, ""), "text/html").body;

/** The pictures that the report card of a version shows: [{name, url}], where the images are still there. */
export async function galleryOf(path) {
  const items = bodyOf(await load(`${path}/report`)).querySelectorAll(".gallery li");
  const images = [...items].map((item) => ({ name: item.querySelector("span")?.textContent, url: item.querySelector("img")?.getAttribute("src") }));
  return images.filter(({ url }) => url);
}

/** What a report page shows, as elements of this document; links lead to places in this page. */
function elementsOf(page) {
  const body = bodyOf(page);
  for (const link of body.querySelectorAll("a[href]")) {
    const [, model, version] = LINK.exec(link.getAttribute("href")) ?? [];
    if (model) link.setAttribute("href", `#/models/${model}/${version}`);
  }
  for (const wide of body.querySelectorAll("pre")) wide.tabIndex = 0; // it scrolls, also by keyboard
  body.querySelector("h1")?.remove(); // the page has it above
  return [...body.childNodes].map((node) => document.adoptNode(node));
}

export function Report({ model, version }) {
  const path = `/models/${model}/versions/${version}/report`;
  const { data, error } = useResource(path, 0, load);
  const place = useRef(null), [failure, setFailure] = useState(null);
  useLayoutEffect(() => {
    if (data) place.current.replaceChildren(...elementsOf(data));
  }, [data]);
  useEffect(() => {
    const open = () => place.current?.querySelectorAll("details").forEach((one) => (one.open = true)); // paper cannot be unfolded
    addEventListener("beforeprint", open);
    return () => removeEventListener("beforeprint", open);
  }, []);
  const save = () => download(path, `${model}-${version}-report.html`, "text/html").catch(setFailure);
  return html`<header class="viewhead"><div><p class="crumbs">
    <a href="#/models">Models</a> <a href="#/models/${model}">${model}</a></p>
      <h1>${model}:${version}</h1></div>
      <p class="headactions"><button onClick=${() => print()}>Print</button>
        <button onClick=${save} disabled=${!data}>Download</button></p></header>
    ${(error ?? failure) && html`<${Notice} kind="bad" title="The report card cannot be shown."
      error=${error ?? failure} />`}
    ${!data && !error && html`<${Busy} label="Drawing the report card" />`}
    <article class="report" ref=${place}></article>`;
}

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
    ${error ? html`<${Notice} kind="bad" title="They could not be asked."
      error=${error} />` : !found ? html`<${Busy} label="Asking both" />`
      : html`<p class="quiet">${found.looked === 0 ? "Their report cards show no images to ask them about."
          : `Of the ${plural(found.looked, "image")} that their report cards show, they answer ${found.found.length || "none"} differently.`}</p>
        <ul class="thumbs">${found.found.map((one) => html`<li key=${one.url}><span class="thumbcard">
          <${Pixels} image=${one.url} alt="" size=${56} />
          <span class="file" title=${one.name}>${one.name}</span>
          ${one.answers.map((answer, at) => html`<span key=${at}><span class="quiet">
            ${versions[at].version}:</span> <b>${answer.label}</b> ${percent(answer.probability, 0)}</span>`)}</span>
            </li>`)}</ul>`}
  </section>`;
}

/** On held-out images; of the base, which has another card, on its own test. */
export const accuracyOf = ({ report }) => report.validation?.accuracy ?? report.test_accuracy;

/** What a sparkline of the training shows: accuracy if it was measured by epoch, else the loss. */
function historyOf({ history }) {
  const accuracy = history?.map((one) => one.validation_accuracy).filter((one) => one != null) ?? [];
  if (accuracy.length > 1) return ["Validation accuracy by epoch", accuracy];
  return ["Loss by epoch", history?.map((one) => one.data_loss).filter((one) => one != null) ?? []];
}

const Figure = ({ title, children }) => html`<div class="figure"><dt>${title}</dt><dd>${children}</dd></div>`;

/** The key figures of a report card in a line; `low` is where axes of accuracy begin. */
export function Figures({ report, low }) {
  const score = report.validation ?? report.test, robust = report.robustness, calibration = report.calibration;
  const [told, values] = historyOf(report);
  const plain = report.test_accuracy ?? report.accuracy;
  return html`<dl class="figures">
    ${score && html`<${Figure} title="Accuracy"><b>${percent(score.accuracy)}
      </b> <${Interval} value=${score.accuracy} interval=${score.accuracy_interval} low=${low} width=${90} /><//>`}
    ${!score && typeof plain === "number" && html`<${Figure} title="Accuracy"><b>${percent(plain)}</b><//>`}
    ${robust && html`<${Figure} title=${`Under attack, ε ${robust.epsilon}`}><b>${percent(robust.accuracy)}</b><//>`}
    ${calibration && html`<${Figure}
      title="Calibration error"><b>${percent(calibration.expected_calibration_error)}</b><//>`}
    ${values.length > 1 && html`<${Figure} title="Training"><${Spark} values=${values} label=${told} /><//>`}
  </dl>`;
}
