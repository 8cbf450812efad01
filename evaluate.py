"""Evaluation (LIONs, arXiv 2407.06542, sections 2 and 4): benchmarks, win rates, margins, curves.

Reads   models (folders of sft.py, dpo.py, online_dpo.py, or Hub ids). Questions, templates and
        answers in the benchmarks' own formats, as files or hf:OWNER/NAME/PATH of a Hub data set.
Writes  --output: result.json, which names all that decides the number, answers-*.jsonl and
        replies-*.jsonl. Answers and replies are on disk as they finish, under a hash of all that
        decides them: the same command continues, and nothing that was paid is asked again.

    python evaluate.py                                              # the demo's stages, a table
    python evaluate.py arena-hard MODEL --templates judge_config.yaml --judge-url URL --dry-run
    python evaluate.py mt-bench MODEL --judge-url URL               # key: OPENAI_API_KEY
    python evaluate.py alpaca-eval MODEL --judge-url URL            # needs alpaca_eval
    python evaluate.py openllm MODEL                                # needs lm-eval
    python evaluate.py judge RUN RUN --data PROMPTS --judge pairrm  # win rates of any models
    python evaluate.py agree --judge JUDGE --data PAIRS             # is a judge any good?
    python evaluate.py margins BEFORE AFTER --data PAIRS
    python evaluate.py curve RUNS.. --x steps --y exact-match
    python evaluate.py report RUNS..                                # one page, report.html

Judges that were shut down: gpt-4-1106-preview, which is Arena-Hard v0.1's and AlpacaEval's, and
gpt-4-0314 on 2026-03-26, and gpt-4, MT-Bench's, on 2026-10-23. A number under another judge is
no number of the benchmark. Compare it with numbers of the same judge alone, and look at how often
that judge agrees with stored verdicts (`agree`).

Differs from the benchmarks
 1. A game without a verdict is left out and counted. Arena-Hard's 2025 scoring leaves out the
    question's other game as well.
 2. A reply that was cut at --judge-max-tokens gives no verdict.
 3. The turn that asks for a missing verdict (Arena-Hard 2024) is worded here (FINISH).
 4. Arena-Hard's interval resamples questions. The original's, over battles, stands beside it.
 5. Style control is left out: Arena-Hard fits it over the battles of all models that it judged.
"""
from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import gzip
import html
import inspect
import itertools
import json
import math
import operator
import os
import re
import string
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas
import torch
from numpy.polynomial.polynomial import polyfit, polyval

import data
from data import (HelpFormatter, hash_of, positive, read_growing, read_json, table, user,
                  without_nan, write_json, write_lines)
from dpo import CURVES, copy_of, frozen_logps
from online_dpo import (ask_llm, check_judge, check_sampling, check_urls, fill, final_text,
                        judge_flags, load_judge, read_prompts, refused_parts, reply_keys,
                        request_flags, sample_phase, sampling_flags)
from sft import (default_dtype, default_micro_tokens, device, git_commit, init_distributed, log,
                 needs, plot_curves, prepare_rows, run_main, torch_dtype)

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
SHUT_DOWN = {"gpt-4-1106-preview": "2026-03-26", ANNOTATOR: "2026-03-26",
             "gpt-4-0314": "2026-03-26", "gpt-4": "2026-10-23"}
VERSIONS = {  # Arena-Hard-Auto: its data, judge, tokens per verdict, parsing, baseline
    "v0.1": ("arena-hard-v0.1", "gpt-4-1106-preview", 4096, "2024", "gpt-4-0314"),
    "star": ("arena-hard-v0.1", "gpt-4o-2024-05-13", 4096, "2024", "gpt-3.5-turbo-0125"),
    "v2.0": ("arena-hard-v2.0", "gpt-4.1", 16000, "2025", None)}     # a baseline per category
PLACEHOLDERS = (("question_1", "answer_1", "answer_2"), ("QUESTION", "ANSWER_A", "ANSWER_B"))
ARENA = "hf:lmarena-ai/arena-hard-auto/data"
MT_BENCH = "hf:spaces/lmsys/mt-bench/data"
ALPACA = "hf:tatsu-lab/alpaca_eval/alpaca_eval_gpt4_baseline.json"
MT_TEMPERATURE = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
                  "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}     # FastChat's, else 0.7
OPENLLM = [  # Open LLM Leaderboard v1 in lm-evaluation-harness' names, NAME:SHOTS:METRIC
    "arc_challenge:25:acc_norm,none", "hellaswag:10:acc_norm,none", "mmlu:5:acc,none",
    "truthfulqa_mc2:0:acc,none", "winogrande:5:acc,none", "gsm8k:5:exact_match,strict-match"]
NAMED = ("version", "judge", "annotator", "parse", "limit")     # in a result's folder name
FINISH = "Please end your judgment now: give the one label that is your final verdict."


# ------------------------------------------------------ scoring rules: Arena-Hard, MT-Bench, fits
LABELS = {  # (score of A, number of battles)
    "A>>B": (1.0, 3),
    "A>B": (1.0, 1),
    "A=B": (0.5, 1),
    "B>A": (0.0, 1),
    "B>>A": (0.0, 3)}
MIRRORED = {  # read by the 2025 rule
    "B<<A": "A>>B",
    "B<A": "A>B",
    "B=A": "A=B",
    "A<B": "B>A",
    "A<<B": "B>>A"}


def arena_verdict(text: str, parse: str) -> str | None:
    """Arena-Hard-Auto's label in a judge's text, or None (2406.11939 and its code).

    2024: all [[..]] of A, B, <, >, = are one label. 2025: the last [[..]] of the upper-cased text,
    else the last [..]. last: as 2025, of what follows the judge's last thought.
    "[[A>B]] .. [[B>A]]" is None in 2024, B>A in 2025."""
    if parse == "2024":
        labels = list(set(re.findall(r"\[\[([AB<>=]+)\]\]", text)))
        if len(labels) > 1:
            return None
    else:
        text = (final_text(text) if parse == "last" else text).upper()
        labels = re.findall(r"\[\[([AB<>=]+)\]\]", text) or re.findall(r"\[([AB<>=]+)\]", text)
        labels = [MIRRORED.get(label, label) for label in labels]
    if not labels or labels[-1] not in LABELS:
        return None
    return labels[-1]


def arena_battles(verdicts: dict, drop_twins: bool = False) -> pandas.DataFrame:
    """{"QUESTION/GAME": label or None} -> a row per battle of the candidate: its question and its
    score, 1 win, 0.5 tie, 0 loss. Game 1 has A = baseline, game 2 is swapped. A strong verdict
    counts as 3 battles. A game without a verdict is left out, with drop_twins the question's other
    game as well."""
    battles = []
    failed = {name[:-2] for name, label in verdicts.items() if label is None and drop_twins}
    for name, label in verdicts.items():
        question, _, game = name.rpartition("/")
        if label is not None and question not in failed:
            score, times = LABELS[label]
            if game == "1":
                score = 1.0 - score
            battles += [(question, score)] * times
    return pandas.DataFrame(battles, columns=["question", "score"])


def win_rate(outcomes) -> float | None:
    """Share of battles won, ties half, or None without battles. All battles are with the baseline,
    so that the mean is the Bradley-Terry fit anchored at it: sigmoid(xi) = mean of outcomes."""
    if len(outcomes) == 0:
        return None
    return float(np.mean(outcomes))


def bootstrap(values, draws=1000, seed=0, groups=None, level=95):
    """Percentiles, around the middle `level` percent, of the mean over resampled items. Equal
    values: no width. For paired comparisons pass one difference per item. groups (n,): items of one
    group, such as a question's battles, are drawn together."""
    items = pandas.Series(values, dtype=float)
    if not len(items):
        return None, None
    if groups is None:
        groups = items.index
    items = items.groupby(np.asarray(groups))
    total = items.sum().to_numpy()
    n = items.size().to_numpy()
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(draws):
        i = rng.integers(len(n), size=len(n))
        means.append(total[i].sum() / n[i].sum())
    return tuple(np.percentile(means, [50 - level / 2, 50 + level / 2]).tolist())


