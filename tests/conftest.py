"""One thread for each process and a cache of the session's own: tests are the same wherever they run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep prepared data out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["SCALETRAIN_CACHE"] = str(folder)
    yield folder
    del os.environ["SCALETRAIN_CACHE"]


@pytest.hookimpl(tryfirst=True)  # before the marks of groups are read
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot do; with several workers, keep tests of several processes in one
    of them, and each file of unit tests.
    """
    import torch

    for item in items:
        folder = item.path.parent.name
        if folder != "recipes":
            processes = folder in ("distributed", "chaos")
            item.add_marker(pytest.mark.xdist_group("processes" if processes else str(item.path)))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("network") and os.environ.get("HF_HUB_OFFLINE") == "1":
            item.add_marker(pytest.mark.skip(reason="offline"))
