"""What README.md, CONTRIBUTING.md and docs/ say of the code is true of the code."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from cli.main import main as temper
from tests.conftest import Service, png, zipped
from tests.docs.tables import BEGIN, END, settings_table
from trainer.asked import parse_asked
from trainer.spec import ATTACK_NAMES, Adversarial, Spec

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*.md")))
}
TEXT = "\n".join(PAGES.values())
ADDRESS = "localhost:8080"
INDENT = 2  # of a tree, for each level


def blocks(language: str) -> list[str]:
    """Fenced code of a language in the README."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def code(text: str) -> Iterator[str]:
    """Every code span, and every line of every code block, without comments after two spaces."""
    for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
        yield from (line.partition("  #")[0].strip() for line in block.splitlines())
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from (match.partition("  #")[0].strip() for match in re.findall(r"^    (.+)$", text, re.MULTILINE))
    yield from re.findall(r"`([^`\n]+)`", text)


def section(title: str) -> str:
    """The part of the README under a heading, up to the next one."""
    found = re.search(rf"^#+ {title}\n(.*?)(?=^#+ |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found, f"no section {title!r}"
    return found[1]


def rows(title: str, header: str) -> list[list[str]]:
    """Cells of the table that begins with `header` in a section."""
    lines = section(title).partition(header)[2].partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("| ")]


def test_the_settings_table_is_that_of_the_code() -> None:
    written = README.partition(BEGIN)[2].partition(END)[0]
    assert written == settings_table(), "run .venv/bin/python -m tests.docs.tables"


def test_the_spec_table_has_the_fields_and_defaults_of_the_code() -> None:
    def shown(value: Any) -> str:
        if isinstance(value, bool) or value is None:
            return {True: "true", False: "false", None: "null"}[value]
        return value if isinstance(value, str) else f"{value:g}"

    found = {name.strip("`"): default.strip("`") for name, default, _ in rows("The spec", "| field | default |")}
    assert found == {name: shown(field.default) for name, field in Spec.model_fields.items()}


def test_the_options_in_the_spec_table_have_the_defaults_of_the_code() -> None:
    for name, _, meaning in rows("The spec", "| field | default |"):
        kinds = [kind for kind in get_args(Spec.model_fields[name.strip("`")].annotation) if isinstance(kind, type)]
        for kind in kinds:
            if issubclass(kind, BaseModel):
                for option, field in kind.model_fields.items():
                    assert f"`{option}`" in meaning, f"{name}: {option} is missing"
                    for default in re.findall(rf"`{option}` ([\d.]+)", meaning):
                        assert float(default) == field.default, f"{name}.{option}"


def test_the_attack_table_has_the_options_and_defaults_of_the_code() -> None:
    models = {get_args(tagged)[1].tag: get_args(tagged)[0] for tagged in get_args(get_args(Adversarial)[0])}
    found = {
        name.strip("`"): dict(re.findall(r"`(\w+)` ([\w.]+)", options.partition(";")[0]))
        for name, options, _ in rows("The spec", "| `attack` | options")
    }
    assert tuple(found) == ATTACK_NAMES
    for name, options in found.items():
        expected = {option: field.default for option, field in models[name].model_fields.items() if option != "attack"}
        assert options == {
            option: value if isinstance(value, str) else f"{value:g}" for option, value in expected.items()
        }, name


def tree() -> list[str]:
    """Paths of the tree in the README."""
    found, parents = [], [""]
    for line in section("The tree").splitlines():
        if match := re.match(r"    ( *)(\S+)  +\S", line):
            depth = len(match[1]) // INDENT
            path = parents[depth] + match[2]
            parents[depth + 1 :] = [path]
            found.append(path)
    return found


def test_every_path_of_the_tree_exists() -> None:
    assert len(tree()) > 10
    assert [path for path in tree() if not (ROOT / path).exists()] == []


def test_every_package_is_in_the_tree() -> None:
    packages = {
        f"{init.parent.relative_to(ROOT).as_posix()}/"
        for init in ROOT.glob("[!.]*/**/__init__.py")
        if "var" not in init.parts
    }
    assert {package for package in packages if not package.startswith("tests/")} - set(tree()) == set()
    assert "tests/" in tree()


