// Now: what the service does at this moment, for those who keep an eye on it.

import { text } from "./api.js";
import { Jobs, hits, quantile, rate, reading } from "./activity.js";
import { Busy, Notice, count, duration, html, percent, plural, useEffect, useMay, useResource, useState } from "./parts.js";

const EVERY_MS = 1000;
const KEPT = 120; // readings: two minutes
const WINDOW = 10; // readings over which rates and quantiles are taken

/** The readings of GET /metrics, the newest last. */
function useReadings(allowed) {
  const { data } = useResource(allowed ? "/metrics" : null, EVERY_MS, async (path, options) =>
    reading(await text(path, "text/plain", options), performance.now() / 1000));
  const [readings, setReadings] = useState([]);
  useEffect(() => {
    if (data) setReadings((old) => [...(old.at(-1)?.predictions > data.predictions ? [] : old), data].slice(-KEPT));
  }, [data]);
  return readings;
}

/** A value for every reading, against the reading some seconds before it. */
const series = (readings, of, window = 3) => readings.slice(1).map((now, at) => of(now, readings[Math.max(0, at + 1 - window)]));

/** An area of two minutes; it grows from the right, so that a pixel is always the same time. */
function Trend({ values, label, least = 1 }) {
  const [width, height] = [240, 44], most = Math.max(least, ...values.filter((value) => value != null));
  const places = values.map((value, at) => [width - ((values.length - 1 - at) * width) / (KEPT - 2), height - 2 - ((value ?? 0) / most) * (height - 6)]);
  const line = places.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");
  return html`<svg class="trend" viewBox="0 0 ${width} ${height}" preserveAspectRatio="none" role="img" aria-label=${label}>
    ${places.length > 1 && html`<path class="under" d=${`M${line}L${width} ${height}L${places[0][0]} ${height}Z`} /><path class="over" d=${`M${line}`} />`}</svg>`;
}

const Figure = ({ name, value, more, values, least }) => html`<div class="traffic-figure"><dt>${name}</dt>
  <dd><b>${value}</b>${more}</dd>${values && html`<dd><${Trend} values=${values} least=${least} label="${name} over the last two minutes" /></dd>`}</div>`;

const perSecond = (value) => (value == null ? "–" : value >= 100 ? count(Math.round(value)) : value.toFixed(1));

function Batches({ now, before }) {
  const found = hits(now.batches, before.batches), total = found.reduce((all, { count: each }) => all + each, 0);
  const name = ({ upTo }, at) => (upTo === Infinity ? "more" : upTo - (found[at - 1]?.upTo ?? 0) > 1 ? `${found[at - 1].upTo + 1}–${upTo}` : `${upTo}`);
  return html`<section aria-labelledby="batches-title"><h2 id="batches-title">Images in a call</h2>
    ${total > 0 && html`<ul class="bars">${found.map((bucket, at) => html`<li key=${bucket.upTo}><span class="name">${name(bucket, at)}</span>
      <span class="track" aria-hidden="true"><span style=${{ transform: `scaleX(${bucket.count / total})` }}></span></span>
      <span class="value">${percent(bucket.count / total, 0)}</span></li>`)}</ul>`}
    <p class="quiet">${total ? plural(total, "call") : "No calls"} to model servers in the last two minutes.</p></section>`;
}

function Served({ now, before }) {
  const rows = [...now.served].map(([name]) => [name, rate(now, before, (each) => each.served.get(name) ?? 0)]).filter(([, each]) => each);
  return html`<section aria-labelledby="served-title"><h2 id="served-title">Who answers</h2>
    ${rows.length === 0 ? html`<p class="quiet">No predictions in the last ${WINDOW} seconds.</p>` : html`<table>
      <thead><tr><th scope="col">version</th><th scope="col">a second</th><th scope="col">median</th><th scope="col">95%</th></tr></thead>
      <tbody>${rows.sort(([, a], [, b]) => b - a).slice(0, 8).map(([name, each]) => html`<tr key=${name}><th scope="row">${name}</th><td>${perSecond(each)}</td>
        ${[0.5, 0.95].map((share) => html`<td>${duration(quantile(share, now.latencyOf.get(name), before.latencyOf.get(name)))}</td>`)}</tr>`)}</tbody></table>`}
  </section>`;
}

