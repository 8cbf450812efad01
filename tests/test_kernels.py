"""kernels.py: packed = shared = alone on every supported family, token_logps, layout by hand,
refusals. On a GPU: the back ends against fp32, speed and memory of one step."""
import copy
import functools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers as hf

import kernels
import sft
from kernels import Group, LogProbs, attend, layout, token_logps, use_varlen

ROOT = Path(kernels.__file__).parent
SIZE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
            eos_token_id=2)
WINDOW = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"], head_dim=16,
              query_pre_attn_scalar=16)
FAMILIES = {  # family: its config, made anew by each call
    "llama": functools.partial(hf.LlamaConfig, **SIZE),
    "gemma": functools.partial(hf.GemmaConfig, **SIZE, head_dim=16),
    "gemma-2": functools.partial(hf.Gemma2Config, **SIZE, **WINDOW, attn_logit_softcapping=2.0,
                                 final_logit_softcapping=3.0),
    "gemma-3": functools.partial(hf.Gemma3TextConfig, **SIZE, **WINDOW),
    "mistral": functools.partial(hf.MistralConfig, **SIZE, sliding_window=8),
    "qwen2": functools.partial(hf.Qwen2Config, **SIZE),
    "qwen3": functools.partial(hf.Qwen3Config, **SIZE, head_dim=16),
    "phi-3": functools.partial(hf.Phi3Config, **SIZE),
    "olmo-2": functools.partial(hf.Olmo2Config, **SIZE)}
ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
DYNAMIC = functools.partial(hf.LlamaConfig, **SIZE, max_position_embeddings=32,
                            rope_parameters=ROPE)


def build(config, dtype=torch.float32, scale=4.0):
    """A random model with weights large enough that attention is not uniform."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(scale)
    return model


def varlen_copy(spec, checkpointing=False):
    """The same model behind LogProbs, as training runs it."""
    model = copy.deepcopy(spec)
    use_varlen(model, 64)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return LogProbs(model)


def random_ids(*lengths):
    return [torch.randint(3, 97, (n,)).tolist() for n in lengths]


def documents(docs):
    return [Group([], [d], [[False] + [True] * (len(d) - 1)]) for d in docs]


def answers_to(prompt, *answers):
    return Group(prompt, list(answers), [[True] * len(y) for y in answers])


def alone(model, groups):
    """log pi of every target, one eager run per sequence, from the full log-softmax."""
    logps = []
    for x, answers, _ in groups:
        for y in answers:
            ids = torch.tensor(x + y)
            z = torch.log_softmax(model(ids[None]).logits[0, :-1].float(), -1)      # (T - 1, V)
            logps.append(z.gather(1, ids[1:, None])[max(0, len(x) - 1):, 0])
    return torch.cat(logps)


def gradients(model, logps):
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def assert_same(a, b, model_a, model_b):
    """Equal values and, relative to their norms, equal gradients of all parameters."""
    assert_close(a, b)
    grads_a = gradients(model_a, a)
    grads_b = gradients(model_b, b)
    assert grads_a.keys() == grads_b.keys()
    for name, grad in grads_b.items():
        assert (grads_a[name] - grad).norm() <= 1e-5 * max(1.0, grad.norm()), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(family, checkpointing):
    """Documents longer than every window of 8, and one of 2 tokens."""
    spec = build(FAMILIES[family]())
    logps = varlen_copy(spec, checkpointing)
    groups = documents(random_ids(21, 13, 13, 2, 30))
    assert_same(logps(layout(groups)), alone(spec, groups), logps.model, spec)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompt_equals_alone(family):
    """K = 1..5 answers, prompts and answers of one token, prompts longer than the window, answers
    with a long common beginning."""
    spec = build(FAMILIES[family]())
    logps = varlen_copy(spec)
    x, one, y, z, w, v, u = random_ids(17, 1, 12, 7, 1, 9, 1)
    groups = [answers_to(x, y, y[:-1] + z, w, z, v), answers_to(one, u, w), answers_to(x, z)]
    shared = layout(groups)
    plain = layout(groups, share=False)
    n_plain = sum(len(g.prompt + y) for g in groups for y in g.answers)
    assert shared.input_ids.shape[1] < plain.input_ids.shape[1] == n_plain
    assert_close(logps(shared), logps(plain))
    assert_same(logps(shared), alone(spec, groups), logps.model, spec)


def test_transformers_builds_no_mask(monkeypatch):
    """It would look for packed documents in the positions, for which a GPU's host waits."""
    from transformers import masking_utils
    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    logps = varlen_copy(build(FAMILIES["llama"]()), checkpointing=True)
    assert logps(kernels.layout(documents(random_ids(9, 4)))).isfinite().all()


