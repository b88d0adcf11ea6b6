import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxrlhf.data import files
from jaxrlhf.data.sources import SourceConfig, _prepared, cache_folder, open_source, to_python


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceConfig(path=str(path))


def test_second_open_does_not_parse_and_remembers_what_was_skipped(tmp_path, monkeypatch):
    cfg = write(tmp_path / "a.jsonl", ["one", "", "two"])
    options = {"cache_dir": str(tmp_path / "cache"), "skip_bad": True}
    first = open_source(cfg, "demonstrations", **options)

    def never(self):
        raise AssertionError("parsed again")

    monkeypatch.setattr(files.Parser, "__iter__", never)
    again = open_source(cfg, "demonstrations", **options)
    assert list(again) == list(first) == [{"text": "one"}, {"text": "two"}]
    assert first.skipped == again.skipped == 1 and first.fingerprint == again.fingerprint
    with pytest.raises(AssertionError, match="parsed again"):  # other rules, other records
        open_source(cfg, "demonstrations", cache_dir=str(tmp_path / "cache"), skip_bad=False)


def test_changed_file_is_parsed_again(tmp_path):
    first = open_source(write(tmp_path / "a.jsonl", ["one"]), "demonstrations", cache_dir=str(tmp_path / "c"))
    second = open_source(write(tmp_path / "a.jsonl", ["two"]), "demonstrations", cache_dir=str(tmp_path / "c"))
    assert (first[0]["text"], second[0]["text"]) == ("one", "two") and first.fingerprint != second.fingerprint


def test_split_of_local_files(tmp_path):
    cfg = write(tmp_path / "a.jsonl", [str(i) for i in range(10)])
    parts = [
        open_source(SourceConfig(path=cfg.path, split=split), "demonstrations", cache_dir=str(tmp_path / "c"))
        for split in ("train[:90%]", "train[90%:]")
    ]
    assert [[record["text"] for record in part] for part in parts] == [[str(i) for i in range(9)], ["9"]]
    assert parts[0].fingerprint != parts[1].fingerprint
    for split, message in (("trian", "did you mean 'train'"), ("train[:0%]", "no records"), ("train[", "")):
        with pytest.raises(ValueError, match=r"data\.prompts\.split: ") as error:
            open_source(SourceConfig(path=cfg.path, split=split), "demonstrations", cache_dir=str(tmp_path / "c"))
        assert message in str(error.value) and "\n" not in str(error.value)


def test_two_processes_prepare_the_same_data_at_once(tmp_path):
    """Both have seen that nothing is prepared before either writes; one loses the race, and reads the winner's."""
    cfg = write(tmp_path / "a.jsonl", ["one", "two"])
    found = files.find_files(str(cfg.path), "x")

    def make():
        return files.records_builder(
            "0" * 64,
            str(tmp_path / "c"),
            {"train": files.Parser(files.tables_of(found), "demonstrations", {}, False, "x")},
        )

    slow, calls = make(), []

    def first_slow_then_fresh():
        calls.append(1)
        return slow if len(calls) == 1 else make()

    download_and_prepare = slow.download_and_prepare

    def lose(**options):
        generate = slow._generate_examples

        def late(split):
            yield from generate(split)
            _prepared(make)  # the other process finishes in the middle of ours

        slow._generate_examples = late
        download_and_prepare(**options)

    slow.download_and_prepare = lose
    builder = _prepared(first_slow_then_fresh)
    assert [json.loads(row["record"])["text"] for row in builder.as_data_source("train")] == ["one", "two"]
    assert len(calls) > 1
    assert not [name for name in os.listdir(os.path.dirname(builder.data_dir)) if "incomplete" in name]


def test_other_process_finishes_while_we_start(tmp_path):
    """Our builder is made before the data is there, and looks for it after."""
    cfg = write(tmp_path / "a.jsonl", ["one", "two"])
    found = files.find_files(str(cfg.path), "x")

    def make():
        return files.records_builder(
            "0" * 64,
            str(tmp_path / "c"),
            {"train": files.Parser(files.tables_of(found), "demonstrations", {}, False, "x")},
        )

    early = make()
    _prepared(make)
    made = iter([early])
    assert len(_prepared(lambda: next(made, None) or make()).as_data_source("train")) == 2


