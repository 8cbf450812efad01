"""Evaluation (LIONs, arXiv 2407.06542, sections 2 and 4): benchmarks, win rates, margins, curves.

Reads   models (folders of sft.py, dpo.py, online_dpo.py, or Hub ids); questions, templates and
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
    python evaluate.py report RUNS..

Judges that were shut down: gpt-4-1106-preview, which is Arena-Hard v0.1's and AlpacaEval's, and
gpt-4-0314 on 2026-03-26; gpt-4, which is MT-Bench's, on 2026-10-23. A number under another judge is
no number of the benchmark. Compare it with numbers of the same judge alone, and look at how often
that judge agrees with stored verdicts (`agree`).

Differs from the benchmarks
 1. A game without a verdict is no battle, and counted. Arena-Hard's 2025 scoring drops its twin.
 2. A verdict that was cut at the judge's limit is none.
 3. The turn that asks for a missing verdict (Arena-Hard 2024) is worded here (FINISH).
 4. Arena-Hard's interval resamples questions. The original's, over battles, stands beside it.
 5. Style control is left out: Arena-Hard fits it over the battles of all models that it judged.
"""
from __future__ import annotations

import argparse
import ast
import gzip
import importlib
import itertools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pandas
import torch

import data
from data import (HelpFormatter, hash_of, positive, read_growing, read_json, table, user,
                  write_json, write_lines)
from dpo import CURVES, copy_of, frozen_logps
from online_dpo import (ask_llm, check_judge, check_sampling, check_urls, fill, final_text,
                        judge_flags, load_judge, read_prompts, refused_parts, reply_keys,
                        request_flags, sample_phase, sampling_flags)
from sft import (default_dtype, device, git_commit, init_distributed, plot_curves, prepare_rows,
                 run_main, torch_dtype)

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
                  "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}     # FastChat's; else 0.7
OPENLLM = [  # Open LLM Leaderboard v1 in lm-evaluation-harness' names, NAME:SHOTS:METRIC
    "arc_challenge:25:acc_norm,none", "hellaswag:10:acc_norm,none", "mmlu:5:acc,none",
    "truthfulqa_mc2:0:acc,none", "winogrande:5:acc,none", "gsm8k:5:exact_match,strict-match"]
FINISH = "Please end your judgment now: give the one label that is your final verdict."


