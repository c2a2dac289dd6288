"""Fixtures of the tests of storage."""

from tests.contracts.conftest import quick_disk

__all__ = ["quick_disk"]
