"""The rules of a good schedule, and where in a schedule each action stands."""

from collections import defaultdict
from typing import NamedTuple

from fused_megatron.pipeline.schedule.action import Action, Schedule

RULES = {
    "complete": "every stage and microbatch has one F, and one B or one I and one W; nothing else is there",
    "order": "F before B or I, I before W, and a stage's input before its use where both are on one rank",
    "placement": "a stage's actions stand on its rank",
    "paired": "every edge between ranks has one send, behind its maker, and one receive, before its use; others none",
    "fifo": "a channel (from rank, to rank, direction) is received from in the order in which it is sent to",
    "deadlock": "every rank comes to its end, though a message is only passed when both sides are there",
    "reduction": "gradients are reduced once, behind the last backward; tied ones on all ranks in the same order",
    "memory": "no more live activations than the schedule allows",
    "ascending": "the backwards of a stage are in the order of the microbatches, so that all schedules sum alike",
    "sharding": "UNSHARD and RESHARD of a stage alternate, and it computes between them",
    "update": "where steps overlap: a stage's updates are in order, each behind the backwards that it needs",
}


class Finding(NamedTuple):
    """A breach of a rule. For what is missing, the position is that of the action that misses it, or the list's end."""

    rank: int
    position: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"rank {self.rank}, position {self.position}, rule {self.rule}: {self.message}"


class Places:
    """Where each action stands."""

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
        """(rank, position) where an action stands first."""
        places = self.of.get(action)
        return places[0] if places else None

    def missing(self, rule: str, action: Action, *users: Action) -> Finding:
        """Reported at the first action that needs it."""
        rank = self.schedule.placement[action.stage]
        position = next((place[1] for user in users if (place := self.first(user))), len(self.schedule.actions[rank]))
        return Finding(rank, position, rule, f"{action} is missing")
