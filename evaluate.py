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


# ------------------------------------------------------------------------------- files of the benchmarks
def fetch(name: str, flag: str) -> Path:
    """A file here, or hf:OWNER/NAME/PATH of a Hub data set (hf:spaces/OWNER/NAME/PATH of a Space)."""
    if not name.startswith("hf:"):
        if not Path(name).is_file():
            raise ValueError(f"{flag} {name}: no such file; name a file here or hf:OWNER/NAME/PATH of a Hub data set")
        return Path(name)
    from huggingface_hub import hf_hub_download
    kind, rest = ("space", name[10:]) if name.startswith("hf:spaces/") else ("dataset", name[3:])
    owner, repo, path = rest.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{repo}", path, repo_type=kind))
    except Exception as error:                              # offline, gated, moved: many kinds, one way out
        raise ValueError(f"{flag} {name}: not to be had from the Hub ({type(error).__name__}: {str(error)[:200]}); download "
                         f"it elsewhere and name the file with {flag}") from error


def read_rows(name: str, flag: str) -> list[tuple[str, dict]]:
    """(file:line, row) of a .jsonl, .jsonl.gz, .json (one list) or .yaml (one object) file."""
    path = fetch(name, flag)
    if path.suffix in (".yaml", ".yml"):
        import yaml
        return [(str(path), yaml.safe_load(path.read_text()))]
    if path.suffix == ".json":
        made = json.loads(path.read_text())
        return [(f"{path}[{i}]", r) for i, r in enumerate(made if isinstance(made, list) else [made])]
    return [(f"{path}:{n}", r) for n, r in data.read_lines(str(path))]


def read_questions(args) -> list[dict]:
    """{"id", "turns": texts, "category"} of Arena-Hard's (uid, prompt), MT-Bench's (question_id, turns) or AlpacaEval's
    (instruction) files, the first --limit of them."""
    out = {}
    for where, r in read_rows(args.questions, "--questions"):
        turns = r.get("turns") or [r[k] for k in ("prompt", "instruction") if isinstance(r.get(k), str)]
        turns = [t["content"] if isinstance(t, dict) else t for t in turns]
        name = str(r.get("uid", r.get("question_id", r.get("id", r.get("instruction")))))
        if not turns or name == "None" or name in out:
            raise ValueError(f"--questions {where}: " + (f"question {name} is there twice" if name in out else "no uid or question_id "
                             f"with prompt, turns or instruction; its keys are {sorted(r)}"))
        out[name] = {"id": name, "turns": turns, "category": r.get("category", r.get("dataset", ""))}
    return list(out.values())[:args.limit]


def read_answers(name: str, flag: str, questions: list[dict]) -> dict[str, list[str]]:
    """Texts of an answer file in Arena-Hard's form (uid, messages), FastChat's (question_id, choices) or AlpacaEval's
    (instruction, output): id -> one text a turn, for every question. Raises where one is missing, there twice or "$ERROR$"."""
    found, wanted = {}, {q["id"]: len(q["turns"]) for q in questions}
    for where, r in read_rows(name, flag):
        key = str(r.get("uid", r.get("question_id", r.get("instruction"))))
        if "messages" in r:
            texts = [m["content"] for m in r["messages"] if m["role"] == "assistant"]
            texts = [t["answer"] if isinstance(t, dict) else t for t in texts]
        elif "choices" in r:
            texts = [t["content"] if isinstance(t, dict) else t for t in r["choices"][0]["turns"]]
        else:
            texts = [r.get("output")]
        if key not in wanted:
            continue
        wrong = "is there twice" if key in found else "holds no text" if not all(isinstance(t, str) for t in texts) else \
            f"has {len(texts)} turns, not {wanted[key]}" if len(texts) != wanted[key] else \
            "is the mark of a failed request, $ERROR$" if "$ERROR$" in texts else ""
        if wrong:
            raise ValueError(f"{flag} {where}: the answer to question {key} {wrong}; make that answer again")
        found[key] = texts
    missing = [k for k in wanted if k not in found]
    if missing:
        raise ValueError(f"{flag} {name}: no answer to {len(missing)} of {len(wanted)} questions (first: {missing[0]})")
    return found


def fill(template: str, values: dict, where: str) -> str:
    """{name} -> values[name] in one pass: braces in a value stay text."""
    unknown = set(re.findall(r"\{(\w+)\}", template)) - set(values)
    if unknown:
        raise ValueError(f"--templates {where}: placeholders {', '.join(sorted(unknown))} are unknown; there are "
                         f"{', '.join(sorted(values))}")
    return re.sub(r"\{(\w+)\}", lambda m: values[m[1]], template)


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


# ----------------------------------------------------------------------------------- answers and verdicts
def model_key(args) -> str:
    """What tells a model from another: its weights, or its name where a server holds them."""
    if args.engine == "server":
        return f"{args.served_model or args.model}"
    return dpo.weights_hash(args.model)


def sample_answers(args, folder: Path, asked: list[dict]) -> list[str] | None:
    """Texts for {"messages", "temperature"}, each by one call of the engine, from answers-0.jsonl where they are there; None
    where --dry-run would have to sample."""
    from tqdm import tqdm
    tokenizer = template = None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.engine != "server":
        from transformers import AutoConfig
        tokenizer, template = sft.load_tokenizer(args)
        context = getattr(AutoConfig.from_pretrained(args.model).get_text_config(), "max_position_embeddings", None) or math.inf
        sizes = [len(sft.prompt_ids(tokenizer, a["messages"])) for a in asked]
        if max(sizes) + args.max_new_tokens > context:
            raise ValueError(f"--max-new-tokens {args.max_new_tokens}: with it {sum(s + args.max_new_tokens > context for s in sizes)} "
                             f"of {len(sizes)} prompts (longest {max(sizes)} tokens) exceed {args.model}'s context of {context}; lower it")
    decides = [model_key(args), args.engine, tokenizer and tokenizer.chat_template, args.max_new_tokens, args.top_p, args.seed, args.dtype]
    keys = [digest([*decides, a["messages"], a["temperature"]]) for a in asked]
    folder.mkdir(parents=True, exist_ok=True)
    online_dpo.cut_torn_lines(folder, "answers-*.jsonl")
    known = {r["key"]: r["text"] for r in online_dpo.read_growing(folder, "answers-*.jsonl")}
    if args.dry_run and not all(k in known for k in keys):
        return None
    bar = tqdm(total=len(asked), initial=sum(k in known for k in keys), unit="answer", desc="answers", dynamic_ncols=True)
    with open(folder / "answers-0.jsonl", "a") as file:
        for t in sorted({a["temperature"] for a in asked}):
            rows = list({k: {"key": k, "prompt": a["messages"]} for k, a in zip(keys, asked)
                         if a["temperature"] == t and k not in known}.values())
            settings = dpo.argparse_with(args, temperature=t, samples=1, base_url=args.server_url)
            for a in online_dpo.answers_of(settings, args.model, tokenizer, rows, frozenset(), device, 0, "--server-url") if rows else ():
                key = rows[a.prompt]["key"]
                file.write(json.dumps({"key": key, "text": a.text, "tokens": len(a.ids), "finished": a.finished}) + "\n")
                file.flush()
                known[key] = a.text
                bar.update()
    bar.close()
    return [known[k] for k in keys]


