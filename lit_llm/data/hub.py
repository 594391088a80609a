"""Records from a data set on the Hugging Face Hub."""

import re
from collections.abc import Iterator

from lit_llm.data.record_formats import Record, without_nulls
from lit_llm.errors import UserError

_COMMIT = re.compile(r"[0-9a-f]{40}")


def read_hub(
    path: str,
    *,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = True,
) -> Iterator[Record]:
    """Read a data set with ``datasets.load_dataset``; code from the Hub is never run.

    Args:
        path: Name of the data set, ``"owner/name"`` or ``"name"``.
        subset: Configuration of the data set.
        split: Split to read.
        revision: Branch, tag or commit.
        streaming: Read while downloading, without a copy on disk.

    Raises:
        UserError: When the Hub does not answer or does not know the data set, subset or split.
    """
    try:
        import datasets

        records = datasets.load_dataset(
            path, name=subset, split=split, revision=revision, streaming=streaming
        )
        for row, record in enumerate(records, start=1):
            data = {name: without_nulls(value) for name, value in record.items()}
            yield Record(data, f"{path}/{split}:{row}")
    # The Hub client, its transport and every file format raise errors of their own.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        wanted = f"{path!r} (subset {subset!r}, split {split!r}, revision {revision!r})"
        raise UserError(
            f"cannot read {wanted} from the Hugging Face Hub: {reason.rstrip('.')}. "
            "There is no local file or folder of that name either."
        ) from error


def hub_commit(path: str, revision: str | None = None) -> str | None:
    """Commit hash that a data set's revision stands for, or None when the Hub cannot be asked."""
    if revision and _COMMIT.fullmatch(revision):
        return revision
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(path, revision=revision, timeout=10).sha
    # Only identifies the version: whatever keeps the Hub from answering, reading will tell.
    except Exception:
        return None
