"""`temper keys`: API keys, made and revoked by whoever operates the machine, in the store itself."""

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from cli.command import as_json, print_json
from cli.show import show
from store.errors import TemperError
from store.records import DEFAULT_TENANT, SCOPES
from store.settings import from_environment

if TYPE_CHECKING:
    from store.keys import Key, Keys


@contextlib.contextmanager
def _keys() -> Iterator["Keys"]:
    """The keys in the store that the settings name."""
    from store.engine import connect  # a third of a second, which the other commands do without
    from store.keys import Keys

    try:
        settings = from_environment()
        settings.make_home()
        engine = connect(settings.store_url)
    except ValueError as exc:
        raise click.ClickException(str(exc)) from exc
    except TemperError as exc:
        raise click.ClickException(exc.message) from exc
    try:
        yield Keys(engine)
    except TemperError as exc:
        raise click.ClickException(exc.message) from exc
    finally:
        engine.dispose()


@click.group()
def keys() -> None:
    """Create, list and revoke API keys, in the store of TEMPER_HOME or TEMPER_STORE."""


@keys.command()
@click.option("--name", required=True, help="What the key is for.")
@click.option("--tenant", default=DEFAULT_TENANT, show_default=True, help="Whose models and jobs it sees.")
@click.option(
    "--scope",
    "scopes",
    default=["predict"],
    show_default=True,
    multiple=True,
    help=f"What it may do: {', '.join(SCOPES)}. With commas, or several times.",
)
@click.option("--rate", type=float, help="Most predict requests a second.  [default: TEMPER_MAX_RATE]")
@as_json
def create(name: str, tenant: str, scopes: tuple[str, ...], rate: float | None, as_json: bool) -> None:
    """Create a key and print it, once."""
    with _keys() as stored:
        key, token = stored.create(name, tenant, [part.strip() for part in ",".join(scopes).split(",")], rate)
    if as_json:
        print_json({**_shown(key), "key": token})
        return
    click.echo(f"{key.id} for the tenant {key.tenant}, with {_scopes(key)}; the key is not shown again:", err=True)
    click.echo(token)


@keys.command("list")
@as_json
def list_(as_json: bool) -> None:
    """List the keys, without their secrets."""
    with _keys() as stored:
        found = stored.all()
    if as_json:
        print_json([_shown(key) for key in found])
        return
    table = Table("id", "name", "tenant", "scopes", "rate", "created", "revoked", box=None)
    for key in found:
        rate = "" if key.rate is None else f"{key.rate:g}/s"
        table.add_row(key.id, key.name, key.tenant, _scopes(key), rate, _day(key.created_at), _day(key.revoked_at))
    show(table)


@keys.command()
@click.argument("id")
@as_json
def revoke(id: str, as_json: bool) -> None:
    """End the validity of the key with this ID; gateways notice within a second."""
    with _keys() as stored:
        key = stored.revoke(id)
    if as_json:
        print_json(_shown(key))
    else:
        click.echo(f"{key.id} ({key.name}) is revoked")


def _shown(key: "Key") -> dict[str, Any]:
    """What may be shown of a key."""
    return {
        "id": key.id, "name": key.name, "tenant": key.tenant, "scopes": [one for one in SCOPES if one in key.scopes],
        "rate": key.rate, "created_at": key.created_at, "revoked_at": key.revoked_at,
    }  # fmt: skip


def _scopes(key: "Key") -> str:
    return ", ".join(scope for scope in SCOPES if scope in key.scopes)


def _day(seconds: Any) -> str:
    return "" if seconds is None else time.strftime("%F", time.localtime(seconds))
