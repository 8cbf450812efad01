"""data.py's commands: duplicates, contamination, selection, annotation, against few-line computations of their own."""
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import data

NAN = float("nan")


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def run(tmp_path, command, *args):
    """main() of a command into tmp_path/out: its result and the rows it wrote."""
    folders = ["--output", tmp_path / "out", "--cache-dir", tmp_path / "cache"]
    made = data.main([command, *map(str, [*folders, *args])])
    rows = tmp_path / "out/rows.jsonl"
    return made, [json.loads(x) for x in rows.read_text().splitlines()] if rows.exists() else None


def pair(prompt, chosen, rejected, scores=(None, None)):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "score_chosen": scores[0],
            "score_rejected": scores[1]}


def words(rng, n):
    return [f"w{rng.randrange(5000)}" for _ in range(n)]


# ------------------------------------------------------------------------------------------ duplicates
def test_grams_by_hand():
    assert data.grams("The cat, the CAT  sat!", 3) == {"the cat the", "cat the cat", "the cat sat"}
    assert data.grams("Yes.", 5) == {"yes"} and data.grams(":)", 5) == {":)"} != data.grams(":(", 5)


def test_exact_across_sources_whatever_the_schema_and_the_ends(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"query": "q\u00e9 1", "response": "a"}, {"query": "x", "response": "y"}])
    b = write(tmp_path / "b.jsonl", [{"instruction": q, "output": "a"} for q in ("qe\u0301 1\n", "Q\u00e9 1")])
    made, rows = run(tmp_path, "dedup", "--data", a, b)
    assert [(r["source"], r["row"]) for r in rows] == [(a, 1), (a, 2), (b, 2)] and made["exact"] == 1
    cluster, = map(json.loads, (tmp_path / "out/clusters.jsonl").read_text().splitlines())
    assert cluster == {"kept": f"{a}:1", "dropped": [{"row": f"{b}:1", "kind": "exact", "jaccard": 1.0}]}
    assert [(r["source"], r["row"]) for r in run(tmp_path, "dedup", "--data", b, a)[1]] == [(b, 1), (b, 2), (a, 2)]


@pytest.fixture
def near_files(tmp_path):
    """40 texts of 100 words; 10 copies with one word changed (J = 91/101), 10 with every tenth (J about 0.35), a copy
    of a near copy, and a chain a ~ b ~ c with J(a, b), J(b, c) >= 0.8 > J(a, c)."""
    rng = random.Random(0)
    texts = [words(rng, 100) for _ in range(40)]
    near = [t[:50] + ["new"] + t[51:] for t in texts[:10]]
    far = [[("new" if i % 10 == 5 else w) for i, w in enumerate(t)] for t in texts[10:20]]
    b = texts[20][:30] + ["b1"] + texts[20][31:60] + ["b2"] + texts[20][61:]
    c = b[:10] + ["c1"] + b[11:85] + ["c2"] + b[86:]
    rows = [{"query": " ".join(t[:20]), "response": " ".join(t[20:])} for t in texts + near + far + [near[0], b, c]]
    return write(tmp_path / "a.jsonl", rows)


def test_near_duplicates_are_those_of_exact_jaccard(tmp_path, near_files):
    """Against all pairs, first kept first: a row goes when an earlier kept one is at >= 0.8."""
    pytest.importorskip("rensa")
    made, rows = run(tmp_path, "dedup", "--near", "--data", near_files)
    texts = [f"{r['query']} {r['response']}".split() for _, r in data.read_lines(near_files)]
    sets = [{tuple(t[i:i + 5]) for i in range(len(t) - 4)} for t in texts]
    kept = []
    for i, s in enumerate(sets):
        if all(len(s & sets[k]) / len(s | sets[k]) < 0.8 for k in kept):
            kept.append(i)
    assert [r["row"] - 1 for r in rows] == kept and 61 not in kept and {*range(40), *range(50, 60), 62} == set(kept)
    assert made == made | {"near": 11, "exact": 1}
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["clusters"] == 11 and report["examples"][0]["kept"] == f"{near_files}:1"


