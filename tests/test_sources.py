"""data.py: each public source by a row of its published schema, ratings, mixes, whole files."""
import gzip
import hashlib
import json
import os
import re
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
    "ise-uiuc/Magicoder-Evol-Instruct-110K": ({"instruction": "q", "response": "a"}, QA),
    # popular sources that no mix names
    "tatsu-lab/alpaca": (
        {"instruction": "q", "input": "i", "output": "a", "text": "Below is .."},
        data.ask("q\n\ni", "a")),
    "databricks/databricks-dolly-15k": (
        {"instruction": "Who built it?", "context": "Ida built the mill.", "response": "Ida",
         "category": "closed_qa"}, data.ask("Who built it?\n\nIda built the mill.", "Ida")),
    "Open-Orca/OpenOrca": (
        {"id": "flan.1", "system_prompt": "be brief", "question": "q", "response": "a"},
        SYSTEM + QA),
    "allenai/WildChat-1M": (
        {"conversation_hash": "f0", "model": "gpt-4", "timestamp": None, "turn": 1,
         "conversation": [m | {"toxic": False, "language": "English"} for m in QA]}, QA),
    "lmsys/lmsys-chat-1m": (
        {"conversation_id": "f0", "model": "vicuna", "conversation": QA, "redacted": False}, QA),
    "HuggingFaceH4/no_robots": (
        {"prompt": "q", "prompt_id": "f0", "messages": SYSTEM + QA, "category": "Chat"},
        SYSTEM + QA),
    "allenai/tulu-3-sft-mixture": ({"id": "f0", "messages": QA, "source": "ai2"}, QA),
    "Magpie-Align/Magpie-Pro-300K-Filtered": (
        {"uuid": "f0", "instruction": "q", "response": "a",
         "conversations": share_gpt(("human", "q"), ("gpt", "a"))}, QA),
    "openai/gsm8k:main:train": ({"question": "q", "answer": "a"}, QA),
    "TIGER-Lab/MathInstruct": ({"source": "CoT", "instruction": "q", "output": "a"}, QA),
    "hiyouga/glaive-alike-history": (
        {"instruction": "r", "input": "", "output": "b", "history": [["q", "a"]],
         "system": "be brief"}, SYSTEM + QA + RB),
    "trl-internal-testing/zen:conversational_prompt_completion:train": (
        {"prompt": QA[:1], "completion": QA[1:]}, QA)}


def completion(text, *ratings):
    """UltraFeedback's. Its overall_score holds 10s meant as 1s, and is not read."""
    aspects = {name: {"Rating": rating, "Rationale": "..."}
               for name, rating in zip(data.ASPECTS, ratings)}
    return {"model": "m", "response": text, "annotations": aspects, "overall_score": 10.0,
            "critique": ""}


def helpsteer(prompt, text, helpfulness):
    return {"prompt": prompt, "response": text, "helpfulness": helpfulness, "correctness": 4,
            "coherence": 4, "complexity": 0, "verbosity": 0}


def authors(prompt, chosen, rejected, *scores):
    """The schema of all the authors' copies on the Hub."""
    return {"prompt": prompt[0]["content"], "prompt_id": "f0", "other_info": {},
            "chosen": [*prompt, assistant(chosen)], "rejected": [*prompt, assistant(rejected)],
            "messages": [*prompt, assistant(chosen)], "score_chosen": scores[0],
            "score_rejected": scores[1]}


