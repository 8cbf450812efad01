"""dpo.py: the maths by hand, sharing = plain = alone, the reference cache, whole runs, resume, the sweep,
bad input, and equality with TRL's DPOTrainer where trl is installed.

Run as a script under torchrun it trains a few steps for each given variant of flags (see test_sft.py)."""
import copy
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
import data
import dpo
import kernels
import sft
from test_kernels import FAMILIES, alone, assert_same, build, random_ids

LN2 = math.log(2)
PAIRS = ["--data", "demo-pairs:test", "--eval-data", "demo-pairs:test=0.2", "--max-length", "128", "--max-prompt-length",
         "64", "--batch-size", "6", "--lr", "1e-3", "--eval-samples", "0", "--max-pairs", "60"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A small trained model folder, and a cache: what stage 1 leaves."""
    folder = tmp_path_factory.mktemp("sft")
    sft.main(["--data", "demo:test", "--eval-data", "demo:test", "--max-length", "128", "--batch-size", "6",
              "--eval-samples", "0", "--max-steps", "3", "--output", str(folder / "run"), "--cache-dir",
              str(folder / "cache")])
    return folder / "run"


def run(policy, out, *flags):
    return dpo.main([*PAIRS, "--model", str(policy), "--output", str(out), "--cache-dir", str(policy.parent / "cache"),
                     *map(str, flags)])


def weights(folder):
    from safetensors.torch import load_file
    return load_file(str(Path(folder) / "model.safetensors"))


# --------------------------------------------------------------------------------------------- maths
def test_loss_by_hand():
    """beta 0.5, log-ratios w: 2, l: -2: margin 0.5 * 4 = 2, loss log(1 + e^-2); a second pair, policy =
    reference: ln 2. Rewards +1 and -1, so the sums are 1, -1."""
    w, l, rw, rl = (torch.tensor(x) for x in ([-3.0, -7.0], [-9.0, -8.0], [-5.0, -7.0], [-7.0, -8.0]))
    assert dpo.dpo_loss(w, l, rw, rl, 0.5).item() == pytest.approx(math.log1p(math.exp(-2)) + LN2)
    got = dict(zip(dpo.METRICS, dpo.dpo_metrics(w, l, rw, rl, 0.5).tolist()))
    assert got == pytest.approx(dict(loss=math.log1p(math.exp(-2)) + LN2, margin=2, accuracy=1, reward_w=1, reward_l=-1,
                                     logp_w=-10, logp_l=-17, ratio_w=2, ratio_l=-2), abs=1e-6)


def test_gradient_by_hand():
    """dL/d logp_w = -beta sigmoid(-margin), dL/d logp_l the opposite: at margin 0, -beta / 2 and beta / 2."""
    w, l = torch.tensor([-4.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    dpo.dpo_loss(w, l, w.detach(), l.detach(), 0.3).backward()
    assert (w.grad.item(), l.grad.item()) == pytest.approx((-0.15, 0.15))


def test_loss_degenerate():
    none = torch.zeros(0)
    assert dpo.dpo_loss(none, none, none, none, 0.1) == 0
    far = dpo.dpo_loss(torch.tensor([-1e5]), torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([0.0]), 1.0)
    assert far.item() == 1e5                                # no overflow


def test_copied_out_the_maths_runs_with_torch_alone(tmp_path):
    code = ("from __future__ import annotations\nimport sys; sys.modules['transformers'] = None\n"
            "import importlib.util, math\nfrom typing import NamedTuple\nimport torch\n"
            "import torch.nn.functional as F\nBACKENDS = ()\n")
    code += "\n\n".join(inspect.getsource(p) for p in (
        kernels.Group, kernels.Batch, kernels.layout, kernels.sdpa_segments, kernels.pick_backend, kernels.attend,
        kernels.sequence_logps, dpo.dpo_loss, dpo.dpo_metrics)) + """
b = layout([Group([1, 2], [[3, 4], [5]], [[True, True], [True]])])
h = torch.randn(5, 2, 8)
o = attend(h, h[b.kv_index], h[b.kv_index], b.cu_seqlens_q, b.cu_seqlens_k, b.max_q, b.max_k, 1.0)
logps = sequence_logps(torch.full((3,), -1.0), b.sequence, 2)
assert logps.tolist() == [-2, -1] and o.shape == h.shape
assert abs(dpo_loss(logps[:1], logps[1:], logps[:1], logps[1:], 0.1).item() - math.log(2)) < 1e-6
"""
    (tmp_path / "copied.py").write_text(code)
    subprocess.run([sys.executable, "copied.py"], cwd=tmp_path, check=True)


# ------------------------------------------------------------------------------------------ equality
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_shared_equal_plain_equal_alone(family, checkpointing):
    """Log-probs and all gradients of the DPO loss: shared, plain, one eager run a sequence."""
    spec = build(FAMILIES[family]())
    model = copy.deepcopy(spec)
    kernels.use_varlen(model, 64)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train(), spec.train()
    x, one, y, z, w, u = random_ids(17, 1, 12, 7, 1, 1)
    pairs = [(x, y, y[:-1] + z), (one, u, w), (x[:9], z, w)]        # a long common beginning; one token each
    groups = [kernels.Group(p, [a, b], [[True] * len(a), [True] * len(b)]) for p, a, b in pairs]
    logps, ref = kernels.LogProbs(model), torch.linspace(-9, -5, 6).view(3, 2)
    docs, skip = [g.prompt + a for g in groups for a in g.answers], [len(g.prompt) for g in groups for _ in "wl"]

    def loss_of(tokens, sequence):
        sums = kernels.sequence_logps(tokens, sequence, 6).view(3, 2)
        return dpo.dpo_loss(*sums.unbind(1), *ref.unbind(1), 0.1) / 3
    shared, plain = kernels.layout(groups), kernels.layout(groups, share=False)
    a = loss_of(logps(shared), shared.sequence)
    torch.testing.assert_close(a, loss_of(logps(plain), plain.sequence), atol=1e-5, rtol=1e-5)
    assert_same(a[None], loss_of(alone(spec, docs, skip), shared.sequence)[None], model, spec)


def test_one_to_64_pairs_a_batch():
    """The same 64 pairs in batches of 1, 2, .. 64: log-probs agree."""
    torch.manual_seed(1)
    model = build(FAMILIES["llama"]())
    kernels.use_varlen(model, 64)
    logps, groups = kernels.LogProbs(model), []
    for _ in range(64):
        x, a, b = random_ids(*torch.randint(1, 20, (3,)).tolist())
        groups.append(kernels.Group(x, [a, b], [[True] * len(a), [True] * len(b)]))
    seen = []
    with torch.no_grad():
        for size in (1, 2, 8, 64):
            seen.append(torch.cat([dpo.pair_logps(logps, kernels.layout(groups[i:i + size]), size)
                                   for i in range(0, 64, size)]))
    for other in seen[1:]:
        torch.testing.assert_close(seen[0], other, atol=1e-4, rtol=1e-5)


def test_a_straddling_token_belongs_to_each_answer():
    """Byte-level BPE merges the header's newline with an answer's first newline: x ends before it, and the
    merged token is scored, in that answer alone."""
    from test_data import bpe_tokenizer
    tokenizer = bpe_tokenizer()
    template = data.set_template(tokenizer)
    pair = data.Pair([{"role": "user", "content": "hi"}], "\nyes", "no")
    e = data.encode_pair(pair, tokenizer, template)
    plain = data.encode_pair(pair._replace(chosen="yes"), tokenizer, template)
    assert len(e.prompt) == len(plain.prompt) - 1
    assert tokenizer.decode([e.chosen[0]]) == "\n\n" and e.chosen_targets[0] and not e.rejected_targets[0]
    assert tokenizer.decode(e.prompt + e.rejected).startswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nno")


# ---------------------------------------------------------------------------------------------- pairs
def test_truncation_cuts_the_prompt_first_and_no_more_than_needed():
    tokenizer = data.demo_tokenizer()
    template = data.set_template(tokenizer)
    pair = data.Pair([{"role": "user", "content": "q" * 100}], "y" * 30, "n" * 10)
    whole = data.encode_pair(pair, tokenizer, template)
    longest = len(whole.prompt) + len(whole.chosen)
    assert data.encode_pair(pair, tokenizer, template, max_length=longest).cut == 0
    e = data.encode_pair(pair, tokenizer, template, max_length=longest - 7, max_prompt_length=10)
    assert e.prompt == whole.prompt[7:] and e.chosen == whole.chosen and e.rejected == whole.rejected and e.cut == 14
    e = data.encode_pair(pair, tokenizer, template, max_length=20, max_prompt_length=12)
    assert e.prompt == whole.prompt[-12:] and e.chosen == whole.chosen[:8] and all(e.chosen_targets)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in e.chosen            # never forged
    same = pair._replace(rejected="y" * 20 + "n")
    with pytest.raises(ValueError, match="equal.* after truncation"):
        data.encode_pair(same, tokenizer, template, max_length=20, max_prompt_length=12)


PREFERENCES = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}],
     "rejected": [{"role": "assistant", "content": "b"}], "score_chosen": 8, "score_rejected": 3.5},
    {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
     "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
    {"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
     "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}]


@pytest.mark.parametrize("row", PREFERENCES)
def test_preference_formats(row):
    pair = data.to_pair(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([{"role": "user", "content": "q"}], "a", "b")
    assert pair.score_chosen == row.get("score_chosen") and pair.score_rejected == row.get("score_rejected")


@pytest.mark.parametrize("row, reason", [
    ({"prompt": "q", "chosen": "a", "rejected": " a "}, "chosen equals rejected"),
    ({"prompt": "q", "chosen": "a", "rejected": " "}, "empty turn"),
    ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: r\n\nAssistant: b"}, "histories"),
    ({"question": "q", "ground_truth": "1", "m": {"is_correct": True, "solution": "1"}}, "no right and wrong")])
def test_refused_pairs(row, reason):
    with pytest.raises(ValueError, match=reason):
        data.to_pair(row)


def prepare(rows, tmp_path, **kwargs):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokenizer = data.demo_tokenizer()
    return data.prepare([str(tmp_path / "p.jsonl")], tokenizer, data.set_template(tokenizer), max_length=200, pairs=True,
                        max_prompt_length=50, cache_dir=str(tmp_path / "cache"), **kwargs)


def test_dedup_never_on_chosen_alone_and_scores_stay(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 4, "score_rejected": 1}
    made = prepare([row, row, {**row, "rejected": "c"}, {**row, "score_rejected": 3.5, "prompt": "r"}], tmp_path)
    assert made.stats["total"]["duplicates"] == 1 and len(made.dataset) == 3
    assert sorted(made.dataset["score_rejected"]) == [1, 1, 3.5]
    gap = prepare([row, {**row, "score_rejected": 3.5, "prompt": "r"}], tmp_path, min_gap=2)
    assert len(gap.dataset) == 1 and gap.stats["total"]["refused"] == 1
    with pytest.raises(ValueError, match="p.jsonl:1: no score, and --min-gap needs both"):
        prepare([{"prompt": "q", "chosen": "a", "rejected": "b"}, row], tmp_path, min_gap=2)


# ------------------------------------------------------------------------------ reference log-probs
@pytest.fixture
def counted(monkeypatch):
    """How many pairs each reference pass computed."""
    seen, plain = [], dpo.pair_logps
    monkeypatch.setattr(dpo, "pair_logps", lambda module, batch, n: (
        seen.append(n) if isinstance(module, kernels.LogProbs) else None, plain(module, batch, n))[1])
    return seen


def test_reference_is_reused_and_never_wrongly(policy, tmp_path, counted):
    def computed(*flags, model=policy):
        counted.clear()
        run(model, tmp_path / "run", "--max-steps", 1, "--overwrite", "--cache-dir", tmp_path / "cache", *flags)
        return sum(counted)
    first = computed()
    assert first >= 60 and computed() == 0
    assert 0 < computed("--max-pairs", 90) <= 30            # a larger N: only what is new
    assert computed("--seed", 7, "--max-pairs", 1000) > 0   # all pairs of the source, in another order
    assert computed("--seed", 8, "--max-pairs", 1000) == 0  # the same rows in another order
    assert computed("--max-prompt-length", 63, "--max-length", 70) > 0          # another cut: rows that it changed
    assert computed("--dtype", "bf16", "--zero", 1) >= 60
    assert computed("--no-share-prompt") >= 60
    template = tmp_path / "t.jinja"
    template.write_text(data.CHATML.replace("'\n' + m", "' \n' + m"))
    assert computed("--chat-template", template) >= 60
    other = tmp_path / "other"
    run(policy, other, "--max-steps", 1)
    assert computed(model=other) >= 60                      # other weights


def test_damaged_reference_is_computed_again(policy, tmp_path, counted):
    flags = ["--max-steps", 1, "--overwrite", "--cache-dir", tmp_path / "cache"]
    run(policy, tmp_path / "run", *flags)
    file, = (tmp_path / "cache/reference").glob("*/*")
    whole, n = file.read_bytes(), sum(counted)
    good = dpo.read_reference(file.parent)
    for damage in (whole[:len(whole) // 2], whole[:-5] + bytes(5), b""):
        counted.clear()
        file.write_bytes(damage)
        run(policy, tmp_path / "run", *flags)
        assert sum(counted) == n and dpo.read_reference(file.parent).keys() == good.keys()
    some = dict(list(good.items())[:-4])
    some[next(iter(some))] = np.full(2, np.nan, dtype=np.float32)
    counted.clear()
    dpo.write_reference(file, some)
    run(policy, tmp_path / "run", *flags)
    assert sum(counted) == 5                                # four missing and one that was not finite


def test_killed_reference_pass_goes_on(policy, tmp_path, counted, monkeypatch):
    plain, calls = dpo.write_reference, []

    def dies(path, rows):
        plain(path, rows)
        calls.append(len(rows))
        raise KeyboardInterrupt
    monkeypatch.setattr(dpo, "write_reference", dies)
    whole = dpo.reference_logps.__defaults__
    monkeypatch.setattr(dpo.reference_logps, "__defaults__", (0.0,))            # a part after every micro-batch
    flags = ["--max-steps", 1, "--cache-dir", tmp_path / "cache"]
    with pytest.raises(KeyboardInterrupt):
        run(policy, tmp_path / "run", *flags)
    monkeypatch.setattr(dpo, "write_reference", plain)
    monkeypatch.setattr(dpo.reference_logps, "__defaults__", whole)
    counted.clear()
    result = run(policy, tmp_path / "run", *flags)
    train_and_held = len(dpo.read_reference(next((tmp_path / "cache/reference").iterdir())))
    assert sum(counted) == train_and_held - calls[0] and result["steps"] == 1
    assert len(list((tmp_path / "cache/reference").glob("*/*"))) == 1


def test_reference_with_another_tokenizer(policy, tmp_path):
    """A reference of another vocabulary: its log-probs are those of its own tokens, computed alone."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from test_data import bpe_tokenizer
    tokenizer = bpe_tokenizer()
    template = data.set_template(tokenizer)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained(tmp_path / "ref")
    tokenizer.save_pretrained(tmp_path / "ref")
    run(policy, tmp_path / "run", "--max-steps", 1, "--ref", tmp_path / "ref", "--cache-dir", tmp_path / "cache",
        "--max-pairs", 5, "--eval-data", "demo-pairs:test=0.02")
    got = np.stack(list(dpo.read_reference(next((tmp_path / "cache/reference").iterdir())).values()))
    policy_tokenizer = data.demo_tokenizer()
    made = data.prepare(["demo-pairs:test"], policy_tokenizer, data.set_template(policy_tokenizer, "chatml"), pairs=True,
                        max_length=128, max_prompt_length=64, max_examples=5, cache_dir=str(tmp_path / "c2"))
    for text in made.dataset["messages_json"]:
        e = data.encode_pair(data.Pair(*json.loads(text)[:3]), tokenizer, template, max_length=128, max_prompt_length=64)
        want = []
        for y, t in ((e.chosen, e.chosen_targets), (e.rejected, e.rejected_targets)):
            ids = torch.tensor([e.prompt + y])
            logps = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
            want.append(logps[len(e.prompt) - 1:][torch.tensor(t)].sum().item())
        assert np.abs(got - want).max(1).min() < 1e-4


# ----------------------------------------------------------------------------------------- whole runs
def test_a_run_learns_and_leaves_an_ordinary_folder(policy, tmp_path):
    from transformers import AutoModelForCausalLM
    out = tmp_path / "run"
    result = run(policy, out, "--epochs", 2, "--lr", 5e-4, "--eval-prompts", "demo:test=0.1", "--eval-samples", 4)
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(LN2, abs=1e-5) and lines[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert len(lines) == result["steps"] == 20 and result["exact_match"] is not None
    held = [x["eval_loss"] for x in lines if "eval_loss" in x]
    assert held[-1] < held[0] < LN2 and result["accuracy"] > 0.5
    assert set(dpo.METRICS) <= set(lines[0]) and {f"eval_{k}" for k in dpo.METRICS} <= set(result)
    assert result["cumulative"] == {"steps": 20, "tokens": sum(x["tokens"] for x in lines),
                                    "flops": sum(x["flops"] for x in lines)}
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    # train it further with the original reference: a new run, cumulative figures, no ln 2 at its start
    further = run(out, tmp_path / "further", "--ref", policy, "--max-steps", 2)
    assert further["cumulative"]["steps"] == 22
    first = json.loads((tmp_path / "further/metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["loss"] - LN2) > 1e-4                  # the reference is not the policy any more
    assert json.loads((tmp_path / "further/run.json").read_text())["ref"] == str(policy)


def test_useful_flops_by_hand():
    """1 layer, D 8, 2 heads of 4, V 11 untied: 10 tokens, 3 targets, 20 (query, key) pairs."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
    body = 4 * 8 * 8 + 3 * 8 * 16 + 3 * 8                   # q k v o, gate up down, three norms
    assert sft.useful_flops(model, 10, 3, 20) == 6 * body * 10 + 6 * 88 * 3 + 12 * 1 * 8 * 20


def test_attended_pairs_by_hand():
    """x 2, y_w 2, y_l 1: shared 1+2+3+4 and y_l's one query sees 3: 13; plain 10 + 6."""
    import datasets
    row = dict(prompt=[5, 6], chosen=[7, 8], rejected=[9], chosen_targets=[True, True], rejected_targets=[True])
    rows = datasets.Dataset.from_list([row | {"n_targets": 3}])
    assert dpo.Pairs(rows, True).attended.tolist() == [13] and dpo.Pairs(rows, False).attended.tolist() == [16]
    assert dpo.Pairs(rows, True).tokens.tolist() == [5] and dpo.Pairs(rows, False).tokens.tolist() == [7]


def test_killed_and_resumed_equals_uninterrupted(policy, tmp_path):
    flags = [*PAIRS, "--model", str(policy), "--cache-dir", str(tmp_path / "cache"), "--max-steps", "30", "--save-every",
             "2", "--batch-size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "dpo.py"), *flags, "--output"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, env=environment)
    out = tmp_path / "broken"
    p = subprocess.Popen([*command, str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    while not list(out.glob("checkpoints/step-*")):
        assert p.poll() is None
        time.sleep(0.0002)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    done = subprocess.run([*command, str(out)], check=True, capture_output=True, text=True, env=environment)
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 30
    a, b = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(a[k], b[k]) for k in a)
    steps = [json.loads(x)["step"] for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31))
    changed = subprocess.run([*command, str(out), "--beta", "0.2"], capture_output=True, text=True, env=environment)
    assert changed.returncode == 2 and "--beta: was 0.1, now 0.2" in changed.stderr


def test_sweep_resumes_and_draws(policy, tmp_path, monkeypatch):
    flags = ["sweep", "--beta", "0.05", "0.5", "--max-pairs", "12", "24", "--output", str(tmp_path / "s"), *PAIRS[:-2],
             "--model", str(policy), "--cache-dir", str(tmp_path / "cache")]
    plain, ran = dpo.main, []

    def dies_at_the_third(argv=None):
        ran.append(argv)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return plain(argv)
    monkeypatch.setattr(dpo, "main", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        dpo.sweep(flags[1:])
    monkeypatch.setattr(dpo, "main", lambda argv=None: (ran.append(argv), plain(argv))[1])
    (tmp_path / "scores.json").write_text('{"beta-0.05-pairs-12": 3.5}')
    result = dpo.sweep([*flags[1:], "--scores", str(tmp_path / "scores.json")])
    assert result["runs"] == 4 and len(ran) == 5            # two were finished, two were left
    assert result["scores"]["beta-0.05-pairs-12"] == 3.5 and result["scores"]["beta-0.5-pairs-24"] is None
    table = (tmp_path / "s/sweep.md").read_text()
    assert table.count("\n| 0.") == 4 and "The loss does not tell" in table
    assert (tmp_path / "s/sweep.png").stat().st_size > 20000
    with pytest.raises(ValueError, match="finished with other settings.*\n--lr: was 0.001, now 0.5"):
        dpo.sweep([*flags[1:], "--lr", "0.5"])
    (tmp_path / "scores.json").write_text('{"nobody": 1}')
    with pytest.raises(ValueError, match="--scores .*no such run: nobody"):
        dpo.sweep([*flags[1:], "--scores", str(tmp_path / "scores.json")])


def variants(out, *flag_lists):
    """As in test_sft.py: first-step gradients and final weights for each list of flags."""
    import test_sft
    test_sft.sft = type("stage", (), {"main": staticmethod(dpo.main)})
    test_sft.SMALL = PAIRS
    test_sft.variants(out, *flag_lists)


@pytest.mark.slow
def test_nothing_but_rounding_depends_on_memory_flags_ranks_and_zero(policy, tmp_path):
    base = ["--model", str(policy), "--cache-dir", str(tmp_path / "cache")]
    one = [[], ["--micro-tokens", "100"], ["--gradient-checkpointing"], ["--no-share-prompt"], ["--zero", "3"],
           ["--batch-size", "1"]]
    two = [["--zero", z] for z in "0123"] + [["--batch-size", "1", "--zero", "3"]]    # rank 1 has no pair
    for n, flags in (1, one), (2, two):
        (tmp_path / str(n)).mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), "--master_port",
             str(29700 + n), __file__, str(tmp_path / str(n)), json.dumps([base + f for f in flags])],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)})
        assert done.returncode == 0, done.stderr[-4000:]
    for n, i, like in [(1, i, 0) for i in range(1, 5)] + [(2, i, 0) for i in range(4)] + [(2, 4, 5)]:
        spec = torch.load(tmp_path / f"1/{like}.grads")
        for name, g in torch.load(tmp_path / f"{n}/{i}.grads").items():
            assert (g - spec[name]).norm() <= 2e-5 * max(0.01, spec[name].norm()), (n, i, name)


# ------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("flags, message", [
    (["--beta", "0"], "--beta 0.0: must be above 0"), (["--max-prompt-length", "128"], "--max-prompt-length 128: must lie"),
    (["--model", "demo"], "--model demo: DPO starts from a trained model"), (["--ref", "./no"], "--ref ./no: no such folder"),
    (["--data", "demo:test"], "no known format"), (["--max-pairs", "0"], "--max-pairs 0: must be above 0"),
    (["--data", "none.jsonl"], "none.jsonl: no such file")])