def test_near_does_not_hang_on_hash_seed_or_processes(tmp_path, near_files):
    pytest.importorskip("rensa")
    seen = set()
    for seed, n in (("1", "1"), ("2", "2")):
        out = tmp_path / seed
        script = "import sys; sys.path.insert(0, sys.argv[1]); import data; data.CHUNK = 20; data.main(sys.argv[2:])"
        subprocess.run([sys.executable, "-c", script, str(Path(data.__file__).parent), "dedup", "--near", "--data",
                        near_files, "--num-proc", n, "--output", str(out), "--cache-dir", str(out)], check=True,
                       capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed})
        seen.add((out / "rows.jsonl").read_bytes() + (out / "clusters.jsonl").read_bytes())
    assert len(seen) == 1


def test_a_shared_frame_is_not_verified_row_by_row(tmp_path, monkeypatch):
    """600 rows of one system prompt (J about 0.55 by it alone) and ten near copies: the copies go, and few of the
    180,000 pairs that share a band come to the exact Jaccard."""
    pytest.importorskip("rensa")
    rng, verified, plain = random.Random(3), [], data.jaccard
    frame, asked = " ".join(words(rng, 120)), [words(rng, 40) for _ in range(600)]
    asked += [t[:20] + ["new"] + t[21:] for t in asked[:10]]
    rows = [{"messages": [{"role": "system", "content": frame}, *data.ask(" ".join(t[:30]), " ".join(t[30:]))]}
            for t in asked]
    monkeypatch.setattr(data, "jaccard", lambda a, b: verified.append(1) or plain(a, b))
    made, kept = run(tmp_path, "dedup", "--near", "--data", write(tmp_path / "a.jsonl", rows))
    assert [r["row"] for r in kept] == list(range(1, 601)) and made["near"] == 10
    assert len(verified) < 2500


def test_an_operator_or_a_sign_makes_another_row(tmp_path):
    """12 + 30 and 12 - 30, f(x) and f[x]: not near, though their words are the same; a word of 100 changed is."""
    pytest.importorskip("rensa")
    made = [("What is 12 + 30 of it?", "a"), ("What is 12 - 30 of it?", "a"), ("f(x) == -1", "b"), ("f[x] != 1", "b"),
            *((" ".join(["w"] * 3 + [f"w{i}" for i in range(100)] + end), "c") for end in ([], ["end"]))]
    made, rows = run(tmp_path, "dedup", "--near", "--data", write(tmp_path / "a.jsonl", [
        {"query": q, "response": a} for q, a in made]))
    assert [r["row"] for r in rows] == [1, 2, 3, 4, 5]


def test_pairs_are_near_in_each_part(tmp_path):
    """A long prompt in common does not make another answer, or another rejected one, a duplicate."""
    pytest.importorskip("rensa")
    rng = random.Random(1)
    x, y, z = (" ".join(words(rng, n)) for n in (300, 40, 40))
    rows = [pair(x, y, z), pair(x, y, "no"), pair(x, z, y), pair(x + " end", y, z), pair(x, y + " end", z)]
    made, kept = run(tmp_path, "dedup", "--near", "--pairs", "--data", write(tmp_path / "p.jsonl", rows))
    assert [r["row"] for r in kept] == [1, 2, 3] and made["near"] == 2


def test_near_without_its_library_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--near: rensa.*pip install"):
        run(tmp_path, "dedup", "--near")


def test_work_goes_on_after_a_crash_and_goes_when_done(tmp_path, near_files, monkeypatch):
    """The second chunk fails: the first stays and is not computed again."""
    monkeypatch.setattr(data, "CHUNK", 20)
    done = []
    plain = data.overlaps

    def failing(store, ids, benchmark, start, stop, file):
        done.append(start)
        if start == 20 and done.count(20) == 1:
            raise OSError("disk full")
        plain(store, ids, benchmark, start, stop, file)
    monkeypatch.setattr(data, "overlaps", failing)
    flags = ("decontaminate", "--data", near_files, "--against", near_files, "--num-proc", 1)
    with pytest.raises(OSError):
        run(tmp_path, *flags)
    assert list((tmp_path / "cache").glob("*.writing"))
    assert run(tmp_path, *flags)[0]["hits"] == 63 and done == [0, 20, 20, 40, 60]
    assert not list((tmp_path / "cache").glob("*.writing"))


def enter_and_leave(folder: Path, rounds: int):
    """A process of test_work_folder: its file is alone in the folder, then the folder goes."""
    for i in range(rounds):
        with data.work_folder(folder) as work:
            (work / f"{os.getpid()}-{i}").touch()
            assert [f.name for f in work.iterdir()] == [f"{os.getpid()}-{i}"]