def candidate_answers(args, folder: Path, questions: list[dict], temperature=lambda q: 0.0) -> dict[str, list[str]] | None:
    """--answers, or the model's own, turn after turn: id -> texts. None where --dry-run would have to sample them."""
    if args.answers:
        return read_answers(args.answers, "--answers", questions)
    said = {q["id"]: [] for q in questions}
    for turn in range(max(len(q["turns"]) for q in questions)):
        now = [q for q in questions if turn < len(q["turns"])]
        asked = [{"temperature": temperature(q), "messages": [
            m for i in range(turn + 1) for m in data.ask(q["turns"][i], (said[q["id"]] + [""])[i])][:-1]} for q in now]
        if (made := sample_answers(args, folder, asked)) is None:
            return None
        for q, text in zip(now, made):
            said[q["id"]].append(text)
    return said


def ask_judge(args, folder: Path, calls: list[dict], parse, follow_up: str | None = None) -> tuple[dict, dict]:
    """calls {"id", "messages"} -> {id: parse(the judge's own text) or None}, and counts.

    Every reply is appended to verdicts-0.jsonl under a hash of id, judge, messages, temperature and limit, and never asked
    for again; what is parsed is the reply, so another parse variant costs nothing. follow_up: one more user turn where the
    first reply holds no label at all; both texts are parsed together. A request that failed for good is recorded
    without a reply: unparsed now, asked again by the next run. Refused keys and names (401, 403, 404) and 20 failures in a
    row of a server that is busy, broken or silent stop the run."""
    import fcntl
    from tqdm import tqdm
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "verdicts-0.jsonl", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)    # two processes would pay twice
    except BlockingIOError:
        raise ValueError(f"--output {folder}: another process is judging into this folder; wait for it or name another") from None
    online_dpo.cut_torn_lines(folder, "verdicts-*.jsonl")
    known = {r["key"]: r["reply"] for r in online_dpo.read_growing(folder, "verdicts-*.jsonl") if r["reply"] is not None}
    settings = {"model": args.judge, "temperature": args.judge_temperature, "max_tokens": args.judge_max_tokens}
    key_of = lambda name, messages: digest([name, settings, messages])
    todo = [c for c in calls if c.get("extra") or key_of(c["id"], c["messages"]) not in known]     # extra: answer to come
    if args.dry_run:
        return {}, dry_run(args, calls, todo, follow_up)
    lock, failing, counts = threading.Lock(), [0], {"asked": 0, "failed": 0, "judge_tokens": 0}

    def ask(call):
        messages, said = list(call["messages"]), []
        for last in ([False, True] if follow_up else [True]):
            key, error, status, tokens = key_of(call["id"], messages), None, None, 0
            reply = known.get(key)
            if reply is None:
                try:
                    reply, _, tokens = online_dpo.chat(args.judge_url, {**settings, "messages": messages}, args, "--base-url")
                except online_dpo.ChatError as e:
                    if e.status in (401, 403, 404):
                        raise
                    error, status = str(e), e.status
                with lock:
                    file.write(json.dumps({"key": key, "id": call["id"], "judge": args.judge, "url": args.judge_url, "reply": reply,
                                           "error": error, "tokens": tokens, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}) + "\n")
                    file.flush()
                    counts["asked"] += reply is not None
                    counts["failed"] += reply is None
                    counts["judge_tokens"] += tokens
                    failing[0] = 0 if reply is not None else failing[0] + (status is None or status >= 429)
                    if failing[0] >= 20:
                        raise ValueError(f"20 requests in a row failed; stopped, nothing is lost. The last: {error}")
            if reply is None:
                return None                                 # a game is judged by whole replies or not at all
            said.append(reply)
            if last or re.search(r"\[\[[AB<>=]+\]\]", reply):
                break
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": follow_up}]
        return parse("\n".join(said))
    verdicts = {}
    bar = tqdm(total=len(calls), unit="verdict", desc=f"judge {args.judge}", dynamic_ncols=True)
    with file:
        for call, verdict in online_dpo.in_parallel(ask, calls, args.concurrency):
            verdicts[call["id"]] = verdict
            bar.update()
    bar.close()
    counts |= {"calls": len(calls), "unparsed": sum(v is None for v in verdicts.values())}
    if counts["unparsed"]:
        print(f"{counts['unparsed']} of {len(calls)} verdicts are unparsed ({counts['failed']} of them failed requests, which the same "
              "command asks again); they count as neither win nor loss", file=sys.stderr)
    return verdicts, counts


def dry_run(args, calls, todo, follow_up) -> dict:
    """Calls, tokens and cost of what is not on disk yet. Tokens in: bytes / 4, an estimate; out: at most the limit."""
    tokens_in = sum(len(m["content"].encode()) for c in todo for m in c["messages"]) // 4 + sum(c.get("extra", 0) for c in todo)
    tokens_out, cost = len(todo) * args.judge_max_tokens, None
    if args.price:
        cost = (tokens_in * args.price[0] + tokens_out * args.price[1]) / 1e6
    told = {"dry_run": True, "calls": len(todo), "on_disk": len(calls) - len(todo), "tokens_in": tokens_in,
            "tokens_out_at_most": tokens_out, "cost_at_most": cost}
    print(f"dry run: {len(todo)} calls of {args.judge} ({told['on_disk']} on disk), about {tokens_in:,} tokens in (bytes / 4), at most "
          f"{tokens_out:,} out" + (f", at most {cost:.2f} at {args.price[0]:g} / {args.price[1]:g} a million" if args.price else
                                   "; --price IN OUT gives the cost") +
          ("; a reply without a verdict costs one call more" if follow_up else ""), file=sys.stderr)
    return told


def finish(args, folder: Path, result: dict) -> dict:
    """result.json: the score with all that decides it."""
    import transformers
    result = {"command": args.command, **result, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "git": sft.git_commit(),
              "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__,
                           "numpy": np.__version__}, "flags": vars(args), "output": str(folder)}
    folder.mkdir(parents=True, exist_ok=True)
    sft.write_json(folder / "result.json", result)
    return result


def output_folder(args, name: str) -> Path:
    """--output, else MODEL/evaluate/NAME for a folder, runs/evaluate/MODEL/NAME for any other name."""
    model = args.model or Path(args.answers).name.split(".jsonl")[0]
    local = Path(model) / "evaluate" if Path(model).is_dir() else Path("runs/evaluate") / model.replace("/", "--")
    return Path(args.output) if args.output else local / name


