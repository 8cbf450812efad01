"""data.py: each public source by a row of its published schema, ratings, mixes, whole files."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data
from data import assistant, user
from test_data import SYSTEM, chatml, numbered, prepare, source     # noqa: F401 (fixtures)


def share_gpt(*turns):
    return [{"from": who, "value": text} for who, text in turns]


QA = data.ask("q", "a")
QB = data.ask("q", "b")
RB = data.ask("r", "b")
SFT = {  # source: (row, messages)
    "teknium/OpenHermes-2.5": (
        {"conversations": share_gpt(("system", "be brief"), ("human", "q"), ("gpt", "a")),
         "source": "airoboros2.2", "category": "orca", "system_prompt": None, "hash": None,
         "language": None}, SYSTEM + QA),
    "Open-Orca/SlimOrca-Dedup": (
        {"conversations": share_gpt(("system", "be brief"), ("human", "q"), ("gpt", "a"))},
        SYSTEM + QA),
    "meta-math/MetaMathQA": (
        {"type": "MATH_AnsAug", "query": "q", "original_question": "o", "response": "a"}, QA),
    "HuggingFaceH4/ultrachat_200k:train_sft": (
        {"prompt": "q", "prompt_id": "f0", "messages": QA + RB}, QA + RB),
    "microsoft/orca-math-word-problems-200k": ({"question": "q", "answer": "a"}, QA),
    "LDJnr/Capybara": (
        {"source": "Airoboros", "conversation": [{"input": "q", "output": "a"},
                                                 {"input": "r", "output": "b"}]}, QA + RB),
    "HuggingFaceH4/deita-10k-v0-sft:train_sft": (
        {"prompt": "q", "prompt_id": "f0", "messages": QA}, QA),
    "ise-uiuc/Magicoder-Evol-Instruct-110K": ({"instruction": "q", "response": "a"}, QA)}


def completion(text, *ratings):
    """UltraFeedback's. Its overall_score holds 10s meant as 1s, and is not read."""
    aspects = {name: {"Rating": rating, "Rationale": "..."}
               for name, rating in zip(data.ASPECTS, ratings)}
    return {"model": "m", "response": text, "annotations": aspects, "overall_score": 10.0,
            "critique": ""}


def helpsteer(prompt, text, helpfulness):
    return {"prompt": prompt, "response": text, "helpfulness": helpfulness, "correctness": 4,
            "coherence": 4, "complexity": 0, "verbosity": 0}


