// The fields of a spec, as the JSON schema in /openapi.json describes them, and a control for each kind. An empty control
// leaves its field out: it is searched, or has its default.

import { html, useRef, useState } from "./parts.js";

/** Groups in which fields are shown; a field that no group names is shown in the last one, so none is ever missing. */
export const GROUPS = [
  ["Search", ["search"]],
  ["What is trained", ["method", "lora", "bias", "ia3", "adapter", "head", "base"]],
  ["Regularization", ["l1", "l2", "l2_sp", "dropout", "label_smoothing", "mixup", "augmentation", "ema"]],
  ["Robustness", ["adversarial"]],
  ["Training", ["epochs", "learning_rate", "schedule", "optimizer", "momentum", "weight_decay", "batch_size", "min_steps", "class_weights", "early_stopping"]],
  ["Evaluation", ["validation_split", "folds", "calibrate", "coverage", "twin", "gate"]],
  ["Everything else", []],
];

/** [group, names of its fields] of a schema. */
export function grouped(schema) {
  const named = new Set(GROUPS.flatMap(([, names]) => names));
  const rest = Object.keys(schema.properties).filter((name) => !named.has(name));
  return GROUPS.map(([title, names]) => [title, names.length ? names.filter((name) => name in schema.properties) : rest]);
}

/**
 * A field's schema as {kind, …}: "number", "choice", "boolean", "several", "object", "variants", "text" or "json" (for
 * what has no control of its own); `nullable` if null switches it off.
 */
export function fieldOf(schema, schemas) {
  const options = (schema.anyOf ?? [schema]).filter((one) => one.type !== "null");
  const nullable = schema.anyOf?.some((one) => one.type === "null") ?? false;
  const described = { description: schema.description, default: schema.default, nullable };
  if (options.length !== 1) return { ...described, kind: "json" };
  const one = resolved(options[0], schemas);
  return { ...described, ...control(one, schemas) };
}

function control(one, schemas) {
  if (one.oneOf) {
    const variants = one.oneOf.map((each) => resolved(each, schemas));
    const tag = Object.keys(variants[0].properties).find((name) => variants.every((each) => each.properties[name]?.const));
    return { kind: "variants", tag, variants: Object.fromEntries(variants.map((each) => [each.properties[tag].const, each])) };
  }
  if (one.const !== undefined) return { kind: "choice", choices: [one.const] };
  if (one.enum) return { kind: "choice", choices: one.enum };
  if (one.type === "boolean") return { kind: "boolean" };
  if (one.type === "array" && one.items.enum) return { kind: "several", choices: one.items.enum };
  if (one.type === "object" && one.properties) return { kind: "object", schema: one };
  if (one.type === "number" || one.type === "integer") {
    const least = one.minimum ?? one.exclusiveMinimum, most = one.maximum ?? one.exclusiveMaximum;
    return { kind: "number", whole: one.type === "integer", least, most };
  }
  return { kind: one.type === "string" ? "text" : "json" };
}

const resolved = (schema, schemas) => (schema.$ref ? schemas[schema.$ref.split("/").at(-1)] : schema);

/** `given` with a value at a path; undefined takes it out, and objects that are empty then with it. */
export function withValue(given, [name, ...rest], value) {
  const inner = rest.length ? withValue(given?.[name] ?? {}, rest, value) : value;
  const { [name]: _, ...others } = given ?? {};
  return inner === undefined ? others : { ...others, [name]: inner };
}

const valueAt = (given, path) => path.reduce((inner, name) => inner?.[name], given);

const NAMES = { l1: "L1 (lasso)", l2: "L2 (ridge)", l2_sp: "L2-SP", ema: "EMA of the weights", lora: "LoRA", ia3: "IA³", mixup: "MixUp", twin: "Unregularized twin" };

function titleOf(name) {
  return NAMES[name] ?? name.replaceAll("_", " ").replace(/^./, (first) => first.toUpperCase());
}

const NONE = "not set";
const shown = (value) => (value === null || value === undefined ? NONE : Array.isArray(value) ? value.join(", ") : String(value).replaceAll("_", " "));
const OFF = "\u0000off", ON = "\u0000on"; // values of options that no field can have
let ids = 0;

/** An id for this use of a component. */
const useId = () => {
  const id = useRef(null);
  return (id.current ??= `field-${++ids}`);
};

