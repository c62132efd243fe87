"""Train a small GPT, byte by byte, on the sources of Python's standard library. No download.

Runs in any of these ways; the last is a size that keeps eight GPUs busy:

    python jobs/train_gpt.py
    torchrun --nproc_per_node 2 jobs/train_gpt.py
    python jobs/train_gpt.py --num-gpus 8 --layers 12 --width 768 --context 1024 --batch-size 256

The entropy of single bytes is what a model reaches that knows only how frequent each byte is. A loss well
below it has learnt from what came before.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from entrypoint import rm, submit_if_asked, training_flags

if __name__ == "__main__":
    submit_if_asked()  # before torch: the process that submits may run where there is none

import torch
from stdlib_text import encode, stdlib_text, unigram_entropy, vocabulary
from torch import Tensor, nn
from torch.nn import functional as F
from training import Gang, fit, hand_over_weights, joined_gang

TEXT_BYTES = 4_000_000
HELD_OUT = 0.05
"""The share of the text, at its end, that is not trained on."""


class Block(nn.Module):
    """One layer: every position looks at the ones before it, then thinks for itself. (n, time, width) to same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x))
        return x + self.mlp(x)

    def attend(self, x: Tensor) -> Tensor:
        n, time, width = x.shape
        split = self.query_key_value(x).view(n, time, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (n, heads, time, width / heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        merged = self.attention_out(mixed.transpose(1, 2).reshape(n, time, width))
        return F.dropout(merged, self.dropout, self.training)


class GPT(nn.Module):
    """Decoder-only transformer: tokens (n, time) to the logits (n, time, symbols) of each next one."""

    def __init__(self, symbols: int, context: int, layers: int, width: int, dropout: float) -> None:
        super().__init__()
        heads = max(2, width // 64)
        self.token = nn.Embedding(symbols, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)
        self.head.weight = self.token.weight  # reading and writing a symbol share one table
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What is added to the residual stream is scaled down with depth, as in GPT-2.
                added = name.endswith(("attention_out.weight", "mlp.3.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if added else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.token(tokens) + self.position(positions))))
        return logits


def main() -> None:
    args = parse_arguments()
    text = stdlib_text(TEXT_BYTES)
    symbols = vocabulary(text)
    with joined_gang() as gang:
        tokens = torch.frombuffer(bytearray(encode(text, symbols)), dtype=torch.uint8).to(gang.device)
        learnt, held_out = tokens.tensor_split([int(len(tokens) * (1 - HELD_OUT))])
        torch.manual_seed(args.seed)
        model = GPT(len(symbols), args.context, args.layers, args.width, args.dropout).to(gang.device)
        gang.say(f"{sum(p.numel() for p in model.parameters())} parameters, {len(symbols)} different bytes")
        gang.say(f"unigram entropy {unigram_entropy(text):.4f} nats")

        def batch_loss(module: nn.Module, step: int) -> Tensor:
            # The windows of a step follow from its number: a resumed run draws the same.
            draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            starts = torch.randint(len(learnt) - args.context, (args.batch_size,), generator=draw)
            return window_loss(module, learnt, gang.share(starts), args.context)

        fit(gang, model, batch_loss, args, text)
        hand_over_weights(gang, model, args.weights_out)
        test(gang, model, held_out, args.context)


def parse_arguments() -> Namespace:
    parser = training_flags(__doc__ or "", steps=1500, batch_size=16, lr=4e-3, checkpoint_every=100)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64, help="a multiple of 64")
    parser.add_argument("--context", type=int, default=64, help="how many bytes the model looks back")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--weights-out", type=Path, metavar="FILE", help="keep the final weights there")
    return parser.parse_args()


def window_loss(module: nn.Module, tokens: Tensor, starts: Tensor, context: int) -> Tensor:
    """Mean nats per byte over the windows of `context` bytes that begin at `starts`."""
    offsets = torch.arange(context + 1)
    windows = tokens[(starts.unsqueeze(1) + offsets).to(tokens.device)].long()
    logits = module(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def test(gang: Gang, model: nn.Module, held_out: Tensor, context: int) -> None:
    """The loss on text that was not trained on, at windows spread evenly over it."""
    model.eval()
    starts = torch.linspace(0, len(held_out) - context - 1, 64).long()
    with gang.autocast():
        loss = window_loss(model, held_out, starts, context).item()
    rm.report(held_out_loss=loss)
    gang.say(f"held-out loss {loss:.4f} nats")


if __name__ == "__main__":
    main()
