# shellcheck shell=bash
# Sourced by the launchers.  supervise COMMAND...: run torchrun, pass signals on to its workers, end with its exit code.
#
# Workers stop between two steps on SIGTERM or SIGUSR1, save and exit with 0. torchrun spoils that: it dies of SIGUSR1, and on
# SIGTERM it kills the workers after 30 seconds and exits with 1 even if all of them saved. So torchrun runs in a process group of
# its own, where what a scheduler sends to the group of this script does not reach it, and only its children are signaled;
# when they have ended well, so does torchrun. Ctrl-C ends it at once.
#
# UNIFIED_LM_DRY=1 prints the command instead.

supervise() {
    local agent status=0
    if [[ -n "${UNIFIED_LM_DRY:-}" ]]; then
        printf '%q ' "$@"
        echo
        return
    fi
    set -m # a process group of its own
    "$@" </dev/null &
    agent=$!
    set +m
    # shellcheck disable=SC2064 # the agent of now is meant
    {
        trap "_to_workers USR1 $agent" USR1
        trap "_to_workers TERM $agent" TERM HUP
        trap "kill -INT $agent 2>/dev/null || true" INT
    }
    wait "$agent" || status=$?
    while kill -0 "$agent" 2>/dev/null; do # a signal interrupted the waiting
        wait "$agent" || true
    done
    trap - USR1 TERM HUP INT
    if ((status > 128)); then # bash remembers how a child ended
        status=0
        wait "$agent" || status=$?
    fi
    return "$status"
}

_to_workers() {
    echo "launch: SIG$1 received, asking the workers to save and stop" >&2
    # before there are workers nothing can be lost
    pkill "-$1" -P "$2" || kill -TERM "$2" 2>/dev/null || true
}
