# What the batch scripts share: sourced by slurm/*.sbatch, which then call `start_run OVERRIDES...`. Every setting is a
# variable; slurm/README.md lists them.
# shellcheck shell=bash
set -euo pipefail

ENGINE=${ENGINE:-nemo_aligner}
ECHORL_HOME=$(realpath -m "${ECHORL_HOME}")
RUN_DIR=$(realpath -m "${RUN_DIR:-${SLURM_SUBMIT_DIR}/runs/${SLURM_JOB_NAME}-${SLURM_JOB_ID}}")
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
RANKS_PER_NODE=${RANKS_PER_NODE:-$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1))}
CONTAINER=${CONTAINER:-}
CONTAINER_RUNTIME=${CONTAINER_RUNTIME:-$([[ -n ${CONTAINER} ]] && echo pyxis || echo none)}
MOUNTS=${MOUNTS:-}
SRUN_OPTIONS=${SRUN_OPTIONS:-}
PYTHON=${PYTHON:-python}
MAX_RESTARTS_WITHOUT_PROGRESS=${MAX_RESTARTS_WITHOUT_PROGRESS:-3}
SAVE_MARGIN_SECONDS=${SAVE_MARGIN_SECONDS:-1500}
EXIT_REQUEUE=75 # of ranks that have saved and want to be started again
if [[ ${CONTAINER_RUNTIME} == none ]]; then
    HOME_OF_RANKS=${ECHORL_HOME}
    PLAN_PYTHON=${PLAN_PYTHON:-${PYTHON}}
else # as the Dockerfile lays them out
    HOME_OF_RANKS=${ECHORL_IN_CONTAINER:-/opt/echorl_nemo}
    PLAN_PYTHON=${PLAN_PYTHON:-/opt/echorl_plan/bin/python}
fi

start_run() {
    # a warning that comes before there are ranks is heeded once the command of the moment is done
    stopping=
    trap 'stopping=USR1' USR1
    trap 'stopping=TERM' TERM
    say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) of job ${SLURM_JOB_ID}: engine ${ENGINE}, config ${CONFIG}, run folder ${RUN_DIR}"
    check_settings "$@"
    mkdir -p "${RUN_DIR}"
    export_settings
    check_nodes
    make_plan "$@"
    stop_without_progress
    [[ -z ${stopping} ]] || put_back "${stopping} came before the ranks were started"
    if [[ ${ENGINE} == nemo_rl ]]; then
        start_on_ray
    else
        start_ranks
    fi
}

say() {
    echo "[$(date '+%F %T')] $*"
}

fail() {
    say "error: $*" >&2
    exit 1
}

check_settings() {
    case ${ENGINE} in
        megatron | nemo_aligner | nemo_rl) ;;
        *) fail "ENGINE=${ENGINE}: use megatron, nemo_aligner or nemo_rl" ;;
    esac
    case ${CONTAINER_RUNTIME} in
        pyxis | apptainer) [[ -n ${CONTAINER} ]] || fail "CONTAINER_RUNTIME=${CONTAINER_RUNTIME}: name the image, CONTAINER=..." ;;
        none) ;;
        *) fail "CONTAINER_RUNTIME=${CONTAINER_RUNTIME}: use pyxis, apptainer or none" ;;
    esac
    if [[ ${ENGINE} == nemo_rl ]]; then
        [[ ${CONTAINER_RUNTIME} == pyxis ]] || fail "ENGINE=nemo_rl: its ray.sub needs pyxis; set CONTAINER to an image"
        in_mounts "${SLURM_SUBMIT_DIR}" || fail "MOUNTS=${MOUNTS}: ray.sub works in ${SLURM_SUBMIT_DIR}, where sbatch was called, also inside the container; add it"
        in_mounts "${RUN_DIR}" || fail "MOUNTS=${MOUNTS}: RUN_DIR=${RUN_DIR} is not in the container; add it"
        [[ -f ${NEMO_RL_HOME:-}/ray.sub ]] || fail "NEMO_RL_HOME=${NEMO_RL_HOME:-}: name a checkout of NeMo-RL v0.7.0 on shared storage; no ray.sub is there"
        [[ $(nemo_rl_version) =~ ^0\.[678]$ ]] || fail "NEMO_RL_HOME=${NEMO_RL_HOME}: it holds NeMo-RL '$(nemo_rl_version)'; use a checkout of v0.7.0, or of 0.6 or 0.8"
        [[ -n ${SLURM_JOB_ACCOUNT:-} ]] || fail "SLURM_JOB_ACCOUNT is not set, which NeMo-RL's ray.sub reads; use sbatch --account=NAME, or export it"
        [[ ${SAVE_MARGIN_SECONDS} =~ ^[0-9]+$ ]] || fail "SAVE_MARGIN_SECONDS=${SAVE_MARGIN_SECONDS}: use a whole number of seconds"
    fi
    [[ -f ${ECHORL_HOME}/slurm/check_node.sh ]] || fail "ECHORL_HOME=${ECHORL_HOME}: no checkout of echorl_nemo"
    local argument key
    for argument in "$@"; do
        key=${argument%%=*}
        case ${key//+/} in
            engine) fail "${argument}: the script sets it; use ENGINE=${argument#*=}" ;;
            trainer.run_dir) fail "${argument}: the script sets it; use RUN_DIR=${argument#*=}" ;;
            trainer.resume) fail "${argument}: the script sets it, true where RUN_DIR holds a run; leave it out" ;;
            cluster.nodes) fail "${argument}: the script sets it; use sbatch --nodes=${argument#*=}" ;;
            cluster.gpus_per_node) fail "${argument}: the script sets it; use GPUS_PER_NODE=${argument#*=} and sbatch --gpus-per-node=${argument#*=}" ;;
        esac
    done
}

