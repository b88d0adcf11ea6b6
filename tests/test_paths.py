"""Which paths can be opened here, and that every key and argument that takes one says so in one line."""

from types import SimpleNamespace

import fsspec
import pytest

from jaxrlhf.config.load import load
from jaxrlhf.config.places import check_places, places
from jaxrlhf.data.sources import SourceConfig, open_source
from jaxrlhf.errors import ConfigError
from jaxrlhf.models.files import hf_folder
from jaxrlhf.paths import malformed, unreachable

DPO = "configs/tiny/dpo.yaml"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("http://host/x", "http:// can't be opened; expected a local path or gs://BUCKET/PATH"),
        ("file:///tmp/x", "file:// can't be opened"),
        ("gguf:gs://bucket/x", "gguf:gs:// can't be opened"),
        ("a\0b", "holds a NUL character"),
        ("gs://", "names no bucket"),
        ("gs:///", "names no bucket"),
    ],
)
def test_a_path_of_no_machine(path, words):
    assert words in str(malformed(path)) and unreachable(path) == malformed(path)


def test_a_store_needs_its_library(monkeypatch):
    monkeypatch.setattr(fsspec, "get_filesystem_class", no_library)
    assert malformed("gs://bucket/x") is None
    assert unreachable("gs://bucket/x") == (
        "no library for gs:// is installed; expected a local path, or after: pip install 'jaxrlhf[gcs]'"
    )
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda scheme: SimpleNamespace())
    assert unreachable("gs://bucket/x") is None
    assert unreachable("runs/x@best") is None and unreachable("") is None


def no_library(scheme: str):
    raise ImportError(scheme)


def test_every_path_of_a_config_is_looked_at(tmp_path):
    """Keys that hold a path, by their values: each is refused where it is a URL."""
    url = "http://host/x"
    overrides = [f"data.{name}={{path: {url}}}" for name in ("preferences", "eval_preferences", "eval_prompts")]
    overrides += [f"data.cache_dir={url}", f"eval.judge={{path: {url}}}", f"tokenizer.init_from={url}"]
    overrides += [f"run_dir={url}", f"models.policy.init_from={url}", f"models.reward.init_from=gguf:{url}"]
    cfg = load(DPO, overrides)
    assert [path for _, path in places(cfg) if path == url] == [url] * 9
    with pytest.raises(ConfigError) as caught:
        check_places(cfg, DPO)
    lines = str(caught.value).splitlines()
    assert len(lines) == 9 and all(line.endswith("; expected a local path or gs://BUCKET/PATH") for line in lines)


@pytest.mark.parametrize(
    ("inside", "words"),
    [("file", "a file"), ("file/run", "{}/file is a file"), ("x" * 300, "File name too long")],
    ids=["file", "below", "long"],
)
def test_a_run_dir_that_can_be_no_directory(tmp_path, inside, words):
    (tmp_path / "file").write_text("")
    run_dir = tmp_path / inside
    with pytest.raises(ConfigError) as caught:
        check_places(load(DPO, [f"run_dir={run_dir}"]))
    assert f": {words.format(tmp_path)}; expected a directory that can be written" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("url", ["http://host/x", "s3://bucket/x"])
def test_what_takes_a_path_says_what_it_cannot_open(command, monkeypatch, url):
    """In the command line and in Python, one line each."""
    monkeypatch.setattr(fsspec, "get_filesystem_class", no_library)
    calls = [("train", url), ("train", "--check", url), ("evaluate", url), ("generate", url, "--prompt", "x")]
    calls += [("export", url, "--to", "out"), ("export", "gguf:x", "--to", url), ("plan", url, "--topology", "v5e:2x2")]
    for call in calls:
        out, err = command(*call, code=2)
        assert (out, err.count("\n")) == ("", 1) and url in err, call
    with pytest.raises(ValueError, match=r"^data\.prompts\.path: .*expected a local path"):
        open_source(SourceConfig(path=f"{url}.jsonl"), "prompts")
    with pytest.raises(ValueError, match=r"^init_from: .*expected a local path"):
        hf_folder.locate(url)
