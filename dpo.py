"""Stage 2, offline preference learning by DPO (LIONs, arXiv 2407.06542, section 3; Rafailov et al., 2305.18290).

    r(x, y) = beta (log pi(y|x) - log pi_ref(y|x)),    log pi(y|x) = sum_i log pi(y_i | x, y_<i)
    L       = - sum over pairs of log sigmoid( r(x, y_w) - r(x, y_l) )  /  pairs of the optimiser step

No padding anywhere, and y_w and y_l share one pass over x (kernels.layout); log pi_ref is computed once,
before training, through the same forward, and cached by content: no reference model is in memory while
training. What memory flags and the number of GPUs change is rounding.

Reads   preference pairs (--data, see data.py), the SFT model (--model), a reference (--ref).
Writes  --output: an ordinary Hugging Face folder, run.json, metrics.jsonl, curves.png, ds_config.json.

    python dpo.py                                                        # the demo, after python sft.py
    python dpo.py --model runs/gemma-2b-sft                              # one GPU
    deepspeed dpo.py --model runs/llama-3-8b-sft                         # all GPUs
    python dpo.py --model RUN --ref SFT --output FURTHER                 # train a finished run further
    python dpo.py sweep --beta 0.01 0.05 0.1 0.3 0.5 --max-pairs 1000 10000

Differs from the paper
 1. Chosen and rejected share one pass over their prompt (--no-share-prompt: the paper's plain unpadded batch).
 2. Log-probs are float32 at target positions only; the release pads again and builds (2B, S, V) logits.
 3. A pair that is too long loses the prompt's beginning, no more than needed, never below
    --max-prompt-length tokens, then the end of its answers; the release cuts every long prompt to the limit.

Step 0 with the policy as reference: loss ln 2 = 0.6931, margin 0, accuracy 0. The demo ends near 0.51, held out.
"""
from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import sft
from kernels import Group, LogProbs, layout, pick_backend, sequence_logps

PRESETS = {  # the paper's table as argparse defaults
    "demo": dict(model="runs/sft", data=["demo-pairs:train"], eval_data=["demo-pairs:test"],
                 eval_prompts=["demo:test"], batch_size=32, max_length=512, max_prompt_length=256, lr=1e-5,
                 schedule="linear", beta=0.5, chat_template="tokenizer", eval_samples=400, output="runs/dpo"),
    "gemma-2b": dict(model="runs/gemma-2b-sft", data=["lion-dpo-gemma"], epochs=2,
                     batch_size=128, max_length=2048, max_prompt_length=512, lr=5e-7, schedule="linear", beta=0.05,
                     zero=3, gradient_checkpointing=True, chat_template="tokenizer", output="runs/gemma-2b-dpo"),
    "llama-3-8b": dict(model="runs/llama-3-8b-sft", data=["lion-dpo-llama"],
                       epochs=1, batch_size=128, max_length=2048, max_prompt_length=1024, lr=5e-7,
                       schedule="cosine", beta=0.01, zero=3, gradient_checkpointing=True, seed=27,
                       chat_template="tokenizer", output="runs/llama-3-8b-dpo")}
CURVES = {"loss": "loss (ln 2 where policy = reference)", "margin": "reward margin r_w - r_l", "accuracy": "share of pairs r_w > r_l",
          "ratio_w": "log pi/pi_ref of chosen (nats)", "ratio_l": "log pi/pi_ref of rejected (nats)",
          "grad_norm": "gradient norm"}
METRICS = ("loss", "margin", "accuracy", "reward_w", "reward_l", "logp_w", "logp_l", "ratio_w", "ratio_l")


# --------------------------------------------------------------------------------------------- maths
def dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta: float):
    """The DPO loss of P pairs, summed (Rafailov et al. 2305.18290, eq. 7; LIONs section 3).

        L = - sum_p log sigmoid( beta (log pi(y_w|x) - log pi_ref(y_w|x)) - beta (log pi(y_l|x) - log pi_ref(y_l|x)) )

    All (P,) float32 nats, sums over an answer's tokens. Returns a scalar: divide it once by the step's
    pairs. Check value: policy = reference gives P ln 2.
    """
    r_w, r_l = beta * (logp_w - ref_logp_w), beta * (logp_l - ref_logp_l)       # (P,) implicit rewards
    return -F.logsigmoid(r_w - r_l).sum()


