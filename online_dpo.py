"""Stage 3, online DPO (LIONs, arXiv 2407.06542, section 3): sample K, judge, best against worst, train, again.

    y_1 .. y_K ~ pi(. | x)                     K samples of the present policy, temperature 0.8
    s_1 .. s_K = judge(x, y_1 .. y_K)          PairRM, a reward model, an LLM, or a function of yours
    y_w, y_l   = y_argmax s, y_argmin s        prompts without a real difference are dropped and counted
    DPO on (x, y_w, y_l) from pi, reference pi (dpo.py); --iterations n: again from the new policy

Reads   prompts (--data: any conversations or pairs, see data.py), the DPO model (--model).
Writes  --output/iteration-i: prompts.jsonl, answers-*.jsonl, scores-*.jsonl, pairs.jsonl (a preference data set of
        its own), report.json, and the trained model; --output: run.json, report.md, report.png.
Every answer, verdict and score (PairRM, reward: a batch) is on disk the moment it is there; the same command goes on
where a killed run died.

    python online_dpo.py                                                 # the demo, after sft.py and dpo.py
    python online_dpo.py --model runs/gemma-2b-dpo                       # one GPU
    deepspeed online_dpo.py --model runs/llama-3-8b-dpo                  # all GPUs
    python online_dpo.py --engine server --base-url http://localhost:8000/v1 --served-model NAME --model RUN
    python online_dpo.py --judge python:FILE:FUNCTION                    # function(prompt, answers, reference)

Differs from the paper
 1. PairRM budgets a row's tokens by that row alone; the original by its batch, so that neighbours change scores.
 2. Answers cut by --max-new-tokens cannot win (--truncated-can-win: they can).
 3. Sample k of a prompt hangs on (seed, iteration, prompt, k) alone on the padded hf engine.

Step 0 of each iteration's training: loss ln 2 = 0.6931. The demo ends near 0.78 exact match, from dpo.py's 0.71.
"""
from __future__ import annotations

import ast
import concurrent.futures
import gc
import hashlib
import http.client
import importlib.util
import itertools
import json
import math
import operator
import os
import re
import sys
import time
import traceback
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import torch

import data
import dpo
import sft
from kernels import Group, LogProbs, layout, sequence_logps

PRESETS = {  # the paper's table as argparse defaults
    "demo": dict(model="runs/dpo", data=["demo:train=0.2"], eval_data=["demo-pairs:test"], eval_prompts=["demo:test"],
                 batch_size=32, max_length=512, max_prompt_length=256, lr=2e-5, beta=1.0, eval_samples=400,
                 iterations=3, max_prompts=5000, max_new_tokens=64, sampling_rows=256,
                 judge="python:online_dpo.py:exact_answer", output="runs/online-dpo"),
    "gemma-2b": dict(model="runs/gemma-2b-dpo", data=["HuggingFaceH4/ultrafeedback_binarized:train_prefs"], epochs=1,
                     batch_size=32, max_length=2048, max_prompt_length=512, lr=5e-7, beta=0.05, zero=1,
                     gradient_checkpointing=True, max_new_tokens=2048, output="runs/gemma-2b-online-dpo"),
    "llama-3-8b": dict(model="runs/llama-3-8b-dpo", data=["HuggingFaceH4/ultrafeedback_binarized:train_prefs"],
                       epochs=1, batch_size=128, max_length=2048, max_prompt_length=512, lr=5e-7, beta=0.01, zero=3,
                       gradient_checkpointing=True, max_new_tokens=2048, output="runs/llama-3-8b-online-dpo")}
# what cannot change answers, scores or pairs beyond rounding (and an engine's own draws); two flags that are free elsewhere
# decide here: --max-new-tokens the answers, --export-dtype the next iteration's policy
FREE = sft.FREE - {"max_new_tokens", "export_dtype"} | {"sampling_rows", "judge_tokens", "concurrency", "timeout", "retries", "base_url",
                                        "judge_url", "iterations"}


# --------------------------------------------------------------------------------------------- maths
def scores_from_comparisons(c):
    """PairRM's ranking (LLM-Blender 2306.02561): score_i = mean_j (C_ij - C_ji) over all ordered comparisons.

    c (K, K): c[i, j] is how far answer i, shown first, beats answer j, shown second; the matrix is not
    antisymmetric and both orders count. Diagonal ignored. Returns (K,). C_01 = 3, C_10 = 1: 1 and -1."""
    c = np.asarray(c, dtype=np.float64) * (1 - np.eye(len(c)))
    return (c - c.T).mean(1)


def ranks(scores):
    """rank = 1 + number of strictly greater scores; ties share a rank. (K,) -> (K,) int64. 5, 7, 5: 2, 1, 2."""
    s = np.asarray(scores)
    return 1 + (s[None, :] > s[:, None]).sum(1)


def pick_pairs(rows: list[dict], scores, *, min_gap: float = 0.0, truncated_can_win: bool = False,
               forbidden: list[str] = ()) -> tuple[list[dict], dict]:
    """Best against worst of each prompt's K answers (LIONs section 3), in the preference format.

    rows: {"prompt": messages, "answer": reference or None, "answers": K of {"text", "finished"}}; scores
    (len(rows), K). Empty answers and those with a `forbidden` (special) string stand outside; equal ones
    collapse, a finished one staying; a truncated one may lose, not win. Ties: the first sample. A prompt
    without two different answers, a winner, or a gap above 0 and of at least min_gap gives no pair.
    Returns the pairs and a count of every reason. Scores 1, 3, 2 give (second, first), gap 2."""
    counts = dict(prompts=len(rows), pairs=0, empty_answers=0, special_answers=0, truncated_answers=0, equal_answers=0,
                  no_usable_answer=0, all_equal=0, no_finished_answer=0, only_truncated_better=0, tie=0, gap_too_small=0)
    pairs = []
    for row, s in zip(rows, np.asarray(scores, dtype=np.float64)):
        different, best_first = {}, sorted(range(len(s)), key=lambda k: (not row["answers"][k]["finished"], k))
        for k in best_first:
            text = row["answers"][k]["text"]
            counts["truncated_answers"] += not row["answers"][k]["finished"]
            if not text.strip():
                counts["empty_answers"] += 1
            elif any(f in text for f in forbidden):
                counts["special_answers"] += 1
            elif text.strip() in different:
                counts["equal_answers"] += 1
            else:
                different[text.strip()] = k
        left = sorted(different.values())
        can_win = [k for k in left if truncated_can_win or row["answers"][k]["finished"]]
        if len(left) < 2 or not can_win:
            counts["no_usable_answer" if not left else "all_equal" if len(left) < 2 else "no_finished_answer"] += 1
            continue
        w, l = max(can_win, key=lambda k: (s[k], -k)), min(left, key=lambda k: (s[k], k))
        if not s[w] > s[l] or s[w] - s[l] < min_gap:
            differ = max(s[k] for k in left) > s[l]
            counts["gap_too_small" if s[w] > s[l] else "only_truncated_better" if differ else "tie"] += 1
            continue
        said = lambda k: [{"role": "assistant", "content": row["answers"][k]["text"]}]
        pairs.append({"prompt": row["prompt"], "chosen": said(w), "rejected": said(l), "score_chosen": s[w],
                      "score_rejected": s[l], "answer": row["answer"], "source": "online",
                      "unfinished": [side for side, k in (("chosen", w), ("rejected", l)) if not row["answers"][k]["finished"]]})
    return pairs, counts | {"pairs": len(pairs)}