/** One field: `form` is {given, onValue(path, value), auto (names that are searched), errors ({path: reason}), schemas, resolved}. */
export function Field({ name, path, schema, form }) {
  const id = useId(), field = fieldOf(schema, form.schemas), where = path.join(".");
  const value = valueAt(form.given, path), error = form.errors[where];
  const isSearched = path.length === 1 && form.auto.has(name);
  const fallback = isSearched ? "automatic" : shown(field.default);
  const set = (next) => form.onValue(path, next);
  const about = `${id}-about`, wrong = `${id}-wrong`;
  const shared = { id, field, value, fallback, set, described: error ? `${wrong} ${about}` : about, invalid: Boolean(error) };
  const nested = value && typeof value === "object" && !Array.isArray(value);
  return html`<div class="field ${error ? "wrong" : ""} ${value !== undefined ? "given" : ""}">
    <label for=${id}>${titleOf(name)}</label>
    <div class="control"><${Control} ...${shared} name=${name} /></div>
    ${error && html`<p class="error" id=${wrong}>${error}</p>`}
    <p class="quiet about" id=${about}>${field.description?.replaceAll("`", "").replace(/\bnull\b/, field.default == null ? NONE : "off")}</p>
    ${nested && field.kind === "object" && html`<${Fields} schema=${field.schema} path=${path} form=${form} />`}
    ${nested && field.kind === "variants" && html`<${Fields} schema=${field.variants[value[field.tag]]}
      path=${path} form=${form} without=${field.tag} />`}
  </div>`;
}

/** The fields of an object. */
export function Fields({ schema, path, form, without }) {
  return html`<div class="fields">
    ${Object.entries(schema.properties).filter(([name]) => name !== without).map(([name, inner]) =>
    html`<${Field} key=${name} name=${name} path=${[...path, name]} schema=${inner} form=${form} />`)}</div>`;
}

function Control({ field, ...rest }) {
  if (field.kind === "number") return html`<${NumberControl} field=${field} ...${rest} />`;
  if (field.kind === "several") return html`<${Several} field=${field} ...${rest} />`;
  if (field.kind === "text" || field.kind === "json") return html`<${Text} field=${field} ...${rest} />`;
  return html`<${Select} field=${field} ...${rest} />`;
}

/** Numbers are typed as text: what is no number yet stays as it is, and the gateway says what is wrong with it. */
function NumberControl({ id, field, value, fallback, set, described, invalid }) {
  const [typed, setTyped] = useState(null); // while the cursor is in it, so that "0." does not become "0"
  const type = (event) => {
    const text = event.target.value.trim(), number = Number(text.replace(",", "."));
    setTyped(event.target.value);
    set(text === "" ? undefined : field.nullable && text === "off" ? null : Number.isFinite(number) ? number : text);
  };
  const { least, most } = field, hint = least != null && most != null ? `${least} to ${most < 1e6 ? most : "2³¹"}` : "";
  return html`<input id=${id} inputmode="decimal" autocomplete="off"
    value=${typed ?? (value === null ? "off" : value ?? "")}
    placeholder=${fallback} aria-describedby=${described} aria-invalid=${invalid} onInput=${type}
    onBlur=${() => setTyped(null)} /><span class="quiet hint">${hint}</span>`;
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
  const isDefaultOff = field.nullable && fallback === NONE;
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
  return html`<span class="several" id=${id} role="group" aria-describedby=${described}>
    ${field.choices.map((choice) => html`<label key=${choice}>
    <input type="checkbox" checked=${chosen.includes(choice)} onChange=${() => toggle(choice)} />${shown(choice)}
      </label>`)}</span>`;
}

function Text({ id, field, value, fallback, set, described, invalid }) {
  const isJson = field.kind === "json";
  const [typed, setTyped] = useState(null);
  const type = (event) => {
    const text = event.target.value.trim();
    setTyped(event.target.value);
    let found = text || undefined;
    try {
      if (isJson && text) found = JSON.parse(text);
    } catch { /* not JSON yet; the gateway says so */ }
    set(found);
  };
  const text = value === undefined ? "" : isJson && typeof value !== "string" ? JSON.stringify(value) : value;
  return html`<input id=${id} autocomplete="off" spellcheck="false" value=${typed ?? text}
    placeholder=${isJson ? "JSON" : fallback}
    aria-describedby=${described} aria-invalid=${invalid} onInput=${type} onBlur=${() => setTyped(null)} />`;
}
