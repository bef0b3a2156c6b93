"""PatchGAN: scores how real the patches of an image look; used only to train a VAE."""

from torch import Tensor, nn

SMALLEST = 24
"""Side of the smallest images, in pixels, of which three layers score a patch."""


class Discriminator(nn.Module):
    """Images (B, 3, H, W) -> a score of each patch, (B, 1, H / 2^layers - 2, W / 2^layers - 2).

    pix2pix's (Isola et al. 2017, arXiv:1611.07004, section 3.2.2), which LDM uses for its
    autoencoders: three layers score patches of 70 x 70. It has group norm in place of batch norm,
    so that an image's score does not depend on the other images of its batch.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers={layers} must be at least 1")
        modules: list[nn.Module] = [
            nn.Conv2d(3, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        width = channels
        for i in range(1, layers + 1):
            before, width = width, channels * min(2**i, 8)
            stride = 2 if i < layers else 1
            modules += [
                nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(32, width // 4), width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*modules, nn.Conv2d(width, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # the paper's section 6.2
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