def test_work_folder_is_one_process_at_a_time(tmp_path):
    """Four processes take turns in a folder that each of them removes."""
    context = data.multiprocessing.get_context("fork")
    ran = [context.Process(target=enter_and_leave, args=(tmp_path / "deep/x.writing", 200)) for _ in range(4)]
    for p in ran:
        p.start()
    for p in ran:
        p.join()
    assert [p.exitcode for p in ran] == [0] * 4 and not (tmp_path / "deep/x.writing").exists()


def write_often(path: Path, text: str):
    for _ in range(200):
        data.write_lines(path, [text.encode()] * 100)


def test_writers_of_one_file_do_not_mix(tmp_path):
    context = data.multiprocessing.get_context("fork")
    ran = [context.Process(target=write_often, args=(tmp_path / "f", text)) for text in ("a" * 999, "b" * 5000)]
    for p in ran:
        p.start()
    while any(p.is_alive() for p in ran):
        assert not (tmp_path / "f").exists() or len(set((tmp_path / "f").read_text())) == 1
    assert [p.exitcode for p in ran] == [0, 0] and [f.name for f in tmp_path.iterdir()] == ["f"]


def test_each_method_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = data.main(["select", "--method", "random", "--budget", "2", "--data", "demo:test", "--cache-dir", "c"])
    assert made["output"] == "runs/select-random" and (tmp_path / "runs/select-random/rows.jsonl").exists()


# --------------------------------------------------------------------------------------- contamination
def test_decontaminate_by_hand(tmp_path):
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    bench = write(tmp_path / "bench.jsonl", [{"question": f"Well: {long}?", "answer": "#### 1"}, {
        "question": "Who am I", "answer": "2"}, {"turns": [{"content": "Say yes"}, "Twice"]}])
    said = [*((long.replace(*change), "a") for change in ((" seven", " SEVEN,"), (" two", ""), (" seven", " 7"))),
            ("x", f"so {long} it is"), ("who am I?", "a"), ("tell me who am I", "a"), ("x", "Say yes"), ("twice", "b")]
    rows = [{"query": q, "response": r} for q, r in said]
    flags = ("decontaminate", "--data", write(tmp_path / "a.jsonl", rows), "--against", bench)
    made, kept = run(tmp_path, *flags)
    assert made["hits"] == 4 and kept is None
    made, kept = run(tmp_path, *flags, "--remove")
    assert [r["row"] for r in kept] == [2, 3, 6, 7] and made["prompts"] == 4
    hits = [json.loads(x) for x in (tmp_path / "out/hits.jsonl").read_text().splitlines()]
    assert [h["benchmark"][-1] for h in hits] == ["1", "1", "2", "3"] and hits[2]["shared"] == "who am i"
    assert made == made | {"shared": 2, "short": 2}


