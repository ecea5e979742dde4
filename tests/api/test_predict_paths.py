"""Every path to a prediction and every kind of body: they mean the same, and say what is wrong."""

import asyncio
import contextlib
import io
import json
import select
import socket
import threading
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import requests
from PIL import Image

from api.inference.bodies import ImageDecoder
from store.errors import Overloaded, TooLarge
from store.settings import Settings
from tests.conftest import Service, eventually, png, zipped

Digits = tuple[np.ndarray, np.ndarray]
RAW, NPY, ZIP = "application/octet-stream", "application/x-npy", "application/zip"


def npy(array: np.ndarray) -> bytes:
    packed = io.BytesIO()
    np.save(packed, array)
    return packed.getvalue()


def ask(service: Service, content: bytes, kind: str, query: str = "model=lenet5", **headers: str) -> httpx.Response:
    return service.api.post(f"/predict?{query}", content=content, headers={"Content-Type": kind, **headers})


@pytest.fixture(scope="module")
def images(digits: Digits) -> np.ndarray:
    found: np.ndarray = digits[0][:5]  # (5, 28, 28) uint8
    return found


@pytest.fixture(scope="module")
def expected(service: Service, images: np.ndarray) -> np.ndarray:
    """Probabilities (5, 10), asked for as JSON bytes."""
    body = {"model": "lenet5", "range": "byte", "instances": images.tolist()}
    answer = service.api.post("/predict", json=body).raise_for_status()
    return np.array([prediction["probabilities"] for prediction in answer.json()["predictions"]])


