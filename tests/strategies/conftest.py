"""Two ranks that last as long as the tests, and the runs that they are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.strategies.recipe_cases import write_settings
from tests.strategies.world import World


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[World]:
    """Two processes that do jobs; mark what uses them ``xdist_group("two_ranks")``."""
    world = World(2)
    yield world
    world.close()


@pytest.fixture(scope="session")
def parity_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the settings of every recipe."""
    return write_settings(tmp_path_factory.mktemp("parity"))
