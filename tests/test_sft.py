"""sft.py: the maths, whole runs, resume, what memory flags and ranks may change, bad input.

As a script it runs `train_variants` or `die_in_a_checkpoint` of a stage in a process of its own."""
import functools
import importlib
import inspect
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import kernels
import sft
from conftest import start_ranks
from test_data import bpe_tokenizer
from test_kernels import documents, random_ids

SMALL = ["--data", "demo:test", "--eval-data", "demo:test=0.1", "--max-length", "128",
         "--batch-size", "6", "--lr", "1e-3"]


# ------------------------------------------------------------------------------------- the maths
def test_learning_rate_by_hand():
    """10 steps, 20% warm-up, linear: 1/2, 2/2 of lr, then 1 - (step - 2) / 8."""
    rates = [sft.learning_rate(step, 10, 8.0, 0.2, "linear") for step in range(10)]
    assert rates == [4.0, 8.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert sft.learning_rate(6, 10, 1.0, 0.2, "cosine") == pytest.approx(0.5)


def test_loss_by_hand():
    """A uniform model costs ln V. Sequence norm: documents of 1 and 3 targets weigh the same,
    (2 + (1 + 1 + 1) / 3) / 2."""
    uniform = torch.full((4,), -math.log(7))
    assert sft.sft_loss(uniform, torch.ones(4), 4) == pytest.approx(math.log(7))
    logps = torch.tensor([-2.0, -1, -1, -1])
    weight = torch.tensor([1, 1 / 3, 1 / 3, 1 / 3])
    assert sft.sft_loss(logps, weight, 2) == pytest.approx(1.5)


def test_micro_batches_hold_every_row_once():
    tokens = [100, 7, 50, 50, 93, 1, 20, 64]
    for limit, ranks in [(100, 1), (100, 2), (60, 2), (1000, 3), (10 ** 6, 8)]:
        split = sft.micro_batches(tokens, limit, ranks)
        micros = sum(split, [])
        assert sorted(sum(micros, [])) == list(range(8))
        assert len(split) == ranks
        assert len({len(rank) for rank in split}) == 1
        assert all(len(m) == 1 or sum(tokens[i] for i in m) <= limit for m in micros)


def test_packed_rows_by_hand():
    """Documents of 3 and 4 tokens with 2 and 3 targets in rows of 5 (concat): 0 1 2, 0 1 | 1 2 3.
    A repeated token is context. With --loss-norm sequence each document weighs 1 in all."""
    documents = datasets.Dataset.from_list([
        dict(input_ids=[4, 5, 6], targets=[False, True, True], n_targets=2, length=3),
        dict(input_ids=[5, 6, 7, 8], targets=[False, True, True, True], n_targets=3, length=4)])
    packed = sft.Packed(documents, data.pack(documents["length"], 5, "concat"), "sequence")
    assert packed.tokens.tolist() == [5, 3]
    assert packed.targets.tolist() == [3, 2]
    assert packed.weights.tolist() == pytest.approx([1 / 2 + 1 / 2 + 1 / 3, 1 / 3 + 1 / 3])
    assert packed.attended.tolist() == [6 + 3, 6]
    batch, weight = packed.batch([0, 1])
    assert batch.target.tolist() == [5, 6, 6, 7, 8]
    assert weight.tolist() == pytest.approx([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])


def test_micro_batches_are_laid_out_in_order_and_errors_arrive():
    class Rows:
        def batch(self, wanted):
            return kernels.layout([kernels.Group([], [[i, 9], ], [[False, True]])
                                   for i in wanted]), torch.tensor(wanted)
    batches = [*sft.laid_out(Rows(), [5, 6, 7, 8], [[2, 0], [], [3]])]
    assert [values.tolist() for _, values in batches] == [[7, 5], [], [8]]
    assert [b.input_ids.tolist() for b, _ in batches] == [[[7, 9, 5, 9]], [[0]], [[8, 9]]]
    with pytest.raises(IndexError):
        [*sft.laid_out(Rows(), [5], [[0], [1]])]


def test_text_bytes_by_hand():
    """The targets of an answer are its text and its end of turn, which is no text."""
    tokenizer = data.demo_tokenizer()
    messages = data.Conversation(data.ask("hi", "é!"))
    encoded = data.encode(messages, tokenizer, data.set_template(tokenizer))
    assert sum(encoded.targets) == 4
    assert sft.text_bytes([encoded._asdict()], tokenizer) == 3


def test_useful_flops_by_hand():
    """1 layer, D 8, 2 heads of 4, V 11 untied: 10 tokens, 3 targets, 20 (query, key) pairs."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2))
    body = 4 * 8 * 8 + 3 * 8 * 16 + 3 * 8                   # q k v o, gate up down, three norms
    expected = 6 * body * 10 + 6 * 88 * 3 + 12 * 1 * 8 * 20
    assert sft.useful_flops(model, 10, 3, 20) == expected


def test_useful_flops_of_frozen_weights():
    """Frozen: 4 a weight. A trained layer of 8 x 16 in it: 6."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True)).requires_grad_(False)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    body = 4 * 8 * 8 + 3 * 8 * 16 + 3 * 8
    assert sft.useful_flops(model, 10, 3, 0) == (4 * body + 2 * 8 * 16) * 10 + 4 * 88 * 3


def test_useful_flops_of_a_mixture():
    """Of 4 experts of 3 * 8 * 16 weights a token uses 2."""
    from transformers import AutoModelForCausalLM, MixtralConfig
    model = AutoModelForCausalLM.from_config(MixtralConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))
    body = 4 * 8 * 8 + 2 * 3 * 8 * 16 + 8 * 4 + 3 * 8       # router 8 x 4
    assert sft.useful_flops(model, 10, 0, 0) == 6 * body * 10
    others = dict.fromkeys(("num_local_experts", "num_experts", "num_experts_per_tok"))
    vars(model.config).update(others, moe_num_experts=4, moe_topk=[2])
    assert sft.useful_flops(model, 10, 0, 0) == 6 * body * 10


