"""Learn which byte follows which in Python's standard library, by gradient descent, without torch or numpy.

For machines where nothing but Python is installed, and to try the resource manager out:

    python jobs/train_chars.py
    python jobs/train_chars.py --num-gpus 1

The model is a table of logits, one row for each preceding byte: its loss falls from the entropy of single
bytes towards that of pairs. It trains in one process; in a gang each rank does the same, and rank 0 writes.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import time

from entrypoint import STOPPED, replacing, rm, submit_if_asked, training_flags
from stdlib_text import encode, stdlib_text, unigram_entropy, vocabulary

TEXT_BYTES = 200_000
Table = list[list[float]]


def main() -> None:
    parser = training_flags(__doc__ or "", steps=600, batch_size=128, lr=20.0, checkpoint_every=100)
    args = parser.parse_args()
    rm.should_stop()  # from here on SIGTERM asks, and no longer kills
    leads = os.environ.get("RANK", "0") == "0"
    checkpoint = (args.checkpoint_dir or rm.checkpoint_dir()) / "train_chars.json"
    text = stdlib_text(TEXT_BYTES)
    symbols = vocabulary(text)
    tokens = encode(text, symbols)
    settings = [args.seed, args.steps, args.batch_size, args.lr, symbols.hex()]
    first, table = 0, [[0.0] * len(symbols) for _ in symbols]
    if checkpoint.exists():
        first, kept_settings, table = json.loads(checkpoint.read_bytes())
        if kept_settings != settings:
            raise SystemExit(f"{checkpoint} is of another training: delete it or change --checkpoint-dir")
        print(f"resumed at step {first} of {args.steps} from {checkpoint}", flush=True)
    print(f"unigram entropy {unigram_entropy(text):.4f} nats", flush=True)
    for step in range(first, args.steps):
        rate = args.lr * (1 - step / args.steps)
        loss = descend(table, tokens, random.Random(args.seed * 1_000_003 + step), args.batch_size, rate)
        done, stop = step + 1, rm.should_stop()
        rm.report(step=done, total=args.steps, loss=loss)
        if done % 50 == 0 or done == args.steps:
            print(f"step {done}/{args.steps} loss {loss:.4f}", flush=True)
        if leads and (stop or done % args.checkpoint_every == 0 or done == args.steps):
            with replacing(checkpoint) as file:
                file.write(json.dumps([done, settings, table]).encode())
            rm.checkpointed()
        if stop and done < args.steps:
            print(f"stopped at step {done} of {args.steps}", flush=True)
            raise SystemExit(STOPPED)
        time.sleep(args.step_delay)
    loss = mean_loss(table, tokens)
    rm.report(final_loss=loss)
    print(f"final loss {loss:.4f} nats")


def descend(table: Table, tokens: bytes, draw: random.Random, batch_size: int, rate: float) -> float:
    """One step of stochastic gradient descent on randomly drawn pairs. Returns their mean loss."""
    loss = 0.0
    gradients: dict[int, list[float]] = {}
    for _ in range(batch_size):
        place = draw.randrange(len(tokens) - 1)
        before, after = tokens[place], tokens[place + 1]
        chances = softmax(table[before])
        loss -= math.log(chances[after])
        chances[after] -= 1.0  # the gradient of the loss by the logits
        so_far = gradients.get(before)
        gradients[before] = [a + b for a, b in zip(so_far, chances, strict=True)] if so_far else chances
    for before, gradient in gradients.items():
        table[before] = [w - rate / batch_size * g for w, g in zip(table[before], gradient, strict=True)]
    return loss / batch_size


def softmax(logits: list[float]) -> list[float]:
    peak = max(logits)
    powers = [math.exp(logit - peak) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers]


def mean_loss(table: Table, tokens: bytes) -> float:
    """Nats per byte over the whole text."""
    losses = [[-math.log(max(chance, 1e-300)) for chance in softmax(row)] for row in table]
    return sum(losses[a][b] for a, b in itertools.pairwise(tokens)) / (len(tokens) - 1)


if __name__ == "__main__":
    submit_if_asked()
    main()
