#!/usr/bin/env bash
# Fine-tuning on several hosts under Slurm: sbatch recipes/slurm.sh [CONFIG.toml] [section.key=value ...]
#
# What to change: the lines marked (change), and the names of partition and account that your site asks for. One task a
# host is started; torchrun in it starts a process for each GPU. A job that is requeued, preempted or submitted again goes
# on from its newest checkpoint, as long as output_dir is on a disk that all hosts share.
#SBATCH --job-name=vft
#SBATCH --nodes=2                        # (change)
#SBATCH --ntasks-per-node=1              # one torchrun a host, whatever the number of GPUs
#SBATCH --gpus-per-node=8                # (change)
#SBATCH --cpus-per-task=96               # (change) 1 + data.workers for each GPU, at least
#SBATCH --mem=0                          # all memory of the hosts
#SBATCH --time=24:00:00                  # (change)
#SBATCH --signal=TERM@300                # so many seconds before the time is up: the run saves, and ends
#SBATCH --requeue                        # after a host failed or the job was preempted
#SBATCH --open-mode=append               # a requeued job goes on in the same log
#SBATCH --output=slurm-%x-%j.log
#SBATCH --exclusive
set -euo pipefail

config=${1:-recipes/qwen2_5_vl_7b/caption.toml}             # (change)
shift || true
task=caption                                                # (change) caption, qa, classify, summarize, story or ground
cd "${SLURM_SUBMIT_DIR:-.}"
source .venv/bin/activate                                   # (change) the same files on every host

# The hub and the network are asked once, beforehand: hf download MODEL; not by every host of every job.
export HF_HUB_OFFLINE=1
# Index of the data and decoded frames, on a disk of each host's own: fast, and filled by one process a host.
export VFT_CACHE=${VFT_CACHE:-/tmp/$USER/vft}               # (change)
# The network between the hosts, where the one that the host's name leads to is not it; `ip address` lists them.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0      # (change)

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# How long torchrun lets its processes save before it kills them (from torch 2.12 on; before, always 30 seconds).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270

# A process that fails ends the run everywhere within parallel.silence_s; torchrun then starts it again, here at most 3
# times. A host that is gone for good ends the job; --requeue brings it back on other hosts.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m "vft.recipes.$task" "$config" \
    checkpoint.every_steps=50 parallel.silence_s=60 parallel.timeout_s=600 "$@"
