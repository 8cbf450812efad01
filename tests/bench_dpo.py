"""DPO against TRL's DPOTrainer: time and peak memory over the same pairs, side by side in one run.

    pip install trl==1.16.0                     # for this benchmark only
    python tests/bench_dpo.py --data hh_rlhf_harmless_test.jsonl.gz

A random 27M-parameter Llama, a 32k BPE trained on the data, 96 pairs, 8 a step, fp32, references known before the
clock starts, nothing truncated, no gradient checkpointing. Contenders: trl; padded (stock transformers, full logits);
unpadded (dpo.py --no-share-prompt); shared (dpo.py). They take turns, each in a process of its own (peak memory = its
ru_maxrss), `--repeat` times; medians are compared. Time is the training loop's own. Then shared alone: 1x, 2x, 4x
the pairs, and 1x, 2x, 4x as long answers. share_of_matmul_rate = useful FLOPs (sft.useful_flops) / time / the rate of
a 1024^3 matmul measured in the same run. The last line is JSON.
"""
import argparse
import functools
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
STEP = 8


def lions(work: Path, *flags: str, pairs: str = "pairs.jsonl") -> dict:
    import dpo
    base = ["--model", str(work / "model"), "--data", str(work / pairs), "--max-length", "2048", "--max-prompt-length",
            "1024", "--batch-size", str(STEP), "--epochs", "1", "--cache-dir", str(work / "cache"), "--micro-tokens",
            "4096", "--lr", "5e-7", "--output", str(work / "run"), "--overwrite", *flags]
    if "--reference-only" in flags:                         # fills the cache: one step, not measured
        base = [f for f in base if f != "--reference-only"] + ["--max-steps", "1"]
    result = dpo.main(base)
    lines = [json.loads(x) for x in (work / "run/metrics.jsonl").read_text().splitlines()]
    return {"seconds": sum(x["tokens"] for x in lines) / result["tokens_per_s"],
            "flops": result["cumulative"]["flops"], "tokens": result["cumulative"]["tokens"]}


def rows_of(work: Path):
    import data
    return [data.to_pair(json.loads(x)) for x in (work / "pairs.jsonl").read_text().splitlines()]


def padded(work: Path) -> dict:
    """What the textbook does: right-padded batches of chosen and rejected, logits of every position."""
    import torch
    import dpo
    import data
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    template = data.set_template(tokenizer, "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    adam = torch.optim.AdamW(model.parameters(), lr=5e-7, weight_decay=0)
    pairs = [data.encode_pair(p, tokenizer, template) for p in rows_of(work)]

    def logps(batch):
        sides = [(e.prompt + y, [False] * len(e.prompt) + m) for k in ("chosen", "rejected") for e in batch
                 for y, m in [(getattr(e, k), getattr(e, k + "_targets"))]]
        width = max(len(ids) for ids, _ in sides)
        ids = torch.tensor([x + [0] * (width - len(x)) for x, _ in sides])
        seen = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x, _ in sides])
        mask = torch.tensor([m + [False] * (width - len(m)) for _, m in sides])
        z = model(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        return (z.gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1).view(2, -1)
    ref = torch.zeros(2, STEP)
    started = time.perf_counter()
    for a in range(0, len(pairs), STEP):
        w, l = logps(pairs[a:a + STEP])
        (dpo.dpo_loss(w, l, *ref[:, :len(w)], 0.1) / len(w)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
    return {"seconds": time.perf_counter() - started}


def trl(work: Path) -> dict:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    reply = lambda text: [{"role": "assistant", "content": text}]
    rows = Dataset.from_list([{"prompt": p.prompt, "chosen": reply(p.chosen), "rejected": reply(p.rejected)}
                              for p in rows_of(work)])
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(work / "model", dtype="float32"), train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(work / "model"), args=DPOConfig(
            str(work / "trl"), precompute_ref_log_probs=True, max_length=None, per_device_train_batch_size=STEP,
            num_train_epochs=1, use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1,
            gradient_checkpointing=False, disable_tqdm=True, beta=0.1, learning_rate=5e-7))
    started = time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - started}


