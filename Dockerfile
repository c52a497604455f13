# The locked environment and the checkout: docker build -t segmae . && docker run --gpus all --shm-size=16g segmae --help
# For Apptainer: segmae.def.
FROM python:3.12-slim-bookworm

# A C compiler for torch.compile.
RUN apt-get update && \
    apt-get install -y --no-install-recommends build-essential=12.9 && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /segmae
COPY environment.sh requirements.txt run_benchmark.sh ./
# The packages are a layer of their own, which a change of the code leaves.
RUN ["bash", "-c", "set -euo pipefail; source ./environment.sh; \"$python\" -m pip cache purge"]
COPY . .
ENTRYPOINT ["/segmae/run_benchmark.sh"]
CMD ["--help"]
