# An image for NVIDIA GPUs; the host needs its driver and the NVIDIA Container Toolkit.
#
#   docker build -t mae_et .
#   docker run --rm --gpus all --shm-size 16g --ulimit memlock=-1 -v /path/to/images:/data:ro -v "$PWD/runs":/mae_et/runs \
#       mae_et torchrun --nproc_per_node=8 main_pretrain.py --recipe in1k_vitb_etpp400 --data_path /data
#
# --shm-size: loader workers hand batches over in /dev/shm, which Docker makes 64 MB small. Needed are
# devices × workers × 4 × batch_size × channels × height × width bytes: 8 × 10 × 4 × 64 × 3 × 224 × 224 are 3.1 GB.
FROM python:3.12-slim

# torch.compile builds kernels with a C compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /mae_et
COPY requirements.txt ./
RUN pip install --no-cache-dir --requirement requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --editable .
CMD ["python", "-m", "mae_et", "--help"]
