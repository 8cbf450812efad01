"""Any conversation or preference source becomes rows of ids and masks.

    source -> raw rows -> conversations, one JSON line each (a pair: two that differ in their last
    turn) -> the first of equal rows, over all sources -> a seeded order -> rendered, tokenised and
    masked -> packed rows, or pairs that share their prompt

Rows that are left out are counted by source and reason, truncated tokens by source. All steps run
on `datasets`: in parallel, memory-mapped, cached by content. A killed command keeps its finished
shards.

    python data.py show --data FILE.jsonl --model DIR          rows with their trained tokens marked
    python data.py stats --data A.jsonl B.parquet=0.5          examples and tokens per source
    python data.py dedup --near --data A.jsonl B.jsonl         the first of equal and near rows
    python data.py decontaminate --against BENCH.jsonl --remove --data A.jsonl
    python data.py select --pairs --method a2 --budget 10000 --data PAIRS.jsonl
    python data.py annotate --rm MODEL --data RATED.jsonl UNRATED.jsonl

A source is NAME[:[config:]split][=fraction]. NAME is a Hub id, a file (SOURCES), a save_to_disk
folder, `demo`, `demo-pairs` or a mix (MIXES). A fraction counts rows without duplicates. Columns
decide the format of a row (FORMATS, PAIR_FORMATS). Text columns that no format reads are named.

Differs from the paper
 1. A2's bins of score differences are 1 wide, from 2 on, with equal quotas. The paper gives no
    widths and no quotas.
 2. Of lion-dpo-study the paper names three sources. Capybara, Orca, py-dpo and the half of HH-RLHF
    are our choice.
 3. A fraction of a source counts the rows that equal none taken before, of any source.
 4. lion-sft leaves ruozhiba_en out: the release's copy is not public.
"""
from __future__ import annotations

import argparse
import bisect
import contextlib
import functools
import glob
import gzip
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing
import operator
import os
import random
import re
import socket
import sys
import tempfile
import unicodedata
import uuid
from pathlib import Path
from typing import NamedTuple

import datasets
import filelock
import numpy as np
import pandas


# ------------------------------------------------------------------------------ sources and mixes
class Source(NamedTuple):
    name: str
    split: str = "train"           # or config:split
    fraction: float = 1.0


# The sources of the paper's table of SFT data (the public originals), and of its DPO mixtures (the
# authors' own copies on the Hub), with the fractions of the authors' configs. lion-dpo-study: the
# paper names UltraFeedback, HH-RLHF, TLDR and 264K pairs in all.
AUTHORS = "Columbia-NLP/DPO-"
ULTRAFEEDBACK = f"{AUTHORS}UltraFeedback_binarized:train_prefs"
TLDR = f"{AUTHORS}tldr-summarisation-preferences"
SMALL_PAIRS = [f"{AUTHORS}distilabel-capybara-dpo-7k-binarized",
               f"{AUTHORS}distilabel-intel-orca-dpo-pairs_cleaned", f"{AUTHORS}py-dpo-v0.1"]
SERIES_PAIRS = [*SMALL_PAIRS, ULTRAFEEDBACK, f"{AUTHORS}HelpSteer", f"{AUTHORS}PKU-SafeRLHF=0.1"]
DEITA_10K = "HuggingFaceH4/deita-10k-v0-sft:train_sft"
LARGE_SFT = ["teknium/OpenHermes-2.5", "meta-math/MetaMathQA",
             "HuggingFaceH4/ultrachat_200k:train_sft"]
MIXES = {
    "lion-sft": [*LARGE_SFT, "Open-Orca/SlimOrca-Dedup", "microsoft/orca-math-word-problems-200k",
                 "LDJnr/Capybara", DEITA_10K, "ise-uiuc/Magicoder-Evol-Instruct-110K"],
    "lion-sft-1.6m": LARGE_SFT,
    "deita-10k": [DEITA_10K],
    "lion-dpo-study": [ULTRAFEEDBACK, f"{AUTHORS}hh-rlhf=0.5", TLDR, *SMALL_PAIRS],
    "lion-dpo-gemma": [*SERIES_PAIRS, f"{TLDR}=0.1", f"{AUTHORS}Nectar=0.25"],
    "lion-dpo-llama": [*SERIES_PAIRS, f"{AUTHORS}Nectar"]}


def parse_source(text: str) -> Source:
    """'NAME[:[config:]split][=fraction]' -> Source. A name that exists as a path is taken whole."""
    if os.path.exists(text):
        return Source(text)
    name, split, share = re.fullmatch(
        r"(.*?)(?::((?:[^:=/]+:)?[\w-]+))?(?:=(\d*\.?\d+))?", text).groups()
    if share and not 0 < float(share) <= 1:
        raise ValueError(f"--data {text}: the fraction must be in (0, 1], not {share}")
    return Source(name, split or "train", float(share or 1))


def parse_sources(texts: list[str]) -> list[Source]:
    """All --data texts. A mix becomes its sources, a fraction of it that fraction of each."""
    sources = []
    for source in map(parse_source, texts):
        if source.name not in MIXES:
            sources.append(source)
            continue
        if source.split != "train":
            raise ValueError(f"--data {source.name}:{source.split}: a mix names its own splits")
        for part in map(parse_source, MIXES[source.name]):
            sources.append(part._replace(fraction=part.fraction * source.fraction))
    return sources


JSON_LINE = "lions_json_line"      # the one column of raw rows that are still text, a JSON each
SEPARATORS = {"csv": ",", "tsv": "\t"}
SOURCES = (" (a source is a Hub id, ID:split or ID:config:split, a saved folder, or a whole UTF-8 "
           "file that ends in .jsonl, .ndjson, .json, .csv, .tsv, each also with .gz, or .parquet)")


@contextlib.contextmanager
def loading(name, hint=""):
    """Any error inside becomes a ValueError with the name of what was loaded, and its cause.
    Libraries, parsers and connections raise many kinds."""
    try:
        yield
    except Exception as error:
        texts = [str(e) for e in (error, error.__cause__) if e]
        text = " ".join("; ".join(texts).split())[:1000]
        raise ValueError(f"{name} cannot be loaded ({type(error).__name__}): {text}{hint}"
                         ) from error


def check_split(source, splits):
    if source.split not in splits:
        raise ValueError(f"{source.name}:{source.split}: the splits are {', '.join(splits)}")


def load_source(source, folder):
    """(raw rows, a value that changes with their content). The rows are a memory-mapped
    datasets.Dataset: a table, or one column JSON_LINE, so that rows need no common schema. `folder`
    gets the copies of files and downloads."""
    name, split = source.name, source.split
    ending = re.search(r"\.(jsonl|ndjson|json|csv|tsv|parquet)(\.gz)?$", name)
    with loading(f"--data {name}", SOURCES):
        if name in DEMO_ROWS:
            check_split(source, DEMO_ROWS[name])
            return json_dataset(demo_rows(name, split)), name
        if os.path.isdir(name):
            splits = datasets.load_from_disk(name)
            if isinstance(splits, datasets.Dataset):
                splits = {"train": splits}
            check_split(source, splits)
            files = sorted(path for path in Path(name).rglob("*") if path.is_file())
            return splits[split], [file_hash(path) for path in files]
        if ending or os.path.isfile(name):
            check_split(source, ["train"])
            content = file_hash(name)
            return load_file(name, ending, str(folder / "files" / content)), content
        *config, split = split.split(":")
        raw = datasets.load_dataset(name, *config, split=split, cache_dir=str(folder / "hub"))
        return raw, raw._fingerprint


def json_dataset(rows):
    return datasets.Dataset.from_dict({JSON_LINE: [json.dumps(row) for row in rows]})


def load_file(name, ending, folder):
    """A file's raw rows. `folder` gets their Arrow copy."""
    if ending is None:
        raise ValueError("unknown ending")
    if os.path.getsize(name) == 0:
        raise ValueError("the file is empty")
    kind, zipped = ending.groups()
    copy = dict(data_files=glob.escape(os.path.abspath(name)), split="train", cache_dir=folder)
    if kind == "parquet":
        return datasets.load_dataset("parquet", **copy)
    if kind in SEPARATORS:
        rows = pandas.read_csv(name, sep=SEPARATORS[kind], dtype=str, keep_default_na=False,
                               encoding="utf-8-sig")
        if not isinstance(rows.index, pandas.RangeIndex):   # pandas: the first field is an index
            raise ValueError("rows have more fields than the header")
        return datasets.Dataset.from_pandas(rows)
    with (gzip.open if zipped else open)(name, "rt", encoding="utf-8-sig") as f:
        if kind == "json" and f.read(1) == "[":
            return json_dataset(json.loads(f"[{f.read()}"))
    lines = datasets.load_dataset("text", encoding="utf-8-sig", **copy)
    return lines.rename_column("text", JSON_LINE)


def raw_rows(batch, positions, name):
    """(row number from 1, row) of a batch of raw rows. The row numbers of JSON lines are line
    numbers. Blank lines are no rows."""
    if JSON_LINE not in batch:
        for position, values in zip(positions, zip(*batch.values())):
            yield position + 1, dict(zip(batch, values))
        return
    for position, line in zip(positions, batch[JSON_LINE]):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}:{position + 1}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{name}:{position + 1}: a row must be a JSON object")
        yield position + 1, row


def first_row(raw, name):
    """The first of some raw rows, {} if it is blank or missing."""
    return dict(raw_rows(raw[:1], [0], name)).get(1, {})


def hash_of(*values):
    """32 hex digits of the JSON of some values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def file_hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------- formats
class Pair(NamedTuple):
    prompt: list[dict]             # [{role, content}], what both answers follow
    chosen: str                    # y_w
    rejected: str                  # y_l
    score_chosen: float | None = None
    score_rejected: float | None = None
    answer: str | None = None      # reference answer for exact match
    unfinished: tuple = ()         # "chosen", "rejected": answers cut by a length limit


class Conversation(NamedTuple):
    messages: list[dict]           # [{role, content}], with weight 0 where a turn is not trained
    last_only: bool = False        # only the last assistant turn is trained (a pair's chosen)
    answer: str | None = None      # reference answer for exact match
    unfinished: bool = False       # the last turn was cut by a length limit: no end of turn


SIDES = ("chosen", "rejected")


def unrated(pair):
    return pair._replace(score_chosen=None, score_rejected=None)


def with_answer(pair, which):
    """The pair's prompt and its `which` answer, chosen or rejected, the one trained turn."""
    messages = pair.prompt + [assistant(getattr(pair, which))]
    return Conversation(messages, True, pair.answer, which in pair.unfinished)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def ask(question, answer) -> list[dict]:
    return [user(question), assistant(answer)]


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "model": "assistant", "system": "system", "Human": "user", "Assistant": "assistant",
         "User": "user"}
# What no rule reads: a row or turn that holds one is refused
UNREAD = ("tools functions tool_calls function_call reasoning reasoning_content thinking images "
          "image videos audio untrained").split()
TRAIN_MARKS = "weight train trainable training loss".split()    # 0 or false: not trained


def check_read(fields):
    for name in UNREAD:
        if fields.get(name) not in (None, "", "[]", "null", [], {}):
            raise ValueError(f"{name}: no rule reads it")


