"""The REST API."""

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.contract.conftest import AVAILABLE, IMAGES, Server, config, expected
from tests.contract.models import save

PREDICT = "/v1/models/rest:predict"
ROW = json.dumps({"instances": IMAGES.tolist()})


@pytest.fixture(scope="module")
def rest(server: Server, lenet: Path, tmp_path_factory: pytest.TempPathFactory) -> httpx.Client:
    """A client. `rest` is our LeNet in versions 1 (labelled stable) and 2, `mixed` the model of many dtypes."""
    mixed = tmp_path_factory.mktemp("mixed") / "mixed"
    save(mixed / "1")
    configs = config("rest", lenet, specific=[1, 2]), config("mixed", mixed)
    server.reload(*configs)
    server.until("rest", {1: AVAILABLE, 2: AVAILABLE})
    server.reload(config("rest", lenet, specific=[1, 2], labels={"stable": 1}), configs[1])
    return server.http


def refused(response: httpx.Response, code: int = 400) -> str:
    """The message of an error response, whose layout is checked too."""
    assert response.status_code == code
    assert response.headers["Content-Type"] == "application/json"
    text: str = response.json()["error"]
    assert response.text == '{\n    "error": ' + json.dumps(text) + "\n}"
    return text


def mixed(rest: httpx.Client, signature: str, **body: Any) -> httpx.Response:
    return rest.post("/v1/models/mixed:predict", json={"signature_name": signature, **body})


