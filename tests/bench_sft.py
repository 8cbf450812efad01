"""SFT against TRL's SFTTrainer: time and peak memory, side by side in one run.

    pip install trl==1.16.0                     # for this benchmark only
    python tests/bench_sft.py --data gsm8k_train.jsonl.gz

A random 27M-parameter Llama, a 32k BPE trained on the data, one epoch over the same documents, rows of
1024, fp32. Contenders take turns, each in a process of its own (peak memory = its ru_maxrss), `--repeat`
times; medians are compared. Time is the training loop's own. share_of_matmul_rate = useful FLOPs (6 x
body parameters x tokens, head at targets only, causal attention, no recomputation) / time / the rate of a
1024^3 matmul measured in the same run. The last line is JSON.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LENGTH = 1024


def make_model(folder: Path, texts: list[str]) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
    import data
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=32000, special_tokens=["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    data.set_template(tokenizer)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=32000, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=2048)).save_pretrained(folder)


def lions(work: Path) -> dict:
    import numpy as np
    import sft
    result = sft.main(["--model", str(work / "model"), "--data", str(work / "docs.jsonl"), "--max-length",
                       str(LENGTH), "--batch-size", "4", "--epochs", "1", "--cache-dir", str(work / "cache"), "--output", str(work / "run"), "--overwrite", "--micro-tokens", "2048", "--chat-template", "tokenizer"])
    lines = [json.loads(x) for x in (work / "run/metrics.jsonl").read_text().splitlines()]
    tokens, targets = sum(x["tokens"] for x in lines), sum(x["targets"] for x in lines)
    import datasets
    lengths = np.asarray(datasets.load_from_disk(str(next((work / "cache").glob("*/stats.json")).parent))["length"], dtype=float)
    body = json.loads((work / "run/run.json").read_text())["parameters"] - 32000 * 384
    flops = 6 * body * tokens + 6 * 32000 * 384 * targets + 6 * 6 * 384 * (lengths ** 2).sum()
    return {"seconds": tokens / result["tokens_per_s"], "tokens": tokens, "flops": flops}


def trl(work: Path, packing: bool) -> dict:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    rows = [json.loads(x) for x in (work / "docs.jsonl").read_text().splitlines()]
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": r["question"]}],
                               "completion": [{"role": "assistant", "content": r["answer"]}]} for r in rows])
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(work / "model", dtype="float32"), train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(work / "model"), args=SFTConfig(
            str(work / "trl"), packing=packing, max_length=LENGTH, per_device_train_batch_size=4 if packing else 16,
            num_train_epochs=1, use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1,
            gradient_checkpointing=False, disable_tqdm=True, max_grad_norm=1.0, learning_rate=2e-5))
    started = time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - started, "tokens": trainer.state.num_input_tokens_seen}


def matmul_rate() -> float:
    """FLOPs a second of a 1024^3 float32 matmul, now."""
    import torch
    a = torch.randn(1024, 1024)
    a @ a
    started = time.perf_counter()
    for _ in range(50):
        a @ a
    return 50 * 2 * 1024 ** 3 / (time.perf_counter() - started)


def run_one(script: str, data_file: str, name: str, work: Path, *rest: str) -> dict:
    """One contender in a process of its own: its figures, printed as a line too."""
    done = subprocess.run([sys.executable, script, "--data", data_file, "--one", name, str(work), *rest],
                          capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{name:12} {' '.join(rest):32} {result['seconds']:8.2f} s  {result['peak_gb']:6.2f} GB", flush=True)
    return result


def main() -> dict:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="question/answer .jsonl or .jsonl.gz, GSM8K's format")
    p.add_argument("--documents", type=int, default=120)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--one", nargs=2, help=argparse.SUPPRESS)     # contender and folder: a process of its own
    args = p.parse_args()
    contenders = {"lions": lions, "trl-packed": lambda w: trl(w, True), "trl-padded": lambda w: trl(w, False)}
    if args.one:
        result = contenders[args.one[0]](Path(args.one[1]))
        return result | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20}
    import data
    rows = [r for _, r in data.read_lines(args.data)]
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        make_model(work / "model", [r["question"] + "\n" + r["answer"] for r in rows])
        (work / "docs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:args.documents]))
        seen = {name: [] for name in contenders}
        rates = []
        for _ in range(args.repeat):
            rates.append(matmul_rate())
            for name in contenders:
                seen[name].append(run_one(__file__, args.data, name, work))
    middle = lambda name, key: statistics.median(x[key] for x in seen[name])
    ours = middle("lions", "seconds")
    return {"speedup_vs_trl_packed": middle("trl-packed", "seconds") / ours,
            "speedup_vs_trl_padded": middle("trl-padded", "seconds") / ours,
            "memory_ratio_vs_trl_packed": middle("lions", "peak_gb") / middle("trl-packed", "peak_gb"),
            "share_of_matmul_rate": middle("lions", "flops") / ours / statistics.median(rates),
            "seconds": {name: middle(name, "seconds") for name in seen},
            "peak_gb": {name: middle(name, "peak_gb") for name in seen}}


if __name__ == "__main__":
    print(json.dumps(main()))
