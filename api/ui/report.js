// The report card of a version inside the page: the gateway's own HTML, without its style sheet, which the page has.

import { Busy, Notice, html, useEffect, useLayoutEffect, useRef, useResource, useState } from "./parts.js";
import { download, text } from "./api.js";

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
  return html`<header class="viewhead"><div><p class="crumbs"><a href="#/models">Models</a> <a href="#/models/${model}">${model}</a></p>
      <h1>${model}:${version}</h1></div>
      <p class="headactions"><button onClick=${() => print()}>Print</button><button onClick=${save} disabled=${!data}>Download</button></p></header>
    ${(error ?? failure) && html`<${Notice} kind="bad" title="The report card cannot be shown." error=${error ?? failure} />`}
    ${!data && !error && html`<${Busy} label="Drawing the report card" />`}
    <article class="report" ref=${place}></article>`;
}
