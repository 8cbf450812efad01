"""Faults on purpose. Each trial damages something and says what must hold.

    python tests/break.py [--only WORD ..] [--quick] [--no-processes]

A trial survives if nothing is lost, nothing is silently wrong, and a user sees one message, not a
traceback: an exception other than ValueError, OSError and FloatingPointError is a defect. Prints a
table by kind; the last line is JSON. test_break.py runs the trials, the quick ones by default."""
from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch
from safetensors.torch import load_file, save_file

import data
import dpo
import evaluate
import online_dpo
import sft
from conftest import start_ranks


# ------------------------------------------------------------------------------------- the table
class Trial(NamedTuple):
    kind: str
    what: str
    run: object                    # function of a Lab; raises if the trial is a defect
    in_process: bool               # else it starts processes and takes long
    quick: bool                    # every seventh row of a function, if in this process


TRIALS = []


def trials(kind, *rows, in_process=True):
    """Adds the decorated function(lab, *row) once per row."""
    def add(function):
        for number, row in enumerate(rows or [()]):
            def run(lab, row=row):
                function(lab, *row)
            names = [getattr(x, "name", getattr(x, "__name__", str(x))) for x in row]
            what = " ".join([function.__name__.replace("_", " "), *names])
            quick = in_process and number % 7 == 0
            TRIALS.append(Trial(kind, what, run, in_process, quick))
        return function
    return add


def refused(words, function, *args, **settings):
    """The message of a refusal that contains all words."""
    try:
        result = function(*args, **settings)
    except (ValueError, OSError, FloatingPointError) as error:
        missing = [word for word in words if str(word) not in str(error)]
        assert not missing, f"{missing} not in: {error}"
        return str(error)
    raise AssertionError(f"not refused: {str(result)[:200]}")


# --------------------------------------------------------------------------------------- the lab
JUDGE = """
import sys, time
def score(prompt, answers, reference):
    print("judged one", file=sys.stderr, flush=True)
    time.sleep(0.01)
    return [sum(map(ord, answer)) % 97 for answer in answers]
"""
STAGES = {"sft": sft, "dpo": dpo, "online": online_dpo}
FLAGS = {
    "sft": ["--data", "demo:test", "--eval-data", "demo:test=0.05", "--max-examples", 40,
            "--max-length", 64, "--batch-size", 2, "--lr", 1e-3],
    "dpo": ["--data", "demo-pairs:test", "--eval-data", "demo-pairs:test=0.03", "--max-pairs", 24,
            "--max-length", 128, "--max-prompt-length", 64, "--batch-size", 4, "--lr", 1e-3],
    "online": ["--data", "demo:test", "--eval-data", "demo-pairs:test=0.03", "--batch-size", 4,
               "--max-length", 128, "--max-prompt-length", 64, "--max-prompts", 16,
               "--max-new-tokens", 8, "--samples", 3, "--truncated-can-win", "--lr", 1e-3]}
STEPS = ["--max-steps", 6, "--save-every", 2]


class Killed(BaseException):
    """Stands in for SIGKILL: no handler of the scripts catches it."""


