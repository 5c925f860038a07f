"""Our call of the transformer is the stock pipeline's, and each way of getting it wrong is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from small_run import TRANSFORMER

from qwenimg_dist.models import parity
from qwenimg_dist.models.transformer import build_transformer, predict_velocity

CPU = torch.device("cpu")
Way = Callable[..., torch.Tensor]


def model(dtype: torch.dtype, **config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_transformer({**TRANSFORMER, **config}).to(dtype).eval()


def found(way: Way, dtype: torch.dtype, *, edits: bool = False, **config: Any) -> dict[str, parity.Difference]:
    module = model(dtype, **config)
    cases = parity.probes(int(TRANSFORMER["joint_attention_dim"]), edits=edits)
    with torch.no_grad():
        ours = parity.our_answers(lambda *given: way(module, *given), cases, dtype=dtype, device=CPU)
        stock = parity.stock_answers(module, cases, dtype=dtype, device=CPU)
    return {one.case: one for one in parity.differences(ours, stock, dtype=dtype, same_module=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_call_is_the_stock_pipeline_s(dtype: torch.dtype) -> None:
    differences = found(predict_velocity, dtype)
    assert list(differences) == ["unmasked", "masked", "trimmed"]
    assert all(one.within for one in differences.values())
    assert differences["unmasked"].max_difference == differences["masked"].max_difference == 0.0
    assert differences["trimmed"].max_difference > 0.0  # other shapes: two computations, not one compared with itself
    assert all(one.max_velocity > 0.1 for one in differences.values())


def thousandfold(module: Any, noisy: Any, sigma: Any, text: Any, mask: Any) -> torch.Tensor:
    return predict_velocity(module, noisy, sigma * 1000, text, mask)


def reversed_time(module: Any, noisy: Any, sigma: Any, text: Any, mask: Any) -> torch.Tensor:
    return predict_velocity(module, noisy, 1 - sigma, text, mask)


def mask_ignored(module: Any, noisy: Any, sigma: Any, text: Any, mask: Any) -> torch.Tensor:
    return predict_velocity(module, noisy, sigma, text, None)


def sides_swapped(module: Any, noisy: Any, sigma: Any, text: Any, mask: Any) -> torch.Tensor:
    """Only in `img_shapes`: as many tokens, other positions."""

    def swapped(**given: Any) -> Any:
        ((frame, height, width),) = given["img_shapes"][0]
        return module(**{**given, "img_shapes": [[(frame, width, height)]] * len(noisy)})

    dtype = next(module.parameters()).dtype
    return predict_velocity(swapped, noisy.to(dtype), sigma, text, mask)


def transposed(module: Any, noisy: Any, sigma: Any, text: Any, mask: Any) -> torch.Tensor:
    return predict_velocity(module, noisy.transpose(2, 3), sigma, text, mask).transpose(2, 3)


def first_sigma_for_all(module: Any, noisy: Any, sigma: Any, text: Any, mask: Any) -> torch.Tensor:
    return predict_velocity(module, noisy, sigma[:1].expand_as(sigma), text, mask)


def data_minus_noise(module: Any, noisy: Any, sigma: Any, text: Any, mask: Any) -> torch.Tensor:
    return -predict_velocity(module, noisy, sigma, text, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("way", "seen_in"),
    [
        (thousandfold, {"unmasked", "masked", "trimmed"}),
        (reversed_time, {"unmasked", "masked"}),
        (mask_ignored, {"masked"}),
        (sides_swapped, {"unmasked", "masked"}),
        (transposed, {"unmasked", "masked", "trimmed"}),
        (first_sigma_for_all, {"trimmed"}),
        (data_minus_noise, {"unmasked", "masked", "trimmed"}),
    ],
)
def test_a_wrong_call_is_seen(way: Way, seen_in: set[str], dtype: torch.dtype) -> None:
    differences = found(way, dtype)
    wrong = {case for case, one in differences.items() if not one.within}
    assert seen_in <= wrong, {case: one.max_difference / one.max_velocity for case, one in differences.items()}


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_call_with_conditions_is_the_stock_edit_pipeline_s(dtype: torch.dtype, zero_cond_t: bool) -> None:
    area = pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE
    differences = found(predict_velocity, dtype, edits=True, zero_cond_t=zero_cond_t)
    assert list(differences) == ["unmasked", "masked", "trimmed", "edit", "edit_trimmed"]
    assert all(one.within and one.max_velocity > 0.1 for one in differences.values())
    assert differences["edit"].max_difference == 0.0
    assert pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE == area == 1024 * 1024


def conditions_dropped(module: Any, noisy: Any, sigma: Any, text: Any, mask: Any, given: Any = ()) -> torch.Tensor:
    return predict_velocity(module, noisy, sigma, text, mask)


def conditions_in_another_order(
    module: Any, noisy: Any, sigma: Any, text: Any, mask: Any, given: Any = ()
) -> torch.Tensor:
    return predict_velocity(module, noisy, sigma, text, mask, given[::-1])


def conditions_as_noisy_as_the_target(
    module: Any, noisy: Any, sigma: Any, text: Any, mask: Any, given: Any = ()
) -> torch.Tensor:
    mixed = [(1 - sigma[:, None, None, None]) * one for one in given]
    return predict_velocity(module, noisy, sigma, text, mask, mixed)


def conditions_on_one_frame(module: Any, noisy: Any, sigma: Any, text: Any, mask: Any, given: Any = ()) -> torch.Tensor:
    """As many tokens, of a single picture by `img_shapes`."""

    def joined(**words: Any) -> Any:
        target, *others = words["img_shapes"][0]
        tokens = sum(height * width for _, height, width in others)
        shapes = [target, *([(1, 1, tokens)] if others else [])]
        return module(**{**words, "img_shapes": [shapes] * len(noisy)})

    dtype = next(module.parameters()).dtype
    return predict_velocity(joined, noisy.to(dtype), sigma, text, mask, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "way",
    [
        conditions_dropped,
        conditions_in_another_order,
        conditions_as_noisy_as_the_target,
        conditions_on_one_frame,
    ],
)
def test_a_wrong_call_with_conditions_is_seen_by_the_cases_of_edits_alone(way: Way, dtype: torch.dtype) -> None:
    differences = found(way, dtype, edits=True)
    wrong = {case for case, one in differences.items() if not one.within}
    # What a random model makes of conditions is less than what padding rounds by in bf16: there the strict case tells.
    of_edits = {"edit", "edit_trimmed"} if dtype == torch.float32 else {"edit"}
    assert of_edits <= wrong <= {"edit", "edit_trimmed"}, {c: one.max_difference for c, one in differences.items()}


def test_not_a_number_is_a_difference() -> None:
    differences = found(
        lambda module, noisy, *rest: predict_velocity(module, noisy * float("nan"), *rest), torch.float32
    )
    assert not any(one.within for one in differences.values())
    assert differences["masked"].as_dict()["max_difference"] == "nan"