def run_copied_out(pieces, check, folder):
    """A file of nothing but these functions, as somebody copies them, without transformers."""
    head = """
from __future__ import annotations
import sys; sys.modules["transformers"] = None
import importlib.util, math
from typing import NamedTuple
import torch
import torch.nn.functional as F
BACKENDS = ()
"""
    parts = [head, *map(inspect.getsource, [*ATTENTION, *pieces]), check]
    (folder / "copied.py").write_text("\n\n".join(parts))
    subprocess.run([sys.executable, "copied.py"], cwd=folder, check=True)


ATTENTION = [kernels.Group, kernels.Batch, kernels.layout, kernels.sdpa_segments,
             kernels.pick_backend, kernels.attend, kernels.sequence_logps]


def test_copied_out_the_maths_runs_with_torch_alone(tmp_path):
    pieces = [kernels.matmul_fp32, kernels.head_logits, kernels.TokenLogps, kernels.token_logps,
              sft.sft_loss, sft.learning_rate, sft.micro_batches]
    run_copied_out(pieces, """
b = layout([Group([1, 2], [[3, 4], [5]], [[True, True], [True]])])
h = torch.randn(5, 2, 8)[:, :1].expand(-1, 2, -1)
o = attend(h, h[b.kv_index], h[b.kv_index], b.cu_seqlens_q, b.cu_seqlens_k, b.max_q, b.max_k, 1.0)
w = torch.zeros(7, 16, requires_grad=True)
loss = sft_loss(token_logps(o.flatten(1)[b.source], w, b.target), torch.ones(3), 3)
loss.backward()
assert abs(loss.item() - math.log(7)) < 1e-6
""", tmp_path)


# ----------------------------------------------------------------------------------- whole runs
def run(folder, *flags):
    """sft.main in this process; the cache lies beside the run."""
    return sft.main([*SMALL, "--output", str(folder), "--cache-dir", str(folder.parent / "cache"),
                     *map(str, flags)])


