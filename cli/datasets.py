"""`temper datasets`: data sets that are kept, for fine-tunes to take by id."""

from collections.abc import Iterator
from pathlib import Path

import click

from cli.command import command
from cli.show import show_dataset, show_datasets, show_deleted_id
from temper import Client, Dataset, DatasetDeleted

dataset_id = click.argument("dataset")


@click.group()
def datasets() -> None:
    """Upload, list and delete data sets that are kept."""


@command(show_dataset)
@click.argument("path", type=click.Path(exists=True, path_type=Path))
def add(client: Client, path: Path) -> Dataset:
    """Upload PATH, show what is in it, and keep it."""
    return client.upload(path)


@command(show_datasets)
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="Number of data sets to show.")
def list_(client: Client, limit: int) -> list[Dataset]:
    """List the newest data sets."""
    found: Iterator[Dataset] = client.datasets(limit)
    return list(found)


@command(show_dataset)
@dataset_id
def show(client: Client, dataset: str) -> Dataset:
    """Show what is in a data set."""
    return client.dataset(dataset)


@command(show_deleted_id)
@dataset_id
def delete(client: Client, dataset: str) -> DatasetDeleted:
    """Delete a data set that no unfinished job needs."""
    return client.delete_dataset(dataset)


datasets.add_command(add)
datasets.add_command(list_, "list")
datasets.add_command(show)
datasets.add_command(delete)