class Lab:
    """Small models, finished and killed runs, made once; fresh folders."""

    def __init__(self, folder):
        self.folder, self.numbers, self.made = Path(folder), itertools.count(), {}
        self.seconds, self.moments, self.caught = {}, {}, {}
        (self.folder / "judge.py").write_text(JUDGE)

    def new(self):
        return self.folder / f"trial-{next(self.numbers)}"

    def copy(self, folder):
        return Path(shutil.copytree(folder, self.new(), symlinks=True))

    def once(self, name, make):
        if name not in self.made:
            folder = self.folder / name
            make(folder)
            self.made[name] = folder
        return self.made[name]

    def base(self):
        """An untrained model of 12k weights and the demo's tokenizer."""
        return self.once("base", lambda folder: small_model(folder, model_type="llama"))

    def model(self):
        """What sft.py leaves, trained until its answers are text."""
        return self.once("model", lambda folder: sft.main(self.flags(
            "sft", folder, "--max-steps", 150, "--lr", 2e-2, "--max-examples", 300)))

    def reward(self):
        """A reward model with an untrained head."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        def make(folder):
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_pretrained(self.model(), num_labels=1)
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(self.model()).save_pretrained(folder)
        return self.once("reward", make)

    def flags(self, stage, out, *more):
        model = self.base() if stage == "sft" else self.model()
        judge = ["--judge", f"python:{self.folder}/judge.py:score"] * (stage == "online")
        return [*map(str, ["--model", model, "--chat-template", "tokenizer", *FLAGS[stage], *judge,
                           "--output", out, "--cache-dir", self.folder / "cache", *more])]

    def run(self, stage, out, *more):
        return STAGES[stage].main(self.flags(stage, out, *STEPS, *more))

    def whole(self, stage):
        """An uninterrupted run."""
        return self.once(f"whole-{stage}", lambda folder: self.run(stage, folder))

    def killed(self, stage, at=5, *more):
        """A run that was killed while it recorded a step: checkpoints up to the step before."""
        return self.once(f"killed-{stage}-{at}", lambda folder: self.kill(stage, folder, at, *more))

    def kill(self, stage, folder, at, *more):
        self.flags(stage, folder)                           # makes the model now
        record = sft.Run.record

        def die(run, now):
            record(run, now)
            if now["step"] == at:
                raise Killed
        sft.Run.record = die
        try:
            self.run(stage, folder, *more)
        except Killed:
            return
        finally:
            sft.Run.record = record
        raise AssertionError("the run was not killed")


def small_model(folder, **config):
    from transformers import AutoConfig, AutoModelForCausalLM
    tokenizer = data.demo_tokenizer()
    data.set_template(tokenizer)
    torch.manual_seed(0)
    small = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32,
                 num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                 max_position_embeddings=256)
    config = AutoConfig.for_model(config.pop("model_type"), **small | config)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal_runs(whole, out):
    a, b = weights_of(whole), weights_of(out)
    assert all(torch.equal(a[name], b[name]) for name in a), "other weights"
    assert [m["loss"] for m in metrics_of(whole)] == [m["loss"] for m in metrics_of(out)], "losses"
    a, b = (json.loads((folder / "run.json").read_text())["result"] for folder in (whole, out))
    assert a["cumulative"] == b["cumulative"], f"totals {a['cumulative']} {b['cumulative']}"
    assert not (out / "checkpoints").exists()


# --------------------------------------------------------------------------- damage to one file
def zero_bytes(path):
    path.write_bytes(b"")


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def missing(path):
    path.unlink()


def one_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def a_bit_in_each_part(path):
    """Padding aside, some of them are in weights and moments."""
    content = bytearray(path.read_bytes())
    for i in range(1, 64):
        content[len(content) * i // 64] ^= 4
    path.write_bytes(content)


def one_header_byte(path):
    """In the middle of a safetensors header."""
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") // 2] ^= 1
    path.write_bytes(content)


def zero_filled(path):
    path.write_bytes(bytes(path.stat().st_size))


def other_json(path):
    path.write_text('{"a": [1]}')


def json_list(path):
    path.write_text("[]")


# ---------------------------------------------------------------------------------------- weights
def without_a_tensor(state):
    del state["model.layers.1.mlp.down_proj.weight"]


def without_a_layer(state):
    for name in [name for name in state if "layers.1" in name]:
        del state[name]


def with_a_layer_more(state):
    state["model.layers.2.mlp.down_proj.weight"] = torch.zeros(16, 32)


def with_another_shape(state):
    state["model.layers.1.mlp.down_proj.weight"] = torch.zeros(3, 3)


def edited(folder, edit):
    state = weights_of(folder)
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def use(lab, user, model):
    """Run whatever loads a model with this one."""
    if user in STAGES:
        return lab.run(user, lab.new(), "--model", model)
    if user == "dpo-ref":
        return lab.run("dpo", lab.new(), "--ref", model)
    if user == "reward-judge":
        return lab.run("online", lab.new(), "--judge", f"reward:{model}")
    if user == "annotate":
        rated = lab.folder / "rated.jsonl"
        rated.write_text("".join(json.dumps({
            "prompt": f"q {i}", "chosen": "a", "rejected": "b", "score_chosen": 5 + i,
            "score_rejected": 1 + i}) + "\n" for i in range(4)))
        return data.main(["annotate", "--rm", str(model), "--data", str(rated), "--output",
                          str(lab.new()), "--cache-dir", str(lab.new())])
    flags = ["--max-length", "128", "--cache-dir", lab.folder / "cache", "--output", lab.new()]
    if user == "evaluate-margins":
        command = ["margins", lab.model(), model, "--max-prompt-length", "64", "--data",
                   "demo-pairs:test=0.03"]
    else:
        command = ["judge", lab.model(), model, "--judge", f"python:{lab.folder}/judge.py:score",
                   "--max-new-tokens", "4", "--data", "demo:test=0.05"]
    return evaluate.main([*map(str, command + flags)])


USERS = ("sft", "dpo", "dpo-ref", "online", "evaluate-judge", "evaluate-margins")


@trials("1 weights", *itertools.product(USERS, (
    without_a_tensor, without_a_layer, with_a_layer_more, with_another_shape)))
def model(lab, user, edit):
    folder = edited(lab.copy(lab.model()), edit)
    number = 2 if edit is with_a_layer_more else 1
    refused([f"model.layers.{number}.mlp.down_proj.weight", folder], use, lab, user, folder)


@trials("1 weights", *itertools.product(USERS, (
    zero_bytes, truncated, missing, one_header_byte)))
def model_file(lab, user, damage):
    folder = lab.copy(lab.model())
    damage(folder / "model.safetensors")
    refused([folder], use, lab, user, folder)


@trials("1 weights", ("reward-judge", without_a_layer), ("reward-judge", with_a_layer_more),
        ("annotate", without_a_layer), ("annotate", with_a_layer_more))
def reward_model(lab, user, edit):
    folder = edited(lab.copy(lab.reward()), edit)
    number = 2 if edit is with_a_layer_more else 1
    refused([f"model.layers.{number}.mlp.down_proj.weight", folder], use, lab, user, folder)


@trials("1 weights", *((user, *damage) for user in USERS for damage in (
    ("config.json", zero_bytes), ("config.json", missing), ("config.json", json_list),
    ("tokenizer.json", zero_bytes), ("tokenizer.json", missing), ("tokenizer.json", truncated),
    ("tokenizer_config.json", missing), ("tokenizer_config.json", zero_bytes),
    ("tokenizer_config.json", json_list))))
def model_folder(lab, user, file, damage):
    folder = lab.copy(lab.model())
    damage(folder / file)
    refused([folder], use, lab, user, folder)


# ------------------------------------------------------------------------------------ checkpoints
def step_folder(out, step):
    folder, = (p for p in (out / "checkpoints").glob("step-*") if int(p.name[5:]) == step)
    return folder


def state_files(out, step):
    return sorted(step_folder(out, step).glob("*states.pt"))


def continues(lab, stage, out, *more):
    lab.run(stage, out, *more)
    assert_equal_runs(lab.whole(stage), out)


@trials("5 checkpoint", *itertools.product(("sft", "dpo"), (
    zero_bytes, truncated, missing, a_bit_in_each_part, zero_filled)))
def checkpoint_file(lab, stage, damage):
    out = lab.copy(lab.killed(stage))
    damage(state_files(out, 4)[0])
    continues(lab, stage, out)


@trials("5 checkpoint", ("sft",), ("dpo",))
def checkpoint_step_folder_empty(lab, stage):
    out = lab.copy(lab.killed(stage))
    for file in step_folder(out, 4).iterdir():
        file.unlink()
    continues(lab, stage, out)


@trials("5 checkpoint", ("sft",), ("dpo",))
def list_of_checkpoint_files_empty(lab, stage):
    out = lab.copy(lab.killed(stage))
    (step_folder(out, 4) / "whole").write_text("")
    continues(lab, stage, out)


@trials("5 checkpoint", ("sft",), ("dpo",))
def empty_later_step_folder(lab, stage):
    out = lab.copy(lab.killed(stage))
    (out / "checkpoints/step-0000006").mkdir()
    continues(lab, stage, out)


def trained(lab, stage, out, *more):
    """The first step that a run trained."""
    steps, record = [], sft.Run.record

    def note(run, now):
        steps.append(now["step"])
        record(run, now)
    sft.Run.record = note
    try:
        lab.run(stage, out, *more)
    finally:
        sft.Run.record = record
    return steps[0] if steps else None


@trials("5 checkpoint", *itertools.product(("sft", "dpo"), (zero_bytes, truncated, missing)))
def newest_damaged_an_older_whole_one_there(lab, stage, damage):
    """As a kill between writing the newer and deleting the older one leaves it."""
    out = lab.copy(lab.killed(stage))
    older = step_folder(lab.killed(stage, 3), 2)
    shutil.copytree(older, out / "checkpoints" / older.name)
    damage(state_files(out, 4)[0])
    assert trained(lab, stage, out) == 3
    assert_equal_runs(lab.whole(stage), out)


@trials("5 checkpoint", ("sft",), ("dpo",))
def checkpoints_gone(lab, stage):
    out = lab.copy(lab.killed(stage))
    shutil.rmtree(out / "checkpoints")
    continues(lab, stage, out)


def torn_end(path):
    os.truncate(path, path.stat().st_size - 9)


def torn_inside(path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]) + "\n")


def a_line_lost(path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:1] + lines[2:]) + "\n")


def a_line_twice(path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2] + lines[1:]) + "\n")


@trials("5 checkpoint", *itertools.product(("sft", "dpo"), (
    zero_bytes, missing, torn_end, torn_inside, a_line_lost, a_line_twice)))
def metrics(lab, stage, damage):
    out = lab.copy(lab.killed(stage))
    damage(out / "metrics.jsonl")
    continues(lab, stage, out)


@trials("5 checkpoint", *itertools.product(("sft", "dpo", "online"), (
    zero_bytes, truncated, json_list, missing)))
def run_json(lab, stage, damage):
    """What cannot be known to be this run is refused, never continued."""
    out = lab.copy(lab.killed(stage))
    damage(out / "run.json")
    before = sorted(map(str, out.rglob("*")))
    refused([out], lab.run, stage, out)
    assert sorted(map(str, out.rglob("*"))) == before


# ------------------------------------------------------------------------------------------ cache
def prepared(lab, cache, pairs=False):
    tokenizer = data.demo_tokenizer()
    template = data.set_template(tokenizer)
    return data.prepare(["demo-pairs:test" if pairs else "demo:test"], tokenizer, template,
                        max_length=100, cache_dir=str(cache), num_proc=1, pairs=pairs)


def rows_of(prepared):
    return prepared.dataset[:], prepared.stats


def cut_at_a_record(path):
    """A valid Arrow stream of the first half of the rows."""
    import datasets
    import pyarrow
    table = datasets.Dataset.from_file(str(path)).data.table
    with pyarrow.ipc.new_stream(path.with_suffix(".cut"), table.schema) as stream:
        stream.write_table(table[:len(table) // 2])
    path.with_suffix(".cut").replace(path)


def rows_of_a_kind_changed(path):
    """A bit of the numbers or text, not of the layout: the last quarter of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


@trials("4 cache", *itertools.product(("converted", "encoded"), (False, True), (
    zero_bytes, truncated, missing, one_bit, zero_filled, cut_at_a_record, rows_of_a_kind_changed)))
