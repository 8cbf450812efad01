"""online_dpo.py: pairs by hand, sampling against generate, PairRM against its rules, judges, servers
that fail, whole runs that are killed in every phase, bad input."""
import asyncio
import contextlib
import gc
import http.server
import inspect
import itertools
import json
import math
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openai
import pytest
import torch

import data
import online_dpo
import sft
from conftest import start_ranks
from data import read_growing
from test_kernels import FAMILIES, build, random_ids
from test_sft import unread_flags

JUDGE = """
def score(prompt, answers, reference):
    return [sum(map(ord, answer)) % 97 for answer in answers]
"""
EXACT = ["--judge", "python:online_dpo.py:exact_answer"]
SLOW_JUDGE = "import time" + JUDGE.replace("    return", "    time.sleep(0.02)\n    return")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A small model folder, trained until its answers are text; beside it a cache and judges."""
    folder = tmp_path_factory.mktemp("policy")
    sft.main(["--preset", "demo", "--data", "demo:test", "--max-length", "128", "--batch-size", "6",
              "--max-steps", "40", "--output", str(folder / "run"),
              "--cache-dir", str(folder / "cache")])
    (folder / "judge.py").write_text(JUDGE)
    (folder / "slow.py").write_text(SLOW_JUDGE)
    return folder / "run"


def flags(policy, out, *more):
    """Of a small run: 40 prompts, 3 answers each, 2 steps."""
    return ["--preset", "demo", "--data", "demo:test", "--eval-data", "demo-pairs:test=0.03",
            "--batch-size", "8", "--max-prompts", "40", "--max-new-tokens", "8", "--samples", "3", "--iterations", "1",
            "--truncated-can-win", "--max-steps", "2", "--sampling-rows", "16",
            "--model", str(policy), "--judge", f"python:{policy.parent}/judge.py:score",
            "--output", str(out), "--cache-dir", str(policy.parent / "cache"), *map(str, more)]


def parse(*flags):
    args = online_dpo.parse(flags, online_dpo.parser(), online_dpo.PRESETS)
    online_dpo.check_judge(args)
    online_dpo.check_sampling(args)
    return args


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# ------------------------------------------------------------------------------------- the maths
def test_ranking_by_hand():
    """C = [[., 3, 1], [1, ., 0], [2, 0, .]]: C - C^T = [[0, 2, -1], [-2, 0, 0], [1, 0, 0]], means
    1/3, -2/3, 1/3. The diagonal is not used."""
    scores = online_dpo.scores_from_comparisons([[9, 3, 1], [1, 9, 0], [2, 0, -9]])
    assert scores == pytest.approx([1 / 3, -2 / 3, 1 / 3])


def prompt_row(*texts, cut=()):
    answers = [{"text": text, "finished": k not in cut} for k, text in enumerate(texts)]
    return {"key": "k", "prompt": [data.user("q")], "answer": None, "answers": answers}


@pytest.mark.parametrize("texts, scores, cut, expected", [
    ("a b c", [1, 3, 2], (), ("b", "a", 2)),
    ("a b c", [1, 1, 0], (), ("a", "c", 1)),                # a tie at the top: the first sample
    ("a b c", [1, 0, 0], (), ("a", "b", 1)),                # and at the bottom
    ("a b c", [1, 3, 2], (1,), ("c", "a", 1)),              # a truncated answer cannot win
    ("a b c", [1, 3, 0], (2,), ("b", "c", 3)),              # it may lose
    ("a a b", [3, 9, 1], (0,), ("a", "b", 8)),              # of equal answers the finished one
    ("a b c", [1, 3, 2], (0, 1, 2), "no_winner"),
    ("a b c", [1, 0, 0], (0,), "no_winner"),                # no finished one is above the worst
    ("a a a", [1, 2, 3], (), "all_equal"),
    ("a <s> <s>", [1, 2, 3], (), "all_equal"),
    ("a a b", [2, 2, 2], (), "tie"),
    ("a <s> b", [1, 9, 2], (), ("b", "a", 1)),              # special strings are not used
    ("a b c", [1, 1.4, 1.2], (), "tie")])                   # below min_gap
def test_pick_pairs_by_hand(texts, scores, cut, expected):
    rows = [prompt_row(*texts.split(), cut=cut)]
    pairs, counts = online_dpo.pick_pairs(rows, [scores], min_gap=0.5, forbidden=["<s>"])
    assert counts["truncated_answers"] == len(cut)
    assert counts["unusable_answers"] == texts.count("<s>")
    if isinstance(expected, str):
        assert not pairs
        assert counts[expected] == 1
        assert counts["pairs"] == 0
    else:
        pair, = pairs
        gap = pair["score_chosen"] - pair["score_rejected"]
        assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"], gap) == expected
        assert data.to_pair(pair).chosen == expected[0]     # a preference row like any other


def test_pick_pairs_counts_every_prompt_once():
    rng = random.Random(0)
    rows = []
    scores = []
    for _ in range(500):
        texts = [rng.choice(["a", "b", "", "<s>"]) for _ in range(3)]
        rows.append(prompt_row(*texts, cut=[k for k in range(3) if rng.random() < 0.4]))
        scores.append([rng.randint(0, 2) for _ in range(3)])
    pick = dict(rows=rows, scores=scores, min_gap=2, forbidden=["<s>"])
    pairs, counts = online_dpo.pick_pairs(**pick)
    outcomes = [counts[name] for name in ("pairs", "all_equal", "no_winner", "tie")]
    assert sum(outcomes) == 500
    assert min(outcomes) > 0
    assert len(pairs) == counts["pairs"]
    _, with_truncated = online_dpo.pick_pairs(**pick, truncated_can_win=True)
    assert with_truncated["no_winner"] == 0
    assert with_truncated["pairs"] > counts["pairs"]


@pytest.mark.parametrize("cut", [0, 1])
def test_a_truncated_answer_trains_no_end_of_turn(cut, tmp_path):
    tokenizer = data.load_tokenizer("demo")
    template = data.set_template(tokenizer)
    file = tmp_path / "pairs.jsonl"
    pairs, _ = online_dpo.pick_pairs([prompt_row("abc", "abd", cut=[cut])], [[3, 1]],
                                     truncated_can_win=True)
    file.write_text(json.dumps(pairs[0]))
    row = data.prepare([str(file)], tokenizer, template, pairs=True, max_length=128,
                       cache_dir=str(tmp_path / "cache")).dataset[0]
    for k, (side, text) in enumerate((("chosen", "abc"), ("rejected", "abd"))):
        trained = np.array(row[side])[row[f"{side}_targets"]].tolist()
        end = [template.end_of_turn_id] * (k != cut)
        assert trained == data.token_ids(tokenizer, text) + end


def test_scores_and_verdicts_by_hand():
    assert online_dpo.exact_answer(None, ["so #### 7", "7", "8"], "7") == [1, 1, 0]
    for text, verdict in (("[[A]] no: [[B>A]]", -1), ("[[C]]", 0), ("[[A>>B]]", 1), ("[A]", None),
                          ("<think>[[A]]</think> [[B]]", -1), ("<think>[[A]]</think>", None)):
        assert online_dpo.verdict(text) == verdict
    one = [data.user("hi")]
    assert online_dpo.as_text(one) == online_dpo.as_text([*data.ask("hi", "")]) == "hi"
    assert online_dpo.as_text(data.ask("hi", "yo") + one) == "user: hi\nassistant: yo\nuser: hi"


# -------------------------------------------------------------------------------------- sampling
def test_pick_token_by_hand():
    """Probabilities 1/2, 1/4, 1/4 (log 2, 0, 0). Uniform below 1/2: token 0; below 3/4: 1; above:
    2. Temperature 1/2 squares them to 2/3, 1/6, 1/6. top_p 0.5 keeps the first, 0.6 the first two:
    2/3, 1/3. Temperature 0 takes the first."""
    logits = torch.tensor([[math.log(2), 0.0, 0.0]])
    for temperature, top_p, tokens in (
            (1.0, 1.0, {0.0: 0, 0.49: 0, 0.51: 1, 0.74: 1, 0.76: 2, 1 - 1e-16: 2}),
            (0.5, 1.0, {0.66: 0, 0.67: 1, 0.84: 2}), (1.0, 0.5, {0.0: 0, 0.999: 0}),
            (1.0, 0.6, {0.66: 0, 0.67: 1, 0.999: 1}), (0.0, 1.0, {0.999: 0})):
        for uniform, token in tokens.items():
            uniform = torch.tensor([uniform], dtype=torch.float64)
            assert online_dpo.pick_token(logits, uniform, temperature, top_p).item() == token


def test_pick_token_draws_the_distribution():
    """100,000 draws of 5 tokens: shares within 4 standard errors, none outside top_p."""
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.0, -30.0]])
    n = 100_000
    uniform = torch.from_numpy(np.random.default_rng(1).random(n))
    for top_p, allowed in ((1.0, [0, 1, 2, 3, 4]), (0.95, [0, 3, 2]), (0.9, [0, 3])):
        p = torch.zeros(5, dtype=torch.float64)
        p[allowed] = torch.softmax(logits[0, allowed].double() / 0.7, 0)
        tokens = online_dpo.pick_token(logits.expand(n, 5), uniform, 0.7, top_p)
        error = (torch.bincount(tokens, minlength=5) / n - p).abs()
        assert (error <= 4 * (p * (1 - p) / n).sqrt() + 1e-12).all()


class IdsAsText:
    """Stands in for a tokenizer: messages are ids already, an answer's text is its ids."""

    def apply_chat_template(self, messages, **settings):
        return messages

    def __call__(self, text, **settings):
        return SimpleNamespace(input_ids=text)

    def decode(self, ids):
        return ids


