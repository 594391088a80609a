"""The tiny run of the recipes' tests, for callbacks seen in a real run."""

from tests.recipes.conftest import tiny

__all__ = ["tiny"]