def test_bf16_within_its_rounding():
    """Packed bf16 against alone in bf16: no further apart than twice what bf16 itself costs alone
    against fp32 (bf16 keeps 8 bits: sums in another order move by as much as the rounding)."""
    groups = documents(random_ids(21, 13, 30))
    spec = build(FAMILIES["llama"]())
    with torch.no_grad():
        exact = alone(spec, groups)
        half = alone(spec.bfloat16(), groups)
        packed = varlen_copy(spec)(layout(groups))
    assert packed.dtype == torch.float32
    assert (packed - half).abs().max() <= 2 * (half - exact).abs().max()


# --------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("config, why", [
    (hf.FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
     "FalconForCausalLM.*AttentionInterface"),
    (DYNAMIC(), "LlamaForCausalLM.*dynamic RoPE"),
    (hf.Lfm2Config(**SIZE, layer_types=["conv", "full_attention"]), "Lfm2ForCausalLM.*conv")])
def test_refused_by_name(config, why):
    with pytest.raises(ValueError, match=why):
        use_varlen(hf.AutoModelForCausalLM.from_config(config), 64)


def test_dynamic_rope_is_served_below_its_length():
    spec = build(DYNAMIC())
    model = copy.deepcopy(spec)
    groups = documents(random_ids(32, 5))
    use_varlen(model, 32)
    assert_close(LogProbs(model)(layout(groups)), alone(spec, groups))


@pytest.mark.parametrize("change, why", [
    ({"cu_seqlens_q": None}, "cu_seqlens_q"), ({"dropout": 0.1}, "dropout"),
    ({"s_aux": 1}, "sinks"), ({"query": torch.zeros(2, 4, 5, 8)}, "batch dimension")])
def test_attention_refuses_what_it_cannot_honour(change, why):
    b = layout(documents(random_ids(5)))
    call = dict(module=torch.nn.Identity(), query=torch.zeros(1, 4, 5, 8),
                key=torch.zeros(1, 2, 5, 8), value=torch.zeros(1, 2, 5, 8), attention_mask=None,
                cu_seqlens_q=b.cu_seqlens_q, cu_seqlens_k=b.cu_seqlens_k, max_q=5, max_k=5)
    assert kernels.varlen_attention(**call)[0].shape == (1, 5, 4, 8)
    with pytest.raises(ValueError, match=f"Identity.*{why}"):
        kernels.varlen_attention(**{**call, **change})


# ----------------------------------------------------------------------------------------- layout
def test_layout_of_a_pair_by_hand():
    """x = 1 2 3, y_w = 4 5, y_l = 6: rows 0..5; y_l reads keys 0 1 2 (x) and 5; both first answer
    tokens are predicted from row 2, x's last."""
    b = layout([answers_to([1, 2, 3], [4, 5], [6])])
    assert b.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert b.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert b.cu_seqlens_q.tolist() == [0, 5, 6]
    assert b.cu_seqlens_k.tolist() == [0, 5, 9]
    assert (b.max_q, b.max_k) == (5, 5)
    assert b.kv_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert b.source.tolist() == [2, 3, 2]
    assert b.target.tolist() == [4, 5, 6]
    assert b.sequence.tolist() == [0, 0, 1]


def test_layout_of_documents_by_hand():
    b = layout([Group([], [[7, 8, 9]], [[False, False, True]]), *documents([[5, 6]])])
    assert b.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert b.cu_seqlens_q.tolist() == [0, 3, 5]
    assert b.kv_index is None
    assert b.source.tolist() == [1, 3]
    assert b.target.tolist() == [9, 6]


def test_layout_degenerate():
    empty = layout([])
    assert empty.input_ids.shape == (1, 1)
    assert len(empty.target) == 0
    with pytest.raises(ValueError, match="first token is a target"):
        layout([answers_to([], [1, 2])])
    with pytest.raises(ValueError, match="2 tokens, 1 target flags"):
        layout([Group([], [[1, 2]], [[True]])])


