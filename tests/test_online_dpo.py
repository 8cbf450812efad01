"""online_dpo.py: pairs and ranks by hand, PairRM against its rules, judges, servers that misbehave, whole runs that
are killed in every phase, bad input."""
import http.server
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
import data
import online_dpo
import sft
from conftest import start_ranks

JUDGE = "def score(prompt, answers, reference):\n    return [sum(map(ord, a)) % 97 for a in answers]\n"
RUN = ["--preset", "demo", "--data", "demo:test", "--eval-data", "demo-pairs:test=0.1", "--eval-samples", "8", "--max-prompts", "40",
       "--max-new-tokens", "8", "--samples", "3", "--iterations", "1", "--truncated-can-win", "--max-steps", "2", "--kl-prompts", "4",
       "--sampling-rows", "16"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A small model folder, trained until its answers are text, a cache, and a judge's file."""
    folder = tmp_path_factory.mktemp("policy")
    sft.main(["--data", "demo:test", "--max-length", "128", "--batch-size", "6", "--eval-samples", "0", "--max-steps", "40",
              "--preset", "demo", "--output", str(folder / "run"), "--cache-dir", str(folder / "cache")])
    (folder / "judge.py").write_text(JUDGE)
    return folder / "run"


def flags(policy, out, *rest):
    return [*RUN, "--model", str(policy), "--judge", f"python:{policy.parent}/judge.py:score", "--output", str(out),
            "--cache-dir", str(policy.parent / "cache"), *map(str, rest)]


# --------------------------------------------------------------------------------------------- maths
def test_ranking_by_hand():
    """C = [[., 3, 1], [1, ., 0], [2, 0, .]]: C - C^T = [[0, 2, -1], [-2, 0, 0], [1, 0, 0]], means 1/3, -2/3, 1/3: the first
    and third tie at rank 1, the second is third. The diagonal is not looked at."""
    s = online_dpo.scores_from_comparisons([[9, 3, 1], [1, 9, 0], [2, 0, -9]])
    assert s == pytest.approx([1 / 3, -2 / 3, 1 / 3]) and online_dpo.ranks(s).tolist() == [1, 3, 1]
    assert online_dpo.ranks([5, 7, 5]).tolist() == [2, 1, 2]


def row(*texts, cut=()):
    return {"key": "k", "prompt": [{"role": "user", "content": "q"}], "answer": None,
            "answers": [{"text": t, "finished": i not in cut} for i, t in enumerate(texts)]}


@pytest.mark.parametrize("texts, scores, cut, wanted", [
    ("a b c", [1, 3, 2], (), ("b", "a", 2)),
    ("a b c", [1, 1, 0], (), ("a", "c", 1)),                # a tie at the top: the first sample
    ("a b c", [1, 0, 0], (), ("a", "b", 1)),                # and at the bottom
    ("a b c", [1, 3, 2], (1,), ("c", "a", 1)),              # a cut answer cannot win
    ("a b c", [1, 3, 0], (2,), ("b", "c", 3)),              # it may lose
    ("a b c", [1, 3, 2], (0, 1, 2), "no_finished_answer"),
    ("a b c", [1, 0, 0], (0,), "only_truncated_better"),    # the best finished one is not above the worst
    ("a a a", [1, 2, 3], (), "all_equal"),
    ("a a b", [2, 2, 2], (), "tie"),
    ("a <s> b", [1, 9, 2], (), ("b", "a", 1)),              # a special string stands outside
    ("<s> <s> <s>", [1, 9, 2], (), "no_usable_answer"),
    ("a b c", [1, 1.4, 1.2], (), "gap_too_small")])
def test_pick_pairs_by_hand(texts, scores, cut, wanted):
    gap = 0.5 if wanted == "gap_too_small" else 0.0
    pairs, counts = online_dpo.pick_pairs([row(*texts.split(), cut=cut)], [scores], min_gap=gap, forbidden=["<s>"])
    if isinstance(wanted, str):
        assert not pairs and counts[wanted] == 1 and counts["pairs"] == 0
    else:
        p, = pairs
        assert (p["chosen"][0]["content"], p["rejected"][0]["content"], p["score_chosen"] - p["score_rejected"]) == wanted
        assert data.to_pair(p).chosen == wanted[0]          # a preference row like any other
    assert counts["prompts"] == 1 and counts["truncated_answers"] == len(cut)


def test_a_cut_answer_trains_no_end_of_turn(policy, tmp_path):
    """The tokens that a pair trains are those that were sampled: a cut answer's end of turn is not forged, in a pair, in its
    reference under another tokenizer's path, and where sft.py reads the chosen side."""
    tokenizer, template = sft.load_tokenizer(args_of(policy, tmp_path))
    pair, = online_dpo.pick_pairs([row("abc", "abd", "x", cut=[1])], [[3, 1, 2]])[0]
    assert pair["unfinished"] == ["rejected"]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    prepare = lambda **how: data.prepare([str(tmp_path / "pairs.jsonl")], tokenizer, template, max_length=128,
                                         cache_dir=str(tmp_path / "cache"), **how).dataset[0]
    made = prepare(pairs=True)
    scored = lambda side: [i for i, t in zip(made[side], made[f"{side}_targets"]) if t]
    word = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    assert scored("chosen") == [*word("abc"), template.end_of_turn_id]
    assert scored("rejected") == word("abd") and made["rejected"][-len(word("abd")):] == word("abd")
    *sides, unfinished = json.loads(made["messages_json"])
    assert data.encode_pair(data.Pair(*sides, unfinished=unfinished), tokenizer, template).rejected == made["rejected"]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair | {"unfinished": ["chosen"]}) + "\n")
    alone = prepare()
    assert [i for i, t in zip(alone["input_ids"], alone["targets"]) if t] == word("abc")


