# shellcheck shell=bash
# Where the scripts run: in the Docker image, or in .venv made from requirements.lock.
# Sourced, never run; needs $root, the repository's folder. Bash 3.2 (macOS) suffices.

image="${SAM3_IMAGE:-sam3-finetuning}"
jetson='' # yes where the image is that of Dockerfile.jetson
venv="${root:?}/.venv"
stamp="$venv/.requirements.sha256"
unset CDPATH # or `cd` may land elsewhere, and prints where

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
fail() {
  say "$@"
  exit 2
}

use_jetson() {
  jetson=yes
  image="${SAM3_IMAGE:-sam3-finetuning-jetson}"
}

# The comment at the head of the script that was called.
usage() { sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; }

# --- .venv ---------------------------------------------------------------------------------------

# Python itself hashes: sha256sum is missing on macOS, shasum on slim Linux.
venv_identity() {
  "$venv/bin/python" -I -c 'import hashlib, sys
lock = open(sys.argv[1], "rb").read()
print(hashlib.sha256(lock).hexdigest(), "python%d.%d" % sys.version_info[:2])
' "$root/requirements.lock"
}

venv_is_current() {
  [ -f "$stamp" ] && [ "$(venv_identity 2>/dev/null)" = "$(cat "$stamp")" ]
}

# python_serves PYTHON MODULE: new enough, and has the module.
python_serves() {
  "$1" -c "import sys, $2; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1
}

# Debian's python3 lacks ensurepip, and with it a usable venv, until python3-venv is installed.
find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if python_serves "$name" ensurepip; then
      printf '%s' "$name"
      return
    fi
  done
  fail "no Python 3.11 or newer with venv found (as python3 or python3.11 … python3.14):" \
    "install one, on Debian and Ubuntu python3 and python3-venv, and run again"
}

# A .venv of ours that is stale or unfinished is made anew; one that someone made by hand is kept
# and only completed. The stamp comes last, by a rename: an install that was cut off has none.
make_venv() {
  local python
  if [ -L "$venv" ]; then # what it leads to is another tree's, and would be emptied
    fail "$venv is a link, and not to packages of this requirements.lock: remove the link"
  fi
  if [ -e "$stamp" ] || [ -e "$stamp.part" ] || ! python_serves "$venv/bin/python" pip; then
    python="$(find_python)" || exit
    "$python" -m venv --clear "$venv" >&2 || fail "$python could not make $venv: see above"
  fi
  venv_identity >"$stamp.part" || fail "requirements.lock cannot be read"
  say "installing requirements.lock into .venv: about 7 GB, half a minute to minutes, once"
  install_lock >&2 || fail "the installation into .venv failed: see above; mend it and run again"
  mv "$stamp.part" "$stamp"
}

# uv, which the lock names too, takes a tenth of pip's time. pip goes on where there is none for the
# platform, and where only pip's own settings lead to the packages.
install_lock() {
  local lock="$root/requirements.lock" checked=(--require-hashes --no-deps --requirement)
  local pip=("$venv/bin/python" -m pip install -qq --disable-pip-version-check "${checked[@]}")
  if "${pip[@]}" <(sed -n '/^uv==/,/[^\\]$/p' "$lock") 2>/dev/null && [ -x "$venv/bin/uv" ]; then
    (cd "$root" && "$venv/bin/uv" pip install --quiet --system-certs \
      --python "$venv/bin/python" "${checked[@]}" "$lock") && return
    say "uv could not: pip goes on, in some minutes"
  fi
  "${pip[@]}" "$lock"
}

# `import app` then works in .venv whatever the current folder. A .venv of another tree stays as it is.
link_app() {
  local link
  if [ -L "$venv" ]; then return; fi
  for link in "$venv"/lib/python3*/site-packages; do
    link="$link/sam3-finetuning.pth"
    if [ ! -f "$link" ] || [ "$(cat "$link")" != "$root" ]; then printf '%s\n' "$root" >"$link"; fi
  done
}