def scored(values, seed=0, groups=None, draws=1000):
    """{"score", "low", "high"}: the mean and its bootstrap interval."""
    low, high = bootstrap(values, draws, seed, groups)
    return {"score": win_rate(values), "low": low, "high": high}


def mt_rating(text: str, parse: str = "mt-bench") -> float | None:
    """MT-Bench's rating in a judge's text (2306.05685): the first [[number]], else the first
    [number]. "Rating: [[7.5]]" is 7.5. As in the benchmark it may lie outside 1..10. parse "last":
    the last one of what follows the judge's last thought."""
    which = 0
    if parse == "last":
        text = final_text(text)
        which = -1
    ratings = re.findall(r"\[\[(\d+\.?\d*)\]\]", text) or re.findall(r"\[(\d+\.?\d*)\]", text)
    return float(ratings[which]) if ratings else None


def quadratic_fit(x, y, draws=1000):
    """Least squares y = c0 + c1 x + c2 x^2 and its vertex -c1 / (2 c2), with 95% intervals.

    The intervals bootstrap the residuals and draw their scale as well, which few points determine
    badly. Three points have no intervals. The vertex has none if the interval of c2 contains 0.
    x, y (n,), at least three different x. y = (x - 2)^2: coefficients 4, -4, 1, vertex 2."""
    x, y = np.asarray([x, y], dtype=float)
    n = len(x)
    different = np.unique(x).tolist()
    if len(different) < 3:
        raise ValueError(f"a degree-2 fit needs three different x, got {different}")
    c = polyfit(x, y, 2)                                                         # (3,)
    fit = {"n": n,
           "coefficients": c.tolist(),
           "vertex": float(-c[1] / (2 * c[2])),
           "maximum": bool(c[2] < 0)}
    fit |= dict.fromkeys(("low", "high", "vertex_low", "vertex_high"))
    if n > 3:
        rng = np.random.default_rng(0)
        residuals = rng.choice(y - polyval(x, c), (draws, n))
        residuals *= np.sqrt(n / rng.chisquare(n - 3, (draws, 1)))
        fits = c + polyfit(x, residuals.T, 2).T                                  # (draws, 3)
        fit["low"], fit["high"] = np.percentile(fits, [2.5, 97.5], axis=0).tolist()
        if fit["low"][2] * fit["high"][2] > 0:
            vertex = np.percentile(-fits[:, 1] / (2 * fits[:, 2]), [2.5, 97.5])
            fit["vertex_low"], fit["vertex_high"] = vertex.tolist()
    return fit


# ------------------------------------------------------------------------ files of the benchmarks
def read_rows(name, flag):
    """Objects of a .jsonl, .jsonl.gz, .json or .yaml file, or of hf:OWNER/NAME/PATH on the Hub
    (hf:spaces/OWNER/NAME/PATH of a Space)."""
    import yaml
    try:
        path = name
        if name.startswith("hf:"):
            from huggingface_hub import hf_hub_download
            kind = "space" if name.startswith("hf:spaces/") else "dataset"
            owner, repository, inside = re.sub("^hf:(spaces/)?", "", name).split("/", 2)
            path = hf_hub_download(f"{owner}/{repository}", inside, repo_type=kind)
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
            if path.endswith((".jsonl", ".jsonl.gz")):
                return [json.loads(line) for line in f if line.strip()]
            if path.endswith(".py"):
                return [python_constants(f.read())]
            content = json.load(f) if path.endswith(".json") else yaml.safe_load(f)
        return content if isinstance(content, list) else [content]
    except Exception as error:                              # many kinds, one way out
        raise ValueError(f"{flag} {name}: cannot be read ({type(error).__name__}: {error}); "
                         f"download it and name the file with {flag}") from None


def python_constants(source):
    """The constants of a Python file, which is read, not run: strings, numbers, dicts, and names of
    earlier ones."""
    known = {}

    def value(node):
        if isinstance(node, ast.Dict):
            return {value(k): value(v) for k, v in zip(node.keys, node.values)}
        return known[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node)
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            known[node.targets[0].id] = value(node.value)
    return known


def key_of(row):
    """The id of a question or answer, in any of the benchmarks' files."""
    for k in ("uid", "question_id", "instruction"):
        if row.get(k) is not None:
            return str(row[k])
    raise ValueError(f"no uid, question_id or instruction in {str(row)[:200]}")


def text_of(turn):
    if isinstance(turn, dict):
        return turn.get("answer", turn.get("content"))
    return turn


class Question(NamedTuple):
    id: str
    turns: list[str]               # of the user
    category: str


def read_questions(args):
    """The first --limit questions of Arena-Hard's file (uid, prompt), MT-Bench's (question_id,
    turns) or AlpacaEval's (instruction)."""
    questions = []
    for row in read_rows(args.questions, "--questions")[:args.limit]:
        turns = row.get("turns") or [row.get("prompt") or row["instruction"]]
        category = row.get("category", row.get("dataset", ""))
        questions.append(Question(key_of(row), list(map(text_of, turns)), category))
    ids = [q.id for q in questions]
    if not ids or len(ids) > len({*ids}):
        raise ValueError(f"--questions {args.questions}: {len(ids)} questions with {len({*ids})} "
                         f"different ids, {max(ids, key=ids.count, default=None)} most often; each "
                         "needs its own")
    return questions


def read_answers(name, flag, questions):
    """id -> a text per turn, from a file in Arena-Hard's form (messages), FastChat's (choices) or
    AlpacaEval's (output). ValueError if an answer is missing, twice there, or a failed request."""
    answers = {}
    for row in read_rows(name, flag):
        texts = [row.get("output")]
        if "messages" in row:
            texts = [text_of(m["content"]) for m in row["messages"] if m["role"] == "assistant"]
        elif "choices" in row:
            texts = [text_of(t) for t in row["choices"][0]["turns"]]
        answers.setdefault(key_of(row), []).append(texts)
    for q in questions:
        own = answers.get(q.id, [])
        if [len(texts) for texts in own] != [len(q.turns)] or not all(
                isinstance(text, str) and text != "$ERROR$" for text in own[0]):
            raise ValueError(f"{flag} {name}: question {q.id} needs one whole answer, with "
                             f"{len(q.turns)} turn(s); it has {len(own)}, or a failed one")
    return {q.id: answers[q.id][0] for q in questions}


# --------------------------------------------------------------------------- answers and verdicts
def sample_answers(args, folder, requests):
    """{"text", "tokens", "finished"} of (messages, temperature), from answers-*.jsonl if they are
    there, else sampled. --dry-run: texts as long as they may become."""
    tokenizer = template = None
    made_by = [args.served_model, args.model, args.serve]
    if args.serve or os.path.isdir(args.model):
        made_by.append(data.weights_hash(args.model))
    if args.engine == "hf":
        tokenizer = data.load_tokenizer(args.model)
        template = data.set_template(tokenizer, args.chat_template)
        made_by = [data.weights_hash(args.model), tokenizer.backend_tokenizer.to_str(), args.dtype,
                   tokenizer.chat_template]
    keys = [hash_of(made_by, args.max_new_tokens, args.top_p, messages, t, args.seed if t else 0)
            for messages, t in requests]
    if args.dry_run:
        answers = {a["key"]: a for a in read_growing(folder, "answers")}
        longest = dict(text="x" * 4 * args.max_new_tokens, finished=True,
                       tokens=args.max_new_tokens)
        return [answers.get(key, longest) for key in keys]
    answers = {}
    by_temperature = {}
    for key, (messages, t) in zip(keys, requests):
        by_temperature.setdefault(t, {})[key] = {"key": key, "prompt": messages}
    for t, rows in sorted(by_temperature.items()):
        settings = copy_of(args, temperature=t, samples=1)
        rows = list(rows.values())
        for row in sample_phase(settings, folder, args.model, tokenizer, template, rows):
            answers[row["key"]] = row["answers"][0]
    return [answers[key] for key in keys]


