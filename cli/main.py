"""The `temper` command: `serve`, and what the HTTP API has, through the Python client."""

import dataclasses
import logging

import click

from api import __version__
from cli.command import Away, Commands, Failed, as_json, command, print_json
from cli.datasets import datasets
from cli.db import db
from cli.jobs import cancel, checkpoints, events, finetune, jobs, pause, resume, status, wait
from cli.keys import keys
from cli.models import delete, delta, download, gate, models, predict, promote, report, rollback, verify
from cli.processes import gateway, load, mirror, model_server, worker
from cli.show import show_finding, show_health
from cli.webhooks import webhooks
from store.settings import Settings, from_environment
from temper import Client, Health


@click.group(cls=Commands)
@click.option("--url", envvar="TEMPER_URL", help="URL of the service.  [default: http://TEMPER_HOST:TEMPER_PORT]")
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context, url: str | None) -> None:
    """Fine-tune a small vision model on a few images without overfitting, and serve it.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 the service is away or overloaded, 130 interrupted.
    """
    if context.invoked_subcommand == "doctor":  # which finds out by itself what is wrong with the settings
        return
    _show_waiting()
    settings = _settings()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        context.obj = context.with_resource(Client(url or f"http://{host}:{settings.port}", retries=1))
    except ValueError as exc:
        raise Failed(f"--url {exc}" if url else str(exc)) from exc


def _show_waiting() -> None:
    """Print on standard error what the client waits for before it tries again."""

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            click.echo(record.getMessage(), err=True)

    log = logging.getLogger("temper.client")
    log.setLevel(logging.INFO)
    log.handlers = [Shown()]
    log.propagate = False


def _settings() -> Settings:
    try:
        return from_environment()
    except ValueError as exc:
        raise Failed(str(exc)) from exc


@main.command()
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the gateway.  [default: TEMPER_PORT or 8080]")
def serve(port: int | None) -> None:
    """Run the gateway, the workers and the model server."""
    from cli import supervisor

    settings = _settings()
    supervisor.serve(settings.model_copy(update={"port": port}) if port else settings)


@main.command()
@as_json
def doctor(as_json: bool) -> None:
    """Check the installation on this machine, and say what to do about each fault.

    Works whether or not the service runs, and changes nothing. The exit code is 1 if there is a fault.
    """
    from cli import doctor as checks

    findings = []
    for finding in checks.examine():
        findings.append(finding)
        if not as_json:
            show_finding(finding)
    sound = all(finding.level != "fault" for finding in findings)
    if as_json:
        print_json({"sound": sound, "findings": [dataclasses.asdict(finding) for finding in findings]})
    if not sound:
        raise click.exceptions.Exit(1)


def _check_ready(health: Health) -> None:
    if not health.ready:
        raise Away("the service is not ready")


@command(show_health, _check_ready)
def health(client: Client) -> Health:
    """Show which parts of the service work."""
    return client.health()


for one in (
    finetune, wait, jobs, status, events, checkpoints, pause, resume, cancel,
    predict, models, report, verify, promote, rollback, gate, download, delta, delete, datasets, webhooks,
    health, keys, db, gateway, worker, model_server, mirror, load,
):  # fmt: skip
    main.add_command(one)
