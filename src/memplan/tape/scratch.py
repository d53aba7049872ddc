"""
Memory that CUDA kernels take inside one operation and give back before it returns, in bytes per allocation.

One table for both writers; docs/tracing.md shows it. Nothing in it has been measured by us yet.
"""

from __future__ import annotations

from typing import NamedTuple

from memplan.tape.multiprocessors import Multiprocessors


class Source(NamedTuple):
    """What an operation takes inside, and how we know."""

    takes: str
    status: str
    """`read`: from the source that is named; `measured`: also seen on a GPU; `unknown`: not counted."""
    where: str
    operators: tuple[str, ...] = ()
    """Those of torch that take it, as the trace sees them."""

    @property
    def is_counted(self) -> bool:
        """Whether plans hold it."""
        return self.status != "unknown"


_TRANSFORMERS = "aten/src/ATen/native/transformers/cuda/"
_CUDA = "aten/src/ATen/native/cuda/"
_ZERO = "deepspeed/runtime/zero/"

SOURCES = {
    "flash_backward": Source(
        "row sums; a float32 accumulator of dQ, padded to 128 rows and 32 (64) columns; dK and dV per query head where "
        "key heads are fewer",
        "read",
        f"{_TRANSFORMERS}flash_attn/flash_api.cpp, mha_bwd; the flash-attn package's csrc/flash_attn/flash_api.cpp",
        ("_scaled_dot_product_flash_attention_backward",),
    ),
    "efficient_backward": Source(
        "row sums; for 16 bits a float32 accumulator of dQ, above 64 columns also of dK and dV; one split of the keys",
        "read",
        f"{_TRANSFORMERS}attention_backward.cu",
        ("_scaled_dot_product_efficient_attention_backward",),
    ),
    "cudnn_backward": Source(
        "row sums and a float32 accumulator of dQ, in one workspace",
        "read",
        "cudnn-frontend, node/scaled_dot_product_flash_attention.h, get_fe_workspace_size_node",
        ("_scaled_dot_product_cudnn_attention_backward",),
    ),
    "softmax_backward": Source(
        "gradient times output",
        "read",
        f"{_CUDA}SoftMax.cu, _softmax_backward_data",
        ("_softmax_backward_data",),
    ),
    "embedding_backward": Source(
        "above 3072 indices: six arrays of them, and a float32 row for each",
        "read",
        f"{_CUDA}EmbeddingBackwardKernel.cu",
        ("embedding_dense_backward",),
    ),
    "index_put_accumulate": Source(
        "linear and sorted indices, and their sort",
        "read",
        f"{_CUDA}Indexing.cu, index_put_with_sort_kernel",
        ("index_put", "index_put_", "_index_put_impl_"),
    ),
    "sort": Source(
        "positions; above 4096 elements copies of keys and values",
        "read",
        f"{_CUDA}Sort.cpp and SortStable.cu, one segment",
        ("sort",),
    ),
    "cast_to_sum": Source(
        "a sum or a running sum in another dtype: all that is summed in that dtype",
        "read",
        "aten/src/ATen/native/ReduceOpsUtils.h, make_reduction; ReduceOps.cpp, impl_func_cum_ops",
        ("sum", "cumsum"),
    ),
    "batched_operand": Source(
        "a copy of an operand whose rows and columns are both strided",
        "read",
        f"{_CUDA}Blas.cpp, prepare_batch_matrix_for_cublas",
        ("bmm", "baddbmm"),
    ),
    "foreach_norm": Source(
        "partial sums: per tensor as many as the largest needs, one for every 65536 elements",
        "read",
        f"{_CUDA}ForeachReduceOp.cu",
        ("_foreach_norm",),
    ),
    "column_sum": Source(
        "sums over many rows, such as the gradient of a bias or of a norm's weight: parts of the sum for every thread, "
        "more of them on cards with more multiprocessors",
        "read",
        f"{_CUDA}Reduce.cuh, setReduceConfig and global_memory_size",
        ("sum", "mean"),
    ),
    "adafactor": Source(
        "norm of the parameter, mean of its rows, norm of the update: a few elements each",
        "read",
        "torch/optim/_adafactor.py, _single_tensor_adafactor",
    ),
    "zero_preparation": Source(
        "stages 1 and 2, preparing the states: float32 gradients of every partition",
        "read",
        f"{_ZERO}stage_1_and_2.py, initialize_optimizer_states",
    ),
    "zero_slices": Source(
        "stages 1 and 2: a copy of a bucket's slices, if several partitions have one",
        "read",
        f"{_ZERO}stage_1_and_2.py, allreduce_and_scatter",
    ),
    "zero_float_copy": Source(
        "with `offload.optimizer`, a gradient's part in float32 on its way to the host",
        "read",
        f"{_ZERO}stage_1_and_2.py, async_inplace_copy_grad_to_fp32_buffer_from_gpu; stage3.py, "
        "_offload_grad_partition_at_boundary",
    ),
    "zero_norm": Source(
        "a float64 copy of a gradient's part, of which the norm is taken",
        "read",
        f"{_ZERO}stage3.py, get_grad_norm_direct; utils.py, get_norm_dtype",
    ),
    "zero_total_norm": Source(
        "norms of all gradients in one tensor, and their squares",
        "read",
        f"{_ZERO}stage_1_and_2.py and stage3.py, get_grad_norm_direct",
    ),
    "zero3_padding": Source(
        "stage 3: what is missing of equal parts of gradients that are reduced together",
        "read",
        "deepspeed/runtime/comm/coalesced_collectives.py, reduce_scatter_coalesced",
    ),
    "zero3_overflow": Source(
        "stage 3 in float16: absolute values of all gradients, and whether each is infinite; then whether each is no "
        "number",
        "read",
        f"{_ZERO}stage3.py, has_overflow; aten/src/ATen/native/TensorCompare.cpp, isinf",
    ),
    "zero3_preparation": Source(
        "stage 3, preparing the states: float32 gradients of the largest group",
        "read",
        f"{_ZERO}stage3.py, initialize_optimizer_states",
    ),
    "zero3_whole": Source(
        "stage 3: a parameter, padded to equal parts, gathered to hang a hook on its gradient",
        "read",
        f"{_ZERO}stage3.py, create_reduce_and_remove_grad_hooks",
    ),
    "zero3_fetched": Source(
        "stage 3 with `offload.params`: parts fetched from the host to be gathered",
        "read",
        f"{_ZERO}partition_parameters.py, all_gather_coalesced",
    ),
    "plans of cuDNN's attention": Source(
        "not counted",
        "unknown",
        "cudnn-frontend, get_workspace_size: what a plan takes beside the above, forward and backward",
    ),
    "split keys of flash attention": Source(
        "not counted",
        "unknown",
        f"{_TRANSFORMERS}flash_attn/flash_api.cpp, set_params_splitkv: forward, where sequences and heads are too few "
        "to fill the card",
    ),
    "split keys of memory-efficient attention": Source(
        "not counted",
        "unknown",
        f"{_TRANSFORMERS}attention_backward.cu, num_splits_key: an accumulator per split beyond the first",
    ),
    "sums within rows, maxima, top-k, histograms": Source(
        "not counted", "unknown", f"{_CUDA}Reduce.cuh, TensorTopK.cu, SummaryOps.cu: a few MiB at most"
    ),
}
"""By the function of this module that computes it; what none does is unknown."""

