"""A prepared folder is whole or absent, and built once."""

from pathlib import Path

import pytest

from lit_llm.data.folder_cache import cached_folder
from lit_llm.errors import UserError


def read(folder: Path) -> str:
    return (folder / "value").read_text()


class Builder:
    """Writes a value and counts how often it was asked to."""

    def __init__(self, value: str = "done") -> None:
        self.value = value
        self.calls = 0

    def __call__(self, draft: Path) -> None:
        self.calls += 1
        assert list(draft.iterdir()) == []
        (draft / "value").write_text(self.value)


def test_it_is_built_once_and_then_opened(tmp_path: Path) -> None:
    build = Builder()
    assert cached_folder(tmp_path / "deep" / "key", read, build) == "done"
    assert cached_folder(tmp_path / "deep" / "key", read, Builder("other")) == "done"
    assert build.calls == 1


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(draft: Path) -> None:
        (draft / "value").write_text("half")
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        cached_folder(tmp_path / "key", read, fail)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert cached_folder(tmp_path / "key", read, Builder()) == "done"


def test_a_damaged_folder_and_what_a_killed_builder_left_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    (tmp_path / ".key.123").mkdir()
    assert cached_folder(tmp_path / "key", read, Builder()) == "done"
    assert not (tmp_path / ".key.123").exists()


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache cannot be written here"):
        cached_folder(tmp_path / "file" / "key", read, Builder())
