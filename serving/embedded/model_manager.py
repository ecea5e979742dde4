"""Which versions of which models are served, from the configuration and the directories on disk."""

import os
import queue
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import tensorflow as tf
from tensorflow_serving.apis import get_model_status_pb2

from serving.embedded.servable import Refused, Servable, invalid

POLL_S = 0.5
LOADERS = 2  # threads; TensorFlow compiles graphs outside the interpreter lock
PLATFORM = "tensorflow"
START, LOADING, AVAILABLE, END = (
    get_model_status_pb2.ModelVersionStatus.State.Value(name) for name in ("START", "LOADING", "AVAILABLE", "END")
)


@dataclass(frozen=True)
class State:
    """The state of a version, with TensorFlow's error code and message if it failed."""

    state: int
    code: int = 0
    message: str = ""


@dataclass
class _Model:
    """A model that is or was configured. Only its loader thread writes `loaded` and `states`."""

    name: str
    loader: int  # which of the LOADERS
    config: Any = None  # None: removed
    waited_for: bool = False  # a reload has waited for it since it was added
    loaded: Mapping[int, Servable] = field(default_factory=dict)  # replaced, never mutated: readers take no lock
    states: Mapping[int, State] = field(default_factory=dict)  # likewise

    def set(self, version: int, state: State) -> None:
        self.states = {**self.states, version: state}


