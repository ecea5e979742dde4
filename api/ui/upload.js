// Labelled images: a folder, a zip or an npz, by drag and drop or by a button; or a data set that is kept already. And the
// fine-tune that is prepared with them. It lives in this module, so that a look at another view loses nothing.

import { Busy, Notice, ago, count, html, plural, useEffect, useResource, useRef, useState } from "./parts.js";
import { upload } from "./api.js";
import { entriesOf, isIgnored, picturesOf, writeZip } from "./archive.js";

const EMPTY = { file: null, pictures: null, dataset: null, excluded: new Set(), automatic: true, given: {}, model: "", label: "stable" };
let draft = EMPTY;
const listeners = new Set();

/** The draft as it is now, which a component may not have drawn yet. */
export const current = () => draft;

/** Change some fields. */
export function change(fields) {
  draft = { ...draft, ...fields };
  for (const listener of [...listeners]) listener(draft);
}

export const reset = () => change(EMPTY);

export function useDraft() {
  const [found, setFound] = useState(draft);
  useEffect(() => (listeners.add(setFound), setFound(draft), () => listeners.delete(setFound)), []);
  return found;
}

/** What the user has asked for, as POST /finetune takes it; null if everything is left to the search. */
export function specOf({ automatic, given }) {
  const { search = {}, ...fields } = given;
  if (automatic) return Object.keys(fields).length || Object.keys(search).length ? { ...fields, search } : null;
  return fields;
}

/** The form of POST /finetune. */
export function formOf(wanted, extra = {}) {
  const form = new FormData();
  const { dataset, excluded, model, label } = wanted, spec = specOf(wanted);
  const fields = { model, dataset: dataset.id, ...(label !== "stable" && { label }), ...(spec && { spec: JSON.stringify(spec) }) };
  if (excluded.size) fields.exclude = JSON.stringify([...excluded]);
  for (const [name, value] of Object.entries({ ...fields, ...extra })) form.set(name, value);
  return form;
}

const LISTED = 50; // files of an error that are shown
const ARCHIVE = /\.(zip|npz)$/i;

/** The file to upload for what was dropped: a zip or npz as it is, folders as a zip. */
async function fileOfDrop(transfer) {
  const items = [...transfer.items].filter((item) => item.kind === "file");
  const roots = items.map((item) => item.webkitGetAsEntry?.()).filter(Boolean); // only until the handler ends
  if (!roots.some((entry) => entry.isDirectory)) return fileOfChoice([...transfer.files]);
  const files = [];
  for (const root of roots) await walk(root, "", files);
  return packed(files);
}

/** Likewise for what was chosen: files of an <input>, perhaps of a whole folder. */
async function fileOfChoice(files) {
  if (files.length === 1 && ARCHIVE.test(files[0].name)) return files[0];
  if (files.length === 1 && !files[0].webkitRelativePath) {
    throw new Error(`${files[0].name} is neither a folder nor a zip nor an .npz.`);
  }
  return packed(files.map((file) => ({ name: file.webkitRelativePath || file.name, file })));
}

async function walk(entry, path, files) {
  const name = path + entry.name;
  if (entry.isFile) {
    files.push({ name, file: await new Promise((resolve, reject) => entry.file(resolve, reject)) });
    return;
  }
  const reader = entry.createReader();
  for (;;) { // a reader gives at most 100 entries at a time
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return;
    for (const inner of some) await walk(inner, `${name}/`, files);
  }
}

async function packed(all) {
  let files = all.filter(({ name }) => !isIgnored(name));
  if (!files.length) throw new Error("There are no files in this folder.");
  const [top] = files[0].name.split("/");
  const deep = files.every(({ name }) => name.startsWith(`${top}/`) && name.split("/").length > 2);
  if (deep) files = files.map(({ name, file }) => ({ name: name.slice(top.length + 1), file })); // its folders are the classes
  const zip = await writeZip(entriesOf(files.sort((a, b) => (a.name < b.name ? -1 : 1))));
  return new File([zip], `${deep ? top : "images"}.zip`, { type: "application/zip" });
}

/** A model's name after a file's. */
const modelOf = (name) => name.replace(/\.\w+$/, "").toLowerCase().replace(/[^a-z0-9._-]+/g, "-").replace(/^[^a-z0-9]+/, "").slice(0, 64) || "model";

/** Send a file and take what the gateway says of it into the draft. */
async function send(file, pictures, onProgress, signal) {
  const form = new FormData();
  form.set("data", file, file.name);
  const dataset = await upload("/datasets", form, onProgress, signal);
  change({ file, pictures, dataset, excluded: new Set(), model: modelOf(file.name) });
}

