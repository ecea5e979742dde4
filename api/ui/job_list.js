// The jobs there are, newest first.

import { Busy, Notice, ago, html, useResource } from "./parts.js";

export const STAGES = ["validating", "previewing", "searching", "training", "evaluating", "exporting", "publishing", "warming"];
export const FINISHED = ["succeeded", "failed", "cancelled"];
const EVERY_MS = 2000;

export const Status = ({ status }) => html`<span class="status ${status}"><i aria-hidden="true"></i>${status}</span>`;

/** Where a job stands, in a few words. */
export function wordsOf(job) {
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
      <span class="quiet words">${wordsOf(job)}</span><span class="quiet when">${ago(job.created_at)}</span></a></li>`)}</ul>
  </section>`;
}