@pytest.mark.parametrize(
    ("path", "seed"),
    [
        ("/v1/models/rest:predict", 2),
        ("/v1/models/%72est:predict", 2),
        ("/v1/models/rest/versions/1:predict", 1),
        ("/v1/models/rest/labels/stable:predict", 1),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_rows_are_answered_by_rows(rest: httpx.Client, path: str, seed: int, named: bool) -> None:
    instances = [{"image": image} for image in IMAGES.tolist()] if named else IMAGES.tolist()
    response = rest.post(path, json={"instances": instances})
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "application/json"
    assert int(response.headers["Content-Length"]) == len(response.content)
    rows = response.json()["predictions"]
    assert [set(row) for row in rows] == [{"logits", "probabilities"}] * 3
    np.testing.assert_allclose([row["logits"] for row in rows], expected(seed), atol=1e-4)


@pytest.mark.parametrize("named", [False, True])
def test_columns_are_answered_by_columns(rest: httpx.Client, named: bool) -> None:
    inputs = {"image": IMAGES.tolist()} if named else IMAGES.tolist()
    outputs = rest.post(PREDICT, json={"inputs": inputs}).json()["outputs"]
    assert set(outputs) == {"logits", "probabilities"}
    np.testing.assert_allclose(outputs["logits"], expected(2), atol=1e-4)


def test_a_single_output_is_bare_and_laid_out_as_recorded(rest: httpx.Client) -> None:
    values = [[0.1, 1, 1e-05], [0.0883738175, 9000000, -2.5]]
    answer = mixed(rest, "echo_float32", instances=values)
    assert answer.text == (
        '{\n    "predictions": [[0.1, 1.0, 1e-05], [0.0883738175, 9e+06, -2.5]\n    ]\n}'
    )  # fmt: skip
    answer = mixed(rest, "echo_float32", inputs=[[0.5, 0.25]])
    assert answer.text == '{\n    "outputs": [\n        [\n            0.5,\n            0.25\n        ]\n    ]\n}'


def test_numbers_are_printed_with_enough_digits_to_round_trip(rest: httpx.Client) -> None:
    third = np.float32(1) / 3
    assert "[[0.333333343]\n" in mixed(rest, "echo_float32", instances=[[float(third)]]).text
    assert "[[0.33333333333333331]\n" in mixed(rest, "echo_float64", instances=[[1 / 3]]).text


def test_bare_nan_and_infinity_are_numbers(rest: httpx.Client) -> None:
    body = '{"signature_name": "echo_float32", "instances": [[NaN, Infinity, -Infinity]]}'
    response = rest.post("/v1/models/mixed:predict", content=body)
    assert response.text == '{\n    "predictions": [[NaN, Infinity, -Infinity]\n    ]\n}'


@pytest.mark.parametrize("spelled", ["Inf", "-Inf", "-NaN", "Infinity"])
def test_inf_is_short_for_infinity_and_nan_may_have_a_sign(rest: httpx.Client, spelled: str) -> None:
    body = f'{{"signature_name": "echo_float32", "instances": [[{spelled}]]}}'
    value = rest.post("/v1/models/mixed:predict", content=body).json()["predictions"][0][0]
    np.testing.assert_equal(value, float(spelled))


@pytest.mark.parametrize(
    ("kind", "sent", "printed"),
    [
        ("float32", "2147483648", "2.14748365e+09"),
        ("float32", "16777217", "16777216.0"),
        ("float32", "1e39", "Infinity"),
        ("float32", "18446744073709551615", "1.84467441e+19"),
        ("float64", "9007199254740993", "9007199254740992.0"),
    ],
)
def test_numbers_beyond_the_precision_of_a_float_are_rounded(
    rest: httpx.Client, kind: str, sent: str, printed: str
) -> None:
    body = f'{{"signature_name": "echo_{kind}", "instances": [{sent}]}}'
    response = rest.post("/v1/models/mixed:predict", content=body)
    assert response.text == f'{{\n    "predictions": [{printed}\n    ]\n}}'


@pytest.mark.parametrize("number", ["1e400", "-1E+400", "9" * 400, "9" * 5000])
def test_a_number_that_no_double_holds_is_refused(rest: httpx.Client, number: str) -> None:
    body = f'{{"signature_name": "echo_float64", "instances": [{number}]}}'
    found = refused(rest.post("/v1/models/mixed:predict", content=body))
    assert found.startswith("JSON Parse error: Number too big to be stored in double. at offset: ")


@pytest.mark.parametrize(("before", "after"), [(b"", b"} trailing"), (b"", b"\0\0"), (b"\xef\xbb\xbf", b"")])
def test_a_byte_order_mark_and_trailing_bytes_are_ignored(rest: httpx.Client, before: bytes, after: bytes) -> None:
    body = before + b'{"signature_name": "echo_float32", "instances": [1.5]}' + after
    response = rest.post("/v1/models/mixed:predict", content=body)
    assert (response.status_code, response.json()) == (200, {"predictions": [1.5]})


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("int32", [-(2**31), 2**31 - 1]),
        ("int64", [-(2**63), 2**63 - 1]),
        ("uint8", [0, 255]),
        ("int8", [-128, 127]),
        ("uint32", [0, 2**32 - 1]),
        ("uint64", [0, 2**64 - 1]),
        ("bool", [True, False]),
        ("string", ["a", 'é " \\ \n']),
    ],
)
def test_every_type_goes_both_ways(rest: httpx.Client, kind: str, values: list[Any]) -> None:
    assert mixed(rest, f"echo_{kind}", instances=values).json() == {"predictions": values}
    assert mixed(rest, f"echo_{kind}", inputs=values).json() == {"outputs": values}


def test_bytes_go_in_and_out_as_base64(rest: httpx.Client) -> None:
    def b64(data: bytes) -> dict[str, str]:
        return {"b64": base64.b64encode(data).decode()}

    response = mixed(rest, "text", instances=[b64(b"ab"), b64(b"c")])
    assert response.json() == {
        "predictions": [{"name": "ab", "name_bytes": b64(b"AB")}, {"name": "c", "name_bytes": b64(b"C")}]
    }


