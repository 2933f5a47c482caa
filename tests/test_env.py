"""Environment variables: what each text means, and what an unknown one is answered with."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from flash_attn import _env


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in _env.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


def test_every_variable_is_a_module_member_under_its_own_name() -> None:
    members = {name: x for name, x in vars(_env).items() if isinstance(x, _env.Variable)}
    assert members == {variable.name: variable for variable in _env.VARIABLES}


@pytest.mark.parametrize("variable", _env.VARIABLES, ids=lambda v: v.name)
def test_unset_or_empty_gives_the_default(
    variable: _env.Variable[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert variable.get() == variable.default
    monkeypatch.setenv(variable.name, "  ")
    assert variable.get() == variable.default


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [(v, text, value) for v in _env.VARIABLES for text, value in v.choices.items()],
    ids=lambda x: x.name if isinstance(x, _env.Variable) else str(x),
)
def test_a_choice_gives_its_value_in_any_case_and_at_once(
    variable: _env.Variable[object], text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spelling in (text, text.upper(), text.lower(), f" {text} "):
        monkeypatch.setenv(variable.name, spelling)
        assert variable.get() == value


def test_an_unknown_text_is_told_with_name_and_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_BACKEND", "gpu")
    message = r"^FLASH_ATTN_BACKEND is set to 'gpu'; it must be one of: auto, cpu, cuda, triton"
    with pytest.raises(ValueError, match=message):
        _env.FLASH_ATTN_BACKEND.get()


def test_an_older_name_is_read_after_the_own_one(monkeypatch: pytest.MonkeyPatch) -> None:
    switch = _env.Variable(
        name="FLASH_ATTN_TEST_SWITCH",
        default=False,
        choices=MappingProxyType({"0": False, "1": True}),
        doc="",
        aliases=("OLD_TEST_SWITCH",),
    )
    monkeypatch.setenv("OLD_TEST_SWITCH", "1")
    assert switch.get() is True
    monkeypatch.setenv("FLASH_ATTN_TEST_SWITCH", "0")
    assert switch.get() is False
    monkeypatch.delenv("FLASH_ATTN_TEST_SWITCH")
    monkeypatch.setenv("OLD_TEST_SWITCH", "yes")
    with pytest.raises(ValueError, match="OLD_TEST_SWITCH is set to 'yes'"):
        switch.get()
