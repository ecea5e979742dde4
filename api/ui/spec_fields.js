// A control for each kind of field. An empty control leaves the field out: it is searched, or has its default.

import { html, useRef, useState } from "./parts.js";
import { fieldOf, titleOf, valueAt, withValue } from "./spec_schema.js";

const shown = (value) => (value === null || value === undefined ? "off" : Array.isArray(value) ? value.join(", ") : String(value).replaceAll("_", " "));
const OFF = "\u0000off", ON = "\u0000on"; // values of options that no field can have
let ids = 0;

/** An id for this use of a component. */
const useId = () => {
  const id = useRef(null);
  return (id.current ??= `field-${++ids}`);
};

/** One field: `form` is {given, onGiven, auto (names that are searched), errors ({path: reason}), schemas, resolved}. */
export function Field({ name, path, schema, form }) {
  const id = useId(), field = fieldOf(schema, form.schemas), where = path.join(".");
  const value = valueAt(form.given, path), error = form.errors[where];
  const isSearched = path.length === 1 && form.auto.has(name);
  const fallback = isSearched ? "automatic" : shown(field.default);
  const set = (next) => form.onGiven(withValue(form.given, path, next));
  const about = `${id}-about`, wrong = `${id}-wrong`;
  const shared = { id, field, value, fallback, set, described: error ? `${wrong} ${about}` : about, invalid: Boolean(error) };
  const nested = value && typeof value === "object" && !Array.isArray(value);
  return html`<div class="field ${error ? "wrong" : ""} ${value !== undefined ? "given" : ""}">
    <label for=${id}>${titleOf(name)}</label>
    <div class="control"><${Control} ...${shared} name=${name} /></div>
    ${error && html`<p class="error" id=${wrong}>${error}</p>`}
    <p class="quiet about" id=${about}>${field.description?.replaceAll("`", "")}</p>
    ${nested && field.kind === "object" && html`<${Fields} schema=${field.schema} path=${path} form=${form} />`}
    ${nested && field.kind === "variants" && html`<${Fields} schema=${field.variants[value[field.tag]]} path=${path} form=${form} without=${field.tag} />`}
  </div>`;
}

/** The fields of an object. */
export function Fields({ schema, path, form, without }) {
  return html`<div class="fields">${Object.entries(schema.properties).filter(([name]) => name !== without).map(([name, inner]) =>
    html`<${Field} key=${name} name=${name} path=${[...path, name]} schema=${inner} form=${form} />`)}</div>`;
}

function Control({ field, ...rest }) {
  if (field.kind === "number") return html`<${NumberControl} field=${field} ...${rest} />`;
  if (field.kind === "several") return html`<${Several} field=${field} ...${rest} />`;
  if (field.kind === "text" || field.kind === "json") return html`<${Text} field=${field} ...${rest} />`;
  return html`<${Select} field=${field} ...${rest} />`;
}

/** Numbers are typed as text, so that 1e-4 and what is not a number yet stay as they are; the gateway says what is wrong. */
function NumberControl({ id, field, value, fallback, set, described, invalid }) {
  const type = (event) => {
    const text = event.target.value.trim(), number = Number(text.replace(",", "."));
    set(text === "" ? undefined : field.nullable && text === "off" ? null : Number.isFinite(number) ? number : text);
  };
  const [least, most] = [field.least, field.most].map((bound) => bound ?? null);
  const hint = least !== null && most !== null ? `${least} to ${most < 1e6 ? most : "2³¹"}` : "";
  return html`<input id=${id} inputmode="decimal" autocomplete="off" value=${value === null ? "off" : value ?? ""} placeholder=${fallback}
    aria-describedby=${described} aria-invalid=${invalid} onChange=${type} /><span class="quiet hint">${hint}</span>`;
}

function Select({ id, field, value, fallback, set, described, invalid }) {
  const nests = field.kind === "object" || field.kind === "variants";
  const choices = field.kind === "boolean" ? [true, false] : field.kind === "object" ? [ON] : field.choices ?? Object.keys(field.variants);
  const text = (choice) => (choice === ON ? "on" : field.kind === "boolean" ? (choice ? "yes" : "no") : shown(choice));
  const current = value === undefined ? "" : value === null ? OFF : field.kind === "object" ? ON : String(field.tag ? value[field.tag] : value);
  const pick = (event) => {
    const picked = event.target.value, choice = choices.find((each) => String(each) === picked);
    if (picked === "") return set(undefined);
    if (picked === OFF) return set(null);
    return set(!nests ? choice : field.tag ? { [field.tag]: picked } : {});
  };
  const isDefaultOff = field.nullable && fallback === "off";
  return html`<select id=${id} value=${current} aria-describedby=${described} aria-invalid=${invalid} onChange=${pick}>
    <option value="">${fallback === "automatic" ? "automatic" : field.kind === "boolean" ? `${field.default ? "yes" : "no"} (default)` : `${fallback} (default)`}</option>
    ${field.nullable && !isDefaultOff && html`<option value=${OFF}>off</option>`}
    ${choices.map((choice) => html`<option key=${choice} value=${String(choice)}>${text(choice)}</option>`)}
  </select>`;
}

function Several({ id, field, value, set, described }) {
  const chosen = value ?? field.default ?? [];
  const toggle = (choice) => {
    const next = field.choices.filter((each) => (each === choice ? !chosen.includes(each) : chosen.includes(each)));
    set(JSON.stringify(next) === JSON.stringify(field.default) ? undefined : next);
  };
  return html`<span class="several" id=${id} role="group" aria-describedby=${described}>${field.choices.map((choice) => html`<label key=${choice}>
    <input type="checkbox" checked=${chosen.includes(choice)} onChange=${() => toggle(choice)} />${shown(choice)}</label>`)}</span>`;
}

function Text({ id, field, value, fallback, set, described, invalid }) {
  const isJson = field.kind === "json";
  const [typed, setTyped] = useState(null); // what is not JSON yet
  const type = (event) => {
    const text = event.target.value.trim();
    setTyped(null);
    if (!text || !isJson) return set(text || undefined);
    try {
      return set(JSON.parse(text));
    } catch {
      setTyped(text);
      return set(text);
    }
  };
  const text = typed ?? (value === undefined ? "" : isJson && typeof value !== "string" ? JSON.stringify(value) : value);
  return html`<input id=${id} autocomplete="off" spellcheck="false" value=${text} placeholder=${isJson ? "JSON" : fallback}
    aria-describedby=${described} aria-invalid=${invalid} onChange=${type} />`;
}
