# An image for NVIDIA GPUs; the host needs its driver and the NVIDIA Container Toolkit.
#
#   docker build -t mae_et .
#   docker run --rm --gpus all --shm-size 16g --ulimit memlock=-1 -v /path/to/images:/data:ro -v "$PWD/runs":/mae_et/runs \
#       mae_et torchrun --nproc_per_node=8 main_pretrain.py --recipe in1k_vitb_etpp400 --data_path /data
#
# --shm-size: loader workers hand images over in /dev/shm, which Docker makes 64 MB small. A rank uses at most 1 GiB, and
# at most half of its share of what is free: 2 GiB for each GPU.
FROM python:3.12-slim

# torch.compile builds kernels with a C compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /mae_et
COPY requirements.txt ./
RUN pip install --no-cache-dir --requirement requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --editable .
CMD ["python", "-m", "mae_et", "--help"]
