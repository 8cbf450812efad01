"""The ten-minute check of a GPU, in one process and without a download.

    python tests/bench_gpu.py                   # one GPU of 80 GB
    python tests/bench_gpu.py --tiny            # the same code on a CPU, small shapes, no figures
    python tests/bench_gpu.py --only attention head

Eight parts, each with its own pass or fail: attention back ends against fp32; reference against
policy in bf16; the head at three vocabularies; the engine at ZeRO 1 to 3; the profile of one
micro-batch; resume; sampling; `pytest -m gpu`. Random models of Gemma-2b's shape. A part that
raises is reported and the next one runs. MFU = useful FLOPs (sft.useful_flops) / time / the rate
of an 8192^3 bf16 matmul measured in the same run. The last line is JSON.
"""
import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import torch
import transformers as hf

import data
import kernels
import online_dpo
import sft
from test_kernels import documents, seconds

GEMMA = dict(hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, head_dim=256,
             num_attention_heads=8, num_key_value_heads=1)
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=32,
            num_attention_heads=2, num_key_value_heads=1)


LINEAR = torch.nn.functional.linear


def shape(args, vocab):
    return hf.GemmaConfig(**(TINY if args.tiny else GEMMA), vocab_size=vocab, pad_token_id=0)


def flags(args, work, *more):
    """Parsed flags of stage 1 in bf16; the model is not loaded by its name."""
    return sft.parse(["--model", "demo", "--data", "demo:test", "--dtype", "bf16", "--cache-dir",
                      str(work / "cache"), *map(str, more)], sft.parser(), sft.PRESETS)