def test_benchmarks_that_are_read_and_one_that_is_not(tmp_path):
    """HellaSwag's ctx, Winogrande's sentence; what is no benchmark is named by its line, early."""
    a = write(tmp_path / "a.jsonl", [{"query": q, "response": "a"} for q in ("A man sits", "the _ fell", "other")])
    bench = write(tmp_path / "b.jsonl", [{"ctx": "A man sits.", "endings": ["x"]}, {"sentence": "The _ fell."}])
    assert run(tmp_path, "decontaminate", "--data", a, "--against", bench)[0]["short"] == 2
    bad = write(tmp_path / "c.jsonl", [{"question": "q"}, {"texte": "q"}])
    with pytest.raises(ValueError, match="--against .*c.jsonl:2: .*ctx.*sentence"):
        run(tmp_path, "decontaminate", "--data", a, "--against", bad, "--output", tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("flags", [("dedup",), ("stats",), ("show",), ("select", "--method", "random", "--budget", 1),
                                   ("decontaminate", "--against", "demo:test")])
def test_preference_rows_without_pairs_are_refused(flags, tmp_path):
    """They would lose their rejected answers; sft.py goes on reading them as prompt + chosen."""
    p = write(tmp_path / "p.jsonl", [pair("q", "a", "b")])
    with pytest.raises(ValueError, match="p.jsonl.*add --pairs"):
        data.main([*map(str, flags), "--data", p, "--cache-dir", str(tmp_path / "c")])


# ------------------------------------------------------------------------------------------- selection
def scores(rng, n):
    """Ratings in steps of 0.1 (ties) with a tenth missing."""
    x = np.round(rng.uniform(1, 10, n), 1)
    x[rng.random(n) < 0.1] = NAN
    return x


def test_highest_against_a_sort():
    rng = np.random.default_rng(0)
    for n, budget in ((0, 3), (1, 1), (500, 50), (500, 500), (500, 10_000)):
        x = scores(rng, n)
        expected = sorted((i for i in range(n) if x[i] == x[i]), key=lambda i: (-x[i], i))[:budget]
        assert data.highest(x, budget).tolist() == expected
    assert data.highest([1, NAN, 3, 3], 9).tolist() == [2, 3, 0]


def test_a2_by_hand():
    assert data.a2([9, 9, 7, 8, 9], [1, 1, 5, 6, 8], 3).tolist() == [0, 3, 1]
    assert data.a2([8.2, 8.1], [6.2, 6.2], 2).tolist() == [0]       # 8.2 - 6.2 = 1.9999999999999991 is 2
    assert data.a2([NAN, 5], [1, NAN], 2).tolist() == [] == data.a2([], [], 3).tolist()


def test_a2_against_its_rounds():
    """Bins as lists, popped in rounds."""
    rng = np.random.default_rng(1)
    for budget in (1, 7, 60, 200, 1000):
        chosen, rejected = scores(rng, 400), scores(rng, 400)
        bins = {}
        for i in range(400):
            d = round(chosen[i] - rejected[i], 9)
            if d >= 2:
                bins.setdefault(int(round(d - 2, 9)), []).append(i)
        for b in bins.values():
            b.sort(key=lambda i: (-chosen[i], i))
        expected = []
        while any(bins.values()):
            for b in sorted(bins, reverse=True):
                if bins[b]:
                    expected.append(bins[b].pop(0))
        assert data.a2(chosen, rejected, budget).tolist() == expected[:budget]


def greedy(x, order, budget, most=0.9):
    """DEITA's rule, one at a time, in float64."""
    kept = []
    for i in order:
        if len(kept) < budget and all(data.cosine(x[i], x[k]) <= most for k in kept):
            kept.append(int(i))
    return kept


def test_diverse_equals_one_at_a_time():
    """Random clusters, so that many are too similar, within a block and across blocks; exactly 0.9 stays."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 8))[rng.integers(60, size=500)] + 0.3 * rng.normal(size=(500, 8))
    order = rng.permutation(500)
    for budget in (5, 60, 500):
        for block in (1, 7, 1024):
            assert data.diverse(x, order, budget, block=block) == greedy(x, order, budget)
    assert 10 < len(data.diverse(x, order, 500)) < 400
    edge = np.array([[1, 0], [0.9, np.sqrt(1 - 0.81)], [0.9 + 1e-9, np.sqrt(1 - (0.9 + 1e-9) ** 2)], [2, 0]])
    assert data.cosine(edge[0], edge[2]) > 0.9
    for order in ([0, 1], [0, 2], [0, 3]):
        assert data.diverse(edge, order, 4) == greedy(edge, order, 4)
    with pytest.raises(ValueError, match="row 1"):
        data.diverse(np.array([[1.0, 0], [0, 0]]), [0, 1], 2)


@pytest.mark.slow
def test_diverse_hundred_thousand():
    """100k candidates of 256 dimensions, 10k kept, none of the rest kept before: minutes at most."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(10_000, 256))[rng.integers(10_000, size=100_000)] + 0.1 * rng.normal(size=(100_000, 256))
    x = x.astype(np.float32)
    started = time.time()
    kept = data.diverse(x, np.arange(100_000), 10_000)
    seconds = time.time() - started
    print(f"{len(kept)} kept in {seconds:.0f} s")
    assert 9_900 < len(kept) <= 10_000 and seconds < 300


RATED = [pair(f"q{i}", "a " * (i % 5 + 1) + f"{i}", f"b{i}", s) for i, s in
         enumerate([(9, 1), (9, 1), (7, 5), (8, 6), (9, 8), (None, 3), (2, 2), (10, None)])]


@pytest.mark.parametrize("method, expected", [
    ("argilla", [1, 2, 3]), ("alpagasus", [8, 1, 2]), ("a2", [1, 4, 2]), ("longest", [5, 4, 3])])
def test_select_command(method, expected, tmp_path):
    made, rows = run(tmp_path, "select", "--pairs", "--method", method, "--budget", 3, "--data",
                     write(tmp_path / "p.jsonl", RATED))
    assert [r["row"] for r in rows] == expected and made["selected"] == 3
    assert (tmp_path / "out/select.png").stat().st_size > 5000 and all(r["selection_score"] is not None for r in rows)
    assert data.to_pair(rows[0]).score_chosen == rows[0]["score_chosen"]          # reads back as a source
    json.loads((tmp_path / "out/report.json").read_text(), parse_constant=lambda x: pytest.fail(x))


@pytest.mark.parametrize("method, row", [("a2", 3), ("argilla", 3), ("alpagasus", 2), ("random", 1)])
def test_of_equal_rows_a_rated_method_keeps_the_first_rated(method, row, tmp_path, capsys):
    """Copies unrated, half rated, rated 9 and 1, rated 8 and 1: one stays, three are counted."""
    copies = [pair("q", "a", "b", s) for s in ((None, None), (9, None), (9, 1), (8, 1))]
    made, rows = run(tmp_path, "select", "--pairs", "--method", method, "--budget", 2, "--data",
                     write(tmp_path / "p.jsonl", [*copies, pair("r", "a", "b", (7, 1))]))
    assert {r["row"] for r in rows} == {row, 5} and made["duplicates"] == 3 and made["rows"] == 2
    assert "3 duplicates" in capsys.readouterr().out


def test_select_says_what_it_cannot_do(tmp_path, capsys):
    plain = write(tmp_path / "a.jsonl", [pair("q", "a", "b"), pair("r", "a", "b")])
    with pytest.raises(ValueError, match="none of the 2 rows has the ratings"):
        run(tmp_path, "select", "--pairs", "--method", "a2", "--budget", 3, "--data", plain)
    with pytest.raises(ValueError, match="(?s)--budget 0.*add --pairs"):
        run(tmp_path, "select", "--method", "a2", "--budget", 0)
    made, rows = run(tmp_path, "select", "--pairs", "--method", "random", "--budget", 9, "--data", plain)
    assert len(rows) == 2 and "fewer than --budget 9" in capsys.readouterr().out


@pytest.mark.parametrize("scores, wrong", [((-14.5, -20), "score_chosen -14.5"), ((9, 0.25), "score_rejected 0.25"),
                                           ((12, 3), "score_chosen 12")])
def test_a_score_that_is_no_rating_is_named(scores, wrong, models, tmp_path):
    """Rewards and logits under a rating's name: conversion keeps them, what counts on 1..10 refuses them."""
    p = write(tmp_path / "p.jsonl", [*RATED, pair("x", "y", "z", scores), pair("u", "v", "w", scores)])
    for flags in (*(("select", "--pairs", "--budget", 3, "--method", m) for m in ("a2", "argilla", "alpagasus")),
                  ("annotate", "--rm", models / "rm")):
        with pytest.raises(ValueError, match=f"p.jsonl:9: {wrong} .*1..10.*2 such"):
            run(tmp_path, *flags, "--data", p)
    assert len(run(tmp_path, "select", "--pairs", "--method", "longest", "--budget", 99, "--data", p)[1]) == 10


def test_output_never_stands_on_its_input(tmp_path):
    (tmp_path / "out").mkdir()
    a = write(tmp_path / "out/rows.jsonl", [{"query": "q", "response": "a"}])
    with pytest.raises(ValueError, match="holds what --data or --against reads"):
        run(tmp_path, "dedup", "--data", a)
    with pytest.raises(ValueError, match="holds what --data or --against reads"):
        run(tmp_path, "decontaminate", "--data", "demo:test", "--against", a)
    import datasets
    datasets.Dataset.from_list([{"query": "q", "response": "a"}]).save_to_disk(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="holds what --data or --against reads"):
        run(tmp_path, "dedup", "--data", tmp_path / "out")


def test_random_is_nested_and_seeded(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"query": str(i), "response": "a"} for i in range(50)])
    take = lambda n, seed=42: [r["row"] for r in run(tmp_path, "select", "--method", "random", "--budget", n, "--seed",
                                                     seed, "--data", a)[1]]
    assert take(20)[:5] == take(5) != take(5, 1)


