"""DPO against TRL's DPOTrainer: time and peak memory over the same pairs, side by side in one run.

    pip install trl==1.16.0                     # for this benchmark only
    python tests/bench_dpo.py --data hh_rlhf_harmless_test.jsonl.gz

A random 27M-parameter Llama, a 32k BPE trained on the data, 96 pairs, 8 a step, fp32, references
known before the clock starts, nothing truncated, no gradient checkpointing. Contenders: trl; padded
(stock transformers, full logits); unpadded (dpo.py --no-share-prompt); shared (dpo.py). They take
turns, each in a process of its own (peak memory = its ru_maxrss), `--repeat` times. Medians are
compared. Time is the training loop's own. Then shared alone: 1x, 2x, 4x the pairs, and 1x, 2x, 4x
as long answers. share_of_matmul_rate = useful FLOPs (sft.useful_flops) / time / the rate of a
1024^3 matmul measured in the same run. The last line is JSON.
"""
import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
from bench_sft import (json_lines, make_model, matmul_rate, parser, peak_gb, run_one,
                       write_json_lines)

STEP = 8
TIMES = (1, 2, 4)


def lions(work, *flags, file="pairs.jsonl"):
    import dpo
    result = dpo.main([
        "--model", f"{work}/model", "--data", f"{work}/{file}", "--max-length", "2048",
        "--max-prompt-length", "1024", "--micro-tokens", "4096", "--batch-size", str(STEP),
        "--epochs", "1", "--lr", "5e-7", "--cache-dir", f"{work}/cache", "--output", f"{work}/run",
        "--overwrite", *flags])
    spent = result["cumulative"]
    return {"seconds": spent["tokens"] / result["tokens_per_s"], "flops": spent["flops"],
            "tokens": spent["tokens"]}


def pairs_of(work):
    import data
    return [data.to_pair(row) for row in json_lines(work / "pairs.jsonl")]


def padded_logps(model, encoded):
    """log pi(y|x) of right-padded sequences, from the logits of every position: (2, P)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    ids, masks = [], []
    for which in ("chosen", "rejected"):
        for e in encoded:
            ids.append(torch.tensor(e.prompt + getattr(e, which)))
            targets = getattr(e, f"{which}_targets")
            masks.append(torch.tensor([False] * len(e.prompt) + targets))
    attended = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
    ids, mask = pad_sequence(ids, batch_first=True), pad_sequence(masks, batch_first=True)
    z = model(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, :-1]
    z = z.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]               # (2P, T - 1)
    return (z * mask[:, 1:]).sum(1).view(2, -1)


def padded(work):
    """What the textbook does."""
    import torch
    import data
    import dpo
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    template = data.set_template(tokenizer, "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    adam = torch.optim.AdamW(model.parameters(), lr=5e-7, weight_decay=0)
    encoded = [data.encode_pair(pair, tokenizer, template) for pair in pairs_of(work)]
    ref = torch.zeros(2, STEP)
    started = time.perf_counter()
    for i in range(0, len(encoded), STEP):
        w, l = padded_logps(model, encoded[i:i + STEP])
        (dpo.dpo_loss(w, l, *ref[:, :len(w)], 0.1) / len(w)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
    return {"seconds": time.perf_counter() - started}


def trl(work):
    import data
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    rows = [{"prompt": pair.prompt, "chosen": [data.assistant(pair.chosen)],
             "rejected": [data.assistant(pair.rejected)]} for pair in pairs_of(work)]
    config = DPOConfig(
        str(work / "trl"), precompute_ref_log_probs=True, max_length=None, num_train_epochs=1,
        per_device_train_batch_size=STEP, use_cpu=True, bf16=False, report_to=[],
        save_strategy="no", logging_steps=1, gradient_checkpointing=False, disable_tqdm=True,
        beta=0.1, learning_rate=5e-7)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(work / "model", dtype="float32"), args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work / "model"))
    started = time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - started}


def unpadded(work, *flags):
    return lions(work, "--no-share-prompt", *flags)


CONTENDERS = {"trl": trl, "padded": padded, "unpadded": unpadded, "shared": lions}
FILL_CACHE = "max-steps=1"         # the reference's log-probs, and one step that is not measured


def one(name, folder, *rest):
    """A contender's figures. rest: FLAG=VALUE for dpo.py, and the file of the pairs."""
    flags = [f"--{flag}" for flag in rest if flag == FILL_CACHE]
    files = {"file": file for file in rest if file.endswith(".jsonl")}
    return CONTENDERS[name](Path(folder), *flags, **files) | {"peak_gb": peak_gb()}


