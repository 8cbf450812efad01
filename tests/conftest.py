import os
import socket
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with --slow")
    config.addinivalue_line("markers", "gpu: needs CUDA")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--real-data", metavar="DIR", help="folder of the benchmarks' own files, for the tests on them")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


def start_ranks(script: str, argv: list, ranks: int, log) -> list[subprocess.Popen]:
    """The ranks of a run as processes of their own, not under a launcher, whose workers would outlive a SIGKILL of it.
    What they print goes to files: log.0.log, log.1.log, .."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]),
                 "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return [subprocess.Popen([sys.executable, os.path.join(root, script), *map(str, argv)], stdout=open(f"{log}.{r}.log", "a"),
                             stderr=subprocess.STDOUT, env={**os.environ, **world, "RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(ranks)]


# Properties: 50 examples. --hypothesis-profile thorough: 500
for name, examples in (("suite", 50), ("thorough", 500)):
    settings.register_profile(name, max_examples=examples, deadline=None, derandomize=True,
                              suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