def sample(model, prompts, wanted, **settings):
    answers = online_dpo.sample_responses(model, IdsAsText(), prompts, wanted, 24, **settings)
    return {(a.prompt, a.sample): a[2:5] for a in answers}


def model_that_stops(family, stops):
    model = build(FAMILIES[family](), scale=2.0)
    model.generation_config.eos_token_id = stops
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_generate(family):
    """One prompt at a time by transformers. Prompts of 1 to 30 tokens (beyond every window), rows
    that come and go, stops at any of 12 tokens."""
    stops = list(range(2, 14))
    model = model_that_stops(family, stops)
    prompts = random_ids(17, 1, 30, 5, 5, 12, 9, 21, 2)
    expected = {}
    for i, x in enumerate(prompts):
        ids = model.generate(torch.tensor([x]), do_sample=False, max_new_tokens=24)[0].tolist()
        ids, finished = ids[len(x):], ids[-1] in stops
        expected[i, 0] = (ids[:-1] if finished else ids, len(ids), finished)
    assert len({tokens for _, tokens, _ in expected.values()}) > 1
    for rows in (1, 3, 64):
        assert sample(model, prompts, list(expected), rows=rows) == expected


def test_finished_rows_do_not_run_out_of_learned_positions():
    """Prompts of 16 tokens and 16 new ones fill all 32 positions of a GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=16, n_layer=1,
                                       n_head=2))
    model.generation_config.eos_token_id = [1, 2, 3, 4, 5]
    prompts, seeds = random_ids(*[16] * 60), list(range(60))
    one, many = (list(online_dpo.sample_responses(
        model, IdsAsText(), prompts, [(i, 0) for i in seeds], 16, temperature=1.0, seeds=seeds,
        rows=rows)) for rows in (1, 16))
    assert sorted(one) == sorted(many)


def test_a_sample_depends_on_its_seed_alone(monkeypatch):
    """Neither on the rows in work nor on its neighbours nor on what is missing, nor on how many
    prompts are computed at once: here (30), (17, 5), (1) tokens."""
    model = model_that_stops("llama", [2, 3, 4, 5, 6, 7])
    prompts = random_ids(17, 1, 30, 5)
    wanted = list(itertools.product(range(4), range(5)))
    settings = dict(temperature=0.8, top_p=0.9, seeds=[7, 8, 9, 10])
    expected = sample(model, prompts, wanted, **settings)
    assert len(expected) == 20
    assert len({str(answer) for answer in expected.values()}) > 12
    assert sample(model, prompts, wanted, rows=3, **settings) == expected
    for part in (wanted[1::3], wanted[12:14]):
        assert sample(model, prompts, part, **settings) == {w: expected[w] for w in part}
    assert sample(model, prompts, wanted, **settings | {"seeds": [1, 8, 9, 10]}) != expected
    monkeypatch.setattr(online_dpo, "PROMPT_TOKENS", 34)
    assert sample(model, prompts, wanted, **settings) == expected


def sample_policy(policy, *more, wanted=None):
    """Answers of a model folder to three prompts, through --engine hf."""
    args = parse(*flags(policy, policy, "--max-new-tokens", "12", *EXACT, *more))
    tokenizer = data.load_tokenizer(args.model)
    template = data.set_template(tokenizer, args.chat_template)
    prompts = [row["messages"][:-1] for row in data.demo_conversations(3, 3, "test")]
    wanted = wanted or list(itertools.product(range(3), range(3)))
    return {(a.prompt, a.sample): a.text for a in online_dpo.sample_locally(
        args, args.model, tokenizer, template, prompts, wanted, [1, 2, 3])}


def with_config(policy, folder, file, **entries):
    shutil.copytree(policy, folder)
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | entries))
    return folder


def test_sampling_stops_at_the_end_of_turn_of_the_template(policy, tmp_path):
    other = with_config(policy, tmp_path / "other", "generation_config.json", eos_token_id=1)
    assert sample_policy(policy) == sample_policy(other)


def test_continuous_batching(policy, tmp_path):
    """Greedy it equals the padded sampler, also where most requests wait. What a restart samples
    repeats no answer that is there. Soft-capping, which it would ignore, is refused."""
    greedy = ("--temperature", 0, "--batching")
    padded = sample_policy(policy, *greedy, "padded")
    for rows in (256, 1):
        assert sample_policy(policy, *greedy, "continuous", "--sampling-rows", rows) == padded
    assert len(padded) == 9
    settings = ("--batching", "continuous", "--temperature", 1.5)
    whole = sample_policy(policy, *settings)
    rest = sample_policy(policy, *settings, wanted=list(whole)[1:])
    assert len(rest) == 8
    assert not set(rest.values()) & set(whole.values()) - {""}
    capped = with_config(policy, tmp_path / "capped", "config.json", attn_logit_softcapping=5.0)
    with pytest.raises(ValueError, match="--batching continuous: .*soft-capping"):
        sample_policy(capped, *settings)


# ---------------------------------------------------------------------------------------- PairRM
@pytest.fixture(scope="module")
def pairrm(tmp_path_factory):
    """A folder in PairRM-hf's form: a random DeBERTa-v2 and head, a tokenizer of words."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import DebertaV2Config, PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp("pairrm")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(50))]
    ids = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]",
                                        cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
    tokenizer.add_special_tokens({"additional_special_tokens": list(online_dpo.PREFIXES)})
    tokenizer.save_pretrained(folder)
    config = DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, relative_attention=True, position_buckets=8,
        position_biased_input=False, pos_att_type=["p2c", "c2p"])
    config.save_pretrained(folder)
    torch.manual_seed(0)
    model = online_dpo.PairRM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def random_words(n, seed):
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(50)}" for _ in range(n))


