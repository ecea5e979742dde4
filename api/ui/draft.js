// The fine-tune that is being prepared. It lives in this module, so that a look at another view loses nothing.

import { useEffect, useState } from "./parts.js";

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
