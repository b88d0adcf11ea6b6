"""Prepared data that were changed on the disk are noticed, set aside and made again."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxrlhf.data import examples
from jaxrlhf.data.sources import SourceConfig, open_source

TEXTS = [f"the film number {i} is warm and its plot bright" for i in range(50)]


def texts(tmp_path: Path) -> list[str]:
    source = open_source(SourceConfig(path=f"{tmp_path}/a.jsonl"), "demonstrations", cache_dir=f"{tmp_path}/cache")
    return [row["text"] for row in source]


@pytest.mark.parametrize("how", ["flipped", "truncated", "deleted"])
def test_damaged_records_are_made_again(tmp_path, capsys, how):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert texts(tmp_path) == texts(tmp_path) == TEXTS
    assert "prepared data" not in capsys.readouterr().err
    (shard,) = (tmp_path / "cache").rglob("*.array_record*")
    data = bytearray(shard.read_bytes())
    for at in range(0, len(data), 997):
        data[at] ^= 4
    if how == "deleted":
        shard.unlink()
    else:
        shard.write_bytes(data if how == "flipped" else data[:-9])
    assert texts(tmp_path) == TEXTS
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if "prepared data were changed or damaged" in line]
    assert len(lines) == 1 and str(shard) in lines[0]
    assert texts(tmp_path) == TEXTS and "prepared data" not in capsys.readouterr().err


def test_damaged_measures_are_made_again(tmp_path, capsys):
    made = []

    def measures() -> np.ndarray:
        made.append(1)
        return np.arange(7)

    for _ in range(2):
        np.testing.assert_array_equal(examples._cached(str(tmp_path), "key", measures), np.arange(7))
    assert len(made) == 1
    (file,) = (tmp_path / "lengths").iterdir()
    for at in (3, file.stat().st_size - 1):  # the checksum; the last number
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)
        np.testing.assert_array_equal(examples._cached(str(tmp_path), "key", measures), np.arange(7))
        assert f"{file}: prepared data were changed or damaged" in capsys.readouterr().err
    assert len(made) == 3