def bodies(images: np.ndarray) -> dict[str, tuple[bytes, str]]:
    unit = images / 255
    return {
        "raw": (images.tobytes(), RAW),
        "npy of bytes": (npy(images), NPY),
        "npy of floats": (npy(unit.astype(np.float32)), NPY),
        "npy of doubles, flat": (npy(unit.reshape(-1, 784)), NPY),
        "npy with a channel": (npy(images[..., None]), NPY),
        "zip": (zipped({f"{i}.png": png(image) for i, image in enumerate(images)} | {"__MACOSX/x": b"y"}), ZIP),
        "JSON floats": (json.dumps({"model": "lenet5", "instances": unit.tolist()}).encode(), "application/json"),
        "JSON floats of 784": (
            json.dumps({"instances": unit.reshape(-1, 784).tolist(), "model": "lenet5"}).encode(), "application/json",
        ),
        "JSON with a channel": (
            json.dumps({"model": "lenet5", "instances": unit[..., None].tolist()}).encode(), "application/json",
        ),
        "JSON with odd spaces": (
            json.dumps({"model": "lenet5", "range": "byte", "instances": images.tolist()}, indent=1).encode(), "",
        ),
        "JSON of bytes as floats": (
            json.dumps({"model": "lenet5", "range": "byte", "instances": images.astype(float).tolist()}).encode(), "",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("form", bodies(np.zeros((1, 28, 28), np.uint8)))
def test_all_bodies_mean_the_same(service: Service, images: np.ndarray, expected: np.ndarray, form: str) -> None:
    content, kind = bodies(images)[form]
    query = "" if form.startswith("JSON") else "model=lenet5"
    answer = ask(service, content, kind, query)
    assert answer.status_code == 200, answer.text
    found = [prediction["probabilities"] for prediction in answer.json()["predictions"]]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_form_of_images_is_answered_by_name(service: Service, images: np.ndarray, expected: np.ndarray) -> None:
    files = [("image", (f"{name}.png", png(image), "image/png")) for name, image in zip("edcba", images, strict=True)]
    answer = service.api.post("/predict", files=files, data={"model": "lenet5", "top_k": "3"}).json()
    assert [prediction["file"] for prediction in answer["predictions"]] == [f"{name}.png" for name in "edcba"]
    np.testing.assert_allclose([p["probabilities"] for p in answer["predictions"]], expected, atol=1e-5)
    for prediction in answer["predictions"]:
        ranked = [answer["classes"][index] for index in np.argsort(prediction["probabilities"])[::-1][:3]]
        assert [entry["label"] for entry in prediction["top_k"]] == ranked
        assert prediction["top_k"][0]["probability"] == max(prediction["probabilities"])


def encoded(image: np.ndarray, kind: str, **options: Any) -> bytes:
    packed = io.BytesIO()
    Image.fromarray(image).save(packed, kind, **options)
    return packed.getvalue()


def test_every_image_format_that_trains_also_predicts(
    service: Service, images: np.ndarray, expected: np.ndarray
) -> None:
    for kind, options in (("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100})):
        answer = ask(service, encoded(images[0], kind, **options), f"image/{kind.lower()}")
        assert answer.status_code == 200, answer.text
        tolerance = 0.05 if kind == "JPEG" else 1e-5
        np.testing.assert_allclose(answer.json()["predictions"][0]["probabilities"], expected[0], atol=tolerance)
    for kind in ("TIFF", "GIF", "PPM"):
        answer = ask(service, encoded(images[0], kind), "image/png")
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_image")
        assert "PNG, JPEG, WEBP, BMP" in answer.json()["error"]["message"]


def test_a_phone_photo_predicts(service: Service) -> None:
    for size, kind in (((4000, 6000), "JPEG"), ((3000, 4000), "PNG")):
        photo = np.full(size, 90, np.uint8)
        photo[1000:3000, 1500:1700] = 200
        assert ask(service, encoded(photo, kind), f"image/{kind.lower()}").status_code == 200
    answer = ask(service, encoded(np.zeros((8000, 8000), np.uint8), "PNG"), "image/png")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_image")
    assert "8000x8000 pixels, more than the limit of 50000000" in answer.json()["error"]["message"]


def test_images_that_take_too_long_to_decode_are_refused(tmp_path: Path) -> None:
    large = encoded(np.zeros((6000, 8000), np.uint8), "PNG")
    decoder = ImageDecoder(Settings(home=tmp_path, predict_timeout_s=0.1))

    async def main() -> None:
        with pytest.raises(TooLarge, match=r"longer than 0\.1 s; send fewer or smaller images"):
            await decoder.decode([("large.png", large)] * 100)
        crowd = [decoder.decode([("large.png", large)]) for _ in range(80)]
        found = await asyncio.gather(*crowd, return_exceptions=True)
        assert {type(result) for result in found} == {np.ndarray, Overloaded}
        assert (await decoder.decode([("small.png", png(BYTES[0]))])).shape == (1, 784)

    asyncio.run(main())


def test_top_k_is_given_only_when_asked_for(service: Service, images: np.ndarray) -> None:
    assert "top_k" not in ask(service, images[:1].tobytes(), RAW).json()["predictions"][0]
    found = ask(service, images[:1].tobytes(), RAW, "model=lenet5&top_k=99").json()["predictions"][0]["top_k"]
    assert len(found) == 10


# --- TensorFlow Serving's REST ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (":predict", lambda x: {"instances": (x / 255)[..., None].tolist()}),
        (":predict", lambda x: {"signature_name": "serving_default", "instances": (x / 255).reshape(-1, 784).tolist()}),
        ("/versions/1:predict", lambda x: {"instances": [{"image": image} for image in (x / 255)[..., None].tolist()]}),
        ("/labels/stable:predict", lambda x: {"signature_name": "serving_bytes", "instances": x.tolist()}),
    ],
)  # fmt: skip
def test_row_format(service: Service, images: np.ndarray, expected: np.ndarray, path: str, body: Any) -> None:
    answer = service.api.post(f"/v1/models/lenet5{path}", json=body(images))
    assert answer.status_code == 200, answer.text
    np.testing.assert_allclose([row["probabilities"] for row in answer.json()["predictions"]], expected, atol=1e-5)
    assert len(answer.json()["predictions"][0]["logits"]) == 10
    assert answer.json()["model_spec"]["version"] == answer.headers["X-Temper-Version"] == "1"


@pytest.mark.parametrize("named", [True, False])
def test_column_format(service: Service, images: np.ndarray, expected: np.ndarray, named: bool) -> None:
    inputs = (images / 255)[..., None].tolist()
    answer = service.api.post("/v1/models/lenet5:predict", json={"inputs": {"image": inputs} if named else inputs})
    assert set(answer.json()["outputs"]) == {"logits", "probabilities"}
    np.testing.assert_allclose(answer.json()["outputs"]["probabilities"], expected, atol=1e-5)


ZEROS = [[[0.0]] * 28] * 28


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        (":predict", "{", 400, "not JSON"),
        (":predict", '{"instances": [' + "NaN," * 783 + "NaN]}", 400, "not JSON"),
        (":predict", [1], 400, "JSON object"),
        (":predict", {}, 400, "Missing 'inputs' or 'instances' key"),
        (":predict", {"instances": [ZEROS], "inputs": [ZEROS]}, 400, "only one of"),
        (":predict", {"instances": []}, 400, "at least one"),
        (":predict", {"instances": [[1, 2]]}, 400, "instance 0"),
        (":predict", {"instances": [ZEROS, {"image": ZEROS}]}, 400, "instance 1"),
        (":predict", {"instances": [{"image": ZEROS}, ZEROS]}, 400, "some are objects"),
        (":predict", {"instances": [{"img": ZEROS}]}, 400, "'image', not img"),
        (":predict", {"inputs": {"img": [ZEROS]}}, 400, "'image', not img"),
        (":predict", {"instances": [ZEROS], "signature_name": "zzz"}, 400, '"zzz" not found'),
        (":predict", {"instances": [ZEROS], "signature_name": 3}, 400, "not found"),
        ("/versions/9:predict", {"instances": [ZEROS]}, 404, "no version 9"),
        ("/labels/nope:predict", {"instances": [ZEROS]}, 404, "no label 'nope'"),
        (":train", {"instances": [ZEROS]}, 405, "Method Not Allowed"),
    ],
)  # fmt: skip
def test_its_errors_are_one_string(service: Service, path: str, body: Any, status: int, says: str) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    answer = service.api.post(f"/v1/models/lenet5{path}", content=content)
    assert (answer.status_code, list(answer.json())) == (status, ["error"]), answer.text
    assert says in answer.json()["error"]