def test_several_inputs_are_passed_by_name(rest: httpx.Client) -> None:
    rows = mixed(rest, "", instances=[{"a": 1, "b": 2}, {"a": 3, "b": 4}])
    assert rows.json() == {"predictions": [{"difference": -1, "sum": 3}, {"difference": -1, "sum": 7}]}
    columns = mixed(rest, "", inputs={"a": [1, 3], "b": [2, 4]})
    assert columns.json() == {"outputs": {"difference": [-1, -1], "sum": [3, 7]}}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "JSON Parse error: The document is empty"),
        ("hello", "JSON Parse error: Invalid value. at offset: 0"),
        ('{"instances": [1,', "JSON Parse error: Invalid value. at offset: 17"),
        ('{"instances": [1 2]}', "JSON Parse error: Missing a comma or ']' after an array element. at offset: 17"),
        ('{"instances": [1}', "JSON Parse error: Missing a comma or ']' after an array element. at offset: 16"),
        ('{"a": 1 "b": 2}', "JSON Parse error: Missing a comma or '}' after an object member. at offset: 8"),
        ('{"é": 1 "b": 2}', "JSON Parse error: Missing a comma or '}' after an object member. at offset: 9"),
        ('{"a" 1}', "JSON Parse error: Missing a colon after a name of object member. at offset: 5"),
        ("{1: 2}", "JSON Parse error: Missing a name for object member. at offset: 1"),
        ('{"a": [nulx]}', "JSON Parse error: Invalid value. at offset: 10"),
        ("[1]", "JSON Value: [1] Is not object"),
        (
            '{"signature_name": 1}',
            'JSON Value: {\n    "signature_name": 1\n} not formatted correctly. '
            "'signature_name' key must be a string value.",
        ),
        ('{"foo": 1}', "Missing 'inputs' or 'instances' key"),
        ('{"instances": 5}', "JSON Value: {\n    \"instances\": 5\n} Expecting 'instances' to be an list/array"),
        ('{"instances": []}', "JSON Value: {\n    \"instances\": []\n} No values in 'instances' array"),
        ('{"inputs": {}}', "Missing named input: image in 'inputs' object."),
        ('{"inputs": {"img": [1]}}', "Missing named input: image in 'inputs' object."),
        ('{"signature_name": "zzz", "instances": [1]}', 'Serving signature name: "zzz" not found in signature def'),
        (
            '{"instances": ["a"]}',
            "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: JSON Value: \"a\" Type: String "
            "is not of expected type: float",
        ),
        (
            '{"instances": [null]}',
            "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: JSON Value: null Type: Null "
            "is not of expected type: float",
        ),
        (
            '{"instances": [[[[true]]]]}',
            "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: JSON Value: true Type: True "
            "is not of expected type: float",
        ),
        (
            '{"instances": [[[[0.0]], [[0.0], [1.0]]]]}',
            "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: Encountered list at "
            "unexpected size: 2 at level: 1 expected size: 1",
        ),
        (
            '{"instances": [{"img": [1]}]}',
            "Failed to process element: 0 key: img of 'instances' list. Error: INVALID_ARGUMENT: JSON object: does "
            "not have named input: img",
        ),
        (
            '{"instances": [{"image": [1], "x": 1}]}',
            "Failed to process element: 0 key: x of 'instances' list. Error: INVALID_ARGUMENT: JSON object: does not "
            "have named input: x",
        ),
    ],
)
def test_malformed_bodies_are_refused_with_a_reason(rest: httpx.Client, body: str, message: str) -> None:
    assert refused(rest.post(PREDICT, content=body)) == message


def test_rows_and_columns_at_once_are_refused_with_the_beginning_of_the_body(rest: httpx.Client) -> None:
    found = refused(rest.post(PREDICT, json={"instances": IMAGES.tolist(), "inputs": IMAGES.tolist()}))
    assert found.startswith('JSON Value: {\n    "instances": [[[[')
    assert found.endswith(" Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist ")
    assert len(found) < 400


def test_base64_is_not_a_number(rest: httpx.Client) -> None:
    found = refused(rest.post(PREDICT, json={"instances": [{"image": {"b64": "AAAA"}}]}))
    assert found == (
        "Failed to process element: 0 key: image of 'instances' list. Error: INVALID_ARGUMENT: "
        'JSON Value: {\n    "b64": "AAAA"\n} Type: Object is not of expected type: float'
    )