def test_pick_pairs_counts_every_prompt_once():
    rng = random.Random(0)
    rows = [row(*(rng.choice(["a", "b", "", "<s>"]) for _ in range(3)), cut=[k for k in range(3) if rng.random() < 0.4])
            for _ in range(500)]
    scores = [[rng.randint(0, 2) for _ in range(3)] for _ in rows]
    pairs, c = online_dpo.pick_pairs(rows, scores, forbidden=["<s>"], min_gap=2)
    assert len(pairs) == c["pairs"] > 0
    assert sum(c[k] for k in ("pairs", "no_usable_answer", "all_equal", "no_finished_answer", "only_truncated_better", "tie",
                              "gap_too_small")) == 500
    again = online_dpo.pick_pairs(rows, scores, forbidden=["<s>"], min_gap=2)
    assert again == (pairs, c)
    cut_wins = online_dpo.pick_pairs(rows, scores, forbidden=["<s>"], min_gap=2, truncated_can_win=True)[1]
    assert cut_wins["no_finished_answer"] == 0 and cut_wins["pairs"] > c["pairs"]


def test_judges_of_answers_by_hand():
    assert online_dpo.exact_answer(None, ["so #### 7", "7", "8"], "7") == [1, 1, 0]
    credit = lambda t: online_dpo.gsm8k_credit(None, [t], "1,200")[0]
    assert credit("x <<1+1=3>> #### 1200") == 1.0
    assert credit("<<2*3=6>> and <<6/4=2>> #### 5") == pytest.approx(0.1 + 0.4 * 0.5)
    assert credit("<<.5*10=5>>") == pytest.approx(0.4) and credit("nothing") == 0.0
    assert credit("#### 1200.00") == credit("#### 1,200.") == 1.0
    assert credit("<<1=1>> <<1e999*1=1e999>>") == 0.0      # no sum, and no number
    assert [online_dpo.calculated(x) for x in ("2*(3+4)", "-1,000/4", "1/0", "2**9", "__import__('os')", "a", "")] == \
        [14, -250, None, None, None, None, None]


# ------------------------------------------------------------------------------------------------ PairRM
@pytest.fixture(scope="module")
def pairrm(tmp_path_factory):
    """A folder in PairRM-hf's form: random tiny DeBERTa-v2 and head, a word tokenizer with [CLS] and [SEP]."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import DebertaV2Config, PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp("pairrm")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(50)), "source", "user", "assistant", ":"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
                                        unk_token="[UNK]")
    tokenizer.add_special_tokens({"additional_special_tokens": list(online_dpo.PREFIXES)})
    tokenizer.save_pretrained(folder)
    config = DebertaV2Config(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                             intermediate_size=32, relative_attention=True, position_buckets=8, max_relative_positions=-1,
                             pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm",
                             position_biased_input=False, type_vocab_size=0, max_position_embeddings=512)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    model = online_dpo.PairRM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def text(n, seed):
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(50)}" for _ in range(n))


def by_the_rules(folder, source, a, b):
    """One pair, alone, from the published rules: ids by hand, no padding, the head written out."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, DebertaV2Config, DebertaV2Model
    state, tokenizer = load_file(folder / "model.safetensors"), AutoTokenizer.from_pretrained(folder)
    body = DebertaV2Model(DebertaV2Config.from_pretrained(folder)).eval()
    body.load_state_dict({k.removeprefix("pretrained_model."): v for k, v in state.items() if k.startswith("pretrained_model.")})
    words = lambda t: [tokenizer.convert_tokens_to_ids(w) for w in t.split()]
    special = lambda t: tokenizer.convert_tokens_to_ids(t)
    part = lambda prefix, t, limit: [1, special(prefix), *words(t)[:limit - 3], 2]
    x = part("<|source|>", source, 1224)
    budget = 412 + (1224 - len(x)) // 2
    ids = x + part("<|candidate1|>", a, budget) + part("<|candidate2|>", b, budget)
    assert len(ids) <= 2048
    with torch.no_grad():
        h = body(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).last_hidden_state[0]
    at = {p: h[ids.index(special(p))] for p in ("<|source|>", "<|candidate1|>", "<|candidate2|>")}
    s = [(state["head_layer.4.weight"] @ torch.tanh(state["head_layer.1.weight"] @ torch.cat([at["<|source|>"], at[c]]) +
          state["head_layer.1.bias"]) + state["head_layer.4.bias"]).item() for c in ("<|candidate1|>", "<|candidate2|>")]
    return s[0] - s[1]


def all_logits(folder, source, answers, tokens=4096):
    model, tokenizer = online_dpo.PairRM.load(str(folder))
    cut = [0]
    rows = online_dpo.pairrm_rows(tokenizer, source, answers, cut)
    return dict(zip(rows, online_dpo.pairrm_logits(model, tokenizer, list(rows.values()), tokens, "cpu"))), cut[0]


