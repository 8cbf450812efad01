"""Evaluation (LIONs, arXiv 2407.06542, sections 2 and 4): four benchmarks, margins, curves, a table of all runs.

Reads   models (folders of sft.py, dpo.py, online_dpo.py or Hub ids), questions, templates, answers: files of the
        benchmarks' own formats or hf:OWNER/NAME/PATH of a Hub data set (hf:spaces/.. of a Space).
Writes  --output (None: MODEL/evaluate/COMMAND, see `folders`): result.json, which names all that decides the number,
        answers-*.jsonl, verdicts-*.jsonl. Every answer and verdict is on disk the moment it is there, under a hash of
        all that decides it: the same command goes on where a killed one died, and nothing that was paid is asked again.

    python evaluate.py                                                   # the demo's stages, a table
    python evaluate.py arena-hard MODEL --templates judge_config.yaml --base-url https://api.openai.com/v1 --dry-run
    python evaluate.py arena-hard MODEL --variant star ..                # the paper's cheaper Arena-Hard-Auto*
    python evaluate.py mt-bench MODEL --base-url URL                     # key: OPENAI_API_KEY
    python evaluate.py openllm MODEL                                     # needs lm-eval
    python evaluate.py alpaca-eval MODEL --base-url URL                  # needs alpaca_eval
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
import contextlib
import functools
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
ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
MT_TEMPERATURE = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
                  "stem": 0.1, "humanities": 0.1}             # FastChat's; 0.7 for any other category
OPENLLM = {  # Open LLM Leaderboard v1: shots and metric, lm-evaluation-harness' names
    "arc_challenge": (25, "acc_norm,none"), "hellaswag": (10, "acc_norm,none"), "mmlu": (5, "acc,none"),
    "truthfulqa_mc2": (0, "acc,none"), "winogrande": (5, "acc,none"), "gsm8k": (5, "exact_match,strict-match")}
FINISH = "Please end your judgment now: give the one label that is your final verdict."
DATE = "%Y-%m-%dT%H:%M:%S%z"
STAGES = ["runs/sft", "runs/dpo", "runs/online-dpo"]


# --------------------------------------------------------------------------------------------- maths
LABELS = {"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)}    # A's score, battles
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
    """(label, game) -> the candidate's battles: 1 win, 0.5 tie, 0 loss, (N,) float64. Game 1 has A = baseline, game 2
    is swapped; a strong verdict is 3 battles, None none. Labels A>>B then B>>A: 0, 0, 0, 0, 0, 0, not a tie."""
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
    means = [v[rng.integers(len(v), size=len(v))].mean() for _ in range(draws)]
    return tuple(map(float, np.percentile(means, [2.5, 97.5])))


def mt_rating(text: str) -> float | None:
    """MT-Bench's rating in a judge's text (2306.05685): the first [[number]], else the first [number], else None.
    "Rating: [[7.5]]" is 7.5. Like the benchmark it takes numbers outside 1..10, too; the result counts those."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    return float(found[1]) if found else None


@functools.lru_cache
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
    back = np.array([[1, -m / s, (m / s) ** 2], [0, 1 / s, -2 * m / s ** 2], [0, 0, 1 / s ** 2]])    # to powers of x
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
        a, e = 4 * (d[2] ** 2 - t * t * cov[2, 2]), d[1] ** 2 - t * t * cov[1, 1]
        b = 2 * (d[1] * d[2] - t * t * cov[1, 2])
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


# ------------------------------------------------------------------------------- files of the benchmarks
def fetch(name: str, flag: str) -> Path:
    """A file here, or hf:OWNER/NAME/PATH of a Hub data set (hf:spaces/OWNER/NAME/PATH of a Space)."""
    if not name.startswith("hf:"):
        if not Path(name).is_file():
            raise ValueError(f"{flag} {name}: no such file; name a file here or hf:OWNER/NAME/PATH of a Hub data set")
        return Path(name)
    from huggingface_hub import hf_hub_download
    kind, rest = ("space", name[10:]) if name.startswith("hf:spaces/") else ("dataset", name[3:])
    if rest.count("/") < 2:
        raise ValueError(f"{flag} {name}: a file on the Hub is hf:OWNER/NAME/PATH")
    owner, repo, path = rest.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{repo}", path, repo_type=kind))
    except Exception as error:                              # offline, gated, moved: many kinds, one way out
        raise ValueError(f"{flag} {name}: not to be had from the Hub ({type(error).__name__}: {str(error)[:200]}); "
                         f"download it elsewhere and name the file with {flag}") from error


def read_rows(name: str, flag: str) -> list[tuple[str, dict]]:
    """(file:line, row) of a .jsonl, .jsonl.gz, .json (a list or one object) or .yaml (one object) file."""
    import yaml
    path = fetch(name, flag)
    if path.suffix in (".json", ".yaml", ".yml"):           # JSON is YAML, but read faster and stricter as itself
        try:
            made = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{flag} {path}: not to be read as {path.suffix[1:]}: {error}") from None
        rows = [(f"{path}[{i}]", r) for i, r in enumerate(made if isinstance(made, list) else [made])]
    else:
        rows = [(f"{path}:{n}", r) for n, r in data.read_lines(str(path))]
    wrong = [where for where, r in rows if not isinstance(r, dict)]
    if wrong or not rows:
        raise ValueError(f"{flag} {wrong[0] if wrong else path}: " + (
            "not an object with named fields" if wrong else "empty"))
    return rows


def read_questions(args) -> list[dict]:
    """{"id", "turns": texts, "category"} of Arena-Hard's (uid, prompt), MT-Bench's (question_id, turns) or AlpacaEval's
    (instruction) files, the first --limit of them."""
    out = {}
    for where, r in read_rows(args.questions, "--questions"):
        turns = r.get("turns") or [r[k] for k in ("prompt", "instruction") if isinstance(r.get(k), str)]
        turns = [t.get("content") if isinstance(t, dict) else t for t in turns] if isinstance(turns, list) else []
        name = str(r.get("uid", r.get("question_id", r.get("id", r.get("instruction")))))
        if not turns or not all(isinstance(t, str) for t in turns) or name == "None" or name in out:
            raise ValueError(f"--questions {where}: " + (f"question {name} is there twice" if name in out else
                             f"no uid or question_id with prompt, turns or instruction; its keys are {sorted(r)}"))
        out[name] = {"id": name, "turns": turns, "category": r.get("category", r.get("dataset", ""))}
    return list(out.values())[:args.limit]


def read_answers(name: str, flag: str, questions: list[dict]) -> dict[str, list[str]]:
    """Texts of an answer file in Arena-Hard's form (uid, messages), FastChat's (question_id, choices) or AlpacaEval's
    (instruction, output): id -> a text a turn, for every question. Raises where one is missing, twice or "$ERROR$"."""
    found, wanted = {}, {q["id"]: len(q["turns"]) for q in questions}
    for where, r in read_rows(name, flag):
        key = str(r.get("uid", r.get("question_id", r.get("instruction"))))
        try:
            texts = [m["content"] for m in r["messages"] if m["role"] == "assistant"] if "messages" in r else \
                r["choices"][0]["turns"] if "choices" in r else [r.get("output")]
            texts = [t.get("answer", t.get("content")) if isinstance(t, dict) else t for t in texts]
        except (KeyError, IndexError, TypeError):
            texts = [None]
        if key not in wanted:
            continue
        wrong = "is there twice" if key in found else \
            "holds no text" if not all(isinstance(t, str) for t in texts) else \
            f"has {len(texts)} turns, not {wanted[key]}" if len(texts) != wanted[key] else \
            "is the mark of a failed request, $ERROR$" if "$ERROR$" in texts else ""
        if wrong:
            raise ValueError(f"{flag} {where}: the answer to question {key} {wrong}; make that answer again")
        found[key] = texts
    missing = [k for k in wanted if k not in found]
    if missing:
        raise ValueError(f"{flag} {name}: no answer to {len(missing)} of {len(wanted)} questions (first: {missing[0]})")
    return found


def fill(template: str, values: dict, where: str, flag: str = "--templates") -> str:
    """{name} -> values[name] in one pass: braces in a value stay text."""
    unknown = set(re.findall(r"\{(\w+)\}", template)) - set(values)
    if unknown:
        raise ValueError(f"{flag} {where}: placeholders {', '.join(sorted(unknown))} are unknown; there are "
                         f"{', '.join(sorted(values))}")
    return re.sub(r"\{(\w+)\}", lambda m: values[m[1]], template)


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


