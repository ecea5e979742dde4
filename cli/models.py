"""Commands about models: list, predict, move labels, check, get, delete."""

import os
import subprocess
import tempfile
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from cli.command import Failed, Versioned, command, to_paste, versioned
from cli.show import (
    console,
    print_gate,
    print_image,
    say,
    show_deleted,
    show_file,
    show_gate,
    show_label,
    show_models,
    show_prediction,
    show_verification,
    show_version,
)
from cli.spec_options import json_object
from store.processes import module_command
from temper import Client, Deleted, Gate, Label, ModelSummary, Prediction, Verification, Version
from temper.bodies import saved_as

Named = tuple[str, int | None]  # a model, and a version if one was given
SAVED_MODEL = "savedmodel"
override_option = click.option("--override", is_flag=True, help="Also to a version that has failed its gate.")
label_option = click.option("--label", default="stable", show_default=True, help="The label to move.")


def output(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option `--output`."""
    text = f"File or directory for {what}."
    return click.option("--output", type=click.Path(path_type=Path), default=".", help=text, callback=_no_dash)


def _no_dash(_: click.Context, __: click.Parameter, value: Path) -> Path:
    if str(value) == "-":
        raise click.BadParameter("name a file; nothing is written to standard output")
    return value


@command(show_models)
def models(client: Client) -> list[ModelSummary]:
    """List the models with their versions and labels."""
    return list(client.models())


@command(show_prediction)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", required=True, help="The model to use.")
@click.option("--version", type=int, help="One of its versions.  [default: the one labelled stable, or its canary]")
@click.option("--label", help="Or the label of one.")
def predict(client: Client, file: Path, model: str, version: int | None, label: str | None) -> Prediction:
    """Classify the image in FILE, or all in a zip or an .npy."""
    answer = client.predict(file, model, version, label)
    if not console.quiet and len(answer.predictions) == 1:
        from PIL import Image  # takes a while: loaded for those who look at the picture

        with suppress(OSError, Image.DecompressionBombError):  # an .npy or a zip
            print_image(Image.open(file))
    return answer


@command(show_label)
@click.argument("version", metavar="MODEL:VERSION", type=Versioned())
@label_option
@click.option(
    "--weight", type=click.FloatRange(0, 1), help="Share of the requests that name neither version nor label."
)
@override_option
def promote(client: Client, version: Named, label: str, weight: float | None, override: bool) -> Label:
    """Have a label stand for a version."""
    model, number = version
    if number is None:
        raise click.BadParameter(f"name the version, as in {model}:2", param_hint="MODEL:VERSION")
    return client.set_label(model, label, number, weight, override=override)


@command(show_label)
@click.argument("model")
@label_option
@override_option
def rollback(client: Client, model: str, label: str, override: bool) -> Label:
    """Move a label back to the live version before the one that it stands for."""
    return client.rollback(model, label, override=override)


@command(show_gate)
@click.argument("model")
@click.option("--set", "conditions", metavar="JSON", help="Give it this gate, such as '{\"accuracy\": 0.9}', or @FILE.")
@click.option("--delete", "delete_", is_flag=True, help="Take its gate away; the default is in its place.")
def gate(client: Client, model: str, conditions: str | None, delete_: bool) -> Gate:
    """Show what the versions to come of a model must fulfil to get their label, or change that."""
    if conditions is not None and delete_:
        raise click.UsageError("give --set or --delete, not both")
    if conditions is not None:
        return client.set_gate(model, json_object(conditions, "--set"))
    return client.delete_gate(model) if delete_ else client.gate(model)


@command(show_deleted)
@versioned
@click.option("--label", help="Delete this label of the model, and no version.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(client: Client, version: Named, label: str | None, yes: bool) -> Deleted:
    """Delete a version, a label, or a model with all its versions and labels."""
    model, number = version
    if label is not None and number is not None:
        raise click.UsageError("give a version or --label, not both")
    what = f"the label {label} of {model}" if label is not None else f"{model}:{number}"
    if label is None and number is None:
        versions = ", ".join(str(live.version) for live in client.model(model).versions)
        what = f"the model {model} with all its labels and versions ({versions})"
    if not yes:
        click.confirm(f"Delete {what}?", abort=True, err=True)
    return client.delete(model, number) if label is None else client.delete_label(model, label)


def _check_proven(found: Verification) -> None:
    if not found.proven:
        wrong = "; ".join(f"{name}: {failure}" for name, failure in found.failures.items() if failure)
        raise Failed(f"{found.model}:{found.version} is not served as it was trained: {wrong}")


@command(show_verification, _check_proven)
@versioned
def verify(client: Client, version: Named) -> Verification:
    """Check that the files of a version are intact and that every model server answers as the trainer did."""
    return client.verify(*version)


@command(show_version)
@versioned
@click.option("--open", "open_", is_flag=True, help="Open the page with all plots in a browser.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the page to this file.")
def report(client: Client, version: Named, open_: bool, output: Path | None) -> Version:
    """Show the report card of a version."""
    found = client.version(*version)
    which = f"{version[0]}:{found.version}"
    print_gate(which, found.report.get("gate"), to_paste("promote", which, "--override"))
    if output or open_:
        page = client.report_page(version[0], found.version)
        if output is None:  # a browser sends no API key, so it is given the page and not the URL
            with tempfile.NamedTemporaryFile("w", prefix="temper-", suffix=".html", delete=False) as file:
                output = Path(file.name)
        saved_as(output, output.name).write_text(page, encoding="utf-8")
        say(f"the page is in {output}")
    if open_ and output and not webbrowser.open(output.resolve().as_uri()):
        raise Failed(f"no browser was found; the page is in {output}")
    return found


@command(show_file)
@versioned
@output("MODEL-VERSION.delta.npz")
def delta(client: Client, version: Named, output: Path) -> Path:
    """Get what a fine-tune changed, which `python -m trainer.delta` applies to its base."""
    model, number = version
    return client.delta(model, output, number)


@command(show_file)
@versioned
@click.option(
    "--format", type=click.Choice([SAVED_MODEL, "tflite", "onnx"]), default=SAVED_MODEL, show_default=True,
    help="What to save it as. The last two are converted here, with the extra `tensorflow` or `onnx`.",
)  # fmt: skip
@output("MODEL-VERSION.zip, .tflite or .onnx")
def download(client: Client, version: Named, format: str, output: Path) -> Path:
    """Get a version as a zip of its SavedModel, which TensorFlow and TensorFlow Serving load, or as TFLite or ONNX."""
    model, number = version
    if format == SAVED_MODEL:
        return client.download(model, output, number)
    with tempfile.TemporaryDirectory() as folder:
        archive = client.download(model, folder, number)
        path = saved_as(output, f"{archive.stem}.{format}")
        # In a process of its own, as the command itself never loads TensorFlow; with nothing from this directory.
        convert = [*module_command("trainer.convert"), str(archive), format, str(path)]
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        done = subprocess.run(convert, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        *_, reason = done.stderr.splitlines() or [""]
        if not reason.startswith("Error: "):  # it did not end by itself
            reason = f"the conversion ended with {done.returncode}: {reason}"
        raise Failed(reason.removeprefix("Error: "))
    say(escape(done.stdout.strip()))
    return path