def test_tfds_round_trip_without_tensorflow(tmp_path):
    """A registered dataset is prepared, read back as plain Python, and tensorflow never imported. No temporary folder
    is left."""
    script = """
import sys
import tensorflow_datasets as tfds
from jaxrlhf.data.sources import SourceConfig, open_source
class Talks(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("short", "long")]
    def _info(self):
        turn = {"role": tfds.features.Text(), "content": tfds.features.Text()}
        features = {"messages": tfds.features.Sequence(turn), "label": tfds.features.ClassLabel(num_classes=3),
                    "q": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}
    def _generate_examples(self):
        for i in range(3):
            turns = [{"role": "user", "content": f"caf\\u00e9 {i}"}]
            yield i, {"messages": turns, "label": i, "q": f"why {i}" if i else ""}
def opened(name, split="train", kind="prompts", **fields):
    return open_source(SourceConfig(tfds=name, split=split, fields=fields), kind, cache_dir=sys.argv[1])
source = opened("talks/short")
records = sorted((source[i] for i in range(3)), key=lambda record: record["label"])
assert records[1] == {"messages": [{"role": "user", "content": "caf\\u00e9 1"}], "label": 1, "q": "why 1"}, records
assert len(opened("talks/short", "test[:2]")) == 2
assert opened("talks/short", "test").fingerprint != source.fingerprint
assert sorted(record["prompt"] for record in opened("talks/long", prompt="q")) == ["", "why 1", "why 2"]
def fails(*args, **kwargs):
    try:
        list(opened(*args, **kwargs))
    except ValueError as error:
        assert "\\n" not in str(error), error
        return str(error)
print(fails("talk"))
print(fails("talks/shrt"))
print(fails("talks/short", "tran"))
print(fails("talks/short", response="q", prompt="question"))
print(fails("talks/short", kind="preferences"))
print(fails("talks/short", kind="demonstrations", text="q"))
print(fails("gsm8kk"))
assert "tensorflow" not in sys.modules
"""
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    command, environment = [sys.executable, "-c", script, str(cache)], os.environ | {"TMPDIR": str(temporary)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(temporary.iterdir()) == []
    said = [line for line in done.stdout.splitlines() if line.startswith("data.prompts") or "talks/short" in line[:20]]
    assert "data.prompts.tfds: 'talk' is unknown (did you mean 'talks'" in said[0]
    assert "data.prompts.tfds: talks/shrt: " in said[1] and "shrt not found" in said[1]
    assert "data.prompts.split: 'tran'" in said[2] and "did you mean 'train'" in said[2]
    assert "data.prompts.fields: 'response' is not a field" in said[3]
    assert "no column 'chosen'" in said[4]
    assert said[5].startswith("talks/short/1.0.0[train]:") and said[5].endswith(": text is empty")
    assert "data.prompts.tfds: 'gsm8kk' is unknown (did you mean 'gsm8k'" in said[6]  # registered by a lazy module


@pytest.mark.parametrize(
    "cfg, kind, message",
    [
        (SourceConfig(), "prompts", "data.prompts: none of path, tfds and hf is given; expected one of them"),
        (SourceConfig(path="a", tfds="b"), "prompts", "data.prompts: path is a and tfds is b; expected one of them"),
        (
            SourceConfig(path="a.jsonl", fields={"promt": "q"}),
            "prompts",
            "fields: 'promt' is not a field (did you mean",
        ),
        (SourceConfig(path="a.jsonl"), "prompt", "kind of data: 'prompt' is unknown (did you mean 'prompts'?)"),
    ],
)
def test_config_errors(cfg, kind, message, tmp_path):
    with pytest.raises(ValueError) as error:
        open_source(cfg, kind, cache_dir=str(tmp_path))
    assert message in str(error.value)


def test_cache_is_local():
    assert cache_folder(None).endswith(".cache/jaxrlhf/data") and not cache_folder(None).startswith("~")
    with pytest.raises(ValueError, match=r"data\.cache_dir: 'gs://bucket' is remote"):
        cache_folder("gs://bucket")


@pytest.mark.parametrize("folder, words", [("file", "a file"), ("file/x", "Not a directory"), ("a\0b", "NUL")])
def test_a_cache_that_can_be_no_folder(tmp_path, monkeypatch, folder, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text('{"prompt": "x"}')
    with pytest.raises(ValueError, match=rf"^data\.cache_dir: .*{words}.*; expected a "):
        open_source(SourceConfig(path="file.jsonl"), "prompts", cache_dir=folder)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("train[3:1]", "no records from 3 to 1; expected FIRST < END"),
        ("train[1:1]", "no records from 1 to 1"),
        ("train[80%:20%]", "no records from 3 to 1"),
        ("train[3:1]+train", "no records from 3 to 1"),
        ("train[9:]", "incompatible with 4 examples"),
        ("train[", "Error parsing split"),
        ("test", "is unknown (there is 'train')"),
    ],
)
def test_a_split_of_nothing_is_one_line(tmp_path, split, words):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n' * 4)
    cfg = SourceConfig(path=str(tmp_path / "a.jsonl"), split=split)
    with pytest.raises(ValueError) as caught:
        open_source(cfg, "prompts", cache_dir=str(tmp_path / "cache"))
    assert str(caught.value).startswith(f"data.prompts.split: {split!r} of ") and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_to_python():
    value = {
        "a": b"x",
        "b": np.int64(3),
        "c": np.array([b"p", b"q"], object),
        "d": [np.float32(0.5)],
        "e": np.bool_(True),
    }
    assert to_python(value) == {"a": "x", "b": 3, "c": ["p", "q"], "d": [0.5], "e": True}
    assert type(to_python(value)["b"]) is int
