#!/usr/bin/env bash
# Whether this node is fit for a run; one task on each node. Uses GPUS_PER_NODE, RUN_DIR, MIN_TMP_GB, MIN_SHM_GB.
set -euo pipefail

problems=()

free_gb() {
    df --output=avail --block-size=1G "$1" | tail -n 1 | tr -d ' '
}

if ((GPUS_PER_NODE > 0)); then
    if ! command -v nvidia-smi > /dev/null; then
        problems+=("no nvidia-smi")
    elif ! listed=$(nvidia-smi --query-gpu=index,memory.used,ecc.errors.uncorrected.volatile.total --format=csv,noheader,nounits); then
        problems+=("nvidia-smi fails")
    else
        count=$(grep -c . <<< "${listed}")
        ((count >= GPUS_PER_NODE)) || problems+=("${count} GPUs, GPUS_PER_NODE=${GPUS_PER_NODE}")
        while IFS=, read -r index used errors; do
            used=${used# } errors=${errors# }
            # GPUs without such a count, or in slices, print words in brackets
            [[ ${used} == \[* ]] || ((used < 2000)) || problems+=("GPU ${index}: ${used} MiB used by others")
            [[ ${errors} == \[* || ${errors} == 0 ]] || problems+=("GPU ${index}: ${errors} uncorrected memory errors")
        done <<< "${listed}"
    fi
fi
for place in "/tmp:${MIN_TMP_GB:-10}" "/dev/shm:${MIN_SHM_GB:-8}"; do
    folder=${place%%:*} wanted=${place##*:}
    have=$(free_gb "${folder}")
    ((have >= wanted)) || problems+=("${folder}: ${have} GB free, ${wanted} wanted")
done
probe=${RUN_DIR}/.probe-$(hostname)-${SLURM_PROCID:-0}
if ! touch "${probe}" 2> /dev/null; then
    problems+=("RUN_DIR=${RUN_DIR} cannot be written to: is it on shared storage?")
fi
rm -f "${probe}"

name=${SLURMD_NODENAME:-$(hostname)}
if ((${#problems[@]})); then
    printf "${name}: %s\n" "${problems[@]}" >&2
    exit 1
fi
echo "${name}: fit"
