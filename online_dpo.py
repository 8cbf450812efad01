"""Stage 3, online DPO (LIONs, 2407.06542, section 3): sample K, judge, train best against worst.

    y_1 .. y_K ~ pi(. | x)                  K samples of the present policy, temperature 0.8
    s_1 .. s_K = judge(x, y_1 .. y_K)       PairRM, a reward model, an LLM, or your function
    y_w, y_l   = y_argmax s, y_argmin s     prompts without a real difference are counted
    DPO on (x, y_w, y_l) from pi, with pi as reference (dpo.py), --iterations times

Reads   prompts (--data: any conversations or pairs, see data.py), the DPO model (--model).
Writes  --output/iteration-i: prompts.jsonl, answers-*.jsonl, scores-*.jsonl, pairs.jsonl (a source
        for --data), report.json and the trained model. --output: run.json, report.md, report.png.
Answers, scores and an LLM's replies are written to disk as they finish. The same command resumes.

    python online_dpo.py                                           # the demo, after dpo.py
    python online_dpo.py --model runs/gemma-2b-dpo                 # one GPU
    deepspeed online_dpo.py --model runs/llama-3-8b-dpo            # all GPUs
    python online_dpo.py --model RUN --serve 'vllm serve {model} --port {port}'
    python online_dpo.py --model RUN --judge python:FILE:FUNCTION  # (prompt, answers, reference)

Differs from the paper
 1. PairRM's token budget depends on a row alone. The original's depends on its batch.
 2. Answers cut by --max-new-tokens cannot win (--truncated-can-win: they can).
 3. On the padded sampler, sample k of a prompt depends only on (seed, iteration, prompt, k).

Step 0 of each iteration's training: loss ln 2 = 0.6931. The demo ends near 0.73 exact match, from
0.64.
"""
from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import data
import dpo
from data import (growing, hash_of, positive, prompt_ids, read_growing, write_json, write_lines)
from sft import (MAY_CHANGE, check_machines, check_resume, delete_run, device, free_memory,
                 git_commit, init_distributed, log, own_folder, parse, prepare_rows, published,
                 run_main, torch_dtype)

ULTRAFEEDBACK = dict(data=["HuggingFaceH4/ultrafeedback_binarized:train_prefs"], epochs=1, lr=5e-7,
                     max_length=2048, max_prompt_length=512, empty_system=0.8,
                     gradient_checkpointing=True)
PRESETS = {  # the paper's table as argparse defaults
    "demo": dict(model="runs/dpo", data=["demo:train=0.2"], eval_data=["demo-pairs:test"],
                 batch_size=32, max_length=512, max_prompt_length=256, lr=2e-5, beta=1.0,
                 iterations=3, max_prompts=5000, max_new_tokens=64, sampling_rows=256,
                 judge="python:online_dpo.py:exact_answer", output="runs/online-dpo"),
    "gemma-2b": dict(ULTRAFEEDBACK, model="runs/gemma-2b-dpo", batch_size=32, beta=0.05, zero=1,
                     output="runs/gemma-2b-online-dpo"),
    "llama-3-8b": dict(ULTRAFEEDBACK, model="runs/llama-3-8b-dpo", batch_size=128, beta=0.01,
                       zero=3, output="runs/llama-3-8b-online-dpo")}


# -------------------------------------------------------------------- ranking, best against worst
def scores_from_comparisons(c):
    """PairRM's ranking (LLM-Blender 2306.02561): score_i = mean_j (C_ij - C_ji).

    c (K, K): c[i, j] is how far answer i, shown first, beats answer j, shown second. The matrix is
    not antisymmetric: both orders count. The diagonal is ignored. Returns (K,). C_01 = 3, C_10 =
    1: 1, -1."""
    c = np.asarray(c, dtype=np.float64) * (1 - np.eye(len(c)))
    return (c - c.T).mean(1)


def pick_pairs(rows, scores, *, min_gap=0.0, truncated_can_win=False, forbidden=()):
    """Best against worst of each prompt's K answers (LIONs section 3), in the preference format.

    rows: {"prompt": messages, "answer": reference or None, "answers": K of {"text", "finished"}}.
    scores: (len(rows), K). Empty answers and answers with a `forbidden` (special) string are not
    used. Of equal answers the first finished one counts. A truncated answer may lose, but not win.
    Of equal scores the first sample counts. Prompts without a pair are counted: all_equal has fewer
    than two different answers, no_winner no finished answer above the worst, tie a score gap of 0
    or below min_gap. Returns the pairs and counts. Scores 1, 3, 2 give (second, first)."""
    counts = dict.fromkeys(("pairs", "truncated_answers", "unusable_answers", "all_equal",
                            "no_winner", "tie"), 0)
    pairs = []
    for row, s in zip(rows, np.asarray(scores, dtype=np.float64)):
        answers = row["answers"]
        different = {}
        finished = [a["finished"] for a in answers]
        counts["truncated_answers"] += len(answers) - sum(finished)
        for k in sorted(range(len(s)), key=lambda k: not finished[k]):
            text = answers[k]["text"]
            if text.strip() and not any(f in text for f in forbidden):
                different.setdefault(text.strip(), k)
            else:
                counts["unusable_answers"] += 1
        left = sorted(different.values())
        can_win = [k for k in left if truncated_can_win or finished[k]]
        if len(left) < 2:
            counts["all_equal"] += 1
            continue
        if not can_win:
            counts["no_winner"] += 1
            continue
        w = max(can_win, key=s.item)
        l = min(left, key=s.item)
        gap = data.gap(s[w], s[l])
        if gap > 0 and gap >= min_gap:
            counts["pairs"] += 1
            pairs.append({
                "prompt": row["prompt"], "answer": row["answer"], "source": "online",
                "chosen": [data.assistant(answers[w]["text"])],
                "rejected": [data.assistant(answers[l]["text"])],
                "score_chosen": s[w], "score_rejected": s[l],
                "unfinished": [side for side, k in (("chosen", w), ("rejected", l))
                               if not finished[k]]})
        elif gap <= 0 and max(s[left]) > s[l]:              # a truncated one alone is better
            counts["no_winner"] += 1
        else:
            counts["tie"] += 1
    return pairs, counts


# --------------------------------------------------------------------------------------- sampling
class Answer(NamedTuple):
    prompt: int                    # index into the prompts
    sample: int                    # which of the prompt's K
    text: str                      # without the end of turn, with any other special tokens
    tokens: int                    # as sampled, with the end of turn
    finished: bool                 # False: max_new_tokens came first
    refused: tuple = ()            # parts of the request that a server did not take


def stop_tokens(generation_config):
    """The ends of turn that a generation config names."""
    stops = generation_config.eos_token_id
    return {*(stops if isinstance(stops, list) else [stops])} - {None}


