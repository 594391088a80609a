"""Tokenised samples on disk: one Arrow file, mapped into memory, any row at once.

Arrow (https://arrow.apache.org/docs/python/ipc.html) maps columns of lists without reading them, so
every rank and worker shares one copy in the page cache.

Legend: n tokens of a sample.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lit_llm.data.packing import IGNORED

_ROWS_AT_ONCE = 1000


class SampleWriter:
    """Streams samples to an Arrow file; use it as a context.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> "SampleWriter":
        import pyarrow

        integers = pyarrow.list_(pyarrow.int32())
        flags = pyarrow.list_(pyarrow.bool_())
        self._schema = pyarrow.schema(
            [("input_ids", integers), ("trained", flags), ("about", pyarrow.string())]
        )
        self._writer = pyarrow.ipc.new_file(str(self.path), self._schema)
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._writer.close()

    def write(
        self, input_ids: list[int], trained: list[bool], about: dict[str, Any] | None
    ) -> None:
        """Add one sample.

        Args:
            input_ids: Its n tokens.
            trained: Which of them are targets.
            about: What is kept beside the tokens, as plain data.
        """
        text = None if about is None else json.dumps(about, ensure_ascii=False)
        self._rows.append({"input_ids": input_ids, "trained": trained, "about": text})
        if len(self._rows) == _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        if self._rows:
            table = pyarrow.Table.from_pylist(self._rows, schema=self._schema)
            self._writer.write_table(table, max_chunksize=_ROWS_AT_ONCE)
            self._rows = []


class SampleTable(Dataset[dict[str, Tensor]]):
    """The samples of an Arrow file: ``input_ids`` (n,) and ``labels`` (n,), -100 where not trained.

    Args:
        path: A file that ``SampleWriter`` wrote.

    Raises:
        OSError: When there is no such file.
        ValueError: When it is damaged.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow

        self.path = path
        try:
            with pyarrow.memory_map(str(path)) as source:
                self._table = pyarrow.ipc.open_file(source).read_all()
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is damaged") from error

    def __len__(self) -> int:
        """The number of samples."""
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample ``index``, counted from 0."""
        input_ids = self._values("input_ids", index).astype(np.int64)
        trained = self._values("trained", index)
        labels = np.where(trained, input_ids, IGNORED)
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}

    def _values(self, name: str, index: int) -> NDArray[Any]:
        values = self._table.column(name)[index].values
        result: NDArray[Any] = values.to_numpy(zero_copy_only=False)
        return result

    def lengths(self) -> NDArray[np.int64]:
        """(samples,) tokens of each sample."""
        import pyarrow.compute

        lengths = pyarrow.compute.list_value_length(self._table.column("input_ids"))
        return lengths.to_numpy().astype(np.int64)

    def about(self, index: int) -> dict[str, Any] | None:
        """What was kept beside the tokens of a sample."""
        text = self._table.column("about")[index].as_py()
        return None if text is None else json.loads(text)

    # A mapped table would be pickled as the data behind it; a worker maps the file anew.
    def __getstate__(self) -> dict[str, Any]:
        """The path alone."""
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the file."""
        self.__init__(state["path"])  # type: ignore[misc]