function Refusal({ error, pictures, onWithout }) {
  const { details } = error, bad = new Set(details.map((each) => each.file));
  const rest = pictures?.entries?.filter(({ name }) => !bad.has(name) && !isIgnored(name));
  const areFiles = details.every((each) => each.file);
  const canLeaveOut = rest?.length > 0 && details.length > 0 && details.every((each) => each.file && !each.file.endsWith("/"));
  return html`<div class="notice bad refusal" role="alert">
    <strong>${details.length ? areFiles ? `${plural(details.length, "file")} cannot be used` : error.message : "This upload cannot be used"}</strong>
    ${details.length ? html`<table><tbody>${details.slice(0, LISTED).map((each) => html`<tr key=${each.file ?? each.class ?? each.index}>
        <th scope="row">${each.file ?? each.class ?? (each.index == null ? each.field : `image ${each.index}`)}</th><td>${each.reason}</td>
          </tr>`)}</tbody></table>`
      : html`<p>${error.message}</p>`}
    ${details.length > LISTED && html`<p>and ${count(details.length - LISTED)} more</p>`}
    ${canLeaveOut && html`<p><button class="primary" onClick=${() => onWithout(rest)}>
      Leave ${details.length === 1 ? "it" : "them"} out and go on with ${plural(rest.length, "file")}</button></p>`}
  </div>`;
}

/** The place to drop images on. */
export function Upload() {
  const [state, setState] = useState({}); // {busy, share, error, file, pictures}
  const [over, setOver] = useState(false);
  const depth = useRef(0), files = useRef(null), folder = useRef(null), aborting = useRef(null);

  const take = async (getting) => {
    aborting.current?.abort();
    const { signal } = (aborting.current = new AbortController());
    const show = (next) => signal.aborted || setState(next); // cancelled, or something newer was brought
    let file = null, pictures = null;
    show({ busy: "Reading", share: 0 });
    try {
      file = await getting();
      pictures = await picturesOf(file);
      show({ busy: `Sending ${file.name}`, share: 0 });
      const onProgress = (share) => show({ busy: share < 1 ? `Sending ${file.name}` : `Looking at ${file.name}`, share });
      await send(file, pictures, onProgress, signal);
    } catch (error) {
      show({ error: { details: [], ...error, message: error.message }, file, pictures });
    }
  };
  const drop = (event) => {
    event.preventDefault();
    depth.current = 0;
    setOver(false);
    const { dataTransfer } = event;
    take(() => fileOfDrop(dataTransfer));
  };
  const enter = (by) => (event) => (event.preventDefault(), (depth.current += by), setOver(depth.current > 0)); // children also fire
  const choose = (input) => (event) => {
    const chosen = [...event.target.files];
    if (chosen.length) take(() => fileOfChoice(chosen));
    input.current.value = ""; // so that the same file can be chosen again
  };
  const without = (entries) => take(async () => new File([await writeZip(entries)], state.file.name));

  return html`<section class="dropzone ${over ? "over" : ""}" aria-labelledby="drop-title"
    onDragEnter=${enter(1)} onDragLeave=${enter(-1)}
      onDragOver=${(event) => event.preventDefault()} onDrop=${drop}>
    ${state.busy ? html`<div class="sending"><${Busy} label=${state.busy} />
        <progress value=${state.share} max="1" aria-label="Sent"></progress>
        <button class="plain" onClick=${() => (aborting.current.abort(), setState({}))}>Cancel</button></div>`
      : html`<div class="invite">
        <span class="stack" aria-hidden="true"><i></i><i></i><i></i></span>
        <h2 id="drop-title">Drop your images here</h2>
        <p class="quiet">A folder or a zip with one folder per class, as in <code>seven/a.png</code>,<br />
          or an <code>.npz</code> of <code>images</code> and <code>labels</code>. A few hundred images are plenty.</p>
        <p class="actions"><button class="primary" onClick=${() => folder.current.click()}>Choose a folder</button>
          <button onClick=${() => files.current.click()}>Choose a zip or npz</button></p>
      </div>`}
    <input ref=${folder} class="hidden" type="file" webkitdirectory multiple tabindex="-1" aria-hidden="true"
      onChange=${choose(folder)} />
    <input ref=${files} class="hidden" type="file" accept=".zip,.npz" tabindex="-1" aria-hidden="true"
      onChange=${choose(files)} />
  </section>
  ${state.error && html`<${Refusal} error=${state.error} pictures=${state.pictures} onWithout=${without} />`}`;
}

/** Data sets that are kept, to fine-tune on again. */
export function Kept() {
  const { data, error } = useResource("/datasets?limit=6");
  if (error) return html`<${Notice} kind="bad" title="The data sets cannot be listed." error=${error} />`;
  if (!data?.data.length) return null;
  const take = (dataset) => change({
    dataset, file: null, pictures: null, excluded: new Set(), model: modelOf(dataset.filename),
  });
  return html`<section aria-labelledby="kept-title"><h2 id="kept-title">Your data sets</h2>
    <ul class="cards">${data.data.map((dataset) => html`<li key=${dataset.id}>
      <button class="card" onClick=${() => take(dataset)}>
      <strong>${dataset.filename || "data set"}</strong>
      <span class="quiet">${plural(dataset.report.images, "image")} of ${plural(Object.keys(dataset.report.classes).length, "class", "classes")}, ${ago(dataset.created_at)}</span>
    </button></li>`)}</ul>
  </section>`;
}