def answer_of(ids, prompt, sample, stops, tokenizer):
    finished = bool(ids) and ids[-1] in stops
    text = tokenizer.decode(ids[:len(ids) - finished])
    return Answer(prompt, sample, text, len(ids), finished)


def pick_token(logits, uniform, temperature: float, top_p: float):
    """One token per row by inverting the cumulative distribution. logits (B, V), uniform (B,) in
    [0, 1) -> (B,) int64. temperature 0: the most likely. top_p: of the smallest set of most likely
    tokens that holds at least top_p (Holtzman et al. 1904.09751). p = 1/2, 1/4, 1/4, uniform 0.6:
    token 1."""
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits.double() / temperature, -1)    # (B, V)
    token = None
    if top_p < 1:
        p, token = p.sort(descending=True, stable=True)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    total = p.cumsum(-1)
    at = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)     # (B, 1)
    at = at.clamp(max=p.shape[-1] - 1)
    return (at if token is None else token.gather(1, at))[:, 0]


def growing_cache():
    """A transformers cache that appends in place. Its own copies all keys for every token."""
    from transformers.cache_utils import Cache, DynamicLayer

    class GrowingLayer(DynamicLayer):
        def update(self, keys, values, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
                self.replace(keys[:, :, :0], values[:, :, :0])
            n, m = self.keys.shape[2], self.keys.shape[2] + keys.shape[2]
            if m > self.room:
                self.room = m + 64
                self.store = [F.pad(x, (0, 0, 0, self.room - n)) for x in (self.keys, self.values)]
            for store, new in zip(self.store, (keys, values)):
                store[:, :, n:m] = new
            self.keys, self.values = (store[:, :, :m] for store in self.store)
            return self.keys, self.values

        def replace(self, keys, values):
            self.keys = keys
            self.values = values
            self.room = 0
    return Cache(layer_class_to_replicate=GrowingLayer)


@dataclasses.dataclass
class PendingAnswer:
    """An answer that is being sampled."""
    prompt: int
    sample: int
    random: np.random.Generator    # of its uniform numbers, one per token
    ids: list[int] = dataclasses.field(default_factory=list)
    done: bool = False


class Decoder:
    """R pending answers, padded on the left: their caches, mask (R, W) and next logits (R, V)."""

    def __init__(self, model, prompts):
        ids = pad_sequence(list(map(torch.tensor, prompts)), True, -1, "left").to(model.device)
        self.model = model
        self.cache = growing_cache()
        self.mask = (ids >= 0).long()
        self.forward(ids.clamp(min=0))

    def forward(self, ids):
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        self.logits = self.model(
            input_ids=ids, attention_mask=self.mask, position_ids=positions, use_cache=True,
            past_key_values=self.cache, logits_to_keep=1).logits[:, -1]

    def step(self, token, live):
        """Append one token (R,) to every row. It counts in the rows that are `live`, (R,) bool: the
        positions of the others stand still."""
        live = torch.tensor(live, device=self.mask.device).long()
        self.mask = torch.cat([self.mask, live[:, None]], 1)
        self.forward(token[:, None])

    def keep(self, rows):
        """These rows, in this order, without columns that are padding in all of them."""
        rows = torch.tensor(rows, device=self.mask.device)
        first = int(self.mask[rows].any(0).float().argmax())
        self.mask = self.mask[rows, first:]
        self.logits = self.logits[rows]
        for layer in self.cache.layers:
            layer.replace(layer.keys[rows, :, first:], layer.values[rows, :, first:])

    def append(self, other):
        """Add the other decoder's rows behind these."""
        wider = other.mask.shape[1] - self.mask.shape[1]

        def joined(mine, theirs, *inner):
            mine = F.pad(mine, (*inner, max(0, wider), 0))
            return torch.cat([mine, F.pad(theirs, (*inner, max(0, -wider), 0))])
        self.mask = joined(self.mask, other.mask)
        self.logits = torch.cat([self.logits, other.logits])
        for a, b in zip(self.cache.layers, other.cache.layers):
            a.replace(joined(a.keys, b.keys, 0, 0), joined(a.values, b.values, 0, 0))


PROMPT_TOKENS = 16384              # computed at once at most, or one prompt


@torch.no_grad()
def sample_responses(model, tokenizer, prompts, wanted, max_new_tokens, *, temperature=0.0,
                     top_p=1.0, seeds=None, rows=64):
    """Answers to prompts (lists of messages), as they finish. wanted: (prompt, sample) pairs.

    At most `rows` answers are sampled at once. Finished ones leave the batch and waiting prompts,
    longest first, take their place. Both copy all caches, so that they happen when an eighth of the
    rows is done. A prompt is computed once for all its answers. Sample k of prompt i draws its
    numbers from (seeds[i], k) alone, so that neighbours change it only by rounding. model: a
    transformers model whose generation_config stops it."""
    model, stops = model.eval(), stop_tokens(model.generation_config)
    seeds = seeds or [0] * len(prompts)
    ids = {i: prompt_ids(tokenizer, prompts[i]) for i, _ in wanted}
    waiting = sorted(wanted, key=lambda w: -len(ids[w[0]]))
    work = []
    while waiting or not all(w.done for w in work):
        keep = [r for r, w in enumerate(work) if not w.done]
        if len(keep) <= 7 / 8 * len(work):                  # also at the start
            work = [work[r] for r in keep]
            if work:
                decoder.keep(keep)
            free = rows - len(work)
            new = waiting[:free]
            waiting = waiting[free:]
            prompts_left = list(dict.fromkeys(i for i, _ in new))
            while prompts_left:
                n = max(1, PROMPT_TOKENS // len(ids[prompts_left[0]]))
                once, prompts_left = prompts_left[:n], prompts_left[n:]
                part = [(i, k) for i, k in new if i in once]
                start = Decoder(model, [ids[i] for i in once])
                start.keep([once.index(i) for i, _ in part])
                if work:
                    decoder.append(start)
                else:
                    decoder = start
                for i, k in part:
                    random = np.random.Generator(np.random.Philox(key=[seeds[i], k]))
                    work.append(PendingAnswer(i, k, random))
        uniform = [w.random.random() for w in work]         # of a done row: not used
        uniform = torch.tensor(uniform, dtype=torch.float64, device=model.device)
        token = pick_token(decoder.logits, uniform, temperature, top_p)               # (R,)
        for w, t in zip(work, token.tolist()):
            if not w.done:
                w.ids.append(t)
                w.done = t in stops or len(w.ids) == max_new_tokens
                if w.done:
                    yield answer_of(w.ids, w.prompt, w.sample, stops, tokenizer)
        live = [not w.done for w in work]
        if any(live):
            decoder.step(token, live)


def sample_continuously(model, tokenizer, prompts, wanted, max_new_tokens, *,
                        temperature, top_p, seeds, rows):
    """`sample_responses` by transformers' continuous batching, the default on CUDA. Its draws
    depend on the order of the requests, so that a restart needs another seed."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    stops = stop_tokens(model.generation_config)
    draws = {}
    memory = {}
    if temperature > 0:
        draws = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    if model.device.type == "cpu":
        memory = dict(max_memory_percent=0.05, max_batch_tokens=1024)
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=sorted(stops), **draws,
                              pad_token_id=model.generation_config.pad_token_id)
    batching = ContinuousBatchingConfig(max_requests_per_batch=rows, **memory,
                                        seed=int(hash_of(seeds, wanted)[:7], 16))
    with model.continuous_batching_context_manager(
            generation_config=config, block=True, timeout=5,
            continuous_batching_config=batching) as manager:
        waiting = iter(wanted)

        def request(n):
            for i, k in itertools.islice(waiting, n):
                manager.add_request(prompt_ids(tokenizer, prompts[i]), request_id=f"{i}.{k}",
                                    max_new_tokens=max_new_tokens)
        request(4 * rows)                                   # it walks through all for every token
        left = len(wanted)
        while left:
            r = manager.get_result(timeout=1)               # None: nothing yet
            if r is None and manager.is_running():
                continue
            if r is None or r.error:
                problem = getattr(r, "error", "without a reason")
                raise ValueError(f"--batching continuous: stopped ({problem}); finished answers "
                                 "are on disk. Try --batching padded")
            if r.is_finished():
                left -= 1
                request(1)
                i, k = map(int, r.request_id.split("."))
                yield answer_of(r.generated_tokens, i, k, stops, tokenizer)


def sample_locally(args, policy, tokenizer, template, prompts, wanted, seeds):
    """The wanted answers by the model itself, as they finish."""
    from transformers import AutoModelForCausalLM
    model = data.load_weights(AutoModelForCausalLM, policy, dtype=torch_dtype(args.dtype))
    model = model.to(device())
    stops = stop_tokens(model.generation_config) | {template.end_of_turn_id}
    model.generation_config.eos_token_id = sorted(stops)
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if softcap and args.batching == "continuous":
        raise ValueError("--batching continuous: transformers' paged attention ignores the "
                         f"soft-capping of {policy}; use --batching padded")
    batching, rows = {"cuda": ("continuous", 256), "cpu": ("padded", 64)}[device().type]
    if softcap:
        batching = "padded"
    sample = {"continuous": sample_continuously,
              "padded": sample_responses}[args.batching or batching]
    return sample(model, tokenizer, prompts, wanted, args.max_new_tokens, seeds=seeds,
                  temperature=args.temperature, top_p=args.top_p, rows=args.sampling_rows or rows)


# ---------------------------------------------------------------------- OpenAI-compatible servers
FINISHED = ("stop", "eos", "eos_token", "stop_sequence", "end_turn", None)
REFUSED = (400, 413, 422)          # HTTP statuses of a request that no retry will mend
STOPPING = (301, 302, 303, 307, 308, 401, 402, 403, 404)       # of a wrong URL, key or model name
LONGEST_REPLY = 16 * 2 ** 20       # bytes
# Parts of a request that some servers refuse, in the order of giving them up, and how their errors
# name them. max_tokens becomes max_completion_tokens, the system turn a part of the user's.
DISPENSABLE = {"top_p": "top_p", "seed": "seed", "temperature": "temperature",
               "max_tokens": "max_tokens", "system": "roles?|(system|developer) instruction"}


class Reply(NamedTuple):
    text: str
    tokens: int                    # 0: the server does not say
    finished: bool
    refused: tuple = ()            # the parts of DISPENSABLE that the server did not take


def check_urls(args):
    """ValueError for a URL that is no endpoint. A proxy in the environment is named."""
    for flag in ("judge_url", "base_url"):
        url = getattr(args, flag, None)
        name = flag.replace("_", "-")
        if url and not re.fullmatch(r"https?://[^/?@\s]+(/[^?@\s]*)?", url):
            raise ValueError(f"--{name} {url}: must be http(s)://HOST[/PATH], without user, "
                             "password or query; keys are in the environment")
        proxy = url and proxy_of(url)
        if proxy:
            print(f"--{name} {url}: requests go through the environment's proxy "
                  f"{proxy.rpartition('@')[2]}", file=sys.stderr)


def proxy_of(url):
    """The environment's proxy for a URL. This machine's own servers need none."""
    host = urllib.parse.urlsplit(url)
    if host.hostname in ("localhost", "127.0.0.1") or urllib.request.proxy_bypass(host.netloc):
        return None
    return urllib.request.getproxies().get(host.scheme)


class Endpoint:
    """An OpenAI-compatible server. key: the environment variable that holds its API key."""

    def __init__(self, url, args, key):
        try:
            import httpx2
            import openai
        except ImportError:
            raise ValueError("a server needs the openai package: pip install openai==3.57.0"
                             ) from None

        class Bounded(httpx2.AsyncHTTPTransport):
            """--timeout bounds a whole request. httpx2's own timeout bounds each read."""

            async def handle_async_request(self, request):
                try:
                    return await asyncio.wait_for(self.whole(request), args.timeout)
                except asyncio.TimeoutError:
                    raise httpx2.ReadTimeout("no whole reply in time", request=request) from None

            async def whole(self, request):
                response = await super().handle_async_request(request)
                body = bytearray()
                try:
                    async for part in response.stream:
                        body += part
                        if len(body) > LONGEST_REPLY:
                            raise httpx2.ReadError("a reply above 16 MiB", request=request)
                finally:
                    await response.aclose()
                return httpx2.Response(response.status_code, headers=response.headers,
                                       content=bytes(body), request=request)
        limits = httpx2.Limits(max_connections=args.concurrency)
        http = httpx2.AsyncClient(transport=Bounded(proxy=proxy_of(url), limits=limits))
        self.url = url
        self.key = os.environ.get(key, "").strip() or "none"
        self.refused = set()
        self.openai = openai.AsyncOpenAI(base_url=url, api_key=self.key, timeout=args.timeout,
                                         max_retries=args.retries, http_client=http)

    def without_key(self, text):
        """An error's text without the key. A placeholder such as EMPTY is hidden as a key alone."""
        if len(self.key) < 8:
            return text.replace(f"Bearer {self.key}", "Bearer [key]")
        return text.replace(self.key, "[key]")


def without(request: dict, name: str) -> dict:
    """The request without a part of DISPENSABLE."""
    request = dict(request)
    if name == "max_tokens":
        request["max_completion_tokens"] = request.pop("max_tokens")
    elif name == "system":
        system, first, *rest = request["messages"]
        texts = filter(None, [system["content"], first["content"]])
        request["messages"] = [data.user("\n\n".join(texts)), *rest]
    else:
        del request[name]
    return request


def parts_of(request):
    """The parts of DISPENSABLE that a request has."""
    roles = {message["role"] for message in request["messages"]}
    return [name for name in DISPENSABLE if name in request or name in roles]


def text_of_parts(content) -> str | None:
    """A reply's text: a string, the texts of a list's parts, or None."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else None


def read_reply(body):
    """(text, tokens, finished) of a chat completion. One without text is empty and unfinished."""
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        usage = reply.get("usage")
        text = text_of_parts(choice["message"].get("content"))
        finished = text is not None and choice.get("finish_reason") in FINISHED
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"no chat completion: {body[:300].decode(errors='replace')}") from None
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else 0
    if not isinstance(tokens, int | float) or not 0 <= tokens < 1e7:
        tokens = 0
    return text or "", int(tokens), finished


async def chat(server, **request) -> Reply:
    """One chat completion. A 400 or 422 that names a part of DISPENSABLE is answered by the request
    without it, and that part is left out from then on."""
    import openai
    refused = [name for name in parts_of(request) if name in server.refused]
    first_error = None
    while True:
        rest = request
        for name in refused:
            rest = without(rest, name)
        try:
            reply = await server.openai.chat.completions.with_raw_response.create(**rest)
            server.refused.update(refused)
            return Reply(*read_reply(reply.content), tuple(refused))
        except (openai.OpenAIError, ValueError) as error:
            error.args = server.without_key(str(error)),
            if getattr(error, "status_code", None) not in (400, 422):
                raise
            first_error = first_error or error
            named = [name for name in parts_of(rest)
                     if re.search(rf"\b({DISPENSABLE[name]})\b", str(error), re.IGNORECASE)]
            if not named:                                   # what was left out was not the cause
                raise first_error from None
            refused.append(named[0])


def ask_all(args, flag, server, requests, save, answered):
    """save(name, reply or error) for every request, --concurrency at once. A wrong URL, key or
    model name stops it, and 20 failures in a row: no further request begins, others end first.
    Refused requests are no failures once the server `answered` another."""
    import openai
    from tqdm import tqdm
    waiting = iter(tqdm(requests, unit="request"))
    failures = 0
    stop = None

    async def worker():
        nonlocal answered, failures, stop
        for name in waiting:
            try:
                reply = await chat(server, **requests[name])
                failures = 0
                answered = True
            except (openai.OpenAIError, ValueError) as error:
                reply = error
                status = getattr(error, "status_code", None)
                failures += not (answered and status in REFUSED)
                limit = 20 if answered else min(20, len(requests))
                if status in STOPPING or failures >= limit:
                    stop = error
            if reply is not stop:
                save(name, reply)
            if stop:
                return

    async def all_workers():
        await asyncio.gather(*(worker() for _ in range(args.concurrency)))
    asyncio.run(all_workers())
    if stop:
        raise ValueError(f"{flag} {server.url}: {stop}; what was answered is on disk")


def refused_parts(rows):
    """The parts of requests that servers refused, in answers or replies."""
    return sorted({name for row in rows for name in row.get("refused", ())})


# The environment of this script's own ranks, which a server must not take for its own.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def serving(args, policy, log_file):
    """The policy's endpoint: --base-url, or that of the server which --serve starts and stops."""
    if not args.serve:
        yield args.base_url
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = fill(args.serve, {"model": policy, "port": str(port)}, "--serve")
    url = f"http://127.0.0.1:{port}/v1"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))    # by no proxy
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    with open(log_file, "w") as out:
        server = subprocess.Popen(shlex.split(command), stdout=out, stderr=out,
                                  start_new_session=True, env=environment)

    def interrupt(*_):                                      # else SIGTERM ends us before `finally`
        raise KeyboardInterrupt
    handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        while True:
            with contextlib.suppress(OSError), opener.open(f"{url}/models", timeout=5):
                break
            if server.poll() is not None:
                raise ValueError(f"--serve {command}: ended with {server.returncode}; see "
                                 f"{log_file}")
            time.sleep(1)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(60)
            os.killpg(server.pid, signal.SIGKILL)           # also what it started and left behind
        server.wait()
        signal.signal(signal.SIGTERM, handler)


