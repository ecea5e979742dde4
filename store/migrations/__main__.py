"""`python -m store.migrations < url`: bring a store up to date."""

import sys

from store.engine import connect
from store.errors import StoreUnavailable

if __name__ == "__main__":
    try:
        connect(sys.stdin.read().strip()).dispose()
    except StoreUnavailable as exc:
        sys.exit(exc.message)