def random_documents(args, tokens, length, vocab):
    """Documents of `length` random tokens, `tokens` in all."""
    length = 64 if args.tiny else length
    tokens = 128 if args.tiny else tokens
    return documents(torch.randint(3, vocab, (tokens // length, length)).tolist())


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------- the parts
def attention(args, work):
    """(1) Each back end against fp32 SDPA: outputs within 2e-2, gradients within 2% in norm."""
    device, worst = sft.device(), {}
    backends = ["sdpa"] if args.tiny else ["torch-varlen"]
    if kernels.is_installed("flash-attn") and not args.tiny:
        backends.append("flash-attn")
    ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32, device=device)
                      for ends in ([0, 400, 470], [0, 400, 900]))
    for backend in backends:
        for d in (64, 128, 256):
            for window in (None, 8):
                exact, half = [], []
                torch.manual_seed(0)
                x = [torch.randn(n, heads, d, device=device).bfloat16()
                     for n, heads in ((470, 8), (900, 1), (900, 1))]
                for results, dtype, name in ((exact, torch.float32, "sdpa"),
                                             (half, torch.bfloat16, backend)):
                    q, k, v = (t.detach().to(dtype).requires_grad_() for t in x)
                    o = kernels.attend(q, k, v, ends_q, ends_k, 400, 500, d ** -0.5, window,
                                       backend=name)
                    (o.float() * torch.linspace(-1, 1, d, device=device)).sum().backward()
                    results += [o.detach().float(), *(t.grad.float() for t in (q, k, v))]
                error = (half[0] - exact[0]).abs().max().item()
                gradient = max(relative(h, e) for h, e in zip(half[1:], exact[1:]))
                worst[f"{backend} d={d} window={window}"] = [error, gradient]
    ok = all(error <= 2e-2 and gradient <= 0.02 for error, gradient in worst.values())
    return {"ok": ok, "worst_output": max(error for error, _ in worst.values()),
            "worst_gradient": max(gradient for _, gradient in worst.values())}


def reference(args, work):
    """(2) rms(reference - policy) is at most twice rms(policy - fp32), 2,048 tokens."""
    torch.manual_seed(0)
    with torch.device(sft.device()):
        model = hf.AutoModelForCausalLM.from_config(shape(args, 32000), dtype=torch.bfloat16)
    model.save_pretrained(work / "random")
    del model
    batch = kernels.layout(random_documents(args, 2048, 2048, 32000)).to(sft.device())
    logps = {}
    for name, dtype in (("fp32", torch.float32), ("reference", torch.bfloat16),
                        ("policy", torch.bfloat16)):
        module = hf.AutoModelForCausalLM.from_pretrained(work / "random", dtype=dtype)
        kernels.use_varlen(module, 2048)
        module = kernels.LogProbs(module.to(sft.device()))
        if name == "policy":
            module = sft.make_engine(flags(args, work), module)
        with torch.no_grad():
            logps[name] = module(batch).double()
        if name == "policy":
            sft.release(module)
        del module
        release()
    a, b = ((logps[x] - logps["policy"]).square().mean().sqrt().item()
            for x in ("reference", "fp32"))
    return {"ok": a <= 2 * b, "rms_reference_policy": a, "rms_policy_fp32": b}


def head(args, work):
    """(3) Milliseconds of token_logps, forward and backward, N = 8,192, three vocabularies; the
    third is the second with rows of padding."""
    n, d = (64, 32) if args.tiny else (8192, 2048)
    times = {}
    sizes = [(256000, 256000), (256002, 256002), (256002, 256064)]
    if args.tiny:
        sizes = [(256, 256), (258, 258), (258, 320)]
    for vocab, rows in sizes:
        torch.manual_seed(0)
        h, w = (torch.randn(*size, device=sft.device()).bfloat16().requires_grad_()
                for size in ((n, d), (rows, d)))
        target = torch.randint(vocab, (n,), device=sft.device())

        def step():
            kernels.token_logps(h, w, target, vocab=vocab).sum().backward()
        times[f"{vocab} of {rows}"] = 1e3 * seconds(step, sft.device().type, 3)
    return {"ok": True, "ms": times}


def micro_steps(engine, batch, n):
    """One optimiser step of n micro-batches."""
    for m in range(n):
        loss = -engine(batch).sum() / len(batch.target) / n
        engine.set_gradient_accumulation_boundary(m == n - 1)
        engine.backward(loss, scale_wrt_gas=False)
    norm = sft.clip_and_step(engine, zero=1)
    assert norm < float("inf")


def new_engine(args, work, *more):
    torch.manual_seed(0)
    with torch.device(sft.device()):
        model = hf.AutoModelForCausalLM.from_config(shape(args, 256000 if not args.tiny else 320),
                                                    dtype=torch.bfloat16)
    kernels.use_varlen(model, 16384)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return sft.make_engine(flags(args, work, *more), kernels.LogProbs(model))


def engine(args, work):
    """(4) tokens/s, MFU and peak GiB at ZeRO 1 to 3, four micro-batches of 8,192, then 16,384."""
    figures = {}
    size = 256 if args.tiny else 8192
    a = torch.randn(size, size, device=sft.device(), dtype=torch.bfloat16)
    rate = 2 * size ** 3 / seconds(lambda: a @ a, sft.device().type, 10)
    for zero in (1, 2, 3):
        trained = new_engine(args, work, "--zero", zero)
        for tokens in (8192, 16384):
            groups = random_documents(args, tokens, 2048, 320 if args.tiny else 256000)
            batch = kernels.layout(groups).to(sft.device())
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            spent = seconds(functools.partial(micro_steps, trained, batch, 4),
                            sft.device().type, 2)
            lengths = batch.cu_seqlens_q.diff().double()
            attended = (lengths * (lengths + 1) / 2).sum().item()
            n = batch.input_ids.numel()
            flops = sft.useful_flops(trained.module.model, n, len(batch.target), attended)
            figures[f"ZeRO {zero}, {tokens}"] = {
                "tokens_per_s": 4 * n / spent, "mfu": 4 * flops / spent / rate,
                "peak_gib": sft.peak_gib()}
        sft.release(trained)
        del trained
        release()
    return {"ok": True, "matmul_flops": rate, **figures}


def profile(args, work):
    """(5) The ten longest kernels of one micro-batch, and how often the host waited: at most
    once."""
    from torch.profiler import ProfilerActivity, profile as profiler
    trained = new_engine(args, work)
    batch = kernels.layout(random_documents(args, 8192, 2048, 320 if args.tiny else 256000))
    micro_steps(trained, batch.to(sft.device()), 1)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profiler(activities=activities) as seen:
        loss = -trained(batch.to(sft.device())).mean()
        trained.set_gradient_accumulation_boundary(False)
        trained.backward(loss, scale_wrt_gas=False)
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    averages = sorted(seen.key_averages(), key=lambda e: -getattr(e, key))
    waits = sum(e.count for e in averages if e.key in (
        "cudaStreamSynchronize", "cudaEventSynchronize"))   # the profiler's own: Device..
    sft.release(trained)
    release()
    return {"ok": waits <= 1, "waits": waits,
            "top_us": {e.key[:60]: round(getattr(e, key)) for e in averages[:10]}}


def resume(args, work):
    """(6) Saved at step 2, left and resumed in other processes: the last loss is that of a whole
    run."""
    losses = {}
    for zero in (1, 3):
        for name, stops in (("whole", [4]), ("broken", [2, 4])):
            out = work / f"resume-{zero}-{name}"
            for stop in stops:
                task = ["--train-until", str(stop), str(zero), str(out)]
                subprocess.run([sys.executable, __file__, *task], check=True,
                               stdout=subprocess.DEVNULL)
            rows = (out / "metrics.jsonl").read_text().splitlines()
            losses[f"ZeRO {zero}, {name}"] = json.loads(rows[-1])["loss"]
    gaps = [abs(losses[f"ZeRO {z}, whole"] - losses[f"ZeRO {z}, broken"]) for z in (1, 3)]
    return {"ok": max(gaps) < 1e-3, "losses": losses}


def train_until(stop, zero, out):
    """Part 6's process: four steps of the demo in bf16, ended by the SIGTERM path after `stop`."""
    save_if_due = sft.Run.save_if_due

    def save_and_stop(run, step, stopping):
        return save_if_due(run, step, stopping or step == int(stop) < 4)
    sft.Run.save_if_due = save_and_stop
    return sft.main(["--data", "demo:test", "--dtype", "bf16", "--zero", zero, "--max-steps", "4",
                     "--max-length", "128", "--output", out, "--cache-dir", f"{out}/../cache"])


def sampling(args, work):
    """(7) Tokens/s of answers, padded and continuous, by rows in work."""
    tokenizer = data.demo_tokenizer()
    data.set_template(tokenizer)
    figures = {}
    prompts = [[data.user(f"{i} + {i}")] for i in range(4 if args.tiny else 512)]
    new_tokens = 4 if args.tiny else 256
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(shape(args, len(tokenizer)), dtype=torch.bfloat16)
    model = model.to(sft.device())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    samplers = {"padded": online_dpo.sample_responses}
    if torch.cuda.is_available():
        samplers["continuous"] = online_dpo.sample_continuously
    for name, sample in samplers.items():
        for rows in ((2,) if args.tiny else (64, 256, 512)):
            started = time.perf_counter()
            answers = [*sample(model, tokenizer, prompts, [(i, 0) for i in range(len(prompts))],
                               new_tokens, temperature=1.0, top_p=1.0, seeds=[*range(len(prompts))],
                               rows=rows)]
            spent = time.perf_counter() - started
            figures[f"{name}, {rows} rows"] = len(answers) * new_tokens / spent
    return {"ok": True, "tokens_per_s_at_most": figures}


def tests(args, work):
    """(8) pytest -m gpu."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    if args.tiny:
        command.append("--collect-only")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"ok": done.returncode == 0, "last": done.stdout.strip().splitlines()[-1:]}


PARTS = {f.__name__: f for f in (attention, reference, head, engine, profile, resume, sampling,
                                 tests)}


def release():
    """After a part, which may have failed: memory, and torch's own F.linear, which ZeRO 3
    replaces."""
    torch.nn.functional.linear = LINEAR
    sft.free_memory()


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tiny", action="store_true", help="small shapes, on a CPU")
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    p.add_argument("--train-until", nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.train_until:
        return train_until(*args.train_until)
    if not torch.cuda.is_available() and not args.tiny:
        p.error("no GPU; --tiny runs the same code on a CPU")
    sft.init_distributed()
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            started = time.perf_counter()
            try:
                report[name] = PARTS[name](args, Path(folder))
            except Exception as error:                      # the other parts still count
                traceback.print_exc()
                report[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
            release()
            report[name]["seconds"] = time.perf_counter() - started
            print(name, json.dumps(sft.rounded(report[name])), flush=True)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, tiny shapes"
    return {"device": name, "torch": torch.__version__, "transformers": hf.__version__,
            "ok": all(part["ok"] for part in report.values()), **report}


if __name__ == "__main__":
    print(json.dumps(sft.rounded(main())))