def sample_by_server(args, policy, prompts, wanted, url, append):
    """The wanted answers from an endpoint. Prompts that it refuses (HTTP 400, 413, 422: too long,
    perhaps) are counted and get an empty, unfinished answer in the end."""
    server = Endpoint(url, args, "SERVER_API_KEY")
    settings = dict(model=args.served_model or policy, temperature=args.temperature,
                    max_tokens=args.max_new_tokens)
    if args.top_p < 1:
        settings["top_p"] = args.top_p
    requests = {(i, k): settings | {"messages": prompts[i]} for i, k in wanted}
    refused = {}
    failed = []

    def save(one, reply):
        if isinstance(reply, Reply):
            append(Answer(*one, *reply))
        elif getattr(reply, "status_code", None) in REFUSED:
            refused[one] = reply
        else:
            failed.append(reply)
    ask_all(args, "--base-url", server, requests, save, answered=False)
    if failed:
        raise ValueError(f"--base-url {url}: {len(failed)} of {len(wanted)} requests failed "
                         f"({failed[-1]}); the same command asks them again")
    if refused:
        print(f"--base-url {url}: {len(refused)} of {len(wanted)} requests were refused "
              f"({list(refused.values())[-1]})", file=sys.stderr)
    for i, k in refused:
        append(Answer(i, k, "", 0, False))


