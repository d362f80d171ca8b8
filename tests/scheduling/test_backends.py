"""Masks of every backend, and plans for hosts whose build is not CUDA's."""

from __future__ import annotations

from typing import Any

import pytest

from scheduling.backends import hide_all, mask_of, shown
from scheduling.errors import ConfigError
from scheduling.messages import Gpu, Host
from scheduling.placement import plan


def devices(*entries: str | None) -> tuple[Gpu, ...]:
    return tuple(
        Gpu(
            uuid=f"device-{place}",
            name="all that Metal sees (no list)" if entry is None else "a GPU",
            index=place,
            mask_entry=entry,
        )
        for place, entry in enumerate(entries)
    )


def hosts(ranks: int, seen: tuple[Gpu, ...], *backends: str, **more: Any) -> dict[int, Host]:
    return {
        rank: Host(hostname="n1", gpus=seen, backends=backends, cpus=tuple(range(8)), local_rank=rank, **more)
        for rank in range(ranks)
    }


MASKS = [
    (("cuda",), ("", ""), {"CUDA_VISIBLE_DEVICES": "device-0,device-1"}),
    (("hip",), ("", "1"), {"ROCR_VISIBLE_DEVICES": "device-0,1", "HIP_VISIBLE_DEVICES": "0,1"}),
    (("vulkan",), ("2", "0"), {"GGML_VK_VISIBLE_DEVICES": "2,0"}),
    (("sycl",), ("3",), {"ZE_AFFINITY_MASK": "3", "ONEAPI_DEVICE_SELECTOR": "level_zero:gpu"}),
    (("metal",), (None,), {}),
    # Devices without a name cannot be chosen: what the launcher has set is left alone.
    (("vulkan",), (None,), {}),
    # A second backend would reach the devices that the first is not shown.
    (("cuda", "vulkan"), ("",), {"CUDA_VISIBLE_DEVICES": "device-0", "GGML_VK_VISIBLE_DEVICES": ""}),
    # A build without devices is told as one for CUDA.
    ((), ("",), {"CUDA_VISIBLE_DEVICES": "device-0"}),
]


@pytest.mark.parametrize(("names", "entries", "mask"), MASKS)
def test_each_backend_has_its_own_mask(
    names: tuple[str, ...], entries: tuple[str | None, ...], mask: dict[str, str]
) -> None:
    gpus = devices(*entries)
    assert mask_of(names, gpus) == mask
    assert shown(names, mask, gpus) == (list(gpus) if mask else [])


@pytest.mark.parametrize(
    ("names", "mask"),
    [
        (("cuda",), {"CUDA_VISIBLE_DEVICES": ""}),
        (("hip",), {"ROCR_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1"}),
        (("vulkan",), {"GGML_VK_VISIBLE_DEVICES": ""}),
        (("sycl",), {}),
        (("metal",), {}),
        (("hip", "vulkan"), {"ROCR_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1", "GGML_VK_VISIBLE_DEVICES": ""}),
    ],
)
def test_devices_are_hidden_where_the_backend_can(names: tuple[str, ...], mask: dict[str, str]) -> None:
    assert mask_of(names, []) == mask


@pytest.mark.parametrize(("names", "entries", "mask"), MASKS)
def test_a_mask_that_shows_some_can_be_made_one_that_hides_all(
    names: tuple[str, ...], entries: tuple[str | None, ...], mask: dict[str, str]
) -> None:
    assert hide_all(mask) == {name: value for name, value in mask_of(names, []).items() if name in mask}


def test_workers_are_dealt_the_devices_of_their_build() -> None:
    done = plan(hosts(3, devices("1", "2"), "vulkan"))
    assert [place.device_mask for place in done.placements.values()] == [
        {"GGML_VK_VISIBLE_DEVICES": "1"},
        {"GGML_VK_VISIBLE_DEVICES": "2"},
    ]
    assert {place.backend for place in done.placements.values()} == {"vulkan"}


def test_devices_that_cannot_be_parted_go_to_one_worker_and_it_is_said() -> None:
    done = plan(hosts(2, devices(None), "metal", gpus_known=False))
    (place,) = done.placements.values()
    assert (place.gpu_uuids, place.device_mask) == (("device-0",), {})
    assert place.note.startswith("all that Metal sees, ")
    assert "n1: all that Metal sees (no list): not parted among workers" in done.notes


def test_more_workers_than_one_on_what_cannot_be_parted_are_refused_with_the_way_out() -> None:
    with pytest.raises(
        ConfigError, match=r"no mask that could part all that Metal sees \(no list\).*--ranks-per-gpu 2"
    ):
        plan(hosts(3, devices(None), "metal", gpus_known=False))
    done = plan(hosts(3, devices(None), "metal", gpus_known=False), ranks_per_gpu=2)
    assert [place.gpu_uuids for place in done.placements.values()] == [("device-0",)] * 2


@pytest.mark.parametrize(
    ("backend", "check"),
    [
        ("hip", "rocminfo and ROCR_VISIBLE_DEVICES"),
        ("sycl", "sycl-ls and ZE_AFFINITY_MASK"),
        ("vulkan", "vulkaninfo --summary and GGML_VK_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_is_not_there_is_told_in_the_backends_terms(backend: str, check: str) -> None:
    with pytest.raises(ConfigError, match=f"Check {check} there"):
        plan(hosts(2, (), backend), want_gpu=True)
