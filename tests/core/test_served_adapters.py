import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from core.archives import store_directory
from core.errors import InferenceFailed
from core.inference_client import InferenceClient
from core.inference_servers import InferenceServers
from core.served_adapters import load_proved, remove_from_servers, sent_to_servers
from core.settings import Settings
from core.storage import LocalStorage, ObjectDamaged
from core.tables.models import Model
from sdft_engine.contract.sealed_directory import ADAPTER_WEIGHTS_NAME
from tests.fixtures.scripted_inference import ScriptedInference
from tests.fixtures.scripted_model import logps, write_adapter

PROBE = [1, 2, 3]


@dataclass
class Verdict:
    reason: str | None = None


def load(model: Model, storage: LocalStorage, settings: Settings, client: InferenceClient) -> Verdict:
    """As the adapter 7 of the base model `tiny` has to answer."""

    def compare(directory: Path, score_adapter: Any, score_base: Any, dtype: str | None, tolerance: float) -> Verdict:
        assert (directory.name, dtype, tolerance, score_base(PROBE)) == (model.serving_name, None, 0.05, logps(None, PROBE))
        return Verdict(None if score_adapter(PROBE) == logps(7, PROBE) else "it differs")

    model.base_model = "tiny"
    return load_proved(model, storage, settings.served_adapters_dir, client, compare, 0.05)


def stored_model(storage: LocalStorage, tmp_path: Path) -> Model:
    """With the adapter 7, whose files are in `tmp_path` / adapter as well."""
    adapter_dir = tmp_path / "adapter"
    adapter_dir.mkdir()
    write_adapter(adapter_dir, 7)
    stored = store_directory(storage, "adapters/1.tar.gz", adapter_dir, tmp_path)
    return Model(id="ft:tiny:default::1", serving_name="serving-1", storage_key=stored.key, archive_sha256=stored.sha256)


def test_adapter_is_unpacked_where_the_server_reads_it_and_loaded_again_after_a_restart(settings: Settings, tmp_path: Path) -> None:
    storage = LocalStorage(settings.storage_dir)
    model = stored_model(storage, tmp_path)
    for _ in range(2):  # the second time its directory is there, and the server has forgotten it
        server = ScriptedInference("tiny")
        server.start()
        client = InferenceClient(server.url, settings)
        load(model, storage, settings, client)
        assert server.adapters == {"serving-1": 7}
        server.stop()
    assert (settings.served_adapters_dir / "serving-1").is_dir()


def test_unpacked_weights_that_are_not_the_verified_ones_are_unpacked_again(settings: Settings, tmp_path: Path) -> None:
    storage = LocalStorage(settings.storage_dir)
    adapter_dir = tmp_path / "adapter"
    adapter_dir.mkdir()
    write_adapter(adapter_dir, 7)
    stored = store_directory(storage, "adapters/1.tar.gz", adapter_dir, tmp_path)
    attestation = {"weights_sha256": hashlib.sha256((adapter_dir / ADAPTER_WEIGHTS_NAME).read_bytes()).hexdigest()}
    model = Model(id="ft:tiny:default::1", serving_name="serving-1", storage_key=stored.key, archive_sha256=stored.sha256, attestation=attestation)
    weights = settings.served_adapters_dir / "serving-1" / ADAPTER_WEIGHTS_NAME
    server = ScriptedInference("tiny")
    server.start()
    client = InferenceClient(server.url, settings)
    for damage in (lambda: None, lambda: weights.write_text("8"), lambda: weights.unlink()):
        damage()
        load(model, storage, settings, client)
        assert server.adapters == {"serving-1": 7}
    storage.delete(stored.key)
    load(model, storage, settings, client)  # what is whole is not fetched again
    weights.write_text("8")
    with pytest.raises(FileNotFoundError):
        load(model, storage, settings, client)
    server.stop()


def test_damaged_archive_never_reaches_the_server(settings: Settings, tmp_path: Path) -> None:
    storage = LocalStorage(settings.storage_dir)
    writer = storage.open_writer("adapters/1.tar.gz")
    writer.write(b"other bytes")
    writer.commit()
    model = Model(id="ft:tiny:default::1", serving_name="serving-1", storage_key="adapters/1.tar.gz", archive_sha256="0" * 64)
    with pytest.raises(ObjectDamaged):
        load(model, storage, settings, InferenceClient("http://127.0.0.1:1", settings))