# ----------------------------------------------------------------------------------------- judges
def exact_answer(prompt, answers, reference):
    """1 if the final answer (data.final_answer) is the reference, else 0."""
    return [float(data.final_answer(a) == reference) for a in answers]


PAIRRM = "llm-blender/PairRM-hf"
PREFIXES = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")


class PairRM(torch.nn.Module):
    """llm-blender/PairRM and PairRM-hf (2306.02561): DeBERTa-v3 and a head on three hidden states.

    s_k = head([h_source, h_candidate_k]). The logit s_1 - s_2 is positive if the first is
    better."""

    def __init__(self, config):
        super().__init__()
        from transformers import DebertaV2Model
        from torch.nn import Dropout, Linear, Sequential, Tanh
        self.pretrained_model = DebertaV2Model(config)
        h = config.hidden_size
        self.head_layer = Sequential(Dropout(0.0), Linear(2 * h, h), Tanh(), Dropout(0.0),
                                     Linear(h, 1))

    def forward(self, input_ids, attention_mask, prefixes):
        """(B, L) int64 right-padded, their mask, ids of the three prefixes -> (B,) logits."""
        h = self.pretrained_model(input_ids, attention_mask=attention_mask).last_hidden_state
        at = [(input_ids == prefix).int().argmax(1) for prefix in prefixes]
        x, a, b = (h[torch.arange(len(h)), i] for i in at)                       # (B, D) each
        s_1, s_2 = (self.head_layer(torch.cat([x, y], -1))[:, 0].float() for y in (a, b))
        return s_1 - s_2

    @classmethod
    def load(cls, name):
        """(model, tokenizer) of a folder or Hub id. A missing or unexpected weight is an error."""
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import AutoTokenizer, DebertaV2Config
        folder = data.local_folder(name, "*.safetensors", "*.json", "*.model")
        file, = folder.glob("*.safetensors")
        state = load_file(file)
        known = json.loads((folder / "config.json").read_text())
        base = known.get("model_name", "microsoft/deberta-v3-large")     # named by the original
        config = DebertaV2Config.from_pretrained(folder if "hidden_size" in known else base)
        config.vocab_size = len(state["pretrained_model.embeddings.word_embeddings.weight"])
        model = cls(config)
        model.load_state_dict(state)
        has_tokenizer = any((folder / f).exists() for f in ("tokenizer.json", "spm.model"))
        tokenizer = AutoTokenizer.from_pretrained(folder if has_tokenizer else base)
        if (folder / "tokenizer.json").exists():            # transformers 5 drops its normalizer
            stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer.backend_tokenizer.normalizer = stored.normalizer
        tokenizer.add_special_tokens({"additional_special_tokens": list(PREFIXES)})
        return model.eval(), tokenizer


