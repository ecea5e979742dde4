// The one place that calls the service. The API key is in this module's memory and nowhere else: not in storage, which
// other scripts of this origin could read later, and not in a cookie, which the browser would send by itself.

let key = null;
let reachable = true;
let looking = null;
const listeners = { reachable: new Set(), refused: new Set() };

export class ApiError extends Error {
  constructor(status, { code = "unknown", message = "", param = null, details = [] } = {}) {
    super(message);
    Object.assign(this, { name: "ApiError", status, code, param, details });
  }
}

function listen(name, listener) {
  listeners[name].add(listener);
  return () => listeners[name].delete(listener);
}

/** Call `listener` with true or false when the service comes back or is lost; returns how to stop that. */
export const onReachable = (listener) => listen("reachable", listener);

/** Call `listener` with the error when a request is refused for want of a valid key: it may have been revoked. */
export const onRefused = (listener) => listen("refused", listener);

export const isReachable = () => reachable;

function setReachable(now) {
  if (now === reachable) return;
  reachable = now;
  if (!now) looking = setInterval(() => fetch("/healthz").then(() => setReachable(true), () => {}), 1000);
  else clearInterval(looking);
  for (const listener of [...listeners.reachable]) listener(now);
}

const authorization = () => (key ? { Authorization: `Bearer ${key}` } : {});

/** A response that succeeded. Throws ApiError: of status 0 and code `unreachable` where nothing answers. */
async function request(method, path, { body, headers = {}, signal } = {}) {
  let answer;
  try {
    // Without credentials, a refused request never opens the browser's own dialog for passwords.
    const options = { method, body, signal, credentials: "omit", cache: "no-store" };
    answer = await fetch(path, { ...options, headers: { Accept: "application/json", ...authorization(), ...headers } });
  } catch (failure) {
    if (signal?.aborted) throw failure; // or its time is up
    setReachable(false);
    throw new ApiError(0, { code: "unreachable", message: "The service does not answer." });
  }
  setReachable(true);
  if (answer.ok) return answer;
  const error = errorOf(answer.status, await answer.text());
  if (answer.status === 401) for (const listener of [...listeners.refused]) listener(error);
  throw error;
}

function errorOf(status, text) {
  let body = null;
  try {
    body = JSON.parse(text);
  } catch { /* a proxy's page instead of JSON; its text will do */ }
  const error = new ApiError(status, body?.error ?? { message: text.slice(0, 200) || `Status ${status}` });
  return Object.assign(error, { body });
}

const parsed = async (answer) => (answer.status === 204 ? null : answer.json());

/** The JSON at a path. */
export const get = async (path, options) => parsed(await request("GET", path, options));

/** The text at a path: a report card (`text/html`), metrics (`text/plain`). */
export const text = async (path, accept = "text/plain", options = {}) =>
  (await request("GET", path, { ...options, headers: { Accept: accept } })).text();

/** Send an object as JSON, bytes, or a Blob or FormData as it is; returns the JSON of the answer. */
export async function send(method, path, body, options = {}) {
  const bytes = body instanceof Uint8Array, raw = !body || body instanceof Blob || body instanceof FormData;
  const headers = raw ? {} : { "Content-Type": bytes ? "application/octet-stream" : "application/json" };
  return parsed(await request(method, path, { ...options, headers, body: raw || bytes ? body : JSON.stringify(body) }));
}

/** Send a form; `onProgress` gets the share that is sent, 0 to 1. fetch cannot tell that, so this is an XMLHttpRequest. */
export function upload(path, form, onProgress = () => {}, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const call = new XMLHttpRequest();
    call.open("POST", path);
    for (const [name, value] of Object.entries({ Accept: "application/json", ...authorization() })) {
      call.setRequestHeader(name, value);
    }
    call.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    call.onload = () => {
      if (call.status < 300) return resolve(JSON.parse(call.responseText));
      const error = errorOf(call.status, call.responseText);
      if (call.status === 401) for (const listener of [...listeners.refused]) listener(error);
      return reject(error);
    };
    call.onerror = () => reject(new ApiError(0, { code: "unreachable", message: "The upload broke off." }));
    call.onabort = () => reject(new DOMException("The upload was cancelled.", "AbortError"));
    signal?.addEventListener("abort", () => call.abort());
    call.send(form);
  });
}

/** Save what is at a path as a file. A plain link would not bring the key. */
export async function download(path, filename, accept = "*/*") {
  const blob = await (await request("GET", path, { headers: { Accept: accept } })).blob();
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: filename });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const pause = (ms, signal) => new Promise((resolve) => {
  const timer = setTimeout(resolve, ms);
  signal?.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
});

/**
 * Follow server-sent events until they end or `signal` aborts; `onEvent` gets {id, event, data}, data parsed.
 *
 * EventSource could not send the key. A stream that breaks off is resumed after the last event; so is one that ends,
 * once, because a gateway that shuts down ends its streams properly, too.
 */
export async function stream(path, onEvent, signal) {
  let last = null;
  for (let fruitless = 0, broken = 0; !signal?.aborted && fruitless < 2;) {
    const before = last;
    try {
      const headers = { Accept: "text/event-stream", ...(last ? { "Last-Event-ID": last } : {}) };
      const answer = await request("GET", path, { headers, signal });
      for await (const event of events(answer.body)) {
        last = event.id ?? last;
        broken = 0;
        onEvent(event);
      }
      fruitless = last === before ? fruitless + 1 : 1;
    } catch (failure) {
      if (signal?.aborted) return;
      if (failure instanceof ApiError && failure.status && failure.status < 500 && failure.status !== 429) throw failure;
      await pause(Math.min(5000, 250 * 2 ** broken++), signal);
    }
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (held + value).split(/\r?\n\r?\n/);
    held = blocks.pop();
    for (const block of blocks) {
      const found = { id: null, event: "message", data: "" };
      for (const line of block.split(/\r?\n/)) {
        const [, name, content] = line.match(/^(\w+): ?(.*)$/) ?? [];
        if (name === "data") found.data += (found.data && "\n") + content;
        else if (name in found) found[name] = content;
      }
      if (found.data) yield { ...found, data: JSON.parse(found.data) };
    }
  }
}

/** What the key may do, or what everybody may (null): the answer of GET /key. The key is kept only if it is valid. */
export async function signIn(candidate) {
  const before = key;
  key = candidate?.replace(/[^!-~]/g, "") || null; // what a header cannot carry was not meant
  try {
    return await get("/key");
  } catch (failure) {
    key = before;
    throw failure;
  }
}

export function signOut() {
  key = null;
}
