"""Which blocks of a model become NPT blocks. No torch here: the planner asks the same question."""

from __future__ import annotations

from collections.abc import Sequence

from memplan.errors import JobError


def layer_indices(layers: str | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """
    Indices of the chosen blocks, ascending; `upper_half` of n blocks is [n // 2, n), `lower_half` the rest.

    Raises `JobError` for an unknown word, an index outside [0, num_layers), a repeated index, or an empty
    choice.

    >>> layer_indices("upper_half", 5), layer_indices([3, 0], 5)
    ((2, 3, 4), (0, 3))
    """
    if isinstance(layers, str):
        half = num_layers // 2
        words = {"all": range(num_layers), "upper_half": range(half, num_layers), "lower_half": range(half)}
        if layers not in words:
            raise JobError(
                f"npt.layers is {layers!r}, which is neither {', '.join(words)} nor a list of block indices",
                hint="for example --set npt.layers=upper_half",
            )
        chosen = tuple(words[layers])
    else:
        chosen = tuple(sorted(layers))
    if not chosen:
        raise JobError(
            f"npt.layers = {layers!r} selects none of the model's {num_layers} blocks",
            hint="name at least one block, or use npt.layers: all",
        )
    outside = [index for index in chosen if not 0 <= index < num_layers]
    if outside:
        raise JobError(
            f"npt.layers names block {outside[0]}, but the model has blocks 0 to {num_layers - 1}",
            hint="use indices in that range, or all, upper_half, lower_half",
        )
    repeated = [index for index in chosen if chosen.count(index) > 1]
    if repeated:
        raise JobError(f"npt.layers names block {repeated[0]} more than once", hint="name every block once")
    return chosen
