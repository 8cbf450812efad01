"""sft.py: the maths, invariances of the shipped loop, whole runs, resume, bad input.

Run as a script under torchrun it trains a few steps for each given variant of flags and stores the
first step's gradients and the final weights (see `variants`)."""
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import kernels
import sft
from conftest import start_ranks
from test_kernels import FAMILIES, build, random_ids

SMALL = ["--data", "demo:test", "--eval-data", "demo:test", "--max-length", "128", "--batch-size", "6",
         "--eval-samples", "0", "--lr", "1e-3"]


# --------------------------------------------------------------------------------------------- maths
def test_learning_rate_by_hand():
    """10 steps, 20% warm-up, linear: 1/2, 2/2 of lr, then 1 - (step - 2) / 8."""
    lrs = [sft.learning_rate(s, 10, 8.0, 0.2, "linear") for s in range(10)]
    assert lrs == [4.0, 8.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert sft.learning_rate(6, 10, 1.0, 0.2, "cosine") == pytest.approx(0.5)


def test_loss_of_a_uniform_model_is_ln_v():
    logps = torch.full((4,), -math.log(7))
    assert sft.sft_loss(logps, torch.ones(4), 4) == pytest.approx(math.log(7))
    # sequence norm: documents of 1 and 3 targets weigh the same: (2 + (1 + 1 + 1) / 3) / 2
    weight = torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3])
    assert sft.sft_loss(torch.tensor([-2.0, -1, -1, -1]), weight, 2) == pytest.approx(1.5)


def test_micro_batches_hold_every_row_once():
    tokens = [100, 7, 50, 50, 93, 1, 20, 64]
    for limit, ranks in [(100, 1), (100, 2), (60, 2), (1000, 3), (10 ** 6, 8)]:
        split = sft.micro_batches(tokens, limit, ranks)
        assert sorted(i for rank in split for m in rank for i in m) == list(range(8))
        assert len({len(rank) for rank in split}) == 1 and len(split) == ranks
        assert all(len(m) == 1 or sum(tokens[i] for i in m) <= limit for rank in split for m in rank)


def test_copied_out_the_maths_runs_with_torch_alone(tmp_path):
    pieces = [kernels.Group, kernels.Batch, kernels.layout, kernels._mm, kernels._logits, kernels._TokenLogps,
              kernels.token_logps, kernels.sdpa_segments, kernels.pick_backend, kernels.attend,
              kernels.sequence_logps, sft.sft_loss, sft.learning_rate, sft.micro_batches]
    code = ("import sys; sys.modules['transformers'] = None\nfrom __future__ import annotations\n"
            "import importlib.util, math\nfrom typing import NamedTuple\nimport torch\n"
            "import torch.nn.functional as F\nBACKENDS = ()\n").replace(
        "import sys; sys.modules['transformers'] = None\nfrom __future__ import annotations\n",
        "from __future__ import annotations\nimport sys; sys.modules['transformers'] = None\n")
    code += "\n\n".join(inspect.getsource(p) for p in pieces) + """
b = layout([Group([1, 2], [[3, 4], [5]], [[True, True], [True]])])
h = torch.randn(5, 2, 8)[:, :1].expand(-1, 2, -1)
o = attend(h, h[b.kv_index], h[b.kv_index], b.cu_seqlens_q, b.cu_seqlens_k, b.max_q, b.max_k, 1.0)
w = torch.zeros(7, 16, requires_grad=True)
loss = sft_loss(token_logps(o.flatten(1)[b.source], w, b.target), torch.ones(3), 3)
loss.backward()
assert abs(loss.item() - math.log(7)) < 1e-6
"""
    (tmp_path / "copied.py").write_text(code)
    subprocess.run([sys.executable, "copied.py"], cwd=tmp_path, check=True)


