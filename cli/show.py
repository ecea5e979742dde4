"""What commands print for a person. Tables fit the terminal; what is not a terminal gets whole lines."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from temper.records import (
    Checkpoint,
    ClassPrediction,
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
    ModelSummary,
    Prediction,
    Verification,
    Version,
    Webhook,
    WebhookDeleted,
    doubts,
    failures,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from cli.doctor import Finding

console = Console(highlight=False)
WIDE = 1000  # columns
SHOWN = 20  # classes of a model, at most
BEST = 5  # classes of a prediction
NO_RECIPE = ("base", "search", "gate", "polarity", "device", "seed")  # of a spec
APART = {"validation": "validate on", "test": "test on"}  # parts of a data set besides the images to train on
TERMS = {"data_loss": "loss", "adversarial_loss": "adversarial", "l1": "l1", "l2": "l2", "l2_sp": "l2_sp"}


def say(text: str) -> None:
    """Print a line of markup; a terminal wraps it."""
    console.print(text, soft_wrap=not console.is_terminal)


def show(table: Table) -> None:
    """Print a table."""
    if console.is_terminal or console.quiet:
        console.print(table)
    else:
        Console(highlight=False, width=WIDE).print(table)


def _columns(*names: str, whole: str = "") -> Table:
    """A table whose cells are folded where they must be, but for the column `whole`."""
    return Table(*(Column(name, no_wrap=name == whole, overflow="fold") for name in names), box=None)


def _facts() -> Table:
    """A table of names and values."""
    return Table(box=None, show_header=False, padding=(0, 2, 0, 0))


def _when(seconds: float | None) -> str:
    """A moment, to the minute if it is not long ago."""
    if seconds is None:
        return ""
    return time.strftime("%H:%M" if time.time() - seconds < 86400 else "%b %d", time.localtime(seconds))


@contextmanager
def progress() -> Iterator[Callable[[Job], None]]:
    """A bar that follows a job: call what this yields with every state of it."""
    columns = (
        TextColumn("{task.description:<11}"),
        BarColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("queued", total=None, text="")
        printed: Any = None

        def tell(job: Job) -> None:
            nonlocal printed
            if job.finished:
                bar.update(task, description=job.status, text="", total=1, completed=job.status == "succeeded")
                return
            text, state = progress_line(job.progress), job.progress
            if text and not console.is_terminal and _position(state) != printed:
                printed = _position(state)
                console.print(text)
            done, of = _done(state)
            bar.update(task, description=job.stage or job.status, text=text, total=of, completed=done)

        yield tell


def _position(state: dict[str, Any]) -> tuple[Any, ...]:
    """What changes with every trial or epoch."""
    keys = ("round", "tried") if "trial" in state else ("fold", "epoch")
    return tuple(state.get(key) for key in keys)


def _done(state: dict[str, Any]) -> tuple[int, int | None]:
    """How many trials or epochs are done, and of how many."""
    done, of = ("tried", "trials") if "trial" in state else ("epoch", "epochs")
    return state.get(done, 0), state.get(of)


def progress_line(state: dict[str, Any]) -> str:
    """How far a search or a training is, in one line; empty if that is not known."""
    if "trial" in state:
        best = state["best"]
        low, high = best["accuracy_interval"]
        found = f"lowest loss {best['cross_entropy']:.3f}, {best['accuracy']:.1%} right ({low:.1%} to {high:.1%})"
        work = f"epochs {state['epochs']}, folds {state['folds']}"
        return f"round {state['round']}, {state['tried']}/{state['trials']} recipes, {work}: {found}"
    if "epoch" not in state:
        return ""
    fold = f"fold {state['fold']}/{state['folds']} " if "fold" in state else ""
    losses = "".join(f" {name} {state[key]:.3f}" for key, name in TERMS.items() if state.get(key))
    text = f"{fold}{state['epoch']}/{state.get('epochs', '?')}{losses}"
    if (accuracy := state.get("validation_accuracy")) is not None:
        text += f" val {accuracy:.1%}"
    if (robust := state.get("validation_accuracy_under_pgd")) is not None:
        text += f" PGD {robust:.1%}"
    return text


def show_job(job: Job) -> None:
    """A job in a few lines."""
    version = f"{job.model}:{job.version}" if job.version else job.model
    asked = ", to be cancelled" if job.cancel_requested else ", to pause" if job.pause_requested else ""
    say(f"[bold]{job.id}[/] {escape(version)} {job.status}{asked}")
    table = _facts()
    if job.dataset:
        table.add_row("data", _contents(job.dataset))
    if job.base:
        table.add_row("base", job.base)
    if job.stage:
        table.add_row("stage", job.stage)
    if not job.finished and (text := progress_line(job.progress)):
        table.add_row("progress", text)
    times = {"queued": job.created_at, "started": job.started_at, "finished": job.finished_at}
    table.add_row("times", ", ".join(f"{name} {_when(at)}" for name, at in times.items() if at is not None))
    if job.attempts > 1:
        table.add_row("attempts", f"{job.attempts}; its worker died")
    if job.checkpoint:
        table.add_row("checkpoint", "epoch {epoch} of {job}".format(**job.checkpoint))
    if job.preview_version:
        table.add_row("preview", f"{job.model}:{job.preview_version}")
    if job.version:
        table.add_row("report", job.report_status)
    if job.gate_failures:
        table.add_row("gate", "[red]failed[/]")
    if job.error:
        table.add_row("error", f"{escape(job.error.message)} \\[{job.error.code}]")
    show(table)


def print_gate(which: str, gate: Mapping[str, Any] | None, command: str) -> None:
    """That a version is live without its label, why, and the command that gives it one all the same."""
    reasons, overrides = failures(gate), (gate or {}).get("overrides")
    for doubt in doubts(gate):
        say(f"[yellow]{which} has passed its gate, with a doubt: {escape(doubt)}[/]")
    if not reasons:
        return
    if overrides:
        given = " and ".join(dict.fromkeys(one["label"] for one in overrides))
        say(f"[yellow]{which} has failed its gate, and got the label {given} by an override[/]")
    else:
        say(f"[bold red]{which} is live without its label: it has failed its gate[/]")
    for reason in reasons:
        say(f"  {escape(reason)}")
    if not overrides:
        say(f"To give it the label all the same:\n  {command}")


def _contents(data: Mapping[str, Any]) -> str:
    """What is in the data set of a job."""
    polarity = data["polarity"].replace("_", " ")
    apart = "".join(f", {data[part]['images']} to {verb}" for part, verb in APART.items() if data.get(part))
    return f"{data['images']} images{apart}, {len(data['classes'])} classes, {polarity}"


def show_findings(data: Mapping[str, Any]) -> None:
    """A line for each thing that is wrong with the data set of a job."""
    for part in (data, data.get("validation") or {}):
        for finding in part.get("findings", ()):
            say(f"[yellow]{escape(finding['message'])}[/]")


def show_dry_run(found: DryRun) -> None:
    """What a fine-tune would train, and what it would take."""
    say(f"[bold]{escape(found.model)}[/] would get a version; nothing was created")
    table, estimate = _facts(), found.estimate
    table.add_row("data", _contents(found.dataset))
    table.add_row("base", found.base)
    recipe = {name: value for name, value in found.spec.items() if name not in NO_RECIPE and value}
    searched = [name for name, value in recipe.items() if value == "auto" and name != "class_weights"]
    fixed = [f"{name} {_value(value)}" for name, value in recipe.items() if name not in searched]
    for name, parts in (("fixed", fixed), ("automatic", searched)):
        if parts:
            table.add_row(name, escape(", ".join(parts)))
    search = found.spec.get("search") or {}
    if search.get("folds"):
        table.add_row("search", f"{search['trials']} recipes, {search['folds']} folds")
    kind = "job" if estimate.jobs == 1 else "jobs"
    known = f"from {estimate.jobs} finished {kind} of its kind" if estimate.jobs else "a guess: none has finished here"
    table.add_row("time", f"{estimate.seconds:,.1f} s, give or take {estimate.seconds_within:.0%}, {known}")
    table.add_row("memory", f"{estimate.memory_bytes / 1e9:.1f} GB")
    show(table)
    for text in found.warnings:
        say(f"[yellow]{escape(text)}[/]")


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def show_jobs(jobs: Iterable[Job]) -> None:
    """A line for each job, and what went wrong."""

    def cells(job: Job) -> tuple[str, ...]:
        done, of = _done(job.progress)
        far = f"{done}/{of}" if done and not job.finished else ""
        model = f"{job.model}:{job.version}" if job.version else job.model
        return job.id, model, job.stage or job.status, far, _when(job.started_at)

    rows = ((cells(job), job.error.message if job.error else None) for job in jobs)
    _show_with_errors(("job", "model", "status", "progress", "started"), rows)


def _show_with_errors(names: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], str | None]]) -> None:
    """A line for each row, which begins with its id, with its error; in a terminal the errors are below the table."""
    table = _columns(*names, *(() if console.is_terminal else ("error",)), whole=names[0])
    failures = []
    for cells, error in rows:
        text = escape(error or "")
        if console.is_terminal:
            failures += [f"{cells[0]}: {text}"] if text else []
        table.add_row(*cells, *(() if console.is_terminal else (text,)))
    show(table)
    for failure in failures:
        say(failure)


def show_dataset(dataset: Dataset) -> None:
    """What is worth knowing of a data set."""
    report = dataset.report
    say(f"[bold]{dataset.id}[/] {escape(dataset.filename)}, {dataset.polarity.replace('_', ' ')}")
    facts = _facts()
    apart = "".join(
        f", {report[key]:,} to {verb}" for part, verb in APART.items() if report.get(key := f"{part}_images")
    )
    facts.add_row("images", f"{report['images']:,}{apart}")
    facts.add_row("classes", escape("  ".join(f"{name} {count}" for name, count in report["classes"].items())))
    for name, key in (
        ("duplicates", "duplicates"),
        ("of another class", "conflicts"),
        ("near-constant", "near_constant"),
        ("of these, light on transparent", "blank_after_alpha"),
    ):
        facts.add_row(name, f"{report.get(key, 0):,}")
    show(facts)


def show_datasets(datasets: Iterable[Dataset]) -> None:
    """A line for each data set."""
    table = _columns(
        "data set", "file", "images", "classes", "created", whole="data set" if not console.is_terminal else ""
    )
    for one in datasets:
        report = one.report
        sizes = (f"{report['images']:,}", str(len(report["classes"])))
        table.add_row(one.id, escape(one.filename), *sizes, _when(one.created_at))
    show(table)


def show_deleted_id(deleted: DatasetDeleted | WebhookDeleted) -> None:
    """What was deleted."""
    say(f"deleted {deleted.id}")


def show_secret(webhook: Webhook) -> None:
    """A webhook's new secret, alone on standard output."""
    click.echo(f"{webhook.id}, to {webhook.url}; the secret is not shown again:", err=True)
    click.echo(webhook.secret)


