"""data.py: every public source by a row of its published schema, its ratings on one scale, refusals, named mixes."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import data

U = lambda text: {"role": "user", "content": text}
A = lambda text: {"role": "assistant", "content": text}
S = lambda text: {"role": "system", "content": text}
SHARE = lambda *said: [{"from": w, "value": t} for w, t in said]

SFT = {
    "teknium/OpenHermes-2.5": (
        {"conversations": SHARE(("system", "be brief"), ("human", "q"), ("gpt", "a")), "source": "airoboros2.2",
         "category": "orca", "system_prompt": None, "hash": None, "language": None}, [S("be brief"), U("q"), A("a")]),
    "Open-Orca/SlimOrca-Dedup": (
        {"conversations": SHARE(("system", "s"), ("human", "q"), ("gpt", "a"))}, [S("s"), U("q"), A("a")]),
    "meta-math/MetaMathQA": (
        {"type": "MATH_AnsAug", "query": "q", "original_question": "o", "response": "a"}, [U("q"), A("a")]),
    "HuggingFaceH4/ultrachat_200k:train_sft": (
        {"prompt": "q", "prompt_id": "f0", "messages": [U("q"), A("a"), U("r"), A("b")]},
        [U("q"), A("a"), U("r"), A("b")]),
    "microsoft/orca-math-word-problems-200k": ({"question": "q", "answer": "a"}, [U("q"), A("a")]),
    "LDJnr/Capybara": (
        {"source": "Airoboros", "conversation": [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}]},
        [U("q"), A("a"), U("r"), A("b")]),
    "HuggingFaceH4/deita-10k-v0-sft:train_sft": (
        {"prompt": "q", "prompt_id": "f0", "messages": [U("q"), A("a")]}, [U("q"), A("a")]),
    "ise-uiuc/Magicoder-Evol-Instruct-110K": ({"instruction": "q", "response": "a"}, [U("q"), A("a")])}


def aspects(*ratings):
    return {k: {"Rating": r, "Rationale": "..."} for k, r in zip(data.ASPECTS, ratings) if r is not None}


def completion(text, *ratings, overall=10.0):
    return {"model": "m", "response": text, "annotations": aspects(*ratings), "overall_score": overall, "critique": ""}


HELPSTEER = dict(correctness=4, coherence=4, complexity=0, verbosity=0)
# source: (row, prompt, chosen, rejected, score of chosen, of rejected)
PAIRS = {
    "HuggingFaceH4/ultrafeedback_binarized:train_prefs": (
        {"prompt": "q", "prompt_id": "f0", "chosen": [U("q"), A("a")], "rejected": [U("q"), A("b")],
         "messages": [U("q"), A("a")], "score_chosen": 8.5, "score_rejected": 6.0}, [U("q")], "a", "b", 8.5, 6),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        {"source": "evol", "prompt": "q", "chosen": [U("q"), A("a")], "chosen-rating": 5.0, "chosen-model": "x",
         "rejected": [U("q"), A("b")], "rejected-rating": 3.0, "rejected-model": "y"}, [U("q")], "a", "b", 10, 5.5),
    "openbmb/UltraFeedback": (                              # means 4, 3 of 1..5: 1 + 9 * 3/4, 1 + 9 * 2/4; one unrated
        {"source": "evol", "instruction": "q", "models": ["m"] * 3, "correct_answers": ["None"], "completions": [
            completion("b", "3", "3", "3", "3"), completion("a", "5", "4", "4", "3"),
            completion("c", "5", "5", "5", "N/A")]},
        [U("q")], "a", "b", 7.75, 5.5),
    "Anthropic/hh-rlhf": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: c",
         "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: d"},
        [U("q"), A("a"), U("r")], "c", "d", None, None),
    "CarperAI/openai_summarize_comparisons": (
        {"prompt": "POST: p\nTL;DR:", "chosen": "TL;DR: a", "rejected": "TL;DR: b"}, [U("POST: p\nTL;DR:")], "TL;DR: a",
        "TL;DR: b", None, None),
    "openai/summarize_from_feedback": (
        {"info": {"id": "t3", "post": "p", "title": "t", "subreddit": "x", "site": None, "article": None}, "choice": 1,
         "summaries": [{"text": "b", "policy": "sup", "note": ""}, {"text": "a", "policy": "ppo", "note": ""}],
         "worker": "w", "batch": "b", "split": "train", "extra": {"confidence": 7}},
        [U("SUBREDDIT: r/x\nTITLE: t\nPOST: p\nTL;DR:")], "a", "b", None, None),
    "berkeley-nest/Nectar": (
        {"prompt": "\n\nHuman: q\n\nAssistant: ", "turns": 1, "num_responses": 2, "source": ["anthropic-hh"],
         "good_natured": True, "answers": [{"answer": "b", "model": "x", "rank": 2.0},
                                           {"answer": "a", "model": "y", "rank": 1.0}]},
        [U("q")], "a", "b", None, None),
    "nvidia/HelpSteer": (                                   # means 4 and 3 of 0..4: 10 and 1 + 9 * 3/4
        {"prompt": "q", "responses": [{"prompt": "q", "response": "b", "helpfulness": 1, **HELPSTEER},
                                      {"prompt": "q", "response": "a", "helpfulness": 4, **HELPSTEER}]},
        [U("q")], "a", "b", 10, 7.75),
    "PKU-Alignment/PKU-SafeRLHF": (
        {"prompt": "q", "response_0": "b", "response_1": "a", "is_response_0_safe": False, "is_response_1_safe": True,
         "better_response_id": 1, "safer_response_id": 1}, [U("q")], "a", "b", None, None),
    "jondurbin/py-dpo-v0.1": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "id": "7"}, [U("q")], "a", "b", None, None),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        {"source": "GOAT", "conversation": [{"input": "q", "output": "x"}, {"input": "r", "output": "y"}],
         "prompt": "q", "chosen": [U("q"), A("x"), U("r"), A("a")], "rejected": [U("q"), A("x"), U("r"), A("b")],
         "rating_chosen": 5, "rating_rejected": 2, "chosen_model": "m", "rejected_model": "n"},
        [U("q"), A("x"), U("r")], "a", "b", 10, 3.25),
    "Intel/orca_dpo_pairs": (
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, [S("s"), U("q")], "a", "b", None, None),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        {"system": "", "input": "q", "chosen": "a", "rejected": "b", "generations": ["b", "a"],
         "order": ["rejected", "chosen"], "rating": [7.0, 9.0], "status": "unchanged",
         "chosen_score": 9.0, "in_gsm8k_train": False},
        [U("q")], "a", "b", 9, 7)}


@pytest.mark.parametrize("name", SFT)
def test_sft_source(name):
    row, messages = SFT[name]
    assert data.to_conversation(row).messages == messages


@pytest.mark.parametrize("name", PAIRS)
def test_pair_source(name):
    row, *expected = PAIRS[name]
    pair = data.to_pair(row)
    assert [pair.prompt, pair.chosen, pair.rejected, pair.score_chosen, pair.score_rejected] == expected
    if "responses" not in row and "messages" not in row:
        c = data.to_conversation(row)                       # sft.py reads it as prompt + chosen
        assert c.messages == pair.prompt + [A(pair.chosen)] and c.last_only


def without(row, key):
    return {k: v for k, v in row.items() if k != key}


NEEDS = {"openbmb/UltraFeedback": ["instruction", "completions"],
         "openai/summarize_from_feedback": ["info", "summaries", "choice"],
         "berkeley-nest/Nectar": ["prompt", "answers"], "nvidia/HelpSteer": ["prompt", "responses"],
         "PKU-Alignment/PKU-SafeRLHF": ["prompt", "response_0", "response_1", "better_response_id",
                                        "safer_response_id"]}
READ = {"conversations", "conversation", "messages", "query", "response", "question", "answer", "instruction"}


@pytest.mark.parametrize("name, key", [(n, k) for n in PAIRS for k in NEEDS.get(n, ["chosen", "rejected"])])
@pytest.mark.parametrize("change", ["gone", "null"])
def test_pair_that_lacks_what_it_needs(name, key, change):
    row = PAIRS[name][0]
    with pytest.raises(ValueError):
        data.to_pair(without(row, key) if change == "gone" else {**row, key: None})


@pytest.mark.parametrize("name, key", [(n, k) for n, (row, _) in SFT.items() for k in sorted(READ & set(row))])
@pytest.mark.parametrize("change", ["gone", "null", "number"])
def test_conversation_that_lacks_what_it_needs(name, key, change):
    row = SFT[name][0]
    with pytest.raises(ValueError):
        data.to_conversation(without(row, key) if change == "gone" else {**row, key: None if change == "null" else 3})


@pytest.mark.parametrize("change, reason", [
    ({"completions": [completion("a", 5, 5, 5, 5)]}, "fewer than two rated"),
    ({"completions": [completion("a", 5, 5, 5, None), completion("b", 4, 4, 4, 4)]}, "fewer than two rated"),
    ({"completions": [completion("a", 4, 4, 4, 4), completion("b", 4, 4, 4, 4)]}, "ratings tie"),
    ({"completions": [completion("a", 6, 4, 4, 4), completion("b", 4, 4, 4, 4)]}, "no number of 1..5")])
def test_ultrafeedback_never_invents_a_rating(change, reason):
    with pytest.raises(ValueError, match=reason):
        data.to_pair({"instruction": "q", **change})


def test_a_missing_rating_stays_missing_and_a_wrong_one_is_refused():
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for missing in (None, "", float("nan"), "nan", "N/A"):
        assert data.to_pair({**row, "score_chosen": missing, "score_rejected": 3})[3:5] == (None, 3)
    assert data.to_pair({**row, "rating": [None, 8.0], "chosen_score": None})[3:5] == (None, None)
    for wrong in ("good", True, float("inf"), [4], {"x": 1}):
        with pytest.raises(ValueError, match="rating is no number"):
            data.to_pair({**row, "score_chosen": wrong, "score_rejected": 3})
    with pytest.raises(ValueError, match="no number of 1..5"):
        data.to_pair({**row, "chosen-rating": 0.5, "rejected-rating": 3})


@pytest.mark.parametrize("column, low, high", [(c, *s) for c, s in data.SCALES.items() if s])
def test_scales_reach_one_and_ten(column, low, high):
    assert [data.on_ten(x, column) for x in (low, (low + high) / 2, high, str(high))] == [1, 5.5, 10, 10]


def test_alpagasus_cut_on_the_one_scale():
    assert data.on_ten(4.5, "chosen-rating".replace("chosen", "{}")) == 8.875


def test_drawn_answer_hangs_on_the_prompt_alone():
    """Best 7 against one strictly worse; over many prompts every worse one is drawn; equals of the best never are."""
    rated = [(7, "best"), (7, "equal"), (3, "x"), (5, "y"), (None, "unrated")]
    drawn = {data.best_against_drawn(f"prompt {i}", rated)[1][1] for i in range(40)}
    assert drawn == {"x", "y"} and data.best_against_drawn("p", rated)[0] == (7, "best")
    assert data.best_against_drawn("p", rated) == data.best_against_drawn("p", rated)


def test_nectar_refuses_what_has_no_order():
    row = PAIRS["berkeley-nest/Nectar"][0]
    for ranks in ((1.0, 1.0), (None, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="tie|fewer than two"):
            data.to_pair({**row, "answers": [{"answer": a, "rank": r} for a, r in zip("ab", ranks)]})


def test_drawn_answer_is_another_and_no_empty_one():
    """An answer equal to the best or empty is never drawn, for that would lose the pair though another is there."""
    rated = [(7, "best"), (3, " best\n"), (3, ""), (4, " "), (5, None), (2, "x")]
    assert {data.best_against_drawn(f"prompt {i}", rated)[1] for i in range(40)} == {(2, "x")}
    with pytest.raises(ValueError, match="every worse answer is empty or equals the best"):
        data.best_against_drawn("p", rated[:4])
    row = PAIRS["openbmb/UltraFeedback"][0]
    lost = {**completion("d", 1, 1, 1, 1), "annotations": None}
    assert data.to_pair({**row, "completions": [lost, *row["completions"]]})[1:3] == ("a", "b")


def test_safety_pair_needs_both_verdicts_to_agree():
    with pytest.raises(ValueError, match="not the safer one"):
        data.to_pair({**PAIRS["PKU-Alignment/PKU-SafeRLHF"][0], "safer_response_id": 0})


# ------------------------------------------------------------------------------------------- mixes
def test_mixes_name_known_sources_and_the_release_fractions():
    read = {name: {s.name: s.fraction for s in data.parse_sources([name])} for name in data.MIXES}
    known = {data.parse_source(n).name for n in [*SFT, *PAIRS]}
    assert all(set(sources) <= known for sources in read.values())
    assert list(read) == ["lion-sft", "lion-sft-1.6m", "deita-10k", "lion-dpo-study", "lion-dpo-gemma",
                          "lion-dpo-llama"]
    assert set(read["lion-sft-1.6m"]) == {"teknium/OpenHermes-2.5", "meta-math/MetaMathQA",
                                          "HuggingFaceH4/ultrachat_200k"}
    gemma, llama = read["lion-dpo-gemma"], read["lion-dpo-llama"]
    assert {k.split("/")[1]: v for k, v in gemma.items() if v < 1} == {
        "PKU-SafeRLHF": 0.1, "openai_summarize_comparisons": 0.1, "Nectar": 0.25}
    assert {k.split("/")[1]: v for k, v in llama.items() if v < 1} == {"PKU-SafeRLHF": 0.1}
    assert len(gemma) == 8 and set(gemma) - set(llama) == {"CarperAI/openai_summarize_comparisons"}


def test_a_system_turn_beside_a_prompt_and_a_list():
    row = {"system": "s", "prompt": "q", "chosen": [A("a")], "rejected": [A("b")]}
    assert data.to_pair(row).prompt == [S("s"), U("q")] == data.to_conversation(row).messages[:2]


def test_unknown_columns_are_a_short_reason(chatml, tmp_path):
    a = write(tmp_path / "a.jsonl", [{"text": "x", "b": 1}, {"query": "q", "response": "a"}])
    made = data.prepare([a], *chatml, max_length=100, cache_dir=str(tmp_path / "cache"))
    assert made.stats["sources"][a]["reasons"] == {"unknown columns b, text": [1, f"{a}:1"]}


def test_csv_with_a_long_field(tmp_path):
    (tmp_path / "a.csv").write_text("query,response\nq," + "a" * 200_000 + "\n")
    (n, row), = data.load_source(data.Source(str(tmp_path / "a.csv")))
    assert len(row["response"]) == 200_000


def test_a_worker_that_dies_says_what_to_do(tmp_path):
    """Not a ValueError: the half-done work stays."""
    with pytest.raises(OSError, match="lower --num-proc; call again"):
        data.in_chunks(lambda start, stop, f: os._exit(9), 2 * data.CHUNK, tmp_path, "x", 2)


def test_fraction_of_a_mix_and_its_splits():
    made = data.parse_sources(["lion-dpo-gemma=0.5", "demo"])
    assert made[-1].name == "demo" and {s.name: s.fraction for s in made}["berkeley-nest/Nectar"] == 0.125
    with pytest.raises(ValueError, match="a mix names its own splits"):
        data.parse_sources(["lion-sft:test"])


# ----------------------------------------------------------------------------- whole files, refusals
def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture(scope="module")
def chatml():
    tokenizer = data.demo_tokenizer()
    return tokenizer, data.set_template(tokenizer, "chatml")


def test_refused_rows_are_counted_with_source_row_and_reason(chatml, tmp_path):
    """A row of other columns, one with a tie, one without its answers: each named by its line; the rest stays."""
    good = PAIRS["openbmb/UltraFeedback"][0]
    tie = {"instruction": "q", "completions": [completion("a", 4, 4, 4, 4), completion("b", 4, 4, 4, 4)]}
    a = write(tmp_path / "a.jsonl", [{"text": "unknown"}, good, tie, {**good, "completions": None}])
    made = data.prepare([a], *chatml, max_length=100, cache_dir=str(tmp_path / "cache"), pairs=True)
    reasons = made.stats["sources"][a]["reasons"]
    assert sorted(where for _, where in reasons.values()) == [f"{a}:1", f"{a}:3", f"{a}:4"]
    assert reasons["all ratings tie"] == [1, f"{a}:3"] and made.stats["total"]["refused"] == 3
    assert made.dataset["score_chosen"][:] == [7.75] and "all ratings tie" in data.stats_table(made.stats)


def test_helpsteer_rows_of_a_prompt_make_one_pair_wherever_they_stand(chatml, tmp_path):
    row = lambda prompt, text, h: {"prompt": prompt, "response": text, "helpfulness": h, **HELPSTEER}
    rows = [row("q", "b", 1), row("r", "c", 2), row("q", "a", 4), row("s", "d", 0), row("r", "e", 2)]
    a = write(tmp_path / "a.jsonl", rows)
    made = data.prepare([a], *chatml, max_length=100, cache_dir=str(tmp_path / "cache"), pairs=True)
    assert [json.loads(x) for x in made.dataset["messages_json"]] == [[[U("q")], "a", "b", []]]
    assert made.stats["sources"][a]["reasons"] == {"all ratings tie": [1, f"{a}:2"],
                                                   "fewer than two rated answers": [1, f"{a}:4"]}
    assert len(data.prepare([a], *chatml, max_length=100, cache_dir=str(tmp_path / "cache")).dataset) == 5


def test_text_that_is_no_unicode_is_refused(chatml, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"query": "\\ud800", "response": "a"}\n{"query": "q", "response": "a"}\n'
                                      '{"messages": [{"role": "user", "content": "r"}, {"role": "assistant", '
                                      '"content": "a"}], "answer": "\\ud800"}\n')
    made = data.prepare([str(tmp_path / "a.jsonl")], *chatml, max_length=100, cache_dir=str(tmp_path / "cache"))
    assert len(made.dataset) == 1 and list(made.stats["sources"].values())[0]["reasons"] == {
        "text is not valid Unicode": [2, f"{tmp_path}/a.jsonl:1"]}


def test_canonical_text():
    """A composed and a decomposed e-acute and white space at the ends are the same; a superscript, case, indentation are not."""
    assert data.canonical("\n caf\u00e9 au lait ") == data.canonical("cafe\u0301 au lait") == "caf\u00e9 au lait"
    assert data.canonical("if a:\n  b\nc") != data.canonical("if a:\n  b\n  c")              # code
    assert data.canonical("x\u00b2") != data.canonical("x2") and data.canonical("A") != data.canonical("a")


def test_same_rows_whatever_the_hash_seed_and_the_processes(chatml, tmp_path):
    """12,000 rows with duplicates: three chunks by one process, by two, and in a process with another hash seed."""
    rows = [{"query": f"q {i % 11200}", "response": "a" if i % 7 else "<|im_end|>"} for i in range(12000)]
    a = write(tmp_path / "a.jsonl", rows)
    script = ("import sys, json; sys.path.insert(0, sys.argv[1]); import data; t = data.demo_tokenizer();"
              "m = data.prepare([sys.argv[2]], t, data.set_template(t), max_length=64, cache_dir=sys.argv[3],"
              "num_proc=int(sys.argv[4]), max_examples=6000, empty_system=0.5);"
              "print(json.dumps([m.dataset['row'][:], m.dataset['length'][:], m.stats['total']]))")
    seen = {subprocess.run([sys.executable, "-c", script, str(Path(data.__file__).parent), a,
                            str(tmp_path / f"c{n}{seed}"), str(n)], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": seed}).stdout
            for n, seed in ((1, "1"), (2, "2"))}
    rows, lengths, total = json.loads(seen.pop())
    assert not seen and len(rows) == 6000 and total["duplicates"] == 800
    assert total["refused"] > 0 and all(r % 7 != 1 for r in rows)
    assert rows[:100] == list(data.prepare([a], *chatml, max_length=64, cache_dir=str(tmp_path / "c"), max_examples=100,
                                           empty_system=0.5).dataset["row"])


def test_kill_in_the_middle_continues(tmp_path):
    """SIGKILL once some chunks are there; the same call goes on without computing them again, to the same rows."""
    a = write(tmp_path / "a.jsonl", [{"query": f"q {i}", "response": "word " * 30} for i in range(6000)])
    script = ("import sys; sys.path.insert(0, sys.argv[1]); import data; t = data.demo_tokenizer(); data.CHUNK = 500;"
              "m = data.prepare([sys.argv[2]], t, data.set_template(t), max_length=512, cache_dir=sys.argv[3],"
              "num_proc=2);"
              "print(m.dataset['row'][:])")
    command = [sys.executable, "-c", script, str(Path(data.__file__).parent), a]
    p = subprocess.Popen([*command, str(tmp_path / "c")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    chunks = lambda: {f.name: f.stat().st_mtime_ns for f in tmp_path.glob("c/*.writing/encode-*-*0")
                      if "." not in f.name}             # whole ones
    while not chunks() and p.poll() is None:
        time.sleep(0.02)
    p.send_signal(signal.SIGKILL)
    p.wait()
    first = chunks()
    done = subprocess.Popen([*command, str(tmp_path / "c")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while done.poll() is None and len(chunks()) <= len(first):
        time.sleep(0.02)
    later = chunks()
    out, err = done.communicate()
    assert done.returncode == 0, err
    assert first and (not later or first.items() <= later.items())
    assert out == subprocess.run([*command, str(tmp_path / "d")], capture_output=True, text=True, check=True).stdout
    assert not list(tmp_path.glob("c/*.writing"))


def test_convert_continues_behind_a_torn_record(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"query": f"q {i}", "response": "a"} for i in range(50)])
    parsed = data.parse_sources([a])
    x, y = tmp_path / "x", tmp_path / "y"
    x.mkdir(), y.mkdir()
    with_all = data.convert(parsed, False, 42, x)
    torn = int(with_all.index["end"][24]) - 3
    (y / "index.bin").write_bytes((x / "index.bin").read_bytes()[:20 * data.INDEX.itemsize + 5])
    (y / "rows.jsonl").write_bytes((x / "rows.jsonl").read_bytes()[:torn])
    again = data.convert(parsed, False, 42, y)
    assert again.path.read_bytes() == with_all.path.read_bytes() and again.index.tobytes() == with_all.index.tobytes()


def test_first_of_equal():
    keys = np.array([b"b" * 16, b"a" * 16, b"b" * 16, b"a" * 16, b"c" * 16, b"a" * 15 + b"\0"], dtype="V16")
    assert data.first_of_equal(keys).tolist() == [0, 1, 0, 1, 4, 5]
    assert data.first_of_equal(keys[:0]).tolist() == []
