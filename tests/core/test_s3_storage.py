"""A bucket on bad days: what is retried, what is said in the end, and that nothing is left or believed that is not there."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.errors import StorageFull, StorageUnavailable
from core.object_storage import open_storage
from core.s3_storage import S3Storage
from core.settings import Settings
from core.storage import LocalStorage, ObjectDamaged
from tests.fixtures.faulty_proxy import EVERY, Fault, FaultyProxy, completions, parts, reads, uploads
from tests.fixtures.s3_server import SHORT, Bucket

PART = 5 << 20
"""The smallest that S3 takes."""
LARGE = os.urandom(1 << 20) * 12
SMALL = os.urandom(100_000)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.s3_storage.PART_BYTES", PART)


HASTY = replace(SHORT, request_seconds=3)
"""For servers that hang."""


@pytest.fixture
def storage(bucket: Bucket, proxy: FaultyProxy) -> S3Storage:
    return bucket.storage(proxy.url)


def write(storage: S3Storage, content: bytes, key: str = "files/a") -> None:
    writer = storage.open_writer(key)
    try:
        for start in range(0, len(content), 1 << 18):
            writer.write(content[start : start + (1 << 18)])
        writer.commit()
    finally:
        writer.abort()


def read(storage: S3Storage, key: str = "files/a") -> bytes:
    return b"".join(storage.read(key))


def test_a_large_object_is_uploaded_while_it_is_written(bucket: Bucket) -> None:
    storage = bucket.storage()
    writer = storage.open_writer("files/a")
    for start in range(0, len(LARGE), PART):
        writer.write(LARGE[start : start + PART])
    assert bucket.unfinished_uploads() == ["some/prefix/files/a"]
    assert not storage.exists("files/a")
    assert writer.commit().size_bytes == len(LARGE)
    assert bucket.unfinished_uploads() == []
    assert read(storage) == LARGE


def test_an_abort_leaves_no_unfinished_upload(bucket: Bucket) -> None:
    writer = bucket.storage().open_writer("files/a")
    writer.write(LARGE)
    assert bucket.unfinished_uploads() == ["some/prefix/files/a"]
    writer.abort()
    writer.abort()
    assert (bucket.unfinished_uploads(), bucket.keys()) == ([], [])


def test_keys_lie_under_the_prefix(bucket: Bucket) -> None:
    write(bucket.storage(), SMALL, "files/a")
    assert bucket.keys() == ["files/a"]
    assert [listed.key for page in bucket.storage().list_objects("files") for listed in page] == ["files/a"]


ONCE_OR_TWICE = [
    Fault("status", times=3, status=500),
    Fault("status", times=2, status=503),
    Fault("status", times=1, status=429),
    Fault("hang", times=1),
    Fault("cut_request", times=2, after_bytes=1000),
    Fault("lost_answer", times=1),
]


@pytest.mark.parametrize("fault", ONCE_OR_TWICE, ids=lambda fault: f"{fault.kind}-{fault.status}")
@pytest.mark.parametrize(("content", "meant"), [(SMALL, uploads), (LARGE, parts), (LARGE, completions)], ids=["object", "part", "completion"])
def test_a_failure_that_passes_is_not_noticed_by_a_writer(bucket: Bucket, proxy: FaultyProxy, content: bytes, meant: object, fault: Fault) -> None:
    storage = bucket.storage(proxy.url, HASTY if fault.kind == "hang" else SHORT)
    proxy.faults = [Fault(fault.kind, fault.times, meant, fault.status, after_bytes=fault.after_bytes)]  # type: ignore[arg-type]
    write(storage, content)
    assert proxy.faults[0].times == 0
    assert read(bucket.storage()) == content
    assert bucket.unfinished_uploads() == []


@pytest.mark.parametrize("meant", [uploads, parts, completions])
@pytest.mark.parametrize("kind", ["status", "cut_request", "hang"])
def test_a_failure_that_stays_is_said_and_leaves_nothing(bucket: Bucket, proxy: FaultyProxy, kind: str, meant: object) -> None:
    storage = bucket.storage(proxy.url, patience=replace(SHORT, request_seconds=2, retries=1) if kind == "hang" else SHORT)
    proxy.faults = [Fault(kind, EVERY, meant, after_bytes=10)]  # type: ignore[arg-type]
    started = time.monotonic()
    with pytest.raises(StorageUnavailable) as caught:
        write(storage, LARGE)
    assert time.monotonic() - started < 60
    assert (caught.value.status, caught.value.code, caught.value.headers["retry-after"]) == (503, "storage_unavailable", "5")
    assert "http" not in caught.value.message
    assert (bucket.keys(), bucket.unfinished_uploads()) == ([], [])


def test_the_number_of_tries_is_bounded(bucket: Bucket, proxy: FaultyProxy, storage: S3Storage) -> None:
    proxy.faults = [Fault("status", EVERY, uploads)]
    with pytest.raises(StorageUnavailable):
        write(storage, SMALL)
    assert [method for method, _ in proxy.seen].count("PUT") == 1 + SHORT.retries


def test_a_store_that_is_not_there(bucket: Bucket) -> None:
    storage = bucket.storage("http://127.0.0.1:1")
    for action in (lambda: write(storage, SMALL), lambda: storage.read("a"), lambda: storage.exists("a"), lambda: storage.delete("a")):
        with pytest.raises(StorageUnavailable, match="can't be reached"):
            action()
    with pytest.raises(StorageUnavailable):
        next(storage.list_objects("files"))


def test_a_bucket_that_is_not_there(bucket: Bucket) -> None:
    storage = S3Storage("s3://no-such-bucket", endpoint_url=bucket.endpoint_url, access_key_id="key", secret_access_key="secret", patience=SHORT)
    for content in (SMALL, LARGE):
        with pytest.raises(StorageUnavailable):
            write(storage, content)


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["one part", "several"])
def test_keys_that_are_refused_are_not_tried_again(proxy: FaultyProxy, storage: S3Storage, content: bytes) -> None:
    proxy.faults = [Fault("status", EVERY, status=403)]
    with pytest.raises(StorageUnavailable, match="refuses this server"):
        write(storage, content)
    with pytest.raises(StorageUnavailable, match="refuses this server"):
        storage.read("files/a")


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["one part", "several"])
def test_a_full_store_is_a_507(proxy: FaultyProxy, storage: S3Storage, content: bytes) -> None:
    proxy.faults = [Fault("status", EVERY, uploads, status=507)]
    with pytest.raises(StorageFull) as caught:
        write(storage, content)
    assert caught.value.status == 507


def test_a_store_that_says_yes_and_keeps_nothing_is_not_believed(bucket: Bucket, proxy: FaultyProxy, storage: S3Storage) -> None:
    proxy.faults = [Fault("lie", EVERY, uploads)]
    with pytest.raises(StorageUnavailable):
        write(storage, SMALL)


def test_an_older_object_under_the_key_is_not_taken_for_the_new_one(bucket: Bucket, proxy: FaultyProxy, storage: S3Storage) -> None:
    write(storage, SMALL)
    proxy.faults = [Fault("lie", EVERY, uploads)]
    with pytest.raises(StorageUnavailable):
        write(storage, SMALL)
    assert read(storage) == SMALL


def test_a_store_that_keeps_less_than_it_was_given_is_not_believed(bucket: Bucket, storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by the size that the store itself gives; what it kept goes."""
    writer = storage.open_writer("files/a")
    writer.write(SMALL)
    writer.size_bytes += 1
    with pytest.raises(StorageUnavailable):
        writer.commit()
    assert bucket.keys() == []


