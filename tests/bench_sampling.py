"""Sampling: sample_responses against transformers' generate, one answer at a time and in padded
batches, and against transformers' continuous batching, over the same prompts.

    python tests/bench_sampling.py --data gsm8k_train.jsonl.gz
    python tests/bench_sampling.py --data gsm8k_train.jsonl.gz --model runs/gsm8k-sft

64 prompts x 5 samples at temperature 0.8. Without --model a 22M-parameter Llama with a 32k BPE is
first trained a little on the data, so that its answers end. Contenders take turns, each in its own
process. Medians are compared as seconds per sampled token, because samples differ in length.
Peak memory is a process's ru_maxrss. The last line is JSON. Goals: 9 times one by one, 3 times
padded.
"""
import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench_sft import json_lines, make_model, run_one          # noqa: E402, behind the path


def generated_tokens(model, prompts, size, max_new_tokens):
    """How many tokens `generate` samples for prompts (lists of ids), `size` at a time, up to each
    answer's end."""
    import torch
    stops, total = set(model.generation_config.eos_token_id), 0
    for start in range(0, len(prompts), size):
        part = prompts[start:start + size]
        width = max(map(len, part))
        ids = [[0] * (width - len(x)) + x for x in part]
        mask = [[0] * (width - len(x)) + [1] * len(x) for x in part]
        ids, mask = (torch.tensor(x, device=model.device) for x in (ids, mask))
        answers = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_p=1.0,
                                 top_k=0, temperature=0.8, max_new_tokens=max_new_tokens)
        for answer in answers[:, width:].tolist():
            ends = [n for n, token in enumerate(answer, 1) if token in stops]
            total += ends[0] if ends else len(answer)
    return total


def one(name, folder, args) -> dict:
    """Seconds and tokens of one contender."""
    import torch
    import data
    import online_dpo
    import sft
    from transformers import AutoModelForCausalLM
    tokenizer = data.load_tokenizer(folder)
    rows = json_lines(args.data)[-args.prompts:]
    prompts = [[data.user(row["question"])] for row in rows]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = model.to(sft.device())
    if isinstance(model.generation_config.eos_token_id, int):
        model.generation_config.eos_token_id = [model.generation_config.eos_token_id]
    wanted = list(itertools.product(range(len(prompts)), range(args.samples)))
    torch.manual_seed(0)
    started = time.perf_counter()
    if name in ("lions", "continuous"):
        sample = {"lions": online_dpo.sample_responses,
                  "continuous": online_dpo.sample_continuously}[name]
        answers = sample(model, tokenizer, prompts, wanted, args.max_new_tokens, temperature=0.8,
                         top_p=1.0, seeds=list(range(len(prompts))), rows=args.rows)
        tokens = sum(answer.tokens for answer in answers)
    else:
        ids = sorted((data.prompt_ids(tokenizer, prompts[i]) for i, _ in wanted), key=len)
        size = 1 if name == "one-by-one" else args.rows
        tokens = generated_tokens(model, ids, size, args.max_new_tokens)
    return {"seconds": time.perf_counter() - started, "tokens": tokens,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20}


def main() -> dict:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="question/answer .jsonl or .jsonl.gz as GSM8K's")
    p.add_argument("--model", help="a trained folder; None: train one first")
    p.add_argument("--train-steps", type=int, default=40)
    p.add_argument("--prompts", type=int, default=64)
    p.add_argument("--samples", type=int, default=5)
    p.add_argument("--rows", type=int, default=64, help="answers in work at once, padded and ours")
    p.add_argument("--max-new-tokens", type=int, default=256)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--contenders", nargs="+", default=["lions", "padded", "one-by-one"],
                   choices=["lions", "padded", "one-by-one", "continuous"])
    p.add_argument("--one", nargs=2, help=argparse.SUPPRESS)      # a contender in its own process
    args = p.parse_args()
    if args.one:
        return one(*args.one, args)
    with tempfile.TemporaryDirectory() as work:
        folder = args.model or train(args, work)
        settings = []
        for name in ("prompts", "samples", "rows", "max_new_tokens"):
            settings += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        runs = {name: [] for name in args.contenders}
        for _ in range(args.repeat):
            for name, of in runs.items():
                of.append(run_one(__file__, args.data, name, folder, *settings))
    cost = {name: statistics.median(run["seconds"] / run["tokens"] for run in of)
            for name, of in runs.items()}
    faster = {f"speedup_vs_{name.replace('-', '_')}": round(cost[name] / cost["lions"], 2)
              for name in cost if name != "lions" and "lions" in cost}
    answers = args.prompts * args.samples
    return faster | {
        "tokens_per_s": {name: round(1 / c) for name, c in cost.items()},
        "mean_tokens_per_answer": {name: round(of[0]["tokens"] / answers, 1)
                                   for name, of in runs.items()},
        "peak_gb": {name: round(statistics.median(run["peak_gb"] for run in of), 2)
                    for name, of in runs.items()}}


def train(args, work) -> str:
    """A small model that is trained a little on the data."""
    texts = [row["question"] + "\n" + row["answer"] for row in json_lines(args.data)]
    make_model(Path(work) / "model", texts)
    subprocess.run([sys.executable, str(ROOT / "sft.py"), "--model", f"{work}/model", "--data",
                    args.data, "--max-length", "512", "--batch-size", "16", "--lr", "1e-3",
                    "--max-steps", str(args.train_steps), "--cache-dir", f"{work}/cache",
                    "--output", f"{work}/run"], check=True)
    return f"{work}/run"


if __name__ == "__main__":
    print(json.dumps(main()))