def test_every_file_that_is_linked_to_exists() -> None:
    broken = [
        f"{page}: {target}"
        for page, text in PAGES.items()
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text)
        if "://" not in target and not (ROOT / page).parent.joinpath(target).exists()
    ]
    assert broken == []


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {found for line in code(TEXT) for found in re.findall(r"^make ([a-z-]+)", line)}
    assert {"demo", "serve", "test"} <= named
    assert named - targets == set()


def test_every_temper_command_and_option_exists() -> None:
    named = set()
    for line in code(TEXT):
        if match := re.match(r"(?:\.venv/bin/)?temper ([a-z-]+)(.*)", line):
            command = temper.commands.get(match[1])
            assert command, line
            parts = (command, *getattr(command, "commands", {}).values())  # a group has commands of its own
            options = {name for part in parts for parameter in part.params for name in parameter.opts}
            assert set(re.findall(r"(?<= )--[a-z0-9-]+", match[2])) - options - {"--help"} == set(), line
            named.add(match[1])
    assert named == set(temper.commands)


@pytest.mark.slow
def test_every_module_that_is_run_has_a_help_with_the_options_that_are_named() -> None:
    named: dict[str, set[str]] = {}
    for line in code(TEXT):
        if match := re.search(r"(?:python|^) ?-m ((?:\w+\.)*\w+)(.*)", line):
            named.setdefault(match[1], set()).update(re.findall(r"(?<= )--[a-z0-9-]+", match[2]))
    assert {"api", "trainer", "serving", "load.bench_predict", "trainer.delta"} <= set(named)
    missing = [name for name in named if importlib.util.find_spec(name) is None]
    assert missing == []
    ours = [name for name in named if (ROOT / name.partition(".")[0]).is_dir()]

    def helped(name: str) -> str:
        command = [sys.executable, "-m", name, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
        assert (done.returncode, done.stdout[:6]) == (0, "Usage:"), f"{name}: {done.stdout[-300:]}{done.stderr[-300:]}"
        return done.stdout

    with ThreadPoolExecutor(2) as pool:
        for name, help_text in zip(ours, pool.map(helped, ours), strict=True):
            assert [option for option in named[name] if option not in help_text] == [], name


def test_commands_to_paste_name_the_virtual_environment() -> None:
    for page, text in PAGES.items():
        for block in re.findall(r"```(?:bash)?\n(.*?)```|((?:^    .+\n)+)", text, re.DOTALL | re.MULTILINE):
            for line in "".join(block).splitlines():
                assert not re.match(r"\s*(python|temper|pytest|ruff|mypy)\b(?!/)", line), f"{page}: {line}"


@dataclass(frozen=True)
class Curl:
    """A request as a curl command makes it."""

    method: str
    path: str
    forms: dict[str, str]
    body: str | None


def curls(script: str) -> Iterator[Curl]:
    """The requests of a script of bash."""
    script = script.replace("\\\n", " ")
    variables: dict[str, str] = {}
    for line in script.splitlines():
        words = shlex.split(line, comments=True)
        if words and all(re.match(r"[A-Z]+=", word) for word in words):
            variables.update((name, value) for name, _, value in (word.partition("=") for word in words))
        if not words or words[0] != "curl":
            continue
        words = [re.sub(r"\$([A-Z]+)", lambda found: variables[found[1]], word) for word in words]
        method, url, forms, body = None, "", {}, None
        rest = iter(words[1:])
        for word in rest:
            match word:
                case "-s":
                    pass
                case "-X":
                    method = next(rest)
                case "-F":
                    name, _, value = next(rest).partition("=")
                    forms[name] = value
                case "-d" | "--data-binary":
                    body = next(rest)
                case "-H":
                    next(rest)
                case _:
                    assert not word.startswith("-"), f"an option that this test does not know: {line}"
                    url = word
        assert url.startswith(f"{ADDRESS}/"), line
        path = url.removeprefix(ADDRESS).partition("?")[0]
        yield Curl(method or ("POST" if forms or body else "GET"), path, forms, body)


@pytest.fixture(scope="module")
def openapi(service: Service) -> dict[str, Any]:
    return dict(service.api.get("/openapi.json").json())


def is_route(openapi: dict[str, Any], method: str, path: str) -> bool:
    templates = [route for route, item in openapi["paths"].items() if method.lower() in item]
    return any(re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(route)), path) for route in templates)