function Traffic({ readings }) {
  const now = readings.at(-1), before = readings.at(-1 - WINDOW) ?? readings[0];
  if (!now) return html`<${Busy} label="Reading the metrics" />`;
  const slow = (share) => (each, earlier) => quantile(share, each.latency, earlier.latency);
  const calls = rate(now, before, (each) => each.calls);
  const late = slow(0.95)(now, before);
  const failing = rate(now, before, (each) => each.failed);
  const others = rate(now, before, (each) => each.others);
  return html`
    <dl class="tiles traffics">
      <${Figure} name="Predictions a second" value=${perSecond(rate(now, before, (each) => each.predictions))} more=${others ? `and ${perSecond(others)} other requests` : ""}
        values=${series(readings, (each, earlier) => rate(each, earlier, (one) => one.predictions))} />
      <${Figure} name="Latency" value=${duration(quantile(0.5, now.latency, before.latency))} more=${late ? `median; 95% within ${duration(late)}` : "no predictions"}
        values=${series(readings, slow(0.95), 6)} least=${0.005} />
      <${Figure} name="Images in a call" value=${calls ? (rate(now, before, (each) => each.images) / calls).toFixed(1) : "–"} more="${now.inFlight} under way, ${count(now.waiting)} waiting"
        values=${series(readings, (each, earlier) => (each.calls > earlier.calls ? (each.images - earlier.images) / (each.calls - earlier.calls) : null))} />
      <${Figure} name="Fine-tunes in the queue" value=${count(now.jobs.queued)} more=${now.oldest ? `the oldest for ${duration(now.oldest)}` : `${now.jobs.running ?? 0} running`}
        values=${readings.map((each) => each.jobs.queued ?? 0)} />
    </dl>
    ${failing > 0 && html`<${Notice} kind="bad" title="${perSecond(failing)} requests a second fail." />`}
    <div class="halves"><${Served} now=${now} before=${before} /><${Batches} now=${now} before=${readings[0]} /></div>`;
}

const GOOD = new Set(["ok", "ready", "idle", "busy", "reporting"]);
const State = ({ name, state }) => html`<li><span class="dot ${GOOD.has(state) ? "good" : state === "loading" || state === "warming" ? "soon" : "lost"}" aria-hidden="true"></span>
  <span class="what">${name}</span><span class="quiet">${state}</span></li>`;

function Parts() {
  const { data, error } = useResource("/readyz", 1000);
  const found = error?.body?.status ? error.body : error ? null : data; // "not ready" is an answer, too: 503 with the same body
  if (!found) return error ? html`<p class="quiet">Nobody answers.</p>` : html`<${Busy} />`;
  const workers = Object.entries(found.workers ?? {});
  return html`<ul class="states">
    <${State} name="Service" state=${found.status === "ready" ? "ready" : "not ready"} />
    ${found.store && html`<${State} name="Store" state=${found.store} /><${State} name="Disk" state=${found.disk} />`}
    ${Object.entries(found.model_servers ?? {}).map(([name, state]) => html`<${State} key=${name} name=${name.startsWith("unix:") ? "Model server" : `Model server ${name}`} state=${state} />`)}
    ${workers.map(([name, state]) => html`<${State} key=${name} name="Worker ${name}" state=${state} />`)}
    ${found.workers && workers.length === 0 && html`<${State} name="Worker" state="none" />`}
  </ul>`;
}

export default function Now() {
  const [mayAdmin, mayTrain] = [useMay("admin"), useMay("finetune")];
  const readings = useReadings(mayAdmin);
  return html`<div><h1>Now</h1>
    ${mayAdmin && html`<${Traffic} readings=${readings} />`}
    <div class="halves">
      <section aria-labelledby="parts-title"><h2 id="parts-title">Parts</h2><${Parts} /></section>
      ${mayTrain && html`<div class="side"><${Jobs} /></div>`}
    </div>
    ${!mayAdmin && html`<p class="quiet">Figures of the traffic need a key with the scope admin.</p>`}</div>`;
}