def turns(raw):
    """A list of {role, content}, of ShareGPT's {from, value}, of Capybara's {input, output} or of
    [question, answer], or a transcript, as [{role, content}], with weight 0 where a mark says that
    the turn is not trained."""
    if isinstance(raw, str):
        return transcript(raw)
    messages = []
    for m in raw or []:
        if isinstance(m, list):
            messages += ask(*m)
        elif "output" in m:
            messages += ask(m["input"], m["output"])
        else:
            check_read(m)
            role = ROLES.get(m.get("role", m.get("from")))
            if role is None:
                raise ValueError("unknown role")
            turn = {"role": role, "content": m.get("content", m.get("value"))}
            if role == "assistant" and any(m.get(mark, 1) == 0 for mark in TRAIN_MARKS):
                turn["weight"] = 0
            messages.append(turn)
    return messages


def unmarked(messages):
    """The messages without their weights."""
    return [{"role": m["role"], "content": m["content"]} for m in messages]


EXTRA = "<extra_id_1>"


def transcript(text):
    """HH-RLHF: '\\n\\nHuman: ..' and '\\n\\nAssistant: ..' turns. HelpSteer2: a question, then
    turns behind '<extra_id_1>Assistant' and '<extra_id_1>User'."""
    marks = r"\n\n(Human|Assistant):"
    if EXTRA in text:
        marks, text = rf"\s*{EXTRA}(User|Assistant)\s", f"{EXTRA}User\n{text}"
    before, *parts = re.split(marks, "\n\n" + text.lstrip())
    if before.strip():
        raise ValueError("text before the first turn; messages are a list or a transcript")
    return [{"role": ROLES[who], "content": content.strip()}
            for who, content in zip(parts[::2], parts[1::2])]


def is_transcript(text):
    return isinstance(text, str) and (text.lstrip().startswith("Human:") or EXTRA in text)


SYSTEM = ("system", "system_prompt", "system_message")


def system_of(row):
    return next((row[name] for name in SYSTEM if row.get(name)), None)


def add_system(messages, system):
    """The messages behind a system turn, unless they have one. None adds none."""
    if system is None or messages[:1] and messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}] + messages


QUESTIONS = ("prompt", "instruction", "query", "question", "input", "context")
ANSWERS = ("output", "response", "answer", "completion")
TURNS = ("messages", "conversations", "conversation")


def prompt_of(row):
    """What precedes the answer: the first of QUESTIONS, a text (and the row's input and context), a
    transcript or a list of turns, behind the row's history."""
    names = [name for name in QUESTIONS if row.get(name)]
    if not names:
        raise ValueError("no question beside the answer")
    question = row[names[0]]
    if isinstance(question, str) and not is_transcript(question):
        texts = [question, *(row[name] for name in names[1:] if name in ("input", "context"))]
        messages = [user("\n\n".join(texts))]
    else:
        messages = turns(question)
        if messages[-1] == assistant(""):                   # the header of the answer
            messages.pop()
    if isinstance(row.get("history"), list):
        messages = turns(row["history"]) + messages
    return messages


def reference(row):
    """What exact match looks for; None without one."""
    if row.get("answer") is None:
        return None
    return final_answer(str(row["answer"])) or None


def from_turns(row):
    """A column of turns. Our own files add `last_only` and `unfinished`."""
    column = next(name for name in TURNS if name in row)
    return Conversation(turns(row[column]), row.get("last_only") is True, reference(row),
                        row.get("unfinished") is True)


def answer_of(row, answer):
    """An answer, a text or a list of turns, as turns. The white space around an answer to a
    transcript is the transcript's."""
    if isinstance(answer, list):
        return turns(answer)
    if isinstance(answer, str) and any(is_transcript(row.get(name)) for name in QUESTIONS):
        answer = answer.strip()
    return [assistant(answer)]


def from_answer(row):
    """Columns of a question and an answer. GSM8K's reference answer follows '####'."""
    column, right = next(name for name in ANSWERS if name in row), reference(row)
    if column == "answer" and "####" not in str(row["answer"]):
        right = None
    return Conversation(prompt_of(row) + answer_of(row, row[column]), False, right)


def from_preference(row):
    """prompt + chosen, whose last turn is trained (the paper's 'SFT on chosen')."""
    unfinished = "chosen" in (row.get("unfinished") or ())
    return Conversation(side(row, "chosen"), True, reference(row), unfinished)


def side(row, which):
    """The whole conversation that ends in the `which` answer. The answer is a text or a list of
    turns, or a transcript or list that holds its prompt, too."""
    answer = row[which]
    messages = transcript(answer) if is_transcript(answer) else answer_of(row, answer)
    if messages and messages[0]["role"] == "assistant":
        messages = prompt_of(row) + messages
    return without_tldr(messages)


def without_tldr(messages):
    """In every version of TLDR's pairs 'TL;DR:' ends the prompt and begins no answer."""
    *_, question, answer = [user(""), user(""), *messages]
    if question["content"].startswith("SUBREDDIT:"):
        post = re.sub(r"\s*(TL;DR:)?\s*$", "", question["content"])
        question["content"] = f"{post}\nTL;DR:"
        answer["content"] = answer["content"].strip().removeprefix("TL;DR:").strip()
    return messages


def pair_from_preference(row):
    """UltraFeedback, HH-RLHF, py-dpo, Orca, Capybara, TRL: two answers to one history."""
    chosen, rejected = side(row, "chosen"), side(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("the histories of chosen and rejected differ")
    if {m["role"] for m in chosen[-1:] + rejected[-1:]} != {"assistant"}:
        raise ValueError("an answer is missing")
    return Pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], *ratings_of(row),
                reference(row), tuple(row.get("unfinished") or ()))


# Ratings are brought to 1..10 by 1 + 9 (r - low) / (high - low): A2's cut of 2 and AlpaGasus' 4.5
# of 5 (8.875) count on that scale. Unrated: HH-RLHF, TLDR (a rater's confidence is no rating of an
# answer), PKU-SafeRLHF, py-dpo, Nectar (ranks).
SCALES = [
    ("score_{}", 1, 10),           # UltraFeedback binarized, TRL's and our own files
    ("{}_score", 1, 10),
    ("{}-rating", 1, 5),           # UltraFeedback cleaned by Argilla: mean of four aspects
    ("rating_{}", 1, 5),           # Capybara-DPO
    ("{}_rating", 1, 5), ("{}_rating", 1, 10)]         # Argilla's mixes: what holds both
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")    # UltraFeedback raw
HELPSTEER = ("helpfulness", "correctness", "coherence")     # complexity and verbosity are style


def on_ten(value, low, high):
    """A rating of low..high on the scale of 1 to 10. None if the value is missing or outside its
    scale, as rewards are. 3 of 1..5 is 5.5."""
    try:
        r = float(value)
    except (TypeError, ValueError):
        return None
    if isinstance(value, bool) or not low <= r <= high:
        return None
    if (low, high) == (1, 10):                              # exactly as it was read
        return r
    return 1 + 9 * (r - low) / (high - low)


def ratings_of(row):
    """[chosen's, rejected's] ratings of 1 to 10, None if unrated."""
    if isinstance(row.get("rating"), list):                 # Orca pairs by Argilla: unordered
        both = [on_ten(r, 1, 10) for r in row["rating"]]
        if len(both) != 2 or None in both:
            return [None, None]
        return sorted(both, reverse=True)
    ratings = []
    for column, low, high in SCALES:
        ratings.append([on_ten(row.get(column.format(which)), low, high) for which in SIDES])
    return min(ratings, key=lambda both: both.count(None))  # the first of the most complete


def draw(text, n):
    """One of 0..n-1 by a hash of the text, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % n


def best_against_drawn(row, rated):
    """Of (rating or None, answer) the best, the first of equals, against one drawn by a hash of the
    prompt among those rated lower that are neither empty nor equal to it."""
    rated = [(r, y) for r, y in rated if r is not None]
    if len(rated) < 2:
        raise ValueError("fewer than two rated answers")
    r_w, y_w = max(rated, key=operator.itemgetter(0))
    worse = [(r, y) for r, y in rated if r < r_w]
    if not worse:
        raise ValueError("all ratings tie")
    worse = [(r, y) for r, y in worse if (y or "").strip() not in ("", y_w.strip())]
    if not worse:
        raise ValueError("every worse answer is empty or equals the best")
    prompt = prompt_of(row)
    r_l, y_l = worse[draw(row.get("prompt") or prompt[-1]["content"], len(worse))]
    return Pair(prompt, y_w, y_l, r_w, r_l)


def mean_rating(ratings, low, high):
    ratings = [on_ten(r, low, high) for r in ratings if r != "N/A"]
    if None in ratings or not ratings:
        return None
    return sum(ratings) / len(ratings)


def pair_from_completions(row):
    """UltraFeedback raw, by the mean of four aspects: its overall_score holds 10s meant as 1s."""
    rated = []
    for completion in row["completions"]:
        aspects = completion["annotations"] or {}
        ratings = [(aspects.get(name) or {}).get("Rating") for name in ASPECTS]
        rated.append((mean_rating(ratings, 1, 5), completion["response"]))
    return best_against_drawn(row, rated)


def pair_from_responses(row):
    """HelpSteer: all responses to a prompt (gathered by `gather_helpsteer`)."""
    rated = []
    for r in row["responses"]:
        ratings = [r.get(name) for name in HELPSTEER]
        rated.append((mean_rating(ratings, 0, 4), r["response"]))
    return best_against_drawn(row, rated)


def pair_from_ranks(row):
    """Nectar: rank 1 of seven against one drawn among the bottom three. A rank is no rating."""
    rated = [(-float(a["rank"]), a["answer"]) for a in row["answers"] if on_ten(a["rank"], 1, 7)]
    rated.sort(key=operator.itemgetter(0))
    return unrated(best_against_drawn(row, rated[-1:] + rated[:3]))


def pair_from_safety(row):
    """PKU-SafeRLHF: the better response against the other, if the better one is the safer one."""
    better = row["better_response_id"]
    if better not in (0, 1) or better != row["safer_response_id"]:
        raise ValueError("the better response is not the safer one")
    return Pair(prompt_of(row), *(row[f"response_{int(i)}"] for i in (better, 1 - better)))


def pair_from_summaries(row):
    """TLDR comparisons: the summary that the rater chose against the other."""
    info, choice = row["info"], row["choice"]
    if choice not in (0, 1) or len(row["summaries"]) != 2 or not info.get("post"):
        raise ValueError("no post, choice or second summary")
    text = (f"SUBREDDIT: r/{info.get('subreddit')}\nTITLE: {info.get('title')}\n"
            f"POST: {info['post']}\nTL;DR:")
    chosen, rejected = (row["summaries"][int(i)]["text"] for i in (choice, 1 - choice))
    return pair_from_preference(dict(prompt=text, chosen=chosen, rejected=rejected))


def pair_from_strength(row):
    """HelpSteer2 and 3: a strength of -3..3, below 0 for the first response."""
    strength = float(row.get("preference_strength", row.get("overall_preference")))
    if not strength:
        raise ValueError("neither response is preferred")
    name = "response" if "response1" in row else "response_"
    better, worse = row[f"{name}1"], row[f"{name}2"]
    if strength > 0:
        better, worse = worse, better
    return Pair(prompt_of(row), better, worse)


def pair_from_solutions(row):
    """GSM8K's model solutions: a right one against a wrong one, drawn by a hash of the question."""
    right, wrong = [], []
    for _, value in sorted(row.items()):
        if isinstance(value, dict) and "is_correct" in value:
            solutions = right if value["is_correct"] else wrong
            solutions.append(value["solution"])
    if not right or not wrong:
        raise ValueError("no right and wrong solution")
    byte = hashlib.sha256(row["question"].encode()).digest()
    return Pair(prompt_of(row), right[byte[0] % len(right)], wrong[byte[1] % len(wrong)])


