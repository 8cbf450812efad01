"""Any conversation or preference source becomes rows of ids and masks: formats, template, dedup, packing.

One path for everything: source -> conversation (a pair: two that differ in their last turn) -> rendered
once -> tokenised once with offsets -> ids and a target mask from character spans -> exact dedup across
sources -> packed rows, or pairs with their common prompt. Nothing is dropped silently: duplicates,
truncation and refused rows are counted by source and reason.

    python data.py show --data FILE.jsonl --model DIR      rows with the trained tokens marked
    python data.py show --pairs                            both answers of preference pairs
    python data.py stats --data A.jsonl B.parquet=0.5      examples and tokens per source

Sources: a Hub id, .jsonl / .jsonl.gz / .parquet / .csv, a save_to_disk folder, `demo` or `demo-pairs`;
written NAME[:split][=fraction]. Formats are recognised by their columns (see FORMATS, PAIR_FORMATS).
"""
from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np


# ------------------------------------------------------------------------------------------ sources
class Source(NamedTuple):
    name: str
    split: str = "train"
    fraction: float = 1.0


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


class Conversation(NamedTuple):
    messages: list[dict]           # [{role, content}]
    last_only: bool = False        # train the last assistant turn only (a preference row's chosen)
    answer: str | None = None      # reference answer for exact match


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
    import re
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if parts[0].strip():
        raise ValueError("text before the first turn")
    return [{"role": ROLES["human" if who == "Human" else "gpt"], "content": said.strip()}
            for who, said in zip(parts[1::2], parts[2::2])]


def reference(row) -> str | None:
    """The row's reference answer for exact match, where it has one."""
    return None if row.get("answer") is None else str(row["answer"])


def from_messages(row):
    return Conversation(turns(row["messages"]), False, reference(row))


def from_sharegpt(row):
    return Conversation(turns(row["conversations"], "from", "value"))


def from_instruction(row):
    given = row.get("input") or ""
    return Conversation(ask(f"{row['instruction']}\n\n{given}" if given else row["instruction"], row["output"]))


def from_query(row):
    return Conversation(ask(row["query"], row["response"]))


def from_question(row):
    answer = row["answer"]
    return Conversation(ask(row["question"], answer), False,
                        final_answer(answer) if isinstance(answer, str) and "####" in answer else None)


def side(row, which: str) -> list[dict]:
    """The whole conversation that ends in the `which` answer: chosen or rejected; prompt given or not."""
    prompt, said = row.get("prompt"), row[which]
    if isinstance(said, str):
        if prompt is None or said.startswith(f"{prompt}\n\nAssistant:"):
            return transcript(said)
        return ask(prompt, said) if isinstance(prompt, str) else \
            turns(prompt) + [{"role": "assistant", "content": said}]
    said = turns(said)
    if isinstance(prompt, str) and said and said[0]["role"] == "assistant":
        said = [{"role": "user", "content": prompt}] + said
    elif prompt is not None and not isinstance(prompt, str):
        said = turns(prompt) + said
    return said


def from_preference(row):
    """prompt + chosen, its last turn as the target (the paper's 'SFT on chosen')."""
    return Conversation(side(row, "chosen"), True, reference(row))


def pair_from_preference(row):
    """Two conversations that differ in their last turn, ratings kept. UltraFeedback, HH-RLHF, TRL's formats."""
    chosen, rejected = side(row, "chosen"), side(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("the histories of chosen and rejected differ")
    if not chosen or not rejected or {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        raise ValueError("an answer is missing")

    def score(which):
        found = [row[k] for k in (f"score_{which}", f"{which}_score", f"{which}-rating") if row.get(k) is not None]
        return float(found[0]) if found else None
    return Pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], score("chosen"), score("rejected"),
                reference(row))


def pair_from_solutions(row):
    """GSM8K's example_model_solutions: a right solution against a wrong one, each drawn by a hash of the
    question among those of its kind."""
    made = {True: [], False: []}
    for name in sorted(row):
        if isinstance(row[name], dict) and "is_correct" in row[name]:
            made[bool(row[name]["is_correct"])].append(row[name]["solution"])
    if not made[True] or not made[False]:
        raise ValueError("no right and wrong solution")
    draw = hashlib.sha256(row["question"].encode()).digest()
    right, wrong = (made[k][draw[i] % len(made[k])] for i, k in enumerate((True, False)))
    return Pair([{"role": "user", "content": row["question"]}], right, wrong)