def test_pairrm_equals_its_rules(pairrm):
    """All ordered pairs of 4 answers (two of them equal: a tie), short, long beyond the budget, and ranks."""
    source, answers = text(12, 1), [text(3, 2), text(40, 3), text(7, 4), text(3, 2)]
    got, cut = all_logits(pairrm, source, answers)
    c = np.zeros((4, 4))
    for i, j in itertools.permutations(range(4), 2):
        c[i, j] = by_the_rules(pairrm, source, answers[i], answers[j])
        assert got[i, j] == pytest.approx(c[i, j], abs=1e-5)
    assert cut == 0 and np.abs(c).max() > 1e-2 and abs(c[0, 1] + c[1, 0]) > 1e-4       # not antisymmetric
    spec = [sum(c[i, j] - c[j, i] for j in range(4) if j != i) / 4 for i in range(4)]
    scores = online_dpo.scores_from_comparisons(c)
    assert scores == pytest.approx(spec) and scores[0] == pytest.approx(scores[3], abs=1e-5)
    long = all_logits(pairrm, text(1500, 5), [text(900, 6), text(5, 7)])
    assert long[1] == 3                                     # the source once, the long answer as first and as second
    assert long[0][0, 1] == pytest.approx(by_the_rules(pairrm, text(1500, 5), text(900, 6), text(5, 7)), abs=1e-5)


def test_pairrm_neighbours_change_nothing(pairrm):
    source, answers = text(9, 1), [text(4, 2), text(60, 3), text(11, 4)]
    alone, beside = (all_logits(pairrm, source, answers, tokens)[0] for tokens in (1, 100_000))
    assert alone == pytest.approx(beside, abs=1e-5)


@pytest.mark.parametrize("special", ["[SEP]", "[CLS]", "[PAD]", *online_dpo.PREFIXES])
def test_pairrm_special_strings_in_texts_are_spaces(pairrm, special):
    plain, dirty = (all_logits(pairrm, f"w1{s}w2", [f"w3 {s} w4", f"{s}w5"])[0] for s in (" ", special))
    assert dirty == plain


def test_pairrm_renders_several_turns_as_lines():
    one = [{"role": "user", "content": "hi"}]
    assert online_dpo.as_text(one) == online_dpo.as_text([{"role": "system", "content": ""}, *one]) == "hi"
    assert online_dpo.as_text([*one, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "so"}]) == \
        "user: hi\nassistant: yo\nuser: so"


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_pairrm_load_is_strict(pairrm, tmp_path, change):
    import shutil
    from safetensors.torch import load_file, save_file
    shutil.copytree(pairrm, tmp_path / "x")
    state = load_file(tmp_path / "x/model.safetensors")
    if change == "missing":
        del state["head_layer.4.bias"]
    else:
        state["head_layer.9.bias"] = torch.zeros(1)
    save_file(state, tmp_path / "x/model.safetensors")
    with pytest.raises(ValueError, match=change + r": head_layer"):
        online_dpo.PairRM.load(str(tmp_path / "x"))


def args_of(policy, out, *rest):
    return sft.parse(flags(policy, out, *rest), online_dpo.parser, online_dpo.PRESETS, online_dpo.check_flags)


def test_pairrm_as_judge(policy, pairrm, tmp_path):
    rows = [row(text(3, 1), text(5, 2), text(4, 3)), row("w1", "w2", "w1")]
    judge = online_dpo.load_judge(args_of(policy, tmp_path, "--judge", f"pairrm:{pairrm}"), "cpu")
    s = online_dpo.score_responses(judge, rows)
    c = np.zeros((3, 3))
    for i, j in itertools.permutations(range(3), 2):
        c[i, j] = by_the_rules(pairrm, "q", *(rows[0]["answers"][k]["text"] for k in (i, j)))
    assert s[0] == pytest.approx(online_dpo.scores_from_comparisons(c), abs=1e-6)
    assert s[1, 0] == pytest.approx(s[1, 2], abs=1e-6) and abs(s[0]).max() > 1e-4


