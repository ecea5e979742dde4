"""What a spec asks for and a report says, over HTTP against a running service."""

import io
import json

import numpy as np
import pytest

from tests.conftest import Service, npz, png, zipped

Digits = tuple[np.ndarray, np.ndarray]


@pytest.mark.slow
def test_the_costly_part_of_the_report_follows_and_the_page_shows_it(service: Service, digits_zip: bytes) -> None:
    done = service.finished(service.finetune(digits_zip, "reported", '{"epochs": 2}').json()["id"])
    assert done["report_status"] in ("quick", "complete")
    path = f"/models/reported/versions/{done['version']}"
    service.completed(done["id"])
    report = service.api.get(path).json()["report"]
    assert report["robustness"]["trusted"] in (True, False)
    assert report["forgetting"]["sample"] == "synthetic digits"
    page = service.api.get(f"{path}/report")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<svg" in page.text
    assert f"{report['validation']['accuracy']:.1%}"[:4] in page.text


def test_the_delta_can_be_downloaded(service: Service, digits_zip: bytes) -> None:
    done = service.finished(service.finetune(digits_zip, "delta", '{"epochs": 1}').json()["id"])
    answer = service.api.get(f"/models/delta/versions/{done['version']}/delta")
    with np.load(io.BytesIO(answer.content), allow_pickle=False) as file:
        card = json.loads(str(file["card"]))
        assert file["conv2/lora_a"].shape == (150, 4)
    assert card["manifest"]["base_sha256"] == service.api.get("/models/lenet5/versions/1").json()["manifest"]["sha256"]
    none = service.api.get("/models/lenet5/versions/1/delta")
    assert (none.status_code, none.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("part", ["", "/report", "/delta"])
def test_a_version_that_is_not_there_has_no_parts(service: Service, part: str) -> None:
    for path in ("/models/lenet5/versions/99", "/models/nobody/versions/1"):
        answer = service.api.get(path + part)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_model")


@pytest.mark.slow
def test_a_validation_upload_is_what_is_measured_on(service: Service, digits: Digits) -> None:
    images, labels = digits
    train = npz(images=images[:100], labels=labels[:100])
    apart = npz(images=images[300:340], labels=labels[300:340])
    files = {"data": ("train.npz", train), "validation": ("apart.npz", apart)}
    answer = service.api.post("/finetune", files=files, data={"model": "apart", "spec": '{"epochs": 2}'})
    assert answer.status_code == 202, answer.text
    assert answer.json()["dataset"]["validation"]["images"] == 40
    done = service.finished(answer.json()["id"])
    report = service.api.get(f"/models/apart/versions/{done['version']}").json()["report"]
    assert (report["train"]["images"], report["validation"]["images"]) == (100, 40)


@pytest.mark.slow
def test_train_val_and_test_folders_are_trained_on_validated_on_and_scored_apart(
    service: Service, digits: Digits
) -> None:
    images, labels = digits
    of_part = {"train": range(100), "val": range(300, 340), "test": range(400, 480)}
    content = zipped({f"{top}/{labels[i]}/{i}.png": png(images[i]) for top, some in of_part.items() for i in some})
    files, fields = {"data": ("parts.zip", content)}, {"model": "parts", "spec": '{"epochs": 2, "method": "head"}'}
    dry = service.api.post("/finetune", files=files, data={**fields, "dry_run": "true"}).json()
    answer = service.api.post("/finetune", files=files, data=fields)
    assert answer.status_code == 202, answer.text
    dataset = answer.json()["dataset"]
    assert dry["dataset"] == dataset
    assert [part["images"] for part in (dataset, dataset["validation"], dataset["test"])] == [100, 40, 80]
    done = service.finished(answer.json()["id"])
    report = service.api.get(f"/models/parts/versions/{done['version']}").json()["report"]
    assert [report[part]["images"] for part in ("train", "validation", "test")] == [100, 40, 80]
    unseen = np.stack([images[i] for i in of_part["test"]]).tolist()
    predicted = service.api.post("/predict", json={"model": "parts", "range": "byte", "instances": unseen}).json()
    right = [one["label"] == str(labels[i]) for one, i in zip(predicted["predictions"], of_part["test"], strict=True)]
    assert report["test"]["accuracy"] == pytest.approx(np.mean(right))
    low, high = report["test"]["accuracy_interval"]
    assert low < report["test"]["accuracy"] < high
    assert 0 < report["test"]["expected_calibration_error"] < 1
    assert report["test"]["cross_entropy"] > 0
    page = service.api.get(f"/models/parts/versions/{done['version']}/report").text
    assert "Test accuracy" in page


@pytest.mark.slow
def test_a_test_part_leaves_the_report_out_of_fold_and_no_one_looks_at_it(service: Service, digits: Digits) -> None:
    """The same training images give the same weights, whatever there is to test on."""
    images, labels = digits
    hashes = []
    for first in (200, 300):
        some = {"train": range(60), "test": range(first, first + 30)}
        content = zipped({f"{top}/{labels[i]}/{i}.png": png(images[i]) for top, of in some.items() for i in of})
        spec = '{"epochs": 2, "method": "head", "folds": 2, "validation_split": 0}'
        done = service.finished(service.finetune(content, "untouched", spec).json()["id"])
        version = service.api.get(f"/models/untouched/versions/{done['version']}").json()
        hashes.append(version["manifest"]["sha256"])
        assert version["report"]["validation"]["out_of_fold"]
        assert (version["report"]["train"]["images"], version["report"]["test"]["images"]) == (60, 30)
    assert hashes[0] == hashes[1]


@pytest.mark.slow
def test_validation_images_are_given_once_and_have_no_parts(service: Service, digits: Digits) -> None:
    images, labels = digits
    parts = zipped({
        f"{top}/{labels[i]}/{i}.png": png(images[i])
        for top, at in (("train", 0), ("val", 300)) for i in range(at, at + 60)
    })  # fmt: skip
    apart = npz(images=images[500:540], labels=labels[500:540])
    kept = {name: service.api.post("/datasets", files={"data": body}).json()["id"] for name, body in (
        ("parts", parts), ("apart", apart))}  # fmt: skip
    cases: list[tuple[dict[str, bytes], dict[str, str], str]] = [
        ({"data": parts, "validation": apart}, {}, "validation"),
        ({"data": parts}, {"validation_dataset": kept["apart"]}, "validation_dataset"),
        ({}, {"dataset": kept["parts"], "validation_dataset": kept["apart"]}, "validation_dataset"),
        ({"data": apart, "validation": parts}, {}, "validation"),
        ({"data": apart}, {"validation_dataset": kept["parts"]}, "validation_dataset"),
    ]
    for files, fields, param in cases:
        answer = service.api.post("/finetune", files=files, data={"model": "twice", "dry_run": "true", **fields})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (422, "invalid_dataset", param), answer.text
    for file, apart_file in ((kept["parts"], kept["apart"]), (kept["apart"], kept["parts"])):
        wanted = {"model": "lenet5", "training_file": file, "validation_file": apart_file}
        error = service.api.post("/openai/v1/fine_tuning/jobs", json=wanted).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_dataset", "validation_file")
    taken = service.api.post("/finetune", data={"model": "twice", "dry_run": "true", "dataset": kept["parts"]})
    assert taken.json()["dataset"]["validation"]["images"] == 60
    for name in kept.values():
        assert service.api.delete(f"/datasets/{name}").status_code == 200


@pytest.mark.slow
def test_validation_images_of_unknown_classes_are_refused(service: Service, digits: Digits) -> None:
    images, labels = digits
    train = npz(images=images[:100], labels=labels[:100])
    files = {"data": ("train.npz", train), "validation": ("apart.npz", npz(images=images[:3], labels=["0", "x", "y"]))}
    answer = service.api.post("/finetune", files=files, data={"model": "apart"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, "invalid_dataset", "validation")
    assert [detail["class"] for detail in error["details"]] == ["x", "y"]
    kept = sorted((service.home / "datasets").iterdir())
    files["validation"] = files["data"]
    error = service.api.post("/finetune", files=files, data={"model": "apart"}).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_dataset", "validation")
    assert sorted((service.home / "datasets").iterdir()) == kept
    assert [path.name for path in (service.home / "staging").rglob("*") if path.is_file()] == ["lock"]
    files["validation"] = ("apart.npz", b"junk")
    error = service.api.post("/finetune", files=files, data={"model": "apart"}).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_dataset", "validation")


def test_a_spec_that_the_data_do_not_allow_is_refused_at_upload(service: Service, digits: Digits) -> None:
    images, labels = digits
    lonely = npz(images=images[:23], labels=[0] * 20 + [1] * 3)
    many = npz(images=images[:300], labels=labels[:300])
    for data, spec, field in (
        (lonely, '{"validation_split": 0.1}', "spec.validation_split"), (lonely, '{"folds": 5}', "spec.folds"),
        (many, '{"adversarial": {"attack": "free", "replays": 1}}', "spec.adversarial.replays"),
    ):  # fmt: skip
        answer = service.finetune(data, "refused", spec)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (422, "invalid_spec", field)


@pytest.mark.slow
def test_five_folds_estimate_from_every_image(service: Service, digits: Digits) -> None:
    images, labels = digits
    spec = '{"folds": 5, "method": "head", "epochs": 3}'
    upload = npz(images=images[:150], labels=labels[:150])
    done = service.finished(service.finetune(upload, "folded", spec).json()["id"])
    assert done["status"] == "succeeded", done["error"]
    across = service.api.get("/models/folded/versions/1").json()["report"]["cross_validation"]
    assert (len(across["folds"]), across["images"]) == (5, 150)
    low, high = across["accuracy_interval"]
    assert low < across["accuracy"] < high


@pytest.mark.exhaustive
def test_an_adapter_version_is_served_and_can_be_continued(service: Service, digits_zip: bytes) -> None:
    grown = service.finished(service.finetune(digits_zip, "grown", '{"method": "adapter", "epochs": 3}').json()["id"])
    assert grown["status"] == "succeeded", grown["error"]
    for method in ("adapter", "lora"):
        spec = json.dumps({"method": method, "base": "grown", "epochs": 1})
        more = service.finished(service.finetune(digits_zip, f"grown-{method}", spec).json()["id"])
        assert more["status"] == "succeeded", more["error"]
    other = json.dumps({"method": "adapter", "adapter": {"bottleneck": 4}, "base": "grown"})
    error = service.finetune(digits_zip, "grown-other", other).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_spec", "spec.adapter.bottleneck")
