"""`make fuzz`: schemathesis tries the whole OpenAPI document on a service of its own, without keys and then with them.

What is checked is in `schemathesis.toml`. With `TEMPER_STORE` set, the service keeps its jobs there.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from quality.digits import all_digits
from store.engine import connect
from store.keys import Keys
from store.records import ADMIN, FINETUNE, PREDICT
from store.settings import Settings
from tests.conftest import Service, png, running_service, zipped

OPERATIONS = 67  # about as many as there are; cases are counted by operation
SHARE = 0.25  # of cases and time that the round with keys gets


@click.command()
@click.option("--tool", required=True, help="The command schemathesis.")
@click.option("--cases", default=1000, show_default=True, help="About how many requests to make up.")
@click.option("--seconds", type=int, help="When to stop, whatever is left.")
@click.option("--seed", default=1, show_default=True, help="The same seed makes up the same requests.")
def main(tool: str, cases: int, seconds: int | None, seed: int) -> None:
    """Fuzz the API; fail if a check does, or if the service predicts no more."""
    images, labels = all_digits()
    data = zipped({f"{labels[i]}/{i}.png": png(images[i]) for i in range(60)})
    passed = []
    for keys, share in (("off", 1 - SHARE), ("required", SHARE)):
        with tempfile.TemporaryDirectory() as home:
            key = _key(home) if keys == "required" else None
            with running_service(Path(home), key, TEMPER_KEYS=keys, TEMPER_MAX_JOBS="20") as service:
                command = [tool, "run", f"{service.url}/openapi.json", "--seed", str(seed)]
                command += ["--max-examples", str(max(1, round(cases * share / OPERATIONS)))]
                if seconds:
                    command += ["--max-time", str(max(1, round(seconds * share)))]
                if key:
                    command += ["--header", f"Authorization: Bearer {key}"]
                else:  # there is nothing to refuse
                    command += ["--generation-with-security-parameters", "false", "--exclude-checks", "ignored_auth"]
                status = subprocess.run(command, env={**os.environ, **_things(service, data)}).returncode
                answer = service.api.post("/predict", json={"model": "lenet5", "instances": [[0] * 784]})
                print(
                    f"keys {keys}: schemathesis exits with {status}; a prediction gets {answer.status_code} afterwards"
                )
                passed.append(status == 0 and answer.status_code == 200)
    sys.exit(0 if all(passed) else 1)


def _key(home: str) -> str:
    """A key for everything, in the store of a service that is still to start."""
    settings = Settings(home=Path(home))
    settings.make_home()
    engine = connect(settings.store_url)
    try:
        return Keys(engine).create("fuzz", scopes=[PREDICT, FINETUNE, ADMIN])[1]
    finally:
        engine.dispose()


def _things(service: Service, data: bytes) -> dict[str, str]:
    """A finished job with its model `digits`, a data set and a webhook; their ids as `schemathesis.toml` reads them."""
    job = service.finetune(data, "digits", '{"epochs": 1, "checkpoints": 1}').json()["id"]
    assert service.finished(job)["status"] == "succeeded"
    dataset = service.api.post("/datasets", files={"data": ("digits.zip", data)}).json()["id"]
    webhook = service.api.post("/webhooks", json={"url": "http://127.0.0.1:9/"}).json()["id"]
    return {"FUZZ_JOB": job, "FUZZ_DATASET": dataset, "FUZZ_WEBHOOK": webhook}


if __name__ == "__main__":
    main()
