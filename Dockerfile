# latentdiff in a container: drawing, training and own images; no weights are fetched while building.
#
#     docker build -t latentdiff .                            # CPU
#     docker build -t latentdiff:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#     docker run --rm -v "$PWD:/work" latentdiff generate "a cat" --out images
#     docker run --rm --gpus all -v "$PWD:/work" latentdiff:cuda train mine
ARG PYTHON=3.12-slim-bookworm
FROM python:${PYTHON}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=train,lora,openvino

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HOME=/home/latentdiff/.cache/huggingface

RUN useradd --create-home --uid 1000 latentdiff && mkdir /work && chown latentdiff /work

COPY pyproject.toml README.md LICENSE constraints.txt /src/
COPY latentdiff /src/latentdiff

# The pinned torch and torchvision come from the index of the build argument: a local version such as
# 2.12.1+cpu is preferred to the same one of PyPI. All else is PyPI's.
RUN pip install --constraint /src/constraints.txt --extra-index-url "${TORCH_INDEX}" \
        "/src[${EXTRAS}]" \
    && rm -rf /src

USER latentdiff
WORKDIR /work
ENTRYPOINT ["latentdiff"]
CMD ["--help"]
