"""The command of the load kit. See docs/load.md."""

import contextlib
import functools
import sys
from collections.abc import Callable
from types import NoneType
from typing import Any, get_args

import click
from pydantic import SecretStr
from pydantic_core import PydanticUndefined

from load.images import choose_images
from load.kit import follow_labels
from load.scenarios import SCENARIOS, Call, WorkersNotStarted
from load.settings import LoadSettings, make_folder, read_settings
from load.summary import AWAY, INVALID, present
from load.target import RequestFailed, Target

OWN_ACCURACY = 0.85  # of the base model on scikit-learn's digits, where 0.89 to 0.90 were measured
HIDDEN = {"prepared"}


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every setting."""
    for name, field in reversed(LoadSettings.model_fields.items()):
        if name in HIDDEN:
            continue
        kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not NoneType]
        kind = {int: int, float: float}.get(kinds[0], str)
        default = field.default
        shown = "" if default in (None, "", PydanticUndefined) or isinstance(default, SecretStr) else f"  [{default}]"
        command = click.option(
            f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper().replace("STR", "TEXT"),
            help=f"{field.description}{shown}",
        )(command)  # fmt: skip
    return command


@click.command()
@click.argument("scenario", type=click.Choice(list(SCENARIOS)), default="mixed")
@options
def main(scenario: str, **given: Any) -> None:
    """Load a service for a SCENARIO, mixed by default, print what it took and write a report.

    Every option may also be set by a variable: --p99-ms by TEMPER_LOAD_P99_MS, --api-key by TEMPER_API_KEY.

    Exit codes: 0 all objectives kept, 1 one was missed, 2 wrong usage, 3 the service is away, 4 the load generator was
    saturated or did not start, so that the run says nothing about the service.
    """
    given = {name: value for name, value in given.items() if value is not None}
    try:
        settings = read_settings(given)
        if not settings.url and settings.accuracy is None and not settings.images and settings.models == "lenet5":
            settings = read_settings(given | {"accuracy": OWN_ACCURACY})
        images, missing = choose_images(settings)
        make_folder(settings.out)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    say = functools.partial(click.echo, err=True)
    with contextlib.ExitStack() as stack:
        url = settings.url
        if not url:
            try:
                from demo import service
            except ImportError:
                raise click.UsageError("--url: which service? (Outside a checkout there is no own one.)") from None
            url = str(stack.enter_context(service()).base_url).rstrip("/")
        say(f"{scenario}: {url}")
        try:
            follow_labels(Target(settings, url), settings.model_names)
            run = SCENARIOS[scenario](Call(settings, url, images, say))
        except RequestFailed as exc:
            if exc.code == "unknown_model":
                raise click.UsageError(f"--models {settings.models}: the service has no such model") from exc
            if exc.status in (401, 403):
                raise click.UsageError(f"--api-key: {exc}") from exc
            click.echo(f"Error: {url}: {exc}", err=True)
            sys.exit(AWAY)
        except WorkersNotStarted as exc:
            click.echo(f"Error: --workers: {exc}", err=True)
            sys.exit(INVALID)
    run.notes += [f"no {kind} images: {why}" for kind, why in missing.items()]
    sys.exit(present(run))
