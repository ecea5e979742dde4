"""What a load test does and what it demands: options of the command, or `TEMPER_LOAD_*` variables."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, FilePath, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

FORMS = ("json", "png", "bytes")
KINDS = ("clean", "noisy", "adversarial")


class LoadSettings(BaseSettings):
    """Every option of the load kit. Durations are seconds, bounds of latencies milliseconds."""

    model_config = SettingsConfigDict(env_prefix="TEMPER_LOAD_", frozen=True, protected_namespaces=(), extra="ignore")

    url: str = Field("", description="URL of the service; without one, a service of its own is started.")
    api_key: SecretStr = Field(
        SecretStr(""),
        validation_alias="TEMPER_API_KEY",
        description="API key. /metrics is read if it has the scope `admin`.",
    )
    ca: FilePath | None = Field(None, description="Certificates, PEM, that sign that of an https service.")
    model_server: str = Field("", description="`host:port` or `unix:/path` of the model server for GrpcPredictor.")

    models: str = Field("lenet5", description="Models that are asked, with commas; each gets the same share.")
    rate: float = Field(50.0, gt=0, le=100_000, description="Arrivals a second of all workers together.")
    grpc_rate: float = Field(5.0, ge=0, le=100_000, description="Arrivals a second straight at --model-server.")
    duration_s: float = Field(30.0, gt=0, le=7 * 86400, description="Duration of the scenario, or of one rate of it.")
    forms: str = Field("json=2,png=1,bytes=1", description="Bodies of the requests, by weight.")
    kinds: str = Field("clean=8,noisy=1,adversarial=1", description="Images of the requests, by weight.")
    images: FilePath | None = Field(
        None, description="An .npz with `images` (n, 28, 28) uint8 and `labels` (n,); scikit-learn's digits otherwise."
    )
    noise: float = Field(0.2, ge=0, le=1, description="Standard deviation of the noise, where a pixel has 0 to 1.")
    epsilon: float = Field(0.1, ge=0, le=1, description="Greatest change of a pixel in adversarial images.")
    finetuners: int = Field(1, ge=0, le=100, description="Users that fine-tune, one job at a time.")
    operators: int = Field(1, ge=0, le=100, description="Users that list, move labels, roll back and read metrics.")
    workers: int = Field(0, ge=0, le=64, description="Processes that send; 0: this one does.")
    rate_per_user: float = Field(10.0, gt=0, description="Arrivals a second that each Predictor of Locust stands for.")
    cap: int = Field(1000, ge=1, le=50_000, description="Most open requests of a process; further ones are dropped.")
    timeout_s: float = Field(10.0, gt=0, le=600, description="Time after which a request has failed.")
    seed: int = Field(0, ge=0, description="Seed of arrivals, of noise and of the order of images.")

    p90_ms: float = Field(100.0, gt=0, description="Bound of SingleStream's 90th percentile.")
    p95_ms: float = Field(250.0, gt=0, description="Objective: 95th percentile of the latency of predictions.")
    p99_ms: float = Field(500.0, gt=0, description="Objective: 99th percentile; also Server's and MultiStream's bound.")
    error_share: float = Field(0.001, ge=0, le=1, description="Objective: share of failed or dropped requests.")
    requests: int = Field(500, ge=0, description="Objective: least number of answered predictions.")
    accuracy: float | None = Field(None, ge=0, le=1, description="Objective: accuracy on clean images.")
    noisy_accuracy: float | None = Field(None, ge=0, le=1, description="Objective: accuracy on noisy images.")
    adversarial_accuracy: float | None = Field(None, ge=0, le=1, description="Objective: on adversarial images.")
    skew_s: float = Field(2.0, ge=0, description="Objective: time within which all answers follow a moved label.")
    version: int | None = Field(None, ge=1, description="Version that every answer must come from; any live one else.")

    lag_share: float = Field(
        0.2,
        gt=0,
        description="Share of --p99-ms; the run is invalid if more than 1% of requests start later than that.",
    )
    cpu_share: float = Field(0.9, gt=0, description="Share of a core, over 5 s, above which the run is invalid.")
    max_rate: float = Field(2000.0, gt=0, description="Highest rate that `server` and `find-max` try.")
    spike_factor: float = Field(5.0, gt=1, le=100, description="How much the rate grows in the `spike`.")
    prepared: FilePath | None = Field(None, description="Images that the process which starts workers has made.")
    out: Path = Field(Path("var/load"), description="Folder of summary.json, seconds.csv and report.html.")

    @field_validator("forms")
    @classmethod
    def _known_forms(cls, value: str) -> str:
        weights(value, FORMS)
        return value

    @field_validator("kinds")
    @classmethod
    def _known_kinds(cls, value: str) -> str:
        weights(value, KINDS)
        return value

    @field_validator("models")
    @classmethod
    def _some_model(cls, value: str) -> str:
        if not all(name.strip() for name in value.split(",")):
            raise ValueError(f"{value!r} has an empty name")
        return value

    @field_validator("url")
    @classmethod
    def _http(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError(f"{value!r} does not begin with http:// or https://")
        return value.rstrip("/")

    @property
    def model_names(self) -> list[str]:
        """The models that are asked."""
        return [name.strip() for name in self.models.split(",")]


def weights(text: str, names: tuple[str, ...]) -> dict[str, float]:
    """Read `a=2,b=1`: weights by name; names that are left out have none.

    Raises:
        ValueError: a name is unknown, a weight is no number from 0 on, or all are 0.
    """
    found = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        if name not in names:
            raise ValueError(f"{name!r} is none of {', '.join(names)}")
        try:
            found[name] = float(weight or 1)
        except ValueError:
            raise ValueError(f"{weight!r}, the weight of {name}, is not a number") from None
        if not 0 <= found[name] < float("inf"):
            raise ValueError(f"{weight}, the weight of {name}, is not a number from 0 on")
    if not sum(found.values()):
        raise ValueError("all weights are 0")
    return found


def read_settings(given: Mapping[str, Any] | None = None) -> LoadSettings:
    """The settings from the environment, with `given` ones in their place.

    Raises:
        ValueError: in one line, every option with a wrong value and what is wrong with it.
    """
    given = {_read_as(name): value for name, value in (given or {}).items()}
    try:
        return LoadSettings(**given)
    except ValidationError as exc:
        found = ((_option(str(e["loc"][0])), e["input"], e["msg"].removeprefix("Value error, ")) for e in exc.errors())
        raise ValueError("; ".join(f"{name} {value}: {why}" for name, value, why in found)) from exc


def make_folder(out: Path) -> None:
    """Make the folder of the results before the load, so that they are not lost.

    Raises:
        ValueError: no file can be written there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as exc:
        raise ValueError(f"--out {out}: {exc.strerror or exc}") from exc


def variables(settings: LoadSettings) -> dict[str, str]:
    """The environment in which another process reads the same settings."""
    found = {}
    for name in LoadSettings.model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        if value is not None:
            variable = _read_as(name)
            found[f"TEMPER_LOAD_{name.upper()}" if variable == name else variable] = str(value)
    return found


def _read_as(name: str) -> str:
    return str(LoadSettings.model_fields[name].validation_alias or name)


def _option(name: str) -> str:
    return "--" + name.removeprefix("TEMPER_").lower().replace("_", "-")
