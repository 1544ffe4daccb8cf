"""What every test gets: a seed from its id, caches of this session only, a fresh Dynamo, no GPU tests without a GPU."""

import os
import random
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


class TorchRandom:
    """Lets hypothesis seed torch before each example (always alike), so that a failing example fails when replayed."""

    def seed(self, seed: Any) -> None:
        torch.manual_seed(int(seed))

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(TORCH_RANDOM)

# Examples are derived from the test, as seeds are; HYPOTHESIS_PROFILE=explore looks for new ones.
# Timing is never asserted, hence no deadline.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_configure(config: pytest.Config) -> None:
    # OMP_NUM_THREADS holds, for processes side by side that xdist did not start: threads that outnumber the cores spin while
    # they wait for each other. The reference of 60 x 4096 in eight processes on two cores: 0.1 s with one thread each, 4 s
    # with two.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, (os.cpu_count() or 1) // NUM_WORKERS))
    if hasattr(config, "workerinput"):
        return  # an xdist worker: the environment set below came with it
    if os.environ.get("EXPECTTEST_ACCEPT"):
        if os.environ.get("CI"):
            raise pytest.UsageError("EXPECTTEST_ACCEPT must not be set in CI: a person accepts snapshots")
        if getattr(config.option, "numprocesses", None):
            raise pytest.UsageError("EXPECTTEST_ACCEPT must be used without -n: workers would edit one file at once")

    # A user's warm Inductor cache would hide a pass that no longer runs. Workers and subprocesses share this one.
    cache = tempfile.TemporaryDirectory(prefix="dsv4-compile-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(cache.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache.name, "inductor"))
    os.environ["TRITON_CACHE_DIR"] = str(Path(cache.name, "triton"))
    # Inductor's pool of compile processes takes longer to start than the small programs here take to compile.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _seed_from_test_id(request: pytest.FixtureRequest) -> None:
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:  # importing it costs seconds, and most op tests do without
        torch._dynamo.reset()
