"""dpo.py: the maths by hand, sharing = plain = alone, the log-prob cache, whole runs, resume, bad
input, and equality with TRL's DPOTrainer where trl is installed."""
import copy
import json
import math
from types import SimpleNamespace

import datasets
import pytest
import torch

import data
import dpo
import kernels
import sft
from test_data import bpe_tokenizer
from test_kernels import FAMILIES, alone, answers_to, assert_close, assert_same, build, random_ids
from test_kernels import varlen_copy
from test_sft import (SMALL, assert_only_rounding_differs, assert_resume_is_exact, metrics,
                      run_copied_out, unread_flags)

LN2 = math.log(2)
PAIRS = ["--data", "demo-pairs:test", "--eval-data", "demo-pairs:test=0.05", "--max-length", "128",
         "--max-prompt-length", "64", "--batch-size", "6", "--lr", "1e-3", "--max-pairs", "36"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A small trained model folder, and a cache: what stage 1 leaves."""
    folder = tmp_path_factory.mktemp("sft")
    sft.main([*SMALL, "--max-steps", "3", "--output", str(folder / "run"), "--cache-dir",
              str(folder / "cache")])
    return folder / "run"


def flags_of(policy, out, *flags):
    return [*PAIRS, "--model", str(policy), "--output", str(out), "--cache-dir",
            str(policy.parent / "cache"), *map(str, flags)]


def run(policy, out, *flags):
    return dpo.main(flags_of(policy, out, *flags))


# ------------------------------------------------------------------------------------- the maths
LOGPS, REF = torch.tensor([[-3.0, -9], [-7, -8]]), torch.tensor([[-5.0, -7], [-7, -8]])
LENGTHS = torch.tensor([[2.0, 4], [7, 8]])


def flags_of_loss(**flags):
    return SimpleNamespace(**dict(beta=0.5, loss="sigmoid", label_smoothing=0.0, nll_weight=0.0,
                                  length_normalise=False) | flags)


def metrics_of(**flags):
    sums = dpo.pair_metrics(flags_of_loss(**flags), LOGPS, REF, LENGTHS)
    return dict(zip(dpo.METRICS, sums.tolist(), strict=True))


def test_loss_by_hand():
    """beta 0.5, log-ratios w: 2, l: -2: margin 0.5 * 4 = 2, loss log(1 + e^-2); a second pair,
    policy = reference: ln 2. Rewards +1 and -1, so the sums are 1, -1."""
    loss = math.log1p(math.exp(-2)) + LN2
    assert dpo.dpo_loss(*LOGPS.T, *REF.T, 0.5).item() == pytest.approx(loss)
    assert metrics_of() == pytest.approx(dict(
        loss=loss, margin=2, accuracy=1, reward_w=1, reward_l=-1, logp_w=-10, logp_l=-17, ratio_w=2,
        ratio_l=-2, nll_w=3 / 2 + 7 / 7), abs=1e-6)


SOFTPLUS = {m: math.log1p(math.exp(m)) for m in (-2, -0.75, 2)}


@pytest.mark.parametrize("flags, loss, margin", [
    (dict(label_smoothing=0.1), 0.9 * SOFTPLUS[-2] + 0.1 * SOFTPLUS[2] + LN2, 2),
    (dict(nll_weight=0.2), SOFTPLUS[-2] + LN2 + 0.2 * (3 / 2 + 1), 2),
    # log-ratios per token: 2 / 2 and -2 / 4
    (dict(length_normalise=True), SOFTPLUS[-0.75] + LN2, 0.75),
    # differences of log-ratios 4 and 0, target 1 / (2 beta) = 1; per token 1.5 and 0
    (dict(loss="ipo"), (4 - 1) ** 2 + 1, 2),
    (dict(loss="ipo", length_normalise=True), (1.5 - 1) ** 2 + 1, 0.75)])
def test_other_losses_by_hand(flags, loss, margin):
    assert dpo.pair_loss(flags_of_loss(**flags), LOGPS, REF, LENGTHS).item() == pytest.approx(loss)
    found = metrics_of(**flags)
    assert (found["loss"], found["margin"]) == pytest.approx((loss, margin))
    assert (found["ratio_w"], found["logp_w"]) == (2, -10)  # in nats, whatever the loss


def test_lengths_count_targets():
    batch = kernels.layout([kernels.Group([1, 2], [[3, 4, 5], [6, 7]], [[True] * 3, [False, True]]),
                            kernels.Group([1], [[2], [3]], [[True], [True]])])
    assert dpo.pair_lengths(batch, 2).tolist() == [[3, 1], [1, 1]]


@pytest.mark.parametrize("flags, first", [
    (["--loss", "ipo"], 1.0), (["--loss", "ipo", "--length-normalise"], 1.0),
    (["--label-smoothing", "0.2"], LN2), (["--length-normalise"], LN2),
    (["--nll-weight", "0.5"], None)])
def test_other_losses_start_at_their_value_and_fall(flags, first, policy, tmp_path):
    run(policy, tmp_path, "--max-steps", 12, "--lr", 5e-4, "--beta", 0.5, *flags)
    steps = metrics(tmp_path)
    if first is None:                                       # RPO: ln 2 plus half the NLL
        first = LN2 + 0.5 * steps[0]["nll_w"]
    assert steps[0]["loss"] == pytest.approx(first, abs=1e-4)
    assert steps[-1]["eval_loss"] < steps[0]["loss"]


def test_gradient_by_hand():
    """dL/d logp_w = -beta sigmoid(-margin), dL/d logp_l the opposite: at margin 0, -beta / 2 and
    beta / 2."""
    w, l = (torch.tensor([x], requires_grad=True) for x in (-4.0, -2.0))
    dpo.dpo_loss(w, l, w.detach(), l.detach(), 0.3).backward()
    assert (w.grad.item(), l.grad.item()) == pytest.approx((-0.15, 0.15))


def test_loss_degenerate():
    none = torch.zeros(0)
    zero = torch.zeros(1)
    assert dpo.dpo_loss(none, none, none, none, 0.1) == 0
    assert dpo.dpo_loss(torch.tensor([-1e5]), zero, zero, zero, 1.0) == 1e5     # no overflow


def test_copied_out_the_maths_runs_with_torch_alone(tmp_path):
    run_copied_out([dpo.dpo_loss, dpo.pair_loss, dpo.pair_metrics], """
b = layout([Group([1, 2], [[3, 4], [5]], [[True, True], [True]])])
h = torch.randn(5, 2, 8)
o = attend(h, h[b.kv_index], h[b.kv_index], b.cu_seqlens_q, b.cu_seqlens_k, b.max_q, b.max_k, 1.0)
logps = sequence_logps(torch.full((3,), -1.0), b.sequence, 2)
assert logps.tolist() == [-2, -1] and o.shape == h.shape
loss = dpo_loss(logps[:1], logps[1:], logps[:1], logps[1:], 0.1)
assert abs(loss.item() - math.log(2)) < 1e-6
""", tmp_path)


# -------------------------------------------------------------------------------------- equality
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_shared_equal_plain_equal_alone(family, checkpointing):
    """The DPO loss and all its gradients: shared, plain, one eager run per sequence. Answers with a
    long common beginning; prompts and answers of one token."""
    spec = build(FAMILIES[family]())
    logps = varlen_copy(spec, checkpointing)
    x, one, y, z, w, u = random_ids(17, 1, 12, 7, 1, 1)
    groups = [answers_to(x, y, y[:-1] + z), answers_to(one, u, w), answers_to(x[:9], z, w)]
    shared = kernels.layout(groups)
    plain = kernels.layout(groups, share=False)
    ref = torch.linspace(-9, -5, 6).view(3, 2)

    def loss(logps_of_targets):
        sums = kernels.sequence_logps(logps_of_targets, shared.sequence, 6).view(3, 2)
        return dpo.dpo_loss(*sums.unbind(1), *ref.unbind(1), 0.1)[None] / 3
    assert_close(loss(logps(shared)), loss(logps(plain)))
    assert_same(loss(logps(shared)), loss(alone(spec, groups)), logps.model, spec)


def test_one_to_64_pairs_a_batch():
    """The same 64 pairs in batches of 1, 2, .. 64: log-probs agree."""
    torch.manual_seed(1)
    logps = varlen_copy(build(FAMILIES["llama"]()))
    lengths = torch.randint(1, 20, (64, 3)).tolist()
    groups = [answers_to(*random_ids(*row)) for row in lengths]
    by_size = []
    with torch.no_grad():
        for size in (1, 2, 8, 64):
            parts = [kernels.layout(groups[i:i + size]) for i in range(0, 64, size)]
            by_size.append(torch.cat([dpo.pair_logps(logps, part, size) for part in parts]))
    for other in by_size[1:]:
        torch.testing.assert_close(by_size[0], other, atol=1e-4, rtol=1e-5)


# ----------------------------------------------------------------------------------------- pairs
def test_pairs_by_hand():
    """x 2, y_w 2, y_l 1: shared 1+2+3+4 and y_l's one query attends to 3: 13; plain 10 + 6."""
    row = dict(prompt=[5, 6], chosen=[7, 8], rejected=[9], chosen_targets=[True, True],
               rejected_targets=[True], n_targets=3)
    for share, tokens, attended in ((True, 5, 13), (False, 7, 16)):
        pairs = dpo.Pairs(datasets.Dataset.from_list([row]), share)
        assert pairs.tokens.tolist() == [tokens]
        assert pairs.attended.tolist() == [attended]
        assert pairs.batch([0])[0].target.tolist() == [7, 8, 9]


def test_truncation_cuts_the_prompt_first_and_no_more_than_needed():
    tokenizer = data.demo_tokenizer()
    template = data.set_template(tokenizer)
    pair = data.Pair([data.user("q" * 100)], "y" * 30, "n" * 10)
    whole = data.encode_pair(pair, tokenizer, template)
    longest = len(whole.prompt) + len(whole.chosen)

    def encode(pair, max_length, max_prompt_length):
        return data.encode_pair(pair, tokenizer, template, max_length=max_length,
                                max_prompt_length=max_prompt_length)
    assert encode(pair, longest, 512).cut == 0
    cut = encode(pair, longest - 7, 10)
    assert cut.prompt == whole.prompt[7:]
    assert cut.cut == 14
    assert cut.chosen == whole.chosen
    assert cut.rejected == whole.rejected
    cut = encode(pair, 20, 12)
    assert cut.prompt == whole.prompt[-12:]
    assert cut.chosen == whole.chosen[:8]
    assert all(cut.chosen_targets)
    assert template.end_of_turn_id not in cut.chosen    # never forged
    with pytest.raises(ValueError, match="equal.* after truncation"):
        encode(pair._replace(rejected="y" * 20 + "n"), 20, 12)


TEXTS = {"prompt": "q", "chosen": "a", "rejected": "b"}
TURNS = {which: [data.assistant(TEXTS[which])] for which in ("chosen", "rejected")}
WHOLE = {which: data.ask("q", TEXTS[which]) for which in ("chosen", "rejected")}


@pytest.mark.parametrize("row", [
    TEXTS, TURNS | {"prompt": [data.user("q")], "score_chosen": 8, "score_rejected": 3.5}, WHOLE,
    WHOLE | {"prompt": "q"},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}])
