"""From a model's row to the adapter that an inference server has loaded, and back.

A server that has an adapter under its serving name has proved that it answers as the trainer measured: every adapter is loaded under
a name that nobody knows first, compared, and only then under its own. So no restart of ours and no second API process can meet an
adapter that was loaded and never proved.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, TypeVar

from core.archives import fetch_directory
from core.errors import InferenceFailed, InferenceUnavailable
from core.ids import new_token
from core.inference_client import AdapterRefused, InferenceClient
from core.inference_servers import InferenceServers
from core.logging import get_logger
from core.storage import Storage
from core.tables.models import Model

WEIGHTS_NAME = "adapter_model.safetensors"
"""PEFT's name."""

log = get_logger(__name__)


class Verdict(Protocol):
    @property
    def reason(self) -> str | None:
        """None where the server proved itself."""


V = TypeVar("V", bound=Verdict)
Score = Callable[[list[int]], list[float]]
Compare = Callable[[Path, Score, Score, str | None, float], V]
"""sdft_engine.contract.served_attestation.compare_served, which this room can't name."""


def load_proved(model: Model, storage: Storage, served_adapters_dir: Path, client: InferenceClient, compare: "Compare[V]", tolerance: float) -> V:
    """Have the model's adapter loaded under its serving name, if the server proves under another name first that it serves what was
    trained. `tolerance` in nats. Returns the verdict.

    Raises ObjectDamaged, FileNotFoundError (not in storage any more), StorageUnavailable, StorageFull, InferenceUnavailable,
    InferenceFailed, or AdapterRefused with the server's reason.
    """
    trial = f"{model.serving_name}-{new_token()[:12]}"
    with _at_hand(model, storage, served_adapters_dir, stays=not client.sends_files) as directory:
        path = client.place_adapter(directory)
        try:
            client.load_adapter(trial, path)
            score = client.prompt_logprobs
            verdict = compare(directory, partial(score, trial), partial(score, model.base_model), client.served_dtype(model.base_model), tolerance)
        finally:
            with suppress(AdapterRefused, InferenceUnavailable, InferenceFailed):  # it only takes memory: nobody knows the name
                client.unload_adapter(trial)
    if verdict.reason is None:
        client.load_adapter(model.serving_name, path)
    return verdict


def remove_from_servers(model: Model, served_adapters_dir: Path, servers: InferenceServers) -> None:
    """Have the model's adapter unloaded everywhere, and remove its files here and there. Idempotent; whoever needs it loads it again.

    It only frees memory and disk, so a server that is away or refuses is no error.
    """
    unload_and_remove(served_adapters_dir / model.serving_name, servers)


def unload_and_remove(directory: Path, servers: InferenceServers) -> None:
    """The same for an unpacked adapter, which is served under its directory's name. Its files stay where a server has it again by then:
    somebody had it loaded while another server was told."""
    told: list[InferenceClient] = []
    for client in servers.clients:
        try:
            client.remove_adapter(directory.name)
            told.append(client)
        except (InferenceUnavailable, InferenceFailed, AdapterRefused) as error:
            log.warning("adapter_not_unloaded", name=directory.name, server=client.url, error=str(error))
    if directory.exists() and not any(_serves(client, directory.name) for client in told):
        shutil.rmtree(directory, ignore_errors=True)


def _serves(client: InferenceClient, name: str) -> bool:
    try:
        return name in client.served_names()
    except (InferenceUnavailable, InferenceFailed):  # it needs no files now, and unpacks them anew when it is asked to load
        return False


def sent_to_servers(servers: InferenceServers) -> set[str]:
    """The names of the adapters that servers were sent and have not been told to remove: what no directory of this machine tells. Those
    of a server that can't be asked are left out."""
    names: set[str] = set()
    for client in servers.clients:
        try:
            names |= client.sent_names()
        except (InferenceUnavailable, InferenceFailed) as error:
            log.warning("sent_adapters_unknown", server=client.url, error=str(error))
    return names


@contextmanager
def _at_hand(model: Model, storage: Storage, served_adapters_dir: Path, *, stays: bool) -> Iterator[Path]:
    """The model's adapter, unpacked. It stays where inference servers read it; what is sent to them is not needed here any more, and
    other machines would not know of it when the model is deleted."""
    if stays:
        yield _unpacked(model, storage, served_adapters_dir)
        return
    served_adapters_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{model.serving_name}.", dir=served_adapters_dir) as temporary:
        yield fetch_directory(storage, model.storage_key, model.archive_sha256, Path(temporary) / model.serving_name)


def _unpacked(model: Model, storage: Storage, served_adapters_dir: Path) -> Path:
    """The model's adapter where the inference servers read it. Where it was unpacked before, and its weights are no longer those that
    were verified, it is unpacked again."""
    directory = served_adapters_dir / model.serving_name
    if directory.exists() and not _holds_verified_weights(directory, model):
        log.error("served_adapter_damaged", model=model.id, directory=str(directory))
        shutil.rmtree(directory, ignore_errors=True)
    fetch_directory(storage, model.storage_key, model.archive_sha256, directory)
    return directory


def _holds_verified_weights(directory: Path, model: Model) -> bool:
    """Also True for a model that was not verified yet: nothing says what its weights should be."""
    verified: str | None = (model.attestation or {}).get("weights_sha256")
    if verified is None:
        return True
    try:
        with (directory / WEIGHTS_NAME).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == verified
    except FileNotFoundError:
        return False
