"""The references' features in a file: looking at thousands of images takes minutes."""

from pathlib import Path

from torch import Tensor

from latentdiff.evaluation.judge import features_of
from latentdiff.evaluation.looks import NamedLook
from latentdiff.evaluation.references import References
from latentdiff.formats.header import read_header
from latentdiff.formats.weights import load_safetensors, save_safetensors

NAME = "features"


def kept_features(path: Path, named: NamedLook, references: References) -> Tensor:
    """Read the references' features (N, D) from a file, which is written if it is not there.

    Raises ValueError for a file of other references or of another way to look at them.
    """
    of = {"look": named.description, "references": references.fingerprint}
    if not path.exists():
        features = features_of(references, named.look)
        save_safetensors({NAME: features}, path, metadata=of)
        return features
    metadata = read_header(path).metadata
    for key, value in of.items():
        if metadata.get(key) != value:
            raise ValueError(
                f"reference_features={path}: {key} is {metadata.get(key)!r} there and {value!r} "
                "here; name another file"
            )
    return load_safetensors(path)[NAME]
