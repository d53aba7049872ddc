"""Which blocks of a model become NPT blocks, and what they get. No torch: the planner asks the same questions."""

from __future__ import annotations

from collections.abc import Sequence

from memplan.errors import JobError
from memplan.job.spec import Npt


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


def modulator_shapes(
    npt: Npt, hidden_size: int, intermediate_size: int, *, is_gated: bool = True
) -> dict[str, tuple[int, ...]]:
    """
    Trained tensors of one converted block by name, in the order of the module's parameters. `is_gated`: the MLP has two
    input matrices.

    >>> modulator_shapes(Npt(variant="outer", rank=8, components=2, bias=True), 32, 48)
    {'bias': (16,), 'A': (32, 16), 'B': (16, 48), 'C': (32, 16)}
    """
    shapes = _weight_shapes(npt, hidden_size, hidden_size, intermediate_size)
    made = dict(shapes)
    if npt.target == "gate_up" or (npt.target == "all" and is_gated):
        made |= {f"up.{name}": shape for name, shape in shapes.items()}
    if npt.target == "all":
        down = _weight_shapes(npt, hidden_size, intermediate_size, hidden_size)
        made |= {f"down.{name}": shape for name, shape in down.items()}
    return made


def _weight_shapes(
    npt: Npt, hidden_size: int, in_features: int, out_features: int
) -> dict[str, tuple[int, ...]]:
    """Of the delta of one matrix."""
    features = npt.rank * (npt.components if npt.variant == "outer" else 1)
    shapes: dict[str, tuple[int, ...]] = {"bias": (features,)} if npt.bias else {}
    shapes |= {"A": (in_features, features), "B": (features, out_features)}
    if npt.variant != "diag":
        shapes["C"] = (hidden_size, features)
    return shapes


def check_target(npt: Npt, *, is_gated: bool) -> None:
    """Raises `JobError` where `npt.target` names a matrix that the MLPs of the model do not have."""
    if npt.target == "gate_up" and not is_gated:
        raise JobError(
            "npt.target is gate_up, but the MLPs of this model have one input matrix",
            hint="use --set npt.target=gate, which modulates it",
        )
