"""The verbs of the API, and the two clients that have them."""

import functools
import itertools
import json as jsons
import logging
import random
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from temper import bodies
from temper.bodies import Data, Image
from temper.errors import Conflict, JobFailed, NotFound, TooManyRequests, Unavailable, Unreachable
from temper.records import (
    Checkpoint,
    Correction,
    CorrectionDeleted,
    Dataset,
    DatasetDeleted,
    Deleted,
    Delivery,
    DryRun,
    Event,
    Gate,
    Health,
    Job,
    Label,
    Model,
    ModelSummary,
    Prediction,
    Verification,
    Version,
    Webhook,
    WebhookDeleted,
    failures,
)
from temper.transport import (
    Answer,
    AsyncDriver,
    Chunk,
    Driver,
    Lister,
    Listing,
    Open,
    Pause,
    Request,
    Send,
    Steps,
    SyncDriver,
    Verb,
    Work,
    at,
)

log = logging.getLogger("temper.client")

LOOK_S = 0.25  # between looks at a job that is waited for
PATIENCE_S = 60.0  # how long the service may be away while a job is followed
LONG_S = 300.0  # what an upload, a proof or a page may take
SHORTEST_S, LONGEST_S = 0.25, 5.0  # between attempts
TOLD_S = 1.5  # between attempts from which on a user wonders what is going on
MOST = 100  # items of a page
MOST_EVENTS = 1000
STABLE = "stable"

Path_ = str | PathLike[str]