def test_its_status_and_metadata(service: Service) -> None:
    states = service.api.get("/v1/models/lenet5").json()["model_version_status"]
    assert states == [{"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}]
    assert service.api.get("/v1/models/lenet5/versions/1").json()["model_version_status"] == states
    assert service.api.get("/v1/models/lenet5/versions/2").status_code == 404
    assert service.api.get("/v1/models/nobody").json() == {"error": "Could not find any versions of model nobody"}
    assert service.api.get("/v1/models/lenet5/labels/stable").json()["model_version_status"] == states
    assert service.api.get("/v1/models/lenet5/labels/nope").status_code == 404
    for path in ("", "/versions/1", "/labels/stable"):
        found = service.api.get(f"/v1/models/lenet5{path}/metadata").json()
        signatures = found["metadata"]["signature_def"]["signature_def"]
        assert signatures["serving_bytes"]["inputs"]["image"]["dtype"] == "DT_UINT8"
        assert found["model_spec"]["version"] == "1"


# --- the Open Inference Protocol ----------------------------------------------------------------------------------


def tensor(images: np.ndarray, datatype: str = "FP32", **other: Any) -> dict[str, Any]:
    data = images if datatype == "UINT8" else images / 255
    return {"name": "image", "shape": list(images.shape), "datatype": datatype, "data": data.ravel().tolist(), **other}


@pytest.mark.parametrize("datatype", ["FP32", "FP64", "UINT8"])
@pytest.mark.parametrize("path", ["", "/versions/1"])
def test_inference(service: Service, images: np.ndarray, expected: np.ndarray, path: str, datatype: str) -> None:
    body = {"id": "a-1", "inputs": [tensor(images, datatype)]}
    answer = service.api.post(f"/v2/models/lenet5{path}/infer", json=body).json()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("a-1", "lenet5", "1")
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert set(outputs) == {"logits", "probabilities"}
    assert (outputs["probabilities"]["datatype"], outputs["probabilities"]["shape"]) == ("FP32", [5, 10])
    np.testing.assert_allclose(np.reshape(outputs["probabilities"]["data"], (5, 10)), expected, atol=1e-5)


def test_outputs_can_be_chosen_and_data_nested(service: Service, images: np.ndarray) -> None:
    body = {"inputs": [{**tensor(images), "data": (images / 255).tolist()}], "outputs": [{"name": "logits"}]}
    answer = service.api.post("/v2/models/lenet5/infer", json=body).json()
    assert [output["name"] for output in answer["outputs"]] == ["logits"]
    assert "id" not in answer


BYTES = np.zeros((1, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 400, "inputs"),
        ({"inputs": [tensor(BYTES), tensor(BYTES)]}, 400, "one tensor"),
        ({"inputs": [tensor(BYTES, name="x")]}, 400, "inputs.0.name"),
        ({"inputs": [tensor(BYTES, datatype="INT64")]}, 400, "inputs.0.datatype"),
        ({"inputs": [tensor(BYTES, shape=[1, 27, 28])]}, 400, "shape"),
        ({"inputs": [tensor(BYTES, shape=[2, 28, 28])]}, 400, "784 numbers do not fill shape"),
        ({"inputs": [tensor(BYTES, shape=[-1, 28, 28])]}, 400, "shape"),
        ({"inputs": [tensor(BYTES, data=["a"] * 784)]}, 400, "array of FP32 numbers"),
        ({"inputs": [tensor(BYTES, data=[2] * 784)]}, 400, "instance 0 has values"),
        ({"inputs": [{**tensor(BYTES, "UINT8"), "data": [0.5] * 784}]}, 400, "array of UINT8 numbers"),
        ({"inputs": [tensor(BYTES)], "outputs": [{"name": "x"}]}, 400, "outputs.0.name"),
        ({"inputs": [tensor(BYTES)], "parameters": {"label": "nope"}}, 404, "no label 'nope'"),
        ({"inputs": [tensor(BYTES)], "parameters": {"label": ["a"]}}, 400, "parameters.label"),
    ],
)  # fmt: skip
def test_its_errors_say_what_is_wrong(service: Service, body: Any, status: int, says: str) -> None:
    answer = service.api.post("/v2/models/lenet5/infer", json=body)
    assert (answer.status_code, list(answer.json())) == (status, ["error"]), answer.text
    assert says in answer.json()["error"]


def test_its_health_and_metadata(service: Service) -> None:
    get = service.api.get
    assert get("/v2").json()["name"] == "temper"
    assert get("/v2/health/live").json() == {"live": True}
    eventually(lambda: get("/v2/health/ready").json() == {"ready": True}, "the service is ready")
    assert get("/v2/models/lenet5/ready").json() == {"name": "lenet5", "ready": True}
    assert get("/v2/models/lenet5/versions/9/ready").status_code == 404
    found = get("/v2/models/lenet5").json()
    assert (found["versions"], found["inputs"][0]["shape"]) == (["1"], [-1, 28, 28, 1])
    assert found["outputs"][0]["parameters"]["classes"] == [str(digit) for digit in range(10)]


def npy_header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


# --- what is wrong with a body, and what comes with every answer --------------------------------------------------


@pytest.mark.parametrize(
    ("content", "kind", "query", "status", "code", "says"),
    [
        (b"", RAW, "model=lenet5", 422, "invalid_instances", "is empty"),
        (b"x" * 785, RAW, "model=lenet5", 422, "invalid_instances", "785 bytes"),
        (b"x" * 784, RAW, "", 422, "invalid_request", "model"),
        (b"x" * 784, RAW, "model=lenet5&x=1", 422, "invalid_request", "x"),
        (b"x" * 784, RAW, "model=lenet5&path=x", 422, "invalid_request", "path: unknown field"),
        (b'{"model": "lenet5", "body": 1, "instances": []}', "application/json", "", 422, "invalid_request", "body: "),
        (b"x" * 784, RAW, "model=lenet5&model=a", 422, "invalid_request", "given more than once"),
        (b"x" * 784, RAW, "model=lenet5&version=1&label=stable", 422, "invalid_request", "not both"),
        (b"x" * 784, RAW, "model=lenet5&top_k=0", 422, "invalid_request", "top_k"),
        (b"x" * 784 * 1025, RAW, "model=lenet5", 413, "too_large", "1025 images"),
        (b"x", NPY, "model=lenet5", 422, "invalid_instances", "not an .npy file"),
        (npy_header(b"(((("), NPY, "model=lenet5", 422, "invalid_instances", "not an .npy file"),
        (npy_header(b"{[]: 1}"), NPY, "model=lenet5", 422, "invalid_instances", "not an .npy file"),
        (npy(BYTES)[:-1], NPY, "model=lenet5", 422, "invalid_instances", "783 bytes"),
        (npy(BYTES.astype(np.int64)), NPY, "model=lenet5", 422, "invalid_instances", "int64"),
        (npy(np.array([None])), NPY, "model=lenet5", 422, "invalid_instances", "object"),
        (npy(np.zeros((3, 27, 28), "u1")), NPY, "model=lenet5", 422, "invalid_instances", "(3, 27, 28)"),
        (npy(np.asfortranarray(np.zeros((3, 28, 28), "u1"))), NPY, "model=lenet5", 422, "invalid_instances", "Fortran"),
        (npy(np.full((2, 28, 28), np.nan)), NPY, "model=lenet5", 422, "invalid_instances", "instance 0"),
        (npy(np.full((1, 28, 28), np.inf)), NPY, "model=lenet5", 422, "invalid_instances", "not between 0 and 1"),
        (b"PK", ZIP, "model=lenet5", 422, "invalid_instances", "zip is broken"),
        (zipped({}), ZIP, "model=lenet5", 422, "invalid_instances", "no image"),
        (zipped({"a.png": png(BYTES[0]), "b.png": b"x"}), ZIP, "model=lenet5", 422, "invalid_image", "b.png"),
        (zipped({f"{i}": b"" for i in range(1025)}), ZIP, "model=lenet5", 413, "too_large", "more than 1024"),
        (b"x", "multipart/form-data; boundary=x", "model=lenet5", 400, "malformed_request", ""),
        (b"x", "text/csv", "model=lenet5", 415, "unsupported_media_type", "application/x-npy"),
    ],
)  # fmt: skip
def test_a_bad_body_is_refused_with_the_reason(
    service: Service, content: bytes, kind: str, query: str, status: int, code: str, says: str
) -> None:
    answer = ask(service, content, kind, query)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert says in answer.json()["error"]["message"]


def test_an_offer_to_upgrade_the_connection_is_ignored(service: Service, images: np.ndarray) -> None:
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    assert ask(service, images.tobytes(), RAW, **offer).status_code == 200
    assert ask(service, images.tobytes(), RAW).status_code == 200


@pytest.mark.parametrize("cut", [0, 30, 100])
@pytest.mark.parametrize("name", ["Upgrade", "UPGRADE", "uPgRaDe"])
def test_an_offer_to_upgrade_keeps_the_body_however_it_is_written_and_split(
    service: Service, images: np.ndarray, name: str, cut: int
) -> None:
    one = images[:1].tobytes()
    request = (
        b"POST /predict?model=lenet5 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        b"Connection: upgrade\r\n%s: h2c\r\nContent-Length: %d\r\n\r\n" % (name.encode(), len(one))
    ) + one
    split = request.index(name.encode()) + 3 if cut == 30 else cut
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=10) as client:
        for _ in range(2):  # the connection stays usable
            client.sendall(request[:split])
            if split:
                select.select([client], [], [], 0.1)  # let the first part arrive on its own
            client.sendall(request[split:])
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", ["/v1/models/lenet5/versions/{}:predict", "/v2/models/lenet5/versions/{}/infer"])
@pytest.mark.parametrize(("version", "status"), [("9" * 5000, 404), ("9" * 19, 404), ("abc", 400), ("0x1", 400)])
def test_a_version_that_cannot_exist_gets_a_clear_answer(
    service: Service, images: np.ndarray, path: str, version: str, status: int
) -> None:
    body = {"instances": (images[:1] / 255).tolist()} if "v1" in path else {"inputs": [tensor(images[:1])]}
    answer = service.api.post(path.format(version), json=body)
    assert answer.status_code == status, answer.text
    assert version[:10] in answer.json()["error"]
    assert len(answer.json()["error"]) < 200


