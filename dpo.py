"""Stage 2, offline preference learning by DPO (LIONs, 2407.06542, section 3; Rafailov, 2305.18290).

    r(x, y) = beta (log pi(y|x) - log pi_ref(y|x)),    log pi(y|x) = sum_i log pi(y_i | x, y_<i)
    L       = - sum over pairs of log sigmoid( r(x, y_w) - r(x, y_l) )  /  pairs of the step

Nothing is padded, and y_w and y_l share one pass over x (kernels.layout). log pi_ref is computed
once, before training, through the same forward, and cached by content: no reference model is in
memory while training. Memory flags and the number of GPUs change results only by rounding.

Reads   preference pairs (--data, see data.py), the SFT model (--model), a reference (--ref).
Writes  --output: an ordinary Hugging Face folder, run.json, metrics.jsonl, curves.png.

    python dpo.py                                                  # the demo, after python sft.py
    python dpo.py --model runs/gemma-2b-sft                        # one GPU
    deepspeed dpo.py --model runs/llama-3-8b-sft                   # all GPUs
    python dpo.py --model RUN --ref SFT --output FURTHER           # train a finished run further
    for b in 0.01 0.05 0.1; do python dpo.py --beta $b --output runs/beta-$b; done   # a sweep

Differs from the paper
 1. Chosen and rejected share one pass over their prompt; --no-share-prompt: the plain layout.
 2. Log-probs are float32 at target positions only. The release pads again and builds (2B, S, V)
    logits.
 3. A pair that is too long loses the beginning of its prompt, as little as needed, down to
    --max-prompt-length tokens, then the end of its answers. The release cuts every long prompt.

Step 0 with the policy as reference: loss ln 2 = 0.6931, margin 0, accuracy 0. The demo ends near
0.54, held out.
"""
from __future__ import annotations

import functools
import hashlib
import json
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
from data import PAIR_LISTS, growing, positive, read_growing
from kernels import Group, LogProbs, layout, sequence_logps
from sft import (Run, all_sum, attention_backend, check_finite, check_machines, check_resume,
                 clip_and_step, device, due, export, free_memory, init_distributed, laid_out,
                 load_model, log, make_engine, micro_batches, own_folder, parse, plan_steps,
                 prepare_rows, published, run_main, set_learning_rate, stage_parser)

PRESETS = {  # the paper's table as argparse defaults
    "demo": dict(model="runs/sft", data=["demo-pairs:train"], eval_data=["demo-pairs:test"],
                 batch_size=32, max_length=512, max_prompt_length=256, lr=1e-5, beta=0.5,
                 output="runs/dpo"),
    "gemma-2b": dict(model="runs/gemma-2b-sft", data=["lion-dpo-gemma"], epochs=2, batch_size=128,
                     max_length=2048, max_prompt_length=512, lr=5e-7, beta=0.05, zero=3,
                     empty_system=0.8, gradient_checkpointing=True, output="runs/gemma-2b-dpo"),
    "llama-3-8b": dict(model="runs/llama-3-8b-sft", data=["lion-dpo-llama"], epochs=1,
                       batch_size=128, max_length=2048, max_prompt_length=1024, lr=5e-7,
                       schedule="cosine", beta=0.01, zero=3, empty_system=0.8, seed=27,
                       gradient_checkpointing=True, output="runs/llama-3-8b-dpo")}
CURVES = {"loss": "loss (ln 2 if policy = reference)", "margin": "reward margin r_w - r_l",
          "accuracy": "share of pairs with r_w > r_l", "ratio_w": "log pi/pi_ref of chosen (nats)",
          "ratio_l": "log pi/pi_ref of rejected (nats)", "grad_norm": "gradient norm"}


