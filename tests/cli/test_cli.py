"""The `temper` command as a client, and the API's odd names on a terminal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.conftest import Service, png

Digits = tuple[np.ndarray, np.ndarray]
QUICK = json.dumps({"epochs": 2})


def temper(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli", "--url", service.url, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120"})


def test_the_command_uploads_a_folder_waits_and_predicts(service: Service, digits: Digits, tmp_path: Path) -> None:
    for index in range(60):
        place = tmp_path / "digits" / str(digits[1][index])
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index}.png").write_bytes(png(digits[0][index]))
    done = temper(service, "finetune", str(tmp_path / "digits"), "--model", "cli", "--epochs", "2", "--epsilon", "0.05",
                  "--method", "head", "--l2", "1e-3", "--wait")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "generalization gap" in done.stdout
    assert "cli:1 serves" in done.stdout
    assert " PGD " in done.stdout  # in the progress lines
    (attacked,) = (line for line in done.stdout.splitlines() if line.startswith("accuracy under PGD"))
    assert "epsilon 0.05" in attacked
    assert "under FGSM" in attacked
    (version,) = service.api.get("/models/cli").json()["versions"]
    spec = version["manifest"]["spec"]
    assert (spec["epochs"], spec["method"], spec["l2"], spec["adversarial"]["epsilon"]) == (2, "head", 1e-3, 0.05)
    image = next((tmp_path / "digits" / "4").iterdir())
    assert "says cli:1" in temper(service, "predict", str(image), "--model", "cli").stdout
    assert "cli" in temper(service, "models").stdout
    assert "succeeded" in temper(service, "jobs").stdout


def test_the_command_says_what_is_wrong(service: Service, tmp_path: Path) -> None:
    (tmp_path / "d.zip").write_bytes(b"")
    failed = temper(service, "finetune", str(tmp_path / "d.zip"), "--model", "m")
    assert failed.returncode == 1
    assert "empty" in failed.stderr
    assert "[invalid_dataset]" in failed.stderr
    assert "Traceback" not in failed.stderr
