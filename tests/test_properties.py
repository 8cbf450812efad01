"""Properties of the parts whose inputs are many. 50 examples each (conftest.py), 500 with
pytest tests/test_properties.py --hypothesis-profile thorough"""
import functools
import importlib
import itertools
import json
import string
from unittest import mock

import numpy as np
import pandas
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import data
import kernels
import online_dpo
import sft
from conftest import start_ranks
from test_data import TEMPLATES
from test_kernels import FAMILIES, build, varlen_copy


# ------------------------------------------------------------------- encode and decode are inverse
def metaspace_tokenizer():
    """As SentencePiece: a space is a letter of the word behind it, unknown letters are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    letters = ["▁", *string.ascii_lowercase, *string.digits, *".,:#é日"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters,
              "▁t", "he", "▁the"]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)},
                               merges=[("▁", "t"), ("h", "e"), ("▁t", "he")], unk_token="<unk>",
                               byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse()])
    return bpe


def wordpiece_tokenizer():
    """As BERT: lower-case words and their pieces. White space is lost."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    letters = [*string.ascii_lowercase, *string.digits]
    tokens = ["<unk>", "<s>", "</s>", *letters, *(f"##{x}" for x in letters), "the", "##ing",
              *"[]<>|/:_.,"]
    model = models.WordPiece(vocab={token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    words = Tokenizer(model)
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return words


MADE = {"metaspace": metaspace_tokenizer, "wordpiece": wordpiece_tokenizer}
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
WORDS = st.lists(st.sampled_from(["the", "thing", "a", "7", "going"]), min_size=1, max_size=9)
TEXTS = {"metaspace": UNICODE, "wordpiece": WORDS.map(" ".join)}
ACCEPTED = ("chatml", "llama-2", "llama-3", "gemma", "mistral", "zephyr", "phi-3", "deepseek-r1")
REFUSALS = ("empty turn", "special token in the text", "first token merges with the prompt",
            "drops or rewrites a turn", "another text before an answer")


@functools.cache
def tokenizer_with(kind, name, folder):
    from tokenizers import processors
    from transformers import AddedToken, PreTrainedTokenizerFast
    made = MADE[kind]()
    made.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>")
    specials, text = TEMPLATES[name]
    tokens = [AddedToken(t, rstrip=name == "phi-3", special=True) for t in specials.split()]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    path = folder / f"{kind}-{name}.jinja"
    path.write_text(text)
    return tokenizer, data.set_template(tokenizer, str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("templates")


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", ACCEPTED)
def test_targets_decode_to_the_assistants_texts(kind, name, folder):
    """Every run of targets is one answer and its end of turn; a refusal has one of five reasons.
    test_data.py does this for byte-level tokens."""
    tokenizer, template = tokenizer_with(kind, name, folder)
    trained = []

    @given(st.lists(st.tuples(TEXTS[kind], TEXTS[kind]), min_size=1, max_size=3))
    def check(exchanges):
        messages = sum(itertools.starmap(data.ask, exchanges), [])
        try:
            row = data.to_conversation({"messages": messages})
            encoded = data.encode(row, tokenizer, template)
        except ValueError as error:
            assert any(reason in str(error) for reason in REFUSALS), error
            return
        runs = [[i for i, _ in run] for trained, run in itertools.groupby(
            zip(encoded.input_ids, encoded.targets), key=lambda token: token[1]) if trained]
        assert [run[-1] for run in runs] == [template.end_of_turn_id] * len(exchanges)
        texts = [tokenizer.decode(run[:-1]).strip() for run in runs]
        assert texts == [answer.strip() for _, answer in exchanges]
        trained.append(exchanges)
    check()
    assert len(trained) > 20


# ---------------------------------------------------------------------- packing and micro-batches
@given(st.integers(2, 60), st.data(), st.sampled_from(["bfd", "concat", "none"]))
def test_packing_conserves_every_target(limit, draw, packing):
    lengths = draw.draw(st.lists(st.integers(1, limit), min_size=1, max_size=80))
    rows = data.pack(lengths, limit, packing)
    packed = []
    for doc, start, end in zip(rows.doc, rows.start, rows.end):
        packed += [(doc, i) for i in range(start + 1, end)]
    assert sorted(packed) == [(doc, i) for doc, n in enumerate(lengths) for i in range(1, n)]
    pieces = np.diff(rows.offsets)
    assert pieces.min() > 0
    assert pieces.sum() == len(rows.doc)
    assert np.add.reduceat(rows.end - rows.start, rows.offsets[:-1]).max() <= limit


@given(st.lists(st.integers(1, 200), max_size=60), st.integers(1, 400), st.integers(1, 9))
def test_micro_batches_partition_a_step(tokens, limit, ranks):
    split = sft.micro_batches(tokens, limit, ranks)
    micros = list(itertools.chain(*split))
    assert sorted(itertools.chain(*micros)) == list(range(len(tokens)))
    assert len(split) == ranks
    assert len({len(of_rank) for of_rank in split}) == 1
    assert all(len(m) == 1 or sum(tokens[i] for i in m) <= limit for m in micros)


def first_step(lab, stage, ranks, *more):
    """Loss and gradient norm of the first step over four rows or pairs."""
    out = lab.new()
    more = ["--batch-size", "4", "--max-steps", "1", *more]
    if ranks == 1:
        lab.run(stage, out, *more)
    else:
        processes = start_ranks(f"{stage}.py", lab.flags(stage, out, *more), ranks, out)
        assert [p.wait() for p in processes] == [0] * ranks
    now = importlib.import_module("break").metrics_of(out)[0]
    return now["loss"], now["grad_norm"]


@pytest.mark.parametrize("stage", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_a_step_on_two_ranks_is_that_of_one(lab, stage):
    for a, b in zip(first_step(lab, stage, 1), first_step(lab, stage, 2)):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_step_is_the_same_in_any_micro_batches(lab, stage):
    """All rows in one micro-batch, and each on its own: the divisor is the step's."""
    for a, b in zip(first_step(lab, stage, 1, "--micro-tokens", "1"),
                    first_step(lab, stage, 1, "--micro-tokens", "4096")):
        assert a == pytest.approx(b, rel=1e-4)


# ------------------------------------------------------------------------------- shared and plain
@pytest.fixture(scope="module")
def logps():
    return varlen_copy(build(FAMILIES["llama"]()))


IDS = st.integers(3, 96)
ANSWERS = st.lists(st.lists(IDS, min_size=1, max_size=9), min_size=1, max_size=4)
GROUPS = st.lists(st.tuples(st.lists(IDS, max_size=12), ANSWERS), min_size=1, max_size=4)


@given(GROUPS, st.data())
def test_shared_prompts_equal_the_plain_layout(logps, shapes, draw):
    groups = []
    for prompt, answers in shapes:
        masks = [draw.draw(st.lists(st.booleans(), min_size=len(y), max_size=len(y)))
                 for y in answers]
        masks = [[m and (i > 0 or len(prompt) > 0) for i, m in enumerate(mask)] for mask in masks]
        groups.append(kernels.Group(prompt, answers, masks))
    shared, plain = kernels.layout(groups), kernels.layout(groups, share=False)
    for name in ("target", "sequence"):
        assert getattr(shared, name).equal(getattr(plain, name))
    with torch.no_grad():
        torch.testing.assert_close(logps(shared), logps(plain), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------ rows, names, pairs
@given(st.lists(st.sampled_from("abcdef"), min_size=1))
def test_first_of_equal_by_brute_force(tmp_path_factory, keys):
    """dedup keeps the first row of each text, and names it for every copy."""
    out = tmp_path_factory.mktemp("dedup")
    names = [f"f:{i}" for i in range(len(keys))]
    rows = pandas.DataFrame({"key": keys, "line": ["{}"] * len(keys), "where": names,
                             "source": "f"})
    with mock.patch.object(data, "read_rows", lambda args: rows):
        data.dedup(data.parser().parse_args(["dedup", "--output", str(out)]))
    found = dict(zip(names, names))
    for line in (out / "duplicates.jsonl").read_text().splitlines():
        row = json.loads(line)
        found[row["row"]] = row["kept"]
    assert list(found.values()) == [names[keys.index(key)] for key in keys]


NAMES = st.from_regex(r"[A-Za-z0-9][\w.-]{0,12}(/[A-Za-z0-9][\w.-]{0,12}){0,2}", fullmatch=True)
SPLITS = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,12}", fullmatch=True)


@given(NAMES, SPLITS, st.integers(1, 10 ** 6))
def test_a_sources_name_is_read_as_it_is_written(name, split, millionths):
    share = f"{millionths / 10 ** 6:.6f}"
    assume(name not in data.MIXES)
    for text, source in ((name, (name, "train", 1.0)), (f"{name}:{split}", (name, split, 1.0)),
                         (f"{name}={share}", (name, "train", float(share))),
                         (f"{name}:{split}={share}", (name, split, float(share)))):
        parsed = data.parse_source(text)
        assert (parsed.name, parsed.split, parsed.fraction) == source


ANSWER = st.fixed_dictionaries({
    "text": st.sampled_from(["", " ", "a", "a ", "b", "c", "d", "<s>", "b<s>"]),
    "finished": st.booleans()})


@given(st.lists(st.lists(st.tuples(ANSWER, st.integers(-3, 3)), min_size=3, max_size=3),
                min_size=1, max_size=6), st.integers(0, 3), st.booleans())
def test_pick_pairs_keeps_its_rules(prompts, min_gap, truncated_can_win):
    rows = [{"prompt": [data.user(str(i))], "answer": None, "answers": [a for a, _ in answers]}
            for i, answers in enumerate(prompts)]
    scores = [[s for _, s in answers] for answers in prompts]
    pick = functools.partial(online_dpo.pick_pairs, rows, min_gap=min_gap, forbidden=["<s>"],
                             truncated_can_win=truncated_can_win)
    pairs, counts = pick(scores)
    assert sum(counts[k] for k in ("pairs", "all_equal", "no_winner", "tie")) == len(prompts)
    assert counts["pairs"] == len(pairs)
    for pair in pairs:
        answers = prompts[int(pair["prompt"][0]["content"])]
        chosen, rejected = (pair[side][0]["content"] for side in ("chosen", "rejected"))
        assert chosen.strip() != rejected.strip()
        assert "<s>" not in chosen + rejected
        assert pair["score_chosen"] - pair["score_rejected"] >= max(min_gap, 1)
        usable = [(a, s) for a, s in answers if a["text"].strip() and "<s>" not in a["text"]]
        of = {side: [(a, s) for a, s in usable if a["text"] == pair[side][0]["content"]
                     and s == pair[f"score_{side}"]] for side in ("chosen", "rejected")}
        assert of["chosen"] and of["rejected"]
        if not truncated_can_win:
            assert any(a["finished"] for a, _ in of["chosen"])
            assert "chosen" not in pair["unfinished"]
    shifted, _ = pick([[s + 5 for s in row] for row in scores])
    assert [(p["chosen"], p["rejected"]) for p in shifted] == [
        (p["chosen"], p["rejected"]) for p in pairs]


# ----------------------------------------------------------------------------------------- resume
@pytest.mark.slow
@settings(max_examples=8)
@given(st.sampled_from(["sft", "dpo"]), st.integers(1, 6), st.integers(1, 6),
       st.sampled_from("012"))
def test_a_run_killed_at_any_step_equals_uninterrupted(lab, stage, at, every, zero):
    faults = importlib.import_module("break")
    flags = ("--save-every", every, "--zero", zero)
    whole = lab.once(f"whole-{stage}-{zero}", lambda folder: lab.run(stage, folder, *flags))
    out = lab.new()
    lab.kill(stage, out, at, *flags)
    lab.run(stage, out, *flags)
    faults.assert_equal_runs(whole, out)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return importlib.import_module("break").Lab(tmp_path_factory.mktemp("lab"))