def candidate_answers(args, questions, temperature, clean=str):
    """--answers, or the model's own, turn after turn: id -> texts, and what a result says of them.
    temperature: question -> its own. clean: of a sampled text, before the next turn."""
    sampled = []
    talks = {q.id: data.add_system([], args.system) for q in questions}
    if args.answers:
        answers = read_answers(args.answers, "--answers", questions)
        n_turns = 0
    else:
        answers = {q.id: [] for q in questions}
        n_turns = max(len(q.turns) for q in questions)
    for turn in range(n_turns):
        asked = [q for q in questions if turn < len(q.turns)]
        requests = []
        for q in asked:
            talks[q.id].append(user(q.turns[turn]))
            requests.append((talks[q.id], temperature(q)))
        for q, a in zip(asked, sample_answers(args, args.shared, requests)):
            text = clean(a["text"])
            answers[q.id].append(text)
            talks[q.id].append(data.assistant(text))
            sampled.append(a)
    if not args.dry_run:
        first = [{"prompt": [user(q.turns[0])], "answer": answers[q.id][0]} for q in questions]
        write_lines(args.shared / "samples.jsonl", map(json.dumps, first))  # for `report`
    texts = list(itertools.chain(*answers.values()))
    about = {"model": args.model or args.answers,
             "questions": len(questions),
             "empty_answers": sum(not text.strip() for text in texts),
             "mean_answer_characters": float(np.mean(list(map(len, texts))))}
    if sampled:
        about |= {"truncated_answers": sum(not a["finished"] for a in sampled),
                  "mean_answer_tokens": float(np.mean([a["tokens"] for a in sampled])),
                  "model_refused_parts": refused_parts(sampled)}
    return answers, about


def judged(args, calls, parse, usual_judge, follow_up=None):
    """calls {id: messages} -> {id: parse(the judge's text) or None}, and what a result says of
    them. follow_up: one more user turn for a first reply without any label. Then both texts are
    parsed together."""
    settings = dict(max_tokens=args.judge_max_tokens, temperature=args.judge_temperature)
    if args.dry_run:
        return {}, dry_run(args, calls, settings)
    replies = ask_llm(args, args.judge, calls, args.shared, **settings)
    records = list(replies.values())
    texts = {name: record["reply"] or "" for name, record in replies.items()}
    if follow_up:
        second = {f"{name}+": [*calls[name], data.assistant(text), user(follow_up)]
                  for name, text in texts.items()
                  if text and not re.search(r"\[\[[AB<>=]+\]\]", text)}
        for name, record in ask_llm(args, args.judge, second, args.shared, **settings).items():
            texts[name[:-1]] += "\n" + (record["reply"] or "")
            records.append(record)
            replies[name[:-1]] = record
    verdicts = {name: parse(text) for name, text in texts.items()}
    unfinished = [name for name, r in replies.items() if not r.get("finished", True)]
    verdicts |= dict.fromkeys(unfinished)                   # whatever marks they contain
    counts = {"calls": len(calls),
              "failed": sum(r["reply"] is None for r in records),
              "unfinished": len(unfinished),
              "unparsed": list(verdicts.values()).count(None),
              "judge_refused_parts": refused_parts(records),
              "judge_urls": sorted({r.get("url") or "unknown" for r in records}),
              "asked": hash_of(calls)}                      # questions, answers, template
    log(f"{counts}: an unparsed verdict is neither win nor loss; the same command asks failed "
        "requests again")
    return verdicts, counts | {"parse": args.parse} | about_judge(args.judge, usual_judge)


def about_judge(judge, usual):
    """What a result says of its judge."""
    gone = SHUT_DOWN.get(judge)
    if gone:
        log(f"--judge {judge} was shut down on {gone}: name a judge that exists")
    return {"judge": judge, "judge_is_the_benchmarks": judge == usual, "judge_shut_down": gone}


def dry_run(args, calls, settings):
    """What is not on disk yet: calls, tokens in (bytes / 4) and at most out, and their cost."""
    known = {r["key"] for r in read_growing(args.shared, "replies") if r["reply"] is not None}
    keys = reply_keys(args.judge, calls, **settings)
    todo = [json.dumps(calls[name]) for name, key in keys.items() if key not in known]
    tokens = sum(map(len, todo)) // 4, len(todo) * args.judge_max_tokens
    cost = args.price and np.dot(tokens, args.price).item() / 1e6
    return {"dry_run": True, "calls": len(todo), "tokens_in": tokens[0],
            "tokens_out_at_most": tokens[1], "cost_at_most": cost}


def finish(args, folder, result):
    """result.json: the score with all that decides it."""
    import transformers
    versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
    flags = {k: v for k, v in vars(args).items() if k not in ("run", "default", "shared")}
    result = {"command": args.command,
              **result,
              "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
              "git": git_commit(),
              "versions": versions,
              "flags": flags,
              "output": str(folder)}
    if "benchmark" in result and args.limit:
        result["benchmark"] += f", first {args.limit} questions"
    keep_older(folder / "result.json", flags)
    write_json(folder / "result.json", result)
    return result


def keep_older(file, flags):
    """A result of other flags, or a file of the user's, is renamed by the time of its writing."""
    if not file.exists():
        return
    with contextlib.suppress(ValueError, AttributeError):
        if read_json(file).get("flags") == json.loads(json.dumps(flags)):
            return
    older = file.with_name(f"result-{file.stat().st_mtime_ns}.json")
    file.rename(older)
    log(f"{file} was of other flags and is now {older}")


def output_folders(args):
    """The folder of answers and replies: --output, else MODEL/evaluate/COMMAND (of margins
    AFTER/..), or runs/evaluate/COMMAND if MODEL is no folder here. And the folder of the result:
    the same, but COMMAND-FLAG-VALUE for flags of NAMED that are set, so that no result replaces
    another."""
    model = getattr(args, "model", None) or getattr(args, "after", None) or ""
    base = Path(model if os.path.isdir(model) else "runs")
    folder = base / "evaluate" / args.command
    return Path(args.output or folder), Path(args.output or named(args, folder))


def named(args, folder):
    """FOLDER-FLAG-VALUE for flags of NAMED that are set."""
    name = folder.name
    for flag in NAMED:
        value = getattr(args, flag, None)
        if value != args.default(flag):
            name += f"-{flag}-{value}".replace("/", "--")
    return folder.with_name(name)


# ------------------------------------------------------------------------------------- benchmarks
def judge_call(template, values, where):
    """A judge's messages from a template with system_prompt and prompt_template."""
    text = template["prompt_template"]
    text = fill(text if isinstance(text, str) else text[0], values, where)
    return [{"role": "system", "content": template["system_prompt"]}, user(text)]


def arena_templates(args, questions):
    """category -> {"prompt_template", "system_prompt", "baseline"}, from the benchmark's files: the
    judge_config.yaml of 2024, or today's config and judge_utils.py. Placeholders of both years."""
    template = {}
    for name in args.templates:
        template |= read_rows(name, "--templates")[0]
    known = template.pop("JUDGE_SETTINGS", {})
    templates = {}
    for category in {q.category for q in questions}:
        own = {"baseline": None} | template | known.get(category, {})
        if args.baseline:
            own["baseline"] = args.baseline
        if not {"prompt_template", "system_prompt"} <= own.keys() or not own["baseline"]:
            raise ValueError(f"--templates {' '.join(args.templates)}: no prompt_template, "
                             f"system_prompt or baseline of category {category}; name the config "
                             "and judge_utils.py of the benchmark")
        templates[category] = own
    return templates


