"""Any conversation or preference source becomes rows of ids and masks: formats, template, dedup, packing, selection.

One path for everything: source -> conversation (a pair: two that differ in their last turn) -> one line of JSON each ->
exact dedup across sources -> rendered once -> tokenised once with offsets -> ids and a target mask from character
spans -> packed rows, or pairs with their common prompt. Nothing is dropped silently: duplicates, truncation and refused
rows are counted by source and reason. A killed command goes on when called again.

    python data.py show --data FILE.jsonl --model DIR          rows with the trained tokens marked (--pairs: of pairs)
    python data.py stats --data A.jsonl B.parquet=0.5          examples and tokens per source
    python data.py dedup --near --data A.jsonl B.jsonl         equal and near rows go, the first stays
    python data.py decontaminate --against BENCH.jsonl --remove --data A.jsonl
    python data.py select --pairs --method a2 --budget 10000 --data PAIRS.jsonl
    python data.py annotate --rm MODEL --data RATED.jsonl UNRATED.jsonl

Sources: a Hub id, .jsonl / .jsonl.gz / .parquet / .csv, a save_to_disk folder, `demo`, `demo-pairs` or a mix (MIXES);
written NAME[:split][=fraction]. Formats are recognised by their columns (FORMATS, PAIR_FORMATS, SCALES of ratings).
"""
from __future__ import annotations

import argparse
import array
import bisect
import collections
import contextlib
import csv
import ctypes
import fcntl
import functools
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import unicodedata
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np


# ------------------------------------------------------------------------------------------ sources
class Source(NamedTuple):
    name: str
    split: str = "train"
    fraction: float = 1.0


# Named mixes of --data: the sources of the paper's Table of SFT data and of its DPO mixtures, fractions as in the
# authors' configs. lion-dpo-study: UltraFeedback, HH-RLHF and TLDR are the paper's, the rest of its 264K pairs is not
# published: the other three and HH's half are our choice of that size. ruozhiba_en (release only) is left out.
ULTRAFEEDBACK, TLDR = "HuggingFaceH4/ultrafeedback_binarized:train_prefs", "CarperAI/openai_summarize_comparisons"
SMALL_PAIRS = ["argilla/distilabel-capybara-dpo-7k-binarized", "argilla/distilabel-intel-orca-dpo-pairs",
               "jondurbin/py-dpo-v0.1"]
SERIES_PAIRS = [*SMALL_PAIRS, ULTRAFEEDBACK, "nvidia/HelpSteer", "PKU-Alignment/PKU-SafeRLHF=0.1"]
DEITA_10K = "HuggingFaceH4/deita-10k-v0-sft:train_sft"
LARGE_SFT = ["teknium/OpenHermes-2.5", "meta-math/MetaMathQA", "HuggingFaceH4/ultrachat_200k:train_sft"]
MIXES = {
    "lion-sft": [*LARGE_SFT, "Open-Orca/SlimOrca-Dedup", "microsoft/orca-math-word-problems-200k", "LDJnr/Capybara",
                 DEITA_10K, "ise-uiuc/Magicoder-Evol-Instruct-110K"],
    "lion-sft-1.6m": LARGE_SFT,
    "deita-10k": [DEITA_10K],
    "lion-dpo-study": [ULTRAFEEDBACK, "Anthropic/hh-rlhf=0.5", TLDR, *SMALL_PAIRS],
    "lion-dpo-gemma": [*SERIES_PAIRS, f"{TLDR}=0.1", "berkeley-nest/Nectar=0.25"],
    "lion-dpo-llama": [*SERIES_PAIRS, "berkeley-nest/Nectar"]}


def parse_source(text: str) -> Source:
    """'NAME[:split][=fraction]' -> Source. What exists as a path is a path, colons and all."""
    name, fraction, split = text, 1.0, "train"
    if not os.path.exists(name) and "=" in name:
        name, share = name.rsplit("=", 1)
        try:
            fraction = float(share)
        except ValueError:
            fraction = -1.0
        if not 0 < fraction <= 1:
            raise ValueError(f"--data {text}: the fraction after '=' must lie in (0, 1], not {share!r}")
    if not os.path.exists(name) and ":" in name:
        name, split = name.rsplit(":", 1)
    return Source(name, split, fraction)


def parse_sources(texts: list[str]) -> list[Source]:
    """Every --data text as a Source; a mix becomes its sources, a fraction of it that fraction of each."""
    found = []
    for text in texts:
        one = parse_source(text)
        if one.name not in MIXES or os.path.exists(one.name):
            found.append(one)
        elif one.split != "train":
            raise ValueError(f"--data {text}: a mix names its own splits; write {one.name}")
        else:
            found += [s._replace(fraction=s.fraction * one.fraction) for s in map(parse_source, MIXES[one.name])]
    return found


def read_lines(path: str):
    """(line number, row) of a .jsonl or .jsonl.gz file; blank lines are skipped but counted."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
        for n, line in enumerate(f, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{n}: not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}:{n}: a row must be a JSON object, not {type(row).__name__}")
                yield n, row


def local_kind(name: str) -> str | None:
    for ending in (".jsonl", ".jsonl.gz", ".parquet", ".csv"):
        if name.endswith(ending):
            return ending
    return "folder" if os.path.isdir(name) else None


def load_source(source: Source):
    """The rows of a source, one after the other: (line or row number, dict)."""
    kind = local_kind(source.name)
    if source.name in DEMO_ROWS:
        sizes = DEMO_ROWS[source.name]
        if source.split not in sizes:
            raise ValueError(f"--data {source.name}:{source.split}: the splits are {', '.join(sizes)}")
        make = demo_pairs if source.name == "demo-pairs" else demo_conversations
        yield from enumerate(make(sizes[source.split], 0, source.split), 1)
    elif kind in (".jsonl", ".jsonl.gz"):
        yield from read_lines(source.name)
    elif kind == ".csv":
        csv.field_size_limit(sys.maxsize)
        with open(source.name, newline="") as f:
            yield from enumerate(csv.DictReader(f), 2)
    else:
        yield from enumerate(load_table(source), 1)


def load_table(source: Source):
    """A parquet file, a save_to_disk folder or a Hub data set as a memory-mapped datasets.Dataset."""
    import datasets
    kind = local_kind(source.name)
    if kind == ".parquet":
        return datasets.Dataset.from_parquet(source.name, keep_in_memory=False)
    if kind == "folder":
        found = datasets.load_from_disk(source.name)
        return found[source.split] if isinstance(found, datasets.DatasetDict) else found
    return datasets.load_dataset(source.name, split=source.split)


def hash_file(digest, path) -> None:
    """A file's content into a hashlib digest, block by block."""
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)


def fingerprint(source: Source) -> str:
    """A hash of the source's content, so that a changed file is never served from a cache."""
    digest, kind = hashlib.sha256(repr(source).encode()), local_kind(source.name)
    paths = sorted(p for p in Path(source.name).rglob("*") if p.is_file()) if kind == "folder" else \
        [Path(source.name)] if kind else []
    for path in paths:
        hash_file(digest, path)
    if not kind and source.name not in DEMO_ROWS:
        digest.update(load_table(source)._fingerprint.encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ formats
class Pair(NamedTuple):
    prompt: list[dict]             # [{role, content}], all that both answers follow
    chosen: str                    # y_w
    rejected: str                  # y_l
    score_chosen: float | None = None
    score_rejected: float | None = None
    answer: str | None = None      # reference answer for exact match
    unfinished: tuple = ()         # "chosen", "rejected": answers that a length limit cut; they have no end of turn


class Conversation(NamedTuple):
    messages: list[dict]           # [{role, content}]
    last_only: bool = False        # train the last assistant turn only (a preference row's chosen)
    answer: str | None = None      # reference answer for exact match
    unfinished: bool = False       # the last turn was cut where it was sampled: no end of turn is forged


def with_answer(pair: Pair, which: str) -> Conversation:
    """The pair's prompt and its `which` answer, chosen or rejected, the one turn that trains."""
    return Conversation(pair.prompt + [{"role": "assistant", "content": getattr(pair, which)}], True, pair.answer,
                        which in pair.unfinished)


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
         "system": "system"}


def turns(raw, role: str = "role", content: str = "content") -> list[dict]:
    if isinstance(raw, str):
        raise ValueError("messages are text, not a list")
    out = []
    for m in raw or []:
        if role not in m:
            role, content = ("from", "value") if "from" in m else ("role", "content")
        if m.get(role) not in ROLES:
            raise ValueError("unknown role")
        out.append({"role": ROLES[m[role]], "content": m.get(content)})
    return out


def ask(question: str, answer: str, system: str = "") -> list[dict]:
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def transcript(text: str) -> list[dict]:
    """HH-RLHF: '\\n\\nHuman: ..' and '\\n\\nAssistant: ..' turns."""
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if parts[0].strip():
        raise ValueError("text before the first turn")
    return [{"role": ROLES["human" if who == "Human" else "gpt"], "content": said.strip()}
            for who, said in zip(parts[1::2], parts[2::2])]


def reference(row) -> str | None:
    """The row's reference answer for exact match, where it has one."""
    return None if row.get("answer") is None else str(row["answer"])


def from_messages(row):
    return Conversation(turns(row["messages"]), row.get("last_only") is True, reference(row), row.get("unfinished") is True)


def from_sharegpt(row):
    return Conversation(turns(row["conversations"], "from", "value"))


def from_instruction(row):
    given = row.get("input") or ""
    return Conversation(ask(f"{row['instruction']}\n\n{given}" if given else row["instruction"], row["output"]))


def from_response(asked: str, row):
    """MetaMathQA (query), Magicoder (instruction), HelpSteer's single rows (prompt)."""
    return Conversation(ask(row[asked], row["response"]))


def from_question(row):
    answer = row["answer"]
    return Conversation(ask(row["question"], answer), False,
                        final_answer(answer) if isinstance(answer, str) and "####" in answer else None)


def from_exchanges(row):
    """Capybara: a list of {input, output}."""
    return Conversation([m for x in row["conversation"] for m in ask(x["input"], x["output"])])


# A source's ratings reach one scale of 1 to 10, on which A2's cut of 2 and AlpaGasus' 4.5 of 5 (8.875) count, by
# 1 + 9 (r - low) / (high - low). None: they stand as they are. Sources without a line here have no rating and get none:
# HH-RLHF, TLDR (a rater's confidence is not an answer's rating), PKU-SafeRLHF, py-dpo.
SCALES = {
    "rating": (1, 10),             # Orca pairs by Argilla: [two ratings], the better one is the chosen answer's
    "score_{}": None,              # UltraFeedback binarized: overall score, 1 to 10 already; TRL's and our own files
    "{}_score": None,
    "{}-rating": (1, 5),           # UltraFeedback cleaned by Argilla: mean of four aspects
    "rating_{}": (1, 5),           # Capybara-DPO
    "rank": None,                  # Nectar: orders answers, never becomes a score
    "completions": (1, 5),         # UltraFeedback raw: mean of all four aspects
    "responses": (0, 4)}           # HelpSteer: mean of these three; complexity and verbosity are style
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
HELPSTEER = ("helpfulness", "correctness", "coherence")


def on_ten(value, column: str) -> float | None:
    """A rating on the scale of 1 to 10 by its column's line in SCALES; None, NaN, "" and N/A are a missing one.
    3 of 1..5 is 5.5. ValueError for what is no number or outside its scale."""
    if value is None or value in ("", "N/A") or value != value:
        return None
    try:
        r = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        r = math.nan
    low, high = SCALES[column] or (-sys.float_info.max, sys.float_info.max)
    if r != r and str(value).strip().lower() == "nan":
        return None
    if not low <= r <= high:
        raise ValueError("a rating is no number" + (f" of {low}..{high}" if SCALES[column] else ""))
    return r if SCALES[column] is None else 1 + 9 * (r - low) / (high - low)


def ratings_of(row) -> list:
    """[chosen's, rejected's] ratings of 1 to 10, None where there is none."""
    if isinstance(row.get("rating"), (list, tuple)):
        both = [on_ten(r, "rating") for r in row["rating"]]
        return [max(both), min(both)] if len(both) == 2 and None not in both else [None, None]
    for column in [c for c in SCALES if "{}" in c]:
        both = [on_ten(row.get(column.format(which)), column) for which in ("chosen", "rejected")]
        if both != [None, None]:
            return both
    return [None, None]


