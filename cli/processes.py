"""Commands that run one process of the service without the others, or a load test."""

import os
import sys
from importlib.util import find_spec
from typing import Any

import click

from cli.command import Failed
from store.processes import module_command

EXTRAS = {"tensorflow": "trainer", "locust": "bench"}  # what a package comes with


def _process(name: str, module: str, help: str, needs: str | None = None) -> click.Command:
    """A command that runs one of our modules in place of this process.

    Args:
        needs: a package that has to be installed.
    """
    settings: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": []}

    @click.command(name, help=help, context_settings=settings)
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def run(arguments: tuple[str, ...]) -> None:
        if needs and find_spec(needs) is None:
            raise Failed(f"this needs {needs}, which is not installed: pip install 'temper[{EXTRAS[needs]}]'")
        command = [*module_command(module), *arguments]
        sys.stdout.flush()
        os.execv(command[0], command)  # noqa: S606 (our own module)

    return run


gateway = _process("gateway", "api", "Run a gateway, and nothing else.")
model_server = _process("model-server", "serving", "Run the embedded model server, and nothing else.", "tensorflow")
mirror = _process("mirror", "serving.mirror", "Keep published versions on a model server's disk.")
worker = _process("worker", "trainer", "Run a worker here, or a pool of them on a Ray cluster.", "tensorflow")
load = _process("load", "load", "Load-test a service.", "locust")
