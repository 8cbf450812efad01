"""Tokens laid end to end, attention between the right ones, and log pi(token) where it is wanted.

    log pi(y | x) = sum_i log pi(y_i | x, y_<i)              (LIONs, arXiv 2407.06542)

Nothing is padded. The sequences of a micro-batch are laid end to end, `cu_seqlens` holds where each
one ends, and the attention kernel keeps them apart. SFT, DPO and the reference pass are sums over
the output of one module, `LogProbs`: Batch -> one log-probability per target token.

    layout(groups)      groups of one prompt and its answers  ->  Batch
    attend(q, k, v)     causal attention inside segments: flash-attn, torch varlen_attn or SDPA
    use_varlen(model)   routes a stock transformers model through `attend`, or refuses it by name
    token_logps(h, W)   logit[target] - logsumexp(logits), without an (N, V) matrix
    sequence_logps(..)  log pi(y|x), the sum over an answer's tokens

Letters: T tokens, S segments, N targets, V vocabulary, D hidden, H heads.

Differs from the paper
 1. The paper's release pads the hidden states again before the head and builds float32 logits for
    every position. Here the head sees only target positions, chunk by chunk.
 2. Answers to one prompt share one pass over it, the idea of li-plus/flash-preference. The query
    segments are x+y_w and y_l, their key segments x+y_w and x+y_l. `layout(groups, share=False)` is
    the plain unpadded layout, the specification that sharing must equal.
"""
from __future__ import annotations

import functools
import importlib.metadata
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


