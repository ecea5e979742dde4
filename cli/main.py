"""The `temper` command: `serve`, and a thin client of the HTTP API."""

import contextlib
import json
import re
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, get_args

import click
import httpx
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from api import __version__
from cli import keys
from store.settings import Settings, from_environment
from trainer.spec import ATTACK_NAMES, SEARCHED, Fgsm, Spec

console = Console(highlight=False)
WIDE = 1000  # columns
SHOWN = 20  # classes of a model, at most
STATUS = {"failed": "failed", "cancelled": "was cancelled"}

TERMS = {"data_loss": "loss", "adversarial_loss": "adversarial", "l1": "l1", "l2": "l2", "l2_sp": "l2_sp"}


MAX_DETAILS = 20  # lines printed for one error


class Api:
    """A client of the service at `url`. Raises `click.ClickException` for every failure."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(30, read=300))
        except httpx.InvalidURL as exc:
            raise click.ClickException(f"--url {url}: {exc}") from exc
        self.url = url.rstrip("/")

    def call(self, method: str, path: str, *, patience_s: float = 0.0, **arguments: Any) -> Any:
        """Return the JSON of a successful answer. Retries for `patience_s` while the gateway cannot be reached."""
        try:
            answer = self._client.request(method, path, **arguments)
        except httpx.HTTPError as exc:
            if patience_s > 0:
                time.sleep(1)
                return self.call(method, path, patience_s=patience_s - 1, **arguments)
            raise click.ClickException(f"no answer from {self.url}: {exc} (is `temper serve` running?)") from exc
        try:
            body = answer.json()
            if "x-request-id" in answer.headers:  # every answer of the gateway has one
                if answer.is_success:
                    return body
                raise click.ClickException(_explained(body["error"]))
        except (ValueError, TypeError, KeyError):
            pass
        status = f"{answer.status_code} {answer.reason_phrase}"
        raise click.ClickException(f"{self.url} is not a Temper service: {method} {path} returned {status}")


def _explained(error: dict[str, Any]) -> str:
    """The message of an error, and a line for each detail that the message does not already contain."""
    message, lines = error["message"], []
    for detail in error["details"]:
        where = next((str(detail[key]) for key in ("file", "index", "class", "field") if key in detail), "")
        if not re.search(rf"(?<!\w){re.escape(where)}:? ?{re.escape(detail['reason'])}", message):
            lines.append(f"  {where}: {detail['reason']}")
    if len(lines) > MAX_DETAILS:
        lines[MAX_DETAILS:] = [f"  ... and {len(lines) - MAX_DETAILS} more"]
    return "\n".join([f"{message} [{error['code']}]", *lines])


class Commands(click.Group):
    """Report operating system errors, such as an unreadable file, in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click exits quietly
            raise
        except OSError as exc:
            raise click.ClickException(": ".join(filter(None, (exc.filename, exc.strerror or str(exc))))) from exc


@click.group(cls=Commands)
@click.option("--url", envvar="TEMPER_URL", help="URL of the service.  [default: http://TEMPER_HOST:TEMPER_PORT]")
@click.option("--key", envvar="TEMPER_API_KEY", help="API key, better given in TEMPER_API_KEY than on a command line.")
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context, url: str | None, key: str | None) -> None:
    """Fine-tune a small vision model on a few images without overfitting, and serve it."""
    settings = _settings()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    context.obj = Api(url or f"{settings.scheme}://{host}:{settings.port}", key)


def _settings() -> Settings:
    try:
        return from_environment()
    except ValueError as exc:
        raise click.ClickException(str(exc)) from exc


@main.command()
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the gateway.  [default: TEMPER_PORT or 8080]")
def serve(port: int | None) -> None:
    """Run the gateway, the workers and the model server."""
    from cli import supervisor

    settings = _settings()
    supervisor.serve(settings.model_copy(update={"port": port}) if port else settings)


