// A job as it happens: its events, put together to what the view shows.

import { useEffect, useRef, useState } from "./parts.js";
import { get, stream } from "./api.js";

const NOTHING = { runs: [], trials: [], best: null, resolved: null, preview: null, seq: 0 };

/** What is known after one more event. `runs` are trainings, of a fold or the final one, each with its epochs. */
export function after(state, { seq, type, data }) {
  if (seq <= state.seq) return state; // a stream that is resumed may repeat one
  const next = { ...state, seq };
  if (type === "epoch") next.runs = withEpoch(state.runs, data);
  if (type === "trial") [next.trials, next.best] = [[...state.trials, data], data.best];
  if (type === "resolved") next.resolved = data.spec;
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
export function useJob(id) {
  const [job, setJob] = useState(null), [events, setEvents] = useState(NOTHING), [error, setError] = useState(null);
  const asking = useRef({});
  const reload = () => {
    const state = asking.current;
    if (state.busy) return (state.again = true);
    Object.assign(state, { busy: true, again: false });
    return get(`/finetune/${id}`).then(setJob, setError).finally(() => (state.busy = false, state.again && reload()));
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
    stream(`/finetune/${id}/events`, onEvent, ending.signal).then(reload, setError);
    return () => ending.abort();
  }, [id]);
  return { job, events, error, reload };
}
