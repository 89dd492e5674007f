# shellcheck shell=bash disable=SC2034
# Copy to slurm/env.sh and keep what your site needs. slurm/dpo.sh sources it on the first node of a
# job, before anything else; srun hands the environment on to the other nodes.

# Modules, and an environment other than the repository's .venv:
# module load cuda/13.0
# source /path/to/venv/bin/activate

# A container: a command put in front of torchrun on every node (Apptainer), or options of srun (Pyxis).
# launcher=(apptainer exec --nv --bind "$PWD" /path/to/image.sif)
# srun_options+=(--container-image=/path/to/image.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD")

# NCCL: the network between the nodes, where it does not find the right one by itself.
# gloo too: it takes the one that the node's own name leads to, which may be 127.0.1.1.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_DEBUG=WARN

# Compute nodes without internet: fill the caches on a login node first, with
# `python train_dpo.py --prepare_only ...`, on a file system that all nodes see.
# export HF_HOME=/path/to/shared/huggingface
# export HF_HUB_OFFLINE=1

# Processes on every node, instead of one per GPU (or, on CPU nodes, of --ntasks-per-node):
# DPO_PROCESSES_PER_NODE=4
