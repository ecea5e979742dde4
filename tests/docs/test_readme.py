"""What README.md, CONTRIBUTING.md and docs/ say of the code is true of the code."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from cli.main import main as temper
from docs.generate import GENERATED, PART, PROCESSES, REFERENCE, classes_of_errors, generated, process
from quality import plots
from tests.conftest import Service
from tests.docs.test_snippets import ADDRESS, SNIPPETS
from trainer.asked import parse_asked
from trainer.spec import ATTACK_NAMES, Adversarial, Spec, unregularized

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/**/*.md")))
}
TEXT = "\n".join(PAGES.values())
HELP = """\
import contextlib, io, json, runpy, sys

found = {}
for name in sys.argv[1:]:  # in one process, which imports TensorFlow once
    sys.argv = [name, "--help"]
    code = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as exc:
            code = exc.code
    found[name] = code, printed.getvalue()
print(json.dumps(found))
"""
INDENT = 2  # of a tree, for each level


def code(text: str) -> Iterator[str]:
    """Every code span, and every line of every code block, without comments after two spaces."""
    for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
        yield from (line.partition("  #")[0].strip() for line in block.splitlines())
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from (match.partition("  #")[0].strip() for match in re.findall(r"^    (.+)$", text, re.MULTILINE))
    yield from re.findall(r"`([^`\n]+)`", text)


def rows(page: str, header: str) -> list[list[str]]:
    """Cells of the table that begins with `header` on a page."""
    lines = PAGES[page].partition(header)[2].partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("| ")]


def test_the_reference_is_that_of_the_code() -> None:
    written = {path: path.read_text(encoding="utf-8") for path in REFERENCE.glob("*.md")}
    parts = [name for text in written.values() for _, name, _ in PART.findall(text)]
    assert sorted(parts) == sorted(GENERATED)
    for path, text in written.items():
        assert text == generated(text), f"{path.name}: run .venv/bin/python -m docs.generate"


def test_every_error_has_a_cause_and_a_cure_of_its_own() -> None:
    kinds = list(classes_of_errors())
    assert len({kind.code for kind in kinds}) == len(kinds)
    for kind in kinds:
        assert (kind.__doc__ or "").strip(), f"{kind.__name__} has no cause: its docstring"
        assert vars(kind).get("cure", "").endswith("."), f"{kind.__name__} has no cure"


def test_every_regularizer_of_the_spec_is_explained_with_an_equation_and_a_plot() -> None:
    page = PAGES["docs/explanation/regularizers.md"]
    spec = Spec(l1=1, l2=1, l2_sp=1, dropout=0.5, label_smoothing=0.5, mixup=1, ema=0.5)
    off = unregularized(spec)
    names = {name for name in Spec.model_fields if getattr(spec, name) != getattr(off, name)} - {"calibrate"}
    for name in names | {"augmentation", "early_stopping"}:
        text = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert re.search(r"^    \S", text, re.MULTILINE), f"{name} has no equation"
        assert f"({name}.svg)" in text, f"{name} has no plot"
    assert {f"{name}.svg" for name in plots.ALL} == {path.name for path in (ROOT / "docs/explanation").glob("*.svg")}


def test_every_plot_can_be_drawn_from_the_results_that_are_kept() -> None:
    found, needed = plots.results(), {run.key for make in plots.ALL.values() for run in make().runs}
    assert needed - set(found) == set(), "run .venv/bin/python -m quality.plots"


def test_the_attack_table_has_the_options_and_defaults_of_the_code() -> None:
    models = {get_args(tagged)[1].tag: get_args(tagged)[0] for tagged in get_args(get_args(Adversarial)[0])}
    found = {
        name.strip("`"): dict(re.findall(r"`(\w+)` ([\w.]+)", options.partition(";")[0]))
        for name, options, _ in rows("docs/explanation/adversarial.md", "| `attack` | options")
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
    for line in README.partition("## The tree\n")[2].splitlines():
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
            if match[1] in PROCESSES:  # which pass theirs on
                parts = (process(match[1]),)
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

    command = [sys.executable, "-W", "ignore", "-c", HELP, *ours]  # the modules warn that they are imported already
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-1000:]
    for name, (status, help_text) in json.loads(done.stdout.splitlines()[-1]).items():
        assert (status, help_text[:6]) == (0, "Usage:"), f"{name}: {help_text[-300:]}{done.stderr[-300:]}"
        assert [option for option in named[name] if option not in help_text] == [], name


def test_commands_to_paste_name_the_virtual_environment() -> None:
    for page, text in PAGES.items():
        text = re.sub(r"^```(?:python|text|json)\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
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
                case "-H" | "-o":
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
    found = [curl for snippet in SNIPPETS if snippet.language == "bash" for curl in curls(snippet.code)]
    assert len(found) > 15
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
