"""What a Prefect server does by itself about runs that die: a silent run has crashed, a crashed run is started again, so often and no more.

A run that dies with its worker says nothing: its state stays Running and holds its pool's slot. Living runs send a heartbeat every 30 s, where their worker was started with
PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30, as those of `likeness up` and infra/ are. Whoever is taken for dead and lives after all does no harm: stages are made once.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

HEARTBEAT_S = 30                # the least that Prefect takes
RUNS = "prefect.flow-run.*"


@dataclass(frozen=True)
class AutomationPlan:
    """An automation, known by its name."""

    name: str
    description: str
    trigger: EventTrigger
    action: ChangeFlowRunState

    @property
    def label(self) -> str:
        """What people read."""
        return f"automation {self.name!r}"

    def facts(self) -> dict[str, Any]:
        """What is compared with the server's; whether it is enabled is the operator's to say."""
        return _facts(self.description, self.trigger, [self.action])


def automations_of(tag: str, *, silent_after_s: float, most_starts: int) -> tuple[AutomationPlan, ...]:
    """What looks after runs of deployments with this tag.

    Args:
        tag: of the deployments.
        silent_after_s: without a heartbeat for so long a run has crashed.
        most_starts: a run that crashes is started again until it was started so often. The server counts starts; one that crashes before it began is not.
    """
    ours = ResourceSpecification({"prefect.resource.id": [f"prefect.tag.{tag}"], "prefect.resource.role": ["tag"]})
    return (
        AutomationPlan("likeness: a silent run has crashed", f"Runs tagged {tag} that send no heartbeat for {silent_after_s:g} s",
                       EventTrigger(match=ResourceSpecification({"prefect.resource.id": [RUNS]}), match_related=ours, after={"prefect.flow-run.heartbeat"},
                                    expect={RUNS}, for_each={"prefect.resource.id"}, posture=Posture.Proactive, threshold=1,
                                    within=timedelta(seconds=silent_after_s)),
                       ChangeFlowRunState(state=StateType.CRASHED, message=f"no heartbeat for {silent_after_s:g} s")),
        AutomationPlan("likeness: a crashed run starts again", f"Runs tagged {tag} that crashed, until they were started {most_starts} times",
                       EventTrigger(match=ResourceSpecification({"prefect.resource.id": [RUNS], "prefect.run-count": [str(n) for n in range(1, most_starts)]}),
                                    match_related=ours, expect={"prefect.flow-run.Crashed"}, for_each={"prefect.resource.id"}, posture=Posture.Reactive, threshold=1,
                                    within=timedelta(0)),
                       ChangeFlowRunState(state=StateType.SCHEDULED, message="it crashed: it goes on where it was")))


async def automation_facts(client: PrefectClient, name: str) -> dict[str, Any] | None:
    """What the server holds under that name, None if nothing."""
    there = await _there(client, name)
    return None if there is None else _facts(there.description, there.trigger, there.actions)


async def make_automation(client: PrefectClient, plan: AutomationPlan) -> None:
    """Make it, or change what differs."""
    there = await _there(client, plan.name)
    wanted = AutomationCore(name=plan.name, description=plan.description, enabled=there is None or there.enabled, trigger=plan.trigger, actions=[plan.action])
    if there is None:
        await client.create_automation(wanted)
    else:
        await client.update_automation(there.id, wanted)


async def _there(client: PrefectClient, name: str) -> Automation | None:
    found = await client.read_automations_by_name(name)
    return found[0] if found else None


def _facts(description: str, trigger: Any, actions: Any) -> dict[str, Any]:
    """Comparable: without the ids that the server gives, sets in order."""
    says = {name: _plain(value) for name, value in trigger.model_dump(mode="json").items() if name != "id"}
    return {"description": description, "trigger": says, "actions": [action.model_dump(mode="json") for action in actions]}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return sorted(value) if isinstance(value, list) else value
