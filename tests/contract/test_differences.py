"""The deliberate differences, checked on whichever server runs."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow.core.framework import tensor_pb2

from tests.contract.conftest import AVAILABLE, END, IMAGES, Server, config, put, refusal
from tests.contract.differences import DIFFERENCES

IMAGE = {"image": IMAGES}
FILE = Path(__file__).read_text()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return put(tmp_path / "model" / "1").parent


def test_every_difference_has_a_test() -> None:
    assert [name for name in DIFFERENCES if f'differs("{name}")' not in FILE] == []


# Our exported graph refuses these itself. Do not send others: they could abort the real server.
@pytest.mark.parametrize("shape", [(), (3, 784), (3, 28, 28), (3, 28, 28, 3), (1, 32, 32, 1), (1, 3, 28, 28, 1)])
def test_shapes(server: Server, lenet: Path, name: str, shape: tuple[int, ...]) -> None:
    server.reload(config(name, lenet))
    found = refusal(server.predict, name, {"image": np.zeros(shape, np.float32)})
    assert found.code == "INVALID_ARGUMENT"
    if not server.differs("shapes"):
        text = f"input image has shape {list(shape)}, the signature has [-1, 28, 28, 1]"
        assert found.message == text
    assert server.predict(name, IMAGE).model_spec.version.value == 2


def test_missing_base_path_of_a_new_model(server: Server, base: Path, name: str, tmp_path: Path) -> None:
    later = tmp_path / "later"
    configs = config(name, base), config(f"{name}-later", later)
    server.reload(configs[0])
    if not server.differs("missing base path of a new model"):
        found = refusal(server.reload, *configs)
        assert found.code == "UNKNOWN"
        assert found.message.startswith("1 model(s) did not become available: ")
        assert f"No versions of servable {name}-later found under base path {later}" in found.message
        put(later / "1")
    else:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.reload, *configs)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=3)
            assert server.states(f"{name}-later") == {}
            put(later / "1")
            waiting.result(timeout=60)
    server.until(f"{name}-later", {1: AVAILABLE})
    assert server.predict(name, IMAGE).model_spec.version.value == 1


def test_missing_base_path_of_another_model(server: Server, base: Path, name: str, tmp_path: Path) -> None:
    other = put(tmp_path / "other" / "1").parent
    server.reload(config(name, base), config(f"{name}-other", other))
    other.rename(tmp_path / "gone")
    put(base / "2")
    if not server.differs("missing base path of another model"):
        server.until(name, {1: END, 2: AVAILABLE})
    (tmp_path / "gone").rename(other)
    server.until(name, {1: END, 2: AVAILABLE})
    assert server.predict(f"{name}-other", IMAGE).model_spec.version.value == 1


def test_version_without_variables(server: Server, base: Path, name: str, tmp_path: Path) -> None:
    server.reload(config(name, base))
    broken = put(tmp_path / "aside" / "kept")
    shutil.rmtree(broken / "variables")
    (broken / "variables").mkdir()
    broken.rename(base / "2")
    if server.differs("version without variables"):
        server.until(name, {1: END, 2: AVAILABLE})
        assert refusal(server.predict, name, IMAGE).code == "FAILED_PRECONDITION"
    else:
        server.until(name, {1: AVAILABLE, 2: END})
        assert server.statuses(name)[0].status.error_code == 5
        assert server.predict(name, IMAGE).model_spec.version.value == 1


def test_health(server: Server) -> None:
    stub = health_pb2_grpc.HealthStub(server.channel)
    request = health_pb2.HealthCheckRequest()
    if server.differs("health"):
        assert refusal(stub.Check, request).code == "UNIMPLEMENTED"
        return
    for service in ("", "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"):
        request.service = service
        assert stub.Check(request).status == health_pb2.HealthCheckResponse.SERVING
    request.service = "nope"
    assert refusal(stub.Check, request).code == grpc.StatusCode.NOT_FOUND.name


def test_repeated_values(server: Server, lenet: Path, name: str) -> None:
    server.reload(config(name, lenet))
    tensor = tensor_pb2.TensorProto(dtype=1, float_val=[1])
    for size in (1 << 20, 28, 28, 1):
        tensor.tensor_shape.dim.add(size=size)
    if server.differs("repeated values"):
        pytest.skip("it would allocate three gigabytes")
    found = refusal(server.predict, name, {"image": tensor})
    assert (found.code, found.message) == ("INVALID_ARGUMENT", "tensor parsing error: image")


def test_concurrent_calls(server: Server, lenet: Path, name: str) -> None:
    server.reload(config(name, lenet))
    number = 8 if server.differs("concurrent calls") else 128
    with ThreadPoolExecutor(number) as pool:
        answers = list(pool.map(lambda _: server.predict(name, IMAGE).model_spec.version.value, range(2 * number)))
    assert answers == [2] * 2 * number