@pytest.mark.parametrize(("right", "wrong"), [("version", "1.0"), ("version", "true"), ("top_k", "1.0")])
def test_options_of_another_type_are_refused_whatever_was_asked_before(
    service: Service, images: np.ndarray, right: str, wrong: str
) -> None:
    text = '{"model": "lenet5", "range": "byte", "%s": %s, "instances": ' + json.dumps(images[:1].tolist()) + "}"
    headers = {"Content-Type": "application/json"}
    for value, status in ((wrong, 422), ("1", 200), (wrong, 422)):
        answer = service.api.post("/predict", content=text % (right, value), headers=headers)
        assert (value, answer.status_code) == (value, status), answer.text


@pytest.mark.parametrize("size", [9 << 20, 40 << 20])
def test_a_refusal_of_a_large_body_reaches_every_client(service: Service, size: int) -> None:
    body, url = bytes(size), f"{service.url}/predict?model=lenet5"

    def with_httpx() -> int:
        async def send() -> int:
            async with httpx.AsyncClient(timeout=30) as api:
                return (await api.post(url, content=body, headers={"Content-Type": RAW})).status_code

        return asyncio.run(send())

    def with_urllib() -> int:
        request = urllib.request.Request(url, body, {"Content-Type": RAW})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        with refused.value as answer:
            assert json.load(answer)["error"]["code"] == "too_large"
            return answer.code

    def with_requests() -> int:
        answer = requests.post(url, body, headers={"Content-Type": RAW}, timeout=30)
        return int(answer.status_code)

    found = [send() for _ in range(10) for send in (with_httpx, with_urllib, with_requests)]
    assert Counter(found) == {413: 30}


