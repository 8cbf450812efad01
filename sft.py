"""Stage 1, supervised fine-tuning: sequence packing and loss masking (LIONs, 2407.06542, section 3)

    L = - sum over all targets of log pi(y_i | x, y_<i)              / targets
    L = - sum over documents of (1/|y|) sum_i log pi(y_i | x, y_<i)  / documents

The first is --loss-norm token, the second --loss-norm sequence.

y are the tokens of assistant turns with their end of turn (--loss-on assistant), or all tokens.
Sums and divisors are over the whole optimiser step on all ranks, so that memory flags and the
number of GPUs change results only by rounding.

Reads   conversations (--data, see data.py) and a Hugging Face model (--model).
Writes  --output: an ordinary Hugging Face folder, run.json, metrics.jsonl, curves.png.

    python sft.py                                                  # the demo, minutes on a CPU
    python sft.py --model google/gemma-2b                          # one GPU
    deepspeed sft.py --model meta-llama/Meta-Llama-3-8B            # all GPUs

Differs from the paper
 1. --loss-norm token is the default, as in the release, but over the step, not the micro-batch.
 2. All embeddings train. The release trains only special rows (--train-embeddings special).
 3. A document cut by --packing concat continues as a segment of its own; one token is repeated.

Step 0 of a random model costs about ln V nats per target. The demo ends near 0.39, held out.
README.md tables the memory per GPU of each ZeRO stage.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
from data import HelpFormatter, positive, read_json, write_json, write_lines
from kernels import BACKENDS, Group, LogProbs, layout, pick_backend, to_device, use_varlen

PRESETS = {  # the paper's table as argparse defaults
    "demo": dict(model="demo", data=["demo:train"], eval_data=["demo:test"], epochs=1, batch_size=8,
                 max_length=512, lr=3e-3, output="runs/sft"),
    "gemma-2b": dict(model="google/gemma-2b", data=["lion-sft"], epochs=3, batch_size=32,
                     max_length=8192, lr=2e-5, zero=1, empty_system=0.8,
                     gradient_checkpointing=True, output="runs/gemma-2b-sft"),
    "llama-3-8b": dict(model="meta-llama/Meta-Llama-3-8B", data=["lion-sft"], epochs=1,
                       batch_size=32, max_length=8192, lr=2e-5, zero=3, empty_system=0.8,
                       gradient_checkpointing=True, output="runs/llama-3-8b-sft")}


# --------------------------------------------------------------- loss, schedule and micro-batches
def sft_loss(logps, weight, total: float):
    """-sum(weight * log pi) / total, the formula in the header. weight (N,) is 1 (token) or 1/|y|
    (sequence), total the sum of all weights of the step on all ranks. Uniform pi gives ln V."""
    return -(weight * logps).sum() / total


def learning_rate(step: int, steps: int, lr: float, warmup: float, schedule: str) -> float:
    """Linear warm-up over the first `warmup` share of `steps`, then cosine or linear to 0, or
    constant."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return lr * (step + 1) / ramp
    x = (step - ramp) / max(1, steps - ramp)
    decay = {"cosine": (1 + math.cos(math.pi * x)) / 2, "linear": 1 - x, "constant": 1.0}
    return lr * decay[schedule]


def micro_batches(tokens, limit: int, ranks: int) -> list[list[list[int]]]:
    """A step's rows, `tokens` long, in micro-batches of nearly equal tokens: [rank][micro][row].

    All ranks get the same number of micro-batches, some may be empty. None is above `limit` tokens
    unless it is a single row. The longest row goes first, into the lightest micro-batch."""
    n = max(1, math.ceil(sum(tokens) / (limit * ranks)))
    while True:
        load, rows = [0] * (n * ranks), [[] for _ in range(n * ranks)]
        for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
            lightest = load.index(min(load))
            load[lightest] += tokens[i]
            rows[lightest].append(i)
        if all(used <= limit or len(r) == 1 for used, r in zip(load, rows)):
            rows = list(map(sorted, rows))
            return [rows[rank::ranks] for rank in range(ranks)]
        n += 1


# ---------------------------------------------------------------------- documents as training rows
class Packed:
    """Prepared documents in rows. tokens, targets, weights, attended: sums of each row, (R,)."""

    def __init__(self, dataset, rows, loss_norm):
        self.rows, self.docs = rows, dataset.with_format("numpy", columns=["input_ids", "targets"])
        per_doc = np.asarray(dataset["n_targets"], dtype=np.int64)
        lengths = np.asarray(dataset["length"], dtype=np.int64)
        counts = per_doc[rows.doc].copy()                           # targets of each piece
        for p in np.flatnonzero((rows.start > 0) | (rows.end < lengths[rows.doc])):
            mask = np.asarray(self.docs[int(rows.doc[p])]["targets"])
            counts[p] = mask[rows.start[p] + 1:rows.end[p]].sum()   # its first token is context
        self.weight = np.ones(len(rows.doc))                        # of each target of a piece
        if loss_norm == "sequence":
            self.weight = 1.0 / per_doc[rows.doc]
        size = (rows.end - rows.start).astype(float)
        sums = (size, counts, counts * self.weight, size * (size + 1) / 2)
        self.tokens, self.targets, self.weights, self.attended = (
            np.add.reduceat(x, rows.offsets[:-1]) for x in sums)

    def __len__(self):
        return len(self.tokens)

    def batch(self, wanted: list[int]):
        """The rows as one Batch, and the weight of each of its targets."""
        groups, weight = [], []
        for r in wanted:
            for p in range(self.rows.offsets[r], self.rows.offsets[r + 1]):
                doc = self.docs[int(self.rows.doc[p])]
                piece = slice(self.rows.start[p], self.rows.end[p])
                ids, mask = doc["input_ids"][piece].tolist(), doc["targets"][piece].tolist()
                groups.append(Group([], [ids], [[False] + mask[1:]]))
                weight.append(self.weight[p])
        batch = layout(groups)
        return batch, torch.tensor(weight, dtype=torch.float32)[batch.sequence]


def laid_out(rows, wanted, micros):
    """rows.batch of each micro-batch, on the device. `micros` are positions in `wanted`. A thread
    lays out the next one while the GPU works on the present one."""
    batches = (rows.batch([int(wanted[j]) for j in micro]) for micro in micros)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while present := coming.result():
            coming = thread.submit(next, batches, None)
            batch, values = present
            yield batch.to(device()), to_device(values, device())