class Verbs(Driver):
    """What can be asked of the service. Every failure is a `TemperError`; a file that cannot be read an `OSError`."""

    def _ask(self, request: Request, step: type[Send | Open] = Send, patience_s: float = 0.0) -> Steps[Answer]:
        """The answer, if it is a success.

        Args:
            patience_s: for how long a request that can be repeated is repeated at least.
        """
        began = time.monotonic()
        for attempt in itertools.count():
            try:
                answer: Answer = yield step(request)
                answer.check()
                return answer
            except (Unavailable, TooManyRequests) as exc:
                if not request.repeatable or (attempt >= self.retries and time.monotonic() - began >= patience_s):
                    raise
                pause_s = min(LONGEST_S, SHORTEST_S * 2**attempt) * random.uniform(0.5, 1.0)
                pause_s = max(pause_s, exc.retry_after_s or 0.0)
                if pause_s > TOLD_S:
                    log.info("%s; trying again in %.0f s", exc.message, pause_s)
                yield Pause(pause_s)
        raise AssertionError

    def _get(self, path: str, patience_s: float = 0.0, **params: Any) -> Steps[Answer]:
        return (yield from self._ask(Request("GET", path, params, repeatable=True), patience_s=patience_s))

    def _number(self, model: str, version: int | None) -> Steps[int]:
        """The version, or the one labelled `stable`."""
        if version is not None:
            return version
        return _labelled((yield from self._get(at("models", model))).read(Model), STABLE)

    def _of_version(self, model: str, version: int | None, *parts: str) -> Steps[str]:
        """The path of a version, or of something that belongs to it."""
        number = yield from self._number(model, version)
        return at("models", model, "versions", number, *parts)

    def _wait(self, job: str, on_progress: Callable[[Job], object] | None, timeout_s: float | None) -> Steps[Job]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        shown: Job | None = None
        while True:
            found = (yield from self._get(at("finetune", job), PATIENCE_S)).read(Job)
            if on_progress and found != shown:
                shown = found
                on_progress(found)
            if found.status == "succeeded":
                return found
            if found.finished:
                raise JobFailed(found.error.message if found.error else f"the job was {found.status}", found)
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"{job} is still {found.status} after {timeout_s:g} s")
            yield Pause(LOOK_S)

    def _save(self, path: str, to: Path_, name: str) -> Steps[Path]:
        """Stream a file to a path, or into a directory under this name. It appears when it is complete."""
        target = bodies.saved_as(to, name)
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        yield from self._ask(Request("GET", path, repeatable=True, timeout_s=LONG_S), Open)
        try:
            with part.open("xb") as file:
                while chunk := (yield Chunk()):
                    file.write(chunk)
            part.replace(target)
        except OSError as exc:  # which names `part`
            raise OSError(exc.errno, exc.strerror, str(target)) from exc
        finally:
            part.unlink(missing_ok=True)
        return target

    def _upload(
        self, path: str, fields: Mapping[str, str], given: Mapping[str, Data | None], key: str | None = None
    ) -> Steps[Answer]:
        """Post a form with files; repeated if need be, which creates nothing twice."""
        files: dict[str, Any] = {}
        try:
            for name, part in given.items():
                if part is not None:
                    files[name] = yield Work(functools.partial(bodies.upload, part))
            # A fixed boundary makes a repeated request equal to the first, byte by byte.
            content_type = {"Content-Type": f"multipart/form-data; boundary={uuid.uuid4().hex}"} if files else {}
            request = Request(
                "POST", path, data=fields, files=files, repeatable=True, timeout_s=LONG_S,
                headers={"Idempotency-Key": key or uuid.uuid4().hex, **content_type},
            )  # fmt: skip
            return (yield from self._ask(request))
        finally:
            for _, file in files.values():
                file.close()

    def _create(self, path: str, new: Mapping[str, Any], key: str | None) -> Steps[Answer]:
        """Post what is to be created; repeated if need be, which creates nothing twice."""
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return (yield from self._ask(Request("POST", path, json=new, headers=headers, repeatable=True)))

    @Verb
    def health(self) -> Steps[Health]:
        """Which parts of the service work. Does not raise if it is not ready, only if nothing answers."""
        return (yield from self._ask(Request("GET", "/readyz", repeatable=True, accepted=(503,)))).read(Health)

    @Verb
    def finetune(
        self,
        data: Data | None,
        model: str,
        spec: Mapping[str, Any] | None = None,
        *,
        dataset: str | None = None,
        validation: Data | None = None,
        exclude: Sequence[str | int] = (),
        corrections: bool = False,
        label: str | None = None,
        priority: int = 0,
        metadata: Mapping[str, str] | None = None,
        wait: bool = False,
        on_progress: Callable[[Job], object] | None = None,
        idempotency_key: str | None = None,
    ) -> Steps[Job]:
        """Upload labelled images and queue a fine-tune on them.

        Args:
            data: the path of a directory of class folders (perhaps inside train/, val/ and test/) or of images with a
                CSV of their labels, of a zip of one or of an `.npz`; or a pair of arrays, images (n, height, width[,
                channels]) as uint8 or floats from 0 to 1, and the label of each.
                None with `dataset`.
            model: gets a new version.
            spec: how to train; chosen automatically if not given.
            dataset: id of a data set that is kept, in place of `data`.
            validation: images to measure on, in the same form.
            exclude: images to leave out, by the names that `findings` of the job's data set and reports give them:
                files in the zip or directory, or indices in the array.
            corrections: learn from the model's corrections as well; without `dataset` they are added to the data set
                that `stable` was trained on.
            label: moves to the new version; `stable` if not given.
            priority: from -100 to 100; the highest of the queued jobs is next.
            metadata: of your own, to find the job by; up to 16 strings.
            wait: return when the job has succeeded, as `wait` does.
            on_progress: as in `wait`.
            idempotency_key: requests with the same one are one job; made up if not given.

        Raises:
            InvalidDataset: the images cannot be trained on.
            InvalidSpec: the spec is wrong.
            JobFailed: `wait` was given, and the job failed or was cancelled.
        """
        fields, files = _asked(
            data, model, spec, dataset, validation, exclude, corrections, label, priority, metadata
        )  # fmt: skip
        job = (yield from self._upload("/finetune", fields, files, idempotency_key)).read(Job)
        return (yield from self._wait(job.id, on_progress, None)) if wait else job

    @Verb
    def dry_run(
        self,
        data: Data | None,
        model: str,
        spec: Mapping[str, Any] | None = None,
        *,
        dataset: str | None = None,
        validation: Data | None = None,
        exclude: Sequence[str | int] = (),
        corrections: bool = False,
        label: str | None = None,
        priority: int = 0,
        metadata: Mapping[str, str] | None = None,
    ) -> Steps[DryRun]:
        """Validate what `finetune` would be given, and estimate what it would take. Nothing is created.

        Raises:
            InvalidDataset: the images cannot be trained on.
            InvalidSpec: the spec is wrong.
        """
        fields, files = _asked(
            data, model, spec, dataset, validation, exclude, corrections, label, priority, metadata
        )  # fmt: skip
        return (yield from self._upload("/finetune", fields | {"dry_run": "true"}, files)).read(DryRun)

    @Verb
    def upload(self, data: Data) -> Steps[Dataset]:
        """Upload labelled images, in the form that `finetune` takes, see what is in them, and keep them.

        Raises:
            InvalidDataset: the images cannot be trained on.
        """
        return (yield from self._upload("/datasets", {}, {"data": data})).read(Dataset)

    @Lister
    def datasets(self, limit: int | None = None) -> Listing[Dataset]:
        """Data sets that are kept, newest first; at most `limit` of them."""
        yield from self._pages("/datasets", Dataset, "id", limit)

    @Verb
    def dataset(self, dataset: str) -> Steps[Dataset]:
        """A data set that is kept, with its report."""
        return (yield from self._get(at("datasets", dataset))).read(Dataset)

    @Verb
    def delete_dataset(self, dataset: str) -> Steps[DatasetDeleted]:
        """Delete a data set that no unfinished job needs."""
        return (yield from self._ask(Request("DELETE", at("datasets", dataset)))).read(DatasetDeleted)

    @Verb
    def create_webhook(
        self, url: str, types: Collection[str] | None = None, *, idempotency_key: str | None = None
    ) -> Steps[Webhook]:
        """Register an endpoint that is told what happens from now on.

        Args:
            url: of the endpoint.
            types: what to tell it, such as `model.label.moved`; everything if not given.
            idempotency_key: requests with the same one are one webhook; made up if not given.

        Returns:
            The webhook with its `secret`, which signs its deliveries and is shown this once.

        Raises:
            InvalidRequest: webhooks may not go to the URL, or there is no such type.
        """
        new = {"url": url} | ({} if types is None else {"types": list(types)})
        return (yield from self._create("/webhooks", new, idempotency_key)).read(Webhook)

    @Lister
    def webhooks(self, limit: int | None = None) -> Listing[Webhook]:
        """Webhooks without their secrets, newest first; at most `limit` of them."""
        yield from self._pages("/webhooks", Webhook, "id", limit)

    @Verb
    def webhook(self, webhook: str) -> Steps[Webhook]:
        """A webhook without its secret."""
        return (yield from self._get(at("webhooks", webhook))).read(Webhook)

    @Verb
    def delete_webhook(self, webhook: str) -> Steps[WebhookDeleted]:
        """Delete a webhook with its deliveries."""
        return (yield from self._ask(Request("DELETE", at("webhooks", webhook)))).read(WebhookDeleted)

    @Verb
    def rotate_webhook(self, webhook: str) -> Steps[Webhook]:
        """Give a webhook a new `secret`, which is shown this once. For 24 hours the old one signs as well."""
        return (yield from self._ask(Request("POST", at("webhooks", webhook, "rotate")))).read(Webhook)

    @Lister
    def deliveries(self, webhook: str, status: str | None = None, limit: int | None = None) -> Listing[Delivery]:
        """What a webhook was or will be told, newest first; at most `limit` deliveries.

        Args:
            status: only those that are `pending`, `succeeded`, or `failed`, that is given up.
        """
        yield from self._pages(at("webhooks", webhook, "deliveries"), Delivery, "id", limit, status=status)

    @Verb
    def replay_delivery(self, webhook: str, delivery: str) -> Steps[Delivery]:
        """Send a delivery again, at once and with all its retries, under the same id.

        Raises:
            Conflict: the webhook is disabled.
        """
        path = at("webhooks", webhook, "deliveries", delivery, "replay")
        return (yield from self._ask(Request("POST", path))).read(Delivery)

    @Verb
    def job(self, job: str) -> Steps[Job]:
        """A job with its status, its progress, and its version or error."""
        return (yield from self._get(at("finetune", job))).read(Job)

    @Lister
    def jobs(self, limit: int | None = None) -> Listing[Job]:
        """Jobs, newest first; at most `limit` of them."""
        yield from self._pages("/finetune", Job, "id", limit)

    @Verb
    def wait(
        self, job: str, on_progress: Callable[[Job], object] | None = None, timeout_s: float | None = None
    ) -> Steps[Job]:
        """Wait until a job has succeeded. The service may be away for up to a minute meanwhile.

        Args:
            on_progress: called with the job whenever it has changed.
            timeout_s: longest time to wait; the job goes on after it.

        Raises:
            JobFailed: it failed or was cancelled.
            TimeoutError: it has not finished in time.
        """
        return (yield from self._wait(job, on_progress, timeout_s))

    @Verb
    def cancel(self, job: str) -> Steps[Job]:
        """Cancel a job that waits at once, or a running one within a second."""
        return (yield from self._ask(Request("POST", at("finetune", job, "cancel")))).read(Job)

    @Verb
    def pause(self, job: str) -> Steps[Job]:
        """Pause a queued job at once, or a running one at the end of its epoch; its worker is free for others."""
        return (yield from self._ask(Request("POST", at("finetune", job, "pause")))).read(Job)

    @Verb
    def resume(self, job: str) -> Steps[Job]:
        """Queue a paused job again. It goes on from where it was."""
        return (yield from self._ask(Request("POST", at("finetune", job, "resume")))).read(Job)

    @Lister
    def events(self, job: str, follow: bool = False, after: int = 0) -> Listing[Event]:
        """What has happened to a job, oldest first.

        Args:
            follow: go on with what happens, until nothing more can. A connection that breaks is made again: no event is
                lost or told twice, and the service may be away for up to a minute.
            after: number of the last event that is known.
        """
        path = at("finetune", job, "events")
        while not follow:
            answer = yield from self._get(path, after=after, limit=MOST_EVENTS)
            found, more = answer.page(Event)
            yield from found
            if not more:
                return
            after = found[-1].seq
        while True:
            headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
            yield from self._ask(Request("GET", path, headers=headers, repeatable=True), Open, PATIENCE_S)
            stream = EventStream()
            try:
                while chunk := (yield Chunk()):
                    for data in stream.read(chunk):
                        event = Event.read(data)
                        after = event.seq
                        yield event
            except Unreachable:
                yield Pause(SHORTEST_S)
                continue
            state = (yield from self._get(at("finetune", job), PATIENCE_S)).read(Job)
            if state.finished and state.report_status != "quick":  # else something on the way has ended the stream
                return
            yield Pause(SHORTEST_S)

    @Lister
    def checkpoints(self, job: str) -> Listing[Checkpoint]:
        """What the training of a job has kept, as `checkpoints` of its spec asks for; the last epoch first."""
        yield from self._pages(at("finetune", job, "checkpoints"), Checkpoint, "id", None)

    @Verb
    def publish_checkpoint(
        self, job: str, epoch: int, label: str | None = None, *, idempotency_key: str | None = None
    ) -> Steps[Job]:
        """Queue a job that publishes a checkpoint of a job as a version, without training.

        Args:
            label: moves to the version; `stable` if not given.
            idempotency_key: requests with the same one are one job; made up if not given.

        Raises:
            NotFound: the job has no checkpoint of this epoch.
            Conflict: it has not finished, or its images or what it started from have been deleted.
        """
        path = at("finetune", job, "checkpoints", epoch, "publish")
        return (yield from self._create(path, {"label": label} if label else {}, idempotency_key)).read(Job)

    @Verb
    def predict(
        self, image: Image, model: str, version: int | None = None, label: str | None = None,
        top_k: int | None = None, *, feedback: bool = False,
    ) -> Steps[Prediction]:  # fmt: skip
        """Classify an image, or many.

        Args:
            image: the path or the content of an image file, an `.npy` or a zip of images; or an array of (28, 28),
                (n, 28, 28), (n, 28, 28, 1) or (n, 784) uint8, or floats from 0 to 1.
            model: the model to use.
            version: one of its versions.
            label: the label of one; without both, `stable` or a label with a share of the requests.
            top_k: also return so many of the most probable classes, best first.
            feedback: keep the images, 16 at most, for an hour, so that `correct` can name the right classes.

        Raises:
            InvalidImage, InvalidInstances: the image or array cannot be read.
        """
        options = {"model": model, "version": version, "label": label, "top_k": top_k}
        return (yield from self._predict("/predict", image, options | ({"feedback": "true"} if feedback else {})))

    @Verb
    def explain(
        self, image: Image, model: str, version: int | None = None, label: str | None = None, *,
        target: str | None = None, pictures: str = "numbers", feedback: bool = False,
    ) -> Steps[Prediction]:  # fmt: skip
        """Classify up to 16 images, and explain the answers.

        Args:
            image, model, version, label, feedback: as for `predict`.
            target: explain this class instead of the answers.
            pictures: `numbers`, or `png` for data URLs.

        Returns:
            Predictions with an `explanation` each.

        Raises:
            Conflict: the version was exported by a release that did not explain.
        """
        options = {"model": model, "version": version, "label": label, "class": target, "pictures": pictures}
        return (yield from self._predict("/explain", image, options | ({"feedback": "true"} if feedback else {})))

    def _predict(self, path: str, image: Image, options: Mapping[str, Any]) -> Steps[Prediction]:
        kind, content = yield Work(functools.partial(bodies.prediction, image))
        request = Request("POST", path, options, headers={"Content-Type": kind}, content=content, repeatable=True)
        return (yield from self._ask(request)).read(Prediction)

    @Verb
    def correct(self, prediction: str, label: str, index: int = 0) -> Steps[Correction]:
        """Name the right class of an image that was predicted with `feedback`, in place of an earlier correction.

        Args:
            prediction: its `id`.
            label: the right class.
            index: which of its images.

        Raises:
            NotFound: there is no such prediction, or not any more.
        """
        new = {"id": prediction, "index": index, "label": label}
        return (yield from self._ask(Request("POST", "/feedback", json=new, repeatable=True))).read(Correction)

    @Lister
    def corrections(self, model: str, limit: int | None = None) -> Listing[Correction]:
        """The corrections of a model, the oldest first. `finetune` learns from them with `corrections=True`."""
        yield from self._pages("/feedback", Correction, "id", limit, model=model)

    @Verb
    def delete_correction(self, correction: str) -> Steps[CorrectionDeleted]:
        """Delete a correction."""
        return (yield from self._ask(Request("DELETE", at("feedback", correction)))).read(CorrectionDeleted)

    @Lister
    def models(self, limit: int | None = None) -> Listing[ModelSummary]:
        """The models by name; at most `limit` of them."""
        yield from self._pages("/models", ModelSummary, "name", limit)

    @Verb
    def model(self, model: str) -> Steps[Model]:
        """A model with its live versions and their report cards."""
        return (yield from self._get(at("models", model))).read(Model)

    @Verb
    def version(self, model: str, version: int | None = None) -> Steps[Version]:
        """A live version with its report card, by default the one labelled `stable`."""
        path = yield from self._of_version(model, version)
        return (yield from self._get(path)).read(Version)

    @Verb
    def report(self, model: str, version: int | None = None) -> Steps[dict[str, Any]]:
        """The report card of a version, by default of the one labelled `stable`."""
        path = yield from self._of_version(model, version)
        return (yield from self._get(path)).read(Version).report

    @Verb
    def report_page(self, model: str, version: int | None = None) -> Steps[str]:
        """The report card as a page of HTML that needs no other file."""
        path = yield from self._of_version(model, version, "report")
        request = Request("GET", path, repeatable=True, timeout_s=LONG_S)
        return (yield from self._ask(request)).body.decode()

    @Verb
    def promote(self, model: str, version: int, *, override: bool = False) -> Steps[Label]:
        """Have `stable` stand for a version.

        Args:
            override: also if its gate has failed.

        Raises:
            GateFailed: it has.
        """
        return (yield from self._put_label(model, STABLE, version, None, override))

    @Verb
    def rollback(self, model: str, label: str = STABLE, *, override: bool = False) -> Steps[Label]:
        """Move a label back to the live version before the one that it stands for that has not failed its gate.

        Args:
            override: to the one before, whether it has failed its gate or not.

        Raises:
            Conflict: there is none.
            GateFailed: all that there are have failed theirs.
        """
        found = (yield from self._get(at("models", model))).read(Model)
        now = _labelled(found, label)
        earlier = [version for version in found.versions if version.version < now]
        passed = [version for version in earlier if override or not failures(version.report.get("gate"))]
        before = [version.version for version in passed or earlier]
        if not before:
            text = f"model {model!r} has no live version before {now}, for which {label!r} stands"
            raise Conflict(text, code="wrong_state", param="version")
        return (yield from self._put_label(model, label, max(before), None, override))

    @Verb
    def set_label(
        self, model: str, label: str, version: int, weight: float | None = None, *, override: bool = False
    ) -> Steps[Label]:
        """Have a label stand for a version.

        Args:
            weight: its share of the requests that name neither version nor label; stays as it is if not given.
            override: also if the gate of the version has failed.

        Raises:
            GateFailed: it has.
        """
        return (yield from self._put_label(model, label, version, weight, override))

    @Verb
    def gate(self, model: str) -> Steps[Gate]:
        """The gate of a model: what its versions must fulfil to get their label."""
        return (yield from self._get(at("models", model, "gate"))).read(Gate)

    @Verb
    def set_gate(self, model: str, gate: Mapping[str, Any]) -> Steps[Gate]:
        """Give a model a gate, for fine-tunes to come that have none in their spec.

        Args:
            gate: conditions such as `{"accuracy": 0.9}`; what is left out has its default.
        """
        return (yield from self._ask(Request("PUT", at("models", model, "gate"), json=dict(gate)))).read(Gate)

    @Verb
    def delete_gate(self, model: str) -> Steps[Gate]:
        """Take a model's gate away; the default is in its place."""
        return (yield from self._ask(Request("DELETE", at("models", model, "gate")))).read(Gate)

    @Verb
    def delete_label(self, model: str, label: str) -> Steps[Deleted]:
        """Delete a label; its version stays."""
        return (yield from self._ask(Request("DELETE", at("models", model, "labels", label)))).read(Deleted)

    @Verb
    def delete(self, model: str, version: int | None = None) -> Steps[Deleted]:
        """Delete a version that has no label; without a version the whole model."""
        path = at("models", model) if version is None else at("models", model, "versions", version)
        return (yield from self._ask(Request("DELETE", path, timeout_s=LONG_S))).read(Deleted)

    @Verb
    def verify(self, model: str, version: int | None = None) -> Steps[Verification]:
        """Check the files of a version, and that every model server answers as the trainer did."""
        path = yield from self._of_version(model, version, "verify")
        return (yield from self._ask(Request("POST", path, timeout_s=LONG_S))).read(Verification)

    @Verb
    def download(self, model: str, to: Path_, version: int | None = None) -> Steps[Path]:
        """Save a version as a zip of its SavedModel, as `model/version/`; return the path.

        Args:
            to: a file, which is replaced, or a directory.
        """
        number = yield from self._number(model, version)
        path = at("models", model, "versions", number, "saved_model")
        return (yield from self._save(path, to, f"{model}-{number}.zip"))

    @Verb
    def delta(self, model: str, to: Path_, version: int | None = None) -> Steps[Path]:
        """Save what a fine-tune changed, from which `python -m trainer.delta` rebuilds the version; return the path.

        Args:
            to: a file, which is replaced, or a directory.
        """
        number = yield from self._number(model, version)
        path = at("models", model, "versions", number, "delta")
        return (yield from self._save(path, to, f"{model}-{number}.delta.npz"))

    def _put_label(
        self, model: str, label: str, version: int, weight: float | None, override: bool
    ) -> Steps[Label]:  # fmt: skip
        move: dict[str, Any] = {"version": version} | ({} if weight is None else {"weight": weight})
        move |= {"override": True} if override else {}
        return (yield from self._ask(Request("PUT", at("models", model, "labels", label), json=move))).read(Label)

    def _pages(self, path: str, kind: Any, key: str, limit: int | None, **params: Any) -> Listing[Any]:
        """All items of a list, by pages; `key` is what names an item."""
        after, left = None, limit
        while left is None or left > 0:
            size = MOST if left is None else min(left, MOST)
            found, more = (yield from self._get(path, after=after, limit=size, **params)).page(kind)
            yield from found
            if not more:
                return
            after = getattr(found[-1], key)
            left = None if left is None else left - len(found)


