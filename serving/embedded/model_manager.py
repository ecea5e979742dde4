"""Which versions of which models are served, from the configuration and the directories on disk.

Loading follows what is asked for. Versions wait in a queue: the first one of every model, then the second ones, and so
on, in the order of the configuration. A call for a version that still waits puts it at the head of the queue and waits
for it. Until a version is loaded its state is START or LOADING, never AVAILABLE.
"""

import heapq
import itertools
import os
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
LOAD_WAIT_S = 5.0  # longest that a call waits for its version to be loaded; less than the gateway waits for the call
MAX_WAITING = 4  # calls that wait for loading at a time, half of the server's threads: others are for loaded versions
ASKED_FOR = -1  # rank in the queue of a version for which a call waits
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
    """A model that is or was configured. It changes under the lock of `Models`; calls read it without one."""

    name: str
    config: Any = None  # None: removed
    waited_for: bool = False  # a reload has waited for it since it was added
    wanted: Mapping[int, str] = field(default_factory=dict)  # directories by version
    loads: "Mapping[int, _Load]" = field(default_factory=dict)  # not over yet; replaced, never mutated
    loaded: Mapping[int, Servable] = field(default_factory=dict)  # likewise
    states: Mapping[int, State] = field(default_factory=dict)  # likewise

    def set(self, version: int, state: State) -> None:
        self.states = {**self.states, version: state}


@dataclass(eq=False)
class _Load:
    """A version that waits to be loaded, or is being loaded."""

    model: _Model
    version: int
    directory: str
    begun: bool = False
    over: threading.Event = field(default_factory=threading.Event)  # it was loaded, it failed, or it is not wanted


class Models:
    """The models of a server. One thread looks for new versions, others load them."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}
        self._labels: Mapping[str, Mapping[str, int]] = {}
        self._changed = threading.Condition()  # its lock guards every change of a model, and the queue
        self._one_scan = threading.Lock()  # what was read first is also applied first
        self._queue: list[tuple[int, int, _Load]] = []  # a heap by rank, then by arrival; may hold a load twice
        self._arrivals = itertools.count()
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)
        for loader in range(LOADERS):
            threading.Thread(target=self._load_forever, name=f"loader-{loader}", daemon=True).start()
        threading.Thread(target=self._poll_forever, name="poll", daemon=True).start()

    def find(self, spec: Any) -> tuple[int, Servable]:
        """The version that a ModelSpec asks for. One that is not loaded yet is loaded next; the call waits for it.

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
        if model and (version not in model.loaded if version is not None else not model.loaded):
            self._hurry(model, version)
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
        with self._changed:
            for name in dict.fromkeys((*configs, *models)):
                model = models.setdefault(name, _Model(name))
                model.config = configs.get(name)
                model.waited_for &= model.config is not None
        self._models = models
        for model in models.values():
            self._scan(model)
        failed = []
        for model in (models[name] for name in configs):
            if not model.waited_for:
                with self._changed:
                    while model.loads and not model.loaded:
                        self._changed.wait()
                failed += _failures(model)
        if failed:
            text = f"{len(failed)} model(s) did not become available: {{{''.join(failed)}}}"
            raise Refused(grpc.StatusCode.UNKNOWN, text)

    def _poll_forever(self) -> None:
        while True:
            time.sleep(POLL_S)
            for model in self._models.values():
                self._scan(model)

    def _scan(self, model: _Model) -> None:
        """Queue the wanted versions that are missing, and unload those no longer wanted."""
        with self._one_scan:
            wanted = _wanted(model.config)
            if wanted is None:
                return
            with self._changed:
                model.wanted = wanted
                missing = [
                    version for version in wanted
                    if version not in model.loaded and version not in model.loads
                    and not model.states.get(version, State(START)).code
                ]  # fmt: skip
                for rank, version in enumerate(missing):
                    model.set(version, State(START))
                    load = _Load(model, version, wanted[version])
                    model.loads = {**model.loads, version: load}
                    heapq.heappush(self._queue, (rank, next(self._arrivals), load))
                for version, load in model.loads.items():
                    if version not in wanted and not load.begun:
                        load.begun = True  # by nobody
                        self._end(load, State(END))
                _unload(model)
                self._changed.notify_all()

    def _hurry(self, model: _Model, version: int | None) -> None:
        """Have a version loaded next, and wait until that is over. None: the newest version."""
        loads = model.loads
        load = loads.get(max(loads, default=-1) if version is None else version)
        if load is None or not self._waiting.acquire(blocking=False):
            return
        try:
            with self._changed:
                heapq.heappush(self._queue, (ASKED_FOR, next(self._arrivals), load))
                self._changed.notify_all()
            load.over.wait(LOAD_WAIT_S)
        finally:
            self._waiting.release()

    def _load_forever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                _, _, load = heapq.heappop(self._queue)
                if load.begun:
                    continue
                load.begun = True
                load.model.set(load.version, State(LOADING))
            state, servable = _loaded(load)
            with self._changed:
                if servable is not None:
                    load.model.loaded = {**load.model.loaded, load.version: servable}
                self._end(load, state)
                _unload(load.model)
                self._changed.notify_all()

    @staticmethod
    def _end(load: _Load, state: State) -> None:
        model = load.model
        model.set(load.version, state)
        model.loads = {version: other for version, other in model.loads.items() if other is not load}
        load.over.set()


def _unload(model: _Model) -> None:
    """Unload what is no longer wanted, unless what is wanted is still missing."""
    if model.loaded.keys() & model.wanted or not model.wanted:
        for version in model.loaded.keys() - model.wanted:
            model.loaded = {number: servable for number, servable in model.loaded.items() if number != version}
            model.set(version, State(END))


def _loaded(load: _Load) -> tuple[State, Servable | None]:
    """How loading a version ended, and what it gave."""
    try:
        return State(AVAILABLE), _load(load.model.name, load.version, load.directory)
    except Refused as exc:
        return State(END, exc.code.value[0], exc.message), None
    except tf.errors.OpError as exc:
        return State(END, exc.error_code, exc.message), None
    except Exception as exc:  # a bad directory must end its version, never this thread
        return State(END, tf.errors.UNKNOWN, str(exc) or type(exc).__name__), None


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
    """Directories of the versions that the policy selects, in the order in which they should be loaded.

    That is the policy's order where it lists them, and otherwise newest first. None if the base path is unreadable.
    """
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
            numbers = sorted(there, reverse=True)
        case "specific":
            numbers = [number for number in policy.specific.versions if number in there]
        case _:
            numbers = sorted(there, reverse=True)[: policy.latest.num_versions or 1]
    return {number: there[number] for number in numbers}


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