# ---------------------------------------------------------------------------------------- whole runs
def run(*flags, **kwargs):
    done = subprocess.run([sys.executable, str(ROOT / "sft.py"), *map(str, flags)], capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def weights(folder):
    from safetensors.torch import load_file
    return load_file(str(Path(folder) / "model.safetensors"))


def test_a_run_leaves_an_ordinary_folder(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out = tmp_path / "run"
    result = sft.main([*SMALL, "--output", str(out), "--max-steps", "4", "--eval-samples", "8",
                       "--cache-dir", str(tmp_path / "cache")])
    assert {"exact_match", "loss", "steps", "tokens_per_s", "output", "bits_per_byte"} <= set(result)
    assert 0 < result["loss"] < math.log(260) and result["steps"] == 4
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.float32 and "varlen" not in (out / "config.json").read_text()
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    assert (out / "curves.png").stat().st_size > 5000 and not (out / "checkpoints").exists()
    with pytest.raises(ValueError, match="finished run"):
        sft.main([*SMALL, "--output", str(out), "--max-steps", "4", "--cache-dir", str(tmp_path / "cache")])
    # the next stage's input: train it further under another name, from its own template
    again = sft.main([*SMALL, "--model", str(out), "--output", str(tmp_path / "further"), "--max-steps", "1",
                      "--chat-template", "tokenizer", "--packing", "concat", "--loss-norm", "sequence",
                      "--train-embeddings", "new", "--cache-dir", str(tmp_path / "cache")])
    assert again["steps"] == 1
    a, b = weights(out)["model.embed_tokens.weight"], weights(tmp_path / "further")["model.embed_tokens.weight"]
    assert set((a != b).any(1).nonzero().flatten().tolist()) <= {2, 3}


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    """SIGKILL inside a checkpoint write, then SIGTERM (saves, exits 0), then to the end: bit-equal."""
    flags = [*SMALL, "--max-steps", 16, "--save-every", 2, "--batch-size", 2, "--cache-dir", tmp_path / "cache"]
    run(*flags, "--output", tmp_path / "whole")
    out = tmp_path / "broken"
    command = [sys.executable, str(ROOT / "sft.py"), *map(str, flags), "--output", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    while not (list(out.glob("checkpoints/step-*")) and (out / "checkpoints/writing").exists()):
        assert p.poll() is None, p.communicate()[1].decode()[-3000:]
        time.sleep(0.0002)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    before = (out / "metrics.jsonl").stat().st_mtime_ns
    while (out / "metrics.jsonl").stat().st_mtime_ns == before:
        assert p.poll() is None, p.communicate()[1].decode()[-3000:]
        time.sleep(0.001)
    time.sleep(0.05)
    p.send_signal(signal.SIGTERM)
    stdout, stderr = p.communicate()
    assert p.returncode == 0, stderr.decode()[-3000:]
    assert json.loads(stdout.splitlines()[-1]).get("stopped")
    assert run(*flags, "--output", out)["steps"] == 16
    a, b = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(a[k], b[k]) for k in a)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 17))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_five_random_kills_equal_uninterrupted(ranks, tmp_path):
    """SIGKILL to every rank at five random moments after a step was logged."""
    import random
    rng = random.Random(ranks)
    flags = [*SMALL, "--max-steps", "40", "--save-every", "3", "--cache-dir", str(tmp_path / "cache"),
             "--zero", "1", "--output"]

    start = lambda out: start_ranks("sft.py", [*flags, out], ranks, out)

    def finish(out):
        assert [p.wait() for p in start(out)] == [0] * ranks, Path(f"{out}.0.log").read_text()[-3000:]
    finish(tmp_path / "whole")
    out, log = tmp_path / "broken", tmp_path / "broken/metrics.jsonl"
    for _ in range(5):
        mark, processes = time.time(), start(out)
        while processes[0].poll() is None and not (log.exists() and log.stat().st_mtime > mark):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.8))
        assert processes[0].poll() is None, Path(f"{out}.0.log").read_text()[-3000:]
        for p in processes:
            p.kill()
            p.wait()
    finish(out)
    a, b = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_reports_go_where_asked(tmp_path, monkeypatch):
    import types
    seen = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(
        init=lambda **k: seen.append(sorted(k)), log=lambda m, step: seen.append((step, m["loss"]))))
    args = sft.parse(["--report-to", "wandb"])
    for write in sft.reporters(args, tmp_path):
        write({"step": 3, "loss": 0.5})
    assert seen == [["config", "dir"], (3, 0.5)]