POST = "SUBREDDIT: r/x\nTITLE: t\nPOST: p\nTL;DR:"
EXTRA = "q\n<extra_id_1>Assistant\na\n<extra_id_1>User\nr"
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
    **{f"{data.AUTHORS}{name}": (authors(QA[:1], "a", "b", 8.5, 6), *A_OVER_B, 8.5, 6)
       for name in ("UltraFeedback_binarized", "distilabel-intel-orca-dpo-pairs_cleaned",
                    "py-dpo-v0.1", "HelpSteer", "PKU-SafeRLHF", "Nectar")},
    **{f"{data.AUTHORS}{name}": (
        authors([*QA, user("r")], "c", "d", 10, 1), [*QA, user("r")], "c", "d", 10, 1)
       for name in ("distilabel-capybara-dpo-7k-binarized", "hh-rlhf")},
    f"{data.AUTHORS}tldr-summarisation-preferences": (
        authors([user(POST)], "a", "b", None, None), [user(POST)], "a", "b", None, None),
    # means 4 and 3 of 1..5: 1 + 9 * 3/4, 1 + 9 * 2/4
    "openbmb/UltraFeedback": (
        {"source": "evol", "instruction": "q", "models": ["m"] * 3, "correct_answers": ["None"],
         "completions": [completion("b", "3", "3", "3", "3"), completion("a", "5", "4", "4", "3"),
                         completion("unrated", "N/A", "N/A", "N/A", "N/A"),
                         {"response": "unrated", "annotations": None}]},
        *A_OVER_B, 7.75, 5.5),
    "Anthropic/hh-rlhf": (
        {"chosen": HISTORY + "c", "rejected": HISTORY + "d"},
        [*QA, user("r")], "c", "d", None, None),
    "CarperAI/openai_summarize_comparisons": (
        {"prompt": POST[:-7], "chosen": "TL;DR: a", "rejected": "TL;DR: b"},
        [user(POST)], "a", "b", None, None),
    "openai/summarize_from_feedback": (
        {"info": {"id": "t3", "post": "p ", "title": "t", "subreddit": "x", "site": None,
                  "article": None},
         "summaries": [{"text": " b", "policy": "sup", "note": ""},
                       {"text": " a", "policy": "ppo", "note": ""}],
         "choice": 1, "worker": "w", "batch": "b", "split": "train", "extra": {"confidence": 7}},
        [user(POST)], "a", "b", None, None),
    "trl-lib/tldr-preference": (
        {"prompt": POST, "chosen": " a", "rejected": " b"},
        [user(POST)], "a", "b", None, None),
    "trl-lib/ultrafeedback_binarized": (
        {"chosen": QA, "rejected": QB, "score_chosen": 9.0, "score_rejected": 5.5},
        *A_OVER_B, 9, 5.5),
    "trl-lib/hh-rlhf-helpful-base": (
        {"prompt": [*QA, user("r")], "chosen": [assistant("c")], "rejected": [assistant("d")]},
        [*QA, user("r")], "c", "d", None, None),
    "argilla/dpo-mix-7k": (                 # of 1..5, and of 1..10 if one is above 5
        {"dataset": "argilla/..", "chosen": QA, "rejected": QB, "chosen_rating": 5.0,
         "rejected_rating": 3.0}, *A_OVER_B, 10, 5.5),
    "argilla/dpo-mix-7k, its Orca rows": (
        {"dataset": "argilla/..", "chosen": QA, "rejected": QB, "chosen_rating": 9,
         "rejected_rating": 4}, *A_OVER_B, 9, 4),
    "Skywork/Skywork-Reward-Preference-80K-v0.2": (
        {"chosen": QA, "rejected": QB, "source": "magpie"}, *A_OVER_B, None, None),
    "nvidia/HelpSteer2": (
        {"prompt": EXTRA, "responses": [helpsteer(EXTRA, "d", 0), helpsteer(EXTRA, "c", 4)]},
        [*QA, user("r")], "c", "d", 10, 7),
    "nvidia/HelpSteer2, preference": (
        {"split": "train", "prompt": EXTRA, "response_1": "d", "response_2": "c",
         "preference_strength": 1, "preference_statement": ".."},
        [*QA, user("r")], "c", "d", None, None),
    "nvidia/HelpSteer3:preference:train": (
        {"domain": "general", "language": "english", "context": [*QA, user("r")],
         "response1": "c", "response2": "d", "overall_preference": -2},
        [*QA, user("r")], "c", "d", None, None),
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


STRENGTHS = {"HelpSteer2, preference": ["prompt", "response_1", "response_2"],
             "HelpSteer3:preference:train": ["context", "response1", "response2"]}