def logit_by_the_rules(folder, source, a, b):
    """One pair, alone, from the published rules: ids by hand, no padding, the head written out."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, DebertaV2Config, DebertaV2Model
    state = load_file(folder / "model.safetensors")
    id_of = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids
    body = DebertaV2Model(DebertaV2Config.from_pretrained(folder)).eval()
    body.load_state_dict({name.removeprefix("pretrained_model."): w for name, w in state.items()
                          if name.startswith("pretrained_model.")})
    ids = []
    prefixes = ("<|source|>", "<|candidate1|>", "<|candidate2|>")
    limit = 1224
    for prefix, text in zip(prefixes, (source, a, b)):
        ids += [1, id_of(prefix), *map(id_of, text.split()[:limit - 3]), 2]
        if prefix == "<|source|>":
            limit = 412 + (1224 - len(ids)) // 2            # half of what is left of 2048
    assert len(ids) <= 2048
    ids = torch.tensor([ids])
    with torch.no_grad():
        h = body(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    x, a, b = (h[ids[0].tolist().index(id_of(prefix))] for prefix in prefixes)
    w1, b1, w2, b2 = (state[f"head_layer.{name}"] for name in (
        "1.weight", "1.bias", "4.weight", "4.bias"))
    s_1, s_2 = (w2 @ torch.tanh(w1 @ torch.cat([x, y]) + b1) + b2 for y in (a, b))
    return (s_1 - s_2).item()


def pairrm_logits(folder, source, answers, batch_tokens=4096):
    """{(i, j): logit} and the number of texts that were cut, by the shipped functions."""
    model, tokenizer = online_dpo.PairRM.load(str(folder))
    rows, n_cut = online_dpo.pairrm_rows(tokenizer, source, answers)
    logits = online_dpo.pairrm_logits(model, tokenizer, list(rows.values()), batch_tokens)
    return dict(zip(rows, logits)), n_cut


def test_pairrm_equals_its_rules(pairrm):
    """All ordered pairs of four answers, two of them equal; then a source and an answer beyond the
    budget. Batches of one row or of all give the same."""
    source = random_words(12, 1)
    answers = [random_words(n, seed) for n, seed in ((3, 2), (40, 3), (7, 4), (3, 2))]
    logits, n_cut = pairrm_logits(pairrm, source, answers)
    expected = {(i, j): logit_by_the_rules(pairrm, source, answers[i], answers[j])
                for i, j in itertools.permutations(range(4), 2)}
    assert logits == pytest.approx(expected, abs=1e-5)
    assert n_cut == 0
    assert abs(expected[0, 1] + expected[1, 0]) > 1e-4      # not antisymmetric
    assert pairrm_logits(pairrm, source, answers, 1)[0] == pytest.approx(logits, abs=1e-5)
    long = random_words(1500, 5), [random_words(900, 6), random_words(5, 7)]
    logits, n_cut = pairrm_logits(pairrm, *long)
    assert n_cut == 3                                       # the source; the answer at both places
    assert logits[0, 1] == pytest.approx(logit_by_the_rules(pairrm, long[0], *long[1]), abs=1e-5)


def test_pairrm_normalizes_as_its_file_says(pairrm, tmp_path):
    """transformers 5 rebuilds DebertaV2Tokenizer without the normalizer of tokenizer.json. The
    ellipsis is three dots, a no-break space a space, a ligature two letters, none an unknown."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    folder = shutil.copytree(pairrm, tmp_path / "x")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "▁Wait", "...", "▁what", "?", "▁find"]
    words += ["▁", *"Waithwfnd.", *online_dpo.PREFIXES]
    words = list(dict.fromkeys(words))
    backend = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], 3))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    backend.add_special_tokens(words[:4])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "DebertaV2Tokenizer"}')
    _, tokenizer = online_dpo.PairRM.load(str(folder))
    ids = tokenizer("Wait\u2026\u00a0what? \ufb01nd").input_ids
    assert ids == tokenizer("Wait... what? find").input_ids
    assert [words[i] for i in ids] == ["[CLS]", "▁Wait", "...", "▁what", "?", "▁find", "[SEP]"]


@pytest.mark.gpu
def test_pairrm_ranks_in_tf32_are_those_of_fp32(pairrm):
    """200 prompts x 5 answers on CUDA against the CPU: equal order but for ties within 1e-2."""
    model, tokenizer = online_dpo.PairRM.load(str(pairrm))
    rows = []
    for i in range(200):
        answers = [random_words(3 + 7 * k, 5 * i + k) for k in range(5)]
        rows += online_dpo.pairrm_rows(tokenizer, random_words(20, i), answers)[0].values()
    fast = online_dpo.pairrm_logits(model.cuda(), tokenizer, rows, 16384)
    with torch.no_grad():
        exact = np.array([model.cpu()(torch.tensor([ids]), torch.ones(1, len(ids)).long(),
                                      tokenizer.convert_tokens_to_ids(list(online_dpo.PREFIXES[:3]))
                                      ).item() for ids in rows])
    off_diagonal = np.array([i != j for i, j in itertools.product(range(5), range(5))])

    def scores(logits):
        c = np.zeros((200, 25))
        c[:, off_diagonal] = logits.reshape(200, 20)
        return np.array([online_dpo.scores_from_comparisons(x) for x in c.reshape(200, 5, 5)])
    a, b = scores(fast), scores(exact)
    gap_a, gap_b = (x[:, :, None] - x[:, None] for x in (a, b))
    assert ((np.sign(gap_a) == np.sign(gap_b)) | (abs(gap_b) < 1e-2)).all()