def test_overwrite_deletes_nothing_before_the_input_was_checked(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="no.jsonl"):
        sft.main(["--data", "no.jsonl", "--output", str(tmp_path), "--overwrite", "--cache-dir",
                  str(tmp_path / "cache")])
    assert (tmp_path / "run.json").exists()


def test_changed_flags_are_refused_by_name(tmp_path):
    args = sft.parse([*SMALL, "--output", str(tmp_path)])
    sft.write_json(tmp_path / "run.json", {"flags": vars(args), "world": 2, "data": "a"})
    other = sft.parse([*SMALL, "--output", str(tmp_path), "--lr", "2", "--micro-tokens", "9"])
    with pytest.raises(ValueError, match=r"--lr: was 0.001, now 2.0\nnumber of ranks: was 2, now 1") as error:
        sft.check_resume(other, tmp_path, 1, "a")
    assert "micro" not in str(error.value)
    with pytest.raises(ValueError, match="--data: same names, other content"):
        sft.check_resume(args, tmp_path, 2, "b")


# --------------------------------------------------------------------------------------- invariances
def variants(out, *flag_lists):
    """Train once for each list of flags; store first-step gradients and final weights of rank 0."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    step = deepspeed.DeepSpeedEngine.step
    for i, flags in enumerate(flag_lists):
        grads = {}

        def first_step(engine, *args, **kwargs):
            if not grads:
                for name, p in engine.module.named_parameters():
                    grads[name] = safe_get_full_grad(p).detach().clone()
            return step(engine, *args, **kwargs)
        deepspeed.DeepSpeedEngine.step = first_step
        sft.main([*SMALL, "--max-steps", "5", "--clip", "1e9", "--overwrite", "--output", f"{out}/{i}", *flags])
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(grads, f"{out}/{i}.grads")


@pytest.mark.slow
def test_nothing_but_rounding_depends_on_memory_flags_ranks_and_zero(tmp_path):
    """Gradients of the first step within 1e-6 (relative norm), weights after 5 steps within
    0.05 x lr x steps on average, over micro-batches, checkpointing, ranks 1 and 2, ZeRO 0 to 3."""
    one = [["--micro-tokens", "768"], ["--micro-tokens", "128"], ["--gradient-checkpointing"], ["--zero", "1"],
           ["--zero", "2"], ["--zero", "3"], ["--batch-size", "1"]]
    two = [["--zero", z] for z in "0123"] + [["--batch-size", "1", "--zero", "3"]]    # rank 1 has no row
    for n, flags in (1, one), (2, two):
        (tmp_path / str(n)).mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), "--master_port",
             str(29600 + n), __file__, str(tmp_path / str(n)), json.dumps(flags)], capture_output=True,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)})
        assert done.returncode == 0, done.stderr[-4000:]
    for n, i, like in [(1, i, 0) for i in range(1, 6)] + [(2, i, 0) for i in range(4)] + [(2, 4, 6)]:
        spec_grads, spec = torch.load(tmp_path / f"1/{like}.grads"), weights(tmp_path / f"1/{like}")
        grads = torch.load(tmp_path / f"{n}/{i}.grads")
        for name, g in spec_grads.items():
            assert (grads[name] - g).norm() <= 1e-6 * max(1.0, g.norm()), (n, i, name)
        moved = weights(tmp_path / f"{n}/{i}")
        for name, w in spec.items():
            assert (moved[name] - w).abs().mean() <= 0.05 * 1e-3 * 5, (n, i, name)


def test_bf16_weights_lose_small_steps():
    """Twenty AdamW steps at DPO's lr 5e-7: fp32 masters all move, weights stored in bf16 hardly do."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        w = (0.02 * torch.randn(10000)).to(dtype).requires_grad_()
        start, adam = w.detach().clone(), torch.optim.AdamW([w], lr=5e-7, weight_decay=0)
        for _ in range(20):
            w.grad = torch.randn(10000).to(dtype)
            adam.step()
        moved[dtype] = (w != start).float().mean()
    assert moved[torch.float32] > 0.99 and moved[torch.bfloat16] < 0.05


