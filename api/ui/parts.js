// Small components, hooks and number formats that several views share.

import { createContext, html, useCallback, useContext, useEffect, useLayoutEffect, useRef, useState } from "./vendor/htm-preact.js";
import { get, isReachable, onReachable } from "./api.js";

export * from "./vendor/htm-preact.js";

/** What GET /key has said: {required, name, tenant, scopes}. */
export const Session = createContext({ required: false, name: null, tenant: "default", scopes: [] });

/** Whether the key may do this: "predict", "finetune" or "admin". */
export const useMay = (scope) => useContext(Session).scopes.includes(scope);

/** The base model: everyone's, so it is not deleted; its images are not here, so it learns from no corrections. */
export const BASE = "lenet5";

// ---- numbers

export const percent = (share, digits = 1) => (share == null ? "–" : `${(100 * share).toFixed(digits)}%`);
export const count = (number) => (number == null ? "–" : number.toLocaleString("en"));
export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

/** Seconds, in three significant digits and the unit that suits them. */
export function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return "–";
  if (seconds < 1) return `${seconds < 0.01 ? (1000 * seconds).toPrecision(seconds < 0.001 ? 1 : 2).replace(/\.0$/, "") : Math.round(1000 * seconds)} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

/** Unix seconds as words: "just now", "5 min ago". */
export function ago(at, now = Date.now() / 1000) {
  const passed = now - at;
  if (passed < 5) return "just now";
  if (passed < 60) return `${Math.round(passed)} s ago`;
  if (passed < 3600) return `${Math.round(passed / 60)} min ago`;
  if (passed < 86_400) return `${Math.round(passed / 3600)} h ago`;
  return new Date(1000 * at).toLocaleDateString("en", { day: "numeric", month: "short", year: "numeric" });
}

/** The service's messages begin in lower case, since the command puts words before them. */
const sentence = (message) => message.charAt(0).toUpperCase() + message.slice(1);

// ---- hooks

const PATIENCE_MS = 10_000; // for an answer, before the same is asked for again

/**
 * What GET finds at `path` (null: nothing is asked), again every `everyMs` while the page is visible, and at once when
 * the service comes back. Returns {data, error, loading, reload}; data stays while a later request fails.
 */
export function useResource(path, everyMs = 0, load = get) {
  const [state, setState] = useState({ path: null, data: null, error: null });
  const reloads = useRef(() => {});
  useEffect(() => {
    if (!path) return undefined;
    const aborting = new AbortController();
    let asked = 0, settled = 0, at = 0;
    const ask = async () => {
      const mine = ++asked;
      const settle = (next) => mine > settled && !aborting.signal.aborted && ((settled = mine), setState(next)); // no older answer
      at = performance.now();
      try {
        const data = await load(path, { signal: aborting.signal });
        settle({ path, data, error: null });
      } catch (error) {
        settle((old) => ({ path, data: old.path === path ? old.data : null, error }));
      }
    };
    const waits = () => asked > settled && performance.now() < at + PATIENCE_MS;
    reloads.current = ask;
    ask();
    const timer = everyMs ? setInterval(() => document.hidden || !isReachable() || waits() || ask(), everyMs) : null;
    const stop = onReachable((now) => now && ask());
    return () => {
      aborting.abort();
      clearInterval(timer);
      stop();
    };
  }, [path, everyMs]);
  const fresh = state.path === path ? state : { data: null, error: null };
  const reload = useCallback(() => reloads.current(), []);
  return { data: fresh.data, error: fresh.error, loading: Boolean(path) && !fresh.data && !fresh.error, reload };
}

/** Whether the service answers. */
export function useReachable() {
  const [reachable, setReachable] = useState(isReachable());
  useEffect(() => onReachable(setReachable), []);
  return reachable;
}

/** Load uPlot when the first chart needs it: it is most of what the page weighs. */
let plotting = null;
export function loadPlot() {
  plotting ??= new Promise((resolve, reject) => {
    const script = Object.assign(document.createElement("script"), { src: "/ui/vendor/uplot.js" });
    script.onload = () => resolve(window.uPlot);
    script.onerror = () => (plotting = null, reject(new Error("uplot.js did not load")));
    document.head.append(script);
  });
  return plotting;
}

// ---- components

/** A message: kind "note", "poor" (a warning) or "bad" (an error). Errors and warnings are announced. */
export function Notice({ kind = "note", title, error, children }) {
  const details = (error?.details ?? []).filter(({ reason }) => !error.message.endsWith(reason)); // which was said
  return html`<aside class="notice ${kind}" role=${kind === "note" ? "status" : "alert"}>
    ${title && html`<strong>${title} </strong>`}
    ${error && html`<span>${sentence(error.message)}</span>`}
    ${children}
    ${details.length > 0 && html`<ul>${details.slice(0, 20).map((each) => html`
      <li>${[each.file ?? each.class ?? each.index ?? each.field, each.reason].filter((part) => part != null).join(": ")}</li>`)}</ul>`}
  </aside>`;
}

/** Something is on its way. */
export const Busy = ({ label = "Loading" }) => html`<p class="busy" role="status"><span aria-hidden="true"></span>${label}…</p>`;

/**
 * Classes with their probabilities as bars; the first of `best` is marked. With more than `most` classes only the most
 * probable are shown.
 */
export function Bars({ classes, probabilities, best = null, most = 12, label = "Probabilities" }) {
  let order = classes.map((_, index) => index);
  if (order.length > most) order = order.sort((a, b) => probabilities[b] - probabilities[a]).slice(0, most);
  return html`<ul class="bars" aria-label=${label}>
    ${order.map((index) => html`<li key=${classes[index]} class=${classes[index] === best ? "best" : ""}>
      <span class="name">${classes[index]}</span>
      <span class="track" aria-hidden="true"><span style=${{ transform: `scaleX(${probabilities[index]})` }}></span></span>
      <span class="value">${best != null && percent(probabilities[index], 0)}</span>
    </li>`)}
  </ul>`;
}

/** A small grey image with crisp pixels: `image` is a URL, or 784 bytes. */
export function Pixels({ image, alt, size = 84, className = "" }) {
  const canvas = useRef(null);
  const isUrl = typeof image === "string";
  useEffect(() => {
    if (!image || isUrl) return;
    const data = new ImageData(28, 28);
    image.forEach((value, at) => data.data.set([value, value, value, 255], 4 * at));
    Object.assign(canvas.current, { width: 28, height: 28 });
    canvas.current.getContext("2d").putImageData(data, 0, 0);
  }, [image]);
  const style = { width: `${size}px`, height: `${size}px` };
  if (!image) return html`<span class="pixels empty ${className}" style=${style}></span>`;
  return isUrl ? html`<img class="pixels ${className}" src=${image} alt=${alt} style=${style} />`
    : html`<canvas class="pixels ${className}" ref=${canvas} role="img" aria-label=${alt} style=${style}></canvas>`;
}

/** A dialog that asks before something is done that cannot be undone. The element is the browser's, so Escape and the
 * focus work by themselves. */
export function Confirm({ title, action = "Delete", keep = "Cancel", danger = true, onConfirm, onClose, children }) {
  const dialog = useRef(null);
  useLayoutEffect(() => dialog.current.showModal(), []);
  const submit = (event) => { // what is confirmed may take the dialog away, and with it a form under way
    event.preventDefault();
    dialog.current.close();
    onConfirm(event);
  };
  return html`<dialog ref=${dialog} class="confirm" aria-labelledby="confirm-title" onClose=${onClose}>
    <form onSubmit=${submit}>
      <h2 id="confirm-title">${title}</h2>
      ${children}
      <p class="actions">
        <button type="button" class="plain" onClick=${() => dialog.current.close()}>${keep}</button>
        <button class=${danger ? "danger" : "primary"}>${action}</button>
      </p>
    </form>
  </dialog>`;
}
