"""The one training loop.

`fit` takes a list of jobs over one frozen, resident base and trains each job's own parameters. A method is a `Step`: which parameters, and
the loss of one step. Everything random is drawn from a generator seeded by (job seed, step), so a checkpoint needs no generator state and
a resumed training is, on CPU and with the same number of threads, bit for bit the undisturbed one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from likeness.errors import LikenessError, NonFiniteLoss, translated


@dataclass(frozen=True)
class Group:
    """Parameters, in a stable order, that learn at `rate` times the plan's learning rate, from `first_step` on; before, they have no gradient."""

    parameters: list[nn.Parameter]
    rate: float = 1.0
    first_step: int = 0


class Step(Protocol):
    """What a method gives the loop."""

    def groups(self) -> list[Group]:
        """The trained parameters."""

    def loss(self, step: int) -> Tensor:
        """The scalar loss of one step; draws its own batch, seeded by the step."""

    def state(self) -> dict[str, Tensor]:
        """The trained tensors by name, fp32, on CPU: what a checkpoint needs."""

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put saved tensors back; raises BadCheckpoint if they do not fit."""

    def export(self) -> dict[str, Tensor]:
        """The adapter's tensors by the names of its file, fp32, on CPU."""

    def close(self) -> None:
        """Leave the base as it was found."""


@dataclass(frozen=True)
class Plan:
    """The numbers of the loop itself."""

    steps: int
    learning_rate: float
    max_grad_norm: float
    report_every: int = 10
    checkpoint_every: int = 50
    warmup_steps: int = 10


@dataclass
class Checkpoint:
    """Everything that a training needs to go on: exactly this is saved."""

    step: int
    tensors: dict[str, Tensor]              # the method's
    moments: dict[str, Tensor]              # the optimizer's: "<parameter number>.<name>"
    losses: list[tuple[int, float]]         # (step, mean loss since the last report)
    pending: tuple[float, int] = (0.0, 0)   # sum and count of losses not yet reported


@dataclass
class Job:
    """One training: how to build its step (late, so that only one is resident), where it stands, what to tell whom."""

    name: str
    build: Callable[[], Step]
    plan: Plan
    resume: Checkpoint | None = None
    on_report: Callable[[int, float], None] = lambda step, loss: None
    on_checkpoint: Callable[[Checkpoint], None] = lambda checkpoint: None


@dataclass(frozen=True)
class FitResult:
    """What became of one job: the adapter's tensors, or the error that ended it."""

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    losses: tuple[tuple[int, float], ...] = ()
    steps: int = 0
    error: LikenessError | None = None


def fit(jobs: Sequence[Job]) -> list[FitResult]:
    """Train the jobs one after another over the resident base; one that fails ends alone."""
    return [_isolated(job) for job in jobs]


def _isolated(job: Job) -> FitResult:
    try:
        with translated(f"training {job.name}"):
            step = job.build()
            try:
                return _train(job, step)
            finally:
                step.close()
    except LikenessError as error:
        return FitResult(job.name, error=error)


def learning_rate(step: int, plan: Plan, *, first_step: int = 0) -> float:
    """Linear warm-up from `first_step` on, then half a cosine down to a tenth: late steps refine, they do not wander."""
    done, steps = max(0, step - first_step), plan.steps - first_step
    ramp = min(1.0, (done + 1) / max(1, min(plan.warmup_steps, steps // 4)))
    return plan.learning_rate * ramp * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done / steps)))


def _train(job: Job, method: Step) -> FitResult:
    plan = job.plan
    groups = method.groups()
    parameters = [p for group in groups for p in group.parameters]
    optimizer = torch.optim.AdamW([{"params": group.parameters} for group in groups], lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, foreach=False)
    at, losses, pending = _start(job, method, optimizer)
    while at < plan.steps:
        # -- loss
        loss = method.loss(at)
        # -- gradient
        loss.backward()
        # -- update
        for settings, group in zip(optimizer.param_groups, groups, strict=True):
            settings["lr"] = group.rate * learning_rate(at, plan, first_step=group.first_step)
        nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        at += 1
        value = loss.item()          # the one host sync of a step: a NaN must not reach a checkpoint
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the loss became {value} at step {at} of {plan.steps}: lower the learning rate ({plan.learning_rate:g})")
        pending = (pending[0] + value, pending[1] + 1)
        # -- once in a while
        if at % plan.report_every == 0 or at == plan.steps:
            losses.append((at, pending[0] / pending[1]))
            pending = (0.0, 0)
            job.on_report(at, losses[-1][1])
        if at % plan.checkpoint_every == 0 and at < plan.steps:
            job.on_checkpoint(Checkpoint(at, method.state(), _moments(optimizer), list(losses), pending))
    return FitResult(job.name, method.export(), tuple(losses), at)


def _start(job: Job, method: Step, optimizer: torch.optim.Optimizer) -> tuple[int, list[tuple[int, float]], tuple[float, int]]:
    if job.resume is None:
        return 0, [], (0.0, 0)
    method.restore(job.resume.tensors)
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in job.resume.moments.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return job.resume.step, list(job.resume.losses), job.resume.pending


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"{number}.{name}": torch.as_tensor(value).detach().cpu().contiguous().clone()
            for number, values in optimizer.state_dict()["state"].items() for name, value in values.items()}