@pytest.mark.parametrize("special", ["[SEP]", "[CLS]", "[PAD]", *online_dpo.PREFIXES])
def test_special_strings_are_spaces_to_pairrm(pairrm, special):
    plain, special = (pairrm_logits(pairrm, f"w1{s}w2", [f"w3 {s} w4", f"{s}w5"])
                      for s in (" ", special))
    assert special == plain


@pytest.mark.parametrize("name, problem", [("4.bias", "Missing"), ("9.bias", "Unexpected")])
def test_pairrm_load_is_strict(pairrm, tmp_path, name, problem):
    from safetensors.torch import load_file, save_file
    shutil.copytree(pairrm, tmp_path / "x")
    state, name = load_file(tmp_path / "x/model.safetensors"), f"head_layer.{name}"
    if state.pop(name, None) is None:
        state[name] = torch.zeros(1)
    save_file(state, tmp_path / "x/model.safetensors")
    with pytest.raises(RuntimeError, match=f"{problem} key.*{name}"):
        online_dpo.PairRM.load(str(tmp_path / "x"))


# ---------------------------------------------------------------------------------------- judges
def test_pairrm_as_judge(policy, pairrm, tmp_path):
    """Answers a, b, a with g = C_ab - C_ba: scores g / 3, -2 g / 3, g / 3."""
    texts = [random_words(n, n) for n in (3, 5)]
    judge = online_dpo.load_judge(parse(*flags(policy, tmp_path, "--judge", f"pairrm:{pairrm}")))
    scores = judge([prompt_row(*texts, texts[0])])[0]
    gap = logit_by_the_rules(pairrm, "q", *texts) - logit_by_the_rules(pairrm, "q", *texts[::-1])
    assert scores == pytest.approx([gap / 3, -2 * gap / 3, gap / 3], abs=1e-5)
    assert abs(gap) > 1e-3


@pytest.mark.parametrize("pad", [None, "<|im_end|>", "<eos>"])
def test_reward_model_as_judge(policy, tmp_path, pad):
    """A random Llama reward model's score of each conversation is the stock classifier's at the
    last token. The template ends in the end of text; the padding token is none, or an end.
    `annotate` gets the same number for the same text."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template += "{{ eos_token }}"
    tokenizer.pad_token = pad
    model = AutoModelForSequenceClassification.from_config(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_labels=1, max_position_embeddings=100)).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "rm")
    rows = [prompt_row("yes", "a longer answer", "no"), prompt_row("x", "yy", "zz z")]
    judge = online_dpo.load_judge(parse(*flags(policy, tmp_path, "--judge",
                                               f"reward:{tmp_path}/rm")))
    for row, scores in zip(rows, judge(rows)):
        for answer, score in zip(row["answers"], scores):
            messages = row["prompt"] + [data.assistant(answer["text"])]
            ids = torch.tensor([data.token_ids(tokenizer, data.render(tokenizer, messages))])
            assert ids[0, -1] == tokenizer.eos_token_id
            with torch.no_grad():
                expected = model.score(model.model(ids).last_hidden_state[0, -1]).item()
            assert score == pytest.approx(expected, abs=1e-5)
            text = data.render(tokenizer, messages)
            assert data.Scorer(str(tmp_path / "rm"), "reward")(text) == score
    with pytest.raises(ValueError, match="beyond its context of 100 tokens.*--max-new-tokens"):
        judge([prompt_row("a" * 100, "b")])


@pytest.mark.parametrize("body, problem", [
    ("[float('nan')] * len(answers)", "nan.*not one finite score"), ("[1.0]", "not one finite"),
    ("None", "not one finite score|TypeError"), ("answers[99]", "IndexError: list index")])
def test_scores_that_are_none_are_named(policy, tmp_path, body, problem):
    file = tmp_path / "judge.py"
    file.write_text(f"def score(prompt, answers, reference):\n    return {body}\n")
    judge = online_dpo.load_judge(parse(*flags(policy, tmp_path, "--judge",
                                               f"python:{file}:score")))
    with pytest.raises(ValueError, match=f"--judge python:{file}:score: .*{problem}"):
        judge([prompt_row("a", "b")])


def test_a_judge_that_fails_loses_no_score(policy, tmp_path):
    """It fails at the 20th prompt: the first 16 scores stay, and the same judge continues. Another
    content of its file is refused: its scores are another's. The file may hold dataclasses."""
    judge, broken = tmp_path / "judge.py", tmp_path / "broken"
    head = ("from __future__ import annotations\nimport dataclasses, os\n@dataclasses.dataclass\n"
            "class Calls:\n    n: int = 0\ncalls = Calls()\n")
    text = head + JUDGE.replace("):\n", "):\n    calls.n += 1\n", 1).replace(
        "return [", f"return None if calls.n == 20 and os.path.exists({str(broken)!r}) else [")
    judge.write_text(text)
    broken.touch()
    run = flags(policy, tmp_path / "run", "--judge", f"python:{judge}:score")
    with pytest.raises(ValueError, match=f"--judge python:{judge}:score: ValueError"):
        online_dpo.main(run)
    before = read_growing(tmp_path / "run/iteration-1", "scores")
    assert len(before) == 16
    judge.write_text(JUDGE)
    with pytest.raises(ValueError, match="judge_content: was"):
        online_dpo.main(run)
    judge.write_text(text)
    broken.unlink()
    assert online_dpo.main(run)["pairs"] > 0
    assert all(row in read_growing(tmp_path / "run/iteration-1", "scores") for row in before)