# ------------------------------------------------------------------------------------------ maths
LABELS = {"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)}
MIRRORED = {"B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A"}    # 2025


def arena_verdict(text: str, parse: str) -> str | None:
    """Arena-Hard-Auto's label in a judge's text, or None (2406.11939; its code).

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
    """{"QUESTION/GAME": label or None} -> a row per battle of the candidate: its question, and its
    score, 1 win, 0.5 tie, 0 loss. Game 1 has A = baseline, game 2 is swapped. A strong verdict is 3
    battles, None is none. drop_twins: it leaves out the question's other game as well."""
    battles = []
    failed = {name[:-2] for name, label in verdicts.items() if label is None and drop_twins}
    for name, label in verdicts.items():
        question, game = name[:-2], name[-1]
        if label is not None and question not in failed:
            score, times = LABELS[label]
            battles += [(question, score if game == "2" else 1.0 - score)] * times
    return pandas.DataFrame(battles, columns=["question", "score"])


def win_rate(outcomes) -> float | None:
    """Share of battles won, ties half; None without battles. All battles have the baseline: a
    Bradley-Terry fit anchored at it, sigmoid(xi) = mean of outcomes, has this closed form."""
    if len(outcomes) == 0:
        return None
    return float(np.mean(outcomes))


def bootstrap(values, draws: int = 1000, seed: int = 0, groups=None, level: float = 95) -> tuple:
    """Percentiles, around the middle `level` percent, of the mean over resampled items. Equal
    values: no width. For paired comparisons pass one difference per item. groups (n,): items of one
    group, such as a question's battles, are drawn together."""
    items, rng = pandas.Series(values, dtype=float), np.random.default_rng(seed)
    if not len(items):
        return None, None
    items = items.groupby(items.index if groups is None else np.asarray(groups))
    total, n = items.sum().to_numpy(), items.size().to_numpy()
    drawn = (rng.integers(len(n), size=len(n)) for _ in range(draws))
    means = [total[i].sum() / n[i].sum() for i in drawn]
    return tuple(map(float, np.percentile(means, [50 - level / 2, 50 + level / 2])))


def scored(values, draws=1000, seed=0, groups=None):
    """{"score", "low", "high"}: the mean and its bootstrap interval."""
    ends = bootstrap(values, draws, seed, groups)
    return dict(zip(("score", "low", "high"), (win_rate(values), *ends)))


def mt_rating(text: str, parse: str = "mt-bench") -> float | None:
    """MT-Bench's rating in a judge's text (2306.05685): the first [[number]], else the first
    [number]. "Rating: [[7.5]]" is 7.5. As in the benchmark it may lie outside 1..10. parse "last":
    the last one of what follows the judge's last thought."""
    which = 0
    if parse == "last":
        text, which = final_text(text), -1
    found = re.findall(r"\[\[(\d+\.?\d*)\]\]", text) or re.findall(r"\[(\d+\.?\d*)\]", text)
    return float(found[which]) if found else None


def quadratic_fit(x, y, draws: int = 1000) -> dict:
    """Least squares y = c0 + c1 x + c2 x^2 and its vertex -c1 / (2 c2), with 95% intervals by
    bootstrap of the residuals, in which their scale is drawn too: few points know it badly. Three
    points have none; nor has the vertex if c2's includes 0.

    x, y (n,), at least three different x. y = (x - 2)^2: coefficients 4, -4, 1, vertex 2."""
    x, y, n = np.asarray(x, dtype=float), np.asarray(y, dtype=float), len(x)
    if len(np.unique(x)) < 3:
        raise ValueError(f"a degree-2 fit needs three different x, got {np.unique(x).tolist()}")
    m, s = x.mean(), x.std()
    powers = np.vander((x - m) / s, 3, increasing=True)                          # (n, 3)
    to_x = np.array([[1, -m / s, (m / s) ** 2], [0, 1 / s, -2 * m / s ** 2], [0, 0, 1 / s ** 2]])
    solve = np.linalg.pinv(powers)                                               # (3, n)
    c = to_x @ solve @ y
    fit = dict.fromkeys(("low", "high", "vertex_low", "vertex_high"))
    fit |= {"n": n, "coefficients": c.tolist(), "vertex": float(-c[1] / (2 * c[2])),
            "maximum": bool(c[2] < 0)}
    if n > 3:
        fitted, rng = powers @ solve @ y, np.random.default_rng(0)
        residuals = rng.choice(y - fitted, (draws, n))
        drawn = fitted + residuals * np.sqrt(n / rng.chisquare(n - 3, (draws, 1)))
        fits = drawn @ (to_x @ solve).T                                          # (draws, 3)
        fit["low"], fit["high"] = np.percentile(fits, [2.5, 97.5], axis=0).tolist()
        if fit["low"][2] * fit["high"][2] > 0:
            vertex = np.percentile(-fits[:, 1] / (2 * fits[:, 2]), [2.5, 97.5])
            fit["vertex_low"], fit["vertex_high"] = vertex.tolist()
    return fit


# ------------------------------------------------------------------------ files of the benchmarks
def read_rows(name, flag) -> list[dict]:
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


def python_constants(source: str) -> dict:
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


def read_questions(args) -> list[dict]:
    """{"id", "turns", "category"} of Arena-Hard's (uid, prompt), MT-Bench's (question_id, turns) or
    AlpacaEval's (instruction) files, the first --limit of them."""
    questions = []
    for row in read_rows(args.questions, "--questions")[:args.limit]:
        turns = row.get("turns") or [row.get("prompt") or row["instruction"]]
        questions.append({"id": key_of(row), "turns": [text_of(t) for t in turns],
                          "category": row.get("category", row.get("dataset", ""))})
    return questions


def read_answers(name, flag, questions) -> dict[str, list[str]]:
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
        found = answers.get(q["id"], [])
        if [len(texts) for texts in found] != [len(q["turns"])] or not all(
                isinstance(text, str) and text != "$ERROR$" for text in found[0]):
            raise ValueError(f"{flag} {name}: question {q['id']} needs one whole answer, with "
                             f"{len(q['turns'])} turn(s); it has {len(found)}, or a failed one")
    return {q["id"]: answers[q["id"]][0] for q in questions}


# --------------------------------------------------------------------------- answers and verdicts
def sample_answers(args, folder, requests) -> list[dict]:
    """{"text", "tokens", "finished"} of (messages, temperature), from answers-*.jsonl if they are
    there, else sampled. --dry-run: texts as long as they may become."""
    tokenizer = template = None
    made_by = [args.served_model, args.model]
    if args.serve:
        made_by += [args.serve, data.weights_hash(args.model)]
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
    for temperature in sorted({t for _, t in requests}):
        rows = {key: {"key": key, "prompt": messages} for key, (messages, t) in zip(keys, requests)
                if t == temperature}
        settings = copy_of(args, temperature=temperature, samples=1)
        rows = list(rows.values())
        for row in sample_phase(settings, folder, args.model, tokenizer, template, rows):
            answers[row["key"]] = row["answers"][0]
    return [answers[key] for key in keys]


def candidate_answers(args, folder, questions, temperature, clean=str) -> tuple[dict, dict]:
    """--answers, or the model's own, turn after turn: id -> texts; and their counts and lengths.
    temperature: question -> its own. clean: of a sampled text, before the next turn."""
    answers, sampled = {q["id"]: [] for q in questions}, []
    n_turns = max(len(q["turns"]) for q in questions)
    if args.answers:
        answers, n_turns = read_answers(args.answers, "--answers", questions), 0
    for turn in range(n_turns):
        now, requests = [q for q in questions if turn < len(q["turns"])], []
        for q in now:
            said = answers[q["id"]] + [""]
            exchanges = [data.ask(question, answer) for question, answer in zip(q["turns"], said)]
            requests.append((sum(exchanges, [])[:-1], temperature(q)))
        for q, a in zip(now, sample_answers(args, folder, requests)):
            answers[q["id"]].append(clean(a["text"]))
            sampled.append(a)
    texts = list(itertools.chain(*answers.values()))
    counts = {"empty_answers": sum(not text.strip() for text in texts),
              "mean_answer_characters": float(np.mean([len(text) for text in texts]))}
    if sampled:
        counts |= {"truncated_answers": sum(not a["finished"] for a in sampled),
                   "mean_answer_tokens": float(np.mean([a["tokens"] for a in sampled])),
                   "model_refused_parts": refused_parts(sampled)}
    return answers, counts


def judged(args, folder, calls, parse, follow_up=None) -> tuple[dict, dict]:
    """calls {id: messages} -> {id: parse(the judge's text) or None}, and counts. follow_up: one
    more user turn for a first reply without any label; both texts are parsed together."""
    settings = dict(max_tokens=args.judge_max_tokens, temperature=args.judge_temperature)
    if args.dry_run:
        return {}, dry_run(args, folder, calls, settings)
    replies = ask_llm(args, args.judge, calls, folder, **settings)
    records = list(replies.values())
    texts = {name: record["reply"] or "" for name, record in replies.items()}
    if follow_up:
        second = {f"{name}+": [*calls[name], data.assistant(text), user(follow_up)]
                  for name, text in texts.items()
                  if text and not re.search(r"\[\[[AB<>=]+\]\]", text)}
        for name, record in ask_llm(args, args.judge, second, folder, **settings).items():
            texts[name[:-1]] += "\n" + (record["reply"] or "")
            records.append(record)
            replies[name[:-1]] = record
    verdicts = {name: parse(text) for name, text in texts.items()}
    unfinished = [name for name, r in replies.items() if not r.get("finished", True)]
    verdicts |= dict.fromkeys(unfinished)                   # whatever marks they contain
    counts = {"calls": len(calls), "failed": sum(r["reply"] is None for r in records),
              "unfinished": len(unfinished), "unparsed": list(verdicts.values()).count(None),
              "judge_refused_parts": refused_parts(records)}
    print(f"{counts}: an unparsed verdict is neither win nor loss; the same command asks failed "
          "requests again", file=sys.stderr)
    return verdicts, counts


def about_judge(judge, usual) -> dict:
    """What a result says of its judge."""
    gone = SHUT_DOWN.get(judge)
    if gone:
        print(f"--judge {judge} was shut down on {gone}: name a judge that exists",
              file=sys.stderr)
    return {"judge": judge, "judge_is_the_benchmarks": judge == usual, "judge_shut_down": gone}


def dry_run(args, folder, calls, settings):
    """What is not on disk yet: calls, tokens in (bytes / 4) and at most out, and their cost."""
    known = {r["key"] for r in read_growing(folder, "replies") if r["reply"] is not None}
    keys = reply_keys(args.judge, calls, **settings)
    todo = [json.dumps(calls[name]) for name, key in keys.items() if key not in known]
    tokens = sum(map(len, todo)) // 4, len(todo) * args.judge_max_tokens
    cost = args.price and sum(n * price for n, price in zip(tokens, args.price)) / 1e6
    return {"dry_run": True, "calls": len(todo), "tokens_in": tokens[0],
            "tokens_out_at_most": tokens[1], "cost_at_most": cost}


def finish(args, folder, result):
    """result.json: the score with all that decides it."""
    import transformers
    versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
    flags = {k: v for k, v in vars(args).items() if k != "run"}
    result = {"command": args.command, **result, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
              "git": git_commit(), "versions": versions, "flags": flags, "output": str(folder)}
    write_json(folder / "result.json", result)
    return result


def output_folder(args) -> Path:
    """--output, else MODEL/evaluate/COMMAND, or runs/evaluate/COMMAND if MODEL is no folder
    here."""
    model = getattr(args, "model", None)
    base = Path(model) if model and Path(model).is_dir() else Path("runs")
    return Path(args.output or base / "evaluate" / args.command)


# ------------------------------------------------------------------------------------- benchmarks
def judge_call(template, values, where) -> list[dict]:
    """A judge's messages from a template with system_prompt and prompt_template."""
    text = template["prompt_template"]
    text = fill(text if isinstance(text, str) else text[0], values, where)
    return [{"role": "system", "content": template["system_prompt"]}, user(text)]


def arena_templates(args, questions) -> dict:
    """category -> {"prompt_template", "system_prompt", "baseline"}, from the benchmark's files: the
    judge_config.yaml of 2024, or today's config and judge_utils.py. Placeholders of both years."""
    template = {}
    for name in args.templates:
        template |= read_rows(name, "--templates")[0]
    known, templates = template.pop("JUDGE_SETTINGS", {}), {}
    for category in {q["category"] for q in questions}:
        own = template | known.get(category, {})
        own["baseline"] = args.baseline or own.get("baseline")
        if not {"prompt_template", "system_prompt"} <= own.keys() or not own["baseline"]:
            raise ValueError(f"--templates {' '.join(args.templates)}: no prompt_template, "
                             f"system_prompt or baseline of category {category}; name the config "
                             "and judge_utils.py of the benchmark")
        templates[category] = own
    return templates


def arena_calls(questions, mine, theirs, templates, where) -> dict:
    """{"QUESTION/GAME": messages} of both games. Game 1: A is the baseline."""
    calls = {}
    for q in questions:
        a, b = theirs[q["id"]][0], mine[q["id"]][0]
        for game, (first, second) in ((1, (a, b)), (2, (b, a))):
            values, texts = {}, (q["turns"][0], first, second)
            for names in PLACEHOLDERS:
                values |= zip(names, texts)
            calls[f"{q['id']}/{game}"] = judge_call(templates[q["category"]], values, where)
    return calls


def arena_hard(args):
    """Arena-Hard-Auto v0.1 or v2.0, or the paper's Arena-Hard-Auto* (star): two swapped games
    against a baseline. The judge of v0.1 was shut down on 2026-03-26."""
    name, usual_judge, max_tokens, parse, baseline = VERSIONS[args.version]
    args.judge, args.parse = args.judge or usual_judge, args.parse or parse
    args.judge_max_tokens = args.judge_max_tokens or max_tokens
    args.baseline, args.questions = (args.baseline or baseline,
                                     args.questions or f"{ARENA}/{name}/question.jsonl")
    folder, questions = output_folder(args), read_questions(args)
    templates, theirs = arena_templates(args, questions), {}
    for baseline in sorted({t["baseline"] for t in templates.values()}):
        file = fill(args.baseline_answers or f"{ARENA}/{name}/model_answer/{{baseline}}.jsonl",
                    {"baseline": baseline}, "--baseline-answers")
        of = [q for q in questions if templates[q["category"]]["baseline"] == baseline]
        theirs |= read_answers(file, "--baseline-answers", of)
    mine, counts = candidate_answers(args, folder, questions, lambda q: 0.0)
    calls = arena_calls(questions, mine, theirs, templates, " ".join(args.templates))
    verdicts, more = judged(args, folder, calls, lambda text: arena_verdict(text, args.parse),
                            FINISH if args.parse == "2024" else None)
    if args.dry_run:
        return more
    write_json(folder / "games.json", verdicts)
    battles = arena_battles(verdicts, drop_twins=args.parse == "2025")
    categories = {q["id"]: q["category"] for q in questions}
    battles["category"] = battles.question.map(categories)
    by_category = {category: scored(100 * part.score, 1000, args.seed, part.question)
                   for category, part in battles.groupby("category")}
    level = 90 if args.parse == "2025" else 95              # the original's, over battles
    original = bootstrap(100 * battles.score, 100, args.seed, level=level)
    if args.version == "star":
        name += "*"
    if args.limit:
        name += f", first {len(questions)} questions"
    about = {"benchmark": name, "parse": args.parse,
             "model": args.model or args.answers, "baseline": args.baseline,
             "template": hash_of(templates), "battles": len(battles),
             "questions": len(questions), "categories": by_category,
             "original_interval": original, "original_level": level, "style_control": None}
    score = scored(100 * battles.score, 1000, args.seed, battles.question)
    return finish(args, folder, counts | more | score | about | about_judge(args.judge,
                                                                            usual_judge))


def mt_bench(args):
    """MT-Bench: two turns, each graded alone on 1 to 10, some against a reference. Its judge,
    gpt-4, was shut down on 2026-10-23."""
    folder, questions = output_folder(args), read_questions(args)
    templates = {r["name"]: r for r in read_rows(args.templates, "--templates")}
    references = read_answers(args.references, "--references", [
        q for q in questions if q["category"] in ("math", "reasoning", "coding")])
    answers, counts = candidate_answers(
        args, folder, questions, lambda q: MT_TEMPERATURE.get(q["category"], 0.7), str.strip)
    calls, rows = {}, []
    for q in questions:
        values = {"question": q["turns"][0], "answer": answers[q["id"]][0]}
        for n, (question, answer) in enumerate(zip(q["turns"], answers[q["id"]]), 1):
            values |= {f"question_{n}": question, f"answer_{n}": answer}
            if q["id"] in references:
                values[f"ref_answer_{n}"] = references[q["id"]][n - 1]
            kind = "single-math-v1" if q["id"] in references else "single-v1"
            if n > 1:
                kind += "-multi-turn"
            calls[f"{q['id']}/{n}"] = judge_call(templates[kind], values, args.templates)
            rows.append({"id": q["id"], "category": q["category"], "turn": f"turn {n}"})
    ratings, more = judged(args, folder, calls, lambda text: mt_rating(text, args.parse))
    if args.dry_run:
        return more
    write_json(folder / "ratings.json", ratings)
    rows = pandas.DataFrame(rows).assign(rating=pandas.Series(ratings.values(), dtype=float))
    groups = pandas.concat([rows.set_index("category").rating, rows.set_index("turn").rating])
    means = groups.groupby(level=0, sort=False).mean().astype(object)
    means = means.where(means.notna(), None).to_dict()
    rated = rows.dropna(subset="rating")
    score = scored(rated.rating, 1000, args.seed, rated.id)
    bars = {k: v or 0.0 for k, v in (means | {"overall": score["score"]}).items()}
    data.figure(folder / "mt-bench.png", [
        {"xlabel": "MT-Bench rating", "xlim": (0, 10), "series": bars}])
    return finish(args, folder, counts | more | score | {
        "benchmark": "mt-bench", "model": args.model or args.answers, "baseline": None,
        "parse": args.parse, "template": hash_of(templates), "categories": means,
        "questions": len(questions), "with_reference": len(references),
        "out_of_scale": int((~rated.rating.between(1, 10)).sum())}
        | about_judge(args.judge, "gpt-4"))


def needs(package, install):
    """An optional package, imported when it is used."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{package} cannot be imported ({error}); pip install {install}") from None


def alpaca_eval(args):
    """AlpacaEval-2: outputs in its format; the alpaca_eval package annotates and computes win
    rates, their standard errors and the mean length. The default annotator's judge,
    gpt-4-1106-preview, was shut down on 2026-03-26."""
    package = needs("alpaca_eval", 'alpaca_eval==0.6.6 "setuptools<81"')
    folder, questions = output_folder(args), read_questions(args)
    answers, counts = candidate_answers(args, folder, questions, lambda q: args.temperature)
    name = (args.model or Path(args.answers).name).strip("/").replace("/", "--")
    outputs = [{"instruction": q["turns"][0], "output": answers[q["id"]][0], "generator": name,
                "dataset": q["category"]} for q in questions]
    write_json(folder / "outputs.json", outputs)
    baseline = args.reference_outputs or args.questions
    reference = read_rows(baseline, "--reference-outputs")[:args.limit]
    if [r.get("instruction") for r in reference] != [o["instruction"] for o in outputs]:
        raise ValueError(f"--reference-outputs {baseline}: needs one per instruction, in order")
    os.environ["OPENAI_BASE_URL"] = args.judge_url          # how its client takes an endpoint
    metric = "length_controlled_winrate" if args.length_controlled else "win_rate"
    board, annotations = package.evaluate(
        model_outputs=outputs, reference_outputs=reference, annotators_config=args.annotator,
        name=name, output_path=str(folder), caching_path=str(folder / "annotations-cache.json"),
        is_return_instead_of_print=True, precomputed_leaderboard=None, is_cache_leaderboard=False,
        sort_by=metric, fn_metric=f"get_{metric.replace('win_rate', 'winrate')}",
        metric_kwargs={"save_weights_dir": None} if args.length_controlled else {},
        annotation_kwargs={"chunksize": args.concurrency, "num_procs": args.concurrency})
    row = json.loads(board.loc[name].to_json())
    preferences = pandas.Series([a.get("preference") for a in annotations], dtype=float)
    return finish(args, folder, counts | row | {
        "benchmark": "alpaca-eval-2", "model": args.model or args.answers,
        "baseline": reference[0].get("generator"), "questions": len(questions),
        "unparsed": int(preferences.isna().sum()), "score": row[metric],
        "stderr": row.get("lc_standard_error", row.get("standard_error"))}
        | about_judge(args.annotator, ANNOTATOR))


def subject_scores(results: dict, task: str, metric: str) -> dict[str, float]:
    """The metric of each subject of a group task such as MMLU; {} of a plain task. The leaderboard
    takes their plain mean. The harness weighs subjects by their questions."""
    members = results.get("group_subtasks", {}).get(task, [])
    scores = {}
    for member in members:
        scores |= subject_scores(results, member, metric) or {
            member: 100 * results["results"][member][metric]}
    return scores


def openllm(args):
    """Open LLM Leaderboard v1 by lm-evaluation-harness: six tasks, their shots and metrics, their
    mean. The harness keeps its answers in the output folder."""
    lm_eval = needs("lm_eval", '"lm-eval[hf]==0.4.13"')
    from lm_eval.tasks import TaskManager
    folder, tasks = output_folder(args), {}
    dtype = str(torch_dtype(args.dtype)).removeprefix("torch.")
    for text in args.tasks or OPENLLM:
        name, shots, metric = (text.split(":") + ["", ""])[:3]
        results = lm_eval.simple_evaluate(
            model="hf", model_args=f"pretrained={args.model},dtype={dtype}", batch_size="auto",
            tasks=[name], num_fewshot=int(shots) if shots else None, limit=args.limit,
            task_manager=TaskManager(include_path=args.include_path), log_samples=False,
            use_cache=str(folder / data.weights_hash(args.model)),
            device=str(device()),
            apply_chat_template=args.apply_chat_template)
        if results is None:                                 # ranks above 0 of `accelerate launch`
            return {}
        values = results["results"][name]
        metric = metric or next(k for k in values if "," in k and "_stderr" not in k)
        tasks[name] = {"score": 100 * values[metric], "metric": metric, "shots": shots,
                       "stderr": 100 * values.get(metric.replace(",", "_stderr,"), math.nan)}
        subjects = subject_scores(results, name, metric)
        if subjects:
            tasks[name] |= {"score": win_rate(list(subjects.values())),
                            "by_question": 100 * values[metric], "subjects": subjects}
    shown = pandas.DataFrame(tasks).T.drop(columns="subjects", errors="ignore")
    print(table(shown.reset_index(names="task")), file=sys.stderr)
    return finish(args, folder, {
        "benchmark": "openllm" if args.tasks else "openllm-v1", "model": args.model, "tasks": tasks,
        "score": win_rate([of["score"] for of in tasks.values()]), "lm_eval": lm_eval.__version__})


# -------------------------------------------------------------------------- models against models
def prompt_answers(args, model, folder) -> tuple[list[dict], list[dict], str]:
    """(prompts of --data, a model's answers to them, the data's hash)."""
    args = copy_of(args, model=model)
    tokenizer = data.load_tokenizer(model)
    rows, key = read_prompts(args, tokenizer, data.set_template(tokenizer, args.chat_template))
    rows = rows[:args.limit]
    return rows, sample_answers(args, folder, [(r["prompt"], args.temperature) for r in rows]), key


def judge(args):
    """Win rates of every run against every other on --data's prompts, by any judge of
    online_dpo.py."""
    check_judge(args)
    folder, answers, rates = output_folder(args), {}, {}
    args.output = str(folder)
    for run in args.runs:
        rows, answers[name_of(run)], key = prompt_answers(args, run, folder)
    scores, names = load_judge(args), list(answers)
    for a, b in itertools.combinations(names, 2):
        both = list(zip(answers[a], answers[b]))
        differ = [n for n, (x, y) in enumerate(both) if x["text"].strip() != y["text"].strip()]
        duels = [{**rows[n], "answers": both[n], "key": f"{a}/{b}/{rows[n]['key']}"}
                 for n in differ]
        gaps = np.zeros(0)
        if duels:
            gaps = np.diff(scores(duels), axis=1)[:, 0]
        # an LLM's gap sums two orders' verdicts, -2 to 2; of other judges only the sign counts
        if not args.judge.startswith("llm:"):
            gaps = 2 * np.sign(gaps)
        outcomes = np.full(len(rows), 0.5)                  # equal answers are a tie
        outcomes[differ] = (1 + gaps / 2) / 2
        rates[f"{b} over {a}"] = scored(outcomes) | {"equal": len(rows) - len(differ)}
    print(table([{"duel": duel} | of for duel, of in rates.items()]), file=sys.stderr)
    truncated = {name: sum(not a["finished"] for a in of) for name, of in answers.items()}
    return finish(args, folder, {"models": args.runs, "judge": args.judge, "data": key,
                                 "win_rates": rates, "prompts": len(rows),
                                 "truncated_answers": truncated})


def both_orders(judge, rows) -> np.ndarray:
    """(n, 2): how far the answer shown first wins, for a row's two answers as they are and swapped.
    NaN: no verdict."""
    if judge.compare:
        return np.reshape(judge.compare(rows), (-1, 2))
    swapped = [row | {"answers": row["answers"][::-1]} for row in rows]
    return np.stack([-np.diff(judge(part))[:, 0] for part in (rows, swapped)], axis=1)


def agreement(orders, gap, longer, prompts, bins: int = 5) -> dict:
    """A judge against stored verdicts, in percent, with intervals that resample prompts.

    orders (n, 2): how far the preferred answer wins, shown first, and how far the other one wins,
    shown first. gap (n,): their stored scores' difference, or NaN. longer (n,): characters that the
    preferred answer has more. prompts (n,): names. A judge agrees if both orders together favour
    the preferred answer; a tie is a half. orders (1, -1), (1, 1): 100 and 50, so 75; one of two is
    consistent."""
    first = np.sign(np.nan_to_num(orders))                  # 1: the answer shown first wins
    favours = np.sign(first[:, 0] - first[:, 1])
    t = pandas.DataFrame({"score": 50 * (1 + favours), "gap": gap, "longer": longer,
                          "prompt": prompts})
    parts = {"all": t, "the preferred one is longer": t[t.longer > 0],
             "the preferred one is shorter": t[t.longer < 0]}
    rated = t.dropna(subset="gap").sort_values("gap", kind="stable")
    for part in np.array_split(np.arange(len(rated)), bins):
        part = rated.iloc[part]
        if len(part):
            name = f"score difference {part.gap.min():.2f} to {part.gap.max():.2f}"
            parts[name] = part
    rows = [{"pairs": name, "n": len(part), "difference": part.gap.mean()}
            | scored(part.score, groups=part.prompt) for name, part in parts.items()]
    figures = {"consistent over both orders": (first[:, 0] == -first[:, 1]).mean(),
               "prefers the first": (1 + first).mean() / 2,
               "prefers the longer": (1 + favours * np.sign(t.longer)).mean() / 2,
               "stored verdicts prefer the longer": (1 + np.sign(t.longer)).mean() / 2}
    return {"rows": rows, "percent": {name: float(100 * v) for name, v in figures.items()},
            "unparsed": int(np.isnan(orders).sum()), "pairs": len(t)}


def agree(args):
    """How often a judge prefers the answer that stored verdicts prefer, on rated pairs: in all, by
    score difference, over both orders, and by length. Look here before you believe a judge."""
    check_judge(args)
    folder, rows = output_folder(args), data.read_rows(args)
    args.output = str(folder)
    gap = rows.score_chosen - rows.score_rejected
    rows, n = rows.assign(gap=gap)[~(gap <= 0)], len(rows)
    print(f"{n - len(rows)} of {n} pairs have equal or reversed scores and are left out")
    rows = rows.iloc[data.permutation(len(rows), args.seed)[:args.limit]]
    duels, prompts, longer = [], [], []
    for key, line in zip(rows.key, rows.line):
        pair = json.loads(line)
        texts = [pair[side][-1]["content"] for side in ("chosen", "rejected")]
        duels.append({"key": key, "prompt": pair["prompt"], "answer": pair.get("answer"),
                      "answers": [{"text": text, "finished": True} for text in texts]})
        prompts.append(json.dumps(pair["prompt"]))
        longer.append(len(texts[0]) - len(texts[1]))
    result = agreement(both_orders(load_judge(args), duels), rows.gap.to_numpy(), longer, prompts)
    t = pandas.DataFrame(result["rows"])
    bins = t.iloc[3:]
    data.figure(folder / "agree.png", [
        {"series": {"95% intervals": (bins.difference, bins.score, "o-", abs(
            bins[["low", "high"]].T - bins.score))}, "xlabel": "difference of the stored scores",
         "ylabel": "agreement (%)", "ylim": (0, 100), "title": args.judge},
        {"series": result["percent"], "xlim": (0, 100), "xlabel": "% of pairs"}])
    print(f"{table(t)}\n{table([result['percent']])}", file=sys.stderr)
    everything = {k: result["rows"][0][k] for k in ("score", "low", "high")}
    return finish(args, folder, result | everything | {"judge": args.judge, "data": args.data})


def name_of(folder):
    return folder.strip("/").replace("/", "--").removeprefix("runs--")


def stages(args):
    """Exact match of runs on --data's reference answers, win rates over the run before, and margins
    on --pairs; without RUNS those of the demo's stages."""
    runs, rows, before = [read_run(r) for r in args.runs], [], None
    margins_of, _ = pair_margins(args, [str(r["folder"]) for r in runs])
    for run, m in zip(runs, margins_of):
        folder = run["folder"] / "evaluate" / "exact-match"
        prompts, answers, key = prompt_answers(args, str(run["folder"]), folder)
        samples = [{"prompt": p["prompt"], "reference": p["answer"], "answer": a["text"],
                    "correct": data.final_answer(a["text"]) == p["answer"]}
                   for p, a in zip(prompts, answers) if p["answer"] is not None]
        write_lines(folder / "samples.jsonl", map(json.dumps, samples))
        right = np.array([100.0 * s["correct"] for s in samples])
        exact = scored(right, 10_000)
        about = {"model": str(run["folder"]), "data": key, "prompts": len(right)}
        finish(args, folder, about | exact)
        row = {"stage": run["name"], "exact match": interval(exact), "win rate over the last": None}
        if before is not None:                              # right and wrong: 1, both alike: a half
            row["win rate over the last"] = interval(scored((100 + right - before) / 2, 10_000))
        row |= {"margin (nats)": float(m.mean()), "pairs right": float(100 * (m > 0).mean())}
        rows.append(row)
        before = right
    print(f"{table(rows)}\nPercent, 95% bootstrap intervals over {len(right)} prompts, paired for "
          f"win rates; margins of {len(m)} pairs", flush=True)
    return {"stages": rows}


def interval(of) -> str | float | None:
    if of["low"] is None:
        return of["score"]
    return "{score:.1f} ({low:.1f} .. {high:.1f})".format(**of)


# ---------------------------------------------------------------------------------------- margins
def pair_margins(args, names) -> tuple[list[np.ndarray], str]:
    """m = log pi(y_w|x) - log pi(y_l|x) in nats of --pairs' pairs under each model, (P,) each; the
    data's hash."""
    args = copy_of(args, micro_tokens=args.max_length, gradient_checkpointing=False,
                   empty_system=0.0, model=names[0], no_share_prompt=False)
    tokenizer = data.load_tokenizer(names[0])
    template = data.set_template(tokenizer, args.chat_template)
    rows, key = prepare_rows(args.pairs, args, tokenizer=tokenizer, template=template, pairs=True,
                             max_prompt_length=args.max_prompt_length)
    logps = [frozen_logps(args, name, rows, tokenizer).astype(np.float64) for name in names]
    return [x[:, 0] - x[:, 1] for x in logps], key


def margin_summary(before, after, bins: int = 10) -> dict:
    """What training did to held-out margins (LIONs' analysis figure): means, accuracy = share m >
    0, flips, and the change over the margin before as a degree-2 fit and as means of equally full
    bins with their standard errors. before (-1, 1), after (1, 2): accuracy 0.5 -> 1, one flip to
    right."""
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    change, binned = after - before, []
    for part in np.array_split(np.argsort(before, kind="stable"), min(bins, len(before))):
        error = change[part].std(ddof=1) / math.sqrt(len(part)) if len(part) > 1 else None
        binned.append({"before": float(before[part].mean()), "change": float(change[part].mean()),
                       "pairs": len(part), "stderr": error})
    return {"pairs": len(before), "margin_before": float(before.mean()),
            "margin_after": float(after.mean()), "accuracy_before": float((before > 0).mean()),
            "accuracy_after": float((after > 0).mean()),
            "to_right": int(((before <= 0) & (after > 0)).sum()),
            "to_wrong": int(((before > 0) & (after <= 0)).sum()), "bins": binned,
            "fit": quadratic_fit(before, change) if len(np.unique(before)) > 2 else None}


def margins(args):
    """Margins of held-out pairs before and after training: scatter, binned means, degree-2 fit."""
    (before, after), key = pair_margins(args, [args.before, args.after])
    folder, s = output_folder(args), margin_summary(before, after)
    pandas.DataFrame({"before": before, "after": after}).to_json(
        folder / "margins.jsonl", orient="records", lines=True)
    bins = pandas.DataFrame(s["bins"], dtype=float)
    series = {f"{len(before)} pairs": (before, after - before, "."),
              "means of bins": (bins.before, bins.change, "ko", bins.stderr.fillna(0.0))}
    if s["fit"]:
        grid, c = np.linspace(before.min(), before.max(), 200), s["fit"]["coefficients"]
        label = f"{c[0]:.3g} {c[1]:+.3g} m {c[2]:+.3g} m²"
        series[label] = (grid, np.polyval(c[::-1], grid), "r:")
    data.figure(folder / "margins.png", [{
        "series": series, "ylabel": "change of the margin (nats)",
        "xlabel": "margin before, log π(y_w|x) − log π(y_l|x) (nats)",
        "title": f"accuracy {s['accuracy_before']:.3f} → {s['accuracy_after']:.3f}; "
                 f"{s['to_right']} pairs to right, {s['to_wrong']} to wrong"}], 1)
    return finish(args, folder, {"before": args.before, "after": args.after, "data": key} | s)


# ------------------------------------------------------------------------------ curves and report
def read_run(folder):
    """run.json of a finished run, with "name", "size" of its data, "folder" of its model (of the
    last iteration for online_dpo.py) and "scores", {name: {"score", "low", "high"}}: the numbers
    of its result, and the evaluations beside its model."""
    run = read_json(Path(folder) / "run.json")
    if not run.get("result"):
        raise ValueError(f"RUNS {folder}: no finished run there (run.json with a result)")
    model, result = Path(folder), run["result"]
    if run["stage"] == "online-dpo":
        model = Path(result["output"])
        result = read_json(model / "run.json")["result"] | result
    scores = {k: dict(score=v, low=None, high=None) for k, v in result.items()
              if isinstance(v, int | float)}
    for file in sorted(model.glob("evaluate/*/result.json")):
        evaluation = read_json(file)
        scores[file.parent.name] = {k: evaluation.get(k) for k in ("score", "low", "high")}
    return run | {"result": result, "name": name_of(folder), "folder": model, "scores": scores,
                  "size": result.get("pairs") or run.get("rows")}


def curve(args):
    """Score over steps, tokens, FLOPs or beta (log), a line per data size with its degree-2 fit and
    its vertex: the paper's scaling figure."""
    sizes, lines, series = {}, {}, {}
    for run in map(read_run, args.runs):
        x = run["flags"]["beta"] if args.x == "beta" else run["result"]["cumulative"][args.x]
        if args.y not in run["scores"]:
            raise ValueError(f"--y {args.y}: {run['name']} only has {', '.join(run['scores'])}")
        point = {"run": run["name"], "x": x} | run["scores"][args.y]
        sizes.setdefault(run["size"], []).append(point)
    for n, (size, points) in enumerate(sorted(sizes.items())):
        t = pandas.DataFrame(points).sort_values("x")
        ends = t[["low", "high"]].astype(float).T.fillna(t.score)
        series[f"data size {size:,}"] = (t.x, t.score, f"C{n}o", (ends - t.score).abs())
        line = lines[str(size)] = {"points": points}
        if t.x.nunique() > 2:
            fit = line["fit"] = quadratic_fit(np.log(t.x), t.score)
            grid = np.linspace(np.log(t.x.min()), np.log(t.x.max()), 200)
            fitted = np.polyval(fit["coefficients"][::-1], grid)
            series[f"degree-2 fit, {size:,}"] = (np.exp(grid), fitted, f"C{n}:")
            for end in ("", "_low", "_high"):               # of a maximum, in the units of x
                v = fit[f"vertex{end}"]
                usable = fit["maximum"] and v is not None and abs(v) < 100
                line[f"saturation{end}"] = math.exp(v) if usable else None
    folder = output_folder(args)
    data.figure(folder / "curve.png", [
        {"series": series, "xscale": "log", "xlabel": args.x, "ylabel": args.y}], 1)
    print(table([{"data size": size} | {k: v for k, v in line.items() if k.startswith("saturation")}
                 for size, line in lines.items()]), file=sys.stderr)
    return finish(args, folder, {"x": args.x, "y": args.y, "lines": lines})


def report(args):
    """One Markdown page of runs: flags that differ, scores, held-out figures and their rank
    correlation with the scores, answers to the same prompts."""
    runs, folder = [read_run(r) for r in args.runs], output_folder(args)
    flags = pandas.DataFrame([r["flags"] for r in runs]).astype(str)
    flags = flags.drop(columns=["output", "cache_dir", "local_rank", "overwrite"], errors="ignore")
    flags = flags.loc[:, flags.nunique() > 1].add_prefix("--")
    names = args.score or sorted({f.parent.name for r in runs
                                  for f in r["folder"].glob("evaluate/*/result.json")})
    held = ["eval_loss", "eval_margin", "eval_accuracy"]
    nothing = dict(score=None, low=None)
    found = [{k: r["scores"].get(k, nothing) for k in (*names, *held)} for r in runs]
    scores = pandas.DataFrame([{k: v["score"] for k, v in of.items()} for of in found], dtype=float)
    tuned = [r["stage"] != "sft" for r in runs]             # SFT's loss is of another kind
    correlation = scores[tuned].rank().corr(min_periods=3).loc[held, names]
    about = pandas.DataFrame(runs, columns=["name", "stage", "size"])
    shown = [{k: interval(of[k]) for k in names} for of in found]
    shown = pandas.DataFrame(shown, index=about.index)
    page = pandas.concat([about, flags, shown, scores[held]], axis=1)
    samples, steps = {}, {}
    for r in runs:
        steps[r["name"]] = [json.loads(line) for line in (r["folder"] / "metrics.jsonl").open()]
        path = r["folder"] / "evaluate" / "exact-match" / "samples.jsonl"
        for s in map(json.loads, path.open() if path.exists() else ()):
            question = {"prompt": s["prompt"][-1]["content"]}
            row = samples.setdefault(json.dumps(s["prompt"]), question)
            row |= {"reference": s["reference"], r["name"]: s["answer"] + " *" * s["correct"]}
    plot_curves(folder / "curves.png", steps, CURVES)
    answers = pandas.DataFrame(list(samples.values())[:args.samples])
    text = "\n".join([
        "# Runs\n", page.to_markdown(index=False, floatfmt=".4g"), "",
        "Spearman's rank correlation of held-out figures with scores; the paper finds none:\n",
        correlation.to_markdown(floatfmt=".3g"), "\n![curves](curves.png)\n",
        "Answers (* correct):\n", table(answers.replace({"\n": " ", r"\|": r"\\|"}, regex=True))])
    (folder / "report.md").write_text(text)
    print(text, file=sys.stderr)
    return finish(args, folder, {
        "runs": args.runs, "scores": json.loads(scores.to_json(orient="records")),
        "rank_correlation": json.loads(correlation.to_json(orient="index"))})


# ------------------------------------------------------------------------------------------ flags
def data_flags(add):
    add("--chat-template", default="tokenizer", help="chatml, tokenizer (its own) or a jinja file")
    add("--dtype", choices=["fp32", "bf16"], help="None: bf16 on CUDA")
    add("--max-length", type=positive, default=2048, help="tokens per row; more are cut, counted")
    add("--max-prompt-length", type=positive, default=512, help="prompt tokens of a cut pair")
    add("--num-proc", type=positive, help="processes that prepare data; None: all cores")
    add("--cache-dir", help="prepared data and log-probs; None: ~/.cache/lions")


def answer_flags(add, max_new_tokens):
    sampling_flags(add, max_new_tokens, 0.0)
    add("--limit", type=positive, help="first N questions or prompts; None: all")
    add("--seed", type=int, default=42, help="of sampled answers")
    data_flags(add)


def benchmark_flags(add, questions, max_new_tokens, judge=None):
    add("model", nargs="?", metavar="MODEL", help="folder or Hub id; not needed with --answers")
    add("--answers", help="the model's answers in the benchmark's format; None: sample them")
    add("--questions", default=questions, help="FILE or hf:OWNER/NAME/PATH")
    answer_flags(add, max_new_tokens)
    judge_flags(add, judge)


def verdict_flags(add, max_tokens, parses, parse=None):
    add("--parse", choices=parses, default=parse, help="last: the last mark of the judge's final "
        "text; else the benchmark's own rule; None: the version's")
    add("--judge-temperature", type=float, default=0.0, help="of verdicts")
    add("--judge-max-tokens", type=positive, default=max_tokens, help="tokens per verdict at most")
    add("--dry-run", action="store_true", help="count calls, tokens and cost; send nothing")
    add("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="per million tokens")


def agree_flags(add):
    add("--data", nargs="+", default=["demo-pairs:test"], help="pairs, as for --data of dpo.py")
    add("--limit", type=positive, help="N pairs, drawn by a fixed seed; None: all")
    add("--num-proc", type=positive, help="processes that prepare data; None: all cores")
    add("--cache-dir", help="prepared data; None: ~/.cache/lions")
    judge_flags(add, "pairrm")
    request_flags(add)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter,
                                allow_abbrev=False)
    commands = p.add_subparsers(dest="command", metavar="COMMAND")

    def command(run, runs=None, **defaults):
        text = " ".join(run.__doc__.split())
        c = commands.add_parser(run.__name__.replace("_", "-"), help=text, description=text,
                                allow_abbrev=False, formatter_class=HelpFormatter)
        c.set_defaults(run=run, **defaults)
        c.add_argument("--output", help="folder; None: MODEL or runs, /evaluate/COMMAND")
        if runs:
            c.add_argument("runs", nargs=runs, metavar="RUNS", help="folders of finished runs",
                           default=["runs/sft", "runs/dpo", "runs/online-dpo"])
        return c.add_argument

    add = command(arena_hard)
    benchmark_flags(add, None, 4096)
    verdict_flags(add, None, ["2024", "2025", "last"])
    add("--version", choices=list(VERSIONS), default="v0.1", help="star: the paper's, for studies")
    add("--templates", nargs="+", default=[], help="judge_config.yaml of 2024, or today's "
        "arena-hard-v..yaml and judge_utils.py")
    add("--baseline", help="its name; None: the version's")
    add("--baseline-answers", help="FILE or hf:.., with {baseline} for its name; None: the "
        "benchmark's")
    add = command(mt_bench)
    benchmark_flags(add, f"{MT_BENCH}/mt_bench/question.jsonl", 1024, "gpt-4")
    verdict_flags(add, 2048, ["mt-bench", "last"], "mt-bench")
    add("--templates", default=f"{MT_BENCH}/judge_prompts.jsonl", help="the benchmark's own")
    add("--references", help="answers of the reference",
        default=f"{MT_BENCH}/mt_bench/reference_answer/gpt-4.jsonl")
    add = command(alpaca_eval, dry_run=False)
    benchmark_flags(add, ALPACA, 2048)
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
    sampled = dict(dry_run=False, empty_system=0.0, bad_rows="refuse")
    add = command(judge, "+", **sampled)
    add("--data", nargs="+", default=["demo:test"], help="prompts, as for --data of the stages")
    answer_flags(add, 2048)
    judge_flags(add, "pairrm")
    add = command(agree, pairs=True, seed=42)
    agree_flags(add)
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
    add("--x", choices=["steps", "tokens", "flops", "beta"], default="steps", help="cumulative")
    add("--y", default="exact-match", help="an evaluation beside the model, or a number of its run")
    add = command(report, "+")
    add("--score", nargs="+", help="names as for curve --y; None: evaluations beside the models")
    add("--samples", type=positive, default=8, help="answers to show")
    return p


def check_flags(args):
    if hasattr(args, "answers") and not (args.model or args.answers):
        raise ValueError("MODEL: needed, a folder or Hub id; or --answers FILE")
    if hasattr(args, "answers") and not (args.judge_url or args.dry_run):
        raise ValueError("--judge-url: needed, the judge's endpoint (https://api.openai.com/v1)")
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
    folder = output_folder(args)
    folder.mkdir(parents=True, exist_ok=True)
    try:                                                    # two would sample and pay twice
        with filelock.FileLock(folder / f"lock-{os.environ.get('RANK', 0)}", timeout=0):
            return args.run(args)
    except filelock.Timeout:
        raise ValueError(f"--output {folder}: another process works there; wait, or name another "
                         "folder") from None


if __name__ == "__main__":
    run_main(main)
