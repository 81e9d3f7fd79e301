#!/usr/bin/env bash
# What runs on the machine that a job is issued to: fetch, check, train.
#
#   RUN=s3://bucket/runs/digits LOCAL=/ckpt bash job.sh train.py --epochs 8
#
# Also from the environment: RANKS (2), GPUS (0: on the CPU), ROOM_MIB (256, that must be free in LOCAL), and what the
# bucket needs (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).
#
# Exit codes: 0 done; 69 not on this machine, issue the job to another one; 78 on no machine, a person has to look;
# all others: the job failed or was killed, issue it again.
set -uo pipefail
export RUN LOCAL
: "${RUN:?is where the checkpoints belong, as a URL}" "${LOCAL:?is a directory on the disk of this machine}"
ranks=${RANKS:-2}

# 1. What the run has so far, into the local directory; on the first start that is nothing.
ckptengine prefetch "$RUN" "$LOCAL"
case $? in
0) ;;
1) exit 78 ;; # no checkpoint of the run is whole: beginning anew is for a person to decide
*) exit 69 ;;
esac

# 2. Is this machine fit for the job?
python "$(dirname "$0")/check_environment.py" --run "$RUN" --local "$LOCAL" \
    --ranks "$ranks" --gpus "${GPUS:-0}" --room-mib "${ROOM_MIB:-256}" || exit 69

# 3. Train. On several machines torchrun has --nnodes and --rdzv-endpoint in place of --standalone.
STOP=$(mktemp)
export STOP OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
trap 'rm -f "$STOP"' EXIT
torchrun --standalone --nproc-per-node="$ranks" "$@"
code=$?
if [ -s "$STOP" ]; then
    cat "$STOP" >&2
    exit 78
fi
exit $code
