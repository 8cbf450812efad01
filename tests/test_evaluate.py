"""evaluate.py: scores by hand and against independent solvers, judges over HTTP that fail, runs that are killed, answers that
try to be verdicts, the pictures' numbers."""
import http.server
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
import data
import evaluate
import online_dpo
import sft


# ------------------------------------------------------------------------------------------ golden scoring
@pytest.mark.parametrize("text, old, new", [
    ("My final verdict is: [[A>B]]", "A>B", "A>B"),
    ("[[A>>B]] as I said: [[A>>B]]", "A>>B", "A>>B"),       # twice the same
    ("first [[A>B]], no: [[B>A]]", None, "B>A"),            # conflicting: 2025 takes the last
    ("[[a=b]]", None, "A=B"),                               # lower case: 2025 upper-cases
    ("tie", None, None),
    ("", None, None),
    ("[[]] [[C]] [[A]]", None, None),                       # other brackets are no label
    ("[[A><B]]", None, None),
    ("[A>B]", None, "A>B"),                                 # 2025 falls back to single brackets
    ("[[B<A]]", None, "A>B"),                               # mirrored labels are 2025's
    ("[[A>B]] [x] [B>A]", "A>B", "A>B")])
def test_arena_parse_table(text, old, new):
    assert (evaluate.arena_verdict(text, "2024"), evaluate.arena_verdict(text, "2025")) == (old, new)


def bradley_terry(outcomes):
    """Newton's method on the log-likelihood of one strength xi against a baseline at 0; a tie is half a win and half a
    loss. Returns the predicted win probability."""
    xi = 0.0
    for _ in range(100):
        p = 1 / (1 + math.exp(-xi))
        gradient = sum(o * (1 - p) - (1 - o) * p for o in outcomes)
        xi += gradient / (len(outcomes) * p * (1 - p))
    return 1 / (1 + math.exp(-xi))


def test_arena_score_by_hand():
    """Game 1 (A = baseline): A>>B is 3 losses, B>A one win. Game 2 (A = candidate): A>>B 3 wins, A=B half, B>A a loss,
    None nothing: (0+0+0+1+3+0.5+0) / 9 = 0.5."""
    battles = evaluate.arena_battles([("A>>B", 1), ("B>A", 1), ("A>>B", 2), ("A=B", 2), ("B>A", 2), (None, 1), (None, 2)])
    assert battles.tolist() == [0, 0, 0, 1, 1, 1, 1, 0.5, 0] and evaluate.win_rate(battles) == 0.5
    assert evaluate.win_rate(evaluate.arena_battles([(None, 1)])) is None


@pytest.mark.parametrize("seed", range(5))
def test_arena_score_is_bradley_terry(seed):
    """The fit, and its bootstrap percentiles over the same draws, by an independent solver, to 1e-6."""
    rng = random.Random(seed)
    games = [(rng.choice([*evaluate.LABELS, "B>A", "B>A", None]), 1 + i % 2) for i in range(200)]
    battles = evaluate.arena_battles(games)
    assert evaluate.win_rate(battles) == pytest.approx(bradley_terry(battles), abs=1e-6)
    draws = np.random.default_rng(7)
    fits = [bradley_terry(battles[draws.integers(len(battles), size=len(battles))]) for _ in range(100)]
    assert evaluate.bootstrap(battles, 100, 7) == pytest.approx(np.percentile(fits, [2.5, 97.5]), abs=1e-6)


def test_swapping_the_players_mirrors_the_score():
    swap = {"A>>B": "B>>A", "A>B": "B>A", "A=B": "A=B", "B>A": "A>B", "B>>A": "A>>B"}
    games = [(random.Random(i).choice(list(swap)), 1 + i % 2) for i in range(50)]
    mirrored = [(swap[label], game) for label, game in games]
    a, b = (evaluate.win_rate(evaluate.arena_battles(g)) for g in (games, mirrored))
    assert a + b == pytest.approx(1) and a != b
    other_seat = [(label, 3 - game) for label, game in games]
    assert evaluate.win_rate(evaluate.arena_battles(other_seat)) == pytest.approx(b)


