"""When a version should not be believed, over HTTP against a running service."""

import numpy as np
import pytest

from tests.conftest import Service, png

NOISE = png(np.random.default_rng(0).integers(0, 255, (28, 28)).astype(np.uint8))
Digits = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def model(service: Service, digits_zip: bytes) -> str:
    service.finished(service.finetune(digits_zip, "abstains", '{"epochs": 5}').json()["id"])
    return "abstains"


def predicted(service: Service, model: str, image: bytes) -> dict[str, object]:
    answer = service.api.post(f"/predict?model={model}", content=image, headers={"Content-Type": "image/png"})
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["predictions"]
    return dict(found)


def test_a_prediction_has_its_set_and_an_image_of_another_kind_is_none_of_these(
    service: Service, model: str, digits: Digits
) -> None:
    rule = service.api.get(f"/models/{model}").json()["versions"][0]["manifest"]["abstention"]
    instances = (digits[0][300:400] / 255).tolist()
    answer = service.api.post("/predict", json={"model": model, "instances": instances, "top_k": 1}).json()
    for one in answer["predictions"]:
        plausible = [
            name for name, chance in zip(answer["classes"], one["probabilities"], strict=True)
            if np.float32(chance) >= np.float32(rule["threshold"])
        ]  # fmt: skip
        assert one["set"] == plausible
    assert sum(one["none_of_these"] for one in answer["predictions"]) < 20
    covered = [str(label) in one["set"] for label, one in zip(digits[1][300:400], answer["predictions"], strict=True)]
    assert np.mean(covered) > 0.8
    assert predicted(service, model, NOISE)["none_of_these"] is True


def test_the_base_says_neither_and_without_coverage_there_are_no_sets(service: Service, digits_zip: bytes) -> None:
    assert set(predicted(service, "lenet5", NOISE)) == {"label", "probabilities"}
    spec = '{"epochs": 1, "coverage": null}'
    service.finished(service.finetune(digits_zip, "uncovered", spec).json()["id"])
    assert set(predicted(service, "uncovered", NOISE)) == {"label", "probabilities", "none_of_these"}


@pytest.mark.parametrize("coverage", ["0", "1", "-0.5", '"auto"'])
def test_a_coverage_that_is_no_share_is_refused(service: Service, digits_zip: bytes, coverage: str) -> None:
    answer = service.finetune(digits_zip, "refused", f'{{"coverage": {coverage}}}')
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "spec.coverage")


def test_the_distance_is_an_output_of_both_protocols(service: Service, model: str) -> None:
    image = np.zeros((28, 28, 1)).tolist()
    rest = service.api.post(f"/v1/models/{model}:predict", json={"instances": [image]}).json()
    assert set(rest["predictions"][0]) == {"logits", "probabilities", "distance"}
    metadata = service.api.get(f"/v1/models/{model}/metadata").json()["metadata"]["signature_def"]["signature_def"]
    assert metadata["serving_default"]["outputs"]["distance"]["tensor_shape"]["dim"] == [{"size": "-1", "name": ""}]
    tensor = {"name": "image", "shape": [1, 784], "datatype": "FP32", "data": [0.0] * 784}
    asked = {"inputs": [tensor], "outputs": [{"name": "distance"}]}
    (output,) = service.api.post(f"/v2/models/{model}/infer", json=asked).json()["outputs"]
    assert (output["name"], output["shape"]) == ("distance", [1])
    assert output["data"][0] == pytest.approx(rest["predictions"][0]["distance"], abs=1e-5)
    names = [one["name"] for one in service.api.get(f"/v2/models/{model}").json()["outputs"]]
    assert names == ["logits", "probabilities", "distance"]
    refused = service.api.post("/v2/models/lenet5/infer", json=asked)
    assert refused.status_code == 400
    assert "has no 'distance'" in refused.text
