"""Where the embedded model server and TensorFlow Serving 2.20 differ, on purpose.

Every row is held by a test that takes it by its name. `python -m tests.contract.differences` prints them.
"""

from dataclasses import dataclass

import click


@dataclass(frozen=True)
class Difference:
    """One row."""

    name: str
    embedded: str
    real: str
    why: str


DIFFERENCES = {
    row.name: row
    for row in (
        Difference(
            "shapes",
            "checks them against the signature: INVALID_ARGUMENT, naming both shapes",
            "never checks; the graph may refuse with a message of its own, answer nonsense, or end the process",
            "a wrong rank that reaches a convolution must not end the server",
        ),
        Difference(
            "missing base path of a new model",
            "the reload ends at once: UNKNOWN, 'did not become available'",
            "the reload, and every later one, waits until the path is there",
            "one lost directory must not stop all publishing",
        ),
        Difference(
            "missing base path of another model",
            "the other models' new versions are found all the same",
            "no model's new versions are found until it is back",
            "models must not depend on each other",
        ),
        Difference(
            "version without variables",
            "ends END with NOT_FOUND, and the older version goes on serving",
            "becomes AVAILABLE, retires the older one, and every Predict is FAILED_PRECONDITION",
            "AVAILABLE should mean that it can answer",
        ),
        Difference(
            "health",
            "grpc.health.v1.Health/Check answers SERVING",
            "UNIMPLEMENTED",
            "Kubernetes and Compose can ask it",
        ),
        Difference(
            "values that stand for many",
            "a tensor of more than 2^28 elements of which fewer are sent is no tensor: INVALID_ARGUMENT",
            "the memory is taken, and filled",
            "a request of some bytes must not take gigabytes",
        ),
        Difference(
            "calls at a time",
            "any number: those beyond its threads wait",
            "RESOURCE_EXHAUSTED beyond its threads (--grpc_max_threads)",
            "the gateway bounds what it has in flight; others need not know",
        ),
    )
}


@click.command()
def main() -> None:
    """Print where the embedded model server and TensorFlow Serving differ on purpose."""
    for row in DIFFERENCES.values():
        click.echo(f"{row.name}\n  embedded  {row.embedded}\n  real      {row.real}\n  because   {row.why}\n")


if __name__ == "__main__":
    main()
