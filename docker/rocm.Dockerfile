# vft on AMD GPUs: docker build -f docker/rocm.Dockerfile -t vft:rocm .        (docs/use/install.md)
# BASE is any image with PyTorch 2.11 or newer for ROCm and Python 3.11 or newer; its torch is used as it is.
ARG BASE=rocm/pytorch:latest
FROM ${BASE}

USER root
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ffmpeg python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --groups video vft \
    && mkdir -p /opt/vft /work \
    && chown vft:vft /opt/vft /work

USER vft
COPY --chown=vft:vft . /opt/vft
RUN PIP_NO_CACHE_DIR=1 /opt/vft/tools/setup \
    && /opt/vft/.venv/bin/python -c "import torch; assert torch.version.hip, 'the image has no torch for ROCm'"

ENV PATH=/opt/vft/.venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["vft"]
CMD ["--help"]