def side(row, which: str) -> list[dict]:
    """The whole conversation that ends in the `which` answer: chosen or rejected; prompt given or not. Orca pairs
    call it question or input, and a system turn may stand beside it."""
    said = row[which]
    prompt = next((row[k] for k in ("prompt", "question", "input") if row.get(k) is not None), None)
    if isinstance(said, str):
        if prompt is None or said.startswith(f"{prompt}\n\nAssistant:"):
            return transcript(said)
        return ask(prompt, said, row.get("system") or "") if isinstance(prompt, str) else \
            turns(prompt) + [{"role": "assistant", "content": said}]
    said = turns(said)
    if isinstance(prompt, str) and said and said[0]["role"] == "assistant":
        said = ask(prompt, "", row.get("system") or "")[:-1] + said
    elif prompt is not None and not isinstance(prompt, str):
        said = turns(prompt) + said
    return said


def from_preference(row):
    """prompt + chosen, its last turn as the target (the paper's 'SFT on chosen')."""
    return Conversation(side(row, "chosen"), True, reference(row), "chosen" in (row.get("unfinished") or ()))


def pair_from_preference(row):
    """Two conversations that differ in their last turn: UltraFeedback, HH-RLHF, py-dpo, Orca, Capybara, TRL's."""
    chosen, rejected = side(row, "chosen"), side(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("the histories of chosen and rejected differ")
    if not chosen or not rejected or {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        raise ValueError("an answer is missing")
    return Pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], *ratings_of(row), reference(row),
                tuple(row.get("unfinished") or ()))


def draw(text: str, n: int) -> int:
    """One of 0..n-1 by a hash of the text: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % n


def best_against_drawn(prompt: str, rated: list[tuple]) -> list[tuple]:
    """The best of (rating or None, answer), the first of equals, against one drawn among the strictly worse that are
    neither empty nor equal to it."""
    rated = [x for x in rated if x[0] is not None]
    if len(rated) < 2:
        raise ValueError("fewer than two rated answers")
    best = max(rated, key=lambda x: x[0])
    worse = [x for x in rated if x[0] < best[0]]
    if not worse:
        raise ValueError("all ratings tie")
    said = lambda x: x[1].strip() if isinstance(x[1], str) else ""
    worse = [x for x in worse if said(x) not in ("", said(best))]
    if not worse:
        raise ValueError("every worse answer is empty or equals the best")
    return [best, worse[draw(prompt, len(worse))]]


def pair_of_rated(asked: str, column: str, answers) -> Pair:
    """Of (ratings, answer) the best against one drawn, by the mean of an answer's ratings on the scale of 1 to 10; an
    answer that lacks one of them is unrated."""
    on = [([on_ten(r, column) for r in ratings], y) for ratings, y in answers]
    (r_w, y_w), (r_l, y_l) = best_against_drawn(asked, [(None if None in r else sum(r) / len(r), y) for r, y in on])
    return Pair(ask(asked, "")[:1], y_w, y_l, r_w, r_l)


def pair_from_completions(row):
    """UltraFeedback raw: a completion's rating is the mean of its four aspects (its overall_score is known to hold
    10s that were meant as 1s); best against drawn."""
    return pair_of_rated(row["instruction"], "completions", [
        ([(a.get(k) or {}).get("Rating") for k in ASPECTS], c["response"])
        for c in row["completions"] for a in [c["annotations"] or {}]])


def pair_from_responses(row):
    """HelpSteer: all responses to a prompt (`read_source` gathers them), best against drawn."""
    return pair_of_rated(row["prompt"], "responses", [(map(r.get, HELPSTEER), r["response"]) for r in row["responses"]])


def pair_from_ranks(row):
    """Nectar: rank 1 of seven against one drawn among the lower ranks. A rank is no rating: no scores."""
    rated = [(None if rank is None else -rank, a["answer"])
             for a in row["answers"] for rank in [on_ten(a.get("rank"), "rank")]]
    (_, y_w), (_, y_l) = best_against_drawn(row["prompt"], rated)
    said = row["prompt"].removesuffix(" ").removesuffix("\n\nAssistant:")
    return Pair(transcript(said) if "\n\nHuman:" in f"\n\n{said}" else ask(said, "")[:1], y_w, y_l)


def pair_from_safety(row):
    """PKU-SafeRLHF: the better response against the other, where the better one is the safer one, too."""
    better, safer = row["better_response_id"], row["safer_response_id"]
    if better not in (0, 1) or safer not in (0, 1):
        raise ValueError("no better or safer response is named")
    if better != safer:
        raise ValueError("the better response is not the safer one")
    return Pair(ask(row["prompt"], "")[:1], row[f"response_{int(better)}"], row[f"response_{1 - int(better)}"])


def pair_from_summaries(row):
    """TLDR comparisons: the summary that the rater chose against the other."""
    info, choice = row["info"], row["choice"]
    if choice not in (0, 1) or len(row["summaries"]) != 2 or not info.get("post"):
        raise ValueError("no post, choice or second summary")
    text = f"SUBREDDIT: r/{info.get('subreddit')}\nTITLE: {info.get('title')}\nPOST: {info['post']}\nTL;DR:"
    return Pair(ask(text, "")[:1], *(row["summaries"][i]["text"] for i in (int(choice), 1 - int(choice))))


def pair_from_solutions(row):
    """GSM8K's example_model_solutions: a right solution against a wrong one, each drawn by a hash of the
    question among those of its kind."""
    made = {True: [], False: []}
    for name in sorted(row):
        if isinstance(row[name], dict) and "is_correct" in row[name]:
            made[bool(row[name]["is_correct"])].append(row[name]["solution"])
    if not made[True] or not made[False]:
        raise ValueError("no right and wrong solution")
    byte = hashlib.sha256(row["question"].encode()).digest()
    right, wrong = (made[k][byte[i] % len(made[k])] for i, k in enumerate((True, False)))
    return Pair([{"role": "user", "content": row["question"]}], right, wrong)


PAIR_FORMATS = [({"chosen", "rejected"}, pair_from_preference),
                ({"instruction", "completions"}, pair_from_completions),
                ({"prompt", "answers"}, pair_from_ranks), ({"prompt", "responses"}, pair_from_responses),
                ({"prompt", "response_0", "response_1"}, pair_from_safety),
                ({"info", "summaries", "choice"}, pair_from_summaries),
                ({"question", "ground_truth"}, pair_from_solutions)]
FORMATS = [({"messages"}, from_messages), ({"conversations"}, from_sharegpt), ({"chosen"}, from_preference),
           ({"conversation"}, from_exchanges), ({"instruction", "output"}, from_instruction),
           *(({k, "response"}, functools.partial(from_response, k)) for k in ("instruction", "query", "prompt")),
           ({"question", "answer"}, from_question),
           *((needed, lambda row, make=make: with_answer(make(row), "chosen"))
             for needed, make in PAIR_FORMATS[1:])]           # read by sft.py: prompt + chosen, its last turn trained


def find_format(columns, where: str | None, formats):
    for needed, convert in formats:
        if needed <= set(columns):
            return convert
    if where is None:
        raise ValueError(f"unknown columns {', '.join(sorted(map(str, columns)))}")
    known = "; ".join("+".join(sorted(needed)) for needed, _ in formats)
    raise ValueError(f"{where}: columns {sorted(columns)} are no known format. Known: {known}")


def convert_row(row: dict, formats):
    """By the first format whose columns the row has. ValueError(short reason) for one that lacks what it needs."""
    try:
        return find_format(row, None, formats)(row)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"malformed row ({type(error).__name__}: {error})") from None


def checked(c: Conversation) -> Conversation:
    """The conversation, or ValueError(short reason) where its turns cannot be trained on."""
    if not c.messages:
        raise ValueError("empty conversation")
    if any(not isinstance(m["content"], str) for m in c.messages):
        raise ValueError("content is not text")
    try:
        "".join([*(m["content"] for m in c.messages), c.answer or ""]).encode()
    except UnicodeEncodeError:                              # a lone surrogate
        raise ValueError("text is not valid Unicode") from None
    if any(not m["content"].strip() for m in c.messages if m["role"] != "system"):
        raise ValueError("empty turn")
    said = [m["role"] for m in c.messages[c.messages[0]["role"] == "system":]]
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(said)):
        raise ValueError("role order broken")
    if "assistant" not in said or (c.last_only and said[-1] != "assistant"):
        raise ValueError("no assistant turn")
    return c


def to_conversation(row: dict) -> Conversation:
    """A raw row of any known format, checked. ValueError(short reason) when it is refused."""
    return checked(convert_row(row, FORMATS))


def to_pair(row: dict) -> Pair:
    """A raw row of any known preference format, checked. ValueError(short reason) when it is refused."""
    pair = convert_row(row, PAIR_FORMATS)
    for which in ("chosen", "rejected"):
        checked(with_answer(pair, which))
    if pair.chosen.strip() == pair.rejected.strip():
        raise ValueError("chosen equals rejected")
    return pair


def final_answer(text: str) -> str:
    """What exact match compares: the text after the last '####' (GSM8K), else all of it; stripped."""
    return text.rsplit("####", 1)[-1].strip()


# ----------------------------------------------------------------------------------------- template
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


class Template(NamedTuple):
    end_of_turn: str               # text of the token that ends an assistant turn
    end_of_turn_id: int
    new_tokens: list[str]          # tokens that the vocabulary lacked
    specials: list[str]            # every special token's text: user text must hold none of them
    bos: bool                      # whether a document starts with a BOS


def adds_bos(tokenizer) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]


def render(tokenizer, messages, **kwargs) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def set_template(tokenizer, chat_template: str = "chatml") -> Template:
    """Give the tokenizer its template: 'chatml' (above), 'tokenizer' (its own) or a jinja file; add the
    special tokens it lacks; check on a probe that assistant text appears and its end is a special token."""
    if not tokenizer.is_fast:
        raise ValueError(f"--model: {type(tokenizer).__name__} is slow and gives no offsets; masks need them")
    new = []
    if chat_template == "chatml":
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos(tokenizer) else "") + CHATML
        new = [t for t in ("<|im_start|>", "<|im_end|>") if t not in tokenizer.get_vocab()]
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
                                     replace_extra_special_tokens=False)
    elif chat_template != "tokenizer":
        if not os.path.isfile(chat_template):
            raise ValueError(f"--chat-template {chat_template}: not chatml, tokenizer or a file that exists")
        tokenizer.chat_template = Path(chat_template).read_text()
    elif not tokenizer.chat_template:
        raise ValueError("--chat-template tokenizer: this tokenizer has no chat template; use chatml")
    a, b = "\ue100first\ue101", "\ue100second\ue101"
    text = render(tokenizer, ask("q", a) + ask("r", b))
    if a not in text or b not in text:
        raise ValueError(f"--chat-template {chat_template}: it drops the assistant text")
    ends, specials = set(), sorted({t.content for t in tokenizer.added_tokens_decoder.values() if t.special} |
                                   set(tokenizer.all_special_tokens))
    for tail in (text.split(a, 1)[1], text.split(b, 1)[1]):
        found = [t for t in specials if t and tail.lstrip().startswith(t)]
        ends.add(max(found, key=len) if found else None)
    if len(ends) != 1 or None in ends:
        raise ValueError(f"--chat-template {chat_template}: it never trains an end of turn: after an "
                         "assistant turn it must write one special token, the same each time")
    end = ends.pop()
    return Template(end, tokenizer.convert_tokens_to_ids(end), new, specials, adds_bos(tokenizer))


class Encoded(NamedTuple):
    input_ids: list[int]
    targets: list[bool]            # which tokens are scored; never the first
    truncated: int                 # tokens cut


def encode(conversation: Conversation, tokenizer, template: Template, *, max_length: int | None = None,
           loss_on: str = "assistant") -> Encoded:
    """Ids and target mask of a conversation, by one rendering and one tokenisation.

    Assistant contents are replaced by sentinels, the template is rendered and split there, so that the
    spans of the true contents are known to the character. A token is a target when any of its
    characters lies in an assistant's content or end of turn (loss_on 'all': every token but the first).
    BOS stands once, first, where the tokenizer uses one. Tokens beyond max_length are cut from the end;
    an EOS is never forged. ValueError(short reason) when the row is refused.
    """
    messages = conversation.messages
    if any(s in m["content"] for m in messages for s in template.specials):
        raise ValueError("special token in the text")
    marks = {i: f"\ue100{i}\ue101" for i, m in enumerate(messages) if m["role"] == "assistant"}
    parts, rest = [], render(tokenizer, [{**m, "content": marks.get(i, m["content"])}
                                         for i, m in enumerate(messages)])
    for mark in marks.values():
        if rest.count(mark) != 1:
            raise ValueError("template does not show the assistant text once")
        before, rest = rest.split(mark)
        parts.append(before)
    true = render(tokenizer, messages)
    for contents in ([messages[i]["content"] for i in marks], [messages[i]["content"].strip() for i in marks]):
        text, spans = "", []
        for before, content, after in zip(parts, contents, parts[1:] + [rest]):
            text += before
            end = after.find(template.end_of_turn)
            if end < 0 or after[:end].strip():
                raise ValueError("no end of turn after an assistant turn")
            spans.append((len(text), len(text) + len(content) + end + len(template.end_of_turn)))
            text += content
        if text + rest == true:
            break
    else:
        raise ValueError("template rewrites the assistant text")
    made = tokenizer(true, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets, bos = list(made.input_ids), list(made.offset_mapping), tokenizer.bos_token_id
    if template.bos and ids[:1] != [bos]:
        ids, offsets = [bos] + ids, [(0, 0)] + offsets
    if bos is not None and bos != template.end_of_turn_id and ids[:2] == [bos, bos]:
        raise ValueError("two BOS tokens")
    targets = [False] * len(ids)
    for a, b in spans[-1:] if conversation.last_only else spans:
        first = bisect.bisect_right(offsets, a, key=lambda o: o[1])                 # offsets never fall
        end = bisect.bisect_left(offsets, b, key=lambda o: o[0])
        if first >= end or offsets[first][0] > a or ids[end - 1] != template.end_of_turn_id:
            raise ValueError("mask does not cover the assistant text")
        targets[first:end] = [True] * (end - first)
    if loss_on == "all":
        targets = [True] * len(ids)
    if conversation.unfinished:
        ids, targets = ids[:end - 1], targets[:end - 1]
    targets[0] = False
    cut = max(0, len(ids) - max_length) if max_length else 0
    ids, targets = ids[:len(ids) - cut], targets[:len(ids) - cut]
    if not any(targets):
        raise ValueError("no target left after truncation" if cut else "no target")
    return Encoded(ids, targets, cut)


class EncodedPair(NamedTuple):
    prompt: list[int]              # x: what both answers share
    chosen: list[int]              # y_w, with the tokens before it that straddle
    rejected: list[int]
    chosen_targets: list[bool]     # which tokens of `chosen` are scored
    rejected_targets: list[bool]
    cut: int                       # tokens cut from the prompt and from both answers


def encode_pair(pair: Pair, tokenizer, template: Template, *, max_length: int | None = None,
                max_prompt_length: int = 512) -> EncodedPair:
    """Both conversations by `encode`, split where they may share.

    x is the longest common token prefix that ends at or before both answers' first character; a token
    that straddles (byte-level BPE merges the header's newline with an answer's) stays with its answer.

    A pair whose longer side exceeds max_length loses prompt tokens after BOS from the left, no more than
    needed and never below max_prompt_length prompt tokens, then the end of its answers; an EOS is never
    forged. ValueError(short reason) when an answer has no target left or both became equal."""
    sides = [encode(with_answer(pair, which), tokenizer, template) for which in ("chosen", "rejected")]
    ids, masks = [e.input_ids for e in sides], [e.targets for e in sides]
    share = min(mask.index(True) for mask in masks)
    share = next((i for i, (a, b) in enumerate(zip(ids[0][:share], ids[1])) if a != b), share)
    cut = 0
    if max_length:
        over = max(map(len, ids)) - max_length
        c = max(0, min(over, share - max_prompt_length))
        a = 1 if template.bos else 0
        before = sum(map(len, ids))
        ids = [(y[:a] + y[a + c:])[:max_length] for y in ids]
        masks = [(m[:a] + m[a + c:])[:max_length] for m in masks]
        cut, share = before - sum(map(len, ids)), share - c
    if not all(map(any, masks)):
        raise ValueError("no answer token left after truncation" if cut else "no answer token")
    if ids[0] == ids[1]:
        raise ValueError("chosen equals rejected after truncation" if cut else "chosen equals rejected as tokens")
    return EncodedPair(ids[0][:share], ids[0][share:], ids[1][share:], masks[0][share:], masks[1][share:], cut)


# ------------------------------------------------------------------------------------------ prepare
class Prepared(NamedTuple):
    dataset: object                # datasets.Dataset: input_ids, targets, length, n_targets, answer, ...
    stats: dict                    # JSON-serialisable; stats_table() prints it
    key: str = ""                  # hash of all that decided the content


def permutation(n: int, seed: int, epoch: int = 0) -> np.ndarray:
    """The one seeded order of n things in an epoch; no state, the same on every machine and rank."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