def cache(lab, kind, pairs, damage):
    fresh = lab.once(f"cache-{pairs}", lambda folder: prepared(lab, folder, pairs))
    expected = rows_of(prepared(lab, fresh, pairs))
    folder = lab.copy(fresh)
    file, = (folder / kind).glob("*.arrow")
    damage(file)
    if kind == "converted":
        shutil.rmtree(folder / "encoded")
    assert rows_of(prepared(lab, folder, pairs)) == expected


def torn_inside_each(paths):
    for path in paths:
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([lines[0][:20] + b"\n", *lines[1:], b'{"key": "half']))


@trials("4 cache")
def torn_reference_log_probs(lab):
    cache, out = lab.new(), (lab.new(), lab.new())
    lab.run("dpo", out[0], "--cache-dir", cache)
    torn_inside_each(cache.glob("logps/*/*.jsonl"))
    lab.run("dpo", out[1], "--cache-dir", cache)
    assert_equal_runs(*out)


@trials("4 cache", ("answers",), ("scores",))
def torn_lines(lab, name):
    """Of a killed run, whose answers and scores are made again."""
    out, clean = lab.new(), lab.whole("online") / "iteration-1"
    lab.kill("online", out, 1)
    torn_inside_each(out.glob(f"iteration-1/{name}-*.jsonl"))
    lab.run("online", out)
    a, b = weights_of(clean), weights_of(out / "iteration-1")
    assert all(torch.equal(a[name], b[name]) for name in a)


@trials("4 cache", (zero_bytes,), (truncated,))
def iteration_report(lab, damage):
    out = lab.copy(lab.whole("online"))
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({k: v for k, v in run.items() if k != "result"}))
    damage(out / "iteration-1/report.json")
    refused([out / "iteration-1/report.json"], lab.run, "online", out)


# ------------------------------------------------------------------------------- the same or not
@trials("4 same name", ("sft",), ("dpo",), ("online",))
def model_trained_anew(lab, stage):
    """A finished run is another one if the model under the same name has other weights."""
    folder, out = lab.copy(lab.base() if stage == "sft" else lab.model()), lab.new()
    lab.run(stage, out, "--model", folder)
    state = weights_of(folder)
    state["model.layers.1.mlp.down_proj.weight"] += 1e-3
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(["--overwrite", out], lab.run, stage, out, "--model", folder)


@trials("4 same name", ("finished",), ("killed",))
def judge_changed(lab, when):
    file, out = lab.new().with_suffix(".py"), lab.new()
    file.write_text(JUDGE)
    judge = ("--judge", f"python:{file}:score")
    if when == "killed":
        lab.kill("online", out, 1, *judge)
    else:
        lab.run("online", out, *judge)
    file.write_text(JUDGE.replace("97", "89"))
    refused(["--overwrite", out], lab.run, "online", out, *judge)


@trials("4 same name", ("finished",), ("killed",))
def reward_model_trained_anew(lab, when):
    folder, out = lab.copy(lab.reward()), lab.new()
    judge = ("--judge", f"reward:{folder}")
    if when == "killed":
        lab.kill("online", out, 1, *judge)
    else:
        lab.run("online", out, *judge)
    state = weights_of(folder)
    state["score.weight"] *= -1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(["--overwrite", out], lab.run, "online", out, *judge)


@trials("4 same name", ("sft",), ("dpo",))
def finished_run_with_checkpoints_left(lab, stage):
    """As a kill between the result and the checkpoints' removal leaves it."""
    out = lab.copy(lab.whole(stage))
    shutil.copytree(lab.killed(stage) / "checkpoints", out / "checkpoints")
    lab.run(stage, out)
    assert not list(out.rglob("checkpoints"))


# --------------------------------------------------------------------------------- what is deleted
def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
            for p in sorted(folder.rglob("*"))}


@trials("6 overwrite", *itertools.product(("sft", "dpo", "online"), ([], ["--overwrite"]), (
    "notes.txt", "run.json", "metrics.jsonl", "config.json", "checkpoints/mine.pt",
    "iteration-1/mine.txt")))
def folder_with_a_file_of_the_user(lab, stage, flags, name):
    out = lab.new()
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text('{"mine": 1}')
    before = tree(out)
    refused([out, name.split("/")[0]], lab.run, stage, out, *flags)
    assert tree(out) == before


@trials("6 overwrite", *itertools.product(("sft", "dpo", "online"), (
    "notes.txt", "thesis/chapter.tex", "data.jsonl")))
def overwrite_a_run_with_a_file_of_the_user(lab, stage, name):
    out = lab.copy(lab.whole(stage))
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    before = tree(out)
    refused([name.split("/")[0]], lab.run, stage, out, "--overwrite")
    assert tree(out) == before


@trials("6 overwrite", ("sft",), ("dpo",), ("online",))
def overwrite_the_checkout(lab, stage):
    """--output . --overwrite in a copy of the scripts."""
    out = lab.new()
    out.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, out)
    before = tree(out)
    with contextlib.chdir(out):
        refused([".py", "no run here wrote"], lab.run, stage, ".", "--overwrite")
    assert tree(out) == before


@trials("6 overwrite", ("sft",), ("dpo",), ("online",))
def overwrite_through_a_symlink(lab, stage):
    """A killed run with another learning rate does not continue under the new one."""
    out, link = lab.copy(lab.killed(stage)), lab.new()
    link.symlink_to(out)
    lab.run(stage, link, "--lr", 1e-4, "--overwrite")
    clean = lab.new()
    lab.run(stage, clean, "--lr", 1e-4)
    of = "iteration-1" if stage == "online" else ""
    assert_equal_runs(clean / of, out / of)
    assert link.is_symlink()


@trials("6 overwrite", ("sft", "--model"), ("dpo", "--model"), ("dpo", "--ref"), ("dpo", "--data"))
def overwrite_an_input(lab, stage, flag):
    """The model, reference or data that a run reads from its own --output stay."""
    out = lab.copy(lab.model())
    value = out
    if flag == "--data":
        value = out / "pairs.jsonl"
        value.write_text(json.dumps(data.demo_pairs(1)[0]) + "\n")
    before = tree(out)
    refused([out, "--overwrite"], lab.run, stage, out, "--overwrite", flag, value)
    assert tree(out) == before


@trials("6 overwrite", ("sft",), ("dpo",), ("online",))
def overwrite_a_finished_run(lab, stage):
    out = lab.copy(lab.whole(stage))
    lab.run(stage, out, "--lr", 1e-4, "--overwrite")
    assert not [p for p in out.rglob("*") if p.name.startswith("lock")]


@trials("6 overwrite", ("sft",), ("online",))
def overwrite_where_deleting_fails(lab, stage):
    out = lab.copy(lab.killed(stage))
    rmtree, unlink = shutil.rmtree, Path.unlink

    def fail(path, *args, **settings):
        if str(out) in str(path) and "lock" not in str(path):
            if not (args or settings.get("ignore_errors")):
                raise PermissionError(13, "Permission denied", str(path))
    shutil.rmtree = Path.unlink = fail
    try:
        refused(["Permission denied"], lab.run, stage, out, "--lr", 1e-4, "--overwrite")
    finally:
        shutil.rmtree, Path.unlink = rmtree, unlink


# ----------------------------------------------------------------------------------------- export
@trials("7 export", *itertools.product(("sft", "dpo"), (
    {"temperature": 0.6, "top_p": 0.9}, {"top_k": 5}, {"num_beams": 4, "do_sample": True},
    {"early_stopping": True})))
def generation_config(lab, stage, values):
    folder, out = lab.copy(lab.base() if stage == "sft" else lab.model()), lab.new()
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    lab.run(stage, out, "--model", folder)
    assert (out / "model.safetensors").exists()


@trials("7 export", ("sft",), ("dpo",))
def positions_learned_and_fewer_than_max_length(lab, stage):
    folder = lab.once("gpt2", lambda folder: small_model(
        folder, model_type="gpt2", max_position_embeddings=64))
    flags = ["--model", folder, *["--max-prompt-length", 32] * (stage == "dpo")]
    refused(["--max-length 128", "64"], lab.run, stage, lab.new(), *flags, "--max-length", 128)
    lab.run(stage, lab.new(), *flags, "--max-length", 64)