def from_solutions(row):
    pair = pair_from_solutions(row)
    return Conversation(ask(row["question"], pair.chosen), True)


PAIR_FORMATS = [({"chosen", "rejected"}, pair_from_preference),
                ({"question", "ground_truth"}, pair_from_solutions)]
FORMATS = [({"messages"}, from_messages), ({"conversations"}, from_sharegpt), ({"chosen"}, from_preference),
           ({"instruction", "output"}, from_instruction), ({"query", "response"}, from_query),
           ({"question", "answer"}, from_question), ({"question", "ground_truth"}, from_solutions)]


def find_format(columns, where: str, formats=FORMATS):
    for needed, convert in formats:
        if needed <= set(columns):
            return convert
    known = "; ".join("+".join(sorted(needed)) for needed, _ in formats)
    raise ValueError(f"{where}: columns {sorted(columns)} are no known format. Known: {known}")


def to_conversation(row: dict) -> Conversation:
    """A raw row of any known format, checked. ValueError(short reason) when it is refused."""
    c = find_format(row, "row")(row)
    if not c.messages:
        raise ValueError("empty conversation")
    if any(not isinstance(m["content"], str) for m in c.messages):
        raise ValueError("content is not text")
    if any(not m["content"].strip() for m in c.messages if m["role"] != "system"):
        raise ValueError("empty turn")
    said = [m["role"] for m in c.messages[c.messages[0]["role"] == "system":]]
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(said)):
        raise ValueError("role order broken")
    if "assistant" not in said or (c.last_only and said[-1] != "assistant"):
        raise ValueError("no assistant turn")
    return c


def to_pair(row: dict) -> Pair:
    """A raw row of any known preference format, checked. ValueError(short reason) when it is refused."""
    pair = find_format(row, "row", PAIR_FORMATS)(row)
    for answer in (pair.chosen, pair.rejected):
        to_conversation({"messages": pair.prompt + [{"role": "assistant", "content": answer}]})
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
        inside = [i for i, (s, e) in enumerate(offsets) if s < b and e > a]
        if not inside or offsets[inside[0]][0] > a or ids[inside[-1]] != template.end_of_turn_id:
            raise ValueError("mask does not cover the assistant text")
        for i in inside:
            targets[i] = True
    if loss_on == "all":
        targets = [True] * len(ids)
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
    sides = [encode(Conversation(pair.prompt + [{"role": "assistant", "content": y}], True), tokenizer, template)
             for y in (pair.chosen, pair.rejected)]
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


def canonical_hash(messages) -> str:
    text = json.dumps([[m["role"], m["content"].strip()] for m in messages])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def with_system(messages: list[dict], key: str, probability: float, seed: int) -> list[dict]:
    """An empty system turn in front with a probability; the draw hangs on seed and content alone."""
    draw = int(hashlib.sha256(f"{seed} {key}".encode()).hexdigest()[:8], 16) / 2 ** 32
    system = draw < probability and messages[0]["role"] != "system"
    return [{"role": "system", "content": ""}] * system + messages


def encode_row(row: dict, tokenizer, template, max_length, loss_on, empty_system, seed) -> dict:
    """One raw row for datasets.map: encoded, or with its reason of refusal."""
    try:
        c = to_conversation(json.loads(row["raw"]))
        key = canonical_hash(c.messages)
        c = c._replace(messages=with_system(c.messages, key, empty_system, seed))
        e = encode(c, tokenizer, template, max_length=max_length, loss_on=loss_on)
    except ValueError as error:
        return dict(input_ids=[], targets=[], length=0, n_targets=0, cut=0, turns=0, answer=None,
                    messages_json="", key="", reason=str(error))
    return dict(input_ids=e.input_ids, targets=e.targets, length=len(e.input_ids), n_targets=sum(e.targets),
                cut=e.truncated, turns=len(c.messages), answer=c.answer,
                messages_json=json.dumps(c.messages), key=key, reason="")