# -------------------------------------------------------------------------------------- attention
def attend_by_definition(q, k, v, ends_q, ends_k, scaling, window, softcap):
    """One query and one head at a time."""
    out = torch.empty_like(q)
    for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
        for i in range(q0, q1):
            last = i - q0 + (k1 - k0) - (q1 - q0)
            first = max(0, last - window + 1) if window else 0
            keys = slice(k0 + first, k0 + last + 1)
            for h in range(q.shape[1]):
                g = h // (q.shape[1] // k.shape[1])
                s = k[keys, g] @ q[i, h] * scaling
                s = softcap * torch.tanh(s / softcap) if softcap else s
                out[i, h] = torch.softmax(s, 0) @ v[keys, g]
    return out


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_attend_equals_the_definition(window, softcap):
    """Fewer queries than keys, runs of equal segments, GQA, head dimension 256."""
    torch.manual_seed(0)
    ends_q = [0, 4, 8, 9, 15, 17]
    ends_k = [0, 4, 8, 13, 19, 28]
    q, k, v = (torch.randn(n, heads, 256) for n, heads in ((17, 4), (28, 2), (28, 2)))
    segments = torch.tensor(ends_q), torch.tensor(ends_k), 6, 9
    expected = attend_by_definition(q, k, v, ends_q, ends_k, 0.1, window, softcap)
    torch.testing.assert_close(attend(q, k, v, *segments, 0.1, window, softcap), expected)
    with pytest.raises(ValueError, match="unknown attention back end 'x'"):
        attend(q, k, v, *segments, 0.1, backend="x")


# ------------------------------------------------------------------------------------ token_logps
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_token_logps_equals_log_softmax_and_its_gradient(softcap):
    torch.manual_seed(0)
    h, w, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True)
               for shape in ((7, 4), (11, 4), (11,)))
    t = torch.randint(11, (7,))

    def logps(h, w, b, chunk_bytes=132):                    # 3 rows of 11 float32 logits
        return token_logps(h, w, t, b, 1.7, softcap, chunk_bytes)
    z = 1.7 * (h @ w.T + b)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    expected = torch.log_softmax(z, -1).gather(1, t[:, None])[:, 0]
    torch.testing.assert_close(logps(h, w, b), expected)
    torch.testing.assert_close(logps(h, w, b), logps(h, w, b, 10 ** 9))
    assert torch.autograd.gradcheck(logps, (h, w, b))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_padded_rows_do_not_count(softcap):
    """Log-probs and gradients of 11 real rows, whatever the 5 rows of padding hold."""
    torch.manual_seed(0)
    h, w, b = (torch.randn(*shape, requires_grad=True) for shape in ((7, 4), (16, 4), (16,)))
    t = torch.randint(11, (7,))
    expected = token_logps(h, w[:11], t, b[:11], 1.7, softcap, 132)
    logps = token_logps(h, w, t, b, 1.7, softcap, 132, vocab=11)
    torch.testing.assert_close(logps, expected)
    for a, e in zip(*(torch.autograd.grad(x.sum(), (h, w, b)) for x in (logps, expected))):
        torch.testing.assert_close(a, e)
        assert len(a) == 7 or a[11:].abs().max() == 0


