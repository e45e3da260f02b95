#!/bin/bash
#SBATCH --job-name={{ name }}
{% for option in options %}
#SBATCH {{ option }}
{% endfor %}
#SBATCH --open-mode=append
#SBATCH --{{ 'requeue' if requeue else 'no-requeue' }}
{% if saves %}
#SBATCH --signal=B:USR1@{{ notice_s }}
{% endif %}

# shellcheck disable=SC2016 # what is in single quotes is not for this shell
cd {{ folder }} || exit

{% if place %}
run={{ place }}
{% endif %}
command=({{ command }})
{% if again %}
# A requeued job goes on. What is there when a job first starts is of another one, and the command refuses it.
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]{% if begun %} && [ -e {{ begun }} ]{% endif %}; then
  command=({{ again }})
fi
{% endif %}
{% if saves and requeue %}
saved() { ls -ld -- {{ saves }} 2>/dev/null; }
before=$(saved)
warned=
{% endif %}

# SIGTERM, of a preemption or of scancel, reaches the processes of srun as well: wait until they have saved and ended.
trap 'interrupted=yes' TERM
{% if saves %}
# {{ notice_s }} s before the time is up SLURM sends SIGUSR1 to this script alone. A second SIGTERM would end vitft at once.
trap 'trap "" USR1; scancel --signal=TERM "$SLURM_JOB_ID"; interrupted=yes{{ '; warned=yes' if requeue }}' USR1
{% endif %}
{% if processes > 1 %}
# The {{ processes }} processes meet on the first node; these variables are those that torchrun sets.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT WORLD_SIZE={{ processes }} LOCAL_WORLD_SIZE={{ per_node }}
srun --kill-on-bad-exit=1 {{ srun_options }}bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' vitft "${command[@]}" &
{% else %}
srun {{ srun_options }}"${command[@]}" &
{% endif %}
srun=$! interrupted=yes
while [ "$interrupted" ]; do # a signal interrupts `wait`
  interrupted=
  wait "$srun"
  code=$?
done

{% if requeue %}
# 143: SIGTERM stopped it. The job is still running, so neither SLURM nor scancel has decided what becomes of it.
if [ "$code" = 143 ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
{% if saves %}
  if [ "$warned" ] && [ "$(saved)" = "$before" ]; then
    echo "error: nothing was saved before the time was up: submit the job with a longer --time" >&2
    exit "$code"
  fi
{% endif %}
  scontrol requeue "$SLURM_JOB_ID"
fi
{% endif %}
exit "$code"