def arena_calls(questions, mine, theirs, templates, where):
    """{"QUESTION/GAME": messages} of both games. Game 1: A is the baseline."""
    calls = {}
    for q in questions:
        a = theirs[q.id]                                    # one text each
        b = mine[q.id]
        for game, answers in (("1", a + b), ("2", b + a)):
            values = {}
            for names in PLACEHOLDERS:
                values |= zip(names, [q.turns[0], *answers])
            calls[f"{q.id}/{game}"] = judge_call(templates[q.category], values, where)
    return calls


def arena_hard(args, folder):
    """Arena-Hard-Auto v0.1 or v2.0, or the paper's Arena-Hard-Auto* (star): two swapped games
    against a baseline. The judge of v0.1 was shut down on 2026-03-26."""
    name, usual_judge, max_tokens, parse, baseline = VERSIONS[args.version]
    args.judge = args.judge or usual_judge
    args.judge_max_tokens = args.judge_max_tokens or max_tokens
    args.parse = args.parse or parse
    args.baseline = args.baseline or baseline
    args.questions = args.questions or f"{ARENA}/{name}/question.jsonl"
    questions = read_questions(args)
    templates = arena_templates(args, questions)
    theirs = {}
    files = args.baseline_answers or f"{ARENA}/{name}/model_answer/{{baseline}}.jsonl"
    for category, template in templates.items():
        file = fill(files, {"baseline": template["baseline"]}, "--baseline-answers")
        of = [q for q in questions if q.category == category]
        theirs |= read_answers(file, "--baseline-answers", of)
    mine, about_answers = candidate_answers(args, questions, lambda q: 0.0)
    calls = arena_calls(questions, mine, theirs, templates, " ".join(args.templates))
    follow_up, level = {"2024": (FINISH, 95), "2025": (None, 90), "last": (None, 95)}[args.parse]
    verdicts, about_verdicts = judged(args, calls, lambda text: arena_verdict(text, args.parse),
                                      usual_judge, follow_up)
    if args.dry_run:
        return about_verdicts
    write_json(folder / "games.json", verdicts)
    battles = arena_battles(verdicts, drop_twins=args.parse == "2025")
    category = battles.question.map({q.id: q.category for q in questions})
    battles["score"] *= 100
    if args.version == "star":
        name += "*"
    score = scored(battles.score, args.seed, battles.question)
    return finish(args, folder, about_answers | about_verdicts | score | {
        "benchmark": name,
        "baseline": args.baseline,
        "template": hash_of(templates),
        "battles": len(battles),
        "style_control": None,
        "categories": {name: scored(part.score, args.seed, part.question)
                       for name, part in battles.groupby(category)},
        "original_interval": bootstrap(battles.score, 100, args.seed, level=level),
        "original_level": level})


def mt_bench(args, folder):
    """MT-Bench: two turns, each graded alone on 1 to 10, some against a reference. Its judge,
    gpt-4, was shut down on 2026-10-23."""
    questions = read_questions(args)
    calls = {}
    rows = []
    templates = {r["name"]: r for r in read_rows(args.templates, "--templates")}
    references = read_answers(args.references, "--references", [
        q for q in questions if q.category in ("math", "reasoning", "coding")])
    answers, about_answers = candidate_answers(
        args, questions, lambda q: MT_TEMPERATURE.get(q.category, 0.7), str.strip)
    for q in questions:
        values = {"question": q.turns[0], "answer": answers[q.id][0]}
        kind = "single-v1"
        for n, reference in enumerate(references.get(q.id, ()), 1):
            values[f"ref_answer_{n}"] = reference
            kind = "single-math-v1"
        for n, (question, answer) in enumerate(zip(q.turns, answers[q.id]), 1):
            values |= {f"question_{n}": question, f"answer_{n}": answer}
            template = templates[kind + "-multi-turn" * (n > 1)]
            calls[f"{q.id}/{n}"] = judge_call(template, values, args.templates)
            rows.append({"id": q.id, "category": q.category, "turn": f"turn {n}"})
    ratings, about_ratings = judged(args, calls, lambda text: mt_rating(text, args.parse), "gpt-4")
    if args.dry_run:
        return about_ratings
    write_json(folder / "ratings.json", ratings)
    rows = pandas.DataFrame(rows).assign(rating=np.array([*ratings.values()], dtype=float))
    groups = rows.melt("rating", ["category", "turn"]).groupby("value", sort=False)
    means = groups.rating.mean()
    rated = rows.dropna(subset="rating")
    score = scored(rated.rating, args.seed, rated.id)
    bars = means.fillna(0.0).to_dict() | {"overall": score["score"] or 0.0}
    data.figure(folder / "mt-bench.png", [
        {"xlabel": "MT-Bench rating", "xlim": (0, 10), "series": bars}])
    return finish(args, folder, about_answers | about_ratings | score | {
        "benchmark": "mt-bench",
        "baseline": None,
        "template": hash_of(templates),
        "categories": without_nan(means).to_dict(),
        "with_reference": len(references),
        "out_of_scale": int((~rated.rating.between(1, 10)).sum())})


def alpaca_eval(args, folder):
    """AlpacaEval-2: outputs in its format. The alpaca_eval package annotates and computes win
    rates, their standard errors and the mean length. The default annotator's judge,
    gpt-4-1106-preview, was shut down on 2026-03-26."""
    package = needs("alpaca_eval", 'alpaca_eval==0.6.6 "setuptools<81"')
    questions = read_questions(args)
    answers, about_answers = candidate_answers(args, questions, lambda q: args.temperature)
    name = name_of(args.model or Path(args.answers).name)
    outputs = [{"instruction": q.turns[0],
                "output": answers[q.id][0],
                "generator": name,
                "dataset": q.category} for q in questions]
    write_json(folder / "outputs.json", outputs)
    baseline = args.reference_outputs or args.questions
    reference = read_rows(baseline, "--reference-outputs")[:args.limit]
    if [r.get("instruction") for r in reference] != [o["instruction"] for o in outputs]:
        raise ValueError(f"--reference-outputs {baseline}: needs one per instruction, in order")
    os.environ["OPENAI_BASE_URL"] = args.judge_url          # how its client takes an endpoint
    metric = "win_rate"
    function = "get_winrate"
    settings = {}
    if args.length_controlled:
        metric = "length_controlled_winrate"
        function = "get_length_controlled_winrate"
        settings = {"save_weights_dir": None}
    board, annotations = package.evaluate(
        model_outputs=outputs, reference_outputs=reference, annotators_config=args.annotator,
        name=name, output_path=str(folder), is_return_instead_of_print=True,
        caching_path=str(args.shared / "annotations-cache.json"), precomputed_leaderboard=None,
        is_cache_leaderboard=False, sort_by=metric, fn_metric=function, metric_kwargs=settings,
        annotation_kwargs={"chunksize": args.concurrency, "num_procs": args.concurrency})
    row = json.loads(board.loc[name].to_json())
    preferences = pandas.Series([a.get("preference") for a in annotations], dtype=float)
    return finish(args, folder, about_answers | row | about_judge(args.annotator, ANNOTATOR) | {
        "benchmark": "alpaca-eval-2",
        "baseline": reference[0].get("generator"),
        "unparsed": int(preferences.isna().sum()),
        "score": row[metric],
        "stderr": row.get("lc_standard_error", row.get("standard_error"))})


def subject_scores(results, task, metric):
    """The metric of each subject of a group task such as MMLU, {} of a plain task. The leaderboard
    takes their plain mean. The harness weighs subjects by their questions."""
    members = results.get("group_subtasks", {}).get(task, [])
    scores = {}
    for member in members:
        scores |= subject_scores(results, member, metric) or {
            member: 100 * results["results"][member][metric]}
    return scores