# ------------------------------------------------------------------------- judges that are plain functions
def exact_answer(prompt, answers: list[str], reference) -> list[float]:
    """1 where the final answer (data.final_answer: after '####', else all of it) is the reference, else 0."""
    return [float(data.final_answer(a) == reference) for a in answers]


def gsm8k_credit(prompt, answers: list[str], reference) -> list[float]:
    """Partial credit on GSM8K, for models too weak to be right: 1 for the right final number; else 0.1 where the
    answer ends in '#### number', plus 0.4 times the share of its <<sum=result>> notes that add up (a note whose
    left side has no operator does not)."""
    number = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)\.?\s*$")
    close = lambda a, b: a is not None and b is not None and math.isfinite(a) and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6)

    def credit(text):
        last = number.search(text.strip())
        if last and close(calculated(last[1]), calculated(str(reference))):
            return 1.0
        notes = re.findall(r"<<([^<>=]+)=([^<>=]+)>>", text)
        right = sum(bool(re.search(r"\d\s*[-+*/]", a)) and close(calculated(a), calculated(b)) for a, b in notes)
        return 0.1 * bool(last) + (0.4 * right / len(notes) if notes else 0.0)
    return [credit(a) for a in answers]


def calculated(text: str) -> float | None:
    """Value of + - * / over numbers and brackets, walked over its syntax tree, never run; None if it is else."""
    steps = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in steps:
            return steps[type(node.op)](value(node.left), value(node.right))
        raise ValueError
    try:
        clean = re.sub(r"(?<![\d.])0+(?=\d)", "", text.replace(",", "").strip())
        return value(ast.parse(clean, mode="eval").body) if len(clean) <= 200 else None
    except (ValueError, SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


# ------------------------------------------------------------------------------------------------ PairRM
PREFIXES = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")


class PairRM(torch.nn.Module):
    """llm-blender/PairRM and PairRM-hf (2306.02561): DeBERTa-v3 and a head on the hidden states at three tokens.

    s_k = head([h_source ; h_candidate_k]); the logit s_1 - s_2 is positive where the first answer is better."""

    def __init__(self, config):
        super().__init__()
        from transformers import DebertaV2Model
        from torch.nn import Dropout, Linear, Sequential, Tanh
        self.pretrained_model, h = DebertaV2Model(config), config.hidden_size
        self.head_layer = Sequential(Dropout(0.0), Linear(2 * h, h), Tanh(), Dropout(0.0), Linear(h, 1))

    def forward(self, input_ids, attention_mask, prefixes):
        """(B, L) int64 right-padded, their mask, ids of source, candidate1, candidate2 -> (B,) logits."""
        h = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state     # (B, L, D)
        x, a, b = (h[torch.arange(len(h)), (input_ids == t).int().argmax(1)] for t in prefixes)             # (B, D)
        s_1, s_2 = (self.head_layer(torch.cat([x, y], -1))[:, 0].float() for y in (a, b))
        return s_1 - s_2

    @classmethod
    def load(cls, name: str):
        """Model and tokenizer from a folder or Hub id. Weights are loaded strictly: a missing or unexpected key
        is an error that names it."""
        from safetensors.torch import load_file
        from transformers import AutoTokenizer, DebertaV2Config
        folder = Path(name)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download
            folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model"]))
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise ValueError(f"--judge pairrm:{name}: {len(files)} .safetensors files there, one is needed")
        state = load_file(files[0])
        known = json.loads((folder / "config.json").read_text())
        base = str(folder) if "hidden_size" in known else known.get("model_name", "microsoft/deberta-v3-large")
        table = "pretrained_model.embeddings.word_embeddings.weight"
        config = DebertaV2Config.from_pretrained(base)
        if table in state:
            config.vocab_size = len(state[table])
        model = cls(config)
        wrong = [f"{word}: {', '.join(sorted(keys)[:5])}" for word, keys in (
            ("missing", set(model.state_dict()) - set(state)), ("unexpected", set(state) - set(model.state_dict()))) if keys]
        if wrong:
            raise ValueError(f"--judge pairrm:{name}: not PairRM's weights; keys " + "; ".join(wrong))
        model.load_state_dict(state)
        own = any((folder / f).exists() for f in ("tokenizer.json", "spm.model"))
        tokenizer = AutoTokenizer.from_pretrained(folder if own else base)
        tokenizer.add_special_tokens({"additional_special_tokens": list(PREFIXES)})
        return model.eval(), tokenizer


def without(specials, text: str) -> str:
    """Text in which special strings have become spaces."""
    for s in specials:
        text = text.replace(s, " ")
    return text


def as_text(messages: list[dict]) -> str:
    """A prompt for PairRM: its one user turn as it is; several turns as 'role: content' lines."""
    said = [m for m in messages if m["content"]]
    return said[0]["content"] if len(said) == 1 and said[0]["role"] == "user" else \
        "\n".join(f"{m['role']}: {m['content']}" for m in said)


def pairrm_rows(tokenizer, source: str, answers: list[str], cut: list[int]) -> dict:
    """Input ids of all K(K-1) ordered pairs: (i, j) -> [CLS]<|source|>x[SEP][CLS]<|candidate1|>y_i[SEP][CLS]<|candidate2|>y_j[SEP].

    Source at most 1224 tokens, each answer at most half of what is left of 2048, by this row alone. Special
    strings in the texts become a space. cut[0] counts texts that were cut."""
    special = set(tokenizer.all_special_tokens) | set(PREFIXES)

    def ids(prefix, text, limit):
        made = tokenizer(prefix + without(special, text)).input_ids
        cut[0] += len(made) > limit
        return made if len(made) <= limit else made[:limit - 1] + made[-1:]
    x = ids(PREFIXES[0], source, 1224)
    first, second = ([ids(p, y, (2048 - len(x)) // 2) for y in answers] for p in PREFIXES[1:3])
    return {(i, j): x + first[i] + second[j] for i in range(len(answers)) for j in range(len(answers)) if i != j}


def by_length(rows: list[list[int]], tokens: int, pad: int, device):
    """Right-padded batches of rows of like length, at most `tokens` with padding: (which rows, ids, mask)."""
    order = sorted(range(len(rows)), key=lambda r: -len(rows[r]))
    while order:
        width = len(rows[order[0]])
        part, order = order[:max(1, tokens // width)], order[max(1, tokens // width):]
        x = torch.tensor([rows[r] + [pad] * (width - len(rows[r])) for r in part], device=device)
        mask = torch.tensor([[1] * len(rows[r]) + [0] * (width - len(rows[r])) for r in part], device=device)
        yield part, x, mask


@torch.no_grad()
def pairrm_logits(model, tokenizer, wanted: list[list[int]], tokens: int, device):
    """Logits of input rows (`pairrm_rows`), float64 (R,); neighbours do not change a row beyond rounding."""
    prefixes, out = tokenizer.convert_tokens_to_ids(list(PREFIXES[:3])), np.zeros(len(wanted))
    for part, x, mask in by_length(wanted, tokens, tokenizer.pad_token_id, device):
        out[part] = model(x, mask, prefixes).double().cpu().numpy()
    return out


# ------------------------------------------------------------------------------------------------ judges
def load_judge(args, device, verdicts: list[dict] = (), file: Path | None = None):
    """--judge -> function: rows ({"key", "prompt", "answer", "answers"}) -> a list of K scores for each.
    The llm judge appends each verdict to `file` and asks for none that is among `verdicts`."""
    kind, _, name = args.judge.partition(":")
    if kind == "python":
        return python_judge(name)
    if kind == "llm":
        return llm_judge(args, name, verdicts, file)
    if kind == "pairrm":
        model, tokenizer = PairRM.load(name or "llm-blender/PairRM-hf")
        model.to(device)

        def judge(rows):
            cut, made = [0], []
            for n, r in enumerate(rows):
                pairs = pairrm_rows(tokenizer, as_text(r["prompt"]), [a["text"] for a in r["answers"]], cut)
                made += [(n, ij, ids) for ij, ids in pairs.items()]
            logits = pairrm_logits(model, tokenizer, [ids for *_, ids in made], args.judge_tokens, device)
            c = np.zeros((len(rows), args.samples, args.samples))
            for (n, (i, j), _), v in zip(made, logits):
                c[n, i, j] = v
            if cut[0]:
                print(f"pairrm: {cut[0]} texts were cut to its 2048 tokens", file=sys.stderr)
            return [scores_from_comparisons(x) for x in c]
        return judge
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, use_safetensors=True).to(device).eval()
    if model.config.num_labels != 1:
        raise ValueError(f"--judge reward:{name}: {model.config.num_labels} outputs; a reward model has one")
    if not tokenizer.chat_template:
        raise ValueError(f"--judge reward:{name}: its tokenizer has no chat template to render a conversation with")
    specials = tokenizer.all_special_tokens

    @torch.no_grad()
    def reward(rows):
        said = [[{**m, "content": without(specials, m["content"])} for m in (*r["prompt"], {"role": "assistant", "content": a["text"]})]
                for r in rows for a in r["answers"]]
        ids, out = [tokenizer(data.render(tokenizer, m), add_special_tokens=False).input_ids for m in said], np.zeros(len(said))
        pad = tokenizer.pad_token_id
        if pad is None:                                     # an id that no text has: the model looks for the last other one
            pad = min(set(range(len(tokenizer))) - set(itertools.chain(*ids)))
        model.config.pad_token_id = pad
        for part, x, mask in by_length(ids, args.judge_tokens, pad, device):
            out[part] = model(input_ids=x, attention_mask=mask).logits[:, 0].double().cpu().numpy()
        return out.reshape(len(rows), -1).tolist()
    return reward


def judge_function(name: str):
    """FILE:FUNCTION, the file looked for here and then beside this script."""
    file, _, function = name.rpartition(":")
    found = [p for p in (Path(file), Path(__file__).parent / file) if file.endswith(".py") and p.is_file()]
    if not found:
        raise ValueError(f"--judge python:{name}: no file {file!r}; write python:FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location("lions_judge", found[0])
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)       # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--judge python:{name}: {found[0]} cannot be imported: {told(error)}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"--judge python:{name}: {found[0]} has no function {function!r}")
    return getattr(module, function)


def told(error: Exception) -> str:
    """An error of somebody's own code in a line: its kind, its text and where it was raised."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({at.filename}:{at.lineno})"


def python_judge(name: str):
    score = judge_function(name)

    def judge(rows):
        made = []
        for r in rows:
            try:
                made.append(score(r["prompt"], [a["text"] for a in r["answers"]], r["answer"]))
            except Exception as error:
                raise ValueError(f"--judge python:{name}: prompt {json.dumps(r['prompt'])[:200]}: {told(error)}; scores got "
                                 "before it are on disk, mend the judge and run the same command again") from error
        return made
    return judge


VERDICTS = {"A>>B": 1.0, "A>B": 1.0, "A": 1.0, "A=B": 0.0, "C": 0.0, "B>A": -1.0, "B>>A": -1.0, "B": -1.0}


def llm_judge(args, name: str, verdicts: list[dict] = (), file: Path | None = None):
    """Every ordered pair of a prompt's answers by one question to an LLM at temperature 0. The template (a file
    with {prompt}, {answer_a}, {answer_b}) must ask for [[A]], [[B]], [[C]] for a tie, or [[A>B]] and the like;
    the last such mark counts. A reply without one is a tie, and counted. A verdict is appended to `file` as
    {"key", "pair", "verdict"} the moment it is there; `verdicts` are such lines, not asked for again."""
    template = Path(args.judge_template).read_text()
    known = {(v["key"], *v["pair"]): v["verdict"] for v in verdicts}

    def judge(rows):
        pairs = [(n, i, j) for n in range(len(rows)) for i, j in itertools.permutations(range(args.samples), 2)]

        def ask(one):
            n, i, j = one
            values = {"prompt": as_text(rows[n]["prompt"]), "answer_a": rows[n]["answers"][i]["text"],
                      "answer_b": rows[n]["answers"][j]["text"]}
            text = re.sub(r"\{(prompt|answer_a|answer_b)\}", lambda m: values[m[1]], template)
            said = chat(args.judge_url, {"model": name, "messages": [{"role": "user", "content": text}], "temperature": 0,
                                         "max_tokens": 2048}, args, "--judge-url")[0]
            found = re.findall(r"\[\[(A>>B|A>B|A=B|B>A|B>>A|A|B|C)\]\]", said)
            return VERDICTS[found[-1]] if found else None
        at = {(n, i, j): (rows[n]["key"], i, j) for n, i, j in pairs}
        got = {p: known[k] for p, k in at.items() if k in known}
        with open(file or os.devnull, "a") as out:
            for (n, i, j), verdict in in_parallel(ask, [p for p in pairs if p not in got], args.concurrency):
                got[n, i, j] = verdict
                out.write(json.dumps({"key": rows[n]["key"], "pair": [i, j], "verdict": verdict}) + "\n")
                out.flush()
        c = np.zeros((len(rows), args.samples, args.samples))
        for p, verdict in got.items():
            c[p] = verdict or 0.0
        unparsed = sum(v is None for v in got.values())
        if unparsed:
            print(f"llm judge: {unparsed} of {len(pairs)} replies without a verdict count as ties", file=sys.stderr)
        return [scores_from_comparisons(x) for x in c]
    return judge


def score_responses(judge, rows: list[dict], name: str = "") -> np.ndarray:
    """A judge's scores of each row's K answers: (len(rows), K) float64, checked: right number, all finite."""
    made = judge(rows)
    if len(made) != len(rows):
        raise ValueError(f"--judge {name}: scores for {len(made)} prompts, asked for {len(rows)}")
    for row, s in zip(rows, made):
        try:
            s = np.asarray(s, dtype=np.float64)
        except (TypeError, ValueError):
            s = np.full(len(row["answers"]), np.nan)
        if s.shape != (len(row["answers"]),) or not np.isfinite(s).all():
            why = f"{s.tolist()}: not finite numbers" if s.shape == (len(row["answers"]),) else \
                f"scores of shape {s.shape}, not one for each of {len(row['answers'])} answers"
            raise ValueError(f"--judge {name}: prompt {json.dumps(row['prompt'])[:200]}: {why}; scores got before it are "
                             "on disk, mend the judge and run the same command again")
    return np.asarray(made, dtype=np.float64)


# ----------------------------------------------------------------------------------------------- servers
class ChatError(ValueError):
    """A request that failed for good; `status`: the last HTTP status, None where there was no usable reply."""

    def __init__(self, text: str, status: int | None = None):
        super().__init__(text)
        self.status = status


def chat(url: str, payload: dict, args, flag: str, key_name: str = "OPENAI_API_KEY") -> tuple[str, bool, int]:
    """One chat completion of an OpenAI-compatible endpoint: (text, finished, tokens). Busy (429), failing (5xx),
    silent or garbled servers are asked again with back-off; what still fails raises ChatError. The key comes
    from the environment's `key_name` alone (a judge's and a policy's server are not each other's business), and is
    cut out of what a server says."""
    key = os.environ.get(key_name, "").strip()
    if not (key.isascii() and key.isprintable()):           # http.client would put it into its error
        raise ValueError(f"{key_name}: holds a character that no HTTP header can, a line break inside it, say; set it anew")
    head = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    hide = lambda t: t.replace(key, "[key]") if key else t
    for attempt in range(args.retries + 1):
        wait, status = min(60.0, 0.5 * 2 ** attempt), None
        try:
            request = urllib.request.Request(url.rstrip("/") + "/chat/completions", json.dumps(payload).encode(), head)
            with urllib.request.urlopen(request, timeout=args.timeout) as reply:
                body = json.loads(reply.read())
            choice = body["choices"][0]
            text, why = choice["message"]["content"], choice.get("finish_reason")
            if text is None and why == "length":            # all of the limit went into reasoning
                text = ""
            if not isinstance(text, str):
                raise ValueError(f"content is {text!r}, not text")
            return hide(text), why not in ("length", "content_filter"), (body.get("usage") or {}).get("completion_tokens") or 0
        except urllib.error.HTTPError as error:
            try:
                said = error.read(1000).decode(errors="replace")
            except (OSError, http.client.HTTPException):    # its body breaks off, or hangs
                said = ""
            status, last = error.code, hide(f"HTTP {error.code}: {said}")[:220]
            if error.code < 500 and error.code not in (408, 409, 425, 429):
                raise ChatError(f"{flag} {url}: {last}; nothing got so far is lost. Check the model's name, the URL "
                                f"(it ends in /v1) and {key_name}", status) from None
            told = error.headers.get("Retry-After", "")
            wait = min(60.0, float(told)) if told.isdecimal() else wait
        except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            last = hide(f"{type(error).__name__}: {error}")
        if attempt < args.retries:
            time.sleep(wait)
    raise ChatError(f"{flag} {url}: {args.retries + 1} tries failed, the last with {last}; what was got is on disk. Is the "
                    "server up? Run the same command again", status)


def in_parallel(work, items, workers: int):
    """(item, work(item)) as they finish, few of them begun ahead. After an error those under way are still handed out,
    then it is raised; none is begun any more after that, or after the loop over this is left (Ctrl-C)."""
    items, waiting, failed = iter(items), {}, None
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        while True:
            for x in itertools.islice(items, 2 * workers - len(waiting) if failed is None else 0):
                waiting[pool.submit(work, x)] = x
            if not waiting:
                break
            for f in concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED).done:
                x = waiting.pop(f)
                if f.exception() is None:
                    yield x, f.result()
                elif failed is None:
                    failed = f.exception()
                    waiting = {other: y for other, y in waiting.items() if not other.cancel()}
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        raise failed


# ---------------------------------------------------------------------------------------------- sampling
def sample_continuously(model, tokenizer, prompts, max_new_tokens: int, *, samples: int = 1, temperature: float = 0.0,
                        top_p: float = 1.0, done=frozenset(), rows: int = 64, seed: int = 0):
    """`sft.sample_responses` by transformers' continuous batching (paged keys and values): Answers as they finish.
    The default on CUDA. Its draws hang on the order of the requests: a restart must bring another seed."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    stops = sft.stop_tokens(model.generation_config)
    how = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0) if temperature else dict(do_sample=False)
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=sorted(stops), **how,
                              pad_token_id=model.generation_config.pad_token_id)
    memory = {} if model.device.type == "cuda" else dict(max_memory_percent=0.05)   # of the free memory, on a CPU
    wanted = [(i, k) for i in range(len(prompts)) for k in range(samples) if (i, k) not in done]
    with model.continuous_batching_context_manager(
            generation_config=config, block=True, timeout=5, continuous_batching_config=ContinuousBatchingConfig(
                max_requests_per_batch=rows, seed=seed, **memory)) as manager:
        left = {manager.add_request(sft.prompt_ids(tokenizer, prompts[i]), request_id=f"{i}.{k}", max_new_tokens=max_new_tokens)
                for i, k in wanted}
        while left:
            r = manager.get_result(timeout=1)
            if r is None and not manager.is_running():
                raise ValueError("--engine hf: transformers' continuous batching stopped; what was got is on disk. Run the same "
                                 "command again, or with --batching padded")
            if r is not None and r.is_finished():
                if r.error:
                    raise ValueError(f"--engine hf: continuous batching: {r.error}; try --batching padded")
                left.discard(r.request_id)
                yield sft.answer_of(r.generated_tokens, *map(int, r.request_id.split(".")), stops, tokenizer)


def answers_of(args, policy: str, tokenizer, rows: list[dict], done: set, device, iteration: int, flag="--base-url"):
    """The missing answers of `rows` by --engine, as they finish: sft.Answer. done: (row, k) that are there; flag: the
    one that args.base_url came from."""
    prompts = [r["prompt"] for r in rows]
    seeds = [int(hashlib.sha256(f"{args.seed} {iteration} {r['key']}".encode()).hexdigest()[:15], 16) for r in rows]
    how = dict(samples=args.samples, temperature=args.temperature, top_p=args.top_p, done=done)
    wanted = [(i, k) for i in range(len(rows)) for k in range(args.samples) if (i, k) not in done]
    if args.engine == "server":
        def ask(one):
            i, k = one
            try:
                text, finished, tokens = chat(args.base_url, {
                    "model": args.served_model or policy, "messages": prompts[i], "temperature": args.temperature,
                    "top_p": args.top_p, "max_tokens": args.max_new_tokens, "seed": (seeds[i] + k) % 2 ** 31}, args, flag,
                    "SERVER_API_KEY")
            except ChatError as error:
                if error.status not in (400, 413, 422):
                    raise
                return error                                # this prompt's fault, it may be: the others go on
            tokens = tokens or (len(tokenizer(text, add_special_tokens=False).input_ids) if tokenizer else 0)
            return sft.Answer(i, k, text, [0] * tokens, finished)       # a server tells how many ids, not which
        texts, whole, same = {}, 0, 0                       # of prompts under way; prompts done; those of one answer
        refused, works = [], False
        for one, a in in_parallel(ask, wanted, args.concurrency):
            if isinstance(a, ChatError):
                refused.append(one)
                if not works and len(refused) == min(16, len(wanted)):
                    raise a                                 # nothing works: nothing is recorded
                continue
            works = True
            yield a
            texts.setdefault(a.prompt, []).append(a.text)
            if len(texts[a.prompt]) == args.samples:
                whole, same = whole + 1, same + (len(set(texts.pop(a.prompt))) == 1)
                if whole == same == 16 and args.temperature:
                    print(f"--base-url {args.base_url}: each of the first 16 prompts got one answer {args.samples} times at "
                          f"--temperature {args.temperature:g}; does the server sample? (`transformers serve` does so where the "
                          'model\'s generation_config.json says "do_sample": true)', file=sys.stderr, flush=True)
        if refused:
            print(f"{flag} {args.base_url}: {len(refused)} of {len(wanted)} requests were refused (HTTP 400, 413 or 422; a prompt too "
                  "long for the server?); they are empty, unfinished answers", file=sys.stderr, flush=True)
        yield from (sft.Answer(i, k, "", [], False) for i, k in refused)
    elif args.engine == "vllm":
        from transformers import GenerationConfig
        from vllm import LLM, SamplingParams
        engine = LLM(model=policy, dtype="bfloat16" if args.dtype == "bf16" else "float32")
        stops = sft.stop_tokens(GenerationConfig.from_pretrained(policy))
        for a in range(0, len(wanted), 256):
            part = wanted[a:a + 256]
            made = engine.generate([{"prompt_token_ids": sft.prompt_ids(tokenizer, prompts[i])} for i, _ in part], [
                SamplingParams(temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_new_tokens,
                               seed=(seeds[i] + k) % 2 ** 31, stop_token_ids=sorted(stops)) for i, k in part], use_tqdm=False)
            for (i, k), r in zip(part, made):
                yield sft.answer_of(list(r.outputs[0].token_ids), i, k, stops, tokenizer)
        del engine
    else:
        from transformers import AutoModelForCausalLM
        dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype, use_safetensors=True).to(device)
        softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
        batching = args.batching or ("continuous" if device.type == "cuda" and not softcap else "padded")
        if batching == "continuous" and softcap:
            raise ValueError(f"--batching continuous: transformers' paged attention leaves out {policy}'s soft-capping of attention "
                             f"({softcap:g}); use --batching padded")
        if batching == "padded":
            yield from sft.sample_responses(model, tokenizer, prompts, args.max_new_tokens, seeds=seeds,
                                            rows=args.sampling_rows, **how)
        else:
            drawn = hashlib.sha256(f"{seeds} {sorted(done)}".encode()).hexdigest()      # not the numbers of what is there
            yield from sample_continuously(model, tokenizer, prompts, args.max_new_tokens, rows=args.sampling_rows,
                                           seed=int(drawn[:8], 16) % 2 ** 31, **how)


