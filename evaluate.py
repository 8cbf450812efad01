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


def sample_answers(args, folder: Path, asked: list[dict]) -> list[str]:
    """Texts for {"messages", "temperature"}, each by one call of the engine, from answers-0.jsonl where they are there."""
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
    decides = [model_key(args), tokenizer and tokenizer.chat_template, args.max_new_tokens, args.top_p, args.seed, args.dtype]
    keys = [digest([*decides, a["messages"], a["temperature"]]) for a in asked]
    folder.mkdir(parents=True, exist_ok=True)
    online_dpo.cut_torn_lines(folder, "answers-*.jsonl")
    known = {r["key"]: r["text"] for r in online_dpo.read_growing(folder, "answers-*.jsonl")}
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
    if args.dry_run:
        return None
    said = {q["id"]: [] for q in questions}
    for turn in range(max(len(q["turns"]) for q in questions)):
        now = [q for q in questions if turn < len(q["turns"])]
        asked = [{"temperature": temperature(q), "messages": [
            m for i in range(turn + 1) for m in data.ask(q["turns"][i], (said[q["id"]] + [""])[i])][:-1]} for q in now]
        for q, text in zip(now, sample_answers(args, folder, asked)):
            said[q["id"]].append(text)
    return said


def ask_judge(args, folder: Path, calls: list[dict], parse, follow_up: str | None = None) -> tuple[dict, dict]:
    """calls {"id", "messages"} -> {id: parse(the judge's own text) or None}, and counts.

    Every reply is appended to verdicts-0.jsonl under a hash of id, judge, messages, temperature and limit, and never asked
    for again; what is parsed is the reply, so another parse variant costs nothing. follow_up: one more user turn where the
    first reply holds no label at all; both texts are parsed together. A request that failed for good is recorded
    without a reply: unparsed now, asked again by the next run. Refused keys and names (401, 403, 404) and 20 failures in a
    row stop the run."""
    from tqdm import tqdm
    folder.mkdir(parents=True, exist_ok=True)
    online_dpo.cut_torn_lines(folder, "verdicts-*.jsonl")
    known = {r["key"]: r["reply"] for r in online_dpo.read_growing(folder, "verdicts-*.jsonl") if r["reply"] is not None}
    settings = {"model": args.judge, "temperature": args.judge_temperature, "max_tokens": args.judge_max_tokens}
    key_of = lambda name, messages: digest([name, settings, messages])
    todo = [c for c in calls if key_of(c["id"], c["messages"]) not in known]
    if args.dry_run:
        return {}, dry_run(args, calls, todo, follow_up)
    lock, failing, counts = threading.Lock(), [0], {"asked": 0, "failed": 0, "judge_tokens": 0}
    file = open(folder / "verdicts-0.jsonl", "a")

    def ask(call):
        messages, said = list(call["messages"]), []
        for last in ([False, True] if follow_up else [True]):
            key, error, tokens = key_of(call["id"], messages), None, 0
            reply = known.get(key)
            if reply is None:
                try:
                    reply, _, tokens = online_dpo.chat(args.judge_url, {**settings, "messages": messages}, args, "--base-url")
                except online_dpo.ChatError as e:
                    if e.status in (401, 403, 404):
                        raise
                    error = str(e)
                with lock:
                    file.write(json.dumps({"key": key, "id": call["id"], "judge": args.judge, "reply": reply, "error": error,
                                           "tokens": tokens, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}) + "\n")
                    file.flush()
                    counts["asked"] += reply is not None
                    counts["failed"] += reply is None
                    counts["judge_tokens"] += tokens
                    failing[0] = failing[0] + 1 if error else 0
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
    for name, run, temperature in (("arena-hard", arena_hard, None), ("mt-bench", mt_bench, None)):
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
    return p


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


def judge_flags(add):
    add("--judge", help="the judge's model name; None: the benchmark's")
    add("--base-url", "--judge-url", dest="judge_url", metavar="URL", help="the judge: an OpenAI-compatible endpoint; its key comes "
        "from OPENAI_API_KEY")
    add("--judge-temperature", type=float, default=0.0)
    add("--judge-max-tokens", type=int, help="a verdict's limit; None: the benchmark's")
    add("--concurrency", type=int, default=16, help="requests at once")
    add("--timeout", type=float, default=600, help="seconds a request may stay silent")
    add("--retries", type=int, default=6, help="further tries of a request, each after twice the wait")
    add("--dry-run", action="store_true", help="print calls, tokens and cost; send and sample nothing")
    add("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="the judge's price a million tokens in and out")


DEFAULTS = {"arena-hard": dict(questions=ARENA + "question.jsonl", max_new_tokens=4096, judge_max_tokens=4096),
            "mt-bench": dict(questions=MT_BENCH + "mt_bench/question.jsonl", templates=MT_BENCH + "judge_prompts.jsonl",
                             max_new_tokens=1024, judge_max_tokens=2048, judge="gpt-4")}


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
    if hasattr(args, "answers"):
        if not args.model and not args.answers:
            why.append("MODEL: needed, a folder or Hub id; or --answers FILE, its answers")
        if args.engine == "server" and not args.server_url and not args.answers:
            why.append("--engine server: needs --server-url, an endpoint like http://localhost:8000/v1")
        if args.engine != "server" and args.model and args.model.startswith((".", "/", "runs/")) and not Path(args.model).is_dir() \
                and not args.answers:
            why.append(f"MODEL {args.model}: no such folder")
    if hasattr(args, "price") and not args.judge_url and not args.dry_run:
        why.append("--base-url: needed, the judge's OpenAI-compatible endpoint (https://api.openai.com/v1); --dry-run counts without one")
    for name, url in (("--base-url", have("judge_url")), ("--server-url", have("server_url"))):
        parts = urllib.parse.urlsplit(url or "http://x")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            why.append(f"{name} {url}: not an http(s) URL")
        elif parts.username or parts.password or parts.query:
            why.append(f"{name}: must hold no user, password or query, which would be written to disk; a key goes into OPENAI_API_KEY")
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