# ----------------------------------------------------------------------------------- answers and verdicts
def model_key(args) -> list:
    """What tells a model from another: weights, tokenizer, template and generation config by content, and the name by
    which a server knows it. A server's MODEL may be a name alone."""
    served, folder = args.engine == "server", Path(args.model)
    if served and not any(folder.glob("*.safetensors")):
        return [args.served_model or args.model]
    key, patterns = hashlib.sha256(), ["tokenizer*", "chat_template*", "generation_config.json"]
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        folder = Path(snapshot_download(args.model, allow_patterns=patterns))
    for path in sorted(p for pattern in patterns for p in folder.glob(pattern) if p.is_file()):
        key.update(path.name.encode())
        data.hash_file(key, path)
    return [dpo.weights_hash(args.model), key.hexdigest(), served and (args.served_model or args.model)]


def sample_answers(args, folder: Path, asked: list[dict]) -> list[dict] | None:
    """{"text", "finished"} for {"messages", "temperature"}, from answers-0.jsonl where they are there, else by the
    engine, a call for each temperature; None where --dry-run would have to sample. A refused request is no answer."""
    from tqdm import tqdm
    served, tokenizer = args.engine == "server", None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not served:
        from transformers import AutoConfig
        tokenizer, template = sft.load_tokenizer(args)
        online_dpo.check_stops(args.model, template)
        config, limit = AutoConfig.from_pretrained(args.model).get_text_config(), args.max_new_tokens
        context = getattr(config, "max_position_embeddings", None) or math.inf
        sizes = [len(sft.prompt_ids(tokenizer, a["messages"])) for a in asked]
        if max(sizes) + limit > context:
            over = sum(s + limit > context for s in sizes)
            raise ValueError(f"--max-new-tokens {limit}: with it {over} of {len(sizes)} prompts (longest {max(sizes)} "
                             f"tokens) exceed {args.model}'s context of {context}; lower it")
    decides = [model_key(args), args.engine, tokenizer and tokenizer.chat_template, args.max_new_tokens, args.top_p,
               None if served else args.dtype]
    keys = [digest([*decides, a["messages"], a["temperature"], args.seed if a["temperature"] else 0]) for a in asked]
    folder.mkdir(parents=True, exist_ok=True)
    online_dpo.cut_torn_lines(folder, "answers-*.jsonl")
    known = {r["key"]: r for r in online_dpo.read_growing(folder, "answers-*.jsonl")}
    if args.dry_run and not all(k in known for k in keys):
        return None
    bar = tqdm(total=len(asked), initial=sum(k in known for k in keys), unit="answer", desc="answers",
               dynamic_ncols=True)
    refused = []
    with open(folder / "answers-0.jsonl", "a") as file:
        for t in sorted({a["temperature"] for a in asked}):
            rows = list({k: {"key": k, "prompt": a["messages"]} for k, a in zip(keys, asked)
                         if a["temperature"] == t and k not in known}.values())
            settings = dpo.argparse_with(args, temperature=t, samples=1, base_url=args.server_url)
            made = online_dpo.answers_of(settings, args.model, tokenizer, rows, frozenset(), device, 0, "--server-url")
            for a in made if rows else ():
                if served and not (a.text or a.ids or a.finished):
                    refused.append(rows[a.prompt]["prompt"])
                    continue
                row = {"key": rows[a.prompt]["key"], "text": a.text, "tokens": len(a.ids), "finished": a.finished}
                file.write(json.dumps(row) + "\n")
                file.flush()
                known[row["key"]] = row
                bar.update()
    bar.close()
    if refused:
        raise ValueError(f"--server-url {args.server_url}: {len(refused)} answers were refused (first prompt: "
                         f"{json.dumps(refused[0])[:200]}); the others are on disk. A prompt too long for the server, "
                         f"or --max-new-tokens {args.max_new_tokens}? Mend it and run the same command again")
    return [known[k] for k in keys]


def candidate_answers(args, folder: Path, questions: list[dict], temperature=lambda q: 0.0):
    """--answers, or the model's own, turn after turn: id -> texts, None where --dry-run would have to sample them; and
    counts of empty ones and of those cut at --max-new-tokens (of --answers: unknown)."""
    blank = lambda said: sum(not text.strip() for turns in said.values() for text in turns)
    if args.answers:
        said = read_answers(args.answers, "--answers", questions)
        return said, {"empty_answers": blank(said), "truncated_answers": None}
    said, cut = {q["id"]: [] for q in questions}, 0
    for turn in range(max(len(q["turns"]) for q in questions)):
        now = [q for q in questions if turn < len(q["turns"])]
        asked = [{"temperature": temperature(q), "messages": [
            m for i in range(turn + 1) for m in data.ask(q["turns"][i], (said[q["id"]] + [""])[i])][:-1]} for q in now]
        if (made := sample_answers(args, folder, asked)) is None:
            return None, {}
        for q, row in zip(now, made):
            said[q["id"]].append(row["text"])
        cut += sum(not row["finished"] for row in made)
    return said, {"empty_answers": blank(said), "truncated_answers": cut}


def ask_judge(args, folder: Path, calls: list[dict], parse, follow_up: str | None = None) -> tuple[dict, dict]:
    """calls {"id", "messages"} -> {id: parse(the judge's own text) or None}, and counts.

    Every reply is appended to verdicts-0.jsonl under a hash of id, judge, messages, temperature and limit, and never
    asked for again; what is parsed is the reply, so that parsing 2025 after 2024 costs nothing. follow_up: one more
    user turn where the first reply holds no label at all; both texts are parsed together. A request that failed for
    good is recorded without a reply: unparsed now, asked again by the next run. Refused keys, accounts and names (401,
    402, 403, 404), 20 failures in a row, and failures alone, however few, stop the run."""
    from tqdm import tqdm
    online_dpo.cut_torn_lines(folder, "verdicts-*.jsonl")
    known = online_dpo.read_growing(folder, "verdicts-*.jsonl")
    known = {r["key"]: r["reply"] for r in known if r["reply"] is not None}
    settings = {"model": args.judge, "temperature": args.judge_temperature, "max_tokens": args.judge_max_tokens}
    key_of = lambda name, messages: digest([name, settings, messages])

    def further(messages, reply):                           # the turn after a first reply, None where there is none
        if follow_up and len(messages) < 3 and not re.search(r"\[\[[AB<>=]+\]\]", reply):
            return [*messages, {"role": "assistant", "content": reply}, {"role": "user", "content": follow_up}]

    def left(name, messages):                               # the first turn that is not on disk, None where all are
        while messages and (reply := known.get(key_of(name, messages))) is not None:
            messages = further(messages, reply)
        return messages
    todo = [c | {"messages": m} for c in calls          # extra: answers to come
            if (m := c["messages"] if c["extra"] else left(c["id"], c["messages"]))]
    if args.dry_run:
        return {}, dry_run(args, calls, todo, follow_up)
    lock, failing, counts = threading.Lock(), [0, ""], {"asked": 0, "failed": 0, "judge_tokens": 0}

    def ask(call):
        messages, said = call["messages"], []
        while messages:
            key, error, tokens = key_of(call["id"], messages), None, 0
            reply = known.get(key)
            if reply is None:
                try:
                    reply, _, tokens = online_dpo.chat(args.judge_url, settings | {"messages": messages}, args,
                                                       "--base-url")
                except online_dpo.ChatError as e:
                    if e.status in (401, 402, 403, 404):
                        raise
                    error = str(e)
                with lock:
                    file.write(json.dumps({"key": key, "id": call["id"], "judge": args.judge, "url": args.judge_url,
                                           "reply": reply, "error": error, "tokens": tokens,
                                           "time": time.strftime(DATE)}) + "\n")
                    file.flush()
                    counts["asked"] += reply is not None
                    counts["failed"] += reply is None
                    counts["judge_tokens"] += tokens or 0
                    failing[:] = (0, failing[1]) if reply is not None else (failing[0] + 1, error)
                    if failing[0] >= 20:
                        raise ValueError(f"20 requests in a row failed; stopped, nothing is lost. The last: {error}")
            if reply is None:
                return None                                 # a game is judged by whole replies or not at all
            said.append(reply)
            messages = further(messages, reply)
        return parse("\n".join(said))
    verdicts = {}
    bar = tqdm(total=len(calls), unit="verdict", desc=f"judge {args.judge}", dynamic_ncols=True)
    with open(folder / "verdicts-0.jsonl", "a") as file:
        for call, verdict in online_dpo.in_parallel(ask, calls, args.concurrency):
            verdicts[call["id"]] = verdict
            bar.update()
    bar.close()
    if counts["failed"] and len(todo) == len(calls) and not counts["asked"]:
        raise ValueError(f"all {counts['failed']} requests failed; nothing is scored. The last: {failing[1]}")
    counts |= {"calls": len(calls), "unparsed": sum(v is None for v in verdicts.values())}
    if counts["unparsed"]:
        print(f"{counts['unparsed']} of {len(calls)} verdicts are unparsed ({counts['failed']} requests failed, which "
              "the same command asks again" + f"; the last: {failing[1]}" * bool(failing[1]) + "); they count as "
              "neither win nor loss", file=sys.stderr)
    return verdicts, counts