def test_the_content_type_does_not_matter_and_compression_is_not_understood(rest: httpx.Client) -> None:
    assert rest.post(PREDICT, content=ROW, headers={"Content-Type": "text/plain"}).status_code == 200
    response = rest.post(PREDICT, content=ROW, headers={"Accept-Encoding": "gzip"})
    assert "Content-Encoding" not in response.headers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/models/rest"),
        ("POST", "/v1/models/rest:train"),
        ("POST", "/v1/models/rest:PREDICT"),
        ("POST", "/v1/models/rest:predict/"),
        ("POST", "/v1/models/rest:predict?x=1"),
        ("POST", "/v1/models/rest/versions/abc:predict"),
        ("GET", "/v1/models/rest:predict"),
        ("PUT", "/v1/models/rest:predict"),
        ("DELETE", "/v1/models/rest:predict"),
        ("GET", "/v1/models/"),
        ("GET", "/v1/models/rest/"),
    ],
)
def test_requests_outside_the_api_are_malformed(rest: httpx.Client, method: str, path: str) -> None:
    body = ROW if method in ("POST", "PUT") else None
    assert refused(rest.request(method, path, content=body)) == f"Malformed request: {method} {path}"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("GET", "/foo"), ("POST", "/foo"), ("GET", "/v1"), ("GET", "/monitoring/prometheus/metrics")],
)
def test_other_paths_get_an_html_404(rest: httpx.Client, method: str, path: str) -> None:
    response = rest.request(method, path, content="{}" if method == "POST" else None)
    assert (response.status_code, response.headers["Content-Type"]) == (404, "text/html")
    assert response.text == (
        "<HTML><HEAD>\n<TITLE>404 Not Found</TITLE>\n</HEAD><BODY>\n<H1>Not Found</H1>\n</BODY></HTML>\n"
    )


def test_options_and_head_get_an_empty_400(rest: httpx.Client) -> None:
    options = rest.options(PREDICT)
    assert (options.status_code, options.content) == (400, b"")
    assert options.headers["Content-Type"] == "text/html; charset=ISO-8859-1"
    # The real server sends a body with its answer to HEAD, which spoils the connection for the next request.
    with httpx.Client(base_url=rest.base_url) as client:
        head = client.head("/v1/models/rest")
    assert (head.status_code, head.content, head.headers["Content-Type"]) == (400, b"", "application/json")


def test_trace_is_not_implemented(rest: httpx.Client) -> None:
    with httpx.Client(base_url=rest.base_url) as client:
        response = client.request("TRACE", "/v1/models/rest")
    assert (response.status_code, response.headers["Content-Type"]) == (501, "text/html")


@pytest.mark.parametrize("digits", [20, 5000])
def test_a_version_beyond_64_bits_is_answered_by_nothing(rest: httpx.Client, digits: int) -> None:
    path = "/v1/models/rest/versions/" + "9" * digits
    for response in (rest.post(f"{path}:predict", content=ROW), rest.get(path)):
        assert (response.status_code, response.content) == (400, b"")
        assert response.headers["Content-Type"] == "application/json"


def test_leading_zeros_of_a_version_do_not_count(rest: httpx.Client) -> None:
    found = rest.get("/v1/models/rest/versions/" + "0" * 5000 + "1").json()
    assert [state["version"] for state in found["model_version_status"]] == ["1"]


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("/v1/models/nope:predict", 404, "Servable not found for request: Latest(nope)"),
        ("/v1/models/rest/versions/99:predict", 404, "Servable not found for request: Specific(rest, 99)"),
        ("/v1/models/rest/labels/canary:predict", 400, "Unrecognized servable version label: canary"),
    ],
)
def test_unknown_models_versions_and_labels_are_named(rest: httpx.Client, path: str, code: int, message: str) -> None:
    assert refused(rest.post(path, content=ROW), code) == message


