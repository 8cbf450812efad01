"""data.py's commands: duplicates, contamination, selection, annotation, against few-line
computations of their own."""
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import data
from test_data import source                                # noqa: F401 (a fixture)

NAN = float("nan")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(tmp_path):
    """A command's result and the rows that it wrote to tmp_path/out."""
    def run_here(command, *flags):
        folders = ["--output", tmp_path / "out", "--cache-dir", tmp_path / "cache"]
        report = data.main([*command.split(), *map(str, [*flags, *folders])])
        rows = tmp_path / "out/rows.jsonl"
        return report, read(rows) if rows.exists() else None
    return run_here


def lines(rows):
    """The line numbers of rows in their source."""
    return [row["lions_origin"][1] for row in rows]


def pair(prompt, chosen, rejected, ratings=(None, None)):
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "score_chosen": ratings[0],
        "score_rejected": ratings[1]}


def question(text, answer="a"):
    return {"query": text, "response": answer}


def text_row(words):
    return question(" ".join(words[:20]), " ".join(words[20:]))


def random_words(rng, n):
    return [f"w{rng.randrange(5000)}" for _ in range(n)]


def replaced(words, *positions):
    """A copy with new words at some positions."""
    return [f"new{i}" if i in positions else word for i, word in enumerate(words)]


# ------------------------------------------------------------------------------------- duplicates
def test_grams_by_hand():
    text = "The cat, the CAT  sat!"
    assert data.grams(text, 3) == {"the cat the", "cat the cat", "the cat sat"}
    assert data.grams("Yes.", 5) == {"yes"}
    assert data.grams(":)", 5) == {":)"}


def test_exact_across_sources_whatever_the_schema_and_the_ends(run, source, tmp_path):
    a = source([question("q\u00e9 1"), question("x", "y")])
    b = source([{"instruction": "qe\u0301 1\n", "output": "a"}, question("Q\u00e9 1")], "b.jsonl")
    rows = run("dedup --data", a, b)[1]
    assert [row["lions_origin"] for row in rows] == [[a, 1], [a, 2], [b, 2]]
    assert read(tmp_path / "out/duplicates.jsonl") == [
        {"row": f"{b}:1", "kept": f"{a}:1", "kind": "exact", "jaccard": 1.0}]


@pytest.fixture
def near_texts():
    """Lists of 100 words: 40 texts; 10 copies with one word changed (J = 91/101), 10 with every
    tenth (J about 0.35), a copy of a near copy, and b and c of a chain with
    J(a, b), J(b, c) >= 0.8 > J(a, c)."""
    rng = random.Random(0)
    texts = [random_words(rng, 100) for _ in range(40)]
    near = [replaced(text, 50) for text in texts[:10]]
    far = [replaced(text, *range(5, 100, 10)) for text in texts[10:20]]
    b = replaced(texts[20], 30, 60)
    return [*texts, *near, *far, near[0], b, replaced(b, 10, 85)]


def test_near_duplicates_are_those_of_exact_jaccard(run, source, near_texts, tmp_path):
    """Against all pairs, in order: a row goes if a kept one before it is at >= 0.8."""
    file = source(map(text_row, near_texts))
    report, rows = run("dedup --near --data", file)
    grams = [{tuple(text[i:i + 5]) for i in range(len(text) - 4)} for text in near_texts]
    kept = []
    for i, of in enumerate(grams):
        if all(len(of & grams[k]) / len(of | grams[k]) < 0.8 for k in kept):
            kept.append(i)
    assert kept == [*range(40), *range(50, 60), 62] == [line - 1 for line in lines(rows)]
    assert report["near"] == 11
    assert report["exact"] == 1
    dropped = {row.pop("row"): row for row in read(tmp_path / "out/duplicates.jsonl")}
    for line, kind in ((41, "near"), (61, "exact")):
        assert dropped[f"{file}:{line}"] == {
            "kept": f"{file}:1", "kind": kind, "jaccard": pytest.approx(91 / 101)}


