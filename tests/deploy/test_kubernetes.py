"""The manifests for Kubernetes are valid and fit together, and name what is real.

There is no kustomize here, so `rendered` does what our overlays use of it: resources, strategic merge patches, images
and the namespace. KubeRay's RayCluster has no schema among Kubernetes' own; the pods in it are validated as pods.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import cli.main
import trainer.worker.loop
from serving.tensorflow_serving import tensorflow_serving_command
from store.settings import Settings, from_environment, unknown_variables

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "k8s"
OVERLAYS = ("cpu", "ray", "tensorflow-serving")
VERSIONS = ("1.27", "1.37")  # the first with stable gRPC probes, and the newest that the schemas know
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
}
OURS = {"temper-gateway": "gateway", "temper-trainer": "trainer", "temper-model-server": "model-server"}
Resource = dict[str, Any]


def merged(old: Any, new: Any, field: str = "") -> Any:
    """A strategic merge: objects by field (null removes), lists of `MERGE_KEYS` by their key, all else replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        both = old | {name: merged(old[name], value, name) if name in old else value for name, value in new.items()}
        return {name: value for name, value in both.items() if value is not None}
    if isinstance(old, list) and field in MERGE_KEYS:
        key = MERGE_KEYS[field]
        patches = {item[key]: item for item in new}
        kept = [merged(item, patches.pop(item[key])) if item[key] in patches else item for item in old]
        return kept + list(patches.values())
    return new