# --------------------------------------------------------------------------------------- the benchmarks
def arena_hard(args) -> dict:
    """Arena-Hard-Auto v0.1, or the paper's Arena-Hard-Auto*: two swapped games a question against the baseline."""
    chosen = VARIANTS[args.variant]
    args.judge, args.baseline = args.judge or chosen["judge"], args.baseline or chosen["baseline"]
    folder = output_folder(args, "arena-hard" if args.variant == "v0.1" else f"arena-hard-{args.variant}")
    questions = read_questions(args)
    where, template = read_rows(args.templates, "--templates")[0]
    texts = template.get("prompt_template") if isinstance(template, dict) else None
    texts = [texts] if isinstance(texts, str) else texts
    if not texts or len(texts) != 1 or not isinstance(template.get("system_prompt"), str):
        raise ValueError(f"--templates {where}: needs system_prompt and one prompt_template, as in Arena-Hard's judge_config.yaml")
    baseline = read_answers(args.baseline_answers or f"{ARENA}model_answer/{args.baseline}.jsonl", "--baseline-answers", questions)
    answers = candidate_answers(args, folder, questions)
    calls = []
    for q in questions:
        for game in (1, 2):                                 # 1: A is the baseline; 2: A is the candidate
            (mine,), (theirs,) = answers[q["id"]] if answers else [""], baseline[q["id"]]
            a, b = (theirs, mine) if game == 1 else (mine, theirs)
            values = dict.fromkeys(("question_1", "question", "prompt", "QUESTION"), q["turns"][0])
            values |= dict.fromkeys(("answer_1", "answer_a", "ANSWER_A"), a) | dict.fromkeys(("answer_2", "answer_b", "ANSWER_B"), b)
            calls.append({"id": f"{q['id']}/{game}", "extra": 0 if answers else args.max_new_tokens, "messages": [
                {"role": "system", "content": template["system_prompt"]},
                {"role": "user", "content": fill(texts[0], values, where)}]})
    verdicts, counts = ask_judge(args, folder, calls, lambda text: arena_verdict(text, args.parse),
                                 FINISH if args.parse == "2024" else None)
    if args.dry_run:
        return counts
    battles = arena_battles([(verdicts[c["id"]], int(c["id"][-1])) for c in calls])
    score, (low, high) = win_rate(battles), bootstrap(battles, args.bootstrap, args.seed)
    percent = lambda v: None if v is None else 100 * v
    sft.write_rows(folder / "games.jsonl", [{"id": c["id"], "verdict": verdicts[c["id"]]} for c in calls])
    print(f"Arena-Hard ({args.variant}): {percent(score) if score is not None else math.nan:.1f} "
          f"({percent(low) or 0:.1f} .. {percent(high) or 0:.1f}), {len(battles)} battles", file=sys.stderr)
    return finish(args, folder, {
        "benchmark": "arena-hard-auto-v0.1" + ("*" if args.variant == "star" else ""), "model": args.model or args.answers,
        "judge": args.judge, "baseline": args.baseline, "parse": args.parse, "temperature": args.judge_temperature,
        "template": digest([template["system_prompt"], texts[0]]), "score": percent(score), "low": percent(low), "high": percent(high),
        "battles": len(battles), "questions": len(questions), "empty_answers": sum(not a.strip() for x in answers.values() for a in x),
        **counts})


def mt_bench(args) -> dict:
    """MT-Bench: two turns, each graded alone on 1 to 10, against a reference where --references has one."""
    folder, questions = output_folder(args, "mt-bench"), read_questions(args)
    templates = {r["name"]: r for _, r in read_rows(args.templates, "--templates") if "name" in r}
    missing = [n for n in ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn") if n not in templates]
    if missing:
        raise ValueError(f"--templates {args.templates}: no template {', '.join(missing)}; MT-Bench's judge_prompts.jsonl has them")
    with_reference = {str(r.get("question_id")) for _, r in read_rows(args.references, "--references")}
    references = read_answers(args.references, "--references", [q for q in questions if q["id"] in with_reference])
    answers = candidate_answers(args, folder, questions, lambda q: MT_TEMPERATURE.get(q["category"], 0.7))
    calls = []
    for q in questions:
        for turn in range(len(q["turns"])):
            said, right = answers[q["id"]] if answers else [""] * len(q["turns"]), references.get(q["id"])
            t = templates[f"single{'-math' * (right is not None)}-v1{'-multi-turn' * (turn > 0)}"]
            values = {"question": q["turns"][0], "answer": said[0]}
            for i in range(turn + 1):
                values |= {f"question_{i + 1}": q["turns"][i], f"answer_{i + 1}": said[i]} | (
                    {f"ref_answer_{i + 1}": right[i]} if right else {})
            calls.append({"id": f"{q['id']}/{turn + 1}", "extra": 0 if answers else (turn + 1) * args.max_new_tokens, "messages": [
                {"role": "system", "content": t["system_prompt"]},
                {"role": "user", "content": fill(t["prompt_template"], values, args.templates)}]})
    ratings, counts = ask_judge(args, folder, calls, mt_rating)
    if args.dry_run:
        return counts
    mean = lambda keep: (lambda r: float(np.mean(r)) if r else None)([r for r in map(ratings.get, keep) if r is not None])
    ids = {q["id"]: [f"{q['id']}/{t + 1}" for t in range(len(q["turns"]))] for q in questions}
    by_category = {c: mean([i for q in questions if q["category"] == c for i in ids[q["id"]]])
                   for c in dict.fromkeys(q["category"] for q in questions)}
    turns = {f"turn {t + 1}": mean([x[t] for x in ids.values() if t < len(x)]) for t in range(max(map(len, ids.values())))}
    low, high = bootstrap([m for m in map(mean, ids.values()) if m is not None], args.bootstrap, args.seed)
    sft.write_rows(folder / "ratings.jsonl", [{"id": i, "rating": r} for i, r in ratings.items()])
    plot_bars(folder / "mt-bench.png", {**by_category, **turns, "overall": mean(ratings)}, "MT-Bench rating (1 to 10)", 10)
    used = sorted({n for n in templates if n.startswith("single")})
    return finish(args, folder, {
        "benchmark": "mt-bench", "model": args.model or args.answers, "judge": args.judge, "baseline": None, "parse": "mt-bench",
        "temperature": args.judge_temperature, "template": digest([[templates[n]["system_prompt"], templates[n]["prompt_template"]]
                                                                   for n in used]),
        "score": mean(ratings), "low": low, "high": high, "categories": by_category, "turns": turns, "questions": len(questions),
        "with_reference": len(references), "out_of_scale": sum(r is not None and not 1 <= r <= 10 for r in ratings.values()),
        "empty_answers": sum(not a.strip() for x in answers.values() for a in x), **counts})


def plot_bars(path: Path, values: dict[str, float | None], label: str, top: float | None = None) -> None:
    figure, ax = new_figure()
    names = list(values)
    bars = ax.bar(names, [values[n] or 0 for n in names], color="#4477aa")
    ax.bar_label(bars, ["-" if values[n] is None else f"{values[n]:.2f}" for n in names], fontsize=9)
    ax.set(ylabel=label, ylim=(0, top))
    ax.tick_params(axis="x", rotation=30)
    save_figure(figure, path)


def new_figure(**size):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(**{"figsize": (8, 5), "constrained_layout": True, **size})


def save_figure(figure, path: Path) -> None:
    import matplotlib.pyplot as plt
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------- models against models
def judge(args) -> dict:
    """Win rates of every run against every other on --data's prompts by any judge of online_dpo.py, in both orders."""
    names = [name_of(r) for r in args.runs]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"RUNS {' '.join(args.runs)}: two or more different ones are needed")
    folder, kind = Path(args.output or "runs/evaluate/judge"), args.judge.partition(":")[0]
    rank, _, device = sft.init_distributed()
    first = dpo.argparse_with(args, model=args.runs[0])
    tokenizer, template = sft.load_tokenizer(first)
    rows, data_key = online_dpo.read_prompts(first, tokenizer, template, rank, lambda *a: print(*a, file=sys.stderr))
    rows = rows[:args.limit]
    said = {n: sample_answers(dpo.argparse_with(args, model=run), folder / n, [
        {"messages": r["prompt"], "temperature": args.temperature} for r in rows]) for n, run in zip(names, args.runs)}
    said = None if None in said.values() else said          # --dry-run before there are answers
    duels = [(a, b) for i, a in enumerate(names) for b in names[i + 1:]]
    outcomes, counts = {}, {}
    if kind == "llm":
        llm = dpo.argparse_with(args, judge=args.judge.partition(":")[2])
        calls, text = [], fetch(args.judge_template, "--judge-template").read_text()
        for a, b in duels:
            for n, r in enumerate(rows):
                for one, two in ((a, b), (b, a)):
                    if said is None or said[a][n].strip() != said[b][n].strip():
                        values = {"prompt": online_dpo.as_text(r["prompt"]), "answer_a": said[one][n] if said else "",
                                  "answer_b": said[two][n] if said else ""}
                        calls.append({"id": f"{one} {two} {r['key']}", "extra": 0 if said else 2 * args.max_new_tokens,
                                      "messages": [{"role": "user", "content": fill(text, values, args.judge_template)}]})

        def parse(reply):
            found = re.findall(r"\[\[(A>>B|A>B|A=B|B>A|B>>A|A|B|C)\]\]", reply)
            return online_dpo.VERDICTS[found[-1]] if found else None
        verdicts, counts = ask_judge(llm, folder, calls, parse)
        if args.dry_run:
            return counts
    else:
        scorer = online_dpo.load_judge(dpo.argparse_with(args, samples=2), device)
        counts = {"unparsed": 0}
    for a, b in duels:
        wins = []                                           # of b over a, a prompt: mean over both orders
        differ = [n for n in range(len(rows)) if said[a][n].strip() != said[b][n].strip()]
        if kind == "llm":
            for n, r in enumerate(rows):
                seen = [v if one == b else -v for one, two in ((a, b), (b, a))
                        if (v := verdicts.get(f"{one} {two} {r['key']}", 0.0 if n not in differ else None)) is not None]
                wins += [(1 + sum(seen) / len(seen)) / 2] if seen else []
        else:
            gap = np.zeros(len(rows))
            for one, two in ((a, b), (b, a)) if kind == "python" else ((a, b),):       # PairRM looks at both orders itself
                made = online_dpo.score_responses(scorer, [rows[n] | {"answers": [{"text": said[x][n]} for x in (one, two)]}
                                                           for n in differ], args.judge) if differ else []
                for n, s in zip(differ, made):
                    gap[n] += np.sign(s[1] - s[0]) * (1 if one == a else -1)
            wins = ((1 + np.sign(gap)) / 2).tolist()
        low, high = bootstrap(wins, args.bootstrap, 0)
        outcomes[f"{b} over {a}"] = {"win_rate": win_rate(wins), "low": low, "high": high, "prompts": len(wins), "equal": len(rows) - len(differ)}
        print(f"{b} over {a}: {100 * (win_rate(wins) or 0):.1f}% ({100 * (low or 0):.1f} .. {100 * (high or 0):.1f}) of {len(wins)} prompts, "
              f"{len(rows) - len(differ)} equal answers", file=sys.stderr)
    template_hash = digest(Path(args.judge_template).read_text()) if kind == "llm" else None
    return finish(args, folder, {"models": args.runs, "judge": args.judge, "baseline": None, "parse": "last [[..]]", "template": template_hash,
                                 "temperature": args.temperature, "data": data_key, "win_rates": outcomes, **counts})