HISTORY = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: "
A_OVER_B = QA[:1], "a", "b"
PAIRS = {  # source: (row, prompt, chosen, rejected, score of chosen, of rejected)
    "HuggingFaceH4/ultrafeedback_binarized:train_prefs": (
        {"prompt": "q", "prompt_id": "f0", "chosen": QA, "rejected": QB,
         "messages": QA, "score_chosen": 8.5, "score_rejected": 6.0},
        *A_OVER_B, 8.5, 6),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        {"source": "evol", "prompt": "q", "chosen": QA, "chosen-rating": 5.0, "chosen-model": "x",
         "rejected": QB, "rejected-rating": 3.0, "rejected-model": "y"},
        *A_OVER_B, 10, 5.5),
    "openbmb/UltraFeedback": (              # means 4 and 3 of 1..5: 1 + 9 * 3/4, 1 + 9 * 2/4
        {"source": "evol", "instruction": "q", "models": ["m"] * 3, "correct_answers": ["None"],
         "completions": [completion("b", "3", "3", "3", "3"), completion("a", "5", "4", "4", "3"),
                         completion("unrated", "5", "5", "5", "N/A"),
                         {"response": "unrated", "annotations": None}]},
        *A_OVER_B, 7.75, 5.5),
    "Anthropic/hh-rlhf": (
        {"chosen": HISTORY + "c", "rejected": HISTORY + "d"},
        [*QA, user("r")], "c", "d", None, None),
    "CarperAI/openai_summarize_comparisons": (
        {"prompt": "POST: p\nTL;DR:", "chosen": "TL;DR: a", "rejected": "TL;DR: b"},
        [user("POST: p\nTL;DR:")], "TL;DR: a", "TL;DR: b", None, None),
    "openai/summarize_from_feedback": (
        {"info": {"id": "t3", "post": "p", "title": "t", "subreddit": "x", "site": None,
                  "article": None},
         "summaries": [{"text": "b", "policy": "sup", "note": ""},
                       {"text": "a", "policy": "ppo", "note": ""}],
         "choice": 1, "worker": "w", "batch": "b", "split": "train", "extra": {"confidence": 7}},
        [user("SUBREDDIT: r/x\nTITLE: t\nPOST: p\nTL;DR:")], "a", "b", None, None),
    "berkeley-nest/Nectar": (
        {"prompt": "\n\nHuman: q\n\nAssistant: ", "turns": 1, "num_responses": 2,
         "answers": [{"answer": "b", "model": "x", "rank": 2.0},
                     {"answer": "a", "model": "y", "rank": 1.0}],
         "source": ["anthropic-hh"], "good_natured": True},
        *A_OVER_B, None, None),
    "nvidia/HelpSteer": (                   # means 4 and 3 of 0..4: 10 and 1 + 9 * 3/4
        {"prompt": "q", "responses": [helpsteer("q", "b", 1), helpsteer("q", "a", 4)]},
        *A_OVER_B, 10, 7.75),
    "PKU-Alignment/PKU-SafeRLHF": (
        {"prompt": "q", "response_0": "b", "response_1": "a", "is_response_0_safe": False,
         "is_response_1_safe": True, "better_response_id": 1, "safer_response_id": 1},
        *A_OVER_B, None, None),
    "jondurbin/py-dpo-v0.1": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "id": "7"},
        *A_OVER_B, None, None),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        {"source": "GOAT", "conversation": [{"input": "q", "output": "a"},
                                            {"input": "r", "output": "y"}],
         "prompt": "q", "chosen": [*QA, user("r"), assistant("c")],
         "rejected": [*QA, user("r"), assistant("d")], "rating_chosen": 5, "rating_rejected": 2,
         "chosen_model": "m", "rejected_model": "n"},
        [*QA, user("r")], "c", "d", 10, 3.25),
    "Intel/orca_dpo_pairs": (
        {"system": "be brief", "question": "q", "chosen": "a", "rejected": "b"},
        [*SYSTEM, user("q")], "a", "b", None, None),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        {"system": "", "input": "q", "chosen": "a", "rejected": "b", "generations": ["b", "a"],
         "order": ["rejected", "chosen"], "rating": [7.0, 9.0], "status": "unchanged",
         "chosen_score": 9.0, "in_gsm8k_train": False},
        *A_OVER_B, 9, 7)}


@pytest.mark.parametrize("name", SFT)
def test_sft_source(name):
    row, messages = SFT[name]
    assert data.to_conversation(row).messages == messages


@pytest.mark.parametrize("name", PAIRS)
def test_pair_source(name):
    """sft.py reads a pair as prompt + chosen, where the row is no conversation by itself."""
    row, *expected = PAIRS[name]
    pair = data.to_pair(row)
    assert [*pair[:5]] == expected
    if "messages" not in row:
        conversation = data.to_conversation(row)
        assert conversation.messages == pair.prompt + [assistant(pair.chosen)]
        assert conversation.last_only


NEEDED = {
    "openbmb/UltraFeedback": ["instruction", "completions"],
    "openai/summarize_from_feedback": ["info", "summaries", "choice"],
    "berkeley-nest/Nectar": ["prompt", "answers"], "nvidia/HelpSteer": ["prompt", "responses"],
    "PKU-Alignment/PKU-SafeRLHF": ["prompt", "response_0", "response_1", "better_response_id",
                                   "safer_response_id"]}


