"""A model is proved on every inference server that can be reached."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.archives import store_directory
from core.database import Database
from core.errors import InferenceUnavailable
from core.settings import Settings
from core.tables.models import Model
from sdft_engine.contract.run_directory import Attestation, AttestationProbe
from sdft_engine.contract.sealed_directory import file_sha256
from tests.fixtures.scripted_inference import ScriptedInference
from tests.fixtures.scripted_model import logps, write_adapter
from tests.worker.conftest import Workshop, workshop_of
from worker.comparison import prove_on_servers

AWAY = "http://127.0.0.1:9"
PROBE = [1, 2, 3, 4]


@pytest.fixture
def second() -> Iterator[ScriptedInference]:
    server = ScriptedInference("tiny")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def make_workshop(worker_settings: Callable[..., Settings], sqlite_database: Database, tmp_path: Path) -> Callable[..., Workshop]:
    def make(*urls: str) -> Workshop:
        return workshop_of(worker_settings(inference_urls=list(urls)), sqlite_database, tmp_path)

    return make


def stored_model(workshop: Workshop, tmp_path: Path) -> Model:
    adapter_dir = tmp_path / "adapter"
    adapter_dir.mkdir()
    write_adapter(adapter_dir, 7)
    probe = AttestationProbe(token_ids=PROBE, adapter_logps=logps(7, PROBE), base_logps=logps(None, PROBE))
    (adapter_dir / "attestation.json").write_text(Attestation(dtype="float32", probes=[probe]).model_dump_json())
    stored = store_directory(workshop.resources.storage, "models/1.tar.gz", adapter_dir, tmp_path)
    return Model(id="ft:tiny:default::1", base_model="tiny", serving_name="served", storage_key=stored.key, archive_sha256=stored.sha256)


def test_every_server_loads_it_and_the_record_says_what_was_compared(
    make_workshop: Callable[..., Workshop], inference: ScriptedInference, second: ScriptedInference, tmp_path: Path, tiny_model_dir: Path
) -> None:
    workshop = make_workshop(inference.url, second.url)
    model = stored_model(workshop, tmp_path)
    verdict = prove_on_servers(workshop.resources, model)
    assert verdict.reason is None
    assert inference.adapters == second.adapters == {"served": 7}
    record = verdict.record
    assert (record["servers"], record["matched"], record["base_model"], record["archive_sha256"]) == (2, True, "tiny", model.archive_sha256)
    assert (record["base_source"], record["base_revision"]) == (str(tiny_model_dir), None)
    assert record["chat_template_sha256"] == file_sha256(tiny_model_dir / "chat_template.jinja")


def test_one_server_that_differs_or_fails_keeps_no_other_from_answering(
    make_workshop: Callable[..., Workshop], inference: ScriptedInference, second: ScriptedInference, tmp_path: Path
) -> None:
    workshop = make_workshop(inference.url, second.url)
    model = stored_model(workshop, tmp_path)
    second.ignores_adapters = True
    verdict = prove_on_servers(workshop.resources, model)
    assert (verdict.reason, verdict.record["matched"], verdict.record["servers"]) == (None, True, 1)
    assert (inference.adapters, second.adapters) == ({"served": 7}, {})
    second.breaks_scores = True
    assert prove_on_servers(workshop.resources, model).record["servers"] == 1


def test_where_all_differ_the_model_is_not_proved(
    make_workshop: Callable[..., Workshop], inference: ScriptedInference, second: ScriptedInference, tmp_path: Path
) -> None:
    inference.ignores_adapters = second.ignores_adapters = True
    workshop = make_workshop(inference.url, second.url)
    verdict = prove_on_servers(workshop.resources, stored_model(workshop, tmp_path))
    assert verdict.reason == "the inference server answers as if the adapter were not applied"
    assert (verdict.record["matched"], verdict.record["servers"]) == (False, 0)


def test_a_server_that_is_away_is_left_out(make_workshop: Callable[..., Workshop], inference: ScriptedInference, tmp_path: Path) -> None:
    workshop = make_workshop(AWAY, inference.url)
    verdict = prove_on_servers(workshop.resources, stored_model(workshop, tmp_path))
    assert (verdict.reason, verdict.record["servers"]) == (None, 1)


def test_where_none_can_be_reached_nothing_is_proved(make_workshop: Callable[..., Workshop], tmp_path: Path) -> None:
    workshop = make_workshop(AWAY, "http://127.0.0.1:10")
    with pytest.raises(InferenceUnavailable):
        prove_on_servers(workshop.resources, stored_model(workshop, tmp_path))
