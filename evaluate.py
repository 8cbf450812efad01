"""Evaluation (LIONs, arXiv 2407.06542, sections 2 and 4): four benchmarks, margins, curves, a table of all runs.

Reads   models (folders of sft.py, dpo.py, online_dpo.py or Hub ids), questions, templates, answers: files of the
        benchmarks' own formats or hf:OWNER/NAME/PATH of a Hub data set (hf:spaces/.. of a Space).
Writes  --output (None: MODEL/evaluate/COMMAND): result.json, which names all that decides the number, answers-*.jsonl,
        verdicts-*.jsonl. Every answer and verdict is on disk the moment it is there, under a hash of all that decides
        it: the same command goes on where a killed one died, and nothing that was paid is asked again.

    python evaluate.py                                                   # the demo's stages, a table
    python evaluate.py arena-hard MODEL --templates judge_config.yaml --base-url https://api.openai.com/v1 --dry-run
    python evaluate.py arena-hard MODEL --variant star ..                # the paper's cheaper Arena-Hard-Auto*
    python evaluate.py mt-bench MODEL --base-url URL                     # key: OPENAI_API_KEY
    python evaluate.py openllm MODEL                                     # needs lm-eval
    python evaluate.py alpaca-eval MODEL                                 # needs alpaca_eval
    python evaluate.py judge RUN RUN --data PROMPTS --judge pairrm       # win rates among any models
    python evaluate.py margins BEFORE AFTER --data PAIRS
    python evaluate.py curve RUNS.. --x steps --y exact_match
    python evaluate.py report RUNS..

Differs from the benchmarks
 1. A game without a verdict is no battle, and counted; Arena-Hard's own 2025 scoring drops its twin as well.
 2. The turn that asks for a missing verdict (Arena-Hard 2024) is worded here (FINISH).
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import torch

import data
import dpo
import online_dpo
import sft

VARIANTS = {"v0.1": dict(judge="gpt-4-1106-preview", baseline="gpt-4-0314"),
            "star": dict(judge="gpt-4o-2024-05-13", baseline="gpt-3.5-turbo-0125")}
ARENA = "hf:lmarena-ai/arena-hard-auto/data/arena-hard-v0.1/"
MT_BENCH = "hf:spaces/lmsys/mt-bench/data/"
ALPACA = "hf:tatsu-lab/alpaca_eval/alpaca_eval_gpt4_baseline.json"
MT_TEMPERATURE = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
                  "stem": 0.1, "humanities": 0.1}             # FastChat's; 0.7 for any other category
OPENLLM = {  # Open LLM Leaderboard v1: shots and metric, lm-evaluation-harness' names
    "arc_challenge": (25, "acc_norm,none"), "hellaswag": (10, "acc_norm,none"), "mmlu": (5, "acc,none"),
    "truthfulqa_mc2": (0, "acc,none"), "winogrande": (5, "acc,none"), "gsm8k": (5, "exact_match,strict-match")}
FINISH = "Please end your judgment now: give the one label that is your final verdict."
STAGES = ["runs/sft", "runs/dpo", "runs/online-dpo"]


# --------------------------------------------------------------------------------------------- maths
LABELS = {"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)}      # A's score, battles
MIRRORED = {"B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A"}                 # known since 2025


def arena_verdict(text: str, parse: str) -> str | None:
    """Arena-Hard-Auto's label in a judge's own text, None where there is none (2406.11939; its code).

    2024: all [[..]] of A, B, <, >, = agree on one value. 2025: the last [[..]] of the upper-cased text, else the last
    [..]. "[[A>B]] .. [[B>A]]" is None in 2024, B>A in 2025; "[[a>b]]" None in 2024, A>B in 2025."""
    if parse == "2024":
        found = set(re.findall(r"\[\[([AB<>=]+)\]\]", text))
        label = found.pop() if len(found) == 1 else None
        return label if label in LABELS else None
    found = re.findall(r"\[\[([AB<>=]+)\]\]", text.upper()) or re.findall(r"\[([AB<>=]+)\]", text.upper())
    label = MIRRORED.get(found[-1], found[-1]) if found else None
    return label if label in LABELS else None


def arena_battles(games) -> np.ndarray:
    """(label, game) -> the candidate's battles: 1 win, 0.5 tie, 0 loss, (N,) float64. Game 1 has A = baseline, game 2 is
    swapped; a strong verdict is 3 battles, None none. Labels A>>B then B>>A: 0, 0, 0, 0, 0, 0, not a tie."""
    out = []
    for label, game in games:
        if label is not None:
            score, times = LABELS[label]
            out += [score if game == 2 else 1.0 - score] * times
    return np.array(out, dtype=np.float64)


def win_rate(outcomes) -> float | None:
    """Share of battles won, ties half: Arena-Hard's score / 100, None where there was no battle. All battles have the
    baseline, so that a Bradley-Terry fit anchored at it, sigmoid(xi) = mean of outcomes, has this closed form."""
    return float(np.mean(outcomes)) if len(outcomes) else None


def bootstrap(values, draws: int = 1000, seed: int = 0) -> tuple[float, float] | tuple[None, None]:
    """2.5 and 97.5 percentile of the mean over resampled items (battles, questions, prompts). Equal values: no width.
    Paired comparisons: pass one difference an item."""
    v, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    if not len(v):
        return None, None
    return tuple(map(float, np.percentile([v[rng.integers(len(v), size=len(v))].mean() for _ in range(draws)], [2.5, 97.5])))


def mt_rating(text: str) -> float | None:
    """MT-Bench's rating in a judge's text (2306.05685): the first [[number]], else the first [number], else None.
    "Rating: [[7.5]]" is 7.5. Like the benchmark it takes numbers outside 1..10, too; the result counts those."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    return float(found[1]) if found else None


