"""Every command and snippet of README.md and docs/ is executed, page by page, in the order in which it stands there.

A page's snippets share a folder as `make demo` leaves it. All pages ask the service of the test, and what would train
for long trains for one epoch. What a test cannot run is in `EXCEPTIONS`, with the reason.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Service, png, zipped

ROOT = Path(__file__).parents[2]
ADDRESS = "localhost:8080"
SOURCES = ("README.md", *(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/**/*.md"))))
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S* )*(?:\.venv/bin/|make |curl |docker |kubectl |apt-get |pip |cp |ray |export [A-Z]|eval )"
)


@dataclass(frozen=True)
class Snippet:
    """A block of commands or of Python."""

    page: str
    language: str  # bash or python
    code: str

    @property
    def first_line(self) -> str:
        """What names it in `EXCEPTIONS`."""
        return self.code.splitlines()[0]


def snippets(page: str, text: str) -> Iterator[Snippet]:
    """The fenced blocks of bash and Python, and the indented blocks that hold commands."""
    for match in re.finditer(
        r"^```(\w*)\n(.*?)^```|(^    \S[^\n]*\n(?:^    [^\n]*\n)*)", text, re.DOTALL | re.MULTILINE
    ):
        language, fenced, indented = match.groups()
        if language in ("bash", "python"):
            yield Snippet(page, language, fenced)
        elif language in ("", "sh", "shell", "console", "py"):
            raise AssertionError(f"{page}: a block needs a language, bash or python if it can run: {fenced}")
        elif indented and any(COMMAND.match(line.strip()) for line in indented.splitlines()):
            yield Snippet(page, "bash", re.sub(r"^    ", "", indented, flags=re.MULTILINE))


SNIPPETS = [found for page in SOURCES for found in snippets(page, (ROOT / page).read_text(encoding="utf-8"))]

# Why no test runs a snippet as it stands.
SERVES = "goes on until it is stopped; the service of this test is such a one"
INSTALLS = "installs packages; a test has the environment that it has"
LONG = "takes minutes to hours; its module and options are checked by test_readme.py"
LOAD = "sends load for minutes; tests/load runs the load kit for seconds"
MACHINES = "needs several machines; tests/end_to_end/test_several_machines.py runs these processes on one"
BUCKET = "needs an object store; tests/end_to_end/test_object_store.py runs these processes with one"
RAY = "needs a Ray cluster; tests/trainer/test_ray.py runs a pool on one"
DOCKER = "needs Docker; tests/deploy checks what it is given"
KUBERNETES = "needs a cluster; tests/deploy checks the manifests"
ROOT_RIGHTS = "needs root, and changes the packages of the machine"
GPU = "needs a GPU; `make test-gpu` runs the trainer's tests on one"
BINARY = "needs TensorFlow Serving's binary; tests/contract runs against it where TEMPER_TFS_BINARY names it"
FORMATS = "ONNX needs an environment of its own; tests/trainer/test_convert.py converts and runs both formats"
TLS = "needs three processes with certificates; tests/serving/test_tls.py makes them as the page says and uses them"
MACHINE = "its exit code depends on the machine; tests/cli/test_doctor.py runs it"
# Page -> first line of a snippet -> why.
EXCEPTIONS: Mapping[str, Mapping[str, str]] = {
    "README.md": {
        "make demo      # fine-tune on 300 handwritten digits, predict 1,497 others, print the report":
            "the demo has a test of its own below, and the service of this test is what `make serve` starts",
    },
    "docs/tutorial.md": {"make demo": "as in README.md"},
    "docs/deploy.md": {
        "docker build --target gateway --tag temper-gateway .": DOCKER,
        "apt-get install buildah debootstrap": ROOT_RIGHTS,
        "cp deploy/.env.example deploy/.env       # set the two passwords in it": DOCKER,
        "docker compose -f deploy/compose.yaml exec gateway temper keys create --name prometheus --scope admin "
        "| tr -d '\\n' > deploy/secrets/metrics_key": DOCKER,
        "kubectl apply -f deploy/k8s/base/namespace.yaml": KUBERNETES,
    },
    "docs/explanation/regularizers.md": {".venv/bin/python -m quality.plots": LONG},
    "docs/export.md": {
        ".venv/bin/temper download digits:3 --format tflite  # digits-3.tflite": FORMATS,
        "import json": FORMATS,
    },
    "docs/load.md": {
        ".venv/bin/python -m load --url https://temper.example --ca ca.pem --duration-s 60": LOAD,
        ".venv/bin/locust -f load/locustfile.py --host http://localhost:8080": LOAD,
    },
    "docs/operations.md": {
        ".venv/bin/temper doctor          # --json for programs": MACHINE,
        ".venv/bin/python -m serving --address 0.0.0.0:8500 --tls-cert model-server.crt --tls-key model-server.key "
        "--client-ca ca.crt": TLS,
    },
    "docs/reliability.md": {
        ".venv/bin/python -m tests.end_to_end.test_histories --histories 10000 --seed 7": LONG,
        "make torture SECONDS=600": LONG,
    },
    "docs/how-to/gpu.md": {
        ".venv/bin/pip install --require-hashes -r requirements/gpu.txt": INSTALLS,
        ".venv/bin/temper doctor": GPU,
        ".venv/bin/temper finetune var/demo/digits.zip --model digits-gpu --device gpu --wait": GPU,
        "TEMPER_WORKERS=2 TEMPER_GPU_MEMORY_MB=4096 .venv/bin/temper serve": SERVES,
    },
    "docs/how-to/load-test.md": {
        "make load": LOAD,
        ".venv/bin/python -m load --url http://localhost:8080 --duration-s 60": LOAD,
    },
    "docs/how-to/postgresql.md": {
        "export TEMPER_STORE=postgresql+psycopg://temper:password@db.example/temper TEMPER_HOME=/srv/temper "
        "TEMPER_MODEL_SERVER=model-server:8500": MACHINES,
        "export TEMPER_STORE=postgresql+psycopg://temper:password@db.example/temper "
        "TEMPER_OBJECTS=s3://bucket/prefix": BUCKET,
    },
    "docs/how-to/ray.md": {
        ".venv/bin/ray start --head --port 6379": RAY,
        ".venv/bin/temper worker --engine ray --address 127.0.0.1:6379 --cpus 2 --gpus 0.25": RAY,
    },
    "docs/how-to/tensorflow-serving.md": {
        "TEMPER_MODEL_SERVER=/usr/local/bin/tensorflow_model_server .venv/bin/temper serve": BINARY,
        'docker run --rm -p 8500:8500 -v "$PWD/var/models:/models" -v "$PWD/deploy/tensorflow-serving:/config:ro" '
        "tensorflow/serving --model_config_file=/config/models.config": DOCKER,
        "TEMPER_TFS_BINARY=/usr/local/bin/tensorflow_model_server make test-contract": BINARY,
    },
}  # fmt: skip


def is_exception(snippet: Snippet) -> bool:
    """Tell whether it is listed."""
    return snippet.first_line in EXCEPTIONS.get(snippet.page, {})


def test_every_exception_is_a_snippet() -> None:
    there = {(snippet.page, snippet.first_line) for snippet in SNIPPETS}
    listed = {(page, line) for page, lines in EXCEPTIONS.items() for line in lines}
    assert listed - there == set()
    assert len(SNIPPETS) - len(listed) > 25


@pytest.fixture
def folder(digits_zip: bytes, digits: Any, tmp_path: Path) -> Path:
    """As after `make demo`, in a checkout with an environment."""
    (tmp_path / "var" / "demo").mkdir(parents=True)
    (tmp_path / "var" / "demo" / "digits.zip").write_bytes(digits_zip)
    (tmp_path / "var" / "demo" / "sample.png").write_bytes(png(digits[0][0]))
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    temper = "import sys; from cli.main import main; main(prog_name='temper')"
    for name, options in (("python", ""), ("temper", f'-c "{temper}"')):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {options} "$@"\n')
        (programs / name).chmod(0o755)
    return tmp_path


def run(snippet: Snippet, service: Service, folder: Path) -> str:
    """What a snippet prints. It fails where a command does, a request that is answered with an error included."""
    code = snippet.code
    for here, there in ((ADDRESS, service.url.removeprefix("http://")), *REPLACED.get(snippet.page, ())):
        code = code.replace(here, there)
    # The store on which `temper keys` works is one in the folder: a key would close the service to the other pages.
    environment = {**os.environ, "TEMPER_URL": service.url, "TEMPER_HOME": "var", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    if snippet.language == "bash":
        if "curl " in code and not shutil.which("curl"):
            pytest.skip("no curl on this machine (Debian: apt-get install curl)")
        for long, short in SHORTENED:
            code = code.replace(long, short)
        functions = 'curl() { command curl --fail-with-body "$@"; echo; }'
        command = ["bash", "-euo", "pipefail", "-c", f"{functions}\n{code}"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{snippet.page}: {snippet.first_line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


# To save time: an epoch in place of a search.
SHORTENED = ((" --wait", " --epochs 1 --wait"), ("spec={", 'spec={"epochs": 1, '))
# Page -> what of its snippets is another thing here.
REPLACED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "README.md": (('"digits-python", wait', '"digits-python", {"search": {"trials": 2}, "epochs": 1}, wait'),),
    "docs/how-to/images.md": (
        ('report("digits")', 'report("doubted")'),
        ('"digits", exclude=', '"doubted", {"epochs": 1, "gate": {"not_worse": False}}, exclude='),
    ),
    "docs/how-to/postgresql.md": (("postgresql+psycopg://temper:password@db.example/temper", "sqlite:///temper.db"),),
    "docs/how-to/webhooks.md": (("https://example.com/hook", "http://127.0.0.1:9/hook"),),
}


def doubt(service: Service, folder: Path, digits: Any) -> None:
    """Mislabel some images of the upload, and have a model whose report names them."""
    images, labels = digits
    wrong = {number: (labels[number] + 1 + number % 9) % 10 for number in range(20)}
    upload = zipped({f"{wrong.get(i, labels[i])}/{i}.png": png(images[i]) for i in range(200)})
    (folder / "var" / "demo" / "digits.zip").write_bytes(upload)
    job = service.finetune(upload, "doubted", '{"folds": 3, "validation_split": 0}').json()
    assert service.finished(job["id"])["status"] == "succeeded"


def newest(service: Service, model: str) -> dict[str, Any]:
    """The last job of a model."""
    found: dict[str, Any] = service.api.get(f"/finetune?model={model}&limit=1").json()["data"][0]
    return found


def check_readme(service: Service, said: list[str]) -> None:
    """The client's example names a version and a digit."""
    words = said[-1].split()
    assert (words[0], words[-1].isdecimal()) == ("version", True)