# --------------------------------------------------------------------------------------- servers
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send(200, b"{}")

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.keys.add(self.headers["Authorization"])
        reply = self.server.reply(request)
        if reply is None:
            time.sleep(2)
        elif isinstance(reply, int):
            error = {"message": f"Incorrect: {self.headers['Authorization']}"}
            self.send(reply, json.dumps({"error": error}).encode())
        elif isinstance(reply, tuple):
            status, body, *headers = reply
            self.send(status, json.dumps(body).encode(), "application/json", *headers)
        elif isinstance(reply, bytes):
            self.send(200, reply)
        else:
            choice = {"message": {"content": reply}, "finish_reason": "stop"}
            body = {"choices": [choice], "usage": {"completion_tokens": 2}}
            self.send(200, json.dumps(body).encode(), "application/json")

    def send(self, status, body, kind="text/html", headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("retry-after-ms", "1")             # tests do not wait for a second try
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible server on loopback. reply(request) -> an answer's text, an HTTP status
    (its body repeats the key), (status, JSON[, headers]), bytes as the whole body, or None: it
    hangs for 2 s."""
    request_queue_size = 256

    def __init__(self, reply, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.reply = reply
        self.requests = []
        self.keys = set()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


def question_of(request):
    return request["messages"][-1]["content"]


def ask(server, *more, messages=(data.user("hi"),), **request):
    """One request; then the server, for what it was seen to refuse."""
    args = parse(*EXACT, *more)
    endpoint = online_dpo.Endpoint(server.url, args, "OPENAI_API_KEY")
    return asyncio.run(online_dpo.chat(endpoint, model="m", messages=list(messages), **request))


def test_a_server_that_fails_for_a_while_is_survived():
    replies = [None, 429, 500, 503, "fine"]
    server = Server(lambda request: replies[len(server.requests) - 1])
    assert ask(server, "--timeout", "0.5") == ("fine", 2, True, ())
    assert len(server.requests) == 5


def completion(content="x", finish="stop", usage=None, **more):
    """The body of a chat completion."""
    message = {"role": "assistant", "content": content}
    choices = [{"index": 0, "message": message, "finish_reason": finish}]
    return json.dumps({"choices": choices, "usage": usage} | more).encode()


NESTED = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize("body, expected", [
    # whole replies of real servers: (text, tokens, finished)
    (completion("x", "stop", {"completion_tokens": 7}), ("x", 7, True)),
    (completion("x", "eos_token"), ("x", 0, True)),                       # TGI
    (completion("x", "end_turn"), ("x", 0, True)),                        # Claude-compatible
    (completion("x", "stop_sequence"), ("x", 0, True)),
    (completion("x", None), ("x", 0, True)),
    (completion("x", "length"), ("x", 0, False)),
    (completion("x", "abort"), ("x", 0, False)),                          # vLLM, SGLang
    (completion("x", "error"), ("x", 0, False)),                          # OpenRouter
    (completion(None, "stop"), ("", 0, False)),                           # gpt-oss: thoughts alone
    (completion(None, "content_filter"), ("", 0, False)),                 # Azure
    (completion(None, "length"), ("", 0, False)),
    (b'{"choices": [{"message": {}, "finish_reason": "stop"}]}', ("", 0, False)),
    (completion([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                 {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
     ("ab", 0, True)),                                                    # Mistral
    (completion([1]), ("", 0, True)),
    (completion({"deep": {}}), ("", 0, False)),
    (completion("x", ["stop"]), ("x", 0, False)),
    (completion("x", usage="many"), ("x", 0, True)),                      # counts of no use
    (completion("x", usage={"completion_tokens": "7"}), ("x", 0, True)),
    (completion("x", usage={"completion_tokens": 7.0}), ("x", 7, True)),
    (completion("x", usage={"completion_tokens": 3e9}), ("x", 0, True)),
    (completion("x", usage={"completion_tokens": -1}), ("x", 0, True)),
    (completion("x", usage={"completion_tokens": math.nan}), ("x", 0, True)),
    # no replies
    (b'{"error": {"message": "Provider overloaded", "code": 502}}', "Provider overloaded"),
    (b"<html>", "<html>"), (b"{}", "{}"), (b"[]", ""), (b"null", "null"), (b"", ""), (b"\xff", ""),
    (b'{"choices": []}', "choices"), (b'{"choices": [{}]}', "choices"),
    (b'{"choices": [{"mes', "mes"), (NESTED, ""), (b'{"choices": ' + NESTED + b"}", "")])
def test_replies_of_all_kinds(body, expected):
    """A reply that is whole is never an error. Anything else is one error with its text."""
    if isinstance(expected, tuple):
        assert online_dpo.read_reply(body) == expected
        return
    with pytest.raises(ValueError, match=f"no chat completion: .*{expected}"):
        online_dpo.read_reply(body)


def refusing(name, message, status=400):
    """A server that refuses requests with this part."""
    def reply(request):
        if name in request or request["messages"][0]["role"] == name:
            return status, {"error": {"message": message, "param": name, "code": "unsupported"}}
        return f"sent {sorted(request)}"
    return reply


SYSTEM = [{"role": "system", "content": "S"}, data.user("U")]
SERVERS = {  # what is refused, and the words for it
    "vLLM": None, "SGLang": None, "llama.cpp": None, "Ollama": None,
    "OpenAI o": ("max_tokens", "Unsupported parameter: 'max_tokens' is not supported with this "
                 "model. Use 'max_completion_tokens' instead.", 400),
    "GPT-5": ("temperature", "Unsupported value: 'temperature' does not support 0 with this model. "
              "Only the default (1) value is supported.", 400),
    "Azure": ("max_tokens", "max_tokens is not supported", 400),
    "TGI": ("top_p", "Input validation error: `top_p` must be > 0.0 and < 1.0", 422),
    "Claude-compatible": ("top_p", "`temperature` and `top_p` cannot both be specified for this "
                          "model. Please use only one.", 400),
    "Mistral": ("seed", '[{"type":"extra_forbidden","loc":["body","seed"]}]', 422),
    "Gemma's template": ("system", "System role not supported", 400),
    "an old Mistral's template": ("system", "Conversation roles must alternate", 400)}


@pytest.mark.parametrize("name", SERVERS)
def test_what_is_sent_to_whom(name):
    """Only what is set is sent. What a server refuses by name is left out, or renamed, from then on
    and recorded; the other settings stay."""
    part, message, status = SERVERS[name] or (None, "", 0)
    server = Server(refusing(part, message, status))
    settings = dict(temperature=0.0, max_tokens=9)
    if part in ("top_p", "seed"):
        settings[part] = 0.5
    args = parse(*EXACT)
    endpoint = online_dpo.Endpoint(server.url, args, "OPENAI_API_KEY")

    async def twice():
        return [await online_dpo.chat(endpoint, model="m", messages=SYSTEM, **settings)
                for _ in range(2)]
    replies = asyncio.run(twice())
    refused = () if part is None else (part,)
    assert [reply.refused for reply in replies] == [refused, refused]
    assert len(server.requests) == 2 + len(refused)         # the refusal is asked for once
    last = dict(server.requests[-1])
    assert last.pop("model") == "m"
    messages = last.pop("messages")
    assert messages == ([data.user("S\n\nU")] if part == "system" else SYSTEM)
    if part == "max_tokens":
        settings["max_completion_tokens"] = settings.pop("max_tokens")
    elif part in settings:
        del settings[part]
    assert last == settings


def test_an_empty_system_turn_leaves_no_blank_lines():
    request = {"messages": [{"role": "system", "content": ""}, data.user("U")]}
    assert online_dpo.without(request, "system")["messages"] == [data.user("U")]


def test_a_server_refuses_two_parts_one_after_the_other():
    def reply(request):
        for name in ("max_tokens", "temperature"):
            if name in request:
                return 400, {"error": {"message": f"'{name}' is not supported"}}
        return "fine"
    server = Server(reply)
    refused = ("max_tokens", "temperature")
    assert ask(server, max_tokens=9, temperature=0.0) == ("fine", 2, True, refused)
    assert len(server.requests) == 3


def test_a_named_part_that_is_not_the_cause_is_kept():
    """vLLM names max_tokens where a prompt is too long. The error stays its own, and nothing is
    learned."""
    server = Server(lambda request: (400, {"message": "'max_tokens' is too large: 9"}))
    args = parse(*EXACT)
    endpoint = online_dpo.Endpoint(server.url, args, "OPENAI_API_KEY")
    with pytest.raises(openai.BadRequestError, match="too large"):
        asyncio.run(online_dpo.chat(endpoint, model="m", messages=SYSTEM, max_tokens=9))
    assert not endpoint.refused
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(monkeypatch, status):
    """The key stays with the server that it belongs to."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")
    other = Server(lambda request: "stolen")
    server = Server(lambda request: (status, {}, {"Location": f"{other.url}/chat/completions"}))
    with pytest.raises(openai.APIStatusError, match=str(status)):
        ask(server, "--retries", 0)
    assert not other.requests
    assert not other.keys


