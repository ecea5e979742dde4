// What is in an upload: images of each class with a few of them, and what is worth a look before training.

import { count, html, plural, useEffect, useMemo, useState } from "./parts.js";

const SHOWN_CLASSES = 12, STRIP = 8, SHOWN = 24;
const inOrder = new Intl.Collator("en", { numeric: true }).compare;

export const nameOf = (image) => image.file ?? image.index;

/** A small picture of an upload; an empty frame where the page does not have it. */
export function Thumbnail({ pictures, name, alt = "", size = 40 }) {
  const [url, setUrl] = useState(null);
  useEffect(() => {
    let ended = false;
    setUrl(null);
    pictures?.url(name).then((found) => !ended && setUrl(found));
    return () => (ended = true);
  }, [pictures, name]);
  const style = { width: `${size}px`, height: `${size}px` };
  return url ? html`<img class="thumb" src=${url} alt=${alt} style=${style} />`
    : html`<span class="thumb" style=${style} aria-hidden="true"></span>`;
}

function Classes({ classes, pictures }) {
  const [all, setAll] = useState(false);
  const names = Object.keys(classes).sort(inOrder), most = Math.max(...Object.values(classes));
  const samples = useMemo(() => {
    const found = new Map();
    for (const name of pictures?.names ?? []) {
      const folders = [pictures.classOf(name), ...String(name).split("/")]; // a class may have folders of its own
      const its = folders.find((each) => Object.hasOwn(classes, each)), some = found.get(its) ?? [];
      if (some.length < STRIP) found.set(its, [...some, name]);
    }
    return found;
  }, [pictures]);
  return html`<ul class="classes" aria-label="Images of each class">
    ${(all ? names : names.slice(0, SHOWN_CLASSES)).map((name) => html`<li key=${name}>
      <span class="name" title=${name}>${name}</span>
      <span class="track" aria-hidden="true"><span style=${{ transform: `scaleX(${classes[name] / most})` }}></span></span>
      <span class="value">${count(classes[name])}</span>
      <span class="strip" aria-hidden="true">
        ${(samples.get(name) ?? []).map((each) => html`<${Thumbnail} key=${each} pictures=${pictures}
          name=${each} size=${28} />`)}
      </span>
    </li>`)}
  </ul>
  ${!all && names.length > SHOWN_CLASSES && html`<button class="plain" onClick=${() => setAll(true)}>
    Show all ${count(names.length)} classes</button>`}`;
}

/**
 * Images that are worth a look, each with a switch that leaves it out of the next fine-tune.
 *
 * `images` are as the gateway lists them, `say` says something of one, `suggested` are those that one would leave out.
 */
export function Findings({ title, note, images, say, suggested = images, pictures, excluded, onExclude }) {
  if (!images.length) return null;
  const toggle = (names, out) => {
    const next = new Set(excluded);
    for (const name of names) out ? next.add(name) : next.delete(name);
    onExclude(next);
  };
  const all = images.length === 1 ? "this one" : `all ${images.length}`;
  const which = suggested.length === images.length ? all : plural(suggested.length, "copy", "copies");
  const names = suggested.map(nameOf), allOut = names.every((name) => excluded.has(name));
  return html`<section class="findings">
    <header><h4>${title}</h4>
      ${onExclude && html`<button class="plain" onClick=${() => toggle(names, !allOut)}>
        ${allOut ? "Keep them" : `Leave out ${which}`}</button>`}
    </header>
    <p class="quiet">${note}</p>
    <ul class="thumbs">
      ${images.slice(0, SHOWN).map((image) => {
        const name = nameOf(image), out = excluded.has(name);
        const shown = html`<${Thumbnail} pictures=${pictures} name=${name} size=${56} />
          <span class="file" title=${name}>${typeof name === "number" ? `image ${name}` : name}</span><span>
            ${say(image)}</span>`;
        return html`<li key=${name}>${onExclude
          ? html`<button class="thumbcard" aria-pressed=${out} title=${out ? "Left out; keep it" : "Leave it out"}
              onClick=${() => toggle([name], !out)}>${shown}</button>`
          : html`<span class="thumbcard">${shown}</span>`}</li>`;
      })}
    </ul>
    ${images.length > SHOWN && html`<p class="quiet">and ${count(images.length - SHOWN)} more</p>`}
  </section>`;
}

/** The report of POST /datasets, and which images are to be left out. */
export function DatasetReport({ dataset, pictures, excluded, onExclude }) {
  const { report } = dataset;
  const several = (group) => new Set(group.map((image) => image.class)).size > 1;
  const groups = report.duplicate_groups ?? [];
  const conflicts = groups.filter(several).flat(), copies = groups.filter((group) => !several(group));
  const parts = [["to validate on", report.validation_images], ["to test on", report.test_images]].filter(([, images]) => images);
  const shared = { pictures, excluded, onExclude };
  const clean = !conflicts.length && !copies.length && !report.near_constant && !report.blank_after_alpha;
  const [width, height] = report.smallest, [wide, high] = report.largest;
  const sizes = report.sizes > 1 ? `${width}×${height} to ${wide}×${high}` : `${width}×${height}`;
  return html`<div class="dataset">
    <dl class="tiles">
      <div><dt>Images</dt><dd><b>${count(report.images)}
        </b> ${parts.map(([to, images]) => `${count(images)} ${to}`).join(", ") || "to train and measure on"}</dd></div>
      <div><dt>Classes</dt><dd><b>${count(Object.keys(report.classes).length)}</b> ${balance(report.classes)}</dd></div>
      <div><dt>Size</dt><dd><b>${sizes}</b> each becomes 28×28, grey</dd></div>
      <div><dt>Polarity</dt><dd><b class="words">${dataset.polarity.replaceAll("_", " ")}
        </b> decided from the borders</dd></div>
    </dl>
    <${Classes} classes=${report.classes} pictures=${pictures} />
    ${clean && html`<p class="clean">Every file could be read, no image is there twice, and none is empty.</p>`}
    <${Findings} ...${shared} title="The same picture in different classes" images=${conflicts}
      say=${(image) => image.class}
      note="Nobody can learn these: keep each picture in one class." />
    <${Findings} ...${shared} title="Copies" images=${copies.flat()} say=${(image) => image.class}
      suggested=${copies.flatMap((group) => group.slice(1))}
      note="Equal at 28×28 pixels. They are held out together, so they flatter no figure; more of the same teaches little." />
    <${Findings} ...${shared} title="Next to nothing on them" images=${report.near_constant_images ?? []}
      say=${(image) => image.class}
      note="Leave them out unless an empty image is what you mean." />
    <${Findings} ...${shared} title="Blank once their transparency is white"
      images=${report.blank_after_alpha_images ?? []} say=${(image) => image.class}
      note="What they show is white on a transparent ground." />
  </div>`;
}

function balance(classes) {
  const counts = Object.values(classes), [fewest, most] = [Math.min(...counts), Math.max(...counts)];
  return fewest === most ? `${plural(fewest, "image")} each` : `${count(fewest)} to ${plural(most, "image")} each`;
}
