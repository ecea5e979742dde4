import store.logging  # noqa: F401  # before anything else imports structlog, and Rich with it, which is 3 MB