EMBEDDING_SORTS_ABOVE = 3072
"""Indices up to which embedding's backward needs no sorting."""
SORT_SPILLS_ABOVE = 4096
"""Elements up to which a sort works in place."""
NORM_CHUNK_ELEMENTS = 65536
"""Elements per partial sum of _foreach_norm."""


_THREADS_OF_SUM = 512
_WARP = 32
_LEAST_VALUES, _MOST_VALUES = 16, 256
"""Of one thread, where the rows of a sum are cut into parts."""
_INDEXED_BYTES = 1 << 31
"""From so many on, a kernel gets its tensor in pieces."""


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def flash_backward(
    batch: int, heads: int, key_heads: int, length: int, key_length: int, head_dim: int, itemsize: int
) -> list[int]:
    """
    Row sums, and a float32 accumulator of dQ padded to 128 rows and 32 (64) columns; with fewer key heads than query
    heads also dK and dV per query head.
    """
    rows, columns = round_up(length, 128), round_up(head_dim, 32 if head_dim <= 128 else 64)
    scratch = [batch * heads * rows * 4, batch * rows * heads * columns * 4]
    if key_heads != heads:
        scratch += [batch * key_length * heads * head_dim * itemsize] * 2
    return scratch


def efficient_backward(
    batch: int,
    heads: int,
    length: int,
    key_length: int,
    head_dim: int,
    itemsize: int,
    value_head_dim: int | None = None,
) -> list[int]:
    """
    Row sums; for 16-bit inputs float32 accumulators of dQ and, for heads wider than 64, of dK and dV. The heads of
    values are as wide as those of queries unless `value_head_dim` says otherwise.
    """
    scratch = [batch * heads * length * 4]
    if itemsize < 4:
        widths = (head_dim, head_dim if value_head_dim is None else value_head_dim)
        elements = round_up(length, 64) * round_up(head_dim, 32)
        if max(widths) > 64:
            elements += sum(round_up(key_length, 64) * round_up(width, 64) for width in widths)
        scratch.append(batch * heads * elements * 4)
    return scratch


def cudnn_backward(batch: int, heads: int, length: int, head_dim: int) -> list[int]:
    """
    Row sums and a float32 accumulator of dQ, in one workspace: what the open frontend asks for. What the plan that it
    runs adds is not public.
    """
    return [batch * heads * length * (1 + head_dim) * 4]


def softmax_backward(num_bytes: int) -> list[int]:
    """Gradient times output, as large as the gradient."""
    return [num_bytes]