@trials("7 export", ("sft",), ("dpo",), ("dpo-ref",), ("online",))
def quantised_weights(lab, user):
    folder = lab.copy(lab.model())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    refused([folder, "quanti"], use, lab, user, folder)


@trials("7 export")
def jitter_noise_of_a_mixture(lab):
    """Two passes over one batch are equal, as without dropout."""
    folder = lab.once("mixtral", lambda folder: small_model(
        folder, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2,
        router_jitter_noise=0.5))
    out = lab.new()
    lab.run("dpo", out, "--model", folder)
    assert abs(metrics_of(out)[0]["loss"] - 0.693147) < 1e-5


@trials("7 export", ("sft",), ("dpo",))
def killed_in_the_export(lab, stage):
    """After the last step a checkpoint stands: nothing is trained again."""
    out, export = lab.new(), sft.export

    def die(*args):
        raise Killed
    STAGES[stage].export = die
    try:
        lab.run(stage, out, "--save-every", 100)
    except Killed:
        pass
    finally:
        STAGES[stage].export = export
    assert trained(lab, stage, out, "--save-every", 100) is None
    assert_equal_runs(lab.whole(stage), out)


# ---------------------------------------------------------------------------------------- servers
class Server(http.server.ThreadingHTTPServer):
    """answer(handler) writes the whole response to a POST."""
    daemon_threads = True

    def __init__(self, answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                self.server.keys.append(self.headers["Authorization"])
                self.rfile.read(int(self.headers["Content-Length"] or 0))
                with contextlib.suppress(OSError):
                    answer(self)

            def do_GET(self):
                self.server.keys.append(self.headers["Authorization"])
                send(self, b"{}")

            def log_message(self, *args):
                pass
        super().__init__(("127.0.0.1", 0), Handler)
        self.keys, self.url = [], f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


def send(handler, body, status=200, **headers):
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", **headers}.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body)


def completion(text="so: [[A>B]]", **changes):
    """The body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text},
              "finish_reason": "stop"}
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m",
            "choices": [choice], "usage": {"completion_tokens": 2}} | changes


def sends(reply):
    body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    return functools.partial(send, body=body)


def arena(lab, server, *more, texts=("mine", "theirs")):
    """Arena-Hard on two questions with this judge: 4 calls."""
    folder = lab.new()
    folder.mkdir()

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / name
    flags = {"--questions": write("questions.jsonl", [
        {"uid": f"q{i}", "category": "c", "prompt": f"question {i}"} for i in range(2)])}
    for flag, text in zip(("--answers", "--baseline-answers"), texts):
        flags[flag] = write(f"{text}.jsonl", [
            {"uid": f"q{i}", "model": text, "messages": [
                data.user(f"question {i}"), data.assistant(text)]} for i in range(2)])
    (folder / "template.yaml").write_text(
        'system_prompt: judge\nprompt_template: ["{question_1} {answer_1} {answer_2}"]\n')
    flags |= {"--templates": folder / "template.yaml", "--output": folder / "out", "--judge": "m",
              "--judge-url": server.url, "--timeout": 2, "--retries": 0}
    return evaluate.main(["arena-hard", *map(str, itertools.chain(*flags.items())),
                          *map(str, more)])


@contextlib.contextmanager
def environment(**values):
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@trials("3 keys", *itertools.product(
    ("EMPTY", "A", "B", "x", "0", ">", "none", "test", "judge", "sk-abcdefgh12345678"),
    ("the test is right, none is EMPTY: [[A>B]]", "x0 [[B>>A]]")))
def key(lab, key, text):
    """An API key that is part of a reply leaves the reply as it is."""
    with environment(OPENAI_API_KEY=key):
        result = arena(lab, Server(sends(completion(text))))
    assert (result["failed"], result["unparsed"]) == (0, 0)
    replies = data.read_growing(Path(result["output"]), "replies")
    assert {r["reply"] for r in replies} == {text}


@trials("3 keys", *itertools.product((301, 302, 303, 307, 308)))
def redirect_to_another_host(lab, status):
    other = Server(sends(completion()))
    elsewhere = other.url.replace("127.0.0.1", "localhost") + "/chat/completions"
    server = Server(functools.partial(send, body=b"", status=status, Location=elsewhere))
    with environment(OPENAI_API_KEY="sk-abcdefgh12345678"):
        with contextlib.suppress(ValueError):
            arena(lab, server)
    assert not any("sk-abc" in str(key) for key in other.keys)


def a_byte_a_second(handler):
    send(handler, b"")
    for _ in range(60):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.5)


def a_header_a_second(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for n in range(60):
        handler.wfile.write(f"X-{n}: x\r\n".encode())
        handler.wfile.flush()
        time.sleep(0.5)


def a_body_without_end(handler):
    send(handler, b'{"choices": [{"message": {"content": "')
    for _ in range(500):
        handler.wfile.write(b"x" * 2 ** 20)


def silence(handler):
    time.sleep(30)


BODIES = {
    "brackets": b"[" * 10 ** 6, "braces": b'{"a":' * 10 ** 5,
    "brackets in the content": completion(None) | {"choices": [
        {"message": {"content": functools.reduce(lambda x, _: [x], range(300), "x")}}]},
    "invalid utf-8": b'{"choices": [{"message": {"content": "\xff\xfe"}}]}', "empty": b"",
    "null": b"null", "list": b"[]", "number": b"7", "html": b"<html>",
    "choices null": completion(choices=None), "choices dict": completion(choices={"a": 1}),
    "choices empty": completion(choices=[]), "content list": completion([1]),
    "content dict": completion({"text": "x"}), "content number": completion(7),
    "surrogate": completion("\ud800 [[A>B]]"), "NaN": b'{"choices": NaN}',
    "usage text": completion(usage={"completion_tokens": "many"}),
    "usage float": completion(usage={"completion_tokens": 7.5}),
    "usage huge": completion(usage={"completion_tokens": 3 * 10 ** 9}),
    "usage infinite": b'{"choices": [{"message": {"content": "[[A>B]]"}}], '
                      b'"usage": {"completion_tokens": Infinity}}',
    "usage negative": completion(usage={"completion_tokens": -5}),
    "usage list": completion(usage=[1]), "usage text itself": completion(usage="many"),
    "finish_reason list": completion(choices=[
        {"message": {"content": "[[A>B]]"}, "finish_reason": ["stop"]}]),
    "finish_reason dict": completion(choices=[
        {"message": {"content": "[[A>B]]"}, "finish_reason": {"a": 1}}]),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(completion()).encode(),
    "a number of 10,000 digits": b'{"choices": ' + b"1" * 10 ** 4 + b"}",
    "200 MB": completion("x" * 2 * 10 ** 8)}


@trials("8 servers", (a_byte_a_second,), (a_header_a_second,), (a_body_without_end,), (silence,),
        *((name,) for name in BODIES))
def judge_answers_once(lab, body):
    """The other three verdicts count; the first is one, or recorded as failed. Within seconds."""
    first, well = itertools.count(), sends(completion())
    badly = body if callable(body) else sends(BODIES[body])
    started = time.time()
    result = arena(lab, Server(lambda handler: (well if next(first) else badly)(handler)))
    assert time.time() - started < 15, f"{time.time() - started:.0f} s"
    assert result["calls"] == 4
    assert result["failed"] in (0, 1)
    assert result["unparsed"] <= 1
    size = sum(file.stat().st_size for file in Path(result["output"]).rglob("*"))
    assert size < 10 ** 8


@trials("8 servers", (a_byte_a_second,), (a_body_without_end,), ("brackets",), ("null",))
def judge_answers_always(lab, body):
    """One message that names the judge's URL, within seconds."""
    server = Server(body if callable(body) else sends(BODIES[body]))
    started = time.time()
    refused([server.url, "--judge-url"], arena, lab, server)
    assert time.time() - started < 15, f"{time.time() - started:.0f} s"


@trials("8 servers", *((name,) for name in BODIES if "usage" in name or "finish" in name))
def policy_server_answers(lab, body):
    """Sampling for online DPO: the run ends with tokens that are numbers, or names the server."""
    server = Server(sends(BODIES[body]))
    flags = ("--base-url", server.url, "--timeout", 2, "--retries", 0)
    try:
        with resources(address_gib=24):
            lab.run("online", lab.new(), *flags)
    except ValueError as error:
        assert server.url in str(error) or "too few to train on" in str(error), error


@contextlib.contextmanager
def resources(address_gib):
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_gib * 2 ** 30, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ------------------------------------------------------------------------------------------ input
def files(lab, name, content):
    folder = lab.new()
    folder.mkdir()
    (folder / name).write_bytes(content)
    return folder / name


ROW = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
SOURCES = {
    "nested.jsonl": b'{"messages": ' + b"[" * 10 ** 5 + b"]" * 10 ** 5 + b"}\n",
    "binary.jsonl": bytes(range(256)) * 40, "utf16.jsonl": ROW.decode().encode("utf-16"),
    "digits.jsonl": b'{"messages": ' + b"1" * 10 ** 4 + b"}\n", "half.jsonl": ROW[:30],
    "nul.jsonl": b"\0" * 1000, "broken.jsonl.gz": b"\x1f\x8b" + b"x" * 99,
    "plain.jsonl.gz": ROW, "broken.parquet": b"PAR1" + b"x" * 99, "empty.parquet": b"",
    "broken.csv": b'"a,b\n1', "empty.csv": b"", "binary.csv": b"a,b\n\xff\xfe,1\n",
    "unknown.txt": ROW, "role.jsonl": b'{"messages": [{"role": {}, "content": "q"}]}\n',
    "content.jsonl": b'{"messages": [{"role": "user", "content": {"a": 1}}]}\n',
    "messages.jsonl": b'{"messages": {"a": 1}}\n', "turns.jsonl": b'{"messages": [1, 2]}\n',
    "columns.jsonl": b'{"messages": null, "chosen": 1, "rejected": 2}\n'}


@trials("9 input", *itertools.product(("sft", "dpo"), SOURCES))
def source(lab, stage, name):
    path = files(lab, name, SOURCES[name])
    refused([name], lab.run, stage, lab.new(), "--data", path)


@trials("9 input", *itertools.product(("sft", "dpo"), (
    "", ":", "=", "=0.5", "demo:nosplit", "demo=0", "demo=2", "demo=0.5.5", "no/such", "folder/",
    "lion-sft:train_x", "/dev/null")))
def source_name(lab, stage, name):
    (lab.folder / "folder").mkdir(exist_ok=True)
    if name == "folder/":
        name = str(lab.folder / "folder")
    with environment(HF_HUB_OFFLINE="1"):
        word = name if name.strip("=:.05") else "--data"
        refused([word], lab.run, stage, lab.new(), "--data", name)


JUDGES = {
    "syntax": "def score(:", "no function": "x = 1", "raises": "def score(*a): raise KeyError(7)",
    "divides": "def score(*a): return 1 / 0", "imports": "import no_such_module",
    "text": "def score(p, a, r): return ['x'] * 3", "few": "def score(p, a, r): return [1.0]",
    "nan": "def score(p, a, r): return [float('nan')] * 3", "none": "def score(*a): return None"}


@trials("9 input", *((name,) for name in JUDGES))
def judge_file(lab, name):
    file = files(lab, "judge.py", JUDGES[name].encode())
    refused(["--judge python:"], lab.run, "online", lab.new(), "--judge", f"python:{file}:score")


@trials("5 checkpoint", ("dpo", "beta", 0.7), ("sft", "lr", 2e-3), ("online", "lr", 2e-3))
def killed_then_another(lab, stage, flag, value):
    """A changed setting that decides the result is refused by name."""
    out = lab.copy(lab.killed(stage))
    refused([f"{flag}: was"], lab.run, stage, out, f"--{flag}", value)


@trials("5 checkpoint")
def killed_then_more_iterations(lab):
    out, clean = lab.new(), lab.new()
    lab.kill("online", out, 5)
    for folder in (out, clean):
        lab.run("online", folder, "--iterations", 2)
    for i in (1, 2):
        assert_equal_runs(clean / f"iteration-{i}", out / f"iteration-{i}")


# ------------------------------------------------------------------------ processes: environments
def script(lab, stage, out, *more, prefix=(), ranks=1, **changes):
    """A stage as a process with its own files of output: OUT.log."""
    flags = lab.flags(stage, out, *more)
    name = {"online": "online_dpo"}.get(stage, stage)
    log = open(f"{out}.log", "a")
    return subprocess.Popen([*map(str, prefix), sys.executable, ROOT / f"{name}.py", *flags],
                            stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1",
                                                         **changes})