# {column: converter}: the first column that a row has decides its format
PAIR_FORMATS = {
    "rejected": pair_from_preference, "completions": pair_from_completions,
    "answers": pair_from_ranks, "responses": pair_from_responses, "response_0": pair_from_safety,
    "summaries": pair_from_summaries, "ground_truth": pair_from_solutions,
    "preference_strength": pair_from_strength, "overall_preference": pair_from_strength}
FORMATS = {
    "messages": from_turns, "conversations": from_turns, "chosen": from_preference,
    "conversation": from_turns, **dict.fromkeys(ANSWERS, from_answer), **PAIR_FORMATS}


def convert_row(row, formats):
    """By the first format whose column the row has. ValueError(short reason) if it is refused."""
    check_read(row)
    for column, converter in formats.items():
        if column in row:
            try:
                return converter(row)
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                raise ValueError(f"malformed row ({type(error).__name__}: {error})") from None
    raise ValueError(f"unknown columns {', '.join(sorted(map(str, row)))}")


def checked(c, row):
    """A row's conversation, or ValueError(short reason) if its turns cannot be trained on or a text
    of context, history or system is not among them."""
    texts = [m["content"] for m in c.messages]
    if not texts:
        raise ValueError("empty conversation")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("content is not text")
    if any(not m["content"].strip() for m in c.messages if m["role"] != "system"):
        raise ValueError("empty turn")
    text = " ".join(texts)
    try:
        f"{text}{c.answer}".encode()
    except UnicodeEncodeError:                              # a lone surrogate
        raise ValueError("text is not valid Unicode") from None
    roles = "".join(m["role"][0] for m in c.messages)       # s, u, a
    if not re.fullmatch("s?(ua)*u?", roles):
        raise ValueError("role order broken")
    if "a" not in roles or (c.last_only and roles[-1] != "a"):
        raise ValueError("no assistant turn")
    words = " ".join(text.split())
    for name in ("context", "history", "input", "instruction", "query", "question", *SYSTEM):
        value = row.get(name)
        if isinstance(value, str) and not is_transcript(value) and (
                " ".join(value.split()) not in words):
            raise ValueError(f"{name}: the format has no place for it")
    return c


# Columns that some rule reads
READ = {*QUESTIONS, *SYSTEM, *FORMATS, "history", "response_1", "response_2", "response1",
        "response2"}


def unread_text(row):
    """'no rule reads NAME', for each of the row's columns of text that no rule reads."""
    return [f"no rule reads the text column {name}" for name in sorted({*row} - READ)
            if isinstance(row[name], str) and row[name].strip()]


def to_conversation(row: dict) -> Conversation:
    """A raw row of any known format. ValueError(short reason) if it is refused."""
    c = convert_row(row, FORMATS)
    if isinstance(c, Pair):                                 # sft.py trains the chosen answer
        c = with_answer(c, "chosen")
    return checked(c._replace(messages=add_system(c.messages, system_of(row))), row)


def to_pair(row: dict) -> Pair:
    """A raw row of any known preference format. ValueError(short reason) if it is refused."""
    pair = convert_row(row, PAIR_FORMATS)
    pair = pair._replace(prompt=unmarked(add_system(pair.prompt, system_of(row))))
    for which in SIDES:
        checked(with_answer(pair, which), row)
    if pair.chosen.strip() == pair.rejected.strip():
        raise ValueError("chosen equals rejected")
    return pair


def final_answer(text: str) -> str:
    """What exact match compares: the text after the last '####' (GSM8K), else all, stripped."""
    return text.rsplit("####", 1)[-1].strip()


# -------------------------------------------------------------------- chat template and loss mask
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def load_tokenizer(name, **settings):
    """The tokenizer of a Hub id or folder, or the demo's."""
    from transformers import AutoTokenizer
    if name == "demo":
        return demo_tokenizer()
    with loading(name):
        if Path(name).is_dir():                             # without it BOS is lost, unsaid
            (Path(name) / "tokenizer_config.json").stat()
        return AutoTokenizer.from_pretrained(name, **settings)


class Template(NamedTuple):
    end_of_turn: str               # text of the token that ends an assistant turn
    end_of_turn_id: int
    new_tokens: list[str]          # tokens that the vocabulary lacked
    specials: list[str]            # every special token's text: user text must not contain one
    bos: bool                      # whether a document starts with a BOS


def render(tokenizer, messages, sample=False):
    """The conversation as text. sample: up to and with the header of the answer to come. A template
    that refuses it raises ValueError."""
    import jinja2
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=sample)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses it: {error}") from None


def special_texts(tokenizer) -> list[str]:
    """The text of every special token."""
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return sorted(filter(None, added | set(tokenizer.all_special_tokens)))


def render_judged(tokenizer, messages):
    """A conversation as text for a reward model. Special tokens in its contents become a space, so
    that no answer ends its own turn and writes the next one."""
    special = "|".join(map(re.escape, special_texts(tokenizer))) or "(?!)"       # or no match
    return render(tokenizer, [m | {"content": re.sub(special, " ", m["content"])}
                              for m in messages])


def token_ids(tokenizer, text) -> list:
    """Ids of a rendered text, or of each of several. Their template alone writes the BOS."""
    return tokenizer(text, add_special_tokens=False).input_ids


def prompt_ids(tokenizer, messages) -> list[int]:
    """What sampling sees, and what precedes a trained answer."""
    return token_ids(tokenizer, render(tokenizer, messages, sample=True))


def write_bos(tokenizer):
    """Whether a document starts with a BOS. The template writes it, also where the tokenizer would
    add it: in training, in sampling and for a reward model alike."""
    bos = tokenizer.bos_token
    if bos is None:
        return False
    adds = tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    text = render(tokenizer, ask("q", "a"))
    if adds and not text.startswith(bos):
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return adds or text.startswith(bos) and text.count(bos) == 1


# Vocabulary entries that models keep for later use: Gemma, LLaMA-3, Phi-3, ..
RESERVED = re.compile(r"\W*(unused|reserved(_special)?(_token)?|placeholder)_?\d+\W*")


def add_chatml_tokens(tokenizer):
    """ChatML's tokens that the vocabulary lacks. They take its first reserved entries, so that it
    keeps its size, or else are appended."""
    chatml, vocab = ["<|im_start|>", "<|im_end|>"], tokenizer.get_vocab()
    new = [token for token in chatml if token not in vocab]
    reserved = sorted(filter(RESERVED.fullmatch, vocab), key=vocab.get)
    if new and reserved:
        state = tokenizer.backend_tokenizer.to_str()
        for token, entry in zip(new, reserved):
            state = state.replace(json.dumps(entry), json.dumps(token))
        tokenizer.backend_tokenizer.__setstate__(state.encode())
    tokenizer.add_special_tokens({"additional_special_tokens": chatml},
                                 replace_extra_special_tokens=False)
    return new


def set_template(tokenizer, chat_template: str = "chatml") -> Template:
    """Give the tokenizer its template: 'chatml' (above), 'tokenizer' (its own) or a jinja file,
    with a BOS if the tokenizer uses one, and the special tokens that it lacks. A probe
    conversation must encode, each answer ended by one special token."""
    flag, new = f"--chat-template {chat_template}", []
    if chat_template == "chatml":
        tokenizer.chat_template, new = CHATML, add_chatml_tokens(tokenizer)
    elif chat_template != "tokenizer":
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        raise ValueError(f"{flag}: this tokenizer has no chat template; use chatml")
    probe = ask("one", "\ue100first\ue101") + ask("two", "\ue100second\ue101")
    prompts = ()
    try:
        bos, text = write_bos(tokenizer), render(tokenizer, probe)
        specials = special_texts(tokenizer)
        rest = text.partition(probe[1]["content"])[2].lstrip()
        end = max((t for t in specials if rest.startswith(t)), key=len, default=None)
        if end is None:
            raise ValueError("no special token ends an assistant turn; models would never stop")
        end_id = tokenizer.convert_tokens_to_ids(end)
        template = Template(end, end_id, new, specials, bos)
        prompts = [render(tokenizer, probe[:i], sample=True) for i in (1, 3)]
        encode(Conversation(probe), tokenizer, template)
    except ValueError as error:
        if prompts:
            other = min(prompts, key=text.startswith)       # the first that is no prefix
            error = f"{error}\n  training: {text!r}\n  sampling: {other!r}"
        raise ValueError(f"{flag}: {error}") from None
    return template


class Encoded(NamedTuple):
    input_ids: list[int]
    targets: list[bool]            # which tokens are scored, never the first
    cut: int                       # tokens beyond max_length


def encode(conversation: Conversation, tokenizer, template: Template, *,
           max_length: int | None = None, loss_on: str = "assistant") -> Encoded:
    """Ids and target mask of a conversation.

    The targets are what the assistant writes: from the end of the prompt that sampling would see,
    up to and with the end of turn. That prompt's tokens must be the beginning of the ids. loss_on
    'last': the last assistant turn only. loss_on 'all': every token but the first. Tokens beyond
    max_length are cut from the end. No EOS is added. ValueError(short reason) if the row is
    refused."""
    messages = conversation.messages
    contents = [m["content"].strip() for m in messages]
    joined = "\0".join(contents)
    if any(special in joined for special in template.specials):
        raise ValueError("special token in the text")
    text, at = render(tokenizer, messages), 0
    system = messages[0]["role"] == "system" and contents[0]
    loses_text = system and render(tokenizer, messages[1:]) == text     # shows no system turn
    for content in contents:                                # each must appear, in this order
        at = text.find(content, at) + len(content)
        loses_text = loses_text or at < len(content)
    if loses_text:
        raise ValueError("the chat template drops or rewrites a turn")
    trained = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if conversation.last_only or loss_on == "last":
        trained = trained[-1:]
    prompts = [render(tokenizer, messages[:i], sample=True) for i in trained]   # sampling sees them
    ids, *ids_of_prompts = token_ids(tokenizer, [text, *prompts])
    targets = [loss_on == "all"] * len(ids)
    for i, prompt, before in zip(trained, prompts, ids_of_prompts):
        after = text[len(prompt):].lstrip()
        ended = after[len(contents[i]):].lstrip().startswith(template.end_of_turn)
        if not (text.startswith(prompt) and after.startswith(contents[i]) and ended):
            raise ValueError("the chat template writes another text before an answer in training "
                             "than in sampling")
        if ids[:len(before)] != before:
            raise ValueError("the answer's first token merges with the prompt")
        end = ids.index(template.end_of_turn_id, len(before)) + 1
        targets[len(before):end] = [messages[i].get("weight") != 0] * (end - len(before))
    if conversation.unfinished:                             # without the last end of turn
        ids, targets = ids[:end - 1], targets[:end - 1]
    targets[0] = False
    n_tokens = len(ids)
    ids, targets = ids[:max_length], targets[:max_length]
    cut = n_tokens - len(ids)
    if not any(targets):
        raise ValueError("no target left after truncation" if cut else "no target")
    return Encoded(ids, targets, cut)


class EncodedPair(NamedTuple):
    prompt: list[int]              # x, what both answers share
    chosen: list[int]              # y_w, with what precedes it and is not shared
    rejected: list[int]            # y_l likewise
    chosen_targets: list[bool]     # which tokens of `chosen` are scored
    rejected_targets: list[bool]
    cut: int                       # tokens cut from the prompt and from both answers