@pytest.mark.parametrize("name", PAIRS)
def test_pair_that_lacks_what_it_needs(name):
    row = PAIRS[name][0]
    for column in NEEDED.get(name, ["chosen", "rejected"]):
        without = {k: v for k, v in row.items() if k != column}
        for damaged in (without, row | {column: None}):
            with pytest.raises(ValueError):
                data.to_pair(damaged)


@pytest.mark.parametrize("name", SFT)
def test_conversation_that_lacks_what_it_needs(name):
    row = SFT[name][0]
    for column in {"conversations", "conversation", "messages", "query", "response", "question",
                   "answer", "instruction"} & set(row):
        without = {k: v for k, v in row.items() if k != column}
        for damaged in (without, row | {column: None}, row | {column: 3}):
            with pytest.raises(ValueError):
                data.to_conversation(damaged)


# ---------------------------------------------------------------------------------------- ratings
@pytest.mark.parametrize("ratings, reason", [
    ([5, 5, 5, None], "fewer than two rated"), ([6, 4, 4, 4], "fewer than two rated"),
    ([4, 4, 4, 4], "ratings tie")])
def test_ultrafeedback_never_invents_a_rating(ratings, reason):
    completions = [completion("a", *ratings), completion("b", 4, 4, 4, 4)]
    with pytest.raises(ValueError, match=reason):
        data.to_pair({"instruction": "q", "completions": completions})


@pytest.mark.parametrize("value", [None, "", float("nan"), "nan", "N/A", "good", True, [4], {},
                                   float("inf"), 0.5, -14.5, 12])
def test_what_is_no_rating_of_1_to_10_is_unrated(value):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": value,
           "score_rejected": 3}
    assert data.to_pair(row)[3:5] == (None, 3)


def test_a_missing_rating_of_an_unordered_list():
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert data.to_pair(row | {"rating": [None, 8.0], "chosen_score": 8.0})[3:5] == (None, None)


def test_scales_reach_one_and_ten():
    """AlpaGasus' cut of 4.5 of 5 is 8.875 of 10."""
    for low, high in ((1, 10), (1, 5), (0, 4)):
        values = low, (low + high) / 2, high, str(high)
        assert [data.on_ten(value, low, high) for value in values] == [1, 5.5, 10, 10]
    assert data.on_ten(4.5, *data.SCALES["{}-rating"]) == 8.875


def test_drawn_answer_depends_on_the_prompt_alone():
    """The best, 7, against one strictly worse. Over many prompts each worse one is drawn, but none
    that is unrated, empty or equal to the best: that would lose the pair."""
    rated = [(7, "best"), (7, "equal"), (3, " best\n"), (3, ""), (4, " "), (5, None), (2, "x"),
             (5, "y"), (None, "unrated")]
    drawn = set()
    for i in range(40):
        row = {"prompt": f"prompt {i}"}
        pair = data.best_against_drawn(row, rated)
        assert pair.chosen == "best"
        assert pair == data.best_against_drawn(row | {"id": i}, rated)
        drawn.add(pair.rejected)
    assert drawn == {"x", "y"}
    with pytest.raises(ValueError, match="every worse answer is empty or equals the best"):
        data.best_against_drawn({"prompt": "p"}, rated[:6])


@pytest.mark.parametrize("rank", [1.0, None, float("nan")])
def test_nectar_refuses_what_has_no_order(rank):
    answers = [{"answer": "a", "rank": rank}, {"answer": "b", "rank": 1.0}]
    with pytest.raises(ValueError, match="tie|fewer than two"):
        data.to_pair({"prompt": "q", "answers": answers})


def test_safety_pair_needs_both_verdicts_to_agree():
    with pytest.raises(ValueError, match="not the safer one"):
        data.to_pair(PAIRS["PKU-Alignment/PKU-SafeRLHF"][0] | {"safer_response_id": 0})