def canonical(text: str) -> str:
    """What makes two texts the same: Unicode's NFC, no white space at the ends. Inside it is content: code hangs on it."""
    return unicodedata.normalize("NFC", text).strip()


def canonical_hash(messages) -> str:
    text = json.dumps([[m["role"], canonical(m["content"])] for m in messages])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def with_system(messages: list[dict], key: str, probability: float, seed: int) -> list[dict]:
    """An empty system turn in front with a probability; the draw hangs on seed and content alone."""
    draw = int(hashlib.sha256(f"{seed} {key}".encode()).hexdigest()[:8], 16) / 2 ** 32
    system = draw < probability and messages[0]["role"] != "system"
    return [{"role": "system", "content": ""}] * system + messages


# what is known of a converted row without reading it: where its line ends, whence it comes, a hash of its canonical
# text, its scores (NaN: none), and whether it was refused
INDEX = np.dtype([("end", "<i8"), ("source", "<i2"), ("row", "<i8"), ("key", "V16"), ("score_chosen", "<f8"),
                  ("score_rejected", "<f8"), ("refused", "?")])
CHUNK = 5000                       # rows that a worker takes at a time; what a kill can cost each


class Converted(NamedTuple):
    """Sources as one file: a line of JSON a row, conversations or pairs as design has them, or {"refused": reason}."""
    path: Path
    index: np.ndarray              # (n,) INDEX
    names: list[str]               # of the sources

    def lines(self, ids):
        """The lines of rows `ids`, as bytes."""
        with open(self.path, "rb") as f:
            for i in ids:
                a = int(self.index["end"][i - 1]) if i else 0
                yield os.pread(f.fileno(), int(self.index["end"][i]) - a, a)

    def where(self, i) -> str:
        """FILE:ROW of row i."""
        return f"{self.names[self.index['source'][i]]}:{self.index['row'][i]}"


def count_rows(source: Source) -> int:
    if source.name.endswith((".jsonl", ".jsonl.gz")):
        with (gzip.open if source.name.endswith(".gz") else open)(source.name, "rb") as f:
            return sum(1 for line in f if line.strip())
    if source.name in DEMO_ROWS:
        return DEMO_ROWS[source.name].get(source.split) or sum(1 for _ in load_source(source))    # or raises
    return sum(1 for _ in load_source(source)) if local_kind(source.name) == ".csv" else len(load_table(source))


def read_source(source: Source, pairs: bool):
    """(number of rows, rows as load_source has them). HelpSteer's rows of one prompt become one, for their pair."""
    first = next(iter(load_source(source)), (0, {}))[1] if pairs else {}
    if not {"prompt", "response", *HELPSTEER} <= set(first):
        return count_rows(source), load_source(source)
    found = {}
    for n, row in load_source(source):
        found.setdefault(json.dumps(row.get("prompt")), (n, []))[1].append(row)
    return len(found), [(n, {"prompt": rows[0].get("prompt"), "responses": rows}) for n, rows in found.values()]


def raw_rows(parsed: list[Source], pairs: bool, seed: int):
    """(source, row number, row, rows in all) of every source's sampled share. One ValueError for a source that is
    empty, or of which none of the first hundred rows has known columns."""
    read = [read_source(source, pairs) for source in parsed]
    taken = [np.arange(n) if s.fraction == 1 else np.sort(permutation(n, seed)[:max(1, round(s.fraction * n))])
             for s, (n, _) in zip(parsed, read)]
    total = sum(map(len, taken))
    for index, (source, (n_rows, rows)) in enumerate(zip(parsed, read)):
        if not n_rows:
            raise ValueError(f"--data {source.name}: the source is empty, no row is left")
        mine, unknown = np.zeros(n_rows, dtype=bool), []
        mine[taken[index]] = True
        for i, (n, row) in enumerate(rows):
            if unknown is not None:
                try:
                    unknown = find_format(row, f"--data {source.name}:{n}", PAIR_FORMATS if pairs else FORMATS) and None
                except ValueError as error:
                    unknown.append(error)
                    if i == min(n_rows, 100) - 1:
                        raise unknown[0]
            if mine[i]:
                yield index, n, row, total


def convert_line(row: dict, pairs: bool, source: str, n: int):
    """A raw row -> (its line as a dict, 16 bytes of its canonical hash, scores). ValueError when it is refused."""
    if not pairs:
        c = to_conversation(row)
        extra = {k: True for k in ("last_only", "unfinished") if getattr(c, k)}
        return (dict(messages=c.messages, **extra, answer=c.answer, source=source, row=n),
                bytes.fromhex(canonical_hash(c.messages)), None, None)
    pair = to_pair(row)
    key = canonical_hash(pair.prompt + [{"role": w, "content": getattr(pair, w)} for w in ("chosen", "rejected")])
    line = pair._asdict() | {w: [{"role": "assistant", "content": getattr(pair, w)}] for w in ("chosen", "rejected")}
    return line | dict(source=source, row=n), bytes.fromhex(key), pair.score_chosen, pair.score_rejected


def convert(parsed: list[Source], pairs: bool, seed: int, folder: Path) -> Converted:
    """Every raw row converted, or refused with its reason, into rows.jsonl and index.bin of `folder`. A killed pass
    goes on behind its last whole record. Rows that a command wrote keep the source and row that they say they are of.
    Memory: the index, 59 bytes a row."""
    from tqdm import tqdm
    path, records, named = folder / "rows.jsonl", folder / "index.bin", folder / "names.json"
    done = np.fromfile(records, INDEX) if records.exists() else np.zeros(0, INDEX)
    names = json.loads(named.read_text()) if named.exists() else []
    if not (folder / "converted").exists():
        end = int(done["end"][-1]) if len(done) else 0
        with open(path, "ab") as out, open(records, "ab") as index:
            out.truncate(end), index.truncate(len(done) * INDEX.itemsize)
            waiting, bar = [], tqdm(desc="convert", unit="row", initial=len(done))

            def flush():
                out.flush()
                write_lines(named, [json.dumps(names).encode()])
                index.write(np.array(waiting, dtype=INDEX).tobytes())
                index.flush(), waiting.clear()
            for i, (source, n, row, total) in enumerate(raw_rows(parsed, pairs, seed)):
                bar.total = total
                if i < len(done):
                    continue
                try:
                    ours = "answer" in row and isinstance(row.get("source"), str) and type(row.get("row")) is int
                    name, at = ([row["source"], -1], row["row"]) if ours else ([parsed[source].name, source], n)
                    line, key, chosen, rejected = convert_line(row, pairs, name[0], at)
                    refused = False
                    text = json.dumps(line).encode() + b"\n"
                except ValueError as error:
                    name, at = [parsed[source].name, source], n
                    key, chosen, rejected, refused = bytes(16), None, None, True
                    text = json.dumps({"refused": str(error)}).encode() + b"\n"
                out.write(text)
                end += len(text)
                scores = (np.nan if x is None else x for x in (chosen, rejected))
                names += [] if name in names else [name]
                waiting.append((end, names.index(name), at, key, *scores, refused))
                bar.update()
                if len(waiting) == CHUNK:
                    flush()
            flush(), bar.close()
        (folder / "converted").touch()
        done = np.fromfile(records, INDEX)
    return Converted(path, done, [name for name, _ in names])


@contextlib.contextmanager
def work_folder(folder: Path):
    """A folder for half-done work: it outlives a kill, so that the same command goes on, is one process's at a time
    (others wait), and goes when the work is done or its data is at fault. The lock beside it stays: who waits on a
    file that is removed holds a lock that nobody else sees."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a record lock: forked workers do not hold it
        except OSError:
            print(f"another process works in {folder}; waiting for it", file=sys.stderr)
            fcntl.lockf(lock, fcntl.LOCK_EX)
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        except ValueError:
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


CHUNK_FUNCTION = None              # what forked workers run: inherited, so nothing large is pickled


def run_chunk(start: int, stop: int, path: Path) -> int:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with open(temporary, "wb") as f:
        CHUNK_FUNCTION(start, stop, f)
    temporary.rename(path)
    return stop - start


def end_with(parent: int) -> None:
    """Let a worker die with its parent, however that one was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)          # PR_SET_PDEATHSIG
    if os.getppid() != parent:                              # dead already
        os._exit(1)