@pytest.mark.parametrize("pad", [True, False])
def test_reward_model_as_judge(policy, tmp_path, pad):
    """A random Llama reward model: scores in a batch equal each conversation alone, without a padding token, too, though the
    template ends in the end of text; special strings in an answer are spaces."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template += "{{ eos_token }}"
    if not pad:
        tokenizer.pad_token = None
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, pad_token_id=tokenizer.pad_token_id)).eval()
    model.save_pretrained(tmp_path / "rm"), tokenizer.save_pretrained(tmp_path / "rm")
    rows = [row("yes", "a longer answer", "no"), row("x", "yy", "z<|im_end|>z")]
    judge = online_dpo.load_judge(args_of(policy, tmp_path, "--judge", f"reward:{tmp_path}/rm"), "cpu")
    got = online_dpo.score_responses(judge, rows)
    for n, k in itertools.product(range(2), range(3)):
        said = rows[n]["prompt"] + [{"role": "assistant", "content": rows[n]["answers"][k]["text"].replace("<|im_end|>", " ")}]
        ids = tokenizer(tokenizer.apply_chat_template(said, tokenize=False), add_special_tokens=False).input_ids
        assert ids[-1] == tokenizer.eos_token_id
        assert got[n, k] == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)


# ----------------------------------------------------------------------------------------------- servers
class Server:
    """An OpenAI-compatible server on loopback whose replies `reply(payload, n)` makes: text, a status, (a status, bytes
    promised), b"raw" or None (it hangs)."""

    def __init__(self, reply):
        self.seen, self.keys, outer = [], set(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append(payload)
                outer.keys.add(self.headers["Authorization"])
                made = reply(payload, len(outer.seen))
                if made is None:
                    time.sleep(3)
                if isinstance(made, tuple):                 # a status, and a body that breaks off
                    self.send_response(made[0]), self.send_header("Content-Length", str(made[1])), self.end_headers()
                    self.wfile.write(b"no")
                    return
                if isinstance(made, int):
                    self.send_response(made), self.end_headers()
                    self.wfile.write(b"no")
                    return
                self.send_response(200), self.end_headers()
                self.wfile.write(made if isinstance(made, bytes) else json.dumps({"choices": [
                    {"message": {"content": made}, "finish_reason": "stop"}], "usage": {"completion_tokens": 2}}).encode())

            def log_message(self, *_):
                pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def fast(monkeypatch):
    wait = time.sleep
    monkeypatch.setattr(online_dpo.time, "sleep", lambda s: wait(min(s, 3 if s == 3 else 0.01)))


def test_server_that_misbehaves_is_survived(policy, tmp_path, fast):
    bad = [429, 500, 503, (503, 5000), b"garbage", b"{}", b'{"choices": [{"message": {"content": null}}]}', None]
    server = Server(lambda p, n: bad[n - 1] if n <= len(bad) else "fine")
    args = args_of(policy, tmp_path, "--timeout", "0.5", "--retries", "8")
    assert online_dpo.chat(server.url, {}, args, "--base-url") == ("fine", True, 2)
    assert len(server.seen) == len(bad) + 1


def test_a_reply_that_went_into_reasoning_is_empty_and_cut(policy, tmp_path):
    server = Server(lambda p, n: b'{"choices": [{"message": {"content": null}, "finish_reason": "length"}], "usage": null}')
    assert online_dpo.chat(server.url, {}, args_of(policy, tmp_path), "--base-url") == ("", False, 0)


@pytest.mark.parametrize("key", ["sk-ab\ncd", "sk-\u2026"])
def test_a_key_that_no_header_can_hold_is_named_not_shown(policy, tmp_path, monkeypatch, key):
    server = Server(lambda p, n: "fine")
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY: holds a character") as error:
        online_dpo.chat(server.url, {}, args_of(policy, tmp_path), "--judge-url")
    assert not server.seen and "sk-" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", " sk-ab\n")         # as from a file
    assert online_dpo.chat(server.url, {}, args_of(policy, tmp_path), "--judge-url")[0] == "fine" and server.keys == {"Bearer sk-ab"}


def test_each_endpoint_gets_its_own_key(policy, tmp_path, monkeypatch):
    """The policy's server hears SERVER_API_KEY, the judge OPENAI_API_KEY; without the first, the policy's server hears none."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-judge")
    monkeypatch.setenv("SERVER_API_KEY", "sk-server")
    (tmp_path / "t.txt").write_text("{prompt}{answer_a}{answer_b}")
    served, judge = Server(lambda p, n: f"answer {n}"), Server(lambda p, n: "[[A]]")
    args = args_of(policy, tmp_path, "--engine", "server", "--base-url", served.url, "--judge", "llm:x", "--judge-url", judge.url,
                   "--judge-template", tmp_path / "t.txt")
    answers = lambda: list(online_dpo.answers_of(args, "me", None, [row("a", "b", "c")], frozenset(), "cpu", 0))
    answers(), online_dpo.score_responses(online_dpo.load_judge(args, "cpu"), [row("a", "b", "c")])
    assert served.keys == {"Bearer sk-server"} and judge.keys == {"Bearer sk-judge"}
    monkeypatch.delenv("SERVER_API_KEY"), served.keys.clear()
    assert answers() and served.keys == {None}


@pytest.mark.parametrize("reply, told", [(404, "HTTP 404"), (401, "HTTP 401"), (500, "HTTP 500"), (b"garbage", "JSONDecodeError"),
                                         (None, "[Tt]imed ?[Oo]ut|TimeoutError")])
def test_server_that_stays_bad_is_named(policy, tmp_path, fast, reply, told):
    server = Server(lambda p, n: reply)
    args = args_of(policy, tmp_path, "--timeout", "0.3", "--retries", "2")
    with pytest.raises(ValueError, match=f"--base-url {server.url}: .*{told}"):
        online_dpo.chat(server.url, {}, args, "--base-url")
    assert len(server.seen) == (1 if reply in (404, 401) else 3)


def test_missing_endpoint_is_named(policy, tmp_path, fast):
    with pytest.raises(ValueError, match="--base-url http://127.0.0.1:9/v1: 2 tries failed.*refused"):
        online_dpo.chat("http://127.0.0.1:9/v1", {}, args_of(policy, tmp_path, "--retries", "1"), "--base-url")


