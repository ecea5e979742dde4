"""`make load`: half a minute of `load/locustfile.py` against a service of its own."""

import os
import subprocess
import sys

from demo import service


def main() -> int:
    """The exit code of Locust, which is 0 when the objectives are kept."""
    with service() as api:
        command = [
            sys.executable, "-m", "locust", "-f", "load/locustfile.py", "--headless", "--only-summary",
            "--users", "20", "--spawn-rate", "10", "--run-time", os.environ.get("LOAD_TIME", "30s"),
            "--stop-timeout", "30", "--host", str(api.base_url),
        ]  # fmt: skip
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
