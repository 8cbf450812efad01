"""data.py: formats, masks by hand, packing as a multiset, caches, messages for bad input."""
import gzip
import json
import time

import numpy as np
import pytest

import data


@pytest.fixture(scope="module")
def chatml():
    tokenizer = data.demo_tokenizer()
    return tokenizer, data.set_template(tokenizer, "chatml")


def bpe_tokenizer(bos=False):
    """Byte-level BPE in which newlines merge: '\\n' + '\\n' is one token, so a header can swallow an answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<s>", "</s>"] + alphabet + ["ĊĊ", "ab"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ"), ("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def encode(messages, tokenizer, template, **kwargs):
    return data.encode(data.Conversation(messages), tokenizer, template, **kwargs)


def trained(e, tokenizer):
    return tokenizer.decode([i for i, t in zip(e.input_ids, e.targets) if t])


QA = data.ask("q", "ab")
ROWS = [({"messages": QA}, QA), ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "ab"}]}, QA),
        ({"instruction": "q", "input": "i", "output": "ab"}, data.ask("q\n\ni", "ab")),
        ({"query": "q", "response": "ab"}, QA), ({"question": "q", "answer": "ab"}, QA),
        ({"prompt": "q", "chosen": "ab", "rejected": "c"}, QA),
        ({"prompt": QA[:1], "chosen": QA[1:], "rejected": QA[1:]}, QA), ({"chosen": QA, "rejected": QA}, QA),
        ({"chosen": "\n\nHuman: q\n\nAssistant: ab", "rejected": ""}, QA)]


@pytest.mark.parametrize("row, messages", ROWS)
def test_formats(row, messages):
    assert data.to_conversation(row).messages == messages


def test_reference_answer_is_what_follows_the_hashes():
    assert data.to_conversation({"question": "q", "answer": "1+1\n#### 2"}).answer == "2"


@pytest.mark.parametrize("messages, reason", [
    ([], "empty conversation"), (QA[::-1], "role order broken"), (QA[:1], "no assistant turn"),
    (data.ask("q", " "), "empty turn"), ([{"role": "x", "content": ""}], "unknown role"),
    (data.ask("q", 3), "content is not text")])
def test_refused_rows(messages, reason):
    with pytest.raises(ValueError, match=reason):
        data.to_conversation({"messages": messages})


def test_mask_by_hand(chatml):
    """<|im_start|>user\\nq<|im_end|>\\n<|im_start|>assistant\\nab<|im_end|>\\n, one token a byte: 1+4+1+1+1+1
    + 1+9+1 = 20 tokens of prompt, then a, b, end of turn are trained, the last newline is not."""
    e = encode(QA, *chatml)
    assert e.targets == [False] * 20 + [True] * 3 + [False]
    assert trained(e, chatml[0]) == "ab<|im_end|>"


def test_multi_turn_and_last_only(chatml):
    messages = QA + data.ask("r", "\U0001f981 lion")
    assert trained(encode(messages, *chatml), chatml[0]) == "ab<|im_end|>\U0001f981 lion<|im_end|>"
    last = data.encode(data.Conversation(messages, last_only=True), *chatml)
    assert trained(last, chatml[0]) == "\U0001f981 lion<|im_end|>"


def test_loss_on_all_leaves_out_the_first_token_only(chatml):
    assert encode(QA, *chatml, loss_on="all").targets == [False] + [True] * 23


def test_answer_that_merges_with_the_header():
    """'assistant\\n' + '\\nx': both newlines are one token; it holds a character of the answer, so it trains."""
    tokenizer = bpe_tokenizer()
    template = data.set_template(tokenizer, "chatml")
    assert template.new_tokens == ["<|im_start|>", "<|im_end|>"]
    assert trained(encode(data.ask("q", "\nx"), tokenizer, template), tokenizer) == "\n\nx<|im_end|>"


def test_bos_once():
    tokenizer = bpe_tokenizer(bos=True)
    e = encode(QA, tokenizer, data.set_template(tokenizer, "chatml"))
    assert e.input_ids[0] == 0 and e.input_ids.count(0) == 1


TEMPLATES = {
    "llama-2": "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}"
               "{% else %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{% endfor %}",
    "trims": "{% for m in messages %}{{ m.role + ':' + m.content | trim + '</s>' }}{% endfor %}"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_other_templates(name, tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATES[name])
    tokenizer = bpe_tokenizer()
    template = data.set_template(tokenizer, str(tmp_path / "t.jinja"))
    e = encode(data.ask("q", " ab "), tokenizer, template)
    assert template.end_of_turn == "</s>" and trained(e, tokenizer).split() == ["ab</s>"] or \
        trained(e, tokenizer).split() == ["ab", "</s>"]


@pytest.mark.parametrize("text, why", [
    ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}</s>{% endif %}{% endfor %}", "drops"),
    ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "never trains an end of turn")])
def test_bad_templates_name_the_flag(text, why, tmp_path):
    (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(ValueError, match=f"--chat-template.*{why}"):
        data.set_template(bpe_tokenizer(), str(tmp_path / "t.jinja"))


def test_special_tokens_in_user_text_are_refused(chatml):
    with pytest.raises(ValueError, match="special token in the text"):
        encode(data.ask("q<|im_end|>", "a"), *chatml)


def test_truncation_counts_and_never_forges_an_end(chatml):
    e = encode(QA, *chatml, max_length=22)
    assert e.truncated == 2 and trained(e, chatml[0]) == "ab"
    with pytest.raises(ValueError, match="no target left after truncation"):
        encode(QA, *chatml, max_length=20)


@pytest.mark.parametrize("packing", ["bfd", "concat", "none"])
def test_every_target_in_exactly_one_row(packing):
    """As a multiset: (document, position) of every token that can be a target, over all rows."""
    rng = np.random.default_rng(0)
    for limit in (2, 3, 17, 64):
        lengths = rng.integers(1, limit + 1, 300)
        rows = data.pack(lengths, limit, packing)
        seen = sorted((d, i) for d, a, b in zip(rows.doc, rows.start, rows.end) for i in range(a + 1, b))
        assert seen == [(d, i) for d, n in enumerate(lengths) for i in range(1, n)]
        used = np.add.reduceat(rows.end - rows.start, rows.offsets[:-1])
        assert used.max() <= limit and rows.offsets[-1] == len(rows.doc)


def test_bfd_is_best_fit():
    """Against the definition: longest first, into the row with the least room that still fits."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        lengths, rooms = rng.integers(1, 21, 60), []
        for n in sorted(lengths.tolist(), reverse=True):
            best = min((r for r in rooms if r >= n), default=None)
            if best is not None:
                rooms.remove(best)
            rooms.append((20 if best is None else best) - n)
        rows = data.pack(lengths, 20)
        left = 20 - np.add.reduceat(rows.end - rows.start, rows.offsets[:-1])
        assert sorted(left.tolist()) == sorted(rooms)


