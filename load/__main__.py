"""`make load`: run `load/locustfile.py` for half a minute against a service of its own."""

import os
import subprocess
import sys

import click

from demo import service


@click.command()
def main() -> None:
    """Load a service of its own for LOAD_TIME (30s). Exits with 1 if an objective is missed."""
    with service() as api:
        command = [
            sys.executable, "-m", "locust", "-f", "load/locustfile.py", "--headless", "--only-summary",
            "--users", "20", "--spawn-rate", "10", "--run-time", os.environ.get("LOAD_TIME", "30s"),
            "--stop-timeout", "30", "--host", str(api.base_url),
        ]  # fmt: skip
        status = subprocess.run(command, check=False).returncode
    sys.exit(status)


if __name__ == "__main__":
    main()