def show_webhooks(webhooks: Iterable[Webhook]) -> None:
    """A line for each webhook."""
    table = _columns("webhook", "url", "types", "status", "created", whole="webhook")
    for one in webhooks:
        why = f": {one.disabled_because}" if one.disabled_because else ""
        types = ", ".join(one.types) if one.types else "all"
        table.add_row(one.id, escape(one.url), types, escape(one.status + why), _when(one.created_at))
    show(table)


def show_deliveries(deliveries: Iterable[Delivery]) -> None:
    """A line for each delivery, and what went wrong."""
    rows = (((one.id, one.type, one.status, str(one.attempts), _when(one.created_at)), one.error) for one in deliveries)
    _show_with_errors(("delivery", "type", "status", "attempts", "created"), rows)


def show_delivery(delivery: Delivery) -> None:
    """A delivery that is sent again."""
    say(f"{delivery.id} is {delivery.status}")


def show_events(events: Iterable[Event]) -> None:
    """A line for each event, as it comes."""
    for event in events:
        clock = time.strftime("%T", time.localtime(event.created_at))
        say(f"{clock} [bold]{event.type:<10}[/] {escape(_event_line(event))}")


def _event_line(event: Event) -> str:
    match event.type:
        case "trial" | "epoch":
            return progress_line(event.data)
        case "resolved":
            return json.dumps(event.data.get("spec"))
    values = dict(event.data)
    if gate := values.pop("gate", None):
        values["gate"] = f"without its label: {'; '.join(failures(gate))}" if failures(gate) else None
    return " ".join(
        str(value["message"] if isinstance(value, dict) and "message" in value else value)
        for value in values.values()
        if value is not None
    )