PAIR_LISTS = ("prompt", "chosen", "rejected", "chosen_targets", "rejected_targets")


def encode_pair_row(row: dict, tokenizer, template, max_length, max_prompt_length, empty_system, min_gap,
                    seed) -> dict:
    """One raw preference row for datasets.map; messages_json is the prompt and both answers."""
    try:
        pair = to_pair(json.loads(row["raw"]))
        scores = [pair.score_chosen, pair.score_rejected]
        if min_gap is not None and None in scores:
            raise ValueError("no score, and --min-gap needs both")
        if min_gap is not None and scores[0] - scores[1] < min_gap:
            raise ValueError(f"score gap below --min-gap {min_gap:g}")
        key = canonical_hash(pair.prompt + [{"role": w, "content": c} for w, c in
                                            (("chosen", pair.chosen), ("rejected", pair.rejected))])
        pair = pair._replace(prompt=with_system(pair.prompt, key, empty_system, seed))
        e = encode_pair(pair, tokenizer, template, max_length=max_length, max_prompt_length=max_prompt_length)
    except ValueError as error:
        return {k: [] for k in PAIR_LISTS} | dict(
            length=0, n_targets=0, cut=0, turns=0, answer=None, messages_json="", key="", reason=str(error),
            score_chosen=None, score_rejected=None)
    return e._asdict() | dict(
        length=len(e.prompt) + len(e.chosen) + len(e.rejected), turns=len(pair.prompt) + 1, answer=pair.answer,
        n_targets=sum(e.chosen_targets) + sum(e.rejected_targets), key=key, reason="",
        messages_json=json.dumps([pair.prompt, pair.chosen, pair.rejected]),
        score_chosen=scores[0], score_rejected=scores[1])


