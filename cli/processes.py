"""`temper gateway`, `temper worker` and `temper model-server`: one process of the service, without the others."""

import os
import sys
from typing import Any

import click

from cli.command import Failed
from store.processes import has_tensorflow, module_command

NO_TENSORFLOW = "this needs TensorFlow, which is not installed: pip install 'temper[trainer]'"


def _become(module: str, arguments: tuple[str, ...]) -> None:
    """Run one of our modules in place of this process."""
    command = [*module_command(module), *arguments]
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606 (our own module)


def _process(name: str, module: str, help: str, needs_tensorflow: bool) -> click.Command:
    settings: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": []}

    @click.command(name, help=help, context_settings=settings)
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def run(arguments: tuple[str, ...]) -> None:
        if needs_tensorflow and not has_tensorflow():
            raise Failed(NO_TENSORFLOW)
        _become(module, arguments)

    return run


gateway = _process("gateway", "api", "Run a gateway, and nothing else.", False)
model_server = _process("model-server", "serving", "Run the embedded model server, and nothing else.", True)
mirror = _process("mirror", "serving.mirror", "Keep published versions on a model server's disk.", False)
worker = _process("worker", "trainer", "Run a worker, and nothing else.", True)
