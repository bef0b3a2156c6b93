"""What train_vae.py does to its pictures."""

import torch
from scripts import script

from latentdiff.training.randomness import Share, generator


def test_about_half_of_the_pictures_are_mirrored_whoever_works_on_them() -> None:
    images = torch.rand(64, 3, 2, 4)
    places = torch.rand(64, generator=generator(0, 5, "flip"))
    mirror = script("train_vae").mirror
    found = mirror(images, places)
    turned = [not torch.equal(a, b) for a, b in zip(found, images, strict=True)]
    assert 20 < sum(turned) < 44
    for before, after, was_turned in zip(images, found, turned, strict=True):
        assert torch.equal(after, before.flip(-1) if was_turned else before)
    parts = [Share(index, 4) for index in range(4)]
    alone = [mirror(part.rows(images), part.rows(places)) for part in parts]
    assert torch.equal(torch.cat(alone), found)
