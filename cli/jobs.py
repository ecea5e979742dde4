"""Commands about fine-tuning: start a job, watch it, stop it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from cli.command import INTERRUPTED, command, to_paste
from cli.show import (
    console,
    print_gate,
    print_report,
    progress,
    show_checkpoints,
    show_dry_run,
    show_events,
    show_findings,
    show_job,
    show_jobs,
)
from cli.spec_options import spec_of, spec_options
from temper import Checkpoint, Client, DryRun, Event, Job

job_id = click.argument("job")


def _show_job(job: Job) -> None:
    show_job(job)
    _tell_gate(job)


def _tell_gate(job: Job) -> None:
    """That the version of a job is live without its label, if so."""
    which, label = f"{job.model}:{job.version}", () if job.label == "stable" else ("--label", job.label)
    print_gate(which, job.gate, to_paste("promote", which, *label, "--override"))


def _show_queued(job: Job) -> None:
    if not job.finished:  # else `_wait` has told everything
        show_job(job)


def _show_asked(found: Job | DryRun) -> None:
    if isinstance(found, DryRun):
        show_dry_run(found)
    elif not found.finished:
        _show_created(found)


def _show_created(job: Job) -> None:
    show_job(job)
    show_findings(job.dataset)


@command(_show_asked)
@click.argument("path", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--model", required=True, help="The model to add a version to.")
@click.option("--dataset", help="Id of a data set that is kept, in place of PATH.")
@click.option(
    "--validation", type=click.Path(exists=True, path_type=Path), help="Images to measure on, in the same form as PATH."
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="IMAGE",
    help="An image to leave out, by its name in PATH, or @FILE with one on each line; may be repeated.",
)
@click.option("--label", help="The label to move to the new version.  [default: stable]")
@click.option("--priority", default=0, help="From -100 to 100; the highest of the queued jobs is next.")
@click.option("--wait", is_flag=True, help="Show progress until the job finishes.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained and what it would take; create nothing.")
@spec_options
def finetune(
    client: Client, path: Path | None, model: str, dataset: str | None, validation: Path | None,
    exclude: tuple[str, ...], label: str | None, priority: int, wait: bool, dry_run: bool, **given: Any,
) -> Job | DryRun:  # fmt: skip
    """Fine-tune on PATH: a directory of class folders, a zip of one, or an .npz of images and labels.

    The class folders may be inside train/, val/ and test/; or a CSV names files and labels.
    """
    if (path is None) is (dataset is None):
        raise click.UsageError("give either PATH or --dataset")
    if dry_run and wait:
        raise click.UsageError("give --dry-run or --wait, not both")
    ask = client.dry_run if dry_run else client.finetune
    found: Job | DryRun = ask(
        path, model, spec_of(given), dataset=dataset, validation=validation, exclude=_names(exclude), label=label,
        priority=priority,
    )  # fmt: skip
    if not wait or isinstance(found, DryRun):
        return found
    _show_created(found)
    return _wait(client, found.id)


def _names(exclude: tuple[str, ...]) -> list[str]:
    """What `--exclude` names, with the lines of the files that it names."""
    found: list[str] = []
    for name in exclude:
        lines = Path(name[1:]).read_text(encoding="utf-8").splitlines() if name.startswith("@") else [name]
        found += [line.strip() for line in lines if line.strip()]
    return found


@command(_show_queued)
@job_id
def wait(client: Client, job: str) -> Job:
    """Show the progress of a job until it finishes."""
    return _wait(client, job)


def _wait(client: Client, job_id: str) -> Job:
    """Follow a job to its end, and print its report."""
    try:
        with progress() as tell:
            job = client.wait(job_id, on_progress=tell)
    except KeyboardInterrupt:
        click.echo(
            f"\nNo longer waiting for {job_id}, which goes on. To wait again, or to stop it:\n"
            f"  {to_paste('wait', job_id)}\n  {to_paste('cancel', job_id)}",
            err=True,
        )
        raise click.exceptions.Exit(INTERRUPTED) from None
    print_report(client.report(job.model, job.version))
    if not job.gate_failures:
        where = "live" if job.label == "stable" else f"live as {job.label}"
        console.print(f"[bold green]{job.model}:{job.version}[/] is {where}")
    _tell_gate(job)
    return job


@command(show_jobs)
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="Number of jobs to show.")
def jobs(client: Client, limit: int) -> list[Job]:
    """List the newest jobs."""
    return list(client.jobs(limit))


@command(_show_job)
@job_id
def status(client: Client, job: str) -> Job:
    """Show a job."""
    return client.job(job)


@command(show_job)
@job_id
def cancel(client: Client, job: str) -> Job:
    """Cancel a job: a running one ends within a second."""
    return client.cancel(job)


@command(show_job)
@job_id
def pause(client: Client, job: str) -> Job:
    """Pause a job: a running one stops at the end of its epoch."""
    return client.pause(job)


@command(show_job)
@job_id
def resume(client: Client, job: str) -> Job:
    """Have a paused job go on from where it was."""
    return client.resume(job)


@command(show_events)
@job_id
@click.option("--follow", is_flag=True, help="Go on with what happens, until nothing more can.")
@click.option("--after", default=0, type=click.IntRange(0), help="Begin after the event of this number.")
def events(client: Client, job: str, follow: bool, after: int) -> Iterator[Event]:
    """Tell what has happened to a job; with --json a line for each event."""
    return client.events(job, follow=follow, after=after)


def _show_checkpoints(found: list[Checkpoint] | Job) -> None:
    if isinstance(found, Job):
        show_job(found)
    else:
        show_checkpoints(found)


@command(_show_checkpoints)
@job_id
@click.option("--publish", type=click.IntRange(1), metavar="EPOCH", help="Queue a job that makes it a version.")
@click.option("--label", help="The label to move to that version.  [default: stable]")
def checkpoints(client: Client, job: str, publish: int | None, label: str | None) -> list[Checkpoint] | Job:
    """List the checkpoints that a job has kept, or publish one."""
    if publish is not None:
        return client.publish_checkpoint(job, publish, label)
    if label is not None:
        raise click.UsageError("--label is for --publish")
    return list(client.checkpoints(job))