@torch.no_grad()
def evaluate_loss(engine, packed, limit, rank, world):
    """Mean nats per target token over all rows of `packed`, split over ranks."""
    engine.eval()
    nats = torch.zeros((), dtype=torch.float64, device=device())
    micros = micro_batches(packed.tokens.tolist(), limit, world)[rank]
    for batch, _ in laid_out(packed, range(len(packed)), micros):
        nats -= engine(batch).double().sum()
    engine.train()
    return all_sum([nats])[0] / packed.targets.sum()


def text_bytes(dataset, tokenizer):
    """UTF-8 bytes of all targets: nats * targets / ln 2 / bytes is bits per byte."""
    texts = (tokenizer.decode(np.asarray(r["input_ids"])[np.asarray(r["targets"])],
                              skip_special_tokens=True) for r in dataset)
    return max(1, sum(len(text.encode()) for text in texts))


# ------------------------------------------------------------------------------------------ train
def parser() -> argparse.ArgumentParser:
    p = stage_parser(__doc__, PRESETS)
    p.set_defaults(output="runs/sft")
    add = p.add_argument_group("stage 1").add_argument
    add("--max-examples", type=positive, help="the first N of a seeded permutation; None: all")
    data.target_flags(add)
    add("--loss-norm", choices=["token", "sequence"], default="token", help="weight 1 or 1/|y|")
    add("--train-embeddings", choices=["all", "special"], default="all",
        help="all rows, or those of special tokens")
    return p


def main(argv=None):
    args = parse(argv, parser(), PRESETS)
    if args.train_embeddings == "special" and args.weight_decay:
        raise ValueError("--weight-decay: changes rows that --train-embeddings special freezes; "
                         "use 0")
    with own_folder(args):
        return published(args, train_on_rows(args))


def train_on_rows(args):
    """A whole SFT run. Returns the result that main prints."""
    started, (rank, world) = time.time(), init_distributed()
    check_machines(args, world)
    tokenizer = data.load_tokenizer(args.model)
    template = data.set_template(tokenizer, args.chat_template)
    settings = dict(args=args, tokenizer=tokenizer, template=template, loss_on=args.loss_on)
    train_set, data_key = prepare_rows(args.data, max_examples=args.max_examples, **settings)
    held_set, held_key = prepare_rows(args.eval_data, **settings)
    data_key += held_key
    if args.model != "demo":
        data_key += data.weights_hash(args.model)
    if stored := check_resume(args, world, data_key):
        return stored

    train = Packed(train_set, data.pack(train_set["length"], args.max_length, args.packing),
                   args.loss_norm)
    held = held_set and Packed(held_set, data.pack(held_set["length"], args.max_length), "token")
    targets = int(sum(train_set["n_targets"]))
    if train.targets.sum() != targets:
        raise RuntimeError(f"packing lost targets: {train.targets.sum()} of {targets}")
    fill = float(train.tokens.sum() / (len(train) * args.max_length))
    log(f"{args.packing}: {len(train_set)} documents in {len(train)} rows of {args.max_length}, "
        f"{fill:.2%} full; {targets} target tokens, each in exactly one row")
    per_epoch, steps = plan_steps(args, len(train), "rows")

    new_ids = tokenizer.convert_tokens_to_ids(list(template.new_tokens))
    model = load_model(args, tokenizer, new_ids)
    if args.train_embeddings == "special" and not args.lora_rank:
        train_rows_only(model, tokenizer.convert_tokens_to_ids(template.specials))
    engine = make_engine(args, LogProbs(model))
    run = Run(args, engine, "sft", steps, data=data_key, rows=len(train))
    log(f"an untrained model starts near ln V = {math.log(len(tokenizer)):.3f} nats per target")
    for step in range(run.first, steps):
        # - the step: every rank takes its micro-batches of the same global rows ------------------
        epoch, i = divmod(step, per_epoch)
        order = data.permutation(len(train), args.seed, epoch)
        wanted = order[i * args.batch_size:(i + 1) * args.batch_size]
        total = train.weights[wanted].sum() or 1.0          # the divisor, known before any backward
        mine = micro_batches(train.tokens[wanted].tolist(), args.micro_tokens, world)[rank]
        loss_sum = torch.zeros((), device=device())
        for m, (batch, weight) in enumerate(laid_out(train, wanted, mine)):
            logps = engine(batch)                                               # (N,) nats
            loss = sft_loss(logps, weight, total)
            engine.set_gradient_accumulation_boundary(m == len(mine) - 1)
            engine.backward(loss * world, scale_wrt_gas=False)                  # ranks are averaged
            loss_sum += loss.detach()
        lr = set_learning_rate(engine, args, step, steps)
        loss, stopping = all_sum([loss_sum, run.stop])
        now = {"step": step + 1, "loss": loss, "lr": lr}
        now["grad_norm"] = clip_and_step(engine, args.zero)
        check_finite(now, "rows", wanted)
        # -----------------------------------------------------------------------------------------
        now |= run.cost(train, wanted)
        if held is not None and due(step + 1, args.eval_every, steps):
            now["eval_loss"] = evaluate_loss(engine, held, args.micro_tokens, rank, world)
        run.record(now)
        if stopped := run.save_if_due(step + 1, stopping):
            return stopped
    last = run.close()

    export(engine, tokenizer, template.end_of_turn_id, args)
    result = {"loss": last.get("loss"), "targets": targets, "fill": fill}
    if held is not None:
        result["eval_loss"] = evaluate_loss(engine, held, args.micro_tokens, rank, world)
        bits = result["eval_loss"] * held.targets.sum() / math.log(2)
        result["bits_per_byte"] = float(bits / text_bytes(held_set, tokenizer))
    return run.finish(result | {"seconds": time.time() - started})


def train_rows_only(model, ids):
    """Zero the gradient of every other row of the embeddings and the head."""
    def keep(grad):
        kept = torch.zeros_like(grad)
        kept[ids] = grad[ids]
        return kept
    for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        table.requires_grad_(True)                          # LoRA has frozen it
        table.register_hook(keep)


