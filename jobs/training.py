"""The loop that the PyTorch scripts here share: one gang, one model, a checkpoint that resumes it exactly.

What makes a resumed run end with the very weights of an undisturbed one: the examples of a step follow from
the seed and the step's number alone, and the checkpoint holds everything else that a step depends on: model,
optimizer, schedule, and the random state of every rank. Bit for bit on CPU with the same number of processes;
with another number the training goes on with the same examples and new random states, and says so. On a GPU
it is exact as far as CUDA's kernels are, some of which add up in no fixed order.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from entrypoint import STOPPED, replacing, rm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

FREE_TO_CHANGE = {"num_gpus", "detach", "checkpoint_dir", "checkpoint_every", "step_delay", "weights_out"}
"""Flags that say how a training is run. All others say what is trained: another value is another training."""

BatchLoss = Callable[[nn.Module, int], Tensor]
"""The mean loss of this rank's examples of the given step."""


@dataclass(frozen=True)
class Gang:
    """The processes that train one model together, seen from one of them."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print once for the whole gang."""
        if self.leads:
            print(line, flush=True)

    def autocast(self) -> torch.autocast:
        """bfloat16 where it is fast, on a GPU; full precision on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def share(self, examples: Tensor) -> Tensor:
        """This rank's part of a global batch. The parts are equal, so that the mean of means is the mean."""
        return examples[self.rank :: self.world_size]

    def agree(self, stop: bool, loss: Tensor) -> tuple[bool, float]:
        """Whether any rank wants to stop, and the mean loss: one small all-reduce for both."""
        if self.world_size == 1:
            return stop, loss.item()
        sums = torch.stack([torch.tensor(float(stop), device=self.device), loss.detach().float()])
        dist.all_reduce(sums)
        wants, losses = sums.tolist()
        return wants > 0, losses / self.world_size

    def gathered(self, value: Any) -> list[Any]:
        """The `value` of every rank, by rank."""
        values = [value]
        if self.world_size > 1:
            values *= self.world_size
            dist.all_gather_object(values, value)
        return values

    def from_leader(self, value: Any) -> Any:
        """Rank 0's `value`, on all ranks."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]


@contextlib.contextmanager
def joined_gang() -> Iterator[Gang]:
    """The gang that the environment describes (torchrun's variables); a gang of one without them."""
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    gang = Gang(rank, int(os.environ.get("WORLD_SIZE", "1")), _own_device(local_rank))
    if gang.world_size == 1:
        yield gang
        return
    on_gpu = gang.device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=gang.device if on_gpu else None)
    exit_with = None
    try:
        yield gang
    except SystemExit as leaving:  # any other exception passes: the others can't be waited for then
        exit_with = leaving
    # Nobody leaves before rank 0 has written all: whoever watches may end the gang with its first exit.
    dist.barrier()
    dist.destroy_process_group()
    if exit_with:
        raise exit_with


