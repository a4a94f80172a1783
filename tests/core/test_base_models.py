import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from core.base_models import PREPARED_MARK, BaseModelEntry, made_from_of
from sdft_engine.prepare_base_model import source_of

REVISION = "0123456789abcdef"


@pytest.mark.parametrize("model_id", ["smollm2-135m-instruct", "A", "Qwen3.5_4B", "x" * 64])
def test_usable_ids(model_id: str) -> None:
    assert BaseModelEntry(id=model_id, source="/models/x").id == model_id


@pytest.mark.parametrize("model_id", ["", "-x", ".hidden", "..", "a/b", "ft:a", "a b", "x" * 65, "ä", "a\n"])
def test_ids_that_could_not_be_a_directory_or_part_of_a_model_name(model_id: str) -> None:
    with pytest.raises(ValidationError, match="id"):
        BaseModelEntry(id=model_id, source="/models/x")


@pytest.mark.parametrize(("source", "revision"), [("/models/x", None), ("package:llm_x/x.gguf", None), ("hub:owner/name", REVISION)])
def test_usable_sources(source: str, revision: str | None) -> None:
    assert BaseModelEntry(id="x", source=source, revision=revision).source == source


@pytest.mark.parametrize("source", ["", "owner/name", "relative/path", "file:///models/x", "https://example.org/model", "~/models"])
def test_unknown_sources(source: str) -> None:
    with pytest.raises(ValidationError, match="source must start with"):
        BaseModelEntry(id="x", source=source)


def test_hub_sources_are_pinned() -> None:
    with pytest.raises(ValidationError, match="pinned revision"):
        BaseModelEntry(id="x", source="hub:owner/name")


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError, match="trust_remote_code"):
        BaseModelEntry.model_validate({"id": "x", "source": "/x", "trust_remote_code": True})


def test_directory_is_one_per_source_and_revision(tmp_path: Path) -> None:
    entries = [
        BaseModelEntry(id="x", source="/a"),
        BaseModelEntry(id="x", source="/b"),
        BaseModelEntry(id="x", source="hub:owner/name", revision="1"),
        BaseModelEntry(id="x", source="hub:owner/name", revision="2"),
    ]
    directories = {entry.directory(tmp_path) for entry in entries}
    assert len(directories) == 4
    assert {directory.parent for directory in directories} == {tmp_path / "base_models"}
    assert entries[0].directory(tmp_path) == BaseModelEntry(id="x", source="/a").directory(tmp_path)


def test_prepared_means_that_the_mark_was_written(tmp_path: Path) -> None:
    entry = BaseModelEntry(id="x", source="/a")
    entry.directory(tmp_path).mkdir(parents=True)
    assert not entry.is_prepared(tmp_path)
    (entry.directory(tmp_path) / "prepared.json").write_text("{}")
    assert entry.is_prepared(tmp_path)


def test_arguments_of_the_preparation(tmp_path: Path) -> None:
    pinned = BaseModelEntry(id="big", source="hub:owner/big", revision=REVISION)
    directory = str(pinned.directory(tmp_path))
    assert pinned.preparation_arguments(tmp_path) == ["--id", "big", "--source", "hub:owner/big", "--revision", REVISION, "--directory", directory]
    assert "--revision" not in BaseModelEntry(id="x", source="/a").preparation_arguments(tmp_path)


@pytest.mark.parametrize(("source", "expected"), [("package:llm_x/weights/x.gguf", ("llm_x", "weights/x.gguf")), ("/a/package:x", None)])
def test_packaged_file(source: str, expected: tuple[str, str] | None) -> None:
    assert BaseModelEntry(id="x", source=source).packaged_file == expected


@pytest.mark.parametrize(
    ("source", "revision", "is_base"),
    [
        (None, None, True),
        ("hub:o/n", "1", True),
        ("hub:o/n", "2", False),
        ("hub:o/other", "1", False),
        ("package:p/f.gguf", None, False),
        ("/models/n", None, True),
    ],
)
def test_a_tuned_model_belongs_to_one_source_and_revision(tmp_path: Path, source: str | None, revision: str | None, is_base: bool) -> None:
    made_from = made_from_of(source, revision)
    assert BaseModelEntry(id="x", source="hub:o/n", revision="1").is_base_of(made_from) is is_base
    assert BaseModelEntry(id="x", source="/models/n").is_base_of(made_from), "a path says nothing of what it holds"
    (tmp_path / PREPARED_MARK).write_text(json.dumps({"id": "x", "source": source, "revision": revision}))
    assert source_of(tmp_path) == made_from, "as the engine writes it into adapters"