# ---------------------------------------------------------------------------------------- files that grow
def read_growing(folder: Path, pattern: str) -> list[dict]:
    """Whole lines of all files. A last line without its newline (the process died in it) is no line."""
    lines = (x for path in sorted(folder.glob(pattern)) for x in path.read_bytes().split(b"\n")[:-1])
    return [json.loads(x) for x in lines]


def cut_torn_lines(folder: Path, pattern: str) -> None:
    """Last lines without their newline go, before anyone appends."""
    for path in folder.glob(pattern):
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def resume_growing(folder: Path, name: str, rank: int) -> list[dict]:
    """All rows on disk, the same on every rank; rank 0 cuts torn last lines off first."""
    if rank == 0:
        cut_torn_lines(folder, f"{name}-*.jsonl")
    torch.distributed.barrier()
    rows = read_growing(folder, f"{name}-*.jsonl")
    torch.distributed.barrier()
    return rows


# ------------------------------------------------------------------------------------------ one iteration
def check_stops(model: str, template) -> None:
    """Raises where a model's generation config does not stop at the template's end of turn."""
    from transformers import AutoConfig, GenerationConfig
    try:
        stops = sft.stop_tokens(GenerationConfig.from_pretrained(model))
    except OSError:                                         # no such file: transformers makes one of the config
        stops = sft.stop_tokens(GenerationConfig.from_model_config(AutoConfig.from_pretrained(model)))
    if template.end_of_turn_id not in stops:
        raise ValueError(f"--model {model}: its generation_config.json stops at {sorted(stops, key=str)}, not at the template's "
                         f"{template.end_of_turn} ({template.end_of_turn_id}), so that every answer would run to --max-new-tokens; "
                         "add that id to its eos_token_id")


