"""Stage 1, supervised fine-tuning: sequence packing and loss masking (LIONs, arXiv 2407.06542, section 3).

    L = - sum over documents of (1/|y|) sum_i log pi(y_i | x, y_<i)  / documents     --loss-norm sequence
    L = - sum over all targets of log pi(y_i | x, y_<i)              / targets       --loss-norm token

y are the tokens of assistant turns with their end of turn (--loss-on assistant) or every token (all).
Sums and the divisor are over the whole optimiser step on all ranks, so memory flags change nothing.

Reads   conversations (--data, see data.py) and a Hugging Face model (--model).
Writes  --output: an ordinary Hugging Face folder, run.json, metrics.jsonl, curves.png, ds_config.json.

    python sft.py                                                        # the demo, minutes on a CPU
    python sft.py --model google/gemma-2b                                # one GPU
    deepspeed sft.py --model meta-llama/Meta-Llama-3-8B                  # all GPUs

Differs from the paper
 1. --loss-norm token is the default (as in the release, but over the step, not the micro-batch).
 2. Embeddings train whole by default; the release trains special rows only (--train-embeddings new).
 3. A document cut by --packing concat goes on as a segment of its own, one token of context repeated.

Step 0 of a random model costs about ln V nats; the demo ends near 0.32, held out.
"""
from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
from kernels import Group, LogProbs, layout, pick_backend, use_varlen

PRESETS = {  # the paper's table as argparse defaults
    "demo": dict(model="demo", data=["demo:train"], eval_data=["demo:test"], epochs=1, batch_size=8,
                 max_length=512, lr=3e-3, eval_samples=400, output="runs/sft"),
    "gemma-2b": dict(model="google/gemma-2b", data=["lion-sft"], epochs=3, batch_size=32,
                     max_length=8192, lr=2e-5, zero=1, empty_system=0.8, gradient_checkpointing=True,
                     output="runs/gemma-2b-sft"),
    "llama-3-8b": dict(model="meta-llama/Meta-Llama-3-8B", data=["lion-sft"], epochs=1,
                       batch_size=32, max_length=8192, lr=2e-5, zero=3, empty_system=0.8,
                       gradient_checkpointing=True, output="runs/llama-3-8b-sft")}
# flags that cannot change the result, beyond rounding: a resumed run may change them
FREE = {"micro_tokens", "save_every", "eval_every", "report_to", "num_proc", "cache_dir", "overwrite", "output",
        "local_rank", "gradient_checkpointing", "offload", "eval_data", "eval_samples", "eval_prompts", "export_dtype",
        "max_new_tokens"}


# --------------------------------------------------------------------------------------------- maths
def sft_loss(logps, weight, total: float):
    """-sum(weight * log pi) / total: the formula in the header. weight (N,) is 1 (token norm) or 1/|y|
    (sequence norm), total the sum of all weights of the step on all ranks. Uniform pi gives ln V."""
    return -(weight * logps).sum() / total


def learning_rate(step: int, steps: int, lr: float, warmup: float, schedule: str) -> float:
    """Linear warm-up over the first `warmup` share of `steps`, then cosine or linear to 0, or constant."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return lr * (step + 1) / ramp
    x = (step - ramp) / max(1, steps - ramp)
    return lr * {"cosine": (1 + math.cos(math.pi * x)) / 2, "linear": 1 - x, "constant": 1.0}[schedule]


def micro_batches(tokens, limit: int, ranks: int) -> list[list[list[int]]]:
    """Split a step's rows, `tokens` long, into micro-batches of near-equal tokens: [rank][micro][row].

    The same number on every rank (some may be empty), none above `limit` tokens unless a single row is;
    longest row first into the lightest micro-batch. A pure function of its arguments."""
    n = max(1, math.ceil(sum(tokens) / (limit * ranks)))
    while True:
        load, rows = [0] * (n * ranks), [[] for _ in range(n * ranks)]
        for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
            b = min(range(n * ranks), key=lambda b: (load[b], b))
            load[b] += tokens[i]
            rows[b].append(i)
        if all(a <= limit or len(r) == 1 for a, r in zip(load, rows)):
            return [[sorted(r) for r in rows[k::ranks]] for k in range(ranks)]
        n += 1


# ------------------------------------------------------------------------------------------ plumbing
def parser() -> argparse.ArgumentParser:
    p = stage_parser(__doc__, PRESETS)
    add = p.add_argument_group("stage 1").add_argument
    add("--max-examples", type=int, help="first N of one seeded permutation; None: all")
    add("--packing", choices=["bfd", "concat", "none"], default="bfd")
    add("--loss-on", choices=["assistant", "all"], default="assistant", help="the loss mask")
    add("--loss-norm", choices=["token", "sequence"], default="token", help="weight of a target: 1 or 1/|y|")
    add("--train-embeddings", choices=["all", "new"], default="all", help="new: only the template's rows")
    return p


def stage_parser(description: str, presets: dict) -> argparse.ArgumentParser:
    """The flags that all stages share."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    add = p.add_argument_group("model and data").add_argument
    add("--preset", choices=list(presets), help="the paper's settings; default: by --model, demo if none")
    add("--model", help="Hub id or folder; 'demo' is a small random Llama made in code")
    add("--data", nargs="+", help="NAME[:split][=fraction] or a mix (data.py's MIXES), several")
    add("--eval-data", nargs="+", help="held-out sources, same form; None: no evaluation")
    add("--chat-template", default="chatml", help="chatml, tokenizer (its own) or a jinja file")
    add("--max-length", type=int, default=2048, help="tokens a row; longer ones are cut and counted")
    add("--empty-system", type=float, default=0.0, help="probability of an empty system turn where none is")
    add("--bad-rows", choices=["refuse", "stop"], default="refuse", help="count them, or stop at the first")
    add("--num-proc", type=int, help="processes that prepare data; None: all cores")
    add("--cache-dir", help="prepared data; None: ~/.cache/lions")
    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=float, default=1)
    add("--max-steps", type=int, help="stop the schedule here; None: by --epochs")
    add("--batch-size", type=int, default=32, help="rows an optimiser step, over all GPUs")
    add("--lr", type=float, default=2e-5)
    add("--schedule", choices=["cosine", "linear", "constant"], default="cosine")
    add("--warmup", type=float, default=0.1, help="share of steps")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999])
    add("--eps", type=float, default=1e-8)
    add("--weight-decay", type=float, default=0.0)
    add("--clip", type=float, default=1.0, help="gradient norm")
    add("--seed", type=int, default=42)
    add = p.add_argument_group("memory and machines").add_argument
    add("--micro-tokens", type=int, help="tokens a micro-batch on a GPU; None: --max-length")
    add("--dtype", choices=["fp32", "bf16"], help="compute; masters are fp32. None: bf16 on GPU")
    add("--zero", type=int, choices=[0, 1, 2, 3], help="ZeRO stage; None: 0 for fp32, 1 for bf16")
    add("--offload", action="store_true", help="optimiser state in CPU memory (ZeRO >= 1)")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False)
    add("--local_rank", "--local-rank", type=int, default=0, help="set by the deepspeed launcher")
    add = p.add_argument_group("output").add_argument
    add("--output", help="folder of the run; None: the stage's, under runs/")
    add("--overwrite", action="store_true", help="delete --output first")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--eval-every", type=int, help="steps between evaluations; None: a quarter of the run")
    add("--eval-samples", type=int, default=200, help="held-out prompts answered for exact match; 0: none")
    add("--max-new-tokens", type=int, default=64, help="an answer's limit when sampling")
    add("--export-dtype", choices=["fp32", "bf16"], default="fp32")
    add("--report-to", choices=["wandb", "tensorboard"], nargs="*", default=[])
    return p


