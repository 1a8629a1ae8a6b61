"""One law for requests that are sampled alike: those of one law are drafted and judged together."""

from dataclasses import replace
from weakref import WeakValueDictionary

from specdec.sampling.law import Law
from specdec.sampling.params import SamplingParams


class SharedLaws:
    """The laws in use in one engine, by what they were made from; nothing is kept alive.

    Only laws without a state are shared: not those of processors that the caller hands over. For
    one engine, as a law's tokens are held against its vocabulary once.
    """

    def __init__(self) -> None:
        self._laws: WeakValueDictionary[SamplingParams, Law] = WeakValueDictionary()

    def of(self, params: SamplingParams) -> Law:
        """The law that these parameters describe; a new one where they cannot be compared, as with
        a mapping or a list in them."""
        if params.processors:
            return params.law()
        key = replace(params, max_new_tokens=1)  # says nothing of the law
        try:
            found = self._laws.get(key)
        except TypeError:  # unhashable
            return params.law()
        if found is None:
            found = self._laws[key] = params.law()
        return found