# ---------------------------------------------------------------------------------- models that score
CHAT = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random reward model and a random causal LM, with a byte tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig
    folder = tmp_path_factory.mktemp("models")
    tokenizer = data.demo_tokenizer()
    tokenizer.chat_template = CHAT
    shape = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=300,
                 pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    for name, make, more in (("rm", AutoModelForSequenceClassification, dict(num_labels=1)),
                             ("lm", AutoModelForCausalLM, {}),
                             ("two", AutoModelForSequenceClassification, dict(num_labels=2))):
        make.from_config(LlamaConfig(**shape, **more)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def test_rewards_and_deita_scores_one_at_a_time(models, tmp_path):
    """Batches of like length equal the formulas on one text at a time; the second call computes nothing."""
    import torch
    texts = ["a", "bb b", "a much longer text " * 5, "bb b", "\n"]
    rm, lm = data.load_scorer(str(models / "rm"), "reward"), data.load_scorer(str(models / "lm"), "rating")
    tokenizer, model = rm[:2]
    one = [model(input_ids=torch.tensor([tokenizer(t).input_ids])).logits.item() for t in texts]
    assert np.allclose(data.score_texts(rm, "reward", texts, tmp_path, 100), one, atol=1e-5)
    model, ids = lm[1], [torch.tensor([tokenizer(t).input_ids]) for t in texts]
    digits = [tokenizer.convert_tokens_to_ids(str(k)) for k in range(1, 7)]
    p = [model(input_ids=x).logits[0, -1, digits].double().softmax(0).detach().numpy() for x in ids]
    found = data.score_texts(lm, "rating", texts, tmp_path, 100)
    assert np.allclose(found, [(np.arange(1, 7) * x).sum() for x in p], atol=1e-5)
    hidden = [model.model(input_ids=x).last_hidden_state[0, -1].detach().numpy() for x in ids]
    found = data.score_texts(lm, "embedding", texts, tmp_path, 100)
    read = lambda: np.fromfile(tmp_path / f"embedding-{lm[2]}.f32", np.float32).reshape(-1, 32)
    assert np.allclose(read()[found], hidden, atol=1e-5) and len(read()) == 4
    with open(tmp_path / f"embedding-{lm[2]}.f32", "ab") as f:
        f.write(b"a vector whose line a kill left out")
    found = data.score_texts(lm, "embedding", [*texts, "new"], tmp_path, 100)
    assert np.allclose(read()[found[:5]], hidden, atol=1e-5) and found[5] == 4 and len(read()) == 5
    assert data.score_texts((tokenizer, model, lm[2]), "rating", ["x" * 301], tmp_path, 100) == [None]


def test_classifier_without_padding_token_scores_the_last_token(models, tmp_path):
    """Padding = end of sequence: a row's own last end token must not be taken for padding."""
    import torch
    tokenizer, model, key = data.load_scorer(str(models / "rm"), "reward")
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["a<eos>", "bb<eos>", "c<eos>"]
    found = data.score_texts((tokenizer, model, key), "reward", texts, tmp_path, 1000)
    for text, value in zip(texts, found):
        hidden = model.model(input_ids=torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0, -1]
        assert np.isclose(model.score(hidden).item(), value, atol=1e-5)


def test_scoring_goes_on_after_a_kill(models, tmp_path, monkeypatch):
    """The third batch dies and leaves a torn line: what is whole stays, the rest is computed once."""
    rm, texts = data.load_scorer(str(models / "rm"), "reward"), [f"text {i} " * (i + 1) for i in range(12)]
    computed, plain = [], data.score_batch

    def counted(tokenizer, model, kind, rows, pad):
        if len(computed) == 6:
            raise KeyboardInterrupt
        computed.extend(rows)
        return plain(tokenizer, model, kind, rows, pad)
    monkeypatch.setattr(data, "score_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        data.score_texts(rm, "reward", texts, tmp_path, 1)
    file, = tmp_path.glob("*.jsonl")
    with open(file, "a") as f:
        f.write('["torn')
    computed.append("one more")
    found = data.score_texts(rm, "reward", texts, tmp_path, 1)
    assert len(computed) == 13 and len(file.read_text().splitlines()) == 12
    monkeypatch.undo()
    assert np.allclose(found, data.score_texts(rm, "reward", texts, tmp_path / "fresh", 1000), atol=1e-5)


def test_deita_command(models, tmp_path):
    """Against its parts, complexity x quality summed over turns; called twice, the second from the cache."""
    rows = [{"messages": data.ask(f"q{i}", "a" * i) + (data.ask("r", f"b{i}") if i % 3 == 0 else [])}
            for i in range(1, 13)]
    flags = ["select", "--method", "deita", "--budget", 6, "--data", write(tmp_path / "a.jsonl", rows)]
    flags += [x for kind in ("complexity", "quality", "embedding") for x in (f"--{kind}-model", models / "lm")]
    made, kept = run(tmp_path, *flags)
    lm = data.load_scorer(str(models / "lm"), "rating")
    value = lambda kind, q, a: data.score_texts(lm, "rating", [data.DEITA[kind].format(instruction=q, output=a)],
                                                tmp_path / "x", 9)[0]
    for r in kept:
        m = [x["content"] for x in r["messages"]]
        assert np.isclose(r["selection_score"], sum(value("complexity", q, a) * value("quality", q, a)
                                                    for q, a in zip(m[::2], m[1::2])))
    order = [r["selection_score"] for r in kept]
    assert order == sorted(order, reverse=True) and made["selected"] == len(kept) <= 6
    sizes = lambda: {f: f.stat().st_size for f in (tmp_path / "cache/scores").iterdir()}
    before = sizes()
    assert run(tmp_path, *flags)[1] == kept and before == sizes()


def test_models_that_cannot_score_are_refused(models, tmp_path):
    p = write(tmp_path / "p.jsonl", RATED)
    with pytest.raises(ValueError, match="two: 2 outputs"):
        run(tmp_path, "annotate", "--rm", models / "two", "--data", p)
    with pytest.raises(ValueError, match="lm: no weights for.*score"):
        data.load_scorer(str(models / "lm"), "reward")
    odd = tmp_path / "odd"                                  # a vocabulary without digits
    data.shutil.copytree(models / "lm", odd)
    made = json.loads((odd / "tokenizer.json").read_text())
    made["model"]["vocab"] = {k.replace("5", "five"): v for k, v in made["model"]["vocab"].items()}
    (odd / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match='odd: .*"1".."6"'):
        data.load_scorer(str(odd), "rating")
    data.load_scorer(str(odd), "embedding")
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": {"AutoModel": "odd.Odd"}}))
    (remote / "odd.py").write_text("open('ran', 'w')")
    with pytest.raises(ValueError, match="code from its own folder.*--trust-remote-code"):
        data.load_scorer(str(remote), "reward")


# ------------------------------------------------------------------------------------------ annotation
def test_fit_equals_numpy_and_a_known_answer():
    assert np.allclose(data.fit_ratings([0, 2, 4], [1, 3, NAN], 1)[2], [1, 4])
    rng = np.random.default_rng(0)
    r = rng.normal(3, 5, 300)
    z = (r - r.min()) / (r.max() - r.min())
    known = 2 + 3 * z - z ** 2
    low, high, c = data.fit_ratings(r, np.where(rng.random(300) < 0.5, known, NAN), 2)
    assert np.allclose(c, [2, 3, -1]) and (low, high) == (r.min(), r.max())
    noisy = known + rng.normal(size=300)
    expected = np.linalg.lstsq(np.vander(z, 4, increasing=True), noisy, rcond=None)[0]
    assert np.allclose(data.fit_ratings(r, noisy, 3)[2], expected)


@pytest.mark.parametrize("ratings, rewards, why", [
    ([NAN, NAN], [1, 2], "no row has a rating"), ([3, 3], [1, 2], "constant"), ([1, 2], [5, 5], "1 different rewards"),
    ([1, 2], [NAN, NAN], "no rated answer has a reward"), ([1, NAN], [NAN, 2], "no rated answer has a reward")])
def test_fit_needs_ratings_that_differ(ratings, rewards, why):
    with pytest.raises(ValueError, match=f"annotate: .*{why}"):
        data.fit_ratings(rewards, ratings, 1)


@pytest.mark.parametrize("degree", [1, 2])
def test_annotate_command(models, tmp_path, degree):
    """Original ratings win; the missing ones are numpy's polynomial of the rescaled rewards, inside 1..10."""
    rows = [*RATED, *[pair(f"new {i}", f"x{i}", f"y{i}") for i in range(5)]]
    made, out = run(tmp_path, "annotate", "--rm", models / "rm", "--degree", degree, "--data",
                    write(tmp_path / "p.jsonl", rows))
    r = np.array([[x["reward_chosen"], x["reward_rejected"]] for x in out])
    known = np.array([[np.nan if v is None else v for v in (x["score_chosen"], x["score_rejected"])] for x in rows])
    z, has = (r - r.min()) / (r.max() - r.min()), ~np.isnan(known)
    c = np.polyfit(z[has], known[has], degree)[::-1]
    assert np.allclose(made["coefficients"], c)
    got = np.array([[x["score_chosen"], x["score_rejected"]] for x in out])
    assert (got[has] == known[has]).all() and np.allclose(got[~has], np.clip(np.polyval(c[::-1], z), 1, 10)[~has])
    assert [x["annotated_chosen"] for x in out] == (~has[:, 0]).tolist()
    error = np.clip(np.polyval(c[::-1], z), 1, 10)[has] - known[has]
    assert np.isclose(made["mse"], (error ** 2).mean()) and np.isclose(made["mae"], np.abs(error).mean())
    assert made["agreement"] == (r[:, 0] > r[:, 1]).mean() and made["annotated_answers"] == (~has).sum()
    assert (tmp_path / "out/annotate.png").stat().st_size > 5000
    assert data.to_pair(out[-1]).score_chosen == out[-1]["score_chosen"]


def test_an_answer_too_long_to_score_is_not_annotated(models, tmp_path):
    """Its score stays missing, and so says its mark."""
    rows = [*RATED, pair("q", "a" * 400, "b")]
    made, out = run(tmp_path, "annotate", "--rm", models / "rm", "--data", write(tmp_path / "p.jsonl", rows))
    assert made["too_long"] == 1 and made["annotated_answers"] == 3 == sum(
        r["annotated_chosen"] + r["annotated_rejected"] for r in out)
    assert out[-1]["score_chosen"] is None and not out[-1]["annotated_chosen"] and out[-1]["annotated_rejected"]


def test_annotate_without_ratings(models, tmp_path):
    for rows, why in (([pair("q", "a", "b"), pair("r", "a", "b")], "no row has a rating"),
                      ([pair("q", "a", "b", (3, 3)), pair("r", "a", "b")], "constant")):
        with pytest.raises(ValueError, match=f"annotate: .*{why}"):
            run(tmp_path, "annotate", "--rm", models / "rm", "--data", write(tmp_path / "p.jsonl", rows))


# ------------------------------------------------------------------------------------------ statistics
def test_stats_command(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", RATED)
    b = write(tmp_path / "b.jsonl", [pair("q", "a", "b"), pair("s", "a" * 99, "b")])
    total = run(tmp_path, "stats", "--pairs", "--data", a, b)[0]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert total["examples"] == 10 and total["ratings"] == 7 and total["gaps"] == 6
    assert np.isclose(total["mean_gap"], (8 + 8 + 2 + 2 + 1 + 0) / 6) and report["sources"][b]["ratings"] == 0
    text = capsys.readouterr().out
    assert "p90" in text and "gap" in text and (tmp_path / "out/stats.png").stat().st_size > 5000


def test_the_first_source_outlives_a_step(tmp_path):
    """dedup, then select, then stats: rows still say which file and row they come from, beside rows of other files."""
    a = write(tmp_path / "a.jsonl", [{"query": f"q{i}", "response": "a"} for i in (0, 0, 1)])
    b = write(tmp_path / "b.jsonl", [{"query": f"r{i}", "response": "a"} for i in range(3)])
    made, rows = run(tmp_path, "dedup", "--data", a, b)
    (tmp_path / "out").rename(tmp_path / "one")
    made, rows = run(tmp_path, "select", "--method", "random", "--budget", 9, "--data", tmp_path / "one/rows.jsonl", b)
    assert {(r["source"], r["row"]) for r in rows} == {(a, 1), (a, 3), (b, 1), (b, 2), (b, 3)}
    (tmp_path / "out").rename(tmp_path / "two")
    bad = write(tmp_path / "c.jsonl", [{"messages": [], "answer": None, "source": a, "row": 7},
                                       {"query": "s", "response": "a", "source": "forum", "row": "x"}])
    run(tmp_path, "stats", "--data", tmp_path / "two/rows.jsonl", bad)
    sources = json.loads((tmp_path / "out/report.json").read_text())["sources"]
    assert {name: s["examples"] for name, s in sources.items()} == {a: 2, b: 3, bad: 1}
    assert sources[bad]["reasons"] == {"empty conversation": [1, f"{bad}:1"]}


def test_no_dead_flag():
    """Every flag of every command is read somewhere in data.py."""
    source = Path(data.__file__).read_text()
    for action in data.parser()._subparsers._group_actions[0].choices.values():
        for flag in (a.dest for a in action._actions if a.dest != "help"):
            assert f"args.{flag}" in source or f'getattr(args, "{flag}"' in source, flag
