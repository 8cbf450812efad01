"""data.py: formats, masks by hand, templates, packing as a multiset, caches, bad input."""
import gzip
import json
import re
import time
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

import data
from data import Conversation, ask, assistant, user

QA = ask("q", "ab")
SYSTEM = [{"role": "system", "content": "be brief"}]


@pytest.fixture(scope="module")
def chatml():
    tokenizer = data.demo_tokenizer()
    return tokenizer, data.set_template(tokenizer, "chatml")


def bpe_tokenizer(bos=False, entries=()):
    """Byte-level BPE in which newlines merge: '\\n' + '\\n' is one token, so that a header can
    swallow an answer's first character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *entries, *alphabet, "ĊĊ", "ab"])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ"), ("a", "b")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    if bos:
        bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def encode(messages, tokenizer, template, **settings):
    return data.encode(Conversation(messages), tokenizer, template, **settings)


def trained(encoded, tokenizer):
    return tokenizer.decode([i for i, t in zip(encoded.input_ids, encoded.targets) if t])


# ---------------------------------------------------------------------------------------- formats
# Formats that no public source in test_sources.py shows
ROWS = [
    ({"messages": QA, "system": "be brief"}, SYSTEM + QA),
    ({"messages": SYSTEM + QA, "system": "be  brief"}, SYSTEM + QA),
    ({"instruction": "q", "input": "i", "output": "ab"}, ask("q\n\ni", "ab")),
    ({"instruction": "q", "input": "", "output": "ab"}, QA),
    ({"question": "q", "context": "c", "answer": "ab"}, ask("q\n\nc", "ab")),
    ({"system_prompt": "be brief", "question": "q", "response": "ab"}, SYSTEM + QA),
    ({"context": "q", "completion": "ab"}, QA),
    ({"prompt": QA[:1], "completion": QA[1:]}, QA),
    ({"prompt": "Human: q\n\nAssistant: x\n\nHuman: r\n\nAssistant:", "completion": "ab"},
     ask("q", "x") + ask("r", "ab")),
    ({"prompt": QA[:1], "chosen": QA[1:], "rejected": QA[1:]}, QA),
    ({"prompt": "q", "chosen": QA[1:], "rejected": [], "system": "be brief"}, SYSTEM + QA),
    ({"system": "be brief", "conversations": [
        {"from": "user", "value": "q"}, {"from": "assistant", "value": "ab"}]}, SYSTEM + QA),
    ({"system_message": "be brief", "instruction": "q", "output": "ab"}, SYSTEM + QA),
    ({"system": "be brief", "prompt": "Human: q", "completion": "ab"}, SYSTEM + QA),
    ({"system": "be brief", "prompt": QA[:1], "completion": QA[1:]}, SYSTEM + QA),
    ({"system": "be brief", "conversation": QA}, SYSTEM + QA),
    ({"query": "r", "response": "x", "history": QA}, QA + ask("r", "x")),
    ({"prompt": "\n\nHuman: q\n\nAssistant:", "completion": " ab"}, QA),
    ({"prompt": "q", "messages": QA, "tools": "[]", "reasoning": None}, QA)]


@pytest.mark.parametrize("row, messages", ROWS)
def test_formats(row, messages):
    assert data.to_conversation(row).messages == messages


def test_reference_answer_follows_the_hashes():
    row = {"question": "q", "answer": "1+1\n#### 2"}
    assert data.to_conversation(row).answer == "2"


@pytest.mark.parametrize("messages, reason", [
    ([QA[0], QA[1] | {"tool_calls": [{"name": "f"}]}], "tool_calls: no rule reads it"),
    ([QA[0], QA[1] | {"reasoning_content": "hm"}], "reasoning_content: no rule reads it"),
    ([], "empty conversation"), (QA[::-1], "role order broken"), (QA[:1], "no assistant turn"),
    (ask("q", " "), "empty turn"), ([{"role": "x", "content": ""}], "unknown role"),
    (ask("q", 3), "content is not text"), ("q", "messages are a list")])
def test_refused_rows(messages, reason):
    with pytest.raises(ValueError, match=reason):
        data.to_conversation({"messages": messages})


@pytest.mark.parametrize("row, reason", [
    ({"messages": QA, "context": "c"}, "context: the format has no place for it"),
    ({"messages": SYSTEM + QA, "system": "other"}, "system: the format has no place for it"),
    ({"prompt": QA[:1], "completion": "ab", "input": "i"}, "input: the format has no place"),
    ({"prompt": "p", "query": "q", "response": "ab"}, "query: the format has no place"),
    ({"question": "q", "answer": "ab", "history": "h"}, "history: the format has no place"),
    ({"chosen": QA, "rejected": QA, "context": "c"}, "context: the format has no place"),
    ({"messages": QA, "tools": [{"name": "f"}]}, "tools: no rule reads it"),
    ({"question": "q", "answer": "ab", "reasoning": "hm"}, "reasoning: no rule reads it"),
    ({"question": "q", "answer": "ab", "image": {"path": "x"}}, "image: no rule reads it")])
def test_text_is_never_dropped(row, reason):
    with pytest.raises(ValueError, match=reason):
        data.to_conversation(row)


@pytest.mark.parametrize("row, prompt, chosen, rejected", [
    ({"instruction": "Translate.", "input": "Good day", "chosen": "Bonjour", "rejected": "Hola"},
     [user("Translate.\n\nGood day")], "Bonjour", "Hola"),
    ({"question": "q", "context": "c", "chosen": "a", "rejected": "b", "system": "be brief"},
     [*SYSTEM, user("q\n\nc")], "a", "b"),
    ({"system_prompt": "be brief", "chosen": QA, "rejected": ask("q", "b")},
     [*SYSTEM, user("q")], "ab", "b"),
    ({"prompt": "q", "history": [["x", "y"]], "chosen": "a", "rejected": "b"},
     [*ask("x", "y"), user("q")], "a", "b"),
    ({"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": " 4", "rejected": " 5"},
     [user("2+2?")], "4", "5"),
    ({"prompt": "\n\nHuman: q\n\nAssistant: x\n\nHuman: 2+2?\n\nAssistant:",
      "chosen": " 4\n", "rejected": " 5"}, [*ask("q", "x"), user("2+2?")], "4", "5"),
    ({"prompt": "q\n<extra_id_1>Assistant\nx\n<extra_id_1>User\nr\n<extra_id_1>Assistant\n",
      "chosen": "4", "rejected": "5"}, [*ask("q", "x"), user("r")], "4", "5"),
    ({"prompt": "q", "chosen": "    return 1", "rejected": "pass"}, [user("q")], "    return 1",
     "pass")])
def test_pair_formats(row, prompt, chosen, rejected):
    assert data.to_pair(row)[:3] == (prompt, chosen, rejected)


@pytest.mark.parametrize("mark", [
    {"weight": 0}, {"weight": 0.0}, {"train": False}, {"trainable": False}])
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_marked_turns_are_not_trained(mark, loss_on, prepare, source, chatml, run_dedup):
    """Nor after a command wrote the row again, nor behind an empty system turn."""
    messages = [user("q") | mark, assistant("ab") | mark,
                user("r"), assistant("cd") | {"weight": 1}]
    a = source([{"messages": messages}])
    b = source([{"prompt": messages[:3], "completion": messages[3:]}], "b.jsonl")
    for name in (a, b, run_dedup(a)):
        dataset = prepare(name, loss_on=loss_on, empty_system=1.0).dataset
        ids, targets = dataset["input_ids"][0], dataset["targets"][0]
        text = chatml[0].decode([i for i, t in zip(ids, targets) if t])
        assert "cd<|im_end|>" in text
        assert "ab" not in text
    pair = data.to_pair({"prompt": messages[:3], "chosen": "x", "rejected": "y"})
    assert pair.prompt == [user("q"), assistant("ab"), user("r")]
    with pytest.raises(ValueError, match="no target"):
        prepare(source([{"messages": messages[:2]}]))


# ------------------------------------------------------------------------------------------ masks
def test_mask_by_hand(chatml):
    """<|im_start|>user\\nq<|im_end|>\\n<|im_start|>assistant\\nab<|im_end|>\\n, one token per byte:
    1+4+1+1+1+1 + 1+9+1 = 20 tokens of prompt, then a, b and the end of turn are trained, the last
    newline is not."""
    e = encode(QA, *chatml)
    assert e.targets == [False] * 20 + [True] * 3 + [False]
    assert trained(e, chatml[0]) == "ab<|im_end|>"


def test_multi_turn_last_only_and_unfinished(chatml):
    messages = QA + ask("r", "\U0001f981 lion")
    assert trained(encode(messages, *chatml), chatml[0]) == "ab<|im_end|>\U0001f981 lion<|im_end|>"
    last = Conversation(messages, last_only=True)
    of_last = data.encode(last, *chatml)
    assert trained(of_last, chatml[0]) == "\U0001f981 lion<|im_end|>"
    assert encode(messages, *chatml, loss_on="last") == of_last
    cut = last._replace(unfinished=True)
    assert trained(data.encode(cut, *chatml), chatml[0]) == "\U0001f981 lion"


def test_loss_on_all_leaves_out_the_first_token_only(chatml):
    assert encode(QA, *chatml, loss_on="all").targets == [False] + [True] * 23


def test_answer_that_merges_with_the_header_is_refused():
    """'assistant\\n' + '\\nx': both newlines are one token, which sampling never sees."""
    tokenizer = bpe_tokenizer()
    template = data.set_template(tokenizer, "chatml")
    assert template.new_tokens == ["<|im_start|>", "<|im_end|>"]
    with pytest.raises(ValueError, match="first token merges with the prompt"):
        encode(ask("q", "\nx"), tokenizer, template)


def test_special_tokens_in_user_text_are_refused(chatml):
    with pytest.raises(ValueError, match="special token in the text"):
        encode(ask("q<|im_end|>", "a"), *chatml)


def test_truncation_counts_and_never_forges_an_end(chatml):
    e = encode(QA, *chatml, max_length=22)
    assert e.cut == 2
    assert trained(e, chatml[0]) == "ab"
    with pytest.raises(ValueError, match="no target left after truncation"):
        encode(QA, *chatml, max_length=20)


# -------------------------------------------------------------------------------------- templates
# Reduced to what makes each public template special: (special tokens, template)
TEMPLATES = {
    "chatml": ("<|im_start|> <|im_end|>", data.CHATML),
    "llama-2": (                                # no generation prompt: [/INST] is the header
        "", "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}"
        "{% else %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"),
    "llama-3": (                                # trims
        "<|start|> <|end|> <|eot_id|>",
        "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' }}"
        "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"),
    "gemma": (                                  # another role name, no system turn
        "<start_of_turn> <end_of_turn>",
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "{{ '<start_of_turn>' + m.role | replace('assistant', 'model') + '\n' }}"
        "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"),
    "mistral": (                                # the system turn before a last user turn only
        "[INST] [/INST]",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
        "{% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"),
    "zephyr": (                                 # headers are ordinary text
        "", "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        "{% endfor %}"),
    "phi-3": (                                  # tokens that swallow the white space behind them
        "<|user|> <|assistant|> <|end|>",
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"),
    "deepseek-r1": (                            # drops the thinking of answers
        "<|User|> <|Assistant|>",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<|User|>' + m.content }}{% else %}{{ '<|Assistant|>' }}"
        "{{ m.content.split('</think>')[-1] + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"),
    "qwen-3": (                                 # empty thinking before the last answer
        "<|im_start|> <|im_end|>",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"),
    "qwen-2.5": (                               # a system turn of its own
        "<|im_start|> <|im_end|>",
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}"
        "{% endif %}" + data.CHATML),
    "smollm2": (                                # the same, but tested as it is written there
        "<|im_start|> <|im_end|>",
        "{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}"
        "{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"),
    "phi-3-first": (                            # no system turn; the user turn writes the header
        "<|user|> <|assistant|> <|end|>",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<|user|>\n' + m.content + '<|end|>\n<|assistant|>\n' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"),
    "thinking": (                               # DeepSeek-R1's later generation prompt
        "<|im_start|> <|im_end|>",
        data.CHATML + "{% if add_generation_prompt %}<think>{% endif %}"),
    "headless": (
        "", "{% for m in messages %}{{ m.role + ':' + m.content + '</s>' }}{% endfor %}"),
    "endless": ("", "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"),
    "forgetful": (
        "", "{% for m in messages if m.role == 'user' %}{{ m.content + '</s>' }}{% endfor %}"),
    "broken": ("", "{% for m in messages %}")}


def with_template(name, tmp_path):
    from transformers import AddedToken
    tokenizer = bpe_tokenizer(bos=True)
    specials, text = TEMPLATES[name]
    tokens = [AddedToken(t, rstrip=name.startswith("phi"), special=True) for t in specials.split()]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    path = tmp_path / "template.jinja"
    path.write_text(text)
    return tokenizer, data.set_template(tokenizer, str(path))


@pytest.mark.parametrize("name, text", [
    ("chatml", "ab<|im_end|>cd<|im_end|>"), ("llama-2", " ab </s> cd </s>"),
    ("llama-3", "ab<|eot_id|>cd<|eot_id|>"), ("gemma", "ab<end_of_turn>cd<end_of_turn>"),
    ("mistral", " ab</s> cd</s>"), ("zephyr", "ab</s>cd</s>"), ("phi-3", "ab<|end|>cd<|end|>"),
    ("qwen-2.5", "ab<|im_end|>cd<|im_end|>"), ("smollm2", "ab<|im_end|>cd<|im_end|>"),
    ("phi-3-first", "ab<|end|>cd<|end|>"), ("deepseek-r1", "ab</s>cd</s>")])
def test_template_trains_answers_and_their_ends(name, text, tmp_path):
    """What precedes an answer is exactly what sampling sees, with one BOS."""
    tokenizer, template = with_template(name, tmp_path)
    messages = ask("q", "ab") + ask("r", "cd")
    e = encode(messages, tokenizer, template)
    assert trained(e, tokenizer) == text
    assert text.endswith(template.end_of_turn)
    assert template.bos
    assert e.input_ids[0] == 0 != e.input_ids[1]
    for answer in (1, 3):
        prompt = data.prompt_ids(tokenizer, messages[:answer])
        assert e.input_ids[:len(prompt)] == prompt
        assert e.targets[len(prompt)] > e.targets[len(prompt) - 1]


def test_template_that_trims_its_answers(tmp_path):
    tokenizer, template = with_template("llama-3", tmp_path)
    assert trained(encode(ask("q", " ab\n"), tokenizer, template), tokenizer) == "ab<|eot_id|>"


@pytest.mark.parametrize("name, messages, reason", [
    ("gemma", SYSTEM + QA, "System role not supported"),
    ("mistral", SYSTEM + QA, "drops or rewrites a turn"),
    ("phi-3-first", [{"role": "system", "content": "user"}, *QA], "drops or rewrites a turn"),
    ("deepseek-r1", ask("q", "<think>hm</think>ab"), "drops or rewrites a turn")])
def test_rows_that_a_template_cannot_hold(name, messages, reason, tmp_path):
    tokenizer, template = with_template(name, tmp_path)
    with pytest.raises(ValueError, match=reason):
        encode(messages, tokenizer, template)


@pytest.mark.parametrize("name, reason", [
    ("qwen-3", "another text before an answer in training than in sampling"),
    ("thinking", "another text before an answer in training than in sampling"),
    ("headless", "another text before an answer"), ("broken", "the chat template refuses it"),
    ("endless", "no special token ends an assistant turn"),
    ("forgetful", "no special token ends an assistant turn")])
def test_refused_templates_name_the_flag(name, reason, tmp_path):
    with pytest.raises(ValueError, match=f"--chat-template .*template.jinja: .*{reason}"):
        with_template(name, tmp_path)


def test_a_refused_template_shows_both_texts(tmp_path):
    """Training and sampling of the first answer that they disagree on."""
    with pytest.raises(ValueError) as refusal:
        with_template("thinking", tmp_path)
    training, sampling = str(refusal.value).split("\n")[1:]
    assert training.startswith("  training: '<s><|im_start|>user\\none<|im_end|>")
    assert sampling == ("  sampling: '<s><|im_start|>user\\none<|im_end|>\\n<|im_start|>assistant"
                        "\\n<think>'")


PUBLIC = ["chatml", "llama-3", "gemma", "mistral", "zephyr", "phi-3", "phi-3-first", "qwen-2.5",
          "deepseek-r1", "smollm2"]
WORDS = strategies.text("ab \n<>/[]|:I\u00e9\U0001f981", max_size=6)


@strategies.composite
def conversations(draw):
    """Perhaps a system turn, one to three exchanges, texts of characters that templates write."""
    messages = [{"role": "system", "content": draw(WORDS)}] * draw(strategies.booleans())
    for _ in range(draw(strategies.integers(1, 3))):
        messages += ask(draw(WORDS), draw(WORDS))
    return messages


@pytest.mark.parametrize("name", PUBLIC)
def test_training_begins_with_what_sampling_sees(name, tmp_path_factory, request):
    """On random conversations: refused by a reason, or each answer and its end are trained behind
    exactly the tokens that sampling sees, and every turn's text appears."""
    tokenizer, template = with_template(name, tmp_path_factory.mktemp(name))
    seen = {"trained": 0}

    @hypothesis.settings(max_examples=500 if request.config.getoption("--slow") else 50,
                         deadline=None, derandomize=True, database=None)
    @hypothesis.given(conversations())
    def check(messages):
        try:
            data.checked(Conversation(messages), {})
            e = encode(messages, tokenizer, template)
        except ValueError as refusal:
            assert re.search("empty turn|refuses it|drops or rewrites|another text|merges|special "
                             "token in the text", str(refusal))
            return
        seen["trained"] += 1
        left = [False] * len(e.targets)
        for i, m in enumerate(messages):
            if m["role"] == "assistant":
                prompt = data.prompt_ids(tokenizer, messages[:i])
                assert e.input_ids[:len(prompt)] == prompt
                end = e.input_ids.index(template.end_of_turn_id, len(prompt)) + 1
                answer = tokenizer.decode(e.input_ids[len(prompt):end])
                assert answer.split(template.end_of_turn)[0].strip() == m["content"].strip()
                left[len(prompt):end] = [True] * (end - len(prompt))
        assert e.targets == left
        text = tokenizer.decode(e.input_ids)
        for m in messages:
            assert text.count(m["content"].strip()) >= [x["content"] for x in messages].count(
                m["content"])
    check()
    assert seen["trained"] >= 5