def test_server_engine_loses_nothing(policy, tmp_path, fast):
    """The server dies for good after 50 answers; the second run asks for the missing 70 alone."""
    alive = [True]
    server = Server(lambda p, n: 401 if alive[0] and n > 50 else f"answer {n} {p['messages'][-1]['content']}")
    run = flags(policy, tmp_path / "run", "--engine", "server", "--base-url", server.url, "--concurrency", "4")
    with pytest.raises(ValueError, match="HTTP 401"):
        online_dpo.main(run)
    file = tmp_path / "run/iteration-1/answers-0.jsonl"
    before, alive[0] = file.read_bytes(), False
    assert before.count(b"\n") == 50
    server.seen.clear()
    report = online_dpo.main(run)
    rows = [json.loads(x) for x in file.read_text().splitlines()]
    assert file.read_bytes().startswith(before) and len(server.seen) == 70
    assert len({(r["key"], r["sample"]) for r in rows}) == len(rows) == 120 and report["pairs"] > 0


def test_requests_that_a_server_refuses_are_empty_answers(policy, tmp_path, fast, capfd):
    """HTTP 400 for prompts of an even length: empty, unfinished, counted, and the others go on. For all: nothing is recorded."""
    size = lambda p: len(p["messages"][-1]["content"])
    server = Server(lambda p, n: 400 if size(p) % 2 == 0 else f"answer {n}")
    report = online_dpo.main(flags(policy, tmp_path / "run", "--engine", "server", "--base-url", server.url, "--concurrency", "4"))
    rows = online_dpo.read_growing(tmp_path / "run/iteration-1", "answers-*.jsonl")
    prompts = {r["key"]: r["prompt"] for r in map(json.loads, (tmp_path / "run/iteration-1/prompts.jsonl").read_text().splitlines())}
    for r in rows:
        assert (r["text"] == "" and not r["finished"]) == (size({"messages": prompts[r["key"]]}) % 2 == 0)
    refused = sum(r["text"] == "" for r in rows)
    assert len(rows) == 120 and 0 < refused < 120 and f"{refused} of 120 requests were refused" in capfd.readouterr().err
    assert report["pairs"] > 0
    server = Server(lambda p, n: 400)
    with pytest.raises(ValueError, match="HTTP 400"):
        online_dpo.main(flags(policy, tmp_path / "all", "--engine", "server", "--base-url", server.url))
    assert not online_dpo.read_growing(tmp_path / "all/iteration-1", "answers-*.jsonl")


def test_a_loop_that_is_left_begins_no_more_work():
    begun = []
    work = lambda x: (begun.append(x), time.sleep(0.01))
    for n, _ in enumerate(online_dpo.in_parallel(work, range(1000), 4)):
        if n == 5:
            break
    seen = len(begun)
    time.sleep(0.1)
    assert len(begun) == seen < 30
    assert sorted(x for x, _ in online_dpo.in_parallel(lambda x: x, range(100), 3)) == list(range(100))


def test_llm_judge_asks_both_orders(policy, tmp_path):
    """An LLM that always prefers the longer answer, and the first where both are as long: both orders cancel to a tie."""
    def reply(payload, n):
        assert payload["temperature"] == 0
        a, b = payload["messages"][0]["content"].split("|")[1:]
        return f"I think [[B]]... no: [[{'A>B' if len(a) >= len(b) else 'B>A'}]]"
    server = Server(reply)
    (tmp_path / "t.txt").write_text("{prompt}|{answer_a}|{answer_b}")
    args = args_of(policy, tmp_path, "--judge", "llm:any", "--judge-url", server.url, "--judge-template", tmp_path / "t.txt")
    s = online_dpo.score_responses(online_dpo.load_judge(args, "cpu"), [row("aa", "{prompt}", "b")])
    assert len(server.seen) == 6 and online_dpo.ranks(s[0]).tolist() == [2, 1, 3]
    tie = online_dpo.score_responses(online_dpo.load_judge(args, "cpu"), [row("aa", "bb", "cc")])
    assert tie.tolist() == [[0, 0, 0]]


def test_llm_verdicts_are_paid_once(policy, tmp_path, fast):
    """The judge's server fails for good after 100 verdicts of 40 prompts x 6: the second run asks for the other 140, and ends
    with the scores of a run that was never stopped. A template of another text is refused."""
    def reply(p, n):
        a, b = p["messages"][0]["content"].split("@@@")[1:]
        return 400 if broken[0] and n > 100 else f"[[{'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'C'}]]"
    broken, template = [False], tmp_path / "t.txt"
    template.write_text("{prompt}@@@{answer_a}@@@{answer_b}")

    def run(name, server):
        return online_dpo.main(flags(policy, tmp_path / name, "--judge", "llm:any", "--judge-url", server.url, "--judge-template", template))
    server = Server(reply)
    run("whole", server)
    assert len(server.seen) == 240
    broken[0], server = True, Server(reply)
    with pytest.raises(ValueError, match="HTTP 400"):
        run("broken", server)
    file = tmp_path / "broken/iteration-1/verdicts-0.jsonl"
    assert file.read_bytes().count(b"\n") == 100
    broken[0], server = False, Server(reply)
    template.write_text("{prompt}@@@{answer_a}@@@{answer_b} ")
    with pytest.raises(ValueError, match="--judge-template-hash: was"):
        run("broken", server)
    template.write_text("{prompt}@@@{answer_a}@@@{answer_b}")
    run("broken", server)
    lines = [json.loads(x) for x in file.read_text().splitlines()]
    assert len(server.seen) == 140 and len({(v["key"], *v["pair"]) for v in lines}) == len(lines) == 240
    same_end(*(tmp_path / name / "iteration-1" for name in ("whole", "broken")))