@functools.cache
def is_installed(distribution: str) -> bool:
    """Whether pip installed it. A module of that name proves nothing: others use it as well."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if is_installed("kernels") and __name__ == "kernels":
    # Hugging Face's package of this file's name: transformers would import its names from here and
    # fail. Its test for the package is cached, and says no while the name is hidden. So prebuilt
    # kernels from the Hub are off, and the policy and its reference use the same ones.
    this_module, sys.modules["kernels"] = sys.modules["kernels"], None
    from transformers.utils.import_utils import is_kernels_available
    is_kernels_available()
    sys.modules["kernels"] = this_module


# ------------------------------------------------------------------------------- batch and layout
class Group(NamedTuple):
    """One prompt x and any number of answers. An SFT document is a group with an empty prompt."""
    prompt: list[int]              # token ids of x, computed once
    answers: list[list[int]]       # token ids of each y
    targets: list[list[bool]]      # for each y, which of its tokens are scored


class Batch(NamedTuple):
    """The input of one forward: S query segments of T tokens in all, on one device."""
    input_ids: torch.Tensor        # (1, T) int64, all tokens end to end
    position_ids: torch.Tensor     # (1, T) int64, counted within their own sequence
    cu_seqlens_q: torch.Tensor     # (S+1,) int32, where query segments end
    cu_seqlens_k: torch.Tensor     # (S+1,) int32, where key segments end
    max_q: int                     # longest query segment
    max_k: int                     # longest key segment
    kv_index: torch.Tensor | None  # (T_k,) int64, rows of K and V by key; None: keys = queries
    source: torch.Tensor           # (N,) int64, position whose hidden state predicts the target
    target: torch.Tensor           # (N,) int64, the token to be scored
    sequence: torch.Tensor         # (N,) int64, the answer it belongs to, counted over all groups

    def to(self, device) -> Batch:
        return Batch(*(to_device(x, device) for x in self))


def to_device(x, device):
    """A tensor on `device`, anything else as it is. The copy to a GPU is from pinned memory, so
    that the host does not wait for it."""
    if not torch.is_tensor(x):
        return x
    if torch.cuda.is_available():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def layout(groups: list[Group], share: bool = True) -> Batch:
    """Lay groups end to end.

    A group `x, [y_1 .. y_K]` becomes `x y_1 y_2 .. y_K` with the query segments x+y_1, y_2, .. y_K.
    The key segment of y_k is x+y_k, gathered by `kv_index`. Causal attention aligned to the bottom
    right then shows each answer its prompt and itself and nothing else. The first token of every
    answer is predicted from the last position of x, which `source` names K times. With share=False,
    or with an empty prompt, each x+y_k is laid out on its own. An empty list gives one dummy token
    and no target, so that a rank without rows can take part in a collective forward.

    Raises ValueError if the first token of a sequence is a target, because nothing predicts it.
    """
    ids, positions, cu_q, cu_k, kv_index = [], [], [0], [0], []
    source, target, sequence = [], [], []
    n_answers, any_shared = 0, False
    for x, answers, targets in groups:
        x_start = len(ids)
        for k, (y, mask) in enumerate(zip(answers, targets, strict=True)):
            if len(y) != len(mask):
                raise ValueError(f"answer {n_answers}: {len(y)} tokens, {len(mask)} target flags")
            shared = share and k > 0 and len(x) > 0
            any_shared |= shared
            if not shared:
                x_start = len(ids)
                ids += x
                positions += range(len(x))
            y_start = len(ids)
            ids += y
            positions += range(len(x), len(x) + len(y))
            kv_index += range(x_start, x_start + len(x))
            kv_index += range(y_start, len(ids))
            cu_q.append(len(ids))
            cu_k.append(len(kv_index))
            for i, is_target in enumerate(mask):
                if is_target and i == 0 and not x:
                    raise ValueError(f"answer {n_answers}: its first token is a target, but no "
                                     "token before it predicts it")
                if is_target:
                    source.append(y_start + i - 1 if i else x_start + len(x) - 1)
                    target.append(y[i])
                    sequence.append(n_answers)
            n_answers += 1
    if not ids:
        ids, positions, cu_q, cu_k = [0], [0], [0, 1], [0, 1]
    q_ends, k_ends = (torch.tensor(ends, dtype=torch.int32) for ends in (cu_q, cu_k))
    rows = (ids, positions, kv_index, source, target, sequence)
    ids, positions, kv_index, source, target, sequence = (
        torch.tensor(row, dtype=torch.int64) for row in rows)
    max_q, max_k = int(q_ends.diff().max()), int(k_ends.diff().max())
    return Batch(ids[None], positions[None], q_ends, k_ends, max_q, max_k,
                 kv_index if any_shared else None, source, target, sequence)


# ------------------------------------------------------------------------------ attention back ends
BACKENDS = {  # name: when it is picked
    "flash-attn": "the fastest",
    "torch-varlen": "flash-attn is faster and not installed",
    "sdpa": "the slowest; others need CUDA and bf16, with soft-capping flash-attn as well"}


def pick_backend(device: torch.device, dtype: torch.dtype, softcap: float | None = None) -> str:
    """The fastest back end available: a varlen kernel for 16-bit CUDA tensors, else SDPA. torch's
    own varlen_attn has no soft-capping."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        if is_installed("flash-attn"):
            return "flash-attn"
        if softcap is None:
            return "torch-varlen"
    return "sdpa"


def attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q: int, max_k: int, scaling: float,
           window: int | None = None, softcap: float | None = None, backend: str | None = None):
    """Causal attention inside each segment, aligned to the bottom right: query i of Lq sees keys
    j <= i + Lk - Lq, and with a window W only the last W of them, itself included.

    q (T, H, d); k and v (T_k, H_kv, d) with H a multiple of H_kv; cu_seqlens_* (S+1,) int32.
    softcap c: scores become c * tanh(scores / c). Returns (T, H, d), equal for all back ends.
    """
    backend = backend or pick_backend(q.device, q.dtype, softcap)
    window_size = (window - 1 if window else -1, 0)
    if backend == "flash-attn":
        from flash_attn import flash_attn_varlen_func
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, softmax_scale=scaling, causal=True,
            window_size=window_size, softcap=softcap or 0.0)
    if backend == "torch-varlen":
        if softcap:
            raise ValueError("torch's varlen_attn has no soft-capping; install flash-attn")
        from torch.nn.attention.varlen import varlen_attn
        return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale=scaling,
                           window_size=window_size, enable_gqa=True)
    if backend != "sdpa":
        raise ValueError(f"unknown attention back end {backend!r}; one of {', '.join(BACKENDS)}")
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return sdpa_segments(q, k, v, ends_q, ends_k, scaling, window, softcap)


