// One job: its stages, curves and search as they happen, what can be done to it, and what it has become.

import { Busy, Confirm, Notice, duration, html, useEffect, useMay, useState } from "./parts.js";
import { send } from "./api.js";
import { Curves } from "./curves.js";
import { useJob } from "./follow.js";
import { FINISHED, STAGES, Status, wordsOf } from "./job_list.js";
import { Live } from "./live.js";
import { SearchView } from "./search_view.js";

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
  const searches = Object.values(job.spec).includes("auto");
  const needed = STAGES.filter((stage) => stage !== "warming" && (searches || stage !== "searching") && (stage !== "previewing" || events.preview || job.stage === stage));
  const at = needed.indexOf(job.stage);
  const done = (index) => job.status === "succeeded" || (at >= 0 && index < at);
  return html`<ol class="stages" aria-label="Stages">${needed.map((stage, index) => html`<li key=${stage}
    class=${done(index) ? "done" : index === at ? "now" : ""} aria-current=${index === at ? "step" : null}>${stage}</li>`)}</ol>`;
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
    ${["resume", "pause", "cancel"].filter(can).map((action) => html`<button key=${action} class=${action === "resume" ? "primary" : ""}
      disabled=${state.busy === action || pending(action)} onClick=${() => (action === "cancel" ? setState({ asks: true }) : act(action))}>
      ${words[action][pending(action) ? 1 : 0]}</button>`)}
    ${state.asks && html`<${Confirm} title="Cancel this fine-tune?" action="Cancel it" onConfirm=${() => act("cancel")} onClose=${() => setState((old) => ({ ...old, asks: false }))}>
      <p>What it has learned so far is thrown away. To go on later, pause it instead.</p><//>`}
    ${state.error && html`<${Notice} kind="bad" title="That did not work." error=${state.error} />`}
  </div>`;
}

function Failure({ job }) {
  const { error } = job;
  return html`<${Notice} kind="bad" title="It failed.">${error?.message} ${error?.param && html`<br /><span>The field to change: <code>${error.param}</code></span>`}<//>`;
}

export function Job({ id }) {
  const { job, events, error, reload } = useJob(id);
  const isOpen = job && !FINISHED.includes(job.status), now = useNow(isOpen), mayPredict = useMay("predict");
  if (!job) return error ? html`<${Notice} kind="bad" title="There is nothing to show." error=${error} />` : html`<${Busy} />`;
  const spent = job.started_at && (job.finished_at ?? now) - job.started_at;
  const left = isOpen && job.estimated_end_at && job.estimated_end_at - now;
  const preview = events.preview ?? job.preview_version;
  return html`<article class="job">
    <header class="viewhead"><div>
        <p class="crumbs"><a href="#/finetune">Fine-tune</a></p>
        <h1>${job.model}</h1>
        <p class="jobline" role="status"><${Status} status=${job.status} /><span class="quiet">${wordsOf(job)}</span></p></div>
      <div class="clock"><b>${spent ? duration(Math.max(0, spent)) : "–"}</b><span class="quiet">${left > 0 ? `about ${duration(left)} to go` : isOpen ? "so far" : "in all"}</span></div>
    </header>
    ${job.status !== "succeeded" && html`<${Stages} job=${job} events=${events} />`}
    ${isOpen && html`<${Actions} job=${job} onDone=${reload} />`}
    ${error && html`<${Notice} kind="bad" title="The events of this job do not come." error=${error} />`}
    ${job.status === "failed" && html`<${Failure} job=${job} />`}
    ${job.status === "cancelled" && html`<${Notice} title="It was cancelled.">Your images are kept: start again from <a href="#/finetune">Fine-tune</a>.<//>`}
    ${job.status === "succeeded" && job.version && html`<${Live} job=${job} />`}
    ${isOpen && preview && html`<${Notice} title=${`Version ${preview} is live already.`}>A preview from a quick recipe; the better one replaces it.${" "}
      ${mayPredict && html`<a href="#/draw?model=${job.model}">Draw with it</a>`}<//>`}
    <${Curves} runs=${events.runs} isOpen=${isOpen} />
    <${SearchView} trials=${events.trials} job=${job} resolved=${events.resolved} />
    <${Facts} job=${job} />
  </article>`;
}

function Facts({ job }) {
  const spec = job.resolved_spec ?? job.spec;
  return html`<details class="group"><summary>What was asked for<span class="quiet">${job.dataset.images} images of ${Object.keys(job.dataset.classes ?? {}).length} classes</span></summary>
    <dl class="facts"><dt>Job</dt><dd><code>${job.id}</code></dd><dt>From</dt><dd>${job.base}</dd><dt>Images</dt><dd>${job.dataset.filename}</dd>
      <dt>Label</dt><dd>${job.label}</dd><dt>Attempts</dt><dd>${job.attempts}</dd></dl>
    <pre tabindex="0">${JSON.stringify(spec, null, 2)}</pre></details>`;
}