def show_checkpoints(checkpoints: Iterable[Checkpoint]) -> None:
    """A line for each checkpoint."""
    table = _columns("epoch", "accuracy", "cross-entropy", "created", "version")
    for one in checkpoints:
        accuracy = "" if one.validation_accuracy is None else f"{one.validation_accuracy:.1%}"
        loss = "" if one.validation_cross_entropy is None else f"{one.validation_cross_entropy:.3f}"
        table.add_row(str(one.epoch), accuracy, loss, _when(one.created_at), str(one.version or ""))
    show(table)


def show_models(models: Iterable[ModelSummary]) -> None:
    """A line for each model."""
    table = _columns("model", "versions", "labels", "classes")
    for model in models:
        classes = escape(" ".join(model.classes[:SHOWN]))
        if len(model.classes) > SHOWN:
            classes += f" … ({len(model.classes)})"
        shares = {name: f" ({share:.0%})" for name, share in model.weights.items()}
        labels = ", ".join(f"{name} {number}{shares.get(name, '')}" for name, number in sorted(model.labels.items()))
        table.add_row(model.name, ", ".join(map(str, model.versions)), labels, classes)
    show(table)


def show_label(label: Label) -> None:
    """Where a label has moved."""
    share = f" and {label.weight:.0%} of the requests" if label.weight else ""
    say(f"{label.label} of {label.model} is now [bold]{label.model}:{label.version}[/]{share}")