def sdpa_segments(q, k, v, ends_q: list[int], ends_k: list[int], scaling, window, softcap):
    """`attend` in plain PyTorch, segment by segment; neighbours of equal length go together."""
    runs = []                                               # [segments, query length, key length]
    for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
        if runs and runs[-1][1:] == [q1 - q0, k1 - k0]:
            runs[-1][0] += 1
        else:
            runs.append([1, q1 - q0, k1 - k0])
    # The backward of one split is one cat; a slice per segment would write (T, H, d) zeros each.
    q_parts = q.split([n * Lq for n, Lq, _ in runs])
    lengths_k = [n * Lk for n, _, Lk in runs]
    k_parts, v_parts = k.split(lengths_k), v.split(lengths_k)
    out = []
    for (n, Lq, Lk), *qkv in zip(runs, q_parts, k_parts, v_parts):
        qs, ks, vs = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in qkv)      # (n, H, L, d)
        plain_causal = Lq == Lk and not (window and window < Lk)
        mask = None
        if not plain_causal or softcap:
            mask = torch.ones(Lq, Lk, dtype=torch.bool, device=q.device).tril(Lk - Lq)
            if window:
                mask = mask.triu(Lk - Lq - window + 1)
        if softcap:
            heads = q.shape[1] // k.shape[1]                # query heads per key head
            ks, vs = ks.repeat_interleave(heads, 1), vs.repeat_interleave(heads, 1)
            scores = torch.tanh(qs @ ks.mT * (scaling / softcap)) * softcap      # (n, H, Lq, Lk)
            weights = scores.float().masked_fill(~mask, float("-inf")).softmax(-1)
            o = weights.to(q.dtype) @ vs
        else:
            o = F.scaled_dot_product_attention(
                qs, ks, vs, attn_mask=mask, is_causal=plain_causal, scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1])
        out.append(o.transpose(1, 2).flatten(0, 1))                              # (n * Lq, H, d)
    return torch.cat(out)


# ----------------------------------------------------------------------- the hook into transformers
def varlen_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0,
                     sliding_window=None, softcap=None, cu_seqlens_q=None, cu_seqlens_k=None,
                     max_q=None, max_k=None, kv_index=None, **kwargs):
    """`attend` with the signature of transformers' AttentionInterface: query (1, H, T, d), key and
    value (1, H_kv, T, d) -> (1, T, H, d). ValueError names what it cannot do."""
    causal = getattr(module, "is_causal", True) and kwargs.get("is_causal") is not False
    refused = {
        "cu_seqlens_q": cu_seqlens_q is None,
        "dropout": bool(dropout),
        "attention sinks (s_aux)": kwargs.get("s_aux") is not None,
        "position_bias": kwargs.get("position_bias") is not None,
        "bidirectional attention": not causal,
        "a batch dimension": query.shape[0] != 1,
        "a key/value cache": query.shape[2] != key.shape[2]}
    if any(refused.values()):
        names = ", ".join(name for name, is_refused in refused.items() if is_refused)
        raise ValueError(f"{type(module).__name__}: varlen attention lacks or cannot use {names}. "
                         "Pass a Batch through LogProbs; to generate, call "
                         "set_attn_implementation('sdpa')")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))                # (T, H, d)
    if kv_index is not None:
        k, v = k[kv_index], v[kv_index]                                          # (T_k, H_kv, d)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    out = attend(q.to(v.dtype), k.to(v.dtype), v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scaling,
                 sliding_window, softcap)
    return out[None], None