def in_chunks(function, n: int, folder: Path, name: str, num_proc: int | None = None) -> list[Path]:
    """function(start, stop, file) over 0..n in chunks and processes; the chunks' files, in order. Chunks whose file
    is there (a killed pass left it) are not computed again; the result hangs on neither chunks nor processes."""
    global CHUNK_FUNCTION
    from tqdm import tqdm
    CHUNK_FUNCTION = function
    jobs = [(a, min(n, a + CHUNK), folder / f"{name}-{a}-{min(n, a + CHUNK)}") for a in range(0, n, CHUNK)]
    todo = [job for job in jobs if not job[2].exists()]
    with tqdm(total=n, initial=n - sum(b - a for a, b, _ in todo), desc=name, unit="row") as bar:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()     # Linux: ours alone
        workers = min(num_proc or cores, len(todo))
        if workers < 2:
            for job in todo:
                bar.update(run_chunk(*job))
        else:
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), end_with, (os.getpid(),))
            try:
                for done in as_completed([pool.submit(run_chunk, *job) for job in todo]):
                    bar.update(done.result())
            except BrokenProcessPool:
                raise OSError("a worker was killed, out of memory? lower --num-proc; call again, it goes on") from None
            finally:
                pool.shutdown(cancel_futures=True)
    return [path for *_, path in jobs]


def first_of_equal(keys: np.ndarray) -> np.ndarray:
    """For each key the index of the first one equal to it. (n,) V16 -> (n,) int64"""
    words = np.ascontiguousarray(keys).view("<u8").reshape(-1, 2)                            # (n, 2)
    order = np.lexsort(words.T)                                                              # stable: first comes first
    new = np.append(True, (words[order[1:]] != words[order[:-1]]).any(1))[:len(order)]       # (n,)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[new][np.cumsum(new) - 1]
    return first


def gap(chosen, rejected) -> np.ndarray:
    """Score difference of pairs, NaN where a score is missing; 8.2 - 6.2 is 2, not a little less."""
    return np.round(np.asarray(chosen, dtype=float) - np.asarray(rejected, dtype=float), 9)


def encode_row(line: dict, key: str, tokenizer, template, max_length, loss_on, empty_system, seed) -> dict:
    """One converted conversation as a row of ids. ValueError(short reason) when it is refused."""
    c = Conversation(line["messages"], line.get("last_only", False), line["answer"], line.get("unfinished", False))
    c = c._replace(messages=with_system(c.messages, key, empty_system, seed))
    e = encode(c, tokenizer, template, max_length=max_length, loss_on=loss_on)
    return dict(input_ids=e.input_ids, targets=e.targets, length=len(e.input_ids), n_targets=sum(e.targets),
                cut=e.truncated, turns=len(c.messages), messages_json=json.dumps(c.messages))


PAIR_LISTS = ("prompt", "chosen", "rejected", "chosen_targets", "rejected_targets")


def encode_pair_row(line: dict, key: str, tokenizer, template, max_length, max_prompt_length, empty_system,
                    seed) -> dict:
    """One converted pair as a row of ids; messages_json is the prompt, both answers and which were cut."""
    pair = Pair(with_system(line["prompt"], key, empty_system, seed), line["chosen"][0]["content"],
                line["rejected"][0]["content"], line["score_chosen"], line["score_rejected"],
                unfinished=tuple(line["unfinished"]))
    e = encode_pair(pair, tokenizer, template, max_length=max_length, max_prompt_length=max_prompt_length)
    return e._asdict() | dict(
        length=len(e.prompt) + len(e.chosen) + len(e.rejected), turns=len(pair.prompt) + 1,
        n_targets=sum(e.chosen_targets) + sum(e.rejected_targets), score_chosen=pair.score_chosen,
        score_rejected=pair.score_rejected, messages_json=json.dumps([*pair[:3], pair.unfinished]))


def encode_chunk(store: Converted, ids, pairs: bool, settings: dict, schema, start: int, stop: int, file) -> None:
    """Rows ids[start:stop] as an Arrow stream; the refused ones, (row, reason), stand in its schema's metadata."""
    import pyarrow
    made, refused = [], []
    for i, line in zip(ids[start:stop], store.lines(ids[start:stop])):
        line, record = json.loads(line), store.index[i]
        try:
            row = (encode_pair_row if pairs else encode_row)(line, record["key"].tobytes().hex(), **settings)
            made.append(row | dict(source=record["source"], row=record["row"], answer=line["answer"]))
        except ValueError as error:
            refused.append([int(i), str(error)])
    schema = schema.with_metadata({"refused": json.dumps(refused)})
    with pyarrow.ipc.new_stream(file, schema) as out:
        out.write_table(pyarrow.Table.from_pylist(made, schema=schema))


def prepare(sources: list[str], tokenizer, template: Template, *, max_length: int | None,
            loss_on: str = "assistant", empty_system: float = 0.0, max_examples: int | None = None,
            seed: int = 42, bad_rows: str = "refuse", num_proc: int | None = None,
            cache_dir: str | None = None, pairs: bool = False, max_prompt_length: int = 512,
            min_gap: float | None = None) -> Prepared:
    """Sources -> encoded documents in a seeded order, deduplicated, memory-mapped, cached.

    pairs: preference rows instead (columns PAIR_LISTS for input_ids and targets, and score_chosen,
    score_rejected; `length` is that of x, y_w and y_l); duplicates are equal prompt, chosen and rejected.
    max_examples: the first so many of the order; no more are encoded, or counted as refused by encoding.

    The cache's key hashes all that decides the content; entries are written aside and renamed; a killed
    call goes on. Raises one ValueError for missing files or unknown columns (naming them) and when no row is left."""
    import datasets
    parsed = check_sources(sources)
    folder = cache_folder(cache_dir)
    decides = [[fingerprint(s) for s in parsed], tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template,
               list(template), max_length, loss_on, empty_system, max_examples, seed, pairs,
               [max_prompt_length, min_gap] if pairs else None, Path(__file__).read_text()]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]
    final = folder / key

    def cached():
        try:
            stats = json.loads((final / "stats.json").read_text())
            if not (bad_rows == "stop" and stats["total"]["refused"]):
                return Prepared(datasets.load_from_disk(str(final)), stats, key)
        except (OSError, ValueError, KeyError) as error:
            if final.exists():
                print(f"cache {final} is damaged ({error}); made again", file=sys.stderr)
    found = cached()
    if found:
        return found
    settings = dict(tokenizer=tokenizer, template=template, max_length=max_length, empty_system=empty_system,
                    seed=seed) | (dict(max_prompt_length=max_prompt_length) if pairs else dict(loss_on=loss_on))
    with work_folder(folder / f"{key}.writing") as work:
        found = cached()                                    # made while we waited
        if not found:
            made = _prepare(parsed, settings, pairs, max_examples, min_gap, seed, bad_rows, num_proc, work)
            made.dataset.save_to_disk(str(work / "done"))
            (work / "done" / "stats.json").write_text(json.dumps(made.stats))
            shutil.rmtree(final, ignore_errors=True)
            (work / "done").rename(final)
            found = cached()
    return found


def cache_folder(cache_dir: str | None) -> Path:
    return Path(cache_dir or Path.home() / ".cache" / "lions")


def check_sources(sources: list[str]) -> list[Source]:
    """--data parsed; one ValueError for all files that are not there."""
    parsed = parse_sources(sources)
    missing = [f"--data {s.name}: no such file" for s in parsed
               if local_kind(s.name) not in (None, "folder") and not os.path.exists(s.name)]
    if missing:
        raise ValueError("\n".join(missing))
    return parsed


def refused_rows(store: Converted) -> list[tuple[int, str]]:
    """(row, reason) of what conversion refused."""
    rows = np.flatnonzero(store.index["refused"])
    return [(int(i), json.loads(line)["refused"]) for i, line in zip(rows, store.lines(rows))]


def by_reason(store: Converted, refused: list[tuple[int, str]]) -> list[dict]:
    """Of each source {reason: [how many rows, FILE:ROW of the first]}."""
    out = [{} for _ in store.names]
    for i, reason in sorted(refused):
        out[store.index["source"][i]].setdefault(reason, [0, store.where(i)])[0] += 1
    return out


def check_rows(reasons: list[dict], bad_rows: str, kept: int) -> None:
    """ValueError naming every reason, where no row is left or --bad-rows stop asks for it."""
    bad = [f"{where}: {reason} ({n} such row(s))" for of in reasons for reason, (n, where) in of.items()]
    if not kept or (bad and bad_rows == "stop"):
        raise ValueError("\n".join(["--data: stopped at bad rows:" if kept else "--data: no row is left:", *bad]))


def _prepare(parsed, settings, pairs, max_examples, min_gap, seed, bad_rows, num_proc, work) -> Prepared:
    import datasets
    import pyarrow
    store = convert(parsed, pairs, seed, work)
    index, refused = store.index, refused_rows(store)
    good = np.flatnonzero(~index["refused"])
    if min_gap is not None:
        gaps = gap(index["score_chosen"], index["score_rejected"])[good]
        if np.isnan(gaps).any():
            raise ValueError(f"--data: stopped at bad rows:\n{store.where(good[np.isnan(gaps)][0])}: no score, and "
                             f"--min-gap needs both ({np.isnan(gaps).sum()} such row(s))")
        refused += [(int(i), f"score gap below --min-gap {min_gap:g}") for i in good[gaps < min_gap]]
        good = good[gaps >= min_gap]
    first = first_of_equal(index["key"][good]) == np.arange(len(good))
    duplicates = np.bincount(index["source"][good[~first]], minlength=len(store.names))
    kept = good[first]
    check_rows(by_reason(store, refused), bad_rows, len(kept))

    features = datasets.Features(
        source=datasets.Value("int16"), row=datasets.Value("int64"), answer=datasets.Value("string"),
        **{k: datasets.List(datasets.Value("bool" if "targets" in k else "int32"))
           for k in (PAIR_LISTS if pairs else ("input_ids", "targets"))},
        **({k: datasets.Value("float64") for k in ("score_chosen", "score_rejected")} if pairs else {}),
        length=datasets.Value("int32"), n_targets=datasets.Value("int32"), cut=datasets.Value("int32"),
        turns=datasets.Value("int32"), messages_json=datasets.Value("string"))
    order, wanted, parts, start = kept[permutation(len(kept), seed)], max_examples or len(kept), [], 0
    while start < len(order) and (left := wanted - sum(map(len, parts))) > 0:               # refused ones are replaced
        ids = order[start:start + left]
        for path in in_chunks(functools.partial(encode_chunk, store, ids, pairs, settings, features.arrow_schema),
                              len(ids), work, f"encode-{start}", num_proc):
            part = datasets.Dataset.from_file(str(path))
            with pyarrow.memory_map(str(path)) as f:
                refused += map(tuple, json.loads(pyarrow.ipc.open_stream(f).schema.metadata[b"refused"]))
            parts += [part] if len(part) else []
        start += len(ids)
    reasons = by_reason(store, refused)
    check_rows(reasons, bad_rows, len(parts))
    made = datasets.concatenate_datasets(parts)

    columns = ("source", "length", "n_targets", "cut", "turns") + ("score_chosen", "score_rejected") * pairs
    of = {k: made.data.column(k).to_numpy() for k in columns}
    lines = [summary({k: v[of["source"] == s] for k, v in of.items()}) | dict(
        duplicates=int(duplicates[s]), reasons=reasons[s], refused=sum(n for n, _ in reasons[s].values()))
        for s in range(len(store.names))]
    stats = {"sources": {}, "total": summary(of)}
    stats["sources"].update(zip(distinct(store.names), lines))
    for key in ("duplicates", "refused"):
        stats["total"][key] = sum(line[key] for line in lines)
    return Prepared(made.remove_columns(["cut", "turns"]), stats)


def distinct(names: list[str]) -> list[str]:
    """The names, a prime behind each that came before."""
    out = []
    for name in names:
        while name in out:
            name += "'"
        out.append(name)
    return out


def summary(of: dict) -> dict:
    """Counts and percentiles of rows, {"length", "n_targets", "cut", "turns", score_..}: (n,) each."""
    n, length = len(of["length"]), of["length"]
    out = dict(examples=n, tokens=int(length.sum()), targets=int(of["n_targets"].sum()), turns=int(of["turns"].sum()),
               truncated=int((of["cut"] > 0).sum()), cut=int(of["cut"].sum()))
    out |= {f"p{q}": int(np.percentile(length, q)) if n else 0 for q in (50, 90, 99, 100)}
    if "score_chosen" in of:
        chosen, gaps = of["score_chosen"], gap(of["score_chosen"], of["score_rejected"])
        for name, x in (("rating", chosen[~np.isnan(chosen)]), ("gap", gaps[~np.isnan(gaps)])):
            out |= {f"{name}s": len(x), f"mean_{name}": float(x.mean()) if len(x) else None}
    return out


