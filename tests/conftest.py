"""Fixtures that all tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.s3 import s3, s3_server

__all__ = ["s3", "s3_server"]

DATA_VARIABLE = "LOGITSTORE_TEST_DATA"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; a test that asks for it is skipped where it is absent."""
    given = os.environ.get(DATA_VARIABLE)
    folder = Path(given) if given else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real data, and '{folder}' is not there; set {DATA_VARIABLE} to a folder that holds it")
    return folder


@pytest.fixture(autouse=True)
def _same_folder() -> Iterator[None]:
    """Come back to where the tests were started from: the next one may import from there in another process."""
    here = Path.cwd()
    yield
    os.chdir(here)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