def use_varlen(model, max_length: int | None = None) -> None:
    """Route the attention of a transformers causal LM through `varlen_attention`.

    max_length: longest sequence in tokens. ValueError names the model's class if packed documents
    could reach each other past their segments, or if its head does more than token_logps. The model
    must be on its device."""
    config, problems = model.config.get_text_config(), []
    if not (getattr(model, "_supports_attention_backend", False) and model._supports_flash_attn):
        problems.append("its attention does not use transformers' AttentionInterface")
    if getattr(model, "_is_stateful", False):
        problems.append("its recurrent state runs from one document into the next")
    layers = set(getattr(config, "layer_types", None) or ())
    unknown = layers - {"full_attention", "sliding_attention"}
    if unknown:
        problems.append(f"layers of type {', '.join(sorted(unknown))} ignore a document's end")
    longest = getattr(config, "max_position_embeddings", 0)
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if len(tables) > 1 and max_length and max_length > longest:
        problems.append(f"it has {longest} learned positions; set --max-length to at most that "
                        f"(now --max-length {max_length})")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    for r in kinds:
        limit = r.get("original_max_position_embeddings") or longest
        if r["rope_type"] in ("dynamic", "longrope") and (max_length is None or max_length > limit):
            problems.append(f"its {r['rope_type']} RoPE depends on the longest neighbour beyond "
                            f"{limit} tokens; set --max-length to at most that (now {max_length})")
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        problems.append("it has no output embedding to score targets with")
    if problems:
        raise ValueError(f"{type(model).__name__} cannot be trained on packed documents: "
                         f"{'; '.join(problems)}")
    from transformers import AttentionInterface
    AttentionInterface.register("varlen", varlen_attention)     # without a mask of that name: none
    model.set_attn_implementation("varlen")
    check_logps(model, config.vocab_size)


@torch.no_grad()
def check_logps(model, vocab):
    """ValueError if 15 log-probs differ from those of the model's own logits, as they do where a
    layer stands between the last hidden state and the head."""
    ids = [i % vocab for i in range(16)]
    b = layout([Group([], [ids], [[False] + [True] * 15])]).to(model.device)
    was_training = model.training
    model.eval()
    logits = model(**varlen_inputs(b)).logits[0, :, :vocab].float()              # (16, V)
    off = LogProbs(model)(b) - logits.log_softmax(-1)[b.source, b.target]
    off = off.abs().mean().item()
    model.train(was_training)
    allowed = 1e-3
    if model.dtype.itemsize == 2:                           # its own logits are rounded as well
        allowed = logits.abs().max().item() / 128
    if off > allowed:
        raise ValueError(f"{type(model).__name__} cannot be trained: log-probs would be {off:.3g} "
                         "nats off, its head is more than the output embedding")


def varlen_inputs(b: Batch) -> dict:
    """What the forward of a model behind `use_varlen` takes."""
    names = "input_ids position_ids cu_seqlens_q cu_seqlens_k max_q max_k kv_index".split()
    return {name: getattr(b, name) for name in names} | {"use_cache": False}


# ---------------------------------------------------------------------------------- token log-probs
def matmul_fp32(a, b):
    """a @ b, accumulated and returned in float32 (float64 for float64)."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def head_logits(h, weight, bias, scale, softcap, vocab):
    """softcap(scale * (h W^T + b)): (n, D), (V, D) -> (n, V) float32; -inf from row `vocab` on."""
    logits = matmul_fp32(h, weight.T)
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    logits[:, vocab:] = float("-inf")
    return logits


class TokenLogps(torch.autograd.Function):
    """The forward and backward of `token_logps`."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, scale, softcap, chunk, vocab):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        out = torch.empty(len(target), device=hidden.device, dtype=dtype)
        lse = torch.empty_like(out)
        for i in range(0, len(target), chunk):
            rows = slice(i, i + chunk)
            z = head_logits(hidden[rows], weight, bias, scale, softcap, vocab)   # (n, V)
            at_target = z.gather(1, target[rows, None])[:, 0]                    # (n,)
            top = z.amax(1)
            lse[rows] = top + z.sub_(top[:, None]).exp_().sum(1).log()
            out[rows] = at_target - lse[rows]
        ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.settings = scale, softcap, chunk, vocab
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, target, lse = ctx.saved_tensors
        scale, softcap, chunk, vocab = ctx.settings
        _, need_w, need_b = ctx.needs_input_grad[:3]
        d_h = torch.empty_like(hidden)
        d_w = weight.new_zeros(weight.shape, dtype=grad.dtype) if need_w else None
        d_b = bias.new_zeros(bias.shape, dtype=grad.dtype) if need_b else None
        for i in range(0, len(target), chunk):
            rows = slice(i, i + chunk)
            h, g = hidden[rows], grad[rows, None]
            z = head_logits(h, weight, bias, scale, softcap, vocab)
            if softcap:                                     # d softcap(u) / du, before z changes
                slope = (z / softcap).square_().neg_().add_(1)
            d_z = z.sub_(lse[rows, None]).exp_().mul_(-g)                    # -g softmax(z)
            d_z.scatter_add_(1, target[rows, None], g)                       # g (1[t] - softmax(z))
            if softcap:
                d_z.mul_(slope)[:, vocab:] = 0              # their slope is not finite
            if scale != 1.0:
                d_z.mul_(scale)
            if need_b:
                d_b += d_z.sum(0)
            d_z = d_z.to(hidden.dtype)
            d_h[rows] = d_z @ weight
            if need_w and d_z.dtype == d_w.dtype:
                d_w.addmm_(d_z.T, h)
            elif need_w:
                d_w += matmul_fp32(d_z.T, h)
        if need_w:
            d_w = d_w.to(weight.dtype)
        if need_b:
            d_b = d_b.to(bias.dtype)
        return d_h, d_w, d_b, *[None] * 5


