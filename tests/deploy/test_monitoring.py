"""Prometheus' rules and Grafana's dashboard are valid and name metrics that exist, and alerts fire when they should."""

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
STORE_METRICS = ROOT / "api" / "store_metrics.py"
SUFFIXES = re.compile(r"_(bucket|sum|count)$")


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    dashboard = json.loads((GRAFANA / "dashboards" / "temper.json").read_text())
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    yield from (target["expr"] for panel in panels() for target in panel["targets"])


def strings(path: Path) -> set[str]:
    """The string constants of a module."""
    tree = ast.parse(path.read_text())
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.fixture
def promtool() -> str:
    binary = shutil.which("promtool")
    if binary is None:
        pytest.skip("promtool is not on the PATH (Debian: apt-get install prometheus)")
    return binary


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_metrics_and_labels_that_are_named_exist() -> None:
    known = strings(ROOT / "api" / "metrics.py")
    known |= strings(STORE_METRICS)
    records = {rule["record"] for rule in rules() if "record" in rule}
    for expression in expressions():
        without_text = re.sub(r'"[^"]*"', '""', expression)
        metrics = {SUFFIXES.sub("", name) for name in re.findall(r"\btemper_\w+", without_text)}
        assert metrics <= known, expression
        assert set(re.findall(r"\btemper:[\w:]+", without_text)) <= records, expression
        labels = re.findall(r'(\w+)\s*(?:=~?|!=)\s*""', without_text)
        labels += [label for part in re.findall(r"\bby \(([^)]*)\)", without_text) for label in re.split(r",\s*", part)]
        assert set(labels) <= known | {"le", "job", "instance"}, expression


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    cases = [
        case
        for test in yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == alerts


def test_every_alert_has_a_severity_a_summary_and_a_description() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert rule["annotations"].keys() == {"summary", "description"}


def test_the_rules_and_the_configuration_are_valid(promtool: str) -> None:
    run(promtool, "check", "rules", PROMETHEUS / "rules.yml")
    run(promtool, "check", "config", "--syntax-only", PROMETHEUS / "prometheus.yml")


def test_every_alert_fires_when_it_should_and_not_before(promtool: str) -> None:
    run(promtool, "test", "rules", PROMETHEUS / "rules_test.yml")


def test_the_expressions_of_the_dashboard_are_valid(promtool: str, tmp_path: Path) -> None:
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    assert len(found) > 10
    asked = [{"record": f"panel:{i}", "expr": each.replace("$__rate_interval", "1m")} for i, each in enumerate(found)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": asked}]}))
    run(promtool, "check", "rules", tmp_path / "panels.yml")


def test_the_dashboard_asks_the_source_that_is_provisioned() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    for panel in panels():
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {source["uid"]}
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    assert source["url"] == "http://prometheus:9090"
    assert "127.0.0.1:9090:9090" in compose["prometheus"]["ports"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "temper.yaml").read_text())["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in compose["grafana"]["volumes"]


def test_prometheus_asks_the_gateway_with_the_key_that_compose_gives_it() -> None:
    (job,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    (secret,) = compose["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    (target,) = job["static_configs"][0]["targets"]
    assert target.partition(":")[0] in compose["services"]
    assert all(f'up{{job="{job["job_name"]}"}}' in each for each in expressions() if "up{" in each.replace("_up{", ""))