def said(out):
    return Path(f"{out}.log").read_text(errors="replace")


def assert_one_message(out):
    text = said(out)
    assert "Traceback" not in text and "terminate called" not in text, text[-800:]
    assert "error: " in text, text[-800:]


@trials("9 environment", in_process=False)
def home_that_cannot_be_written(lab):
    out = lab.new()
    flags = [f for f in lab.flags("sft", out, *STEPS)]
    at = flags.index("--cache-dir")
    log = open(f"{out}.log", "a")
    code = subprocess.call([sys.executable, ROOT / "sft.py", *flags[:at], *flags[at + 2:]],
                           stdout=log, stderr=log, env={**os.environ, "HOME": "/dev/null"})
    assert code == 2
    assert_one_message(out)
    assert "--cache-dir" in said(out).splitlines()[-1] or "--cache-dir" in said(out)


@trials("9 environment", ("LANG=C LC_ALL=C",), ("LC_ALL=POSIX PYTHONUTF8=0 PYTHONCOERCECLOCALE=0",),
        in_process=False)
def locale(lab, settings):
    out, source = lab.new(), lab.new().with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"messages": data.ask(f"é {i} 日本", "ü \U0001f981")},
                                         ensure_ascii=False) + "\n" for i in range(20)), "utf-8")
    changes = dict(pair.split("=") for pair in settings.split())
    process = script(lab, "sft", out, *STEPS, "--data", source, "--max-length", 128, **changes)
    assert process.wait() == 0, said(out)[-800:]


@trials("9 environment", ("sft", 40), ("sft", 100), ("online", 100), in_process=False)
def file_descriptors(lab, stage, n):
    out = lab.new()
    limit = ["bash", "-c", f'ulimit -n {n}; exec "$@"', "-"]
    if script(lab, stage, out, *STEPS, prefix=limit).wait():
        assert_one_message(out)
    assert script(lab, stage, out, *STEPS).wait() == 0, said(out)[-800:]
    of = "iteration-1" if stage == "online" else ""
    assert_equal_runs(lab.whole(stage) / of, out / of)


@trials("9 environment", *itertools.product(("sft", "dpo", "online"), (4, 40, 100)),
        in_process=False)
def files_of_at_most_so_many_kib(lab, stage, kib):
    """A disk that fills: the checkpoint, the export, the cache. A rerun continues."""
    out = lab.new()
    cache = ("--cache-dir", lab.new())
    limit = ["bash", "-c", f'ulimit -f {kib}; exec "$@"', "-"]
    if script(lab, stage, out, *STEPS, *cache, prefix=limit).wait():
        assert_one_message(out)
    assert script(lab, stage, out, *STEPS, *cache).wait() == 0, said(out)[-800:]
    of = "iteration-1" if stage == "online" else ""
    assert_equal_runs(lab.whole(stage) / of, out / of)


@trials("9 environment", in_process=False)
def output_on_another_device(lab):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        out = Path(folder) / "out"
        lab.run("sft", out)
        assert_equal_runs(lab.whole("sft"), out)