def _own_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # one core a process, and sums in one order
        return torch.device("cpu")
    # Where each process sees only its own GPU, that one is number 0 for all of them.
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def fit(gang: Gang, model: nn.Module, batch_loss: BatchLoss, args: Namespace, data: bytes) -> None:
    """Train `model` in place for `args.steps` steps, from the last checkpoint on if there is one.

    Told to stop, the gang leaves together: it checkpoints and exits with STOPPED. `data` is what is learnt
    from: a checkpoint that came from other data, or from other flags, is refused.
    """
    if args.batch_size % gang.world_size:
        raise SystemExit(f"--batch-size {args.batch_size} is no multiple of the {gang.world_size} processes")
    rm.should_stop()  # from here on SIGTERM asks, and no longer kills
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, args.steps))
    path = (args.checkpoint_dir or rm.checkpoint_dir()) / f"{Path(sys.argv[0]).stem}.pt"
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    settings = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    settings["data"] = hashlib.sha256(data).hexdigest()
    checkpoint = Checkpoint(gang, path, parts, settings)
    module = DistributedDataParallel(model) if gang.world_size > 1 else model
    module.train()
    if gang.world_size > 1:
        with gang.autocast():
            _settle(module, batch_loss)
    seed_rank(gang, args.seed)
    first = checkpoint.restore()
    for step in range(first, args.steps):
        with gang.autocast():
            loss = batch_loss(module, step)
        _descend(loss, optimizer)
        schedule.step()
        done = step + 1
        # Waits for the GPU at every step: a stop is then never more than a step away.
        stop, mean_loss = gang.agree(rm.should_stop(), loss)
        rm.report(step=done, total=args.steps, loss=mean_loss)
        if done % max(1, args.steps // 20) == 0 or done == args.steps:
            gang.say(f"step {done}/{args.steps} loss {mean_loss:.4f}")
        if stop or done % args.checkpoint_every == 0 or done == args.steps:
            checkpoint.save(done)
        if stop and done < args.steps:
            gang.say(f"stopped at step {done} of {args.steps}")
            raise SystemExit(STOPPED)
        time.sleep(args.step_delay)


def _settle(module: nn.Module, batch_loss: BatchLoss) -> None:
    """One backward pass for nothing, before any state that counts is set.

    DistributedDataParallel orders its buckets anew after the first one, and from three ranks on a sum's last
    bits depend on that order. Without this, a resumed run would take one step in the old order, in mid-training.
    """
    batch_loss(module, 0).backward()
    module.zero_grad(set_to_none=True)


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def _lr_factor(step: int, steps: int) -> float:
    """Up in a straight line over the first twentieth, then down along a cosine to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def seed_rank(gang: Gang, seed: int) -> None:
    """Dropout differs from rank to rank. Models are built before this, from one seed on all ranks."""
    torch.manual_seed(seed * 1_000_003 + gang.rank)


class Checkpoint:
    """The last state of a training, in one file that is whole at any time. Only rank 0 reads and writes it."""

    def __init__(self, gang: Gang, path: Path, parts: dict[str, Any], settings: dict[str, Any]) -> None:
        self.gang = gang
        self.path = path
        self.parts = parts
        self.settings = settings

    def save(self, step: int) -> None:
        """Keep the state after `step` steps."""
        rng = self.gang.gathered(_rng_state(self.gang.device))
        if self.gang.leads:
            states = {name: part.state_dict() for name, part in self.parts.items()}
            with replacing(self.path) as file:
                torch.save({"step": step, "settings": self.settings, "rng": rng, **states}, file)
            rm.checkpointed()

    def restore(self) -> int:
        """Put everything back as it was. Returns the number of steps done: 0 without a checkpoint."""
        saved = None
        if self.gang.leads and self.path.exists():
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        saved = self.gang.from_leader(saved)
        if saved is None:
            return 0
        self._refuse_other_settings(saved["settings"])
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        step: int = saved["step"]
        self.gang.say(f"resumed at step {step} of {self.settings['steps']} from {self.path}")
        if len(saved["rng"]) == self.gang.world_size:
            _set_rng_state(self.gang.device, saved["rng"][self.gang.rank])
        else:
            seed_rank(self.gang, self.settings["seed"] + step)
            self.gang.say(
                f"it had {len(saved['rng'])} processes and this has {self.gang.world_size}: "
                "the same examples, but not the same bits as without the change"
            )
        return step

    def _refuse_other_settings(self, saved: dict[str, Any]) -> None:
        other = sorted(name for name in self.settings if saved.get(name) != self.settings[name])
        if other:
            was = ", ".join(f"{name} {saved.get(name)}, now {self.settings[name]}" for name in other)
            raise SystemExit(
                f"{self.path} is of another training ({was}): delete it or change --checkpoint-dir"
            )


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(device: torch.device, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def hand_over_weights(gang: Gang, model: nn.Module, weights_out: Path | None) -> None:
    """Print the digest of the weights, by which two runs are compared, and keep them where asked to."""
    if not gang.leads:
        return
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    gang.say(f"weights sha256 {digest.hexdigest()}")
    if weights_out:
        with replacing(weights_out) as file:
            torch.save(model.state_dict(), file)