class NumberOrAuto(click.ParamType):  # type: ignore[type-arg]
    """A number, or the word `auto`."""

    def __init__(self, number: click.types.IntParamType | click.types.FloatParamType) -> None:
        self.name = f"{number.name}|auto"
        self._number = number

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number or the word."""
        return value if value == "auto" else self._number.convert(value, param, ctx)


def spec_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for every plain field of the spec, and for the most used fields of its parts."""
    for name, field in reversed(Spec.model_fields.items()):
        kind, choices = field.annotation, get_args(field.annotation)
        accepted: Any = kind
        if kind in (int, float) and name in SEARCHED:
            accepted = NumberOrAuto(click.INT if kind is int else click.FLOAT)
        elif choices and all(isinstance(choice, str) for choice in choices):
            accepted = click.Choice((*choices, "auto") if name in SEARCHED else choices)
        elif kind not in (int, float, str):
            continue
        option = click.option(f"--{name.replace('_', '-')}", type=accepted, help=field.description)
        command = option(command)
    extra = (
        click.option("--rank", type=int, help="Rank of LoRA."),
        click.option("--attack", type=click.Choice(ATTACK_NAMES), help="Train against this attack."),
        click.option(
            "--epsilon",
            type=NumberOrAuto(click.FLOAT),
            help=f"Of the attack. {Fgsm.model_fields['epsilon'].description}",
        ),
        click.option("--trials", type=int, help="Search with so many recipes whatever is not given."),
        click.option("--seconds", type=float, help="Time for that search and the training of its choice."),
        click.option("--patience", type=int, help="Stop early after this many epochs without improvement."),
        click.option("--spec", "spec_json", help="A whole spec as JSON; the other options override it."),
    )
    for option in extra:
        command = option(command)
    return command


def _spec(given: dict[str, Any]) -> str | None:
    """Build the spec's JSON from the options that were given; None if there were none."""
    try:
        spec = json.loads(given.pop("spec_json") or "{}")
    except ValueError as exc:
        raise click.ClickException(f"--spec is not valid JSON: {exc}") from exc
    if not isinstance(spec, dict):
        raise click.ClickException("--spec must be a JSON object")
    parts = {
        "rank": ("lora", "rank"),
        "attack": ("adversarial", "attack"),
        "epsilon": ("adversarial", "epsilon"),
        "patience": ("early_stopping", "patience"),
        "trials": ("search", "trials"),
        "seconds": ("search", "seconds"),
    }
    for name, value in given.items():
        if value is None:
            continue
        if name in parts:
            part, key = parts[name]
            inner = spec.get(part) or {}
            if not isinstance(inner, dict):
                raise click.ClickException(f"--spec: {part} must be a JSON object")
            spec[part] = {**inner, key: value}
        else:
            spec[name] = value
    return json.dumps(spec) if spec else None


@main.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--model", required=True, help="The model to add a version to.")
@click.option(
    "--validation", type=click.Path(exists=True, path_type=Path), help="Images to measure on, in the same form as PATH."
)
@click.option("--label", help="The label to move to the new version.  [default: stable]")
@click.option("--wait", is_flag=True, help="Show progress until the job finishes.")
@spec_options
@click.pass_obj
def finetune(
    api: Api, /, path: Path, model: str, validation: Path | None, label: str | None, wait: bool, **given: Any
) -> None:
    """Fine-tune on PATH: a directory of class folders, a zip of one, or an .npz of images and labels."""
    spec = _spec(given)
    with contextlib.ExitStack() as stack:
        parts = {"data": path} | ({"validation": validation} if validation else {})
        files = {name: (part.name, stack.enter_context(_opened(part))) for name, part in parts.items()}
        fields = {"model": model} | ({"spec": spec} if spec else {}) | ({"label": label} if label else {})
        job = api.call("POST", "/finetune", files=files, data=fields)
    dataset = job["dataset"]
    polarity = dataset["polarity"].replace("_", " ")
    text = f"{dataset['images']} images, {len(dataset['classes'])} classes, {polarity}"
    console.print(f"[bold]{job['id']}[/] {job['status']}: {text}", soft_wrap=True)
    if wait:
        path_of_job = f"/finetune/{job['id']}"
        try:
            job = follow(lambda: api.call("GET", path_of_job, patience_s=30))
        except KeyboardInterrupt:
            click.echo(
                f"\nNo longer waiting for {job['id']}, which goes on. `temper jobs` shows its progress; to cancel it:\n"
                f"  curl -X POST {api.url}{path_of_job}/cancel",
                err=True,
            )
            raise click.exceptions.Exit(130) from None
        if job["status"] != "succeeded":
            preview = f"; its preview {model}:{job['preview_version']} stays" if job["preview_version"] else ""
            error = f": {job['error']['message']}" if job["error"] else ""
            raise click.ClickException(f"the job {STATUS[job['status']]}{error}{preview}")
        print_report(api.call("GET", f"/models/{model}/versions/{job['version']}")["report"])
        where = "live" if job["label"] == "stable" else f"live as {job['label']}"
        console.print(f"[bold green]{model}:{job['version']}[/] is {where}")


