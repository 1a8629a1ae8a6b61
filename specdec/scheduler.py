"""Which sequences take part in the next step. For now: all that were admitted."""

from specdec.errors import InvalidArgumentError
from specdec.sequence import Sequence


class Scheduler:
    """Waiting and running sequences, in order of arrival."""

    def __init__(self) -> None:
        self.running: list[Sequence] = []

    def admit(self, sequence: Sequence) -> None:
        self.running.append(sequence)

    def next_batch(self) -> list[Sequence]:
        """The sequences of the coming step."""
        return list(self.running)

    def retire(self, sequence: Sequence) -> None:
        self.running.remove(sequence)

    def of_request(self, request_id: str) -> list[Sequence]:
        """The running sequences of a request; raises for an unknown one."""
        found = [s for s in self.running if s.request_id == request_id]
        if not found:
            known = ", ".join(sorted({s.request_id for s in self.running})) or "none"
            raise InvalidArgumentError(
                f"request_id={request_id!r} is not running; running: {known}"
            )
        return found
