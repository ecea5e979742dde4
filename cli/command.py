"""What all commands share: the client, `--json`, and failures in one line with an exit code.

0    done
1    refused, failed, or not as it should be
2    wrong usage (click's)
3    the service is away or overloaded: try again later
130  interrupted
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from cli.show import console
from temper import Client, JobFailed, TemperError, TooManyRequests, Unavailable
from temper.records import Record

INTERRUPTED = 130
MAX_DETAILS = 20  # lines printed for one error
STATUS = {"failed": "failed", "cancelled": "was cancelled"}


class Failed(click.ClickException):
    """A failure, in one line on standard error."""

    exit_code = 1


class Away(Failed):
    """The service cannot answer now."""

    exit_code = 3


class Commands(click.Group):
    """Reports the failures of the service and of the operating system in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except JobFailed as exc:
            raise Failed(_ended(exc)) from exc
        except TemperError as exc:
            kind = Away if isinstance(exc, Unavailable | TooManyRequests) else Failed
            raise kind(_explained(exc)) from exc
        except BrokenPipeError:  # click exits quietly
            raise
        except OSError as exc:
            raise Failed(": ".join(filter(None, (exc.filename, exc.strerror or str(exc))))) from exc
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED) from None


def _explained(error: TemperError) -> str:
    """The message of an error, and a line for each detail that the message does not already contain."""
    message, lines = error.message, []
    for detail in error.details:
        where = next((str(detail[key]) for key in ("file", "index", "class", "field") if key in detail), "")
        if not re.search(rf"(?<!\w){re.escape(where)}:? ?{re.escape(detail['reason'])}", message):
            lines.append(f"  {where}: {detail['reason']}")
    if len(lines) > MAX_DETAILS:
        lines[MAX_DETAILS:] = [f"  ... and {len(lines) - MAX_DETAILS} more"]
    return "\n".join([f"{message} [{error.code}]" if error.status else message, *lines])


def _ended(failure: JobFailed) -> str:
    job = failure.job
    why = f": {job.error.message}" if job.error else ""
    preview = f"; its preview {job.model}:{job.preview_version} stays" if job.preview_version else ""
    return f"the job {STATUS.get(job.status, job.status)}{why}{preview}"


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")


def command(
    show: Callable[[Any], None], check: Callable[[Any], None] = lambda found: None
) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a command of a function that is called with the client and returns what it has found.

    Args:
        show: prints that for a person. With `--json` it is printed as JSON instead, an iterator's items a line each,
            and nothing that the function prints to the console appears.
        check: called afterwards; raises `Failed` if what was found is nothing to be content with.
    """

    def decorate(function: Callable[..., Any]) -> click.Command:
        @click.command()
        @as_json
        @click.pass_obj
        @functools.wraps(function)
        def run(client: Client, /, as_json: bool, **given: Any) -> None:
            console.quiet = as_json
            try:
                found = function(client, **given)
            except JobFailed as exc:
                if as_json:
                    print_json(exc.job)
                raise
            (print_json if as_json else show)(found)
            check(found)

        return run

    return decorate


def print_json(found: Any) -> None:
    """Print a record, a list of records or a path as one JSON document, and an iterator as one a line."""
    if isinstance(found, Iterator):
        for item in found:
            click.echo(json.dumps(_plain(item), ensure_ascii=False))
    else:
        click.echo(json.dumps(_plain(found), ensure_ascii=False, indent=2))


def _plain(found: Any) -> Any:
    if isinstance(found, Record):
        return found.json
    if isinstance(found, Path):
        return {"path": str(found), "bytes": found.stat().st_size}
    return [_plain(item) for item in found] if isinstance(found, list) else found


def to_paste(*words: str) -> str:
    """A command that asks the same service."""
    root = click.get_current_context().find_root()
    url = ("--url", root.params["url"]) if root.get_parameter_source("url") is ParameterSource.COMMANDLINE else ()
    return " ".join(("temper", *url, *words))


class Versioned(click.ParamType):  # type: ignore[type-arg]
    """`MODEL` or `MODEL:VERSION`, as a pair."""

    name = "model[:version]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int | None]:
        """The name and the number, None if there is none."""
        if isinstance(value, tuple):
            return value
        model, colon, number = value.partition(":")
        if not model or (colon and not re.fullmatch("[1-9][0-9]{0,18}", number)):
            self.fail(f"{value!r} is not a model's name, or name:version", param, ctx)
        return model, int(number) if colon else None


versioned = click.argument("version", metavar="MODEL[:VERSION]", type=Versioned())
