// How to train: a form made from the JSON schema of the spec, in which everything may stay automatic.

import { html, plural, useResource, useMemo } from "./parts.js";
import { change, current, specOf } from "./draft.js";
import { Field, Fields, fieldOf, grouped, withValue } from "./spec_fields.js";

/** Reasons by the path of their field, `l2` or `search.trials`, of an error of the API. */
export function reasonsOf(error) {
  const found = {};
  for (const { field, reason } of error?.details ?? []) if (field) found[field.replace(/^spec\./, "")] = reason;
  if (error?.param && !Object.keys(found).length) found[error.param.replace(/^spec\./, "")] = error.message;
  return found;
}

const covers = (name, path) => path === name || path.startsWith(`${name}.`);

/** `auto` has the names of fields that are searched unless they are given. */
export function SpecForm({ draft, auto, error }) {
  const { data } = useResource("/openapi.json");
  const schemas = data?.components.schemas, errors = useMemo(() => reasonsOf(error), [error]);
  const setMode = (automatic) => () => {
    const { search, ...given } = draft.given;
    change({ automatic, given });
  };
  // A few fields are "auto" by default without being searched.
  const searched = draft.automatic && schemas ? new Set([...auto].filter((name) => schemas.Spec.properties[name]?.default !== "auto")) : new Set();
  const form = { given: draft.given, auto: searched, errors, schemas, onValue: (path, value) => change({ given: withValue(current().given, path, value) }) };
  const spec = specOf(draft);
  const groups = schemas ? grouped(schemas.Spec).filter(([title]) => draft.automatic || title !== "Search") : [];
  return html`<div class="specform">
    <div class="modes" role="radiogroup" aria-label="How the recipe is found">
      ${[
        [true, "Find the best recipe", "Tries recipes on your images, scores each by images it has not seen, and trains the best of the simplest. What you fix below stays fixed."],
        [false, "Use my recipe", "Trains once, as the fields below say. Fields you leave empty have their defaults."],
      ].map(([automatic, title, text]) => html`<label key=${title} class="mode">
        <input type="radio" name="mode" checked=${draft.automatic === automatic} onChange=${setMode(automatic)} />
        <span><strong>${title}</strong><small>${text}</small></span></label>`)}
    </div>
    ${groups.map(([title, names]) => {
      const wrong = Object.keys(errors).filter((path) => names.some((name) => covers(name, path)));
      const given = names.filter((name) => draft.given[name] !== undefined);
      return html`<details key=${title} class="group" ref=${(node) => node && wrong.length && (node.open = true)}>
        <summary>${title}<span class="quiet">
          ${wrong.length ? plural(wrong.length, "problem") : given.length ? `${given.length} set` : names.some((name) => searched.has(name)) ? "automatic" : ""}</span></summary>
        <div class="fields">${names.map((name) => name === "search"
          ? html`<${Fields} key=${name} schema=${fieldOf(schemas.Spec.properties.search, schemas).schema}
            path=${["search"]} form=${form} />`
          : isShown(name, draft) && html`<${Field} key=${name} name=${name} path=${[name]}
            schema=${schemas.Spec.properties[name]} form=${form} />`)}
        </div></details>`;
    })}
    ${spec && Object.keys(spec).length > 0 && html`<details class="group">
      <summary>As JSON<span class="quiet">what will be sent</span></summary>
      <pre tabindex="0">${JSON.stringify(spec, null, 2)}</pre>
      <p><button class="plain" onClick=${() => change({ given: {} })}>Back to ${draft.automatic ? "automatic" : "the defaults"}</button></p></details>`}
  </div>`;
}

const OWNERS = { lora: "method", bias: "method", ia3: "method", adapter: "method", momentum: "optimizer", weight_decay: "optimizer" };
const CHOSEN = { momentum: "sgd", weight_decay: "adamw" };

/** Options of a method or an optimizer are shown with that one alone, as the gateway takes them with that one alone. */
function isShown(name, { given, automatic }) {
  const owner = OWNERS[name];
  if (!owner || given[name] !== undefined) return true;
  return (given[owner] ?? (owner === "method" && !automatic ? "lora" : null)) === (CHOSEN[name] ?? name);
}