def as_text(messages):
    """A prompt for a judge: its one user turn as it is, several turns as 'role: content' lines."""
    messages = [m for m in messages if m["content"]]
    if [m["role"] for m in messages] == ["user"]:
        return messages[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)


def pairrm_rows(tokenizer, source, answers):
    """Ids of all K(K-1) ordered pairs, and how many texts were cut: (i, j) ->
    [CLS]<|source|>x[SEP][CLS]<|candidate1|>y_i[SEP][CLS]<|candidate2|>y_j[SEP].

    The source has at most 1224 tokens, each answer half of what is left of 2048, by this row alone.
    Special strings in the texts become a space."""
    special = re.compile("|".join(map(re.escape, {*tokenizer.all_special_tokens, *PREFIXES})))
    n_cut = 0

    def ids(prefix, text, limit):
        nonlocal n_cut
        full = tokenizer(prefix + special.sub(" ", text)).input_ids
        if len(full) <= limit:
            return full
        n_cut += 1
        return full[:limit - 1] + full[-1:]
    x = ids(PREFIXES[0], source, 1224)
    room = (2048 - len(x)) // 2
    first = [ids(PREFIXES[1], y, room) for y in answers]
    second = [ids(PREFIXES[2], y, room) for y in answers]
    pairs = itertools.permutations(range(len(answers)), 2)
    return {(i, j): x + first[i] + second[j] for i, j in pairs}, n_cut


