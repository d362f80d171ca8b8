"""Options' names in errors of the Python API."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.optionwords import as_arguments, spoken_as_arguments
from coordinator.pool import Pool
from scheduling.errors import ConfigError, RequestError


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("--slots is 0: it must be 1 or more", "slots is 0: it must be 1 or more"),
        ("--slots 9 with --contexts 1: use --contexts 3 or more", "slots=9 with contexts=1: use contexts=3 or more"),
        ("--lease is 0.5: it must be 2 or more", "lease_s is 0.5: it must be 2 or more"),
        ("--rope-scale 2.5 needs --rope-scaling linear or yarn", "rope_scale 2.5 needs rope_scaling='linear' or yarn"),
        ("run on the CPU with --device cpu", "run on the CPU with device='cpu'"),
        ("without --no-flash-attention (or --cache-type-k)", "without flash_attention=False (or cache_type_k)"),
        ("with --no-speculate: leave", "with speculate=False: leave"),
        ("--lora a.gguf:x: give PATH", "loras a.gguf:x: give PATH"),
        ("-m: a name that is no text", "model: a name that is no text"),
        ("measure again with `llmpi bench engine --calibrate --contexts 3`", None),
        ("`a --slots 2` and --slots 2", "`a --slots 2` and slots=2"),
        ("set --unheard-of or OMPI --bind-to none", None),
        ("a--slots b---slots", None),
        ("the model /data/--slots 4/x.gguf, '--slots 4'", None),
        ("--temperature: temperature is -1", "temperature: temperature is -1"),
        ("use --ctx 2251 or more", "use ctx=2251 or more"),
    ],
)  # fmt: skip
def test_flags_are_said_as_arguments_and_the_rest_stays(said: str, expected: str | None) -> None:
    assert as_arguments(said) == (said if expected is None else expected)


def test_an_error_keeps_its_type_and_what_else_it_carries() -> None:
    with pytest.raises(RequestError, match="slots=3") as caught, spoken_as_arguments():
        raise RequestError("--slots 3", param="n")
    assert caught.value.param == "n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"slots": 0}, "slots is 0"),
        ({"flash_attention": False, "split": "tensor", "gpus_per_rank": 2}, "split='tensor' needs flash attention"),
        ({"lease_s": 0.1}, "lease_s is 0.1"),
        ({"loras": ["a.gguf:inf"]}, "loras a.gguf:inf"),
    ],
)
def test_a_pool_never_speaks_of_flags(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Pool("m.gguf", **options)
    assert said in str(caught.value)
    assert "--" not in str(caught.value)
