"""Whether two runs are the same to the bit: arrays, data positions, metrics, samples."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.log.rows import read_rows

OF_TIME = ("time", "throughput", "memory")  # what metrics begin with that no two runs have in common


def differences(expected: Path, found: Path, step: int) -> list[str]:
    """What differs of two run directories that came to ``step``, a line each."""
    wrong = []
    for item in ("arrays", "extra"):
        read = read_arrays if item == "arrays" else read_extra
        try:
            one, other = read(expected, step), read(found, step)
        except (OSError, ValueError) as error:
            wrong.append(f"checkpoint of step {step}: {error}")
            continue
        names = [name for name in one.keys() | other.keys() if not same(one.get(name), other.get(name))]
        if names:
            wrong.append(f"{item}: {min(names)} differs, of {len(names)} that do")
    for name in ("metrics", "samples"):
        rows = [[without_time(row) for row in read_rows(run, name)] for run in (expected, found)]
        if line := first_difference(*rows):
            wrong.append(f"{name}.jsonl: {line}")
    if left := sorted(path.name for path in (found / "checkpoints").glob("*.orbax-checkpoint-tmp*")):
        wrong.append(f"checkpoints: {left[0]} was left behind")
    return wrong


def first_difference(expected: list[dict], found: list[dict]) -> str:
    """Where two lists of rows part; "" where they are equal."""
    for place, (one, other) in enumerate(zip(expected, found)):
        if one != other:
            keys = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
            key = "step" if "step" in keys else min(keys)
            return f"row {place + 1}: {key} is {other.get(key)}; expected {one.get(key)}"
    return "" if len(expected) == len(found) else f"{len(found)} rows; expected {len(expected)}"


def without_time(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key.removeprefix("eval/").split("/")[0] not in OF_TIME}


def same(one: Any, other: Any) -> bool:
    """Whether two leaves have the same type, shape and bits (NaN is equal to itself)."""
    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray):
        return type(one) is type(other) and one == other
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def read_arrays(run: Path, step: int) -> dict[str, Any]:
    """Name -> NumPy array of all items of a checkpoint."""
    import jax
    import orbax.checkpoint as ocp

    folder, found = run.resolve() / "checkpoints" / str(step), {}
    with ocp.PyTreeCheckpointer() as checkpointer:
        for item in sorted(
            path for path in folder.iterdir() if path.is_dir() and path.name not in ("extra", "metrics")
        ):
            tree = checkpointer.metadata(item).item_metadata.tree
            asked = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            leaves = checkpointer.restore(item, restore_args=asked)
            for path, leaf in jax.tree_util.tree_leaves_with_path(leaves):
                found[item.name + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def read_extra(run: Path, step: int) -> dict[str, Any]:
    """What a checkpoint holds besides arrays: config, data positions, models."""
    return json.loads((run / "checkpoints" / str(step) / "extra" / "metadata").read_text())


def seen(lines: Iterable[str]) -> set[tuple[str, str]]:
    """(prompt, response) of all that a reward function scored; half a line, of a process that was killed, is none."""
    found = set()
    for line in lines:
        try:
            found |= {(row["prompt"], row["response"]) for row in json.loads(line)}
        except ValueError:
            continue
    return found