def dpo_metrics(logp_w, logp_l, ref_logp_w, ref_logp_l, beta: float):
    """Sums over P pairs of METRICS, (9,) float64: loss, margin r_w - r_l, accuracy [r_w > r_l], rewards
    r = beta log pi/pi_ref, log-probs and log-ratios log pi/pi_ref of both answers (nats). Policy =
    reference gives P ln 2, then zeros for margin, accuracy, rewards and ratios."""
    logp_w, logp_l, ref_logp_w, ref_logp_l = (x.detach().double() for x in (logp_w, logp_l, ref_logp_w, ref_logp_l))
    ratio_w, ratio_l = logp_w - ref_logp_w, logp_l - ref_logp_l                 # (P,)
    margin = beta * (ratio_w - ratio_l)                                         # (P,)
    return torch.stack([x.sum() for x in (
        -F.logsigmoid(margin), margin, (margin > 0).double(), beta * ratio_w, beta * ratio_l, logp_w, logp_l,
        ratio_w, ratio_l)])


# ------------------------------------------------------------------------------------------- the pairs
class Pairs:
    """Prepared preference rows and, once known, their reference log-probs: `pairs.ref` (P, 2) float32."""

    def __init__(self, dataset, share: bool):
        self.rows, self.share, self.ref = dataset.with_format("numpy", columns=list(data.PAIR_LISTS)), share, None
        table = dataset.with_format("arrow")[:]
        size = lambda k: table[k].combine_chunks().value_lengths().to_numpy().astype(np.int64)
        x, w, l = (size(k) for k in ("prompt", "chosen", "rejected"))
        self.unshared = int((x == 0).sum())
        self.tokens = x + w + l if share else 2 * x + w + l         # laid out, a pair
        self.targets = np.asarray(dataset["n_targets"], dtype=np.int64)
        seen = lambda n: n * (n + 1) / 2
        self.attended = seen(x + w) + seen(x + l) - (seen(x) if share else 0)   # (query, key) pairs

    def __len__(self):
        return len(self.tokens)

    def batch(self, wanted: list[int], device):
        """Pairs -> one Batch whose answers are y_w, y_l, y_w, .. and their (P, 2) reference log-probs."""
        groups = []
        for i in wanted:
            r = self.rows[int(i)]
            groups.append(Group(r["prompt"].tolist(), [r["chosen"].tolist(), r["rejected"].tolist()],
                                [r["chosen_targets"].tolist(), r["rejected_targets"].tolist()]))
        ref = None if self.ref is None else torch.from_numpy(self.ref[wanted]).to(device)
        return layout(groups, share=self.share).to(device), ref

    def keys(self) -> list[bytes]:
        """16 bytes a pair: a hash of its ids and targets."""
        out = []
        for r in self.rows:
            digest = hashlib.blake2b(digest_size=16)
            for k in data.PAIR_LISTS:
                digest.update(len(r[k]).to_bytes(4, "little") + np.ascontiguousarray(r[k]).tobytes())
            out.append(digest.digest())
        return out


def pair_logps(logp_module, batch, n: int):
    """log pi(y|x) of n pairs: (n, 2) float32 nats, chosen then rejected."""
    return sequence_logps(logp_module(batch), batch.sequence, 2 * n).view(n, 2)