def parse(argv=None, make=parser, presets=PRESETS, check=None):
    """Flags over preset over defaults; every problem in one ValueError. check(args): a stage's own problems."""
    p = make()
    first, _ = p.parse_known_args(argv)
    by_model = {v["model"]: k for k, v in presets.items()}
    name = first.preset or by_model.get(first.model, None if first.model else "demo")
    p.set_defaults(**presets.get(name, {}))
    args = p.parse_args(argv)
    print(f"preset: {name or 'none (defaults; no preset names this model)'}", file=sys.stderr)
    args.preset = name
    args.micro_tokens = args.micro_tokens or args.max_length
    args.dtype = args.dtype or ("bf16" if torch.cuda.is_available() else "fp32")
    args.zero = args.zero if args.zero is not None else int(args.dtype == "bf16")
    flag = lambda f: f"--{f.replace('_', '-')} {getattr(args, f)}"
    why = [f"{flag(f)}: must be above 0" for f in (
        "max_length", "epochs", "batch_size", "lr", "micro_tokens", "save_every", "clip") if not getattr(args, f) > 0]
    why += [f"{flag(f)}: must be above 0, or left out" for f in (
        "max_steps", "max_examples", "max_pairs", "eval_every", "num_proc")
        if getattr(args, f, None) is not None and getattr(args, f) <= 0]
    why += [f"{flag(f)}: must lie in 0..1" for f in ("warmup", "empty_system") if not 0 <= getattr(args, f) <= 1]
    if not args.data:
        why.append("--data: needed, no preset gives one for this model")
    if args.dtype == "bf16" and args.zero == 0:
        why.append("--zero 0 with --dtype bf16: would sum gradients in bf16; use --zero 1 or more")
    if args.offload and not args.zero:
        why.append("--offload: needs --zero 1 or more")
    why += (check or check_flags)(args)
    if why:
        raise ValueError("\n".join(why))
    return args


def check_flags(args) -> list[str]:
    args.output = args.output or "runs/sft"
    if args.train_embeddings == "new" and args.weight_decay:
        return ["--train-embeddings new with --weight-decay: decay would move the frozen rows; set it to 0"]
    return []


def init_distributed():
    """DeepSpeed over nccl or gloo; plain `python` is a world of one. Returns (rank, world, device)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import datetime
    import torch.distributed as dist
    import deepspeed
    for handler in deepspeed.utils.logging.logger.handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.setStream(sys.stderr)                   # stdout ends in our JSON line
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False      # gloo alone: no compiler needed on CPU
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not dist.is_initialized():
        limit = datetime.timedelta(hours=3)
        if "RANK" in os.environ:
            if backend == "nccl":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            else:
                beside = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1  # torchrun, deepspeed
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(beside)))
            dist.init_process_group(backend, timeout=limit)
        else:
            os.environ.setdefault("LOCAL_RANK", "0")        # DeepSpeed asks for it
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    deepspeed.init_distributed(backend, verbose=False)
    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
    return dist.get_rank(), dist.get_world_size(), device


def all_sum(values, device) -> list[float]:
    """Sum of a few numbers over all ranks, in float64."""
    t = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(t)
    return t.tolist()


def load_tokenizer(args):
    """The tokenizer with its template set, and the template (data.set_template)."""
    from transformers import AutoTokenizer
    tokenizer = data.demo_tokenizer() if args.model == "demo" else AutoTokenizer.from_pretrained(args.model)
    return tokenizer, data.set_template(tokenizer, args.chat_template)


def prepare_rows(sources, *, args, tokenizer, template, rank: int, **settings):
    """data.prepare under a stage's flags: rank 0 fills the cache, the others read it. (dataset, its key)."""
    if rank:
        torch.distributed.barrier()
    made = data.prepare(sources, tokenizer, template, max_length=args.max_length, empty_system=args.empty_system,
                        seed=args.seed, bad_rows=args.bad_rows, num_proc=args.num_proc, cache_dir=args.cache_dir,
                        **settings)
    if rank == 0:
        torch.distributed.barrier()
        print(data.stats_table(made.stats), file=sys.stderr, flush=True)
    return made.dataset, made.key


