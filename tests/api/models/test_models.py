import hashlib
import io
import tarfile
from urllib.parse import quote

import pytest

from core.tables.models import Model
from tests.api.inference_stub import InferenceStub
from tests.api.model_rows import add_model
from tests.api.serving import Api
from tests.api.test_errors import assert_error

FIRST, SECOND, THIRD = "ft:tiny:default:lamps:1", "ft:tiny:default:lamps:2", "ft:tiny:default:lamps:3"


def model_row(api: Api, model_id: str) -> Model:
    with api.database.reading() as session:
        return session.get_one(Model, model_id)


def test_base_model(api: Api) -> None:
    model = api.client.get("/v1/models/tiny").json()
    assert model == {
        "id": "tiny",
        "object": "model",
        "created": 0,
        "owned_by": "system",
        "parent": None,
        "root": "tiny",
        "base_model": "tiny",
        "job_id": None,
        "step": None,
        "lineage": [],
        "status": "not_prepared",
        "attestation": None,
    }
    directory = api.settings.base_models[0].directory(api.settings.cache_dir)
    directory.mkdir(parents=True)
    (directory / "prepared.json").write_text("{}")
    model = api.client.get("/v1/models/tiny").json()
    assert model["status"] == "servable"
    assert model["created"] > 1_700_000_000


def test_list_holds_base_and_servable_models(api_on_both: Api) -> None:
    api = api_on_both
    add_model(api, FIRST, created_at=1.0)
    add_model(api, SECOND, created_at=2.0)
    add_model(api, "ft:tiny:default:unverified:1", status="unverified")
    add_model(api, "ft:tiny:default:deleted:1", status="deleted")
    add_model(api, "ft:tiny:other:x:1", project_id=api.other_project_id)
    listed = api.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["tiny", SECOND, FIRST]
    assert [model["id"] for model in api.client.get("/v1/models", headers=api.other_headers).json()["data"]] == ["tiny", "ft:tiny:other:x:1"]


def test_tuned_model_with_its_lineage(api_on_both: Api) -> None:
    api = api_on_both
    add_model(api, FIRST, status="deleted")
    add_model(api, SECOND, parent=FIRST)
    third = add_model(api, THIRD, parent=SECOND, step=20, attestation={"largest_difference": 0.01})
    model = api.client.get(f"/v1/models/{THIRD}").json()
    assert model == {
        "id": THIRD,
        "object": "model",
        "created": int(third.created_at),
        "owned_by": api.project_id,
        "parent": SECOND,
        "root": "tiny",
        "base_model": "tiny",
        "job_id": third.job_id,
        "step": 20,
        "lineage": ["tiny", FIRST, SECOND],
        "status": "servable",
        "attestation": {"largest_difference": 0.01},
    }
    lineages = {model["id"]: model["lineage"] for model in api.client.get("/v1/models").json()["data"]}
    assert lineages == {"tiny": [], SECOND: ["tiny", FIRST], THIRD: ["tiny", FIRST, SECOND]}
    assert api.client.get(f"/v1/models/{SECOND}").json()["parent"] == FIRST


def test_unverified_model_can_be_looked_at(api: Api) -> None:
    add_model(api, FIRST, status="unverified", attestation={"largest_difference": 3.0})
    model = api.client.get(f"/v1/models/{FIRST}").json()
    assert (model["status"], model["attestation"]) == ("unverified", {"largest_difference": 3.0})


@pytest.mark.parametrize("name", ["unknown", "ft:tiny:default:lamps:9", "/models/tiny", "../tiny", FIRST])
def test_unknown_model(api: Api, name: str) -> None:
    add_model(api, FIRST, status="deleted")
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/adapter")):
        assert_error(api.client.request(method, f"/v1/models/{quote(name, safe='')}{path}"), 404, "model_not_found", "model")


def test_ids_are_percent_encoded(api: Api) -> None:
    name = "ft:tiny:a/b:adapter/adapter:1"
    add_model(api, name)
    for encoded in (quote(name, safe=""), quote(name)):
        assert api.client.get(f"/v1/models/{encoded}").json()["id"] == name
        assert api.client.get(f"/v1/models/{encoded}/adapter").status_code == 200


def test_adapter_is_a_peft_directory(api: Api) -> None:
    model = add_model(api, FIRST)
    answer = api.client.get(f"/v1/models/{FIRST}/adapter")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/gzip"
    assert answer.headers["x-sha256"] == hashlib.sha256(answer.content).hexdigest() == model.archive_sha256
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''ft-tiny-default-lamps-1.tar.gz"
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        assert archive.getnames() == ["adapter_config.json", "adapter_model.safetensors", "attestation.json"]
    part = api.client.get(f"/v1/models/{FIRST}/adapter?format=peft", headers={"range": "bytes=10-"})
    assert (part.status_code, part.content) == (206, answer.content[10:])
    assert part.headers["x-sha256"] == model.archive_sha256


def test_head_tells_the_hash_without_the_bytes(live_api: Api) -> None:
    api = live_api
    model = add_model(api, FIRST)
    answer, head = api.client.get(f"/v1/models/{FIRST}/adapter"), api.client.head(f"/v1/models/{FIRST}/adapter")
    assert head.headers["x-sha256"] == model.archive_sha256
    differing = {"x-request-id", "date"} | {name for name in head.headers if name.startswith("x-ratelimit")}
    assert (head.status_code, head.content) == (200, b"")
    assert {n: v for n, v in head.headers.items() if n not in differing} == {n: v for n, v in answer.headers.items() if n not in differing}
    assert api.client.head(f"/v1/models/{THIRD}/adapter").status_code == 404


def test_adapter_formats(api: Api) -> None:
    add_model(api, FIRST)
    assert_error(api.client.get(f"/v1/models/{FIRST}/adapter?format=zip"), 400, "literal_error", "format")
    assert_error(api.client.get("/v1/models/tiny/adapter"), 400, "base_model", "model")


def test_deleted_model_is_gone_everywhere(live_api: Api, inference: InferenceStub) -> None:
    api = live_api
    model = add_model(api, FIRST)
    served = api.settings.served_adapters_dir / model.serving_name
    served.mkdir(parents=True)
    (served / "adapter_config.json").write_text("{}")
    deleted = api.openai.models.delete(FIRST)
    assert (deleted.id, deleted.object, deleted.deleted) == (FIRST, "model", True)
    assert inference.unloaded == [model.serving_name]
    assert not served.exists()
    assert not api.state.storage.exists(model.storage_key)
    assert model_row(api, FIRST).status == "deleted"
    assert [model.id for model in api.openai.models.list()] == ["tiny"]
    assert_error(api.client.delete(f"/v1/models/{FIRST}"), 404, "model_not_found", "model")


def test_model_is_deleted_without_the_inference_server(api: Api) -> None:
    add_model(api, FIRST)
    assert api.client.delete(f"/v1/models/{FIRST}").status_code == 200
    assert model_row(api, FIRST).status == "deleted"


def test_base_model_cannot_be_deleted(api: Api) -> None:
    assert_error(api.client.delete("/v1/models/tiny"), 400, "base_model", "model")
    assert api.client.get("/v1/models/tiny").status_code == 200


def test_stock_client(live_api: Api) -> None:
    name = "ft:tiny:org/name:x:1"
    add_model(live_api, name)
    assert {model.id for model in live_api.openai.models.list()} == {"tiny", name}
    assert live_api.openai.models.retrieve(name).id == name
    assert live_api.openai.models.delete(name).deleted