def stats_table(stats: dict) -> str:
    """The paper's table: examples and tokens per source, absolute and percent, lengths, and all that was left out;
    of pairs, how many have a rating and a gap, and their means on the scale of 1 to 10."""
    total, scored = stats["total"], "ratings" in stats["total"]
    head = ("source", "examples", "%", "tokens", "%", "targets", "turns", "p50", "p90", "p99", "longest", "duplicates",
            "truncated", "tokens cut", "refused") + ("rated", "rating", "gaps", "gap") * scored
    rows, n_of, mean = [head], "{:,}".format, lambda x: "-" if x is None else f"{x:.2f}"
    for name, s in [*stats["sources"].items(), ("total", total)]:
        n = max(1, s["examples"])
        rows.append((name, f"{s['examples']:,}", f"{100 * s['examples'] / max(1, total['examples']):.1f}",
                     f"{s['tokens']:,}", f"{100 * s['tokens'] / max(1, total['tokens']):.1f}",
                     f"{s['targets']:,}", f"{s['turns'] / n:.1f}", *(f"{s[f'p{q}']:,}" for q in (50, 90, 99, 100)),
                     *(f"{s[k]:,}" for k in ("duplicates", "truncated", "cut", "refused")),
                     *([n_of(s["ratings"]), mean(s["mean_rating"]), n_of(s["gaps"]), mean(s["mean_gap"])] if scored
                       else [])))
    widths = [max(len(r[c]) for r in rows) for c in range(len(head))]
    text = ["  ".join(x.ljust(w) if c == 0 else x.rjust(w) for c, (x, w) in enumerate(zip(r, widths)))
            for r in rows]
    return "\n".join(text + refused_lines({name: s["reasons"] for name, s in stats["sources"].items()}))


def refused_lines(refused: dict) -> list[str]:
    return [f"  refused in {name}: {n} x {reason} (first: {where})" for name, reasons in refused.items()
            for reason, (n, where) in reasons.items()]