PAIR_LISTS = EncodedPair._fields[:5]


def encode_pair(pair: Pair, tokenizer, template: Template, *, max_length: int | None = None,
                max_prompt_length: int = 512) -> EncodedPair:
    """Both conversations by `encode`, split behind the longest common token prefix that ends at or
    before both answers.

    A pair whose longer side exceeds max_length loses prompt tokens after BOS from the left, as few
    as needed, until max_prompt_length of them are left, then the end of its answers.
    ValueError(short reason) if an answer has no target left or both became equal."""
    ids, masks, _ = zip(*(encode(with_answer(pair, which), tokenizer, template)
                          for which in SIDES))
    share, n_tokens = masks[0].index(True), sum(map(len, ids))      # both answers begin at share
    over = max(map(len, ids)) - (max_length or sys.maxsize)
    c = max(0, min(over, share - max_prompt_length))        # cut from the prompt
    a = int(template.bos)
    ids = [(y[:a] + y[a + c:])[:max_length] for y in ids]
    masks = [(m[:a] + m[a + c:])[:max_length] for m in masks]
    cut, share = n_tokens - sum(map(len, ids)), share - c
    if not all(map(any, masks)):
        raise ValueError("no answer token left after truncation" if cut else "no answer token")
    if ids[0] == ids[1]:
        raise ValueError("chosen equals rejected " + ("after truncation" if cut else "as tokens"))
    return EncodedPair(ids[0][:share], *(y[share:] for y in ids), *(m[share:] for m in masks), cut)


# ---------------------------------------------------------------------------------------- prepare
class Prepared(NamedTuple):
    dataset: object                # datasets.Dataset, see `prepare`
    stats: dict                    # JSON-serialisable, printed by stats_table()
    key: str                       # hash of all that decided the content


def permutation(n: int, seed: int, epoch: int = 0) -> np.ndarray:
    """The one seeded order of n things in an epoch, the same on every machine and rank."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


def canonical(text: str) -> str:
    """Equal for texts that count as the same: Unicode's NFC without white space at the ends. White
    space inside is content, as in code."""
    return unicodedata.normalize("NFC", text).strip()


def canonical_hash(messages):
    text = json.dumps([[m["role"], canonical(m["content"])] for m in messages])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def with_system(messages, key, probability, seed):
    """Adds an empty system turn with a probability. The draw depends on seed and content alone."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).hexdigest()
    if int(digest[:8], 16) / 2 ** 32 < probability:
        return add_system(messages, "")
    return messages


def cache_folder(cache_dir):
    """The one folder that preparation writes to."""
    try:
        folder = Path(cache_dir or Path.home() / ".cache" / "lions")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:                # RuntimeError: there is no home
        raise ValueError(f"--cache-dir {cache_dir or '~/.cache/lions'}: {error}; name a folder "
                         "that can be written to") from None
    return folder


def check_processes(n):
    """ValueError if the machine cannot start several processes (no usable /dev/shm)."""
    try:
        multiprocessing.Lock()
    except OSError as error:
        raise ValueError(f"--num-proc {n}: processes need shared memory in /dev/shm ({error}); use "
                         "--num-proc 1") from None


def cached_map(dataset, function, path, columns, num_proc, **settings):
    """dataset.map(function) in batches and processes, with the columns {name: feature}, cached at
    `path`.

    The name of `path` is a hash of all that decides the content. A cache that differs from its
    checksum is made again."""
    workers = min(num_proc or os.cpu_count(), math.ceil(len(dataset) / 1000))
    if workers > 1:
        check_processes(workers)
    path.parent.mkdir(parents=True, exist_ok=True)
    checksum = path.with_suffix(".json")
    with filelock.FileLock(f"{path}.lock"):
        stored, parts = read_json(checksum), part_hashes(path)
        for name in parts:                                  # whole shards stay
            if stored.get(name, parts[name]) != parts[name]:
                print(f"cache {path} is damaged; it is made again", file=sys.stderr)
                path.with_name(name).unlink()
        try:
            mapped = dataset.map(
                function, batched=True, with_indices=True, fn_kwargs=settings,
                features=datasets.Features(columns), remove_columns=dataset.column_names,
                cache_file_name=str(path), new_fingerprint=path.stem, desc=function.__name__,
                load_from_cache_file=True, num_proc=workers if workers > 1 else None)
            if not parts or stored != parts:
                write_json(checksum, part_hashes(path))
        except OSError as error:
            raise OSError(f"--cache-dir: {path} could not be written ({error}); the same command "
                          "continues") from error
        return mapped


def part_hashes(path):
    """{name: hash of its content} of a cache's Arrow files."""
    parts = sorted(path.parent.glob(f"{path.stem}*.arrow"))
    return {part.name: file_hash(part) for part in parts}


def batch_of(records, columns):
    """Records as `datasets` wants them: {column: values}, None where a record lacks it."""
    return {column: [record.get(column) for record in records] for column in columns}


def frame(dataset, *columns: str):
    """Columns of a Dataset in its order, as a pandas.DataFrame."""
    return dataset.select_columns(list(columns)).with_format("arrow")[:].to_pandas()


SCORES = ("score_chosen", "score_rejected")
PLACEHOLDERS = [10, 1]             # SCORES of every row of the authors' Nectar and HH-RLHF
TEXT, NUMBER, SCORE, FLAG = map(datasets.Value, ("string", "int64", "float64", "bool"))
CONVERTED = dict(line=TEXT, key=TEXT, refused=TEXT, source=TEXT, row=NUMBER, score_chosen=SCORE,
                 score_rejected=SCORE, unread=[TEXT])
DUPLICATE = "equal to an earlier row"


def convert_rows(batch, positions, name, pairs, rated):
    """Raw rows -> columns CONVERTED: a line of JSON (a conversation or a pair), a hash of its
    canonical text, its scores if `rated`, or the reason in `refused`. Rows that a command here
    wrote keep their `lions_origin`, [source, row]."""
    records = []
    for n, row in raw_rows(batch, positions, name):
        source, at = row.get("lions_origin") or (name, n)
        record = dict(source=source, row=at, unread=unread_text(row))
        try:
            example = to_pair(row) if pairs else to_conversation(row)
            if pairs and not rated:
                example = unrated(example)
            fields = example._asdict() | {"lions_origin": [source, at]}
            messages = fields["prompt" if pairs else "messages"]
            for which in SIDES if pairs else ():
                messages = messages + [{"role": which, "content": fields[which]}]
                fields[which] = [assistant(fields[which])]
            record |= fields | dict(line=json.dumps(fields), key=canonical_hash(messages))
        except ValueError as error:
            record["refused"] = str(error)
        records.append(record)
    return batch_of(records, CONVERTED)


def gather_helpsteer(raw, name):
    """HelpSteer's rows of one prompt as one row, in the line of the first. The other lines are
    blank."""
    if not {"prompt", "response", *HELPSTEER} <= set(first_row(raw, name)):
        return raw
    lines, by_prompt = [""] * len(raw), {}
    for n, row in raw_rows(raw[:], range(len(raw)), name):
        by_prompt.setdefault(str(row.get("prompt")), []).append((n - 1, row))
    for numbered in by_prompt.values():
        positions, rows = zip(*numbered)
        lines[positions[0]] = json.dumps(rows[0] | {"responses": rows})
    return datasets.Dataset.from_dict({JSON_LINE: lines})


def convert(sources, pairs, seed, folder, num_proc):
    """The sources, converted: a Dataset with the columns CONVERTED, and a hash of each source's
    content. A fraction f takes int(f n) of a source's n rows that are usable and equal none taken
    before. Raises ValueError for a source of which no row can be used."""
    parts, hashes, taken = [], [], []
    for source in sources:
        raw, content = load_source(source, folder)
        if pairs:
            raw = gather_helpsteer(raw, source.name)
        hashes.append(hash_of(source.name, source.split, content, file_hash(__file__)))
        for rated in (True, False):                         # again without placeholders
            path = folder / "converted" / f"{hash_of(hashes[-1], pairs, rated)}.arrow"
            part = cached_map(raw, convert_rows, path, CONVERTED, num_proc, name=source.name,
                              pairs=pairs, rated=rated)
            rows = frame(part, "source", "row", "refused", "key", *SCORES)
            scores = rows[[*SCORES]].dropna().drop_duplicates()
            if scores.to_numpy().tolist() != [PLACEHOLDERS]:
                break
        if not rated:
            print(f"--data {source.name}: every row has the scores {PLACEHOLDERS}; such "
                  "placeholders are no ratings", file=sys.stderr)
        check_refused(rows)
        # Rows are drawn among the different new ones. Copies of what is left out go with it.
        new = rows.key[~rows.key.isin(taken)].dropna().drop_duplicates()
        n, order = max(1, int(source.fraction * len(new))), permutation(len(new), seed)
        taken += new.iloc[order[:n]].tolist()
        parts.append(part.select(rows.index[~rows.key.isin(new.iloc[order[n:]])]))
    return datasets.concatenate_datasets(parts), hashes


def by_reason(rows, column="refused"):
    """{source: {reason: [number of rows, FILE:ROW of the first]}} of rows that are left out, or
    whose `unread` columns are."""
    reasons, rows = {}, rows[["source", "row", column]].explode(column)
    for (source, reason), part in rows.groupby(["source", column], sort=False):
        reasons.setdefault(source, {})[reason] = [len(part), f"{source}:{part.row.min()}"]
    return reasons


def reason_lines(reasons):
    """A line for each reason in some dicts {reason: [number of rows, FILE:ROW of the first]}."""
    lines = []
    for counts in reasons:
        lines += [f"  {where}: {reason} ({n} such rows)" for reason, (n, where) in counts.items()]
    return "\n".join(lines)


def check_refused(rows, bad_rows="refuse"):
    """ValueError with every reason if no row is left, or if --bad-rows stop asks for it."""
    refused = rows.refused.notna()
    if refused.all() or (refused.any() and bad_rows == "stop"):
        problem = "no row is left" if refused.all() else "stopped at bad rows"
        raise ValueError(f"--data: {problem}:\n{reason_lines(by_reason(rows).values())}")


def gap(chosen, rejected):
    """Score differences of pairs, NaN if a score is missing. 8.2 - 6.2 is 2, not a little less."""
    return np.round(np.asarray(chosen, dtype=float) - np.asarray(rejected, dtype=float), 9)


COUNTED = ("length", "n_targets", "turns", "cut")
TOKEN = datasets.Value("int32")
COMMON = dict(source=TEXT, refused=TEXT, answer=TEXT, messages_json=TEXT, row=NUMBER)
COMMON |= dict.fromkeys(COUNTED, TOKEN)
ENCODED = {  # columns of encoded rows, by `pairs`
    False: COMMON | dict(input_ids=[TOKEN], targets=[FLAG]),
    True: COMMON | dict.fromkeys(SCORES, SCORE) | dict.fromkeys(PAIR_LISTS[:3], [TOKEN])
    | dict.fromkeys(PAIR_LISTS[3:], [FLAG])}