# ------------------------------------------------------------------------------------------ mixes
def test_mixes_name_known_sources_and_the_release_fractions():
    mixes = {name: {source.name.split("/")[1]: source.fraction
                    for source in data.parse_sources([name])} for name in data.MIXES}
    known = {data.parse_source(name).name.split("/")[1] for name in [*SFT, *PAIRS]}
    assert set().union(*mixes.values()) <= known
    assert list(mixes) == ["lion-sft", "lion-sft-1.6m", "deita-10k", "lion-dpo-study",
                           "lion-dpo-gemma", "lion-dpo-llama"]
    assert set(mixes["lion-sft-1.6m"]) == {"OpenHermes-2.5", "MetaMathQA", "ultrachat_200k"}
    gemma = mixes["lion-dpo-gemma"]
    llama = mixes["lion-dpo-llama"]
    assert len(gemma) == 8
    assert set(gemma) - set(llama) == {"openai_summarize_comparisons"}
    parts = {name: share for name, share in (gemma | llama).items() if share < 1}
    assert parts == {"PKU-SafeRLHF": 0.1, "openai_summarize_comparisons": 0.1}
    assert gemma["Nectar"] == 0.25


def test_fraction_of_a_mix_and_its_splits():
    *mix, demo = data.parse_sources(["lion-dpo-gemma=0.5", "demo"])
    assert demo.name == "demo"
    assert {source.name: source.fraction for source in mix}["berkeley-nest/Nectar"] == 0.125
    with pytest.raises(ValueError, match="--data lion-sft:test: a mix names its own splits"):
        data.parse_sources(["lion-sft:test"])


# ------------------------------------------------------------------------------------ whole files
def test_fractions_are_seeded(prepare, source):
    name = f"{source(numbered(40))}=0.5"
    half, same, other = ({*prepare(name, seed=seed).dataset["row"]} for seed in (1, 1, 2))
    assert len(half) == len(other) == 20
    assert half == same != other


def test_only_newlines_end_a_row(prepare, tmp_path):
    """A byte order mark, Windows' line ends and the separators that str.splitlines knows."""
    text = '\ufeff{"query": "q\u2028\u0085r", "response": "a"}\r\n\r\n'
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    messages, = prepare(str(tmp_path / "a.jsonl")).dataset["messages_json"]
    assert json.loads(messages) == data.ask("q\u2028\u0085r", "a")


def test_refused_rows_are_counted_with_source_row_and_reason(prepare, source):
    """A row of other columns, one with a tie, one without its answers."""
    good = PAIRS["openbmb/UltraFeedback"][0]
    tie = good | {"completions": [completion("a", 4, 4, 4, 4), completion("b", 4, 4, 4, 4)]}
    a = source([{"text": "x", "b": 1}, good, tie, good | {"completions": None}])
    dataset, stats, _ = prepare(a, pairs=True)
    assert f"{a}:3: all ratings tie (1 such rows)" in data.stats_table(stats)
    reasons = stats["sources"][a]["reasons"]
    assert reasons.pop("unknown columns b, text") == [1, f"{a}:1"]
    assert reasons.pop("all ratings tie") == [1, f"{a}:3"]
    assert [*reasons.values()] == [[1, f"{a}:4"]]
    assert dataset["score_chosen"][:] == [7.75]


def test_helpsteer_rows_of_a_prompt_make_one_pair(prepare, source):
    """Rows of one prompt meet wherever they are, and the pair has the line of the first. Blank
    lines and rows of other columns stay as they are."""
    a = source([helpsteer("q", "b", 1), helpsteer("r", "c", 2), helpsteer("q", "a", 4),
                helpsteer("s", "d", 0), helpsteer("r", "e", 2)])
    with open(a, "a") as f:
        f.write('\n{"text": "x"}\n')
    dataset, stats, _ = prepare(a, pairs=True)
    assert dataset["row"][:] == [1]
    assert json.loads(dataset["messages_json"][0]) == [*A_OVER_B, []]
    reasons = stats["sources"][a]["reasons"]
    assert reasons.pop("all ratings tie") == [1, f"{a}:2"]
    assert reasons.pop("fewer than two rated answers") == [1, f"{a}:4"]
    assert [*reasons.values()] == [[1, f"{a}:7"]]
    assert len(prepare(a).dataset) == 5