# ------------------------------------------------------------------------------------------ packing
class Rows(NamedTuple):
    """Row r holds the pieces offsets[r]:offsets[r+1]; a piece is tokens start:end of a document."""
    offsets: np.ndarray            # (R+1,) int64
    doc: np.ndarray                # (P,) int64
    start: np.ndarray              # (P,) int64
    end: np.ndarray                # (P,) int64


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each document: longest first, each into the fullest row that still takes it.

    Open rows stand in a stack per free capacity; one big integer has a bit for each stack that is not
    empty, so that the fullest fitting row is its lowest bit at or above the length. (n,) -> (n,)."""
    stacks, free, n_rows = [[] for _ in range(capacity + 1)], 0, 0
    row_of = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    for i, length in zip(order.tolist(), lengths[order].tolist()):
        fits = free >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            row = stacks[room].pop()
            if not stacks[room]:
                free &= ~(1 << room)
        else:
            room, row, n_rows = capacity, n_rows, n_rows + 1
        left = room - length
        if left:
            stacks[left].append(row)
            free |= 1 << left
        row_of[i] = row
    return row_of


def pack(lengths, max_length: int, packing: str = "bfd") -> Rows:
    """Documents -> rows of at most max_length tokens.

    bfd: whole documents, best-fit decreasing. none: one document a row. concat: documents run on from
    row to row; the piece that goes on repeats the last token before the cut as context, so that every
    target is scored exactly once (a piece's first token never is). Lengths are at most max_length."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) == 0 or lengths.max() > max_length or lengths.min() < 1:
        raise ValueError(f"pack: needs lengths in 1..{max_length}")
    n = len(lengths)
    if packing == "none":
        return Rows(np.arange(n + 1), np.arange(n), np.zeros(n, dtype=np.int64), lengths)
    if packing == "bfd":
        row_of = best_fit_decreasing(lengths, max_length)
        doc = np.argsort(row_of, kind="stable")
        offsets = np.append(0, np.cumsum(np.bincount(row_of)))
        return Rows(offsets, doc, np.zeros(n, dtype=np.int64), lengths[doc])
    if packing != "concat":
        raise ValueError(f"--packing {packing}: one of bfd, concat, none")
    offsets, doc, start, end, room = [0], [], [], [], max_length
    for d, length in enumerate(lengths.tolist()):
        a = 0
        while a < length - (a > 0):                         # a piece of context alone would score nothing
            if room < 2:
                offsets.append(len(doc))
                room = max_length
            b = min(length, a + room)
            doc.append(d), start.append(a), end.append(b)
            room -= b - a
            a = b - 1 if b < length else length
    return Rows(*(np.asarray(x, dtype=np.int64) for x in (offsets + [len(doc)], doc, start, end)))


# -------------------------------------------------------------------------------------- duplicates, contamination
PROMPTS = ("turns", "question", "prompt", "instruction", "problem", "query", "ctx", "sentence")     # of benchmarks
NEAR, GRAM, BENCHMARK_GRAM = 0.8, 5, 13   # Jaccard of 5-grams; words shared with a benchmark's prompt
LIKELY = 0.7                       # share of equal hashes to verify from: 0.2% of J = 0.8 lie below, none of 0.85
BANDS, BAND_ROWS = 16, 8           # MinHash: P(found) = 1 - (1 - J^8)^16: 0.95 at J = 0.8, 0.99 at 0.85, 0.24 at 0.6


def grams(text: str, n: int, words: str = r"\w+") -> set[str]:
    """n-grams of a text's words (a regular expression), lower-cased; a shorter text is one gram, whole."""
    found = re.findall(words, canonical(text).lower())
    return {" ".join(found[i:i + n]) for i in range(len(found) - n + 1)} or {" ".join(found) or canonical(text)}


def shingles(line: dict) -> list[set[str]]:
    """5-grams of what must be near in each part: a conversation as one, or a pair's prompt, chosen and rejected (a long
    prompt with another answer is no duplicate). Each sign counts as a word: 1 + 2 is not 1 - 2."""
    parts = [line["messages"]] if "messages" in line else [line[k] for k in ("prompt", "chosen", "rejected")]
    return [grams("\n".join(m["content"] for m in part), GRAM, r"\w+|[^\w\s]") for part in parts]


def jaccard(a: list[set], b: list[set]) -> float:
    """min over the parts of |A & B| / |A | B|. {1, 2, 3} and {2, 3, 4}: 0.5"""
    return min(len(x & y) / len(x | y) for x, y in zip(a, b))


def signatures(store: Converted, ids, start: int, stop: int, file) -> None:
    """MinHash signatures of rows ids[start:stop]: (rows, BANDS * BAND_ROWS) uint32."""
    from rensa import RMinHash
    out = np.empty((stop - start, BANDS * BAND_ROWS), dtype=np.uint32)
    for r, line in enumerate(store.lines(ids[start:stop])):
        h = RMinHash(num_perm=BANDS * BAND_ROWS, seed=42)
        h.update([f"{part} {gram}" for part, found in enumerate(shingles(json.loads(line))) for gram in found])
        out[r] = h.digest()
    np.save(file, out)


def near_duplicates(store: Converted, ids, folder: Path, num_proc: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """For each row of `ids` the earliest *kept* row that it is near to, its own number if none, and their Jaccard.

    Candidates share a band of their MinHash and at least LIKELY of its hashes; each is verified by exact Jaccard, in
    order, so that a row is dropped only for one that stays. (n,) int64 into ids, (n,) float."""
    from tqdm import tqdm
    made = in_chunks(functools.partial(signatures, store, ids), len(ids), folder, "minhash", num_proc)
    signs = np.concatenate([np.load(p, mmap_mode="r") for p in made])                        # (n, BANDS * BAND_ROWS)
    mix = np.random.default_rng(0).integers(1, 2 ** 63, BAND_ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    members, buckets = [], []                               # rows that share a band with another, and which
    for band in range(BANDS):
        keys = (signs[:, band * BAND_ROWS:][:, :BAND_ROWS] * mix).sum(1)                     # wraps; equal stays equal
        order = np.argsort(keys, kind="stable")
        run = np.cumsum(np.append(False, keys[order[1:]] != keys[order[:-1]]))               # (n,) equal keys, one run
        many = np.bincount(run)[run] > 1
        members.append(order[many]), buckets.append(run[many] * BANDS + band)
    members, buckets = np.concatenate(members), np.concatenate(buckets)
    order = np.argsort(members, kind="stable")
    members, buckets = members[order], buckets[order]
    first, likeness = np.arange(len(ids)), np.ones(len(ids))
    open_rows = collections.defaultdict(functools.partial(array.array, "q"))                 # bucket: kept rows
    read = functools.lru_cache(2_000)(lambda i: shingles(json.loads(next(store.lines([ids[i]])))))
    starts = np.flatnonzero(np.append(True, members[1:] != members[:-1]))[:len(members)]
    for a, b in zip(tqdm(starts, desc="verify", unit="row"), np.append(starts[1:], len(members))):
        row, mine = int(members[a]), buckets[a:b].tolist()
        others = np.unique(np.concatenate([open_rows[bucket] for bucket in mine]))
        for other in others[(signs[others] == signs[row]).mean(1) >= LIKELY].tolist():
            j = jaccard(read(row), read(other))
            if j >= NEAR:
                first[row], likeness[row] = other, j
                break
        else:
            for bucket in mine:
                open_rows[bucket].append(row)
    return first, likeness


def write_lines(path: Path, lines) -> None:
    """Bytes lines into a file that is whole or not there; of two writers the last one's."""
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "wb") as f:
        f.writelines(lines)
    os.replace(temporary, path)


def json_line(row: dict) -> bytes:
    return json.dumps(row).encode() + b"\n"


def write_report(out: Path, report: dict) -> dict:
    write_lines(out / "report.json", [json.dumps(report, indent=1).encode()])
    return report


def dedup(store: Converted, work: Path, out: Path, args) -> dict:
    """Exact and, with --near, near duplicates within and across sources; the first in the order given stays."""
    good = np.flatnonzero(~store.index["refused"])
    kind, likeness = np.zeros(len(good), dtype="<U5"), np.ones(len(good))
    first = first_of_equal(store.index["key"][good])
    exact = first != np.arange(len(good))
    kind[exact] = "exact"
    if args.near:
        unique = np.flatnonzero(~exact)
        near, j = near_duplicates(store, good[unique], work, args.num_proc)
        dropped = near != np.arange(len(unique))
        first[unique], likeness[unique], kind[unique[dropped]] = unique[near], j, "near"
        first, likeness[exact] = first[first], likeness[first[exact]]     # a copy of a row that is near to a third
    write_lines(out / "rows.jsonl", store.lines(good[kind == ""]))
    clusters = {}
    for i in np.flatnonzero(kind != ""):
        clusters.setdefault(int(first[i]), []).append({"row": store.where(good[i]), "kind": str(kind[i]),
                                                       "jaccard": round(float(likeness[i]), 4)})
    write_lines(out / "clusters.jsonl", (json_line({"kept": store.where(good[i]), "dropped": found})
                                         for i, found in sorted(clusters.items())))
    largest = sorted(clusters, key=lambda i: (-len(clusters[i]), i))[:args.examples]
    examples = [{"kept": store.where(good[i]), "row": json.loads(next(store.lines([good[i]]))),
                 "copies": len(clusters[i]), "dropped": clusters[i][:5]} for i in largest]
    source = store.index["source"][good]
    table = {name: {k or "kept": int((kind[source == s] == k).sum()) for k in ("", "exact", "near")}
             for s, name in enumerate(distinct(store.names))}
    for name, line in table.items():
        print(f"{name:40} kept {line['kept']:,}, exact {line['exact']:,}, near {line['near']:,}")
    for e in examples:
        print(f"  {e['kept']} stands for {e['copies']} more: {json.dumps(e['row'])[:100]}")
    total = {k or "kept": int((kind == k).sum()) for k in ("", "exact", "near")}
    return total | {"clusters": len(clusters), "sources": table, "examples": examples}


def benchmark_prompts(row: dict) -> list[str]:
    """A benchmark row's prompts: its turns (MT-Bench, Arena-Hard), question, prompt, ..., else its user turns."""
    for name in PROMPTS:
        if isinstance(row.get(name), str):
            return [row[name]]
        if isinstance(row.get(name), list) and row[name]:
            return [t["content"] if isinstance(t, dict) else t for t in row[name]]
    return [m["content"] for m in to_conversation(row).messages if m["role"] == "user"]


def read_benchmarks(against: list[Source]) -> tuple[dict, int]:
    """({gram: NAME:ROW of its first prompt}, number of prompts) of all benchmarks."""
    benchmark, prompts = {}, 0
    for source in against:
        for n, row in load_source(source):
            try:
                texts = benchmark_prompts(row)
            except ValueError as error:
                raise ValueError(f"--against {source.name}:{n}: no prompt is found ({error}); a row needs a text or "
                                 f"list named {', '.join(PROMPTS)}, or a conversation") from None
            prompts += len(texts)
            for gram in (gram for text in texts for gram in grams(text, BENCHMARK_GRAM)):
                benchmark.setdefault(gram, f"{source.name}:{n}")
    return benchmark, prompts


def overlaps(store: Converted, ids, benchmark: dict, start: int, stop: int, file) -> None:
    """[row, a gram that a benchmark has, where] of rows ids[start:stop], as JSON. A prompt shorter than 13 words counts
    where a user turn equals it: an answer 'yes' is not a benchmark's question."""
    found = []
    for i, line in zip(ids[start:stop], store.lines(ids[start:stop])):
        line = json.loads(line)
        said = line.get("messages") or line["prompt"] + line["chosen"] + line["rejected"]
        hits = [g for m in said for g in grams(m["content"], BENCHMARK_GRAM) if g in benchmark
                and (m["role"] == "user" or g.count(" ") == BENCHMARK_GRAM - 1)]
        if hits:
            gram = min(hits, key=lambda g: (-g.count(" "), g))                               # 13 words before fewer
            found.append([int(i), gram, benchmark[gram]])
    file.write(json.dumps(found).encode())


def decontaminate(store: Converted, work: Path, out: Path, args, benchmark: dict, prompts: int) -> dict:
    """Rows that share 13 words in a row with a benchmark's prompt, or a turn with a shorter one: hits.jsonl; with
    --remove the others: rows.jsonl."""
    good = np.flatnonzero(~store.index["refused"])
    hits = [hit for path in in_chunks(functools.partial(overlaps, store, good, benchmark), len(good), work, "overlap",
                                      args.num_proc) for hit in json.loads(path.read_text())]
    rows = np.array([i for i, *_ in hits], dtype=np.int64)
    shown = [{"row": store.where(i), "benchmark": where, "shared": gram} for i, gram, where in hits]
    write_lines(out / "hits.jsonl", map(json_line, shown))
    (out / "rows.jsonl").unlink(missing_ok=True)             # no other run's rows beside this report
    if args.remove:
        write_lines(out / "rows.jsonl", store.lines(np.setdiff1d(good, rows)))
    shared = sum(gram.count(" ") == BENCHMARK_GRAM - 1 for _, gram, _ in hits)
    print(f"of {len(good):,} rows {shared:,} share {BENCHMARK_GRAM} words in a row with one of {prompts:,} prompts, in "
          f"{len(hits) - shared:,} more a user turn equals a shorter one; "
          + ("removed" if args.remove else "--remove leaves them out"))
    for e in shown[:args.examples]:
        print(f"  {e['row']} and {e['benchmark']}: {e['shared']}")
    found = np.bincount(store.index["source"][rows], minlength=len(store.names))
    return {"rows": len(good), "prompts": prompts, "hits": len(hits), "shared": shared, "short": len(hits) - shared,
            "removed": len(hits) * args.remove, "sources": dict(zip(distinct(store.names), found.tolist())),
            "examples": shown[:args.examples]}


# ---------------------------------------------------------------------------------------------- selection
def highest(values, budget: int) -> np.ndarray:
    """Indices of the `budget` highest values, highest first; ties in the order given; NaN, a missing one, never.
    Longest, AlpaGasus (chosen's rating) and Argilla (score difference) are this rule. 1, NaN, 3, 3: 2, 3, 0."""
    values = np.asarray(values, dtype=float)
    return np.argsort(-values, kind="stable")[:np.count_nonzero(~np.isnan(values))][:budget]


def a2(chosen, rejected, budget: int, least: float = 2.0, width: float = 1.0) -> np.ndarray:
    """LIONs' A2: pairs whose score difference is at least `least`, in bins of `width` of that difference, the same
    quota of each bin, by the highest chosen score; what a bin cannot fill goes to the others.

    Rounds: the best of each bin, the second best of each, ..., the bin of larger differences first, until `budget`.
    Ties in the order given; a missing score (NaN) never. (n,), (n,) -> indices in that order. Scores (9, 1), (9, 1),
    (7, 5), (8, 6), (9, 8), budget 3: 0, 3, 1."""
    gaps, bins = gap(chosen, rejected), {}
    for i in highest(np.where(gaps >= least, chosen, np.nan), len(gaps)).tolist():           # NaN compares false
        bins.setdefault(np.floor(np.round((gaps[i] - least) / width, 9)), []).append(i)
    rounds = sorted((place, -b, i) for b, of in bins.items() for place, i in enumerate(of))
    return np.array([i for *_, i in rounds[:budget]], dtype=int)


def cosine(a, b) -> float:
    """Cosine similarity of two vectors, in float64."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return float((a * b).sum() / (np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())))


def diverse(embeddings, order, budget: int, most: float = 0.9, block: int = 1024) -> list[int]:
    """DEITA's greedy (2312.15685, repr filter): in the order given, keep an item while its largest cosine similarity to
    all kept ones is at most `most`, until `budget`.

    Similarities come by blocks, in float32; what lies within 1e-4 of `most` is decided by `cosine`, so that the result
    is that of one at a time. embeddings (n, D), order (m,) indices, best first. Returns the kept ones, in order."""
    kept, units = [], np.empty((min(budget, len(order)), np.shape(embeddings)[1]), dtype=np.float32)
    for a in range(0, len(order), block):
        ids = np.asarray(order[a:a + block])
        x = np.asarray(embeddings[ids], dtype=np.float32)
        norms = np.linalg.norm(x, axis=1, keepdims=True)
        if not (fine := np.isfinite(norms) & (norms > 0)).all():
            raise ValueError(f"an embedding is zero or not finite: row {ids[np.argmin(fine)]}")
        x /= norms                                                                           # (B, D)
        before, inside, new = x @ units[:len(kept)].T, x @ x.T, []                           # (B, kept), (B, B)
        old = list(kept)
        for j, i in enumerate(ids):
            similar = np.concatenate([before[j], inside[j, new]])
            if similar.max(initial=-1) > most - 1e-4:
                if similar.max() > most + 1e-4:
                    continue
                near = np.flatnonzero(similar > most - 1e-4)
                both = old + [ids[k] for k in new]
                if any(cosine(embeddings[i], embeddings[both[k]]) > most for k in near):
                    continue
            units[len(kept)] = x[j]
            kept.append(int(i)), new.append(j)
            if len(kept) == budget:
                return kept
    return kept


# DEITA's scorers read these words; they are the models' own
DEITA = {"complexity": "You are a helpful assistant. Please identify the complexity score of the following user query. "
                       "\n##Query: {instruction}  \n##Complexity: ",
         "quality": "You are a helpful assistant. Please identify the quality score of the Response corresponding to "
                    "the Question. \n #Question#:\n{instruction}\n#Response#:\n{output} \n##Quality: "}


def load_scorer(name: str, kind: str, trust_remote_code: bool = False):
    """(tokenizer, model, a hash of what they are) of a reward model ("reward"), or of a causal LM ("rating",
    "embedding"). A model that asks for code from its folder, or whose weights lack its head, is refused by name."""
    import transformers
    config = transformers.PreTrainedConfig.get_config_dict(name)[0]
    if config.get("auto_map") and not trust_remote_code:
        raise ValueError(f"{name} needs code from its own folder ({', '.join(config['auto_map'])}), which is not "
                         "supported without --trust-remote-code: it would run here")
    trust = dict(trust_remote_code=True) if trust_remote_code else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **trust)
    make = transformers.AutoModelForSequenceClassification if kind == "reward" else transformers.AutoModelForCausalLM
    model, info = make.from_pretrained(name, use_safetensors=True, output_loading_info=True, **trust)
    if info["missing_keys"]:
        raise ValueError(f"{name}: no weights for {sorted(info['missing_keys'])[:3]}: no {kind} model of this kind")
    if kind == "reward" and model.config.num_labels != 1:
        raise ValueError(f"--rm {name}: {model.config.num_labels} outputs; a reward model has one")
    if kind == "reward" and not tokenizer.chat_template:
        raise ValueError(f"--rm {name}: its tokenizer has no chat template to render a conversation with")
    digits = {*tokenizer.convert_tokens_to_ids(list("123456"))} - {None, tokenizer.unk_token_id}
    if kind == "rating" and len(digits) < 6:
        raise ValueError(f'{name}: its vocabulary lacks tokens "1".."6", from whose logits a rating is computed')
    digest = hashlib.sha256(json.dumps([kind, name, getattr(model.config, "_commit_hash", None)]).encode())
    for path in sorted(Path(name).glob("*.*")) if os.path.isdir(name) else []:
        hash_file(digest, path)
    return tokenizer, model.eval(), digest.hexdigest()[:16]


def score_batch(tokenizer, model, kind: str, rows: list[list[int]], pad: int) -> list:
    """One value for each row of ids, right-padded. reward: the model's one output. rating: DEITA's sum over k = 1..6 of
    k softmax(logits of "1".."6")_k at the first generated position. embedding: the last token's last hidden state."""
    import torch
    width = max(map(len, rows))
    x = torch.tensor([r + [pad] * (width - len(r)) for r in rows], device=model.device)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=model.device)
    last = torch.tensor([len(r) - 1 for r in rows], device=model.device)
    with torch.no_grad():
        if kind == "reward":
            return model(input_ids=x, attention_mask=mask).logits[:, 0].double().tolist()
        hidden = model.base_model(input_ids=x, attention_mask=mask).last_hidden_state
        hidden = hidden[range(len(rows)), last]                                              # (B, D)
        if kind == "embedding":
            return hidden.float().cpu().numpy()
        digits = model.get_output_embeddings()(hidden)[:, tokenizer.convert_tokens_to_ids(list("123456"))].double()
        return (digits.softmax(-1) @ torch.arange(1, 7, dtype=torch.double, device=digits.device)).tolist()


def score_texts(scorer, kind: str, texts: list[str], folder: Path, batch_tokens: int) -> list:
    """score_batch of every text, by batches of like length, kept in a file as they come: what is there is not computed
    again. An embedding's value is its row in KIND-KEY.f32, raw float32. None for a text that is longer than the model
    reads; ValueError for a value that is not finite."""
    import torch
    from tqdm import tqdm
    tokenizer, model, key = scorer
    folder.mkdir(parents=True, exist_ok=True)
    path, done = folder / f"{kind}-{key}.jsonl", {}
    binary = path.with_suffix(".f32") if kind == "embedding" else os.devnull
    name = lambda text: hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    whole = 0
    with open(path, "ab+") as f, open(binary, "ab") as vectors:
        fcntl.lockf(f, fcntl.LOCK_EX)                       # one process adds to it at a time
        f.seek(0)
        for line in f:
            if line.endswith(b"\n"):
                done.update([json.loads(line)])
                whole += len(line)
        f.truncate(whole)                                   # a torn last line, and vectors without a line
        if kind == "embedding":
            vectors.truncate(4 * model.config.get_text_config().hidden_size * len(done))
        todo = list(dict.fromkeys(text for text in texts if name(text) not in done))
        ids = [tokenizer(t, add_special_tokens=kind != "reward").input_ids for t in tqdm(todo, desc="tokenise")]
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        pad = tokenizer.pad_token_id
        padded = pad is not None and pad != tokenizer.eos_token_id
        model.config.get_text_config().pad_token_id = pad if padded else -1         # a classifier reads the last other
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        order = sorted((i for i in range(len(todo)) if len(ids[i]) <= limit), key=lambda i: -len(ids[i]))
        with tqdm(total=len(texts), initial=len(texts) - len(order), desc=kind, unit="text") as bar:
            while order:
                n = max(1, batch_tokens // len(ids[order[0]]))
                part = [i for i in order[:n] if padded or len(ids[i]) == len(ids[order[0]])]    # else of equal length
                order = order[len(part):]
                values = score_batch(tokenizer, model, kind, [ids[i] for i in part], pad if padded else 0)
                if kind == "embedding":
                    vectors.write(values.tobytes()), vectors.flush()
                    values = range(len(done), len(done) + len(part))
                for i, value in zip(part, values):
                    if isinstance(value, float) and not math.isfinite(value):
                        raise ValueError(f"{kind}: the model gives {value} for {todo[i][:80]!r}; try float32 weights")
                    done[name(todo[i])] = value
                f.write(b"".join(json.dumps([name(todo[i]), v]).encode() + b"\n" for i, v in zip(part, values)))
                f.flush(), bar.update(len(part))
    return [done.get(name(text)) for text in texts]


def answered(line: dict) -> list[dict]:
    """The conversation that SFT-style selection looks at: all turns, or a pair's prompt and chosen answer."""
    return line.get("messages") or line["prompt"] + line["chosen"]


def answer_lengths(store: Converted, ids, tokenizer, start: int, stop: int, file) -> None:
    """Tokens of what is trained in rows ids[start:stop]: the assistant's turns; in pairs and the like, the last."""
    out = []
    for line in map(json.loads, store.lines(ids[start:stop])):
        said = [m["content"] for m in answered(line) if m["role"] == "assistant"]
        said = said[-1:] if "chosen" in line or line.get("last_only") else said
        out.append(sum(map(len, tokenizer(said, add_special_tokens=False).input_ids)))
    np.save(file, np.array(out, dtype=np.int64))


def deita_scores(store: Converted, ids, args) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) sum over turns of complexity x quality, NaN where one is too long; (n,) each row's place among the (m, D)
    embeddings, which stay on disk."""
    asked, whole, owner = [], [], []
    for r, line in enumerate(map(json.loads, store.lines(ids))):
        said = answered(line)
        whole.append("\n".join(f"{m['role']}: {m['content']}" for m in said))
        turn = [dict(instruction=q["content"], output=a["content"]) for q, a in zip(said, said[1:])
                if (q["role"], a["role"]) == ("user", "assistant")]
        asked += turn
        owner += [r] * len(turn)
    folder = cache_folder(args.cache_dir) / "scores"
    product, total = np.ones(len(asked)), np.zeros(len(ids))
    for kind, name in (("complexity", args.complexity_model), ("quality", args.quality_model)):
        found = score_texts(load_scorer(name, "rating", args.trust_remote_code), "rating",
                            [DEITA[kind].format(**t) for t in asked], folder, args.batch_tokens)
        product *= [np.nan if x is None else x for x in found]
    np.add.at(total, owner, product)
    scorer = load_scorer(args.embedding_model, "embedding", args.trust_remote_code)
    at = np.array([-1 if x is None else x for x in score_texts(scorer, "embedding", whole, folder, args.batch_tokens)])
    total[at < 0] = np.nan
    file, width = folder / f"embedding-{scorer[2]}.f32", scorer[1].config.get_text_config().hidden_size
    return total, at, np.memmap(file, np.float32, "r").reshape(-1, width) if (at >= 0).any() else np.zeros((0, width))


def check_scale(store: Converted, ids) -> None:
    """ValueError where a known score of rows `ids` is no rating of 1..10: a reward or a logit is on another scale."""
    for which in ("score_chosen", "score_rejected"):
        x = store.index[which][ids]
        if len(bad := np.flatnonzero((x < 1) | (x > 10))):                                   # NaN compares false
            raise ValueError(f"{store.where(ids[bad[0]])}: {which} {x[bad[0]]:g} is no rating of 1..10, on which this "
                             f"rule counts ({len(bad)} such row(s)); rescale or drop it")


def select(store: Converted, work: Path, out: Path, args) -> dict:
    """--budget rows by --method, in rows.jsonl with their selection_score, best first; select.png: before and after."""
    good, method = np.flatnonzero(~store.index["refused"]), args.method
    chosen, rejected = (store.index[k][good] for k in ("score_chosen", "score_rejected"))
    gaps = gap(chosen, rejected)
    needs = {"alpagasus": chosen, "argilla": gaps, "a2": gaps}.get(method)
    order = np.arange(len(good))
    if needs is not None:
        check_scale(store, good)
        if np.isnan(needs).all():
            raise ValueError(f"--method {method}: none of the {len(good)} rows has the ratings that it needs; name a "
                             "rated source, or annotate this one first (python data.py annotate)")
        order = np.argsort(np.isnan(needs), kind="stable")     # of equal rows the first stays that has what is needed
    kept = np.sort(order[first_of_equal(store.index["key"][good[order]]) == np.arange(len(good))])
    duplicates, good, chosen, rejected, gaps = len(good) - len(kept), *(x[kept] for x in (good, chosen, rejected, gaps))
    score, order = None if needs is None else needs[kept], None
    if method == "random":
        order = permutation(len(good), args.seed)[:args.budget]
    elif method == "longest":
        from transformers import AutoTokenizer
        tokenizer = demo_tokenizer() if args.model == "demo" else AutoTokenizer.from_pretrained(args.model)
        score = np.concatenate([np.load(p) for p in in_chunks(functools.partial(answer_lengths, store, good, tokenizer),
                                                              len(good), work, "lengths", args.num_proc)]).astype(float)
    elif method == "deita":
        score, at, vectors = deita_scores(store, good, args)
        best = highest(score, len(score))
        of = {int(at[i]): i for i in best[::-1]}            # equal texts have one embedding: the best one's
        order = np.array([of[k] for k in diverse(vectors, at[best], args.budget)], dtype=int)
    elif method == "a2":
        order = a2(chosen, rejected, args.budget)
    order = highest(score, args.budget) if order is None else order
    missing = 0 if score is None else int(np.isnan(score).sum())
    print(f"{len(good):,} rows, {duplicates:,} duplicates left out")
    if len(order) < args.budget:
        print(f"{method}: {len(order):,} rows, fewer than --budget {args.budget:,}: of {len(good):,} rows {missing:,} "
              "have no score, the others are left out by the rule")
    values = [None] * len(order) if score is None else score[order].tolist()
    write_lines(out / "rows.jsonl", (json_line(json.loads(line) | {"selection_score": x})
                                     for x, line in zip(values, store.lines(good[order]))))
    named = {"score difference": gaps, "rating of chosen": chosen} if args.pairs else {}
    named |= {k: score for m, k in (("longest", "answer tokens"), ("deita", "complexity x quality")) if m == method}
    figure(out / "select.png", [(name, "share of rows", {"before": x, f"after {method}": x[order]})
                                for name, x in named.items()])
    means = {name: [float(np.nanmean(x)), float(np.nanmean(x[order]))] for name, x in named.items()
             if not np.isnan(x[order]).all()}
    for name, (before, after) in means.items():
        print(f"{name}: mean {before:.3f} before, {after:.3f} after")
    report = {"method": method, "rows": len(good), "duplicates": duplicates, "without_score": missing,
              "selected": len(order), "means": means}
    if method == "a2":
        bins, counts = np.unique(np.floor(gaps[order]).astype(int), return_counts=True)
        report["bins"] = {f"{b}..{b + 1}": int(n) for b, n in zip(bins, counts)}
        print("pairs a bin of score difference:", report["bins"])
    return report


def figure(path: Path, panels: list[tuple]) -> None:
    """One PNG. A panel is (x label, y label, {name: values}): histograms on the same bins, as shares, or bars by name
    where a value is one number; a pair of arrays is points."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    panels = [p for p in panels if not all(np.ndim(v) == 1 and np.isnan(v).all() for v in p[2].values())]  # no scores
    fig, axes = pyplot.subplots(1, max(1, len(panels)), figsize=(5.5 * max(1, len(panels)), 4), squeeze=False)
    for ax, (xlabel, ylabel, series) in zip(axes[0], panels):
        ax.set(xlabel=xlabel, ylabel=ylabel)
        if all(isinstance(v, tuple) for v in series.values()):
            for name, (x, y) in series.items():
                ax.plot(x, y, "." if len(x) > 2 else "-", ms=3, label=name)
        elif all(np.ndim(v) == 0 for v in series.values()):
            ax.barh(range(len(series)), list(series.values()))
            ax.set_yticks(range(len(series)), [Path(name).name for name in series])
            ax.invert_yaxis()
            continue
        else:
            series = {k: np.asarray(v)[~np.isnan(v)] for k, v in series.items()}
            edges = np.histogram_bin_edges(np.concatenate(list(series.values())), 30)
            for name, x in series.items():
                ax.hist(x, edges, weights=np.full(len(x), 1 / max(1, len(x))), histtype="stepfilled", alpha=0.5,
                        label=f"{name} (n = {len(x):,})")
        ax.legend()
    fig.tight_layout()
    png = io.BytesIO()
    fig.savefig(png, dpi=120, format="png")
    pyplot.close(fig)
    write_lines(path, [png.getbuffer()])


# --------------------------------------------------------------------------------------------- annotation
def fit_ratings(rewards, ratings, degree: int) -> tuple[float, float, np.ndarray]:
    """(low, high, c): the least-squares map from a reward r onto known ratings, sum_k c_k z^k with
    z = (r - low) / (high - low), low and high the extremes of all rewards (LIONs: rescaled, then fitted).

    rewards (n,) all of them; ratings (n,), NaN where unknown. Rewards 0, 2, 4 with ratings 1, 3, NaN, degree 1: z is
    0, 0.5, 1, so c = (1, 4)."""
    rewards, ratings = np.asarray(rewards, dtype=float), np.asarray(ratings, dtype=float)
    known = ~np.isnan(ratings) & ~np.isnan(rewards)
    low, high = np.nanmin(rewards, initial=np.inf), np.nanmax(rewards, initial=-np.inf)
    if not known.any():
        raise ValueError("annotate: " + (
            "no row has a rating to fit the rewards to; add a rated source to --data" if np.isnan(ratings).all() else
            "no rated answer has a reward: the model reads none so long"))
    if len(np.unique(ratings[known])) < 2:
        raise ValueError(f"annotate: all {known.sum()} known ratings are {ratings[known][0]:g}; a constant column fits "
                         "nothing")
    if len(np.unique(rewards[known])) <= degree:
        raise ValueError(f"annotate: {len(np.unique(rewards[known]))} different rewards among the rated answers; a fit "
                         f"of --degree {degree} needs {degree + 1}")
    z = (rewards[known] - low) / (high - low)
    return float(low), float(high), np.polynomial.polynomial.polyfit(z, ratings[known], degree)


def annotate(store: Converted, work: Path, out: Path, args) -> dict:
    """Both answers of every pair scored by --rm, mapped onto the ratings that are known; known ratings stay."""
    good = np.flatnonzero(~store.index["refused"])
    check_scale(store, good)
    scorer = load_scorer(args.rm, "reward", args.trust_remote_code)
    texts = [render(scorer[0], line["prompt"] + line[which]) for which in ("chosen", "rejected")
             for line in map(json.loads, store.lines(good))]
    found = score_texts(scorer, "reward", texts, cache_folder(args.cache_dir) / "scores", args.batch_tokens)
    rewards = np.array([np.nan if x is None else x for x in found]).reshape(2, -1)           # (2, n) chosen, rejected
    ratings = np.stack([store.index[k][good] for k in ("score_chosen", "score_rejected")])   # (2, n)
    low, high, c = fit_ratings(rewards.ravel(), ratings.ravel(), args.degree)
    raw = np.polynomial.polynomial.polyval((rewards - low) / (high - low), c)
    predicted, known = np.clip(raw, 1, 10), ~np.isnan(ratings) & ~np.isnan(rewards)
    final, annotated = np.where(np.isnan(ratings), predicted, ratings), np.isnan(ratings) & ~np.isnan(rewards)

    def lines():
        for k, line in enumerate(map(json.loads, store.lines(good))):
            for s, which in enumerate(("chosen", "rejected")):
                score, reward = (None if np.isnan(x[s, k]) else float(x[s, k]) for x in (final, rewards))
                line |= {f"score_{which}": score, f"reward_{which}": reward,
                         f"annotated_{which}": bool(annotated[s, k])}
            yield json_line(line)
    write_lines(out / "rows.jsonl", lines())
    figure(out / "annotate.png", [("rating given", "rating predicted", {
        "answers": (ratings[known], predicted[known]), "equal": ([1, 10], [1, 10])})])
    error, both = predicted[known] - ratings[known], ~np.isnan(rewards).any(0)
    slope = np.polynomial.polynomial.polyval(np.linspace(0, 1, 101), np.polynomial.polynomial.polyder(c))
    report = {"pairs": len(good), "scored_pairs": int(both.sum()), "ties": int((rewards[0] == rewards[1]).sum()),
              "agreement": float((rewards[0] > rewards[1])[both].sum() / max(1, both.sum())),
              "rated_answers": int(known.sum()),
              "annotated_answers": int(annotated.sum()), "clipped": int((raw != predicted)[~np.isnan(raw)].sum()),
              "too_long": int(np.isnan(rewards).sum()),
              "low": low, "high": high, "monotone": bool((slope >= 0).all()), "coefficients": c.tolist(),
              "mse": float((error ** 2).mean()), "mae": float(np.abs(error).mean())}
    print("rating = sum over k of coefficients z^k, z = (reward - low) / (high - low), clipped to 1..10; errors on "
          "what was fitted", *(f"{k}: {v}" for k, v in report.items()), sep="\n")
    return report


# --------------------------------------------------------------------------------------------- demo
DEMO_ROWS = {"demo": {"train": 60000, "test": 400}, "demo-pairs": {"train": 10000, "test": 400}}


def demo_tokenizer():
    """A fast tokenizer made in code: one token a byte, and ChatML's specials."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"] + letters)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def demo_turn(rng: random.Random) -> tuple[str, str]:
    """One question and its answer: reverse, sort, add, count."""
    task = rng.choice(["reverse", "sort", "add", "count"])
    if task == "add":
        a, b = rng.randrange(100), rng.randrange(10)
        return f"add {a} {b}", str(a + b)
    word = "".join(rng.choice("abcdefgh") for _ in range(rng.randint(3, 6)))
    return f"{task} {word}", {"reverse": word[::-1], "sort": "".join(sorted(word)), "count": str(len(word))}[task]


def demo_slip(question: str, right: str) -> str:
    """The demo's habitual mistake on a question: one too many (count), a carry forgotten or ten too many
    (add), the last two different letters swapped (reverse, sort); in a word of one letter, one lost."""
    if question.startswith("count"):
        return str(int(right) + 1)
    if question.startswith("add"):
        a, b = (int(x) % 10 for x in question.split()[1:])
        return str(int(right) - 10 if a + b >= 10 else int(right) + 10)
    for i in range(len(right) - 2, -1, -1):
        if right[i] != right[i + 1]:
            return right[:i] + right[i + 1] + right[i] + right[i + 2:]
    return right[1:]


DEMO_SLIPS = 0.5                   # share of the demo's training turns answered with its habitual mistake


def demo_conversations(n: int, seed: int = 0, split: str = "train") -> list[dict]:
    """n conversations with a reference answer, a quarter of them of 2 or 3 turns. A hash of the last
    question decides its split, so that no held-out question is ever trained as a last one. A share of the
    training turns is answered wrong, as in data that nobody judged; held-out turns are all right."""
    rng, rows = random.Random(f"{seed} {split}"), []
    while len(rows) < n:
        said = [demo_turn(rng) for _ in range(rng.choice([1, 1, 1, 1, 1, 1, 2, 3]))]
        held = [hashlib.sha256(q.encode()).digest()[0] < 16 for q, _ in said]
        slips = [split == "train" and rng.random() < DEMO_SLIPS for _ in said]
        if held[-1] if split == "test" else not any(held):
            rows.append({"messages": [m for (q, a), slip in zip(said, slips)
                                      for m in ask(q, demo_slip(q, a) if slip else a)], "answer": said[-1][1]})
    return rows


def demo_pairs(n: int, seed: int = 0, split: str = "train") -> list[dict]:
    """n preference rows: the demo's questions with the right last answer against the habitual mistake."""
    rows = []
    for row in demo_conversations(n, seed + 1, split):
        *prompt, last = row["messages"]
        reply = lambda text: [{"role": "assistant", "content": text}]
        rows.append({"prompt": prompt, "chosen": reply(row["answer"]), "answer": row["answer"],
                     "rejected": reply(demo_slip(prompt[-1]["content"], row["answer"]))})
    return rows


# --------------------------------------------------------------------------------------------- main
def marked(input_ids, targets, tokenizer, colour: bool) -> str:
    """Text of a row with its trained tokens in green, or between brackets where there is no colour."""
    on, off = ("\033[32m", "\033[0m") if colour else ("\u27e6", "\u27e7")
    runs = itertools.groupby(zip(input_ids, targets), key=lambda token: token[1])
    texts = [(trained, tokenizer.decode([i for i, _ in run])) for trained, run in runs]
    return "".join(on + text + off if trained else text for trained, text in texts)


def stats_figure(path: Path, made: Prepared, pairs: bool) -> None:
    of = {k: made.dataset.data.column(k).to_numpy().astype(float)
          for k in ("length", "score_chosen", "score_rejected")[:3 if pairs else 1]}
    panels = [(k, "", {name: line[k] for name, line in made.stats["sources"].items()}) for k in ("examples", "tokens")]
    panels.append(("tokens a row", "share of rows", {"all sources": of["length"]}))
    if pairs:
        panels += [("rating", "share of rows", {k: of[f"score_{k}"] for k in ("chosen", "rejected")}),
                   ("score difference", "share of rows", {"all sources": gap(*list(of.values())[1:])})]
    figure(path, panels)


def show_or_stats(args) -> dict:
    from transformers import AutoTokenizer
    tokenizer = demo_tokenizer() if args.model == "demo" else AutoTokenizer.from_pretrained(args.model)
    template = set_template(tokenizer, args.chat_template)
    made = prepare(args.data, tokenizer, template, max_length=args.max_length, loss_on=args.loss_on, seed=args.seed,
                   num_proc=args.num_proc, cache_dir=args.cache_dir, pairs=args.pairs,
                   max_prompt_length=args.max_prompt_length)
    if args.command == "show":
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        for r in made.dataset.select(range(min(args.n, len(made.dataset)))):
            print(f"--- source {r['source']}, row {r['row']}, {r['length']} tokens, {r['n_targets']} trained")
            sides = [(r["input_ids"], r["targets"])] if not args.pairs else \
                [(r["prompt"] + r[k], [False] * len(r["prompt"]) + r[k + "_targets"]) for k in ("chosen", "rejected")]
            for ids, targets in sides:
                print(marked(ids, targets, tokenizer, colour))
        return made.stats["total"]
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    print(stats_table(made.stats))
    stats_figure(out / "stats.png", made, args.pairs)
    write_report(out, made.stats)
    if args.pairs:
        return made.stats["total"]
    rows = pack(made.dataset["length"], args.max_length, args.packing)
    n_rows = len(rows.offsets) - 1
    fill = float((rows.end - rows.start).sum() / (n_rows * args.max_length))
    print(f"{args.packing}: {n_rows:,} rows of {args.max_length}, {fill:.2%} full")
    return made.stats["total"] | {"rows": n_rows, "fill": fill}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, output: bool = True):
        add = commands.add_parser(name, help=help, description=help, allow_abbrev=False).add_argument
        add("--data", nargs="+", help="NAME[:split][=fraction] or a mix, several; None: the demo's")
        if name != "annotate":
            add("--pairs", action="store_true", help="read preference rows")
        add("--seed", type=int, default=42, help="of fractions, orders and random selection")
        add("--num-proc", type=int, help="processes; None: all cores")
        add("--cache-dir", help="half-done work, prepared rows, scores; None: ~/.cache/lions")
        if output:
            add("--output", help=f"folder of report.json, rows.jsonl, pictures; None: runs/{name}, of select -METHOD")
        return add
    for name, help in (("show", "rows with the trained tokens marked"),
                       ("stats", "examples and tokens per source, as a table and a picture")):
        add = command(name, help, output=name == "stats")
        add("--max-prompt-length", type=int, default=512, help="prompt tokens that a cut pair keeps")
        add("--model", default="demo", help="whose tokenizer: Hub id, folder, or demo")
        add("--chat-template", default="chatml", help="chatml, tokenizer or a jinja file")
        add("--loss-on", choices=["assistant", "all"], default="assistant")
        add("--max-length", type=int, default=2048, help="tokens")
        if name == "show":
            add("-n", type=int, default=3, help="rows to show")
        else:
            add("--packing", choices=["bfd", "concat", "none"], default="bfd")
    add = command("dedup", "drop duplicates within and across sources; the first in the order given stays")
    add("--near", action="store_true", help=f"near ones, too: Jaccard of word {GRAM}-grams >= {NEAR} (needs rensa)")
    add("--examples", type=int, default=5, help="largest clusters that the report shows")
    add = command("decontaminate", f"rows that share {BENCHMARK_GRAM} words in a row with a benchmark's prompt")
    add("--against", nargs="+", required=True, help="benchmark files or data sets, as --data")
    add("--remove", action="store_true", help="write rows.jsonl without them; None: report only")
    add("--examples", type=int, default=5, help="overlaps that the report shows")
    add = command("select", "the best --budget rows by a published rule")
    add("--method", choices=["random", "longest", "alpagasus", "deita", "argilla", "a2"], required=True)
    add("--budget", type=int, required=True, help="rows to take")
    add("--model", default="demo", help="longest: whose tokenizer counts, Hub id, folder, or demo (bytes)")
    for kind, name in (("complexity", "hkust-nlp/deita-complexity-scorer"),
                       ("quality", "hkust-nlp/deita-quality-scorer"), ("embedding", "mistralai/Mistral-7B-v0.1")):
        add(f"--{kind}-model", default=name, help=f"deita: causal LM, Hub id or folder; default {name}")
    models(add)
    add = command("annotate", "a reward model's scores for pairs, mapped onto the ratings that are known")
    add("--rm", required=True, help="reward model: a sequence classifier with one output, Hub id or folder")
    add("--degree", type=int, default=1, help="of the least-squares polynomial from rescaled reward to rating")
    models(add)
    return p