def openllm(args, folder):
    """Open LLM Leaderboard v1 by lm-evaluation-harness: six tasks, their shots and metrics, their
    mean. The harness keeps its answers in the output folder."""
    lm_eval = needs("lm_eval", '"lm-eval[hf]==0.4.13"')
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM
    data.load_weights(AutoModelForCausalLM, args.model)     # the harness would only warn
    tasks = {}
    dtype = str(torch_dtype(args.dtype)).removeprefix("torch.")
    for text in args.tasks or OPENLLM:
        name, shots, metric = (text.split(":") + ["", ""])[:3]
        results = lm_eval.simple_evaluate(
            model="hf", model_args=f"pretrained={args.model},dtype={dtype}", batch_size="auto",
            tasks=[name], num_fewshot=int(shots) if shots else None, limit=args.limit,
            task_manager=TaskManager(include_path=args.include_path), log_samples=False,
            use_cache=str(args.shared / hash_of(data.weights_hash(args.model), args.dtype)),
            device=str(device()),
            apply_chat_template=args.apply_chat_template)
        if results is None:                                 # ranks above 0 of `accelerate launch`
            return {}
        values = results["results"][name]
        metric = metric or next(k for k in values if "," in k and "_stderr" not in k)
        score = 100 * values[metric]
        tasks[name] = {"score": score, "metric": metric, "shots": shots,
                       "stderr": 100 * values.get(metric.replace(",", "_stderr,"), math.nan)}
        subjects = subject_scores(results, name, metric)
        if subjects:
            tasks[name] |= {"score": win_rate(list(subjects.values())), "by_question": score,
                            "subjects": subjects}
    shown = pandas.DataFrame(tasks).T.drop(columns="subjects", errors="ignore")
    print(table(shown.reset_index(names="task")), file=sys.stderr)
    return finish(args, folder, {
        "benchmark": "openllm" if args.tasks else "openllm-v1", "model": args.model, "tasks": tasks,
        "score": win_rate([of["score"] for of in tasks.values()]),
        "score_by_question": win_rate([of.get("by_question", of["score"])
                                       for of in tasks.values()]),
        "lm_eval": lm_eval.__version__})


# -------------------------------------------------------------------------- models against models
def prompt_answers(args, model, folder, expected=None):
    """(prompts of --data, a model's answers to them, the data's hash). ValueError if the prompts
    are not the expected ones: tokenizers and context lengths decide which prompts a model takes."""
    args = copy_of(args, model=model)
    tokenizer = data.load_tokenizer(model)
    rows, key = read_prompts(args, tokenizer, data.set_template(tokenizer, args.chat_template))
    rows = rows[:args.limit]
    if expected not in (None, rows):
        raise ValueError(f"--data: {model} takes {len(rows)} prompts and the model before it "
                         f"{len(expected)}, not the same ones. Lower --max-new-tokens, or leave "
                         "out prompts that one of them cannot take")
    return rows, sample_answers(args, folder, [(r["prompt"], args.temperature) for r in rows]), key


def judge(args, folder):
    """Win rates of every run against every other on --data's prompts, by any judge of
    online_dpo.py."""
    check_judge(args)
    answers = {}
    rates = {}
    rows = None
    for run in args.runs:
        rows, answers[name_of(run)], key = prompt_answers(args, run, args.shared, rows)
    scores = load_judge(copy_of(args, output=args.shared))
    for a, b in itertools.combinations(answers, 2):
        differ = []
        duels = []
        for n, (row, x, y) in enumerate(zip(rows, answers[a], answers[b])):
            if x["text"].strip() != y["text"].strip():
                differ.append(n)
                duels.append(row | {"answers": (x, y), "key": f"{a}/{b}/{row['key']}"})
        outcomes = np.full(len(rows), 0.5)                  # equal answers are a tie
        if duels:
            gaps = np.diff(scores(duels), axis=1)[:, 0]     # of an LLM: two verdicts, -2 to 2
            if not args.judge.startswith("llm:"):           # of other judges the sign counts
                gaps = 2 * np.sign(gaps)
            outcomes[differ] += gaps / 4
        rates[f"{b} over {a}"] = scored(outcomes) | {"equal": len(rows) - len(differ)}
    log(table([{"duel": duel} | of for duel, of in rates.items()]))
    truncated = {name: sum(not a["finished"] for a in of) for name, of in answers.items()}
    return finish(args, folder, {
        "models": args.runs,
        "judge": args.judge,
        "data": key,
        "win_rates": rates,
        "prompts": len(rows),
        "unparsed": scores.unparsed,
        "truncated_answers": truncated})


def both_orders(judge, rows):
    """(n, 2): how far the answer shown first wins, for a row's two answers as they are and swapped.
    NaN: no verdict."""
    if judge.compare:
        return np.reshape(judge.compare(rows), (-1, 2))
    swapped = [row | {"answers": row["answers"][::-1]} for row in rows]
    return np.stack([-np.diff(judge(part))[:, 0] for part in (rows, swapped)], axis=1)


def agreement(orders, gap, longer, prompts, bins=5):
    """A judge against stored verdicts, in percent, with intervals that resample prompts.

    orders (n, 2): how far the preferred answer wins, shown first, and how far the other one wins,
    shown first. gap (n,): their stored scores' difference, or NaN. longer (n,): characters that the
    preferred answer has more. prompts (n,): names. A judge agrees if both orders together favour
    the preferred answer. A tie is a half. orders (1, -1), (1, 1): 100 and 50, so 75, and one of two
    is consistent."""
    first = np.sign(np.nan_to_num(orders))                  # 1: the answer shown first wins
    favours = np.sign(first[:, 0] - first[:, 1])
    longer = np.sign(longer)
    t = pandas.DataFrame({"score": 50 * (1 + favours), "gap": gap, "prompt": prompts})
    parts = {"all": t, "the preferred one is longer": t[longer > 0],
             "the preferred one is shorter": t[longer < 0]}
    rated = t.dropna(subset="gap").sort_values("gap", kind="stable")
    for index in filter(len, np.array_split(rated.index.to_numpy(), bins)):
        part = t.loc[index]
        parts[f"score difference {part.gap.min():.2f} to {part.gap.max():.2f}"] = part
    rows = [{"pairs": name, "n": len(part), "difference": part.gap.mean()}
            | scored(part.score, groups=part.prompt) for name, part in parts.items()]
    both = first[~np.isnan(orders).any(1)]                  # two verdicts
    figures = {"consistent over both orders": pandas.Series(both[:, 0] == -both[:, 1]).mean(),
               "prefers the first": (1 + first).mean() / 2,
               "prefers the longer": (1 + favours * longer).mean() / 2,
               "stored verdicts prefer the longer": (1 + longer).mean() / 2}
    return {"rows": rows,
            "percent": without_nan(100 * pandas.Series(figures)).to_dict(),
            "unparsed": int(np.isnan(orders).sum()),
            "pairs": len(t)}


def agree(args, folder):
    """How often a judge prefers the answer that stored verdicts prefer, on rated pairs: in all, by
    score difference, over both orders, and by length. Look here before you believe a judge."""
    check_judge(args)
    rows = data.read_rows(args).drop_duplicates("key")
    gap = rows.score_chosen - rows.score_rejected
    rows, n = rows.assign(gap=gap)[~(gap <= 0)], len(rows)
    print(f"{n - len(rows)} of {n} pairs have equal or reversed scores and are left out")
    rows = rows.iloc[data.permutation(len(rows), args.seed)[:args.limit]]
    duels = []
    prompts = []
    longer = []
    for key, line in zip(rows.key, rows.line):
        pair = json.loads(line)
        texts = [pair[side][-1]["content"] for side in ("chosen", "rejected")]
        duels.append({"key": key,
                      "prompt": pair["prompt"],
                      "answer": pair.get("answer"),
                      "answers": [{"text": text, "finished": True} for text in texts]})
        prompts.append(json.dumps(pair["prompt"]))
        longer.append(len(texts[0]) - len(texts[1]))
    orders = both_orders(load_judge(copy_of(args, output=args.shared)), duels)
    result = agreement(orders, rows.gap.to_numpy(), longer, prompts)
    t = pandas.DataFrame(result["rows"])
    bins = t.iloc[3:]
    data.figure(folder / "agree.png", [
        {"series": {"95% intervals": (bins.difference, bins.score, "o-", error_bars(bins))},
         "xlabel": "difference of the stored scores", "ylabel": "agreement (%)",
         "ylim": (0, 100), "title": Path(args.judge).name},
        {"series": {k: v for k, v in result["percent"].items() if v is not None},
         "xlim": (0, 100), "xlabel": "% of pairs"}])
    log(f"{table(t)}\n{table([result['percent']])}")
    everything = {k: result["rows"][0][k] for k in ("score", "low", "high")}
    return finish(args, folder, result | everything | {"judge": args.judge, "data": args.data})


