"""Real arithmetic turns queries and keys as the stock class's complex numbers do."""

from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

from qwenimg_dist.models.real_rotary import rotate, use_real_rotary
from qwenimg_dist.models.text_batch import collate_text
from qwenimg_dist.models.tiny import TRANSFORMER_CONFIG, tiny_pipeline_dir
from qwenimg_dist.models.transformer import predict_velocity, set_attention


@pytest.fixture
def model() -> QwenImageTransformer2DModel:
    component = Path(tiny_pipeline_dir()) / "transformer"
    return QwenImageTransformer2DModel.from_pretrained(component)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_the_stock_one(dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 3, 32).to(dtype)
    angles = torch.randn(7, 16)
    stock = apply_rotary_emb_qwen(x, torch.polar(torch.ones_like(angles), angles), use_real=False)
    ours = rotate(x, torch.stack((angles.cos(), angles.sin()), dim=-1))
    assert ours.dtype == dtype
    assert torch.allclose(ours.float(), stock.float(), atol=1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("lengths", [(6, 6), (6, 4)])
@pytest.mark.parametrize("size", [(4, 4), (8, 4)])
def test_velocity_and_gradients_are_the_stock_ones(
    model: QwenImageTransformer2DModel, lengths: tuple[int, int], size: tuple[int, int]
) -> None:
    width = model.config.joint_attention_dim
    text, mask = collate_text([torch.randn(n, width) for n in lengths])
    noisy, sigma = torch.randn(2, 16, *size), torch.tensor([0.5, 0.9])

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        velocity = predict_velocity(model, noisy, sigma, text, mask)
        velocity.square().mean().backward()
        gradient = model.transformer_blocks[0].attn.add_q_proj.weight.grad
        assert gradient is not None
        return velocity.detach(), gradient.clone()

    stock = run()
    use_real_rotary(model)
    for ours, expected in zip(run(), stock, strict=True):
        assert torch.allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_with_condition_pictures_of_several_sizes(zero_cond_t: bool) -> None:
    """The tables are of all pictures one behind the other, the text's begin behind the largest of them."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**TRANSFORMER_CONFIG, zero_cond_t=zero_cond_t)
    text, mask = collate_text([torch.randn(n, TRANSFORMER_CONFIG["joint_attention_dim"]) for n in (6, 4)])
    conditions = [torch.randn(2, 16, 4, 12), torch.randn(2, 16, 6, 2)]
    noisy, sigma = torch.randn(2, 16, 8, 4), torch.tensor([0.5, 0.9])

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        velocity = predict_velocity(model, noisy, sigma, text, mask, conditions)
        velocity.square().mean().backward()
        gradient = model.transformer_blocks[0].attn.to_q.weight.grad
        assert gradient is not None
        return velocity.detach(), gradient.clone()

    stock = run()
    use_real_rotary(model)
    for ours, expected in zip(run(), stock, strict=True):
        assert torch.allclose(ours, expected, atol=1e-6)


def test_the_chosen_attention_kernel_stays(model: QwenImageTransformer2DModel) -> None:
    set_attention(model, "math")
    use_real_rotary(model)
    assert model.transformer_blocks[1].attn.processor._attention_backend == "_native_math"
    set_attention(model, "native")
    assert model.transformer_blocks[1].attn.processor._attention_backend == "native"