def dry_run(args, calls, todo, follow_up) -> dict:
    """Calls, tokens and cost of what is not on disk yet. Tokens in: bytes / 4, an estimate; out: at most the limit."""
    size = sum(len(m["content"].encode()) for c in todo for m in c["messages"])
    tokens_in, tokens_out = size // 4 + sum(c["extra"] for c in todo), len(todo) * args.judge_max_tokens
    cost = (tokens_in * args.price[0] + tokens_out * args.price[1]) / 1e6 if args.price else None
    print(f"dry run: {len(todo)} calls of {args.judge} ({len(calls) - len(todo)} on disk), about {tokens_in:,} tokens "
          f"in (bytes / 4), at most {tokens_out:,} out; " + ("--price IN OUT gives the cost" if cost is None else
          f"at most {cost:.2f} at {args.price[0]:g} and {args.price[1]:g} a million tokens") +
          "; a reply without a verdict costs one call more" * bool(follow_up), file=sys.stderr)
    return {"dry_run": True, "calls": len(todo), "on_disk": len(calls) - len(todo), "tokens_in": tokens_in,
            "tokens_out_at_most": tokens_out, "cost_at_most": cost}


def finish(args, folder: Path, result: dict) -> dict:
    """result.json: the score with all that decides it."""
    import transformers
    versions = {"python": sys.version.split()[0]} | {m.__name__: m.__version__ for m in (torch, transformers, np)}
    result = {"command": args.command, "judge": getattr(args, "judge", None), "temperature": getattr(
        args, "judge_temperature", None), **result, "date": time.strftime(DATE), "git": sft.git_commit(),
        "versions": versions, "flags": vars(args), "output": str(folder)}
    folder.mkdir(parents=True, exist_ok=True)
    sft.write_json(folder / "result.json", result)
    return result


def folders(args) -> tuple[Path, Path]:
    """Where answers and verdicts are kept, and where the result goes. Both are --output; else the first is
    MODEL/evaluate/COMMAND, runs/evaluate/MODEL/COMMAND where MODEL is no folder here, runs/evaluate/COMMAND for several
    models: whatever was paid serves any --limit, --judge and --parse. The second has those in its name."""
    if args.output:
        return Path(args.output), Path(args.output)
    have, variant = lambda f: getattr(args, f, None), getattr(args, "variant", None)
    several = have("runs") or [m for m in (have("before"), have("after")) if m]
    model = "" if several else args.model or Path(args.answers).name.split(".jsonl")[0]
    here = model and Path(model).is_dir()
    base = Path(model, "evaluate") if here else Path("runs/evaluate", model.replace("/", "--"))
    work = base / (args.command + "-star" * (variant == "star"))
    usual = {"judge": VARIANTS[variant]["judge"] if variant else DEFAULTS.get(args.command, {}).get("judge"),
             "annotator": ANNOTATOR, "parse": "2024", "limit": None}
    what = "+".join([name_of(m) for m in several] + [f"{f}-{name_of(str(have(f)))}" for f, value in usual.items()
                                                     if have(f) not in (None, value)])
    return work, work.with_name("-".join(filter(None, [work.name, what[:180], digest(what)[:8] * (len(what) > 180)])))


@contextlib.contextmanager
def alone(folder: Path):
    """One process at a time: two would sample and pay twice."""
    import fcntl
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--output {folder}: another process is at work in this folder; wait for it, or name "
                             "another") from None
        yield


# --------------------------------------------------------------------------------------- the benchmarks
def arena_hard(args) -> dict:
    """Arena-Hard-Auto v0.1, or the paper's Arena-Hard-Auto*: two swapped games a question against the baseline."""
    star, chosen = args.variant == "star", VARIANTS[args.variant]
    (folder, out), questions = folders(args), read_questions(args)
    args.judge, args.baseline = args.judge or chosen["judge"], args.baseline or chosen["baseline"]
    where, template = read_rows(args.templates, "--templates")[0]
    system, texts = template.get("system_prompt"), template.get("prompt_template")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(system, str) or not texts or len(texts) != 1:
        raise ValueError(f"--templates {where}: needs system_prompt and one prompt_template, as in Arena-Hard's "
                         "judge_config.yaml")
    baseline = read_answers(args.baseline_answers or f"{ARENA}model_answer/{args.baseline}.jsonl", "--baseline-answers",
                            questions)
    answers, told = candidate_answers(args, folder, questions)
    calls = []
    for q in questions:
        for game in (1, 2):                                 # 1: A is the baseline; 2: A is the candidate
            (mine,), (theirs,) = answers[q["id"]] if answers else [""], baseline[q["id"]]
            a, b = (theirs, mine) if game == 1 else (mine, theirs)
            values = {name: text for names, text in (("question_1 question prompt QUESTION", q["turns"][0]),
                                                     ("answer_1 answer_a ANSWER_A", a),
                                                     ("answer_2 answer_b ANSWER_B", b)) for name in names.split()}
            calls.append(call(f"{q['id']}/{game}", system, fill(texts[0], values, where),
                              0 if answers else args.max_new_tokens))
    verdicts, counts = ask_judge(args, folder, calls, lambda text: arena_verdict(text, args.parse),
                                 FINISH if args.parse == "2024" else None)
    if args.dry_run:
        return counts
    out.mkdir(parents=True, exist_ok=True)
    sft.write_rows(out / "games.jsonl", [{"id": c["id"], "verdict": verdicts[c["id"]]} for c in calls])
    battles = arena_battles([(verdicts[c["id"]], int(c["id"][-1])) for c in calls])
    score, low, high = (None if v is None else 100 * v for v in (
        win_rate(battles), *bootstrap(battles, args.bootstrap, args.seed)))
    shown = "no battle" if score is None else f"{score:.1f} ({low:.1f} .. {high:.1f})"
    print(f"Arena-Hard ({args.variant}): {shown}", file=sys.stderr)
    return finish(args, out, {
        "benchmark": "arena-hard-auto-v0.1" + "*" * star, "model": args.model or args.answers,
        "baseline": args.baseline, "parse": args.parse, "template": digest([system, texts[0]]), "score": score,
        "low": low, "high": high, "battles": len(battles), "questions": len(questions), **told, **counts})


def call(name: str, system: str, text: str, extra: int) -> dict:
    """One question to the judge; extra: tokens at most of answers that are not there yet, for --dry-run."""
    return {"id": name, "extra": extra, "messages": [{"role": "system", "content": system},
                                                     {"role": "user", "content": text}]}


def mt_bench(args) -> dict:
    """MT-Bench: two turns, each graded alone on 1 to 10, against a reference where --references has one."""
    (folder, out), questions = folders(args), read_questions(args)
    templates = {r["name"]: r for _, r in read_rows(args.templates, "--templates") if {
        "name", "system_prompt", "prompt_template"} <= set(r)}
    used = ["single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn"]
    missing = [n for n in used if n not in templates]
    if missing:
        raise ValueError(f"--templates {args.templates}: no template {', '.join(missing)} with system_prompt and "
                         "prompt_template; MT-Bench's judge_prompts.jsonl has them")
    there = {str(r.get("question_id")) for _, r in read_rows(args.references, "--references")}
    references = read_answers(args.references, "--references", [q for q in questions if q["id"] in there])
    bare = [q["id"] for q in questions if q["category"] in ("math", "reasoning", "coding") and q["id"] not in there]
    if bare:
        raise ValueError(f"--references {args.references}: no reference to question {', '.join(bare[:9])}; MT-Bench "
                         "grades math, reasoning and coding against one, and easier without")
    answers, told = candidate_answers(args, folder, questions, lambda q: MT_TEMPERATURE.get(q["category"], 0.7))
    ids = {q["id"]: [f"{q['id']}/{t + 1}" for t in range(len(q["turns"]))] for q in questions}
    calls = []
    for q in questions:
        said, right = answers[q["id"]] if answers else [""] * len(q["turns"]), references.get(q["id"])
        values = {"question": q["turns"][0], "answer": said[0]}
        for turn, name in enumerate(ids[q["id"]]):
            t = templates[f"single{'-math' * bool(right)}-v1{'-multi-turn' * (turn > 0)}"]
            values |= {f"question_{turn + 1}": q["turns"][turn], f"answer_{turn + 1}": said[turn]}
            values |= {f"ref_answer_{turn + 1}": right[turn]} if right else {}
            calls.append(call(name, t["system_prompt"], fill(t["prompt_template"], values, args.templates),
                              0 if answers else (turn + 1) * args.max_new_tokens))
    ratings, counts = ask_judge(args, folder, calls, mt_rating)
    if args.dry_run:
        return counts
    out.mkdir(parents=True, exist_ok=True)
    sft.write_rows(out / "ratings.jsonl", [{"id": c["id"], "rating": ratings[c["id"]]} for c in calls])

    def mean(names):
        given = [ratings[n] for n in names if ratings[n] is not None]
        return float(np.mean(given)) if given else None
    categories = {c: mean([n for q in questions if q["category"] == c for n in ids[q["id"]]])
                  for c in dict.fromkeys(q["category"] for q in questions)}
    turns = {f"turn {t + 1}": mean([x[t] for x in ids.values() if t < len(x)])
             for t in range(max(map(len, ids.values())))}
    low, high = bootstrap([m for m in map(mean, ids.values()) if m is not None], args.bootstrap, args.seed)
    plot_bars(out / "mt-bench.png", categories | turns | {"overall": mean(ratings)}, "MT-Bench rating (1 to 10)", 10)
    return finish(args, out, {
        "benchmark": "mt-bench", "model": args.model or args.answers, "baseline": None, "parse": "mt-bench",
        "template": digest([[templates[n]["system_prompt"], templates[n]["prompt_template"]] for n in used]),
        "score": mean(ratings), "low": low, "high": high, "categories": categories, "turns": turns,
        "questions": len(questions), "with_reference": len(references), **told,
        "out_of_scale": sum(r is not None and not 1 <= r <= 10 for r in ratings.values()), **counts})