def error_bars(t):
    """(2, n) distances of the ends of t's intervals from its scores, 0 where there are none."""
    ends = t[["low", "high"]].astype(float).T.fillna(t.score)
    return (ends - t.score).abs()


def name_of(folder):
    return folder.strip("/").replace("/", "--").removeprefix("runs--")


def stages(args, _):
    """Exact match of runs on --data's reference answers, win rates over the run before, and margins
    on --pairs. Without RUNS: those of the demo's stages."""
    runs = [read_run(r) for r in args.runs]
    rows = []
    prompts = None
    before = None
    margins_of, *_ = pair_margins(args, [str(r["folder"]) for r in runs])
    for run, m in zip(runs, margins_of):
        folder = run["folder"] / "evaluate" / "exact-match"
        model = str(run["folder"])
        prompts, answers, key = prompt_answers(args, model, folder, prompts)
        folder = named(args, folder)
        samples = [{"prompt": p["prompt"],
                    "reference": p["answer"],
                    "answer": a["text"],
                    "correct": a["finished"] and data.final_answer(a["text"]) == p["answer"]}
                   for p, a in zip(prompts, answers) if p["answer"] is not None]
        write_lines(folder / "samples.jsonl", map(json.dumps, samples))
        right = np.array([100.0 * s["correct"] for s in samples])
        exact = scored(right, draws=10_000)
        wins = None
        if before is not None:                              # right and wrong: 1, both alike: a half
            wins = interval(scored((100 + right - before) / 2, draws=10_000))
        finish(args, folder, {
            "model": model, "data": key, "prompts": len(right),
            "truncated_answers": sum(not a["finished"] for a in answers)} | exact)
        rows.append({"stage": run["name"],
                     "exact match": interval(exact),
                     "win rate over the last": wins,
                     "margin (nats)": float(m.mean()),
                     "pairs right": float(100 * (m > 0).mean())})
        before = right
    print(f"{table(rows)}\nPercent, 95% bootstrap intervals over {len(right)} prompts, paired for "
          f"win rates; margins of {len(m)} pairs", flush=True)
    return {"stages": rows}


def interval(of):
    """"SCORE (LOW .. HIGH)", or the score alone where it has no interval."""
    if of["low"] is None:
        return of["score"]
    return "{score:.1f} ({low:.1f} .. {high:.1f})".format(**of)


# ---------------------------------------------------------------------------------------- margins
def pair_margins(args, names):
    """m = log pi(y_w|x) - log pi(y_l|x) in nats of --pairs' pairs under each model, (P,) each, the
    pairs' source and row, and the data's hash."""
    args = copy_of(
        args,
        micro_tokens=default_micro_tokens(args.max_length),
        gradient_checkpointing=False,
        empty_system=0.0,
        model=names[0],
        no_share_prompt=False)
    tokenizer = data.load_tokenizer(names[0])
    template = data.set_template(tokenizer, args.chat_template)
    rows, key = prepare_rows(args.pairs, args, tokenizer=tokenizer, template=template, pairs=True,
                             max_prompt_length=args.max_prompt_length)
    logps = [frozen_logps(args, name, rows, tokenizer).astype(np.float64) for name in names]
    where = rows.select_columns(["source", "row"]).to_pandas()
    return [x[:, 0] - x[:, 1] for x in logps], where, key


def margin_summary(before, after, bins=10):
    """What training did to held-out margins (LIONs' analysis figure): means, accuracy = share m >
    0, flips, and the change over the margin before as a degree-2 fit and as means of equally full
    bins with their standard errors. before (-1, 1), after (1, 2): accuracy 0.5 -> 1, one flip to
    right."""
    t = pandas.DataFrame({"before": before, "after": after}, dtype=float)
    t["change"] = t.after - t.before
    right = t > 0
    order = np.argsort(t.before.to_numpy(), kind="stable")
    for n, part in enumerate(np.array_split(order, min(bins, len(t)))):
        t.loc[part, "bin"] = n
    binned = t.groupby("bin").agg(
        before=("before", "mean"),
        change=("change", "mean"),
        pairs=("bin", "size"),
        stderr=("change", "sem"))
    fit = None
    if t.before.nunique() > 2:
        fit = quadratic_fit(t.before, t.change)
    return {"pairs": len(t),
            "margin_before": t.before.mean(),
            "margin_after": t.after.mean(),
            "accuracy_before": right.before.mean(),
            "accuracy_after": right.after.mean(),
            "to_right": int((~right.before & right.after).sum()),
            "to_wrong": int((right.before & ~right.after).sum()),
            "bins": without_nan(binned).to_dict("records"),
            "fit": fit}


def fitted_line(x, fit):
    """200 points (x, y) of a degree-2 fit over the range of x."""
    grid = np.linspace(x.min(), x.max(), 200)
    return grid, polyval(grid, fit["coefficients"])


def margins(args, folder):
    """Margins of held-out pairs before and after training: scatter, binned means, degree-2 fit."""
    (before, after), where, key = pair_margins(args, [args.before, args.after])
    s = margin_summary(before, after)
    where.assign(before=before, after=after).to_json(
        folder / "margins.jsonl", orient="records", lines=True)
    bins = pandas.DataFrame(s["bins"], dtype=float)
    series = {f"{len(before)} pairs": (before, after - before, "."),
              "means of bins": (bins.before, bins.change, "ko", bins.stderr.fillna(0.0))}
    if s["fit"]:
        label = "{:.3g} {:+.3g} m {:+.3g} m²".format(*s["fit"]["coefficients"])
        series[label] = (*fitted_line(before, s["fit"]), "r:")
    data.figure(folder / "margins.png", [{
        "series": series, "ylabel": "change of the margin (nats)",
        "xlabel": "margin before, log π(y_w|x) − log π(y_l|x) (nats)",
        "title": f"accuracy {s['accuracy_before']:.3f} → {s['accuracy_after']:.3f}; "
                 f"{s['to_right']} pairs to right, {s['to_wrong']} to wrong"}], 1)
    return finish(args, folder, {"before": args.before, "after": args.after, "data": key} | s)


# ------------------------------------------------------------------------------ curves and report
def read_run(folder):
    """run.json of a finished run, with "name", "size" of its data, "folder" of its model (of the
    last iteration for online_dpo.py), "evaluations", the names of those beside its model, and
    "scores", {name: {"score", "low", "high"}}, of its result's numbers and of the evaluations."""
    run = read_json(Path(folder) / "run.json")
    if not run.get("result"):
        raise ValueError(f"RUNS {folder}: no finished run there (run.json with a result)")
    model = Path(folder)
    result = run["result"]
    if run["stage"] == "online-dpo":
        model = Path(folder) / Path(result["output"]).name          # the run may have been moved
        result = read_json(model / "run.json")["result"] | result
    scores = {k: dict(score=v, low=None, high=None) for k, v in result.items()
              if isinstance(v, int | float)}
    evaluations = {}
    for file in sorted(model.glob("evaluate/*/result.json")):
        figures = read_json(file)
        if "score" in figures:                              # margins have none
            of = {k: figures.get(k) for k in ("score", "low", "high")}
            evaluations[file.parent.name] = of
    return run | {"result": result,
                  "name": name_of(folder),
                  "folder": model,
                  "scores": scores | evaluations,
                  "evaluations": set(evaluations),
                  "size": result.get("pairs") or run.get("rows")}


