"""JAX's cache of compiled programs, whose entries are verified: a damaged one goes, is said, and is compiled again.

JAX itself keeps no checksum. Where zstandard is installed, entries with a flipped bit were run: of 10, 3 were noticed,
6 ended the process by SIGILL, and 1 computed other numbers (zlib noticed 36 of 36). An entry that was cut, by a process
that was killed while it wrote, is noticed, but stays, and is compiled again at each start.
"""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from jaxrlhf.hosts import processes

SEALED = "-sha256"  # at the end of the keys of entries that begin with their SHA-256
DIGEST = hashlib.sha256().digest_size


class Verified:
    """``cache``, an LRUCache of JAX, with a SHA-256 before the content of each entry; it has keys of its own, so that
    entries that other programs wrote to the same folder are neither read nor harmed."""

    def __init__(self, cache: Any):
        self.cache, self._path = cache, cache._path  # JAX logs the path

    def get(self, key: str) -> bytes | None:
        """The entry; None where there is none, or it was damaged."""
        kept = self.cache.get(key + SEALED)
        if kept is None or hashlib.sha256(kept[DIGEST:]).digest() == kept[:DIGEST]:
            return kept and kept[DIGEST:]
        self.file(key).unlink(missing_ok=True)
        if processes.is_main():
            what = (
                f"{self._path}: the compiled program {key.rpartition('-')[0] or key} is damaged: it is compiled again"
            )
            print(what, file=sys.stderr)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Add an entry. On a file system it is whole from the first moment on: another process may read meanwhile."""
        content = hashlib.sha256(value).digest() + value
        path = self.file(key)
        if "://" in os.fspath(self._path) or self.cache.eviction_enabled:  # JAX keeps account of what it evicts
            self.cache.put(key + SEALED, content)
            return
        beside = path.with_suffix(".tmp")
        try:
            beside.write_bytes(content)
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise

    def file(self, key: str) -> Any:
        """Where the entry lies."""
        folder = self._path if "://" in os.fspath(self._path) else Path(self._path)
        return folder / f"{key}{SEALED}-cache"


def verify_entries() -> None:
    """From here on the entries of JAX's cache are verified, if it keeps one. It has no hook for it: where a version of
    JAX has other names inside, that is said, and its cache stays as it is."""
    import jax
    from jax._src import compilation_cache as of_jax

    if not (hasattr(of_jax, "_cache") and hasattr(of_jax, "_initialize_cache")):
        print(f"warning: jax {jax.__version__}: compiled programs in its cache can't be verified", file=sys.stderr)
        return
    of_jax._initialize_cache()
    if of_jax._cache is not None and not isinstance(of_jax._cache, Verified):
        of_jax._cache = Verified(of_jax._cache)  # type: ignore[assignment]