def t_quantile(dof: int) -> float:
    """|t| that 95% of Student's t lie below, dof degrees of freedom: with t = sqrt(dof) tan u its density is
    cos(u)^(dof - 1), summed up numerically. dof 1: 12.706, 10: 2.228."""
    u = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(u) ** (dof - 1)
    below = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(dof) * math.tan(np.interp(0.95, below / below[-1], u))


def quadratic_fit(x, y) -> dict:
    """Least squares y = c0 + c1 x + c2 x^2 with 95% intervals, and its vertex -c1 / (2 c2) with Fieller's interval.

    x, y (n,), three different x at least. Intervals are None without a degree of freedom left (n = 3), the vertex's
    also where c2's includes 0: then no finite interval exists. y = (x - 2)^2: coefficients 4, -4, 1, vertex 2."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(set(x.tolist())) < 3:
        raise ValueError(f"a degree-2 fit needs three different x, got {sorted(set(x.tolist()))}")
    m, s = x.mean(), x.std()
    z = np.stack([np.ones_like(x), (x - m) / s, ((x - m) / s) ** 2], 1)                   # (n, 3), well conditioned
    back = np.array([[1, -m / s, (m / s) ** 2], [0, 1 / s, -2 * m / s ** 2], [0, 0, 1 / s ** 2]])   # to powers of x
    d = np.linalg.lstsq(z, y, rcond=None)[0]
    c, dof = back @ d, len(x) - 3
    out = {"coefficients": c.tolist(), "low": None, "high": None, "n": len(x), "vertex": None, "vertex_low": None,
           "vertex_high": None, "maximum": bool(c[2] < 0)}
    if d[2] != 0:
        out["vertex"] = float(m - s * d[1] / (2 * d[2]))
    if dof:
        t = t_quantile(dof)
        cov = np.linalg.inv(z.T @ z) * float(((y - z @ d) ** 2).sum() / dof)                # of d
        half = t * np.sqrt(np.diag(back @ cov @ back.T).clip(0))
        out |= {"low": (c - half).tolist(), "high": (c + half).tolist()}
        # Fieller: all v with (d1 + 2 d2 v)^2 <= t^2 Var(d1 + 2 d2 v), a quadratic a v^2 + 2 b v + e <= 0
        a, b, e = (4 * (d[2] ** 2 - t * t * cov[2, 2]), 2 * (d[1] * d[2] - t * t * cov[1, 2]), d[1] ** 2 - t * t * cov[1, 1])
        if a > 0 and b * b >= a * e:
            root = math.sqrt(b * b - a * e)
            out |= {"vertex_low": float(m + s * (-b - root) / a), "vertex_high": float(m + s * (-b + root) / a)}
    return out


def rank_correlation(x, y) -> float | None:
    """Spearman's: Pearson's over ranks, ties at their mean rank; None below 3 points or where one is constant.
    (1, 2, 3) with (3, 1, 2): -0.5."""
    mean_rank = lambda v: np.array([(np.sum(v < a) + np.sum(v <= a) + 1) / 2 for a in v])
    x, y = mean_rank(np.asarray(x, dtype=np.float64)), mean_rank(np.asarray(y, dtype=np.float64))
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return None
    return float(((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std()))