NEEDED = {
    **{f"nvidia/{name}": columns for name, columns in STRENGTHS.items()},
    "nvidia/HelpSteer2": ["prompt", "responses"],
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


@pytest.mark.parametrize("name", [*SFT][:8])
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
    (["N/A"] * 4, "fewer than two rated"),
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
    assert data.on_ten(4.5, 1, 5) == 8.875


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


def test_nectar_draws_among_the_bottom_three():
    answers = [{"answer": str(rank), "rank": float(rank)} for rank in (4, 1, 7, 2, 6, 3, 5)]
    pairs = [data.to_pair({"prompt": f"q {i}", "answers": answers}) for i in range(60)]
    assert {pair.chosen for pair in pairs} == {"1"}
    assert {pair.rejected for pair in pairs} == {"5", "6", "7"}


def test_an_aspect_that_is_not_applicable_is_left_out_of_the_mean():
    """Means 5 and 2 of 1..5: 10 and 1 + 9 / 4."""
    completions = [completion("b", 2, "N/A", 2, 2), completion("a", 5, "N/A", 5, 5)]
    pair = data.to_pair({"instruction": "q", "completions": completions})
    assert pair[1:5] == ("a", "b", 10, 3.25)


@pytest.mark.parametrize("scores, expected", [
    ([(10, 1)] * 3, [None] * 3), ([(10, 1), (None, None)], [None] * 2),
    ([(10, 1), (9, 1)], [10, 9]),
    ([(10.0, 1.0), (10, 2)], [10, 10])])
def test_placeholder_scores_are_no_ratings(scores, expected, prepare, source, capsys):
    rows = [authors([user(f"q {i}")], "a", "b", *both) for i, both in enumerate(scores)]
    dataset, stats, _ = prepare(source(rows), pairs=True)
    written = {row: score for row, score in zip(dataset["row"], dataset["score_chosen"])}
    assert [written[row] for row in sorted(written)] == expected
    assert stats["total"]["rated"] == len(expected) - expected.count(None)
    assert ("no ratings" in capsys.readouterr().err) == (expected[0] is None)


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
    assert set(gemma) - set(llama) == {"DPO-tldr-summarisation-preferences"}
    parts = {name: share for name, share in (gemma | llama).items() if share < 1}
    assert parts == {"DPO-PKU-SafeRLHF": 0.1, "DPO-tldr-summarisation-preferences": 0.1}
    assert gemma["DPO-Nectar"] == 0.25
    splits = {source.name: source.split for source in data.parse_sources(["lion-dpo-study"])}
    assert splits.pop("Columbia-NLP/DPO-UltraFeedback_binarized") == "train_prefs"
    assert {*splits.values()} == {"train"}


def test_fraction_of_a_mix_and_its_splits():
    *mix, demo = data.parse_sources(["lion-dpo-gemma=0.5", "demo"])
    assert demo.name == "demo"
    assert {source.name: source.fraction for source in mix}["Columbia-NLP/DPO-Nectar"] == 0.125
    with pytest.raises(ValueError, match="--data lion-sft:test: a mix names its own splits"):
        data.parse_sources(["lion-sft:test"])


# ------------------------------------------------------------------------------------ whole files
def test_the_versions_of_tldr_are_duplicates(prepare, source):
    names = [name for name in PAIRS if "summar" in name or "tldr" in name]
    a = source([PAIRS[name][0] for name in names])
    dataset, stats, _ = prepare(a, pairs=True, max_length=300)
    assert len(names) == 4
    assert stats["sources"][a]["reasons"] == {data.DUPLICATE: [3, f"{a}:2"]}
    assert json.loads(*dataset["messages_json"]) == [[user(POST)], "a", "b", []]


def test_fractions_count_after_duplicates(prepare, source):
    """40 rows, 30 different, 5 of them in an earlier source: int(0.5 * 25) of them. A source that
    is taken whole keeps rows that another one's fraction left out."""
    first = source(numbered(5), "first.jsonl")
    half = source(numbered(30) + numbered(10), "half.jsonl") + "=0.5"
    whole = source(numbered(40), "whole.jsonl")
    stats = prepare(first, half, seed=1).stats["sources"]
    assert stats[half[:-4]]["examples"] == 12
    prepared = prepare(first, half, whole, seed=1)
    assert prepared.stats["total"]["examples"] == 40
    assert prepared.stats["sources"][half[:-4]]["examples"] == 12
    assert prepare(source(numbered(100), "a.jsonl") + "=0.29").stats["total"]["examples"] == 28


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


def test_text_that_no_rule_reads_is_named_once(prepare, source):
    rows = [{"query": f"q {i}", "response": "a", "category": "x", "number": 3, "url": " "}
            for i in range(3)]
    a = source([*rows, {"query": "r", "response": "a", "note": "y", "category": "z"}])
    stats = prepare(a).stats
    assert stats["sources"][a]["unread"] == {
        "no rule reads the text column category": [4, f"{a}:1"],
        "no rule reads the text column note": [1, f"{a}:4"]}
    assert data.stats_table(stats).count("category") == 1


QA_LINE, QA_JSON = '{"query": "q", "response": "a"}\n', '[{"query": "q", "response": "a"}]'
QA_CSV = "query,response\nq,a\n"


@pytest.mark.parametrize("name, text", [
    ("a.ndjson", QA_LINE), ("a.jsonl.gz", QA_LINE), ("a.json", QA_JSON), ("a.json.gz", QA_JSON),
    ("a.json", "\ufeff" + QA_JSON), ("a.json", QA_LINE), ("a.json", f"{QA_LINE}\n"),
    ("a.json", QA_JSON.replace(":", ":\n  ")), ("a.csv", QA_CSV), ("a.csv", f"\ufeff{QA_CSV}"),
    ("a.csv.gz", QA_CSV), ("a.csv", 'query,response\r\n"q","a"\r\n'),
    ("a.tsv", QA_CSV.replace(",", "\t"))])
def test_file_formats(name, text, prepare, tmp_path):
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    dataset = prepare(str(tmp_path / name)).dataset
    assert json.loads(*dataset["messages_json"]) == QA
    assert dataset["row"][:] == [1]


@pytest.mark.parametrize("name, content, reason", [
    ("a.txt", b"q", "unknown ending.*ends in .jsonl"), ("a", b"q", "unknown ending"),
    ("a.csv", "query,response\nq,\u00e9\n".encode("latin-1"), "UTF-8"),
    ("a.csv", QA_CSV.encode("utf-16"), "UTF-8"),
    ("a.jsonl", '{"query": "\u00e9"}'.encode("latin-1"), "a.jsonl .*utf-8"),
    ("a.json", '["\u00e9"]'.encode("latin-1"), "UTF-8"),
    ("a.csv", b"query,response\nq,a\nr,b,c\n", "line 3"),
    ("a.csv", b"query,response\nr,b,c\n", "more fields than the header"),
    ("a.csv", b"query,response\nr\n", "empty turn"),
    ("a.json", b'[{"query": ', "a.json .*Expecting"), ("a.json", b"[1]", "a.json:1: .*JSON object"),
    ("a.json", b"{\n}", "a.json:1: not JSON"),
    ("a.json.gz", gzip.compress(b"[{}]")[:-5], "a.json.gz .*Compressed file ended"),
    ("a.parquet", b"PAR1 no", "a.parquet cannot be loaded")])
def test_bad_files_are_named_with_what_is_wrong(name, content, reason, prepare, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)--data.*{reason}|{reason}"):
        prepare(str(tmp_path / name))


def test_parquet_and_folders_are_read_by_content(prepare, tmp_path):
    """A changed file of the same size and time. A folder without the asked split."""
    import datasets
    path, folder = tmp_path / "a.parquet", tmp_path / "saved"
    for answer in "ab":
        table = datasets.Dataset.from_list([{"query": "q", "response": answer}])
        table.to_parquet(path)
        os.utime(path, (1, 1))
        assert json.loads(*prepare(str(path)).dataset["messages_json"])[1]["content"] == answer
    datasets.DatasetDict({"small": table, "large": table}).save_to_disk(folder)
    assert len(prepare(f"{folder}:small").dataset) == 1
    table.save_to_disk(tmp_path / "one")
    for name, splits in ((f"{folder}", "small, large"), (f"{tmp_path}/one:test", "train"),
                         (f"{path}:test", "train"), ("demo:x", "train, test")):
        with pytest.raises(ValueError, match=f"--data .*: the splits are {splits}"):
            prepare(name)


class TimeoutException(Exception):
    """As the Hub's HTTP client raises: no OSError."""


def hub_errors():
    """Each kind of failure, by the classes that the library raises for it."""
    import datasets.exceptions as e
    broken = e.DatasetGenerationError("An error occurred while generating the dataset")
    broken.__cause__ = OSError("Consistency check failed")
    return {
        "unknown": e.DatasetNotFoundError("Dataset 'x/y' doesn't exist on the Hub"),
        "gated": e.DatasetNotFoundError("Dataset 'x/y' is a gated dataset on the Hub"),
        "config": ValueError("Config name is missing.\nPlease pick one among: ['main']"),
        "split": ValueError('Unknown split "x". Should be one of ["test"].'),
        "script": RuntimeError("Dataset scripts are no longer supported, but found y.py"),
        "offline": ConnectionError("Couldn't reach 'x/y' on the Hub (LocalEntryNotFoundError)"),
        "timeout": TimeoutException("The read operation timed out"),
        "empty": e.DataFilesNotFoundError("No (supported) data files found in x/y"),
        "sizes": e.NonMatchingSplitsSizesError("expected 3"), "broken": broken}


@pytest.mark.parametrize("kind", hub_errors())
def test_what_the_hub_raises_is_one_message(kind, prepare, monkeypatch):
    error, calls = hub_errors()[kind], []

    def load_dataset(*names, split, cache_dir):
        calls.append((*names, split))
        raise error
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    text = str(error.__cause__ or error).split("\n")[0]
    with pytest.raises(ValueError, match=f"^--data x/y .*{re.escape(text)}.*ID:config:split"):
        prepare("x/y:main:test")
    assert calls == [("x/y", "main", "test")]


@pytest.mark.parametrize("text, parsed", [
    ("a/b", ("a/b", "train", 1)), ("a/b:test", ("a/b", "test", 1)),
    ("a/b:main:test", ("a/b", "main:test", 1)), ("a/b:v1.2:test=0.5", ("a/b", "v1.2:test", 0.5)),
    ("a/b:2024-01 x:test", ("a/b", "2024-01 x:test", 1))])
def test_source_names(text, parsed):
    assert data.parse_source(text) == parsed


@pytest.mark.parametrize("home", ["/proc/none", "/dev/null", None])
def test_a_home_that_cannot_be_written_to(home, prepare, source, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")
    if home:
        monkeypatch.setenv("HOME", home)
    else:
        monkeypatch.setattr(Path, "home", no_home)
    a = source(numbered(2))
    with pytest.raises(ValueError, match="--cache-dir .*name a folder"):
        prepare(a, cache_dir=None)
    assert len(prepare(a).dataset) == 2


def test_shared_memory_that_cannot_be_used(prepare, source, monkeypatch):
    def lock():
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("multiprocessing.Lock", lock)
    a = source(numbered(2001))
    with pytest.raises(ValueError, match="--num-proc 2: .*/dev/shm.*use --num-proc 1"):
        prepare(a, num_proc=2)
    assert len(prepare(a, num_proc=1).dataset) == 2001


def test_the_cache_folder_is_the_only_place_written_to(source, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    flags = ["--data", source(numbered(20)), "--num-proc", "1", "--cache-dir", tmp_path / "cache",
             "--output", tmp_path / "out"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    subprocess.run([sys.executable, data.__file__, "dedup", *flags], check=True,
                   env=environment | {"HOME": str(home)})
    assert not list(home.rglob("*"))


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


# ------------------------------------------------------------------- rows that nothing else reads
def solution(text, is_correct):
    return {"solution": text, "is_correct": is_correct}


def test_solutions_make_a_pair_drawn_by_the_question():
    """The first two bytes of the question's hash pick a right and a wrong solution."""
    texts = {True: ["r0", "r1", "r2"], False: ["w0", "w1"]}
    row = {"ground_truth": "#### 1"} | {
        text: solution(text, is_right) for is_right, of in texts.items() for text in of}
    drawn = set()
    for question in map(str, range(20)):
        first, second, *_ = hashlib.sha256(question.encode()).digest()
        pair = data.to_pair(row | {"question": question})
        assert (pair.chosen, pair.rejected) == (f"r{first % 3}", f"w{second % 2}")
        drawn |= {pair.chosen, pair.rejected}
    assert len(drawn) == 5
    for is_right in (True, False):
        with pytest.raises(ValueError, match="no right and wrong solution"):
            data.to_pair({"question": "q", "ground_truth": "1", "a": solution("a", is_right)})


@pytest.mark.parametrize("row, reason", [
    ({"chosen": "note\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
     "no question beside the answer"),
    ({"context": [data.user("q")], "response1": "a", "response2": "b", "overall_preference": 0},
     "neither response is preferred"),
    ({"prompt": "q", "chosen": "a ", "rejected": "a"}, "chosen equals rejected"),
    ({"prompt": "q", "chosen": [data.user("a")], "rejected": [data.user("b")]},
     "an answer is missing")])
def test_refused_preferences(row, reason):
    with pytest.raises(ValueError, match=reason):
        data.to_pair(row)


@pytest.mark.parametrize("lengths", [[], [9, 4], [0, 4]])
def test_pack_names_the_lengths_it_takes(lengths):
    with pytest.raises(ValueError, match=r"pack: needs lengths in 1\.\.8"):
        data.pack(lengths, 8)


@pytest.mark.parametrize("text, answer", [
    ("so 2\n#### 2 ", "2"), ("a #### b #### c", "c"), (" 7", "7")])
def test_the_final_answer(text, answer):
    assert data.final_answer(text) == answer