def test_near_does_not_depend_on_the_hash_seed(source, near_texts, tmp_path):
    file = source(map(text_row, near_texts))
    outputs = set()
    for seed in "12":
        folders = ["--output", tmp_path / seed, "--cache-dir", tmp_path / seed]
        subprocess.run([sys.executable, data.__file__, "dedup", "--near", "--data", file, *folders],
                       check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        outputs.add((tmp_path / seed / "duplicates.jsonl").read_text())
    assert len(outputs) == 1


def test_a_shared_frame_is_not_verified_row_by_row(run, source):
    """600 rows of one system prompt (J about 0.55 by it alone) and ten near copies: the copies go,
    and few of the 180,000 pairs that share a band come to the exact Jaccard."""
    rng = random.Random(3)
    frame = " ".join(random_words(rng, 120))
    texts = [random_words(rng, 40) for _ in range(600)]
    texts += [replaced(text, 20) for text in texts[:10]]
    a = source(text_row(text) | {"system": frame} for text in texts)
    with mock.patch.object(data, "jaccard", wraps=data.jaccard) as verified:
        _, rows = run("dedup --near --data", a)
    assert lines(rows) == [*range(1, 601)]
    assert verified.call_count < 2500


def test_an_operator_or_a_sign_makes_another_row(run, source):
    """12 + 30 and 12 - 30, f(x) and f[x] are not near, though their words are the same."""
    text = " ".join(f"w{i}" for i in range(100))
    a = source(map(question, (
        "What is 12 + 30 of it?", "What is 12 - 30 of it?",
        "f(x) == -1", "f[x] != 1",
        text, text + " end")))
    _, rows = run("dedup --near --data", a)
    assert lines(rows) == [1, 2, 3, 4, 5]


def test_pairs_are_near_in_each_part(run, source):
    """A long prompt in common does not make another answer, or another rejected one, near."""
    rng = random.Random(1)
    x, y, z = (" ".join(random_words(rng, n)) for n in (300, 40, 40))
    pairs = source([
        pair(x, y, z),
        pair(x, y, "no"),
        pair(x, z, y),
        pair(x + " end", y, z),
        pair(x, y + " end", z)])
    _, rows = run("dedup --near --pairs --data", pairs)
    assert lines(rows) == [1, 2, 3]


def test_each_method_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "select --method random --budget 2 --data demo:test --cache-dir cache"
    assert data.main(flags.split())["output"] == "runs/select-random"
    assert Path("runs/select-random/rows.jsonl").exists()


# ---------------------------------------------------------------------------------- contamination
def test_decontaminate_by_hand(run, source, tmp_path):
    """13 words in a row in any turn, or a whole user turn that equals a shorter prompt."""
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    bench = source([
        {"question": f"Well: {long}?", "answer": "#### 1"},
        {"question": "Who am I", "answer": "2"},
        {"turns": [{"content": "Say yes"}, "Twice"]}], "bench.jsonl")
    a = source([
        question(long.replace(" seven", " SEVEN,")),
        question(long.replace(" two", "")),
        question(long.replace(" seven", " 7")),
        question("x", f"so {long} it is"),
        question("who am I?"),
        question("tell me who am I"),
        question("x", "Say yes"),
        question("twice", "b")])
    report, rows = run("decontaminate --data", a, "--against", bench)
    assert report["hits"] == 4
    assert report["shared"] == 2
    assert report["removed"] == 0
    assert [bool(row["shared"]) for row in rows] == [True, False, False, True] * 2
    report, rows = run("decontaminate --remove --data", a, "--against", bench)
    assert lines(rows) == [2, 3, 6, 7]
    assert report["removed"] == 4
    hits = read(tmp_path / "out/hits.jsonl")
    assert [hit["benchmark"] for hit in hits] == [f"{bench}:{n}" for n in (1, 1, 2, 3)]
    assert hits[2] == {"where": f"{a}:5", "benchmark": f"{bench}:2", "shared": "who am i"}


def test_benchmarks_that_are_read_and_one_that_is_not(run, source, tmp_path):
    """HellaSwag's ctx, Winogrande's sentence. What is no benchmark is named by its line, early."""
    a = source(map(question, ("A man sits", "the _ fell", "other")))
    bench = source([{"ctx": "A man sits.", "endings": ["x"]}, {"sentence": "The _ fell."}],
                   "b.jsonl")
    bad = source([{"question": "q"}, {"texte": "q"}], "c.jsonl")
    with pytest.raises(ValueError, match="--against .*c.jsonl:2: .*ctx.*sentence"):
        run("decontaminate --data", a, "--against", bad)
    assert not (tmp_path / "out").exists()
    assert run("decontaminate --data", a, "--against", bench)[0]["hits"] == 2


@pytest.mark.parametrize("command", [
    "dedup",
    "stats",
    "show",
    "select --method random --budget 1",
    "decontaminate --against demo:test"])
def test_preference_rows_without_pairs_are_refused(command, run, source):
    """They would lose their rejected answers. sft.py still reads them as prompt + chosen."""
    with pytest.raises(ValueError, match="a.jsonl.*add --pairs"):
        run(command, "--data", source([pair("q", "a", "b")]))


# -------------------------------------------------------------------------------------- selection
def random_ratings(rng, n):
    """In steps of 0.1 (ties) with a tenth missing."""
    ratings = np.round(rng.uniform(1, 10, n), 1)
    ratings[rng.random(n) < 0.1] = NAN
    return ratings


def test_best_first_against_a_sort():
    rng = np.random.default_rng(0)
    for n in (0, 500):
        x = random_ratings(rng, n)
        rated = np.flatnonzero(~np.isnan(x)).tolist()
        expected = sorted(rated, key=lambda i: (-x[i], i))
        assert data.best_first(x).tolist() == expected
    assert data.best_first([1, NAN, 3, 3]).tolist() == [2, 3, 0]


def test_a2_by_hand():
    """8.2 - 6.2 = 1.9999999999999991 is 2."""
    assert data.a2([9, 9, 7, 8, 9], [1, 1, 5, 6, 8], 3).tolist() == [0, 3, 1]
    assert data.a2([8.2, 8.1], [6.2, 6.2], 2).tolist() == [0]
    assert data.a2([NAN, 5], [1, NAN], 2).tolist() == [] == data.a2([], [], 3).tolist()


@pytest.mark.parametrize("budget", [1, 7, 60, 200, 1000])
def test_a2_against_its_rounds(budget):
    """Bins as lists, popped in rounds."""
    rng = np.random.default_rng(budget)
    bins = {}
    expected = []
    chosen = random_ratings(rng, 400)
    rejected = random_ratings(rng, 400)
    for i in np.argsort(-chosen, kind="stable").tolist():
        difference = round(chosen[i] - rejected[i], 9)
        if difference >= 2:
            bins.setdefault(int(difference), []).append(i)
    while any(bins.values()):
        for b in sorted(bins, reverse=True):
            expected += bins[b][:1]
            bins[b] = bins[b][1:]
    assert data.a2(chosen, rejected, budget).tolist() == expected[:budget]


def test_diverse_equals_one_at_a_time():
    """DEITA's rule on random clusters, so that many are too similar. The cosine of (1, 0) and
    (3, 4) is 0.6: what equals the limit stays."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 8))[rng.integers(60, size=500)] + 0.3 * rng.normal(size=(500, 8))
    norms = np.linalg.norm(x, axis=1)
    order = rng.permutation(500).tolist()
    kept = []
    cosine = x @ x.T / np.outer(norms, norms)
    for i in order:
        if all(cosine[i, k] <= 0.9 for k in kept):
            kept.append(i)
    assert 10 < len(kept) < 400
    for budget in (5, 60, 500):
        assert data.diverse(x, order, budget).tolist() == kept[:budget]
    for most, expected in ((0.6, [0, 1]), (0.5999, [0])):
        assert data.diverse(np.array([[1, 0], [3, 4]]), [0, 1], 2, most).tolist() == expected


@pytest.mark.slow
def test_diverse_hundred_thousand():
    """100k candidates of 256 dimensions, 10k clusters: minutes at most."""
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((10_000, 256), dtype=np.float32)
    x = centres[rng.integers(10_000, size=100_000)]
    started = time.time()
    assert 9_900 < len(data.diverse(x, range(100_000), 10_000)) <= 10_000
    assert time.time() - started < 300


RATINGS = [(9, 1), (9, 1), (7, 5), (8, 6), (9, 8), (None, 3), (2, 2), (10, None)]
RATED = [pair(f"q{i}", "a " * (i % 5 + 1) + f"{i}", f"b{i}", ratings)
         for i, ratings in enumerate(RATINGS)]


@pytest.mark.parametrize("method, expected", [
    ("argilla", [1, 2, 3]),
    ("alpagasus", [8, 1, 2]),
    ("a2", [1, 4, 2]),
    ("longest", [5, 4, 3])])
def test_select_command(method, expected, run, source, tmp_path):
    _, rows = run(f"select --pairs --budget 3 --method {method} --data", source(RATED))
    assert lines(rows) == expected
    assert (tmp_path / "out/select.png").stat().st_size > 5000
    assert data.to_pair(rows[0]).score_chosen == rows[0]["score_chosen"]    # rows are a source
    json.loads((tmp_path / "out/report.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("method, line", [
    ("a2", 3),
    ("argilla", 3),
    ("alpagasus", 2),
    ("random", 1)])
def test_of_equal_rows_a_rated_method_keeps_the_first_rated(method, line, run, source):
    """Copies unrated, half rated, rated 9 and 1, rated 8 and 1: one stays, three are counted."""
    copies = [pair("q", "a", "b", r) for r in ((None, None), (9, None), (9, 1), (8, 1))]
    a = source([*copies, pair("r", "a", "b", (7, 1))])
    report, rows = run(f"select --pairs --budget 2 --method {method} --data", a)
    assert set(lines(rows)) == {line, 5}
    assert report["duplicates"] == 3


def test_select_says_what_it_cannot_do(run, source, capsys):
    a = source([pair("q", "a", "b"), pair("r", "a", "b")])
    with pytest.raises(ValueError, match="none of the 2 rows has the score"):
        run("select --pairs --method a2 --budget 3 --data", a)
    with pytest.raises(SystemExit):
        run("select --method a2 --budget 0")
    assert "--budget: 0 must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("method, expected", [
    ("a2", {1, 2, 3, 4}),
    ("alpagasus", {1, 2, 3, 4, 5, 7, 8, 10}),
    ("random", {*range(1, 12)})])
def test_rewards_under_the_name_of_a_rating_count_as_unrated(method, expected, run, source):
    """-14.5, -20, 0.25 and 12 lie outside 1..10."""
    rewards = [(-14.5, -20), (9, 0.25), (12, 3)]
    rows = RATED + [pair(f"x{i}", "y", "z", both) for i, both in enumerate(rewards)]
    _, rows = run(f"select --pairs --budget 99 --method {method} --data", source(rows))
    assert set(lines(rows)) == expected


def test_output_never_overwrites_its_input(run, source, tmp_path):
    import datasets
    out = tmp_path / "out"
    datasets.Dataset.from_list([question("q")]).save_to_disk(out)
    for command, name in (
            ("dedup --data", out),
            ("decontaminate --data demo:test --against", out),
            ("dedup --data", source([question("q")], "out/a.jsonl"))):
        with pytest.raises(ValueError, match="--output .*out: holds the source"):
            run(command, name)


@pytest.mark.parametrize("command", [
    "dedup", "dedup --near", "decontaminate --against BENCH", "select --method random --budget 9",
    "select --method a2 --budget 9", "annotate --rm RM"])
def test_what_a_command_writes_is_a_source(command, run, source, models, tmp_path):
    """Of pairs and of conversations, over two sources, read by sft.py and dpo.py. Rows keep the
    name of the source that they came from."""
    rows = [pair(f"q {i}", "a b c", "d", (5 + i / 2, 2)) for i in range(4)]
    rows[0] |= {"answer": "7", "unfinished": ["chosen"], "system": "s"}
    conversations = [question(f"q {i}") for i in range(4)] + [
        {"messages": data.ask("r", "x"), "answer": "7", "unfinished": True, "last_only": True}]
    bench = source([question("benchmark")], "bench.jsonl")
    command = command.replace("BENCH", bench).replace("RM", str(models / "rm")).split()
    tokenizer = data.demo_tokenizer()
    settings = tokenizer, data.set_template(tokenizer)
    limits = dict(max_length=200, cache_dir=str(tmp_path / "cache"))
    for pairs, content in ((True, rows), (False, conversations)):
        if not pairs and {"a2", "annotate"} & {*command}:
            continue
        files = [source(content[:2], "a.jsonl"), source(content[2:], "b.jsonl")]
        flags = ["--pairs"] * (pairs and command[0] != "annotate")
        run(" ".join([*command, *flags, "--data"]), *files)
        for both in {pairs, False}:
            whole = data.prepare(files, *settings, pairs=both, **limits)
            written = str(tmp_path / "out/rows.jsonl")
            again = data.prepare([written], *settings, pairs=both, **limits)
            columns = ["messages_json", "answer", "source", "row", "n_targets"]
            expected, written = (sorted(zip(*(one.dataset[c] for c in columns)))
                                 for one in (whole, again))
            assert written == expected
            assert {*again.stats["sources"]} == {*files}


def test_random_selection_needs_no_score(run, source, capsys):
    run("select --method random --budget 2 --data", source(map(question, "abc")))
    printed = capsys.readouterr().out
    assert "2 of 3 rows selected" in printed
    assert "without a score" not in printed


def test_random_is_nested_and_seeded(run, source):
    a = source(map(question, map(str, range(50))))
    many, few, other = (
        lines(run(f"select --method random --budget {n} --seed {seed} --data", a)[1])
        for n, seed in ((20, 42), (5, 42), (5, 1)))
    assert many[:5] == few != other


# ------------------------------------------------------------------------------ models that score
@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models with a byte tokenizer: a reward model, a causal LM, a classifier of two."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    folder = tmp_path_factory.mktemp("models")
    tokenizer = data.demo_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    torch.manual_seed(0)
    for name, architecture, outputs in (
            ("rm", LlamaForSequenceClassification, 1),
            ("lm", LlamaForCausalLM, 1),
            ("two", LlamaForSequenceClassification, 2)):
        config = LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=300,
            hidden_size=32, intermediate_size=64,
            num_hidden_layers=2, num_attention_heads=2,
            num_labels=outputs, pad_token_id=tokenizer.pad_token_id)
        architecture(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def test_scorers_by_their_formulas(models):
    """Reward and embedding from the last token's hidden state, whatever that token is. The rating
    is the mean of 1..6 under the probabilities of their digits."""
    import torch
    reward = data.Scorer(str(models / "rm"), "reward")
    rating, embedding = (data.Scorer(str(models / "lm"), k) for k in ("rating", "embedding"))
    digits = rating.tokenizer.convert_tokens_to_ids([*"123456"])
    for text in ("a", "a much longer text " * 5, "\n", "ends in padding<pad>"):
        ids = torch.tensor([reward.tokenizer(text).input_ids])
        hidden = reward.model.model(ids).last_hidden_state[0, -1]
        assert reward(text) == pytest.approx(reward.model.score(hidden).item(), abs=1e-5)
        hidden = rating.model.model(ids).last_hidden_state[0, -1]
        assert embedding(text) == pytest.approx(hidden.tolist(), abs=1e-5)
        p = rating.model.lm_head(hidden)[digits].exp()
        expected = (p @ torch.arange(1.0, 7) / p.sum()).item()
        assert rating(text) == pytest.approx(expected, abs=1e-5)
    assert rating("x" * 300)
    assert rating("x" * 301) is None


def test_rewards_of_a_bf16_model_are_float32(models, tmp_path):
    """The head's sum is not rounded: 100 texts get more different rewards than bf16 has there."""
    from transformers import LlamaForSequenceClassification
    shutil.copytree(models / "rm", tmp_path / "rm")
    model = LlamaForSequenceClassification.from_pretrained(models / "rm").bfloat16()
    model.save_pretrained(tmp_path / "rm")
    reward = data.Scorer(str(tmp_path / "rm"), "reward")
    assert str(reward.model.dtype) == "torch.bfloat16"
    assert len({reward(f"text {i}") for i in range(100)}) > 90


def test_scoring_continues_after_a_kill(models, tmp_path, monkeypatch):
    """Killed at the 1,200th of 1,500 texts: the 1,199 before it stay. Nothing is scored twice."""
    texts = [str(i) for i in range(1500)] * 2
    scored = []
    args = data.parser().parse_args(["annotate", "--rm", "", "--cache-dir", str(tmp_path)])

    def score(scorer, text):
        scored.append(text)
        if len(scored) == 1200:
            raise KeyboardInterrupt
        return float(text)
    monkeypatch.setattr(data.Scorer, "__call__", score)
    with pytest.raises(KeyboardInterrupt):
        data.scores_of(str(models / "rm"), "reward", texts, args)
    for _ in range(2):
        values = data.scores_of(str(models / "rm"), "reward", texts, args)
        assert values.tolist() == [*range(1500)] * 2
        assert len(scored) == 1501


def test_deita_command(models, run, source):
    """Against its parts: complexity x quality, summed over turns; the best first."""
    rows = [{"messages": data.ask(f"q{i}", "a" * i) + data.ask("r", f"b{i}") * (i % 3 == 0)}
            for i in range(1, 13)]
    command = "select --method deita --budget 6 --data"
    lm = models / "lm"
    flags = [source(rows)]
    for kind in ("complexity", "quality", "embedding"):
        flags += [f"--{kind}-model", lm]
    _, kept = run(command, *flags)
    rating = data.Scorer(str(lm), "rating")
    for row in kept:
        texts = [m["content"] for m in row["messages"]]
        total = 0
        for q, a in zip(texts[::2], texts[1::2]):
            complexity, quality = (prompt.format(instruction=q, output=a)
                                   for prompt in data.DEITA.values())
            total += rating(complexity) * rating(quality)
        assert row["selection_score"] == pytest.approx(total)
    scores = [row["selection_score"] for row in kept]
    assert scores == sorted(scores, reverse=True)
    assert len(kept) <= 6
    assert run(command, *flags)[1] == kept


def test_deita_embeds_the_authors_rendering(models):
    """FastChat's vicuna_v1.1 by hand, without the row's system turn. Longer texts are cut."""
    messages = [{"role": "system", "content": "be brief"}, *data.ask("Hello!", "Hi!"),
                data.user("How are you?")]
    assert data.vicuna(messages) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: Hello! "
        "ASSISTANT: Hi!</s>USER: How are you? ")
    embedding = data.Scorer(str(models / "lm"), "embedding")
    for embedding.limit, length in ((300, 300), (9999, 2048)):
        start = "".join(str(i) for i in range(1000))[:length]
        assert embedding(start + "beyond") == embedding(start) != embedding(start[:-1])


