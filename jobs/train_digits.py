"""Learn to read handwritten digits (scikit-learn's, 8 by 8 pixels) with a small convolutional network.

Runs in any of these ways; in the last, the resource manager finds two GPUs for it:

    python jobs/train_digits.py
    torchrun --nproc_per_node 2 jobs/train_digits.py
    python jobs/train_digits.py --num-gpus 2
"""

from __future__ import annotations

from argparse import Namespace
from importlib.metadata import distribution
from pathlib import Path

from entrypoint import rm, submit_if_asked, training_flags

if __name__ == "__main__":
    submit_if_asked()  # before torch: the process that submits may run where there is none

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import Gang, fit, hand_over_weights, joined_gang

TEST_IMAGES = 360
DATA = "sklearn/datasets/data/digits.csv.gz"
"""Read as a file: importing scikit-learn for it would take each rank as long as importing torch."""


def main() -> None:
    args = parse_arguments()
    with joined_gang() as gang:
        (images, labels), test_set = digits(gang.device)
        batches_per_epoch = len(images) // args.batch_size
        args.steps = args.steps or args.epochs * batches_per_epoch
        torch.manual_seed(args.seed)
        model = network(args.dropout).to(gang.device)

        def batch_loss(module: nn.Module, step: int) -> Tensor:
            epoch, batch = divmod(step, batches_per_epoch)
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed + epoch))
            mine = gang.share(order[batch * args.batch_size :][: args.batch_size])
            return F.cross_entropy(module(images[mine]), labels[mine])

        fit(gang, model, batch_loss, args, images.cpu().numpy().tobytes())
        hand_over_weights(gang, model, args.weights_out)
        test(gang, model, test_set)


def parse_arguments() -> Namespace:
    parser = training_flags(__doc__ or "", steps=None, batch_size=64, lr=3e-3, checkpoint_every=50)
    parser.add_argument("--epochs", type=int, default=12, help="used where --steps is not given")
    parser.add_argument("--dropout", type=float, default=0.25)
    parser.add_argument("--weights-out", type=Path, metavar="FILE", help="keep the final weights there")
    return parser.parse_args()


def digits(device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (n, 1, 8, 8) from 0 to 1 and labels (n,), to train on and to test on: always the same split."""
    rows = torch.from_numpy(
        np.loadtxt(distribution("scikit-learn").locate_file(DATA), np.float32, delimiter=",")
    )
    images = rows[:, :-1].reshape(-1, 1, 8, 8) / 16
    labels = rows[:, -1].long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].to(device), labels[order].to(device)
    return (images[TEST_IMAGES:], labels[TEST_IMAGES:]), (images[:TEST_IMAGES], labels[:TEST_IMAGES])


def network(dropout: float) -> nn.Module:
    """(n, 1, 8, 8) to the logits (n, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(128, 10),
    )


@torch.no_grad()
def test(gang: Gang, model: nn.Module, test_set: tuple[Tensor, Tensor]) -> None:
    images, labels = test_set
    model.eval()
    accuracy = (model(images).argmax(dim=1) == labels).float().mean().item()
    rm.report(test_accuracy=accuracy)
    gang.say(f"test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