def read_prompts(args, tokenizer, template, rank: int, log) -> tuple[list[dict], str]:
    """Distinct prompts of --data that leave room to answer: {"key", "prompt", "answer", "source"}; and a data key.
    What is left out is counted."""
    from transformers import AutoConfig
    dataset, key = sft.prepare_rows(args.data, args=args, tokenizer=tokenizer, template=template, rank=rank)
    config = AutoConfig.from_pretrained(args.model)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    names = [source.name for source in data.parse_sources(args.data)]
    rows, equal, long, first = {}, 0, 0, None
    for r in dataset.select_columns(["messages_json", "answer", "source", "row"]):
        messages = json.loads(r["messages_json"])
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        prompt = messages[:last]
        name = data.canonical_hash(prompt)
        size = 0 if context is None else len(sft.prompt_ids(tokenizer, prompt)) + args.max_new_tokens
        if not prompt or name in rows:
            equal += 1
        elif context is not None and size > context:
            long += 1
            first = first or f"{names[r['source']]}, row {r['row']}: {size - args.max_new_tokens} tokens"
        else:
            rows[name] = {"key": name, "prompt": prompt, "answer": r["answer"], "source": names[r["source"]]}
    if long:
        log(f"{long} prompts left out: with --max-new-tokens {args.max_new_tokens} they exceed the model's context of "
            f"{context} (first: {first})")
    if args.engine != "server":
        check_stops(args.model, template)
    if args.judge.endswith((":exact_answer", ":gsm8k_credit")) and rows and all(r["answer"] is None for r in rows.values()):
        raise ValueError(f"--judge {args.judge}: no row of --data has a reference answer to compare with")
    if not rows:
        raise ValueError(f"--data: no prompt is left: {long} are longer than the context of {context} less --max-new-tokens "
                         f"{args.max_new_tokens}" + (f" (first: {first})" if first else ""))
    log(f"{len(rows)} distinct prompts, {equal} repeated ones left out")
    return list(rows.values()), key


