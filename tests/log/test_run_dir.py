"""Run directories that can't be one."""

import re
from pathlib import Path

import pytest

from jaxrlhf.log.run_dir import lock_run_dir


def test_a_file_is_no_run_directory(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path, why in (
        (file, "a file"),
        (file / "run", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        line = rf"^run_dir: {re.escape(str(path))}: {why}; expected a directory that can be written$"
        with pytest.raises(ValueError, match=line):
            lock_run_dir(path)
    assert file.read_text() == ""


def test_a_directory_that_can_not_be_written(tmp_path, monkeypatch):
    """Tests may run as root, whom nothing refuses."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"^run_dir: .*: Permission denied; expected a directory that can be written$"):
        lock_run_dir(Path(tmp_path))
