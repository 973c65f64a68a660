"""The one training loop.

`fit` takes a list of jobs over one frozen, resident base and trains each job's own parameters. A method is a `Step`: which parameters, and
the loss of one step. Everything random is drawn from a generator seeded by (job seed, step), so a checkpoint needs no generator state and
a resumed training is, on CPU and with the same number of threads, bit for bit the undisturbed one.

A step that is out of memory is taken again in twice as many pieces, whose gradients add up, then picture by picture, then with activations computed
twice. What was learnt so far stays; the pieces change the sums' last bits, so the plan is part of the result and of every later checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from likeness.errors import LikenessError, NonFiniteLoss, ResourceError, is_out_of_memory, translated
from likeness.records import Curve, CurvePoint, DevicePlan


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

    def pictures(self, step: int) -> int:
        """How many pictures a step has: in so many pieces can it be taken at most."""

    def loss(self, step: int, *, piece: int = 0, of: int = 1) -> Tensor:
        """The scalar loss of one step, or of one piece of it; draws its own batch, seeded by the step. The pieces' losses add up to the step's."""

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
    device: tuple[DevicePlan, ...] = ()     # that memory has forced so far
    # where a checkpoint is chosen, which the loop knows nothing of:
    points: tuple[CurvePoint, ...] = ()     # those scored so far
    best: dict[str, Tensor] = field(default_factory=dict)       # the best one's, as its file has them


@dataclass
class Job:
    """One training: how to build its step (late, so that only one is resident), where it stands, what to tell whom."""

    name: str
    build: Callable[[], Step]
    plan: Plan
    resume: Checkpoint | None = None
    until: int | None = None                             # ends there, before the plan does, with its state; None: at the plan's last step
    recompute: Callable[[bool], None] | None = None      # switches gradient checkpointing; None: there is none
    on_report: Callable[[int, float], None] = lambda step, loss: None
    on_checkpoint: Callable[[Checkpoint], None] = lambda checkpoint: None


@dataclass(frozen=True)
class FitResult:
    """What became of one job: the adapter's tensors, or the error that ended it."""

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    losses: tuple[tuple[int, float], ...] = ()
    steps: int = 0
    device: tuple[DevicePlan, ...] = ()
    error: LikenessError | None = None
    state: Checkpoint | None = None           # of a job that had an `until`: what it goes on from
    curve: Curve | None = None                # where a checkpoint was chosen


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
                if job.recompute is not None:
                    job.recompute(False)
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
    device = job.resume.device if job.resume is not None else ()
    last = plan.steps if job.until is None else job.until
    while at < last:
        # -- loss and gradient
        loss = _gradient(job, method, at, device)
        if loss is None:
            device = (*device, _smaller(device, at=at, pictures=method.pictures(at), recompute=job.recompute is not None))
            optimizer.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()          # pieces need other sizes than those that are kept
            continue
        # -- update
        for settings, group in zip(optimizer.param_groups, groups, strict=True):
            settings["lr"] = group.rate * learning_rate(at, plan, first_step=group.first_step)
        norm = nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm)
        at += 1
        value, steepness = torch.stack((loss.detach().float(), norm.detach().float().to(loss.device))).tolist()          # the one host sync of a step, before anything moves: no NaN reaches a checkpoint
        if not math.isfinite(value) or not math.isfinite(steepness):
            what = f"the loss became {value}" if not math.isfinite(value) else f"the gradient became {steepness} under a loss of {value:.3g}"
            raise NonFiniteLoss(f"{what} at step {at} of {plan.steps}: lower the learning rate ({plan.learning_rate:g})")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pending = (pending[0] + value, pending[1] + 1)
        # -- once in a while
        if at % plan.report_every == 0 or at == plan.steps:
            losses.append((at, pending[0] / pending[1]))
            pending = (0.0, 0)
            job.on_report(at, losses[-1][1])
        if at % plan.checkpoint_every == 0 and at < last:
            job.on_checkpoint(Checkpoint(at, method.state(), _moments(optimizer), list(losses), pending, device))
    state = None if job.until is None else Checkpoint(at, method.state(), _moments(optimizer), list(losses), pending, device)
    return FitResult(job.name, method.export(), tuple(losses), at, device, state=state)


def _gradient(job: Job, method: Step, at: int, device: tuple[DevicePlan, ...]) -> Tensor | None:
    """The loss of one step, its gradient added to the parameters; None where memory ran out, with part of the gradient there."""
    plan = device[-1] if device else DevicePlan(from_step=0, pieces=1)
    if job.recompute is not None:
        job.recompute(plan.gradient_checkpointing)
    of = min(plan.pieces, method.pictures(at))
    losses = []
    try:
        for piece in range(of):
            loss = method.loss(at, piece=piece, of=of)
            loss.backward()
            losses.append(loss.detach())
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        return None
    return losses[0] if of == 1 else torch.stack(losses).sum()


def _smaller(device: tuple[DevicePlan, ...], *, at: int, pictures: int, recompute: bool) -> DevicePlan:
    """The next plan that needs less memory.

    Raises:
        ResourceError: there is none.
    """
    pieces, twice = (device[-1].pieces, device[-1].gradient_checkpointing) if device else (1, False)
    if pieces < pictures:
        return DevicePlan(from_step=at, pieces=min(2 * pieces, pictures), gradient_checkpointing=twice)
    if recompute and not twice:
        return DevicePlan(from_step=at, pieces=pieces, gradient_checkpointing=True)
    raise ResourceError(f"the device is out of memory at step {at}, one picture at a time{' and with gradient checkpointing' if twice else ''}: free memory on it, "
                        "choose a method or a rank that trains less, or a larger device")


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