def test_packing_is_fast():
    started = time.time()
    data.pack(np.random.default_rng(0).integers(1, 2048, 200_000), 2048)
    assert time.time() - started < 12


@pytest.mark.slow
def test_packing_two_million_lengths():
    started = time.time()
    data.pack(np.random.default_rng(0).integers(1, 2048, 2_000_000), 2048)
    assert time.time() - started < 60


# ------------------------------------------------------------------------------------------ prepare
def write(path, rows):
    text = "".join(json.dumps(r) + "\n" for r in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def prepare(sources, chatml, tmp_path, **kwargs):
    return data.prepare(sources, *chatml, **{"max_length": 64, "cache_dir": str(tmp_path / "cache"), **kwargs})


def test_duplicates_across_sources_keep_the_first(chatml, tmp_path):
    a = write(tmp_path / "a.jsonl", [{"messages": QA}, {"messages": data.ask("r", "b")}])
    b = write(tmp_path / "b.jsonl.gz", [{"query": "q", "response": "ab"}, {"query": "s", "response": "c"}])
    made = prepare([a, b], chatml, tmp_path)
    assert sorted(zip(made.dataset["source"], made.dataset["row"])) == [(0, 1), (0, 2), (1, 2)]
    assert made.stats["sources"][b]["duplicates"] == 1 and made.stats["total"]["examples"] == 3
    assert "duplicates" in data.stats_table(made.stats)


def test_csv_parquet_folder(chatml, tmp_path):
    import datasets
    d = datasets.Dataset.from_list([{"query": "q", "response": "ab"}])
    d.to_csv(str(tmp_path / "a.csv"), index=False), d.to_parquet(str(tmp_path / "a.parquet"))
    d.save_to_disk(str(tmp_path / "folder"))
    ids = [prepare([str(tmp_path / n)], chatml, tmp_path).dataset["input_ids"][0]
           for n in ("a.csv", "a.parquet", "folder")]
    assert ids == [encode(QA, *chatml).input_ids] * 3


def test_cache_follows_content_and_settings(chatml, tmp_path):
    a = write(tmp_path / "a.jsonl", [{"messages": QA}])
    folders = lambda: len(list((tmp_path / "cache").glob("*/stats.json")))
    for change, expected in [({}, 1), ({}, 1), ({"max_length": 63}, 2), ({"loss_on": "all"}, 3)]:
        prepare([a], chatml, tmp_path, **change)
        assert folders() == expected
    write(tmp_path / "a.jsonl", [{"messages": data.ask("q", "ba")}])
    assert prepare([a], chatml, tmp_path).dataset["input_ids"][0] == encode(data.ask("q", "ba"), *chatml).input_ids
    for damaged in (tmp_path / "cache").glob("*/*.arrow"):
        damaged.unlink()
    assert len(prepare([a], chatml, tmp_path).dataset) == 1


def test_subsets_are_nested(chatml, tmp_path):
    a = write(tmp_path / "a.jsonl", [{"messages": data.ask(str(i), "x")} for i in range(30)])
    rows = [list(prepare([a], chatml, tmp_path, max_examples=n).dataset["row"]) for n in (5, 20)]
    assert rows[1][:5] == rows[0]


def test_bad_rows_are_counted_with_their_line(chatml, tmp_path):
    a = write(tmp_path / "a.jsonl", [{"messages": QA}, {"messages": QA[::-1]}, {"messages": []}])
    made = prepare([a], chatml, tmp_path)
    assert made.stats["sources"][a]["reasons"] == {"role order broken": [1, f"{a}:2"], "empty conversation": [1, f"{a}:3"]}
    with pytest.raises(ValueError, match=r"a.jsonl:2: role order broken"):
        prepare([a], chatml, tmp_path, bad_rows="stop")


@pytest.mark.parametrize("text, message", [
    ('{"messages": []}\n', "no row is left:\n.*bad.jsonl:1: empty conversation"),
    ('\n{"messages"\n', "bad.jsonl:2: not JSON"), ('{"foo": 1}\n', "bad.jsonl:1: columns.*foo.*Known"),
    ("", "no row is left")])
def test_bad_files(text, message, chatml, tmp_path):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        prepare([str(tmp_path / "bad.jsonl")], chatml, tmp_path)
    assert not list((tmp_path / "cache").glob("*.writing"))


def test_missing_file_and_fraction(chatml, tmp_path):
    with pytest.raises(ValueError, match="--data no.jsonl: no such file"):
        prepare(["no.jsonl"], chatml, tmp_path)
    with pytest.raises(ValueError, match="--data x=2"):
        data.parse_source("x=2")
    assert data.parse_source("org/name:test=0.5") == ("org/name", "test", 0.5)


def test_demo_split_is_disjoint():
    last = lambda split, n: {r["messages"][-2]["content"] for r in data.demo_conversations(n, 0, split)}
    assert not last("train", 3000) & last("test", 200)


def test_show_marks_what_is_trained(capsys, tmp_path):
    data.main(["show", "-n", "1", "--data", write(tmp_path / "a.jsonl", [{"messages": QA}]),
               "--cache-dir", str(tmp_path / "c")])
    assert "assistant\n\u27e6ab<|im_end|>\u27e7" in capsys.readouterr().out
