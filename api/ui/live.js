// What a job has become: the version, whether it has its label, and what the training has found out about the images.

import { Notice, html, percent, useEffect, useMay, useResource, useState } from "./parts.js";
import { get, send } from "./api.js";
import { Findings } from "./dataset_report.js";
import { change } from "./draft.js";
import { GateRefusal } from "./labels.js";
import { galleryOf } from "./report.js";

/** Pictures by the names of their images, from the galleries of the version's report card. */
function usePictures(path, isWanted) {
  const [pictures, setPictures] = useState(null);
  useEffect(() => {
    if (!isWanted) return;
    galleryOf(path).then((images) => {
      const urls = new Map(images.map((image) => [image.name, image.url]));
      setPictures({ url: async (name) => urls.get(typeof name === "number" ? `image ${name}` : name) ?? null });
    }).catch(() => {}); // the names will do
  }, [path, isWanted]);
  return pictures;
}

function LabelErrors({ job, path, errors }) {
  const pictures = usePictures(path, errors.listed.length > 0), [excluded, setExcluded] = useState(new Set());
  const [state, setState] = useState({});
  const canRepeat = Boolean(job.dataset.kept);
  const again = async () => {
    try {
      const dataset = await get(`/datasets/${job.dataset.kept}`);
      change({ dataset, file: null, pictures, excluded, automatic: true, given: {}, model: job.model, label: job.label });
      location.hash = "#/finetune";
    } catch (error) {
      setState({ error });
    }
  };
  return html`<div class="labelerrors">
    <${Findings} title="Labels that are probably wrong" images=${errors.listed} pictures=${pictures}
      excluded=${excluded} onExclude=${canRepeat ? setExcluded : null}
      say=${(image) => html`labelled <b>${image.class}</b>, rather <b>${image.suggested}
        </b> (${percent(image.probability, 0)})`}
      note=${`By networks that had not seen them; about ${percent(errors.estimated_share)} of ${errors.checked} labels may be wrong.`} />
    ${canRepeat && excluded.size > 0 && html`<p>
      <button class="primary" onClick=${again}>Fine-tune again without ${excluded.size === 1 ? "it" : `these ${excluded.size}`}</button></p>`}
    ${state.error && html`<${Notice} kind="bad" title="The data set cannot be taken." error=${state.error} />`}
  </div>`;
}

export function Live({ job }) {
  const path = `/models/${job.model}/versions/${job.version}`;
  const { data, error } = useResource(path, job.report_status === "complete" ? 0 : 3000);
  const mayPredict = useMay("predict"), [given, setGiven] = useState(null);
  const report = data?.report, passed = given || job.gate?.passed !== false;
  const validation = report?.validation, robust = report?.robustness, errors = report?.inspection?.label_errors;
  if (error?.status === 404) return html`<${Notice} title=${`Version ${job.version} has been deleted since.`} />`;
  return html`<section class="live ${passed ? "" : "held"}" aria-labelledby="live-title">
    <div class="livehead"><span class="beacon" aria-hidden="true"></span><div>
      <h2 id="live-title">${job.model}:${job.version} is live</h2>
      <p>${passed ? html`It answers as <b>${given ?? job.label}</b>${validation && html`, and got <b>
        ${percent(validation.accuracy)}</b> of ${validation.images} images right that it had never seen`}.`
        : html`It answers when asked for by number; <b>${job.label}
          </b> does not lead to it, because it failed its gate.`}</p></div></div>
    <p class="actions">
      ${mayPredict && html`<a class="button primary"
        href=${passed ? `#/draw?model=${job.model}` : `#/draw?on=${job.model}:${job.version}`}>Draw with it</a>`}
      <a class="button" href="#/models/${job.model}/${job.version}">Report card</a>
      <a class="button" href="#/models/${job.model}">All versions</a></p>
    ${validation && html`<dl class="tiles">
      <div><dt>Accuracy</dt><dd><b>${percent(validation.accuracy)}
        </b> ${percent(validation.accuracy_interval[0])} to ${percent(validation.accuracy_interval[1])}</dd></div>
      ${report.base && html`<div><dt>The base, before</dt><dd><b>${percent(report.base.accuracy)}
        </b> on the same images</dd></div>`}
      ${robust && html`<div><dt>Under attack, ε = ${robust.epsilon}</dt><dd><b>${percent(robust.accuracy)}
        </b> ${robust.attack.toUpperCase()}</dd></div>`}
      ${report.calibration && html`<div><dt>Calibration error</dt><dd><b>
        ${percent(report.calibration.expected_calibration_error)}</b> confidence against accuracy</dd></div>`}
    </dl>`}
    ${!passed && html`<${GateRefusal} gate=${job.gate} label=${job.label}
      onOverride=${() => send("PUT", `/models/${job.model}/labels/${job.label}`, { version: job.version, override: true }).then(() => setGiven(job.label))} />`}
    ${report?.warnings?.length > 0 && html`<${Notice} kind="poor" title="Before you rely on it">
      ${report.warnings.length > 1 ? html`<ul>${report.warnings.map((one) => html`<li key=${one}>${one}</li>`)}
      </ul>` : report.warnings[0]}<//>`}
    ${errors?.listed.length > 0 && html`<${LabelErrors} job=${job} path=${path} errors=${errors} />`}
  </section>`;
}
