"""The images contain what runs in them. `make images` builds and runs them, which takes minutes."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

from deploy import slim
from deploy.images import LOCKS, TARGETS

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
STAGES = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL))
PARENTS = {stage: parent for parent, stage in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)}
ALLOWED = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
TOPS = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"deploy"}


def instructions(target: str, name: str) -> list[str]:
    """The arguments of an instruction in a stage and those that it starts from, the last one first."""
    found: list[str] = []
    stage: str | None = target
    while stage in STAGES:
        found += reversed(re.findall(rf"^(?:HEALTHCHECK .* )?{name} (.*)$", STAGES[stage], re.MULTILINE))
        stage = PARENTS[stage]
    return found


def test_everything_that_our_modules_import_is_in_the_images() -> None:
    sources = [
        path for name in ALLOWED for path in ((ROOT / name).rglob("*.py") if (ROOT / name).is_dir() else [ROOT / name])
    ]
    assert len(sources) > 100
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())) if path.suffix == ".py" else ():
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                top = name.partition(".")[0]
                allowed = top in ALLOWED or f"{name.replace('.', '/')}.py" in ALLOWED
                assert top not in TOPS or allowed, f"{path} imports {name}"


@pytest.mark.parametrize("target", TARGETS)
def test_every_image_has_a_command_a_health_check_and_a_user_without_rights(target: str) -> None:
    check, command = instructions(target, "CMD")[1::-1]
    for line in (check, command):
        words = json.loads(line)
        assert words[:2] == ["python", "-m"]
        assert importlib.util.find_spec(words[2]) is not None
    assert json.loads(check)[2:] == ["deploy.healthcheck", target]
    assert instructions(target, "USER")[0] == "10001"


def test_the_images_install_the_lock_files() -> None:
    assert "requirements/gateway.txt" in STAGES["gateway-build"]
    assert "requirements/${EXTRA}.txt" in STAGES["trainer-build"]
    assert f"ARG EXTRA={LOCKS['trainer']}" in DOCKERFILE
    assert all((ROOT / "requirements" / f"{name}.txt").exists() for name in (*LOCKS.values(), "gpu"))
    assert "tensorflow" not in (ROOT / "requirements" / "gateway.txt").read_text()


def test_only_what_is_never_read_is_removed(tmp_path: Path) -> None:
    unused = [pattern.replace("*", "1.so") for pattern in slim.UNUSED]
    surplus = ["numpy/tests/test_a.py", "uvloop/loop.pyx", "a/b.pyi", "botocore/data/ec2/service.json.gz", *unused]
    kept = ["numpy/testing/a.py", "uvloop/loop.so", "botocore/data/s3/service.json.gz", "botocore/data/endpoints.json",
            "PIL/_webp.1.so", "pillow.libs/libwebp-1.so"]  # fmt: skip
    for name in [*surplus, *kept]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    slim.prune(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
    with pytest.raises(SystemExit, match="has a new release moved it"):
        slim.prune(tmp_path)