def test_models_that_cannot_score_are_refused(models, tmp_path):
    """Two outputs, no head, a vocabulary without "5", weights that are no safetensors, own code."""
    odd, unsafe, remote = (shutil.copytree(models / "lm", tmp_path / name)
                           for name in ("odd", "unsafe", "remote"))
    tokenizer = (odd / "tokenizer.json").read_text()
    (odd / "tokenizer.json").write_text(tokenizer.replace('"5"', '"five"'))
    (unsafe / "model.safetensors").rename(unsafe / "pytorch_model.bin")
    (remote / "config.json").write_text(json.dumps(
        {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd"}}))
    for name, kind, message in (
            (models / "two", "reward", "two: .*2 outputs"),
            (models / "lm", "reward", "lm cannot be loaded .*score.weight"),
            (odd, "rating", 'odd: .*5 of the tokens "1".."6"'),
            (remote, "reward", "trust_remote_code"),
            (unsafe, "reward", "unsafe: no .safetensors file")):
        with pytest.raises(ValueError, match=message):
            data.Scorer(str(name), kind)
    data.Scorer(str(odd), "embedding")


# ------------------------------------------------------------------------------------- annotation
def test_fit_equals_numpy_and_a_known_answer():
    few = np.array([0, 2, 4]), np.array([1, 3, NAN])
    assert np.allclose(data.fit_ratings(*few, 1).coef, [1, 4])
    rng = np.random.default_rng(0)
    rewards = rng.normal(3, 5, 300)
    z = (rewards - rewards.min()) / (rewards.max() - rewards.min())
    ratings = 2 + 3 * z - z ** 2
    fit = data.fit_ratings(rewards, np.where(rng.random(300) < 0.5, ratings, NAN), 2)
    assert np.allclose(fit.coef, [2, 3, -1])
    assert fit.domain.tolist() == [rewards.min(), rewards.max()]
    assert np.allclose(fit(rewards), ratings)
    ratings += rng.normal(size=300)
    expected = np.linalg.lstsq(np.vander(z, 4, increasing=True), ratings, rcond=None)[0]
    assert np.allclose(data.fit_ratings(rewards, ratings, 3).coef, expected)


@pytest.mark.parametrize("ratings, rewards, counts", [
    ([NAN, NAN], [1, 2], "0 .* 0 .* 0"),
    ([3, 3], [1, 2], "2 .* 1 .* 2"),
    ([1, 2], [5, 5], "2 .* 2 .* 1"),
    ([1, NAN], [NAN, 2], "0 .* 0 .* 0")])
def test_fit_needs_ratings_that_differ(ratings, rewards, counts):
    """Answers with both, different ratings, different rewards."""
    with pytest.raises(ValueError, match=f"annotate: {counts} different rewards"):
        data.fit_ratings(np.array(rewards), np.array(ratings), 1)


@pytest.mark.parametrize("degree", [1, 2])
def test_annotate_command(degree, models, run, source, tmp_path):
    """Known ratings stay; the others are numpy's polynomial of the rescaled rewards, in 1..10."""
    rows = RATED + [pair(f"new {i}", f"x{i}", f"y{i}") for i in range(5)]
    report, out = run(f"annotate --degree {degree} --rm", models / "rm", "--data", source(rows))

    def column(kind, rows):
        values = [[row[f"{kind}_chosen"], row[f"{kind}_rejected"]] for row in rows]
        return np.array(values, dtype=float)
    rewards = column("reward", out)
    before = column("score", rows)
    after = column("score", out)
    known = ~np.isnan(before)
    z = (rewards - rewards.min()) / (rewards.max() - rewards.min())
    c = np.polyfit(z[known], before[known], degree)
    predicted = np.clip(np.polyval(c, z), 1, 10)
    assert np.allclose(report["coefficients"], c[::-1])
    assert np.allclose(after, np.where(known, before, predicted))
    assert (column("annotated", out) == ~known).all()
    error = (predicted - before)[known]
    assert report["mse"] == pytest.approx((error ** 2).mean())
    assert report["mae"] == pytest.approx(np.abs(error).mean())
    assert report["agreement"] == (rewards[:, 0] > rewards[:, 1]).mean()
    assert report["annotated_answers"] == (~known).sum()
    assert (tmp_path / "out/annotate.png").stat().st_size > 5000
    assert data.to_pair(out[-1]).score_chosen == after[-1, 0]


def test_an_answer_too_long_to_score_is_not_annotated(models, run, source):
    """Its score stays missing, and its mark says so."""
    a = source([*RATED, pair("q", "a" * 400, "b")])
    report, (*_, last) = run("annotate --rm", models / "rm", "--data", a)
    assert report["too_long"] == 1
    assert report["annotated_answers"] == 3
    assert last["score_chosen"] is None
    assert not last["annotated_chosen"]
    assert last["annotated_rejected"]
    assert 1 <= last["score_rejected"] <= 10


# ------------------------------------------------------------------------------------- statistics
def test_stats_command(run, source, tmp_path, capsys):
    b = source([pair("q", "a", "b"), pair("s", "a" * 99, "b")], "b.jsonl")
    total, _ = run("stats --pairs --data", source(RATED), b)
    assert total["examples"] == 10
    assert total["rated"] == 7
    assert total["mean_rating"] == pytest.approx(54 / 7)
    assert total["mean_gap"] == pytest.approx((8 + 8 + 2 + 2 + 1 + 0) / 6)
    assert "p90" in capsys.readouterr().out
    assert (tmp_path / "out/stats.png").stat().st_size > 5000


def test_the_first_source_outlives_a_step(run, source, tmp_path):
    """dedup, then select, then stats: rows keep the file and line that they come from, beside rows
    of other files, and refused ones as well."""
    a = step = source(map(question, ("q0", "q0", "q1")))
    for command in ("dedup --data", "select --method random --budget 9 --data"):
        step = source(run(command, step)[1], "step.jsonl")
    refused = {"messages": [], "lions_origin": [a, 7]}
    b = source([refused, question("s") | {"source": "forum", "row": "x"}], "b.jsonl")
    run("stats --data", step, b)
    sources = json.loads((tmp_path / "out/report.json").read_text())["sources"]
    assert {name: of["examples"] for name, of in sources.items()} == {a: 2, b: 1}
    assert sources[a]["reasons"] == {"empty conversation": [1, f"{a}:7"]}


def test_a_command_killed_between_its_files_starts_again(run, source, monkeypatch):
    """A picture without a report would count as somebody's file."""
    rated = source([pair(f"q{i}", "a", "b", (5, i % 4 + 1)) for i in range(8)])

    def killed(*args, **report):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(data, "write_rows", killed)
        with pytest.raises(KeyboardInterrupt):
            run("select --pairs --method argilla --budget 2 --data", rated)
    report, rows = run("select --pairs --method argilla --budget 2 --data", rated)
    assert report["rows"] == len(rows) == 2