def load_model(args, tokenizer, new_ids):
    """The model in fp32 with rows for new tokens (mean of the old ones), dropout off, varlen attention."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
    torch.manual_seed(args.seed)
    if args.model == "demo":
        model = AutoModelForCausalLM.from_config(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
            tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id))
    else:
        config = AutoConfig.from_pretrained(args.model)
        for key in [k for k in vars(config) if k.endswith(("dropout", "pdrop"))]:
            setattr(config, key, 0.0)
        model = AutoModelForCausalLM.from_pretrained(args.model, config=config, dtype=torch.float32,
                                                     use_safetensors=True)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if new_ids:
        old = [i for i in range(len(tokenizer)) if i not in set(new_ids)]
        with torch.no_grad():
            for table in {model.get_input_embeddings(), model.get_output_embeddings()}:
                table.weight[new_ids] = table.weight[old].mean(0)
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        raise ValueError(f"--model {args.model}: weights that are NaN or infinite in {', '.join(bad[:5])}; this run "
                         "diverged or the file is damaged, take an earlier one")
    use_varlen(model, args.max_length)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_engine(args, module, world: int):
    """DeepSpeed around LogProbs. It never averages over micro-batches: the loss carries its divisor."""
    import deepspeed
    bf16 = args.dtype == "bf16"
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "gradient_clipping": args.clip, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10 ** 9, "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": args.zero, **({"offload_optimizer": {"device": "cpu"}}
                                                     if args.offload else {})},
        **({"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"} if bf16 else {})}
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=args.lr,
                                  betas=tuple(args.betas), eps=args.eps, weight_decay=args.weight_decay)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine, config


def train_rows_only(weight, ids):
    """Zero the gradient of every other row of an embedding table (--train-embeddings new)."""
    def keep(grad):
        out = torch.zeros_like(grad)
        out[ids] = grad[ids]
        return out
    weight.register_hook(keep)


def save_checkpoint(engine, folder: Path, step: int, rank: int) -> None:
    """Everything a resumed run needs, written under a temporary name and renamed; then older ones go."""
    barrier = torch.distributed.barrier
    tmp, final = folder / "writing", folder / f"step-{step:08d}"
    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    barrier()
    failed = ""
    try:
        engine.save_checkpoint(str(folder), tag="writing", client_state={"step": step}, save_latest=False)
    except (OSError, RuntimeError) as error:
        failed = str(error)
    if all_sum([bool(failed)], engine.device)[0]:
        if rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(f"--output {folder.parent}: checkpoint at step {step} could not be written ({failed}); "
                      "the last good one is intact. Free disk space and run the same command again")
    if rank == 0:
        tmp.rename(final)
        for old in sorted(folder.glob("step-*"))[:-1]:
            shutil.rmtree(old)
    barrier()


def clip_and_step(engine, zero: int) -> float:
    """The optimiser's step, gradients clipped; returns their norm before. At ZeRO 0 DeepSpeed forgets it."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.parameters() if p.grad is not None]) \
        if zero == 0 else None
    engine.step()
    return float(engine.get_global_grad_norm() if norm is None else norm)


def load_checkpoint(engine, folder: Path) -> int:
    """Continue from the last whole checkpoint; returns the number of steps done, 0 where there is none.
    Read with weights_only: not even our own folder runs pickled code."""
    whole = sorted(folder.glob("step-*"))
    if not whole:
        return 0
    from unittest import mock
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    plain = torch.load
    with torch.serialization.safe_globals([LossScaler, fragment_address, ZeroStageEnum]), \
            mock.patch("torch.load", lambda *a, **k: plain(*a, **{**k, "weights_only": True})):
        _, state = engine.load_checkpoint(str(folder), tag=whole[-1].name)
    return state["step"]


def changed_flags(old: dict, args, free=FREE) -> list[str]:
    """Flags that decide a result and differ from a run's stored ones, a line each."""
    now = json.loads(json.dumps(vars(args)))
    return [f"--{k.replace('_', '-')}: was {old.get(k)}, now {now[k]}"
            for k in sorted(now) if k not in free and old.get(k) != now[k]]


def check_resume(args, out: Path, world: int, data_key: str, free=FREE) -> None:
    """Refuse to continue a run whose result-flags (all but `free`) or data differ, naming them."""
    if not (out / "run.json").exists():
        return
    old = json.loads((out / "run.json").read_text())
    changed = changed_flags(old["flags"], args, free)
    if old["world"] != world:
        changed.append(f"number of ranks: was {old['world']}, now {world}")
    if not changed and old.get("data") != data_key:
        changed.append("--data: same names, other content (or another data.py)")
    if changed:
        raise ValueError(f"--output {out} holds a run with other settings; name another --output or "
                         "--overwrite it:\n" + "\n".join(changed))
    if old.get("result"):
        raise ValueError(f"--output {out} holds a finished run; name another --output or --overwrite it")


