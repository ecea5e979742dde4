"""`python -m api`: the gateway."""

import logging

import uvicorn

from api.app import create_app
from serving.settings import Settings


def main() -> None:
    """Serve the HTTP API with the settings of the environment."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = Settings()
    uvicorn.run(
        create_app(settings), host=settings.host, port=settings.port, access_log=False, log_level="warning",
        timeout_graceful_shutdown=5,
    )  # fmt: skip


if __name__ == "__main__":
    main()
