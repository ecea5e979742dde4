"""Where the embedded model server and TensorFlow Serving 2.20 differ on purpose.

Every row has a test that looks it up by name. `python -m tests.contract.differences` prints them all.
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
            "checks them against the signature: INVALID_ARGUMENT that names both shapes",
            "never checks them; the graph may refuse in its own words, return nonsense or abort the process",
            "a wrong rank that reaches a convolution must not abort the server",
        ),
        Difference(
            "missing base path of a new model",
            "the reload fails at once: UNKNOWN, 'did not become available'",
            "the reload, and every later one, blocks until the path exists",
            "one missing directory must not stop all publishing",
        ),
        Difference(
            "missing base path of another model",
            "the new versions of other models are still found",
            "no model's new versions are found until the path is back",
            "models must not depend on each other",
        ),
        Difference(
            "version without variables",
            "ends in END with NOT_FOUND, and the older version keeps serving",
            "becomes AVAILABLE, retires the older one, and every Predict is FAILED_PRECONDITION",
            "AVAILABLE should mean that the version can answer",
        ),
        Difference(
            "health",
            "grpc.health.v1.Health/Check answers SERVING",
            "UNIMPLEMENTED",
            "Kubernetes and Compose can probe it",
        ),
        Difference(
            "repeated values",
            "INVALID_ARGUMENT for a tensor of more than 2^28 elements that sends fewer values",
            "allocates the memory and repeats the last value",
            "a request of a few bytes must not allocate gigabytes",
        ),
        Difference(
            "concurrent calls",
            "any number; those beyond its threads wait",
            "RESOURCE_EXHAUSTED beyond its threads (--grpc_max_threads)",
            "the gateway bounds its calls in flight, and other clients should not have to",
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
