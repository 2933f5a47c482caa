"""The benchmark of steps of generation, as far as it runs without a GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import decode
import decode_methods
import latent_methods
import pytest
import result_tables
import torch
from accuracy import distance, exact_attention
from decode_methods import CUDNN, FA3, FA3_PLANNED, FLASHINFER, OURS, VLLM, Case, Libraries
from latent_methods import FLASHMLA, SGLANG, LatentCase

import flash_attn_interface

SMALL: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 32}
PACKED: dict[str, Any] = {"queries": 7, "page": 16, "packed": (1, 7, 1)}


def test_bytes_are_keys_and_values_in_use_queries_and_results() -> None:
    case = Case("one", 2, 1000, heads=8, kv_heads=2, head_dim=64, queries=3)
    keys, rows = 2 * 1000 * 2, 2 * 3 * 8
    assert case.bytes == 2 * 64 * (2 * keys + 2 * rows)
    ragged = Case("ragged", 4, 1000, ragged=True)
    assert ragged.lengths == Case("ragged", 4, 1000, ragged=True).lengths
    assert all(1 <= x <= 1000 for x in ragged.lengths)
    assert ragged.bytes < Case("whole", 4, 1000).bytes
    packed = Case("packed", 3, 100, **SMALL, **PACKED)
    assert packed.bytes == 2 * 32 * (2 * 3 * 100 * 2 + 2 * 9 * 4)


@pytest.mark.parametrize("changed", [{"queries": 3}, {"queries": 3, "ragged": True}, PACKED])
def test_flops_are_of_keys_that_each_query_sees(changed: dict[str, Any]) -> None:
    case = Case("any", 3, 100, **SMALL, **changed)
    counts = case.packed or (case.queries,) * 3
    seen = [n for count, end in zip(counts, case.lengths) for n in range(end - count + 1, end + 1)]
    assert case.flops == 2 * 2 * 4 * 32 * sum(seen)


def test_calls_of_a_graph_do_not_fit_into_l2_together() -> None:
    every = (*decode.cases(quick=False), *decode.chunks(), *decode.mixed(), *decode.models())
    for case in (*every, *latent_methods.cases()):
        cache = case.batch * case.seqlen * case.row_bytes
        many = case.calls in (decode_methods.MAX_CALLS, case.layers)
        assert many or case.calls * cache >= decode_methods.ROTATING_BYTES
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
    others = {"head dim 64", "head dim 256", "MHA", "MQA"}
    assert {(kind, batch) for kind in others for batch in (1, 16)} <= {
        (case.kind, case.batch) for case in cases
    }
    assert {"4 queries", "append and rotate"} <= {case.kind for case in cases}


def test_mixed_batches_are_what_their_names_say() -> None:
    cases = list(decode.mixed())
    totals = {case.kind: (case.batch, case.queries, sum(case.packed)) for case in cases}
    assert totals == {
        "31 of 1 query, 1 of 512": (32, 512, 543),
        "60 of 1 query, 4 of 300": (64, 300, 1260),
        "16 of 20 to 200 queries": (16, 200, 16 * 110),
        "64 of 1 to 8 queries": (64, 8, 64 * 9 // 2),
    }
    assert len(cases) == 9
    for case in cases:
        assert (case.batch, case.queries) == (len(case.packed), max(case.packed))
        assert (case.seqlen, case.head_dim, case.page) == (4000, 128, 64)


def test_packed_queries_have_pages_for_all_keys() -> None:
    inputs, *_ = decode_methods.all_inputs(Case("packed", 3, 100, **SMALL, **PACKED), "cpu")
    assert inputs.q.shape == (9, 4, 32)
    assert inputs.packed["cu_seqlens_q"].tolist() == [0, 1, 8, 9]
    assert inputs.key_starts.tolist() == [0, 100, 200, 300]
    assert inputs.table is not None
    assert inputs.table.shape == (3, 7)
    assert sorted(inputs.table.flatten().tolist()) == list(range(len(inputs.k)))


def test_layers_have_caches_of_their_own_and_share_lengths_and_positions() -> None:
    case = Case("3 layers", 2, 64, new=1, layers=3, **SMALL)
    first, *others = inputs = decode_methods.all_inputs(case, "cpu")
    assert len(inputs) == 3
    assert all(x.lengths is first.lengths and x.rotary is first.rotary for x in others)
    assert len({x.k.data_ptr() for x in inputs}) == 3
    steps = decode_methods.all_inputs(Case("steps", 2, 64, **SMALL), "cpu")
    assert steps[1].lengths is not steps[0].lengths


@pytest.mark.parametrize(
    "case",
    [
        Case("plain", 2, 64, **SMALL),
        Case("ragged", 3, 64, ragged=True, **SMALL),
        Case("pages", 2, 64, page=16, queries=4, **SMALL),
        Case("append and rotate", 2, 64, new=1, **SMALL),
        Case("packed", 3, 100, **SMALL, **PACKED),
    ],
    ids=lambda case: case.kind,
)
def test_flash_attention_3_is_asked_for_the_same(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The operators of that name that this package has.
    assert flash_attn_interface.flash_attn_3_gpu
    monkeypatch.setattr(decode_methods, "MAX_CALLS", 2)
    first, second = decode_methods.all_inputs(case, "cpu")
    methods = Libraries(Path("unused")).methods(first)
    for inputs in (first, second):
        expected = methods[OURS](inputs)
        assert distance(methods[FA3](inputs), expected) < 1e-3
        assert distance(methods[FA3_PLANNED](inputs), expected) < 1e-3


def test_packed_queries_are_the_last_of_their_sequences() -> None:
    inputs, *_ = decode_methods.all_inputs(Case("packed", 3, 100, **SMALL, **PACKED), "cpu")
    assert inputs.table is not None
    starts = inputs.packed["cu_seqlens_q"].tolist()
    found = decode_methods.ours_packed(inputs)
    for i, pages in enumerate(inputs.table):
        rows = slice(starts[i], starts[i + 1])
        q = torch.zeros(100, *found.shape[1:])
        q[100 - rows.stop + rows.start :] = inputs.q[rows]
        k, v = (x[pages].flatten(0, 1)[:100].repeat_interleave(2, 1) for x in (inputs.k, inputs.v))
        exact = exact_attention(q[None], k[None], v[None], causal=True)[0]
        assert distance(found[rows], exact[100 - rows.stop + rows.start :]) < 0.01


def test_a_plan_is_made_once_for_all_layers_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = iter(range(10))
    monkeypatch.setattr(decode_methods, "fa3_plan", lambda first: next(plans))
    monkeypatch.setattr(decode_methods, "fa3", lambda inputs, plan: plan)
    model = decode_methods.all_inputs(Case("layers", 1, 64, layers=3, **SMALL), "cpu")
    step = decode_methods.fa3_planned(model[0])
    assert [step(inputs) for inputs in model * 2] == [1, 1, 1, 2, 2, 2]
    plain = decode_methods.all_inputs(Case("plain", 1, 64, **SMALL), "cpu")
    step = decode_methods.fa3_planned(plain[0])
    assert [step(inputs) for inputs in plain[:3] * 2] == [3] * 6


def test_methods_take_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fa3_planned", "vllm_planned", "flashinfer_planned"):
        monkeypatch.setattr(decode_methods, name, lambda first: None)
    libraries = Libraries(Path("a"), Path("b"), Path("c"))

    def methods(**changed: Any) -> set[str]:
        case = Case("any", seqlen=64, **{"batch": 2, **SMALL, "head_dim": 128, **changed})
        return set(libraries.methods(decode_methods.all_inputs(case, "cpu")[0]))

    monkeypatch.setattr(decode_methods, "MAX_CALLS", 1)
    everyone = {OURS, FA3, FA3_PLANNED, VLLM, FLASHINFER, CUDNN}
    assert methods() == everyone
    assert methods(head_dim=64) == everyone - {FLASHINFER}
    assert methods(ragged=True) == everyone - {CUDNN}
    assert methods(page=16) == methods(queries=4) == everyone - {FLASHINFER, CUDNN}
    assert methods(new=1) == {OURS, FA3, FA3_PLANNED}
    assert methods(batch=3, **PACKED) == {OURS, FA3, FA3_PLANNED, VLLM}


def test_latents_are_read_once_as_keys_and_as_values() -> None:
    case = LatentCase("any", 2, 100, heads=16, queries=3)
    assert case.bytes == 2 * 2 * 100 * (512 + 64)
    assert case.flops == 2 * 2 * 16 * (98 + 99 + 100) * (512 + 64 + 512)
    assert case.calls == decode_methods.MAX_CALLS


def test_latent_cases_are_steps_that_servers_run() -> None:
    cases = list(latent_methods.cases())
    plain = {(case.heads, case.batch, case.seqlen) for case in cases if case.kind == "1 query"}
    assert {heads for heads, *_ in plain} == {16, 128}
    assert {batch for _, batch, _ in plain} == set(decode.BATCHES)
    assert {seqlen for *_, seqlen in plain} == set(decode.SEQLENS)
    assert {case.page for case in cases} == {1, 64}
    assert {case.queries for case in cases} == {1, 2, 4, 512}
    assert any(case.ragged for case in cases)
    assert len(cases) == 16


@pytest.mark.parametrize("changed", [{}, {"queries": 3}, {"page": 1}, {"ragged": True}])
def test_all_are_asked_for_the_same_of_views_of_one_cache(
    changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_methods, "MAX_CALLS", 1)
    case = LatentCase("any", 2, 70, heads=4, **changed)
    inputs: Any
    (inputs,) = decode_methods.all_inputs(case, "cpu", latent_methods.Latents)
    assert {x.stride(-3) for x in (inputs.k, inputs.v)} == {512 + 64}
    expected = exact_latents(inputs)
    methods = latent_methods.methods_of(Libraries(Path("unused")), inputs)
    assert set(methods) == {OURS, FA3, FA3_PLANNED}
    assert all(distance(method(inputs), expected) < 0.01 for method in methods.values())
    public = flash_attn_interface.flash_attn_with_kvcache(
        *(inputs.q, inputs.k, inputs.v),
        qv=inputs.qv,
        cache_seqlens=inputs.lengths,
        page_table=inputs.table,
        softmax_scale=(128 + 64) ** -0.5,
        causal=True,
    )
    assert torch.equal(public, methods[OURS](inputs))


def test_ours_leaves_the_names_of_flash_attention_3_to_its_extension() -> None:
    code = (
        "import latent_methods, torch; from decode_methods import all_inputs;"
        "case = latent_methods.LatentCase('any', 1, 64, 2, layers=1);"
        "latent_methods.ours(*all_inputs(case, 'cpu', latent_methods.Latents));"
        "assert not hasattr(torch.ops.flash_attn_3, 'fwd')"
    )
    folder = Path(decode.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def exact_latents(inputs: Any) -> torch.Tensor:
    """In float64, of whole rows of q and of the cache."""
    outs = []
    for q, pages, length in zip(inputs.whole_q.double(), inputs.table, inputs.case.lengths):
        rows = inputs.cache[pages].flatten(0, 2)[:length].double()
        scores = torch.einsum("qhd,kd->hqk", q, rows) * (128 + 64) ** -0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(length - len(q) + 1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqk,kd->qhd", weights, rows[:, :512]))
    return torch.stack(outs)


def test_flashmla_and_sglang_take_pages_of_their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fa3_planned", "vllm_planned", "sglang_planned", "flashmla_planned"):
        monkeypatch.setattr(latent_methods, name, lambda first: None)
    monkeypatch.setattr(decode_methods, "MAX_CALLS", 1)
    paths = {name: Path("a") for name in ("vllm", "sglang", "flashmla")}

    def methods(page: int) -> set[str]:
        case = LatentCase("any", 1, 64, 2, page=page)
        inputs, *_ = decode_methods.all_inputs(case, "cpu", latent_methods.Latents)
        return set(latent_methods.methods_of(Libraries(Path("b"), **paths), inputs))

    everyone = {OURS, FA3, FA3_PLANNED, VLLM, SGLANG, FLASHMLA}
    assert methods(64) == everyone - {SGLANG}
    assert methods(1) == everyone - {FLASHMLA}


def test_chunks_become_a_table() -> None:
    case = Case("chunk", 1, 100, heads=4, kv_heads=2, head_dim=64, queries=3, page=16)
    assert case.flops == 4 * 4 * 64 * (98 + 99 + 100)
    us, tflops = {OURS: 10.0, FA3: 12.5}, {OURS: 500.0, FA3: 400.0}
    row = {**asdict(case), "us": us, "tflops": tflops, "ratio": 1.25}
    text = result_tables.chunks_table([row])
    assert "geometric mean 1.25" in text
    assert "| 4 of 2 | 64 | 3 | 100, pages of 16 | 1.25 | 500 (10.0) | 400 (12.5) |" in text


def test_mixed_batches_become_a_table() -> None:
    case = Case("1 of 1 query, 1 of 3", 2, 100, queries=3, page=16, packed=(1, 3), **SMALL)
    us = {OURS: 10.0, FA3: 12.5, VLLM: 12.0}
    one = {**asdict(case), "us": us, "of_ceiling": 0.75, "ratio": 1.2}
    two = {**one, "us": {OURS: 10.0, FA3: 10.8}, "ratio": 1.08}
    text = result_tables.mixed_table([one, two])
    assert text.startswith("**Mixed batches**, us; geometric mean 1.14\n\n| Sequences | Heads |")
    assert "| 1 of 1 query, 1 of 3 | 4 of 2 | 0.750 | 1.20 | 10.0 | 12.5 | 12.0 |" in text
    assert "| 1 of 1 query, 1 of 3 | 4 of 2 | 0.750 | 1.08 | 10.0 | 10.8 | - |" in text


def test_only_a_result_that_has_mixed_batches_shows_them() -> None:
    us = {OURS: 10.0, FA3: 12.5}
    row = {"kind": "any", "batch": 1, "seqlen": 8, "heads": 4, "kv_heads": 2, "us": us}
    rows = [{**row, "of_ceiling": 0.75, "ratio": 1.25}]
    told = ("device", "date", "driver", "power_limit")
    result = {**dict.fromkeys(told, "-"), "versions": {}, "read_gbps": 1.0, "rows": rows}
    assert "Mixed" not in result_tables.decode_section(result)
    assert "Latent" not in result_tables.decode_section({**result, "latent": []})
    assert "**Mixed batches**" in result_tables.decode_section({**result, "mixed": rows})


def test_latents_become_a_table() -> None:
    us = {OURS: 10.0, FA3: 12.5}
    rates = {"gbps": {OURS: 2000.0, FA3: 1600.0}, "tflops": {OURS: 100.0, FA3: 80.0}}
    row = {**asdict(LatentCase("1 query", 16, 8192, 128)), **rates, "us": us, "ratio": 1.25}
    text = result_tables.latent_table([row])
    assert text.startswith("**Latent attention**, us; geometric mean 1.25\n\n| Call | Heads |")
    assert "| 1 query | 128 | 16 | 8192 | 2000 | 100 | 1.25 | 10.0 | 12.5 |" in text


def test_layers_become_a_table() -> None:
    us = {OURS: 10.0, FA3: 12.5}
    row = {"batch": 16, "seqlen": 4096, "layers": 32, "us": us, "ratio": 1.25, "cpu_us": us}
    text = result_tables.layers_table([row])
    assert "| 16 | 4096 | 1.25 | 320 (10.0) | 400 (12.5) |" in text