# MAJOR.MINOR of the checkout.
nemo_rl_version() {
    sed -n 's/^\(MAJOR\|MINOR\) *= *//p' "${NEMO_RL_HOME}/nemo_rl/package_info.py" 2> /dev/null | paste -sd . || true
}

# Whether a folder has the same path inside the container.
in_mounts() {
    local mount outside inside
    for mount in ${MOUNTS//,/ }; do
        IFS=: read -r outside inside _ <<< "${mount}"
        [[ ${outside} == "${inside:-${outside}}" && $1/ == "${outside%/}"/* ]] && return 0
    done
    return 1
}

export_settings() {
    local first
    first=$(scontrol show hostnames "${SLURM_JOB_NODELIST}" | head -n 1)
    export MASTER_ADDR=${MASTER_ADDR:-${first}}
    export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
    # runs stop in time for this; older Slurms set neither, and a job that this one was submitted from may have
    SLURM_JOB_START_TIME=$(job_time StartTime)
    SLURM_JOB_END_TIME=$(job_time EndTime)
    export SLURM_JOB_START_TIME SLURM_JOB_END_TIME
    export GPUS_PER_NODE RUN_DIR
}

# One of the job's entries in `scontrol show job`.
job_entry() {
    scontrol --oneliner show job "${SLURM_JOB_ID}" | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1
}

# Seconds since the epoch; empty for a time that is not known.
job_time() {
    date -d "$(job_entry "$1")" +%s 2> /dev/null || true
}

# A job that is put back again and again without a newer checkpoint is broken.
stop_without_progress() {
    local newest log=${RUN_DIR}/attempts.txt entry
    newest=$(find "${RUN_DIR}/checkpoints" "${RUN_DIR}/nemo_aligner/checkpoints" -mindepth 1 -maxdepth 1 ! -name '*.partial*' ! -name '*.damaged*' ! -name '*unfinished*' ! -name 'tmp_*' \
        -printf '%T@ %f\n' 2> /dev/null | sort -n | tail -n 1 | cut -d ' ' -f 2- || true)
    entry="job ${SLURM_JOB_ID} from ${newest:-none}"
    echo "${entry}" >> "${log}"
    if (($(tail -n "$((MAX_RESTARTS_WITHOUT_PROGRESS + 1))" "${log}" | grep -cFx -- "${entry}") > MAX_RESTARTS_WITHOUT_PROGRESS)); then
        fail "${MAX_RESTARTS_WITHOUT_PROGRESS} restarts from the same checkpoint (${newest:-none}): not put back again; see the log above, and submit again once the cause is removed"
    fi
}

# One task on each node: what is wrong with a node is printed with its name.
check_nodes() {
    # shellcheck disable=SC2086  # options are words
    srun ${SRUN_OPTIONS} --ntasks-per-node=1 --kill-on-bad-exit=0 bash "${ECHORL_HOME}/slurm/check_node.sh" \
        || fail "a node is not fit to run, see above; exclude it with sbatch --exclude=NODE"
}

# What would fail fails here, within seconds; writes the command of the run to RUN_DIR/launch.
make_plan() {
    local settings=() options=() code=0
    if [[ ${ENGINE} == nemo_rl ]]; then
        settings=(algo=nemo_rl rollout=vllm) # as much of the configuration as it has
    elif [[ ${ENGINE} == megatron && (-e ${RUN_DIR}/metrics.jsonl || -e ${RUN_DIR}/checkpoints) ]]; then
        settings=(trainer.resume=true)
    fi
    [[ ${PLAN_PYTHON} == "${PYTHON}" ]] || options=(--packages-elsewhere)
    # shellcheck disable=SC2016  # for the container's shell
    run_in_container 1 1 bash -c 'command -v "$0" > /dev/null || exit 127; exec "$0" "$@"' "${PLAN_PYTHON}" -m echorl_nemo plan "${options[@]}" --config-name "${CONFIG}" --launch "${RUN_DIR}/launch" \
        "engine=${ENGINE}" "cluster.nodes=${SLURM_JOB_NUM_NODES}" "cluster.gpus_per_node=${RANKS_PER_NODE}" \
        "trainer.run_dir=${RUN_DIR}" "${settings[@]}" "$@" || code=$?
    ((code != 127)) || fail "PLAN_PYTHON=${PLAN_PYTHON}: there is no such program${CONTAINER:+ in CONTAINER=${CONTAINER}}; build the image with the Dockerfile (slurm/README.md, Images), or name an environment with the native engine's libraries"
    ((code == 0)) || fail "the plan found problems, see above; nothing was started"
}

# run_in_container NODES TASKS_PER_NODE COMMAND...
run_in_container() {
    set_srun_command "$@"
    "${SRUN_COMMAND[@]}"
}

# The same as an array, SRUN_COMMAND: in the background a function is a shell of its own, and no signal would reach srun.
set_srun_command() {
    local nodes=$1 tasks=$2 options=() wrapper=() cpus
    cpus=$((SLURM_CPUS_ON_NODE > $2 ? SLURM_CPUS_ON_NODE / $2 : 1))
    shift 2
    case ${CONTAINER_RUNTIME} in
        pyxis)
            options=(--container-image="${CONTAINER}" --no-container-mount-home --container-workdir="${HOME_OF_RANKS}")
            # where the image sets them too, the job's win
            options+=(--container-env="OMP_NUM_THREADS,CUDA_DEVICE_MAX_CONNECTIONS,NCCL_DEBUG")
            [[ -z ${MOUNTS} ]] || options+=(--container-mounts="${MOUNTS}")
            ;;
        apptainer)
            wrapper=(apptainer exec --no-home --pwd "${HOME_OF_RANKS}")
            ((GPUS_PER_NODE == 0)) || wrapper+=(--nv)
            [[ -z ${MOUNTS} ]] || wrapper+=(--bind "${MOUNTS}")
            wrapper+=("${CONTAINER}")
            ;;
        none) options=(--chdir="${HOME_OF_RANKS}") ;;
    esac
    # shellcheck disable=SC2016  # the image's own search path comes after the package
    wrapper+=(bash -c 'PYTHONPATH=$0${PYTHONPATH:+:${PYTHONPATH}} exec "$@"' "${HOME_OF_RANKS}")
    # shellcheck disable=SC2206  # options are words
    SRUN_COMMAND=(srun ${SRUN_OPTIONS} --nodes="${nodes}" --ntasks-per-node="${tasks}" --cpus-per-task="${cpus}"
        --kill-on-bad-exit=1 "${options[@]}" "${wrapper[@]}" "$@")
}

# One task for each rank. USR1, which comes before the time limit, and TERM go to the ranks, which save and end; so they
# do by themselves before the job's end. Then the job is put back.
start_ranks() {
    local command code=0
    mapfile -t command < "${RUN_DIR}/launch/command.txt"
    say "${SLURM_JOB_NUM_NODES} nodes x ${RANKS_PER_NODE} ranks: ${PYTHON} ${command[*]}"
    rm -f "${RUN_DIR}/requeue"
    set_srun_command "${SLURM_JOB_NUM_NODES}" "${RANKS_PER_NODE}" "${PYTHON}" "${command[@]}"
    "${SRUN_COMMAND[@]}" &
    local ranks=$!
    trap 'stopping=USR1 signalled=1; kill -USR1 "${ranks}" || true' USR1
    # srun takes TERM for an order to kill the ranks at once
    trap 'stopping=TERM signalled=1; kill -USR1 "${ranks}" || true' TERM
    wait_for "${ranks}" || code=$?
    # of ranks that end with a code of their own srun may kill the last
    [[ ! -e ${RUN_DIR}/requeue || ${code} == 0 ]] || code=${EXIT_REQUEUE}
    if [[ ${code} == "${EXIT_REQUEUE}" || (-n ${stopping} && ${code} != 0) ]]; then
        put_back "${stopping:-the time limit} came, ranks ended with ${code}"
    fi
    ((code == 0)) || fail "ranks ended with ${code}"
    say "the run is done"
}

# put_back REASON: into the queue, unless Slurm has done so, or a user wants the job to end.
put_back() {
    local state
    state=$(job_entry JobState)
    if [[ ${state} == RUNNING ]]; then
        say "$1: put back in the queue"
        scontrol requeue "${SLURM_JOB_ID}"
    else
        say "$1: the job is ${state}, and keeps the state that Slurm gave it, put back or cancelled"
    fi
    exit 0
}

# A signal ends bash's wait early, with a code of its own.
wait_for() {
    local code=0 last
    while true; do
        last=0
        wait "$1" || last=$?
        ((last == 127)) || code=${last} # 127: the wait before had its code
        [[ -n ${signalled:-} ]] || return "${code}"
        signalled=
    done
}

# How long NeMo-RL may train before it saves and ends, DD:HH:MM:SS from its start; empty without a time limit.
time_to_save() {
    local left
    [[ -n ${SLURM_JOB_END_TIME} ]] || return 0
    left=$((SLURM_JOB_END_TIME - $(date +%s) - SAVE_MARGIN_SECONDS))
    ((left > 0)) || fail "SAVE_MARGIN_SECONDS=${SAVE_MARGIN_SECONDS}: the job ends before; use less, or sbatch --time= with more"
    printf '%02d:%02d:%02d:%02d' $((left / 86400)) $((left % 86400 / 3600)) $((left % 3600 / 60)) $((left % 60))
}

# The step of NeMo-RL's newest checkpoint; 0 if there is none.
newest_step() {
    find "${RUN_DIR}/checkpoints" -mindepth 1 -maxdepth 1 -name 'step_*' -printf '%f\n' 2> /dev/null | sed 's/^step_//' | sort -n | tail -n 1 | grep . || echo 0
}

# NeMo-RL's own launcher starts Ray on every node and the command on the first.
start_on_ray() {
    local command limit steps
    mapfile -t command < "${RUN_DIR}/launch/command.txt"
    steps=$(printf '%s\n' "${command[@]}" | sed -n 's/^++grpo.max_num_steps=//p')
    limit=$(time_to_save)
    [[ -z ${limit} ]] || command+=("++checkpointing.checkpoint_must_save_by=\"${limit}\"")
    COMMAND="cd /opt/nemo-rl && PYTHONPATH=${HOME_OF_RANKS}:\${PYTHONPATH:-} uv run --no-sync python $(printf '%q ' "${command[@]}")"
    export COMMAND CONTAINER MOUNTS
    # of a fresh attempt: ray.sub takes an old one's files for its own
    export BASE_LOG_DIR=${RUN_DIR}/ray/attempt-${SLURM_RESTART_COUNT:-0}
    mkdir -p "${BASE_LOG_DIR}"
    say "${NEMO_RL_HOME}/ray.sub: ${COMMAND}"
    local code=0
    bash "${NEMO_RL_HOME}/ray.sub" &
    # NeMo-RL takes no signals: it saves and ends by itself, with code 0, before the limit
    trap 'stopping=USR1 signalled=1' USR1
    trap 'stopping=TERM signalled=1' TERM
    wait_for "$!" || code=$?
    [[ -z ${stopping} ]] || put_back "${stopping} came, ray.sub ended with ${code}"
    ((code == 0)) || fail "ray.sub ended with ${code}; see ${BASE_LOG_DIR}"
    (($(newest_step) >= steps)) || put_back "NeMo-RL ended at step $(newest_step) of ${steps}"
    say "the run is done"
}