@pytest.mark.parametrize("fault", ONCE_OR_TWICE, ids=lambda fault: f"{fault.kind}-{fault.status}")
def test_a_failure_that_passes_is_not_noticed_by_a_reader(bucket: Bucket, proxy: FaultyProxy, fault: Fault) -> None:
    storage = bucket.storage(proxy.url, HASTY if fault.kind == "hang" else SHORT)
    write(storage, LARGE)
    proxy.faults = [Fault(fault.kind, fault.times, fault.meant, fault.status)]
    assert read(storage) == LARGE
    assert proxy.faults[0].times == 0


def test_a_read_that_breaks_in_the_middle_goes_on_from_there(bucket: Bucket, proxy: FaultyProxy, storage: S3Storage) -> None:
    write(storage, LARGE)
    proxy.seen.clear()
    proxy.faults = [Fault("cut_answer", 2, reads, after_bytes=1_000_000)]
    assert read(storage) == LARGE
    assert len([path for method, path in proxy.seen if method == "GET"]) == 2 + 2  # of two ranges, the first was cut twice


def test_a_read_that_breaks_again_and_again_is_said(bucket: Bucket, proxy: FaultyProxy, storage: S3Storage) -> None:
    write(storage, LARGE)
    proxy.faults = [Fault("cut_answer", EVERY, reads, after_bytes=100)]
    with pytest.raises(StorageUnavailable):
        read(storage)