# ------------------------------------------------------------------------------- loss and metrics
def dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta: float, loss="sigmoid",
             label_smoothing=0.0):
    """The loss of P pairs, summed. With m_p = r_w - r_l, r = beta (log pi(y|x) - log pi_ref(y|x)):

        sigmoid  - sum_p (1 - eps) log sigmoid(m_p) + eps log sigmoid(-m_p)
        ipo        sum_p (m_p / beta - 1 / (2 beta))^2

    sigmoid is DPO (Rafailov et al. 2305.18290, eq. 7; LIONs section 3). eps = label_smoothing, the
    share of pairs whose labels are wrong, makes it cDPO (Mitchell 2023, "A note on DPO with noisy
    preferences"). ipo: Azar et al. 2310.12036, eq. 17, beta in place of tau.

    All (P,) float32 nats: sums over an answer's tokens, or means per token (--length-normalise).
    Returns a scalar, to be divided once by the pairs of the step. Check value: policy = reference
    gives P ln 2, for ipo P / (4 beta^2).
    """
    r_w, r_l = beta * (logp_w - ref_logp_w), beta * (logp_l - ref_logp_l)       # (P,) rewards
    m = r_w - r_l
    if loss == "ipo":
        return ((m - 0.5) / beta).square().sum()
    return -((1 - label_smoothing) * F.logsigmoid(m) + label_smoothing * F.logsigmoid(-m)).sum()


def pair_loss(args, logps, ref, lengths):
    """The loss that the flags name, summed over P pairs: dpo_loss, on log-probs per token with
    --length-normalise, plus --nll-weight times -log pi(y_w|x) / |y_w| (Pang et al. 2404.19733,
    eq. 1). All (P, 2), chosen then rejected; lengths |y| in tokens."""
    nll = -(logps / lengths)[:, 0].sum()
    if args.length_normalise:
        logps, ref = logps / lengths, ref / lengths
    loss = dpo_loss(*logps.unbind(1), *ref.unbind(1), args.beta, args.loss, args.label_smoothing)
    return loss + args.nll_weight * nll


METRICS = ("loss", "margin", "accuracy", "reward_w", "reward_l", "logp_w", "logp_l", "ratio_w",
           "ratio_l", "nll_w")


def pair_metrics(args, logps, ref, lengths):
    """Sums over P pairs of METRICS, (10,) float64: loss, margin r_w - r_l, accuracy [r_w > r_l],
    rewards r (per token with --length-normalise), then, whatever the loss, log-probs and log-ratios
    log pi/pi_ref of both answers in nats, and the chosen answer's nats per token. Policy =
    reference gives zeros for margin, accuracy, rewards and ratios."""
    logps, ref, lengths = (x.detach().double() for x in (logps, ref, lengths))
    ratio = logps - ref                                                         # (P, 2)
    r = args.beta * ratio
    if args.length_normalise:
        r = r / lengths
    margin = r[:, 0] - r[:, 1]
    nll = -(logps / lengths)[:, 0]
    return torch.hstack([pair_loss(args, logps, ref, lengths), margin.sum(), (margin > 0).sum(),
                         r.sum(0), logps.sum(0), ratio.sum(0), nll.sum()])


# ------------------------------------------------------------------------------------------ pairs
class Pairs:
    """Encoded preference rows. tokens, targets, attended: sums of each pair, (P,). ref: their
    reference log-probs, (P, 2) float32, once known."""

    def __init__(self, dataset, share):
        self.rows = dataset.with_format("numpy", columns=[*PAIR_LISTS])
        self.share, self.ref = share, None
        columns = dataset.with_format("arrow")[:]
        x, w, l = (columns[k].combine_chunks().value_lengths().to_numpy().astype(np.int64)
                   for k in ("prompt", "chosen", "rejected"))
        shared = x * share
        self.tokens, self.targets = 2 * x - shared + w + l, columns["n_targets"].to_numpy()
        attended_w, attended_l, once = (n * (n + 1) / 2 for n in (x + w, x + l, shared))
        self.attended = attended_w + attended_l - once                  # (query, key) pairs

    def __len__(self):
        return len(self.tokens)

    def batch(self, wanted: list[int]):
        """Pairs -> one Batch whose answers are y_w, y_l, y_w, .. and their (P, 2) reference."""
        groups = []
        for i in wanted:
            row = self.rows[int(i)]
            x, w, l, w_mask, l_mask = (row[k].tolist() for k in PAIR_LISTS)
            groups.append(Group(x, [w, l], [w_mask, l_mask]))
        ref = None if self.ref is None else torch.from_numpy(self.ref[wanted])
        return layout(groups, share=self.share), ref

    @functools.cached_property
    def keys(self) -> list[str]:
        """A hash of each pair's ids and targets."""
        keys = []
        for r in self.rows:
            digest = hashlib.blake2b(digest_size=16)
            for k in PAIR_LISTS:
                digest.update(len(r[k]).to_bytes(4, "little"))
                digest.update(np.ascontiguousarray(r[k]).tobytes())
            keys.append(digest.hexdigest())
        return keys


