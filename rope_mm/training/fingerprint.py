"""A fingerprint of the rows of a data set, by which a run notices that its data has changed."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from rope_mm.data.holdout import is_plain, read_content

SAMPLED_ROWS = 256  # of each source, evenly spaced, whose images are read


def fingerprint_rows(sources: Sequence[Any], files: Sequence[str] = ()) -> dict[str, Any]:
    """The number of rows and a digest of them: all texts and numbers, and the images of some rows.

    Where images are stored as paths, their files' names and sizes stand for them. Rows of streams are not
    counted: columns and files stand for them.

    Args:
        sources: data sets of `datasets`.
        files: of streams, see `rope_mm.data.streaming.list_files`.
    """
    digest, rows = hashlib.blake2b(digest_size=16), 0
    for source in sources:
        digest.update(repr(sorted((source.features or {}).items())).encode())
        if not isinstance(source, Dataset):
            digest.update(repr(files).encode())
            return {"rows": "streamed", "files": len(files), "digest": digest.hexdigest()}
        rows += len(source)
        for part in read_parts(source.with_format("arrow")):
            digest.update(part)
    return {"rows": rows, "digest": digest.hexdigest()}


def read_parts(source: Any) -> Iterable[bytes]:
    """All bytes of a source that its digest covers."""
    plain = [name for name, feature in source.features.items() if is_plain(feature)]
    if plain and len(source):
        for table in source.select_columns(plain).iter(batch_size=10_000):
            yield repr(table.to_pydict()).encode()
    rest = [name for name in source.features if name not in plain]
    if rest and len(source):
        count = min(SAMPLED_ROWS, len(source))
        chosen = sorted({i * (len(source) - 1) // max(count - 1, 1) for i in range(count)})
        for row in source.select(chosen).select_columns(rest).iter(batch_size=1):
            yield from read_content(row.to_pydict(), whole_file)


def whole_file(stored: dict[str, Any]) -> Iterable[bytes]:
    """The bytes of a file that is stored; the name and size of one elsewhere."""
    path = Path(stored["path"]) if stored["path"] else None
    if stored["bytes"]:
        yield stored["bytes"]
    elif path is not None:
        yield f"{path.name} {path.stat().st_size if path.exists() else ''}".encode()