@pytest.mark.parametrize("drip", ["head", "body", "endless"])
def test_a_reply_that_never_ends_is_bounded(drip):
    """A byte every 0.1 s, so that no read times out; and a body without an end."""
    class Slow(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            with contextlib.suppress(OSError):
                if drip != "head":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                for _ in range(200):
                    time.sleep(0.1 * (drip != "endless"))
                    self.wfile.write(b"H" * (1 if drip != "endless" else 2 ** 20))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    started = time.time()
    with pytest.raises(openai.APIConnectionError):
        ask(server, "--timeout", "1", "--retries", "0")
    assert time.time() - started < 5
    server.shutdown()


@pytest.mark.parametrize("key", ["EMPTY", "A", "x", "none", "", "sk-abcdefgh1234"])
def test_a_key_is_hidden_in_errors_alone(monkeypatch, key):
    """A reply that contains it stays as it is; so do an error's words that contain a short one."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    text = f"[[A]] EMPTY x none {key}"
    assert ask(Server(lambda request: text)).text == text
    key = key or "none"
    with pytest.raises(openai.AuthenticationError) as error:
        ask(Server(lambda request: 401))
    assert f"Bearer {key}" not in str(error.value)
    assert "Error code: 401" in str(error.value)
    assert "Incorrect: Bearer [key]" in str(error.value)


@pytest.mark.parametrize("flag", ["--judge-url", "--base-url"])
@pytest.mark.parametrize("url, problem", [
    ("host:8000/v1", "must be http"), ("ftp://x", "must be http"),
    ("http://user:secret@x/v1", "without user"), ("http://x/v1?key=1", "without user")])
def test_urls_are_checked_before_anything_is_sent(policy, tmp_path, flag, url, problem):
    with pytest.raises(ValueError, match=f"{flag} .*{problem}"):
        online_dpo.main(flags(policy, tmp_path, flag, url))


def test_a_proxy_is_named_and_loopback_needs_none(monkeypatch, capsys):
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy:3128")
    online_dpo.check_urls(SimpleNamespace(judge_url="http://judge/v1", base_url=None))
    warning = capsys.readouterr().err
    assert "proxy:3128" in warning
    assert "secret" not in warning
    assert ask(Server(lambda request: "fine")).text == "fine"


def serve_flags(policy, out, server, *more):
    return flags(policy, out, "--base-url", server.url, "--concurrency", "4", *more)


def test_200_answers_at_once_lose_none(policy, tmp_path):
    def reply(request):
        time.sleep(0.2)
        return question_of(request)
    server = Server(reply)
    args = parse(*serve_flags(policy, tmp_path, server, "--concurrency", 200))
    prompts = [[data.user(f"question {i}")] for i in range(100)]
    wanted = list(itertools.product(range(100), range(2)))
    with data.growing(tmp_path, "answers") as write:
        online_dpo.sample_by_server(args, "m", prompts, wanted, server.url,
                                    lambda answer: write(answer._asdict()))
    answers = sorted((a["prompt"], a["sample"], a["text"], a["tokens"], a["finished"])
                     for a in read_growing(tmp_path, "answers"))
    assert answers == [(i, k, f"question {i}", 2, True) for i, k in wanted]


def test_each_server_gets_its_own_key_and_no_file_does(policy, tmp_path, monkeypatch):
    """Also if a server repeats the key in its errors. A key may end in a line break. Without
    SERVER_API_KEY the policy's server gets none."""
    template = tmp_path / "template.txt"
    judge = Server(lambda request: "[[A]]")
    template.write_text("{prompt}{answer_a}{answer_b}")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-judge\n")
    for key in ("sk-policy", ""):
        monkeypatch.setenv("SERVER_API_KEY", key)
        server = Server(lambda request: f"answer {len(server.requests)}")
        judge.reply = lambda request: 500 if len(judge.requests) % 7 == 0 else "[[A]]"
        run = serve_flags(policy, tmp_path / f"run{len(key)}", server, "--judge", "llm:x",
                          "--judge-url", judge.url, "--judge-template", template, "--retries", 0)
        with pytest.raises(ValueError, match="requests failed; the same command asks them again"):
            online_dpo.main(run)
        assert server.keys == {f"Bearer {key or 'none'}"}
        assert judge.keys == {"Bearer sk-judge"}
        server.reply = lambda request: 401
        with pytest.raises(ValueError, match=r"401.*Incorrect: Bearer \[key\]"):
            online_dpo.main([*run, "--output", str(tmp_path / f"other{len(key)}")])
    texts = [file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file()]
    assert any("Bearer [key]" in text for text in texts)
    assert not any(key in text for text in texts for key in ("sk-judge", "sk-policy"))


@pytest.mark.parametrize("reply, problem", [
    (404, "404"), (500, "500"), (b"<html>", "no chat completion"), (None, "timed out")])
def test_a_server_that_fails_for_good_is_named(policy, tmp_path, reply, problem):
    server = Server(lambda request: reply)
    run = serve_flags(policy, tmp_path, server, "--timeout", 0.3, "--retries", 0)
    with pytest.raises(ValueError, match=f"{server.url}.*{problem}"):
        online_dpo.main(run)


def test_a_server_that_dies_is_asked_for_the_rest_alone(policy, tmp_path):
    """It dies after 50 of 120 answers, then refuses (HTTP 400) prompts of an even length: these get
    empty answers, which are counted."""
    server = Server(lambda request: 401 if len(server.requests) > 50 else "x")
    run = serve_flags(policy, tmp_path, server)
    with pytest.raises(ValueError, match=f"{server.url}.*401"):
        online_dpo.main(run)
    folder = tmp_path / "iteration-1"
    before = read_growing(folder, "answers")
    assert len(before) == 50

    def reply(request):
        refused = len(question_of(request)) % 2 == 0
        return 400 if refused else f"answer {len(server.requests)}"
    server.reply = reply
    server.requests = []
    online_dpo.main(run)
    after = read_growing(folder, "answers")
    assert len(server.requests) == 70
    assert all(answer in after for answer in before)
    assert len({(a["key"], a["sample"]) for a in after}) == len(after) == 120
    prompts = {row["key"]: row["prompt"][-1]["content"] for row in
               read_lines(folder / "prompts.jsonl")}
    new = [a for a in after if a not in before]
    assert all((a["text"] == "" and not a["finished"]) == (len(prompts[a["key"]]) % 2 == 0)
               for a in new)
    assert 0 < sum(a["text"] == "" for a in new) < 70


def test_a_server_that_refuses_everything_stops_the_run(policy, tmp_path):
    server = Server(lambda request: 400)
    with pytest.raises(ValueError, match=f"{server.url}.*400"):
        online_dpo.main(serve_flags(policy, tmp_path, server))
    assert not read_growing(tmp_path / "iteration-1", "answers")
    assert len(server.requests) < 25


def test_serve_starts_and_stops_a_server_for_each_policy(policy, tmp_path):
    """Two iterations: each server answers with the name of its model, and is gone in the end."""
    script = tmp_path / "serve.py"
    pids = tmp_path / "pids"
    script.write_text("\n".join([
        "import http.server, json, os, sys, threading, time", inspect.getsource(Handler),
        inspect.getsource(Server), "time.sleep(2)", f"open({str(pids)!r}, 'a').write("
        "f'{os.getpid()} ')", "Server(lambda request: f'{sys.argv[1][-11:]} {time.time()}',"
        " int(sys.argv[2]))", "threading.Event().wait()"]))
    out = tmp_path / "run"
    online_dpo.main(flags(policy, out, "--serve", f"{os.sys.executable} {script} {{model}} {{port}}",
                          "--iterations", 2, "--max-prompts", 10))
    for iteration, model in ((1, str(policy)), (2, str(out / "iteration-1"))):
        answers = read_growing(out / f"iteration-{iteration}", "answers")
        assert len(answers) == 30
        assert all(a["text"].startswith(model[-11:]) for a in answers)
        run = json.loads((out / f"iteration-{iteration}/run.json").read_text())
        assert run["ref"] == model
    for pid in map(int, pids.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(ValueError, match="--serve sh -c 'exit 3': ended with 3; see .*server.log"):
        online_dpo.main(flags(policy, tmp_path / "other", "--serve", "sh -c 'exit 3'"))


# ------------------------------------------------------------------------------------ LLM judges
def llm_flags(server, template):
    return ["--judge", "llm:any", "--judge-url", server.url, "--judge-template", str(template)]


def longer_wins(request):
    _, a, b = question_of(request).split("@@@")
    return f"[[{'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'C'}]]"


@pytest.fixture
def template(tmp_path):
    (tmp_path / "template.txt").write_text("{prompt}@@@{answer_a}@@@{answer_b}")
    return tmp_path / "template.txt"


def test_an_llm_judges_both_orders(policy, tmp_path, template):
    """Lengths 2, 8, 1 of 3 answers: wins in both orders over 1, 2, 0 others, so that score_i =
    2 (wins - losses) / 3. A judge that likes the first place finds nothing but ties."""
    server = Server(longer_wins)
    args = parse(*flags(policy, tmp_path / "out", *llm_flags(server, template)))
    scores = online_dpo.load_judge(args)([prompt_row("aa", "{prompt}", "b")])
    assert scores[0] == pytest.approx([0, 4 / 3, -4 / 3])
    assert len(server.requests) == 6
    assert all(request["temperature"] == 0 for request in server.requests)
    server.reply = lambda request: completion("[[A]] because", "length")      # cut: no verdict
    args.judge = "llm:cut"
    assert online_dpo.load_judge(args)([prompt_row("a", "b", "c")]).tolist() == [[0, 0, 0]]
    server.reply = lambda request: 400 if len(server.requests) % 2 else completion(None)
    args.judge = "llm:refuses"                              # never a stop
    assert online_dpo.load_judge(args)([prompt_row("a", "b", "c")]).tolist() == [[0, 0, 0]]
    args.judge = "llm:any"
    server.reply = lambda request: "[[A]]"
    assert online_dpo.load_judge(args)([prompt_row("a", "b", "c")]).tolist() == [[0, 0, 0]]


def test_an_llm_is_paid_once(policy, tmp_path, template):
    """The judge's server fails for good after 100 of 20 x 6 replies. The second run asks for the
    other 20 and ends like a run that was never stopped. Another text of the template is refused."""
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    server = Server(longer_wins)
    more = [*llm_flags(server, template), "--max-prompts", 20]
    online_dpo.main(flags(policy, whole, *more))
    assert len(server.requests) == 120
    server = Server(lambda request: 403 if len(server.requests) > 100 else longer_wins(request))
    run = flags(policy, broken, *more, "--judge-url", server.url)
    with pytest.raises(ValueError, match=f"--judge-url {server.url}: .*403"):
        online_dpo.main(run)
    assert len(read_growing(broken, "replies")) == 100
    server.reply = longer_wins
    server.requests = []
    text = template.read_text()
    template.write_text(text + " ")
    with pytest.raises(ValueError, match="judge_template: was"):
        online_dpo.main(run)
    template.write_text(text)
    online_dpo.main(run)
    assert len(server.requests) == 20
    assert_same_end(whole / "iteration-1", broken / "iteration-1")


# ------------------------------------------------------------------------------------ whole runs
def test_a_run_and_its_folder(policy, tmp_path):
    """Two iterations: counts that agree, a policy that moves on, ordinary model folders, no engine
    left in memory, SIGTERM as it was."""
    from deepspeed import DeepSpeedEngine
    from transformers import AutoModelForCausalLM

    def engines():
        gc.collect()
        return {id(x) for x in gc.get_objects() if type(x) is DeepSpeedEngine}
    others = engines()                                      # of tests that ran before
    run = flags(policy, tmp_path, "--iterations", 2, "--mix", "demo-pairs:test=0.05", "--zero", 3,
                "--reference", "first", "--empty-system", 1)
    result = online_dpo.main(run)
    pairs = data.demo_rows("demo-pairs", "test")
    distinct = {json.dumps([pair["prompt"], pair["chosen"], pair["rejected"]]) for pair in pairs}
    folders = [tmp_path / f"iteration-{i}" for i in (1, 2)]
    for folder, source in zip(folders, (policy, folders[0])):
        report = json.loads((folder / "report.json").read_text())
        assert report["policy"] == str(source)
        assert len(read_lines(folder / "pairs.jsonl")) == report["pairs"]
        trained = json.loads((folder / "run.json").read_text())
        assert trained["pairs"] == report["pairs"] + int(0.05 * len(distinct))  # the mixed ones
        assert trained["ref"] == str(policy)
        assert trained["stage"] == "online-dpo iteration"   # offline steps do not count
        assert trained["flags"]["empty_system"] == 1        # of training, not of sampling
        prompts = [row["prompt"] for row in read_lines(folder / "prompts.jsonl")]
        assert "system" not in {m["role"] for prompt in prompts for m in prompt}
        assert len(read_growing(folder, "answers")) == 120
        assert report["length_all"] <= 8
        assert report["score_worst"] <= report["score_all"] <= report["score_best"]
        assert 0 < report["distinct"] <= 1
        assert report["yield"] == report["pairs"] / 40
        AutoModelForCausalLM.from_pretrained(folder)
    assert result["output"] == str(folders[1])
    assert result["iterations"] == 2
    steps = [json.loads((folder / "run.json").read_text())["result"] for folder in folders]
    assert steps[1]["cumulative"]["steps"] == steps[0]["steps"] + steps[1]["steps"]
    assert read_lines(folders[0] / "prompts.jsonl") != read_lines(folders[1] / "prompts.jsonl")
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert len((tmp_path / "report.md").read_text().splitlines()) == 4
    assert engines() <= others
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert online_dpo.main(run) == json.loads(json.dumps(result))       # finished: stored
    with pytest.raises(ValueError, match="max_new_tokens: was 8, is 9"):
        online_dpo.main([*run, "--max-new-tokens", "9"])


def count_lines(folder, name):
    files = [*folder.glob(f"{name}-*.jsonl"), *folder.glob(f"{name}.jsonl")]
    return sum(file.read_bytes().count(b"\n") for file in files)


WAIT = """
import datetime, sys, time
sys.path.insert(0, {root!r})
import online_dpo, sft, torch.distributed as dist
rank, _ = sft.init_distributed()
group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=2))
online_dpo.waiting_group = lambda world: group
online_dpo.on_all_ranks(lambda: time.sleep(6 * rank))
"""


@pytest.mark.slow
def test_a_rank_waits_longer_than_a_collective_may_take(tmp_path):
    """6 s, in a group whose collectives may take 2."""
    script = tmp_path / "wait.py"
    script.write_text(WAIT.format(root=str(Path(data.__file__).parent)))
    processes = start_ranks(str(script), [], 2, tmp_path / "log")
    assert [p.wait(120) for p in processes] == [0, 0], (tmp_path / "log.0.log").read_text()[-2000:]


def run_with_kills(policy, out, ranks, kills, *more):
    """A run that dies by SIGKILL whenever a file of a phase has so many lines, each time with torn
    last lines, and is started again. What was on disk stays. Returns its iteration's folder."""
    folder = out / "iteration-1"
    log = f"{out}.log"
    kept = {}
    out.parent.mkdir(exist_ok=True)
    for name, lines in [*kills, (None, None)]:
        processes = start_ranks("online_dpo.py", flags(policy, out, *more), ranks, log)
        while name and count_lines(folder, name) < lines:
            assert processes[0].poll() is None, Path(f"{log}.0.log").read_text()[-3000:]
            time.sleep(0.01)
        for p in processes:
            if name:
                p.kill()
            assert p.wait() == (-signal.SIGKILL if name else 0), Path(f"{log}.0.log").read_text()
        assert all(file.read_bytes().startswith(content) for file, content in kept.items())
        for file in [*folder.glob("answers-*"), *folder.glob("scores-*")] if name else []:
            whole_lines, newline, _ = file.read_bytes().rpartition(b"\n")
            kept[file] = whole_lines + newline
            file.write_bytes(kept[file] + b'{"key": "half a li')
    return folder


def assert_same_end(a, b):
    """Answers, scores and pairs of two iterations are equal, each there once."""
    for name in ("answers", "scores"):
        rows = [{(row["key"], row.get("sample")): row for row in read_growing(folder, name)}
                for folder in (a, b)]
        assert rows[0] == rows[1]
        assert len(rows[1]) == len(read_growing(b, name)) > 0
    assert (a / "pairs.jsonl").read_bytes() == (b / "pairs.jsonl").read_bytes()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_in_every_phase_equals_uninterrupted(policy, tmp_path, ranks):
    """SIGKILL while sampling, judging and training: the same answers (at temperature 0.8), scores
    and pairs, also of one rank, and bit-equal weights."""
    more = ["--judge", f"python:{policy.parent}/slow.py:score", "--save-every", 1,
            "--max-steps", 4]
    kills = [("answers", 31), ("scores", 16), ("metrics", 2)]
    whole = run_with_kills(policy, tmp_path / "whole", ranks, [], *more)
    killed = run_with_kills(policy, tmp_path / "killed", ranks, kills, *more)
    assert_same_end(whole, killed)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert weights[0] == weights[1]
    if ranks > 1:
        assert_same_end(run_with_kills(policy, tmp_path / "one", 1, [], *more), killed)


# ------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("more, problem", [
    (["--samples", "1"], "--samples 1: must be at least 2"),
    (["--ref", "x"], "--ref x: leave it out"),
    (["--engine", "server"], "--engine server: needs --base-url or --serve"),
    (["--base-url", "http://x", "--iterations", "2"], "--iterations: a server at --base-url"),
    (["--judge", "python:nowhere.py:f"], "no file 'nowhere.py'; write python:FILE.py:FUNCTION"),
    (["--judge", "llm:x"], "--judge llm:x: needs --judge-url and --judge-template"),
    (["--judge", "best"], "--judge best: not pairrm"),
    (["--judge", "python:online_dpo.py:exact_answer", "--data", "PAIRS"], "no row of --data has a"),
    (["--top-p", "0"], "--top-p 0.0"), (["--temperature", "-1"], "--temperature -1.0"),
    (["--max-new-tokens", "5000"], "no prompt is left; lower --max-new-tokens"),
    (["--temperature", "0"], "0 pairs of 40 prompts, .*'all_equal': [1-9]")])
def test_bad_input_is_one_message(policy, tmp_path, more, problem):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"messages": data.ask("q", "a")}))
    more = [str(file) if flag == "PAIRS" else flag for flag in more]
    with pytest.raises(ValueError, match=problem):
        online_dpo.main(flags(policy, tmp_path / "run", *more))


@pytest.mark.parametrize("error, message", [(OSError(), "OSError"), (ValueError("why"), "why")])
def test_a_failure_of_a_phase_is_raised(error, message):
    """Also one without a text."""
    def work():
        raise error
    sft.init_distributed()
    with pytest.raises(ValueError, match=message):
        online_dpo.on_all_ranks(work)


def test_every_flag_is_read():
    assert unread_flags(online_dpo.parser(), "sft.py", "dpo.py", "online_dpo.py") == []