def _opened(path: Path) -> IO[bytes]:
    """The file, or a temporary zip of the directory."""
    if not path.is_dir():
        return path.open("rb")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    if not any(len(file.relative_to(path).parts) > 1 for file in files):
        raise click.ClickException(
            f"{path} has no images in class folders: make one folder per class, as in {path}/cat"
        )
    packed = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with zipfile.ZipFile(packed, "w", strict_timestamps=False) as archive:
        for file in files:
            archive.write(file, file.relative_to(path))
    packed.seek(0)
    return packed


def follow(read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Show the progress of the job that `read` returns until it finishes; return its last state."""
    columns = (
        TextColumn("{task.description:<11}"),
        BarColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("queued", total=None, text="")
        shown: tuple[Any, ...] = ()
        while True:
            job = read()
            progress = job["progress"]
            text = ""
            done, of = progress.get("epoch", 0), progress.get("epochs")
            if "trial" in progress:
                done, of, text = progress["tried"], progress["trials"], trial_line(progress)
                if not console.is_terminal and (progress["round"], done) != shown:
                    shown = progress["round"], done
                    console.print(text)
            elif "epoch" in progress:
                losses = "".join(f" {name} {progress[key]:.3f}" for key, name in TERMS.items() if progress.get(key))
                fold = f"fold {progress['fold']}/{progress['folds']} " if "fold" in progress else ""
                text = f"{fold}{progress['epoch']}/{progress['epochs']}{losses}"
                if (accuracy := progress.get("validation_accuracy")) is not None:
                    text += f" val {accuracy:.1%}"
                if (robust := progress.get("validation_accuracy_under_pgd")) is not None:
                    text += f" PGD {robust:.1%}"
                if not console.is_terminal and (fold, progress["epoch"]) != shown:
                    shown = fold, progress["epoch"]
                    console.print(text)
            if job["finished_at"] is not None:
                bar.update(task, description=job["status"], text="", total=1, completed=job["status"] == "succeeded")
                return job
            bar.update(task, description=job["stage"] or job["status"], text=text, total=of, completed=done)
            time.sleep(0.2)


def trial_line(progress: dict[str, Any]) -> str:
    """How far a search is, in one line."""
    best = progress["best"]
    low, high = best["accuracy_interval"]
    found = f"lowest loss {best['cross_entropy']:.3f}, {best['accuracy']:.1%} right ({low:.1%} to {high:.1%})"
    work = f"epochs {progress['epochs']}, folds {progress['folds']}"
    return f"round {progress['round']}, {progress['tried']}/{progress['trials']} recipes, {work}: {found}"


def print_report(report: dict[str, Any]) -> None:
    """The report card in a few lines."""
    if sentence := (report.get("search") or {}).get("sentence"):
        console.print(escape(sentence))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    validation, gap, attacked = report["validation"], report["generalization_gap"], report["robustness"]
    low, high = validation["accuracy_interval"]
    text = f"{validation['images']} images, 95% interval {low:.1%} to {high:.1%}"
    kind = "out-of-fold" if validation.get("out_of_fold") else "validation"
    table.add_row(f"{kind} accuracy", f"{validation['accuracy']:.1%}", text)
    table.add_row("generalization gap", f"{gap['accuracy']:+.1%}", f"cross-entropy {gap['cross_entropy']:+.3f}")
    name = f"accuracy under {attacked['attack'].upper()}"
    weaker = attacked.get("accuracy_under_fgsm")
    beside = "" if weaker is None else f", {weaker:.1%} under FGSM"
    table.add_row(name, f"{attacked['accuracy']:.1%}", f"epsilon {attacked['epsilon']:g}{beside}")
    error = report["calibration"]["expected_calibration_error"]
    table.add_row("calibration error", f"{error:.1%}", "expected, over 10 bins")
    counts = report["parameters"]
    table.add_row("trained parameters", f"{counts['trained']:,}", f"of {counts['total']:,}")
    by_stage = report["cost"]["seconds"]
    seconds = "  ".join(f"{stage} {value:.2f}" for stage, value in by_stage.items())
    table.add_row("seconds", f"{sum(by_stage.values()):.2f}", seconds)
    console.print(table)
    for text in [*report["warnings"], *(warning["message"] for warning in report["regularization"]["warnings"])]:
        console.print(f"[yellow]{escape(text)}[/]")
    if report["training"]["ended_by"] == "catastrophic_overfitting":
        epochs = report["training"]["overfitted_attack_in_epoch"], report["training"]["kept_epoch"]
        console.print(
            "[yellow]the attack was overfitted in epoch {}; the weights are those of epoch {}[/]".format(*epochs)
        )


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", required=True, help="The model to use.")
@click.option("--version", type=int, help="One of its versions.  [default: the one labelled stable, or its canary]")
@click.pass_obj
def predict(api: Api, file: Path, model: str, version: int | None) -> None:
    """Classify the image in FILE."""
    try:
        image = Image.open(file)
    except (UnidentifiedImageError, Image.DecompressionBombError) as exc:
        raise click.ClickException(str(exc)) from exc
    wanted = {"model": model} | ({"version": str(version)} if version is not None else {})
    headers = {"Content-Type": Image.MIME.get(str(image.format), "application/octet-stream")}
    answer = api.call("POST", "/predict", params=wanted, content=file.read_bytes(), headers=headers)
    print_image(image)
    label = escape(answer["predictions"][0]["label"])
    console.print(f"[bold]{label}[/] predicted by {model}:{answer['version']}")
    ranked = sorted(zip(answer["predictions"][0]["probabilities"], answer["classes"], strict=True), reverse=True)
    for probability, name in ranked[:5]:
        console.print(f"  {escape(f'{name:>8}')} {'█' * round(30 * probability)} {probability:.1%}")


def print_image(image: Image.Image, width: int = 28) -> None:
    """Draw an image in the terminal, two pixels per character."""
    scale = width / max(image.size)
    grey = image.convert("L").resize((max(1, round(scale * image.width)), max(1, round(scale * image.height / 2)) * 2))
    shades = " .:-=+*#%@"
    for y in range(0, grey.height, 2):
        pairs = ((grey.getpixel((x, y)), grey.getpixel((x, y + 1))) for x in range(grey.width))
        console.print("".join(shades[int((a + b) / 511 * len(shades))] for a, b in pairs), style="bold")  # type: ignore[operator]


@main.command()
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 100), help="Number of jobs to show.")
@click.pass_obj
def jobs(api: Api, limit: int) -> None:
    """List the newest jobs."""
    table = Table(Column("job", no_wrap=True), "model", "version", "status", "progress", "started", "error", box=None)
    for job in api.call("GET", "/finetune", params={"limit": limit})["data"]:
        progress = job["progress"]
        began = time.strftime("%T", time.localtime(job["started_at"])) if job["started_at"] else ""
        done, of = ("tried", "trials") if "trial" in progress else ("epoch", "epochs")
        epoch = f"{progress[done]}/{progress[of]}" if done in progress and not job["finished_at"] else ""
        error = escape(job["error"]["message"]) if job["error"] else ""
        state = job["stage"] or job["status"]
        table.add_row(job["id"], job["model"], str(job["version"] or ""), state, epoch, began, error)
    show(table)


@main.command()
@click.pass_obj
def models(api: Api) -> None:
    """List the models and their versions."""
    table = Table("model", "versions", "stable", "classes", box=None)
    after: dict[str, str] = {}
    while True:
        page = api.call("GET", "/models", params={"limit": 100, **after})
        for model in page["data"]:
            numbers, classes = ", ".join(map(str, model["versions"])), escape(" ".join(model["classes"][:SHOWN]))
            if len(model["classes"]) > SHOWN:
                classes += f" … ({len(model['classes'])})"
            table.add_row(model["name"], numbers, str(model["labels"].get("stable", "")), classes)
        if not page["has_more"]:
            break
        after = {"after": page["data"][-1]["name"]}
    show(table)


def show(table: Table) -> None:
    """Print a table; what is not a terminal gets whole lines."""
    (console if console.is_terminal else Console(highlight=False, width=WIDE)).print(table)


main.add_command(keys.commands(show))