# ================================================================ shared by all stages: the flags
# Flags that change a result at most by rounding: a resumed run may change them.
MAY_CHANGE = ("micro_tokens", "gradient_checkpointing", "offload", "save_every", "eval_every",
              "num_proc", "cache_dir", "output", "overwrite",
              "local_rank", "dtype_given", "report_to", "push_to_hub", "hub_public")


def stage_parser(description, presets) -> argparse.ArgumentParser:
    """The flags that all stages share."""
    p = argparse.ArgumentParser(usage="%(prog)s [FLAGS]", description=description,
                                formatter_class=HelpFormatter, allow_abbrev=False)
    add = p.add_argument_group("model and data").add_argument
    add("--preset", choices=list(presets), help="the paper's settings; None: those of --model, if "
        "it has any, demo without --model")
    add("--model", help="Hub id, folder, or demo, a small random Llama made in code")
    add("--data", nargs="+", help="NAME[:split][=fraction] or a mix (MIXES in data.py), several")
    add("--eval-data", nargs="+", help="held-out sources, same form; None: no evaluation")
    data.row_flags(add)
    add("--empty-system", type=float, default=0.0,
        help="probability of adding an empty system turn when there is none")
    add("--bad-rows", choices=["refuse", "stop"], default="refuse",
        help="skip and count rows that cannot be used, or stop")
    data.cache_flags(add)
    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=float, default=1, help="passes over the data")
    add("--max-steps", type=positive, help="end of the schedule in steps; None: by --epochs")
    add("--batch-size", type=positive, default=32, help="rows per optimiser step, over all GPUs")
    add("--lr", type=float, default=2e-5, help="peak learning rate")
    add("--schedule", choices=["cosine", "linear", "constant"], default="cosine",
        help="of the learning rate, after --warmup")
    add("--warmup", type=float, default=0.1, help="share of steps")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999], help="of AdamW")
    add("--eps", type=float, default=1e-8, help="of AdamW")
    add("--weight-decay", type=float, default=0.0, help="of AdamW")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--seed", type=int, default=42, help="of all orders and draws")
    add = p.add_argument_group("memory and machines").add_argument
    add("--micro-tokens", type=positive, help="tokens per micro-batch; None: --max-length, on CUDA "
        "at least 16384")
    add("--dtype", choices=["fp32", "bf16"], help="of compute; masters: fp32; None: bf16 on CUDA")
    add("--zero", type=int, choices=[0, 1, 2, 3], help="ZeRO stage; None: 0 for fp32, 1 for bf16")
    add("--offload", action="store_true", help="optimiser state in CPU memory (ZeRO 1 to 3)")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False,
        help="less memory, a third more time")
    add("--local_rank", "--local-rank", type=int, default=0, help="set by the deepspeed launcher")
    add = p.add_argument_group("LoRA").add_argument
    add("--lora-rank", type=positive, help="train low-rank updates of this rank; None: all weights")
    add("--lora-alpha", type=float, help="updates are scaled by alpha / rank; None: twice the rank")
    add("--lora-targets", nargs="+", default=["all-linear"], help="names of linear layers")
    add("--keep-adapter", action="store_true",
        help="write the adapter for peft to --output/adapter, beside the merged model")
    add = p.add_argument_group("output").add_argument
    add("--output", help="folder of the run")
    add("--overwrite", action="store_true", help="delete what an earlier run wrote to --output")
    add("--save-every", type=positive, default=200, help="steps between checkpoints; SIGTERM saves "
        "as well, but the deepspeed launcher kills 30 s after it: too soon for a large model")
    add("--eval-every", type=positive, help="steps between evaluations; None: a quarter of the run")
    add("--export-dtype", choices=["fp32", "bf16"], default="fp32", help="of the exported weights")
    add("--report-to", choices=["wandb", "trackio", "tensorboard", "mlflow"], help="a tracker of "
        "metrics.jsonl, curves.png and the result; None: files only")
    add("--push-to-hub", metavar="OWNER/NAME", help="upload the model with a card; offline, or "
        "with HF_HUB_OFFLINE=1, only the card is written")
    add("--hub-public", action="store_true", help="make that repository public")
    return p


def parse(argv, p, presets) -> argparse.Namespace:
    """Flags over preset over defaults."""
    first, _ = p.parse_known_args(argv)
    p.set_defaults(**presets.get(preset := find_preset(first, presets), {}))
    args = p.parse_args(argv)
    args.preset = preset
    print(f"preset: {preset}" if preset else f"no preset for --model {args.model}; using the "
          "defaults shown by --help", file=sys.stderr)
    args.micro_tokens = args.micro_tokens or default_micro_tokens(args.max_length)
    args.dtype_given = args.dtype is not None
    args.dtype = args.dtype or default_dtype()
    args.zero = int(args.dtype == "bf16") if args.zero is None else args.zero
    if not args.data:
        raise ValueError(f"--data: needed, no preset gives any for --model {args.model}")
    if not args.zero and (args.dtype == "bf16" or args.offload):
        raise ValueError("--zero 0: sums bf16 gradients in bf16 and cannot offload; use 1, 2 or 3")
    return args


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_micro_tokens(max_length):
    """--micro-tokens None."""
    return max(max_length, 16384 * torch.cuda.is_available())


def default_dtype():
    """--dtype None."""
    return {"cuda": "bf16", "cpu": "fp32"}[device().type]


def attention_backend(args, config):
    """That of kernels.pick_backend under these flags."""
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return pick_backend(device(), torch_dtype(args.dtype), softcap)


def torch_dtype(name):
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def find_preset(args, presets) -> str | None:
    """--preset, else the one of the model: by its name, or by the run that made the folder."""
    if args.preset or not args.model:
        return args.preset or "demo"
    preset = read_json(Path(args.model) / "run.json").get("flags", {}).get("preset")
    by_name = {p["model"]: name for name, p in presets.items()}
    return preset if preset in presets else by_name.get(args.model)


