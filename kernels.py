"""Tokens laid end to end, attention between the right ones, and log pi(token) where it is wanted.

    log pi(y | x) = sum_i log pi(y_i | x, y_<i)              (LIONs, arXiv 2407.06542)

No padding anywhere: the sequences of a micro-batch stand one after the other, `cu_seqlens` says where
each ends, and the attention kernel keeps them apart. SFT, DPO and the reference pass are sums over the
output of one module, `LogProbs`: Batch -> one log-probability a target token.

    layout(groups)      groups of one prompt and its answers  ->  Batch
    attend(q, k, v)     causal attention inside segments: flash-attn, torch varlen_attn or SDPA
    token_logps(h, W)   logit[target] - logsumexp(logits), never holding (N, V)
    use_varlen(model)   sends a stock transformers model's attention here, or refuses it by name

Letters: T tokens, S segments, N targets, V vocabulary, D hidden, H heads.

Differs from the paper
 1. The paper's release pads hidden states again before the head and builds float32 logits over every
    position; here the head sees target positions only, chunk by chunk.
 2. Answers of one prompt share one pass over it (the idea of li-plus/flash-preference): two query
    segments x+y_w and y_l whose keys are x+y_w and x+y_l. `layout(groups, share=False)` is the plain
    unpadded layout, the spec that sharing must equal.
"""
from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


# ------------------------------------------------------------------------------------------- layout
class Group(NamedTuple):
    """One prompt x and any number of answers. An SFT document is a group with an empty prompt."""
    prompt: list[int]              # token ids of x, computed once
    answers: list[list[int]]       # token ids of each y
    targets: list[list[bool]]      # for each y, which of its tokens are scored


class Batch(NamedTuple):
    """What one forward needs. All tensors on one device; `S` query segments, `T` tokens, no padding."""
    input_ids: torch.Tensor        # (1, T) int64, all tokens end to end
    position_ids: torch.Tensor     # (1, T) int64, counted within their own sequence
    cu_seqlens_q: torch.Tensor     # (S+1,) int32, where query segments end
    cu_seqlens_k: torch.Tensor     # (S+1,) int32, where key segments end
    max_q: int                     # longest query segment
    max_k: int                     # longest key segment
    kv_index: torch.Tensor | None  # (T_k,) int64 rows of K and V each key segment reads; None: keys = queries
    source: torch.Tensor           # (N,) int64, the position whose hidden state predicts the target
    target: torch.Tensor           # (N,) int64, the token to be scored
    sequence: torch.Tensor         # (N,) int64, which answer (counted through all groups) it belongs to

    def to(self, device) -> Batch:
        return Batch(*(x.to(device, non_blocking=True) if torch.is_tensor(x) else x for x in self))


def layout(groups: list[Group], share: bool = True) -> Batch:
    """Lay groups end to end.

    A group `x, [y_1 .. y_K]` becomes `x y_1 y_2 .. y_K`: query segments x+y_1, y_2, .. y_K; the key
    segment of y_k is x+y_k, gathered by `kv_index`, so that causal attention aligned to the bottom
    right gives each answer its prompt and itself and nothing else. The first token of every answer is
    predicted from x's last position, which `source` names K times. With share=False, or an empty
    prompt, each x+y_k is laid out on its own. No groups at all give one dummy token and no target
    (a rank without rows still takes part in a collective forward).

    Raises ValueError when a first token of a sequence is a target: nothing predicts it.
    """
    ids, positions, cu_q, cu_k, kv_index = [], [], [0], [0], []
    source, target, sequence = [], [], []
    n_answers, any_shared = 0, False
    for x, answers, targets in groups:
        x_start = len(ids)
        for k, (y, mask) in enumerate(zip(answers, targets, strict=True)):
            if len(y) != len(mask):
                raise ValueError(f"answer {n_answers}: {len(y)} tokens but {len(mask)} target flags")
            shared = share and k > 0 and len(x) > 0
            any_shared |= shared
            if not shared:
                x_rows = range(len(ids), len(ids) + len(x))
                ids += x
                positions += range(len(x))
            else:
                x_rows = range(x_start, x_start + len(x))
            y_start, before = len(ids), x_rows[-1] if len(x) else None
            ids += y
            positions += range(len(x), len(x) + len(y))
            kv_index += x_rows
            kv_index += range(y_start, len(ids))
            cu_q.append(len(ids))
            cu_k.append(len(kv_index))
            for i, is_target in enumerate(mask):
                if is_target:
                    if i == 0 and before is None:
                        raise ValueError(f"answer {n_answers}: its first token is a target but nothing "
                                         "stands before it to predict it from")
                    source.append(y_start + i - 1 if i else before)
                    target.append(y[i])
                    sequence.append(n_answers)
            n_answers += 1
    if not ids:
        ids, positions, cu_q, cu_k, kv_index = [0], [0], [0, 1], [0, 1], [0]
    lengths = lambda cu: max(b - a for a, b in zip(cu, cu[1:]))
    int64 = lambda x: torch.tensor(x, dtype=torch.int64)
    int32 = lambda x: torch.tensor(x, dtype=torch.int32)
    return Batch(int64([ids]), int64([positions]), int32(cu_q), int32(cu_k), lengths(cu_q), lengths(cu_k),
                 int64(kv_index) if any_shared else None, int64(source), int64(target), int64(sequence))