@pytest.mark.slow
def test_transformers_serve(policy, tmp_path):
    """The real thing on loopback. Greedy answers equal those of the hf engine; at temperature 0.8 a run killed at half its
    answers asks, restarted, for the others alone: what was on disk stays, byte for byte, and none is doubled."""
    for extra in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(extra, reason="pip install transformers[serving]")
    import shutil
    import socket
    model = tmp_path / "model"
    shutil.copytree(policy, model), shutil.copytree(policy.parent / "cache", tmp_path / "cache")
    shutil.copy(policy.parent / "judge.py", tmp_path)
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"do_sample": True}))     # else it is always greedy
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen([str(Path(sys.executable).parent / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    served = ["--engine", "server", "--base-url", f"http://127.0.0.1:{port}/v1", "--concurrency", "1", "--retries", "7"]
    try:
        texts = lambda folder: {(r["key"], r["sample"]): r["text"] for r in online_dpo.read_growing(folder, "answers-*.jsonl")}
        for name, rest in (("hf", []), ("server", served)):
            with pytest.raises(ValueError, match="(all_equal|no_usable_answer) [1-8]"):     # greedy: K equal answers, no pair
                online_dpo.main(flags(model, tmp_path / name, "--samples", "2", "--max-prompts", "8", "--temperature", "0", *rest))
        greedy = texts(tmp_path / "server/iteration-1")
        assert greedy == texts(tmp_path / "hf/iteration-1") and len(greedy) == 16 and len(set(greedy.values())) > 1
        folder = killed_and_resumed(model, tmp_path, [("answers-*.jsonl", 60)], 1, *served)
        assert len(texts(folder)) == len(online_dpo.read_growing(folder, "answers-*.jsonl")) == 120
    finally:
        server.kill()


# ------------------------------------------------------------------------------------------- whole runs
def test_a_run_and_its_folder(policy, tmp_path):
    """Two iterations: files, counts that agree, a policy that moves on, an ordinary model folder, a finished run refused."""
    from transformers import AutoModelForCausalLM
    result = online_dpo.main(flags(policy, tmp_path / "run", "--iterations", "2", "--mix", "demo-pairs:test=0.05"))
    folders = [tmp_path / "run" / f"iteration-{i}" for i in (1, 2)]
    for f, source in zip(folders, (policy, folders[0])):
        report = json.loads((f / "report.json").read_text())
        pairs = [json.loads(x) for x in (f / "pairs.jsonl").read_text().splitlines()]
        assert report["policy"] == str(source) and len(pairs) == report["pick"]["pairs"]
        assert report["pairs"] > len(pairs)                 # the mixed ones beside them
        assert len(online_dpo.read_growing(f, "answers-*.jsonl")) == 120 and report["length"] <= 8
        assert report["score_worst"] <= report["score_all"] <= report["score_best"] and 0 <= report["distinct"] <= 1
        AutoModelForCausalLM.from_pretrained(f)
    assert result["output"] == str(folders[1]) and result["iterations"] == 2
    assert (folders[0] / "prompts.jsonl").read_text() != (folders[1] / "prompts.jsonl").read_text()
    assert (tmp_path / "run/report.png").stat().st_size > 10_000 and "| 2 |" in (tmp_path / "run/report.md").read_text()
    with pytest.raises(ValueError, match="finished run"):
        online_dpo.main(flags(policy, tmp_path / "run", "--iterations", "2", "--mix", "demo-pairs:test=0.05"))


def killed_and_resumed(policy, tmp_path, moments, ranks, *rest):
    """A run killed when a file of a phase has so many lines, restarted; the bytes on disk stay. The folder at its end."""
    folder, log = tmp_path / "killed/iteration-1", tmp_path / "killed"
    tmp_path.mkdir(exist_ok=True)
    kept = {}
    start = lambda: start_ranks("online_dpo.py", flags(policy, tmp_path / "killed", *rest), ranks, log)
    for pattern, lines in moments:
        processes = start()
        while sum(f.read_bytes().count(b"\n") for f in folder.glob(pattern)) < lines:
            assert processes[0].poll() is None, Path(f"{log}.0.log").read_text()[-3000:]
            time.sleep(0.01)
        for p in processes:
            p.kill()
            p.wait()
        for f in folder.glob("answers-*.jsonl"):            # and torn in the middle of a line
            f.write_bytes(f.read_bytes() + b'{"key": "half a li') if lines % 2 else None
        kept = {f: f.read_bytes()[:f.read_bytes().rfind(b"\n") + 1] for f in folder.glob("*-[01].jsonl")}
        if pattern == "scores-*.jsonl":
            assert kept
    assert [p.wait() for p in start()] == [0] * ranks, Path(f"{log}.0.log").read_text()[-3000:]
    for f, raw in kept.items():
        assert f.read_bytes().startswith(raw), f
    return folder


def slow_judge(policy) -> Path:
    """The judge's file with a pause before each prompt, so that a kill finds it at work."""
    file = policy.parent / "slow.py"
    file.write_text("import time\n" + JUDGE.replace("    return", "    time.sleep(0.02)\n    return"))
    return file


def same_end(a: Path, b: Path):
    """Answers, scores and pairs of two iterations are equal, each there once."""
    for name in ("answers", "scores"):
        x, y = (sorted(online_dpo.read_growing(f, f"{name}-*.jsonl"), key=lambda r: (r["key"], r.get("sample", 0))) for f in (a, b))
        assert x == y and len({(r["key"], r.get("sample")) for r in x}) == len(x) > 0
    assert (a / "pairs.jsonl").read_bytes() == (b / "pairs.jsonl").read_bytes()


def test_killed_in_every_phase_equals_uninterrupted(policy, tmp_path):
    """SIGKILL while sampling (twice, once with a torn line), judging and training: the same answers (at temperature 1), scores
    and pairs, bit-equal weights."""
    rest = ["--judge", f"python:{slow_judge(policy)}:score", "--save-every", "1", "--max-steps", "4"]
    killed_and_resumed(policy, tmp_path / "whole", [], 1, *rest)
    folder = killed_and_resumed(policy, tmp_path, [("answers-*.jsonl", 31), ("answers-*.jsonl", 70), ("scores-*.jsonl", 16),
                                                   ("metrics.jsonl", 2)], 1, *rest)
    same_end(folder, tmp_path / "whole/killed/iteration-1")
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole/killed/iteration-1/model.safetensors").read_bytes()


def test_sigterm_ends_the_sampling_after_a_training(policy, tmp_path):
    """The trainer's SIGTERM (save and stop) is its own: in the second iteration's sampling the signal ends the process at once."""
    p, = start_ranks("online_dpo.py", flags(policy, tmp_path / "run", "--iterations", "2", "--max-new-tokens", "400", "--sampling-rows",
                                            "2", "--max-prompts", "8"), 1, tmp_path / "log")
    answers = tmp_path / "run/iteration-2/answers-0.jsonl"
    while p.poll() is None and not (answers.exists() and answers.stat().st_size):
        time.sleep(0.01)
    p.terminate()
    assert p.wait(timeout=60) == -signal.SIGTERM, (tmp_path / "log.0.log").read_text()[-2000:]


@pytest.mark.slow
def test_two_ranks_killed_at_random_moments(policy, tmp_path):
    """Two ranks, six random moments in sampling, judging and training: the answers, scores and pairs of one rank uninterrupted."""
    rest = ["--judge", f"python:{slow_judge(policy)}:score", "--save-every", "1", "--max-steps", "12"]
    online_dpo.main(flags(policy, tmp_path / "whole", *rest))
    rng = random.Random(1)
    moments = [*sorted(("answers-*.jsonl", rng.randrange(1, 120)) for _ in range(3)), ("scores-*.jsonl", 16),
               *sorted(("metrics.jsonl", rng.randrange(1, 8)) for _ in range(2))]
    same_end(killed_and_resumed(policy, tmp_path, moments, 2, *rest), tmp_path / "whole/iteration-1")


def test_continuous_batching_equals_padded(policy):
    """transformers' continuous batching, greedy: the same answers; sampled: K of each, none twice."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32), AutoTokenizer.from_pretrained(policy)
    prompts = [r["messages"][:-1] for r in data.demo_conversations(6, 3, "test")]
    padded, paged = ({(a.prompt, a.sample): (a.text, a.finished) for a in sample(model, tokenizer, prompts, 6, samples=2, done={(1, 0)})}
                     for sample in (sft.sample_responses, online_dpo.sample_continuously))
    assert padded == paged and len(paged) == 11


def test_continuous_batching_after_a_restart_draws_anew(policy, tmp_path):
    """What a restart samples are no copies of the answers that are there; and soft-capping, which it would leave out, is refused."""
    import shutil
    tokenizer = sft.load_tokenizer(args_of(policy, tmp_path))[0]
    rows = [{"key": str(i), "prompt": r["messages"][:-1]} for i, r in enumerate(data.demo_conversations(3, 3, "test"))]
    args = args_of(policy, tmp_path, "--batching", "continuous", "--max-new-tokens", "12", "--temperature", "1.5")
    texts = lambda done: {(a.prompt, a.sample): a.ids for a in online_dpo.answers_of(args, str(policy), tokenizer, rows, done,
                                                                                     torch.device("cpu"), 1)}
    whole, rest = texts(frozenset()), texts({(0, 0)})
    assert whole.keys() - rest.keys() == {(0, 0)} and rest == texts({(0, 0)})
    assert not [k for k in rest if len(rest[k]) > 4 and rest[k] in whole.values()] and max(map(len, rest.values())) > 4
    shutil.copytree(policy, tmp_path / "capped")
    config = json.loads((policy / "config.json").read_text())
    (tmp_path / "capped/config.json").write_text(json.dumps(config | {"attn_logit_softcapping": 5.0}))
    with pytest.raises(ValueError, match="--batching continuous: .*soft-capping"):
        list(online_dpo.answers_of(args, str(tmp_path / "capped"), tokenizer, rows, frozenset(), torch.device("cpu"), 1))


def test_training_leaves_no_engine_in_memory(policy, tmp_path):
    """At ZeRO 1 DeepSpeed's hooks hold an engine, its weights and moments in cycles: each iteration lets go of its own."""
    import gc
    from deepspeed import DeepSpeedEngine
    engines = lambda: sum(type(x) is DeepSpeedEngine for x in gc.get_objects())
    gc.collect()
    before = engines()
    online_dpo.main(flags(policy, tmp_path / "run", "--zero", "1", "--iterations", "2", "--kl-prompts", "0", "--max-steps", "1"))
    assert engines() <= before


# ------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("rest, told", [
    (["--samples", "1"], "--samples 1: best against worst needs at least 2"),
    (["--engine", "server"], "--engine server: needs --base-url"),
    (["--judge", "python:nowhere.py:f"], "no file 'nowhere.py'"),
    (["--judge", "python:online_dpo.py:nothing"], "has no function 'nothing'"),
    (["--judge", f"python:{__file__[:-3]}.txt:f"], "no file .*write python:FILE.py:FUNCTION"),
    (["--judge", "llm:x"], "--judge llm:x: needs --judge-url"),
    (["--judge", "best"], "--judge best: not pairrm"),
    (["--base-url", "http://x/v1"], "--base-url http://x/v1: without effect, it belongs to --engine server"),
    (["--judge", "python:online_dpo.py:exact_answer", "--data", "PAIRS"], "no row of --data has a reference answer"),
    (["--ref", "x"], "--ref x: the reference of online DPO is the policy that samples"),
    (["--top-p", "0"], "--top-p 0.0: must lie in"),
    (["--temperature", "-1"], "--temperature -1.0: must not be below 0"),
    (["--max-new-tokens", "5000"], r"no prompt is left: \d+ are longer than the context of 4096"),
    (["--temperature", "0"], "0 pairs of 40 prompts; nothing to train on.*(all_equal|no_usable_answer) 40")])
def test_bad_input_is_one_message(policy, tmp_path, rest, told):
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n')
    with pytest.raises(ValueError, match=told):
        online_dpo.main(flags(policy, tmp_path / "run", *(tmp_path / "p.jsonl" if x == "PAIRS" else x for x in rest)))


def test_a_model_that_does_not_stop_at_the_end_of_turn_is_named(policy, tmp_path):
    import shutil
    shutil.copytree(policy, tmp_path / "model")
    config = json.loads((policy / "generation_config.json").read_text())
    (tmp_path / "model/generation_config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
    with pytest.raises(ValueError, match=r"stops at \[1\], not at the template's <\|im_end\|> \(3\)"):
        online_dpo.main(flags(policy, tmp_path / "run", "--model", tmp_path / "model"))


@pytest.mark.parametrize("body, told", [("[float('nan')] * len(answers)", "not finite numbers"), ("[1.0]", r"scores of shape \(1,\)"),
                                        ("None", r"scores of shape \(\)|not finite"),
                                        ("answers[99]", r"IndexError: list index out of range \(.*j.py:5\)")])
def test_judge_that_returns_rubbish_is_named_and_nothing_lost(policy, tmp_path, body, told):
    """The judge goes wrong at the 20th prompt: the scores before it stay, a mended judge goes on."""
    judge = tmp_path / "j.py"
    judge.write_text(f"n = 0\ndef score(prompt, answers, reference):\n    global n\n    n += 1\n"
                     f"    return [sum(map(ord, a)) % 97 for a in answers] if n < 20 else {body}\n")
    run = flags(policy, tmp_path / "run", "--judge", f"python:{judge}:score")
    with pytest.raises(ValueError, match=told):
        online_dpo.main(run)
    scores = tmp_path / "run/iteration-1/scores-0.jsonl"
    before = scores.read_bytes()
    assert before.count(b"\n") == 19
    judge.write_text(JUDGE)
    assert online_dpo.main(run)["pairs"] > 0 and scores.read_bytes().startswith(before)


def test_judge_file_may_hold_dataclasses(tmp_path):
    (tmp_path / "j.py").write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass X:\n"
                                   "    a: int\ndef score(p, a, r):\n    return X(1).a\n")
    assert online_dpo.judge_function(f"{tmp_path}/j.py:score")(0, 0, 0) == 1


def test_judge_file_that_cannot_be_imported_is_named(policy, tmp_path):
    (tmp_path / "j.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ValueError, match=r"j.py cannot be imported: ModuleNotFoundError: .*j.py:1"):
        online_dpo.main(flags(policy, tmp_path / "run", "--judge", f"python:{tmp_path}/j.py:score"))


def test_changed_flags_are_refused(policy, tmp_path):
    (tmp_path / "j.py").write_text("def score(p, a, r):\n    return None\n")
    with pytest.raises(ValueError, match="scores of shape|not finite"):
        online_dpo.main(flags(policy, tmp_path / "run", "--judge", f"python:{tmp_path}/j.py:score"))
    with pytest.raises(ValueError, match="--max-new-tokens: was 8, now 9"):
        online_dpo.main(flags(policy, tmp_path / "run", "--judge", f"python:{tmp_path}/j.py:score", "--max-new-tokens", "9"))
