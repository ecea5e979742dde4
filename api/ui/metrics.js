// From the counters in GET /metrics to what happens each second.

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