def usable_pairs(path):
    """The pairs of a preference file in a seeded order."""
    import data
    pairs, n_refused = [], 0
    for row in json_lines(path):
        try:
            pairs.append(data.to_pair(row))
        except ValueError:
            n_refused += 1
    print(f"{len(pairs)} pairs, {n_refused} refused", flush=True)
    return [pairs[i] for i in data.permutation(len(pairs), 0)]


def write_pairs(path, pairs, times=1):
    """Preference rows, each answer `times` as long."""
    import data
    write_json_lines(path, [
        {"prompt": pair.prompt, "chosen": [data.assistant(" ".join([pair.chosen] * times))],
         "rejected": [data.assistant(" ".join([pair.rejected] * times))]} for pair in pairs])


def compare(run, work, names, repeat):
    """Medians over the repeated runs: ({key: {contender: value}}, the matmul's rate)."""
    figures, rates = {name: [] for name in names}, []
    for _ in range(repeat):
        rates.append(matmul_rate())
        for name in names:
            figures[name].append(run(name, work))
    medians = {key: {name: statistics.median(f[key] for f in figures[name]) for name in names}
               for key in ("seconds", "peak_gb")}
    medians["flops"] = figures["shared"][0]["flops"]
    return medians, statistics.median(rates)


def main():
    p = parser(__doc__)
    p.add_argument("--data", required=True, help="preference pairs .jsonl or .jsonl.gz, as HH-RLHF")
    p.add_argument("--pairs", type=int, default=96)
    p.add_argument("--skip-trl", action="store_true", help="ours only; ratios to TRL are null")
    args = p.parse_args()
    if args.one:
        return one(*args.one)
    pairs, growth = usable_pairs(args.data), {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run = functools.partial(run_one, __file__, args.data)
        texts = [[*(m["content"] for m in x.prompt), x.chosen, x.rejected] for x in pairs]
        make_model(work / "model", map("\n".join, texts))
        write_pairs(work / "pairs.jsonl", pairs[:args.pairs])
        for name in ("shared", "unpadded"):
            run(name, work, FILL_CACHE)
        names = [name for name in CONTENDERS if not (args.skip_trl and name == "trl")]
        medians, rate = compare(run, work, names, args.repeat)
        for k in TIMES:
            write_pairs(work / f"pairs-{k}x.jsonl", pairs[:k * args.pairs])
            write_pairs(work / f"answers-{k}x.jsonl", pairs[:args.pairs], k)
            for file in (f"pairs-{k}x.jsonl", f"answers-{k}x.jsonl"):
                run("shared", work, file, FILL_CACHE)
                growth[file] = run("shared", work, file)
    return report(medians, rate, growth)


def report(medians, rate, growth):
    seconds, gb = medians["seconds"], medians["peak_gb"]

    def ratio(values, a, b):
        return round(values[a] / values[b], 3) if a in values and b in values else None

    def by_size(kind, key):
        return {f"{k}x": round(growth[f"{kind}-{k}x.jsonl"][key], 2) for k in TIMES}
    return {"speedup_vs_trl": ratio(seconds, "trl", "shared"),
            "memory_ratio_vs_trl": ratio(gb, "shared", "trl"),
            "speedup_padded_vs_trl": ratio(seconds, "trl", "padded"),
            "speedup_unpadded_vs_padded": ratio(seconds, "padded", "unpadded"),
            "speedup_shared_vs_unpadded": ratio(seconds, "unpadded", "shared"),
            "share_of_matmul_rate": round(medians["flops"] / seconds["shared"] / rate, 3),
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "peak_gb": {name: round(value, 2) for name, value in gb.items()},
            "seconds_by_pairs": by_size("pairs", "seconds"),
            "seconds_by_answer_length": by_size("answers", "seconds"),
            "tokens_by_answer_length": by_size("answers", "tokens")}


if __name__ == "__main__":
    print(json.dumps(main()))
