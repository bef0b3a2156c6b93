"""The contrastive losses of CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023)."""

from collections.abc import Callable

from open_clip import ClipLoss
from open_clip.loss import SigLipLoss
from torch import Tensor
from transformers import CLIPModel


def contrastive_loss(
    kind: str, *, rank: int, world_size: int
) -> Callable[[Tensor, Tensor, CLIPModel], Tensor]:
    """The loss () of the local image and text embeddings (b, D) against those of all processes.

    Its mean over the processes is the loss of the global batch.
    """
    if kind == "softmax":
        softmax = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
        return lambda image, text, clip: softmax(image, text, clip.logit_scale.exp())
    # "gather" needs collectives alone, which every backend has.
    sigmoid = SigLipLoss(rank=rank, world_size=world_size, dist_impl="gather")
    return lambda image, text, clip: sigmoid(image, text, clip.logit_scale.exp(), clip.logit_bias)