def test_a_refused_body_is_not_drained_for_ever(service: Service) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=30) as client:
        client.sendall(head)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 413")
        with pytest.raises(ConnectionError):
            client.sendall(bytes(512 << 20))


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics", "/models", "/models/lenet5", "/finetune",
                                  "/models/nobody", "/v1/models/lenet5", "/v2/health/ready", "/docs"])  # fmt: skip
def test_head_is_get_without_the_body(service: Service, path: str) -> None:
    get, head = service.api.get(path), service.api.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"] if "content-type" in get.headers else True
    assert service.api.head("/predict").status_code == 405


def test_what_is_said_where_nobody_reads_it_is_refused(service: Service, images: np.ndarray) -> None:
    body = {"model": "lenet5", "range": "byte", "instances": images.tolist()}
    answer = service.api.post("/predict?version=9", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "query")
    answer = ask(service, images.tobytes(), RAW, **{"Content-Encoding": "gzip"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_a_head_without_end_is_cut_off(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        with pytest.raises(ConnectionError):
            client.sendall(b"a" * (64 << 20))


@pytest.mark.exhaustive
def test_large_bodies_that_nobody_finishes_are_bounded(service: Service, images: np.ndarray) -> None:
    address = ("127.0.0.1", int(service.url.rpartition(":")[2]))
    head = b"POST /predict?model=lenet5 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(address)) for _ in range(6)]
        for client in clients:
            client.sendall(head + b"Content-Length: 8000000\r\n\r\n" + bytes(1000))
        refused = [client for client in clients if select.select([client], [], [], 2)[0]]
        assert {client.recv(12) for client in refused} == {b"HTTP/1.1 429"}
        assert len(refused) == 2
        assert ask(service, images.tobytes(), RAW).status_code == 200
    many = np.repeat(images, 100, axis=0)
    eventually(lambda: ask(service, many.tobytes(), RAW).status_code == 200, "their places are free again")


def test_a_bad_instance_fails_only_its_own_request(service: Service, images: np.ndarray) -> None:
    good, bad = images[:1].tobytes(), b"x" * 783
    statuses: Counter[tuple[bool, int]] = Counter()

    def send(content: bytes) -> None:
        with httpx.Client(base_url=service.url, timeout=60) as api:
            for _ in range(20):
                status = api.post("/predict?model=lenet5", content=content, headers={"Content-Type": RAW}).status_code
                statuses[content is good, status] += 1

    threads = [threading.Thread(target=send, args=(content,)) for content in (good, bad) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == {(True, 200): 80, (False, 422): 80}


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon"])
def test_a_timeout_that_is_none_is_refused(service: Service, images: np.ndarray, given: str) -> None:
    answer = ask(service, images.tobytes(), RAW, **{"X-Request-Timeout": given})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "X-Request-Timeout")


def test_an_answer_that_comes_too_late_is_a_timeout(service: Service, images: np.ndarray) -> None:
    answer = ask(service, images.tobytes(), RAW, **{"X-Request-Timeout": "0.00001"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "model_server_timeout")
    assert ask(service, images.tobytes(), RAW, **{"X-Request-Timeout": "60"}).status_code == 200


def test_every_answer_has_the_requests_id(service: Service, images: np.ndarray) -> None:
    answer = ask(service, images.tobytes(), RAW, **{"X-Request-ID": "order-7"})
    assert answer.headers["X-Request-ID"] == "order-7"
    assert (answer.headers["X-Temper-Model"], answer.headers["X-Temper-Version"]) == ("lenet5", "1")
    failed = service.api.get("/models/nobody", headers={"X-Request-ID": "order-8"})
    assert failed.json()["error"]["request_id"] == failed.headers["X-Request-ID"] == "order-8"
    made = {service.api.get("/healthz").headers["X-Request-ID"] for _ in range(3)}
    assert len(made) == 3
    for odd in ("a b", "x" * 129, "<script>"):
        assert service.api.get("/healthz", headers={"X-Request-ID": odd}).headers["X-Request-ID"] != odd


def test_metrics_count_by_route_model_and_version(service: Service, images: np.ndarray) -> None:
    ask(service, images.tobytes(), RAW)
    ask(service, b"", RAW)
    service.api.post("/predict", content=b" " * (9 << 20))
    found = service.api.get("/metrics").text
    for line in (
        'temper_requests_total{model="lenet5",route="/predict",status="200",version="1"}',
        'temper_requests_total{model="",route="/predict",status="422",version=""}',
        'temper_request_seconds_bucket{le="0.01",model="lenet5",route="/predict",version="1"}',
        'temper_rejections_total{reason="too_large"}', "temper_batch_images_count", "temper_queue_seconds_sum",
        "temper_calls_in_flight", "temper_images_waiting 0.0", 'temper_model_server_up{target="unix:',
        'temper_versions_served{model="lenet5"} 1.0',
    ):  # fmt: skip
        assert line in found, line
    assert "nobody" not in found
