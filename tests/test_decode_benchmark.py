"""The benchmark of steps of generation, as far as it runs without a GPU."""

from __future__ import annotations

import decode
import pytest


def test_bytes_are_keys_and_values_in_use_queries_and_results() -> None:
    case = decode.Case("one", 2, 1000, heads=8, kv_heads=2, head_dim=64, queries=3)
    keys, rows = 2 * 1000 * 2, 2 * 3 * 8
    assert case.bytes == 2 * 64 * (2 * keys + 2 * rows)
    ragged = decode.Case("ragged", 4, 1000, ragged=True)
    assert ragged.lengths == decode.Case("ragged", 4, 1000, ragged=True).lengths
    assert all(1 <= x <= 1000 for x in ragged.lengths)
    assert ragged.bytes < decode.Case("whole", 4, 1000).bytes


def test_calls_of_a_graph_do_not_fit_into_l2_together() -> None:
    for case in decode.cases(quick=False):
        cache = case.batch * case.seqlen * case.row_bytes
        assert case.calls == decode.MAX_CALLS or case.calls * cache >= decode.ROTATING_BYTES
        # Beside another call's, an H100's L2 of 50 MB keeps nothing of it.
        assert case.calls * cache > 2.5e8


@pytest.mark.parametrize("quick", [True, False])
def test_cases_are_steps_that_people_run(quick: bool) -> None:
    cases = list(decode.cases(quick))
    plain = [case for case in cases if case.kind == "heads 32 of 8"]
    assert {case.batch for case in plain} <= set(decode.BATCHES)
    assert {(1, 1024), (1, 8192), (1, 32768)} <= {(case.batch, case.seqlen) for case in plain}
    assert quick or len(plain) == len(decode.BATCHES) * len(decode.SEQLENS)
    assert {1, 16, 64, 256} <= {case.page for case in cases}
    assert {"MHA", "MQA", "4 queries", "append and rotate"} <= {case.kind for case in cases}
