"""bf16: the reference equals its policy; masters do not depend on when gradients are added up.
These run on a CPU. Tests marked gpu need CUDA and take seconds.

As a script it runs `masters` in a process of its own."""
import functools
import json
import math
import random
import string
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import dpo
import kernels
import sft
from conftest import start_ranks
from test_kernels import FAMILIES, answers_to, build, documents, random_ids, varlen_copy
from test_sft import weights

SIZE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, pad_token_id=0)
SHAPES = {"llama": functools.partial(hf.LlamaConfig, **SIZE, head_dim=128),
          "gemma": functools.partial(hf.GemmaConfig, **SIZE, head_dim=256)}


@pytest.fixture(scope="module", params=SHAPES)
def pairs(request, tmp_path_factory):
    """A random fp32 model's folder, and 4 pairs of 500 + 250 tokens, one per byte, prepared."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = data.demo_tokenizer()
    template = data.set_template(tokenizer)
    for part in (build(SHAPES[request.param](vocab_size=len(tokenizer))), tokenizer):
        part.save_pretrained(folder)
    letters = random.Random(0)
    texts = [["".join(letters.choices(string.ascii_letters, k=n)) for n in (500, 250, 250)]
             for _ in range(4)]
    rows = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in texts]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = data.prepare([str(folder / "pairs.jsonl")], tokenizer, template, pairs=True,
                           max_length=1024, max_prompt_length=600, cache_dir=folder).dataset
    return folder, tokenizer, dataset


def parse(folder, dtype):
    return dpo.parse(["--model", str(folder), "--data", "x", "--dtype", dtype, "--max-length",
                      "1024", "--cache-dir", str(folder / dtype)], dpo.parser(), dpo.PRESETS)


def load_and_cast(load_model, args, *rest):
    """The wrong way: rotary frequencies are rounded with the weights."""
    return load_model(dpo.copy_of(args, dtype="fp32"), *rest).to(torch.bfloat16)


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("cast", [False, True])
def test_reference_equals_policy_in_bf16(pairs, cast, monkeypatch):
    """The reference differs from the engine's policy by less than twice what bf16 costs the policy
    against fp32, and the first loss is ln 2. A module cast as a whole fails both."""
    folder, tokenizer, dataset = pairs
    sft.init_distributed()
    args = parse(folder, "bf16")
    exact = torch.from_numpy(dpo.frozen_logps(parse(folder, "fp32"), folder, dataset, tokenizer))
    engine = sft.make_engine(args, kernels.LogProbs(sft.load_model(args, tokenizer, [])))
    if cast:
        args.cache_dir = folder / "cast"
        monkeypatch.setattr(dpo, "load_model", functools.partial(load_and_cast, sft.load_model))
    ref = torch.from_numpy(dpo.frozen_logps(args, folder, dataset, tokenizer))
    batch, _ = dpo.Pairs(dataset, True).batch(range(4))
    with torch.no_grad():
        policy = dpo.pair_logps(engine, batch.to(sft.device()), 4).cpu()
    sft.release(engine)
    frequencies = [b.dtype for name, b in engine.module.named_buffers() if "inv_freq" in name]
    assert frequencies and set(frequencies) == {torch.float32}
    loss = dpo.dpo_loss(*policy.unbind(1), *ref.unbind(1), 0.1).item() / 4
    assert (rms(ref - policy) <= 2 * rms(policy - exact)) is not cast
    assert (abs(loss - math.log(2)) < 1e-3) is not cast


def masters(out, zero):
    """The fp32 weights after three bf16 steps of two micro-batches, with and without
    immediate_grad_update."""
    import deepspeed
    initialize = deepspeed.initialize
    for immediate in (True, False):

        def initialize_changed(config, **rest):
            config["bf16"]["immediate_grad_update"] &= immediate
            return initialize(config=config, **rest)
        deepspeed.initialize = initialize_changed
        sft.main(["--data", "demo:test", "--max-length", "128", "--batch-size", "8",
                  "--micro-tokens", "256", "--lr", "1e-3", "--dtype", "bf16", "--zero", zero,
                  "--max-steps", "3", "--cache-dir", f"{out}/cache", "--output",
                  f"{out}/{immediate}"])


@pytest.mark.parametrize("zero", [1, *(pytest.param(z, marks=pytest.mark.slow) for z in (2, 3))])
def test_masters_equal_with_and_without_immediate_grad_update(zero, tmp_path):
    """Two ranks, within 1e-8."""
    processes = start_ranks("tests/test_gpu.py", [tmp_path, zero], 2, tmp_path / "log")
    assert [p.wait() for p in processes] == [0, 0], (tmp_path / "log.0.log").read_text()[-3000:]
    a, b = (weights(tmp_path / str(immediate)) for immediate in (True, False))
    assert all((a[name] - b[name]).abs().max() <= 1e-8 for name in a)


# -------------------------------------------------------------------------------------------- GPU
@pytest.mark.gpu
def test_a_forward_and_backward_wait_for_nothing():
    """torch raises at any operation that makes the host wait for the GPU."""
    logps = varlen_copy(build(FAMILIES["llama"](), torch.bfloat16)).cuda()
    batch = kernels.layout([answers_to(*random_ids(17, 12, 7)), *documents(random_ids(9))])
    for mode in ("default", "error"):                       # the first call warms up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            logps(batch.to("cuda")).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_padded_rows_do_not_count_on_cuda(softcap):
    torch.manual_seed(0)
    h, w = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((64, 128), (320, 128)))
    target = torch.randint(302, (64,), device="cuda")
    z = h.float() @ w[:302].float().T
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    exact = z.log_softmax(1).gather(1, target[:, None])[:, 0]
    w.requires_grad_()
    logps = kernels.token_logps(h, w, target, softcap=softcap, vocab=302)
    torch.testing.assert_close(logps, exact, atol=2e-2, rtol=2e-2)
    logps.sum().backward()
    assert w.grad[302:].abs().max() == 0
    assert w.grad.isfinite().all()


if __name__ == "__main__":
    masters(*sys.argv[1:])
