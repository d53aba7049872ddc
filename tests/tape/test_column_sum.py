"""What sums over rows take inside on a GPU, by hand from Reduce.cuh, and where plans have it."""

from __future__ import annotations

import pytest

from memplan.gpu.catalogue import find_gpu
from memplan.job.spec import Job
from memplan.tape.behaviour import Behaviour
from memplan.tape.multiprocessors import A100, FULL_CHIPS, Multiprocessors, multiprocessors
from memplan.tape.scratch import column_sum
from memplan.units import MiB

T4 = Multiprocessors(40, 1024)


@pytest.mark.parametrize(
    ("card", "rows", "columns", "parts", "blocks"),
    [
        # Blocks of 32 x 4 threads, 4 columns to a thread, which adds 512 values: no more blocks than leave it 16.
        (T4, 2048, 768, 32, 6),
        # 8 such blocks on each of 40 multiprocessors, which 24 blocks are enough columns for: 14 parts fill the card.
        (T4, 2048, 3072, 14, 24),
        (A100, 4096, 4096, 54, 32),
        # Never fewer than leave a thread 256 values.
        (T4, 1 << 17, 4096, 128, 32),
    ],
)
def test_blocks_share_a_column(
    card: Multiprocessors, rows: int, columns: int, parts: int, blocks: int
) -> None:
    """In float32, for each of 32 threads and 4 columns at once; and a counter for every block of columns."""
    assert [4 * columns * parts * 32 * 4, 4 * blocks] == column_sum(rows, columns, 2, card)


def test_few_rows_are_added_up_by_one_block() -> None:
    """A thread of a block of 4 has 256 values from 1021 rows on."""
    assert [] == column_sum(1020, 768, 2, T4) == column_sum(8, 768, 2, T4) == column_sum(1, 768, 4, T4)
    assert column_sum(1021, 768, 2, T4)


def test_columns_that_are_not_loaded_four_at_a_time() -> None:
    """30522 go in pairs: blocks of 32 x 8, of which a T4 runs 160 at once and there are 477."""
    assert [] == column_sum(8192, 30522, 2, T4)
    # 864 on an A100 are two for each.
    assert [4 * 30522 * 4 * 32 * 2, 4 * 477] == column_sum(8192, 30522, 2, A100)


def test_a_tensor_of_2_gib_is_added_up_in_pieces() -> None:
    """A kernel counts its bytes in 31 bits."""
    assert column_sum(1 << 18, 4096, 2, A100) == column_sum(1 << 17, 4096, 2, A100)
    assert 2**31 == (1 << 18) * 4096 * 2


def test_cards() -> None:
    """As the catalogue has them; as many as the chip can have where it has none; an A100's for no card."""
    assert T4 == multiprocessors("t4") == Behaviour.for_job(Job(model="gpt2", gpu="Tesla T4")).multiprocessors
    assert A100 == multiprocessors("NVIDIA A100-SXM4-80GB") == multiprocessors(None)
    unknown = find_gpu("NVIDIA L20")
    assert unknown.multiprocessors is None
    assert unknown.compute_capability is not None
    assert multiprocessors("NVIDIA L20").number == FULL_CHIPS[unknown.compute_capability]


def test_no_card_has_more_than_its_chip() -> None:
    from memplan.gpu.catalogue import list_gpus

    known = [gpu for gpu in list_gpus() if gpu.multiprocessors and gpu.compute_capability in FULL_CHIPS]
    assert len(known) > 50
    assert all((gpu.multiprocessors or 0) <= FULL_CHIPS[gpu.compute_capability or (0, 0)] for gpu in known)


def test_plans_have_it() -> None:
    """gpt2 on a T4: biases of 768, 2304 and 3072 columns and, of 2048 tokens, one of the largest at a time."""
    from memplan.model import architecture_from_config
    from memplan.model.resolve import resolve_config
    from memplan.tape.writer import write_tape

    config = resolve_config("gpt2", offline=True)
    architecture = architecture_from_config(dict(config.config), name="gpt2", source=config.source)
    found = {}
    for length in (64, 256):
        job = Job(model="gpt2", method="full", gpu="Tesla T4", micro_batch_size=8, max_seq_len=length)
        written = write_tape(job, architecture)
        sizes = written.flatten().sizes
        found[length] = {
            num_bytes
            for storage, num_bytes in enumerate(sizes)
            if storage and written.describe(storage).where.endswith("parts of the sum") and num_bytes > MiB
        }
    assert found == {64: set(), 256: {12 * MiB, 21 * MiB, 81 * MiB // 4}}