def pair_logps(logp_module, batch, n: int):
    """log pi(y|x) of n pairs: (n, 2) float32 nats, chosen then rejected."""
    return sequence_logps(logp_module(batch), batch.sequence, 2 * n).view(n, 2)


def pair_lengths(batch, n: int):
    """|y|, the targets of each answer: (n, 2) float32."""
    ones = torch.ones_like(batch.sequence, dtype=torch.float32)
    return sequence_logps(ones, batch.sequence, 2 * n).view(n, 2)


@torch.no_grad()
def evaluate_pairs(args, engine, pairs, rank, world):
    """Means of METRICS over held-out pairs, split over ranks; names begin with eval_."""
    engine.eval()
    sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device())
    micros = micro_batches(pairs.tokens.tolist(), args.micro_tokens, world)[rank]
    for batch, ref in laid_out(pairs, range(len(pairs)), micros):
        n = len(ref)
        sums += pair_metrics(args, pair_logps(engine, batch, n), ref, pair_lengths(batch, n))
    engine.train()
    return {f"eval_{k}": v / len(pairs) for k, v in zip(METRICS, all_sum([sums]))}


# ------------------------------------------------------------------------------------------ train
def parser():
    p = stage_parser(__doc__, PRESETS)
    p.set_defaults(chat_template="tokenizer", batch_size=128, lr=5e-7, schedule="linear",
                   output="runs/dpo")
    add = p.add_argument_group("stage 2").add_argument
    add("--beta", type=float, default=0.1,
        help="strength of the KL penalty; the paper sweeps 0.01 to 0.5")
    add("--loss", choices=["sigmoid", "ipo"], default="sigmoid", help="DPO, or IPO on sums of "
        "log-probs; with --length-normalise on means per token, as in TRL")
    add("--label-smoothing", type=float, default=0.0,
        help="cDPO: share of pairs with the wrong label, 0 to 0.5")
    add("--nll-weight", type=float, default=0.0,
        help="RPO: times the chosen answer's nats per token, added to the loss")
    add("--length-normalise", action="store_true",
        help="log-probs per token; --beta is then larger by about |y|: 2 to 10")
    add("--ref", help="reference model, its tokenizer may differ; None: --model")
    add("--max-pairs", type=positive, help="the first N pairs of a seeded permutation; None: all")
    data.pair_flags(add)
    add("--min-gap", type=float,
        help="minimum score difference; unscored pairs are dropped; None: keep all")
    add("--no-share-prompt", action="store_true", help="x once per answer: the paper's layout")
    return p


def main(argv=None):
    args = parse(argv, parser(), PRESETS)
    with own_folder(args):
        return published(args, train_on_pairs(args))