def test_preference_formats(row):
    scores = row.get("score_chosen"), row.get("score_rejected")
    assert data.to_pair(row) == data.Pair([data.user("q")], "a", "b", *scores)


@pytest.mark.parametrize("row, reason", [
    (TEXTS | {"rejected": " a "}, "chosen equals rejected"),
    (TEXTS | {"rejected": " "}, "empty turn"),
    (WHOLE | {"rejected": data.ask("r", "b")}, "histories"),
    ({"question": "q", "ground_truth": "1", "m": {"is_correct": True, "solution": "1"}},
     "no right and wrong")])
def test_refused_pairs(row, reason):
    with pytest.raises(ValueError, match=reason):
        data.to_pair(row)


def prepare(folder, rows, **settings):
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = data.demo_tokenizer()
    return data.prepare([str(folder / "p.jsonl")], tokenizer, data.set_template(tokenizer),
                        max_length=200, pairs=True, max_prompt_length=50,
                        cache_dir=str(folder / "cache"), **settings)


def test_a_duplicate_equals_in_all_three_parts_and_scores_stay(tmp_path):
    row = TEXTS | {"score_chosen": 4, "score_rejected": 1}
    near = row | {"score_rejected": 3.5, "prompt": "r"}
    prepared = prepare(tmp_path, [row, row, row | {"rejected": "c"}, near])
    assert prepared.stats["total"]["refused"] == 1
    assert sorted(prepared.dataset["score_rejected"]) == [1, 1, 3.5]
    assert prepare(tmp_path, [row, near], min_gap=2).dataset["score_rejected"] == [1]
    with pytest.raises(ValueError, match="p.jsonl:1: no score, or a score gap below --min-gap"):
        prepare(tmp_path, [TEXTS], min_gap=2)


