"""The trials of break.py, one test each."""
import importlib

import pytest

faults = importlib.import_module("break")                   # `import break` is no Python
ROWS = {f"{t.kind} | {t.what}": t for t in faults.TRIALS}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return faults.Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if t.quick else pytest.mark.slow) for name, t in ROWS.items()])
def test_survives(name, lab):
    assert faults.attempt(ROWS[name], lab) is None