def name_of(folder: str) -> str:
    return folder.rstrip("/").replace("/", "--").removeprefix("runs--")


# --------------------------------------------------------------------------------------------- margins
def pair_margins(args, names: list[str]) -> tuple[list[np.ndarray], str]:
    """m = log pi(y_w|x) - log pi(y_l|x), nats, of --data's pairs under each model, (P,) float64 each; and the data's key.
    Through dpo.py's shared unpadded forward and its cache; a model with other tokens gets the same messages in its own."""
    rank, world, device = sft.init_distributed()
    log = lambda *a: print(*a, file=sys.stderr, flush=True) if rank == 0 else None
    args = dpo.argparse_with(args, micro_tokens=args.micro_tokens or args.max_length, gradient_checkpointing=False, empty_system=0.0,
                             seed=42, model=names[0], ref=None)
    tokenizer, template = sft.load_tokenizer(args)
    rows, key = sft.prepare_rows(args.data, args=args, tokenizer=tokenizer, template=template, rank=rank, pairs=True,
                                 max_prompt_length=args.max_prompt_length, min_gap=None)
    out = []
    for name in names:
        own, own_template = sft.load_tokenizer(dpo.argparse_with(args, model=name))
        same = own.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str() and own.chat_template == tokenizer.chat_template
        pairs = dpo.Pairs(rows if same else dpo.other_tokens(rows, dpo.argparse_with(args, ref=name), own, own_template), share=True)
        dpo.reference_logps(args, name, dpo.weights_hash(name), pairs, own, own.convert_tokens_to_ids(list(own_template.new_tokens)),
                            rank, world, device, log)
        out.append(pairs.ref[:, 0].astype(np.float64) - pairs.ref[:, 1])
    return out, key


def margin_summary(before, after, bins: int = 10) -> dict:
    """What training did to held-out margins (LIONs' analysis figure): means, accuracy = share m > 0, flips, the change
    after - before over before as a degree-2 fit and as means of equally full bins with their standard errors.
    before (-1, 1), after (1, 2): accuracy 0.5 -> 1, one flip to right, none to wrong."""
    before, after = np.asarray(before), np.asarray(after)
    change, order = after - before, np.argsort(before, kind="stable")
    parts = [p for p in np.array_split(order, bins) if len(p)]
    fit = quadratic_fit(before, change) if len(set(before.tolist())) > 2 else None
    return {"pairs": len(before), "margin_before": float(before.mean()), "margin_after": float(after.mean()),
            "accuracy_before": float((before > 0).mean()), "accuracy_after": float((after > 0).mean()),
            "to_right": int(((before <= 0) & (after > 0)).sum()), "to_wrong": int(((before > 0) & (after <= 0)).sum()), "fit": fit,
            "bins": [{"before": float(before[p].mean()), "change": float(change[p].mean()), "pairs": len(p),
                      "stderr": float(change[p].std(ddof=1) / math.sqrt(len(p))) if len(p) > 1 else None} for p in parts]}


def margins(args) -> dict:
    """Log-prob margins of held-out pairs before and after training: scatter, binned means, degree-2 fit, flips."""
    (before, after), key = pair_margins(args, [args.before, args.after])
    if torch.distributed.get_rank():
        return {}
    folder = Path(args.output or "runs/evaluate/margins")
    result = margin_summary(before, after)
    folder.mkdir(parents=True, exist_ok=True)
    sft.write_rows(folder / "margins.jsonl", [{"before": float(b), "after": float(a)} for b, a in zip(before, after)])
    plot = Path(args.plot or folder / "margins.png")
    figure, ax = new_figure()
    ax.axhline(0, color="0.7", lw=1)
    ax.axvline(0, color="0.7", lw=1)
    ax.plot(before, after - before, ".", ms=4, alpha=0.35, color="#4477aa", label=f"{len(before)} held-out pairs")
    x = [b["before"] for b in result["bins"]]
    ax.errorbar(x, [b["change"] for b in result["bins"]], [b["stderr"] or 0 for b in result["bins"]], fmt="o", color="#222222", ms=5,
                label="means of bins, one standard error")
    if result["fit"]:
        c, grid = result["fit"]["coefficients"], np.linspace(before.min(), before.max(), 200)
        ax.plot(grid, c[0] + c[1] * grid + c[2] * grid ** 2, ":", color="#cc3311", lw=2, label=f"{c[0]:.3g} {c[1]:+.3g} m {c[2]:+.3g} m²")
    ax.set(xlabel=f"margin before, log π(y_w|x) − log π(y_l|x) (nats): {args.before}", ylabel=f"change of margin (nats): {args.after}",
           title=f"accuracy {result['accuracy_before']:.3f} → {result['accuracy_after']:.3f}; {result['to_right']} pairs to right, "
                 f"{result['to_wrong']} to wrong")
    ax.legend()
    save_figure(figure, plot)
    return finish(args, folder, {"before": args.before, "after": args.after, "data": key, **result, "plot": str(plot)})