def test_bad_flags_before_anything_is_written(policy, flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(policy, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_without_stage_1_it_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="runs/sft: no such folder; run python sft.py first"):
        dpo.main([])


def test_nan_weights_and_a_wrong_reference_file(policy, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match="weights that are NaN or infinite in model.norm.weight"):
        run(tmp_path / "nan", tmp_path / "out")
    with pytest.raises(ValueError, match="weights that are NaN"):
        run(policy, tmp_path / "out", "--ref", tmp_path / "nan", "--cache-dir", tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--ref .*empty: no .safetensors file"):
        run(policy, tmp_path / "out", "--ref", tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_step_0_is_ln_2_or_stops():
    dpo.check_step_0(LN2 + 9e-6, "fp32"), dpo.check_step_0(0.70, "bf16")
    with pytest.raises(ValueError, match=r"step 0: the loss is 4.158883, not ln 2 .*dropout"):
        dpo.check_step_0(6 * LN2, "fp32")


def test_every_flag_is_read():
    source = "".join((ROOT / f).read_text() for f in ("dpo.py", "sft.py", "data.py"))
    unread = [a.dest for a in dpo.parser()._actions if a.dest not in ("help", "local_rank")
              and f"args.{a.dest}" not in source and f'"{a.dest}"' not in source]
    assert not unread


# ------------------------------------------------------------------------------------------------ GPU
def pair_step_figures(config, device, dtype, n_pairs, max_length, prompt=(180, 200), answer=(250, 150), micro=8):
    """One step over n_pairs of random lengths (mean, deviation), `micro` pairs a micro-batch: seconds of padded (stock
    transformers, full logits), unpadded and shared, useful tokens/s and MFU of shared, peak GiB of each.
    MFU = sft.useful_flops / time / the rate of a matmul measured here."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch.manual_seed(0)
    with torch.device(device):
        model = build_on(config, dtype)
    draw = lambda mean, sd: int(min(max(1, torch.randn(()).item() * sd + mean), max_length // 2))
    groups = [kernels.Group(x, [w, l], [[True] * len(w), [True] * len(l)]) for x, w, l in
              (random_ids(draw(*prompt), draw(*answer), draw(*answer)) for _ in range(n_pairs))]
    parts, ref = [groups[i:i + micro] for i in range(0, n_pairs, micro)], torch.zeros(micro, device=device)

    def timed(logps_of):
        seconds = []
        for _ in range(3):
            model.zero_grad()
            sync()
            started = time.perf_counter()
            for part in parts:
                w, l = logps_of(part).unbind(1)
                (dpo.dpo_loss(w, l, ref[:len(part)], ref[:len(part)], 0.1) / n_pairs).backward()
            sync()
            seconds.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated() / 2 ** 30 if device == "cuda" else None
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return min(seconds), peak

    def padded(part):
        docs = [(g.prompt + y, len(g.prompt)) for g in part for y in g.answers]
        width = max(len(d) for d, _ in docs)
        ids = torch.tensor([d + [0] * (width - len(d)) for d, _ in docs], device=device)
        at = torch.arange(1, width, device=device)
        inside = torch.stack([(at >= n) & (at < len(d)) for d, n in docs])
        mask = (torch.arange(width, device=device) < torch.tensor([[len(d)] for d, _ in docs], device=device)).long()
        z = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        return (z.gather(2, ids[:, 1:, None])[..., 0] * inside).sum(1).view(-1, 2)
    model.set_attn_implementation("sdpa")
    out = {"padded": timed(padded)}
    kernels.use_varlen(model)
    logps = kernels.LogProbs(model)
    for name, share in (("unpadded", False), ("shared", True)):
        out[name] = timed(lambda part: dpo.pair_logps(logps, kernels.layout(part, share).to(device), len(part)))
    x, w, l = (torch.tensor([len(v) for v in vs]) for vs in zip(*((g.prompt, *g.answers) for g in groups)))
    seen = lambda n: (n * (n + 1) / 2).sum()
    tokens = (x + w + l).sum().item()
    flops = sft.useful_flops(model, tokens, (w + l).sum().item(), (seen(x + w) + seen(x + l) - seen(x)).item())
    a = torch.randn(*(2 * [8192 if device == "cuda" else 256]), device=device, dtype=dtype)
    a @ a
    sync()
    started = time.perf_counter()
    for _ in range(10):
        a @ a
    sync()
    rate = 20 * len(a) ** 3 / (time.perf_counter() - started)
    return {"seconds": {k: v[0] for k, v in out.items()}, "peak_gib": {k: v[1] for k, v in out.items()},
            "tokens_per_s": tokens / out["shared"][0], "mfu": flops / out["shared"][0] / rate}


def build_on(config, dtype):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def test_pair_step_figures_are_sane_on_a_small_model():
    figures = pair_step_figures(FAMILIES["llama"](), "cpu", torch.float32, 4, 60, (10, 5), (10, 5), 2)
    assert min(figures["seconds"].values()) > 0 and 0 < figures["mfu"] < 1


@pytest.mark.gpu
@pytest.mark.parametrize("prompt, answer", [((180, 200), (250, 150)), ((125, 100), (48, 30))], ids=["ultrafeedback", "hh"])
def test_gemma_2b_shape_128_pairs(prompt, answer):
    """Prints the figures (pytest -s); asserts only that they can be."""
    from transformers import GemmaConfig
    config = GemmaConfig(vocab_size=256002, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18,
                         num_attention_heads=8, num_key_value_heads=1, head_dim=256)
    figures = pair_step_figures(config, "cuda", torch.bfloat16, 128, 2048, prompt, answer, 4)
    print(figures)
    assert 0 < figures["mfu"] < 1


# ------------------------------------------------------------------------------------------------ TRL
def test_equals_trl(policy, tmp_path):
    """Per-pair log-probs, loss, rewards and the gradient, against TRL's DPOTrainer on the same pairs."""
    pytest.importorskip("trl", reason="pip install trl==1.16.0")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    tokenizer = AutoTokenizer.from_pretrained(policy)
    # TRL's completion holds the template's newline after the end of turn; ours stops at the end of turn
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_end|>\\n'", "'<|im_end|>'").replace(
        "<|im_end|>\n", "<|im_end|>")
    template = data.set_template(tokenizer, "tokenizer")
    rows = data.demo_pairs(8, 5, "test")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    reference = AutoModelForCausalLM.from_pretrained(policy)
    trainer = DPOTrainer(
        model, reference, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in rows]),
        args=DPOConfig(str(tmp_path / "trl"), beta=0.3, per_device_train_batch_size=8, use_cpu=True, bf16=False,
                       report_to=[], max_length=None, gradient_checkpointing=False, disable_dropout=True))
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    with torch.enable_grad():
        theirs = trainer.compute_loss(trainer.model, batch)
        theirs.backward()
    metrics = {k: v[-1] for mode in ("train", "eval") for k, v in trainer._metrics[mode].items()}
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}

    ours = copy.deepcopy(model)
    ours.zero_grad()
    groups = []
    for r in rows:
        e = data.encode_pair(data.to_pair(r), tokenizer, template)
        groups.append(kernels.Group(e.prompt, [e.chosen, e.rejected], [e.chosen_targets, e.rejected_targets]))
    sums = []
    for m in (ours, reference):
        kernels.use_varlen(m, 512)
        sums.append(dpo.pair_logps(kernels.LogProbs(m), kernels.layout(groups), 8))
    (w, l), (rw, rl) = sums[0].unbind(1), sums[1].detach().unbind(1)
    loss = dpo.dpo_loss(w, l, rw, rl, 0.3) / 8
    loss.backward()
    assert abs(loss.item() - theirs.item()) < 1e-4
    mine = dict(zip(dpo.METRICS, (dpo.dpo_metrics(w, l, rw, rl, 0.3) / 8).tolist()))
    for key, name in (("reward_w", "rewards/chosen"), ("reward_l", "rewards/rejected"), ("margin", "rewards/margins"),
                      ("accuracy", "rewards/accuracies"), ("logp_w", "logps/chosen"), ("logp_l", "logps/rejected")):
        assert mine[key] == pytest.approx(metrics[name], abs=1e-4 * max(1, abs(metrics[name]))), (key, metrics)
    for name, p in ours.named_parameters():
        assert (p.grad - grads[name]).norm() <= 1e-4 * max(1.0, grads[name].norm()), name


if __name__ == "__main__":
    variants(sys.argv[1], *json.loads(sys.argv[2]))