def new_figure():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(figsize=(8, 5), constrained_layout=True)


def save_figure(figure, path: Path) -> None:
    import matplotlib.pyplot as plt
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_bars(path: Path, values: dict[str, float | None], label: str, top: float) -> None:
    figure, ax = new_figure()
    bars = ax.bar(list(values), [v or 0 for v in values.values()], color="#4477aa")
    ax.bar_label(bars, ["-" if v is None else f"{v:.2f}" for v in values.values()], fontsize=9)
    ax.set(ylabel=label, ylim=(0, top))
    ax.tick_params(axis="x", rotation=30)
    save_figure(figure, path)


# ------------------------------------------------------------------------------------- models against models
def judge(args) -> dict:
    """Win rates of every run against every other on --data's prompts by any judge of online_dpo.py, in both orders."""
    names = [name_of(r) for r in args.runs]
    if len(set(names)) < max(2, len(names)):
        raise ValueError(f"RUNS {' '.join(args.runs)}: two or more different ones are needed")
    (folder, out), log = folders(args), lambda *a: print(*a, file=sys.stderr)
    rank, _, device = sft.init_distributed()
    here = [r for r in args.runs if Path(r).is_dir()]       # of a server's models some may be names alone
    first = dpo.argparse_with(args, model=(here or args.runs)[0])
    tokenizer, template = sft.load_tokenizer(first)
    rows, key = online_dpo.read_prompts(first, tokenizer, template, rank, log)
    rows = rows[:args.limit]
    asked = [{"messages": r["prompt"], "temperature": args.temperature} for r in rows]
    made = {n: sample_answers(dpo.argparse_with(args, model=m), folder / n, asked) for n, m in zip(names, args.runs)}
    extra = 2 * args.max_new_tokens if None in made.values() else 0         # --dry-run before there are answers
    said = {n: [f"answer of {n} to come"] * len(rows) if extra else [r["text"] for r in made[n]] for n in names}
    cut = {n: sum(not r["finished"] for r in made[n] or ()) for n in names}
    duels = [(a, b) for i, a in enumerate(names) for b in names[i + 1:]]
    made, counts = llm_outcomes(args, folder, rows, said, duels, extra) if args.judge.startswith("llm:") else \
        scored_outcomes(args, rows, said, duels, device)
    if args.dry_run:
        return counts
    rates = {}
    for a, b in duels:
        wins = [w for w in made[a, b] if w is not None]
        low, high = bootstrap(wins, args.bootstrap, args.seed)
        rates[f"{b} over {a}"] = rate = {
            "win_rate": win_rate(wins), "low": low, "high": high, "prompts": len(wins),
            "equal": sum(x.strip() == y.strip() for x, y in zip(said[a], said[b]))}
        log(f"{b} over {a}: " + ("no verdict" if not wins else f"{rate['win_rate']:.1%} ({low:.1%} .. {high:.1%}) of "
                                 f"{len(wins)} prompts, {rate['equal']} answers equal"))
    return finish(args, out, {"models": args.runs, "baseline": None, "data": key, "win_rates": rates,
                              "truncated_answers": cut, **counts})


def llm_outcomes(args, folder, rows, said, duels, extra: int) -> tuple[dict, dict]:
    """(a, b) -> of each prompt, how far b beats a in 0..1: mean of both orders' verdicts; a half for equal answers;
    None where an order has no verdict: one seat alone would count what the judge likes about it."""
    text = fetch(args.judge_template, "--judge-template").read_text()
    differ = lambda a, b, n: said[a][n].strip() != said[b][n].strip()
    calls = []
    for a, b in duels:
        for n, r in enumerate(rows):
            for one, two in ((a, b), (b, a)) if differ(a, b, n) else ():
                values = {"prompt": online_dpo.as_text(r["prompt"]), "answer_a": said[one][n], "answer_b": said[two][n]}
                calls.append({"id": f"{one} {two} {r['key']}", "extra": extra, "messages": [
                    {"role": "user", "content": fill(text, values, args.judge_template, "--judge-template")}]})

    def first_wins(reply):                                  # 1, 0 or a half; marks as in online_dpo.py's llm judge
        found = re.findall(r"\[\[(A>>B|A>B|A=B|B>A|B>>A|A|B|C)\]\]", reply)
        return (1 + online_dpo.VERDICTS[found[-1]]) / 2 if found else None
    verdicts, counts = ask_judge(dpo.argparse_with(args, judge=args.judge.partition(":")[2]), folder, calls, first_wins)
    if args.dry_run:
        return {}, counts

    def b_wins(a, b, n):
        if not differ(a, b, n):
            return 0.5
        second, first = (verdicts[f"{x} {y} {rows[n]['key']}"] for x, y in ((a, b), (b, a)))
        return None if None in (second, first) else (first + 1 - second) / 2
    return {(a, b): [b_wins(a, b, n) for n in range(len(rows))] for a, b in duels}, counts | {
        "parse": "last [[..]]", "template": digest(text)}


def scored_outcomes(args, rows, said, duels, device) -> tuple[dict, dict]:
    """(a, b) -> of each prompt, how far b beats a in 0..1: 1, 1/2 or 0 for a score above, equal to, below a's, the mean
    of both orders for a Python judge; PairRM's scores are of both by themselves, a reward model's of none."""
    orders = 1 + args.judge.startswith("python:")
    scorer, out = online_dpo.load_judge(dpo.argparse_with(args, samples=2), device), {}
    for a, b in duels:
        gap = np.zeros(len(rows))
        differ = [n for n in range(len(rows)) if said[a][n].strip() != said[b][n].strip()]
        for one, two in ((a, b), (b, a))[:orders] if differ else ():
            asked = [rows[n] | {"answers": [{"text": said[x][n]} for x in (one, two)]} for n in differ]
            scores = online_dpo.score_responses(scorer, asked, args.judge)                  # (len(differ), 2)
            gap[differ] += np.sign(scores[:, 1] - scores[:, 0]) * (1 if one == a else -1)
        out[a, b] = ((1 + gap / orders) / 2).tolist()
    return out, {"unparsed": 0, "parse": None, "template": None}


def name_of(folder: str) -> str:
    return folder.strip("/").replace("/", "--").removeprefix("runs--")


# --------------------------------------------------------------------------------------------- margins
def pair_margins(args, names: list[str]) -> tuple[list[np.ndarray], str]:
    """m = log pi(y_w|x) - log pi(y_l|x), nats, of --data's pairs under each model, (P,) float64 each; the data's key.
    Through dpo.py's shared unpadded forward and its cache; a model with other tokens gets the messages in those."""
    rank, world, device = sft.init_distributed()
    log = lambda *a: print(*a, file=sys.stderr, flush=True) if rank == 0 else None
    args = dpo.argparse_with(args, micro_tokens=args.micro_tokens or args.max_length, gradient_checkpointing=False,
                             empty_system=0.0, seed=42, model=names[0])
    tokenizer, template = sft.load_tokenizer(args)
    rows, key = sft.prepare_rows(args.data, args=args, tokenizer=tokenizer, template=template, rank=rank, pairs=True,
                                 max_prompt_length=args.max_prompt_length, min_gap=None)
    tokens, out = lambda t: (t.backend_tokenizer.to_str(), t.chat_template), []
    for name in names:
        own, its = sft.load_tokenizer(dpo.argparse_with(args, model=name))
        same = tokens(own) == tokens(tokenizer)
        seen = rows if same else dpo.other_tokens(rows, dpo.argparse_with(args, ref=name), own, its)
        pairs = dpo.Pairs(seen, share=True)
        dpo.reference_logps(args, name, dpo.weights_hash(name), pairs, own,
                            own.convert_tokens_to_ids(list(its.new_tokens)), rank, world, device, log)
        out.append(pairs.ref[:, 0].astype(np.float64) - pairs.ref[:, 1])
    return out, key