# ------------------------------------------------------------------------------------------ runs in a row
def read_run(folder: str) -> dict:
    """run.json of a finished run, with "name", "folder" (of the last iteration's model for online_dpo.py) and "right":
    correctness by prompt from samples.jsonl."""
    path = Path(folder) / "run.json"
    run = json.loads(path.read_text()) if path.is_file() else {}
    if not run.get("result"):
        raise ValueError(f"RUNS {folder}: no finished run there (run.json with a result)" + (
            f"; run python {Path(folder).name.replace('-', '_')}.py first" if folder in STAGES else ""))
    last = Path(folder) / Path(run["result"].get("output", folder)).name
    last = last if run["stage"] == "online-dpo" and last.is_dir() else Path(folder)
    samples = last / "samples.jsonl"
    rows = [json.loads(x) for x in samples.read_text().splitlines()] if samples.is_file() else []
    return run | {"name": name_of(folder), "folder": last, "samples": rows,
                  "right": {json.dumps(r["prompt"]): float(r["correct"]) for r in rows}}


def score_of(run: dict, name: str, flag: str) -> dict:
    """{"score", "low", "high"} of a run: evaluate/NAME/result.json beside its model, or NAME in run.json's result."""
    path = run["folder"] / "evaluate" / name / "result.json"
    if path.is_file():
        made = json.loads(path.read_text())
        return {k: made.get(k) for k in ("score", "low", "high")}
    value = run["result"].get(name)
    if not isinstance(value, (int, float)):
        there = sorted([k for k, v in run["result"].items() if isinstance(v, (int, float))] +
                       [p.parent.name for p in run["folder"].glob("evaluate/*/result.json")])
        raise ValueError(f"{flag} {name}: {run['name']} has no such score; it has {', '.join(there)}")
    low, high = bootstrap(list(run["right"].values())) if name == "exact_match" else (None, None)
    return {"score": value, "low": low, "high": high}


def size_of(run: dict) -> int:
    return run["result"].get("pairs") or run.get("rows")


def stages(args) -> dict:
    """The demo's stages, or RUNS: exact match, win rate against the stage before, margins on held-out pairs."""
    runs = [read_run(r) for r in args.runs]
    made, _ = pair_margins(args, [str(r["folder"]) for r in runs])
    if torch.distributed.get_rank():
        return {}
    table, out = ["| stage | exact match | win rate over the stage before | margin (nats) | pairs right | to right, to wrong |", "|" + "---|" * 6], []
    show = lambda r, k, scale=1, form=".1f": f"{scale * r[k]:{form}} ({scale * r[k + '_low']:{form}} .. {scale * r[k + '_high']:{form}})" \
        if r.get(k) is not None else "-"
    for i, (run, m) in enumerate(zip(runs, made)):
        right = run["right"]
        low, high = bootstrap(list(right.values()), 10_000)
        row = {"name": run["name"], "exact_match": float(np.mean(list(right.values()))) if right else None, "exact_match_low": low,
               "exact_match_high": high, "prompts": len(right), "win_rate": None, "margin": float(m.mean()), "accuracy": float((m > 0).mean())}
        if i:
            before, s = runs[i - 1]["right"], margin_summary(made[i - 1], m)
            wins = [(1 + right[k] - before[k]) / 2 for k in right if k in before]     # right and wrong: 1; both alike: a half
            low, high = bootstrap(wins, 10_000)
            row |= {"win_rate": win_rate(wins), "win_rate_low": low, "win_rate_high": high, "paired_prompts": len(wins),
                    "to_right": s["to_right"], "to_wrong": s["to_wrong"]}
        out.append(row)
        table.append(f"| {row['name']} | {show(row, 'exact_match', 100)} | {show(row, 'win_rate', 100)} | {row['margin']:.3f} | "
                     f"{100 * row['accuracy']:.1f} | " + (f"{row['to_right']}, {row['to_wrong']} |" if i else "- |"))
    print("\n".join(table) + f"\n\nPercent, 95% bootstrap intervals over {len(runs[0]['right'])} prompts (paired for win rates); margins on "
          f"{len(made[0])} pairs of {' '.join(args.data)}.", flush=True)
    return {"stages": out, "data": args.data}


def curve(args) -> dict:
    """Score over steps (log), one line a data size with its dotted degree-2 fit and vertex: the paper's scaling figure."""
    points, unit = {}, {"steps": "optimiser steps", "tokens": "tokens", "flops": "FLOPs"}[args.x]
    for run in map(read_run, args.runs):
        noun = "documents" if run["stage"] == "sft" else "pairs"
        points.setdefault(size_of(run), []).append({"run": run["name"], "x": run["result"]["cumulative"][args.x], **score_of(run, args.y, "--y")})
    figure, ax = new_figure()
    lines = {}
    for colour, (n, row) in zip(["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb"] * 9, sorted(points.items())):
        row.sort(key=lambda p: p["x"])
        x, y = np.array([p["x"] for p in row], dtype=float), np.array([p["score"] for p in row])
        error = [[s - p["low"], p["high"] - s] if p["low"] is not None else [0, 0] for p, s in zip(row, y)]
        ax.errorbar(x, y, np.array(error).T, fmt="o", ms=5, color=colour, lw=0.8, elinewidth=0.5,
                    capsize=2, label=f"{n:,} {noun}")
        lines[str(n)] = {"points": row}
        if len(set(x.tolist())) >= 3:
            fit, grid = quadratic_fit(np.log(x), y), np.linspace(np.log(x).min(), np.log(x).max(), 200)
            top = lambda k: None if fit[k] is None or abs(fit[k]) > 700 else math.exp(fit[k])
            lines[str(n)] |= {"fit": fit, "saturation": top("vertex") if fit["maximum"] else None,
                              "saturation_low": top("vertex_low") if fit["maximum"] else None,
                              "saturation_high": top("vertex_high") if fit["maximum"] else None}
            c = fit["coefficients"]
            at = lambda g: c[0] + c[1] * g + c[2] * g ** 2
            ax.plot(np.exp(grid), at(grid), ":", color=colour, lw=2)
            if fit["maximum"] and grid[0] <= fit["vertex"] <= grid[-1]:
                ax.plot(top("vertex"), at(fit["vertex"]), "*", ms=14, color=colour)
    ax.set(xscale="log", xlabel=unit, ylabel=args.y.replace("_", " "), title="dotted: degree-2 fit over the logarithm; star: its vertex")
    ticks = sorted({p["x"] for row in points.values() for p in row})
    if len(ticks) <= 12:
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
    ax.legend()
    folder = Path(args.output or "runs/evaluate/curve")
    plot = Path(args.plot or folder / "curve.png")
    save_figure(figure, plot)
    for n, line in lines.items():
        if line.get("saturation"):
            low, high = line["saturation_low"], line["saturation_high"]
            print(f"{n}: saturation at {line['saturation']:.4g} {args.x}, 95% interval " + (f"{low:.4g} .. {high:.4g}" if low else "unbounded"),
                  file=sys.stderr)
    return finish(args, folder, {"x": args.x, "y": args.y, "lines": lines, "plot": str(plot)})


