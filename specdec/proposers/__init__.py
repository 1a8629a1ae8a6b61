"""Everything that can guess the next tokens: base.py is the protocol, one method per file."""

from specdec.proposers.base import Proposer
from specdec.proposers.draft import DraftModelProposer

# name -> class; wrap(proposer=name) looks here
REGISTRY: dict[str, type[Proposer]] = {DraftModelProposer.name: DraftModelProposer}

__all__ = ["REGISTRY", "DraftModelProposer", "Proposer"]