def test_examples_need_a_signature_that_takes_them(rest: httpx.Client) -> None:
    def asked(model: str, verb: str, signature: str = "") -> str:
        body = {"signature_name": signature, "examples": [{"image": [0.0]}]}
        return refused(rest.post(f"/v1/models/{model}:{verb}", json=body))

    found = asked("rest", "classify")
    assert found.startswith('No classification inputs found in SignatureDef: inputs {\n  key: "image"\n')
    assert asked("rest", "regress") == "Expected one output Tensor."
    found = asked("mixed", "regress", "echo_float32")
    assert found.startswith('No regression inputs found in SignatureDef: inputs {\n  key: "x"\n')
    assert asked("mixed", "classify") == "Expected one input Tensor."
    assert asked("rest", "classify", "zzz") == "No signature was found with the name: zzz"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"examples": [', "JSON Parse error: Invalid value. at offset: 14"),
        ("{}", "JSON Value: {} When method is classify, key 'examples' is expected and was not found"),
        ('{"examples": 5}', "JSON Value: {\n    \"examples\": 5\n} Expecting 'examples' value to be an list/array"),
        ('{"examples": []}', "JSON Value: {\n    \"examples\": []\n} 'examples' value is an empty array"),
        ('{"examples": [1]}', "Example must be JSON object but got JSON Number"),
        ('{"context": 1, "examples": []}', "Example must be JSON object but got JSON Number"),
        ('{"examples": [{"x": null}]}', "Feature: x has element with unexpected JSON type: Null"),
        ('{"examples": [{"x": [[1]]}]}', "Feature: x has element with unexpected JSON type: Array"),
        ('{"examples": [{"x": [1, "a"]}]}', "Unexpected element type in feature: x expecting type: int64"),
        ('{"examples": [{"x": [1.5, true]}]}', "Unexpected element type in feature: x expecting type: float"),
        (
            '{"examples": [{"x": 18446744073709551615}]}',
            "Feature: x has uint64 element. Only int64 is supported.",
        ),
        (
            '{"signature_name": 1, "examples": 5}',
            'JSON Value: {\n    "signature_name": 1,\n    "examples": 5\n} not formatted correctly. '
            "'signature_name' key must be a string value.",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["classify", "regress"])
def test_examples_are_checked_before_the_model_is_looked_up(
    rest: httpx.Client, verb: str, body: str, message: str
) -> None:
    assert refused(rest.post(f"/v1/models/nope:{verb}", content=body)) == message


def test_status_matches_that_over_grpc(rest: httpx.Client) -> None:
    fine = {"error_code": "OK", "error_message": ""}
    two = [{"version": version, "state": "AVAILABLE", "status": fine} for version in ("2", "1")]
    for path in ("/v1/models/rest", "/v1/models/rest/labels/x"):
        response = rest.get(path)
        assert response.json() == {"model_version_status": two}
        assert response.text.startswith('{\n "model_version_status": [\n  {\n   "version": "2",\n   "state": ')
    assert rest.get("/v1/models/rest/versions/1").json() == {"model_version_status": two[1:]}
    assert refused(rest.get("/v1/models")) == "Missing model name in request."
    assert refused(rest.get("/v1/models/nope"), 404) == "Could not find any versions of model nope"
    assert refused(rest.get("/v1/models/rest/versions/9"), 404) == "Could not find version 9 of model rest"


def test_metadata_holds_the_signatures(rest: httpx.Client) -> None:
    found = rest.get("/v1/models/rest/versions/1/metadata").json()
    assert found["model_spec"] == {"name": "rest", "version": "1", "signature_name": ""}
    signature = found["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["method_name"] == "tensorflow/serving/predict"
    assert signature["inputs"]["image"]["dtype"] == "DT_FLOAT"
    assert signature["inputs"]["image"]["tensor_shape"] == {
        "dim": [{"size": size, "name": ""} for size in ("-1", "28", "28", "1")],
        "unknown_rank": False,
    }
    missing = "Servable not found for request: Latest(nope)"
    assert refused(rest.get("/v1/models/nope/metadata"), 404) == missing