# ----------------------------------------------------------------------- processes: two at a time
@trials("2 two processes", ("sft",), ("dpo",), ("online",), in_process=False)
def after_a_holder_that_died(lab, stage):
    """A lock that SIGKILL left is taken over."""
    out = lab.new()
    first = script(lab, stage, out, "--max-steps", 4000, "--save-every", 5)
    wait_for(lambda: list(out.rglob("metrics.jsonl")), first, out)
    first.kill()
    first.wait()
    assert script(lab, stage, out, "--max-steps", 4000, "--save-every", 5, "--lr", 1e-2,
                  "--max-steps", 5, "--overwrite").wait() == 0, said(out)[-800:]


# ----------------------------------------------------------------------------- processes: signals
def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition, process, out, seconds=120):
    started = time.time()
    while not condition():
        assert process.poll() is None, said(out)[-800:]
        assert time.time() - started < seconds
        time.sleep(0.02)


def last_step(out):
    lines = [p.read_text().count("\n") for p in out.rglob("metrics.jsonl")]
    return sum(lines)


# What a script's log holds once a phase has begun
SPAN = ["--max-steps", 23, "--save-every", 5, "--num-proc", 1]
TRAINING = {"training": "from step", "export": "23/23 ["}
PHASES = {
    "sft": {"start": "started", "data": "preset", "loading": "documents in", **TRAINING},
    "dpo": {"start": "started", "data": "preset", "reference": "log-probs under", **TRAINING},
    "online": {"start": "started", "data": "preset", "sampling": "iteration 1:",
               "judging": "judged one", "reference": "log-probs under", **TRAINING},
    "evaluate": {"start": "started", "sampling": "distinct prompts", "judging": "judged one"},
    "data": {"start": "started", "reading": "convert_rows", "scoring": "reward:"}}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "deepspeed", "transformers.models.llama.modeling_llama", "transformers.generation",
    "matplotlib.figure", "evaluate", "conftest"])


def to_file(log):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)


def as_script(path, argv, log, environment):
    """`python PATH ARGV` in a fork of a process that has imported the libraries."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)    # nohup and & ignore it
    to_file(log)
    print("started", flush=True)
    sys.argv = [path, *argv]
    runpy.run_path(path, run_name="__main__")


class Started:
    """The ranks of a script that was just started."""

    def __init__(self, lab, name, out, ranks, *more):
        file = {"online": "online_dpo"}.get(name, name)
        self.name, self.log = name, Path(f"{lab.new()}.log")
        world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = []
        for rank in range(ranks):
            of_rank = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(start_fork(
                as_script, str(ROOT / f"{file}.py"), [*long_command(lab, name, out), *more],
                f"{self.log}.{rank}" if rank else str(self.log), of_rank if ranks > 1 else {}))

    def text(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def phase(self):
        text = self.text()
        return [None, *(p for p, mark in PHASES[self.name].items() if mark in text)][-1]

    def runs(self):
        return self.processes[0].exitcode is None

    def work(self):
        """Seconds that rank 0 has computed: other load on the machine does not count."""
        with contextlib.suppress(OSError):
            nanoseconds = Path(f"/proc/{self.processes[0].pid}/schedstat").read_text().split()[0]
            return int(nanoseconds) / 1e9
        return math.inf

    def end_with_the_first(self):
        """What launchers do once a rank has ended: another may wait for it inside torch."""
        while all(process.exitcode is None for process in self.processes):
            time.sleep(0.05)
        time.sleep(1)
        for process in self.processes:
            process.terminate()

    def wait(self, seconds=600):
        """Exit codes of all ranks."""
        deadline = time.time() + seconds
        for process in self.processes:
            process.join(max(1, deadline - time.time()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        assert None not in codes, f"still running: {codes}: {self.text()[-500:]}"
        return codes


def as_tests(root, argv, log):
    """`pytest ARGV` in another copy of the files."""
    to_file(log)
    for path in ROOT.rglob("*.py"):
        sys.modules.pop(path.stem, None)
    sys.path = [str(root), *(path for path in sys.path if not path.startswith(str(ROOT)))]
    os.chdir(root)
    os._exit(importlib.import_module("pytest").main(argv))


def start_fork(function, *args):
    with environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1",
                     DS_ACCELERATOR="cpu"):
        process = FORKS.Process(target=function, args=args)
        process.start()
    return process


def long_command(lab, name, out):
    if name in STAGES:
        return lab.flags(name, out, *SPAN, "--cache-dir", f"{out}-cache")
    common = ["--output", str(out), "--cache-dir", f"{out}-cache", "--num-proc", "1"]
    if name == "evaluate":
        models = [lab.model(), lab.whole("dpo")]
        return [*map(str, ["judge", *models, "--judge", f"python:{lab.folder}/judge.py:score",
                           "--data", "demo:test=0.3", "--max-new-tokens", 8]), *common]
    return ["annotate", "--rm", str(lab.reward()),
            "--data", str(lab.once("rated.jsonl", rated_pairs)), *common]


def rated_pairs(path):
    path.write_text("".join(json.dumps({
        "prompt": f"q {i}", "chosen": f"a {i}", "rejected": f"b {i}", "score_chosen": 5 + i % 5,
        "score_rejected": 1 + i % 3}) + "\n" for i in range(150)))


def assert_equal_ends(name, whole, out):
    if name in STAGES:
        of = "iteration-1" if name == "online" else ""
        return assert_equal_runs(whole / of, out / of)
    if name == "data":
        assert (whole / "rows.jsonl").read_bytes() == (out / "rows.jsonl").read_bytes()
    file = "result.json" if name == "evaluate" else "report.json"
    a, b = (json.loads((folder / file).read_text()) for folder in (whole, out))
    for own in ("date", "flags", "output"):
        a.pop(own, b.pop(own, None))
    assert a == b


def long_run(lab, name, ranks):
    """An uninterrupted run. How long each of its phases computes: lab.seconds."""
    return lab.once(f"long-{name}-{ranks}", lambda folder: timed(lab, name, ranks, folder))


def timed(lab, name, ranks, whole):
    run, starts = Started(lab, name, whole, ranks), {}
    work = 0
    while run.runs():
        phase, now = run.phase(), run.work()
        work = now if now < math.inf else work
        starts.setdefault(phase, work)
        time.sleep(0.002)
    starts.pop(None, None)
    assert run.wait() == [0] * ranks, run.text()[-800:]
    assert list(starts) == list(PHASES[name]), starts
    ends = [*list(starts.values())[1:], work]
    lab.seconds[name, ranks] = {
        phase: end - start for (phase, start), end in zip(starts.items(), ends)}


def chain(lab, name, number, ranks, draw):
    """One run, stopped once in each phase by a signal to all ranks, then finished: its end equals
    the uninterrupted one's. The moments that hit a phase are counted in lab.moments."""
    whole, out = long_run(lab, name, ranks), lab.new()
    seconds = lab.seconds[name, ranks]
    counts = lab.moments.setdefault(f"{name} {number.name} {ranks}", dict.fromkeys(seconds, 0))
    for phase in PHASES[name]:
        run = Started(lab, name, out, ranks)
        while run.phase() != phase and run.runs():
            time.sleep(0.002)
        moment = run.work() + draw.uniform(0, seconds[phase])
        while run.phase() == phase and run.work() < moment and run.runs():
            time.sleep(0.002)
        now = run.phase()
        alive = [process for process in run.processes if process.exitcode is None]
        for process in alive:
            with contextlib.suppress(ProcessLookupError):   # it has just ended
                os.kill(process.pid, number)
        if number == signal.SIGINT and ranks > 1:
            run.end_with_the_first()
        ended = 0 not in run.wait(120) or number == signal.SIGTERM
        counts[now] += len(alive) == ranks and ended
        assert now == "start" or "Traceback" not in run.text(), run.text()[-800:]
    run = Started(lab, name, out, ranks)
    assert run.wait() == [0] * ranks, run.text()[-800:]
    assert_equal_ends(name, whole, out)
    return counts


