"""`temper webhooks`: endpoints that are told what happens, and what they were told."""

from collections.abc import Iterator

import click

from cli.command import command
from cli.show import show_deleted_id, show_deliveries, show_delivery, show_secret, show_webhooks
from temper import Client, Delivery, Webhook, WebhookDeleted

webhook_id = click.argument("webhook")


@click.group()
def webhooks() -> None:
    """Register endpoints that are told what happens, and see what they were told."""


@command(show_secret)
@click.argument("url")
@click.option(
    "--types", help="What to tell it, with commas, such as fine_tuning.job.failed,model.label.moved.  [default: all]"
)
def create(client: Client, url: str, types: str | None) -> Webhook:
    """Have what happens from now on sent to URL, and print the secret that signs it, once."""
    return client.create_webhook(url, None if types is None else [one.strip() for one in types.split(",")])


@command(show_webhooks)
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="Number of webhooks to show.")
def list_(client: Client, limit: int) -> list[Webhook]:
    """List the newest webhooks, without their secrets."""
    found: Iterator[Webhook] = client.webhooks(limit)
    return list(found)


@command(show_deleted_id)
@webhook_id
def delete(client: Client, webhook: str) -> WebhookDeleted:
    """Delete a webhook with its deliveries."""
    return client.delete_webhook(webhook)


@command(show_secret)
@webhook_id
def rotate(client: Client, webhook: str) -> Webhook:
    """Give a webhook a new secret and print it, once. For 24 hours the old one signs as well."""
    return client.rotate_webhook(webhook)


@command(show_deliveries)
@webhook_id
@click.option(
    "--status", type=click.Choice(["pending", "succeeded", "failed"]), help="Only those; `failed` are given up."
)
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="Number of deliveries to show.")
def deliveries(client: Client, webhook: str, status: str | None, limit: int) -> list[Delivery]:
    """List the newest deliveries to a webhook."""
    found: Iterator[Delivery] = client.deliveries(webhook, status, limit)
    return list(found)


@command(show_delivery)
@webhook_id
@click.argument("delivery")
def replay(client: Client, webhook: str, delivery: str) -> Delivery:
    """Send a delivery again, at once and with all its retries."""
    return client.replay_delivery(webhook, delivery)


webhooks.add_command(create)
webhooks.add_command(list_, "list")
webhooks.add_command(delete)
webhooks.add_command(rotate)
webhooks.add_command(deliveries)
webhooks.add_command(replay)
