"""Hypothesis strategies: random UNet and VAE configurations of tiny networks, of any depth."""

from hypothesis import strategies as st

from latentdiff.models.unet import UNetConfig
from latentdiff.models.vae import VAEConfig


@st.composite
def unet_configs(draw: st.DrawFn, *, width: int = 8, context: int | None = None) -> UNetConfig:
    """2 to 5 levels, 1 to 3 layers, attention anywhere; widths are multiples of `width`."""
    levels = draw(st.integers(2, 5))
    per_level = {"min_size": levels, "max_size": levels}
    down = draw(st.lists(st.sampled_from(["CrossAttnDownBlock2D", "DownBlock2D"]), **per_level))
    up = draw(st.lists(st.sampled_from(["CrossAttnUpBlock2D", "UpBlock2D"]), **per_level))
    heads = st.sampled_from([1, 2, 4])
    return UNetConfig(
        sample_size=draw(st.sampled_from([8, 16, None])),
        in_channels=draw(st.sampled_from([4, 9])),
        block_out_channels=[width * draw(st.integers(1, 2)) for _ in range(levels)],
        down_block_types=down,
        up_block_types=up,
        mid_block_type=draw(st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None])),
        layers_per_block=draw(st.integers(1, 3)),
        cross_attention_dim=draw(st.sampled_from([8, 16])) if context is None else context,
        attention_head_dim=draw(st.one_of(heads, st.lists(heads, **per_level))),
        transformer_layers_per_block=draw(st.integers(1, 2)),
        use_linear_projection=draw(st.booleans()),
        norm_num_groups=draw(st.sampled_from([2, 4, 8])),
    )


@st.composite
def vae_configs(draw: st.DrawFn, *, width: int = 4) -> VAEConfig:
    """1 to 5 levels, 1 to 3 layers, with and without what can be left out."""
    levels = draw(st.integers(1, 5))
    return VAEConfig(
        block_out_channels=[width * draw(st.integers(1, 2)) for _ in range(levels)],
        layers_per_block=draw(st.integers(1, 3)),
        latent_channels=draw(st.sampled_from([2, 4])),
        norm_num_groups=draw(st.sampled_from([1, 2, 4])),
        sample_size=draw(st.sampled_from([16, 32])),
        scaling_factor=draw(st.floats(0.01, 10.0)),
        mid_block_add_attention=draw(st.booleans()),
        use_quant_conv=draw(st.booleans()),
        use_post_quant_conv=draw(st.booleans()),
    )