def _asked(
    data: Data | None, model: str, spec: Mapping[str, Any] | None, dataset: str | None, validation: Data | None,
    exclude: Sequence[str | int], corrections: bool, label: str | None, priority: int,
    metadata: Mapping[str, str] | None,
) -> tuple[dict[str, str], dict[str, Data | None]]:  # fmt: skip
    """The fields and files of a form that asks for a fine-tune."""
    if (data is None) is (dataset is None) and not (corrections and data is None):
        raise ValueError("give either data or dataset")
    fields = {"model": model} | ({"spec": jsons.dumps(spec)} if spec is not None else {})
    fields |= ({"label": label} if label else {}) | ({"dataset": dataset} if dataset else {})
    fields |= {"priority": str(priority)} if priority else {}
    fields |= {"corrections": "true"} if corrections else {}
    fields |= {"exclude": jsons.dumps(list(exclude))} if exclude else {}
    fields |= {"metadata": jsons.dumps(metadata)} if metadata else {}
    return fields, {"data": data, "validation": validation}


def _labelled(model: Model, label: str) -> int:
    if label not in model.labels:
        raise NotFound(f"model {model.name!r} has no label {label!r}", code="unknown_model", param="label")
    return model.labels[label]


class EventStream:
    """Reads server-sent events (section 9.2 of the HTML standard), of which each `data` is JSON."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def read(self, chunk: bytes) -> Iterator[Any]:
        """The data of the events that a chunk completes. What is incomplete when a stream breaks off is dropped."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:])
            elif not line and self._data:
                yield jsons.loads(b"\n".join(self._data))
                self._data = []


class Client(Verbs, SyncDriver):
    """A client of a Temper service.

        with Client("http://localhost:8080") as temper:
            temper.finetune("digits.zip", "digits", wait=True)
            print(temper.predict("seven.png", "digits").labels)

    It may be shared by threads.
    """


class AsyncClient(Verbs, AsyncDriver):
    """The same for asyncio: verbs with one outcome are awaited, those with many iterated over.

    async with AsyncClient() as temper:
        async for event in temper.events("ftjob-…", follow=True):
            print(event.type)
    """