@pytest.mark.parametrize("reachable", [True, False])
def test_adapter_is_removed_whether_the_server_answers_or_not(settings: Settings, reachable: bool) -> None:
    server = ScriptedInference("tiny")
    server.start()
    server.adapters["serving-1"] = 7
    url = server.url if reachable else "http://127.0.0.1:1"
    client = InferenceServers(settings.model_copy(update={"inference_urls": [url]}))
    unpacked = settings.served_adapters_dir / "serving-1"
    unpacked.mkdir(parents=True)
    (unpacked / "adapter_config.json").write_text("{}")
    for _ in range(2):
        remove_from_servers(Model(id="ft:tiny:default::1", serving_name="serving-1"), settings.served_adapters_dir, client)
        assert not unpacked.exists()
        assert server.adapters == ({} if reachable else {"serving-1": 7})
    server.stop()


@pytest.mark.parametrize("trouble", ["differs", "breaks"])
def test_a_server_that_did_not_prove_itself_never_has_the_serving_name(settings: Settings, tmp_path: Path, trouble: str) -> None:
    """Whoever else asks meanwhile, or after a crash, gets a 404 and has it proved."""
    storage = LocalStorage(settings.storage_dir)
    model = stored_model(storage, tmp_path)
    server = ScriptedInference("tiny")
    server.start()
    client = InferenceClient(server.url, settings)
    if trouble == "differs":
        server.ignores_adapters = True
        assert load(model, storage, settings, client).reason == "it differs"
    else:
        server.breaks_scores = True
        with pytest.raises(InferenceFailed):
            load(model, storage, settings, client)
    assert server.adapters == {}
    assert len(server.ever_loaded) == 1
    assert server.ever_loaded[0].startswith("serving-1-")
    server.ignores_adapters = server.breaks_scores = False
    assert load(model, storage, settings, client).reason is None
    assert server.adapters == {"serving-1": 7}
    assert len(set(server.ever_loaded)) == 3, "every trial has a name of its own"
    server.stop()


def test_a_server_that_sees_no_disk_of_ours_is_sent_the_adapter(make_settings: Callable[..., Settings], tmp_path: Path) -> None:
    """Once for both names, and nothing stays here, where nobody would hear of the model's end."""
    settings = make_settings(inference_adapters="upload")
    storage = LocalStorage(settings.storage_dir)
    model = stored_model(storage, tmp_path)
    server = ScriptedInference("tiny")
    server.start()
    server.sent.taken = True
    servers = InferenceServers(settings.model_copy(update={"inference_urls": [server.url]}))
    for _ in range(2):
        assert load(model, storage, settings, servers.clients[0]).reason is None
        assert (server.adapters, server.sent.names(), sent_to_servers(servers)) == ({"serving-1": 7}, ["serving-1"], {"serving-1"})
        assert list(settings.served_adapters_dir.iterdir()) == []
    server.sent.taken = False
    with pytest.raises(InferenceFailed, match="SDFT_INFERENCE_ADAPTERS=shared"):
        load(model, storage, settings, servers.clients[0])
    assert sent_to_servers(servers) == set(), "it does not say"
    server.sent.taken = True
    for _ in range(2):
        remove_from_servers(model, settings.served_adapters_dir, servers)
        assert (server.adapters, server.sent.names()) == ({}, [])
    server.stop()


def test_what_is_loaded_anew_while_it_is_removed_keeps_its_files(settings: Settings, tmp_path: Path) -> None:
    """A gateway that was told of a 404 by the first server, while the second one hesitates."""
    storage = LocalStorage(settings.storage_dir)
    model = stored_model(storage, tmp_path)
    servers = [ScriptedInference("tiny"), ScriptedInference("tiny")]
    for server in servers:
        server.start()
    clients = InferenceServers(settings.model_copy(update={"inference_urls": [server.url for server in servers]}))
    for client in clients.clients:
        load(model, storage, settings, client)
    second = clients.clients[1]
    remove = second.remove_adapter

    def hesitate(name: str) -> None:
        load(model, storage, settings, clients.clients[0])
        remove(name)

    second.remove_adapter = hesitate  # type: ignore[method-assign]
    remove_from_servers(model, settings.served_adapters_dir, clients)
    assert [server.adapters for server in servers] == [{"serving-1": 7}, {}]
    assert (settings.served_adapters_dir / "serving-1" / ADAPTER_WEIGHTS_NAME).exists()
    assert [path.name for path in settings.served_adapters_dir.iterdir()] == ["serving-1"]
    for server in servers:
        server.stop()
