// The shell: which view the address asks for, who is signed in, and whether the service answers.

import { Busy, Notice, Session, html, render, useEffect, useErrorBoundary, useLayoutEffect, useReachable, useRef, useState } from "./parts.js";
import { onRefused, signIn, signOut } from "./api.js";

// Views are loaded when they are first shown: the first paint waits for none of the others.
const VIEWS = {
  draw: { title: "Draw", scope: "predict", load: () => import("./draw.js") },
  finetune: { title: "Fine-tune", scope: "finetune", load: () => import("./finetune.js") },
  models: { title: "Models", scope: null, load: () => import("./models.js") },
  now: { title: "Now", scope: null, load: () => import("./now.js") },
};
const may = (session, view) => view.scope === null || session.scopes.includes(view.scope);

/** The address after the #: {name, parts, query}. `#/models/digits/3` is {name: "models", parts: ["digits", "3"]}. */
function route() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...parts] = path.split("/").filter(Boolean);
  const named = parts.every((part) => /^\w[\w.-]*$/.test(part)); // what can name something; it becomes part of paths
  return { name: named && Object.hasOwn(VIEWS, name) ? name : null, parts, query: new URLSearchParams(query) };
}

function useRoute() {
  const [found, setFound] = useState(route);
  useLayoutEffect(() => { // not after the next frame, as useEffect would: until then a change would be missed
    const look = () => setFound(route());
    addEventListener("hashchange", look);
    return () => removeEventListener("hashchange", look);
  }, []);
  return found;
}

function View({ name, parts, query }) {
  const [state, setState] = useState({});
  const [broken, mend] = useErrorBoundary();
  useEffect(() => {
    if (broken) mend(); // another place may work
  }, [name, parts.join(), query.toString()]);
  useEffect(() => {
    let ended = false;
    const show = (found) => ended || setState({ name, ...found });
    document.title = `${VIEWS[name].title} · Temper`;
    VIEWS[name].load().then((module) => show({ Shown: module.default }), (error) => show({ error }));
    return () => (ended = true);
  }, [name]);
  if (broken) return html`<${Notice} kind="bad" title="This view failed." error=${broken} />`;
  if (state.name !== name) return html`<${Busy} />`;
  if (state.error) return html`<${Notice} kind="bad" title="This view did not load." error=${state.error} />`;
  return html`<${state.Shown} parts=${parts} query=${query} />`;
}

function SignIn({ onSession }) {
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const submit = async (event) => {
    event.preventDefault();
    setBusy(true);
    try {
      onSession(await signIn(new FormData(event.target).get("key")));
    } catch (failure) {
      setError(failure);
      setBusy(false);
    }
  };
  return html`<form class="signin" onSubmit=${submit}>
    <h1>Sign in</h1>
    ${location.hash.endsWith(REFUSED) && html`<${Notice} kind="poor">Your key is not valid any more.<//>`}
    <p class="quiet">This service asks for an API key. It stays in this tab’s memory until you close or reload it.</p>
    <label>API key
      <input name="key" type="password" autocomplete="off" spellcheck="false" placeholder="tmp_…" required
        aria-describedby="signin-error" autofocus />
    </label>
    <button class="primary" disabled=${busy}>Sign in</button>
    <div id="signin-error">${error && html`<${Notice} kind="bad" title="That did not work:" error=${error} />`}</div>
  </form>`;
}

function Header({ session, current, onSignOut }) {
  const shown = session ? Object.entries(VIEWS).filter(([, view]) => may(session, view)) : [];
  return html`<header class="top">
    <a class="brand" href="#/draw"><img src="/ui/icon.svg" alt="" width="26" height="26" />Temper</a>
    <nav aria-label="Views">
      ${shown.map(([name, view]) => html`<a key=${name} href="#/${name}"
        aria-current=${name === current ? "page" : null}>${view.title}</a>`)}
    </nav>
    <div class="who">
      ${session?.name && html`<span class="quiet" title="Tenant ${session.tenant}; may ${session.scopes.join(", ")}">${session.name}</span>
        <button class="plain" onClick=${onSignOut}>Sign out</button>`}
      <a class="quiet docs" href="/docs">API</a>
    </div>
  </header>`;
}

/** Forget everything of a key, the address too. */
function leave(why = "") {
  signOut();
  history.replaceState(null, "", `/#/${why}`);
  location.reload();
}
const REFUSED = "refused";

function App() {
  const [session, setSession] = useState(null);
  const [problem, setProblem] = useState(null);
  const reachable = useReachable(), signedIn = useRef(false);
  const { name, parts, query } = useRoute();
  signedIn.current = Boolean(session);

  const ask = () => signIn(null).then((found) => (setSession(found), setProblem(null)), setProblem);
  // A key that is refused from now on: the next one may be another tenant's, for whom nothing may be left over.
  useEffect(() => onRefused((error) => (signedIn.current ? leave(REFUSED) : setProblem(error))), []);
  useEffect(() => void (reachable && !session && ask()), [reachable]);

  const first = session && Object.keys(VIEWS).find((each) => may(session, VIEWS[each]));
  const current = session && (name && may(session, VIEWS[name]) ? name : first);
  let content = html`<${Busy} />`;
  if (session) content = html`<${View} name=${current} parts=${current === name ? parts : []} query=${query} />`;
  else if (problem?.status === 401) content = html`<${SignIn} onSession=${setSession} />`;
  else if (problem) content = html`<${Notice} kind="bad" title="The page cannot start." error=${problem} />`;

  return html`<${Session.Provider} value=${session ?? { scopes: [] }}>
    <a class="skip" href="#main" onClick=${(event) => (event.preventDefault(), document.getElementById("main").focus())}>Skip to content</a>
    <${Header} session=${session} current=${current} onSignOut=${() => leave()} />
    ${!reachable && html`<p class="lost" role="alert">The service does not answer. This page goes on by itself when it is back.</p>`}
    <main id="main" tabindex="-1">${content}</main>
  <//>`;
}

render(html`<${App} />`, document.getElementById("page"));