@pytest.mark.parametrize("entries, added", [
    (["<unused0>", "<unused1>", "<unused2>"], []), (["<unused7>", "<unused8>"], ["<unused7>"]),
    ([], ["<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]),
    (["<|placeholder1|>", "<|placeholder2|>"], [])])
def test_chatml_takes_reserved_entries(entries, added, tmp_path):
    """The vocabulary keeps its size, also when it is saved and read again. The first reserved
    entries become ChatML's two tokens, named as new so that their rows are set."""
    from transformers import AutoTokenizer
    tokenizer = bpe_tokenizer(entries=entries)
    tokenizer.add_tokens(added)
    size, reserved = len(tokenizer), [*entries, *added][:2]
    ids = tokenizer.convert_tokens_to_ids(reserved)
    template = data.set_template(tokenizer)
    assert template.new_tokens == ["<|im_start|>", "<|im_end|>"]
    e = encode(QA, tokenizer, template)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for one in (tokenizer, again):
        assert len(one) == size
        assert one.convert_tokens_to_ids(template.new_tokens) == ids
        assert not {*reserved} & {*one.get_vocab()}
    read = data.set_template(again)
    assert read.new_tokens == []
    assert encode(QA, again, read) == e
    assert e.input_ids[0] == ids[0]


def test_chatml_is_appended_beyond_the_reserved_entries():
    tokenizer = bpe_tokenizer(entries=["<unused3>", "<unusual4>"])
    size = len(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["<unused3>"])
    assert data.set_template(tokenizer).new_tokens == ["<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [*ids, size]


def test_one_function_writes_the_bos(tmp_path):
    """A template without BOS behind a tokenizer that adds one, and the other way round: exactly one
    in training, in sampling and for a reward model; a cut prompt keeps it."""
    for bos, text in ((True, data.CHATML), (True, "{{ bos_token }}" + data.CHATML),
                      (False, "{{ bos_token }}" + data.CHATML)):
        tokenizer = bpe_tokenizer(bos)
        tokenizer.chat_template = text
        judge = bpe_tokenizer(bos)
        judge.chat_template = text
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        template = data.set_template(tokenizer, "tokenizer")
        data.write_bos(judge)
        assert data.render(judge, QA) == data.render(tokenizer, QA)
        assert template.bos
        for ids in (encode(QA, tokenizer, template).input_ids, data.prompt_ids(tokenizer, QA[:1])):
            assert [i for i, t in enumerate(ids) if t == 0] == [0]
        pair = data.Pair([user("q" * 50)], "a", "b")
        cut = data.encode_pair(pair, tokenizer, template, max_length=60, max_prompt_length=10)
        assert cut.prompt[0] == 0


def test_a_tokenizer_without_template():
    with pytest.raises(ValueError, match="--chat-template tokenizer: .*use chatml"):
        data.set_template(bpe_tokenizer(), "tokenizer")


# ---------------------------------------------------------------------------------------- packing
@pytest.mark.parametrize("packing", ["bfd", "concat", "none"])
def test_every_target_in_exactly_one_row(packing):
    """As a multiset: (document, position) of every token that can be a target, over all rows."""
    rng = np.random.default_rng(0)
    for limit in (2, 3, 17, 64):
        lengths = rng.integers(1, limit + 1, 300)
        rows = data.pack(lengths, limit, packing)
        packed = []
        for doc, start, end in zip(rows.doc, rows.start, rows.end):
            packed += [(doc, i) for i in range(start + 1, end)]
        assert sorted(packed) == [(doc, i) for doc, n in enumerate(lengths) for i in range(1, n)]
        used = np.add.reduceat(rows.end - rows.start, rows.offsets[:-1])
        assert used.max() <= limit
        assert rows.offsets[-1] == len(rows.doc)


def test_bfd_is_best_fit():
    """Against the definition: longest first, into the row with the least room that still fits."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        lengths = rng.integers(1, 21, 60)
        rooms = []
        for n in sorted(lengths.tolist(), reverse=True):
            best = min((room for room in rooms if room >= n), default=20)
            if best in rooms:
                rooms.remove(best)
            rooms.append(best - n)
        rows = data.pack(lengths, 20)
        left = 20 - np.add.reduceat(rows.end - rows.start, rows.offsets[:-1])
        assert sorted(left.tolist()) == sorted(rooms)


@pytest.mark.parametrize("n, seconds", [
    (200_000, 12), pytest.param(2_000_000, 60, marks=pytest.mark.slow)])
def test_packing_is_fast(n, seconds):
    lengths = np.random.default_rng(0).integers(1, 2048, n)
    started = time.time()
    data.pack(lengths, 2048)
    assert time.time() - started < seconds


# ---------------------------------------------------------------------------------------- prepare
@pytest.fixture
def source(tmp_path):
    """Writes rows into a file and returns its name."""
    def write(rows, name="a.jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        return str(path)
    return write


@pytest.fixture
def prepare(chatml, tmp_path):
    """data.prepare with ChatML, at most 100 tokens and a cache of this test's own."""
    def prepare_here(*sources, **settings):
        settings = {"max_length": 100, "cache_dir": str(tmp_path / "cache")} | settings
        return data.prepare(sources, *chatml, **settings)
    return prepare_here


@pytest.fixture
def run_dedup(tmp_path):
    """rows.jsonl of `dedup` over some sources."""
    def run_here(*sources, pairs=()):
        data.main(["dedup", *pairs, "--output", str(tmp_path / "dedup"), "--cache-dir",
                   str(tmp_path / "cache"), "--data", *sources])
        return str(tmp_path / "dedup/rows.jsonl")
    return run_here


def numbered(n):
    return [{"messages": ask(str(i), "x")} for i in range(n)]


def test_duplicates_across_sources_keep_the_first(prepare, source):
    a = source([{"messages": QA}, {"messages": ask("r", "b")}])
    b = source([{"query": "q", "response": "ab"}, {"query": "s", "response": "c"}], "b.jsonl.gz")
    dataset, stats, _ = prepare(a, b)
    assert sorted(zip(dataset["source"], dataset["row"])) == [(a, 1), (a, 2), (b, 2)]
    assert stats["total"]["examples"] == 3
    assert stats["sources"][b]["reasons"] == {data.DUPLICATE: [1, f"{b}:1"]}
    assert f"{b}:1: {data.DUPLICATE}" in data.stats_table(stats)


def test_csv_parquet_folder(prepare, chatml, tmp_path):
    import datasets
    table = datasets.Dataset.from_list([{"query": "q", "response": "ab"}])
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "folder")
    for name in ("a.csv", "a.parquet", "folder"):
        dataset = prepare(str(tmp_path / name)).dataset
        assert dataset["input_ids"][:] == [encode(QA, *chatml).input_ids]


def test_cache_follows_content_and_settings(prepare, source, chatml, tmp_path):
    a = source([{"messages": QA}])
    for change, caches in [({}, 1), ({}, 1), ({"max_length": 63}, 2), ({"loss_on": "all"}, 3)]:
        prepare(a, **change)
        assert len(list(tmp_path.glob("cache/encoded/*.arrow"))) == caches
    changed = ask("q", "ba")
    dataset = prepare(source([{"messages": changed}])).dataset
    assert dataset["input_ids"][:] == [encode(changed, *chatml).input_ids]


def test_damaged_caches_are_made_again(prepare, source, tmp_path):
    """Truncated, empty, foreign, of fewer rows, deleted."""
    a = source(numbered(30))
    prepare(source(numbered(5), "few.jsonl"))
    expected = prepare(a).dataset["input_ids"][:]
    for kind in ("converted", "encoded"):
        caches = tmp_path.glob(f"cache/{kind}/*.arrow")
        few, path = sorted(caches, key=lambda cache: cache.stat().st_size)
        for damage in (path.read_bytes()[:-20], b"", b"x" * 1000, few.read_bytes()):
            path.write_bytes(damage)
            assert prepare(a).dataset["input_ids"][:] == expected
        path.unlink()
        assert prepare(a).dataset["input_ids"][:] == expected


def test_subsets_are_nested(prepare, source):
    a = source(numbered(30))
    few, many = (prepare(a, max_examples=n).dataset["row"][:] for n in (5, 20))
    assert many[:5] == few
    assert len(many) == 20


def test_bad_rows_are_counted_with_their_line(prepare, source):
    a = source([{"messages": QA}, {"messages": QA[::-1]}, {"messages": []}])
    assert prepare(a).stats["sources"][a]["reasons"] == {
        "role order broken": [1, f"{a}:2"], "empty conversation": [1, f"{a}:3"]}
    with pytest.raises(ValueError, match=r"a.jsonl:2: role order broken"):
        prepare(a, bad_rows="stop")


@pytest.mark.parametrize("text, message", [
    ('{"messages": []}\n', "no row is left:\n.*bad.jsonl:1: empty conversation"),
    ('\n{"messages"\n', "bad.jsonl:2: not JSON"), ("[1]\n", "bad.jsonl:1: .*a JSON object"),
    ('{"foo": 1}\n', "no row is left:\n.*bad.jsonl:1: unknown columns foo"),
    ("\n\n", "no row is left"), ("", "bad.jsonl .*the file is empty")])
def test_bad_file_beside_a_good_one(text, message, prepare, source, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text)
    with pytest.raises(ValueError, match=message):
        prepare(source(numbered(1)), str(bad))


def test_missing_file_and_fraction(prepare):
    with pytest.raises(ValueError, match="no.jsonl"):
        prepare("no.jsonl")
    with pytest.raises(ValueError, match="--data x=2"):
        data.parse_source("x=2")
    assert data.parse_source("org/name:test=0.5") == ("org/name", "test", 0.5)


def test_growing_files_survive_a_torn_line(tmp_path):
    """Rows are on disk at once. Another process was killed within its second line."""
    with data.growing(tmp_path, "rows") as append:
        append({"a": 1})
        (tmp_path / "rows-0.jsonl").write_text('{"b": 2}\n{"c": ')
        assert data.read_growing(tmp_path, "rows") == [{"b": 2}, {"a": 1}]


# ---------------------------------------------------------------------------------- demo and show
def test_demo_split_is_disjoint():
    train, test = ({row["messages"][-2]["content"] for row in data.demo_conversations(n, 0, split)}
                   for split, n in (("train", 3000), ("test", 200)))
    assert not train & test


def test_show_marks_what_is_trained(source, capsys, tmp_path):
    a = source([{"messages": QA}])
    data.main(["show", "--rows", "1", "--data", a, "--cache-dir", str(tmp_path)])
    assert "assistant\n\u27e6ab<|im_end|>\u27e7" in capsys.readouterr().out


def test_no_dead_flag():
    """Every flag of every command is read somewhere in data.py."""
    source = Path(data.__file__).read_text()
    commands = data.parser()._subparsers._group_actions[0].choices
    for command in commands.values():
        for action in command._actions:
            name = action.dest
            assert name == "help" or re.search(rf'args\.{name}\b|"{name}"', source), name


def test_an_order_of_each_epoch():
    """Each epoch and each seed has its own order of all rows, the same at every call."""
    orders = [data.permutation(9, seed, epoch).tolist() for seed in (1, 2) for epoch in (0, 1, 0)]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert orders[0] == orders[2]
    assert orders[3] == orders[5]
    assert len(set(map(tuple, orders))) == 4
