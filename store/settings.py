"""Settings of all three processes, read from `TEMPER_*` variables when a process starts."""

import difflib
import ipaddress
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, FilePath, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from store import traces
from store.files import make_directory

log = logging.getLogger("temper.settings")

ATTACK_IMAGES = 500
MAX_MODEL_SERVERS = 4
AUTO, EMBEDDED = "auto", "embedded"
LOCAL_TARGET = "127.0.0.1:8500"  # where `python -m serving` listens, and a gateway or worker looks without a setting
LOCAL_REST = "127.0.0.1:8501"  # likewise, for TensorFlow Serving's REST API
OTHERS = {"URL", "API_KEY", "MNIST", "DOMAINS", "TFS_BINARY"}  # read by the command, the studies and the tests


@dataclass(frozen=True)
class ClientTLS:
    """Whom a client of model servers trusts, and what it presents to a server that demands a certificate."""

    ca: Path
    cert: Path | None = None
    key: Path | None = None


STORE_EXAMPLE = "postgresql+psycopg://user@host:5432/name"


class Settings(BaseSettings):
    """Everything an operator can set; see docs/reference/settings.md."""

    model_config = SettingsConfigDict(env_prefix="TEMPER_", frozen=True, protected_namespaces=())

    home: Path = Field(Path("var"), description="Directory of everything that is kept.")
    host: str = Field("127.0.0.1", description="Address on which the gateway listens.")
    port: int = Field(8080, ge=0, le=65535, description="Port on which the gateway listens; 0 takes a free one.")
    keys: Literal["auto", "required", "off"] = Field(
        "auto",
        description="Whether requests need an API key: `auto` if the gateway listens on anything but a loopback "
        "address, or once a key has been created; `off` lets everybody in.",
    )
    allowed_hosts: str = Field(
        "",
        description="Names, with commas, under which clients may address the gateway; without any, loopback names and "
        "addresses if it listens on one of these, and else all.",
    )
    tls_cert: FilePath | None = Field(None, description="Certificate (chain) of the gateway, PEM, for HTTPS.")
    tls_key: FilePath | None = Field(None, validate_default=True, description="Private key of that certificate, PEM.")
    max_rate: float = Field(
        0.0, ge=0, description="Most predict requests a second with one API key that has no rate of its own; 0: any."
    )
    max_jobs: int = Field(0, ge=0, description="Most unfinished fine-tunes of one tenant; 0 for any number.")
    model_server: str = Field(
        AUTO,
        description="`embedded`, the path of a tensorflow_model_server that `temper serve` starts, `host:port` or "
        "`unix:/path` of one that runs (or several, with commas), or `auto`: the binary on the PATH, or else the "
        "embedded server.",
    )
    model_servers: int | None = Field(
        None,
        ge=1,
        le=MAX_MODEL_SERVERS,
        description="Model servers that `temper serve` starts; one answers, the others stand by. By default 2 where "
        "4 GiB of memory are available, else 1.",
    )
    model_server_ca: FilePath | None = Field(
        None,
        description="Certificates, PEM, that sign those of model servers at a `host:port`, which then use TLS.",
    )
    model_server_cert: FilePath | None = Field(
        None, description="Certificate (chain), PEM, for model servers that demand one of their clients."
    )
    model_server_key: FilePath | None = Field(
        None, validate_default=True, description="Private key of that certificate, PEM."
    )
    log: Literal["text", "json"] = Field(
        "text", description="Form of log lines; `json` writes one object a line, tracebacks within."
    )
    traces: str = Field(
        "",
        description="Base URL of an OTLP collector (HTTP) that gets traces, such as `http://localhost:4318`; empty: "
        "none.",
    )
    model_root: Path | None = Field(None, description="The models' directory as the model server sees it.")
    store: str | None = Field(None, description="SQLAlchemy URL; SQLite in the home by default.")
    objects: str | None = Field(
        None,
        description="`s3://bucket/prefix` for models and data sets, where machines share no home directory.",
    )
    keep_versions: int = Field(
        20, ge=0, description="Newest versions that are kept of a model, besides the labelled ones; 0 keeps all."
    )
    feedback: int = Field(
        1000, ge=0, le=10_000,
        description="Most corrections of a model that are kept to learn from; 0: no more of them, and no images of "
        "predictions.",
    )  # fmt: skip
    attack_images: int = Field(
        ATTACK_IMAGES,
        ge=1,
        description="Most validation images that a report's attacks run on; fewer take less of the worker.",
    )
    workers: int = Field(1, ge=0, le=64, description="Workers that `temper serve` starts here.")
    gpu_memory_mb: int = Field(
        0, ge=0, description="MiB that a worker may take of each GPU; 0: what it needs, of a GPU of its own."
    )
    max_upload_bytes: int = Field(256 << 20, ge=1, description="Largest body of an upload.")
    max_predict_bytes: int = Field(8 << 20, ge=1, description="Largest body of POST /predict.")
    max_instances: int = Field(1024, ge=1, description="Most images of one POST /predict.")
    max_pixels: int = Field(50_000_000, ge=784, description="Most pixels of one image, uploaded or to predict on.")
    max_images: int = Field(200_000, ge=4, description="Most images of one upload.")
    decode_seconds: int = Field(120, ge=1, description="Longest time that decoding an upload may take.")
    decode_memory_bytes: int = Field(2 << 30, ge=1 << 28, description="Most memory that decoding an upload may take.")
    predict_timeout_s: float = Field(10.0, gt=0, description="Longest time that a prediction may take.")
    webhook_private: bool = Field(
        False, description="Whether webhooks may go to private, loopback and link-local addresses."
    )
    webhook_http: bool = Field(False, description="Whether webhooks may go to `http://` URLs, unencrypted.")

    @property
    def models(self) -> Path:
        """Published versions, `<model>/<version>/`, as this process sees them."""
        return self.home.resolve() / "models"

    @property
    def staging(self) -> Path:
        """Unfinished work, on the models' file system so that a rename finishes it."""
        return self.home.resolve() / "staging"

    @property
    def datasets(self) -> Path:
        """Prepared data sets, `<sha256>.npz`."""
        return self.home.resolve() / "datasets"

    @property
    def checkpoints(self) -> Path:
        """What unfinished jobs go on from after an interruption, `<job>/`."""
        return self.home.resolve() / "checkpoints"

    @property
    def kept(self) -> Path:
        """Epochs that finished jobs keep for clients to publish, `<job>/`."""
        return self.home.resolve() / "kept"

    def version(self, model: str, number: int) -> Path:
        """Directory of a published version."""
        return self.models / model / str(number)

    def pulse_file(self, pid: int | Literal["*"]) -> Path:
        """The file that a worker of this host touches every second; with `*`, a pattern for those of all.

        Containers may share a home, and in each of them the worker is process 1.
        """
        return self.home / f"worker-{os.uname().nodename}-{pid}.pulse"

    @property
    def served_root(self) -> Path:
        """The models' directory as the model server sees it."""
        return self.model_root or self.models

    @property
    def store_url(self) -> str:
        """SQLAlchemy URL of the store."""
        return self.store or f"sqlite:///{self.home.resolve() / 'temper.db'}"

    @property
    def is_local(self) -> bool:
        """Tell whether the gateway listens where only this machine can reach it."""
        return is_loopback(self.host)

    @property
    def scheme(self) -> str:
        """Of the gateway's URLs."""
        return "https" if self.tls_cert else "http"

    @field_validator("tls_key")
    @classmethod
    def _check_tls(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if (value is None) != (info.data.get("tls_cert") is None):
            raise ValueError("TEMPER_TLS_CERT and TEMPER_TLS_KEY need each other")
        return value

    @field_validator("model_server_key")
    @classmethod
    def _check_model_server_tls(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if (value is None) != (info.data.get("model_server_cert") is None):
            raise ValueError("TEMPER_MODEL_SERVER_CERT and TEMPER_MODEL_SERVER_KEY need each other")
        if value is not None and info.data.get("model_server_ca") is None:
            raise ValueError("a certificate for model servers needs TEMPER_MODEL_SERVER_CA, or nothing is encrypted")
        return value

    @field_validator("traces")
    @classmethod
    def _check_traces(cls, value: str) -> str:
        return traces.checked(value)

    @field_validator("model_server")
    @classmethod
    def _check_model_server(cls, value: str) -> str:
        if value in (AUTO, EMBEDDED) or _is_binary(value):
            return value
        for target in value.split(","):
            if not re.fullmatch(r"\s*((\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}|unix:/[^,]+)\s*", target):
                raise ValueError(f"{target!r} must be auto, embedded, a path, host:port or unix:/path")
        return value

    @field_validator("tls_cert", "tls_key", "model_server_ca", "model_server_cert", "model_server_key")
    @classmethod
    def _make_absolute(cls, value: Path | None) -> Path | None:
        return value and value.absolute()  # processes that are started with these settings work elsewhere

    @field_validator("store")
    @classmethod
    def _check_store(cls, value: str | None) -> str | None:
        if not value:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("sqlite", "postgresql", "postgresql+psycopg"):
            raise ValueError(f"must be a URL as in {STORE_EXAMPLE}, or sqlite:///path")
        try:
            _ = parts.port
        except ValueError:
            raise ValueError(f"its port is not a number; as in {STORE_EXAMPLE}") from None
        return value

    @field_validator("objects")
    @classmethod
    def _check_objects(cls, value: str | None) -> str | None:
        if value and not re.fullmatch(r"s3://[^/\s]+(/\S*)?", value):
            raise ValueError(f"{value!r} is not s3://bucket or s3://bucket/prefix")
        return value or None

    @property
    def supervised(self) -> bool:
        """Tell whether `temper serve` starts the model server."""
        return self.model_server in (AUTO, EMBEDDED) or _is_binary(self.model_server)

    @property
    def server_addresses(self) -> tuple[str, ...]:
        """Addresses of the model servers, all of which serve the same."""
        if self.supervised:
            return (LOCAL_TARGET,)
        return tuple(dict.fromkeys(target.strip() for target in self.model_server.split(",")))

    @property
    def model_server_tls(self) -> ClientTLS | None:
        """What clients of model servers at a `host:port` need for TLS; None if they use none."""
        if self.model_server_ca is None:
            return None
        return ClientTLS(self.model_server_ca, self.model_server_cert, self.model_server_key)

    @property
    def has_standby(self) -> bool:
        """Tell whether one of several model servers answers and the others stand by for it.

        That is so where all of them listen on Unix sockets: they share the processors of this machine, and dividing
        requests among them would only make smaller batches.
        """
        addresses = self.server_addresses
        return len(addresses) > 1 and all(address.startswith("unix:") for address in addresses)

    def make_home(self) -> None:
        """Create the directories that all processes share.

        Raises:
            OSError: the home cannot be written.
        """
        for directory in (self.models, self.staging, self.datasets, self.checkpoints, self.kept):
            make_directory(directory)


def from_environment() -> Settings:
    """The settings in the `TEMPER_*` variables.

    Raises:
        ValueError: in one line, every variable with a wrong value and what is wrong with it.
    """
    try:
        return Settings()
    except ValidationError as exc:
        found = ((str(error["loc"][0]).upper(), error["msg"].removeprefix("Value error, ")) for error in exc.errors())
        raise ValueError("; ".join(f"TEMPER_{name}: {why}" for name, why in found)) from exc


def is_loopback(host: str) -> bool:
    """Tell whether a name or an address, in brackets or not, is of this machine only."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_binary(model_server: str) -> bool:
    return "/" in model_server and "unix:" not in model_server


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Find `TEMPER_` variables that nothing reads, each with the nearest name that is read, or None."""
    known = {name.upper() for name in Settings.model_fields} | OTHERS
    found = {}
    for variable in sorted(environment):
        prefix, name = variable[:7].upper(), variable[7:].upper()
        if prefix == "TEMPER_" and name not in known and not name.startswith("LOAD_"):
            nearest = next(iter(difflib.get_close_matches(name, known, 1)), None)
            found[variable] = nearest and prefix + nearest
    return found


def warn_of_unknown_variables(environment: Mapping[str, str]) -> None:
    """Log a warning for every variable of `unknown_variables`."""
    for name, nearest in unknown_variables(environment).items():
        log.warning("%s is not a setting and is ignored%s", name, f"; did you mean {nearest}?" if nearest else "")