def plan_steps(args, n, noun) -> tuple[int, int]:
    """(steps per epoch, steps) over n rows or pairs."""
    if n < dist.get_world_size():
        raise ValueError(f"--data: only {n} {noun}; use fewer ranks or more data")
    per_epoch = math.ceil(n / args.batch_size)
    steps = args.max_steps or math.ceil(per_epoch * args.epochs)
    args.eval_every = args.eval_every or max(1, steps // 4)
    log(f"{steps} steps; an epoch is ceil({n} {noun} / {args.batch_size}) = {per_epoch}")
    return per_epoch, steps


def due(step, every, steps):
    return step % every == 0 or step == steps


# ========================================================= shared by all stages: ranks and engine
def init_distributed():
    """DeepSpeed over nccl or gloo; plain `python` is a world of one. Returns (rank, world)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import datetime
    import deepspeed
    import transformers
    transformers.utils.logging.disable_progress_bar()
    for handler in deepspeed.utils.logging.logger.handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.setStream(sys.stderr)                   # stdout ends in our JSON line
    backend = {"cuda": "nccl", "cpu": "gloo"}[device().type]
    if backend == "gloo":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it needs no compiler
    if not dist.is_initialized():
        group = dict(backend=backend, timeout=datetime.timedelta(hours=3))
        if "RANK" in os.environ:
            if sys.platform == "linux":                     # SIGTERM where the launcher has died
                ctypes.CDLL(None).prctl(1, signal.SIGTERM)
            local_ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1
            if backend == "nccl":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            else:
                torch.set_num_threads(max(1, os.cpu_count() // int(local_ranks)))
            dist.init_process_group(**group)
        else:
            os.environ.setdefault("LOCAL_RANK", "0")        # DeepSpeed asks for it
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, **group)
    deepspeed.init_distributed(backend, verbose=False)
    return dist.get_rank(), dist.get_world_size()


def log(*text):
    """To stderr, from rank 0."""
    if dist.get_rank() == 0:
        print(*text, file=sys.stderr, flush=True)


def all_sum(values) -> list[float]:
    """Sums of numbers and tensors over all ranks, in float64. Here the host waits for the GPU."""
    sums = torch.hstack([torch.as_tensor(x, dtype=torch.float64, device=device()) for x in values])
    dist.all_reduce(sums)
    return sums.tolist()


def check_machines(args, world):
    """A large model needs a GPU, and all ranks the disk to which rank 0 writes prepared data,
    reference log-probs and checkpoints."""
    if device().type == "cpu" and not args.dtype_given and args.model != "demo":
        from transformers import AutoConfig, AutoModelForCausalLM
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model))
        n = model.num_parameters()
        if n > 1e9:
            raise ValueError(f"--model {args.model}: {n / 1e9:.1f}e9 parameters, but torch "
                             f"{torch.__version__} finds no GPU; a newer driver may be needed "
                             "(nvidia-smi). To train on the CPU all the same, pass --dtype fp32")
    if world == 1:
        return
    for flag, folder in (("--cache-dir", data.cache_folder(args.cache_dir)),
                         ("--output", Path(args.output))):
        file = folder / f"seen-by-all-ranks-{os.environ.get('MASTER_PORT')}"
        if dist.get_rank() == 0:
            write_lines(file, [])
        dist.barrier()
        blind, = all_sum([not file.exists()])
        file.unlink(missing_ok=True)
        if blind:
            raise ValueError(f"{flag} {folder}: {blind:.0f} of {world} ranks do not see what rank "
                             "0 writes there. Several nodes need a disk that all of them mount")


def prepare_rows(sources, args, **settings):
    """data.prepare under a stage's flags: (dataset, its key), or None, "" without sources. Rank 0
    fills the cache, then the others read it."""
    if not sources:
        return None, ""
    if args.empty_system:
        try:
            data.render(settings["tokenizer"], data.add_system(data.ask("q", "a"), ""))
        except ValueError as error:
            raise ValueError(f"--empty-system {args.empty_system}: {error}; use 0") from None
    for is_turn_of_rank_0 in (True, False):
        if is_turn_of_rank_0 == (dist.get_rank() == 0):
            prepared = data.prepare(
                sources, max_length=args.max_length, empty_system=args.empty_system, seed=args.seed,
                bad_rows=args.bad_rows, num_proc=args.num_proc, cache_dir=args.cache_dir,
                **settings)
        dist.barrier()
    log(data.stats_table(prepared.stats))
    return prepared.dataset, prepared.key


def load_model(args, tokenizer, new_ids):
    """The model in --dtype on this rank's device, without dropout, with varlen attention and rows
    for new tokens (the mean of the others).

    The ranks of a machine take turns, so that its memory holds one model. Nothing is cast after
    loading: `model.to(bfloat16)` would round the rotary frequencies as well."""
    import filelock
    turn = data.cache_folder(args.cache_dir) / f"load-{socket.gethostname()}.lock"
    torch.manual_seed(args.seed)
    with filelock.FileLock(turn):
        model = from_pretrained(args, tokenizer).to(device())
    if new_ids:
        old = sorted({*range(len(tokenizer))} - {*new_ids})
        with torch.no_grad():
            for table in {model.get_input_embeddings(), model.get_output_embeddings()}:
                table.weight[new_ids] = table.weight[old].float().mean(0).to(table.weight.dtype)
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        raise ValueError(f"--model {args.model}: NaN or infinite weights in {', '.join(bad[:5])}; "
                         "the run that made it diverged, or the file is damaged")
    use_varlen(model, args.max_length)
    if args.lora_rank:
        add_lora(args, model, new_ids)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def needs(package, install=None):
    """An optional package, or an error that names the line that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{package} cannot be imported ({error}); pip install "
                         f"{install or package}") from None


def add_lora(args, model, new_ids):
    """Freeze all weights but those of x -> W x + (alpha / r) B A x in --lora-targets, B = 0 at the
    start (Hu et al. 2106.09685, section 4.1), and the embeddings of new tokens."""
    peft = needs("peft", "peft==0.21.2")
    targets = args.lora_targets
    config = peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha or 2 * args.lora_rank,
                             target_modules=targets[0] if targets == ["all-linear"] else targets)
    peft.inject_adapter_in_model(config, model)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        if hasattr(table, "base_layer"):
            raise ValueError(f"--lora-targets {' '.join(targets)}: names the embeddings or the "
                             "head; only layers between them are adapted")
    if new_ids:
        if args.keep_adapter or args.weight_decay:
            raise ValueError("--lora-rank: the rows of new tokens train as well; an adapter cannot "
                             "hold them, weight decay would change all rows: leave out "
                             "--keep-adapter and --weight-decay")
        train_rows_only(model, new_ids)