def show_gate(gate: Gate) -> None:
    """What the versions of a model must fulfil."""
    if gate.gate is None:
        return say(f"{gate.model} has the default gate: no version may be clearly worse than the one before")
    table = _facts()
    for name, limit in gate.gate.items():
        if limit is not None:
            table.add_row(name.replace("_", " "), escape(json.dumps(limit)))
    return show(table)


def show_deleted(deleted: Deleted) -> None:
    """What was deleted."""
    if deleted.label is not None:
        say(f"deleted the label {deleted.label} of {deleted.model}")
    else:
        say("deleted " + ", ".join(f"{deleted.model}:{number}" for number in deleted.versions or []))


def show_verification(found: Verification) -> None:
    """A line for the files and for each model server."""
    table = _facts()
    for name, failure in found.failures.items():
        table.add_row(name, f"[red]{escape(failure)}[/]" if failure else "as trained")
    show(table)


def show_health(health: Health) -> None:
    """A line for each part of the service."""
    table = _facts()
    table.add_row("service", "ready" if health.ready else "[red]not ready[/]")
    table.add_row("store", health.store)
    table.add_row("disk", health.disk)
    for kind, states in (("model server", health.model_servers), ("worker", health.workers)):
        for name, state in states.items():
            table.add_row(kind, f"{state} ({escape(name)})")
    show(table)


def show_finding(finding: "Finding") -> None:
    """Print what a check of the doctor has found, and below it what to do."""
    color = {"ok": "green", "warning": "yellow", "fault": "red"}[finding.level]
    click.echo(f"{click.style(f'{finding.level:8}', fg=color)} {finding.check:13} {finding.found}")
    if finding.advice:
        click.echo(f"{'':22} → {finding.advice}")


def show_file(path: Path) -> None:
    """Which file was written."""
    say(f"{escape(str(path))}: {path.stat().st_size:,} bytes")


def show_version(version: Version) -> None:
    """The report card of a version."""
    print_report(version.report)