def sample_phase(args, folder: Path, policy: str, tokenizer, rows, rank, world, device, iteration) -> dict:
    """Every missing answer of every prompt, appended to answers-RANK.jsonl; returns seconds and tokens of this process."""
    from tqdm import tqdm
    started = time.time()
    at = {r["key"]: i for i, r in enumerate(rows)}
    there = {(at[a["key"]], a["sample"]) for a in resume_growing(folder, "answers", rank)}
    total = len(rows) * args.samples
    open_rows = [i for i in range(len(rows)) if any((i, k) not in there for k in range(args.samples))]
    mine = open_rows[rank::world]
    done = {(n, k) for n, i in enumerate(mine) for k in range(args.samples) if (i, k) in there}
    bar = tqdm(total=len(mine) * args.samples, initial=len(done), disable=rank > 0 or not mine, unit="answer",
               desc=f"sample ({total} in all)", dynamic_ncols=True)
    tokens = 0

    def sample():
        nonlocal tokens
        with open(folder / f"answers-{rank}.jsonl", "a") as file:
            for a in answers_of(args, policy, tokenizer, [rows[i] for i in mine], done, device, iteration):
                file.write(json.dumps({"key": rows[mine[a.prompt]]["key"], "sample": a.sample, "text": a.text,
                                       "tokens": len(a.ids), "finished": a.finished}) + "\n")
                file.flush()
                tokens += len(a.ids)
                bar.update()
                bar.set_postfix_str(f"{tokens / (time.time() - started):.0f} tok/s", refresh=False)
    together(sample if mine else lambda: None, device)
    bar.close()
    release_memory()
    tokens = sft.all_sum([tokens], device)[0]
    return {"seconds": time.time() - started, "tokens": int(tokens)}