def from_pretrained(args, tokenizer):
    """--model as transformers loads it. Where rows must be added to its embedding, and on CUDA, the
    rows become a multiple of 64, as tensor cores want them. `config.vocab_size` stays the number
    of rows that count: LogProbs and export ignore the others."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
    dtype = torch_dtype(args.dtype)
    if args.model == "demo":
        return AutoModelForCausalLM.from_config(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
            tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id), dtype=dtype)
    with data.loading(args.model):
        config = AutoConfig.from_pretrained(args.model)
    for key in [k for k in vars(config) if k.endswith(("dropout", "pdrop", "jitter_noise"))]:
        setattr(config, key, 0.0)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"--model {args.model}: quantised weights cannot be trained; name the "
                         "original ones")
    model = data.load_weights(AutoModelForCausalLM, args.model, config=config, dtype=dtype)
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        log(f"--model {args.model}: its generation config is left out: {error}")
        model.generation_config = type(model.generation_config)()
    rows = len(model.get_input_embeddings().weight)
    vocab = max(rows, len(tokenizer))
    if vocab > rows or device().type == "cuda":
        model.resize_token_embeddings(64 * math.ceil(vocab / 64), mean_resizing=False)
        model.config.get_text_config().vocab_size = vocab
    return model


def make_engine(args, module):
    """DeepSpeed around LogProbs. It never averages over micro-batches: the loss has its divisor."""
    import deepspeed
    bf16 = args.dtype == "bf16"
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "gradient_clipping": args.clip, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10 ** 9,
        "bf16": {"enabled": bf16, "immediate_grad_update": bf16},   # no second copy of gradients
        "timers": {"throughput": {"enabled": False}},               # else it waits for the GPU
        "zero_optimization": {"stage": args.zero}}
    if args.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if bf16:                                                # gradients are summed in fp32
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=tuple(args.betas), eps=args.eps,
                                  weight_decay=args.weight_decay,
                                  fused=device().type == "cuda")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()                # peak_gib is of training alone
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    engine.train()
    return engine


def set_learning_rate(engine, args, step, steps):
    lr = learning_rate(step, steps, args.lr, args.warmup, args.schedule)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    return lr


def check_finite(now, noun, wanted):
    if not math.isfinite(now["loss"] + now["grad_norm"]):
        raise FloatingPointError(
            f"step {now['step']}: the loss is {now['loss']}, the gradient norm {now['grad_norm']} "
            f"on {noun} {wanted.tolist()}; the last checkpoint is intact. Lower --lr, or look at "
            f"these {noun}")


def clip_and_step(engine, zero):
    """The optimiser's step with clipped gradients; returns their norm before clipping."""
    if not zero:                                            # at ZeRO 0 DeepSpeed forgets it
        gradients = [p.grad for p in engine.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
    engine.step()
    if zero:
        norm = engine.get_global_grad_norm()
    if norm is None or not engine.was_step_applied():       # DeepSpeed skips it without a word
        return math.inf
    return float(norm)


def numel(p):
    """Elements of a parameter, at ZeRO 3 those of all ranks."""
    return getattr(p, "ds_numel", p.numel())


def first_set(config, *names):
    """The first of a config's values that is there and not None."""
    return next(filter(None, [getattr(config, name, None) for name in names]), None)


def useful_flops(model, tokens, targets, attended):
    """FLOPs of forward and backward that the result needs: 6 per weight and token in the body, 6
    per weight of the head and target, 12 per layer, head width and (query, key) pair. A frozen
    weight has no gradient of its own and needs 4. Of a mixture's experts only the chosen count."""
    config, head = model.config.get_text_config(), model.get_output_embeddings().weight
    tables = {*model.get_input_embeddings().parameters(), head}
    experts = first_set(config, "num_local_experts", "num_experts", "moe_num_experts") or 1
    chosen = first_set(config, "num_experts_per_tok", "top_k_experts", "moe_topk") or experts

    def per_token(name, p):
        share = np.mean(chosen) / experts if ".experts." in name else 1     # or of each layer
        return numel(p) * (4 + 2 * p.requires_grad) * share
    body = sum(per_token(*named) for named in model.named_parameters() if named[1] not in tables)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim
    return float(body * tokens + per_token("head", head) * targets + attention * attended)


def peak_gib():
    """Peak memory of this rank: of the GPU's allocator, or of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


# ================================================= shared by all stages: checkpoints, export, log
def save_checkpoint(engine, folder, history):
    """All that a resumed run needs, the metrics of its steps with it. `whole` lists the files once
    every rank has written its own; then older checkpoints are deleted."""
    step, rank = len(history), dist.get_rank()
    name = f"step-{step:07}"
    try:
        engine.save_checkpoint(str(folder), name, save_latest=False,
                               client_state={"history": json.dumps(history)})
        dist.barrier()
        if rank == 0:
            write_lines(folder / name / "whole", [p.name for p in (folder / name).glob("*.pt")])
    except (OSError, RuntimeError) as error:
        raise OSError(f"--output {folder.parent}: the checkpoint of step {step} could not be "
                      f"written ({error}); the last one is intact. Free disk space and run the "
                      "same command again") from None
    if rank == 0:
        for old in folder.glob("step-*"):
            if old.name != name:
                shutil.rmtree(old)
    dist.barrier()


def is_whole(checkpoint):
    """Whether its files are all there, with the checksums that torch.save gave their parts."""
    try:
        names = (checkpoint / "whole").read_text().split()
        return names and all(
            zipfile.ZipFile(checkpoint / name).testzip() is None for name in names)
    except Exception as error:                              # zipfile has many kinds
        log(f"{checkpoint} is damaged ({error}); an older one continues, or the run starts anew")
        return False


def load_checkpoint(engine, folder) -> list[dict]:
    """Continue from the newest whole checkpoint; returns the metrics of the steps done. Runs no
    pickled code."""
    whole = [[]]
    if dist.get_rank() == 0:
        whole = [sorted(filter(is_whole, folder.glob("step-*")))]
    dist.broadcast_object_list(whole)
    if not whole[0]:
        return []
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"       # DeepSpeed passes weights_only=False
    with torch.serialization.safe_globals([LossScaler, fragment_address, ZeroStageEnum]):
        state = engine.load_checkpoint(str(folder), whole[0][-1].name)[1]
    return json.loads(state["history"])


# What a run writes below --output, and --overwrite deletes
RUN_FILES = re.compile(
    r"(iteration-\d+/)?(checkpoints/.*|export\.writing/.*|run\.json|metrics\.jsonl|curves\.png"
    r"|\w*config\.json|model[\w-]*\.safetensors(\.index\.json)?|tokenizer\.\w+|merges\.txt"
    r"|(vocab|added_tokens|special_tokens_map)\.json|chat_template\.jinja|report\.(json|md|png)"
    r"|(prompts|pairs)\.jsonl|(answers|scores|replies)-\w+\.jsonl|server\.log"
    r"|adapter/.*|tensorboard/.*)(\.\d+)?")


def is_run_file(path, folder):
    """Of a README.md only the card that `published` wrote."""
    if path.name == "README.md":
        return "by [lions](" in path.read_text(errors="replace")
    return RUN_FILES.fullmatch(path.relative_to(folder).as_posix())


@contextlib.contextmanager
def own_folder(args):
    """Rank 0 locks --output. ValueError, before anything is written, if another process works
    there, if it holds files of others, or if --overwrite would delete an input."""
    rank, _ = init_distributed()
    if rank > 0:
        yield
        return
    out = Path(args.output)
    with data.only_process(out):
        is_run = "stage" in read_json(out / "run.json")
        for path in out.rglob("*"):
            foreign = not is_run or (args.overwrite and not is_run_file(path, out))
            is_entry = path.is_file() or path.is_symlink()  # a linked folder is not deleted
            if foreign and is_entry and not re.fullmatch(r"lock|run\.json\.\d+", path.name):
                raise ValueError(f"--output {out} holds {path}, which no run here wrote; move it, "
                                 "or name another folder")
        more = [vars(args).get(name) or [] for name in ("eval_data", "mix")]
        for name in (args.model, vars(args).get("ref") or args.model, args.chat_template,
                     *args.data, *sum(more, [])):
            if args.overwrite and Path(name).resolve().is_relative_to(out.resolve()):
                raise ValueError(f"--overwrite would delete {name}, an input; name another "
                                 f"--output than {out}")
        yield


def delete_run(folder):
    for path in sorted(folder.rglob("*"), reverse=True):    # a folder comes after its files
        if path.is_dir():
            path.rmdir()
        elif is_run_file(path, folder):
            path.unlink()


def check_resume(args, world, data_key, may_change=MAY_CHANGE) -> dict | None:
    """The stored result if --output holds this run, finished. ValueError if it holds a run with
    other settings or data, naming them."""
    out, flags = Path(args.output), json.loads(json.dumps(vars(args)))
    old = read_json(out / "run.json")
    if args.overwrite or not old:
        return None
    content = "content of --data, of the model or of data.py"
    flags |= {"number of ranks": world, content: data_key}
    before = old["flags"] | {"number of ranks": old["world"], content: old["data"]}
    changed = [f"{name}: was {before.get(name)}, is {flags[name]}" for name in sorted(flags)
               if name not in may_change and flags[name] != before.get(name)]
    if changed:
        raise ValueError(f"--output {args.output} holds a run with other settings; name another "
                         "one or --overwrite it:\n" + "\n".join(changed))
    if old["git"] != git_commit():
        log(f"{args.output} was begun by commit {old['git']}; this is {git_commit()}")
    if old.get("result"):
        log(f"{args.output} is finished; this is its stored result")
        shutil.rmtree(out / "checkpoints", ignore_errors=True)      # a kill may have left them
    return old.get("result")


def export(engine, tokenizer, end_of_turn_id, args):
    """An ordinary Hugging Face folder from the fp32 masters, at any ZeRO stage. LoRA is merged."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param
    model, folder, state = engine.module.model, Path(args.output), {}
    rank = dist.get_rank()
    dtype, vocab = torch_dtype(args.export_dtype), model.config.get_text_config().vocab_size
    tables = {*model.get_input_embeddings().parameters(),
              *model.get_output_embeddings().parameters()}
    for name, p in model.named_parameters():
        with zero.GatheredParameters([p]):                  # a frozen one has no master
            full = safe_get_full_fp32_param(p)
            if full is None:
                full = p.data
            if rank == 0:
                rows = slice(vocab if p in tables else None)    # without padding
                kept = torch.float32 if "lora_" in name else dtype
                state[name] = full.detach()[rows].to("cpu", kept, copy=True)
    if rank == 0:
        state, adapter = merge_lora(model, state)
        saved = set(model.state_dict())
        state |= {name: b.detach().cpu() for name, b in model.named_buffers() if name in saved}
        model.config.dtype, generation = dtype, model.generation_config
        generation.eos_token_id = sorted({end_of_turn_id, tokenizer.eos_token_id} - {None})
        generation.pad_token_id = end_of_turn_id
        if tokenizer.pad_token_id is not None:
            generation.pad_token_id = tokenizer.pad_token_id
        work = folder / "export.writing"
        shutil.rmtree(work, ignore_errors=True)
        try:
            model.save_pretrained(work, state_dict=state)
            tokenizer.save_pretrained(work)
            for file in work.iterdir():
                file.replace(folder / file.name)
            if args.keep_adapter:
                save_adapter(model, adapter, args.model, folder / "adapter")
        except Exception as error:                          # safetensors has its own kinds
            raise OSError(f"--output {folder}: the model could not be written ({error}); the "
                          "checkpoint is intact. Free disk space and run the same command again"
                          ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    dist.barrier()


def merge_lora(model, state):
    """Weights by name with each adapted W replaced by W + scale B A, and the tensors of the
    adapter. A model without LoRA stays as it is."""
    adapter = {}
    for name in [name for name in state if ".lora_A." in name]:
        layer = name.partition(".lora_A.")[0]
        module = model.get_submodule(layer)
        A, B = state.pop(name), state.pop(f"{layer}.lora_B.default.weight")     # (r, in), (out, r)
        update = module.scaling["default"] * B @ A
        W = state.pop(f"{layer}.base_layer.weight")
        if module.fan_in_fan_out:                           # GPT-2 keeps its layers transposed
            update = update.T
        state[f"{layer}.weight"] = (W.float() + update).to(W.dtype)
        adapter |= {f"base_model.model.{layer}.lora_A.weight": A,
                    f"base_model.model.{layer}.lora_B.weight": B}
    return {name.replace(".base_layer.", "."): w for name, w in state.items()}, adapter


def save_adapter(model, tensors, base, folder):
    """A folder that peft.PeftModel.from_pretrained loads onto `base`."""
    from safetensors.torch import save_file
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")


def git_commit() -> str | None:
    """The commit of this folder's code, '+' behind it if files differ; None outside a checkout."""
    import subprocess
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def cumulative(model, stage):
    """Steps, tokens and FLOPs that `stage` has already spent on this model, from its run.json."""
    run = read_json(Path(model) / "run.json")
    spent = dict.fromkeys(("steps", "tokens", "flops"), 0)
    if run.get("stage") == stage:
        spent |= run.get("result", {}).get("cumulative", {})
    return spent


CURVES = {"loss": "loss (nats per target)", "lr": "learning rate", "grad_norm": "gradient norm"}


def plot_curves(path, runs, curves):
    """One panel per metric over steps, one line per run; held-out values ("eval_" + metric) as dots
    of the same colour."""
    panels = []
    for key, title in curves.items():
        series = {}
        for n, (name, rows) in enumerate(runs.items()):
            lines = ((key, f"C{n}-", name), (f"eval_{key}", f"C{n}o--", f"_{name}, held out"))
            for metric, style, label in lines:              # _: not in the legend
                seen = [(r["step"], r[metric]) for r in rows if metric in r]
                if seen:
                    series[label] = (*zip(*seen), style)
        panels.append({"series": series, "title": title,
                       "xlabel": "optimiser step (dots: held out)"})
    data.figure(path, panels)


class Run:
    """A stage's run around its steps: checkpoints, run.json, metrics.jsonl, the bar, SIGTERM."""

    def __init__(self, args, engine, stage, steps, curves=CURVES, **info):
        self.args, self.engine, self.steps, self.curves = args, engine, steps, curves
        self.rank, self.out, self.stop = dist.get_rank(), Path(args.output), False
        if self.rank == 0 and args.overwrite:               # only now: all inputs have been checked
            delete_run(self.out)
        dist.barrier()
        self.history = load_checkpoint(engine, self.out / "checkpoints")
        self.first = len(self.history)
        self.before = cumulative(args.model, stage)
        model = engine.module.model
        n, backend = sum(map(numel, model.parameters())), attention_backend(args, model.config)
        world = dist.get_world_size()
        log(f"{n:,} parameters, {world} rank(s), {args.dtype}, ZeRO {args.zero}, attention by "
            f"{backend} ({BACKENDS[backend]}), from step {self.first}")
        self.info = {"stage": stage, "flags": vars(args), "world": world, "git": git_commit(),
                     "parameters": n, "started": time.strftime("%Y-%m-%d %H:%M:%S"), **info,
                     "versions": {"torch": torch.__version__}}
        if self.rank == 0:
            write_json(self.out / "run.json", self.info)
            write_lines(self.out / "metrics.jsonl", map(json.dumps, self.history))
        self.handler = signal.signal(signal.SIGTERM, self.stop_after_this_step)
        from tqdm import tqdm
        self.bar = tqdm(total=steps, initial=self.first, disable=self.rank > 0, unit="step",
                        ncols=100)
        self.tracks = self.rank == 0 and args.report_to
        if self.tracks:
            self.track, self.end_tracking = start_tracker(args.report_to, self.out, vars(args))
            for row in self.history:                        # a resumed run reports all its steps
                self.track(row)
        self.clock, self.seconds, self.seen = time.time(), 0, 0
        self.minute = collections.deque([(self.clock, 0)])  # (time, tokens seen), the last minute

    def stop_after_this_step(self, *_):
        self.stop = True

    def cost(self, rows, wanted):
        """Tokens, time, memory and FLOPs of a step; rows have tokens, targets and attended."""
        tokens, targets, attended = (float(x[wanted].sum()) for x in (
            rows.tokens, rows.targets, rows.attended))
        self.seen += tokens
        self.minute.append((time.time(), self.seen))
        while self.minute[-1][0] - self.minute[1][0] > 60:
            self.minute.popleft()
        seconds, done = np.subtract(self.minute[-1], self.minute[0])
        return {"tokens": int(tokens), "targets": int(targets), "gib": peak_gib(),
                "tokens_per_s": float(done / seconds),
                "flops": useful_flops(self.engine.module.model, tokens, targets, attended)}

    def record(self, now):
        """Write a step's metrics to metrics.jsonl and show them in the bar."""
        self.history.append(now)
        self.seconds = time.time() - self.clock             # without the last checkpoint
        if self.rank == 0:
            with open(self.out / "metrics.jsonl", "a") as f:
                f.write(json.dumps(now) + "\n")
            if self.tracks:
                self.track(now)
            self.bar.update()
            if len(self.history) == self.first + 10:
                left = self.bar.format_interval(self.seconds / 10 * (self.steps - now["step"]))
                self.bar.write(f"about {left} for the steps that are left", file=sys.stderr)
            self.bar.set_postfix_str(
                f"loss {now['loss']:.4f} lr {now['lr']:.1e} norm {now['grad_norm']:.2f} "
                f"{now['tokens_per_s']:.0f} tok/s {now['gib']:.1f} GiB")

    def save_if_due(self, step, stopping) -> dict | None:
        """A checkpoint if it is time; main's result if SIGTERM asked to stop."""
        if stopping or due(step, self.args.save_every, self.steps):
            save_checkpoint(self.engine, self.out / "checkpoints", self.history)
        if not stopping:
            return None
        self.close()
        log(f"SIGTERM: saved at step {step}; the same command, without --overwrite, continues")
        return {"stopped": True, "steps": step, "output": str(self.out)}

    def close(self):
        """Close the bar and restore the previous SIGTERM handler. Returns the last step's
        metrics."""
        self.bar.close()
        signal.signal(signal.SIGTERM, self.handler)
        return self.history[-1] if self.history else {}

    def finish(self, result):
        """The picture and run.json with its result; then the checkpoints are deleted."""
        result |= {"steps": self.steps, "tokens_per_s": self.seen / max(self.seconds, 1e-9),
                   "output": str(self.out), "cumulative": {
                       "steps": self.before["steps"] + self.steps,
                       "tokens": self.before["tokens"] + sum(m["tokens"] for m in self.history),
                       "flops": self.before["flops"] + sum(m["flops"] for m in self.history)}}
        if self.rank == 0:
            plot_curves(self.out / "curves.png", {self.out.name: self.history}, self.curves)
            write_json(self.out / "run.json", self.info | {"result": result})
            shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
            if self.tracks:
                self.end_tracking(result)
        log("\n".join(f"{name:>20}  {value:,.6g}" for name, value in result.items()
                      if isinstance(value, int | float)))
        dist.barrier()
        release(self.engine)
        return result


def release(engine):
    """Undo what would keep an engine's memory: ZeRO's hooks, and what ZeRO 3 leaves behind, its
    F.linear, its stack of modules and caches of its methods. `free_memory` then frees it."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partition_parameters import (
        InsertPostInitMethodToModuleSubClasses as zero_3)
    engine.destroy()
    F.linear = getattr(zero_3, "linear_bk", F.linear)
    parameter_offload.FWD_MODULE_STACK.clear()
    for x in gc.get_objects():
        if type(x) is functools._lru_cache_wrapper and "deepspeed" in str(x.__module__):
            x.cache_clear()


def free_memory():
    """Give the memory of what is no longer used back to the device: models are cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def start_tracker(name, out, flags):
    """--report-to: a new run of the tracker. Returns two functions, for a line of metrics.jsonl and
    for the result, which ends the run with curves.png."""
    picture = out / "curves.png"
    if name == "tensorboard":
        module = needs("torch.utils.tensorboard", "tensorboard")
        writer = module.SummaryWriter(out / "tensorboard")

        def log(values, step):
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        def end():
            import matplotlib.pyplot as plt
            writer.add_image("curves", plt.imread(picture), dataformats="HWC")
            writer.close()
    elif name == "mlflow":
        mlflow = needs(name)
        mlflow.set_experiment("lions")
        mlflow.start_run(run_name=out.name)
        mlflow.log_params(flags)
        log = mlflow.log_metrics

        def end():
            mlflow.log_artifact(str(picture))
            mlflow.end_run()
    else:
        tracker = needs(name)                               # wandb, and trackio with its functions
        tracker.init(project="lions", name=out.name, config=flags)
        log = tracker.log

        def end():
            tracker.log({"curves": tracker.Image(str(picture))})
            tracker.finish()

    def record(now):
        log({k: v for k, v in now.items() if k != "step"}, step=now["step"])

    def finish(result):
        numbers = {f"result/{k}": v for k, v in result.items() if isinstance(v, int | float)}
        log(numbers, step=result["steps"])
        end()
    return record, finish


CARD = """
# {name}

{base}, trained by [lions](https://arxiv.org/abs/2407.06542)' {stage} on {data}.
The licences of that model and of these data apply.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (of.from_pretrained("{name}") for of in (AutoModelForCausalLM, AutoTokenizer))
```

## Result
{result}

## Flags
{flags}

Made on {started} with torch {torch}, commit {git}.

    Yu et al. LIONs: An Empirically Optimized Approach to Align Language Models. EMNLP 2024.
"""


def published(args, result):
    """The result of a run. With --push-to-hub rank 0 writes a model card from run.json and uploads
    the model's folder, also that of a run which was finished before."""
    if dist.get_rank() > 0 or not args.push_to_hub or result.get("stopped"):
        return result
    from huggingface_hub import HfApi, ModelCard, ModelCardData, constants
    folder = Path(args.output)                              # not result's: the run may have moved
    if "iterations" in result:
        folder /= f"iteration-{result['iterations']}"
    if (folder / "README.md").exists() and not is_run_file(folder / "README.md", folder):
        raise ValueError(f"--push-to-hub would replace {folder}/README.md; move it")
    run = read_json(folder / "run.json")
    flags = run["flags"]
    base = flags["model"]
    seen = {str(folder)}
    while base not in seen and (parent := read_json(Path(base) / "run.json").get("flags")):
        seen.add(base)                                      # a renamed run may name itself
        base = parent["model"]
    on_hub = base != "demo" and not Path(base).exists()
    head = ModelCardData(base_model=base if on_hub else None, library_name="transformers",
                         license="unknown", pipeline_tag="text-generation",
                         tags=["lions", run["stage"].split()[0]])
    tables = {of: data.table([{"name": k, "value": str(v)} for k, v in rows.items()])
              for of, rows in (("result", run["result"]), ("flags", flags))}
    text = CARD.format(name=args.push_to_hub, base=base, stage=run["stage"], git=run["git"],
                       data=", ".join(flags["data"]), started=run["started"],
                       torch=run["versions"]["torch"], **tables)
    ModelCard(f"---\n{head}\n---\n{text}").save(folder / "README.md")
    if constants.HF_HUB_OFFLINE:
        log(f"offline: {folder}/README.md is written, nothing is uploaded")
        return result
    api = HfApi()
    try:
        api.create_repo(args.push_to_hub, private=not args.hub_public, exist_ok=True)
        api.upload_folder(repo_id=args.push_to_hub, folder_path=folder, allow_patterns=[
            *data.MODEL_FILES, "*.safetensors.index.json", "*token*.json", "vocab.json",
            "merges.txt", "README.md", "curves.png", "run.json", "adapter/*"])
    except Exception as error:                              # the connection has its own kinds
        raise OSError(f"--push-to-hub {args.push_to_hub}: {error}; the model is in {folder}, the "
                      "same command uploads it") from error
    return result


def rounded(value):
    """Numbers with six significant digits, for the JSON line."""
    return json.loads(json.dumps(value), parse_float=lambda digits: float(f"{float(digits):.6g}"))


def run_main(main):
    """A script's entry: rank 0 prints the result as the last line, an expected error as one
    message."""
    problem = None
    try:
        result = main()
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(json.dumps(rounded(result)), flush=True)
    except (ValueError, OSError, FloatingPointError) as error:
        problem = error
    except KeyboardInterrupt:
        problem = "interrupted; the same command, without --overwrite, continues"
    except RuntimeError as error:
        if "by peer" not in str(error) and not isinstance(error, dist.DistError):
            raise
        problem = f"another rank has ended, its own message says why: {str(error)[:200]}"
    if problem:
        print(f"error: {problem}", file=sys.stderr, flush=True)
        os._exit(2)                                         # no waiting for other ranks or threads
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