@trials("2 two processes", *itertools.product(("sft", "dpo", "online"), (0.0, 2.0), (
    [], ["--lr", "1e-2"])), in_process=False)
def in_one_output(lab, stage, apart, other):
    """One trains to its end. The other is refused, or finds it finished; it names the first."""
    whole, out = long_run(lab, stage, 1), lab.new()
    first = Started(lab, stage, out, 1)
    time.sleep(apart)
    second = Started(lab, stage, out, 1, *other)
    codes = first.wait() + second.wait()
    texts = first.text(), second.text()
    assert 0 in codes, texts
    for code, text in zip(codes, texts):
        assert code in (0, 2) and "Traceback" not in text, text[-500:]
    assert other == [] or codes != [0, 0]
    if codes != [0, 0]:
        assert f"{out}" in texts[codes.index(2)]
    if codes[0] == 0:
        assert_equal_ends(stage, whole, out)
    again = Started(lab, stage, out, 1, *(other if codes[0] else []))
    assert again.wait() == [0], again.text()[-500:]


@trials("10 signals", *(
    (name, number, ranks) for name in PHASES for ranks in (1, 2)[:1 + (name in STAGES)]
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)), in_process=False)
def ten_random_moments_of_each_phase(lab, name, number, ranks):
    draw = random.Random(f"{name} {number} {ranks}")
    counts = {}
    while min(counts.values(), default=0) < 10:
        counts = chain(lab, name, number, ranks, draw)
        assert max(counts.values()) < 40, f"moments: {counts}"