# --------------------------------------------------------------------------- reference log-probs, once
def weights_hash(model: str) -> str:
    """A hash of a model folder's weights and config, by content; a Hub id is looked up in its local copy."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        folder = Path(snapshot_download(model, allow_patterns=["*.safetensors", "config.json"]))
    digest = hashlib.sha256()
    files = sorted(p for p in folder.glob("*") if p.suffix == ".safetensors" or p.name == "config.json")
    if not any(p.suffix == ".safetensors" for p in files):
        raise ValueError(f"{model}: no .safetensors file there; a model folder of sft.py or a Hub id is needed")
    for path in files:
        digest.update(path.name.encode())
        data.hash_file(digest, path)
    return digest.hexdigest()


def read_reference(folder: Path) -> dict[bytes, np.ndarray]:
    """All rows of a reference folder whose checksum holds and whose values are finite: key -> (2,) float32."""
    from safetensors import SafetensorError, safe_open
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "numpy") as f:
                keys, logps, checksum = f.get_tensor("keys"), f.get_tensor("logps"), f.metadata()["sha256"]
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            print(f"{path}: damaged ({error}); its rows are computed again", file=sys.stderr)
            continue
        if hashlib.sha256(keys.tobytes() + logps.tobytes()).hexdigest() != checksum:
            print(f"{path}: checksum does not hold; its rows are computed again", file=sys.stderr)
            continue
        good = np.isfinite(logps).all(1)
        found.update((k.tobytes(), v) for k, v in zip(keys[good], logps[good]))
    return found


def write_reference(path: Path, rows: dict[bytes, np.ndarray]) -> None:
    from safetensors.numpy import save_file
    keys = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 16)
    logps = np.stack(list(rows.values())).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(".writing")
    save_file({"keys": keys, "logps": logps}, tmp, {"sha256": hashlib.sha256(
        keys.tobytes() + logps.tobytes()).hexdigest()})
    tmp.replace(path)


def reference_logps(args, name: str, weights: str, pairs: Pairs, tokenizer, new_ids, rank: int, world: int, device, log,
                    save_seconds: float = 30.0) -> None:
    """Fill pairs.ref with log pi_ref of every pair, from the cache where it is there, else computed.

    weights: `weights_hash(name)`. The file's key: the reference's weights, dtype, back end, layout and added tokens; a row's key: its ids
    and targets. Ranks take disjoint missing rows and write parts as they go, so that a killed pass goes
    on; at the end the file is whole or the run stops. Raises FloatingPointError naming rows whose log-probs are not
    finite."""
    from tqdm import tqdm
    from transformers import AutoConfig
    device_dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    config = AutoConfig.from_pretrained(name).get_text_config()
    backend = pick_backend(device, device_dtype, getattr(config, "attn_logit_softcapping", None))
    decides = [weights, args.dtype, backend, device.type, "shared" if pairs.share else "plain", new_ids]
    folder = Path(args.cache_dir or Path.home() / ".cache" / "lions") / "reference" / hashlib.sha256(
        json.dumps(decides).encode()).hexdigest()[:32]
    keys = pairs.keys()
    found = read_reference(folder)
    torch.distributed.barrier()                             # all have read before anyone writes
    missing = [i for i, k in enumerate(keys) if k not in found]
    log(f"reference {name}: {len(keys) - len(missing)} of {len(keys)} pairs in {folder}, {len(missing)} to compute")
    if missing:
        missing.sort(key=lambda i: -pairs.tokens[i])
        mine, made, saved = missing[rank::world], {}, time.time()
        model = sft.load_model(argparse_with(args, model=name, gradient_checkpointing=False), tokenizer, new_ids)
        logps = LogProbs(model.to(device, device_dtype).eval())
        bar = tqdm(total=len(mine), disable=rank > 0, unit="pair", desc="reference", dynamic_ncols=True)
        limit, a = args.micro_tokens, 0
        with torch.no_grad():
            while a < len(mine):
                b, load = a + 1, pairs.tokens[mine[a]]
                while b < len(mine) and load + pairs.tokens[mine[b]] <= limit:
                    load, b = load + pairs.tokens[mine[b]], b + 1
                got = pair_logps(logps, pairs.batch(mine[a:b], device)[0], b - a).float().cpu().numpy()
                if not np.isfinite(got).all():
                    raise FloatingPointError(f"reference {name}: log-probs of rows {mine[a:b]} are not finite; nothing of "
                                             "them was kept. Look at these rows, or at the reference's weights")
                made.update((keys[i], v) for i, v in zip(mine[a:b], got))
                bar.update(b - a)
                a = b
                if time.time() - saved > save_seconds or a == len(mine):
                    write_reference(folder / f"part-{uuid.uuid4().hex}.safetensors", made)
                    made, saved = {}, time.time()
        bar.close()
        del model, logps
        if device.type == "cuda":
            torch.cuda.empty_cache()
        torch.distributed.barrier()
        if rank == 0:                                       # one file; then its parts may go
            old = sorted(folder.glob("part-*.safetensors"))
            write_reference(folder / "reference.safetensors", read_reference(folder))
            for part in old:
                part.unlink()
        torch.distributed.barrier()
        found = read_reference(folder)
    absent = [i for i, k in enumerate(keys) if k not in found]
    if absent:
        raise ValueError(f"reference {folder}: {len(absent)} of {len(keys)} pairs are missing (first: row {absent[0]}); "
                         "another process may have deleted them. Run the same command again")
    pairs.ref = np.stack([found[k] for k in keys])          # (P, 2)


def argparse_with(args, **changed):
    """A copy of parsed flags with some changed."""
    return type(args)(**{**vars(args), **changed})


def other_tokens(dataset, args, tokenizer, template) -> object:
    """The same pairs through another model's template and tokens: rows for its reference pass."""
    import datasets
    settings = dict(max_length=args.max_length, max_prompt_length=args.max_prompt_length)
    rows = {k: [] for k in (*data.PAIR_LISTS, "n_targets")}
    for i, text in enumerate(dataset["messages_json"]):
        *sides, unfinished = json.loads(text)
        try:
            e = data.encode_pair(data.Pair(*sides, unfinished=unfinished), tokenizer, template, **settings)
        except ValueError as error:
            raise ValueError(f"--ref {args.ref}: its tokenizer cannot take pair {i} (source {dataset[i]['source']}, row "
                             f"{dataset[i]['row']}): {error}. Take that row out, or another reference") from None
        for k in data.PAIR_LISTS:
            rows[k].append(getattr(e, k))
        rows["n_targets"].append(sum(e.chosen_targets) + sum(e.rejected_targets))
    features = datasets.Features(n_targets=datasets.Value("int32"), **{
        k: datasets.List(datasets.Value("bool" if "targets" in k else "int32")) for k in data.PAIR_LISTS})
    return datasets.Dataset.from_dict(rows, features=features)