def token_logps(hidden, weight, target, bias=None, scale: float = 1.0, softcap: float | None = None,
                chunk_bytes: int | None = None, vocab: int | None = None):
    """log softmax(softcap(scale * (h W^T + b)))[target] for every row h, without the (N, V) matrix.

        log pi(t | h) = z_t - logsumexp(z),    d/dz = 1[t] - softmax(z)

    Rows are taken in chunks whose float32 logits fill `chunk_bytes` (default 32 MiB, CUDA 1 GiB).
    The backward computes each chunk again and sums the weight's gradient in float32 over chunks.

    hidden (N, D), weight (V, D), target (N,) int64, bias (V,) or None. softcap c: z -> c tanh(z/c)
    (Gemma-2). scale multiplies the logits (Cohere, Granite). vocab: rows of W that count, None:
    all; the rest is padding. Returns (N,) float32 nats, float64 for float64 input. N may be 0.
    Check value: W = 0 gives -ln V.
    """
    if chunk_bytes is None:
        chunk_bytes = 2 ** 30 if hidden.is_cuda else 2 ** 25
    chunk = max(1, chunk_bytes // (4 * weight.shape[0]))
    vocab = vocab or weight.shape[0]
    return TokenLogps.apply(hidden, weight, bias, target, scale, softcap, chunk, vocab)


# ----------------------------------------------------------------------------------------- LogProbs
class LogProbs(nn.Module):
    """A causal LM as the one function that training needs: Batch -> (N,) float32 log pi(target) in
    nats. The model must have been through `use_varlen`."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        head, config = model.get_output_embeddings(), model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0                      # Cohere multiplies
        scale /= getattr(config, "logits_scaling", None) or 1.0                  # Granite divides
        softcap = getattr(config, "final_logit_softcapping", None)
        plain_logits = type(head).forward

        # ZeRO-3 gathers a weight only for the forward of its own module. So the head itself scores
        # the targets. Called without targets, as by `generate`, it returns logits as before.
        def logits_or_target_logps(hidden, target=None):
            if target is None:
                return plain_logits(head, hidden)
            bias = getattr(head, "bias", None)
            return token_logps(hidden, head.weight, target, bias, scale, softcap,
                               vocab=config.vocab_size)
        head.forward = logits_or_target_logps

    def forward(self, b: Batch) -> torch.Tensor:             # (N,)
        hidden = self.model.base_model(**varlen_inputs(b)).last_hidden_state[0]  # (T, D)
        return self.model.get_output_embeddings()(hidden[b.source], b.target)


def sequence_logps(logps, sequence, n: int):
    """log pi(y | x), the sum over each answer's tokens. (N,), (N,) int64 -> (n,)."""
    return logps.new_zeros(n).index_add(0, sequence, logps)