def encode_rows(batch, positions, tokenizer, template, pairs, seed, max_length,
                loss_on="assistant", max_prompt_length=512, empty_system=0.0, min_gap=None):
    """Converted rows -> columns ENCODED[pairs], or the reason in `refused`. messages_json holds the
    messages, of a pair its prompt, both answers and which of them are unfinished.

    empty_system: the probability of adding an empty system turn where there is none. min_gap: the
    least score difference of a pair. None: unrated pairs stay, too."""
    records, before = [], "prompt" if pairs else "messages"
    for line, key in zip(batch["line"], batch["key"]):
        fields = json.loads(line)
        source, row = fields.pop("lions_origin")
        record = dict(source=source, row=row)
        fields[before] = with_system(fields[before], key, empty_system, seed)
        try:
            if pairs:
                fields |= {which: fields[which][0]["content"] for which in SIDES}
                pair = Pair(**fields)
                difference = gap(pair.score_chosen, pair.score_rejected)
                if min_gap is not None and not difference >= min_gap:
                    raise ValueError("no score, or a score gap below --min-gap")
                encoded = encode_pair(pair, tokenizer, template, max_length=max_length,
                                      max_prompt_length=max_prompt_length)
                masks = encoded.chosen_targets + encoded.rejected_targets
                length, turns = len(encoded.prompt) + len(masks), len(pair.prompt) + 1
                messages = [pair.prompt, pair.chosen, pair.rejected, pair.unfinished]
            else:
                encoded = encode(Conversation(**fields), tokenizer, template, max_length=max_length,
                                 loss_on=loss_on)
                masks, messages = encoded.targets, unmarked(fields["messages"])
                length, turns = len(masks), len(messages)
            record |= fields | encoded._asdict() | dict(
                length=length, n_targets=sum(masks), turns=turns,
                messages_json=json.dumps(messages))
        except ValueError as error:
            record["refused"] = str(error)
        records.append(record)
    return batch_of(records, ENCODED[pairs])


def prepare(sources: list[str], tokenizer, template: Template, *, pairs: bool = False,
            max_examples: int | None = None, seed: int = 42, bad_rows: str = "refuse",
            num_proc: int | None = None, cache_dir: str | None = None, **settings) -> Prepared:
    """Sources -> encoded rows in a seeded order, without duplicates, memory-mapped, cached. The
    other settings are those of `encode_rows`.

    Columns: source, row, answer, messages_json, length, n_targets, and input_ids and targets, or
    with `pairs` PAIR_LISTS and SCORES. A pair's length is that of x, y_w and y_l. Duplicates are
    equal in prompt, chosen and rejected. max_examples: the first so many of the order. Others take
    the place of rows that encoding refuses. Raises ValueError if no row is left, or for bad_rows
    "stop" if any is refused."""
    parsed, folder = parse_sources(sources), cache_folder(cache_dir)
    store, contents = convert(parsed, pairs, seed, folder, num_proc)
    rows = frame(store, "source", "row", "refused", "unread", "key", *SCORES)
    check_refused(rows, bad_rows)
    rows.loc[rows.refused.isna() & rows.key.duplicated(), "refused"] = DUPLICATE
    kept = np.flatnonzero(rows.refused.isna())

    settings |= dict(pairs=pairs, seed=seed)
    key = hash_of(parsed, contents, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template,
                  str(tokenizer.special_tokens_map), template, settings, max_examples)
    order, parts, counts = kept[permutation(len(kept), seed)], [], []
    missing = max_examples or len(order)
    while missing and len(order):                           # once, but for rows that are refused
        ids, order = order[:missing], order[missing:]
        path = folder / "encoded" / f"{key}-{len(parts)}.arrow"
        part = cached_map(store.select(ids), encode_rows, path, ENCODED[pairs], num_proc,
                          tokenizer=tokenizer, template=template, **settings)
        counts.append(frame(part, "refused", *COUNTED).set_index(ids))
        parts.append(part.select(np.flatnonzero(counts[-1].refused.isna())))
        missing -= len(parts[-1])
    counts = pandas.concat(counts)
    rows["refused"] = rows.refused.fillna(counts.refused)
    check_refused(rows.loc[counts.index], bad_rows)
    dataset = datasets.concatenate_datasets(parts).remove_columns(["turns", "cut", "refused"])
    return Prepared(dataset, source_stats(rows.join(counts[list(COUNTED)])), key)


def source_stats(rows):
    """{"sources": {name: counts}, "total": counts}. rows: a line per raw row, with the reason why
    it is left out, or with COUNTED and (pairs) SCORES."""
    rows = rows.assign(truncated=rows["cut"] > 0, gap=gap(rows.score_chosen, rows.score_rejected))
    rows.loc[rows.length.isna(), ["score_chosen", "gap"]] = np.nan
    groups = pandas.concat([rows, rows.assign(source="total")]).groupby("source", sort=False)
    counts = groups.agg(
        examples=("length", "count"), tokens=("length", "sum"), targets=("n_targets", "sum"),
        turns=("turns", "sum"), truncated=("truncated", "sum"), cut=("cut", "sum"),
        refused=("refused", "count"), rated=("score_chosen", "count"),
        mean_rating=("score_chosen", "mean"), mean_gap=("gap", "mean"))
    for percent in (50, 90, 99, 100):
        counts[f"p{percent}"] = groups.length.quantile(percent / 100)
    sources = json.loads(counts.convert_dtypes().to_json(orient="index"))
    total = sources.pop("total")
    for name, column in (("reasons", "refused"), ("unread", "unread")):
        reasons = by_reason(rows, column)
        for source in sources:
            sources[source][name] = reasons.get(source, {})
    return {"sources": sources, "total": total}


def stats_table(stats):
    """The paper's table: examples and tokens per source, absolute and percent, lengths, and what
    was left out and why, and the ratings of pairs on the scale of 1 to 10. A column that is zero
    or missing for all sources is left out."""
    sources, total = stats["sources"], stats["total"]
    t = pandas.DataFrame([*sources.values(), total], [*sources, "total"])[[*total]]
    for name in ("tokens", "examples"):
        t.insert(0, f"% {name}", 100 * t[name] / total[name])
    lines = [table(t.loc[:, t.any()].reset_index(names="source"))]
    for kind in ("reasons", "unread"):
        lines.append(reason_lines(counts[kind] for counts in sources.values()))
    return "\n".join(lines)


def without_nan(t):
    """A DataFrame or Series with None in place of NaN, which JSON does not have."""
    return t.astype(object).where(t.notna(), None)


def table(rows):
    """Rows as an aligned Markdown table, with - for what is missing."""
    rows = without_nan(pandas.DataFrame(rows))
    return rows.to_markdown(index=False, floatfmt=".4g", intfmt=",", missingval="-")


# ---------------------------------------------------------------------------------------- packing
class Rows(NamedTuple):
    """Row r holds the pieces offsets[r]:offsets[r+1]. A piece is tokens start:end of a document."""
    offsets: np.ndarray            # (R+1,) int64
    doc: np.ndarray                # (P,) int64
    start: np.ndarray              # (P,) int64
    end: np.ndarray                # (P,) int64


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each document: longest first, each into the fullest row that it fits. (n,) ->
    (n,)

    Open rows wait in one stack per free capacity. The capacities with a row are kept sorted, so
    that the fullest row that fits is at the first capacity at or above the length."""
    stacks, capacities, n_rows = [[] for _ in range(capacity + 1)], [], 0
    row_of = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    for i, length in zip(order.tolist(), lengths[order].tolist()):
        first = bisect.bisect_left(capacities, length)
        if first < len(capacities):
            room = capacities[first]
            row = stacks[room].pop()
            if not stacks[room]:
                capacities.pop(first)
        else:
            room, row, n_rows = capacity, n_rows, n_rows + 1
        left = room - length
        if left and not stacks[left]:
            bisect.insort(capacities, left)
        stacks[left].append(row)
        row_of[i] = row
    return row_of


def pack(lengths, max_length: int, packing: str = "bfd") -> Rows:
    """Documents -> rows of at most max_length tokens. No document is longer than that.

    bfd: whole documents, best-fit decreasing. none: one document per row. concat: documents
    continue in the next row. The second piece repeats the last token before the cut as context, so
    that every target is scored exactly once (the first token of a piece never is)."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths) or lengths.min() < 1 or lengths.max() > max_length:
        raise ValueError(f"pack: needs lengths in 1..{max_length}")
    if packing != "concat":
        row_of = np.arange(len(lengths))
        if packing == "bfd":
            row_of = best_fit_decreasing(lengths, max_length)
        doc = np.argsort(row_of, kind="stable")
        offsets = np.append(0, np.cumsum(np.bincount(row_of)))
        return Rows(offsets, doc, np.zeros_like(doc), lengths[doc])
    offsets, pieces, room = [0], [], max_length
    for d, length in enumerate(lengths.tolist()):
        a = 0
        while a < length - (a > 0):                         # context alone scores nothing
            if room < 2:
                offsets.append(len(pieces))
                room = max_length
            b = min(length, a + room)
            pieces.append((d, a, b))
            room -= b - a
            a = b - 1 if b < length else length
    offsets.append(len(pieces))
    return Rows(np.array(offsets), *np.array(pieces, dtype=np.int64).T)


# -------------------------------------------------------------------------------------- demo data
DEMO_ROWS = {"demo": {"train": 60000, "test": 400}, "demo-pairs": {"train": 10000, "test": 400}}
DEMO_SLIPS = 0.5                   # share of training turns with the demo's habitual mistake


def demo_rows(name, split):
    make = {"demo": demo_conversations, "demo-pairs": demo_pairs}[name]
    return make(DEMO_ROWS[name][split], 0, split)


def demo_tokenizer():
    """A fast tokenizer made in code: one token per byte, and ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    specials = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]
    tokens = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": specials[2:]})
    return tokenizer


def demo_turn(rng):
    """One question and its answer: reverse, sort, add, count."""
    task = rng.choice(["reverse", "sort", "add", "count"])
    if task == "add":
        a, b = rng.randrange(100), rng.randrange(10)
        return f"add {a} {b}", str(a + b)
    word = "".join(rng.choice("abcdefgh") for _ in range(rng.randint(3, 6)))
    answers = {"reverse": word[::-1], "sort": "".join(sorted(word)), "count": str(len(word))}
    return f"{task} {word}", answers[task]


def demo_slip(question, right):
    """The demo's habitual mistake on a question. count: one too many. add: a carry forgotten or ten
    too many. reverse, sort: the last two different letters swapped, or one letter lost."""
    if question.startswith("count"):
        return str(int(right) + 1)
    if question.startswith("add"):
        a, b = (int(number) % 10 for number in question.split()[1:])
        return str(int(right) - 10 if a + b >= 10 else int(right) + 10)
    swapped, differ = re.subn(r"(.)(?!\1)(.)(\2*)$", r"\2\1\3", right)
    return swapped if differ else right[1:]


def demo_conversations(n, seed=0, split="train") -> list[dict]:
    """n conversations with a reference answer, a quarter of them of 2 or 3 turns. A hash of the
    last question decides its split, so that no held-out question is trained as a last one. A share
    of the training turns is answered wrong, as in data that nobody judged. Held-out turns are all
    right."""
    rng, rows = random.Random(f"{seed} {split}"), []
    while len(rows) < n:
        exchanges = [demo_turn(rng) for _ in range(rng.choice([1] * 6 + [2, 3]))]
        held_out = [hashlib.sha256(q.encode()).digest()[0] < 16 for q, _ in exchanges]
        messages = []
        for q, a in exchanges:
            if split == "train" and rng.random() < DEMO_SLIPS:
                a = demo_slip(q, a)
            messages += ask(q, a)
        if held_out[-1] if split == "test" else not any(held_out):
            rows.append({"messages": messages, "answer": exchanges[-1][1]})
    return rows


def demo_pairs(n, seed=0, split="train") -> list[dict]:
    """n preference rows: the demo's questions, the right last answer over the habitual mistake."""
    rows = []
    for row in demo_conversations(n, seed + 1, split):
        prompt, right = row["messages"][:-1], row["answer"]
        wrong = demo_slip(prompt[-1]["content"], right)
        rows.append({"prompt": prompt, "chosen": [assistant(right)], "rejected": [assistant(wrong)],
                     "answer": right})
    return rows