class Models:
    """The models of a server. Each belongs to a thread that loads, unloads and polls for new versions."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}
        self._labels: Mapping[str, Mapping[str, int]] = {}
        self._work: list[queue.SimpleQueue[tuple[_Model, threading.Event]]] = []
        for loader in range(LOADERS):
            self._work.append(queue.SimpleQueue())
            threading.Thread(target=self._align_forever, args=(loader,), name=f"loader-{loader}", daemon=True).start()

    def find(self, spec: Any) -> tuple[int, Servable]:
        """The version that a ModelSpec asks for.

        Raises:
            Refused: INVALID_ARGUMENT for a missing name or an unknown label, NOT_FOUND for a version not loaded.
        """
        if not spec.name:
            raise invalid("ModelSpec has no name specified.")
        choice = spec.WhichOneof("version_choice")
        version: int | None = spec.version.value if choice == "version" else None
        if choice == "version_label":
            version = self._labels.get(spec.name, {}).get(spec.version_label)
            if version is None:
                raise invalid(f"Unrecognized servable version label: {spec.version_label}")
        model = self._models.get(spec.name)
        loaded = model.loaded if model else {}
        found = max(loaded, default=None) if version is None else version
        servable = loaded.get(found) if found is not None else None
        if servable is None or found is None:
            which = f"Latest({spec.name})" if version is None else f"Specific({spec.name}, {version})"
            raise Refused(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {which}")
        return found, servable

    def states(self, name: str, version: int | None) -> list[tuple[int, State]]:
        """One version, or all that were ever seen, newest first.

        Raises:
            Refused: NOT_FOUND.
        """
        model = self._models.get(name)
        known = model.states if model else {}
        if version is not None and version not in known:
            raise Refused(grpc.StatusCode.NOT_FOUND, f"Could not find version {version} of model {name}")
        if not known:
            raise Refused(grpc.StatusCode.NOT_FOUND, f"Could not find any versions of model {name}")
        return sorted(known.items(), reverse=True) if version is None else [(version, known[version])]

    def reload(self, configs: Mapping[str, Any]) -> None:
        """Replace the configuration and wait until every new model serves. One call at a time.

        Raises:
            Refused: with UNKNOWN the configuration is in force but new models do not serve; with any other code
                nothing has changed.
        """
        for name, config in configs.items():
            known = self._models.get(name)
            if known and known.config and _platform(known.config) != _platform(config):
                raise invalid(
                    f"Illegal to change a model's platform. For model {name} platform was {_platform(known.config)} "
                    f"and new platform requested is {_platform(config)}"
                )
        for name, config in configs.items():
            if _platform(config) != PLATFORM:
                raise invalid(f"Model {name} requests unsupported platform {_platform(config)}")
            for version in config.version_labels.values():
                if name not in self._models or version not in self._models[name].loaded:
                    raise Refused(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        f"Request to assign label to version {version} of model {name}, "
                        "which is not currently available for inference",
                    )
        self._labels = {name: dict(config.version_labels) for name, config in configs.items()}
        models = dict(self._models)
        for name in dict.fromkeys((*configs, *models)):
            model = models.setdefault(name, _Model(name, len(models) % LOADERS))
            model.config = configs.get(name)
            model.waited_for &= model.config is not None
        self._models = models
        waits = {name: self._align_soon(model) for name, model in models.items()}
        failed = []
        for name in configs:
            if not models[name].waited_for:
                waits[name].wait()
                failed += _failures(models[name])
        if failed:
            text = f"{len(failed)} model(s) did not become available: {{{''.join(failed)}}}"
            raise Refused(grpc.StatusCode.UNKNOWN, text)

    def _align_soon(self, model: _Model) -> threading.Event:
        done = threading.Event()
        self._work[model.loader].put((model, done))
        return done

    def _align_forever(self, loader: int) -> None:
        poll_at = time.monotonic() + POLL_S
        while True:
            try:
                model, done = self._work[loader].get(timeout=max(0.0, poll_at - time.monotonic()))
            except queue.Empty:
                for model in self._models.values():
                    if model.loader == loader:
                        _align(model)
                poll_at = time.monotonic() + POLL_S
            else:
                _align(model)
                done.set()


def _align(model: _Model) -> None:
    """Load the wanted versions that are missing, newest first, then unload those no longer wanted."""
    wanted = _wanted(model.config)
    if wanted is None:
        return
    missing = [
        version for version in wanted
        if version not in model.loaded and not model.states.get(version, State(START)).code
    ]  # fmt: skip
    for version in missing:
        model.set(version, State(START))
    for version in missing:
        model.set(version, State(LOADING))
        state = State(AVAILABLE)
        try:
            servable = _load(model.name, version, wanted[version])
        except Refused as exc:
            state = State(END, exc.code.value[0], exc.message)
        except tf.errors.OpError as exc:
            state = State(END, exc.error_code, exc.message)
        except Exception as exc:  # a bad directory must end its version, never this thread
            state = State(END, tf.errors.UNKNOWN, str(exc) or type(exc).__name__)
        else:
            model.loaded = {**model.loaded, version: servable}
        model.set(version, state)
    if model.loaded.keys() & wanted or not wanted:  # otherwise keep serving: there is no replacement
        for version in model.loaded.keys() - wanted:
            model.loaded = {number: servable for number, servable in model.loaded.items() if number != version}
            model.set(version, State(END))


def _load(name: str, version: int, directory: str) -> Servable:
    if not os.path.isdir(directory):
        raise Refused(
            grpc.StatusCode.FAILED_PRECONDITION,
            "Error while attempting to reserve resources to load servable "
            f"{{name: {name} version: {version}}}: {directory}; Not a directory",
        )
    return Servable(directory)


def _failures(model: _Model) -> list[str]:
    """The reasons, by version, why a new model does not serve. None if it does.

    Marks it as waited for once it serves or a version has failed.
    """
    failed = {version: state for version, state in model.states.items() if state.code}
    model.waited_for = bool(model.loaded or failed)
    if model.loaded:
        return []
    if not failed:
        where = f"No versions of servable {model.name} found under base path {model.config.base_path}"
        failed = {0: State(END, tf.errors.NOT_FOUND, where)}
    names = {code.value[0]: code.name for code in grpc.StatusCode}
    return [
        f"{{{{name: {model.name} version: {version}}} due to error: {names[state.code]}: {state.message}}}, "
        for version, state in failed.items()
    ]


def _wanted(config: Any) -> dict[int, str] | None:
    """Directories of the versions that the policy selects, newest first; None if the base path is unreadable."""
    if config is None:
        return {}
    there = {}
    try:
        with os.scandir(config.base_path) as entries:
            for entry in entries:
                # Accept what absl::SimpleAtoi accepts.
                if re.fullmatch(r"\s*\+?[0-9]+\s*", entry.name, re.ASCII) and (number := int(entry.name)) < 1 << 63:
                    there[number] = entry.path
    except OSError:
        return None
    policy = config.model_version_policy
    match policy.WhichOneof("policy_choice"):
        case "all":
            numbers = set(there)
        case "specific":
            numbers = set(policy.specific.versions) & set(there)
        case _:
            numbers = set(sorted(there)[-(policy.latest.num_versions or 1) :])
    return {number: there[number] for number in sorted(numbers, reverse=True)}


def checked(request: Any) -> dict[str, Any]:
    """The configurations of a reload request, by model name.

    Raises:
        Refused: INVALID_ARGUMENT, because the request contradicts itself.
    """
    if request.config.WhichOneof("config") != "model_config_list":
        raise invalid(
            "ServerModelConfig type not supported by HandleReloadConfigRequest. "
            "Only ModelConfigList is currently supported"
        )
    configs: dict[str, Any] = {}
    for config in request.config.model_config_list.config:
        if config.name in configs:
            raise invalid(f"Illegal to list model {config.name} multiple times in config list")
        if not config.base_path.startswith("/") and "://" not in config.base_path:
            raise invalid(
                f"Expected model {config.name} to have an absolute path or URI; got base_path()={config.base_path}"
            )
        both, text = bool(config.model_type and config.model_platform), "ModelServerConfig::model_platform"
        if both or not _platform(config):
            raise invalid(
                f"Illegal setting {'both' if both else 'neither'} ModelServerConfig::model_type (deprecated) "
                f"{'and' if both else 'nor'} {text}, model name is {config.name}"
            )
        configs[config.name] = config
    return configs


def _platform(config: Any) -> str:
    platform: str = config.model_platform
    return platform or {0: "", 1: PLATFORM}.get(config.model_type, "other")