# Two scripts started at once must not both install. macOS has no flock and goes without.
ensure_venv() {
  if venv_is_current; then
    link_app
    return
  fi
  (
    if command -v flock >/dev/null && ! flock --nonblock 9; then
      say "waiting for another script that is making .venv"
      flock 9
    fi
    venv_is_current || make_venv
    link_app
  ) 9>"$root/.venv.lock"
}

# --- docker --------------------------------------------------------------------------------------

# Prints the engine's runtimes and security options, as JSON; fails where none answers in time.
# Docker before 23 exits with 0 and prints `null` where none answers.
ask_engine() {
  local limit=() answer
  if command -v timeout >/dev/null; then limit=(timeout 5); fi
  answer="$(${limit[@]+"${limit[@]}"} docker info \
    --format '{{json .Runtimes}} {{json .SecurityOptions}}' 2>/dev/null)" || return
  printf '%s' "$answer"
  [ "${answer:0:1}" = '{' ]
}

# An absolute path without `.` and `..`. By text alone: an output folder need not exist yet.
absolute() (
  IFS=/
  set -f
  out=
  case "$1" in /*) path="$1" ;; *) path="$PWD/$1" ;; esac
  for part in $path; do
    case "$part" in '' | .) ;; ..) out="${out%/*}" ;; *) out="$out/$part" ;; esac
  done
  printf '%s' "${out:-/}"
)

# Folders that the container has its own of, and cannot do without.
check_bindable() {
  case "$1" in
    / | /bin | /dev | /etc | /lib | /lib64 | /opt | /proc | /sbin | /sys | /tmp | /usr | /usr/local | /var)
      fail "$2: it does not exist, or lies directly in $1, which the container has its own of;" \
        "correct it, use a folder of its own, or use SAM3_RUNTIME=local"
      ;;
  esac
}

# add_mount PATH [readonly]: at the place that it has outside, once. The quotes are CSV's, for commas.
add_mount() {
  local quote='"' path known
  for known in "${mounted[@]}"; do if [ "$known" = "$1" ]; then return; fi; done
  mounted+=("$1")
  path="${1//$quote/$quote$quote}"
  command+=(--mount "type=bind,\"source=$path\",\"target=$path\"${2:+,readonly}")
}

# bind PATH [readonly]: not what the current folder brings along.
bind() {
  case "$1/" in / | "$PWD"/*) ;; *) add_mount "$@" ;; esac
}

# An input may be a glob, a misspelt path or a word such as `none`: its deepest existing parent.
# A link is followed, so that data/mine -> /disk/mine works inside as well.
bind_input() {
  local path
  path="$(absolute "$1")"
  while [ ! -e "$path" ]; do
    path="${path%/*}"
    path="${path:-/}"
  done
  check_bindable "$path" "$1"
  bind "$path" readonly
  bind "$(readlink -f "$path")" readonly
}

# A YAML may build on others: beside it, or in a folder above it called configs, as upstream's do.
bind_config() {
  local file beside
  bind_input "$1"
  file="$(readlink -f "$(absolute "$1")" || true)"
  case "$file" in */configs/*) bind "${file%/configs/*}/configs" readonly ;; esac
  for beside in "${file%/*}"/*.yaml; do
    if [ -f "$beside" ]; then bind "$beside" readonly; fi
  done
}

# Docker would make a missing folder as root.
bind_output() {
  local path
  path="$(absolute "$1")"
  check_bindable "$path" "$1"
  if [ -z "$dry_run" ]; then mkdir -p "$path"; fi
  outputs+=("$path")
  bind "$path"
  bind "$(readlink -f "$path" || true)"
}

# Read-only below the current folder as well, unless what the app writes lies within.
bind_dataset() {
  local path written
  bind_input "$1"
  path="$(readlink -f "$(absolute "$1")" || true)"
  case "$path" in "$PWD"/*) ;; *) return ;; esac
  if [ ! -e "$path" ]; then return; fi
  for written in "${outputs[@]}"; do case "$written/" in "$path"/*) return ;; esac done
  add_mount "$path" readonly
}

# bind_flags BINDER FLAGS ARGS…: bind what is given to these flags, `--flag value` or `--flag=value`.
bind_flags() {
  local binder="$1" flags=" $2 " flag='' value
  shift 2
  for value in "$@"; do
    case "$value" in --*=*)
      flag="${value%%=*}"
      value="${value#*=}"
      ;;
    esac
    case "$flags" in *" ${flag:-none} "*) if [ -n "$value" ]; then "$binder" "$value"; fi ;; esac
    flag="$value"
  done
}

add_gpus() {
  local why=''
  case "$engine" in
    *'"nvidia"'*) ;;
    *) why="Docker has no nvidia runtime: install NVIDIA's Container Toolkit, or use SAM3_RUNTIME=local" ;;
  esac
  nvidia-smi -L >/dev/null 2>&1 || why="nvidia-smi finds no GPU"
  case "${GPUS:-auto}" in
    none) return ;;
    auto) if [ -n "$why" ]; then say "GPUs: none ($why)" && return; fi ;;
    all | [0-9]* | GPU-* | MIG-*) if [ -n "$why" ]; then fail "GPUS=$GPUS: $why"; fi ;;
    *) fail "GPUS=$GPUS: must be auto, none, all or a list such as 0,1" ;;
  esac
  case "${GPUS:-auto}" in
    auto | all) say "GPUs: all" && command+=(--gpus all) ;;
    *) say "GPUs: $GPUS" && command+=(--gpus "\"device=$GPUS\"") ;;
  esac
}

# Inside a container `localhost` is the container: a tracking server of this machine's own needs
# this machine's network. So does a server of ours, to listen at the --host that it is given.
add_network() {
  local word uri="${MLFLOW_TRACKING_URI:-}"
  if [ "${1:-}" = serve ]; then
    command+=(--network host)
    return
  fi
  for word in "$@"; do case "$word" in --mlflow=* | tracking.mlflow=*) uri="${word#*=}" ;; esac done
  if [[ "$uri" =~ ^https?://([^/]*@)?(localhost|127\.[0-9.]+|\[::1\])(:|/|$) ]]; then
    say "network: host (the tracking server is on this machine)"
    command+=(--network host)
  fi
}

# begin_command OPTIONS…: as the caller, in the current folder.
begin_command() {
  cd -P . || exit # so that `../data` means the same folder inside
  check_bindable "$PWD" "the current folder"
  mounted=('')
  outputs=()
  command=(docker run --rm --init --stop-timeout 120 "$@")
  case "$engine" in
    *name=rootless*) command+=(--user 0:0) ;; # there root inside is the caller outside
    *) command+=(--user "$(id -u):$(id -g)") ;;
  esac
  if [ -t 0 ] && [ -t 1 ]; then command+=(-it); fi
  command+=(-e HOME=/tmp/home --workdir "$PWD")
  add_mount "$PWD"
}

# The Hugging Face cache is shared with the host, or each run would fetch 3.4 GB of weights anew.
docker_command() {
  local cache="${HF_HOME:-${HOME:-}/.cache/huggingface}"
  begin_command --shm-size 8g
  outputs=("$PWD/outputs" "$PWD/data/features") # where no flag says another
  command+=(-e "HF_HOME=$(absolute "$cache")")
  command+=(-e SAM3_BASE -e SAM3_API_KEY -e HF_TOKEN -e ROBOFLOW_API_KEY -e MLFLOW_TRACKING_URI)
  command+=(-e MLFLOW_TRACKING_USERNAME -e MLFLOW_TRACKING_PASSWORD -e MLFLOW_TRACKING_TOKEN)
  command+=(-e LABEL_STUDIO_URL -e LABEL_STUDIO_API_KEY)
  add_gpus
  add_network "$@"
  case " $* " in *camera:*) add_groups video ;; esac
  add_cameras "$@"
  bind_output "$cache"
  bind_flags bind_output "--output-dir --keep --label" "$@"
  bind_flags bind_dataset "--dataset-dir" "$@"
  bind_flags bind_input "--hf-dataset --checkpoint --teacher --input --prompts --ring --sweep" "$@"
  bind_flags bind_config "--config" "$@"
  if [ -n "${SAM3_BASE:-}" ]; then bind_input "$SAM3_BASE"; fi
  command+=("$image" "$@")
}

# add_groups NAMES…: puts the caller into groups of this machine, which own its devices.
add_groups() {
  local group id
  for group in "$@"; do
    id="$(getent group "$group" 2>/dev/null | cut -d: -f3 || true)"
    if [ -n "$id" ]; then command+=(--group-add "$id"); fi
  done
}

# add_cameras ARGS…: lets a container see the cameras that arguments name.
add_cameras() {
  local word
  for word in "$@"; do
    case "${word#--input=}" in
      camera:/dev/*) command+=(--device "${word#*camera:}") ;;
      camera:[0-9]*) command+=(--device "/dev/video${word#*camera:}") ;;
    esac
  done
}

# A Jetson's GPU is not --gpus': its runtime brings it, and the group video owns its devices.
add_jetson() {
  if [ "${GPUS:-auto}" = none ]; then return; fi
  case "$engine" in
    *'"nvidia"'*) command+=(--runtime nvidia) ;;
    *) say "GPUs: none (Docker has no nvidia runtime: docs/jetson.md)" ;;
  esac
  add_groups video render
  add_cameras "$@"
}

# jetson_command ARGS…: sets $command to what runs an exported folder, or prints it under --dry-run.
# The folder is the word with a manifest: its engines are kept in it.
jetson_command() {
  local arguments=() argument
  dry_run=''
  for argument in "$@"; do
    case "$argument" in
      --dry-run) dry_run=yes ;;
      --jetson) ;;
      *) arguments+=("$argument") ;;
    esac
  done
  set -- ${arguments[@]+"${arguments[@]}"}
  use_jetson
  choose_runtime
  if [ "$runtime" = local ]; then fail "--jetson runs in its image alone: docs/jetson.md"; fi
  begin_command
  command+=(-e SAM3_TRT_WORKSPACE)
  add_jetson "$@"
  for argument in "$@"; do
    if [ -f "$argument/manifest.json" ]; then bind_output "$argument"; fi
  done
  bind_flags bind_output "--output-dir --output" "$@"
  bind_flags bind_input "--input --prompts" "$@"
  command+=("$image" "$@")
  if [ -n "$dry_run" ]; then
    print_command "${command[@]}"
    exit 0
  fi
}

# --- the choice ----------------------------------------------------------------------------------

# Sets $runtime and $engine, and says on stderr which runtime and why.
choose_runtime() {
  local obstacle=''
  runtime="${SAM3_RUNTIME:-}"
  case "$runtime" in
    local) say "runtime: local (SAM3_RUNTIME=local)" && return ;;
    docker | '') ;;
    *) fail "SAM3_RUNTIME=$runtime: must be docker or local, or unset to choose by itself" ;;
  esac
  if ! engine="$(ask_engine)"; then
    obstacle="no Docker engine answers"
  elif ! docker image inspect "$image" >/dev/null 2>&1; then
    obstacle="the image $image is not built: ./build.sh${jetson:+ --jetson}"
  fi
  if [ -z "$obstacle" ]; then
    say "runtime: docker (${runtime:+SAM3_RUNTIME=docker, }image $image)"
    runtime=docker
  elif [ -n "$runtime" ]; then
    fail "SAM3_RUNTIME=docker: $obstacle; or use SAM3_RUNTIME=local"
  else
    say "runtime: local ($obstacle)"
    runtime=local
  fi
}

# print_command WORD…: as one line that a shell can run.
print_command() {
  printf '%q ' "$@"
  echo
}

# app_command SUBCOMMAND ARGS…: sets $command to what runs the app, or prints it under --dry-run.
# PYTHONSAFEPATH: without it `python -m app` would take an `app` in the caller's folder.
app_command() {
  local arguments=() argument
  dry_run=''
  for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then dry_run=yes; else arguments+=("$argument"); fi
  done
  choose_runtime
  if [ "$runtime" = docker ]; then
    docker_command "${arguments[@]}"
  else
    command=(env "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
      "$venv/bin/python" -m app "${arguments[@]}")
    if [ -z "$dry_run" ]; then ensure_venv; fi
  fi
  if [ -n "$dry_run" ]; then
    print_command "${command[@]}"
    exit 0
  fi
}