def test_token_logps_degenerate():
    h = torch.randn(5, 4)
    t = torch.arange(5)
    uniform = token_logps(h, torch.zeros(9, 4), t)
    assert uniform.tolist() == pytest.approx([-math.log(9)] * 5)
    w = torch.randn(9, 4, requires_grad=True)
    token_logps(h[:0], w, t[:0]).sum().backward()
    assert w.grad.abs().max() == 0
    huge = token_logps(1e4 * torch.ones(1, 1), torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    assert huge.item() == -2e4


def weight_gradient(h, w, t, chunk_bytes):
    w = w.clone().requires_grad_()
    token_logps(h, w, t, chunk_bytes=chunk_bytes).sum().backward()
    return w.grad.double()


def test_weight_gradient_is_summed_in_fp32():
    """bf16 weights, 64 chunks: the error against float64 is that of the inputs' rounding, not of a
    bf16 running sum."""
    torch.manual_seed(0)
    h = torch.rand(512, 8)
    w = torch.rand(32, 8)
    t = torch.randint(32, (512,))
    h, w = h.bfloat16(), w.bfloat16()
    exact = weight_gradient(h.double(), w.double(), t, 10 ** 9)
    chunked = weight_gradient(h, w, t, 8 * 4 * 32)
    assert (chunked - exact).norm() / exact.norm() < 0.005
    assert torch.equal(chunked, weight_gradient(h, w, t, 10 ** 9))


def test_token_logps_memory():
    """N = 4096, V = 131072, D = 64: peak resident memory beyond inputs and returned gradients under
    1/16 of the full float32 logits (2 GiB), from ru_maxrss of an own process after a warm-up."""
    code = """
import resource, torch
from kernels import token_logps
N, V, D = 4096, 131072, 64
h, w = torch.randn(N, D).requires_grad_(), torch.randn(V, D).requires_grad_()
t = torch.randint(V, (N,))
few_h, few_w = h[:2].detach().requires_grad_(), w.detach()[:99].requires_grad_()
token_logps(few_h, few_w, t[:2] % 99).sum().backward()
h.grad, w.grad = torch.ones_like(h), torch.ones_like(w)     # resident before: what is returned
returned = torch.ones(V, D)                                 # autograd's copy, added to .grad
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
del returned
token_logps(h, w, t).sum().backward()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / (4 * N * V))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) < 1 / 16


# -------------------------------------------------------------------------------- heads, the rest
@pytest.mark.parametrize("config", [
    hf.CohereConfig(**SIZE, logit_scale=0.25), hf.GraniteConfig(**SIZE, logits_scaling=4.0),
    hf.PhiConfig(**SIZE), FAMILIES["gemma-2"]()], ids=["scale", "divisor", "bias", "softcap"])
def test_heads_equal_the_models_own_logits(config):
    spec = build(config)
    groups = documents(random_ids(9, 4))
    for name, p in spec.named_parameters():
        if name == "lm_head.bias":
            torch.nn.init.normal_(p)
    assert_close(varlen_copy(spec)(layout(groups)), alone(spec, groups))


def test_the_model_stays_an_ordinary_one(tmp_path):
    spec = build(FAMILIES["llama"]())
    model = varlen_copy(spec).model
    model.save_pretrained(tmp_path)
    assert "varlen" not in (tmp_path / "config.json").read_text()
    model.set_attn_implementation("sdpa")
    x = torch.tensor(random_ids(6))
    assert_close(model(x).logits, spec(x).logits)
    greedy = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(x, **greedy), spec.generate(x, **greedy))


@pytest.mark.parametrize("argv", [
    ["sft.py", "--max-steps", "1", "--data", "demo:test", "--max-length", "128"],
    ["dpo.py", "--help"], ["online_dpo.py", "--help"], ["evaluate.py", "--help"],
    ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels.py", "-k", "layout"],
    ["-c", "import evaluate; from transformers import LlamaForCausalLM"]])
def test_beside_hugging_faces_package_kernels(argv, tmp_path):
    """Its distribution is installed in the version that transformers would use."""
    info = tmp_path / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    if argv[0] == "sft.py":
        argv = [*argv, "--output", tmp_path / "run", "--cache-dir", tmp_path / "cache"]
    process = subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT,
                             env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert process.returncode == 0, process.stderr[-3000:]


# -------------------------------------------------------------------------------------------- GPU
def seconds(step, device, repeat):
    """Time per call after one to warm up."""
    for n in (1, repeat):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(n):
            step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeat


def padded_logps(model, groups):
    """What the textbook does: right-padded sequences, logits of every position."""
    ids = [torch.tensor(x + y) for x, answers, _ in groups for y in answers]
    masks = [torch.tensor([False] * len(x) + t) for x, _, targets in groups for t in targets]
    ids, mask = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(model.device)
                 for part in (ids, masks))
    z = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return z.gather(2, ids[:, 1:, None])[..., 0][mask[:, 1:]]


def step_figures(config, device, dtype, groups, micro, repeat):
    """Forward and backward over all groups, `micro` at a time, padded, unpadded and shared: seconds
    and peak GiB; of shared tokens/s and MFU (sft.useful_flops / time / rate of a matmul here)."""
    torch.manual_seed(0)
    with torch.device(device):
        model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    parts = [groups[i:i + micro] for i in range(0, len(groups), micro)]
    figures = {}

    def step(logps_of):
        model.zero_grad()
        for part in parts:
            (-logps_of(part).mean()).backward()

    def measure(name, logps_of):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        figures[name] = seconds(functools.partial(step, logps_of), device, repeat), sft.peak_gib()
    measure("padded", functools.partial(padded_logps, model))
    use_varlen(model)
    logps = LogProbs(model)
    for name, share in (("unpadded", False), ("shared", True)):
        measure(name, lambda part: logps(layout(part, share).to(device)))

    batch = layout(groups)
    q = batch.cu_seqlens_q.diff().double()
    k = batch.cu_seqlens_k.diff().double()
    attended = (q * (k - q) + q * (q + 1) / 2).sum().item()             # (query, key) pairs
    tokens = batch.input_ids.numel()
    flops = sft.useful_flops(model, tokens, len(batch.target), attended)
    a = torch.randn(*(2 * [8192 if device == "cuda" else 256]), device=device, dtype=dtype)
    rate = 2 * len(a) ** 3 / seconds(lambda: a @ a, device, 10)
    spent = figures["shared"][0]
    return figures | {"tokens_per_s": tokens / spent, "mfu": flops / spent / rate}


def random_pairs(n, longest, prompt, answer):
    """Pairs of random lengths, drawn from normal distributions (mean, deviation)."""
    torch.manual_seed(0)
    lengths = torch.tensor([prompt, answer, answer]).T[..., None].float()
    lengths = (lengths[0] + lengths[1] * torch.randn(3, n)).clamp(1, longest // 2).int()
    return [answers_to(*random_ids(*row)) for row in lengths.T.tolist()]


def test_step_figures_are_sane_on_a_small_model():
    groups = random_pairs(4, 60, (10, 5), (10, 5))
    figures = step_figures(FAMILIES["llama"](), "cpu", torch.float32, groups, 2, 1)
    assert figures["tokens_per_s"] > 0
    assert 0 < figures["mfu"] < 1
    model = build(FAMILIES["llama"]())
    assert_close(padded_logps(model, groups), alone(model, groups))


@pytest.mark.gpu
@pytest.mark.parametrize("groups, micro", [
    (documents(random_ids(1024, 2048, 512, 512, 4096)), 5),
    (random_pairs(128, 2048, (180, 200), (250, 150)), 4),
    (random_pairs(128, 2048, (125, 100), (48, 30)), 4)], ids=["sft", "ultrafeedback", "hh"])
def test_gemma_2b_shape(groups, micro):
    """Prints the figures (pytest -s); asserts only that they can be."""
    config = hf.GemmaConfig(
        vocab_size=256002, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18,
        num_attention_heads=8, num_key_value_heads=1, head_dim=256)
    figures = step_figures(config, "cuda", torch.bfloat16, groups, micro, 3)
    print(figures)
    assert 0 < figures["mfu"] < 1


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("backend", ["flash-attn", "torch-varlen"])
def test_cuda_back_ends_equal_fp32(backend, window):
    """bf16, fewer queries than keys, GQA, head dimension 256, against fp32 SDPA, same values."""
    if backend == "flash-attn":
        pytest.importorskip("flash_attn", reason="pip install flash-attn --no-build-isolation")
    torch.manual_seed(0)
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32, device="cuda")
                  for ends in ([0, 40, 47], [0, 40, 90]))
    q, k, v = (torch.randn(n, heads, 256, device="cuda").bfloat16()
               for n, heads in ((47, 4), (90, 2), (90, 2)))
    rest = cu_q, cu_k, 40, 50, 0.06, window
    half = attend(q, k, v, *rest, backend=backend).float()
    exact = attend(q.float(), k.float(), v.float(), *rest, backend="sdpa")
    torch.testing.assert_close(half, exact, atol=2e-2, rtol=2e-2)


# ------------------------------------------------------------------------------ further refusals
TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=4)


@pytest.mark.parametrize("config, why", [
    (hf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1), "recurrent state"),
    (hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=32),
     "32 learned positions; set --max-length to at most that .now --max-length 64"),
    (hf.ModernBertDecoderConfig(**TINY, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                cls_token_id=3, sep_token_id=4),     # a layer before its head
     "log-probs would be .* nats off")])
def test_refused_by_name_of_its_part(config, why):
    model = hf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot be trained.*{why}"):
        use_varlen(model, 64)


def test_a_bf16_model_with_large_logits_is_no_other_model():
    """Its own logits, up to hundreds, are rounded to bf16."""
    model = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**TINY), dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3000)
    use_varlen(model, 64)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel cannot.*no output embedding"):
        use_varlen(hf.AutoModel.from_config(hf.LlamaConfig(**TINY)), 64)


def test_sums_over_answers_by_hand():
    """Answers 0 and 2 have targets, answer 1 has none."""
    sums = kernels.sequence_logps(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 2]), 3)
    assert sums.tolist() == [-3, 0, -4]
