// What the service does: readings of its metrics; and the jobs that are under way, with what happens to them.

import { get } from "./api.js";
import { ago, count, html, percent, plural, useEffect, useRef, useResource, useState } from "./parts.js";

const SAMPLE = /^([a-z_]+)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** The samples of Prometheus' text format by name: [{labels, value}]. */
export function parsed(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const [, name, labels = "", value] = line.match(SAMPLE) ?? [];
    if (name) (found[name] ??= []).push({ labels: Object.fromEntries([...labels.matchAll(LABEL)].map(([, key, each]) => [key, each])), value: Number(value) });
  }
  return found;
}

const sum = (samples, wanted = () => true) => (samples ?? []).reduce((total, { labels, value }) => total + (wanted(labels) ? value : 0), 0);
const predicts = ({ route }) => route === "/predict" || route === "/explain" || /(:predict|\/infer)$/.test(route);
const looks = ({ route }) => /^\/(ui\/|metrics|healthz|readyz|key)|^\/$/.test(route); // of this page and of probes

/** Cumulative counts by upper bound. */
function buckets(samples, wanted = () => true) {
  const found = new Map();
  for (const { labels, value } of samples ?? []) {
    if (wanted(labels)) found.set(labels.le, (found.get(labels.le) ?? 0) + value);
  }
  return found;
}

/** What is shown of one reading. */
export function reading(text, at) {
  const found = parsed(text);
  const served = new Map();
  for (const { labels, value } of found.temper_requests_total ?? []) {
    if (!predicts(labels) || !labels.model) continue;
    const name = `${labels.model}:${labels.version}`;
    served.set(name, (served.get(name) ?? 0) + value);
  }
  return {
    at, served,
    predictions: sum(found.temper_requests_total, predicts),
    failed: sum(found.temper_requests_total, (labels) => labels.status >= 500),
    refused: sum(found.temper_rejections_total),
    others: sum(found.temper_requests_total, (labels) => !predicts(labels) && !looks(labels)),
    latency: buckets(found.temper_request_seconds_bucket, predicts),
    batches: buckets(found.temper_batch_images_bucket),
    latencyOf: new Map([...served.keys()].map((name) => [name,
      buckets(found.temper_request_seconds_bucket, (labels) => predicts(labels) && `${labels.model}:${labels.version}` === name)])),
    images: sum(found.temper_batch_images_sum), calls: sum(found.temper_batch_images_count),
    waiting: sum(found.temper_images_waiting), inFlight: sum(found.temper_calls_in_flight),
    jobs: Object.fromEntries((found.temper_jobs ?? []).map(({ labels, value }) => [labels.status, value])),
    oldest: sum(found.temper_queue_oldest_seconds),
  };
}

/** How often each bucket was hit between two readings: [{upTo, count}], upTo a number. */
export function hits(now, before) {
  let below = 0;
  return [...now].map(([bound, total]) => [bound === "+Inf" ? Infinity : Number(bound), total - (before?.get(bound) ?? 0)])
    .sort(([a], [b]) => a - b)
    .map(([upTo, cumulative]) => {
      const found = { upTo, count: cumulative - below };
      below = cumulative;
      return found;
    });
}

/** A quantile between two readings, linear within its bucket, as Prometheus does; null without requests. */
export function quantile(share, now, before) {
  const found = hits(now, before);
  const total = found.reduce((all, { count }) => all + count, 0);
  if (total <= 0) return null;
  let seen = 0, from = 0;
  for (const { upTo, count } of found) {
    if (seen + count >= share * total) return upTo === Infinity ? from : from + ((upTo - from) * (share * total - seen)) / count;
    seen += count;
    from = upTo;
  }
  return from;
}

/** A counter's increase a second; null if the gateway has started again between them. */
export function rate(now, before, value) {
  const passed = now.at - before.at, increase = value(now) - value(before);
  return passed > 0 && increase >= 0 ? increase / passed : null;
}

const SHOWN = 40; // events
const FIRST = 3; // jobs whose past is read, too