def curve(args, folder):
    """Score over steps, tokens, FLOPs or beta (log), a line per data size with its degree-2 fit and
    its vertex: the paper's scaling figure."""
    sizes = {}
    lines = {}
    series = {}
    for run in map(read_run, args.runs):
        x = run["flags"]["beta"] if args.x == "beta" else run["result"]["cumulative"][args.x]
        if args.y not in run["scores"]:
            raise ValueError(f"--y {args.y}: {run['name']} only has {', '.join(run['scores'])}")
        point = {"run": run["name"], "x": x} | run["scores"][args.y]
        sizes.setdefault(run["size"], []).append(point)
    for n, (size, points) in enumerate(sorted(sizes.items())):
        t = pandas.DataFrame(points).sort_values("x")
        series[f"data size {size:,}"] = (t.x, t.score, f"C{n}o", error_bars(t))
        line = lines[str(size)] = {"points": points}
        if t.x.nunique() > 2:
            fit = line["fit"] = quadratic_fit(np.log(t.x), t.score)
            grid, fitted = fitted_line(np.log(t.x), fit)
            series[f"degree-2 fit, {size:,}"] = (np.exp(grid), fitted, f"C{n}:")
            for end in ("", "_low", "_high"):               # of a maximum, in the units of x
                v = fit[f"vertex{end}"]
                saturation = f"saturation{end}"
                line[saturation] = None
                if fit["maximum"] and v is not None and abs(v) < 100:
                    line[saturation] = math.exp(v)
    data.figure(folder / "curve.png", [
        {"series": series, "xscale": "log", "xlabel": args.x, "ylabel": args.y}], 1)
    shown = pandas.DataFrame(lines.values()).drop(columns=["points", "fit"], errors="ignore")
    shown.insert(0, "data size", list(lines))
    log(table(shown))
    return finish(args, folder, {"x": args.x, "y": args.y, "lines": lines})


PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Runs</title>
<style>
body { font: 15px/1.4 sans-serif; margin: 2em; color: #222; }
section { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: 0.3em 0.8em; border-bottom: 1px solid #ddd; text-align: left;
         vertical-align: top; white-space: pre-wrap; }
thead th { border-bottom: 2px solid #888; }
#runs th, #runs td { white-space: nowrap; }
img { max-width: 100%; }
#answers td { min-width: 8em; max-width: 40em; overflow-wrap: anywhere; }
.right { background: #e2f4e2; }
.wrong { background: #fae3e1; }
</style>
</head>
<body>
<h1>Runs</h1>
<section>$runs</section>
<h2>Held-out figures and scores</h2>
<p>Spearman's rank correlation over the runs after SFT, from three runs on.
The paper finds none.</p>
<section>$correlation</section>
$pictures
<h2>Answers</h2>
<p>The first $shown of $prompts prompts.
<label>Search <input type="search" id="search" placeholder="text, ✓ or ✗"></label>
<span id="count"></span></p>
<section>$answers</section>
<script>
const rows = [...document.querySelectorAll("#answers tbody tr")];
const search = document.getElementById("search");
function filter() {
  const wanted = search.value.toLowerCase();
  for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  const shown = rows.filter(row => !row.hidden).length;
  document.getElementById("count").textContent = shown + " found";
}
search.oninput = filter;
filter();
for (const cell of document.querySelectorAll("#answers td")) {
  if (cell.textContent.startsWith("✓ ")) cell.className = "right";
  if (cell.textContent.startsWith("✗ ")) cell.className = "wrong";
}
</script>
</body>
</html>
""")


def html_table(t, name):
    """A DataFrame of texts as an HTML table. All text is escaped."""
    with pandas.option_context("display.max_colwidth", None):
        return t.to_html(index=False, border=0, table_id=name, formatters=[str] * t.shape[1])


def html_picture(path, title):
    """A heading and a PNG file, whose bytes are in the page."""
    content = base64.b64encode(path.read_bytes()).decode()
    title = html.escape(title)
    return f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{content}">\n'


def cell(value):
    """A value of a table as text: numbers to four digits, - for what is missing."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return "-" if value is None else str(value)


def flags_that_differ(runs):
    """A row per run, a column per flag with different values in runs that have it. Folders are left
    out."""
    flags = pandas.DataFrame([pandas.Series(r["flags"], dtype=object).map(str) for r in runs])
    flags = flags.drop(columns=["output", "cache_dir", "local_rank", "overwrite"], errors="ignore")
    flags.columns = "--" + flags.columns.str.replace("_", "-")
    return flags.loc[:, flags.nunique() > 1]


def side_by_side(runs):
    """A row per prompt, a column per run: the answers in samples.jsonl of the runs' evaluations,
    with a mark where right or wrong is known."""
    marks = {True: "✓ ", False: "✗ ", None: ""}
    rows = {}
    for r in runs:
        for path in sorted(r["folder"].glob("evaluate/*/samples.jsonl")):
            for s in map(json.loads, path.open()):
                about = {"evaluation": path.parent.name, "prompt": s["prompt"][-1]["content"],
                         "reference": s.get("reference")}
                row = rows.setdefault((path.parent.name, json.dumps(s["prompt"])), about)
                row[r["name"]] = marks[s.get("correct")] + s["answer"]
    return pandas.DataFrame(rows.values()).dropna(axis=1, how="all")    # no references


def report(args, folder):
    """One page of runs, report.html, that needs no network: flags that differ, scores, held-out
    figures and their rank correlation with the scores, curves and the pictures of evaluations, and
    answers to the same prompts with a search."""
    runs = [read_run(r) for r in args.runs]
    names = args.score or sorted(set().union(*(r["evaluations"] for r in runs)))
    figures = ["eval_loss", "eval_margin", "eval_accuracy"]
    unknown = dict(score=None, low=None, high=None)
    of = [{k: r["scores"].get(k, unknown) for k in (*names, *figures)} for r in runs]
    of = pandas.DataFrame(of)
    scores = of.map(operator.itemgetter("score")).astype(float)
    tuned = [r["stage"] != "sft" for r in runs]             # SFT's loss is of another kind
    correlation = scores[tuned].corr("spearman", min_periods=3).loc[figures, names]
    about = pandas.DataFrame(runs, columns=["name", "stage", "size"], dtype=object)
    overview = pandas.concat([about, of.map(interval), flags_that_differ(runs)], axis=1).map(cell)
    if len(overview.columns) > len(overview):               # the longer side runs down
        overview = overview.set_index("name").rename_axis(None).T.reset_index(names="run")
    ranks = correlation.map(cell).reset_index(names="held out")
    steps = {r["name"]: list(map(json.loads, (r["folder"] / "metrics.jsonl").open())) for r in runs}
    plot_curves(folder / "curves.png", steps, CURVES)
    pictures = html_picture(folder / "curves.png", "Curves")
    for r in runs:
        for path in sorted(r["folder"].glob("evaluate/*/*.png")):
            pictures += html_picture(path, f"{r['name']}: {path.stem}")
    answers = side_by_side(runs)
    shown = answers[:args.samples].map(cell)
    page = folder / "report.html"
    page.write_text(PAGE.substitute(
        runs=html_table(overview, "runs"), correlation=html_table(ranks, "correlation"),
        pictures=pictures, answers=html_table(shown, "answers"), shown=len(shown),
        prompts=len(answers)), encoding="utf-8")
    log(f"{table(overview)}\n{table(ranks)}\n{page}")
    return finish(args, folder, {
        "runs": args.runs, "scores": without_nan(scores).to_dict("records"),
        "rank_correlation": without_nan(correlation).to_dict("index")})


# ------------------------------------------------------------------------------------------ flags
def data_flags(add):
    add("--dtype", choices=["fp32", "bf16"], help="None: bf16 on CUDA")
    data.row_flags(add, "tokenizer")
    data.pair_flags(add)
    data.cache_flags(add)


def answer_flags(add, max_new_tokens, temperature=0.0):
    sampling_flags(add, max_new_tokens, temperature)
    add("--limit", type=positive, help="first N questions or prompts; None: all")
    add("--seed", type=int, default=42, help="of sampled answers")
    data_flags(add)


def benchmark_flags(add, questions, max_new_tokens, temperature=None):
    add("model", nargs="?", metavar="MODEL", help="folder or Hub id; not needed with --answers")
    add("--answers", help="the model's answers in the benchmark's format; None: sample them")
    add("--questions", default=questions,
        help="FILE or hf:OWNER/NAME/PATH; None: those of --version")
    answer_flags(add, max_new_tokens, temperature)
    add("--system", help="system turn of every conversation, may be empty; None: no such turn")
    add("--judge-url", help="the judge's http://HOST:PORT/v1; the key is in OPENAI_API_KEY")


def verdict_flags(add, judge, max_tokens, parses, parse=None):
    add("--judge", default=judge, help="the judge's model name; None: that of --version")
    add("--parse", choices=parses, default=parse, help="how verdicts are read: by the benchmark's "
        "rule, or the last mark after the judge's last thought; None: that of --version")
    add("--judge-temperature", type=float, default=0.0, help="of verdicts")
    add("--judge-max-tokens", type=positive, default=max_tokens,
        help="tokens per verdict at most; None: that of --version")
    add("--dry-run", action="store_true", help="count calls, tokens and cost; send nothing")
    add("--price", type=float, nargs=2, metavar=("IN", "OUT"),
        help="of a million tokens; None: cost unknown")


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter,
                                allow_abbrev=False)
    commands = p.add_subparsers(dest="command", metavar="COMMAND")

    def command(run, runs=None, **defaults):
        text = inspect.getdoc(run)
        c = commands.add_parser(run.__name__.replace("_", "-"), help=text, description=text,
                                allow_abbrev=False, formatter_class=HelpFormatter)
        c.set_defaults(run=run, default=c.get_default, **defaults)
        c.add_argument("--output", help="folder; None: MODEL or runs, /evaluate/COMMAND, of a "
                       "result with -FLAG-VALUE for what is not the default")
        if runs:
            c.add_argument("runs", nargs=runs, metavar="RUNS", help="folders of finished runs",
                           default=["runs/sft", "runs/dpo", "runs/online-dpo"])
        return c.add_argument
    add_benchmarks(command)
    add_comparisons(command)
    return p


def add_benchmarks(command):
    fixed = dict(temperature=0.0)                           # by the benchmark
    add = command(arena_hard, **fixed)
    add("--version", choices=list(VERSIONS), default="v0.1",
        help="data, judge, parsing and baseline; star: the paper's Arena-Hard-Auto*")
    add("--templates", nargs="+", default=[], help="judge_config.yaml of 2024, or today's "
        "arena-hard-v..yaml and judge_utils.py")
    add("--baseline", help="name of the baseline model; None: that of --version")
    add("--baseline-answers", help="FILE or hf:.., with {baseline} for its name; None: the "
        "benchmark's")
    benchmark_flags(add, None, 4096)
    verdict_flags(add, None, None, ["2024", "2025", "last"])
    add = command(mt_bench, **fixed)
    add("--templates", default=f"{MT_BENCH}/judge_prompts.jsonl", help="the benchmark's own")
    add("--references", help="answers of the reference",
        default=f"{MT_BENCH}/mt_bench/reference_answer/gpt-4.jsonl")
    benchmark_flags(add, f"{MT_BENCH}/mt_bench/question.jsonl", 1024)
    verdict_flags(add, "gpt-4", 2048, ["mt-bench", "last"], "mt-bench")
    add = command(alpaca_eval, dry_run=False)
    benchmark_flags(add, ALPACA, 2048, 0.0)
    add("--reference-outputs", help="the baseline's outputs; None: those of --questions")
    add("--annotator", default=ANNOTATOR, help="a config of the package")
    add("--length-controlled", action=argparse.BooleanOptionalAction, default=True,
        help="needs the Hub")
    add = command(openllm)
    add("model", metavar="MODEL", help="folder or Hub id")
    add("--tasks", nargs="+", default=[], help="NAME[:SHOTS[:METRIC]]; none: the leaderboard's six")
    add("--include-path", help="a folder of further task files")
    add("--limit", type=positive, help="first N examples of a task; None: all")
    add("--apply-chat-template", action="store_true", help="off on the leaderboard")
    add("--dtype", choices=["fp32", "bf16"], help="None: bf16 on CUDA")


def add_comparisons(command):
    sampled = dict(dry_run=False, bad_rows="refuse")
    add = command(judge, "+", **sampled)
    add("--data", nargs="+", default=["demo:test"], help="prompts, as for --data of the stages")
    answer_flags(add, 2048)
    judge_flags(add, "pairrm")
    add = command(agree, pairs=True, seed=42)
    add("--data", nargs="+", default=["demo-pairs:test"], help="pairs, as for --data of dpo.py")
    add("--limit", type=positive, help="N pairs, drawn by a fixed seed; None: all")
    data.cache_flags(add)
    judge_flags(add, "pairrm")
    request_flags(add)
    add = command(stages, "*", **sampled)
    add("--data", nargs="+", default=["demo:test"], help="prompts with reference answers")
    add("--pairs", nargs="+", default=["demo-pairs:test"], help="pairs for margins")
    answer_flags(add, 64)
    add = command(margins, bad_rows="refuse", seed=42)
    add("before", metavar="BEFORE", help="folder or Hub id")
    add("after", metavar="AFTER", help="folder or Hub id")
    add("--data", nargs="+", dest="pairs", default=["demo-pairs:test"], help="held-out pairs")
    data_flags(add)
    add = command(curve, "+")
    add("--x", choices=["steps", "tokens", "flops", "beta"], default="steps",
        help="steps, tokens and FLOPs count earlier runs of the same stage")
    add("--y", default="exact-match", help="an evaluation beside the model, or a number of its run")
    add = command(report, "+")
    add("--score", nargs="+", help="names as for curve --y; None: evaluations beside the models")
    add("--samples", type=positive, default=500, help="prompts to show with all answers to them")


def check_flags(args):
    if hasattr(args, "answers"):
        if not (args.model or args.answers):
            raise ValueError("MODEL: needed, a folder or Hub id; or --answers FILE")
        if args.answers and args.system is not None:
            raise ValueError("--system: the answers of --answers are written; leave it out")
        if not (args.judge_url or args.dry_run):
            raise ValueError("--judge-url: needed, the judge's endpoint, such as "
                             "https://api.openai.com/v1")
    names = list(map(name_of, getattr(args, "runs", ())))
    if len(names) > len({*names}):
        raise ValueError(f"RUNS: two have the name {max(names, key=names.count)}; each needs its "
                         "own")
    check_urls(args)
    if hasattr(args, "serve"):
        check_sampling(args)
    if hasattr(args, "judge_url") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{args.command}: every rank would pay the judge; use one process")


def main(argv=None):
    args = parser().parse_args((sys.argv[1:] if argv is None else list(argv)) or ["stages"])
    check_flags(args)
    if hasattr(args, "dtype"):
        args.dtype = args.dtype or default_dtype()
    if args.command != "openllm":
        init_distributed()
    args.shared, folder = output_folders(args)
    if int(os.environ.get("RANK", 0)):
        return args.run(args, folder)
    with data.only_process(args.shared):                    # two would sample and pay twice
        return args.run(args, folder)


if __name__ == "__main__":
    run_main(main)