def print_report(report: dict[str, Any]) -> None:
    """The report card in a few lines. A pretrained model has a card of other fields."""
    if not report.get("validation"):
        table = _facts()
        for name, value in report.items():
            table.add_row(name.replace("_", " "), escape(value if isinstance(value, str) else json.dumps(value)))
        return show(table)
    if sentence := (report.get("search") or {}).get("sentence"):
        console.print(escape(sentence))
    table = _facts()
    validation, gap, attacked = report["validation"], report["generalization_gap"], report["robustness"]
    low, high = validation["accuracy_interval"]
    text = f"{validation['images']} images, 95% interval {low:.1%} to {high:.1%}"
    kind = "out-of-fold" if validation.get("out_of_fold") else "validation"
    table.add_row(f"{kind} accuracy", f"{validation['accuracy']:.1%}", text)
    if test := report.get("test"):
        low, high = test["accuracy_interval"]
        text = f"{test['images']} images, 95% interval {low:.1%} to {high:.1%}"
        table.add_row("test accuracy", f"{test['accuracy']:.1%}", text)
    table.add_row("generalization gap", f"{gap['accuracy']:+.1%}", f"cross-entropy {gap['cross_entropy']:+.3f}")
    name = f"accuracy under {attacked['attack'].upper()}"
    weaker = attacked.get("accuracy_under_fgsm")
    beside = "" if weaker is None else f", {weaker:.1%} under FGSM"
    table.add_row(name, f"{attacked['accuracy']:.1%}", f"epsilon {attacked['epsilon']:g}{beside}")
    if twin := report.get("twin"):
        change, (low, high) = twin["differences"]["accuracy"]["value"], twin["differences"]["accuracy"]["interval"]
        text = f"{100 * change:+.1f} points by regularization, 95% interval {100 * low:+.1f} to {100 * high:+.1f}"
        table.add_row("its unregularized twin", f"{twin['accuracy']:.1%}", text)
    error = report["calibration"]["expected_calibration_error"]
    table.add_row("calibration error", f"{error:.1%}", "expected, over 10 bins")
    counts = report["parameters"]
    table.add_row("trained parameters", f"{counts['trained']:,}", f"of {counts['total']:,}")
    by_stage = report["cost"]["seconds"]
    seconds = "  ".join(f"{stage} {value:.2f}" for stage, value in by_stage.items())
    table.add_row("seconds", f"{sum(by_stage.values()):.2f}", seconds)
    show(table)
    for text in [*report["warnings"], *(warning["message"] for warning in report["regularization"]["warnings"])]:
        say(f"[yellow]{escape(text)}[/]")
    if report["training"]["ended_by"] == "catastrophic_overfitting":
        epochs = report["training"]["overfitted_attack_in_epoch"], report["training"]["kept_epoch"]
        console.print(
            "[yellow]the attack was overfitted in epoch {}; the weights are those of epoch {}[/]".format(*epochs)
        )
    return None


def show_prediction(answer: Prediction) -> None:
    """The most probable classes of one image, or a line for each of many."""
    which = f"{answer.model}:{answer.version}"
    if len(answer.predictions) > 1:
        table = _columns("image", "class", "probability", "plausible")
        for number, one in enumerate(answer.predictions):
            name, sure = escape(one.file or str(number)), f"{max(one.probabilities):.1%}"
            table.add_row(name, escape(one.label), sure, escape(_plausible(one)))
        show(table)
        return say(f"predicted by {which}")
    (one,) = answer.predictions
    console.print(f"[bold]{escape(one.label)}[/] predicted by {which}")
    for probability, name in sorted(zip(one.probabilities, answer.classes, strict=True), reverse=True)[:BEST]:
        console.print(f"  {escape(f'{name:>8}')} {'█' * round(30 * probability)} {probability:.1%}")
    if text := _plausible(one):
        console.print(escape(f"plausible: {text}"))
    return None


def _plausible(one: ClassPrediction) -> str:
    """The prediction set in words; empty for a version that has none."""
    if one.none_of_these:
        return "none of these: unlike the images that were learned"
    return "" if one.set is None else ", ".join(one.set) or "no class"


def print_image(image: "Image", width: int = 28) -> None:
    """Draw an image in the terminal, two pixels per character."""
    scale = width / max(image.size)
    grey = image.convert("L").resize((max(1, round(scale * image.width)), max(1, round(scale * image.height / 2)) * 2))
    shades = " .:-=+*#%@"
    for y in range(0, grey.height, 2):
        pairs = ((grey.getpixel((x, y)), grey.getpixel((x, y + 1))) for x in range(grey.width))
        console.print("".join(shades[int((a + b) / 511 * len(shades))] for a, b in pairs), style="bold")  # type: ignore[operator]