def peak_gib() -> float:
    """Peak memory of this rank so far: the GPU's allocator, or the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def check_rows(rows: int, world: int) -> None:
    if rows < world:
        raise ValueError(f"--data: {rows} rows for {world} ranks; use fewer ranks or more data")


def git_commit() -> str | None:
    """The commit of this folder's code, '+' behind it where files differ; None outside a checkout."""
    import subprocess
    ask = lambda *a: subprocess.run(["git", "-C", str(Path(__file__).parent), *a], capture_output=True,
                                    text=True)
    try:
        head = ask("rev-parse", "HEAD")
    except OSError:
        return None
    dirty = ask("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return head.stdout.strip() + "+" * bool(dirty) if head.returncode == 0 else None


def write_json(path: Path, value) -> None:
    tmp = path.with_suffix(".writing")
    tmp.write_text(json.dumps(value, indent=1))
    tmp.rename(path)


def write_rows(path: Path, rows: list[dict]) -> None:
    """Rows as JSON lines, written aside and renamed."""
    tmp = path.with_suffix(".writing")
    tmp.write_text("".join(json.dumps(r) + "\n" for r in rows))
    tmp.rename(path)


def export(engine, tokenizer, end_of_turn_id: int, folder: Path, dtype: str, rank: int) -> None:
    """An ordinary Hugging Face folder from the fp32 masters, whatever the ZeRO stage."""
    from deepspeed.utils import safe_get_full_fp32_param
    state, model = {}, engine.module.model
    for name, p in model.named_parameters():
        full = safe_get_full_fp32_param(p) if hasattr(p, "_hp_mapping") or hasattr(p, "ds_id") else None
        if rank == 0:
            state[name] = (p.data if full is None else full).detach().to(
                "cpu", torch.bfloat16 if dtype == "bf16" else torch.float32, copy=True)
    if rank == 0:
        for name, b in model.named_buffers():
            if name in model.state_dict():
                state[name] = b.detach().cpu()
        model.config.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        stops = {end_of_turn_id, tokenizer.eos_token_id} - {None}
        model.generation_config.eos_token_id = sorted(stops)
        model.generation_config.pad_token_id = (tokenizer.pad_token_id if tokenizer.pad_token_id is not None
                                                else end_of_turn_id)
        work = folder / "export.writing"
        shutil.rmtree(work, ignore_errors=True)
        try:
            model.save_pretrained(work, state_dict=state)
            tokenizer.save_pretrained(work)
            for file in work.iterdir():
                file.replace(folder / file.name)
        except Exception as error:                          # safetensors has its own kind for a full disk
            raise OSError(f"--output {folder}: the model could not be written ({error}); the checkpoint is "
                          "intact. Free disk space and run the same command again") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    torch.distributed.barrier()


class Answer(NamedTuple):
    prompt: int                    # index into the prompts
    sample: int                    # which of the prompt's K
    text: str                      # without the end of turn; other special tokens show
    ids: list[int]                 # as sampled, with the end of turn
    finished: bool                 # False: max_new_tokens came first


def prompt_ids(tokenizer, messages) -> list[int]:
    """Messages up to and with the header of the answer to come."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def stop_tokens(generation_config) -> set[int]:
    """The ends of turn that a generation config names, one id or a list of them."""
    stops = generation_config.eos_token_id
    return set(stops if isinstance(stops, list) else [stops])


def answer_of(ids: list[int], prompt: int, sample: int, stops: set[int], tokenizer) -> Answer:
    finished = bool(ids) and ids[-1] in stops
    return Answer(prompt, sample, tokenizer.decode(ids[:-1] if finished else ids), ids, finished)


def pick_token(logits, uniform, temperature: float, top_p: float):
    """One token a row by the inverse of the cumulative distribution. logits (B, V), uniform (B,) in [0, 1)
    -> (B,) int64. temperature 0: the likeliest. top_p: of the smallest set of likeliest tokens that holds at
    least top_p (Holtzman et al. 1904.09751). Probabilities 1/2, 1/4, 1/4 and uniform 0.6 give token 1."""
    if temperature == 0:
        return logits.argmax(-1)
    p, token = torch.softmax(logits.double() / temperature, -1), None                   # (B, V)
    if top_p < 1:
        p, token = p.sort(descending=True, stable=True)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    total = p.cumsum(-1)
    at = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True).clamp(max=p.shape[-1] - 1)   # (B, 1)
    return (at if token is None else token.gather(1, at))[:, 0]


def roomy_cache():
    """A transformers cache that writes in place, with room to spare: its own copies all keys at every token."""
    from transformers.cache_utils import Cache, DynamicLayer

    class Roomy(DynamicLayer):
        room = 0                                            # tokens the storage behind keys and values holds

        def update(self, keys, values, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
                self.keys, self.values = keys[:, :, :0], values[:, :, :0]
            n, m = self.keys.shape[2], self.keys.shape[2] + keys.shape[2]
            if m > self.room:
                self.room = m + 64
                self.store = [F.pad(x, (0, 0, 0, self.room - n)) for x in (self.keys, self.values)]
            for store, new in zip(self.store, (keys, values)):
                store[:, :, n:m] = new
            self.keys, self.values = (store[:, :, :m] for store in self.store)
            return self.keys, self.values

        def replace(self, change, other=None):
            """keys and values x -> change(x, the other layer's)."""
            self.keys, self.values = (change(x, y) for x, y in zip(
                (self.keys, self.values), (other.keys, other.values) if other else (None, None)))
            self.store, self.room = None, 0
    return Cache(layer_class_to_replicate=Roomy)


@torch.no_grad()
def sample_responses(model, tokenizer, prompts: list, max_new_tokens: int, *, samples: int = 1, temperature: float = 0.0,
                     top_p: float = 1.0, seeds: list[int] | None = None, done=frozenset(), rows: int = 64):
    """`samples` answers to each prompt (a list of messages), one Answer after the other as they finish.

    Padded on the left, at most `rows` answers at once, and what is done makes room for what waits; a prompt is
    computed once for all its answers. Sample k of prompt i draws its numbers from (seeds[i], k): neither `rows`
    nor neighbours nor what is already there (`done`: (i, k) to leave out) change it, beyond rounding.
    model: a plain transformers model whose generation_config names the ends of turn."""
    model, stops = model.eval(), stop_tokens(model.generation_config)
    ids = {i: prompt_ids(tokenizer, m) for i, m in enumerate(prompts)}
    waiting = [(i, k) for i in sorted(ids, key=lambda i: -len(ids[i])) for k in range(samples) if (i, k) not in done]
    waiting.reverse()                                       # taken from the end, the longest prompts first
    cache = mask = logits = None                            # of the R rows in work: mask (R, W), logits (R, V)
    live = []                                               # [i, k, numbers, tokens so far]; tokens None: done
    while waiting or live:
        over = sum(x[3] is None for x in live)
        free = rows - len(live) + over
        if waiting and free >= max(1, rows // 8) or over > len(live) // 8:
            # --- rows that are done leave, waiting ones come in ---------------------------------------
            keep = [r for r, x in enumerate(live) if x[3] is not None]
            live = [live[r] for r in keep]
            if live:
                keep = torch.tensor(keep, device=model.device)
                mask, logits = mask[keep], logits[keep]
                first = int(mask.any(0).float().argmax())   # columns that are padding in every row go
                mask = mask[:, first:]
                for layer in cache.layers:
                    if layer.is_initialized:
                        layer.replace(lambda x, _: x[keep, :, first:])
            new = [waiting.pop() for _ in range(min(free, len(waiting)))]
            if new:
                once = list(dict.fromkeys(i for i, _ in new))
                width = max(len(ids[i]) for i in once)
                x = torch.tensor([[0] * (width - len(ids[i])) + ids[i] for i in once], device=model.device)
                m = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in once], device=model.device)
                fresh = roomy_cache()
                start = model(input_ids=x, attention_mask=m, position_ids=(m.cumsum(1) - 1).clamp(min=0),
                              past_key_values=fresh, use_cache=True, logits_to_keep=1).logits[:, -1]    # (P, V)
                at = torch.tensor([once.index(i) for i, _ in new], device=model.device)
                if live:
                    old = mask.shape[1]
                    wide = max(width, old)
                    both = lambda x, y: torch.cat([F.pad(x, (0, 0, wide - old, 0)), F.pad(y[at], (0, 0, wide - width, 0))])
                    mask = torch.cat([F.pad(mask, (wide - old, 0)), F.pad(m[at], (wide - width, 0))])
                    logits = torch.cat([logits, start[at]])
                    for layer, other in zip(cache.layers, fresh.layers):
                        if layer.is_initialized:
                            layer.replace(both, other)
                else:
                    cache, mask, logits = fresh, m[at], start[at]
                    for layer in cache.layers:
                        if layer.is_initialized:
                            layer.replace(lambda x, _: x[at])
                for i, k in new:
                    key = [seeds[i] if seeds else 0, k]
                    numbers = np.random.Generator(np.random.Philox(key=key)).random(max_new_tokens) if temperature else None
                    live.append([i, k, numbers, []])
            if not live:
                break
        # --- one token for every row -------------------------------------------------------------------
        uniform = torch.tensor([0.0 if x[3] is None or x[2] is None else x[2][len(x[3])] for x in live],
                               dtype=torch.float64, device=model.device)
        token = pick_token(logits, uniform, temperature, top_p)                         # (R,)
        for x, t in zip(live, token.tolist()):
            if x[3] is not None:
                x[3].append(t)
                if t in stops or len(x[3]) == max_new_tokens:
                    yield answer_of(x[3], x[0], x[1], stops, tokenizer)
                    x[3] = None
        if any(x[3] is not None for x in live):
            mask = F.pad(mask, (0, 1), value=1)
            logits = model(input_ids=token[:, None], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                           past_key_values=cache, use_cache=True).logits[:, -1]


CURVES = {"loss": "loss (nats a target)", "lr": "learning rate", "grad_norm": "gradient norm"}


def plot_curves(path: Path, runs: dict[str, list[dict]], curves: dict[str, str] = CURVES) -> None:
    """One panel a metric over steps, one line a run; what was held out ("eval_" + metric) as dots."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    height = math.ceil(len(curves) / 3)
    figure, axes = plt.subplots(height, 3, figsize=(13, 3.6 * height), constrained_layout=True, squeeze=False)
    for ax, (key, title) in zip(axes.flat, curves.items()):
        for name, rows in runs.items():
            seen = [(r["step"], r[key]) for r in rows if key in r]
            if seen:
                ax.plot(*zip(*seen), label=name, lw=1)
            held = [(r["step"], r["eval_" + key]) for r in rows if "eval_" + key in r]
            if held:
                ax.plot(*zip(*held), "o--", ms=4, lw=0.8, label=f"{name}, held out")
        ax.set(xlabel="optimiser step", title=title)
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def useful_flops(model, tokens: float, targets: float, attended: float) -> float:
    """FLOPs of forward and backward that the result needs: 6 a weight and token for the body, 6 a weight
    of the head and target, 12 a layer, head width and (query, key) pair; recomputation not counted."""
    config, head = model.config.get_text_config(), model.get_output_embeddings().weight
    size = getattr(head, "ds_numel", None) or head.numel()
    total = sum(getattr(p, "ds_numel", None) or p.numel() for p in model.parameters())
    body = total - size * (1 if config.tie_word_embeddings else 2)
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or
                                          config.hidden_size // config.num_attention_heads)
    return float(6 * body * tokens + 6 * size * targets + 12 * config.num_hidden_layers * width * attended)


def spent_before(model: str, stage: str) -> dict:
    """Steps, tokens and FLOPs that `stage` has spent on this model already: its run's cumulative figures."""
    path = Path(model) / "run.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    spent = old.get("result", {}).get("cumulative", {}) if old.get("stage") == stage else {}
    return {k: spent.get(k, 0) for k in ("steps", "tokens", "flops")}


# --------------------------------------------------------------------------------------- a run's life
class Run:
    """What stands around a stage's step: checkpoints, run.json, metrics.jsonl, the bar, SIGTERM."""

    def __init__(self, args, engine, ds_config: dict, stage: str, steps: int, rank: int, world: int, **info):
        self.args, self.engine, self.rank, self.out, self.steps = args, engine, rank, Path(args.output), steps
        self.history, self.writers, self.stop = [], [], []
        if rank == 0 and args.overwrite:                    # only now: everything that can be wrong was looked at
            shutil.rmtree(self.out, ignore_errors=True)
        torch.distributed.barrier()
        self.first = load_checkpoint(engine, self.out / "checkpoints")
        self.before = spent_before(args.model, stage)
        if rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "ds_config.json", ds_config)
            import transformers
            self.run = {"stage": stage, "flags": vars(args), "world": world, "git": git_commit(), **info,
                        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
                        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
            write_json(self.out / "run.json", self.run)
            lines = (self.out / "metrics.jsonl").read_text().splitlines() if self.first else []
            self.history = [m for m in map(json.loads, lines) if m["step"] <= self.first]
            write_rows(self.out / "metrics.jsonl", self.history)
            self.writers = reporters(args, self.out)
        self.handler = None                                 # SIGTERM's before this run
        if threading.current_thread() is threading.main_thread():
            self.handler = signal.signal(signal.SIGTERM, lambda *_: self.stop.append(1))
        from tqdm import tqdm
        self.bar = tqdm(total=steps, initial=self.first, disable=rank > 0, unit="step", dynamic_ncols=True)
        self.clock, self.seen = time.time(), 0

    def record(self, now: dict) -> None:
        """A step's metrics into metrics.jsonl, the reporters and the bar."""
        if self.rank == 0:
            self.history.append(now)
            with open(self.out / "metrics.jsonl", "a") as f:
                f.write(json.dumps(now) + "\n")
            for write in self.writers:
                write(now)
            self.bar.update()
            self.bar.set_postfix_str(f"loss {now['loss']:.4f} lr {now['lr']:.1e} norm {now['grad_norm']:.2f} "
                                     f"{now['tokens_per_s']:.0f} tok/s {now['gib']:.1f} GiB")

    def save_if_due(self, step: int, stopping) -> dict | None:
        """A checkpoint when it is time; what main returns when SIGTERM asked to stop, else None."""
        if stopping or (step % self.args.save_every == 0 and step < self.steps):
            save_checkpoint(self.engine, self.out / "checkpoints", step, self.rank)
        if not stopping:
            return None
        self.close()
        if self.rank == 0:
            print(f"SIGTERM: saved at step {step}; the same command goes on from here", file=sys.stderr)
        return {"stopped": True, "steps": step, "output": str(self.out)} if self.rank == 0 else {}

    def close(self) -> None:
        """The steps are done: SIGTERM means again what it meant before, for whatever comes next in this process."""
        self.bar.close()
        if self.handler is not None:
            signal.signal(signal.SIGTERM, self.handler)
            self.handler = None

    def tokens_per_s(self, tokens: int) -> float:
        self.seen += tokens
        return self.seen / (time.time() - self.clock)

    def total(self) -> dict:
        """Steps, tokens and FLOPs of this run and of those of the same stage that it trains further."""
        spent = dict(steps=self.steps, **{k: sum(m[k] for m in self.history) for k in ("tokens", "flops")})
        return {k: self.before[k] + v for k, v in spent.items()}

    def finish(self, result: dict, curves: dict = CURVES) -> dict:
        """The picture and run.json with its result; then the checkpoints go."""
        if self.rank == 0:
            plot_curves(self.out / "curves.png", {self.out.name: self.history}, curves)
            write_json(self.out / "run.json", self.run | {"result": result})
            shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
        torch.distributed.barrier()
        self.engine.destroy()                               # else ZeRO's hooks keep weights and moments alive
        return result if self.rank == 0 else {}


# ---------------------------------------------------------------------------------------- SFT's data
class Packed:
    """Prepared documents and their rows: row r -> groups for layout(), and what each row weighs."""

    def __init__(self, dataset, rows: data.Rows, loss_norm: str):
        self.rows, self.docs = rows, dataset.with_format("numpy", columns=["input_ids", "targets"])
        per_doc = np.asarray(dataset["n_targets"], dtype=np.int64)
        counts = per_doc[rows.doc].copy()                           # targets of each piece
        lengths = np.asarray(dataset["length"], dtype=np.int64)
        for p in np.flatnonzero((rows.start > 0) | (rows.end < lengths[rows.doc])):
            mask = np.asarray(self.docs[int(rows.doc[p])]["targets"])
            counts[p] = mask[rows.start[p] + 1:rows.end[p]].sum()   # a piece's first token is context
        self.weight = 1.0 / per_doc[rows.doc] if loss_norm == "sequence" else np.ones(len(rows.doc))
        total = lambda x: np.add.reduceat(x, rows.offsets[:-1])
        self.tokens, self.targets = total(rows.end - rows.start), total(counts)
        self.weights = total(counts * self.weight)
        size = (rows.end - rows.start).astype(float)
        self.attended = total(size * (size + 1) / 2)                # (query, key) pairs

    def __len__(self):
        return len(self.rows.offsets) - 1

    def batch(self, wanted: list[int], device):
        """The rows as one Batch and the weight of each of its targets."""
        groups, weight = [], []
        for r in wanted:
            for p in range(self.rows.offsets[r], self.rows.offsets[r + 1]):
                doc = self.docs[int(self.rows.doc[p])]
                a, b = self.rows.start[p], self.rows.end[p]
                ids, mask = doc["input_ids"][a:b].tolist(), doc["targets"][a:b].tolist()
                groups.append(Group([], [ids], [[False] + mask[1:]]))
                weight.append(self.weight[p])
        batch = layout(groups)
        weight = torch.tensor(weight, dtype=torch.float32)[batch.sequence]
        return batch.to(device), weight.to(device)


@torch.no_grad()
def evaluate_loss(engine, packed: Packed, limit: int, rank: int, world: int) -> float:
    """Mean nats a target token over all rows of `packed`, rows split over ranks."""
    engine.eval()
    nats = 0.0
    for micro in micro_batches(packed.tokens.tolist(), limit, world)[rank]:
        batch, _ = packed.batch(micro, engine.device)
        nats -= engine(batch).double().sum().item()
    engine.train()
    return all_sum([nats], engine.device)[0] / packed.targets.sum()


def unigram_nats(train, held_out, vocabulary: int) -> float:
    """Mean nats a held-out target under add-one unigram counts of the training targets."""
    def counts(d):
        total = np.zeros(vocabulary, dtype=np.int64)
        for part in d.with_format("numpy", columns=["input_ids", "targets"]).iter(batch_size=1000):
            ids, mask = (np.concatenate(list(part[c])) for c in ("input_ids", "targets"))
            total += np.bincount(ids[mask.astype(bool)], minlength=vocabulary)
        return total
    a, b = counts(train), counts(held_out)
    return float(-(b * np.log((a + 1) / (a.sum() + vocabulary))).sum() / b.sum())


def exact_match(folder, dataset, tokenizer, args, rank, world, device) -> tuple[float, list]:
    """Share of held-out rows with a reference answer that the exported folder answers exactly (greedy)."""
    from transformers import AutoModelForCausalLM
    rows = (r for r in dataset.select_columns(["messages_json", "answer"]) if r["answer"] is not None)
    rows = list(itertools.islice(rows, args.eval_samples))
    if not rows:
        return None, []
    mine = rows[rank::world]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    prompts = [json.loads(r["messages_json"])[:-1] for r in mine]
    answers = sorted(sample_responses(model, tokenizer, prompts, args.max_new_tokens))
    samples = [{"prompt": p, "answer": a.text, "reference": r["answer"], "correct": data.final_answer(a.text) == r["answer"]}
               for p, a, r in zip(prompts, answers, mine)]
    right = sum(s["correct"] for s in samples)
    return all_sum([right], device)[0] / len(rows), samples


# ---------------------------------------------------------------------------------------------- main
def main(argv=None) -> dict:
    args = parse(argv)
    started, out = time.time(), Path(args.output)
    rank, world, device = init_distributed()
    log = lambda *a: print(*a, file=sys.stderr, flush=True) if rank == 0 else None

    tokenizer, template = load_tokenizer(args)

    prepare = functools.partial(prepare_rows, args=args, tokenizer=tokenizer, template=template, rank=rank,
                                loss_on=args.loss_on)
    train_set, data_key = prepare(args.data, max_examples=args.max_examples)
    held_out = prepare(args.eval_data)[0] if args.eval_data else None
    if not args.overwrite:
        check_resume(args, out, world, data_key)
    rows = data.pack(train_set["length"], args.max_length, args.packing)
    train = Packed(train_set, rows, args.loss_norm)
    if held_out is not None:
        held = Packed(held_out, data.pack(held_out["length"], args.max_length, "bfd"), "token")
    check_rows(len(train), world)
    n_targets = np.asarray(train_set["n_targets"], dtype=np.int64).sum()
    if train.targets.sum() != n_targets:
        raise RuntimeError(f"packing lost targets: {train.targets.sum()} of {n_targets}")
    fill = train.tokens.sum() / (len(train) * args.max_length)
    log(f"{args.packing}: {len(train_set)} documents in {len(train)} rows of {args.max_length}, {fill:.2%} "
        f"full; {train.targets.sum()} target tokens, each in exactly one row")

    per_epoch = math.ceil(len(train) / args.batch_size)
    steps = args.max_steps or math.ceil(per_epoch * args.epochs)
    eval_every = args.eval_every or max(1, steps // 4)
    log(f"{steps} steps = {args.epochs:g} epochs of ceil({len(train)} rows / {args.batch_size})")

    model = load_model(args, tokenizer, tokenizer.convert_tokens_to_ids(list(template.new_tokens)))
    if args.train_embeddings == "new":
        ids = tokenizer.convert_tokens_to_ids(sorted({template.end_of_turn, *template.new_tokens}))
        for w in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            train_rows_only(w, ids)
    n_parameters = sum(p.numel() for p in model.parameters())
    engine, ds_config = make_engine(args, LogProbs(model), world)
    engine.train()
    run = Run(args, engine, ds_config, "sft", steps, rank, world, data=data_key, parameters=n_parameters,
              rows=len(train))
    log(f"{n_parameters:,} parameters, {world} rank(s), {args.dtype}, ZeRO {args.zero}, from step {run.first}")
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    log(f"attention by {pick_backend(device, next(model.parameters()).dtype, softcap)}; an untrained model "
        f"starts near ln V = {math.log(len(tokenizer)):.3f} nats a target")
    loss = run.history[-1]["loss"] if run.history else None
    for step in range(run.first, steps):
        # --- the step: every rank takes its micro-batches of the same global rows -----------------
        epoch, i = divmod(step, per_epoch)
        order = data.permutation(len(train), args.seed, epoch)
        wanted = order[i * args.batch_size:(i + 1) * args.batch_size]
        total = train.weights[wanted].sum() or 1.0          # the divisor, known before any backward
        mine = micro_batches(train.tokens[wanted].tolist(), args.micro_tokens, world)[rank]
        loss_sum = torch.zeros((), device=device)
        for m, micro in enumerate(mine):
            batch, weight = train.batch([int(wanted[j]) for j in micro], device)
            logps = engine(batch)                                                   # (N,) nats
            loss = sft_loss(logps, weight, total)
            engine.set_gradient_accumulation_boundary(m == len(mine) - 1)
            engine.backward(loss * world, scale_wrt_gas=False)                      # DeepSpeed averages ranks
            loss_sum += loss.detach()
        lr = learning_rate(step, steps, args.lr, args.warmup, args.schedule)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        loss, stopping = all_sum([loss_sum.item(), len(run.stop)], device)
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {step + 1}: loss is {loss} on rows {wanted.tolist()}; weights "
                                     "of the last checkpoint are intact. Lower --lr or look at these rows")
        norm = clip_and_step(engine, args.zero)
        # -------------------------------------------------------------------------------------------
        tokens = int(train.tokens[wanted].sum())
        now = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens,
               "targets": int(train.targets[wanted].sum()), "tokens_per_s": run.tokens_per_s(tokens),
               "gib": peak_gib(), "flops": useful_flops(model, tokens, train.targets[wanted].sum(),
                                                        train.attended[wanted].sum())}
        if held_out is not None and ((step + 1) % eval_every == 0 or step + 1 == steps):
            now["eval_loss"] = evaluate_loss(engine, held, args.micro_tokens, rank, world)
        run.record(now)
        if (stopped := run.save_if_due(step + 1, stopping)) is not None:
            return stopped
    run.close()
    seconds = time.time() - run.clock

    export(engine, tokenizer, template.end_of_turn_id, out, args.export_dtype, rank)
    result = {"loss": loss, "steps": steps, "tokens_per_s": run.seen / seconds if seconds else None,
              "targets": int(train.targets.sum()), "fill": float(fill), "seconds": time.time() - started,
              "exact_match": None, "cumulative": run.total(), "output": str(out)}
    if held_out is not None:
        eval_loss = evaluate_loss(engine, held, args.micro_tokens, rank, world)
        unigram = unigram_nats(train_set, held_out, len(tokenizer))
        size = sum(len(tokenizer.decode(np.asarray(r["input_ids"])[np.asarray(r["targets"])],
                                        skip_special_tokens=True).encode()) for r in held_out)
        bits = held.targets.sum() / math.log(2) / max(1, size)
        result |= {"eval_loss": eval_loss, "bits_per_byte": eval_loss * bits,
                   "unigram_bits_per_byte": unigram * bits}
        if args.eval_samples:
            result["exact_match"], samples = exact_match(out, held_out, tokenizer, args, rank, world, device)
            if rank == 0:
                write_rows(out / "samples.jsonl", samples)
    result["seconds"] = time.time() - started
    return run.finish(result)


def reporters(args, out: Path) -> list:
    """One function a --report-to: metrics dict -> None. Imported only when asked for."""
    made = []
    if "wandb" in args.report_to:
        import wandb
        wandb.init(dir=out, config=vars(args))
        made.append(lambda m: wandb.log(m, step=m["step"]))
    if "tensorboard" in args.report_to:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(out)
        made.append(lambda m: [board.add_scalar(k, v, m["step"]) for k, v in m.items() if v is not None])
    return made


def run_main(main) -> None:
    """A script's entry: the result as the last line of stdout, an expected error as one message."""
    try:
        result = main()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if result:
        print(json.dumps(result), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
