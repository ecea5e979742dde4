// The jobs there are; and one, put together from its events: its stages, curves and search as they happen, what can be done
// to it, and what it has become.

import { Busy, Confirm, Notice, ago, duration, html, useEffect, useMay, useRef, useResource, useState } from "./parts.js";
import { get, send, stream } from "./api.js";
import { Curves } from "./curves.js";
import { Live, SearchView } from "./results.js";

const STAGES = ["validating", "previewing", "searching", "training", "evaluating", "exporting", "publishing"];
const FINISHED = ["succeeded", "failed", "cancelled"];
const EVERY_MS = 2000, PATIENCE_MS = 10_000;

const Status = ({ status }) => html`<span class="status ${status}"><i aria-hidden="true"></i>${status}</span>`;

/** Where a job stands, in a few words. */
function wordsOf(job) {
  const { progress } = job;
  if (job.status === "queued") return job.queue_position ? `number ${job.queue_position} in the queue` : "in the queue";
  if (job.status === "failed") return job.error?.message ?? "";
  if (job.status !== "running") return job.version ? `version ${job.version}` : "";
  if (job.stage === "searching" && progress.trial) return `searching, ${progress.tried} of ${progress.trials} recipes`;
  if (job.stage === "training" && progress.epoch) return `training, epoch ${progress.epoch} of ${progress.epochs}`;
  return job.stage ?? "";
}

export function JobList() {
  const { data, error, loading } = useResource("/finetune?limit=12", EVERY_MS);
  if (error && !data) return html`<${Notice} kind="bad" title="The jobs cannot be listed." error=${error} />`;
  if (loading) return html`<${Busy} />`;
  if (!data.data.length) return null;
  return html`<section aria-labelledby="jobs-title"><h2 id="jobs-title">Jobs</h2>
    <ul class="rows">${data.data.map((job) => html`<li key=${job.id}><a class="row" href="#/finetune/${job.id}">
      <strong>${job.model}</strong><${Status} status=${job.status} />
      <span class="quiet words">${wordsOf(job)}</span><span
        class="quiet when">${ago(job.created_at)}</span></a></li>`)}</ul>
  </section>`;
}

const NOTHING = { runs: [], trials: [], best: null, resolved: null, preview: null, stage: null, seq: 0 };

/** What is known after one more event. `runs` are trainings, of a fold or the final one, each with its epochs. */
function after(state, { seq, type, data }) {
  if (seq <= state.seq) return state; // a stream that is resumed may repeat one
  const next = { ...state, seq };
  if (type === "epoch") next.runs = withEpoch(state.runs, data);
  if (type === "trial") [next.trials, next.best] = [[...state.trials, data], data.best];
  if (type === "resolved") next.resolved = data.spec;
  if (type === "status" && data.stage) next.stage = data.stage;
  if (type === "preview") next.preview = data.version;
  return next;
}

function withEpoch(runs, record) {
  const at = runs.findIndex((run) => run.fold === (record.fold ?? null));
  const run = at < 0 ? { fold: record.fold ?? null, of: record.folds, epochs: [] } : runs[at];
  const epochs = [...run.epochs.filter((one) => one.epoch < record.epoch), record]; // an attempt may repeat some
  const next = { ...run, total: record.epochs, epochs };
  return at < 0 ? [...runs, next] : runs.map((one, index) => (index === at ? next : one));
}

/** {job, events, error, reload}: the job is asked for again whenever something has happened to it. */
function useJob(id) {
  const [job, setJob] = useState(null), [events, setEvents] = useState(NOTHING), [error, setError] = useState(null);
  const [lost, setLost] = useState(null); // why its events do not come
  const asking = useRef({});
  const reload = () => {
    const state = asking.current;
    if (state.busy) return (state.again = true);
    Object.assign(state, { busy: true, again: false });
    const found = (next) => (setJob(next), setError(null), (state.over = FINISHED.includes(next.status)));
    return get(`/finetune/${id}`, { signal: AbortSignal.timeout(PATIENCE_MS) }).then(found, setError)
      .finally(() => (state.busy = false, state.again && reload()));
  };
  useEffect(() => {
    const ending = new AbortController();
    let waiting = [];
    const settle = () => { // many events come at once, when a job is opened late: draw once for all of them
      const some = waiting;
      waiting = [];
      setEvents((old) => some.reduce(after, old));
      if (some.some((event) => event.type !== "epoch")) reload();
    };
    const onEvent = ({ data }) => {
      waiting.push(data);
      if (waiting.length === 1) setTimeout(settle, 30);
    };
    reload();
    stream(`/finetune/${id}/events`, onEvent, ending.signal).then(reload, setLost);
    const timer = setInterval(() => asking.current.over || reload(), PATIENCE_MS); // should an event be lost
    return () => (ending.abort(), clearInterval(timer));
  }, [id]);
  return { job, events, error: error ?? lost, reload };
}

function useNow(isRunning) {
  const [now, setNow] = useState(Date.now() / 1000);
  useEffect(() => {
    const timer = isRunning && setInterval(() => setNow(Date.now() / 1000), 1000);
    return () => clearInterval(timer);
  }, [isRunning]);
  return now;
}