# ------------------------------------------------------------------- log-probs of the reference
@pytest.fixture
def computed(monkeypatch):
    """Grows by the number of pairs of each forward of a frozen model."""
    sizes = []
    pair_logps = dpo.pair_logps

    def count(module, batch, n):
        if isinstance(module, kernels.LogProbs):            # the policy is DeepSpeed's engine
            sizes.append(n)
        return pair_logps(module, batch, n)
    monkeypatch.setattr(dpo, "pair_logps", count)
    return sizes


def one_step(policy, folder, *flags):
    return run(policy, folder / "run", "--max-steps", 1, "--overwrite", "--cache-dir",
               folder / "cache", *flags)


def test_reference_is_reused_and_never_wrongly(policy, tmp_path, computed):
    file = tmp_path / "pairs.jsonl"
    data.write_lines(file, map(json.dumps, data.demo_pairs(60, 7, "test")))

    def count(*flags, model=policy):
        computed.clear()
        one_step(model, tmp_path, "--data", file, *flags)
        return sum(computed)
    assert count() >= 36
    assert count() == 0
    assert 0 < count("--max-pairs", 45) <= 9                # a larger N: only what is new
    assert count("--max-pairs", 60, "--eval-data", file) > 0            # all pairs of the source
    assert count("--max-pairs", 60, "--eval-data", file, "--seed", 8) == 0      # another order
    assert count("--max-prompt-length", 63, "--max-length", 70) > 0     # rows that are cut
    assert count("--dtype", "bf16", "--zero", 1) >= 36
    assert count("--no-share-prompt") >= 36
    template = tmp_path / "t.jinja"
    template.write_text(data.CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n"))
    assert count("--chat-template", template) >= 36
    run(policy, tmp_path / "other", "--max-steps", 1)
    assert count(model=tmp_path / "other") >= 36            # other weights


def test_a_loop_over_beta_computes_the_reference_once(policy, tmp_path, computed):
    """As `for b in ..; do python dpo.py --beta $b --output runs/beta-$b; done`, then once more."""
    loop = [(tmp_path / f"beta-{beta}", ["--beta", beta, "--max-steps", 3, "--cache-dir",
                                         tmp_path / "cache"]) for beta in (0.05, 0.1, 0.5)]
    results, counts = [], []
    for out, flags in loop:
        results.append(run(policy, out, *flags))
        counts.append(sum(computed))
    assert counts[0] >= 36
    assert counts[1] == counts[2] == counts[0]
    assert len({result["margin"] for result in results}) == 3
    before = {path: path.read_bytes() for path in tmp_path.glob("beta-*/*")}
    assert [run(policy, out, *flags) for out, flags in loop] == results
    assert {path: path.read_bytes() for path in tmp_path.glob("beta-*/*")} == before


def test_damaged_rows_are_computed_again(policy, tmp_path, computed):
    one_step(policy, tmp_path)
    files = list((tmp_path / "cache/logps").glob("*/*"))
    whole = {path: path.read_bytes() for path in files}
    file = max(files, key=lambda path: len(whole[path]))
    lines = whole[file].splitlines(keepends=True)
    nan = lines[0].replace(json.dumps(json.loads(lines[0])["logps"]).encode(), b"[NaN, NaN]")
    digit = lines[0].replace(b'"logps": [-', b'"logps": [-1')
    for rows, again in (([nan, *lines[1:]], 1), ([digit, *lines[1:]], 1), (lines[4:], 4),
                        ([*lines[:-1], lines[-1][:-9]], 1), ([], len(lines))):
        computed.clear()
        file.write_bytes(b"".join(rows))
        one_step(policy, tmp_path)
        assert sum(computed) == again
        for path in set(file.parent.iterdir()) - {file}:    # what was computed again
            path.write_bytes(whole.get(path, b""))


def test_a_killed_pass_continues(policy, tmp_path, computed, monkeypatch):
    one_step(policy, tmp_path, "--cache-dir", tmp_path / "whole")
    n = sum(computed)
    pair_logps = dpo.pair_logps
    computed.clear()

    def die_at_the_fourth(module, batch, size):
        if len(computed) == 3:
            raise KeyboardInterrupt
        return pair_logps(module, batch, size)
    monkeypatch.setattr(dpo, "pair_logps", die_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        one_step(policy, tmp_path)
    monkeypatch.setattr(dpo, "pair_logps", pair_logps)
    one_step(policy, tmp_path)
    assert len(computed) > 4
    assert sum(computed) == n


def test_reference_with_another_tokenizer(policy, tmp_path):
    """A reference of another vocabulary: its log-probs are those of its own tokens, run alone."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    tokenizer = bpe_tokenizer()
    template = data.set_template(tokenizer)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "ref")
    one_step(policy, tmp_path, "--ref", tmp_path / "ref")
    args = dpo.parse(flags_of(policy, tmp_path / "run"), dpo.parser(), dpo.PRESETS)
    own = data.load_tokenizer(policy)
    limits = dict(max_length=128, max_prompt_length=64)
    dataset = data.prepare(["demo-pairs:test"], own, data.set_template(own, "tokenizer"),
                           pairs=True, max_examples=5, cache_dir=tmp_path, **limits).dataset
    cached = dpo.frozen_logps(args, tmp_path / "ref", dataset, own)
    for text, logps in zip(dataset["messages_json"], cached):
        e = data.encode_pair(data.Pair(*json.loads(text)[:3]), tokenizer, template, **limits)
        answers = (e.chosen, e.chosen_targets), (e.rejected, e.rejected_targets)
        sums = [alone(model, [answers_to(e.prompt, y)])[mask].sum().item() for y, mask in answers]
        assert logps == pytest.approx(sums, abs=1e-4)


# ----------------------------------------------------------------------------------- whole runs
def test_a_run_learns_and_leaves_an_ordinary_folder(policy, tmp_path):
    from transformers import AutoModelForCausalLM
    out = tmp_path / "run"
    result = run(policy, out, "--max-pairs", 60, "--epochs", 2, "--lr", 5e-4)
    steps = metrics(out)
    assert steps[0]["loss"] == pytest.approx(LN2, abs=1e-5)
    assert steps[0]["margin"] == pytest.approx(0, abs=1e-4)
    held = [m["eval_loss"] for m in steps if "eval_loss" in m]
    assert held[-1] < held[0] < LN2
    assert result["accuracy"] > 0.5
    assert set(dpo.METRICS) <= set(steps[0])
    assert {f"eval_{name}" for name in dpo.METRICS} <= set(result)
    spent = {name: sum(m[name] for m in steps) for name in ("tokens", "flops")}
    assert result["cumulative"] == spent | {"steps": 20}
    assert len(steps) == 20
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    # train it further with the original reference: a new run, cumulative figures, no ln 2
    further = run(out, tmp_path / "further", "--ref", policy, "--max-steps", 2)
    assert further["cumulative"]["steps"] == 22
    assert abs(metrics(tmp_path / "further")[0]["loss"] - LN2) > 1e-4
    assert json.loads((tmp_path / "further/run.json").read_text())["ref"] == str(policy)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_uninterrupted(ranks, policy, tmp_path):
    flags = [*PAIRS, "--model", policy]
    assert_resume_is_exact("dpo", flags, ranks, tmp_path)
    with pytest.raises(ValueError, match="beta: was 0.5, is 0.2"):
        run(policy, tmp_path / "broken", "--beta", 0.2)


@pytest.mark.slow
def test_nothing_but_rounding_depends_on_memory_flags_ranks_and_zero(policy, tmp_path):
    """Gradients of the first step. At --batch-size 1 the second rank has no pair."""
    variants = {1: [[], ["--micro-tokens", "100"], ["--gradient-checkpointing"],
                    ["--no-share-prompt"], ["--zero", "3"], ["--batch-size", "1"]],
                2: [*(["--zero", z] for z in "0123"), ["--zero", "3", "--batch-size", "1"]]}
    flags = [*PAIRS, "--model", str(policy)]
    assert len([*assert_only_rounding_differs("dpo", flags, variants, tmp_path, 2e-5, 0.01)]) == 11


# ------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("flags, message", [
    (["--beta", "0"], "--beta 0.0: must be above 0"),
    (["--label-smoothing", "0.5"], "--label-smoothing 0.5: must be at least 0 and below 0.5"),
    (["--label-smoothing", "0.1", "--loss", "ipo"], "--loss ipo has none"),
    (["--max-prompt-length", "128"], "--max-prompt-length 128: leaves no room"),
    (["--model", "demo"], "no chat template"), (["--ref", "./no"], "no"),
    (["--data", "demo:test"], "unknown columns answer, messages"),
    (["--data", "none.jsonl"], "none.jsonl")])
def test_bad_flags_before_anything_is_written(policy, flags, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        run(policy, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_nan_weights_and_a_folder_without_weights(policy, tmp_path):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(policy)
    folder = tmp_path / "nan"
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    model.save_pretrained(folder)
    data.load_tokenizer(policy).save_pretrained(folder)
    for flags in (["--model", folder], ["--ref", folder]):
        with pytest.raises(ValueError, match="nan: NaN or infinite weights in model.norm.weight"):
            run(policy, tmp_path / "out", *flags)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="nan: no .safetensors file there"):
        run(policy, tmp_path / "out", "--ref", folder)
    assert not (tmp_path / "out").exists()


def test_step_0_is_ln_2_or_stops():
    def check(found, dtype="fp32", nll_w=0.0, **flags):
        dpo.check_step_0(flags_of_loss(dtype=dtype, **flags), {"loss": found, "nll_w": nll_w})
    check(LN2 + 9e-6)
    check(LN2 + 0.3 + 9e-6, nll_weight=0.1, nll_w=3.0)
    check(0.70, "bf16")
    check(1 + 7e-5, loss="ipo")                             # 1 / (4 beta^2), 8 times as steep
    with pytest.raises(ValueError, match=r"step 0: the loss is 4.158883, not 0.693147 .*rotary.*"
                       "dropout"):
        check(6 * LN2)
    with pytest.raises(ValueError, match="not 1.000000"):
        check(1 + 9e-5, loss="ipo")


def test_every_flag_is_read():
    assert unread_flags(dpo.parser(), "dpo.py", "sft.py") == []


# ------------------------------------------------------------------------------------------- TRL
@pytest.mark.parametrize("flags, theirs, pairs", [
    ({}, dict(loss_type=["sigmoid"]), 8),
    (dict(length_normalise=True), dict(loss_type=["sigmoid_norm"]), 8),
    (dict(loss="ipo", length_normalise=True), dict(loss_type=["ipo"]), 8),
    # on one pair their aot is cDPO, and their mean over a batch's tokens is RPO's over an answer's
    (dict(label_smoothing=0.1), dict(loss_type=["aot"], label_smoothing=0.1), 1),
    (dict(nll_weight=0.2), dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2]), 1)])
def test_equals_trl(flags, theirs, pairs, policy, tmp_path):
    """Log-probs, loss, rewards and gradient, against TRL's DPOTrainer, on the same pairs."""
    pytest.importorskip("trl", reason="pip install trl==1.16.0")
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer
    tokenizer = data.load_tokenizer(policy)
    # TRL's completion has the template's newline behind the end of turn; ours ends before it
    (tmp_path / "t.jinja").write_text(data.CHATML.replace("<|im_end|>\n", "<|im_end|>"))
    template = data.set_template(tokenizer, tmp_path / "t.jinja")
    rows = data.demo_pairs(pairs, 5, "test")
    torch.manual_seed(0)
    model, reference = (AutoModelForCausalLM.from_pretrained(policy) for _ in range(2))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    trainer = DPOTrainer(
        copy.deepcopy(model), copy.deepcopy(reference), processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows).remove_columns("answer"),
        args=DPOConfig(str(tmp_path / "trl"), **theirs, beta=0.3,
                       per_device_train_batch_size=pairs, use_cpu=True, bf16=False, report_to=[], max_length=None, gradient_checkpointing=False,
                       disable_dropout=True))
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(pairs)])
    with torch.enable_grad():
        trl_loss = trainer.compute_loss(trainer.model, batch)
        trl_loss.backward()
    logged = {k: v[-1] for of_mode in trainer._metrics.values() for k, v in of_mode.items()}

    encoded = [data.encode_pair(data.to_pair(row), tokenizer, template) for row in rows]
    batch = kernels.layout([kernels.Group(e.prompt, [e.chosen, e.rejected], [
        e.chosen_targets, e.rejected_targets]) for e in encoded])
    for m in (model, reference):
        kernels.use_varlen(m, 512)
    logps, ref = (dpo.pair_logps(kernels.LogProbs(m), batch, pairs) for m in (model, reference))
    inputs = flags_of_loss(beta=0.3, **flags), logps, ref.detach(), dpo.pair_lengths(batch, pairs)
    loss = dpo.pair_loss(*inputs) / pairs
    loss.backward()
    assert loss.item() == pytest.approx(trl_loss.item(), rel=1e-4)
    means = dict(zip(dpo.METRICS, (dpo.pair_metrics(*inputs) / pairs).tolist()))
    logs = dict(logp_w="logps/chosen", logp_l="logps/rejected")
    if not flags.get("length_normalise"):                   # TRL's rewards are always sums
        logs |= dict(reward_w="rewards/chosen", reward_l="rewards/rejected",
                     margin="rewards/margins", accuracy="rewards/accuracies")
    for ours, name in logs.items():
        assert means[ours] == pytest.approx(logged[name], rel=1e-4, abs=1e-4), name
    for p, theirs in zip(model.parameters(), trainer.model.parameters(), strict=True):
        assert (p.grad - theirs.grad).norm() <= 1e-4 * max(1.0, theirs.grad.norm())