def report(args) -> dict:
    """One Markdown page of all runs: flags that differ, scores, held-out metrics with their rank correlation, curves, answers."""
    runs, folder = [read_run(r) for r in args.runs], Path(args.output or "runs/evaluate/report")
    folder.mkdir(parents=True, exist_ok=True)
    show = lambda v: "-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v).replace("|", "\\|").replace("\n", " ")
    table = lambda head, rows: "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head)] +
                                         ["| " + " | ".join(map(show, r)) + " |" for r in rows]) + "\n"
    flags = sorted(k for k in {k for r in runs for k in r["flags"]} - {"output", "cache_dir", "local_rank", "overwrite"}
                   if len({json.dumps(r["flags"].get(k)) for r in runs}) > 1)
    names = args.score or sorted({p.parent.name for r in runs for p in r["folder"].glob("evaluate/*/result.json")
                                  if json.loads(p.read_text()).get("score") is not None} |
                                 ({"exact_match"} if any(r["result"].get("exact_match") is not None for r in runs) else set()))
    scores = {n: [score_of(r, n, "--score") if args.score or (r["folder"] / "evaluate" / n / "result.json").is_file() or r["result"].get(n) is not None
                  else dict.fromkeys(("score", "low", "high")) for r in runs] for n in names}
    held = [k for k in ("eval_loss", "eval_margin", "eval_accuracy") if any(r["result"].get(k) is not None for r in runs)]
    interval = lambda s: show(s["score"]) + (f" ({show(s['low'])} .. {show(s['high'])})" if s["low"] is not None else "")
    correlations, tuned = {}, any(r["stage"] != "sft" for r in runs)    # SFT's loss is of another kind: not with DPO's
    for k in held:
        for n in names:
            both = [(r["result"][k], s["score"]) for r, s in zip(runs, scores[n]) if r["result"].get(k) is not None
                    and s["score"] is not None and not (tuned and r["stage"] == "sft")]
            correlations[f"{k} with {n}"] = rank_correlation(*zip(*both)) if both else None
    sft.plot_curves(folder / "curves.png", {r["name"]: [json.loads(x) for x in (r["folder"] / "metrics.jsonl").read_text().splitlines()]
                                            for r in runs}, dpo.CURVES if tuned else sft.CURVES)
    shared = [k for k in runs[0]["right"] if all(k in r["right"] for r in runs)][:args.samples]
    answers = [[next(s for s in r["samples"] if json.dumps(s["prompt"]) == k) for r in runs] for k in shared]
    page = ["# Runs", table(["run", "stage", "data", *(f"--{f.replace('_', '-')}" for f in flags)], [
                [r["name"], r["stage"], size_of(r), *(r["flags"].get(f) for f in flags)] for r in runs]),
            "Scores with 95% intervals, and figures on held-out pairs:\n", table(["run", *names, *held], [
                [r["name"], *(interval(scores[n][i]) for n in names), *(r["result"].get(k) for k in held)] for i, r in enumerate(runs)]),
            "Rank correlation (Spearman) over runs; the paper finds that these figures do not follow the score:\n",
            table(["", *names], [[k, *(correlations[f"{k} with {n}"] for n in names)] for k in held]), "![curves](curves.png)\n",
            "Answers to the same prompts (* correct):\n", table(["prompt", "reference", *(r["name"] for r in runs)], [
                [row[0]["prompt"][-1]["content"], row[0]["reference"], *(s["answer"] + " *" * s["correct"] for s in row)] for row in answers])]
    (folder / "report.md").write_text("\n".join(page))
    print("\n".join(page), file=sys.stderr)
    return finish(args, folder, {"runs": args.runs, "scores": {n: dict(zip([r["name"] for r in runs], s)) for n, s in scores.items()},
                                 "rank_correlation": correlations, "page": str(folder / "report.md")})


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
    lm_eval = needs("lm_eval", '"lm-eval[hf]==0.4.13"')
    needs("accelerate", '"lm-eval[hf]==0.4.13"')
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager
    folder = output_folder(args, "openllm")
    wanted = {}
    for text in args.tasks or [f"{t}:{shots}:{metric}" for t, (shots, metric) in OPENLLM.items()]:
        name, shots, metric = (text.split(":") + ["", ""])[:3]
        if shots and not shots.isdigit():
            raise ValueError(f"--tasks {text}: NAME[:SHOTS[:METRIC]], SHOTS a number")
        wanted[name] = (int(shots) if shots else None, metric)
    manager = TaskManager(include_path=args.include_path)
    settings = f"pretrained={args.model},dtype={'float32' if args.dtype == 'fp32' else 'bfloat16'}" + (f",{args.model_args}" if args.model_args else "")
    model = get_model(args.engine).create_from_arg_string(settings, 
        {"batch_size": args.batch_size, "device": "cuda" if torch.cuda.is_available() else "cpu"} if args.engine == "hf" else {})
    decides = [dpo.weights_hash(args.model), settings, args.engine, args.limit, args.apply_chat_template, lm_eval.__version__]
    folder.mkdir(parents=True, exist_ok=True)
    online_dpo.cut_torn_lines(folder, "tasks-*.jsonl")
    known = {r["key"]: r["values"] for r in online_dpo.read_growing(folder, "tasks-*.jsonl")}
    tasks = {}
    for name, (shots, metric) in wanted.items():
        key = digest([*decides, name, shots, [data.fingerprint(data.parse_source(str(p))) for p in sorted(Path(args.include_path).rglob("*.*"))
                                              if data.local_kind(str(p))] if args.include_path else None])
        if key not in known:
            made = lm_eval.simple_evaluate(model=model, tasks=[name], num_fewshot=shots, limit=args.limit, task_manager=manager,
                                           apply_chat_template=args.apply_chat_template, log_samples=False)
            if made is None:                                # ranks above 0 of `accelerate launch`
                continue
            known[key] = {k: v for k, v in made["results"][name].items() if isinstance(v, (int, float))}
            with open(folder / "tasks-0.jsonl", "a") as file:
                file.write(json.dumps({"key": key, "task": name, "values": known[key]}) + "\n")
        metric = metric or next(k for k in known[key] if "_stderr" not in k and "," in k)
        if metric not in known[key]:
            raise ValueError(f"--tasks {name}: no metric {metric}; it has {', '.join(known[key])}")
        error = known[key].get(metric.replace(",", "_stderr,"))
        tasks[name] = {"score": 100 * known[key][metric], "metric": metric, "shots": shots, "stderr": 100 * error if error is not None else None}
        print(f"{name} ({shots} shots, {metric}): {tasks[name]['score']:.2f}", file=sys.stderr)
    if len(tasks) < len(wanted):
        return {}
    return finish(args, folder, {
        "benchmark": "openllm-v1" if not args.tasks else "openllm", "model": args.model, "score": float(np.mean([t["score"] for t in tasks.values()])),
        "low": None, "high": None, "tasks": tasks, "chat_template": args.apply_chat_template, "limit": args.limit, "lm_eval": lm_eval.__version__})


