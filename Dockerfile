# docker build -t dpo . && docker run --gpus all -it dpo      trains the quickstart; another command follows the image
#
# The wheels of torch bring CUDA 13.0, cuDNN and NCCL themselves, so the small base image is enough: DeepSpeed compiles
# nothing here (AdamW is torch's), and Triton needs the C compiler and Python's headers alone.
FROM nvidia/cuda:13.0.3-base-ubuntu24.04

# The distribution's security updates are wanted, so these versions are not pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Who owns the files that a run writes into mounted folders: docker build --build-arg UID="$(id -u)".
# Ubuntu's image has a user of its own with number 1000.
ARG UID=1000
RUN if id ubuntu; then userdel --remove ubuntu; fi \
    && useradd --create-home --uid "$UID" --shell /bin/bash dpo \
    && install --directory --owner dpo /home/dpo/suite /home/dpo/suite/runs /home/dpo/.cache /home/dpo/.cache/huggingface
USER $UID
WORKDIR /home/dpo/suite

ENV PATH=/home/dpo/venv/bin:$PATH PYTHONUNBUFFERED=1
COPY requirements.txt constraints.txt ./
RUN python3 -m venv /home/dpo/venv \
    && pip install --no-cache-dir -r requirements.txt peft==0.21.2

COPY train_dpo.py ./
COPY dpo dpo
COPY ds_configs ds_configs
COPY recipes recipes

CMD ["python", "train_dpo.py", "--config", "ds_configs/zero2.json"]
