"""What the machines get: the files of the working tree that git does not ignore, and the environment of training."""

import gzip
import os
import shlex
import tarfile
from pathlib import Path

from jaxrlhf.launch.commands import must
from jaxrlhf.launch.config import Launch

CODE, ENVIRONMENT, WORKER = "jaxrlhf-code.tar.gz", "jaxrlhf.env", "jaxrlhf-worker.sh"


def folder(launch: Launch) -> Path:
    """What is made here for this launch, below runs/, which git ignores."""
    return launch.root / "runs" / "launch" / launch.cfg.name


def bundle_paths(launch: Launch) -> list[str]:
    """As one types them here."""
    return [os.path.relpath(folder(launch) / name) for name in (CODE, ENVIRONMENT, WORKER)]


def describe_code(root: Path) -> str:
    """The commit that is sent, and whether the files differ from it."""
    git = ["git", "-C", str(root)]
    commit = must([*git, "rev-parse", "--short=12", "HEAD"]).strip()
    changed = must([*git, "status", "--porcelain"]).splitlines()
    return f"commit {commit}" + (f" with {len(changed)} changed files" if changed else "")


def write_bundle(launch: Launch) -> int:
    """Writes the files of bundle_paths; how many files of the repository are in it. Raises LaunchError without git."""
    root, target = launch.root, folder(launch)
    target.mkdir(parents=True, exist_ok=True)
    listed = must(["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
    names = sorted(name for name in set(listed.split("\0")) if name and (root / name).is_file())
    # no times and no owners: the same files make the same archive
    with (
        open(target / CODE, "wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,  # type: ignore[call-overload]
    ):
        for name in names:
            archive.add(root / name, name, filter=anonymous)
    (target / WORKER).write_bytes((root / "launch" / "worker.sh").read_bytes())
    write_private(target / ENVIRONMENT, exports(launch))
    return len(names)


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def exports(launch: Launch) -> str:
    """The environment of training as lines of shell, secrets with it."""
    values = {**launch.environment, **{key: os.environ[key] for key in launch.cfg.secrets}}
    return "".join(f"export {key}={shlex.quote(value)}\n" for key, value in values.items())


def write_private(path: Path, text: str) -> None:
    """Writes a file that its owner alone can read, from its first byte on."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
