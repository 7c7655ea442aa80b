"""Rules of a valid schedule, the breaches of them, and the positions of actions in a schedule."""

from collections import defaultdict
from typing import NamedTuple

from fused_megatron.pipeline.schedule.action import Action, Schedule

RULES = {
    "complete": "every stage and microbatch has one F, and one B or one I and one W, and no other computations",
    "order": "F comes before B or I, I before W, and a stage's input before its use if both are on one rank",
    "placement": "the actions of a stage are on its rank",
    "paired": "a tensor between ranks has one send, after its computation, and one receive, before its use; no others",
    "fifo": "the receives of a channel (from rank, to rank, direction) have the order of its sends",
    "deadlock": "every rank finishes its list, also if a message passes only when both sides are ready",
    "reduction": "gradients are reduced once, after the last backward; tied weights in the same order on all ranks",
    "memory": "a rank has no more live activations than the schedule allows",
    "ascending": "the backwards of a stage are in the order of the microbatches, so that all schedules sum equally",
    "sharding": "UNSHARD and RESHARD of a stage alternate, and the stage computes only between them",
    "update": "if steps overlap, the updates of a stage are in order, each after the backwards that it needs",
}


class Finding(NamedTuple):
    """Breach of a rule. The position of a missing action is the position of its first user, or the end of the list."""

    rank: int
    position: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"rank {self.rank}, position {self.position}, rule {self.rule}: {self.message}"


class Positions:
    """Positions (rank, index in the list of the rank) of all actions of a schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.last_stage = schedule.num_stages - 1
        self.of: defaultdict[Action, list[tuple[int, int]]] = defaultdict(list)
        self.by_stage: defaultdict[int, list[tuple[int, int, Action]]] = defaultdict(list)
        for rank, actions in enumerate(schedule.actions):
            for position, action in enumerate(actions):
                self.of[action].append((rank, position))
                self.by_stage[action.stage].append((rank, position, action))

    def first(self, action: Action) -> tuple[int, int] | None:
        """Return the first (rank, position) of an action; None if it is missing."""
        found = self.of.get(action)
        return found[0] if found else None

    def missing(self, rule: str, action: Action, *users: Action) -> Finding:
        """Return the finding for a missing action, at the position of the first user, or at the end of the list."""
        rank = self.schedule.placement[action.stage]
        position = next((found[1] for user in users if (found := self.first(user))), len(self.schedule.actions[rank]))
        return Finding(rank, position, rule, f"{action} is missing")
