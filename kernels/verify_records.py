"""Records that the verification kernels share, by the places of their fields; int64, but for laws.

One pointer for several numbers: a kernel has few scalar registers, and each pointer takes two.
"""

import triton.language as tl

# A proposal.
NODE = tl.constexpr(0)  # the row that it names
LAW = tl.constexpr(1)  # its stored law, -1 for a point mass
PLACE = tl.constexpr(2)  # which of the parent's laws that is
COPY = tl.constexpr(3)  # earlier proposals of the same row
REDUCED = tl.constexpr(4)  # 1: drawn from what earlier siblings left of their law, else 0
DRAW = tl.constexpr(5)  # fields

# What a row decided.
SOUND = tl.constexpr(0)  # 1: what it read was a law, else 0
TOKEN = tl.constexpr(1)  # the token that follows it where no child was taken
CHILD = tl.constexpr(2)  # the row of the child that its coins took, -1 for none; recursive only
DECIDED = tl.constexpr(3)  # fields

# A law, float32: p(x) = exp(score - peak) / total where score >= cut.
PEAK, TOTAL, CUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LENGTH = tl.constexpr(3)  # of its list, or the vocabulary's: the bits of an int32
LAW_NUMBERS = tl.constexpr(4)  # fields