# --------------------------------------------------------------------------------- show and stats
def marked(input_ids, targets, tokenizer, colour):
    """A row's text with its trained tokens in green, or between brackets without colour."""
    on, off, text = "\u27e6", "\u27e7", ""
    if colour:
        on, off = "\033[32m", "\033[0m"
    for trained, run in itertools.groupby(zip(input_ids, targets), key=lambda token: token[1]):
        part = tokenizer.decode([i for i, _ in run])
        if trained:
            part = on + part + off
        text += part
    return text


def prepare_for(args):
    """(prepared rows, tokenizer) of `show` and `stats`."""
    tokenizer = load_tokenizer(args.model)
    template = set_template(tokenizer, args.chat_template)
    names = ("max_length", "loss_on", "seed", "num_proc", "cache_dir", "pairs", "max_prompt_length")
    settings = {name: getattr(args, name) for name in names}
    return prepare(args.data, tokenizer, template, **settings), tokenizer


def show(args):
    """Rows with their trained tokens marked."""
    prepared, tokenizer = prepare_for(args)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for r in itertools.islice(prepared.dataset, args.rows):
        print(f"--- {r['source']}:{r['row']}, {r['length']} tokens, {r['n_targets']} trained")
        if not args.pairs:
            print(marked(r["input_ids"], r["targets"], tokenizer, colour))
            continue
        for which in SIDES:
            targets = [False] * len(r["prompt"]) + r[f"{which}_targets"]
            print(marked(r["prompt"] + r[which], targets, tokenizer, colour))
    print(stats_table(prepared.stats))
    return prepared.stats["total"]


def stats(args):
    """Examples and tokens per source, as a table and a picture."""
    prepared, _ = prepare_for(args)
    print(stats_table(prepared.stats))
    result, lengths = prepared.stats["total"], np.asarray(prepared.dataset["length"])
    tokens = {name: counts["tokens"] for name, counts in prepared.stats["sources"].items()}
    panels = [{"xlabel": "tokens", "series": tokens},
              {"xlabel": "tokens per row", "series": {"all sources": lengths}}]
    if args.pairs:
        chosen, rejected = frame(prepared.dataset, *SCORES).to_numpy().T
        panels.append({"xlabel": "rating", "series": {"chosen": chosen, "rejected": rejected}})
        panels.append({"xlabel": "score difference", "series": {"pairs": gap(chosen, rejected)}})
    else:
        rows = len(pack(lengths, args.max_length, args.packing).offsets) - 1
        result = result | {"rows": rows, "fill": result["tokens"] / (rows * args.max_length)}
        print(f"{args.packing}: {rows:,} rows of {args.max_length}, {result['fill']:.2%} full")
    figure(output_file(args, "stats.png"), panels)
    write_report(args, prepared.stats)
    return result


# ----------------------------------- shared by all scripts: files, locks, pictures and models
def write_lines(path, lines):
    """Text lines into a file that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as f:
        f.writelines(f"{line}\n" for line in lines)
    temporary.replace(path)


def write_json(path, value):
    write_lines(path, [json.dumps(value, indent=1)])


def read_json(path) -> dict:
    """A JSON file, {} if there is none."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


@contextlib.contextmanager
def only_process(folder):
    """This process alone works in a folder. ValueError names the process that already does. The
    kernel frees the lock of a dead one."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / "lock"
    lock = filelock.FileLock(holder)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"--output {folder}: {holder.read_text()} works there; wait for it, or "
                         "name another folder") from None
    holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    try:
        yield
    finally:
        holder.unlink()
        lock.release()
        with contextlib.suppress(OSError):                  # not empty: something was written
            folder.rmdir()


@contextlib.contextmanager
def growing(folder, name):
    """append(row): a JSON line in a new file NAME-*.jsonl of this process, on disk at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}-{uuid.uuid4().hex}.jsonl", "w", encoding="utf-8") as file:
        def append(row):
            file.write(json.dumps(row) + "\n")
            file.flush()
        yield append


def read_growing(folder, name) -> list[dict]:
    """The rows of all files NAME-*.jsonl, without a last line that a killed process left torn."""
    rows = []
    for path in sorted(folder.glob(f"{name}-*.jsonl")):
        for n, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                print(f"{path}:{n} is damaged; what it held is made again", file=sys.stderr)
    return rows


def figure(path, panels, columns=3):
    """One PNG of panels {"series": {label: values}, ..what matplotlib's `ax.set` takes}. A number
    is a bar, an array a histogram of shares, a tuple (x, y, format[, y error]) points or a
    line."""
    from matplotlib.figure import Figure
    n_rows, columns = math.ceil(len(panels) / columns), min(columns, len(panels))
    picture = Figure(figsize=(5 * columns, 3.8 * n_rows), layout="constrained")
    below = {}
    for i, panel in enumerate(panels, 1):
        ax, settings = picture.add_subplot(n_rows, columns, i), dict(panel)
        for label, values in settings.pop("series").items():
            if isinstance(values, tuple):
                x, y, style, *error = values
                ax.errorbar(x, y, *error, fmt=style, ms=4, capsize=2, elinewidth=0.6, label=label)
            elif np.ndim(values) == 0:
                ax.barh(Path(label).name, values, color="tab:blue")
            else:
                known = pandas.Series(values).dropna()
                n = len(known)
                ax.hist(known, 30, weights=np.ones(n) / n, alpha=0.5, label=f"{label} (n = {n:,})")
                ax.set_ylabel("share of rows")
        ax.set(**settings)
        handles, labels = ax.get_legend_handles_labels()
        if 0 < len(labels) <= 4:
            ax.legend(fontsize=8)
        elif labels:                                        # many lines: one legend, below all
            below |= dict(zip(labels, handles))
    if below:
        picture.legend(below.values(), below, loc="outside lower center", ncols=columns, fontsize=8)
        picture.set_figheight(3.8 * n_rows + 0.18 * math.ceil(len(below) / columns))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=110)


def load_weights(auto, name, **settings):
    """auto.from_pretrained(name). Weights that the folder lacks or the model does not know are an
    error, unless its class says that they may be."""
    with loading(name):
        model, info = auto.from_pretrained(name, use_safetensors=True, output_loading_info=True,
                                           ignore_mismatched_sizes=True, **settings)
        problems = {kind: sorted(map(str, names))[:5] for kind, names in info.items() if names}
        if problems:
            raise ValueError(problems)
    return model


def local_folder(model, *patterns):
    """A model's folder. Of a Hub id it is the local copy of the files that fit the patterns."""
    if os.path.isdir(model):
        return Path(model)
    from huggingface_hub import snapshot_download
    return Path(snapshot_download(model, allow_patterns=[*patterns]))


MODEL_FILES = ("*.safetensors", "*config.json", "tokenizer.json", "*.model", "*.jinja")


def weights_hash(model):
    """A hash of a model's weights, configs, tokenizer and template by content."""
    folder = local_folder(model, *MODEL_FILES)
    files = sorted(path for name in MODEL_FILES for path in folder.glob(name))
    if not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(f"{model}: no .safetensors file there; name a model folder or a Hub id")
    return hash_of([[path.name, file_hash(path)] for path in files])


# ----------------------------------------- the paper's data studies: duplicates and contamination
NEAR, GRAM = 0.8, 5                # the Jaccard of 5-grams from which rows are near
BENCHMARK_GRAM = 13                # words shared with a benchmark's prompt
HASHES, BANDS = 128, 16            # MinHash: P(candidate) = 1 - (1 - J^8)^16, 0.95 at J = 0.8
LIKELY = 0.7                       # share of equal hashes to verify: misses 0.2% at J = 0.8


def read_rows(args) -> pandas.DataFrame:
    """The usable rows of --data: the columns CONVERTED, and `where`, FILE:ROW."""
    folder = cache_folder(args.cache_dir)
    store, _ = convert(parse_sources(args.data), args.pairs, args.seed, folder, args.num_proc)
    rows = frame(store, *CONVERTED)
    rows["where"] = rows.source + ":" + rows.row.astype(str)
    for column in ("refused", "unread"):
        print(reason_lines(by_reason(rows, column).values()))
    return rows[rows.refused.isna()].reset_index(drop=True)


def write_rows(args, rows, marks, **report):
    """rows.jsonl: the rows' lines with the columns `marks`. report.json: what is returned."""
    marks = without_nan(rows[marks]).to_dict("records")
    lines = (json.dumps(json.loads(line) | mark) for line, mark in zip(rows.line, marks))
    write_lines(output_file(args, "rows.jsonl"), lines)
    report |= {"rows": len(rows), "output": args.output}
    write_report(args, report)
    return report


def output_file(args, name):
    """--output/NAME. Before the first file a report of flags alone says whose it is, so that a
    killed command can start again."""
    if not (Path(args.output) / "report.json").exists():
        write_report(args, {})
    return Path(args.output) / name


def write_report(args, report):
    flags = {k: v for k, v in vars(args).items() if k != "run"}
    write_json(Path(args.output) / "report.json", report | {"flags": flags})


def grams(text: str, n: int, words: str = r"\w+") -> set[str]:
    """n-grams of a text's lower-cased words (a regular expression). A shorter text is one gram."""
    tokens = re.findall(words, canonical(text).lower())
    joined = {" ".join(tokens[i:i + n]) for i in range(len(tokens) - n + 1)}
    return joined or {" ".join(tokens) or canonical(text)}


def parts_of(line):
    """The lists of messages in a row: a conversation's one, or a pair's prompt, chosen and
    rejected."""
    fields = json.loads(line)
    return [fields[k] for k in ("messages", "prompt", *SIDES) if k in fields]


def shingles(line):
    """5-grams of each part of a row. A sign counts as a word: 1 + 2 is not 1 - 2."""
    texts = ["\n".join(map(operator.itemgetter("content"), part)) for part in parts_of(line)]
    return [grams(text, GRAM, r"\w+|[^\w\s]") for text in texts]


def jaccard(a, b):
    """min over the parts, lists of sets, of |A & B| / |A | B|. {1, 2, 3} and {2, 3, 4}: 0.5"""
    return min(len(x & y) / len(x | y) for x, y in zip(a, b))


def near_duplicates(lines):
    """For each row the earliest *kept* row that it is near to, itself if there is none, and their
    Jaccard: (n,) int64, (n,) float.

    Candidates share a band of their MinHash and at least LIKELY of its hashes. The exact Jaccard
    decides, in order, so that a row is dropped only for one that stays."""
    from rensa import RMinHash, RMinHashLSH
    from tqdm import tqdm
    first, likeness = np.arange(len(lines)), np.ones(len(lines))
    index, kept = RMinHashLSH(NEAR, HASHES, BANDS), {}
    cached_shingles = functools.lru_cache(2000)(shingles)
    for i, line in enumerate(tqdm(lines, "near duplicates", unit="row")):
        parts, hashes = shingles(line), RMinHash(num_perm=HASHES, seed=42)
        for number, part in enumerate(parts):
            hashes.update([f"{number} {gram}" for gram in part])
        likely = [k for k in index.query(hashes) if hashes.jaccard(kept[k]) >= LIKELY]
        for k in sorted(likely):
            exact = jaccard(parts, cached_shingles(lines[k]))
            if exact >= NEAR:
                first[i], likeness[i] = k, exact
                break
        else:
            index.insert(i, hashes)
            kept[i] = hashes
    return first, likeness