def check_images(service: Service, said: list[str]) -> None:
    """The images with wrong labels were left out."""
    found = newest(service, "doubted")
    assert (found["status"], 0 < found["dataset"]["excluded"] <= 25) == ("succeeded", True)


def check_canary(service: Service, said: list[str]) -> None:
    """The last step removes the model."""
    assert service.api.get("/models/rollout").status_code == 404


def check_openai(service: Service, said: list[str]) -> None:
    """OpenAI's client has queued a job, which is not waited for."""
    found = newest(service, "digits-openai")
    assert service.api.post(f"/finetune/{found['id']}/cancel").status_code == 200


CHECKS = {
    "README.md": check_readme, "docs/how-to/images.md": check_images, "docs/how-to/canary.md": check_canary,
    "docs/how-to/openai.md": check_openai,
}  # fmt: skip
RUN = {page: [found for found in SNIPPETS if found.page == page and not is_exception(found)] for page in SOURCES}


MARKS = {"docs/tutorial.md": pytest.mark.slow} | {
    f"docs/how-to/{name}.md": pytest.mark.exhaustive for name in ("canary", "images", "jobs")
}  # these train for long
PARAMETERS = [pytest.param(page, marks=MARKS.get(page, ())) for page, found in RUN.items() if found]


@pytest.mark.parametrize("page", PARAMETERS)
def test_the_snippets_of_a_page_work_when_pasted_in_order(
    page: str, service: Service, folder: Path, digits: Any
) -> None:
    if page == "docs/how-to/images.md":
        doubt(service, folder, digits)
    said = [run(snippet, service, folder) for snippet in RUN[page]]
    if check := CHECKS.get(page):
        check(service, said)


@pytest.mark.slow
def test_the_demo_works(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "demo.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {path.name for path in (tmp_path / "var" / "demo").iterdir()} == {"digits.zip", "sample.png"}