def test_bootstrap():
    """A normal mean's interval is +-1.96 standard errors; no item, no interval; equal items, no width; a seed, a value."""
    v = np.random.default_rng(0).normal(size=2000)
    low, high = evaluate.bootstrap(v, 4000)
    assert (high - low) / 2 == pytest.approx(1.96 * v.std() / math.sqrt(2000), rel=0.05) and low < v.mean() < high
    assert evaluate.bootstrap([]) == (None, None) and evaluate.bootstrap([0.3] * 9) == (0.3, 0.3)
    assert evaluate.bootstrap(v, 50, 3) == evaluate.bootstrap(v, 50, 3) != evaluate.bootstrap(v, 50, 4)


@pytest.mark.parametrize("text, rating", [
    ("Rating: [[7]]", 7), ("[[7.5]] or [[3]]", 7.5), ("[2] then [[9]]", 9), ("I give [8]", 8), ("8/10", None), ("", None),
    ("[[rating]]", None), ("[[11]]", 11), ("[[-1]]", None), ("[[10]]", 10), ("[[5.]]", 5)])
def test_mt_bench_rating(text, rating):
    assert evaluate.mt_rating(text) == rating


def test_t_quantile():
    """Published 97.5% points of Student's t."""
    for dof, value in {1: 12.7062, 2: 4.3027, 3: 3.1824, 5: 2.5706, 10: 2.2281, 30: 2.0423, 1000: 1.9623}.items():
        assert evaluate.t_quantile(dof) == pytest.approx(value, rel=1e-4)


def test_quadratic_fit_by_hand():
    """y = (x - 2)^2 exactly; three points have no interval; shifted far from 0 it stays exact."""
    fit = evaluate.quadratic_fit([0, 1, 2, 5], [4, 1, 0, 9])
    assert fit["coefficients"] == pytest.approx([4, -4, 1]) and fit["vertex"] == pytest.approx(2) and not fit["maximum"]
    assert fit["vertex_low"] == pytest.approx(2) == fit["vertex_high"]
    assert evaluate.quadratic_fit([0, 1, 2], [4, 1, 0])["low"] is None
    x = np.linspace(1000, 1010, 30)
    assert evaluate.quadratic_fit(x, -(x - 1004) ** 2)["vertex"] == pytest.approx(1004, abs=1e-6)
    with pytest.raises(ValueError, match="three different x"):
        evaluate.quadratic_fit([1, 1, 2, 2], [0, 1, 2, 3])


def test_quadratic_fit_intervals_cover():
    """Of 400 noisy parabolas the 95% intervals of each coefficient and of the vertex hold the truth 91 to 98.5% of the
    time; noise without curvature gives no interval of the vertex most of the time."""
    rng, x, truth, vertex = np.random.default_rng(1), np.linspace(-1, 3, 12), np.array([1.0, 2.0, -1.0]), 1.0
    hits, found = np.zeros(3), []
    for _ in range(400):
        fit = evaluate.quadratic_fit(x, truth @ np.stack([x ** 0, x, x * x]) + rng.normal(size=12) * 0.5)
        hits += (np.array(fit["low"]) <= truth) & (truth <= fit["high"])
        if fit["vertex_low"] is not None:
            found.append(fit["vertex_low"] <= vertex <= fit["vertex_high"])
    assert all(0.91 < h / 400 < 0.985 for h in hits) and len(found) > 390 and 0.91 < np.mean(found) < 0.985
    flat = [evaluate.quadratic_fit(x, rng.normal(size=12))["vertex_low"] is None for _ in range(200)]
    assert np.mean(flat) > 0.85


def test_rank_correlation():
    assert evaluate.rank_correlation([1, 2, 3], [10, 200, 3000]) == pytest.approx(1)
    assert evaluate.rank_correlation([1, 2, 3], [3, 1, 2]) == pytest.approx(-0.5)
    assert evaluate.rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(math.sqrt(0.9))    # ranks 1, 2.5, 2.5, 4
    assert evaluate.rank_correlation([1, 1, 1], [1, 2, 3]) is None is evaluate.rank_correlation([1, 2], [1, 2])