def embedding_backward(num_indices: int, width: int) -> list[int]:
    """Sorted: six index arrays and a float32 row per index."""
    if num_indices <= EMBEDDING_SORTS_ABOVE:
        return []
    return [num_indices * 8] * 6 + [512, 512, num_indices * width * 4]


def index_put_accumulate(num_indices: int) -> list[int]:
    """Linear and sorted indices, and what the sort itself takes."""
    return [num_indices * 8] * 3 + [num_indices * 16 + 65536]


def sort(num_elements: int) -> list[int]:
    """Of one row of int64: the unsorted positions and, where it is long, copies of keys and values in between."""
    positions = num_elements * 8
    return [positions] if num_elements <= SORT_SPILLS_ABOVE else [positions, 2 * positions + 65536]


def cast_to_sum(num_elements: int, itemsize: int = 8) -> list[int]:
    """Bools are summed as int64."""
    return [num_elements * itemsize]


def batched_operand(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> list[int]:
    """A matrix per batch whose rows and columns are both strided: no library takes it, so that it is copied."""
    _, rows, columns = shape
    _, row_stride, column_stride = strides
    by_row = column_stride == 1 and row_stride >= max(1, columns)
    by_column = row_stride == 1 and column_stride >= max(1, rows)
    return [] if by_row or by_column else [shape[0] * rows * columns * itemsize]


def foreach_norm(num_tensors: int, largest_elements: int) -> list[int]:
    """Partial sums: as many per tensor as the largest one needs, in float32."""
    return [num_tensors * -(-largest_elements // NORM_CHUNK_ELEMENTS) * 4]


def column_sum(rows: int, columns: int, itemsize: int, card: Multiprocessors) -> list[int]:
    """
    A sum over the rows of a contiguous matrix of floats: where threads would have more than 256 values each, blocks
    share a column. The parts are meant to be one per column and block; torch takes as many for each of the threads and
    of the columns that they load at once.

    >>> column_sum(2048, 768, 2, Multiprocessors(40, 1024)), column_sum(512, 768, 2, Multiprocessors(40, 1024))
    ([12582912, 24], [])
    """
    while rows * columns * itemsize >= _INDEXED_BYTES and rows > 1:
        rows = -(-rows // 2)
    vector = 4
    while columns % vector:
        vector //= 2
    most = _THREADS_OF_SUM // vector
    across, along = _power_of_two(columns // vector, most), _power_of_two(rows, most)
    height = min(along, most // min(across, _WARP))
    width = min(across, most // height)
    if rows < min(height * _LEAST_VALUES, _MOST_VALUES):
        return []
    values = -(-rows // height)
    blocks = -(-(columns // vector) // width)
    wanted = card.number * (card.threads // (width * height))
    if values < _MOST_VALUES or blocks > wanted:
        return []
    parts = max(min(-(-wanted // blocks), -(-values // _LEAST_VALUES)), -(-values // _MOST_VALUES))
    return [max(4, itemsize) * columns * parts * width * vector, 4 * blocks] if parts > 1 else []


def _power_of_two(value: int, most: int) -> int:
    """The last one that is not above the value, and no more than `most`."""
    return min(most, 1 << (value.bit_length() - 1))


def adafactor(itemsize: int, rows: int = 1) -> list[int]:
    """A scalar, or one per matrix of a stack."""
    return [itemsize * rows]


def zero_preparation(partitions: list[int]) -> list[int]:
    """float32, one per group; of partitions in elements."""
    return [count * 4 for count in partitions]


def zero_slices(counts: list[int], itemsize: int) -> list[int]:
    """Nothing for a single slice, which is reduced where it is."""
    return [sum(counts) * itemsize] if len(counts) > 1 else []


def zero_float_copy(count: int) -> list[int]:
    """In float32, of so many elements."""
    return [count * 4]


def zero_norm(count: int) -> list[int]:
    """In float64, of so many elements."""
    return [count * 8]


def zero_total_norm(num_gradients: int) -> list[int]:
    """float64 scalars, stacked, and raised to a power."""
    return [8 * num_gradients] * 2


def zero3_padding(counts: list[int], degree: int) -> list[int]:
    """
    Elements, a tensor for every part that is too short.

    >>> zero3_padding([4, 6], 4)
    [2]
    """
    missing = []
    for rank in range(degree):
        for count in counts:
            part = -(-count // degree)
            short = part - max(0, min(part, count - rank * part))
            missing += [short] if short else []
    return missing


def zero3_overflow(count: int, *, infinite: bool) -> list[int]:
    """Of so many elements of 16 bits: the test for infinite ones, or the one for what is no number."""
    return [count * 2, count] if infinite else [count]


def zero3_preparation(groups: list[int]) -> list[int]:
    """float32, of groups in elements."""
    return [max(groups) * 4]


def zero3_whole(part: int, degree: int, itemsize: int) -> list[int]:
    """Of a part in elements."""
    return [part * degree * itemsize]


def zero3_fetched(parts: list[int], itemsize: int) -> list[int]:
    """Of parts in elements."""
    return [part * itemsize for part in parts]