def train_on_pairs(args, stage="dpo"):
    """A whole DPO run; the result that main prints. `stage` is its name in run.json."""
    if not args.beta > 0:
        raise ValueError(f"--beta {args.beta}: must be above 0; at 0 every reward is 0")
    if not 0 <= args.label_smoothing < 0.5 or (args.label_smoothing and args.loss == "ipo"):
        raise ValueError(f"--label-smoothing {args.label_smoothing}: must be at least 0 and below "
                         "0.5, where labels say nothing; --loss ipo has none")
    if args.max_prompt_length >= args.max_length:
        raise ValueError(f"--max-prompt-length {args.max_prompt_length}: leaves no room for "
                         f"answers; must be below --max-length {args.max_length}")
    started, (rank, world) = time.time(), init_distributed()
    check_machines(args, world)
    tokenizer, ref_name = data.load_tokenizer(args.model), args.ref or args.model
    template = data.set_template(tokenizer, args.chat_template)
    settings = dict(args=args, tokenizer=tokenizer, template=template, pairs=True,
                    max_prompt_length=args.max_prompt_length, min_gap=args.min_gap)
    train_set, data_key = prepare_rows(args.data, max_examples=args.max_pairs, **settings)
    held_set, held_key = prepare_rows(args.eval_data, **settings)
    data_key += held_key
    hashes = {name: data.weights_hash(name) for name in {args.model, ref_name}}
    models = data.hash_of(hashes[args.model], hashes[ref_name])
    if stored := check_resume(args, world, data_key + models):
        return stored
    share = not args.no_share_prompt
    train, held = Pairs(train_set, share), held_set and Pairs(held_set, share)
    log(f"{len(train)} pairs, {train.tokens.sum():,} tokens laid out")
    train.ref = frozen_logps(args, ref_name, train_set, tokenizer)
    if held:
        held.ref = frozen_logps(args, ref_name, held_set, tokenizer)
    per_epoch, steps = plan_steps(args, len(train), "pairs")

    new_ids = tokenizer.convert_tokens_to_ids(list(template.new_tokens))
    engine = make_engine(args, LogProbs(load_model(args, tokenizer, new_ids)))
    run = Run(args, engine, stage, steps, CURVES, data=data_key + models, pairs=len(train),
              ref=ref_name)
    for step in range(run.first, steps):
        # - the step: every rank takes its micro-batches of the same global pairs -----------------
        epoch, i = divmod(step, per_epoch)
        order = data.permutation(len(train), args.seed, epoch)
        wanted = order[i * args.batch_size:(i + 1) * args.batch_size]
        mine = micro_batches(train.tokens[wanted].tolist(), args.micro_tokens, world)[rank]
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device())
        for m, (batch, ref) in enumerate(laid_out(train, wanted, mine)):
            logps = pair_logps(engine, batch, len(ref))                         # (P, 2) nats
            lengths = pair_lengths(batch, len(ref))                             # (P, 2) tokens
            loss = pair_loss(args, logps, ref, lengths) / len(wanted)
            engine.set_gradient_accumulation_boundary(m == len(mine) - 1)
            engine.backward(loss * world, scale_wrt_gas=False)                  # ranks are averaged
            sums += pair_metrics(args, logps, ref, lengths)
        lr = set_learning_rate(engine, args, step, steps)
        *sums, stopping = all_sum([sums, run.stop])
        now = {"step": step + 1} | {k: v / len(wanted) for k, v in zip(METRICS, sums)} | {"lr": lr}
        if step == 0 and ref_name == args.model:
            check_step_0(args, now)
        now["grad_norm"] = clip_and_step(engine, args.zero)
        check_finite(now, "pairs", wanted)
        # -----------------------------------------------------------------------------------------
        now |= run.cost(train, wanted)
        if held and due(step + 1, args.eval_every, steps):
            now |= evaluate_pairs(args, engine, held, rank, world)
        run.record(now)
        if stopped := run.save_if_due(step + 1, stopping):
            return stopped
    last = run.close()
    export(engine, tokenizer, template.end_of_turn_id, args)
    result = {k: v for k, v in last.items() if k in METRICS or k.startswith("eval_")}
    result |= {"pairs": len(train), "beta": args.beta, "seconds": time.time() - started}
    return run.finish(result)


def check_step_0(args, now):
    """With the policy as reference the first loss is dpo_loss at 0, ln 2 for sigmoid, or something
    differs between the two."""
    allowed = {"fp32": 1e-5, "bf16": 0.01}[args.dtype]
    if args.dtype == "bf16" and not args.length_normalise:
        allowed *= max(1, args.beta / 0.1)                  # rounding counts times beta
    if args.loss == "ipo":
        allowed *= 2 / args.beta ** 2                       # its slope at 0 beside sigmoid's 1/2
    loss = now["loss"] - args.nll_weight * now["nll_w"]
    zeros = torch.zeros(4, 1, dtype=torch.float64)
    expected = dpo_loss(*zeros, args.beta, args.loss, args.label_smoothing).item()
    if abs(loss - expected) > allowed:
        raise ValueError(
            f"step 0: the loss is {loss:.6f}, not {expected:.6f} (ln 2 = 0.693147 with --loss "
            f"sigmoid) within {allowed:g}, "
            "though the policy is the reference. Likely causes: one of the two was cast as a whole "
            "(model.to(bfloat16) rounds rotary frequencies as well; load it with dtype=), dropout "
            "is on, the forward is not deterministic, another back end or dtype made the "
            "reference, or its cache was changed by hand (delete it: --cache-dir)")