def rendered(folder: Path) -> list[Resource]:
    """The resources of a kustomization."""
    asked = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "namespace", "resources", "patches", "images"}
    assert asked.keys() <= known, "this test would ignore a field of the kustomization"
    found: list[Resource] = []
    for name in asked["resources"]:
        path = (folder / name).resolve()
        found += rendered(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for patch in asked.get("patches", []):
        assert patch.keys() == {"path"}
        for part in yaml.safe_load_all((folder / patch["path"]).read_text()):
            (index,) = (i for i, each in enumerate(found) if identity(each) == identity(part))
            found[index] = merged(found[index], part)
    images = {each["name"]: f"{each['newName']}:{each['newTag']}" for each in asked.get("images", [])}
    for resource in found:
        for pod in pods_of(resource):
            for container in containers_of(pod["spec"]):
                container["image"] = images.get(container["image"], container["image"])
        if resource["kind"] != "Namespace":
            resource["metadata"]["namespace"] = asked["namespace"]
    return found


def identity(resource: Resource) -> tuple[str, str]:
    return resource["kind"], resource["metadata"]["name"]


def pods_of(resource: Resource) -> list[Resource]:
    """The templates of pods in a resource."""
    spec = resource.get("spec", {})
    if resource["kind"] == "RayCluster":
        return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    return [spec["template"]] if "template" in spec else []


def containers_of(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield from spec.get("initContainers", [])
    yield from spec["containers"]


@pytest.fixture(params=OVERLAYS)
def resources(request: pytest.FixtureRequest) -> list[Resource]:
    return rendered(FOLDER / request.param)


def all_pods(resources: list[Resource]) -> list[Resource]:
    return [pod for resource in resources for pod in pods_of(resource)]


def selected(resources: list[Resource], selector: Mapping[str, Any]) -> list[Resource]:
    """The templates of pods that a label selector selects."""

    def matches(labels: Mapping[str, str]) -> bool:
        equal = all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())
        expressions = selector.get("matchExpressions", [])
        assert all(each["operator"] == "In" for each in expressions)
        return equal and all(labels.get(each["key"]) in each["values"] for each in expressions)

    return [pod for pod in all_pods(resources) if matches(pod["metadata"]["labels"])]


def ports_of(pod: Resource) -> dict[str, int]:
    return {
        port["name"]: port["containerPort"] for each in containers_of(pod["spec"]) for port in each.get("ports", [])
    }


def test_every_resource_is_valid(resources: list[Resource]) -> None:
    assert len(resources) > 10
    for version in VERSIONS:
        for resource in resources:
            parts = [resource]
            if resource["kind"] == "RayCluster":
                parts = [{"apiVersion": "v1", "kind": "Pod", **pod} for pod in pods_of(resource)]
            for part in parts:
                kubernetes_validate.validate(part, version, strict=True)


def test_a_misspelt_field_is_found() -> None:
    (service,) = (each for each in rendered(FOLDER / "base") if identity(each) == ("Service", "temper-gateway"))
    service["spec"]["slector"] = service["spec"].pop("selector")
    with pytest.raises(kubernetes_validate.ValidationError, match="slector"):
        kubernetes_validate.validate(service, VERSIONS[-1], strict=True)


def test_no_two_resources_have_one_name(resources: list[Resource]) -> None:
    names = [identity(resource) for resource in resources]
    assert len(names) == len(set(names))


def test_selectors_select_pods_that_exist(resources: list[Resource]) -> None:
    names = {identity(resource) for resource in resources}
    for resource in resources:
        spec = resource.get("spec", {})
        match resource["kind"]:
            case "Deployment" | "StatefulSet":
                assert selected(resources, spec["selector"]) == [spec["template"]], identity(resource)
                if resource["kind"] == "StatefulSet":
                    assert ("Service", spec["serviceName"]) in names
            case "Service":
                assert selected(resources, {"matchLabels": spec["selector"]}), identity(resource)
            case "PodDisruptionBudget":
                assert selected(resources, spec["selector"]), identity(resource)
            case "HorizontalPodAutoscaler":
                assert (spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"]) in names
            case "NetworkPolicy":
                for selector in [spec["podSelector"], *peers(spec)]:
                    assert selector == {} or selected(resources, selector), identity(resource)
    guarded = [pod for each in resources if each["kind"] == "NetworkPolicy" for pod in pods_behind(resources, each)]
    assert all(pod in guarded for pod in all_pods(resources))


def peers(policy: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rules = [*policy.get("ingress", []), *policy.get("egress", [])]
    return [peer["podSelector"] for rule in rules for peer in [*rule.get("from", []), *rule.get("to", [])]]


def pods_behind(resources: list[Resource], policy: Resource) -> list[Resource]:
    """The pods of a network policy that names some."""
    selector = policy["spec"]["podSelector"]
    return selected(resources, selector) if selector else []


def test_ports_that_are_named_exist(resources: list[Resource]) -> None:
    for resource in resources:
        spec = resource.get("spec", {})
        if resource["kind"] == "Service":
            for pod in selected(resources, {"matchLabels": spec["selector"]}):
                assert {port["targetPort"] for port in spec["ports"]} <= ports_of(pod).keys()
        if resource["kind"] == "NetworkPolicy":
            for direction, side in (("ingress", "from"), ("egress", "to")):
                for rule in spec.get(direction, []):
                    named = {port["port"] for port in rule.get("ports", []) if isinstance(port["port"], str)}
                    to = pods_behind(resources, resource)
                    if direction == "egress":
                        to = [pod for peer in rule.get(side, []) for pod in selected(resources, peer["podSelector"])]
                    assert named <= {name for pod in to for name in ports_of(pod)}, identity(resource)
    for pod in all_pods(resources):
        ports = ports_of(pod)
        for container in pod["spec"]["containers"]:
            probes = [
                container[name] for name in ("startupProbe", "livenessProbe", "readinessProbe") if name in container
            ]
            assert probes or "--engine=ray" in container["command"], container["name"]
            for probe in probes:
                if "httpGet" in probe:
                    assert probe["httpGet"]["port"] in ports
                    assert probe["httpGet"]["path"] in ("/healthz", "/readyz")
                elif "grpc" in probe:
                    assert probe["grpc"]["port"] in ports.values()
                else:
                    command = probe["exec"]["command"]
                    assert command == ["python", "-m", "deploy.healthcheck", "trainer"] or command[:2] == [
                        "ray",
                        "health-check",
                    ]


def test_settings_are_real_and_valid(resources: list[Resource], monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = (each for each in resources if identity(each) == ("ConfigMap", "temper-settings"))
    assert found["data"].keys() <= {f"TEMPER_{name.upper()}" for name in Settings.model_fields}
    assert unknown_variables(found["data"]) == {}
    for name, value in found["data"].items():
        monkeypatch.setenv(name, value)
    settings = from_environment()
    (servers,) = (each for each in resources if identity(each) == ("StatefulSet", "temper-model-server"))
    service, port = servers["spec"]["serviceName"], ports_of(servers["spec"]["template"])["grpc"]
    names = tuple(f"temper-model-server-{i}.{service}:{port}" for i in range(servers["spec"]["replicas"]))
    assert settings.server_addresses == names


def test_what_pods_refer_to_exists(resources: list[Resource]) -> None:
    names = {identity(resource) for resource in resources}
    for pod in all_pods(resources):
        spec, kinds = pod["spec"], []
        for volume in spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                kinds.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
            elif "configMap" in volume:
                kinds.append(("ConfigMap", volume["configMap"]["name"]))
            else:
                assert "emptyDir" in volume
        kinds.append(("ServiceAccount", spec["serviceAccountName"]))
        for container in containers_of(spec):
            kinds += [("ConfigMap", each["configMapRef"]["name"]) for each in container.get("envFrom", [])]
            for variable in container.get("env", []):
                assert variable["valueFrom"]["secretKeyRef"] == {"name": "temper-store", "key": "password"}
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted <= {volume["name"] for volume in spec["volumes"]}
        assert set(kinds) <= names
    assert not [resource for resource in resources if resource["kind"] == "Secret"], "secrets are not in the repository"


def test_pods_have_no_rights_that_they_do_not_need(resources: list[Resource]) -> None:
    for pod in all_pods(resources):
        spec = pod["spec"]
        assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
        context = spec["securityContext"]
        assert (context["runAsNonRoot"], context["runAsUser"], context["fsGroup"]) == (True, 10001, 10001)
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers_of(spec):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"/tmp", "/var/lib/temper"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
            assert "memory" in container["resources"]["limits"]


def test_images_are_ours_or_have_a_version(resources: list[Resource]) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    for pod in all_pods(resources):
        for container in containers_of(pod["spec"]):
            repository, _, tag = container["image"].rpartition(":")
            name = repository.rpartition("/")[2]
            assert OURS.get(name) in targets or re.fullmatch(r"\d+\.\d+\.\d+", tag), container["image"]


def test_tensorflow_serving_is_started_as_temper_serve_starts_it(tmp_path: Path) -> None:
    (server,) = (each for each in rendered(FOLDER / "tensorflow-serving") if each["kind"] == "StatefulSet")
    command = server["spec"]["template"]["spec"]["containers"][0]["command"]
    config = "/etc/tensorflow-serving/models.config"
    ours = tensorflow_serving_command("tensorflow_model_server", 8500, 8501, tmp_path / "models.config")
    ours = [part.replace(str(tmp_path / "models.config"), config) for part in ours]
    assert sorted(command) == sorted(part for part in ours if part != "--grpc_socket_path=")
    (models,) = (
        each for each in rendered(FOLDER / "tensorflow-serving") if identity(each) == ("ConfigMap", "temper-models")
    )
    assert models["data"]["models.config"] == (tmp_path / "models.config").read_text()


def test_ray_has_the_version_of_the_lock_file() -> None:
    (cluster,) = (each for each in rendered(FOLDER / "ray") if each["kind"] == "RayCluster")
    assert f"\nray=={cluster['spec']['rayVersion']} " in (ROOT / "requirements" / "trainer.txt").read_text()


def test_commands_exist(resources: list[Resource]) -> None:
    commands = cli.main.main.commands
    for pod in all_pods(resources):
        for container in containers_of(pod["spec"]):
            if container.get("command", [])[:3] == ["python", "-m", "cli"]:
                name, *arguments = container["command"][3:]
                assert name in commands
                if name == "worker":
                    options = {option for each in trainer.worker.loop.main.params for option in each.opts}
                    assert {part.partition("=")[0] for part in arguments} <= options
                else:
                    assert arguments[0] in getattr(commands[name], "commands", {})
