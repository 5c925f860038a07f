"""The call contract against the stock class and the stock pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

from qwenimg_dist.models.text_batch import collate_text
from qwenimg_dist.models.tiny import tiny_pipeline_dir
from qwenimg_dist.models.transformer import (
    activation_checkpointing,
    assemble_transformer,
    build_transformer,
    forward_flops,
    load_transformer_config,
    pack_latents,
    predict_velocity,
    rebuild_rope,
    set_attention,
    unpack_latents,
)
from qwenimg_dist.models.weights import SafetensorsDirectory

QWEN_IMAGE = {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 60}


@pytest.fixture(scope="module")
def component() -> Path:
    return tiny_pipeline_dir() / "transformer"


@pytest.fixture(scope="module")
def transformer(component: Path) -> Any:
    return QwenImageTransformer2DModel.from_pretrained(component).eval()


def features(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, 128, generator=generator) for length in lengths]


def test_packing_equals_the_pipelines_static_methods() -> None:
    for height, width in ((8, 8), (6, 14), (166, 166)):
        latents = torch.randn(2, 16, height, width)
        packed = pack_latents(latents)
        stock = QwenImagePipeline._pack_latents(latents, 2, 16, height, width)
        assert torch.equal(packed, stock)
        stock_back = QwenImagePipeline._unpack_latents(stock, height * 8, width * 8, 8)
        assert torch.equal(unpack_latents(packed, height, width), stock_back[:, :, 0])
        assert torch.equal(unpack_latents(packed, height, width), latents)
    with pytest.raises(ValueError, match="even"):
        pack_latents(torch.zeros(1, 16, 5, 4))
    with pytest.raises(ValueError, match="do not form"):
        unpack_latents(torch.zeros(1, 6, 64), 4, 4)


def test_velocity_is_the_stock_forward(transformer: Any) -> None:
    noisy, sigma = torch.randn(2, 16, 6, 10), torch.tensor([0.3, 0.8])
    text, mask = collate_text(features(9, 9))
    assert mask is None
    with torch.no_grad():
        velocity = predict_velocity(transformer, noisy, sigma, text, mask)
        stock = transformer(
            hidden_states=QwenImagePipeline._pack_latents(noisy, 2, 16, 6, 10),
            encoder_hidden_states=text,
            timestep=sigma,
            img_shapes=[[(1, 3, 5)]] * 2,
        ).sample
    assert velocity.dtype == torch.float32
    assert torch.equal(velocity, QwenImagePipeline._unpack_latents(stock, 48, 80, 8)[:, :, 0])


def test_padded_with_mask_equals_trimmed(transformer: Any) -> None:
    """Tolerance 1e-5 on values of order 1 (fp32; other reduction order)."""
    noisy, sigma = torch.randn(3, 16, 8, 4), torch.tensor([0.1, 0.5, 0.9])
    rows = features(5, 17, 11)
    text, mask = collate_text(rows)
    assert mask is not None
    assert mask.sum(dim=1).tolist() == [5, 17, 11]
    with torch.no_grad():
        batch = predict_velocity(transformer, noisy, sigma, text, mask)
        single = [predict_velocity(transformer, noisy[i : i + 1], sigma[i : i + 1], rows[i][None]) for i in range(3)]
        unmasked = predict_velocity(transformer, noisy, sigma, text, None)
    torch.testing.assert_close(batch, torch.cat(single), atol=1e-5, rtol=0)
    assert (batch - unmasked).abs().max() > 1e-3, "without the mask padding must matter, or this test sees nothing"


def test_inputs_are_cast_to_the_modules_dtype(component: Path, transformer: Any) -> None:
    half = QwenImageTransformer2DModel.from_pretrained(component).to(torch.bfloat16)
    noisy, sigma = torch.randn(1, 16, 4, 4), torch.tensor([0.5])
    text, _ = collate_text(features(6))
    with torch.no_grad():
        velocity = predict_velocity(half, noisy, sigma, text)
        reference = predict_velocity(transformer, noisy, sigma, text)
    assert velocity.dtype == torch.float32
    assert (velocity - reference).norm() / reference.norm() < 0.05
    assert half.pos_embed.pos_freqs.dtype == torch.complex64


def test_wrong_shapes_are_named(transformer: Any) -> None:
    text, _ = collate_text(features(6))
    with pytest.raises(ValueError, match=r"expected noisy"):
        predict_velocity(transformer, torch.zeros(1, 16, 1, 4, 4), torch.zeros(1), text)
    with pytest.raises(ValueError, match=r"expected noisy"):
        predict_velocity(transformer, torch.zeros(2, 16, 4, 4), torch.zeros(1), text)
    with pytest.raises(ValueError, match="at least one text token"):
        collate_text([torch.zeros(0, 4)])


def test_build_from_config_and_rebuild_rope_equals_stock(component: Path, transformer: Any) -> None:
    config = load_transformer_config(component)
    with torch.device("meta"):
        hollow = build_transformer(config)
    assert hollow.pos_embed.pos_freqs.is_meta, "if tables now survive meta, rebuild_rope may go"
    rebuild_rope(hollow)
    for name in ("pos_freqs", "neg_freqs"):
        table = getattr(hollow.pos_embed, name)
        assert table.dtype == torch.complex64
        assert torch.equal(table, getattr(transformer.pos_embed, name))
    assert dict(hollow.config).items() >= {k: v for k, v in config.items() if k != "axes_dims_rope"}.items()
    assert {n: p.shape for n, p in hollow.named_parameters()} == {n: p.shape for n, p in transformer.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_assembled_tensor_by_tensor_equals_stock(component: Path, transformer: Any, dtype: torch.dtype) -> None:
    config, weights = load_transformer_config(component), SafetensorsDirectory(component)
    drawn: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", lambda self, *_, **__: drawn.append(self) or self)
        model = assemble_transformer(config, weights.read, dtype=dtype)
    assert not [tensor for tensor in drawn if not tensor.is_meta], "weights were drawn that are thrown away"
    assert not model.training
    for tensor in [*model.parameters(), *model.buffers()]:
        assert tensor.dtype == dtype
        assert not tensor.is_meta
        assert not tensor.requires_grad
    noisy, sigma, text = torch.randn(1, 16, 4, 8), torch.tensor([0.5]), features(6)[0][None]
    stock = QwenImageTransformer2DModel.from_pretrained(component, torch_dtype=dtype).eval()
    with torch.no_grad():
        assert torch.equal(predict_velocity(model, noisy, sigma, text), predict_velocity(stock, noisy, sigma, text))
    with pytest.raises(ValueError, match=r"img_in\.bias is \(1,\), the config makes it"):
        assemble_transformer(
            config, lambda name: torch.zeros(1) if name == "img_in.bias" else weights.read(name), dtype=dtype
        )


def test_rebuilt_rope_drops_cached_tables(component: Path, transformer: Any) -> None:
    other = QwenImageTransformer2DModel.from_pretrained(component).eval()
    noisy, sigma = torch.randn(1, 16, 4, 8), torch.tensor([0.5])
    text, _ = collate_text(features(6))
    with torch.no_grad():
        other.pos_embed.pos_freqs = other.pos_embed.pos_freqs * 0
        other.pos_embed.neg_freqs = other.pos_embed.neg_freqs * 0
        wrong = predict_velocity(other, noisy, sigma, text)
        rebuild_rope(other)
        right = predict_velocity(other, noisy, sigma, text)
        reference = predict_velocity(transformer, noisy, sigma, text)
    assert not torch.equal(wrong, reference)
    assert torch.equal(right, reference)


def test_config_of_another_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: missing"):
        load_transformer_config(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(ValueError, match="FluxTransformer2DModel"):
        load_transformer_config(tmp_path)


@pytest.mark.parametrize(("side", "tera"), [(256, 7.17), (512, 18.6), (640, 27.8), (1024, 73.1), (1328, 134.8)])
def test_forward_flops_of_the_full_model(side: int, tera: float) -> None:
    assert forward_flops(QWEN_IMAGE, (side // 16) ** 2, 256) / 1e12 == pytest.approx(tera, rel=2e-3)


def test_forward_flops_equal_what_torch_counts(transformer: Any) -> None:
    """Within 10 % on the tiny model, whose in and out projections weigh far more than at full size."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    text, _ = collate_text(features(64))
    # The counter does not know the CPU's fused attention, so let it see the matrix products.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        predict_velocity(transformer, torch.randn(1, 16, 32, 32), torch.tensor([0.5]), text)
    ours = forward_flops(transformer.config, 256, 64)
    assert ours <= counter.get_total_flops() <= 1.1 * ours