def together(work, device) -> None:
    """work() on every rank. Where it fails on one, all of them stop, and none waits for another in vain."""
    failed = ""
    try:
        work()
    except (ValueError, OSError) as error:
        failed = str(error)
    if sft.all_sum([bool(failed)], device)[0]:
        raise ValueError(failed or "another rank failed; its message says why")


def release_memory() -> None:
    """What the last phase left: its model's cycles, and the GPU's cached blocks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def with_answers(folder: Path, rows: list[dict], samples: int) -> list[dict]:
    """Rows with their K answers in order of the samples. Raises where one is missing or there twice."""
    at, out = {r["key"]: i for i, r in enumerate(rows)}, [[None] * samples for _ in rows]
    for a in read_growing(folder, "answers-*.jsonl"):
        if out[at[a["key"]]][a["sample"]] is not None:
            raise ValueError(f"{folder}: answer {a['sample']} of prompt {a['key']} is there twice; delete one of the two lines")
        out[at[a["key"]]][a["sample"]] = a
    if any(a is None for x in out for a in x):
        raise RuntimeError(f"{folder}: answers are missing after sampling")
    return [r | {"answers": x} for r, x in zip(rows, out)]


def judge_phase(args, folder: Path, rows: list[dict], rank, world, device) -> tuple[np.ndarray, dict]:
    """Scores of every prompt's answers, appended to scores-RANK.jsonl: (P, K), and seconds of this process."""
    from tqdm import tqdm
    started, at = time.time(), {r["key"]: i for i, r in enumerate(rows)}
    there = {at[s["key"]] for s in resume_growing(folder, "scores", rank)}
    verdicts = resume_growing(folder, "verdicts", rank)     # of the llm judge: each was paid for
    mine = [i for i in range(len(rows)) if i not in there][rank::world]
    size = 1 if args.judge.startswith("python:") else 16    # prompts a write; a judge of ours gains nothing by many at once

    def score():
        judge = load_judge(args, device, verdicts, folder / f"verdicts-{rank}.jsonl")
        bar = tqdm(total=len(mine), disable=rank > 0, unit="prompt", desc=f"judge {args.judge}", dynamic_ncols=True)
        with open(folder / f"scores-{rank}.jsonl", "a") as file:
            for a in range(0, len(mine), size):
                part = [rows[i] for i in mine[a:a + size]]
                for row, s in zip(part, score_responses(judge, part, args.judge)):
                    file.write(json.dumps({"key": row["key"], "scores": s.tolist()}) + "\n")
                file.flush()
                bar.update(len(part))
        bar.close()
    together(score if mine else lambda: None, device)
    release_memory()
    scores = np.full((len(rows), args.samples), np.nan)
    for s in read_growing(folder, "scores-*.jsonl"):
        scores[at[s["key"]]] = s["scores"]
    return scores, {"seconds": time.time() - started}


@torch.no_grad()
def kl_to_reference(args, policy: str, reference: str, rows, tokenizer, device) -> dict:
    """KL(pi || pi_ref) on pi's own samples (temperature 1): mean over prompts of log pi(y|x) - log pi_ref(y|x), nats an
    answer, with its standard error; and the mean length of those answers in tokens. Each side one forward."""
    from transformers import AutoModelForCausalLM
    prompts = [r["prompt"] for r in rows[:args.kl_prompts]]
    dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype, use_safetensors=True).to(device)
    made = sorted(sft.sample_responses(model, tokenizer, prompts, args.max_new_tokens, temperature=1.0,
                                       seeds=[args.seed + i for i in range(len(prompts))], rows=args.sampling_rows))
    groups = [Group(sft.prompt_ids(tokenizer, p), [a.ids], [[True] * len(a.ids)]) for p, a in zip(prompts, made)]
    del model
    logps = []
    for name in (policy, reference):
        model = sft.load_model(dpo.argparse_with(args, model=name, gradient_checkpointing=False), tokenizer, [])
        model = LogProbs(model.to(device, dtype).eval())
        sums = []
        for g in groups:
            batch = layout([g]).to(device)
            sums.append(sequence_logps(model(batch), batch.sequence, 1).item())
        logps.append(np.array(sums))
        del model
    gap = logps[0] - logps[1]
    return {"kl": float(gap.mean()), "kl_stderr": float(gap.std(ddof=1) / math.sqrt(len(gap))) if len(gap) > 1 else None,
            "length_after": float(np.mean([len(a.ids) for a in made]))}


