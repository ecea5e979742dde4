"""`temper db`: the schema of the store, for whoever operates it."""

import click

from cli.command import as_json, print_json
from store.errors import TemperError
from store.settings import from_environment


@click.group()
def db() -> None:
    """Show and upgrade the schema of the store that TEMPER_HOME or TEMPER_STORE names."""


@db.command()
@as_json
def status(as_json: bool) -> None:
    """Show the schema's revision. Exit code 1: it is not that of this release."""
    stored, head = _revisions(upgrade=False)
    if as_json:
        print_json({"revision": stored, "head": head})
    elif stored == head:
        click.echo(f"revision {head}, which is up to date")
    elif stored is not None and stored > head:
        click.echo(f"revision {stored} of a newer release; this one has {head}")
    else:
        click.echo(f"revision {stored or 'none'}; this release has {head}: temper db upgrade")
    if stored != head:
        raise click.exceptions.Exit(1)


@db.command()
@as_json
def upgrade(as_json: bool) -> None:
    """Bring the schema to that of this release; one that already has it stays as it is.

    The service does so itself when it starts. Run this first where several machines share a store, so that none of
    them begins with it on its own.
    """
    before, _ = _revisions(upgrade=False)
    _, after = _revisions(upgrade=True)
    if as_json:
        print_json({"before": before, "after": after})
    else:
        click.echo(f"revision {after}" + (", as before" if before == after else f"; before: {before or 'none'}"))


def _revisions(upgrade: bool) -> tuple[str | None, str]:
    """The revision of the store, upgraded first if so wanted, and that of this release."""
    from store.engine import connect, stored_revision
    from store.migrations import HEAD

    try:
        settings = from_environment()
        if upgrade:
            settings.make_home()
            connect(settings.store_url).dispose()
        elif not settings.store and not (settings.home / "temper.db").exists():
            return None, HEAD  # to look would make one
        return stored_revision(settings.store_url), HEAD
    except ValueError as exc:
        raise click.ClickException(str(exc)) from exc
    except TemperError as exc:
        raise click.ClickException(exc.message) from exc