# ------------------------------------------------------------------------------------------- the flags
def parser():
    p = sft.stage_parser(__doc__, PRESETS)
    p.set_defaults(chat_template="tokenizer", batch_size=128, lr=5e-7, schedule="linear")
    add = p.add_argument_group("stage 2").add_argument
    add("--beta", type=float, default=0.1, help="strength of the pull to the reference; the paper sweeps 0.01 .. 0.5")
    add("--ref", help="reference model, folder or Hub id; another tokenizer is fine. None: --model itself")
    add("--max-pairs", type=int, help="first N pairs of one seeded permutation; None: all")
    add("--max-prompt-length", type=int, default=512, help="prompt tokens that stay when a pair is too long")
    add("--min-gap", type=float, help="least score_chosen - score_rejected of a pair; None: scores are not looked at")
    add("--no-share-prompt", action="store_true", help="x twice, once for each answer: the paper's layout")
    add("--eval-prompts", nargs="+", help="conversations whose reference answers exact match is taken on")
    return p


def check_flags(args) -> list[str]:
    why = []
    args.output = args.output or "runs/dpo"
    if not args.beta > 0:
        why.append(f"--beta {args.beta}: must be above 0; at 0 every reward is 0 and nothing is learnt")
    if not 0 < args.max_prompt_length < args.max_length:
        why.append(f"--max-prompt-length {args.max_prompt_length}: must lie in 1..{args.max_length - 1}, below "
                   "--max-length, so that answers have room")
    if args.model is None:
        why.append("--model: needed, the SFT model to start from")
    elif args.model == "runs/sft" and not Path(args.model).is_dir():
        why.append("--model runs/sft: no such folder; run python sft.py first")
    elif args.model == "demo":
        why.append("--model demo: DPO starts from a trained model; run python sft.py and name its --output")
    for flag in ("model", "ref"):
        name = getattr(args, flag)
        if name and name.startswith((".", "/", "runs/")) and not Path(name).is_dir() and "no such folder" not in str(why):
            why.append(f"--{flag} {name}: no such folder")
    if args.ref and Path(args.ref).is_dir() and not list(Path(args.ref).glob("*.safetensors")):
        why.append(f"--ref {args.ref}: no .safetensors file there; name a model folder")
    return why


# ---------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate_pairs(engine, pairs: Pairs, beta: float, limit: int, rank: int, world: int) -> dict:
    """Means of METRICS over held-out pairs, rows split over ranks; names begin with eval_."""
    engine.eval()
    sums = torch.zeros(len(METRICS), dtype=torch.float64, device=engine.device)
    for micro in sft.micro_batches(pairs.tokens.tolist(), limit, world)[rank]:
        batch, ref = pairs.batch(micro, engine.device)
        logps = pair_logps(engine, batch, len(micro))
        sums += dpo_metrics(*logps.unbind(1), *ref.unbind(1), beta) if len(micro) else 0
    engine.train()
    return {"eval_" + k: v / len(pairs) for k, v in zip(METRICS, sft.all_sum(sums.tolist(), engine.device))}


