"""Moving bytes within one tensor, whose old and new place may overlap."""

from torch import Tensor


def move_down(memory: Tensor, source: int, target: int, nbytes: int, scratch: Tensor) -> None:
    """memory[target : target + nbytes] = what was in memory[source : source + nbytes].

    memory   uint8, on any device; there, all of it happens on the current stream
    scratch  uint8 on the same device, of any size; its contents are lost
    Raises ValueError where target is behind source.

    From the front, in pieces that are read before anything behind them is written:

        target |........ done ........| next |        | next |......... to be read .........|
                                       new place       old place
    """
    if target > source:
        raise ValueError(f"bytes at {source} are to be moved up, to {target}")
    shift = source - target
    piece = max(shift, len(scratch))
    for start in range(0, nbytes, piece):
        count = min(piece, nbytes - start)
        old = memory[source + start : source + start + count]
        new = memory[target + start : target + start + count]
        if count <= shift:
            new.copy_(old)
        else:
            scratch[:count].copy_(old)
            new.copy_(scratch[:count])