def test_an_object_that_goes_while_it_is_read_breaks_the_read(bucket: Bucket, storage: S3Storage) -> None:
    write(storage, LARGE)
    chunks = storage.read("files/a")
    next(chunks)
    storage.delete("files/a")
    with pytest.raises(ObjectDamaged, match="deleted while it was read"):
        list(chunks)


def test_an_object_that_is_replaced_while_it_is_read_breaks_the_read(bucket: Bucket, storage: S3Storage) -> None:
    write(storage, LARGE)
    chunks = storage.read("files/a")
    next(chunks)
    bucket.replace("files/a", LARGE)  # with another ETag, as it came in one part
    with pytest.raises(StorageUnavailable):
        list(chunks)


MEASURED_UPLOAD = """
import sys
from pathlib import Path
from core.s3_storage import S3Storage
storage = S3Storage(sys.argv[1], endpoint_url=sys.argv[2], access_key_id="key", secret_access_key="secret")
writer = storage.open_writer("small")
writer.write(b"x")
writer.commit()
def peak_mib():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024
before, chunk = peak_mib(), bytes(1 << 20)
writer = storage.open_writer("large")
for _ in range(int(sys.argv[3])):
    writer.write(chunk[:-1] + b"x")
stored = writer.commit()
total = sum(len(chunk) for chunk in storage.read("large"))
assert total == stored.size_bytes == int(sys.argv[3]) << 20
print(peak_mib() - before)
"""


def test_memory_does_not_grow_with_the_object(bucket: Bucket) -> None:
    arguments = [sys.executable, "-c", MEASURED_UPLOAD, bucket.url, bucket.endpoint_url, "128"]
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 64, "MiB: three parts of 16 at most, later a range of 8"


def test_settings_choose_the_storage(bucket: Bucket, tmp_path: Path) -> None:
    assert isinstance(open_storage(Settings(data_dir=tmp_path / "local")), LocalStorage)
    storage = open_storage(Settings(data_dir=tmp_path / "remote", **bucket.settings))
    assert isinstance(storage, S3Storage)
    write(storage, SMALL)
    assert bucket.keys() == ["files/a"]
    assert not (tmp_path / "remote").exists()


def test_keys_come_from_the_customary_variables_where_no_setting_names_them(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    storage = open_storage(Settings(data_dir=tmp_path, storage_url=bucket.url, s3_endpoint_url=bucket.endpoint_url))
    assert isinstance(storage, S3Storage)
    write(storage, SMALL)
    assert read(storage) == SMALL


def test_no_secret_is_logged(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, dict[str, str]]] = []
    monkeypatch.setattr("core.s3_storage.log", SimpleNamespace(warning=lambda event, **values: logged.append((event, values))))
    storage = S3Storage(bucket.url, endpoint_url="http://127.0.0.1:1", access_key_id="canary-id", secret_access_key="canary-secret", patience=SHORT)
    with pytest.raises(StorageUnavailable) as caught:
        storage.read("a")
    assert [event for event, _ in logged] == ["object_storage_failed"]
    assert "canary-secret" not in str(logged) + str(caught.value) + repr(storage)