def margin_summary(before, after, bins: int = 10) -> dict:
    """What training did to held-out margins (LIONs' analysis figure): means, accuracy = share m > 0, flips, the change
    after - before over before as a degree-2 fit and as means of equally full bins with their standard errors.
    before (-1, 1), after (1, 2): accuracy 0.5 -> 1, one flip to right, none to wrong."""
    before, after = np.asarray(before), np.asarray(after)
    change, parts = after - before, np.array_split(np.argsort(before, kind="stable"), bins)
    return {"pairs": len(before), "margin_before": float(before.mean()), "margin_after": float(after.mean()),
            "accuracy_before": float((before > 0).mean()), "accuracy_after": float((after > 0).mean()),
            "to_right": int(((before <= 0) & (after > 0)).sum()), "to_wrong": int(((before > 0) & (after <= 0)).sum()),
            "fit": quadratic_fit(before, change) if len(set(before.tolist())) > 2 else None,
            "bins": [{"before": float(before[p].mean()), "change": float(change[p].mean()), "pairs": len(p),
                      "stderr": float(change[p].std(ddof=1) / math.sqrt(len(p))) if len(p) > 1 else None}
                     for p in parts if len(p)]}


def margins(args) -> dict:
    """Log-prob margins of held-out pairs before and after training: scatter, binned means, degree-2 fit, flips."""
    (before, after), key = pair_margins(args, [args.before, args.after])
    if torch.distributed.get_rank():
        return {}
    folder = folders(args)[1]
    plot, s = Path(args.plot or folder / "margins.png"), margin_summary(before, after)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"before": b, "after": a} for b, a in zip(before.tolist(), after.tolist())]
    sft.write_rows(folder / "margins.jsonl", rows)
    figure, ax = new_figure()
    ax.axhline(0, color="0.7", lw=1)
    ax.axvline(0, color="0.7", lw=1)
    ax.plot(before, after - before, ".", ms=4, alpha=0.35, color="#4477aa", label=f"{len(before)} held-out pairs")
    x, y, error = zip(*((b["before"], b["change"], b["stderr"] or 0) for b in s["bins"]))
    ax.errorbar(x, y, error, fmt="o", color="#222222", ms=5, label="means of bins, one standard error")
    if s["fit"]:
        c, grid = s["fit"]["coefficients"], np.linspace(before.min(), before.max(), 200)
        ax.plot(grid, c[0] + c[1] * grid + c[2] * grid ** 2, ":", color="#cc3311", lw=2,
                label=f"{c[0]:.3g} {c[1]:+.3g} m {c[2]:+.3g} m²")
    ax.set(xlabel=f"margin before, log π(y_w|x) − log π(y_l|x) (nats): {args.before}",
           ylabel=f"change of margin (nats): {args.after}", title=f"accuracy {s['accuracy_before']:.3f} → "
           f"{s['accuracy_after']:.3f}; {s['to_right']} pairs to right, {s['to_wrong']} to wrong")
    ax.legend()
    save_figure(figure, plot)
    return finish(args, folder, {"before": args.before, "after": args.after, "data": key, **s, "plot": str(plot)})


# ------------------------------------------------------------------------------------------ runs in a row
def read_run(folder: str) -> dict:
    """run.json of a finished run, with "name", "folder" (of the last iteration's model for online_dpo.py), "samples"
    and "right", their correctness by prompt."""
    path = Path(folder) / "run.json"
    run = json.loads(path.read_text()) if path.is_file() else {}
    if not run.get("result"):
        raise ValueError(f"RUNS {folder}: no finished run there (run.json with a result)" + (
            f"; run python {Path(folder).name.replace('-', '_')}.py first" if folder in STAGES else ""))
    last = Path(folder) / Path(run["result"].get("output", folder)).name
    last = last if run["stage"] == "online-dpo" and last.is_dir() else Path(folder)
    if last != Path(folder) and (last / "run.json").is_file():      # "cumulative" is in the last training's
        run["result"] = json.loads((last / "run.json").read_text())["result"] | run["result"]
    rows = [r for _, r in data.read_lines(str(last / "samples.jsonl"))] if (last / "samples.jsonl").is_file() else []
    return run | {"name": name_of(folder), "folder": last, "size": run["result"].get("pairs") or run.get("rows"),
                  "samples": rows, "right": {json.dumps(r["prompt"]): float(r["correct"]) for r in rows}}


def evaluations(run: dict) -> list[str]:
    """What `curve --y` and `report --score` can name: numbers of run.json's result, and folders of evaluations."""
    return sorted([k for k, v in run["result"].items() if isinstance(v, (int, float))] +
                  [p.parent.name for p in run["folder"].glob("evaluate/*/result.json")])


def score_of(run: dict, name: str, flag: str) -> dict:
    """{"score", "low", "high"} of a run: evaluate/NAME/result.json beside its model, or NAME in run.json's result."""
    if name not in evaluations(run):
        raise ValueError(f"{flag} {name}: {run['name']} has no such score; it has {', '.join(evaluations(run))}")
    path = run["folder"] / "evaluate" / name / "result.json"
    if path.is_file():
        return {k: json.loads(path.read_text()).get(k) for k in ("score", "low", "high")}
    low, high = bootstrap([float(r["correct"]) for r in run["samples"]]) if name == "exact_match" else (None, None)
    return {"score": run["result"][name], "low": low, "high": high}


def table(head: list, rows: list[list]) -> str:
    plain = lambda v: str(v).replace("|", "\\|").replace("\n", " ")
    show = lambda v: "-" if v is None else f"{v:.4g}" if isinstance(v, float) else plain(v)
    return "\n".join("| " + " | ".join(map(show, r)) + " |" for r in (head, ["---"] * len(head), *rows)) + "\n"


def stages(args) -> dict:
    """The demo's stages, or RUNS: exact match, win rate over the stage before, margins on held-out pairs."""
    runs = [read_run(r) for r in args.runs]
    made, _ = pair_margins(args, [str(r["folder"]) for r in runs])
    if torch.distributed.get_rank():
        return {}
    out, lines = [], []
    for i, (run, m) in enumerate(zip(runs, made)):
        right, wins, flips = run["right"], [], {}
        if i:                                               # right and wrong: 1; both alike: a half
            before, s = runs[i - 1]["right"], margin_summary(made[i - 1], m)
            wins = [(1 + right[k] - before[k]) / 2 for k in right if k in before]
            flips = {k: s[k] for k in ("to_right", "to_wrong")}
        row = {"name": run["name"], "exact_match": win_rate(list(right.values())), "prompts": len(right),
               "win_rate": win_rate(wins), "paired_prompts": len(wins), "margin": float(m.mean()),
               "accuracy": float((m > 0).mean()), **flips}
        for k, values in (("exact_match", list(right.values())), ("win_rate", wins)):
            row[k + "_low"], row[k + "_high"] = bootstrap(values, 10_000)
        out.append(row)
        show = lambda k: None if row[k] is None else "{:.1f} ({:.1f} .. {:.1f})".format(
            *(100 * row[k + end] for end in ("", "_low", "_high")))
        lines.append([row["name"], show("exact_match"), show("win_rate"), f"{m.mean():.3f}",
                      f"{100 * row['accuracy']:.1f}", ", ".join(map(str, flips.values())) or None])
    print(table(["stage", "exact match", "win rate over the stage before", "margin (nats)", "pairs right",
                 "to right, to wrong"], lines))
    print(f"Percent, 95% bootstrap intervals over {len(runs[0]['right'])} prompts (paired for win rates); margins on "
          f"{len(made[0])} pairs of {' '.join(args.data)}.", flush=True)
    return {"stages": out, "data": args.data}


