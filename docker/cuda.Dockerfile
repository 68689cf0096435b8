# vft on NVIDIA GPUs: docker build -f docker/cuda.Dockerfile -t vft:cuda .        (docs/use/install.md)
# BASE is any image with PyTorch 2.11 or newer for CUDA and Python 3.11 or newer; its torch is used as it is.
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${BASE}

USER root
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ffmpeg python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home vft \
    && mkdir -p /opt/vft /work \
    && chown vft:vft /opt/vft /work

USER vft
COPY --chown=vft:vft . /opt/vft
RUN PIP_NO_CACHE_DIR=1 /opt/vft/tools/setup \
    && /opt/vft/.venv/bin/python -c "import torch; assert torch.version.cuda, 'the image has no torch for CUDA'"

ENV PATH=/opt/vft/.venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["vft"]
CMD ["--help"]
