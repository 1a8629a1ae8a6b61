"""Text that is given: a logits processor that holds a model to it, at the model's full cost.

The built-in pair hardly copies, so what lookup proposers gain on copied text is measured with its
output held to the copy. Such figures are of the system, not of the pair: label them HELD.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from specdec.errors import InvalidArgumentError

HELD = "held to the reference"
_NEVER = -1e4


class HeldTo(LogitsProcessor):
    """Leaves one token possible at each position: that of the text, prompt included.

    Works alike in specdec and in transformers' generate, for one prompt without padding. Behind the
    end of the text its last token is repeated. A draft model shares the target's processors; give
    it proposer_options={"processors": False}, or it is held too.
    """

    def __init__(self, text: Sequence[int]) -> None:
        if not text:
            raise InvalidArgumentError("text: it is empty")
        self.text = tuple(text)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        held = torch.full_like(scores, _NEVER)
        held[:, self.text[min(input_ids.shape[1], len(self.text) - 1)]] = 0.0
        return held
