"""A kind of data is a row: what is known of it stands in its row and nowhere else."""

import ast
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf.config import batch as arithmetic
from jaxrlhf.config.check import batch_problems, data_problems, sections_read
from jaxrlhf.config.load import parse
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.data import batch_kinds, batches
from jaxrlhf.data.batch_kinds import DATA_KINDS, DEMONSTRATIONS, kind_of_section
from jaxrlhf.data.encode import Encoded
from jaxrlhf.data.record_kinds import KINDS, DataKind, Kind, filled_text
from jaxrlhf.data.sources import DataConfig, SourceConfig, open_source
from jaxrlhf.run.batch_shapes import batch_shapes
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.types import Batch

NAMES = {name for kind in DATA_KINDS.values() for name in (kind.name, kind.field)}


def encode_song(record, tokenizer, cfg, eos):
    ids = np.asarray([*map(ord, record["song"])], np.int32)
    return (Encoded(ids, np.arange(len(ids)) > 0),)


@pytest.fixture
def songs(monkeypatch) -> DataKind:
    """A kind of data from outside, in place of demonstrations: rows of text, three to a record as far as widths go."""
    kind = DEMONSTRATIONS._replace(name="songs", rows_key="prompts_per_step", encode=encode_song, sides=3, least_rows=4)
    monkeypatch.setitem(KINDS, "songs", Kind((("song",),), {"song": filled_text}, [{"song": "lyrics"}]))
    monkeypatch.setitem(DATA_KINDS, kind.field, kind)
    return kind


def test_a_kind_is_added_as_rows(songs, letters, tmp_path):
    (tmp_path / "songs.jsonl").write_text("".join(json.dumps({"lyrics": "la" * n}) + "\n" for n in range(1, 9)))
    cfg = DataConfig(cache_dir=str(tmp_path), max_length=16, pack=False)
    kind = kind_of_section("eval_songs")
    source = open_source(SourceConfig(f"{tmp_path}/songs.jsonl"), kind.name, cache_dir=str(tmp_path))
    found = next(batches.stream(kind, source, letters, cfg, rows=4, seed=0)).batch
    assert [name for name, part in vars(found).items() if part is not None] == ["sequences"]
    assert {int(n) for n in found.sequences.valid.sum(1)} <= {2 * n for n in range(1, 9)}
    tree = {"run_dir": "r", "iterations": 1, "algorithm": {"name": "sft"}, "models": {"policy": {"init_from": "x"}}}
    run = parse(tree | {"batch": {"prompts_per_step": 3}, "data": {"max_length": 16, "pack": False}}, "test")
    resolved = resolve_config(run)
    assert sections_read(resolved) == ["songs"] and arithmetic.rows_of(resolved) == {"sequences": 3}
    assert arithmetic.columns_of(run, "sequences", 2, shared=False) == 2 * 16 * 3
    assert any(line.startswith("batch.prompts_per_step: 3: sft needs") for line in data_problems(resolved))
    sizes = {"slice": 1, "data": 2, "fsdp": 1, "decode": 1, "expert": 1, "context": 1}
    assert next(batch_problems(resolved, sizes)).startswith("batch.prompts_per_step: 3: 3 rows do not divide")
    (shape,) = batch_shapes(resolved, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert shape.sequences.tokens.shape == (3, 16)


def test_every_row_has_its_fields():
    """Those of Batch and of the config that it names, and what its records hold."""
    from jaxrlhf.config.record import BatchConfig

    for kind in DATA_KINDS.values():
        assert kind.name in KINDS and hasattr(DataConfig(), kind.name) and hasattr(DataConfig(), f"eval_{kind.name}")
        assert hasattr(BatchConfig(), kind.rows_key) and hasattr(Batch(), kind.field)
        assert (kind.shapes is None) == kind.is_prompt
    assert {kind.name for kind in DATA_KINDS.values()} == set(KINDS) - {"labels"}  # which a judge learns from


def test_no_other_table_is_keyed_by_kinds_of_data():
    """Two names of kinds among the keys of a dict display, or the items of a tuple, make one."""
    found = []
    for path in Path(jaxrlhf.__file__).parent.rglob("*.py"):
        if path.parent.name == "published":  # benchmarks, which write files of these names
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            keys = getattr(node, "keys", None) if isinstance(node, ast.Dict) else None
            if len({key.value for key in keys or () if isinstance(key, ast.Constant)} & NAMES) > 1:
                found.append(path.name)
    assert sorted(set(found)) == [
        "movie_reviews.py",
        "record_kinds.py",
    ]  # the table; builders of data sets, by their names
    assert batch_kinds.DATA_KINDS.keys() == {kind.field for kind in batch_kinds.DATA_KINDS.values()}