# ---------------------------------------------------------------------------------------------- main
def main(argv=None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["sweep"]:
        return sweep(argv[1:])
    return train_on_pairs(sft.parse(argv, parser, PRESETS, check_flags))


def train_on_pairs(args) -> dict:
    """A whole DPO run from checked flags (`sft.parse`); the result that main prints, {} on ranks above 0."""
    started, out = time.time(), Path(args.output)
    rank, world, device = sft.init_distributed()
    log = lambda *a: print(*a, file=sys.stderr, flush=True) if rank == 0 else None
    tokenizer, template = sft.load_tokenizer(args)
    new_ids = tokenizer.convert_tokens_to_ids(list(template.new_tokens))

    rows_of = functools.partial(sft.prepare_rows, args=args, tokenizer=tokenizer, template=template, rank=rank)
    pairs_of = functools.partial(rows_of, pairs=True, max_prompt_length=args.max_prompt_length, min_gap=args.min_gap)
    train_set, data_key = pairs_of(args.data, max_examples=args.max_pairs)
    held_set = pairs_of(args.eval_data)[0] if args.eval_data else None
    prompts = rows_of(args.eval_prompts)[0] if args.eval_prompts else None
    weights = weights_hash(args.model)
    ref_weights = weights_hash(args.ref) if args.ref else weights
    own_ref = ref_weights == weights
    data_key += weights[:8] + ("" if own_ref else ref_weights[:8])
    if not args.overwrite:
        sft.check_resume(args, out, world, data_key)
    share = not args.no_share_prompt
    train, held = Pairs(train_set, share), Pairs(held_set, share) if held_set is not None else None
    sft.check_rows(len(train), world)
    if args.max_pairs and len(train) < args.max_pairs:
        log(f"--max-pairs {args.max_pairs}: only {len(train)} pairs are there; all of them are used")
    log(f"{len(train)} pairs, {train.tokens.sum():,} tokens laid out, {train.unshared} without a common prefix")

    # --- log pi_ref, once ------------------------------------------------------------------------
    ref_name = args.ref or args.model
    ref_tokenizer, ref_template = sft.load_tokenizer(argparse_with(args, model=ref_name))
    same = own_ref or ref_tokenizer.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str() \
        and ref_tokenizer.chat_template == tokenizer.chat_template
    if not same:
        log(f"--ref {args.ref} has another tokenizer or template: the same messages go through its own")
    ref_new = ref_tokenizer.convert_tokens_to_ids(list(ref_template.new_tokens))
    for pairs, rows in ((train, train_set), (held, held_set)):
        if rows is None:
            continue
        seen = pairs if same else Pairs(other_tokens(rows, args, ref_tokenizer, ref_template), share)
        reference_logps(args, ref_name, ref_weights, seen, ref_tokenizer, ref_new, rank, world, device, log)
        pairs.ref = seen.ref

    per_epoch = math.ceil(len(train) / args.batch_size)
    steps = args.max_steps or math.ceil(per_epoch * args.epochs)
    eval_every = args.eval_every or max(1, steps // 4)
    log(f"{steps} steps = {args.epochs:g} epochs of ceil({len(train)} pairs / {args.batch_size}), beta {args.beta:g}")
    model = sft.load_model(args, tokenizer, new_ids)
    n_parameters = sum(p.numel() for p in model.parameters())
    engine, ds_config = sft.make_engine(args, LogProbs(model), world)
    engine.train()
    run = sft.Run(args, engine, ds_config, "dpo", steps, rank, world, data=data_key, parameters=n_parameters,
                  pairs=len(train), ref=ref_name)
    log(f"{n_parameters:,} parameters, {world} rank(s), {args.dtype}, ZeRO {args.zero}, from step {run.first}; with the "
        f"policy as reference the loss starts at ln 2 = {math.log(2):.4f}")
    now = run.history[-1] if run.history else {}
    for step in range(run.first, steps):
        # --- the step: every rank takes its micro-batches of the same global pairs ------------------
        epoch, i = divmod(step, per_epoch)
        order = data.permutation(len(train), args.seed, epoch)
        wanted = order[i * args.batch_size:(i + 1) * args.batch_size]
        mine = sft.micro_batches(train.tokens[wanted].tolist(), args.micro_tokens, world)[rank]
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        for m, micro in enumerate(mine):
            batch, ref = train.batch([int(wanted[j]) for j in micro], device)
            logps = pair_logps(engine, batch, len(micro))                           # (P, 2) nats
            (logp_w, logp_l), (ref_w, ref_l) = logps.unbind(1), ref.unbind(1)       # (P,) each
            loss = dpo_loss(logp_w, logp_l, ref_w, ref_l, args.beta) / len(wanted)  # pairs of the whole step
            engine.set_gradient_accumulation_boundary(m == len(mine) - 1)
            engine.backward(loss * world, scale_wrt_gas=False)                      # DeepSpeed averages ranks
            sums += dpo_metrics(logp_w, logp_l, ref_w, ref_l, args.beta)
        lr = sft.learning_rate(step, steps, args.lr, args.warmup, args.schedule)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        *sums, stopping = sft.all_sum([*sums.tolist(), len(run.stop)], device)
        now = {"step": step + 1} | {k: v / len(wanted) for k, v in zip(METRICS, sums)}
        if not math.isfinite(now["loss"]):
            raise FloatingPointError(f"step {step + 1}: loss is {now['loss']} on pairs {wanted.tolist()}; weights of "
                                     "the last checkpoint are intact. Lower --lr or look at these pairs")
        if step == 0 and own_ref:
            check_step_0(now["loss"], args.dtype)
        norm = sft.clip_and_step(engine, args.zero)
        # -------------------------------------------------------------------------------------------
        tokens = int(train.tokens[wanted].sum())
        now |= {"lr": lr, "grad_norm": norm, "tokens": tokens, "targets": int(train.targets[wanted].sum()),
                "tokens_per_s": run.tokens_per_s(tokens), "gib": sft.peak_gib(),
                "flops": sft.useful_flops(model, tokens, train.targets[wanted].sum(), train.attended[wanted].sum())}
        if held is not None and ((step + 1) % eval_every == 0 or step + 1 == steps):
            now |= evaluate_pairs(engine, held, args.beta, args.micro_tokens, rank, world)
        run.record(now)
        if (stopped := run.save_if_due(step + 1, stopping)) is not None:
            return stopped
    run.close()
    seconds = time.time() - run.clock

    sft.export(engine, tokenizer, template.end_of_turn_id, out, args.export_dtype, rank)
    result = {**{k: now.get(k) for k in METRICS}, **{k: v for k, v in now.items() if k.startswith("eval_")},
              "pairs": len(train), "steps": steps, "beta": args.beta, "exact_match": None,
              "tokens_per_s": run.seen / seconds if seconds else None, "cumulative": run.total(), "output": str(out)}
    if prompts is not None and args.eval_samples:
        result["exact_match"], samples = sft.exact_match(out, prompts, tokenizer, args, rank, world, device)
        if rank == 0:
            sft.write_rows(out / "samples.jsonl", samples)
    result["seconds"] = time.time() - started
    return run.finish(result, CURVES)


def check_step_0(loss: float, dtype: str) -> None:
    """With the policy as reference the first loss is ln 2, or something differs between the two."""
    allowed = 1e-5 if dtype == "fp32" else 0.01
    if abs(loss - math.log(2)) > allowed:
        raise ValueError(
            f"step 0: the loss is {loss:.6f}, not ln 2 = {math.log(2):.6f} within {allowed:g}, though the policy is the "
            "reference. Likely causes: dropout is on, the model's forward is not deterministic, another back end or "
            "dtype made the reference, or its cache was changed by hand (delete it: --cache-dir)")


# --------------------------------------------------------------------------------------------- sweep
def sweep(argv) -> dict:
    """One run a beta and number of pairs, nested subsets, one reference pass; finished runs are kept.
    Writes sweep.json, sweep.md and sweep.png into --output. Never picks a beta: the paper finds that
    loss, margin and accuracy do not tell the best model."""
    import argparse
    p = argparse.ArgumentParser(prog="dpo.py sweep", description=sweep.__doc__, allow_abbrev=False,
                                epilog="All other flags are those of dpo.py.")
    p.add_argument("--beta", type=float, nargs="+", default=[0.01, 0.05, 0.1, 0.3, 0.5])
    p.add_argument("--max-pairs", type=int, nargs="+", required=True)
    p.add_argument("--output", default="runs/sweep")
    p.add_argument("--scores", help="JSON file {run name: judged score}; None: exact match where a run has it")
    wanted, rest = p.parse_known_args(argv)
    if "--overwrite" in rest:
        raise ValueError("--overwrite: a sweep keeps finished runs; delete its --output or name another")
    args = {}
    for n in sorted(wanted.max_pairs, reverse=True):        # the largest first: one reference pass serves all
        for beta in wanted.beta:
            name = f"beta-{beta:g}-pairs-{n}"
            args[name] = [*rest, "--beta", str(beta), "--max-pairs", str(n), "--output", f"{wanted.output}/{name}"]
            sft.parse(args[name], parser, PRESETS, check_flags)
    scores = json.loads(Path(wanted.scores).read_text()) if wanted.scores else {}
    unknown = sorted(set(scores) - set(args))
    if unknown:
        raise ValueError(f"--scores {wanted.scores}: no such run: {', '.join(unknown)}; the runs are {', '.join(args)}")
    runs, rank = {}, 0
    for k, (name, flags) in enumerate(args.items(), 1):
        path = Path(wanted.output) / name / "run.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        print(f"sweep: run {k} of {len(args)}, {name}{' (finished)' if old.get('result') else ''}", file=sys.stderr)
        if old.get("result"):
            changed = sft.changed_flags(old["flags"], sft.parse(flags, parser, PRESETS, check_flags))
            if changed:
                raise ValueError(f"{path.parent} was finished with other settings; name another --output:\n" +
                                 "\n".join(changed))
            runs[name] = old["result"]
        else:
            runs[name] = main(flags)
            rank = torch.distributed.get_rank()
            if rank == 0 and runs[name].get("stopped"):
                return runs[name] | {"run": name}
            if rank and runs[name] == {} and not (path.exists() and json.loads(path.read_text()).get("result")):
                return {}
        if rank == 0:
            runs[name]["score"] = scores.get(name, runs[name].get("exact_match"))
    if rank:
        return {}
    out = Path(wanted.output)
    (out / "sweep.md").write_text(sweep_table(runs))
    print(sweep_table(runs), file=sys.stderr)
    plot_sweep(out / "sweep.png", runs)
    sft.write_json(out / "sweep.json", runs)
    return {"runs": len(runs), "output": str(out), "table": str(out / "sweep.md"), "plot": str(out / "sweep.png"),
            "scores": {name: r["score"] for name, r in runs.items()}}


SWEPT = {"loss": "loss", "margin": "margin", "accuracy": "accuracy", "ratio_w": "log pi/pi_ref chosen",
         "ratio_l": "log pi/pi_ref rejected"}


def swept(result: dict, key: str):
    """A run's figure: on held-out pairs where there are some, else of its last step."""
    return result.get("eval_" + key, result.get(key))


def sweep_table(runs: dict) -> str:
    held = any("eval_loss" in r for r in runs.values())
    lines = ["| beta | pairs | steps | " + " | ".join(SWEPT.values()) + " | score |", "|" + "---|" * (len(SWEPT) + 4)]
    for r in sorted(runs.values(), key=lambda r: (r["pairs"], r["beta"])):
        score = "-" if r["score"] is None else f"{r['score']:.4g}"
        lines.append(f"| {r['beta']:g} | {r['pairs']} | {r['steps']} | " +
                     " | ".join(f"{swept(r, k):.4f}" for k in SWEPT) + f" | {score} |")
    where = "held-out pairs" if held else "the last step's pairs (no --eval-data)"
    return "\n".join(lines) + f"\n\nFigures on {where}. The loss does not tell the best model: choose by score.\n"


def plot_sweep(path: Path, runs: dict) -> None:
    """Each figure over beta, one line a number of pairs."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    panels = {**SWEPT, "score": "score (task or judge)"}
    held = any("eval_loss" in r for r in runs.values())
    for ax, (key, title) in zip(axes.flat, panels.items()):
        for n in sorted({r["pairs"] for r in runs.values()}):
            points = sorted((r["beta"], r["score"] if key == "score" else swept(r, key)) for r in runs.values()
                            if r["pairs"] == n and (key != "score" or r["score"] is not None))
            if points:
                ax.plot(*zip(*points), "o-", ms=4, label=f"{n:,} pairs")
        betas = sorted({r["beta"] for r in runs.values()})
        ax.set(xscale="log", xlabel="beta", title=title)
        ax.set_xticks(betas, [f"{b:g}" for b in betas])
        ax.minorticks_off()
        if not ax.lines:
            ax.text(0.5, 0.5, "no score given", transform=ax.transAxes, ha="center")
    axes[0, 0].legend()
    figure.suptitle(f"DPO over beta, on {'held-out pairs' if held else 'the last training step'}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sft.run_main(main)