def curve(args) -> dict:
    """Score over steps (log), a line a data size with its degree-2 fit and vertex: the paper's scaling figure."""
    sizes, lines = {}, {}
    for run in map(read_run, args.runs):
        if args.x not in run["result"].get("cumulative", {}):
            raise ValueError(f"--x {args.x}: {run['name']} records none; the folder of an iteration of online_dpo.py "
                             "does")
        sizes.setdefault(run["size"], []).append({
            "run": run["name"], "x": run["result"]["cumulative"][args.x], **score_of(run, args.y, "--y")})
    noun = "documents" if run["stage"] == "sft" else "pairs"
    figure, ax = new_figure()
    colours = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb"]
    for i, (size, points) in enumerate(sorted(sizes.items())):
        points.sort(key=lambda p: p["x"])
        x, y = (np.array([p[k] for p in points], dtype=np.float64) for k in ("x", "score"))
        error = [[p["score"] - p["low"], p["high"] - p["score"]] if p["low"] is not None else [0, 0] for p in points]
        ax.errorbar(x, y, np.array(error).T.clip(0), fmt="o", ms=5, color=colours[i % 7], elinewidth=0.5, capsize=2,
                    label=f"{size:,} {noun}")
        line = lines[str(size)] = {"points": points}
        if len(set(x.tolist())) < 3:
            continue
        fit = line["fit"] = quadratic_fit(np.log(x), y)
        for k, end in (("vertex", ""), ("vertex_low", "_low"), ("vertex_high", "_high")):   # of a maximum, in steps
            known = fit["maximum"] and fit[k] is not None and abs(fit[k]) < 100
            line["saturation" + end] = math.exp(fit[k]) if known else None
        c, grid = fit["coefficients"], np.linspace(np.log(x).min(), np.log(x).max(), 200)
        at = lambda g: c[0] + c[1] * g + c[2] * g ** 2
        ax.plot(np.exp(grid), at(grid), ":", color=colours[i % 7], lw=2)
        if line["saturation"] and grid[0] <= fit["vertex"] <= grid[-1]:
            ax.plot(line["saturation"], at(fit["vertex"]), "*", ms=14, color=colours[i % 7])
        if line["saturation"]:
            low, high = line["saturation_low"], line["saturation_high"]
            print(f"{size} {noun}: saturation at {line['saturation']:.4g} {args.x}, 95% interval " + (
                f"{low:.4g} .. {high:.4g}" if low and high else "unbounded"), file=sys.stderr)
    ax.set(xscale="log", xlabel={"steps": "optimiser steps", "tokens": "tokens", "flops": "FLOPs"}[args.x],
           ylabel=args.y.replace("_", " "), title="dotted: degree-2 fit over the logarithm; star: its vertex")
    ticks = sorted({p["x"] for points in sizes.values() for p in points})
    if len(ticks) <= 12:
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
    ax.legend()
    folder = Path(args.output or "runs/evaluate/curve")
    plot = Path(args.plot or folder / "curve.png")
    save_figure(figure, plot)
    return finish(args, folder, {"x": args.x, "y": args.y, "lines": lines, "plot": str(plot)})


def report(args) -> dict:
    """One Markdown page of all runs: flags that differ, scores, held-out figures, rank correlation, answers."""
    runs, folder = [read_run(r) for r in args.runs], Path(args.output or "runs/evaluate/report")
    tuned = [r for r in runs if r["stage"] != "sft"] or runs        # SFT's loss is of another kind: not beside DPO's
    known = {k for r in runs for k in r["flags"]} - {"output", "cache_dir", "local_rank", "overwrite"}
    differ = sorted(k for k in known if len({json.dumps(r["flags"].get(k)) for r in runs}) > 1)
    names = args.score or sorted({n for r in runs for n in evaluations(r) if n == "exact_match" or
                                  (r["folder"] / "evaluate" / n).is_dir() and score_of(r, n, "")["score"] is not None})
    no_score = dict.fromkeys(("score", "low", "high"))
    scores = {n: {r["name"]: score_of(r, n, "--score") if args.score or n in evaluations(r) else no_score for r in runs}
              for n in names}
    held = [k for k in ("eval_loss", "eval_margin", "eval_accuracy") if any(k in evaluations(r) for r in runs)]
    correlations = {}
    for k in held:
        for n in names:
            both = [(r["result"][k], scores[n][r["name"]]["score"]) for r in tuned if k in evaluations(r)]
            both = [(k, s) for k, s in both if s is not None]
            correlations[f"{k} with {n}"] = rank_correlation(*zip(*both)) if both else None
    folder.mkdir(parents=True, exist_ok=True)
    steps = {r["name"]: [m for _, m in data.read_lines(str(r["folder"] / "metrics.jsonl"))] for r in runs}
    sft.plot_curves(folder / "curves.png", steps, sft.CURVES if tuned[0]["stage"] == "sft" else dpo.CURVES)
    cell = lambda s: None if s["score"] is None else f"{s['score']:.4g}" + (
        f" ({s['low']:.4g} .. {s['high']:.4g})" if s["low"] is not None else "")
    said = [{json.dumps(s["prompt"]): s for s in r["samples"]} for r in runs]
    shared = [k for k in said[0] if all(k in s for s in said)][:args.samples]
    page = "\n".join([
        "# Runs", table(["run", "stage", "data", *("--" + f.replace("_", "-") for f in differ)], [
            [r["name"], r["stage"], r["size"], *(r["flags"].get(f) for f in differ)] for r in runs]),
        "Scores with 95% intervals, and figures on held-out pairs:\n", table(["run", *names, *held], [
            [r["name"], *(cell(scores[n][r["name"]]) for n in names), *(r["result"].get(k) for k in held)]
            for r in runs]),
        "Rank correlation (Spearman) over runs; the paper finds that these figures do not follow the score:\n",
        table(["", *names], [[k, *(correlations[f"{k} with {n}"] for n in names)] for k in held]),
        "![curves](curves.png)\n",
        "Answers to the same prompts (* correct):\n", table(["prompt", "reference", *(r["name"] for r in runs)], [
            [said[0][k]["prompt"][-1]["content"], said[0][k]["reference"],
             *(s[k]["answer"] + " *" * s[k]["correct"] for s in said)] for k in shared])])
    (folder / "report.md").write_text(page)
    print(page, file=sys.stderr)
    return finish(args, folder, {"runs": args.runs, "scores": scores, "rank_correlation": correlations,
                                 "page": str(folder / "report.md")})


# ------------------------------------------------------------------------------------ other people's harnesses
def needs(package: str, pinned: str):
    """An optional package, imported when used."""
    import importlib
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{package} is not to be imported ({error}); it is optional: pip install {pinned}") from None


def openllm(args) -> dict:
    """Open LLM Leaderboard v1 by lm-evaluation-harness: six tasks with their shots and metrics, and their average."""
    lm_eval, _ = (needs(package, '"lm-eval[hf]==0.4.13"') for package in ("lm_eval", "accelerate"))
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager
    (folder, out), wanted, tasks = folders(args), {}, {}
    for text in args.tasks or [f"{t}:{shots}:{metric}" for t, (shots, metric) in OPENLLM.items()]:
        name, shots, metric = (text.split(":") + ["", ""])[:3]
        if shots and not shots.isdigit():
            raise ValueError(f"--tasks {text}: NAME[:SHOTS[:METRIC]], SHOTS a number")
        wanted[name] = (int(shots) if shots else None, metric)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[args.dtype]
    settings = f"pretrained={args.model},dtype={dtype}" + (f",{args.model_args}" if args.model_args else "")
    model = get_model(args.engine).create_from_arg_string(settings, {} if args.engine == "vllm" else {
        "batch_size": args.batch_size, "device": "cuda" if torch.cuda.is_available() else "cpu"})
    decides = [model_key(args), settings, args.engine, args.limit, args.apply_chat_template,
               lm_eval.__version__]
    folder.mkdir(parents=True, exist_ok=True)
    online_dpo.cut_torn_lines(folder, "tasks-*.jsonl")
    known = {r["key"]: r["values"] for r in online_dpo.read_growing(folder, "tasks-*.jsonl")}
    manager = TaskManager(include_path=args.include_path)
    for name, (shots, metric) in wanted.items():
        key = digest([*decides, name, shots])
        if key not in known or args.include_path:           # task files of one's own may have changed: scored anew
            made = lm_eval.simple_evaluate(model=model, tasks=[name], num_fewshot=shots, limit=args.limit,
                                           task_manager=manager, apply_chat_template=args.apply_chat_template,
                                           log_samples=False)
            if made is None:                                # ranks above 0 of `accelerate launch`
                continue
            known[key] = {k: v for k, v in made["results"][name].items() if isinstance(v, (int, float))}
            with open(folder / "tasks-0.jsonl", "a") as file:
                file.write(json.dumps({"key": key, "task": name, "values": known[key]}) + "\n")
        values = known[key]
        metric = metric or next(k for k in values if "_stderr" not in k and "," in k)
        if metric not in values:
            raise ValueError(f"--tasks {name}: no metric {metric}; it has {', '.join(values)}")
        error = values.get(metric.replace(",", "_stderr,"))
        tasks[name] = {"score": 100 * values[metric], "stderr": None if error is None else 100 * error,
                       "metric": metric, "shots": shots}
        print(f"{name} ({shots} shots, {metric}): {tasks[name]['score']:.2f}", file=sys.stderr)
    if len(tasks) < len(wanted):
        return {}
    return finish(args, out, {
        "benchmark": "openllm" if args.tasks else "openllm-v1", "model": args.model, "tasks": tasks,
        "score": float(np.mean([t["score"] for t in tasks.values()])), "low": None, "high": None,
        "chat_template": args.apply_chat_template, "limit": args.limit, "lm_eval": lm_eval.__version__})


