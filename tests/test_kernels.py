"""kernels.py: packed = shared = alone on every supported family, token_logps, layout by hand, refusals."""
import copy
import math
import subprocess
import sys

import pytest
import torch
import transformers as hf

import kernels
from kernels import Group, LogProbs, attend, layout, token_logps, use_varlen

SIZE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
WINDOW = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
FAMILIES = {
    "llama": lambda: hf.LlamaConfig(**SIZE),
    "gemma": lambda: hf.GemmaConfig(**SIZE, head_dim=16),
    "gemma-2": lambda: hf.Gemma2Config(**SIZE, **WINDOW, head_dim=16, query_pre_attn_scalar=16,
                                       attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma-3": lambda: hf.Gemma3TextConfig(**SIZE, **WINDOW, head_dim=16, query_pre_attn_scalar=16),
    "mistral": lambda: hf.MistralConfig(**SIZE, sliding_window=8),
    "qwen2": lambda: hf.Qwen2Config(**SIZE),
    "qwen3": lambda: hf.Qwen3Config(**SIZE, head_dim=16),
    "phi-3": lambda: hf.Phi3Config(**SIZE),
    "olmo-2": lambda: hf.Olmo2Config(**SIZE)}


def build(config, dtype=torch.float32, scale=4.0):
    """A random model with weights large enough that attention is not uniform."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(scale)
    return model


def random_ids(*lengths):
    return [torch.randint(3, 97, (n,)).tolist() for n in lengths]


def whole(docs):
    return [Group([], [d], [[False] + [True] * (len(d) - 1)]) for d in docs]


def alone(model, docs, skip):
    """log pi of each token after `skip[i]` first ones, one eager run a document, full log-softmax."""
    out = []
    for d, s in zip(docs, skip):
        logps = torch.log_softmax(model(torch.tensor([d])).logits[0, :-1].float(), -1)
        out.append(logps.gather(1, torch.tensor(d)[1:, None])[s - 1:, 0])
    return torch.cat(out)


def gradients(model, logps):
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a, b, model_a, model_b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    ga, gb = gradients(model_a, a), gradients(model_b, b)
    assert ga.keys() == gb.keys()
    for name in ga:
        assert (ga[name] - gb[name]).norm() <= 1e-5 * max(1.0, gb[name].norm()), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(family, checkpointing):
    """Documents (longer than every window of 8; one of 2 tokens): log-probs and all gradients."""
    spec = build(FAMILIES[family]())
    model = copy.deepcopy(spec)
    use_varlen(model, 64)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train(), spec.train()
    docs = random_ids(21, 13, 13, 2, 30)
    assert_same(LogProbs(model)(layout(whole(docs))), alone(spec, docs, [1] * 5), model, spec)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompt_equals_alone(family):
    """K = 1..5 answers, prompts and answers of one token, prompts longer than the window, answers with
    a long common beginning."""
    spec = build(FAMILIES[family]())
    model = copy.deepcopy(spec)
    use_varlen(model, 64)
    x, one, y, z, w, v, u = random_ids(17, 1, 12, 7, 1, 9, 1)
    groups = [Group(x, [y, y[:-1] + z, w, z, v], None), Group(one, [u, w], None), Group(x, [z], None)]
    groups = [g._replace(targets=[[True] * len(a) for a in g.answers]) for g in groups]
    docs = [g.prompt + a for g in groups for a in g.answers]
    skip = [len(g.prompt) for g in groups for _ in g.answers]
    shared, plain = layout(groups), layout(groups, share=False)
    assert shared.input_ids.shape[1] < plain.input_ids.shape[1] == sum(map(len, docs))
    logps = LogProbs(model)
    torch.testing.assert_close(logps(shared), logps(plain), atol=1e-5, rtol=1e-5)
    assert_same(logps(shared), alone(spec, docs, skip), model, spec)


def test_bf16_within_its_rounding():
    """Packed bf16 against alone in bf16: no further apart than twice what bf16 itself costs alone
    against fp32 (bf16 keeps 8 bits: sums in another order move by as much as the rounding)."""
    docs = random_ids(21, 13, 30)
    spec32 = build(FAMILIES["llama"]())
    spec = copy.deepcopy(spec32).bfloat16()
    model = copy.deepcopy(spec)
    use_varlen(model)
    with torch.no_grad():
        exact, half = alone(spec32, docs, [1] * 3), alone(spec, docs, [1] * 3)
        packed = LogProbs(model)(layout(whole(docs)))
    assert packed.dtype == torch.float32
    assert (packed - half).abs().max() <= 2 * (half - exact).abs().max()


# ------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("config, why", [
    (lambda: hf.FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
     "FalconForCausalLM.*AttentionInterface"),
    (lambda: hf.LlamaConfig(**SIZE, max_position_embeddings=32, rope_parameters={
        "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "LlamaForCausalLM.*dynamic RoPE"),
    (lambda: hf.Lfm2Config(**SIZE, layer_types=["conv", "full_attention"]), "Lfm2ForCausalLM.*conv")])
def test_refused_by_name(config, why):
    with pytest.raises(ValueError, match=why):
        use_varlen(hf.AutoModelForCausalLM.from_config(config()), 64)


def test_dynamic_rope_is_served_below_its_length():
    spec = build(hf.LlamaConfig(**SIZE, max_position_embeddings=32, rope_parameters={
        "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    model = copy.deepcopy(spec)
    use_varlen(model, 32)
    docs = random_ids(32, 5)
    torch.testing.assert_close(LogProbs(model)(layout(whole(docs))), alone(spec, docs, [1, 1]),
                               atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change, why", [
    ({"cu_seqlens_q": None}, "cu_seqlens_q"), ({"dropout": 0.1}, "dropout"), ({"s_aux": 1}, "sinks"),
    ({"query": torch.zeros(2, 4, 5, 8)}, "batch dimension")])
def test_attention_refuses_what_it_cannot_honour(change, why):
    b = layout(whole(random_ids(5)))
    call = dict(module=torch.nn.Identity(), query=torch.zeros(1, 4, 5, 8), key=torch.zeros(1, 2, 5, 8),
                value=torch.zeros(1, 2, 5, 8), attention_mask=None, cu_seqlens_q=b.cu_seqlens_q,
                cu_seqlens_k=b.cu_seqlens_k, max_q=5, max_k=5)
    assert kernels.varlen_attention(**call)[0].shape == (1, 5, 4, 8)
    with pytest.raises(ValueError, match=f"Identity.*{why}"):
        kernels.varlen_attention(**{**call, **change})


# -------------------------------------------------------------------------------------------- layout
def test_layout_of_a_pair_by_hand():
    """x = 1 2 3, y_w = 4 5, y_l = 6: rows 0..5; y_l reads keys 0 1 2 (x) and 5; both first answer
    tokens are predicted from row 2, x's last."""
    b = layout([Group([1, 2, 3], [[4, 5], [6]], [[True, True], [True]])])
    assert b.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]] and b.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert b.cu_seqlens_q.tolist() == [0, 5, 6] and b.cu_seqlens_k.tolist() == [0, 5, 9]
    assert (b.max_q, b.max_k) == (5, 5) and b.kv_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert b.source.tolist() == [2, 3, 2] and b.target.tolist() == [4, 5, 6] and b.sequence.tolist() == [0, 0, 1]