# ---------------------------------------------------------------------------------------- attention
BACKENDS = ("flash-attn", "torch-varlen", "sdpa")


def pick_backend(device: torch.device, dtype: torch.dtype, softcap: float | None = None) -> str:
    """The fastest back end that serves this: 16-bit CUDA tensors go to a varlen kernel, the rest to
    SDPA. torch's own varlen_attn has no soft-capping."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        if importlib.util.find_spec("flash_attn"):
            return "flash-attn"
        if softcap is None and importlib.util.find_spec("torch.nn.attention.varlen"):
            return "torch-varlen"
    return "sdpa"


def attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q: int, max_k: int, scaling: float,
           window: int | None = None, softcap: float | None = None, backend: str | None = None):
    """Causal attention inside each segment, aligned to the bottom right: query i of Lq sees keys
    j <= i + Lk - Lq, and with a window W only the last W of them (itself included).

    q (T, H, d), k and v (T_k, H_kv, d) with H a multiple of H_kv; cu_seqlens_* (S+1,) int32;
    softcap c: scores become c * tanh(scores / c). Returns (T, H, d). All back ends give the same.
    """
    backend = backend or pick_backend(q.device, q.dtype, softcap)
    if backend == "flash-attn":
        from flash_attn import flash_attn_varlen_func
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, softmax_scale=scaling, causal=True,
            window_size=(window - 1, 0) if window else (-1, -1), softcap=softcap or 0.0)
    if backend == "torch-varlen":
        if softcap:
            raise ValueError("torch's varlen_attn has no soft-capping: install flash-attn or use sdpa")
        from torch.nn.attention.varlen import varlen_attn
        return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale=scaling,
                           window_size=(window - 1 if window else -1, 0), enable_gqa=True)
    if backend != "sdpa":
        raise ValueError(f"unknown attention back end {backend!r}: one of {', '.join(BACKENDS)}")
    return sdpa_segments(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), scaling, window, softcap)


def sdpa_segments(q, k, v, ends_q: list[int], ends_k: list[int], scaling, window=None, softcap=None):
    """`attend` with plain PyTorch, one segment after the other (runs of equally long ones at once)."""
    runs = []                                               # [segments, query length, key length]
    for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
        if runs and runs[-1][1:] == [q1 - q0, k1 - k0]:
            runs[-1][0] += 1
        else:
            runs.append([1, q1 - q0, k1 - k0])
    # one split a tensor, whose backward is one cat (a slice a segment would each write a zeroed (T, H, d))
    parts = zip(runs, q.split([n * Lq for n, Lq, _ in runs]),
                *(x.split([n * Lk for n, _, Lk in runs]) for x in (k, v)))
    out = []
    for (n, Lq, Lk), *qkv in parts:
        qs, ks, vs = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in qkv)     # (n, H, L, d)
        whole = Lq == Lk and not (window and window < Lk)
        mask = None
        if not whole or softcap:
            mask = torch.ones(Lq, Lk, dtype=torch.bool, device=q.device).tril(Lk - Lq)
            if window:
                mask = mask.triu(Lk - Lq - window + 1)
        if softcap:
            groups = q.shape[1] // k.shape[1]
            ks, vs = ks.repeat_interleave(groups, 1), vs.repeat_interleave(groups, 1)
            scores = torch.tanh(qs @ ks.mT * (scaling / softcap)) * softcap
            o = scores.float().masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype) @ vs
        else:
            o = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, is_causal=whole, scale=scaling,
                                               enable_gqa=q.shape[1] != k.shape[1])
        out.append(o.transpose(1, 2).flatten(0, 1))                             # (n * Lq, H, d)
    return out[0] if len(out) == 1 else torch.cat(out)


def varlen_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0,
                     sliding_window=None, softcap=None, cu_seqlens_q=None, cu_seqlens_k=None, max_q=None,
                     max_k=None, kv_index=None, backend=None, **kwargs):
    """`attend` in the signature of transformers' AttentionInterface: query (1, H, T, d), key and value
    (1, H_kv, T, d) -> (1, T, H, d). What it cannot honour it refuses by name; nothing is ignored."""
    refused = {"cu_seqlens_q": cu_seqlens_q is None, "dropout": bool(dropout),
               "attention sinks (s_aux)": kwargs.get("s_aux") is not None,
               "position_bias": kwargs.get("position_bias") is not None,
               "bidirectional attention": not getattr(module, "is_causal", True)
               or kwargs.get("is_causal") is False,
               "a batch dimension": query.shape[0] != 1, "a key/value cache": query.shape[2] != key.shape[2]}
    if any(refused.values()):
        what = ", ".join(name for name, is_refused in refused.items() if is_refused)
        raise ValueError(f"{type(module).__name__}: varlen attention got no or unservable {what}. "
                         "Pass a Batch through LogProbs, or set_attn_implementation('sdpa') to generate.")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))               # (T, H, d)
    if kv_index is not None:
        k, v = k[kv_index], v[kv_index]                                         # (T_k, H_kv, d)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(q.to(v.dtype), k.to(v.dtype), v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scaling,
                 sliding_window, softcap, backend)
    return out[None], None


def use_varlen(model, max_length: int | None = None) -> None:
    """Send a transformers causal LM's attention through `varlen_attention`. max_length: longest
    sequence it will see, tokens. Raises ValueError naming the model class when packed documents could
    reach each other in a way that segments do not stop, or the head does what token_logps does not."""
    name, config = type(model).__name__, model.config.get_text_config()
    why = []
    if not (getattr(model, "_supports_attention_backend", False) and model._supports_flash_attn):
        why.append("its attention does not go through transformers' AttentionInterface")
    if getattr(model, "_is_stateful", False):
        why.append("its recurrent state runs from one document into the next")
    foreign = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if foreign:
        why.append(f"layers of type {', '.join(sorted(foreign))} do not stop at a document's end")
    rope = getattr(config, "rope_parameters", None) or {}
    for r in [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]:
        limit = r.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", 0)
        if r["rope_type"] in ("dynamic", "longrope") and (max_length is None or max_length > limit):
            why.append(f"its {r['rope_type']} RoPE looks at the longest neighbour beyond {limit} tokens; "
                       f"keep --max-length at or below that (now {max_length})")
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        why.append("it has no output embedding to score targets with")
    for attribute in ("lm_head_multiplier", "mup_scale", "output_multiplier_scale"):
        if getattr(config, attribute, None) not in (None, 1.0):
            why.append(f"its head applies {attribute}")
    if why:
        raise ValueError(f"{name} cannot be trained on packed documents: {'; '.join(why)}")
    from transformers import AttentionInterface, AttentionMaskInterface
    AttentionInterface.register("varlen", varlen_attention)
    AttentionMaskInterface.register("varlen", lambda *args, **kwargs: None)
    model.set_attn_implementation("varlen")


# ---------------------------------------------------------------------------------------- log-probs
def _mm(a, b):
    """a @ b with the product accumulated and returned in float32 (float64 for float64)."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _logits(h, weight, bias, scale, softcap):
    logits = _mm(h, weight.T)                                                   # (n, V) float32
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, scale, softcap, chunk):
        ctx.rest = scale, softcap, chunk
        out = torch.empty(len(target), device=hidden.device,
                          dtype=torch.promote_types(hidden.dtype, torch.float32))
        lse = torch.empty_like(out)
        for i in range(0, len(target), chunk):
            z = _logits(hidden[i:i + chunk], weight, bias, scale, softcap)      # (n, V)
            at = z.gather(1, target[i:i + chunk, None])[:, 0]                   # (n,)
            top = z.amax(1)
            lse[i:i + chunk] = top + z.sub_(top[:, None]).exp_().sum(1).log()
            out[i:i + chunk] = at - lse[i:i + chunk]
        ctx.save_for_backward(hidden, weight, bias, target, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, target, lse = ctx.saved_tensors
        scale, softcap, chunk = ctx.rest
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        d_h = torch.empty_like(hidden) if need_h else None
        d_w = torch.zeros(weight.shape, dtype=grad.dtype, device=grad.device) if need_w else None
        d_b = torch.zeros(bias.shape, dtype=grad.dtype, device=grad.device) if need_b else None
        for i in range(0, len(target), chunk):
            h, t, g = hidden[i:i + chunk], target[i:i + chunk, None], grad[i:i + chunk, None]
            z = _logits(h, weight, bias, scale, softcap)
            # d softcap(u)/du = 1 - (z / c)^2, taken before z is overwritten by -softmax(z) * g
            slope = (z / softcap).square_().neg_().add_(1) if softcap else None
            p = z.sub_(lse[i:i + chunk, None]).exp_().mul_(-g)                  # -g * softmax
            p.scatter_add_(1, t, g)                                             # g * (1[target] - softmax)
            if softcap:
                p.mul_(slope)
            if scale != 1.0:
                p.mul_(scale)
            if need_b:
                d_b += p.sum(0)
            p = p.to(hidden.dtype)
            if need_h:
                d_h[i:i + chunk] = p @ weight
            if need_w and p.dtype == d_w.dtype:
                d_w.addmm_(p.T, h)
            elif need_w:
                d_w += _mm(p.T, h)
        d_w = d_w.to(weight.dtype) if need_w else None
        return d_h, d_w, d_b.to(bias.dtype) if need_b else None, None, None, None, None


def token_logps(hidden, weight, target, bias=None, scale: float = 1.0, softcap: float | None = None,
                chunk_bytes: int | None = None):
    """log softmax(softcap(scale * (h W^T + b)))[target] for every row of h, without the (N, V) matrix.

        log pi(t | h) = z_t - logsumexp(z),    d/dz = 1[t] - softmax(z)

    Rows are taken in chunks whose float32 logits fill `chunk_bytes` (default 32 MiB, on CUDA 1 GiB);
    backward computes each chunk again, and sums the weight's gradient in float32 over all chunks.

    hidden (N, D), weight (V, D), target (N,) int64, bias (V,) or None. softcap c: z -> c tanh(z / c)
    (Gemma-2); scale multiplies the logits (Cohere, Granite). Returns (N,) float32 nats (float64 for
    float64 input). Check value: W = 0 gives -ln V. N = 0 is fine.
    """
    V = weight.shape[0]
    if chunk_bytes is None:
        chunk_bytes = 2 ** 30 if hidden.is_cuda else 2 ** 25
    return _TokenLogps.apply(hidden, weight, bias, target, scale, softcap, max(1, chunk_bytes // (4 * V)))


class LogProbs(nn.Module):
    """A causal LM as the one function that training needs: Batch -> (N,) float32 log pi(target), nats.

    The head module itself scores the targets (called with them it returns log-probs, called without
    it is unchanged), so that ZeRO-3 gathers its weight once a forward. Expects `use_varlen(model)`.
    """

    def __init__(self, model, backend: str | None = None):
        super().__init__()
        self.model, self.backend = model, backend
        head, config = model.get_output_embeddings(), model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0                     # Cohere multiplies
        scale /= getattr(config, "logits_scaling", None) or 1.0                 # Granite divides
        softcap, plain = getattr(config, "final_logit_softcapping", None), type(head).forward

        def forward(hidden, target=None):
            if target is None:
                return plain(head, hidden)
            return token_logps(hidden, head.weight, target, getattr(head, "bias", None), scale, softcap)
        head.forward = forward

    def forward(self, batch: Batch) -> torch.Tensor:
        hidden = self.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
            cu_seqlens_q=batch.cu_seqlens_q, cu_seqlens_k=batch.cu_seqlens_k, max_q=batch.max_q,
            max_k=batch.max_k, kv_index=batch.kv_index, backend=self.backend).last_hidden_state[0]  # (T, D)
        return self.model.get_output_embeddings()(hidden[batch.source], batch.target)               # (N,)


def sequence_logps(logps, sequence, n: int):
    """log pi(y | x) of each answer: the sum of its tokens' log-probs. (N,), (N,) int64 -> (n,)."""
    return logps.new_zeros(n).index_add(0, sequence, logps)
