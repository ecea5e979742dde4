"""deploy/compose.yaml is valid, fits together, and names what is real."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.tensorflow_serving import tensorflow_serving_command
from store.settings import Settings, from_environment, unknown_variables

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy"
TEXT = (FOLDER / "compose.yaml").read_text()
EXAMPLE = dict(re.findall(r"^(\w+)=(.*)$", (FOLDER / ".env.example").read_text(), re.MULTILINE))
VARIABLE = re.compile(r"\$\{(\w+)(:[-?])?([^}]*)\}")


def resolved(text: str) -> str:
    """The text with the variables of `.env.example`, and passwords."""
    return VARIABLE.sub(lambda found: EXAMPLE[found[1]] or (found[3] if found[2] == ":-" else "secret"), text)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load(resolved(TEXT)))


def test_every_variable_is_in_the_example_and_passwords_have_no_default() -> None:
    found = {(name, kind) for name, kind, _ in VARIABLE.findall(TEXT)}
    assert {name for name, _ in found} | {"COMPOSE_PROFILES"} == EXAMPLE.keys()
    assert {name for name, kind in found if kind == ":?"} == {
        name for name, value in EXAMPLE.items() if "PASSWORD" in name
    }
    assert [value for name, value in EXAMPLE.items() if "PASSWORD" in name] == ["", ""]


def test_what_is_used_is_declared_and_the_other_way_round(compose: dict[str, Any]) -> None:
    services = compose["services"]
    used: dict[str, set[str]] = {"networks": set(), "volumes": set(), "secrets": set()}
    for name, service in services.items():
        used["networks"] |= set(service["networks"])
        used["secrets"] |= set(service.get("secrets", []))
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (FOLDER / source).exists(), source
            else:
                used["volumes"].add(source)
        assert set(service.get("depends_on", {})) <= services.keys()
        for other, condition in service.get("depends_on", {}).items():
            assert not services[other].get("profiles"), f"{name} could not start without the profile of {other}"
            assert "healthcheck" in services[other] or "build" in services[other]
            assert condition == {"condition": "service_healthy"}
    assert {kind: set(compose[kind]) for kind in used} == used


def test_images_are_targets_of_the_dockerfile_or_have_a_version(compose: dict[str, Any]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for service in compose["services"].values():
        if "build" in service:
            target = service["build"]["target"]
            assert re.search(rf"^FROM \S+ AS {target}$", dockerfile, re.MULTILINE)
            assert (FOLDER / service["build"]["context"]).resolve() == ROOT
            assert service["image"] == f"temper-{target}"
            for argument in service["build"].get("args", {}):
                assert re.search(rf"^ARG {argument}\b", dockerfile, re.MULTILINE)
        else:
            assert re.fullmatch(r"[\w./-]+:v?\d[\w.]*", service["image"]), service["image"]


@pytest.mark.parametrize("name", ["gateway", "trainer"])
def test_settings_are_real_and_valid(compose: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = compose["services"][name]["environment"]
    ours = {variable: value for variable, value in environment.items() if variable.startswith("TEMPER_")}
    assert ours.keys() <= {f"TEMPER_{field.upper()}" for field in Settings.model_fields}
    assert unknown_variables(ours) == {}
    for variable, value in ours.items():
        monkeypatch.setenv(variable, value or "")
    (address,) = from_environment().server_addresses
    host, _, port = address.partition(":")
    servers = [service for service in compose["services"].values() if service.get("profiles")]
    assert [service["networks"] for service in servers] == [{"serving": {"aliases": [host]}}] * 2
    assert f"0.0.0.0:{port}" in (ROOT / "Dockerfile").read_text()


def test_only_the_gateway_can_be_reached_from_outside(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        ports = service.get("ports", [])
        assert all(port.startswith("127.0.0.1:") for port in ports), name
        assert not ports or "edge" in service["networks"], name
    assert {name for name, network in compose["networks"].items() if not network} == {"edge"}
    assert {name for name, service in compose["services"].items() if "edge" in service["networks"]} == {
        "gateway", "prometheus", "grafana"
    }  # fmt: skip


def test_our_containers_have_no_rights_that_they_do_not_need(compose: dict[str, Any]) -> None:
    for name in ("gateway", "trainer", "model-server", "tensorflow-serving"):
        service = compose["services"][name]
        assert (service["read_only"], service["cap_drop"], service["tmpfs"]) == (True, ["ALL"], ["/tmp"])
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_tensorflow_serving_is_started_as_temper_serve_starts_it(compose: dict[str, Any], tmp_path: Path) -> None:
    ours = tensorflow_serving_command("tensorflow_model_server", 8500, 8501, tmp_path / "models.config")
    ours = [part.replace(str(tmp_path), "/etc/tensorflow-serving") for part in ours]
    command = compose["services"]["tensorflow-serving"]["entrypoint"]
    assert sorted(command) == sorted(part for part in ours if part != "--grpc_socket_path=")
    assert (FOLDER / "tensorflow-serving" / "models.config").read_text() == (tmp_path / "models.config").read_text()


@pytest.mark.parametrize("profile", ["embedded", "tensorflow-serving"])
def test_compose_itself_accepts_the_file_and_refuses_one_without_passwords(profile: str, tmp_path: Path) -> None:
    binary = shutil.which("docker-compose")
    if binary is None:
        pytest.skip("docker-compose is not on the PATH")
    command = [binary, "--file", str(FOLDER / "compose.yaml"), "--env-file"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "COMPOSE_PROFILES": profile}
    without = [*command, str(FOLDER / ".env.example"), "config", "--quiet"]
    refused = subprocess.run(without, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "PASSWORD is missing a value: set it in deploy/.env" in refused.stderr
    variables = tmp_path / "env"
    variables.write_text("".join(f"{name}={value or 'secret'}\n" for name, value in EXAMPLE.items()))
    accepted = subprocess.run(
        [*command, str(variables), "config", "--services"], env=environment, capture_output=True, text=True, check=False
    )
    assert accepted.returncode == 0, accepted.stderr
    servers = {"model-server", "tensorflow-serving"} & set(accepted.stdout.split())
    assert servers == {"model-server" if profile == "embedded" else profile}