const SAID = {
  status: ({ status, stage, version, error }) => (version ? `succeeded: version ${version} is live`
    : error ? `failed: ${error.message}` : stage && status === "running" ? `is ${stage}` : `is ${status}`),
  preview: ({ version }) => `has a preview: version ${version}`,
  trial: ({ trial, trials }) => `has finished trial ${trial}${trials ? ` of ${trials}` : ""}`,
  resolved: () => "has chosen its recipe",
  publishing: ({ step }) => `is being published: ${step}`,
  report: ({ report_status: status }) => (status === "complete" ? "has its complete report card" : `has a ${status} report card`),
  epoch: ({ epoch, epochs, validation_accuracy: accuracy }) =>
    `has finished epoch ${epoch} of ${epochs}${accuracy == null ? "" : `, accuracy ${percent(accuracy)}`}`,
};
const kindOf = ({ type, data }) => (data.error ? "bad" : data.version && type === "status" ? "good" : "");

/** Whether an event of a list is to be shown: of the epochs of a job, only the newest. */
const isNewest = ({ type, job }, at, all) => type !== "epoch" || all.findIndex((one) => one.type === type && one.job.id === job.id) === at;

/** The newest events of the jobs. Pages, not streams: a browser has six connections for all tabs of a service. */
function useEvents(jobs) {
  const [events, setEvents] = useState([]);
  const known = useRef({}); // by job: the last event's number, or Infinity if nothing more will come
  useEffect(() => {
    const look = async (job, at) => {
      const after = known.current[job.id] ?? 0;
      const over = job.finished_at && job.report_status !== "quick";
      if (after === Infinity || (after === 0 && at >= FIRST && over)) return [];
      const page = await get(`/finetune/${job.id}/events?after=${after}&limit=1000`);
      const fresh = page.data.filter(({ seq }) => seq > (known.current[job.id] ?? 0)); // another look may have been faster
      known.current[job.id] = over && !page.has_more ? Infinity : Math.max(known.current[job.id] ?? 0, page.data.at(-1)?.seq ?? after);
      return fresh.map((event) => ({ ...event, job }));
    };
    Promise.allSettled(jobs.map(look)).then((found) => { // of a job that failed, the next look asks again
      const fresh = found.flatMap(({ value }) => value ?? []);
      if (fresh.length) setEvents((old) => [...fresh, ...old].sort((a, b) => b.created_at - a.created_at || b.seq - a.seq).filter(isNewest).slice(0, SHOWN));
    });
  }, [jobs]);
  return events;
}

function Share({ job }) {
  const { epoch, epochs, trial, trials } = job.progress;
  const share = trials ? trial / trials : epochs ? epoch / epochs : 0;
  return html`<span class="meter" role="img" aria-label=${`${percent(share, 0)} of this stage`}><span style=${{ transform: `scaleX(${share})` }}></span></span>`;
}

const NONE = [];

export function Jobs() {
  const { data } = useResource("/finetune?limit=10", 1500);
  const jobs = data?.data ?? NONE;
  const events = useEvents(jobs);
  const active = jobs.filter((job) => !job.finished_at);
  return html`<section aria-labelledby="jobs-title"><h2 id="jobs-title">Fine-tunes</h2>
    ${active.length === 0 && html`<p class="quiet">None is under way.</p>`}
    <ul class="underway">${active.map((job) => html`<li key=${job.id}><a href="#/finetune/${job.id}">${job.model}</a>
      <span class="quiet">${job.queue_position ? `number ${count(job.queue_position)} in the queue` : job.stage ?? job.status}</span><${Share} job=${job} /></li>`)}</ul>
  </section>
  <section aria-labelledby="events-title"><h2 id="events-title">Events</h2>
    ${events.length === 0 && html`<p class="quiet">Nothing has happened yet.</p>`}
    <ol class="feed">${events.map((event) => html`<li key=${event.id} class=${kindOf(event)}>
      <time class="quiet" dateTime=${new Date(1000 * event.created_at).toISOString()}>${ago(event.created_at)}</time>
      <span><a href="#/finetune/${event.job.id}">${event.job.model}</a> ${SAID[event.type]?.(event.data) ?? event.type}</span></li>`)}</ol>
    ${data?.has_more && html`<p class="quiet">Of the newest ${plural(jobs.length, "job")}.</p>`}
  </section>`;
}
