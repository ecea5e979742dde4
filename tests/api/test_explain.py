"""POST /explain, as a client sees it."""

import asyncio
import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from api.inference.explanations import MAX_WAITING, Explanations
from api.inference.neighbours import Neighbours
from api.inference.router import Servable
from api.inference.server_pool import ServerPool
from api.inference.service import Prediction
from serving.registry import Registry
from store.engine import connect
from store.errors import ModelServerUnavailable, Overloaded
from store.settings import Settings
from tests.conftest import Service, npz, png

Digits = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def model(service: Service, digits: Digits) -> str:
    upload = {"data": npz(images=digits[0][:120], labels=digits[1][:120])}
    form = {"model": "explained", "spec": json.dumps({"method": "head", "epochs": 2})}
    answer = service.api.post("/finetune", files=upload, data=form)
    assert service.finished(answer.json()["id"])["status"] == "succeeded"
    return "explained"


def test_an_answer_is_explained_in_numbers_that_add_up(service: Service, model: str, digits: Digits) -> None:
    body = {"model": model, "range": "byte", "instances": digits[0][:2].tolist()}
    found = service.api.post("/explain", json=body).json()
    plain = service.api.post("/predict", json=body).json()
    for explained, predicted, image in zip(found["predictions"], plain["predictions"], digits[0], strict=False):
        explanation = explained.pop("explanation")
        assert explained["label"] == predicted["label"] == explanation["class"]
        np.testing.assert_allclose(np.array(explanation["image"]), image / 255, atol=1e-6)
        gradients = explanation["integrated_gradients"]
        gained = gradients["logit"] - gradients["baseline_logit"]
        assert np.sum(gradients["picture"]) == pytest.approx(gained, rel=0.02, abs=0.05)
        path, stability = explanation["adversarial"], explanation["stability"]
        assert (path[0]["epsilon"], path[0]["label"], path[-1]["epsilon"]) == (0, predicted["label"], 0.5)
        fallen = [one["epsilon"] for one in path if one["label"] != predicted["label"]]
        assert fallen[0] - 0.5 / 32 - 1e-6 <= stability["epsilon"] <= fallen[0] + 1e-6
        assert stability["label"] != predicted["label"]
        moved = [np.abs(np.array(one["image"]) - np.array(explanation["image"])).max() for one in path]
        assert all(distance <= one["epsilon"] + 1e-5 for distance, one in zip(moved, path, strict=True))
        assert explanation["nearest"][0]["distance"] == pytest.approx(0, abs=1e-2)  # it was trained on this image
        np.testing.assert_allclose(np.array(explanation["nearest"][0]["image"]), image / 255, atol=1e-6)


def test_pictures_may_be_png_and_predict_explains_as_well(service: Service, model: str, digits: Digits) -> None:
    query = {"model": model, "explain": "true", "pictures": "png", "class": "3"}
    headers = {"Content-Type": "image/png"}
    answer = service.api.post("/predict", params=query, content=png(digits[0][0]), headers=headers)
    explanation = answer.json()["predictions"][0]["explanation"]
    assert explanation["class"] == "3"
    sources = [explanation["image"], explanation["smooth_grad"], explanation["integrated_gradients"]["picture"]]
    sources += [one["image"] for one in (*explanation["adversarial"], *explanation["nearest"])]
    pictures = [Image.open(io.BytesIO(base64.b64decode(one.removeprefix("data:image/png;base64,")))) for one in sources]
    assert {picture.size for picture in pictures} == {(28, 28)}
    assert pictures[2].mode == "RGB"
    np.testing.assert_array_equal(np.asarray(pictures[0]), digits[0][0])


def test_what_is_not_there_is_said(service: Service, model: str, digits: Digits) -> None:
    images = digits[0][:17].tolist()
    many = service.api.post("/explain", json={"model": model, "range": "byte", "instances": images})
    assert (many.status_code, many.json()["error"]["param"]) == (413, "body")
    one = {"model": model, "range": "byte", "instances": images[:1]}
    strange = service.api.post("/explain", json={**one, "class": "zebra"})
    assert (strange.status_code, strange.json()["error"]["param"]) == (422, "class")
    assert "'zebra' is not a class of explained:1" in strange.json()["error"]["message"]
    absent = service.api.post("/explain", json={**one, "model": "nobody"})
    assert absent.status_code == 404
    base = service.api.post("/explain", json={**one, "model": "lenet5"}).json()["predictions"][0]["explanation"]
    assert (base["nearest"], base["nearest_reason"]) == (None, "it was not fine-tuned")


def test_explanations_do_not_hold_up_predictions(service: Service, model: str, digits: Digits) -> None:
    body = {"model": model, "range": "byte", "instances": digits[0][:6].tolist()}
    one = {**body, "instances": body["instances"][:1]}
    with ThreadPoolExecutor(2) as clients:
        asked = [clients.submit(service.api.post, "/explain", json=body, timeout=120) for _ in range(2)]
        predicted = 0
        while not all(each.done() for each in asked):
            assert service.api.post("/predict", json=one).status_code == 200
            predicted += 1
    assert [each.result().status_code for each in asked] == [200, 200]
    assert predicted > 3


def test_so_many_explanations_may_wait_and_no_more(tmp_path: Path) -> None:
    pool = ServerPool([], lambda *_: True)
    registry = Registry(connect(f"sqlite:///{tmp_path / 'temper.db'}"))
    explanations = Explanations(pool, Neighbours(Settings(home=tmp_path), registry, pool))
    found = Prediction("m", 1, Servable("m", 1), ("0", "1"), {})
    images = np.zeros((16, 784), np.uint8)

    async def many() -> list[BaseException | list[dict[str, Any]]]:
        calls = (explanations.explain(found, images, None, "numbers") for _ in range(MAX_WAITING // 16 + 1))
        return await asyncio.gather(*calls, return_exceptions=True)

    *asked, refused = asyncio.run(many())
    assert isinstance(refused, Overloaded)
    assert {type(each) for each in asked} == {ModelServerUnavailable}  # there is no server to ask
