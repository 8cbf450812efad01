"""Sampling: sft.sample_responses against model.generate one prompt at a time, in padded batches of the same number of
rows, and transformers' continuous batching, over the same prompts, side by side in one run.

    python tests/bench_sampling.py --data gsm8k_train.jsonl.gz
    python tests/bench_sampling.py --data gsm8k_train.jsonl.gz --model runs/gsm8k-sft     # skip the training

64 prompts x 5 samples at temperature 0.8. So that answers end when answers end, the model (a 22M-parameter Llama, a
32k BPE trained on the data) is first trained a little on the data (`--train-steps`), unless --model names one.
Contenders take turns, each in a process of its own (peak memory = its ru_maxrss), `--repeat` times; medians are
compared as seconds a sampled token, because samples differ in length. One at a time and one by one mean: one call of
generate for one answer. The last line is JSON.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))


def one(name: str, folder: Path, args) -> dict:
    import torch
    import data
    import sft
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [r for _, r in data.read_lines(args.data)][-args.prompts:]
    prompts = [[{"role": "user", "content": r["question"]}] for r in rows]
    ids = [sft.prompt_ids(tokenizer, p) for p in prompts]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(
        "cuda" if torch.cuda.is_available() else "cpu")
    stops = set(model.generation_config.eos_token_id)
    settings = dict(do_sample=True, temperature=0.8, top_p=1.0, top_k=0, max_new_tokens=args.max_new_tokens)
    length = lambda x: next((i + 1 for i, t in enumerate(x) if t in stops), len(x))
    torch.manual_seed(0)
    if name == "continuous":
        import online_dpo
    started, tokens = time.perf_counter(), 0
    if name == "lions":
        for a in sft.sample_responses(model, tokenizer, prompts, args.max_new_tokens, samples=args.samples, temperature=0.8,
                                      seeds=list(range(len(prompts))), rows=args.rows):
            tokens += len(a.ids)
    elif name == "continuous":
        for a in online_dpo.sample_continuously(model, tokenizer, prompts, args.max_new_tokens, samples=args.samples,
                                                temperature=0.8, rows=args.rows):
            tokens += len(a.ids)
    else:
        wanted = sorted([x for x in ids for _ in range(args.samples)], key=len)
        size = 1 if name == "one-by-one" else args.rows
        for a in range(0, len(wanted), size):
            part = wanted[a:a + size]
            width = max(map(len, part))
            x = torch.tensor([[0] * (width - len(i)) + i for i in part], device=model.device)
            mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in part], device=model.device)
            y = model.generate(input_ids=x, attention_mask=mask, **settings)[:, width:]
            tokens += sum(map(length, y.tolist()))
    return {"seconds": time.perf_counter() - started, "tokens": tokens}


def main() -> dict:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="question/answer .jsonl or .jsonl.gz, GSM8K's format")
    p.add_argument("--model", help="a trained folder; None: train one first")
    p.add_argument("--train-steps", type=int, default=40)
    p.add_argument("--prompts", type=int, default=64)
    p.add_argument("--samples", type=int, default=5)
    p.add_argument("--rows", type=int, default=64, help="answers in work at once, padded and ours")
    p.add_argument("--max-new-tokens", type=int, default=256)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--contenders", nargs="+", default=["lions", "padded", "one-by-one"],
                   choices=["lions", "padded", "one-by-one", "continuous"])
    p.add_argument("--one", nargs=2, help=argparse.SUPPRESS)     # contender and folder: a process of its own
    args = p.parse_args()
    if args.one:
        result = one(args.one[0], Path(args.one[1]), args)
        return result | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20}
    import data
    from bench_sft import make_model, run_one
    with tempfile.TemporaryDirectory() as work:
        folder = args.model
        if folder is None:
            folder = f"{work}/run"
            rows = [r for _, r in data.read_lines(args.data)]
            make_model(Path(work) / "model", [r["question"] + "\n" + r["answer"] for r in rows])
            subprocess.run([sys.executable, str(ROOT / "sft.py"), "--model", f"{work}/model", "--data", args.data,
                            "--max-length", "512", "--batch-size", "16", "--lr", "1e-3", "--max-steps",
                            str(args.train_steps), "--cache-dir", f"{work}/cache", "--output", folder], check=True)
        seen = {name: [] for name in args.contenders}
        rest = [x for k in ("prompts", "samples", "rows", "max_new_tokens")
                for x in (f"--{k.replace('_', '-')}", str(getattr(args, k)))]
        for _ in range(args.repeat):
            for name in seen:
                seen[name].append(run_one(__file__, args.data, name, folder, *rest))
    cost = {name: statistics.median(x["seconds"] / x["tokens"] for x in runs) for name, runs in seen.items()}
    ratio = lambda name: cost[name] / cost["lions"] if {name, "lions"} <= set(cost) else None
    return {"speedup_vs_one_by_one": ratio("one-by-one"), "speedup_vs_padded": ratio("padded"),
            "speedup_vs_continuous": ratio("continuous"), "tokens_per_s": {name: 1 / c for name, c in cost.items()},
            "mean_tokens_an_answer": {name: runs[0]["tokens"] / args.prompts / args.samples for name, runs in seen.items()},
            "peak_gb": {name: statistics.median(x["peak_gb"] for x in runs) for name, runs in seen.items()}}


if __name__ == "__main__":
    print(json.dumps(main()))