# ----------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("flags, message", [
    (["--lr", "0"], "--lr 0.0: must be above 0"), (["--max-steps", "0"], "--max-steps 0: must be above 0"), (["--warmup", "2"], "--warmup 2.0: must lie in 0..1"),
    (["--dtype", "bf16", "--zero", "0"], "--zero 0 with --dtype bf16"), (["--offload"], "--offload: needs"),
    (["--model", "x/y"], "--data: needed"), (["--data", "no.jsonl"], "--data no.jsonl: no such file"),
    (["--chat-template", "no.jinja"], "--chat-template no.jinja")])
def test_bad_flags_before_anything_is_written(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        sft.main([*flags, "--output", "out", "--cache-dir", "cache"])
    assert not (tmp_path / "out").exists()


def test_fewer_rows_than_ranks_and_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    flags = [*SMALL, "--max-steps", "2", "--output", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "c")]
    with pytest.raises(ValueError, match="--data: 1 rows for 2 ranks"):
        sft.check_rows(1, 2)
    monkeypatch.setattr(sft, "sft_loss", lambda logps, *_: logps.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 1: loss is nan on rows \[\d+, "):
        sft.main(flags)


def test_deepspeed_needs_no_compiler_on_a_cpu():
    """Its shared-memory op, a minute of g++ on a fresh machine, is not built."""
    sft.init_distributed()
    import deepspeed.comm.comm
    assert torch.cuda.is_available() or deepspeed.comm.comm.cdb.shm_comm_op is None


def test_full_disk_at_the_end_leaves_no_half_model(tmp_path, monkeypatch):
    import transformers

    def full(self, folder, **kwargs):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match="the model could not be written.*No space left"):
        sft.main([*SMALL, "--max-steps", "1", "--output", str(tmp_path / "out"), "--cache-dir",
                  str(tmp_path / "cache")])
    assert not list((tmp_path / "out").glob("*.safetensors")) and not (tmp_path / "out/export.writing").exists()


def test_unknown_flags_and_values_are_refused(capsys):
    for flags in (["--lrr", "1"], ["--packing", "x"], ["--gradient-checkpointing=false"]):
        with pytest.raises(SystemExit):
            sft.parse(flags)


def test_every_flag_is_read():
    source = "".join((ROOT / f).read_text() for f in ("sft.py", "data.py"))
    unread = [a.dest for a in sft.parser()._actions if a.dest not in ("help", "local_rank")
              and f"args.{a.dest}" not in source and f'"{a.dest}"' not in source]
    assert not unread


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    import deepspeed
    plain, calls = deepspeed.DeepSpeedEngine.save_checkpoint, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return plain(*args, **kwargs)
    monkeypatch.setattr(deepspeed.DeepSpeedEngine, "save_checkpoint", full)
    with pytest.raises(OSError, match="checkpoint at step 2 could not be written.*last good one is intact"):
        sft.main([*SMALL, "--max-steps", "4", "--save-every", "1", "--output", str(tmp_path / "out"),
                  "--cache-dir", str(tmp_path / "cache")])
    assert [p.name for p in (tmp_path / "out/checkpoints").iterdir()] == ["step-00000001"]


if __name__ == "__main__":
    variants(sys.argv[1], *json.loads(sys.argv[2]))


# ----------------------------------------------------------------------------------------- sampling
class Plain:
    """Stands in for a tokenizer: messages are ids already, text is the list of ids."""
    apply_chat_template = staticmethod(lambda messages, **_: messages)
    __call__ = staticmethod(lambda text, **_: SimpleNamespace(input_ids=text))
    decode = staticmethod(list)


def sampled(model, prompts, *args, **kwargs):
    return {(a.prompt, a.sample): a.ids for a in sft.sample_responses(model, Plain(), prompts, *args, **kwargs)}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_generate_one_at_a_time(family):
    """Prompts of 1 to 30 tokens (beyond every window), rows coming and going, stops at any of 12 tokens."""
    model = build(FAMILIES[family](), scale=2.0)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = list(range(2, 14)), 0
    prompts = random_ids(17, 1, 30, 5, 5, 12, 9, 21, 2)
    alone = {(i, 0): model.generate(torch.tensor([x]), do_sample=False, max_new_tokens=24)[0, len(x):].tolist()
             for i, x in enumerate(prompts)}
    assert len({len(x) for x in alone.values()}) > 1            # rows leave at different times
    for rows in (1, 3, 64):
        assert sampled(model, prompts, 24, rows=rows) == alone


def test_a_sample_hangs_on_its_seed_alone():
    """Neither the rows in work, nor neighbours, nor what is done already changes sample k of prompt i."""
    model = build(FAMILIES["llama"](), scale=2.0)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [2, 3, 4, 5, 6, 7], 0
    prompts, how = random_ids(17, 1, 30, 5), dict(samples=5, temperature=0.8, top_p=0.9)
    spec = sampled(model, prompts, 20, seeds=[7, 8, 9, 10], rows=64, **how)
    assert len(spec) == 20 and len({tuple(x) for x in spec.values()}) > 12
    assert sampled(model, prompts, 20, seeds=[7, 8, 9, 10], rows=3, **how) == spec
    assert sampled(model, prompts[2:], 20, seeds=[9, 10], **how) == {(i - 2, k): x for (i, k), x in spec.items() if i > 1}
    done = {(0, 0), (0, 1), (3, 4), (2, 2)}
    assert sampled(model, prompts, 20, seeds=[7, 8, 9, 10], done=done, **how) == {
        k: x for k, x in spec.items() if k not in done}
    assert sampled(model, prompts, 20, seeds=[1, 8, 9, 10], **how) != spec
    finished = {(a.prompt, a.sample): a for a in sft.sample_responses(model, Plain(), prompts, 20, seeds=[7, 8, 9, 10], **how)}
    for a in finished.values():
        assert a.finished == (a.ids[-1] < 8) and (a.finished or len(a.ids) == 20)
        assert a.text == (a.ids[:-1] if a.finished else a.ids)


def test_pick_token_by_hand():
    """Probabilities 1/2, 1/4, 1/4 (log 2, 0, 0). Uniform below 1/2: token 0; below 3/4: 1; above: 2. Temperature
    1/2 squares them to 2/3, 1/6, 1/6. top_p 0.5 keeps the first alone, 0.6 the first two: 2/3, 1/3."""
    logits = torch.tensor([[math.log(2), 0.0, 0.0]])
    pick = lambda u, t=1.0, p=1.0: sft.pick_token(logits, torch.tensor([u], dtype=torch.float64), t, p).item()
    assert [pick(u) for u in (0.0, 0.49, 0.51, 0.74, 0.76, 1 - 1e-16)] == [0, 0, 1, 1, 2, 2]
    assert [pick(u, 0.5) for u in (0.66, 0.67, 0.84)] == [0, 1, 2]
    assert [pick(u, 1.0, 0.5) for u in (0.0, 0.999)] == [0, 0]
    assert [pick(u, 1.0, 0.6) for u in (0.66, 0.67, 0.999)] == [0, 1, 1]
    assert pick(0.999, 0.0) == 0


def test_pick_token_draws_the_distribution():
    """100,000 draws over 5 tokens: frequencies within 4 standard errors, tokens outside top_p never."""
    logits, n = torch.tensor([[2.0, -1.0, 0.5, 1.0, -30.0]]), 100_000
    u = torch.from_numpy(np.random.Generator(np.random.Philox(key=[1, 2])).random(n))
    for top_p, allowed in ((1.0, [0, 1, 2, 3, 4]), (0.95, [0, 3, 2]), (0.9, [0, 3])):
        p = torch.zeros(5, dtype=torch.float64)
        p[allowed] = torch.softmax(logits[0, allowed].double() / 0.7, 0)
        seen = torch.bincount(sft.pick_token(logits.expand(n, 5), u, 0.7, top_p), minlength=5) / n
        assert ((seen - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 1e-12).all()