def test_layout_of_documents_by_hand():
    b = layout([Group([], [[7, 8, 9]], [[False, False, True]]), Group([], [[5, 6]], [[False, True]])])
    assert b.position_ids.tolist() == [[0, 1, 2, 0, 1]] and b.cu_seqlens_q.tolist() == [0, 3, 5]
    assert b.kv_index is None and b.source.tolist() == [1, 3] and b.target.tolist() == [9, 6]


def test_layout_degenerate():
    empty = layout([])
    assert empty.input_ids.shape == (1, 1) and len(empty.target) == 0
    with pytest.raises(ValueError, match="first token is a target"):
        layout([Group([], [[1, 2]], [[True, True]])])
    with pytest.raises(ValueError, match="2 tokens but 1 target flags"):
        layout([Group([], [[1, 2]], [[True]])])


# ----------------------------------------------------------------------------------------- attention
def naive(q, k, v, ends_q, ends_k, scaling, window, softcap):
    """The definition, one query and one head at a time."""
    out = torch.empty_like(q)
    for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
        for i in range(q0, q1):
            last = i - q0 + (k1 - k0) - (q1 - q0)
            first = max(0, last - window + 1) if window else 0
            for h in range(q.shape[1]):
                g = h // (q.shape[1] // k.shape[1])
                s = k[k0 + first:k0 + last + 1, g] @ q[i, h] * scaling
                s = softcap * torch.tanh(s / softcap) if softcap else s
                out[i, h] = torch.softmax(s, 0) @ v[k0 + first:k0 + last + 1, g]
    return out


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_attend_equals_the_definition(window, softcap):
    """Fewer queries than keys, runs of equal segments, GQA, head dimension 256."""
    torch.manual_seed(0)
    lq, lk = [4, 4, 1, 6, 2], [4, 4, 5, 6, 9]
    ends = lambda x: [0, *torch.tensor(x).cumsum(0).tolist()]
    q, k, v = torch.randn(sum(lq), 4, 256), torch.randn(sum(lk), 2, 256), torch.randn(sum(lk), 2, 256)
    got = attend(q, k, v, torch.tensor(ends(lq)), torch.tensor(ends(lk)), 6, 9, 0.1, window, softcap)
    torch.testing.assert_close(got, naive(q, k, v, ends(lq), ends(lk), 0.1, window, softcap))
    with pytest.raises(ValueError, match="unknown attention back end 'x'"):
        attend(q, k, v, torch.tensor(ends(lq)), torch.tensor(ends(lk)), 6, 9, 0.1, backend="x")