def iterate(args, iteration: int, policy: str, all_rows, tokenizer, template, rank, world, device, log) -> dict:
    """One iteration, from where its folder stands to its report; {"stopped": True, ..} when SIGTERM asked to stop."""
    folder = Path(args.output) / f"iteration-{iteration}"
    if (folder / "report.json").exists():
        return json.loads((folder / "report.json").read_text())
    order = data.permutation(len(all_rows), args.seed, iteration)[:args.max_prompts]
    rows = [all_rows[i] for i in order]
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        sft.write_rows(folder / "prompts.jsonl", rows)
    torch.distributed.barrier()
    log(f"iteration {iteration}: {len(rows)} prompts x {args.samples} samples of {policy}")
    phases = {"sample": sample_phase(args, folder, policy, tokenizer, rows, rank, world, device, iteration)}
    rows = with_answers(folder, rows, args.samples)
    scores, phases["judge"] = judge_phase(args, folder, rows, rank, world, device)
    pairs, counts = pick_pairs(rows, scores, min_gap=args.min_gap or 0.0, truncated_can_win=args.truncated_can_win,
                               forbidden=[*template.specials, "\ufffd"])      # \ufffd: bytes that are no text
    log(f"{len(pairs)} pairs of {len(rows)} prompts: " + ", ".join(f"{k} {v}" for k, v in counts.items() if v))
    if len(pairs) < world:
        raise ValueError(f"{folder}: {len(pairs)} pairs of {len(rows)} prompts; nothing to train on: " + ", ".join(
            f"{k} {v}" for k, v in counts.items()) + ". Answers and scores are kept. A higher --temperature, more "
            "--samples or --max-new-tokens, or another judge (with another --output) may tell answers apart")
    if rank == 0:
        sft.write_rows(folder / "pairs.jsonl", pairs)
    torch.distributed.barrier()
    started, run = time.time(), folder / "run.json"
    trained = lambda: json.loads(run.read_text()).get("result") if run.exists() else None
    if not trained():
        dpo.train_on_pairs(dpo.argparse_with(
            args, model=policy, ref=None, data=[str(folder / "pairs.jsonl"), *args.mix], output=str(folder), empty_system=0.0,
            min_gap=None, overwrite=False, **dict.fromkeys(FREE - sft.FREE)))    # free here, free there
    if not (trained := trained()):                          # SIGTERM
        return {"stopped": True, "iteration": iteration, "output": str(folder)}
    release_memory()
    phases["train"] = {"seconds": time.time() - started,
                       "tokens": trained["cumulative"]["tokens"] - sft.spent_before(policy, "dpo")["tokens"]}
    if rank == 0:
        after = kl_to_reference(args, str(folder), policy, rows, tokenizer, device) if args.kl_prompts else {}
        report = summary(rows, scores, counts) | after | {
            "iteration": iteration, "policy": policy, "output": str(folder), "pick": counts, "phases": phases,
            **{k: trained.get(k) for k in ("exact_match", "loss", "eval_loss", "accuracy", "eval_accuracy", "pairs", "steps")}}
        sft.write_json(folder / "report.json", report)
    torch.distributed.barrier()
    return json.loads((folder / "report.json").read_text())


def summary(rows, scores, counts: dict) -> dict:
    """What an iteration's answers, scores and pairs look like: shares in 0..1, lengths in tokens."""
    n, k = scores.shape
    length = np.array([[a["tokens"] for a in r["answers"]] for r in rows], dtype=float)
    best, worst = scores.argmax(1), scores.argmin(1)
    pick = np.arange(n)
    distinct = [len({a["text"].strip() for a in r["answers"]}) / k for r in rows]
    return {"yield": counts["pairs"] / n, "tie_rate": (counts["tie"] + counts["all_equal"]) / n,
            "truncation_rate": counts["truncated_answers"] / (n * k), "distinct": float(np.mean(distinct)),
            "score_all": float(scores.mean()), "score_best": float(scores.max(1).mean()),
            "score_worst": float(scores.min(1).mean()), "length": float(length.mean()),
            "length_best": float(length[pick, best].mean()), "length_worst": float(length[pick, worst].mean())}


# ------------------------------------------------------------------------------------------------ report
COLUMNS = {"iteration": "iteration", "pairs": "pairs", "yield": "yield", "tie_rate": "ties", "truncation_rate": "truncated",
           "distinct": "distinct", "score_all": "score", "score_best": "best", "score_worst": "worst", "length": "tokens",
           "length_best": "best's", "length_worst": "worst's", "length_after": "after", "kl": "KL (nats)",
           "exact_match": "exact match"}


def report_table(reports: list[dict]) -> str:
    show = lambda v: "-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v)
    lines = ["| " + " | ".join(COLUMNS.values()) + " | seconds: sample, judge, train |", "|" + "---|" * (len(COLUMNS) + 1)]
    lines += ["| " + " | ".join(show(r.get(k)) for k in COLUMNS) + " | " + ", ".join(
        f"{r['phases'][p]['seconds']:.0f}" for p in ("sample", "judge", "train")) + " |" for r in reports]
    return "\n".join(lines) + "\n\nTokens are mean lengths of answers; 'after' those of the trained policy at temperature 1, " \
        "on which KL to the policy that sampled is taken.\n"


