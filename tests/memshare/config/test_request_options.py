"""What one request may ask for, and how it is told that it asked wrongly."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from memshare.request_options import RequestOptions, RequestOptionsError, parse_request_options

# Per option: good values, bad values. An option added later must be added here too.
VALUES: dict[str, tuple[list[object], list[object]]] = {
    "memshare": (["on", "off"], ["auto", 1, None, True]),
    "memshare_step_threshold": ([0, 0.5, 1.0], [-0.1, 1.1, "x", "0.5", float("nan"), True]),
    "memshare_block_threshold": ([0, 0.5, 1.0], [-0.1, 1.1, "x", [0.5], float("inf"), True]),
    "memshare_max_shared_fraction": ([0, 0.5, 1.0], [-0.1, 1.1, "0.1", [0.5], {}, True]),
    "memshare_max_kept_tokens": ([1, 4096], [0, -1, 1.5, "64", [64], {}, True]),
    "memshare_usage": (["on", "off"], ["auto", 1, None, True]),
}
BAD = [(name, value) for name, (_, bad) in VALUES.items() for value in bad]
GOOD = [(name, value) for name, (good, _) in VALUES.items() for value in good]


def test_every_option_is_tested() -> None:
    assert VALUES.keys() == RequestOptions.model_fields.keys()


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_a_good_value_is_taken(name: str, value: object) -> None:
    asked = getattr(parse_request_options({name: value}), name)
    assert asked == (value if value in ("on", "off") else float(str(value)))


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_named_with_its_field_and_the_fix(name: str, value: object) -> None:
    with pytest.raises(RequestOptionsError) as caught:
        parse_request_options({name: value})
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"vllm_xargs.{name} = {value!r}: ")
    fix = " ".join((RequestOptions.model_fields[name].description or "").split())
    assert fix
    assert line.endswith(fix)


def test_an_unknown_option_is_named_with_those_that_exist() -> None:
    with pytest.raises(RequestOptionsError) as caught:
        parse_request_options({"memshare_treshold": 0.5})
    assert "vllm_xargs.memshare_treshold: there is no such option" in str(caught.value)
    assert all(name in str(caught.value) for name in VALUES)


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(RequestOptionsError) as caught:
        parse_request_options({"memshare": "no", "memshare_step_threshold": 2, "memshare_x": 1})
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("extra", [None, {}, {"top_k_extra": 5, "kv_transfer_params": {"a": 1}}])
def test_other_keys_are_left_alone(extra: dict[str, object] | None) -> None:
    options = parse_request_options(extra)
    assert options == RequestOptions()
    assert options.enabled


def test_opting_out() -> None:
    assert not parse_request_options({"memshare": "off", "other": 1}).enabled


def test_options_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse_request_options(None).memshare = "off"  # type: ignore[misc]
