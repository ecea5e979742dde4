"""Load on a Temper service: `locust -f load/locustfile.py`, or `make load`.

`Predictor` sends one image at a time. `Finetuner` uploads a small data set, polls until the job has succeeded and
checks that the new version answers. The run fails if p95 or the share of errors misses its objective.
"""

import io
import os
import time
from typing import Any

import gevent
import numpy as np
from locust import HttpUser, between, constant_throughput, events, task

P95_MS = float(os.environ.get("TEMPER_LOAD_P95_MS", "250"))  # of POST /predict
ERROR_SHARE = float(os.environ.get("TEMPER_LOAD_ERROR_SHARE", "0.001"))  # of all requests
JOB_TIMEOUT_S = 120.0


class Predictor(HttpUser):
    """An app: one 28x28 image per request, twenty requests a second."""

    weight = 9
    wait_time = constant_throughput(20)

    def on_start(self) -> None:
        """Draw random images."""
        self.images = np.random.default_rng(id(self) % 2**32).integers(0, 256, (32, 28, 28)).tolist()
        self.sent = 0

    @task
    def predict(self) -> None:
        """Predict with the base model."""
        self.sent += 1
        image = self.images[self.sent % len(self.images)]
        body = {"model": "lenet5", "range": "byte", "instances": [image]}
        with self.client.post("/predict", json=body, catch_response=True) as answer:
            if answer.ok and len(answer.json()["predictions"]) != 1:
                answer.failure("expected one prediction for one image")


class Finetuner(HttpUser):
    """A team: a hundred labelled images, five epochs, and a look at the result."""

    weight = 1
    wait_time = between(1, 3)

    def on_start(self) -> None:
        """Make a data set of horizontal and vertical stripes."""
        rng = np.random.default_rng(0)
        labels = np.arange(100) % 2
        stripes = np.zeros((100, 28, 28), np.uint8)
        stripes[labels == 0, 8:20:4, 4:24] = 255
        stripes[labels == 1, 4:24, 8:20:4] = 255
        self.images = np.clip(stripes + rng.normal(0, 30, stripes.shape), 0, 255).astype(np.uint8)
        packed = io.BytesIO()
        np.savez(packed, images=self.images, labels=np.array(["rows", "columns"])[labels])
        self.upload = packed.getvalue()
        self.model = f"load-{id(self) % 10_000}"

    @task
    def finetune(self) -> None:
        """Upload, wait, predict with the new version."""
        files, form = {"data": ("stripes.npz", self.upload)}, {"model": self.model, "spec": '{"epochs": 5}'}
        answer = self.client.post("/finetune", files=files, data=form)
        if not answer.ok:
            return
        began, job = time.monotonic(), answer.json()
        while job["finished_at"] is None and time.monotonic() - began < JOB_TIMEOUT_S:
            gevent.sleep(0.2)
            job = self.client.get(f"/finetune/{job['id']}", name="/finetune/{id}").json()
        error = None if job["status"] == "succeeded" else RuntimeError(f"job {job['status']}: {job['error']}")
        seconds = time.monotonic() - began
        self.environment.events.request.fire(
            request_type="JOB", name="finetune", response_time=1000 * seconds, response_length=0, exception=error
        )
        if error is None:
            body = {"model": self.model, "range": "byte", "instances": [self.images[0].tolist()]}
            with self.client.post("/predict", json=body, name="/predict (new)", catch_response=True) as answer:
                found = answer.json() if answer.ok else {}
                if found.get("version", 0) < job["version"] or found["predictions"][0]["label"] != "rows":
                    answer.failure(f"version {job['version']} should predict rows: {answer.text}")


@events.quitting.add_listener
def hold_objectives(environment: Any, **_: Any) -> None:
    """Exit with 1 if an objective is missed, and print them all."""
    total = environment.stats.total
    predict = environment.stats.get("/predict", "POST")
    p95 = predict.get_response_time_percentile(0.95) or float("inf")
    jobs = environment.stats.get("finetune", "JOB").num_requests
    kept = p95 <= P95_MS and total.fail_ratio <= ERROR_SHARE and jobs > 0
    print(
        f"\nPOST /predict p95 {p95:.0f} ms (objective {P95_MS:.0f}), errors {total.fail_ratio:.3%} "
        f"(objective {ERROR_SHARE:.1%}), {jobs} fine-tunes finished: {'kept' if kept else 'MISSED'}"
    )
    environment.process_exit_code = 0 if kept else 1