def alpaca_eval(args) -> dict:
    """AlpacaEval-2: outputs in its own format, then the alpaca_eval package annotates and computes win rates."""
    package = needs("alpaca_eval", 'alpaca_eval==0.6.6 "setuptools<81"')
    import openai
    (folder, out), questions, controlled = folders(args), read_questions(args), args.length_controlled
    if controlled and args.questions != ALPACA:             # the package joins its difficulties by the row's number
        known = [r.get("instruction") for _, r in read_rows(ALPACA, "--length-controlled")]
        if [q["turns"][0] for q in questions] != known[:len(questions)]:
            raise ValueError(f"--length-controlled: the instructions of --questions {args.questions} are not "
                             "AlpacaEval's in their order, which its length control is fitted on; "
                             "--no-length-controlled does without")
    answers, told = candidate_answers(args, folder, questions, lambda q: args.temperature)
    name = (args.model or Path(args.answers).name).rstrip("/").replace("/", "--")
    outputs = [{"instruction": q["turns"][0], "output": answers[q["id"]][0], "generator": name,
                "dataset": q["category"]} for q in questions]
    out.mkdir(parents=True, exist_ok=True)
    sft.write_json(out / "outputs.json", outputs)
    given, wanted = args.reference_outputs or args.questions, {o["instruction"] for o in outputs}
    reference = [r for _, r in read_rows(given, "--reference-outputs") if r.get("instruction") in wanted]
    same = [r["instruction"] for r in reference] == [o["instruction"] for o in outputs]
    if not same or any("output" not in r for r in reference):
        raise ValueError(f"--reference-outputs {given}: needs one output to each instruction of --questions, in order")
    os.environ["OPENAI_BASE_URL"] = args.judge_url          # the way its OpenAI client takes an endpoint
    try:
        board, annotations = package.evaluate(
            model_outputs=outputs, reference_outputs=reference, annotators_config=args.annotator, name=name,
            output_path=str(out), caching_path=str(folder / "annotations-cache.json"),
            is_return_instead_of_print=True, precomputed_leaderboard=None, is_cache_leaderboard=False,
            fn_metric="get_length_controlled_winrate" if controlled else "get_winrate",
            metric_kwargs={"save_weights_dir": None} if controlled else {},
            sort_by="length_controlled_winrate" if controlled else "win_rate",
            annotation_kwargs={"chunksize": args.concurrency, "num_procs": args.concurrency,     # a chunk is kept whole
                               "client_kwargs": {"timeout": args.timeout, "max_retries": args.retries}})
    except openai.OpenAIError as error:
        why = str(error).replace(os.environ.get("OPENAI_API_KEY") or "\0", "[key]")[:300]
        raise ValueError(f"--base-url {args.judge_url}: {type(error).__name__}: {why}; all but the last --concurrency "
                         f"{args.concurrency} annotations are on disk. Check the URL (it ends in /v1), the annotator's "
                         "model and OPENAI_API_KEY, and run the same command again") from None
    row = {k: v.item() if hasattr(v, "item") else v for k, v in board.loc[name].to_dict().items()}
    import importlib.metadata
    return finish(args, out, {
        "benchmark": "alpaca-eval-2", "model": args.model or args.answers, "judge": args.annotator,
        "parse": args.annotator, "baseline": reference[0].get("generator"), "template": args.annotator,
        "questions": len(questions), **told,
        "unparsed": sum(a.get("preference") is None or a["preference"] != a["preference"] for a in annotations),
        "score": row.get("length_controlled_winrate", row["win_rate"]), "low": None, "high": None,
        "win_rate": row["win_rate"], "length_controlled_win_rate": row.get("length_controlled_winrate"),
        "standard_error": row.get("standard_error"), "alpaca_eval": importlib.metadata.version("alpaca_eval")})


# -------------------------------------------------------------------------------------------------- main
def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    commands = p.add_subparsers(dest="command", metavar="COMMAND")

    def command(run, *groups, **defaults):
        c = commands.add_parser(run.__name__.replace("_", "-"), help=run.__doc__.splitlines()[0],
                                description=run.__doc__, allow_abbrev=False)
        c.set_defaults(run=run, **DEFAULTS.get(run.__name__.replace("_", "-"), {}), **defaults)
        for group in groups:
            group(c.add_argument)
        return c.add_argument
    data_set = dict(nargs="+", metavar="DATA", help="NAME[:split][=fraction], several")
    runs = dict(metavar="RUNS", help="folders of finished runs")

    for run, draws in ((arena_hard, 100), (mt_bench, 1000)):
        add = command(run, model_flags, sampling_flags, judge_flags)
        add("--questions", help="FILE or hf:..; None: the benchmark's Hub data")
        add("--templates", help="the benchmark's own judge templates, FILE or hf:..")
        add("--bootstrap", type=int, default=draws, help="resamples of the interval")
        if run is arena_hard:
            add("--variant", choices=list(VARIANTS), default="v0.1", help="star: the paper's, for studies")
            add("--parse", choices=["2024", "2025"], default="2024", help="2024: all labels agree; 2025: the last")
            add("--baseline", help="its name; None: the variant's")
            add("--baseline-answers", help="FILE or hf:..; None: the benchmark's Hub data")
        else:
            add("--references", default=MT_BENCH + "mt_bench/reference_answer/gpt-4.jsonl", help="FILE or hf:..")

    add = command(alpaca_eval, model_flags, sampling_flags, request_flags, dry_run=False)
    add("--questions", help="instructions, with the baseline's outputs; None: the benchmark's Hub data")
    add("--reference-outputs", help="the baseline's outputs, FILE or hf:..; None: those of --questions")
    add("--temperature", type=float, default=0.0, help="of the answers; 0: greedy")
    add("--annotator", default=ANNOTATOR, help="a config of the package, by name or folder")
    add("--length-controlled", action=argparse.BooleanOptionalAction, default=True, help="needs the Hub's data")

    add = command(openllm)
    add("model", metavar="MODEL", help="folder or Hub id")
    add("--engine", choices=["hf", "vllm"], default="hf", help="several GPUs: `accelerate launch evaluate.py openllm` "
        "(hf), --model-args tensor_parallel_size=N or data_parallel_size=N (vllm)")
    add("--tasks", nargs="+", help="NAME[:SHOTS[:METRIC]] of lm-evaluation-harness; None: the leaderboard's six")
    add("--include-path", help="a folder of further task files")
    add("--limit", type=int, help="first N examples of a task; None: all")
    add("--apply-chat-template", action="store_true", help="off on the leaderboard")
    add("--batch-size", default="auto", help="hf engine")
    add("--model-args", help="more of the harness' own, NAME=VALUE,..")
    add("--dtype", choices=["fp32", "bf16"], help="None: bf16 on GPU")
    add("--output", help="folder; None: MODEL/evaluate/openllm")

    add = command(judge, sampling_flags, judge_flags, data_flags, empty_system=0.0)
    add("runs", nargs="+", metavar="RUNS", help="folders or Hub ids; with --engine server its names, the first folder "
        "among them giving the tokenizer that counts prompts")
    add("--data", default=["demo:test"], **data_set)
    add("--temperature", type=float, default=0.0, help="of the answers; 0: greedy")
    add("--judge-template", help="llm judge: a file with {prompt}, {answer_a}, {answer_b}: [[A]], [[B]], [[C]]")
    add("--judge-tokens", type=int, default=16384, help="tokens a judge's batch, with padding")
    add("--bootstrap", type=int, default=1000, help="resamples of the interval")
    add("--output", help="folder; None: runs/evaluate/judge-RUNS")

    add = command(margins, data_flags, pair_flags)
    add("before", metavar="BEFORE", help="folder or Hub id")
    add("after", metavar="AFTER", help="folder or Hub id")
    add("--output", help="folder; None: runs/evaluate/margins-BEFORE+AFTER")
    add("--plot", help="picture; None: margins.png in the folder")
    add("--data", default=["demo-pairs:test"], **data_set)

    add = command(stages, data_flags, pair_flags)
    add("runs", nargs="*", default=STAGES, **runs)
    add("--data", default=["demo-pairs:test"], **data_set)

    add = command(curve)
    add("runs", nargs="+", **runs)
    add("--x", choices=["steps", "tokens", "flops"], default="steps", help="cumulative over runs trained further")
    add("--y", default="exact_match", help="a number of run.json's result, or an evaluation's folder, like arena-hard")
    add("--output", help="folder; None: runs/evaluate/curve")
    add("--plot", help="picture; None: curve.png in the folder")

    add = command(report)
    add("runs", nargs="+", **runs)
    add("--score", nargs="+", help="names as for curve --y; None: exact match and every evaluation there")
    add("--samples", type=int, default=8, help="answers to show")
    add("--output", help="folder; None: runs/evaluate/report")
    return p