def models(add) -> None:
    add("--batch-tokens", type=int, default=16384, help="tokens a batch of a scoring model, padding included")
    add("--trust-remote-code", action="store_true", help="run code that a model's folder brings; else it is refused")


COMMANDS = {"dedup": dedup, "decontaminate": decontaminate, "select": select, "annotate": annotate}


def check_flags(args) -> None:
    """All problems of the flags in one ValueError, before anything is read."""
    why = [f"--{f.replace('_', '-')} {getattr(args, f)}: must be at least {least}" for f, least in
           (("budget", 1), ("num_proc", 1), ("batch_tokens", 1), ("degree", 1), ("max_length", 2), ("examples", 0),
            ("n", 0))
           if getattr(args, f, None) is not None and getattr(args, f) < least]
    if getattr(args, "method", None) in ("alpagasus", "argilla", "a2") and not args.pairs:
        why.append(f"--method {args.method}: goes by the ratings of preference rows; add --pairs")
    if getattr(args, "near", False) and not importlib.util.find_spec("rensa"):
        why.append("--near: rensa, the MinHash library, is not installed; pip install rensa==0.5.0 (requirements.txt)")
    if why:
        raise ValueError("\n".join(why))


def main(argv=None) -> dict:
    args = parser().parse_args(argv)
    args.pairs = getattr(args, "pairs", True)
    check_flags(args)
    args.data = args.data or ["demo-pairs" if args.pairs else "demo"]
    named = f"-{args.method}" if args.command == "select" else ""
    args.output = getattr(args, "output", None) or f"runs/{args.command}{named}"
    parsed, out = check_sources(args.data), Path(args.output)
    for s in parsed if not args.pairs else []:
        if {"chosen", "rejected"} <= set(next(load_source(s), (0, {}))[1]):
            raise ValueError(f"--data {s.name}: preference rows; add --pairs, or their rejected answers are lost")
    if args.command not in COMMANDS:
        return show_or_stats(args)
    flags = {k: v for k, v in vars(args).items() if k not in ("output", "cache_dir", "num_proc")}
    against = check_sources(getattr(args, "against", []))
    if any(local_kind(s.name) and out.resolve() in (Path(s.name).resolve() / "x").parents for s in parsed + against):
        raise ValueError(f"--output {out}: holds what --data or --against reads; name another folder")
    benchmarks = read_benchmarks(against) if against else ()
    key = hashlib.sha256(json.dumps([flags, *([fingerprint(s) for s in of] for of in (parsed, against)),
                                     Path(__file__).read_text()]).encode()).hexdigest()[:32]
    out.mkdir(parents=True, exist_ok=True)
    with work_folder(cache_folder(args.cache_dir) / f"{args.command}-{key}.writing") as work:
        store = convert(parsed, args.pairs, args.seed, work)
        reasons = by_reason(store, refused_rows(store))
        check_rows(reasons, "refuse", int((~store.index["refused"]).sum()))
        report = COMMANDS[args.command](store, work, out, args, *benchmarks)
    report["refused"] = dict(zip(distinct(store.names), reasons))
    print("\n".join(refused_lines(report["refused"])))
    write_report(out, report | {"flags": vars(args)})
    return {k: v for k, v in report.items() if k != "examples"} | {"output": str(out)}


if __name__ == "__main__":
    try:
        print(json.dumps(main()))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