def dedup(args):
    """Keep the first of equal rows (--near: of near ones, too), within and across sources:
    rows.jsonl. duplicates.jsonl names each dropped row, the row that is kept for it and their
    Jaccard."""
    rows = read_rows(args)
    is_copy = rows.key.duplicated()
    unique = np.flatnonzero(~is_copy)                       # the first row of each text
    text_of, _ = pandas.factorize(rows.key)                 # row i has the text of a unique row
    near, likeness = np.arange(len(unique)), np.ones(len(unique))
    if args.near:
        near, likeness = near_duplicates(rows.line[unique].array)
    kept = unique[near][text_of]                            # the row that is kept for row i
    kind = np.select([kept == rows.index, is_copy], ["kept", "exact"], "near")
    dropped = pandas.DataFrame({"row": rows["where"], "kept": rows["where"].to_numpy()[kept],
                                "kind": kind, "jaccard": likeness[text_of]})[kind != "kept"]
    write_lines(output_file(args, "duplicates.jsonl"), map(json.dumps, dropped.to_dict("records")))
    counts = pandas.crosstab(rows.source, kind, margins=True, margins_name="total")
    counts = counts.reindex(columns=["kept", "exact", "near"], fill_value=0)
    print(counts.to_markdown(intfmt=","))
    print("most copies:", dropped.kept.value_counts()[:5].to_dict())
    sources = counts.to_dict("index")
    return write_rows(args, rows[kind == "kept"], [], **sources.pop("total"), sources=sources)


# columns of a benchmark's prompt
PROMPTS = ("turns", "question", "prompt", "instruction", "problem", "query", "ctx", "sentence")


def benchmark_prompts(row):
    """A benchmark row's prompts: its first column of PROMPTS, else its user turns."""
    prompts = next((row[name] for name in PROMPTS if row.get(name)), None)
    if prompts is None:
        prompts = [m for m in to_conversation(row).messages if m["role"] == "user"]
    if isinstance(prompts, str):
        return [prompts]
    return [p["content"] if isinstance(p, dict) else p for p in prompts]


def read_benchmarks(args):
    """{gram: NAME:ROW of its first prompt} of all benchmarks."""
    where_of = {}
    for source in parse_sources(args.against):
        raw, _ = load_source(source, cache_folder(args.cache_dir))
        for n, row in raw_rows(raw[:], range(len(raw)), source.name):
            try:
                texts = benchmark_prompts(row)
            except ValueError as error:
                raise ValueError(f"--against {source.name}:{n}: no prompt found ({error}); a row "
                                 f"needs one of {', '.join(PROMPTS)}, or a conversation") from None
            for text in texts:
                for gram in grams(text, BENCHMARK_GRAM):
                    where_of.setdefault(gram, f"{source.name}:{n}")
    return where_of


def is_long(gram):
    return gram.count(" ") == BENCHMARK_GRAM - 1


def shared_gram(line, benchmark):
    """A gram that a conversation or pair shares with a benchmark's prompt, the longest first. A
    prompt of fewer than 13 words counts only where a whole user turn equals it."""
    shared = []
    for m in itertools.chain(*parts_of(line)):
        common = grams(m["content"], BENCHMARK_GRAM) & benchmark.keys()
        shared += [gram for gram in common if m["role"] == "user" or is_long(gram)]
    return min(shared, key=lambda gram: (-gram.count(" "), gram), default=None)


def decontaminate(args):
    """Rows that share 13 consecutive words with a benchmark prompt, or a user turn with a shorter
    one: hits.jsonl. rows.jsonl has all rows, marked, or with --remove the others."""
    benchmark = read_benchmarks(args)
    rows = read_rows(args)
    rows["shared"] = [shared_gram(line, benchmark) for line in rows.line]
    rows["benchmark"] = rows.shared.map(benchmark)
    hits, n = rows[rows.shared.notna()], len(rows)
    report = hits[["where", "benchmark", "shared"]]
    write_lines(output_file(args, "hits.jsonl"), map(json.dumps, report.to_dict("records")))
    long = int(hits.shared.map(is_long).sum())
    print(f"{table(report[:5])}\n{long:,} of {n:,} rows share {BENCHMARK_GRAM} consecutive words "
          f"with a prompt; a user turn of {len(hits) - long:,} equals a shorter one")
    if args.remove:
        rows = rows.drop(hits.index)
    return write_rows(args, rows, ["shared", "benchmark"], hits=len(hits), shared=long,
                      removed=n - len(rows), sources=hits.source.value_counts().to_dict())


# ----------------------------------------------------------------------- selection and annotation
def best_first(values) -> np.ndarray:
    """Indices of values from the highest on. Ties keep their order. NaN never. Longest, AlpaGasus
    (chosen's rating) and Argilla (score difference). 1, NaN, 3, 3: 2, 3, 0."""
    values = np.asarray(values, dtype=float)
    return np.argsort(-values, kind="stable")[:np.count_nonzero(~np.isnan(values))]


A2_LEAST = 2.0                     # score difference of A2's first bin


def a2(chosen, rejected, budget: int) -> np.ndarray:
    """LIONs' A2: pairs whose score difference is at least A2_LEAST, in bins that are 1 wide,
    equally many of each bin, those with the highest chosen score. What a bin cannot fill goes to
    the others.

    Rounds: the best pair of each bin, larger differences first, then the second best, .. until
    `budget`. Ties keep their order. NaN never. (n,), (n,) -> indices in that order. Scores (9,
    1), (9, 1), (7, 5), (8, 6), (9, 8), budget 3: 0, 3, 1."""
    gaps = gap(chosen, rejected)
    order = best_first(np.where(gaps >= A2_LEAST, chosen, np.nan))
    bins = pandas.Series(np.floor(gaps[order]))
    place = bins.groupby(bins).cumcount()                   # in its bin, the best is 0
    return order[np.lexsort((-bins, place))][:budget]


def diverse(embeddings, order, budget: int, most: float = 0.9) -> np.ndarray:
    """DEITA's greedy repr filter (2312.15685): in the order given, keep an item if its largest
    cosine similarity to all kept ones is at most `most`, until `budget`. (n, D), indices ->
    indices."""
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    kept, chosen = [], np.empty((budget, units.shape[1]), units.dtype)
    for i in order:
        if len(kept) < budget and (chosen[:len(kept)] @ units[i]).max(initial=-1) <= most:
            chosen[len(kept)] = units[i]
            kept.append(i)
    return np.array(kept, dtype=int)


# What DEITA's scorers were trained on, and what it embeds: FastChat's vicuna_v1.1
DEITA = {
    "complexity": "You are a helpful assistant. Please identify the complexity score of the "
                  "following user query. \n##Query: {instruction}  \n##Complexity: ",
    "quality": "You are a helpful assistant. Please identify the quality score of the Response "
               "corresponding to the Question. \n #Question#:\n{instruction}\n#Response#:\n"
               "{output} \n##Quality: "}
VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions. ")
VICUNA_TURNS = {"system": "", "user": "USER: {} ", "assistant": "ASSISTANT: {}</s>"}
EMBEDDED = 2048                    # tokens of a text that DEITA embeds


def vicuna(messages):
    """The text that DEITA embeds. A row's own system turn is left out, as by the authors."""
    return VICUNA + "".join(VICUNA_TURNS[m["role"]].format(m["content"]) for m in messages)


class Scorer:
    """A reward model (kind "reward") or a causal LM ("rating", "embedding"), and its value of a
    text. Texts are scored one at a time: without padding nothing depends on neighbours."""

    def __init__(self, name, kind, trust_remote_code=False):
        import kernels                                      # first, see there  # noqa: F401
        import torch
        import transformers
        trust = dict(trust_remote_code=trust_remote_code)
        self.kind, self.key = kind, hash_of(weights_hash(name), kind, file_hash(__file__))
        self.tokenizer = load_tokenizer(name, **trust)
        auto = transformers.AutoModelForCausalLM
        if kind == "reward":
            auto = transformers.AutoModelForSequenceClassification
            write_bos(self.tokenizer)
        self.model = load_weights(auto, name, **trust)
        head = getattr(self.model, "score", None)           # bf16 rewards would often tie
        if isinstance(head, torch.nn.Linear) and not trust_remote_code:
            head.float().register_forward_pre_hook(lambda _, inputs: inputs[0].float())
        self.digits = self.tokenizer.convert_tokens_to_ids(list("123456"))
        known = {*self.digits} - {None, self.tokenizer.unk_token_id}
        outputs = self.model.config.num_labels
        fits = {"reward": outputs == 1, "rating": len(known) == 6}
        if not fits.get(kind, True):
            raise ValueError(f"{name}: no {kind} model. It has {outputs} outputs and {len(known)} "
                             'of the tokens "1".."6"')
        config = self.model.config.get_text_config()
        config.pad_token_id = None                          # a classifier then reads the last token
        self.limit = getattr(config, "max_position_embeddings", None) or sys.maxsize
        self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, text):
        """reward: the output for a rendered conversation. rating: DEITA's sum over k = 1..6 of
        k softmax(logits of "1".."6")_k at the first generated position. embedding: the last hidden
        state, a list, of the last of the first EMBEDDED tokens. None for another text beyond the
        model's context."""
        import torch
        ids = self.tokenizer(text, add_special_tokens=self.kind != "reward", return_tensors="pt")
        ids = ids.input_ids.to(self.model.device)                                # (1, T)
        if self.kind == "embedding":
            ids = ids[:, :min(EMBEDDED, self.limit)]
        if ids.shape[1] > self.limit:
            return None
        with torch.no_grad():
            if self.kind == "reward":
                value = self.model(ids).logits[0, 0]
            elif self.kind == "embedding":
                value = self.model.base_model(ids).last_hidden_state[0, -1]      # (D,)
            else:
                p = self.model(ids).logits[0, -1, self.digits].double().softmax(-1)
                value = (p * torch.arange(1, 7, device=p.device)).sum()
        if not value.isfinite().all():
            raise ValueError(f"{self.kind} of {text[:80]!r} is not finite; try float32 weights")
        return value.tolist()


def scores_of(name, kind, texts, args):
    """A scorer's value of every text, NaN if it is too long: (n,), of embeddings (n, D). Each is on
    disk as soon as it is known, and is never computed again."""
    from tqdm import tqdm
    scorer, folder = Scorer(name, kind, args.trust_remote_code), cache_folder(args.cache_dir)
    values = {r["text"]: r["value"] for r in read_growing(folder / "scores", scorer.key)}
    missing = sorted({*texts} - values.keys())
    if missing:
        with growing(folder / "scores", scorer.key) as append:
            for text in tqdm(missing, kind, unit="text"):
                values[text] = scorer(text)
                append({"text": text, "value": values[text]})
    return np.array([values[text] for text in texts], dtype=float)


def scored_messages(fields):
    """What SFT-style selection looks at: all turns, or a pair's prompt and chosen answer."""
    return fields.get("messages") or fields["prompt"] + fields["chosen"]


def answer_length(fields, tokenizer):
    """Tokens that are trained: of all assistant turns, or only of the last (a chosen answer)."""
    texts = [m["content"] for m in scored_messages(fields) if m["role"] == "assistant"]
    if fields.get("last_only", True):                       # a pair has no such field
        texts = texts[-1:]
    return sum(map(len, tokenizer(texts, add_special_tokens=False).input_ids))