# --------------------------------------------------------------------------------------- token_logps
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_token_logps_equals_log_softmax_and_its_gradient(softcap):
    torch.manual_seed(0)
    h, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(7, 4), (11, 4), (11,)])
    t = torch.randint(11, (7,))
    f = lambda h, w, b, chunk=132: token_logps(h, w, t, b, 1.7, softcap, chunk)
    z = 1.7 * (h @ w.T + b)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    torch.testing.assert_close(f(h, w, b), torch.log_softmax(z, -1).gather(1, t[:, None])[:, 0])
    torch.testing.assert_close(f(h, w, b), f(h, w, b, 10 ** 9))
    assert torch.autograd.gradcheck(f, (h, w, b))


def test_token_logps_degenerate():
    h, t = torch.randn(5, 4), torch.arange(5)
    assert token_logps(h, torch.zeros(9, 4), t).tolist() == pytest.approx([-math.log(9)] * 5)
    w = torch.randn(9, 4, requires_grad=True)
    token_logps(h[:0], w, t[:0]).sum().backward()
    assert w.grad.abs().max() == 0
    huge = token_logps(1e4 * torch.ones(1, 1), torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    assert huge.item() == -2e4


def test_weight_gradient_is_summed_in_fp32():
    """bf16 weights, 64 chunks: the error against float64 is that of the inputs' rounding, not of a
    bf16 running sum."""
    torch.manual_seed(0)
    h, w, t = torch.rand(512, 8).bfloat16(), torch.rand(32, 8).bfloat16(), torch.randint(32, (512,))
    def grad(h, w, chunk):
        w = w.clone().requires_grad_()
        token_logps(h, w, t, chunk_bytes=chunk).sum().backward()
        return w.grad.double()
    exact = grad(h.double(), w.double(), 10 ** 9)
    assert (grad(h, w, 8 * 4 * 32) - exact).norm() / exact.norm() < 0.005
    assert torch.equal(grad(h, w, 8 * 4 * 32), grad(h, w, 10 ** 9))


def test_token_logps_memory():
    """N = 4096, V = 131072, D = 64: peak resident memory beyond inputs and returned gradients under 1/16
    of the full float32 logits (2 GiB); read from ru_maxrss of a process of its own, after a warm-up."""
    code = """
import resource, torch
from kernels import token_logps
N, V, D = 4096, 131072, 64
h, w = torch.randn(N, D).requires_grad_(), torch.randn(V, D).requires_grad_()
t = torch.randint(V, (N,))
token_logps(h[:2].detach().requires_grad_(), w.detach()[:99].requires_grad_(), t[:2] % 99).sum().backward()
h.grad, w.grad = torch.ones_like(h), torch.ones_like(w)      # resident before: what is returned
held = torch.ones(V, D)                                     # autograd's returned copy, added to .grad
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
del held
token_logps(h, w, t).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * N * V))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=kernels.__file__.rsplit("/", 1)[0])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1 / 16


# ---------------------------------------------------------------------------------------- heads, rest
@pytest.mark.parametrize("config", [
    lambda: hf.CohereConfig(**SIZE, logit_scale=0.25), lambda: hf.GraniteConfig(**SIZE, logits_scaling=4.0),
    lambda: hf.PhiConfig(**SIZE), lambda: FAMILIES["gemma-2"]()], ids=["scale", "divisor", "bias", "softcap"])
def test_heads_equal_the_models_own_logits(config):
    spec = build(config())
    for name, p in spec.named_parameters():
        if name == "lm_head.bias":
            torch.nn.init.normal_(p)
    model = copy.deepcopy(spec)
    use_varlen(model, 64)
    docs = random_ids(9, 4)
    torch.testing.assert_close(LogProbs(model)(layout(whole(docs))), alone(spec, docs, [1, 1]),
                               atol=1e-5, rtol=1e-5)


def test_the_model_stays_an_ordinary_one(tmp_path):
    spec = build(FAMILIES["llama"]())
    model = copy.deepcopy(spec)
    use_varlen(model)
    LogProbs(model)
    model.save_pretrained(tmp_path)
    assert "varlen" not in (tmp_path / "config.json").read_text()
    model.set_attn_implementation("sdpa")
    x = torch.tensor(random_ids(6))
    torch.testing.assert_close(model(x).logits, spec(x).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(x, max_new_tokens=4, do_sample=False),
                       spec.generate(x, max_new_tokens=4, do_sample=False))


def step_figures(config, lengths, device, dtype, steps):
    """One row of documents, forward and backward: tokens/s, MFU and peak memory. MFU = useful FLOPs (6 x
    body parameters x tokens, head at targets, causal attention, nothing recomputed) / time / the rate of
    a matmul measured here."""
    import time
    torch.manual_seed(0)
    with torch.device(device):
        model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    use_varlen(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    logps, batch = LogProbs(model), layout(whole(random_ids(*lengths))).to(device)

    def seconds(f, n):
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(n):
            f()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / n
    a = torch.randn(*(2 * [8192 if device == "cuda" else 256]), device=device, dtype=dtype)
    rate = 2 * len(a) ** 3 / seconds(lambda: a @ a, 10)
    spent = seconds(lambda: (-logps(batch).mean()).backward(), steps)
    head = config.vocab_size * config.hidden_size
    body = sum(p.numel() for p in model.parameters()) - head * (1 if config.tie_word_embeddings else 2)
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    flops = 6 * body * sum(lengths) + 6 * head * len(batch.target) + \
        6 * config.num_hidden_layers * width * sum(n * n for n in lengths)
    return {"tokens_per_s": sum(lengths) / spent, "mfu": flops / spent / rate, "peak_gib":
            torch.cuda.max_memory_allocated() / 2 ** 30 if device == "cuda" else None}


def test_step_figures_are_sane_on_a_small_model():
    figures = step_figures(hf.LlamaConfig(**SIZE), [40, 20], "cpu", torch.float32, 2)
    assert figures["tokens_per_s"] > 0 and 0 < figures["mfu"] < 1


@pytest.mark.gpu
def test_gemma_2b_shape_at_8192_tokens():
    """Prints the figures (pytest -s); asserts only that they can be."""
    config = hf.GemmaConfig(vocab_size=256002, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18,
                            num_attention_heads=8, num_key_value_heads=1, head_dim=256)
    figures = step_figures(config, [1024, 2048, 512, 512, 4096], "cuda", torch.bfloat16, 5)
    print(figures)
    assert 0 < figures["mfu"] < 1


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("backend", ["flash-attn", "torch-varlen"])
def test_cuda_back_ends_equal_fp32(backend, window):
    """bf16, fewer queries than keys, GQA, head dimension 256, against fp32 SDPA on the same values."""
    if backend == "flash-attn":
        pytest.importorskip("flash_attn", reason="pip install flash-attn --no-build-isolation")
    torch.manual_seed(0)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 40, 47], [0, 40, 90]))
    q, k, v = (torch.randn(n, h, 256, device="cuda").bfloat16() for n, h in ((47, 4), (90, 2), (90, 2)))
    got = attend(q, k, v, cu_q, cu_k, 40, 50, 0.06, window, backend=backend)
    want = attend(q.float(), k.float(), v.float(), cu_q, cu_k, 40, 50, 0.06, window, backend="sdpa")
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)
