"""Our transformer is Wan's: compared with diffusers' class on the same weights, and its own rules."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st

from model.config import DiTConfig, Partition
from model.network.dit import DiT
from model.network.layers import attention, rope_freqs, short_attention
from model.network.patch import INPUT, OUTPUT, grid, patchify, unpatchify

CONFIG = DiTConfig(layers=2, heads=4, head_dim=16, ffn_dim=128, text_dim=24)


@pytest.fixture(scope="module")
def pair() -> tuple[WanTransformer3DModel, DiT]:
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(**{k: v for k, v in CONFIG.to_diffusers().items() if not k.startswith("_")}).eval()
    ours = DiT(CONFIG).eval()
    ours.load_state_dict(theirs.state_dict())  # strict: every name and shape agrees
    return theirs, ours


@pytest.mark.parametrize("size", [(1, 4, 6), (3, 8, 6), (5, 2, 10)])
@torch.no_grad()
def test_equals_diffusers(pair: tuple[WanTransformer3DModel, DiT], size: tuple[int, int, int]) -> None:
    theirs, ours = pair
    torch.manual_seed(1)
    x, text, times = torch.randn(2, 16, *size), torch.randn(2, 7, 24), torch.tensor([0.3, 0.9])
    expected = theirs(x, times * 1000, text, return_dict=False)[0]
    torch.testing.assert_close(ours(x, times, text), expected, atol=5e-6, rtol=0)

    tokens = size[0] * size[1] // 2 * size[2] // 2
    each = torch.rand(2, tokens)
    expected = theirs(x, each * 1000, text, return_dict=False)[0]
    torch.testing.assert_close(ours(x, each, text), expected, atol=5e-6, rtol=0)


@torch.no_grad()
def test_a_time_for_each_frame_is_that_time_for_each_of_its_tokens(pair: tuple[WanTransformer3DModel, DiT]) -> None:
    _, ours = pair
    x, text, frames = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 5, 24), torch.tensor([[0.0, 0.5, 1.0]])
    torch.testing.assert_close(ours(x, frames, text), ours(x, frames.repeat_interleave(4, 1), text), atol=5e-6, rtol=0)
    assert not torch.allclose(ours(x, frames, text), ours(x, frames.flip(1), text), atol=1e-2)


def test_refuses_what_it_cannot_compute(pair: tuple[WanTransformer3DModel, DiT]) -> None:
    _, ours = pair
    text = torch.randn(1, 5, 24)
    with pytest.raises(ValueError, match="latent W=5 does not divide into patches of 2"):
        ours(torch.randn(1, 16, 1, 4, 5), torch.ones(1), text)
    with pytest.raises(ValueError, match=r"times has 5 entries a clip; it must be 1, 3 \(frames\) or 12 \(tokens\)"):
        ours(torch.randn(1, 16, 3, 4, 4), torch.ones(1, 5), text)
    with pytest.raises(ValueError, match="image_dim=1280 is not supported"):
        DiTConfig.from_diffusers({**CONFIG.to_diffusers(), "image_dim": 1280})


@torch.no_grad()
def test_an_untrained_model_predicts_nothing_and_a_block_starts_deaf() -> None:
    model = DiT(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    x, times = torch.randn(1, 16, 1, 4, 4), torch.tensor([0.5])
    assert model(x, times, torch.randn(1, 5, 24)).abs().max() == 0
    model.proj_out.weight.normal_()
    assert torch.equal(model(x, times, torch.randn(1, 5, 24)), model(x, times, torch.randn(1, 5, 24)))


def test_both_attentions_agree() -> None:
    q, k, v = torch.randn(2, 9, 4, 8), torch.randn(2, 7, 4, 8), torch.randn(2, 7, 4, 8)
    torch.testing.assert_close(attention(q, k, v), short_attention(q, k, v), atol=2e-6, rtol=0)


@pytest.mark.parametrize("layout", [INPUT, OUTPUT])
def test_unpatchify_undoes_patchify(layout: str) -> None:
    video = torch.randn(2, 3, 4, 6, 8)
    patch = (2, 3, 4)
    assert torch.equal(unpatchify(patchify(video, patch, layout), grid(video, patch), patch, layout), video)


@pytest.mark.parametrize(
    ("text", "partition", "said"),
    [
        ("tp=2", Partition(tp=2), "cfg1xsp1xtp2"),  # as history holds it since before there was zero
        ("cfg=2,sp=3", Partition(cfg=2, sp=3), "cfg2xsp3xtp1"),
        ("sp=2,tp=3,zero=4", Partition(sp=2, tp=3, zero=4), "cfg1xsp2xtp3xzero4"),
    ],
)
def test_a_partition_is_read_as_it_is_written(text: str, partition: Partition, said: str) -> None:
    assert Partition.parse(text) == partition == Partition.parse(str(partition))
    assert str(partition) == said


@given(cfg=st.sampled_from([1, 2]), sp=st.integers(1, 4), tp=st.integers(1, 4), times=st.integers(1, 4))
def test_zero_takes_the_ranks_of_cfg_and_sp_and_adds_some(cfg: int, sp: int, tp: int, times: int) -> None:
    divided = Partition(cfg=cfg, sp=sp, tp=tp, zero=times * cfg * sp)
    assert (divided.batch, divided.world) == (times, times * cfg * sp * tp)
    assert Partition(cfg=cfg, sp=sp, tp=tp).world == cfg * sp * tp


@pytest.mark.parametrize("text", ["", "tp", "tp=0", "tp=x", "pp=2", "tp=2,tp=2", "cfg=3", "tp=-1", "sp=2,zero=3"])
def test_a_wrong_partition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="partition"):
        Partition.parse(text)


def test_a_training_may_follow_an_inference_of_the_same_shape() -> None:
    """The rotary tables of a shape are kept, and what was made for inference alone cannot be trained through."""
    rope_freqs.cache_clear()
    dit = DiT(DiTConfig(layers=1, heads=2, head_dim=12, ffn_dim=32, text_dim=8, freq_dim=16))
    latents, times, text = torch.randn(1, 16, 1, 4, 4), torch.rand(1), torch.randn(1, 3, 8)
    with torch.inference_mode():
        dit(latents, times, text)
    dit(latents, times, text).sum().backward()
    assert dit.patch_embedding.weight.grad is not None