# ------------------------------------------------------- reference log-probs, computed once
def frozen_logps(args, name, dataset, tokenizer) -> np.ndarray:
    """log pi(y|x) of every pair under the model `name`, (P, 2) float32 nats, from a cache or
    computed. A model with another tokenizer or template gets the same messages in its own tokens.

    The file's key: weights, dtype, rotary dtype, back end and layout. A row's key: its ids and
    targets. Ranks take disjoint rows and append them as they go, so that a killed pass
    continues."""
    from transformers import AutoConfig
    own = data.load_tokenizer(name)
    template = data.set_template(own, args.chat_template)
    if (own.backend_tokenizer.to_str(), own.chat_template) != (
            tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template):
        log(f"{name} has another tokenizer or chat template; encoding the pairs with it")
        dataset = in_other_tokens(args, name, dataset, own, template)
    share = not args.no_share_prompt
    pairs, new_ids = Pairs(dataset, share), own.convert_tokens_to_ids(list(template.new_tokens))
    backend = attention_backend(args, AutoConfig.from_pretrained(name))
    folder = data.cache_folder(args.cache_dir) / "logps" / data.hash_of(
        data.weights_hash(name), args.dtype, "rotary fp32", backend, device().type, share, new_ids)
    known = known_logps(folder)
    from_rank_0 = [[i for i, key in enumerate(pairs.keys) if key not in known]]
    dist.broadcast_object_list(from_rank_0)                 # another run may write meanwhile
    missing, = from_rank_0
    log(f"log-probs under {name}: {len(missing)} of {len(pairs)} pairs are not yet in {folder}")
    if missing:
        missing.sort(key=lambda i: -pairs.tokens[i])
        model = load_model(copy_of(args, model=name, gradient_checkpointing=False, lora_rank=None),
                           own, new_ids)
        compute_logps(LogProbs(model.eval()), pairs, missing, folder, args)
        del model
        free_memory()
        dist.barrier()
        known = known_logps(folder)
    return np.array([known[key] for key in pairs.keys], dtype=np.float32)


def known_logps(folder):
    """{key: log-probs} of the rows on disk whose checksum holds."""
    return {r["key"]: r["logps"] for r in read_growing(folder, "logps")
            if r.get("check") == data.hash_of(r["key"], r["logps"])}


@torch.no_grad()
def compute_logps(model, pairs, missing, folder, args):
    """This rank's share of the missing rows, longest first, appended to a new file of `folder`."""
    from tqdm import tqdm
    rank, world = dist.get_rank(), dist.get_world_size()
    mine, micros, room = missing[rank::world], [], 0
    for i in mine:
        if pairs.tokens[i] > room:
            micros.append([])
            room = args.micro_tokens
        micros[-1].append(i)
        room -= pairs.tokens[i]
    with growing(folder, "logps") as append, tqdm(
            total=len(mine), disable=rank > 0, unit="pair", desc="log-probs") as bar:
        for micro, (batch, _) in zip(micros, laid_out(pairs, range(len(pairs)), micros)):
            logps = pair_logps(model, batch, len(micro))
            if not logps.isfinite().all():
                raise FloatingPointError(f"log-probs of rows {micro} are not finite; look at these "
                                         "rows, or at the weights")
            for i, value in zip(micro, logps.tolist()):
                check = data.hash_of(pairs.keys[i], value)
                append({"key": pairs.keys[i], "logps": value, "check": check})
            bar.update(len(micro))


def in_other_tokens(args, name, dataset, tokenizer, template):
    """The same pairs through another model's template and tokens."""
    import datasets
    rows = []
    for i, text in enumerate(dataset["messages_json"]):
        *texts, unfinished = json.loads(text)
        try:
            pair = data.Pair(*texts, unfinished=unfinished)
            e = data.encode_pair(pair, tokenizer, template, max_length=args.max_length,
                                 max_prompt_length=args.max_prompt_length)
        except ValueError as error:
            where = f"{dataset[i]['source']}:{dataset[i]['row']}"
            raise ValueError(f"{where}: the tokenizer of {name} cannot take this pair: {error}. "
                             "Take that row out, or another model") from None
        rows.append(e._asdict() | {"n_targets": sum(e.chosen_targets) + sum(e.rejected_targets)})
    return datasets.Dataset.from_list(rows)


def copy_of(args, **changed):
    """Parsed flags with some changed."""
    return type(args)(**{**vars(args), **changed})


if __name__ == "__main__":
    run_main(main)
