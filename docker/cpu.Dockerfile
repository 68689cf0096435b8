# vft on a CPU: docker build -f docker/cpu.Dockerfile -t vft:cpu .        (docs/use/install.md)
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install -y --no-install-recommends ffmpeg \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 vft \
    && mkdir /opt/vft /work \
    && chown vft:vft /opt/vft /work

USER vft
COPY --chown=vft:vft . /opt/vft
RUN PIP_NO_CACHE_DIR=1 /opt/vft/tools/setup --cpu

ENV PATH=/opt/vft/.venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["vft"]
CMD ["--help"]