def model_flags(add):
    add("model", nargs="?", metavar="MODEL", help="folder or Hub id; may be left out with --answers")
    add("--answers", help="the model's answers in the benchmark's own format; None: sample them")
    add("--output", help="folder; None: MODEL/evaluate/COMMAND")


def sampling_flags(add):
    add("--engine", choices=["hf", "vllm", "server"], default="hf", help="how answers are sampled")
    add("--server-url", metavar="URL", help="server engine: an OpenAI-compatible endpoint, http://HOST:PORT/v1; "
        "its key comes from SERVER_API_KEY")
    add("--served-model", help="server engine: the model's name there; None: MODEL")
    add("--batching", choices=["padded", "continuous"], help="hf engine; None: continuous on CUDA, padded on a CPU")
    add("--sampling-rows", type=int, default=64, help="hf engine: answers in work at once")
    add("--max-new-tokens", type=int, help="an answer's limit; None: the benchmark's")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that hold this much; 1: all")
    add("--chat-template", default="tokenizer", help="chatml, tokenizer (its own) or a jinja file")
    add("--dtype", choices=["fp32", "bf16"], help="None: bf16 on GPU")
    add("--seed", type=int, default=42, help="of sampled answers and resamples")
    add("--limit", type=int, help="first N questions or prompts; None: all")


def request_flags(add):
    add("--base-url", "--judge-url", dest="judge_url", metavar="URL", help="the judge: an OpenAI-compatible endpoint; "
        "its key comes from OPENAI_API_KEY")
    add("--concurrency", type=int, default=16, help="requests at once")
    add("--timeout", type=float, default=600, help="seconds a request may stay silent")
    add("--retries", type=int, default=6, help="further tries of a request, each after twice the wait")


def judge_flags(add):
    request_flags(add)
    add("--judge", help="the judge's model name, None: the benchmark's; for `judge` pairrm[:MODEL], reward:MODEL, "
        "llm:MODEL or python:FILE:FUNCTION")
    add("--judge-temperature", type=float, default=0.0, help="of verdicts")
    add("--judge-max-tokens", type=int, help="a verdict's limit; None: the benchmark's")
    add("--dry-run", action="store_true", help="print calls, tokens and cost; send and sample nothing")
    add("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="the judge's price a million tokens in and out")


def data_flags(add):
    add("--max-length", type=int, default=2048, help="tokens a row; longer ones are cut and counted")
    add("--bad-rows", choices=["refuse", "stop"], default="refuse", help="count them, or stop at the first")
    add("--num-proc", type=int, help="processes that prepare data; None: all cores")
    add("--cache-dir", help="prepared data and log-probs; None: ~/.cache/lions")


def pair_flags(add):
    add("--max-prompt-length", type=int, default=512, help="prompt tokens that stay when a pair is too long")
    add("--micro-tokens", type=int, help="tokens a batch on a GPU; None: --max-length")
    add("--dtype", choices=["fp32", "bf16"], help="None: bf16 on GPU")
    add("--chat-template", default="tokenizer", help="chatml, tokenizer (its own) or a jinja file")


DEFAULTS = {"arena-hard": dict(questions=ARENA + "question.jsonl", max_new_tokens=4096, judge_max_tokens=4096),
            "mt-bench": dict(questions=MT_BENCH + "mt_bench/question.jsonl", templates=MT_BENCH + "judge_prompts.jsonl",
                             max_new_tokens=1024, judge_max_tokens=2048, judge="gpt-4"),
            "alpaca-eval": dict(questions=ALPACA, max_new_tokens=2048),
            "judge": dict(max_new_tokens=2048, judge_max_tokens=2048, judge="pairrm")}


def check_flags(args) -> list[str]:
    have, say = lambda f: getattr(args, f, None), lambda f: f"--{f.replace('_', '-')} {getattr(args, f)}"
    why = [f"{say(f)}: must be above 0" for f in (
        "limit", "max_new_tokens", "sampling_rows", "judge_max_tokens", "judge_tokens", "concurrency", "timeout",
        "bootstrap", "max_length", "max_prompt_length", "micro_tokens", "num_proc")
        if have(f) is not None and not have(f) > 0]
    why += [f"{say(f)}: must not be below 0" for f in ("retries", "judge_temperature", "temperature", "samples")
            if have(f) is not None and have(f) < 0]
    if have("top_p") is not None and not 0 < args.top_p <= 1:
        why.append(f"{say('top_p')}: must lie in (0, 1]")
    if have("price") and min(args.price) < 0:
        why.append(f"--price {args.price[0]:g} {args.price[1]:g}: must not be below 0")
    if hasattr(args, "answers") and not args.model and not args.answers:
        why.append("MODEL: needed, a folder or Hub id; or --answers FILE, its answers")
    if have("engine") == "server" and not args.server_url and not have("answers"):
        why.append("--engine server: needs --server-url, an endpoint like http://localhost:8000/v1")
    if args.command not in ("stages", "curve", "report") and have("engine") != "server" and not have("answers"):
        models = have("runs") or [m for f in ("model", "before", "after") if (m := have(f))]
        why += [f"{m}: no such folder" for m in models if m.startswith((".", "/", "runs/")) and not Path(m).is_dir()]
    kind, _, name = (have("judge") or "").partition(":")
    if args.command == "judge":
        if kind not in ("pairrm", "reward", "llm", "python") or (kind != "pairrm" and not name):
            why.append(f"--judge {args.judge}: not pairrm[:MODEL], reward:MODEL, llm:MODEL or python:FILE:FUNCTION")
        if kind == "llm" and not args.judge_template:
            why.append(f"--judge-template: --judge {args.judge} needs one, with {{prompt}}, {{answer_a}}, {{answer_b}}")
        if kind != "llm" and args.dry_run:
            why.append(f"--dry-run: --judge {args.judge} costs nothing; it is for llm judges")
        if args.engine == "server" and args.served_model:
            why.append(f"--served-model {args.served_model}: RUNS would all be that one model; leave it out, RUNS are "
                       "the server's names")
    if hasattr(args, "judge_url") and not (args.judge_url or args.dry_run or args.command == "judge" and kind != "llm"):
        why.append("--base-url: needed, the judge's endpoint (https://api.openai.com/v1); " +
                   "--dry-run counts without one" * hasattr(args, "price"))
    for flag, url in (("--base-url", have("judge_url")), ("--server-url", have("server_url"))):
        parts = urllib.parse.urlsplit(url or "http://x")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            why.append(f"{flag} {url}: not an http(s) URL")
        elif parts.username or parts.password or parts.query:
            why.append(f"{flag}: must hold no user, password or query, which would be written to disk; a key goes into "
                       + ("OPENAI_API_KEY" if flag == "--base-url" else "SERVER_API_KEY"))
    if args.command in ("arena-hard", "mt-bench", "alpaca-eval", "judge") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        why.append(f"{args.command} runs in one process; for several GPUs serve the model and use --engine server")
    if args.command == "arena-hard" and not args.templates:
        why.append("--templates: needed, Arena-Hard's judge_config.yaml (github.com/lmarena/arena-hard-auto, config/); "
                   "it is not on the Hub")
    return why


def main(argv=None) -> dict:
    args = parser().parse_args((sys.argv[1:] if argv is None else list(argv)) or ["stages"])
    if not args.command:
        raise ValueError("COMMAND: needed; python evaluate.py --help lists them")
    if hasattr(args, "dtype"):
        args.dtype = args.dtype or ("bf16" if torch.cuda.is_available() else "fp32")
    run = args.__dict__.pop("run")
    if why := check_flags(args):
        raise ValueError("\n".join(why))
    first = hasattr(args, "limit") and os.environ.get("RANK", "0") == "0"       # those that sample, judge, score
    with alone(folders(args)[0]) if first else contextlib.nullcontext():
        return run(args)


if __name__ == "__main__":
    sft.run_main(main)
