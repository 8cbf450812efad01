"""SFT against TRL's SFTTrainer: time and peak memory, side by side in one run.

    pip install trl==1.16.0                     # for this benchmark only
    python tests/bench_sft.py --data gsm8k_train.jsonl.gz

A random 27M-parameter Llama, a 32k BPE trained on the data, one epoch over the same documents, rows
of 1024, fp32. Contenders take turns, each in a process of its own (peak memory = its ru_maxrss),
`--repeat` times. Medians are compared. Time is the training loop's own. share_of_matmul_rate =
useful FLOPs (sft.useful_flops) / time / the rate of a 1024^3 matmul measured in the same run. The
last line is JSON.
"""
import argparse
import functools
import gzip
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


def json_lines(path):
    """The rows of a .jsonl or .jsonl.gz file."""
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(folder, texts):
    """A random Llama and a BPE tokenizer trained on the texts, with ChatML."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
    import data
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=32000, special_tokens=["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"],
        show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    data.set_template(tokenizer)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=32000, hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=2048)).save_pretrained(folder)


def lions(work):
    import sft
    result = sft.main([
        "--model", f"{work}/model", "--data", f"{work}/docs.jsonl", "--chat-template", "tokenizer",
        "--max-length", str(LENGTH), "--micro-tokens", "2048", "--batch-size", "4",
        "--epochs", "1", "--cache-dir", f"{work}/cache", "--output", f"{work}/run", "--overwrite"])
    spent = result["cumulative"]
    return {"seconds": spent["tokens"] / result["tokens_per_s"], "tokens": spent["tokens"],
            "flops": spent["flops"]}


def trl(work, packing):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    rows = [{"prompt": [{"role": "user", "content": row["question"]}],
             "completion": [{"role": "assistant", "content": row["answer"]}]}
            for row in json_lines(work / "docs.jsonl")]
    config = SFTConfig(
        str(work / "trl"), packing=packing, max_length=LENGTH, num_train_epochs=1, use_cpu=True,
        per_device_train_batch_size=4 if packing else 16, bf16=False, report_to=[],
        save_strategy="no", logging_steps=1, gradient_checkpointing=False, disable_tqdm=True,
        max_grad_norm=1.0, learning_rate=2e-5)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(work / "model", dtype="float32"), config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work / "model"))
    started = time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - started, "tokens": trainer.state.num_input_tokens_seen}


CONTENDERS = {"lions": lions, "trl-packed": functools.partial(trl, packing=True),
              "trl-padded": functools.partial(trl, packing=False)}


def matmul_rate():
    """FLOPs per second of a 1024^3 float32 matmul, now."""
    import torch
    a = torch.randn(1024, 1024)
    a @ a
    started = time.perf_counter()
    for _ in range(50):
        a @ a
    return 50 * 2 * 1024 ** 3 / (time.perf_counter() - started)


def run_one(script, data_file, name, work, *rest):
    """One contender in a process of its own: its figures, printed as a line, too."""
    command = [sys.executable, script, "--data", data_file, "--one", name, str(work), *rest]
    process = subprocess.run(command, capture_output=True, text=True,
                             env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if process.returncode:
        sys.exit(f"{name} failed:\n{process.stderr[-3000:]}")
    figures = json.loads(process.stdout.splitlines()[-1])
    print(f"{name:12} {' '.join(rest):32} {figures['seconds']:8.2f} s  "
          f"{figures['peak_gb']:6.2f} GB", flush=True)
    return figures


def peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def parser(description):
    p = argparse.ArgumentParser(description=description,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--one", nargs="+", help=argparse.SUPPRESS)  # contender, folder: own process
    return p


def main():
    p = parser(__doc__)
    p.add_argument("--data", required=True, help="question/answer .jsonl or .jsonl.gz, as GSM8K")
    p.add_argument("--documents", type=int, default=120)
    args = p.parse_args()
    if args.one:
        name, folder = args.one
        return CONTENDERS[name](Path(folder)) | {"peak_gb": peak_gb()}
    rows, rates = json_lines(args.data), []
    figures = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", [row["question"] + "\n" + row["answer"] for row in rows])
        write_json_lines(work / "docs.jsonl", rows[:args.documents])
        for _ in range(args.repeat):
            rates.append(matmul_rate())
            for name in CONTENDERS:
                figures[name].append(run_one(__file__, args.data, name, work))
    seconds, gb = ({name: statistics.median(f[key] for f in figures[name]) for name in figures}
                   for key in ("seconds", "peak_gb"))
    rate = figures["lions"][0]["flops"] / seconds["lions"]
    return {"speedup_vs_trl_packed": seconds["trl-packed"] / seconds["lions"],
            "speedup_vs_trl_padded": seconds["trl-padded"] / seconds["lions"],
            "memory_ratio_vs_trl_packed": gb["lions"] / gb["trl-packed"],
            "share_of_matmul_rate": rate / statistics.median(rates),
            "seconds": seconds, "peak_gb": gb}


if __name__ == "__main__":
    print(json.dumps(main()))