def test_text_that_is_no_unicode_is_refused(prepare, source):
    a = source([{"query": "\ud800", "response": "a"}, {"query": "q", "response": "a"},
                {"messages": RB, "answer": "\ud800"}])
    dataset, stats, _ = prepare(a)
    assert dataset["row"][:] == [2]
    assert stats["sources"][a]["reasons"] == {"text is not valid Unicode": [2, f"{a}:1"]}


def test_canonical_text():
    """A composed and a decomposed e-acute and white space at the ends are the same. A superscript,
    case and indentation (code) are not."""
    assert data.canonical("\n caf\u00e9 ") == data.canonical("cafe\u0301") == "caf\u00e9"
    for a, b in (("if a:\n  b\nc", "if a:\n  b\n  c"), ("x\u00b2", "x2"), ("A", "a")):
        assert data.canonical(a) != data.canonical(b)


def prepare_apart(file, **settings):
    """The command of a preparation in a process of its own."""
    script = """if __name__ == "__main__":
    import json, sys
    sys.path.insert(0, sys.argv[1])
    import data
    tokenizer = data.demo_tokenizer()
    template, settings = data.set_template(tokenizer), json.loads(sys.argv[3])
    prepared = data.prepare([sys.argv[2]], tokenizer, template, **settings)
    print(json.dumps([prepared.dataset["row"][:], prepared.stats["total"]]))"""
    folder = str(Path(data.__file__).parent)
    return [sys.executable, "-c", script, folder, file, json.dumps(settings)]


def test_same_rows_whatever_the_hash_seed_and_the_processes(prepare, source, tmp_path):
    """12,000 rows, 800 of them duplicates and a seventh refused, by one process and by two."""
    answers = ["<|im_end|>", "a", "a", "a", "a", "a", "a"] * 1715
    a = source([{"query": f"q {i % 11200}", "response": answers[i]} for i in range(12000)])
    settings = dict(max_length=64, empty_system=0.5)
    outputs = set()
    for n in (1, 2):
        command = prepare_apart(a, max_examples=6000, num_proc=n, cache_dir=str(tmp_path / str(n)),
                                **settings)
        environment = os.environ | {"PYTHONHASHSEED": str(n)}
        outputs.add(subprocess.check_output(command, env=environment))
    rows, total = json.loads(outputs.pop())
    assert not outputs
    assert len(rows) == 6000
    assert total["refused"] > 1400
    assert all(row % 7 != 1 for row in rows)
    assert rows[:100] == prepare(a, max_examples=100, **settings).dataset["row"][:]


def test_killed_preparation_continues(prepare, source, tmp_path):
    """SIGKILL to the whole session while rows are encoded: finished shards stay, and the rows are
    those of an uninterrupted call. So does one shard of two if the other is missing."""
    a = source([{"query": f"q {i}", "response": "a " * 50} for i in range(4000)])
    cache = tmp_path / "killed"
    settings = dict(max_length=200, num_proc=2, cache_dir=str(cache))
    killed = subprocess.Popen(prepare_apart(a, **settings), start_new_session=True)
    while killed.poll() is None and not list(cache.glob("encoded/tmp*")):
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL

    whole = prepare(a, max_length=200, num_proc=1).dataset
    for missing in ("none", "encoded/*_00000_of_00002.arrow"):
        for path in cache.glob(missing):
            path.unlink()
        finished = {path: path.stat().st_mtime_ns for path in cache.glob("*/*_of_*.arrow")}
        again = prepare(a, **settings).dataset
        assert again["row"][:] == whole["row"][:]
        assert again["input_ids"][:] == whole["input_ids"][:]
        assert len(finished) >= 2
        assert all(path.stat().st_mtime_ns == since for path, since in finished.items())


def test_first_of_equal():
    assert data.first_of_equal([*"babac"]).tolist() == [0, 1, 0, 1, 4]
    assert data.first_of_equal([]).tolist() == []
