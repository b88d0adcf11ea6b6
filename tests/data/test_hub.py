"""Data sets of Hugging Face from local folders, with the real ``datasets`` library; and what is said without one."""

import json
import sys

import pytest

from jaxrlhf.data import hub
from jaxrlhf.data.sources import SourceConfig, open_source

datasets = pytest.importorskip("datasets")
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
CALL = {"role": "assistant", "content": "so", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}


def rows(count: int) -> list[dict]:
    """Conversations, some with a key that the others lack, which Arrow fills with null."""
    return [{"messages": [USER, CALL if n % 2 else ANSWER], "id": n} for n in range(count)]


@pytest.fixture
def opened(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

    def do(name: str, split: str = "train", kind: str = "demonstrations", **fields):
        cfg = SourceConfig(hf=name, split=split, fields=fields)
        return open_source(cfg, kind, cache_dir=str(tmp_path / "cache"), path_in_config="data.x")

    return do


def save(how: str, folder) -> None:
    train, test = datasets.Dataset.from_list(rows(7)), datasets.Dataset.from_list(rows(3))
    if how == "saved":
        datasets.DatasetDict(train=train, test=test).save_to_disk(folder)
        return
    folder.mkdir()
    for split, dataset in (("train", train), ("test", test)):
        name = f"{split}-00000-of-00001"
        dataset.to_parquet(folder / f"{name}.parquet") if how == "parquet" else dataset.to_json(
            folder / f"{name}.jsonl"
        )


@pytest.mark.parametrize("how", ["saved", "parquet", "jsonl"])
def test_folders(tmp_path, opened, how):
    save(how, tmp_path / how)
    source = opened(str(tmp_path / how))
    assert list(source) == rows(7)
    assert source.describe() == "messages; columns that are not used: id"
    assert [record["id"] for record in opened(str(tmp_path / how), "train[-2:]+test[:1]")] == [5, 6, 0]
    assert opened(str(tmp_path / how), "test").fingerprint != source.fingerprint
    with pytest.raises(ValueError, match=r"data\.x\.split: 'tests' of .* is unknown \(did you mean 'test'\?\)"):
        opened(str(tmp_path / how), "tests")


def test_the_same_rows_have_the_same_fingerprint_wherever_they_are(tmp_path, opened):
    for name in ("one", "two"):
        save("parquet", tmp_path / name)
    assert opened(str(tmp_path / "one")).fingerprint == opened(str(tmp_path / "two")).fingerprint


def test_one_saved_split(tmp_path, opened):
    pairs = [{"prompt": [USER], "chosen": [ANSWER], "rejected": [CALL]}] * 2
    datasets.Dataset.from_list(pairs).save_to_disk(tmp_path / "pairs")
    source = opened(str(tmp_path / "pairs"), kind="preferences")
    assert list(source) == pairs and source.describe() == "prompt + chosen + rejected: messages"


def test_configs_are_named_after_the_folder(tmp_path, opened):
    folder = tmp_path / "several"
    folder.mkdir()
    for name in ("short", "long"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    listed = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("short", "long")]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(listed)}\n---\n")
    assert [record["text"] for record in opened(f"{folder}/long")] == ["long"]
    for name, message in (
        (str(folder), f"it has several configs; expected {folder}/CONFIG with one of ['short', 'long']"),
        (f"{folder}/lang", "no config 'lang' (did you mean 'long'?)"),
    ):
        with pytest.raises(ValueError) as error:
            opened(name)
        assert message in str(error.value) and str(error.value).startswith("data.x.hf: ")


def test_a_bad_row_is_named(tmp_path, opened):
    bad = [{"text": "a"}, {"text": None}]
    datasets.Dataset.from_list(bad).save_to_disk(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"bad\[train\]:1: text is null"):
        opened(str(tmp_path / "bad"))


@pytest.mark.parametrize(
    ("name", "place"),
    [("squad", ("squad", None)), ("owner/name", ("owner/name", None)), ("owner/name/main", ("owner/name", "main"))],
)
def test_names_on_the_hub(name, place):
    assert hub._locate(name, "x") == place


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere", "a/b/c/d", "gs://bucket/data", "https://huggingface.co/a/b", "a b"]
)
def test_names_that_can_be_nothing(name):
    with pytest.raises(ValueError, match=r"^x\.hf: .* is no folder; expected one, or owner/name or owner/name/config"):
        hub.find_splits(name, "train", "x")


def test_without_a_network_one_line_says_what_to_do(monkeypatch, opened):
    """As the library says it once it has given up."""

    def fail(*_):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError) as error:
        opened("owner/name")
    text = str(error.value)
    assert text.startswith("data.x.hf: 'owner/name' can't be loaded: Couldn't reach") and "\n" not in text
    assert "expected access to huggingface.co" in text and "or a local folder" in text


def test_without_the_library_one_line_says_what_to_install(monkeypatch, opened):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError) as error:
        opened("owner/name")
    assert str(error.value) == "data.x.hf: 'owner/name' needs the datasets library: pip install \"jaxrlhf[hf]\""