CONTENDERS = {"trl": trl, "padded": padded, "unpadded": lambda w: lions(w, "--no-share-prompt"), "shared": lions}


def main() -> dict:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="preference pairs .jsonl or .jsonl.gz, HH-RLHF's format")
    p.add_argument("--pairs", type=int, default=96)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--skip-trl", action="store_true", help="ours only; the ratios to TRL are null")
    p.add_argument("--one", nargs="+", help=argparse.SUPPRESS)   # contender, folder, flags: a process of its own
    args = p.parse_args()
    if args.one:
        name, work, *rest = args.one
        if name in CONTENDERS and not rest:
            result = CONTENDERS[name](Path(work))
        else:
            result = lions(Path(work), *("--" + f for f in rest if not f.endswith("jsonl")),
                           pairs=next((f for f in rest if f.endswith("jsonl")), "pairs.jsonl"))
        return result | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20}
    import data
    from bench_sft import make_model, matmul_rate, run_one
    usable, n = [], 0
    for _, row in data.read_lines(args.data):
        try:
            usable.append(data.to_pair(row))
        except ValueError:
            n += 1
    print(f"{len(usable)} pairs, {n} refused", flush=True)
    usable = [usable[i] for i in data.permutation(len(usable), 0)]

    one = functools.partial(run_one, __file__, args.data)

    def write(path, pairs, times=1):
        as_row = lambda p: {"prompt": p.prompt, **{k: [{"role": "assistant", "content": " ".join([getattr(p, k)] * times)}]
                                                   for k in ("chosen", "rejected")}}
        path.write_text("".join(json.dumps(as_row(p)) + "\n" for p in pairs))
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        make_model(work / "model", ["\n".join([m["content"] for m in p.prompt] + [p.chosen, p.rejected]) for p in usable])
        write(work / "pairs.jsonl", usable[:args.pairs])
        for flags in (["reference-only"], ["reference-only", "no-share-prompt"]):
            one("shared", work, *flags)
        seen, rates = {name: [] for name in CONTENDERS if not (args.skip_trl and name == "trl")}, []
        for _ in range(args.repeat):
            rates.append(matmul_rate())
            for name in seen:
                seen[name].append(one(name, work))
        grow = {}
        for k in (1, 2, 4):
            write(work / f"n{k}.jsonl", usable[:k * args.pairs])
            write(work / f"l{k}.jsonl", usable[:args.pairs], k)
            for kind in "nl":
                one("shared", work, f"{kind}{k}.jsonl", "reference-only")
                grow[f"{kind}{k}"] = one("shared", work, f"{kind}{k}.jsonl")
    middle = lambda name, key: statistics.median(x[key] for x in seen[name]) if name in seen else float("nan")
    ratio = lambda a, b, key="seconds": round(middle(a, key) / middle(b, key), 3) if a in seen and b in seen else None
    return {"speedup_vs_trl": ratio("trl", "shared"), "memory_ratio_vs_trl": ratio("shared", "trl", "peak_gb"),
            "speedup_padded_vs_trl": ratio("trl", "padded"), "speedup_unpadded_vs_padded": ratio("padded", "unpadded"),
            "speedup_shared_vs_unpadded": ratio("unpadded", "shared"),
            "share_of_matmul_rate": round(middle("shared", "flops") / middle("shared", "seconds") /
                                          statistics.median(rates), 3),
            "seconds": {name: round(middle(name, "seconds"), 2) for name in seen},
            "peak_gb": {name: round(middle(name, "peak_gb"), 2) for name in seen},
            "seconds_by_pairs": {f"{k}x": round(grow[f"n{k}"]["seconds"], 2) for k in (1, 2, 4)},
            "seconds_by_answer_length": {f"{k}x": round(grow[f"l{k}"]["seconds"], 2) for k in (1, 2, 4)},
            "tokens_by_answer_length": {f"{k}x": grow[f"l{k}"]["tokens"] for k in (1, 2, 4)}}


if __name__ == "__main__":
    print(json.dumps(main()))