def plot_report(path: Path, reports: list[dict]) -> None:
    """Six panels over iterations: a drift of length or a collapse of diversity shows at a glance."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = {"pairs and ties (share of prompts), cut answers": {"yield": "yield", "tie_rate": "ties", "truncation_rate": "truncated"},
              "judge's score": {"score_best": "best", "score_all": "all", "score_worst": "worst"},
              "answer length (tokens)": {"length_best": "best", "length": "all", "length_worst": "worst", "length_after": "after training"},
              "different answers (share of K)": {"distinct": "distinct"},
              "KL to the policy that sampled (nats)": {"kl": "KL"}, "exact match, held out": {"exact_match": "exact match"}}
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    for ax, (title, lines) in zip(axes.flat, panels.items()):
        for key, name in lines.items():
            seen = [(r["iteration"], r[key]) for r in reports if r.get(key) is not None]
            if seen:
                ax.plot(*zip(*seen), "o-", ms=5, label=name)
        ax.set(xlabel="iteration", title=title)
        ax.set_xticks([r["iteration"] for r in reports])
        if ax.lines:
            low, high = ax.get_ylim()
            ax.set_ylim(min(0.0, low), high + 0.05 * (high - min(0.0, low)))    # from 0: a drift shows in its true proportion
            ax.legend()
        else:
            ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------- flags
def parser():
    p = dpo.parser()
    p.description = __doc__
    p.set_defaults(batch_size=32, judge="pairrm", max_new_tokens=2048)
    add = p.add_argument_group("stage 3: sampling").add_argument
    add("--samples", type=int, default=5, help="K, answers a prompt")
    add("--temperature", type=float, default=0.8, help="0: greedy")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that hold this much; 1: all")
    add("--max-prompts", type=int, help="prompts an iteration, the first N of its own permutation; None: all")
    add("--iterations", type=int, default=1, help="rounds of sampling, judging and training")
    add("--engine", choices=["hf", "vllm", "server"], default="hf")
    add("--batching", choices=["padded", "continuous"], help="hf engine; None: continuous on CUDA, padded on a CPU")
    add("--sampling-rows", type=int, default=64, help="answers in work at once on the hf engine")
    add("--base-url", help="server engine: an OpenAI-compatible endpoint, http://HOST:PORT/v1; key: SERVER_API_KEY")
    add("--served-model", help="server engine: the model's name there; None: --model")
    add("--concurrency", type=int, default=16, help="requests at once")
    add("--timeout", type=float, default=600, help="seconds a request may stay silent")
    add("--retries", type=int, default=6, help="further tries of a request, each after twice the wait")
    add = p.add_argument_group("stage 3: judge and pairs").add_argument
    add("--judge", help="pairrm[:MODEL], reward:MODEL, llm:MODEL or python:FILE:FUNCTION")
    add("--judge-url", help="llm judge: an OpenAI-compatible endpoint; key: OPENAI_API_KEY")
    add("--judge-template", help="llm judge: a file with {prompt}, {answer_a}, {answer_b} that asks for [[A]], [[B]] or [[C]]")
    add("--judge-tokens", type=int, default=16384, help="tokens a judge's batch, with padding")
    add("--truncated-can-win", action="store_true", help="answers cut by --max-new-tokens may be chosen")
    add("--mix", nargs="+", default=[], help="original pairs to train on as well, NAME[:split][=fraction]")
    add("--kl-prompts", type=int, default=64, help="prompts that KL to the reference is estimated on; 0: none")
    return p


def check_flags(args) -> list[str]:
    args.output = args.output or "runs/online-dpo"
    why = dpo.check_flags(args)
    if args.model == "runs/dpo" and not Path(args.model).is_dir():
        why = [w for w in why if not w.startswith("--model runs/dpo:")] + [
            "--model runs/dpo: no such folder; run python sft.py and python dpo.py first"]
    flag = lambda f: f"--{f.replace('_', '-')} {getattr(args, f)}"
    if args.samples < 2:
        why.append(f"--samples {args.samples}: best against worst needs at least 2")
    why += [f"{flag(f)}: must be above 0" for f in ("max_new_tokens", "iterations", "sampling_rows", "concurrency", "timeout",
                                                    "judge_tokens") if not getattr(args, f) > 0]
    why += [f"{flag(f)}: must not be below 0" for f in ("temperature", "retries", "kl_prompts") if getattr(args, f) < 0]
    if args.max_prompts is not None and args.max_prompts <= 0:
        why.append(f"{flag('max_prompts')}: must be above 0, or left out")
    if not 0 < args.top_p <= 1:
        why.append(f"{flag('top_p')}: must lie in (0, 1]")
    if args.ref:
        why.append(f"{flag('ref')}: the reference of online DPO is the policy that samples; leave it out")
    if args.engine == "server" and not args.base_url:
        why.append("--engine server: needs --base-url, an endpoint like http://localhost:8000/v1")
    if args.engine == "server" and args.iterations > 1:
        why.append("--iterations with --engine server: the server keeps serving the first policy; run one iteration, serve "
                   "its output, and run again with --model and another --output")
    if args.engine == "vllm" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        why.append("--engine vllm: runs in one process; with several, use --engine server and `vllm serve`")
    kind, _, name = args.judge.partition(":")
    why += [f"{flag(f)}: without effect, it belongs to {owner}" for f, owner, there in (
        ("base_url", "--engine server", args.engine == "server"), ("served_model", "--engine server", args.engine == "server"),
        ("batching", "--engine hf", args.engine == "hf"), ("judge_url", "--judge llm:MODEL", kind == "llm"),
        ("judge_template", "--judge llm:MODEL", kind == "llm")) if getattr(args, f) and not there]
    if kind not in ("pairrm", "reward", "llm", "python") or (kind != "pairrm" and not name):
        why.append(f"--judge {args.judge}: not pairrm[:MODEL], reward:MODEL, llm:MODEL or python:FILE:FUNCTION")
    elif kind == "python":
        try:
            judge_function(name)
        except ValueError as error:
            why.append(str(error))
    elif kind == "llm":
        if not args.judge_url:
            why.append(f"--judge {args.judge}: needs --judge-url, an OpenAI-compatible endpoint")
        if not args.judge_template or not Path(args.judge_template).is_file():
            why.append(f"--judge-template {args.judge_template}: the llm judge needs a file")
        elif any("{" + k + "}" not in Path(args.judge_template).read_text() for k in ("prompt", "answer_a", "answer_b")):
            why.append(f"--judge-template {args.judge_template}: must hold {{prompt}}, {{answer_a}} and {{answer_b}}")
        else:                                               # a flag of its own: a run goes on under the same text alone
            args.judge_template_hash = hashlib.sha256(Path(args.judge_template).read_bytes()).hexdigest()[:16]
    return why


# -------------------------------------------------------------------------------------------------- main
def main(argv=None) -> dict:
    args = sft.parse(argv, parser, PRESETS, check_flags)
    started, out = time.time(), Path(args.output)
    rank, world, device = sft.init_distributed()
    log = lambda *a: print(*a, file=sys.stderr, flush=True) if rank == 0 else None
    tokenizer, template = sft.load_tokenizer(args)
    rows, data_key = read_prompts(args, tokenizer, template, rank, log)
    data_key += dpo.weights_hash(args.model)[:8]
    if args.overwrite:
        torch.distributed.barrier()
        if rank == 0:
            import shutil
            shutil.rmtree(out, ignore_errors=True)
        torch.distributed.barrier()
    sft.check_resume(args, out, world, data_key, FREE)
    torch.distributed.barrier()
    run = {"stage": "online-dpo", "flags": vars(args), "world": world, "git": sft.git_commit(), "data": data_key,
           "prompts": len(rows), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        sft.write_json(out / "run.json", run)
    reports, policy = [], args.model
    for iteration in range(1, args.iterations + 1):
        report = iterate(args, iteration, policy, rows, tokenizer, template, rank, world, device, log)
        if report.get("stopped"):
            return report if rank == 0 else {}
        reports.append(report)
        policy = report["output"]
        if rank == 0:
            (out / "report.md").write_text(report_table(reports))
            plot_report(out / "report.png", reports)
    log(report_table(reports))
    result = {k: v for k, v in reports[-1].items() if k not in ("phases", "pick")} | {
        "iterations": len(reports), "phases": [r["phases"] for r in reports], "seconds": time.time() - started}
    if rank == 0:
        sft.write_json(out / "run.json", run | {"result": result})
    return result if rank == 0 else {}


if __name__ == "__main__":
    sft.run_main(main)
