"""Which adapters have a metric label of their own: a bounded number of those used most. Pure.

The others share OTHER. An adapter that has no label gets one once it has been used more than
TAKE_OVER times as often as the one that is used least of those that have; that one joins the
others. So labels change hands seldom, and each counter only grows as long as its label lives.
"""

import hashlib
from collections import OrderedDict

import msgspec

from frontend.adapters import written
from pipeline.messages import AdapterKey

OTHER = "other"
TAKE_OVER = 2
MAX_COUNTED = 4096  # adapters without a label whose uses are counted; the latest
MAX_LABEL_CHARACTERS = 200
DIGEST_CHARACTERS = 16


def label_of(key: AdapterKey) -> str:
    """How a metric names an adapter. What some token was needed for has no name but a digest."""
    name = written(key)
    if not key.scope and len(name) <= MAX_LABEL_CHARACTERS:
        return f"{key.source}:{name}"
    digest = hashlib.sha256(msgspec.msgpack.encode(key)).hexdigest()[:DIGEST_CHARACTERS]
    return f"{key.source}:{'private' if key.scope else 'long'}-{digest}"


class AdapterLabels:
    """labels is how many adapters have one at most."""

    def __init__(self, labels: int) -> None:
        self._labels = labels
        self._uses_of: dict[AdapterKey, int] = {}  # of those with a label
        self._uses_of_others: OrderedDict[AdapterKey, int] = OrderedDict()

    def find(self, key: AdapterKey) -> str:
        """The label that counts for this adapter now."""
        return label_of(key) if key in self._uses_of else OTHER

    def use(self, key: AdapterKey) -> str | None:
        """Count a use; gives the label that has ended with it, if one has."""
        if key in self._uses_of:
            self._uses_of[key] += 1
            return None
        uses = self._uses_of_others.pop(key, 0) + 1
        ended = None
        if len(self._uses_of) == self._labels:
            least = min(self._uses_of, key=self._uses_of.__getitem__, default=None)
            if least is None or uses <= TAKE_OVER * self._uses_of[least]:
                self._count_other(key, uses)
                return None
            self._count_other(least, self._uses_of.pop(least))
            ended = label_of(least)
        self._uses_of[key] = uses
        return ended

    def _count_other(self, key: AdapterKey, uses: int) -> None:
        self._uses_of_others[key] = uses
        if len(self._uses_of_others) > MAX_COUNTED:
            self._uses_of_others.popitem(last=False)