def test_every_curl_example_is_a_request_of_the_api(openapi: dict[str, Any]) -> None:
    found = [curl for block in blocks("bash") for curl in curls(block)]
    assert len(found) > 5
    for curl in found:
        assert is_route(openapi, curl.method, curl.path), curl
        if "spec" in curl.forms:
            parse_asked(curl.forms["spec"])
        if curl.body and not curl.body.startswith("@"):
            json.loads(curl.body)


def test_every_route_that_is_named_exists(openapi: dict[str, Any]) -> None:
    for line in code(TEXT):
        if match := re.fullmatch(r"(GET|POST|PUT|DELETE) (/[^ ?\[]*)(?:\?\S*)?", line):
            assert is_route(openapi, match[1], match[2]), f"{line} is no route"


@pytest.fixture
def tried(service: Service, digits_zip: bytes, digits: Any, tmp_path: Path) -> Path:
    """A directory in which the examples can run as after `make demo`."""
    (tmp_path / "var" / "demo").mkdir(parents=True)
    (tmp_path / "var" / "demo" / "digits.zip").write_bytes(digits_zip)
    (tmp_path / "var" / "demo" / "sample.png").write_bytes(png(digits[0][0]))
    return tmp_path


def test_the_examples_for_the_shell_work_when_pasted_in_order(service: Service, tried: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("no curl on this machine (Debian: apt-get install curl)")
    # `curl` fails on an HTTP error, and the examples ask the service of the test.
    script = 'set -eu\ncurl() { command curl --fail-with-body "$@"; echo; }\n' + "\n".join(blocks("bash"))
    script = script.replace(ADDRESS, service.url.removeprefix("http://"))
    script = script.replace(".venv/bin/temper", f"{sys.executable} -m cli")
    script = script.replace("--wait", "--epochs 1 --wait").replace("spec={", 'spec={"epochs": 1, ')  # to save time
    environment = {**os.environ, "TEMPER_URL": service.url, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tried, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert service.api.get("/models/rollout").status_code == 404  # the last step removes it


def output(program: str, folder: Path) -> str:
    """What a Python program prints that is started in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_in_python_works(service: Service, tried: Path) -> None:
    example, *_ = blocks("python")
    program = example.replace(f"http://{ADDRESS}", service.url)
    spec = {"search": {"trials": 2}, "epochs": 1}  # to save time
    program = program.replace('"digits-python", wait', f'"digits-python", {spec}, wait')
    assert "trials" in program
    said = output(program, tried).split()
    assert said[0] == "version"
    assert said[-1].isdecimal()


def test_the_example_with_the_openai_client_works(service: Service, tried: Path) -> None:
    _, example, _ = blocks("python")
    program = example.replace(f"http://{ADDRESS}", service.url)
    program += "client.fine_tuning.jobs.cancel(job.id)\nprint(job.object, job.training_file == file.id)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tried, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["fine_tuning.job", "True"]


def test_the_example_that_leaves_out_wrong_labels_works(service: Service, tried: Path, digits: Any) -> None:
    images, labels = digits
    wrong = {number: (labels[number] + 1 + number % 9) % 10 for number in range(20)}
    files = {f"{wrong.get(i, labels[i])}/{i}.png": png(images[i]) for i in range(200)}
    (tried / "var" / "demo" / "digits.zip").write_bytes(zipped(files))
    spec = '{"folds": 3, "validation_split": 0}'
    service.finished(service.finetune(zipped(files), "doubted", spec).json()["id"])
    *_, example = blocks("python")
    program = example.replace(f"http://{ADDRESS}", service.url).replace('"digits"', '"doubted"')
    program = program.replace("exclude=", 'spec={"epochs": 1, "gate": {"not_worse": False}}, exclude=')
    output(program, tried)
    newest = service.api.get("/finetune?model=doubted&limit=1").json()["data"][0]
    assert (newest["status"], 0 < newest["dataset"]["excluded"] <= 25) == ("succeeded", True)