def weights(folder):
    from safetensors.torch import load_file
    return load_file(Path(folder) / "model.safetensors")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_an_ordinary_folder(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out = tmp_path / "run"
    result = run(out, "--max-steps", 4)
    assert 0 < result["loss"] < math.log(260)
    assert result["steps"] == len(metrics(out)) == 4
    nats = result["eval_loss"] / math.log(2)                # bytes and an end of turn per answer
    assert nats < result["bits_per_byte"] < 2 * nats
    model, tokenizer = (auto.from_pretrained(out) for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert model.dtype == torch.float32
    assert "varlen" not in (out / "config.json").read_text()
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    assert (out / "curves.png").stat().st_size > 5000
    assert not (out / "checkpoints").exists()
    assert run(out, "--max-steps", 4) == result             # finished: its stored result
    # the next stage's input: train it further under another name, from its own template
    further = run(tmp_path / "further", "--model", out, "--max-steps", 1, "--chat-template",
                  "tokenizer", "--packing", "concat", "--loss-norm", "sequence",
                  "--train-embeddings", "special")
    assert further["cumulative"]["steps"] == 5
    before, after = (weights(tmp_path / name)["model.embed_tokens.weight"]
                     for name in ("run", "further"))
    moved = (before != after).any(1).nonzero().flatten().tolist()
    assert {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.convert_ids_to_tokens(moved)) <= {
        *tokenizer.all_special_tokens}


def test_empty_system_needs_a_template_that_takes_it(tmp_path):
    template = tmp_path / "gemma.jinja"
    template.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
                        "{% endif %}" + data.CHATML)
    with pytest.raises(ValueError, match="--empty-system 0.8: .*no system; use 0"):
        run(tmp_path / "run", "--empty-system", 0.8, "--chat-template", template)


def test_presets_by_name_by_model_and_by_the_folder_of_a_run(tmp_path):
    (tmp_path / "run.json").write_text('{"flags": {"preset": "llama-3-8b"}}')
    for flags, epochs in ((["--preset", "gemma-2b"], 3), (["--model", "google/gemma-2b"], 3),
                          (["--model", str(tmp_path)], 1), ([], 1)):
        assert parse(*flags).epochs == epochs
    assert parse("--model", str(tmp_path)).zero == 3
    assert parse("--lr", "1").model == "demo"


def parse(*flags):
    return sft.parse([*map(str, flags)], sft.parser(), sft.PRESETS)


def test_micro_tokens_by_device(monkeypatch):
    """One row on a CPU, 16,384 tokens or one row on CUDA."""
    for cuda, expected in ((False, [8192, 32768]), (True, [16384, 32768])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        for length, n in zip((8192, 32768), expected):
            assert parse("--max-length", length).micro_tokens == n


def save_random_model(folder, tokenizer, vocab):
    """A random Llama's folder of `vocab` rows."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2))
    for part in (model, tokenizer):
        part.save_pretrained(folder)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_new_rows_fill_a_multiple_of_64_that_nobody_sees(dtype, tmp_path):
    """A vocabulary without room for ChatML's two tokens. In training its rows are a multiple of 64;
    log-probs and the exported folder have the real ones. New rows start as the mean."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = bpe_tokenizer()
    n = len(tokenizer)
    save_random_model(tmp_path / "base", tokenizer, n)
    flags = ["--model", tmp_path / "base", "--dtype", dtype, "--max-steps", 1]
    args = parse(*SMALL, *flags, "--cache-dir", tmp_path)
    template = data.set_template(tokenizer)
    new_ids = tokenizer.convert_tokens_to_ids(list(template.new_tokens))
    assert new_ids == [n, n + 1]
    model = sft.load_model(args, tokenizer, new_ids)
    table = model.get_input_embeddings().weight.detach()
    assert len(table) == 64 * math.ceil((n + 2) / 64) > n + 2
    torch.testing.assert_close(table[n].float(), table[:n].float().mean(0), atol=1e-4, rtol=1e-2)
    groups = documents(random_ids(9))
    logps = kernels.LogProbs(model)(kernels.layout(groups))
    model.resize_token_embeddings(n + 2)
    torch.testing.assert_close(kernels.LogProbs(model)(kernels.layout(groups)), logps)
    run(tmp_path / "run", *flags)
    exported, again = (auto.from_pretrained(tmp_path / "run")
                       for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert len(exported.lm_head.weight) == exported.config.vocab_size == len(again) == n + 2
    assert again("a<|im_end|>").input_ids == tokenizer("a<|im_end|>").input_ids


def test_zero_3_leaves_torch_as_it_was(tmp_path):
    linear = torch.nn.functional.linear
    run(tmp_path / "run", "--max-steps", 1, "--zero", 3)
    assert torch.nn.functional.linear is linear


# --------------------------------------------------------------------------------------- resume
def die_in_a_checkpoint(step):
    """Makes this process kill itself half way through its first file of a step's checkpoint."""
    save = torch.save

    def save_half(state, path, **settings):
        save(state, path, **settings)
        if f"step-{step:07}/" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save_half


def start(script, argv, ranks, out):
    """The ranks of a run; one rank is plain `python`."""
    if ranks > 1:
        return start_ranks(script, argv, ranks, out)
    command = [sys.executable, ROOT / script, *map(str, argv)]
    return [subprocess.Popen(command, stdout=open(f"{out}.0.log", "a"), stderr=subprocess.STDOUT,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})]


def log_of(out, rank=0):
    return Path(f"{out}.{rank}.log").read_text()


def finish(script, flags, ranks, out):
    processes = start(script, [*flags, "--output", out], ranks, out)
    assert [p.wait() for p in processes] == [0] * ranks, log_of(out)[-3000:]


def wait_for_step(step, out, processes):
    while not ((out / "metrics.jsonl").exists() and any(m["step"] >= step for m in metrics(out))):
        assert processes[0].poll() is None, log_of(out)[-3000:]
        time.sleep(0.02)


def assert_equal_runs(a, b):
    weights_a = weights(a)
    weights_b = weights(b)
    assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)
    assert [m["loss"] for m in metrics(a)] == [m["loss"] for m in metrics(b)]


def assert_resume_is_exact(stage, flags, ranks, folder):
    """The last rank dies by SIGKILL inside the second checkpoint's write, then SIGTERM to all
    (saves, exits 0), then to the end: bit-equal to an uninterrupted run."""
    script = f"{stage}.py"
    out = folder / "broken"
    flags = [*flags, "--max-steps", 24, "--save-every", 2, "--batch-size", 2, "--zero", 1,
             "--cache-dir", folder / "cache"]
    finish(script, flags, ranks, folder / "whole")
    task = [stage, "die_in_a_checkpoint", ranks - 1, 4, *flags, "--output", out]
    *others, dying = start("tests/test_sft.py", task, ranks, out)
    assert dying.wait() == -signal.SIGKILL, log_of(out, ranks - 1)[-3000:]
    for p in others:
        time.sleep(2)
        p.kill()
        p.wait()
    assert len(metrics(out)) == 4
    processes = start(script, [*flags, "--output", out], ranks, out)
    wait_for_step(5, out, processes)
    for p in processes:
        p.terminate()
    assert [p.wait() for p in processes] == [0] * ranks, log_of(out)[-3000:]
    stopped = json.loads(log_of(out).splitlines()[-1])
    assert stopped["stopped"]
    assert 5 <= stopped["steps"] < 24
    finish(script, flags, ranks, out)
    assert_equal_runs(folder / "whole", out)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_and_resumed_equals_uninterrupted(ranks, tmp_path):
    assert_resume_is_exact("sft", SMALL, ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_five_random_kills_equal_uninterrupted(ranks, tmp_path):
    """SIGKILL to every rank at five random moments, each after a further step was logged."""
    moments = random.Random(ranks)
    out = tmp_path / "broken"
    flags = [*SMALL, "--max-steps", 40, "--save-every", 3, "--zero", 1, "--cache-dir",
             tmp_path / "cache"]
    finish("sft.py", flags, ranks, tmp_path / "whole")
    for step in (1, 8, 15, 22, 29):
        processes = start("sft.py", [*flags, "--output", out], ranks, out)
        wait_for_step(step, out, processes)
        time.sleep(moments.uniform(0, 0.2))
        for p in processes:
            p.kill()
            p.wait()
    finish("sft.py", flags, ranks, out)
    assert_equal_runs(tmp_path / "whole", out)


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_checkpoint_runs_no_pickled_code(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(sft, "export", interrupt)
    flags = ["--max-steps", 3, "--save-every", 2]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", *flags)
    file, = (tmp_path / "run/checkpoints/step-0000003").glob("*model_states.pt")
    torch.save({"module": Payload(str(tmp_path / "ran"))}, file)
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        run(tmp_path / "run", *flags)
    assert not (tmp_path / "ran").exists()


def test_changed_flags_are_refused_by_name(tmp_path):
    args = parse(*SMALL, "--output", tmp_path)
    stored = {"flags": vars(args), "world": 2, "data": "a", "git": "0", "result": {"loss": 1.5}}
    data.write_json(tmp_path / "run.json", stored)
    other = parse(*SMALL, "--output", tmp_path, "--lr", 2, "--micro-tokens", 9)
    problems = "--overwrite it:\nlr: was 0.001, is 2.0\nnumber of ranks: was 2, is 1$"
    with pytest.raises(ValueError, match=problems):
        sft.check_resume(other, 1, "a")
    with pytest.raises(ValueError, match="content of --data.*: was a, is b"):
        sft.check_resume(args, 2, "b")
    sft.init_distributed()
    assert sft.check_resume(args, 2, "a") == stored["result"]


# --------------------------------------------------------------------------------- invariances
def train_variants(stage, out, variants):
    """Five steps for each list of flags; stores the gradients that the first step applies."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    step = deepspeed.DeepSpeedEngine.step
    for i, flags in enumerate(variants):
        grads = {}

        def first_step(engine, *args, **settings):
            if not grads:
                for name, p in engine.module.named_parameters():
                    grads[name] = safe_get_full_grad(p).detach().clone()
            return step(engine, *args, **settings)
        deepspeed.DeepSpeedEngine.step = first_step
        stage.main([*flags, "--max-steps", "5", "--clip", "1e9", "--output", f"{out}/{i}"])
        if os.environ.get("RANK", "0") == "0":
            torch.save(grads, f"{out}/{i}.grads")


def assert_only_rounding_differs(stage, flags, variants, folder, tolerance, floor):
    """variants: {number of ranks: lists of flags}. The first of rank 1 is the reference of all, but
    the last of rank 1 that of the last of each. First-step gradients, relative to their norms."""
    for ranks, changed in variants.items():
        out = folder / str(ranks)
        out.mkdir()
        lists = json.dumps([[*flags, "--cache-dir", str(folder / "cache"), *c] for c in changed])
        argv = [stage, "train_variants", out, lists]
        processes = start("tests/test_sft.py", argv, ranks, out)
        assert [p.wait() for p in processes] == [0] * ranks, log_of(out)[-3000:]
        for i in range(len(changed)):
            like = len(variants[1]) - 1 if i == len(changed) - 1 else 0
            grads = torch.load(out / f"{i}.grads")
            for name, grad in torch.load(folder / f"1/{like}.grads").items():
                error = (grads[name] - grad).norm()
                assert error <= tolerance * max(floor, grad.norm()), (ranks, changed[i], name)
            yield ranks, i, like


@pytest.mark.slow
def test_nothing_but_rounding_depends_on_memory_flags_ranks_and_zero(tmp_path):
    """Gradients of the first step within 1e-6 (relative norm), weights after 5 steps within
    0.05 x lr x steps on average. At --batch-size 1 the second rank has no row."""
    variants = {1: [["--micro-tokens", "768"], ["--micro-tokens", "128"],
                    ["--gradient-checkpointing"], ["--zero", "1"], ["--zero", "2"],
                    ["--zero", "3"], ["--batch-size", "1"]],
                2: [*(["--zero", z] for z in "0123"), ["--zero", "3", "--batch-size", "1"]]}
    for ranks, i, like in assert_only_rounding_differs("sft", SMALL, variants, tmp_path, 1e-6, 1.0):
        reference = weights(tmp_path / f"1/{like}")
        moved = weights(tmp_path / f"{ranks}/{i}")
        for name, w in reference.items():
            assert (moved[name] - w).abs().mean() <= 0.05 * 1e-3 * 5, (ranks, i, name)


# ------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("flags, message", [
    (["--dtype", "bf16", "--zero", "0"], "--zero 0"), (["--offload", "--zero", "0"], "--zero 0"),
    (["--train-embeddings", "special", "--weight-decay", "1"], "--weight-decay"),
    (["--model", "x/y"], "--data: needed"), (["--data", "no.jsonl"], "no.jsonl"),
    (["--chat-template", "no.jinja"], "no.jinja")])
def test_bad_flags_before_anything_is_written(flags, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        sft.main([*flags, "--output", str(tmp_path / "out"), "--cache-dir", str(tmp_path)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    (["--lrr", "1"], "--lrr"), (["--packing", "x"], "--packing"),
    (["--gradient-checkpointing=false"], "--gradient-checkpointing"),
    (["--max-steps", "0"], "--max-steps.* 0 must be at least 1")])
def test_unknown_flags_and_values_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        sft.main(flags)
    assert re.search(message, capsys.readouterr().err)


def unread_flags(parser, *files):
    """Flags that no line of these files reads."""
    source = "".join((ROOT / file).read_text() for file in files)
    names = {action.dest for action in parser._actions} - {"help", "local_rank"}
    return [name for name in names if f"args.{name}" not in source]


def test_every_flag_is_read():
    assert unread_flags(sft.parser(), "sft.py") == []


def test_overwrite_deletes_nothing_before_the_input_was_checked(tmp_path):
    (tmp_path / "run.json").write_text('{"stage": "sft"}')
    with pytest.raises(ValueError, match="no.jsonl"):
        run(tmp_path, "--data", "no.jsonl", "--overwrite")
    assert (tmp_path / "run.json").exists()


def test_fewer_rows_than_ranks(monkeypatch):
    sft.init_distributed()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="--data: only 1 rows; use fewer ranks"):
        sft.plan_steps(parse(), 1, "rows")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_a_large_model_without_a_gpu_is_refused_unless_asked_for(tmp_path):
    from transformers import LlamaConfig
    LlamaConfig(hidden_size=2048, num_hidden_layers=24, vocab_size=32000).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\d\.\de9 parameters.*finds no GPU.*pass --dtype fp32"):
        sft.check_machines(parse("--model", tmp_path, "--data", "x"), 1)
    sft.check_machines(parse("--model", tmp_path, "--data", "x", "--dtype", "fp32"), 1)


def test_ranks_without_a_shared_disk_are_refused(tmp_path, monkeypatch):
    sft.init_distributed()
    args = parse("--output", tmp_path / "run", "--cache-dir", tmp_path / "cache")
    sft.check_machines(args, 2)
    assert [*tmp_path.glob("*/*")] == []
    monkeypatch.setattr(sft, "write_lines", lambda *file_and_lines: None)
    with pytest.raises(ValueError, match="--cache-dir .*cache: 1 of 2 ranks do not see"):
        sft.check_machines(args, 2)


def loss_nan(logps, *_):
    return logps.sum() * math.nan


def gradient_nan(logps, *_):
    return (logps.sum() * 0).sqrt()


@pytest.mark.parametrize("zero, dtype", [(0, "fp32"), (1, "fp32"), (1, "bf16"), (3, "bf16")])
@pytest.mark.parametrize("loss, reason", [
    (loss_nan, "the loss is nan"), (gradient_nan, r"the loss is 0.0, the gradient norm (nan|inf)")])
def test_what_is_not_finite_stops_and_names_its_rows(loss, reason, zero, dtype, tmp_path,
                                                     monkeypatch):
    monkeypatch.setattr(sft, "sft_loss", loss)
    with pytest.raises(FloatingPointError, match=rf"step 1: {reason}.* on rows \[\d+, "):
        run(tmp_path / "out", "--max-steps", 2, "--zero", zero, "--dtype", dtype)


def test_deepspeed_needs_no_compiler_on_a_cpu():
    """Its shared-memory op, a minute of g++ on a fresh machine, is not built."""
    sft.init_distributed()
    import deepspeed.comm.comm
    assert torch.cuda.is_available() or deepspeed.comm.comm.cdb.shm_comm_op is None


def disk_is_full(*args, **settings):
    raise OSError(28, "No space left on device")


def test_a_full_disk_at_the_end_leaves_no_half_model(tmp_path, monkeypatch):
    import transformers

    def save_half(model, folder, **settings):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        disk_is_full()
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", save_half)
    with pytest.raises(OSError, match="the model could not be written.*No space left"):
        run(tmp_path / "out", "--max-steps", 1)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"run.json", "metrics.jsonl", "checkpoints"}


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    import deepspeed
    save = deepspeed.DeepSpeedEngine.save_checkpoint
    folder = tmp_path / "out/checkpoints"

    def save_once(engine, *args, **settings):
        monkeypatch.setattr(deepspeed.DeepSpeedEngine, "save_checkpoint", disk_is_full)
        return save(engine, *args, **settings)
    monkeypatch.setattr(deepspeed.DeepSpeedEngine, "save_checkpoint", save_once)
    with pytest.raises(OSError, match="checkpoint of step 2 could not be .*the last one is intact"):
        run(tmp_path / "out", "--max-steps", 4, "--save-every", 1)
    assert [step.name for step in folder.iterdir() if sft.is_whole(step)] == ["step-0000001"]


if __name__ == "__main__":
    stage, (_, _, task, *rest) = importlib.import_module(sys.argv[1]), sys.argv
    if task == "die_in_a_checkpoint":
        rank, step, *flags = rest
        if os.environ.get("RANK", "0") == rank:
            die_in_a_checkpoint(int(step))
        sft.run_main(functools.partial(stage.main, flags))
    else:
        train_variants(stage, rest[0], json.loads(rest[1]))


# ------------------------------------------------------------------------------------------ LoRA
LORA = ["--lora-rank", "4", "--max-steps", "3", "--lr", "1e-2"]


def test_lora_merged_equals_the_adapter_on_its_base(tmp_path):
    """What training saw = the exported model = the base with the adapter that peft loads. Layers
    change by matrices of rank 4, nothing else does."""
    peft = pytest.importorskip("peft", reason="pip install peft==0.21.2")
    from transformers import AutoModelForCausalLM
    run(tmp_path / "base", "--max-steps", 3)
    result = run(tmp_path / "lora", "--model", tmp_path / "base", *LORA, "--keep-adapter")
    base, merged, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name)
                           for name in ("base", "lora", "base"))
    adapted = peft.PeftModel.from_pretrained(again, tmp_path / "lora/adapter")
    ids = torch.tensor(random_ids(30))
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)
    before, after = base.state_dict(), merged.state_dict()
    for name, w in before.items():
        change = after[name] - w
        ranks = 4 if "_proj" in name else 0
        assert torch.linalg.matrix_rank(change.float().reshape(len(w), -1), atol=1e-5) == ranks
    held = run(tmp_path / "again", "--model", tmp_path / "lora", "--lr", 1e-12, "--max-steps", 1)
    assert held["eval_loss"] == pytest.approx(result["eval_loss"], abs=1e-5)
    with pytest.raises(ValueError, match="--lora-targets q_proj lm_head: names"):
        run(tmp_path / "head", *LORA, "--lora-targets", "q_proj", "lm_head")


def test_lora_packed_equals_alone():
    peft = pytest.importorskip("peft", reason="pip install peft==0.21.2")
    from test_kernels import FAMILIES, alone, assert_same, build, varlen_copy
    spec = build(FAMILIES["llama"]())
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules="all-linear",
                                                 init_lora_weights=False), spec)
    docs = documents(random_ids(9, 1, 17))
    logps = varlen_copy(spec)
    assert_same(logps(kernels.layout(docs)), alone(spec, docs), logps.model, spec)


def test_lora_trains_the_rows_of_new_tokens(tmp_path):
    """A base without ChatML's tokens: their embeddings train beside the adapter, no others."""
    pytest.importorskip("peft", reason="pip install peft==0.21.2")
    from transformers import AutoModelForCausalLM
    tokenizer = bpe_tokenizer()
    save_random_model(tmp_path / "base", tokenizer, len(tokenizer))
    run(tmp_path / "out", "--model", tmp_path / "base", *LORA)
    old, new = (AutoModelForCausalLM.from_pretrained(tmp_path / name).get_input_embeddings().weight
                for name in ("base", "out"))
    assert len(new) == len(old) + 2                         # ChatML's two
    assert torch.equal(old, new[:len(old)])
    assert not torch.equal(new[-1], new[-2])                # both began as the mean
    with pytest.raises(ValueError, match="rows of new tokens train as well"):
        run(tmp_path / "kept", "--model", tmp_path / "base", *LORA, "--keep-adapter")


@pytest.mark.slow
def test_lora_at_every_zero_stage(tmp_path):
    pytest.importorskip("peft", reason="pip install peft==0.21.2")
    from safetensors.torch import load_file
    run(tmp_path / "base", "--max-steps", 3)
    flags = [*SMALL, "--model", str(tmp_path / "base"), *LORA]
    for zero in "0123":
        finish("sft.py", [*flags, "--zero", zero], 2, tmp_path / zero)
    one, *others = (load_file(tmp_path / zero / "model.safetensors") for zero in "0123")
    for other in others:
        for name, w in one.items():
            torch.testing.assert_close(w, other[name], atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------- trackers and the Hub
def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / "run/tensorboard")).Reload()
    assert events.Tags()["images"] == ["curves"]
    return [e.value for e in events.Scalars("loss")], events.Scalars("result/eval_loss")[0].value


def read_mlflow(folder):
    import mlflow
    client = mlflow.MlflowClient()
    found, = client.search_runs([client.get_experiment_by_name("lions").experiment_id])
    assert [a.path for a in client.list_artifacts(found.info.run_id)] == ["curves.png"]
    losses = client.get_metric_history(found.info.run_id, "loss")
    return [m.value for m in losses], found.data.metrics["result/eval_loss"]


def read_trackio(folder):
    from trackio.sqlite_storage import SQLiteStorage
    rows = SQLiteStorage.get_logs("lions", "run")
    assert any("curves" in row for row in rows)
    return ([row["loss"] for row in rows if "loss" in row],
            next(row["result/eval_loss"] for row in rows if "result/eval_loss" in row))


def read_wandb(folder):
    """Its log is a binary file whose values are JSON text."""
    log, = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    log = log.read_bytes()
    assert b"curves" in log
    result = json.loads((folder / "run/run.json").read_text())["result"]
    found = [m["loss"] for m in metrics(folder / "run") if json.dumps(m["loss"]).encode() in log]
    return found, result["eval_loss"] if b"result/eval_loss" in log else None


@pytest.mark.parametrize("tracker, read", [
    ("tensorboard", read_tensorboard), ("mlflow", read_mlflow), ("trackio", read_trackio),
    ("wandb", read_wandb)])
def test_trackers_get_every_step_the_picture_and_the_result(tracker, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    pytest.importorskip(tracker, reason=f"pip install {tracker}")
    result = run(tmp_path / "run", "--max-steps", 3, "--report-to", tracker)
    losses, final = read(tmp_path)
    assert losses == pytest.approx([m["loss"] for m in metrics(tmp_path / "run")])
    assert final == pytest.approx(result["eval_loss"])


def test_push_to_hub(tmp_path, monkeypatch):
    """Offline: the card alone. Else a private repository, also for a run that was finished."""
    import huggingface_hub
    flags = ["--max-steps", 2, "--push-to-hub", "me/lion"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    run(tmp_path / "run", *flags)
    card = huggingface_hub.ModelCard.load(tmp_path / "run/README.md")
    assert (card.data.license, card.data.base_model) == ("unknown", None)
    assert "demo:test" in card.text and "eval_loss" in card.text
    calls = []

    class Api:
        def create_repo(self, name, **settings):
            calls.append((name, settings["private"]))

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            calls.append((repo_id, folder_path))
            if repo_id == "me/broken":
                raise RuntimeError("no connection")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    run(tmp_path / "run", *flags)
    run(tmp_path / "run", *flags, "--hub-public")
    folder = tmp_path / "run"
    assert calls == [("me/lion", True), ("me/lion", folder), ("me/lion", False), ("me/lion", folder)]
    with pytest.raises(OSError, match="me/broken: no connection; the model is in .*same command"):
        run(tmp_path / "run", "--max-steps", 2, "--push-to-hub", "me/broken")
