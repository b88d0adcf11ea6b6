"""A run whose data, weights and directory are all in an object store: trained, gone on with, measured, exported.

What is faked is the store (tests/support/fake_gcs.py); orbax, tensorstore, etils.epath and fsspec are the real ones.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import fsspec
import pytest
from etils import epath

from jaxrlhf.run import manifest
from tests.support import fake_gcs, runs

STORE = "gs://bucket"


class Remote(NamedTuple):
    """What the process left behind."""

    done: runs.Done
    bucket: Path  # the objects, as files


@pytest.fixture(scope="module")
def remote(root) -> Remote:
    """One process: sft to its second iteration; the rest of it; its evaluation and export; rm that starts from it; two
    texts, one from the run and one from its export; and the page of sft."""
    folder = root / "remote"
    bucket = folder / "store" / "bucket"

    def commands() -> list[list[str]]:
        arguments = [
            text.replace(f"{runs.text(root)}/", f"{STORE}/text/") if "jsonl" in text else text
            for text in runs.overrides(runs.text(root), Path("RUNS"))
        ]
        arguments = [text.replace("RUNS", STORE) for text in arguments]
        sft, rm = ([runs.tiny_config(name)] for name in ("sft", "rm"))
        write = ["--prompt", "the film is", "--temperature", "0", "--max-tokens", "8"]
        short = ["rm:iterations=1", "rm:algorithm.normalize_samples=0"]
        return [
            runs.train(*arguments, "sft:iterations=2", configs=sft),
            runs.train(*arguments, configs=sft),
            ["evaluate", f"{STORE}/sft", "--json"],
            ["export", f"{STORE}/sft", "--to", f"{STORE}/hf"],
            runs.train(*arguments, *short, configs=rm),
            ["generate", f"{STORE}/sft", *write],
            ["generate", f"{STORE}/hf", *write],
            ["report", f"{STORE}/sft"],
        ]

    def make() -> list[runs.Done]:
        bucket.mkdir(parents=True)
        (bucket / "text").mkdir()
        for path in runs.text(root).glob("*.jsonl"):
            (bucket / "text" / path.name).write_bytes(path.read_bytes())
        with fake_gcs.Server(bucket.parent) as server:
            home = {"HOME": str(folder)}  # copies of remote weights are kept in ~/.cache
            return [runs.process(folder / "process", commands(), environment=server.environment | home)]

    (done,) = runs.once(root, "remote", make)
    assert done.code == 0, done.errors
    return Remote(done, bucket)


def test_it_trains_and_goes_on(remote):
    first, second, *_ = remote.done.outputs
    assert "step 2/4" not in first and "step 2/2" in first
    assert f"{STORE}/sft: an object store can't be locked" in first
    assert f"{STORE}/sft: an object store can't be locked" in second
    assert "resumed from step 2" in second and "step 4/4" in second
    kept = sorted(path.parent.name for path in (remote.bucket / "sft/checkpoints").glob("*/commit_success.txt"))
    assert kept == ["2", "4"]


def test_what_would_be_appended_is_written_in_parts(remote):
    run = remote.bucket / "sft"
    parts = [sorted(path.name for path in run.glob(pattern)) for pattern in ("metrics*", ".lock", "tensorboard")]
    assert parts == [["metrics-000000.jsonl", "metrics-000001.jsonl"], [], []]
    rows = [json.loads(line) for name in parts[0] for line in (run / name).read_text().splitlines()]
    assert [(row["step"], "eval/loss/policy" in row) for row in rows] == [
        (0, True),
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (4, False),
        (4, True),
    ]


def test_it_computes_what_a_local_run_does(remote, root):
    """The same numbers, though the local run was not stopped."""
    runs.whole(root)
    run = remote.bucket / "sft"
    lines = [line for name in sorted(run.glob("metrics-*.jsonl")) for line in name.read_text().splitlines()]
    losses = [{key: value for key, value in json.loads(line).items() if "loss/" in key} for line in lines]
    local = [{key: value for key, value in row.items() if "loss/" in key} for row in runs.rows(root / "whole/sft")]
    assert losses == local and len(losses) == 7


def test_it_is_measured_exported_and_built_on(remote):
    _, _, evaluated, exported, _, from_run, from_folder, reported = remote.done.outputs
    report = json.loads(evaluated)
    assert report["step"] == 4 and report["after"]["loss/policy"] > 0
    assert exported == f"policy of {STORE}/sft, step 4, written to {STORE}/hf\n"
    names = {path.name for path in (remote.bucket / "hf").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert (remote.bucket / "rm/checkpoints/1/commit_success.txt").exists()
    assert from_run == from_folder and from_run.strip()
    assert reported.startswith(f"{STORE}/sft/report.html: ")
    assert '"state":"finished","step":4,"iterations":4' in (remote.bucket / "sft" / "report.html").read_text()


def test_its_manifests_hold_the_checksums_of_the_store(remote, monkeypatch, tmp_path):
    """Which are compared without reading an object."""
    monkeypatch.setenv(fake_gcs.ROOT, str(shutil.copytree(remote.bucket.parent, tmp_path / "store")))
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (fake_gcs.Buckets(), url.removeprefix("gs://")))
    step = epath.Path(tmp_path / "store/bucket/sft/checkpoints/4")
    kept = manifest.read_all(step)
    assert all(entry.keys() == {"size", "md5Hash"} for entry in (kept["files"] | kept["beside"]).values())
    monkeypatch.setattr(manifest, "checksum", lambda *_: pytest.fail("an object is read"))
    look = lambda: manifest.objects(f"{STORE}/sft/checkpoints/4")
    assert manifest.wrong_sizes(kept["files"], look()) is None
    assert manifest.wrong_content(step, kept["files"], look()) is None
    data = next(path for path in step.glob("params.policy/ocdbt.process_0/d/*") if path.stat().length)
    data.write_bytes(bytes(data.stat().length))
    assert "has another md5Hash checksum" in str(manifest.wrong_content(step, kept["files"], look()))


def test_its_readers_leave_nothing(remote):
    """evaluate, export, generate and the run that starts from it held its step."""
    assert not [*(remote.bucket / "sft").glob("readers/*")]


def test_the_fake_refuses_what_stores_refuse(tmp_path, monkeypatch):
    """Else the runs above would show nothing."""
    monkeypatch.setenv(fake_gcs.ROOT, str(tmp_path))
    store = fake_gcs.Buckets()
    with store.open("gs://bucket/a", "wb") as file:
        file.write(b"one")  # type: ignore[arg-type]
        assert not store.exists("gs://bucket/a")  # an object is there when it is whole
    assert store.cat_file("gs://bucket/a") == b"one"
    with pytest.raises(NotImplementedError, match="can only be written whole"):
        store.open("gs://bucket/a", "ab")
    store.makedirs("gs://bucket/folder")
    assert not store.exists("gs://bucket/folder")
    with pytest.raises(FileNotFoundError):
        store.open("gs://bucket/b", "rb")