@torch.no_grad()
def pairrm_logits(model, tokenizer, rows, batch_tokens):
    """Logits of input rows, (R,) float64, in right-padded batches of rows of like length.
    Neighbours do not change a row beyond rounding. Matrix products are in TF32 on CUDA."""
    logits = np.zeros(len(rows))
    precision = torch.get_float32_matmul_precision()
    if device().type == "cuda":
        torch.set_float32_matmul_precision("high")
    prefixes = tokenizer.convert_tokens_to_ids(list(PREFIXES[:3]))
    order = sorted(range(len(rows)), key=lambda r: -len(rows[r]))
    while order:
        n = max(1, batch_tokens // len(rows[order[0]]))
        part = order[:n]
        order = order[n:]
        batch = tokenizer.pad({"input_ids": [rows[r] for r in part]}, padding_side="right",
                              return_tensors="pt").to(device())
        scores = model(batch["input_ids"], batch["attention_mask"], prefixes)        # (B,)
        logits[part] = scores.double().cpu().numpy()
    torch.set_float32_matmul_precision(precision)
    if not np.isfinite(logits).all():                       # NaN would count as a tie
        raise ValueError("PairRM's logits are not finite; look at its weights")
    return logits


def pairrm_judge(args, name):
    name = name or PAIRRM
    with data.loading(name):
        model, tokenizer = PairRM.load(name)
    model.to(device())

    def compare(rows):
        ids = []
        cut = 0
        for row in rows:
            texts = [a["text"] for a in row["answers"]]
            pairs, n = pairrm_rows(tokenizer, as_text(row["prompt"]), texts)
            ids += pairs.values()
            cut += n
        if cut:
            print(f"pairrm: {cut} texts were cut to its 2048 tokens", file=sys.stderr)
        return pairrm_logits(model, tokenizer, ids, args.judge_tokens)
    return compare


def reward_judge(args, name):
    scorer = data.Scorer(name, "reward")

    def score(row, text):
        messages = row["prompt"] + [data.assistant(text)]
        value = scorer(data.render_judged(scorer.tokenizer, messages))
        if value is None:
            raise ValueError(f"a conversation is beyond its context of {scorer.limit} tokens; use "
                             "another one, or lower --max-new-tokens, in another --output")
        return value
    return lambda rows: [[score(row, a["text"]) for a in row["answers"]] for row in rows]


def python_judge(args, name):
    """FILE:FUNCTION(prompt messages, answer texts, reference) -> K numbers. The file is looked for
    here, then beside this script."""
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        path = Path(__file__).parent / file
    if not path.is_file():
        raise ValueError(f"--judge python:{name}: no file {file!r}; write python:FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location("lions_judge", path)
    with data.loading(f"--judge python:{name}"):
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        score = getattr(module, function)

    def judge(rows):
        return [score(copy.deepcopy(r["prompt"]), [a["text"] for a in r["answers"]], r["answer"])
                for r in rows]
    return judge


VERDICTS = {"A>>B": 1.0, "A>B": 1.0, "A": 1.0, "A=B": 0.0, "C": 0.0, "B": -1.0, "B>A": -1.0,
            "B>>A": -1.0}


def final_text(text):
    """What follows a model's last thought."""
    return text.rpartition("</think>")[2]


def verdict(text: str) -> float | None:
    """1 if the last [[A]], [[B]], [[C]], [[A>B]] .. of the final text prefers A, 0 if it is a tie,
    -1 if it prefers B, None if there is no such mark."""
    marks = re.findall(r"\[\[(A>>B|A>B|A=B|B>A|B>>A|A|B|C)\]\]", final_text(text))
    return VERDICTS[marks[-1]] if marks else None


def fill(template: str, values: dict, where: str) -> str:
    """{name} -> values[name] in one pass, so that braces in a value stay text."""
    unknown = set(re.findall(r"\{(\w+)\}", template)) - set(values)
    if unknown:
        raise ValueError(f"{where}: unknown placeholders {', '.join(sorted(unknown))}; known are "
                         f"{', '.join(sorted(values))}")
    return re.sub(r"\{(\w+)\}", lambda m: values[m[1]], template)


def reply_keys(model, calls, **settings):
    """{id: the hash under which the reply to a call is kept}."""
    return {name: hash_of(name, model, settings, messages) for name, messages in calls.items()}


def ask_llm(args, model, calls, folder, **settings):
    """{id: messages} -> {id: {"reply", "finished", "tokens", "refused"}}, or {"reply": None,
    "error", "status"} of a request that failed.

    Every reply is appended to replies-*.jsonl of `folder`, under a hash of id, model, messages and
    settings, and never asked for again. Failures are asked again by the next run."""
    server = Endpoint(args.judge_url, args, "OPENAI_API_KEY")
    keys = reply_keys(model, calls, **settings)
    known = {r["key"]: r for r in read_growing(folder, "replies") if r["reply"] is not None}
    requests = {name: dict(settings, model=model, messages=messages)
                for name, messages in calls.items() if keys[name] not in known}

    def save(name, reply):
        if isinstance(reply, Reply):
            record = reply._asdict()
            record["reply"] = record.pop("text")
        else:
            record = dict(reply=None, error=str(reply), status=getattr(reply, "status_code", None))
        record |= dict(key=keys[name], id=name, model=model, url=args.judge_url)
        append(record)
        known[record["key"]] = record
    with growing(folder, "replies") as append:
        ask_all(args, "--judge-url", server, requests, save, answered=bool(known))
    return {name: known[key] for name, key in keys.items()}


def llm_judge(args, name):
    """Every ordered pair of answers by one question to an LLM. A reply without a verdict is a tie,
    and counted, as is a pair that the server refuses. See `verdict` for the marks that the template
    must ask for."""
    def compare(rows):
        calls = {}
        for row in rows:
            for (i, a), (j, b) in itertools.permutations(enumerate(row["answers"]), 2):
                values = {"prompt": as_text(row["prompt"]), "answer_a": a["text"],
                          "answer_b": b["text"]}
                text = fill(args.judge_template, values, "--judge-template")
                calls[f"{row['key']} {i} {j}"] = [data.user(text)]
        replies = ask_llm(args, name, calls, Path(args.output), max_tokens=2048, temperature=0.0)
        failed = [r for r in replies.values() if r.get("status", 400) not in REFUSED]
        if failed:
            raise ValueError(f"--judge-url {args.judge_url}: {len(failed)} of {len(calls)} "
                             "requests failed; the same command asks them again")
        verdicts = [verdict(r["reply"]) if r.get("finished") else None for r in replies.values()]
        if None in verdicts:
            print(f"{name}: {verdicts.count(None)} of {len(calls)} replies have no verdict: ties",
                  file=sys.stderr)
        return np.array(verdicts, dtype=float)              # None becomes NaN
    return compare


# They score every answer to each of some prompts.
SCORING = {"reward": reward_judge, "python": python_judge}
# They say how far the first answer beats the second, for all ordered pairs of the K answers to each
# of some prompts, in the order of itertools.permutations. NaN, no verdict, counts as a tie.
COMPARING = {"pairrm": pairrm_judge, "llm": llm_judge}
JUDGES = SCORING | COMPARING


def load_judge(args):
    """--judge -> function: rows {"key", "prompt", "answer", "answers"} -> (rows, K) scores,
    checked. Its `unparsed` counts the comparisons so far without a verdict."""
    kind, _, name = args.judge.partition(":")
    judge = JUDGES[kind](args, name)

    def scores(rows):
        k = len(rows[0]["answers"])
        try:
            values = np.asarray(judge(rows), dtype=np.float64)
        except Exception as error:                          # a function of the user's
            raise ValueError(f"--judge {args.judge}: {type(error).__name__}: {error}") from error
        if kind in COMPARING:
            scores.unparsed += int(np.isnan(values).sum())
            c = np.zeros((len(rows), k, k))
            off_diagonal = ~np.eye(k, dtype=bool)
            c[:, off_diagonal] = np.nan_to_num(values).reshape(len(rows), -1)
            values = np.array([scores_from_comparisons(x) for x in c])
        if values.shape != (len(rows), k) or not np.isfinite(values).all():
            raise ValueError(f"--judge {args.judge}: {values.tolist()}: not one finite score for "
                             f"each answer to {json.dumps(rows[0]['prompt'])[:200]}")
        return values
    scores.compare = judge if kind in COMPARING else None
    scores.unparsed = 0
    return scores


# ---------------------------------------------------------------------------------- one iteration
def read_prompts(args, tokenizer, template):
    """Distinct prompts of --data that leave room for an answer, {"key", "prompt", "answer",
    "source"}, and a hash of the data. The prompt is what precedes a row's last assistant turn,
    without the empty system turns of training."""
    from transformers import AutoConfig
    dataset, key = prepare_rows(args.data, args=dpo.copy_of(args, empty_system=0.0),
                                tokenizer=tokenizer, template=template)
    config = AutoConfig.from_pretrained(args.model).get_text_config()
    room = getattr(config, "max_position_embeddings", None) or sys.maxsize
    room -= args.max_new_tokens
    rows = {}
    too_long = 0
    repeated = 0
    for r in dataset.select_columns(["messages_json", "answer", "source"]):
        messages = json.loads(r["messages_json"])
        prompt = messages[:max(i for i, m in enumerate(messages) if m["role"] == "assistant")]
        name = data.canonical_hash(prompt)
        if name in rows:
            repeated += 1
        elif len(prompt_ids(tokenizer, prompt)) > room:
            too_long += 1
        else:
            rows[name] = {"key": name, "prompt": prompt, "answer": r["answer"],
                          "source": r["source"]}
    log(f"{len(rows)} distinct prompts; left out: {repeated} repeated ones, and {too_long} that "
        f"leave no room for --max-new-tokens {args.max_new_tokens} in the model's context")
    if not rows:
        raise ValueError("--data: no prompt is left; lower --max-new-tokens")
    return list(rows.values()), key


@functools.cache
def waiting_group(world):
    """All ranks of the world, over gloo: over nccl those that wait would keep their GPUs busy."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=3))


def on_all_ranks(work):
    """work() on every rank. If one rank fails, all ranks stop. Ranks that are done wait, for days
    if need be."""
    free_memory()                                           # of the training before
    group = waiting_group(dist.group.WORLD)
    problem = None
    try:
        work()
    except (ValueError, OSError) as error:
        problem = str(error) or type(error).__name__
    failed = torch.tensor([problem is not None]).int()
    options = dist.AllreduceOptions()
    options.timeout = datetime.timedelta(days=30)
    group.allreduce([failed], options).wait()
    if failed[0]:
        raise ValueError(problem or "another rank failed; its message says why")
    free_memory()                                           # of the phase's model


def sample_phase(args, folder, policy, tokenizer, template, rows, iteration=0):
    """The rows with their K answers. Missing answers are sampled and written to answers-*.jsonl."""
    from tqdm import tqdm
    rank, world = init_distributed()
    known = {(a["key"], a["sample"]) for a in read_growing(folder, "answers")}
    dist.barrier()                                          # all have read before anyone writes
    if args.engine == "server":
        world = 1                                           # rank 0 alone asks it
    mine = [(i, k) for i, k in itertools.product(range(len(rows)), range(args.samples))
            if i % world == rank and (rows[i]["key"], k) not in known]
    prompts = [r["prompt"] for r in rows]
    names = [f"{args.seed} {iteration} {r['key']}".encode() for r in rows]
    seeds = [int(hashlib.sha256(name).hexdigest()[:15], 16) for name in names]

    def sample():
        if not mine:
            return
        with growing(folder, "answers") as write:
            def append(a):
                write({"key": rows[a.prompt]["key"], **a._asdict()})
            if args.engine == "server":
                with serving(args, policy, folder / "server.log") as url:
                    sample_by_server(args, policy, prompts, mine, url, append)
                return
            answers = sample_locally(args, policy, tokenizer, template, prompts, mine, seeds)
            for a in tqdm(answers, "sample", len(mine), disable=rank > 0, unit="answer"):
                append(a)
    on_all_ranks(sample)
    answers = {(a["key"], a["sample"]): a for a in read_growing(folder, "answers")}
    return [r | {"answers": [answers[r["key"], k] for k in range(args.samples)]} for r in rows]


def judge_phase(args, folder, rows):
    """Scores of every prompt's answers, (P, K), written to scores-*.jsonl under a hash of both."""
    from tqdm import tqdm
    rank, world = init_distributed()
    known = {s["key"] for s in read_growing(folder, "scores")}
    dist.barrier()
    keys = [hash_of(r["key"], r["answers"]) for r in rows]
    mine = [(key, r) for key, r in zip(keys, rows) if key not in known][rank::world]

    def score():
        if not mine:
            return
        judge = load_judge(args)
        with growing(folder, "scores") as append:
            for start in tqdm(range(0, len(mine), 16), f"judge {args.judge}", disable=rank > 0):
                part_keys, part = zip(*mine[start:start + 16])
                for key, scores in zip(part_keys, judge(part).tolist()):
                    append({"key": key, "scores": scores})
    on_all_ranks(score)
    scores = {s["key"]: s["scores"] for s in read_growing(folder, "scores")}
    return np.array([scores[key] for key in keys])


def iterate(args, iteration, policy, all_rows, tokenizer, template):
    """One iteration: its report, or DPO's result if SIGTERM stopped it. What its folder holds is
    not done again."""
    folder = Path(args.output) / f"iteration-{iteration}"
    clock = [time.time()]
    report = data.read_json(folder / "report.json")
    if report:
        return report | {"output": str(folder)}             # the run may have been moved
    order = data.permutation(len(all_rows), args.seed, iteration)[:args.max_prompts]
    rank = dist.get_rank()
    rows = [all_rows[i] for i in order]
    log(f"iteration {iteration}: {len(rows)} prompts x {args.samples} samples of {policy}")
    if rank == 0:
        write_lines(folder / "prompts.jsonl", map(json.dumps, rows))
    rows = sample_phase(args, folder, policy, tokenizer, template, rows, iteration)
    clock.append(time.time())
    scores = judge_phase(args, folder, rows)
    clock.append(time.time())
    pairs, counts = pick_pairs(rows, scores, min_gap=args.min_gap or 0.0,
                               truncated_can_win=args.truncated_can_win,
                               forbidden=[*template.specials, "\ufffd"])     # \ufffd: no text
    log(f"{len(rows)} prompts: " + ", ".join(f"{k} {v}" for k, v in counts.items()))
    if len(pairs) < dist.get_world_size():
        raise ValueError(f"{folder}: {len(pairs)} pairs of {len(rows)} prompts, too few to train "
                         f"on: {counts}. Answers and scores are kept. Another --temperature, "
                         "--samples, --max-new-tokens or --judge, in another --output, may tell "
                         "answers apart")
    if rank == 0:
        write_lines(folder / "pairs.jsonl", map(json.dumps, pairs))
    dist.barrier()
    sources = [str(folder / "pairs.jsonl"), *args.mix]
    first = args.model if args.reference == "first" else None
    trained = dpo.train_on_pairs(dpo.copy_of(
        args, model=policy, ref=first, data=sources, output=str(folder), min_gap=None,
        overwrite=False, **dict.fromkeys(NOT_OF_TRAINING)), "online-dpo iteration")
    if trained.get("stopped"):
        return trained
    clock.append(time.time())
    report = {"iteration": iteration, "policy": policy, "output": str(folder)}
    report |= answer_report(rows, scores, counts)
    report |= zip(("sample_seconds", "judge_seconds", "train_seconds"), np.diff(clock).tolist())
    for k in ("loss", "eval_loss", "accuracy", "eval_accuracy", "steps"):
        report[k] = trained.get(k)
    if rank == 0:
        write_json(folder / "report.json", report)
    return report


def answer_report(rows, scores, counts):
    """Counts of pick_pairs, shares in 0..1, scores and lengths in tokens. best and worst: by
    score."""
    n, k = scores.shape
    answers = list(itertools.chain(*(row["answers"] for row in rows)))
    t = pandas.DataFrame({"score": scores.ravel(), "length": [a["tokens"] for a in answers],
                          "text": [a["text"].strip() for a in answers]})
    prompts = t.groupby(np.repeat(np.arange(n), k))
    report = counts | {"yield": counts["pairs"] / n,
                       "distinct": (prompts.text.nunique() / k).mean(),
                       "refused_parts": refused_parts(answers)}
    best = t.loc[prompts.score.idxmax()]
    worst = t.loc[prompts.score.idxmin()]
    for name in ("score", "length"):
        for which, part in (("all", t), ("best", best), ("worst", worst)):
            report[f"{name}_{which}"] = part[name].mean()
    return report


PANELS = {"share of prompts with a pair": ["yield"], "different answers (share of K)": ["distinct"],
          "judge's score": ["score_best", "score_all", "score_worst"],
          "answer length (tokens)": ["length_best", "length_all", "length_worst"]}


def write_reports(folder, reports):
    """report.md and report.png: a drift of length or a loss of diversity shows at a glance."""
    t = pandas.DataFrame(reports)
    panels = []
    page = data.table(t.drop(columns=["policy", "output"]))
    write_lines(folder / "report.md", [page])
    log(page)
    for title, keys in PANELS.items():
        series = {key: (t.iteration, t[key], "o-") for key in keys}
        panels.append({"title": title, "xlabel": "iteration", "xticks": t.iteration,
                       "series": series})
    data.figure(folder / "report.png", panels, 2)


# ------------------------------------------------------------------------------------------ flags
# Flags of this script that change answers, scores or pairs at most by rounding. They are hidden
# from DPO, so that its own check of changed flags lets them change.
NOT_OF_TRAINING = ("sampling_rows", "judge_tokens", "concurrency", "timeout", "retries",
                   "base_url", "judge_url", "serve", "iterations")
ONLINE_MAY_CHANGE = (*NOT_OF_TRAINING, *MAY_CHANGE)


def sampling_flags(add, max_new_tokens, temperature):
    """Flags of answers, for online_dpo.py and evaluate.py. temperature None: not the user's."""
    if temperature is not None:
        add("--temperature", type=float, default=temperature, help="0: greedy")
    add("--top-p", type=float, default=1.0, help="sample from the most likely tokens of this share")
    add("--max-new-tokens", type=positive, default=max_new_tokens, help="tokens per answer at most")
    add("--engine", choices=["hf", "server"], default="hf", help="transformers, or an endpoint")
    add("--batching", choices=["padded", "continuous"],
        help="hf engine; None: continuous on CUDA, padded on a CPU")
    add("--sampling-rows", type=positive,
        help="hf engine: answers in work at once; None: 256 on CUDA, 64 on a CPU")
    add("--base-url", help="server engine: http://HOST:PORT/v1; the key is in SERVER_API_KEY")
    add("--serve", help="server engine: a command with {model} and {port} that starts the server")
    add("--served-model", help="server engine: the model's name there; None: --model")
    request_flags(add)


def request_flags(add):
    """Flags of requests to any server."""
    add("--concurrency", type=positive, default=16, help="requests at once")
    add("--timeout", type=float, default=600, help="seconds that a try of a request may take")
    add("--retries", type=int, default=6, help="further tries of a request, after growing waits")


def judge_flags(add, judge):
    """Flags of judges, for online_dpo.py and evaluate.py."""
    add("--judge", default=judge, help="pairrm[:MODEL], reward:MODEL, llm:MODEL or "
        "python:FILE:FUNCTION")
    add("--judge-url", help="LLM judge: http://HOST:PORT/v1; the key is in OPENAI_API_KEY")
    add("--judge-template", help="llm: a file with {prompt}, {answer_a}, {answer_b} that asks for "
        "[[A]], [[B]] or [[C]]")
    add("--judge-tokens", type=positive, default=16384, help="pairrm: tokens per batch")


def parser():
    p = dpo.parser()
    p.description = __doc__
    p.set_defaults(batch_size=32, output="runs/online-dpo")
    add = p.add_argument_group("stage 3").add_argument
    add("--samples", type=positive, default=5, help="K, answers per prompt")
    add("--max-prompts", type=positive, help="prompts per iteration; None: all")
    add("--iterations", type=positive, default=1, help="rounds of sampling, judging and training")
    add("--reference", choices=["policy", "first"], default="policy",
        help="of DPO: the policy that samples, or --model in every iteration, as in RLHFlow")
    add("--truncated-can-win", action="store_true", help="answers cut by --max-new-tokens may win")
    add("--mix", nargs="+", default=[], help="original pairs to train on as well, as for --data")
    sampling_flags(p.add_argument_group("sampling").add_argument, 2048, 0.8)
    judge_flags(p.add_argument_group("judge").add_argument, "pairrm")
    return p


def check_judge(args):
    """ValueError for flags of a judge that do not fit together, before anything runs."""
    kind, _, name = args.judge.partition(":")
    if kind not in JUDGES or (kind != "pairrm" and not name):
        raise ValueError(f"--judge {args.judge}: not pairrm[:MODEL], reward:MODEL, llm:MODEL or "
                         "python:FILE:FUNCTION")
    if kind == "llm" and not (args.judge_url and args.judge_template):
        raise ValueError(f"--judge {args.judge}: needs --judge-url and --judge-template")
    if kind == "llm":                                       # its text is a setting, not its name
        args.judge_template = Path(args.judge_template).read_text()
        for name in ("{prompt}", "{answer_a}", "{answer_b}"):
            if name not in args.judge_template:
                raise ValueError(f"--judge-template: it lacks {name}, which the judge must see")
    elif kind == "python":
        python_judge(args, name)
        args.judge_content = data.file_hash(sys.modules["lions_judge"].__file__)
    else:
        args.judge_content = data.weights_hash(name or PAIRRM)


def check_sampling(args):
    """The same for flags of sampling."""
    if args.serve or args.base_url:
        args.engine = "server"
    elif args.engine == "server":
        raise ValueError("--engine server: needs --base-url or --serve")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise ValueError(f"--temperature {args.temperature}, --top-p {args.top_p}: must be at "
                         "least 0, and above 0 and at most 1")


def main(argv=None):
    args = parse(argv, parser(), PRESETS)
    check_urls(args)
    check_judge(args)
    check_sampling(args)
    if args.samples < 2:
        raise ValueError(f"--samples {args.samples}: must be at least 2, the best and the worst")
    if args.ref:
        raise ValueError(f"--ref {args.ref}: leave it out, --reference says which policy it is")
    if args.iterations > 1 and args.base_url:
        raise ValueError("--iterations: a server at --base-url keeps serving the first policy; use "
                         "--serve, or run one iteration after the other with --model")
    with own_folder(args):
        return published(args, all_iterations(args))


def all_iterations(args):
    """A whole run. Returns the result that main prints."""
    started = time.time()
    rank, world = init_distributed()
    out = Path(args.output)
    check_machines(args, world)
    tokenizer = data.load_tokenizer(args.model)
    template = data.set_template(tokenizer, args.chat_template)
    rows, data_key = read_prompts(args, tokenizer, template)
    cache = data.cache_folder(args.cache_dir)
    trained_on = data.parse_sources([*args.mix, *(args.eval_data or [])])
    data_key += data.weights_hash(args.model)
    data_key += hash_of([data.load_source(source, cache)[1] for source in trained_on])
    if args.judge.endswith(":exact_answer") and all(r["answer"] is None for r in rows):
        raise ValueError(f"--judge {args.judge}: no row of --data has a reference answer")
    stored = check_resume(args, world, data_key, ONLINE_MAY_CHANGE)
    if stored and stored["iterations"] >= args.iterations:
        return stored
    if rank == 0 and args.overwrite:
        delete_run(out)
    dist.barrier()
    run = {"stage": "online-dpo", "flags": vars(args), "world": world, "git": git_commit(),
           "data": data_key, "prompts": len(rows), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    if rank == 0:
        write_json(out / "run.json", run | {"result": stored})      # until there is a newer one
    reports = []
    policy = args.model
    for iteration in range(1, args.iterations + 1):
        report = iterate(args, iteration, policy, rows, tokenizer, template)
        if report.get("stopped"):
            return report
        reports.append(report)
        policy = report["output"]
        if rank == 0:
            write_reports(out, reports)
    result = reports[-1] | {"iterations": len(reports), "seconds": time.time() - started}
    if rank == 0:
        write_json(out / "run.json", run | {"result": result})
    return result


if __name__ == "__main__":
    run_main(main)
