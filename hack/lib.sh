# shellcheck shell=bash disable=SC2034  # what is set here is read by the scripts that source this file
# What the scripts in hack/ share. To be sourced, not run.

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cache=${LARDER_CACHE:-$repo/.cache}

# say TEXT…: a progress line, on standard error.
say() {
    printf '[%s] %s\n' "$(basename -- "$0")" "$*" >&2
}

# die TEXT…: ends the script with an error that says what to do.
die() {
    printf '%s: error: %s\n' "$(basename -- "$0")" "$*" >&2
    exit 1
}

# need_command NAME WHAT: ends the script if NAME is not on the PATH.
need_command() {
    command -v "$1" >/dev/null 2>&1 || die "$1 is not on the PATH; install $2"
}

# use_cluster DIR: from here on kubectl talks to the cluster of `hack/cluster run DIR`, and keeps all that it keeps in DIR.
use_cluster() {
    export KUBECONFIG=$1/kubeconfig KUBECACHEDIR=$1/kubectl-cache KUBERC=off
}