def test_activation_checkpointing_keeps_gradients(component: Path) -> None:
    model = QwenImageTransformer2DModel.from_pretrained(component)
    noisy, sigma = torch.randn(1, 16, 4, 4), torch.tensor([0.5])
    text, _ = collate_text(features(6))
    gradients = []
    for enabled in (False, True):
        activation_checkpointing(model, enabled)
        assert model.gradient_checkpointing is enabled
        model.zero_grad()
        predict_velocity(model, noisy, sigma, text).square().mean().backward()
        gradients.append(model.transformer_blocks[0].attn.to_q.weight.grad.clone())
    assert torch.equal(*gradients)


def test_another_attention_kernel_gives_the_same_velocity(component: Path) -> None:
    model = QwenImageTransformer2DModel.from_pretrained(component)
    noisy, sigma = torch.randn(2, 16, 4, 4), torch.tensor([0.5, 0.9])
    text, mask = collate_text(features(6, 4))
    with torch.no_grad():
        native = predict_velocity(model, noisy, sigma, text, mask)
        set_attention(model, "math")
        assert model.transformer_blocks[1].attn.processor._attention_backend == "_native_math"
        assert torch.allclose(predict_velocity(model, noisy, sigma, text, mask), native, atol=1e-5)
        set_attention(model, "native")
        assert model.transformer_blocks[1].attn.processor._attention_backend == "native"


def test_flash_takes_batches_without_a_mask_and_leaves_the_others_to_native(component: Path) -> None:
    model = QwenImageTransformer2DModel.from_pretrained(component)
    noisy, sigma = torch.randn(2, 16, 4, 4), torch.tensor([0.5, 0.9])
    text, mask = collate_text(features(6, 4))
    assert mask is not None
    with torch.no_grad():
        native = [predict_velocity(model, noisy, sigma, text, one) for one in (mask, None)]
        set_attention(model, "flash")
        for one, expected, kernel in zip((mask, None), native, ("native", "_native_flash"), strict=True):
            assert torch.allclose(predict_velocity(model, noisy, sigma, text, one), expected, atol=1e-5)
            assert {block.attn.processor._attention_backend for block in model.transformer_blocks} == {kernel}
        set_attention(model, "math")
        predict_velocity(model, noisy, sigma, text, None)
        assert model.transformer_blocks[1].attn.processor._attention_backend == "_native_math"