/** The stages of a job, those that it does not need left out. */
function Stages({ job, events }) {
  const isSkipped = { searching: !job.spec.search, previewing: !events.preview && job.stage !== "previewing" };
  const needed = STAGES.filter((stage) => !isSkipped[stage]);
  const stage = job.stage ?? events.stage; // the last one, of a job that is paused or over
  const at = needed.indexOf(stage === "warming" ? "publishing" : stage);
  const done = (index) => job.status === "succeeded" || (at >= 0 && index < at);
  return html`<ol class="stages" aria-label="Stages">${needed.map((stage, index) => html`<li key=${stage}
    class=${done(index) ? "done" : index === at ? "now" : ""} aria-current=${index === at ? "step" : null}>${stage}
      </li>`)}</ol>`;
}

const ACTIONS = { cancel: ["queued", "running", "paused"], pause: ["queued", "running"], resume: ["paused"] };

function Actions({ job, onDone }) {
  const [state, setState] = useState({});
  const act = async (action) => {
    setState({ busy: action });
    try {
      await send("POST", `/finetune/${job.id}/${action}`);
      setState({});
    } catch (error) {
      setState({ error });
    }
    onDone();
  };
  const pending = (action) => (action === "cancel" && job.cancel_requested) || (action === "pause" && job.pause_requested);
  const can = (action) => ACTIONS[action].includes(job.status);
  const words = { cancel: ["Cancel", "Cancelling…"], pause: ["Pause", "Pausing…"], resume: ["Resume", "Resuming…"] };
  return html`<div class="jobactions">
    ${["resume", "pause", "cancel"].filter(can).map((action) => html`<button key=${action}
      class=${action === "resume" ? "primary" : ""}
      disabled=${state.busy === action || pending(action)}
        onClick=${() => (action === "cancel" ? setState({ asks: true }) : act(action))}>
      ${words[action][pending(action) ? 1 : 0]}</button>`)}
    ${state.asks && html`<${Confirm} title="Cancel this fine-tune?" action="Cancel the fine-tune" keep="Let it go on"
      onConfirm=${() => act("cancel")} onClose=${() => setState((old) => ({ ...old, asks: false }))}>
      <p>What it has learned so far is thrown away. To go on later, pause it instead.</p><//>`}
    ${state.error && html`<${Notice} kind="bad" title="That did not work." error=${state.error} />`}
  </div>`;
}

function Failure({ job }) {
  const { error } = job;
  return html`<${Notice} kind="bad" title="It failed.">${error?.message} ${error?.param && html`<br />
    <span>The field to change: <code>${error.param}</code></span>`}<//>`;
}

export function Job({ id }) {
  const { job, events, error, reload } = useJob(id);
  const isOpen = job && !FINISHED.includes(job.status), now = useNow(job?.status === "running"), mayPredict = useMay("predict");
  if (!job) return error ? html`<${Notice} kind="bad" title="There is nothing to show."
    error=${error} />` : html`<${Busy} />`;
  const spent = job.started_at && job.status !== "paused" && (job.finished_at ?? now) - job.started_at;
  const left = isOpen && job.estimated_end_at && job.estimated_end_at - now;
  const preview = events.preview ?? job.preview_version;
  return html`<article class="job">
    <header class="viewhead"><div>
        <p class="crumbs"><a href="#/finetune">Fine-tune</a></p>
        <h1>${job.model}</h1>
        <p class="jobline" role="status"><${Status} status=${job.status} /><span class="quiet">${wordsOf(job)}</span>
          </p></div>
      <div class="clock"><b>${spent ? duration(Math.max(0, spent)) : "–"}</b><span class="quiet">
        ${left >= 1 ? `about ${duration(left)} to go` : isOpen ? "so far" : "in all"}</span></div>
    </header>
    ${job.status !== "succeeded" && html`<${Stages} job=${job} events=${events} />`}
    ${isOpen && html`<${Actions} job=${job} onDone=${reload} />`}
    ${error && html`<${Notice} kind="bad" title="This job could not be refreshed." error=${error} />`}
    ${job.status === "failed" && html`<${Failure} job=${job} />`}
    ${job.status === "cancelled" && html`<${Notice}
      title="It was cancelled.">Your images are kept: start again from <a href="#/finetune">Fine-tune</a>.<//>`}
    ${job.status === "succeeded" && job.version && html`<${Live} job=${job} />`}
    ${isOpen && preview && html`<${Notice}
      title=${`Version ${preview} is live already.`}>A preview from a quick recipe; the better one replaces it.${" "}
      ${mayPredict && html`<a href="#/draw?model=${job.model}">Draw with it</a>`}<//>`}
    <${Curves} runs=${events.runs} isOpen=${isOpen} />
    <${SearchView} trials=${events.trials} job=${job} resolved=${events.resolved} />
    <${Facts} job=${job} />
  </article>`;
}

function Facts({ job }) {
  const spec = job.resolved_spec ?? job.spec;
  return html`<details class="group"><summary>What was asked for<span class="quiet">
    ${job.dataset.images} images of ${Object.keys(job.dataset.classes ?? {}).length} classes</span></summary>
    <dl class="facts"><dt>Job</dt><dd><code>${job.id}</code></dd><dt>From</dt><dd>${job.base}</dd><dt>Images</dt><dd>
      ${job.dataset.filename}</dd>
      <dt>Label</dt><dd>${job.label}</dd><dt>Attempts</dt><dd>${job.attempts}</dd></dl>
    <pre tabindex="0">${JSON.stringify(spec, null, 2)}</pre></details>`;
}