def prepare(sources: list[str], tokenizer, template: Template, *, max_length: int | None,
            loss_on: str = "assistant", empty_system: float = 0.0, max_examples: int | None = None,
            seed: int = 42, bad_rows: str = "refuse", num_proc: int | None = None,
            cache_dir: str | None = None, pairs: bool = False, max_prompt_length: int = 512,
            min_gap: float | None = None) -> Prepared:
    """Sources -> encoded documents in a seeded order, deduplicated, memory-mapped, cached.

    pairs: preference rows instead (columns PAIR_LISTS for input_ids and targets, and score_chosen,
    score_rejected; `length` is that of x, y_w and y_l); duplicates are equal prompt, chosen and rejected.

    The cache's key hashes all that decides the content; entries are written aside and renamed. Raises
    one ValueError for missing files or unknown columns (naming them) and when no row is left."""
    import datasets
    parsed = [parse_source(s) for s in sources]
    missing = [f"--data {s.name}: no such file" for s in parsed
               if local_kind(s.name) not in (None, "folder") and not os.path.exists(s.name)]
    if missing:
        raise ValueError("\n".join(missing))
    folder = Path(cache_dir or Path.home() / ".cache" / "lions")
    decides = [[fingerprint(s) for s in parsed], tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template,
               list(template), max_length, loss_on, empty_system, max_examples, seed, pairs,
               [max_prompt_length, min_gap] if pairs else None, Path(__file__).read_text()]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]
    final, stats_file = folder / key, folder / key / "stats.json"
    if stats_file.exists():
        try:
            stats = json.loads(stats_file.read_text())
            if not (bad_rows == "stop" and stats["total"]["refused"]):
                return Prepared(datasets.load_from_disk(str(final)), stats, key)
        except (OSError, ValueError, KeyError) as error:
            print(f"cache {final} is damaged ({error}); made again", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / f"{key}.{os.getpid()}.writing"
    shutil.rmtree(work, ignore_errors=True)
    try:
        settings = dict(tokenizer=tokenizer, template=template, max_length=max_length, empty_system=empty_system,
                        seed=seed) | (dict(max_prompt_length=max_prompt_length, min_gap=min_gap) if pairs else
                                      dict(loss_on=loss_on))
        made = _prepare(parsed, settings, pairs, max_examples, seed, bad_rows, num_proc, work)
        made.dataset.save_to_disk(str(work / "done"))
        (work / "done" / "stats.json").write_text(json.dumps(made.stats))
        shutil.rmtree(final, ignore_errors=True)
        (work / "done").rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Prepared(datasets.load_from_disk(str(final)), made.stats, key)


def _prepare(parsed, settings, pairs, max_examples, seed, bad_rows, num_proc, work) -> Prepared:
    import datasets

    def raw_rows(index: int):
        source, n_rows = parsed[index], 0
        if source.fraction < 1:                             # a share of the rows needs their number first
            n_rows = sum(1 for _ in load_source(source))
            taken = np.zeros(n_rows, dtype=bool)
            taken[permutation(n_rows, seed)[:max(1, round(source.fraction * n_rows))]] = True
        for i, (n, row) in enumerate(load_source(source)):
            n_rows = max(n_rows, i + 1)
            find_format(row, f"--data {source.name}:{n}", PAIR_FORMATS if pairs else FORMATS)
            if source.fraction == 1 or taken[i]:
                yield {"raw": json.dumps(row, default=str), "source": index, "row": n}
        if not n_rows:
            raise ValueError(f"--data {source.name}: the source is empty, no row is left")

    work.mkdir(parents=True)
    parts = []
    for index in range(len(parsed)):                        # one schema: raw JSON text, written to disk
        try:
            parts.append(datasets.Dataset.from_generator(
                raw_rows, gen_kwargs={"index": index}, cache_dir=str(work), fingerprint=f"raw{index}",
                features=datasets.Features(raw=datasets.Value("string"), source=datasets.Value("int16"),
                                           row=datasets.Value("int64"))))
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, ValueError):
                raise error.__cause__ from None
            raise
    raw = datasets.concatenate_datasets(parts)
    features = datasets.Features(
        source=raw.features["source"], row=raw.features["row"], answer=datasets.Value("string"),
        **{k: datasets.List(datasets.Value("bool" if "targets" in k else "int32"))
           for k in (PAIR_LISTS if pairs else ("input_ids", "targets"))},
        **({k: datasets.Value("float64") for k in ("score_chosen", "score_rejected")} if pairs else {}),
        length=datasets.Value("int32"), n_targets=datasets.Value("int32"), cut=datasets.Value("int32"),
        turns=datasets.Value("int32"), messages_json=datasets.Value("string"), key=datasets.Value("string"),
        reason=datasets.Value("string"))
    workers = 1 if len(raw) < 2000 else num_proc or os.cpu_count()
    done = raw.map(encode_pair_row if pairs else encode_row, fn_kwargs=settings,
                   num_proc=workers if workers > 1 else None, remove_columns=["raw"], features=features,
                   desc="encode", new_fingerprint="encoded", cache_file_name=str(work / "encoded.arrow"))

    zero = dict(examples=0, tokens=0, targets=0, turns=0, duplicates=0, truncated=0, cut=0, refused=0)
    stats = {"sources": {}, "total": dict(zero)}
    lines = [dict(zero) | {"reasons": {}} for _ in parsed]
    seen, kept = set(), []
    for i, (source, row, key, reason) in enumerate(zip(*(done[c] for c in ("source", "row", "key", "reason")))):
        line = lines[source]
        if reason:
            line["refused"] += 1
            line["reasons"].setdefault(reason, [0, f"{parsed[source].name}:{row}"])[0] += 1
        elif key in seen:
            line["duplicates"] += 1
        else:
            seen.add(key)
            kept.append(i)
    bad = [f"{where}: {reason} ({n} such row(s))" for line in lines for reason, (n, where) in
           line["reasons"].items()]
    bad_rows = "stop" if any("--min-gap needs" in b for b in bad) else bad_rows
    if bad and (bad_rows == "stop" or not kept):
        raise ValueError(("--data: no row is left" if not kept else "--data: stopped at bad rows") + ":\n" + "\n".join(bad))
    order = np.asarray(kept)[permutation(len(kept), seed)][:max_examples]
    done = done.select(order)
    for source, length, n, cut, t in zip(*(done[c] for c in ("source", "length", "n_targets", "cut", "turns"))):
        for key, value in dict(examples=1, tokens=length, targets=n, turns=t, truncated=cut > 0, cut=cut).items():
            lines[source][key] += int(value)
    for source, line in zip(parsed, lines):
        name = source.name
        while name in stats["sources"]:
            name += "'"
        stats["sources"][name] = line
        for key in zero:
            stats["total"][key] += line[key]
    return Prepared(done.remove_columns(["key", "reason", "cut", "turns"]).flatten_indices(
        cache_file_name=str(work / "flat.arrow"), new_fingerprint="flat"), stats)