def alpaca_eval(args) -> dict:
    """AlpacaEval-2: outputs in its own format, then the alpaca_eval package annotates and computes win rates."""
    package = needs("alpaca_eval", 'alpaca_eval==0.6.6 "setuptools<81"')
    folder, questions = output_folder(args, "alpaca-eval"), read_questions(args)
    answers = candidate_answers(args, folder, questions, lambda q: args.temperature)
    name = (args.model or Path(args.answers).name).rstrip("/").replace("/", "--")
    outputs = [{"instruction": q["turns"][0], "output": answers[q["id"]][0], "generator": name, "dataset": q["category"]} for q in questions]
    folder.mkdir(parents=True, exist_ok=True)
    sft.write_json(folder / "outputs.json", outputs)
    wanted = {q["turns"][0] for q in questions}
    reference = [r for _, r in read_rows(args.reference_outputs or args.questions, "--reference-outputs") if r["instruction"] in wanted]
    if [r["instruction"] for r in reference] != [o["instruction"] for o in outputs] or not all("output" in r for r in reference):
        raise ValueError(f"--reference-outputs {args.reference_outputs or args.questions}: needs one output to each instruction, in their order")
    if args.judge_url:
        os.environ["OPENAI_BASE_URL"] = args.judge_url      # the way its OpenAI client takes an endpoint
    board, annotations = package.evaluate(
        model_outputs=outputs, reference_outputs=reference, annotators_config=args.annotator, name=name, output_path=str(folder),
        is_return_instead_of_print=True, precomputed_leaderboard=None, is_cache_leaderboard=False,
        caching_path=str(folder / "annotations-cache.json"),
        fn_metric="get_length_controlled_winrate" if args.length_controlled else "get_winrate",
        metric_kwargs={"save_weights_dir": None} if args.length_controlled else {},
        sort_by="length_controlled_winrate" if args.length_controlled else "win_rate")
    row = {k: v.item() if hasattr(v, "item") else v for k, v in board.loc[name].to_dict().items()}
    unparsed = sum(a.get("preference") is None or a["preference"] != a["preference"] for a in annotations)
    return finish(args, folder, {
        "benchmark": "alpaca-eval-2", "model": args.model or args.answers, "judge": args.annotator, "baseline": reference[0].get("generator"),
        "parse": args.annotator, "temperature": args.temperature, "template": None, "unparsed": unparsed, "questions": len(questions),
        "score": row.get("length_controlled_winrate", row["win_rate"]), "low": None, "high": None, "win_rate": row["win_rate"],
        "length_controlled_win_rate": row.get("length_controlled_winrate"), "standard_error": row.get("standard_error"),
        "alpaca_eval": package.__version__ if hasattr(package, "__version__") else None, "outputs": str(folder / "outputs.json")})