def deita_scores(conversations, args):
    """(n,) sum over turns of complexity x quality, NaN if one is too long. (n, D) embeddings."""
    exchanges, row_of = [], []
    for i, messages in enumerate(conversations):
        for question, answer in zip(messages, messages[1:]):
            if answer["role"] == "assistant":
                exchanges.append(dict(instruction=question["content"], output=answer["content"]))
                row_of.append(i)
    product = np.ones(len(exchanges))
    for kind, name in (("complexity", args.complexity_model), ("quality", args.quality_model)):
        texts = [DEITA[kind].format(**exchange) for exchange in exchanges]
        product *= scores_of(name, "rating", texts, args)
    embedded = [vicuna(messages) for messages in conversations]
    embeddings = scores_of(args.embedding_model, "embedding", embedded, args)
    return np.bincount(row_of, product, len(conversations)), embeddings


def select(args):
    """--budget rows by --method, best first, with their selection_score: rows.jsonl; a picture."""
    rows, method = read_rows(args), args.method
    rows["gap"] = gap(rows.score_chosen, rows.score_rejected)
    column = {"alpagasus": "score_chosen", "argilla": "gap", "a2": "gap"}.get(method)
    rows["selection_score"] = rows.get(column, np.nan)
    duplicates = int(rows.key.duplicated().sum())
    rows = rows.sort_values("selection_score", key=pandas.isna, kind="stable")
    rows = rows.drop_duplicates("key").sort_index().reset_index(drop=True)  # the first rated stays
    fields = map(json.loads, rows.line)
    if method == "longest":
        tokenizer = load_tokenizer(args.model)
        rows["selection_score"] = [answer_length(row, tokenizer) for row in fields]
    elif method == "deita":
        conversations = [scored_messages(row) for row in fields]
        rows["selection_score"], embeddings = deita_scores(conversations, args)
    score = rows.selection_score
    if method != "random" and score.isna().all():
        raise ValueError(f"--method {method}: none of the {len(rows)} rows has the score that it "
                         "needs; name a rated source, or run python data.py annotate first")
    order = best_first(score)
    if method == "random":
        order = permutation(len(rows), args.seed)
    elif method == "deita":
        order = diverse(embeddings, order, args.budget)
    elif method == "a2":
        order = a2(rows.score_chosen, rows.score_rejected, args.budget)
    selected = rows.iloc[order[:args.budget]]
    panels = [{"xlabel": name, "series": {"before": rows[name], f"after {method}": selected[name]}}
              for name in ("gap", "score_chosen", "selection_score") if rows[name].notna().any()]
    if panels:
        figure(output_file(args, "select.png"), panels)
    unrated = f", {score.isna().sum():,} rows without a score" * (method != "random")
    print(f"{len(selected):,} of {len(rows):,} rows selected (--budget {args.budget:,}); "
          f"{duplicates:,} duplicates{unrated}")
    return write_rows(args, selected, ["selection_score"], method=method, duplicates=duplicates,
                      candidates=len(rows))


def fit_ratings(rewards, ratings, degree):
    """The least-squares polynomial from rewards r onto known ratings, sum_k c_k z^k with z =
    (r - low) / (high - low), low and high the extremes of all rewards (LIONs: rescaled, fitted).

    rewards, ratings: arrays of one shape, NaN if unknown. Returns a numpy Polynomial: call it on
    rewards; c = .coef, [low, high] = .domain. Rewards 0, 2, 4 and ratings 1, 3, NaN, degree 1: z is
    0, 0.5, 1, so c = (1, 4)."""
    known = ~np.isnan(ratings) & ~np.isnan(rewards)
    levels = len(np.unique(ratings[known])), len(np.unique(rewards[known]))
    if levels[0] < 2 or levels[1] <= degree:
        raise ValueError(f"annotate: {known.sum()} answers have a rating and a reward, {levels[0]} "
                         f"different ratings and {levels[1]} different rewards; a fit needs 2 and "
                         f"{degree + 1} (--degree {degree}). Add a rated source to --data")
    extremes = [np.nanmin(rewards), np.nanmax(rewards)]
    return np.polynomial.Polynomial.fit(rewards[known], ratings[known], degree, domain=extremes,
                                        window=[0, 1])


def annotate(args):
    """A reward model's scores for both answers of every pair, mapped onto the known ratings, which
    stay: rows.jsonl; a picture of the fit."""
    rows = read_rows(args)
    pairs = [json.loads(line) for line in rows.line]
    tokenizer = load_tokenizer(args.rm)
    write_bos(tokenizer)
    texts = []
    for which in SIDES:
        texts += [render_judged(tokenizer, pair["prompt"] + pair[which]) for pair in pairs]
    rewards = scores_of(args.rm, "reward", texts, args).reshape(2, -1).T         # (n, 2)
    ratings = rows[[*SCORES]].to_numpy()                                         # (n, 2)
    fit = fit_ratings(rewards, ratings, args.degree)
    predicted = np.clip(fit(rewards), 1, 10)
    known = ~np.isnan(ratings)
    annotated = ~known & ~np.isnan(predicted)
    rows[[*SCORES]] = np.where(known, ratings, predicted)
    rows[["reward_chosen", "reward_rejected"]] = rewards
    rows[["annotated_chosen", "annotated_rejected"]] = annotated
    figure(output_file(args, "annotate.png"), [{
        "xlabel": "known rating", "ylabel": "predicted rating", "series": {
            "answers": (ratings[known], predicted[known], "."), "equal": ([1, 10], [1, 10], "-")}}])
    both_scored = rewards[~np.isnan(rewards).any(1)].T
    error = predicted - ratings
    report = {"agreement": np.greater(*both_scored).mean(),
              "rated_answers": int((~np.isnan(error)).sum()),
              "annotated_answers": int(annotated.sum()), "too_long": int(np.isnan(rewards).sum()),
              "low": fit.domain[0], "high": fit.domain[1], "coefficients": fit.coef.tolist(),
              "mse": np.nanmean(error ** 2), "mae": np.nanmean(np.abs(error))}
    print("rating = sum over k of coefficients z^k, z = (reward - low) / (high - low), in 1..10;\n"
          f"agreement of pairs, errors on the rated answers:\n{table([report])}")
    marks = [*SCORES, "reward_chosen", "reward_rejected", "annotated_chosen", "annotated_rejected"]
    return write_rows(args, rows, marks, pairs=len(rows), **report)


# ------------------------------------------------------------------------------------------- main
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, each flag's default behind its help, if it may be left
    out."""

    def _get_help_string(self, action):
        return action.help if action.required else super()._get_help_string(action)


def positive(text):
    """The argparse type of counts."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


# Flags of several scripts
def cache_flags(add):
    add("--num-proc", type=positive, help="processes that prepare data; None: all cores")
    add("--cache-dir", help="prepared data, scores and log-probs; None: ~/.cache/lions")


def row_flags(add, chat_template="chatml"):
    add("--chat-template", default=chat_template,
        help="chatml, tokenizer (its own) or a jinja file")
    add("--max-length", type=positive, default=2048, help="tokens per row; more are cut, counted")


def pair_flags(add):
    add("--max-prompt-length", type=positive, default=512,
        help="prompt tokens that truncation keeps at least")


def target_flags(add):
    add("--packing", choices=["bfd", "concat", "none"], default="bfd",
        help="best-fit decreasing, concatenated, or one document per row")
    add("--loss-on", choices=["assistant", "last", "all"], default="assistant",
        help="which tokens are targets: of all answers, of the last one, or all tokens")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    for run in (show, stats, dedup, decontaminate, select, annotate):
        help = " ".join(run.__doc__.split())
        command = commands.add_parser(run.__name__, help=help,
                                      description=inspect.getdoc(run),
                                      allow_abbrev=False, formatter_class=HelpFormatter)
        command.set_defaults(run=run)
        add = command.add_argument
        add("--data", nargs="+", help="sources, NAME[:split][=fraction] or a mix; None: the demo's")
        add("--pairs", action="store_true", help="read preference rows")
        add("--seed", type=int, default=42, help="of fractions, orders and random selection")
        cache_flags(add)
        add("--output", help="folder of the results; None: runs/COMMAND, runs/select-METHOD")
        if run in (show, stats, select):
            add("--model", default="demo", help="the tokenizer's Hub id or folder, or demo")
        if run in (show, stats):
            row_flags(add)
            pair_flags(add)
            target_flags(add)
            add("--rows", type=positive, default=3, help="rows to show")
        if run is dedup:
            add("--near", action="store_true", help=f"Jaccard of word {GRAM}-grams >= {NEAR}")
        if run is decontaminate:
            add("--against", nargs="+", required=True, help="benchmarks, named as for --data")
            add("--remove", action="store_true", help="write rows.jsonl without those rows")
        if run is select:
            add("--method", required=True,
                choices=["random", "longest", "alpagasus", "deita", "argilla", "a2"],
                help="how rows are ranked; deita asks the three models below")
            add("--budget", type=positive, required=True, help="rows to select")
            for kind, name in (("complexity", "hkust-nlp/deita-complexity-scorer"),
                               ("quality", "hkust-nlp/deita-quality-scorer"),
                               ("embedding", "mistralai/Mistral-7B-v0.1")):
                add(f"--{kind}-model", default=name, help="deita: causal LM, Hub id or folder")
        if run is annotate:
            add("--rm", required=True, help="reward model with one output, Hub id or folder")
            add("--degree", type=positive, default=1, help="of the polynomial reward -> rating")
        if run in (select, annotate):
            add("--trust-remote-code", action="store_true", help="run code that a model brings")
    return p


def check_sources(args):
    """ValueError for an --output that would overwrite a source, and for preference rows that would
    lose their rejected answers."""
    out = Path(args.output).resolve()
    for source in parse_sources(args.data + getattr(args, "against", [])):
        path = Path(source.name).resolve()
        if path.exists() and out in (path, *path.parents):
            raise ValueError(f"--output {args.output}: holds the source {source.name}; name "
                             "another folder")
    if args.pairs:
        return
    for source in parse_sources(args.data):
        raw, _ = load_source(source, cache_folder(args.cache_dir))
        if {"chosen", "rejected"} <= set(first_row(raw, source.name)):
            raise ValueError(f"--data {source.name}: holds preference rows; add --pairs, or their "
                             "rejected answers are lost")


WRITTEN = re.compile(r"(rows|hits|duplicates)\.jsonl|report\.json|(stats|select|annotate)\.png")


def check_output(out):
    """ValueError if --output holds files whose names a command writes, but no command's report."""
    held = [path.name for path in out.iterdir() if WRITTEN.fullmatch(path.name)]
    if held and "flags" not in read_json(out / "report.json"):
        raise ValueError(f"--output {out}: holds {held[0]}, which data.py did not write; move it, "
                         "or name another folder")


def main(argv=None):
    args = parser().parse_args(argv)
    args.pairs = args.pairs or args.run is annotate
    args.data = args.data or ["demo-pairs" if args.pairs else "demo"]
    method = f"-{args.method}" if args.run is select else ""
    args.output = args.output or f"runs/{args.command}{method}"
    check_sources(args)
    if args.run is show:
        return show(args)
    with only_process(Path(args.output)):
        check_output(Path(args.output))
        return args.run(args)


if __name__ == "__main__":
    try:
        print(json.dumps(main()))
    except (ValueError, OSError, KeyboardInterrupt) as error:
        problem = str(error) or "interrupted; the same command continues"
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
