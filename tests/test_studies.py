"""Every study's --quick: whole arms in seconds on made data, the same code as the real study."""
import importlib
import json

import numpy as np
import pytest

import studies

STUDIES = ["real_model", "online"]
SLOW = ["beta", "losses", "scaling", "report", "packing", "margins", "reference", "selection"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


@pytest.mark.parametrize("name", [
    *STUDIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_quick_study_leaves_numbers_and_a_picture(name, work):
    study = importlib.import_module(f"study_{name}")
    result = study.main(["--quick", "--work", str(work)])
    file = work / f"study-{name.replace('_', '-')}"
    assert json.loads(file.with_suffix(".json").read_text()) == json.loads(json.dumps(result))
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert result["verdict"]
    assert file.with_suffix(".json").stat().st_size < 50_000


def test_a_constraint_is_read_from_the_prompt_and_checked():
    import study_real_model as study
    table = {"short": ("one two", "w " * 31), "sentence": ("It is 3.5 m.", "It is. It was."),
             "sure": ("Sure, here.", "Yes. Sure."), "commas": ("a b", "a, b")}
    for row in study.constrained(["question"] * 4):
        prompt = row["messages"][:1]
        good, bad = table[study.kind_of(prompt)]
        assert study.satisfied(prompt, [good, bad, ""], None) == [1, 0, 0]


def test_verdict_needs_an_interval_without_zero():
    same = np.zeros((3, 50))
    assert studies.verdict(studies.difference(same, same)) == "undecided"
    assert studies.verdict(studies.difference(same + 1, same)) == "agrees"
    assert studies.verdict(studies.difference(same, same + 1)) == "disagrees"


def test_rank_correlation_with_interval():
    from study_report import correlation, rank_correlation
    assert rank_correlation(np.array([1, 2, 3]), np.array([3, 1, 2])) == pytest.approx(-0.5)
    x = np.arange(20.0)
    assert list(correlation(x, x ** 3).values()) == pytest.approx([1, 1, 1])
    assert correlation(x, np.zeros(20))["mean"] is None