def stats_table(stats: dict) -> str:
    """The paper's table: examples and tokens per source, absolute and percent, and all that was left out."""
    total = stats["total"]
    head = ("source", "examples", "%", "tokens", "%", "targets", "turns", "duplicates", "truncated",
            "tokens cut", "refused")
    rows = [head]
    for name, s in [*stats["sources"].items(), ("total", total)]:
        n = max(1, s["examples"])
        rows.append((name, f"{s['examples']:,}", f"{100 * s['examples'] / max(1, total['examples']):.1f}",
                     f"{s['tokens']:,}", f"{100 * s['tokens'] / max(1, total['tokens']):.1f}",
                     f"{s['targets']:,}", f"{s['turns'] / n:.1f}", f"{s['duplicates']:,}",
                     f"{s['truncated']:,}", f"{s['cut']:,}", f"{s['refused']:,}"))
    widths = [max(len(r[c]) for r in rows) for c in range(len(head))]
    text = ["  ".join(x.ljust(w) if c == 0 else x.rjust(w) for c, (x, w) in enumerate(zip(r, widths)))
            for r in rows]
    for name, s in stats["sources"].items():
        text += [f"  refused in {name}: {n} x {reason} (first: {where})"
                 for reason, (n, where) in s["reasons"].items()]
    return "\n".join(text)


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
    out, a = "", 0
    while a < len(input_ids):
        b = a
        while b < len(input_ids) and targets[b] == targets[a]:
            b += 1
        text = tokenizer.decode(input_ids[a:b])
        out += on + text + off if targets[a] else text
        a = b
    return out


def main(argv=None) -> dict:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=["show", "stats"])
    p.add_argument("--data", nargs="+", help="NAME[:split][=fraction], several; None: the demo's")
    p.add_argument("--pairs", action="store_true", help="read preference rows")
    p.add_argument("--max-prompt-length", type=int, default=512, help="prompt tokens that a cut pair keeps")
    p.add_argument("--model", default="demo", help="whose tokenizer: Hub id, folder, or demo")
    p.add_argument("--chat-template", default="chatml", help="chatml, tokenizer or a jinja file")
    p.add_argument("--loss-on", choices=["assistant", "all"], default="assistant")
    p.add_argument("--max-length", type=int, default=2048, help="tokens")
    p.add_argument("--packing", choices=["bfd", "concat", "none"], default="bfd")
    p.add_argument("--cache-dir", help="None: ~/.cache/lions")
    p.add_argument("-n", type=int, default=3, help="rows to show")
    args = p.parse_args(argv)
    from transformers import AutoTokenizer
    tokenizer = demo_tokenizer() if args.model == "demo" else AutoTokenizer.from_pretrained(args.model)
    template = set_template(tokenizer, args.chat_template)
    made = prepare(args.data or ["demo-pairs" if args.pairs else "demo"], tokenizer, template,
                   max_length=args.max_length, loss_on=args.loss_on, cache_dir=args.cache_dir, pairs=args.pairs,
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
    if args.pairs:
        print(stats_table(made.stats))
        return made.stats["total"]
    rows = pack(made.dataset["length"], args.max_length, args.packing)
    n_rows = len(rows.offsets) - 1
    fill = float((rows.end - rows.start).sum() / (n_rows * args.max_length))
    print(stats_table(made.stats))
    print(f"{args.packing}: {n_rows:,} rows of {args.max_length}, {fill:.2%} full")
    return made.stats["total"] | {"rows": n_rows, "fill": fill}


if __name__ == "__main__":
    try:
        print(json.dumps(main()))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