def ranks_of(out):
    """Pids of all processes that have this output in their command, launchers too."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().split(b"\0")
            if str(out).encode() in command:
                found[int(path.parent.name)] = b" ".join(command).decode()
    return found


LAUNCHERS = {"torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2"],
             "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]}


@trials("10 launchers", ("torchrun", signal.SIGTERM), ("torchrun", signal.SIGKILL),
        ("deepspeed", signal.SIGTERM), ("deepspeed", signal.SIGKILL), in_process=False)
def signal_to_the_launcher(lab, launcher, number):
    """No rank trains on; what they saved continues."""
    out = lab.new()
    flags = lab.flags("sft", out, "--max-steps", 4000, "--save-every", 50)
    log = open(f"{out}.log", "a")
    ports = ["--master-port" if launcher == "torchrun" else "--master_port", str(free_port())]
    process = subprocess.Popen(
        [sys.executable, *LAUNCHERS[launcher], *ports, ROOT / "sft.py", *flags], stdout=log,
        stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    wait_for(lambda: last_step(out) > 60, process, out)
    target = process.pid
    if launcher == "deepspeed":                             # the README: signal launch, not runner
        target, = [pid for pid, command in ranks_of(out).items() if "launcher.launch" in command
                   or "launcher/launch" in command]
    os.kill(target, number)
    deadline = time.time() + 60
    while ranks_of(out) and time.time() < deadline:
        time.sleep(0.2)
    left = ranks_of(out)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"still running: {list(left.values())}"
    assert "saved at step" in said(out), said(out)[-800:]


@trials("11 ranks", ("dies",), ("stops at an error",), in_process=False)
def one_of_two_ranks(lab, how):
    """The other ends within a minute, with one line."""
    out = lab.new()
    flags = lab.flags("sft", out, "--max-steps", 4000, "--save-every", 500)
    processes = start_ranks("sft.py", flags, 2, out)
    log = Path(f"{out}.0.log")
    wait_for(lambda: last_step(out) > 20, processes[0], f"{out}.0")
    if how == "dies":
        processes[1].kill()
        first, other = processes[1], processes[0]
    else:                                                   # rank 0 can no longer write
        shutil.rmtree(out)
        out.write_text("a file in the folder's place")
        first, other = processes
    first.wait(60)
    other.wait(60)
    texts = [Path(f"{out}.{r}.log").read_text() for r in range(2)]
    for r, text in enumerate(texts):
        if processes[r].returncode != -signal.SIGKILL:
            assert processes[r].returncode == 2, (r, processes[r].returncode)
            assert "Traceback" not in text and "terminate called" not in text, text[-800:]
            assert "error: " in text, text[-400:]


@trials("11 ranks", ("--data", "no.jsonl"), ("--model", "no/such"), ("--chat-template", "no.jinja"),
        in_process=False)
def error_on_both_ranks(lab, flag, value):
    out = lab.new()
    processes = start_ranks("dpo.py", lab.flags("dpo", out, flag, value), 2, out)
    assert [p.wait(60) for p in processes] == [2, 2]
    for r in range(2):
        text = Path(f"{out}.{r}.log").read_text()
        assert "Traceback" not in text and "terminate called" not in text, text[-800:]


@trials("11 ranks", in_process=False)
def locked_output_on_two_ranks(lab):
    """Rank 0 finds the folder locked: both end, both with one line."""
    out = lab.new()
    first = script(lab, "sft", out, "--max-steps", 4000, "--save-every", 50)
    wait_for(lambda: last_step(out) > 5, first, out)
    processes = start_ranks("sft.py", lab.flags("sft", out), 2, out)
    codes = [p.wait(60) for p in processes]
    first.kill()
    first.wait()
    assert codes == [2, 2]
    text = Path(f"{out}.0.log").read_text()
    assert str(first.pid) in text and socket.gethostname() in text, text[-400:]
    for r in range(2):
        text = Path(f"{out}.{r}.log").read_text()
        assert "Traceback" not in text and "terminate called" not in text, text[-800:]


@trials("8 servers", (1,), (40,), in_process=False)
def interrupt_while_a_judge_is_silent(lab, calls):
    """Ctrl-C ends evaluate.py within 2 seconds."""
    server = Server(silence)
    folder = lab.new()
    folder.mkdir()
    for name in ("mine", "theirs"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(
            {"uid": f"q{i}", "messages": [data.user("q"), data.assistant(name)]}) + "\n"
            for i in range(calls)))
    (folder / "questions.jsonl").write_text("".join(json.dumps(
        {"uid": f"q{i}", "prompt": "q"}) + "\n" for i in range(calls)))
    (folder / "template.yaml").write_text(
        'system_prompt: judge\nprompt_template: ["{question_1} {answer_1} {answer_2}"]\n')
    log = open(folder / "log", "w")
    process = subprocess.Popen(
        [sys.executable, ROOT / "evaluate.py", "arena-hard", "--questions",
         folder / "questions.jsonl", "--answers", folder / "mine.jsonl", "--baseline-answers",
         folder / "theirs.jsonl", "--templates", folder / "template.yaml", "--judge", "m",
         "--judge-url", server.url, "--timeout", "60", "--output", folder / "out"],
        stdout=log, stderr=log)
    while not server.keys:
        assert process.poll() is None, (folder / "log").read_text()[-500:]
        time.sleep(0.05)
    time.sleep(1)
    started = time.time()
    process.send_signal(signal.SIGINT)
    try:
        process.wait(20)
    finally:
        process.kill()
    assert time.time() - started < 2, f"{time.time() - started:.1f} s"
    assert "Traceback" not in (folder / "log").read_text()


# --------------------------------------------------------------------- one line of the maths wrong
MUTANTS = {  # name: file, what is replaced, by what, the tests that must fail
    "sign in -logsigmoid": (
        "dpo.py", "m = r_w - r_l", "m = r_l - r_w", "dpo", "by_hand"),
    "beta left out": (
        "dpo.py", "r_w, r_l = beta * (logp_w - ref_logp_w), beta * (logp_l - ref_logp_l)",
        "r_w, r_l = logp_w - ref_logp_w, logp_l - ref_logp_l", "dpo", "by_hand"),
    "IPO's half": ("dpo.py", "((m - 0.5) / beta)", "((m - 1.0) / beta)", "dpo", "by_hand"),
    "label smoothing on the same side": (
        "dpo.py", "F.logsigmoid(-m)", "F.logsigmoid(m)", "dpo", "by_hand"),
    "nats of the chosen answer not per token": (
        "dpo.py", "nll = -(logps / lengths)[:, 0].sum()", "nll = -logps[:, 0].sum()", "dpo",
        "by_hand"),
    "margin of the metrics without its reference": (
        "dpo.py", "margin = r[:, 0] - r[:, 1]",
        "margin = args.beta * (logps[:, 0] - logps[:, 1])", "dpo", "by_hand"),
    "pairs of the micro-batch as divisor": (
        "dpo.py", "ref, lengths) / len(wanted)\n", "ref, lengths) / len(ref)\n",
        "properties", "any_micro_batches and dpo"),
    "shared prompt counted twice": (
        "dpo.py", "2 * x - shared + w + l", "2 * x + w + l", "dpo", "by_hand"),
    "attention of the shared prompt counted twice": (
        "dpo.py", "attended_w + attended_l - once", "attended_w + attended_l", "dpo", "by_hand"),
    "cu_seqlens of the keys off by one": (
        "kernels.py", "cu_k.append(len(kv_index))", "cu_k.append(len(kv_index) - 1)", "kernels",
        "by_hand"),
    "targets one position late": (
        "kernels.py", "source.append(y_start + i - 1 if i", "source.append(y_start + i if i",
        "kernels", "by_hand"),
    "positions of the second answer continue": (
        "kernels.py", "positions += range(len(x), len(x) + len(y))",
        "positions += range(y_start, y_start + len(y))", "kernels", "by_hand"),
    "causal mask aligned to the top left": (
        "kernels.py", ".tril(Lk - Lq)", ".tril()", "kernels", "attend_equals"),
    "window one key wider": (
        "kernels.py", "mask.triu(Lk - Lq - window + 1)", "mask.triu(Lk - Lq - window)", "kernels",
        "attend_equals"),
    "gradient without softmax's minus": (
        "kernels.py", ".exp_().mul_(-g)", ".exp_().mul_(g)", "kernels", "token_logps"),
    "softcap's slope left out": (
        "kernels.py", "d_z.mul_(slope)", "d_z", "kernels", "token_logps"),
    "padded logits count": (
        "kernels.py", 'logits[:, vocab:] = float("-inf")', "pass", "kernels", "padded"),
    "cosine's half missing": (
        "sft.py", "(1 + math.cos(math.pi * x)) / 2", "1 + math.cos(math.pi * x)", "sft",
        "learning_rate"),
    "warm-up begins at 0": (
        "sft.py", "lr * (step + 1) / ramp", "lr * step / ramp", "sft", "learning_rate"),
    "loss mask shifted by one": (
        "sft.py", "[[False] + mask[1:]]", "[[False] + mask[:-1]]", "sft", "by_hand"),
    "weights of the micro-batch as divisor": (
        "sft.py", "sft_loss(logps, weight, total)", "sft_loss(logps, weight, weight.sum())",
        "properties", "any_micro_batches and sft"),
    "gradients not multiplied by the ranks": (
        "sft.py", "engine.backward(loss * world", "engine.backward(loss",
        "properties", "two_ranks and sft"),
    "a third of the attention's FLOPs": (
        "sft.py", "12 * config.num_hidden_layers", "4 * config.num_hidden_layers", "sft", "flops"),
    "first-fit in place of best-fit": (
        "data.py", "room = capacities[first]\n", "first, room = -1, capacities[-1]\n", "data",
        "best_fit"),
    "end of turn not trained": (
        "data.py", "template.end_of_turn_id, len(before)) + 1",
        "template.end_of_turn_id, len(before))", "data", "mask_by_hand"),
    "one order for all epochs": (
        "data.py", "key=[seed, epoch]", "key=[seed, 0]", "data", "order_of_each"),
    "A2 takes the rejected score": (
        "data.py", "np.where(gaps >= A2_LEAST, chosen, np.nan)",
        "np.where(gaps >= A2_LEAST, rejected, np.nan)", "selection", "a2"),
    "PairRM's C_ij - C_ji turned round": (
        "online_dpo.py", "return (c - c.T).mean(1)", "return (c.T - c).mean(1)", "online_dpo",
        "ranking"),
    "worst against best": (
        "online_dpo.py", "w = max(can_win, key=s.item)", "w = min(can_win, key=s.item)",
        "online_dpo", "pick_pairs_by_hand"),
    "top-p leaves out the token that reaches p": (
        "online_dpo.py", "p.cumsum(-1) - p >= top_p", "p.cumsum(-1) >= top_p", "online_dpo",
        "pick_token_by_hand"),
    "strong verdicts count once": (
        "evaluate.py", '"A>>B": (1.0, 3)', '"A>>B": (1.0, 1)', "evaluate", "arena_score_by_hand"),
    "second game not swapped": (
        "evaluate.py", "score = 1.0 - score", "score = score", "evaluate", "arena_score_by_hand"),
    "vertex without its half": (
        "evaluate.py", "-c[1] / (2 * c[2])", "-c[1] / c[2]", "evaluate", "quadratic_fit_by_hand")}


@trials("12 maths", *((name,) for name in MUTANTS), in_process=False)
def wrong(lab, name):
    """The tests notice it."""
    file, old, new, tests, chosen = MUTANTS[name]
    root = lab.new()
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__"))
    text = (root / file).read_text()
    assert text.count(old) == 1, f"{file} holds {old} {text.count(old)} times"
    (root / file).write_text(text.replace(old, new))
    log = root / "log"
    process = start_fork(as_tests, root, ["-qx", "-p", "no:cacheprovider", "--slow", "-k", chosen,
                                          f"tests/test_{tests}.py"], str(log))
    process.join()
    failed = [line.split("::")[1].split(" - ")[0] for line in log.read_text().splitlines()
              if line.startswith("FAILED")]
    assert process.exitcode == 1 and failed, log.read_text()[-800:]
    lab.caught[name] = failed[0]


# ------------------------------------------------------------------------------------------- main
def assertion(error):
    """The line of an assertion without a text."""
    return traceback.extract_tb(error.__traceback__)[-1].line


def attempt(trial, lab) -> str | None:
    """What is wrong, None if the trial survives."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            trial.run(lab)
        except AssertionError as error:
            return str(error)[:300] or assertion(error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return f"{type(error).__name__}: {str(error)[:300]}"
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--only", nargs="+", default=[], help="those whose kind and name hold all words")
    p.add_argument("--quick", action="store_true", help="those of the test suite")
    p.add_argument("--no-processes", action="store_true", help="none that starts processes")
    args = p.parse_args(argv)
    chosen = [t for t in TRIALS if all(word in f"{t.kind} {t.what}" for word in args.only)
              and (t.quick or not args.quick) and (t.in_process or not args.no_processes)]
    counts, defects = {}, []
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(folder)
        for trial in chosen:
            started, problem = time.time(), attempt(trial, lab)
            of = counts.setdefault(trial.kind, {"trials": 0, "survived": 0})
            of["trials"] += 1
            of["survived"] += problem is None
            verdict = "survived" if problem is None else f"DEFECT: {' '.join(problem.split())}"
            print(f"{time.time() - started:5.1f} s  {trial.kind} | {trial.what} | {verdict}",
                  file=sys.stderr, flush=True)
            if problem is not None:
                defects.append({"kind": trial.kind, "what": trial.what, "problem": problem})
    print(data.table([{"kind": kind} | of for kind, of in counts.items()]))
    return {"trials": len(chosen), "survived": len(chosen) - len(defects), "defects": defects,
            "moments": lab.moments, "caught": lab.caught}


if __name__ == "__main__":
    result = main()
    print(json.dumps(result))
    sys.exit(bool(result["defects"]))