# -------------------------------------------------------------------------------------------------- main
def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = p.add_subparsers(dest="command", metavar="COMMAND")

    def command(name, run, *groups, **defaults):
        c = commands.add_parser(name, help=(run.__doc__ or "").splitlines()[0], description=run.__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
        c.set_defaults(run=run, **defaults)
        for group in groups:
            group(c.add_argument)
        return c.add_argument
    for name, run in (("arena-hard", arena_hard), ("mt-bench", mt_bench)):
        add = command(name, run, model_flags, sampling_flags, judge_flags)
        add("--questions", help="FILE or hf:..; None: the benchmark's Hub data")
        add("--templates", help="the benchmark's own judge templates, FILE or hf:..")
        add("--limit", type=int, help="first N questions; None: all")
        if run is arena_hard:
            add("--variant", choices=list(VARIANTS), default="v0.1", help="star: the paper's judge and baseline for studies")
            add("--parse", choices=["2024", "2025"], default="2024", help="2024: all labels agree; 2025: the last one")
            add("--baseline", help="its name; None: the variant's")
            add("--baseline-answers", help="FILE or hf:..; None: the benchmark's Hub data")
        else:
            add("--references", default=MT_BENCH + "mt_bench/reference_answer/gpt-4.jsonl", help="reference answers, FILE or hf:..")
        add("--bootstrap", type=int, default=100, help="resamples of the interval")

    add = command("alpaca-eval", alpaca_eval, model_flags, sampling_flags, request_flags, dry_run=False)
    add("--questions", help="instructions, and the baseline's outputs; None: the benchmark's Hub data")
    add("--reference-outputs", help="the baseline's outputs, FILE or hf:..; None: those of --questions")
    add("--limit", type=int, help="first N instructions; None: all")
    add("--temperature", type=float, default=0.0, help="of the answers; 0: greedy")
    add("--annotator", default="weighted_alpaca_eval_gpt4_turbo", help="a config of the package, by name or folder")
    add("--base-url", "--judge-url", dest="judge_url", metavar="URL", help="the annotator's endpoint; None: OpenAI's")
    add("--length-controlled", action=argparse.BooleanOptionalAction, default=True, help="needs the benchmark's own data from the Hub")

    add = command("openllm", openllm)
    add("model", metavar="MODEL", help="folder or Hub id")
    add("--engine", choices=["hf", "vllm"], default="hf", help="several GPUs: `accelerate launch evaluate.py openllm` (hf), "
        "--model-args tensor_parallel_size=N or data_parallel_size=N (vllm)")
    add("--tasks", nargs="+", help="NAME[:SHOTS[:METRIC]] of lm-evaluation-harness; None: the leaderboard's six")
    add("--include-path", help="a folder of further task files")
    add("--limit", type=int, help="first N examples of a task; None: all")
    add("--apply-chat-template", action="store_true", help="off on the leaderboard")
    add("--batch-size", default="auto", help="hf engine")
    add("--model-args", help="more of the harness' own, NAME=VALUE,..")
    add("--dtype", choices=["fp32", "bf16"], help="None: bf16 on GPU")
    add("--output", help="folder; None: MODEL/evaluate/openllm")

    add = command("judge", judge, sampling_flags, judge_flags, empty_system=0.0)
    add("runs", nargs="+", metavar="RUNS", help="folders or Hub ids")
    add("--data", nargs="+", default=["demo:test"], help="prompts, NAME[:split][=fraction], several")
    add("--limit", type=int, help="first N prompts; None: all")
    add("--temperature", type=float, default=0.0, help="of the answers; 0: greedy")
    add("--judge-template", help="llm judge: a file with {prompt}, {answer_a}, {answer_b} that asks for [[A]], [[B]] or [[C]]")
    add("--judge-tokens", type=int, default=16384, help="tokens a judge's batch, with padding")
    add("--bootstrap", type=int, default=1000, help="resamples of the interval")
    add("--output", help="folder; None: runs/evaluate/judge")
    data_flags(add)

    add = command("margins", margins)
    add("before", metavar="BEFORE", help="folder or Hub id")
    add("after", metavar="AFTER", help="folder or Hub id")
    add("--data", nargs="+", default=["demo-pairs:test"], help="preference pairs, NAME[:split][=fraction], several")
    add("--output", help="folder; None: runs/evaluate/margins")
    add("--plot", help="picture; None: margins.png in the folder")
    pair_flags(add)

    add = command("stages", stages)
    add("runs", nargs="*", metavar="RUNS", default=STAGES, help="folders; None: the demo's three")
    add("--data", nargs="+", default=["demo-pairs:test"], help="preference pairs that margins are taken on")
    pair_flags(add)

    add = command("curve", curve)
    add("runs", nargs="+", metavar="RUNS", help="folders of finished runs")
    add("--x", choices=["steps", "tokens", "flops"], default="steps", help="cumulative, with those of runs trained further")
    add("--y", default="exact_match", help="a number of run.json's result, or an evaluation's folder name, like arena-hard")
    add("--output", help="folder; None: runs/evaluate/curve")
    add("--plot", help="picture; None: curve.png in the folder")

    add = command("report", report)
    add("runs", nargs="+", metavar="RUNS", help="folders of finished runs")
    add("--score", nargs="+", help="names as for curve --y; None: exact match and every evaluation there")
    add("--samples", type=int, default=8, help="answers to show")
    add("--output", help="folder; None: runs/evaluate/report")
    return p


def data_flags(add):
    add("--max-length", type=int, default=2048, help="tokens a row; longer ones are cut and counted")
    add("--bad-rows", choices=["refuse", "stop"], default="refuse", help="count them, or stop at the first")
    add("--num-proc", type=int, help="processes that prepare data; None: all cores")
    add("--cache-dir", help="prepared data and log-probs; None: ~/.cache/lions")


def pair_flags(add):
    data_flags(add)
    add("--max-prompt-length", type=int, default=512, help="prompt tokens that stay when a pair is too long")
    add("--micro-tokens", type=int, help="tokens a batch on a GPU; None: --max-length")
    add("--dtype", choices=["fp32", "bf16"], help="None: bf16 on GPU")
    add("--chat-template", default="tokenizer", help="chatml, tokenizer (its own) or a jinja file")


def model_flags(add):
    add("model", nargs="?", metavar="MODEL", help="folder or Hub id; may be left out with --answers")
    add("--answers", help="the model's answers in the benchmark's own format; None: sample them")
    add("--output", help="folder; None: MODEL/evaluate/COMMAND")


def sampling_flags(add):
    add("--engine", choices=["hf", "vllm", "server"], default="hf", help="how answers are sampled")
    add("--server-url", help="server engine: an OpenAI-compatible endpoint, http://HOST:PORT/v1")
    add("--served-model", help="server engine: the model's name there; None: MODEL")
    add("--batching", choices=["padded", "continuous"], help="hf engine; None: continuous on CUDA, padded on a CPU")
    add("--sampling-rows", type=int, default=64, help="hf engine: answers in work at once")
    add("--max-new-tokens", type=int, help="an answer's limit; None: the benchmark's")
    add("--top-p", type=float, default=1.0)
    add("--chat-template", default="tokenizer", help="chatml, tokenizer (its own) or a jinja file")
    add("--dtype", choices=["fp32", "bf16"], help="None: bf16 on GPU")
    add("--seed", type=int, default=42)


def request_flags(add):
    add("--concurrency", type=int, default=16, help="requests at once")
    add("--timeout", type=float, default=600, help="seconds a request may stay silent")
    add("--retries", type=int, default=6, help="further tries of a request, each after twice the wait")


def judge_flags(add):
    request_flags(add)
    add("--judge", help="the judge's model name; None: the benchmark's")
    add("--base-url", "--judge-url", dest="judge_url", metavar="URL", help="the judge: an OpenAI-compatible endpoint; its key comes "
        "from OPENAI_API_KEY")
    add("--judge-temperature", type=float, default=0.0)
    add("--judge-max-tokens", type=int, help="a verdict's limit; None: the benchmark's")
    add("--dry-run", action="store_true", help="print calls, tokens and cost; send and sample nothing")
    add("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="the judge's price a million tokens in and out")


DEFAULTS = {"arena-hard": dict(questions=ARENA + "question.jsonl", max_new_tokens=4096, judge_max_tokens=4096),
            "mt-bench": dict(questions=MT_BENCH + "mt_bench/question.jsonl", templates=MT_BENCH + "judge_prompts.jsonl",
                             max_new_tokens=1024, judge_max_tokens=2048, judge="gpt-4"),
            "alpaca-eval": dict(questions=ALPACA, max_new_tokens=2048),
            "judge": dict(max_new_tokens=2048, judge_max_tokens=2048, judge="pairrm")}


def check_flags(args) -> list[str]:
    have = lambda f: getattr(args, f, None)
    flag = lambda f: f"--{f.replace('_', '-')} {getattr(args, f)}"
    why = [f"{flag(f)}: must be above 0" for f in ("limit", "max_new_tokens", "sampling_rows", "judge_max_tokens", "concurrency",
                                                   "timeout", "bootstrap") if have(f) is not None and not have(f) > 0]
    why += [f"{flag(f)}: must not be below 0" for f in ("retries", "judge_temperature") if have(f) is not None and have(f) < 0]
    if hasattr(args, "top_p") and not 0 < args.top_p <= 1:
        why.append(f"{flag('top_p')}: must lie in (0, 1]")
    if have("price") and min(args.price) < 0:
        why.append(f"--price {args.price[0]:g} {args.price[1]:g}: must not be below 0")
    models = have("runs") or [m for f in ("model", "before", "after") if (m := have(f))]
    if hasattr(args, "answers") and not args.model and not args.answers:
        why.append("MODEL: needed, a folder or Hub id; or --answers FILE, its answers")
    if have("engine") == "server" and not args.server_url and not have("answers"):
        why.append("--engine server: needs --server-url, an endpoint like http://localhost:8000/v1")
    if args.command not in ("stages", "curve", "report") and have("engine") != "server" and not have("answers"):
        why += [f"{m}: no such folder" for m in models if m.startswith((".", "/", "runs/")) and not Path(m).is_dir()]
    kind, _, name = (have("judge") or "").partition(":")
    if args.command == "judge":
        if kind not in ("pairrm", "reward", "llm", "python") or (kind != "pairrm" and not name):
            why.append(f"--judge {args.judge}: not pairrm[:MODEL], reward:MODEL, llm:MODEL or python:FILE:FUNCTION")
        if kind == "llm" and not args.judge_template:
            why.append(f"--judge-template: needed for --judge {args.judge}, a file with {{prompt}}, {{answer_a}}, {{answer_b}}")
        if kind != "llm" and args.dry_run:
            why.append(f"--dry-run: --judge {args.judge} costs nothing; it is for llm judges")
    if hasattr(args, "price") and not args.judge_url and not args.dry_run and (args.command != "judge" or kind == "llm"):
        why.append("--base-url: needed, the judge's OpenAI-compatible endpoint (https://api.openai.com/v1); --dry-run counts without one")
    for name, url in (("--base-url", have("judge_url")), ("--server-url", have("server_url"))):
        parts = urllib.parse.urlsplit(url or "http://x")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            why.append(f"{name} {url}: not an http(s) URL")
        elif parts.username or parts.password or parts.query:
            why.append(f"{name}: must hold no user, password or query, which would be written to disk; a key goes into OPENAI_API_KEY")
    if args.command in ("arena-hard", "mt-bench", "alpaca-eval", "judge") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        why.append(f"{args.command} runs in one process; for several GPUs serve the model and use --engine server")
    if args.command == "arena-hard" and not args.templates:
        why.append("--templates: needed, Arena-Hard's judge_config.yaml (github.com/lmarena/arena-hard-auto, config/); it is not on the Hub")
    return why


def main(argv=None) -> dict:
    args = parser().parse_args((sys.argv[1:] if argv is None else list(argv)) or ["stages"])
    if not args.command:
        raise ValueError("COMMAND: needed; python evaluate.py --help lists them")
    for k, v in DEFAULTS.get(args.command, {}).items():
        if getattr(args, k) is None:
            setattr(args, k, v)
    if hasattr(args, "dtype"):
        args.dtype = args.dtype or ("bf16" if torch.cuda.is_available() else "fp32")
    run = args.__dict__.pop("run")
    why = check_flags(args)
    if why:
        raise ValueError("\n".join(why))
    return run(args)


if __name__ == "__main__":
    sft.run_main(main)
