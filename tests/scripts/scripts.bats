# The scripts as a person calls them: what they pass on, say and refuse. What they ask Docker for
# in detail is in tests/test_scripts.py, what comes of it in tests/container.
#
# Each test works in a copy of the scripts whose `app` prints its words, one a line, and with a
# `docker` that does the same.

setup_file() {
  repository="$(cd "$BATS_TEST_DIRNAME/../.." && pwd)"
  export repository
  export copy="$BATS_FILE_TMPDIR/a cöpy" stubs="$BATS_FILE_TMPDIR/stubs"
  mkdir -p "$copy/app" "$stubs"
  cp -r "$repository"/{train,infer,serve,build,test}.sh "$repository"/scripts "$repository"/requirements.lock "$copy"
  ln -s "$repository/.venv" "$copy/.venv"
  : >"$copy/app/__init__.py" # without it the package that .venv links to would be taken
  printf 'import sys\nprint(*sys.argv[1:], sep="\\n")\n' >"$copy/app/__main__.py"
  printf '#!/bin/sh\nexit 1\n' >"$stubs/nvidia-smi"
  chmod +x "$stubs/nvidia-smi"
  export PATH="$stubs:$PATH"
}

setup() {
  unset SAM3_RUNTIME SAM3_IMAGE SAM3_BASE GPUS MLFLOW_TRACKING_URI
  export HOME="$BATS_TEST_TMPDIR/home"
  mkdir -p "$HOME" "$BATS_TEST_TMPDIR/a földer"
  cd "$BATS_TEST_TMPDIR/a földer" || return
  no_docker
}

# Docker before 23 exits with 0 and prints `null` where no engine answers.
no_docker() { stub_docker 'info) echo "null null" ;;'; }
docker_with_image() { stub_docker "info) echo '{\"runc\": {}} []' ;; image) ;; run | build) printf '%s\n' \"\$@\" ;;"; }
docker_without_image() { stub_docker "info) echo '{\"runc\": {}} []' ;; build) printf '%s\n' \"\$@\" ;; *) exit 1 ;;"; }
stub_docker() {
  # shellcheck disable=SC2016
  printf '#!/bin/sh\ncase "$1" in %s esac\n' "$1" >"$stubs/docker"
  chmod +x "$stubs/docker"
}

# The flags that --help lists, one a line, each with a value that needs quoting.
flags_of() {
  (cd "$repository" && .venv/bin/python -m app "$1" --help) | grep -oE -- '--[a-z][a-z-]+' |
    sort -u | grep -v -- '^--help$' | sed "s/\$/=a 'b' \"c\" \$HOME/"
}

# passes_on SCRIPT SUBCOMMAND: every flag arrives as it was given.
passes_on() {
  mapfile -t flags < <(flags_of "$2")
  [ "${#flags[@]}" -gt 15 ]
  printf '%s\n' "$2" "${flags[@]}" key=value >expected
  "$copy/$1" "${flags[@]}" key=value 2>said | tail -n "$(wc -l <expected)" >got
  diff expected got
}

@test "train.sh passes every flag on to Python" {
  SAM3_RUNTIME=local passes_on train.sh train
  [ "$(cat said)" = "train.sh: runtime: local (SAM3_RUNTIME=local)" ]
}

@test "infer.sh passes every flag on to Python" {
  SAM3_RUNTIME=local passes_on infer.sh infer
}

@test "serve.sh passes every flag on to Python" {
  SAM3_RUNTIME=local passes_on serve.sh serve
}

@test "train.sh passes every flag on to the container" {
  docker_with_image
  passes_on train.sh train
  grep -q "runtime: docker (image sam3-finetuning)" said
}

@test "words stay as they are, and an empty one stays" {
  words=('my images/ünï*.jpg' "a'b\"c" "\$HOME \`id\`" '' $'two\nlines' -)
  for given in "SAM3_RUNTIME=local" "SAM3_RUNTIME=docker"; do
    docker_with_image
    env "$given" "$copy/infer.sh" "${words[@]}" >got 2>/dev/null
    printf '%s\n' infer "${words[@]}" >expected
    diff expected <(tail -n "$(wc -l <expected)" got)
  done
}

@test "a dry run prints one command that a shell reads back, and makes nothing" {
  words=(--output-dir 'new földer/x' "a'b\"c" "\$HOME" '' 'lr=[1,2]')
  for given in local docker; do
    docker_with_image
    SAM3_RUNTIME=$given "$copy/train.sh" --dry-run "${words[@]}" >printed 2>/dev/null
    [ "$(wc -l <printed)" = 1 ]
    [ ! -e "new földer" ]
    [ ! -e "$HOME/.cache" ]
    bash -c "$(cat printed)" | tail -n "$((${#words[@]} + 1))" >got
    diff <(printf '%s\n' train "${words[@]}") got
  done
}

@test "infer.sh --jetson passes every other word on to the container" {
  docker_with_image
  words=('my model' --input 'ünï*.jpg' "a'b\"c" "\$HOME" '' --threshold=0.5)
  "$copy/infer.sh" "${words[@]}" --jetson >got 2>said
  diff <(printf '%s\n' sam3-finetuning-jetson "${words[@]}") <(tail -n "$((${#words[@]} + 1))" got)
  grep -q "runtime: docker (image sam3-finetuning-jetson)" said
  bash -c "$("$copy/infer.sh" --dry-run --jetson "${words[@]}" 2>/dev/null)" | diff got -
}

@test "a dry run without arguments" {
  run bash -c 'SAM3_RUNTIME=local "$copy/train.sh" --dry-run 2>/dev/null'
  [[ "$output" == *" -m app train " ]]
}

@test "--help is the app's own" {
  SAM3_RUNTIME=local run "$repository/train.sh" --help
  [ "$status" = 0 ]
  [[ "$output" == *--dataset-dir* ]]
  SAM3_RUNTIME=local run "$repository/infer.sh" --help
  [ "$status" = 0 ]
  [[ "$output" == *--prompt* ]]
}

@test "build.sh --help prints its head" {
  for flag in -h --help; do
    run "$copy/build.sh" "$flag"
    [ "$status" = 0 ]
    [[ "$output" == *"Usage: ./build.sh"* ]]
    [[ "$output" != *"set -"* ]]
  done
}

@test "without an engine: local where nothing was asked, refused where docker was" {
  run "$copy/train.sh" a
  [ "$status" = 0 ]
  [ "$output" = "train.sh: runtime: local (no Docker engine answers)"$'\ntrain\na' ]
  SAM3_RUNTIME=docker run "$copy/train.sh" a
  [ "$status" = 2 ]
  [[ "$output" == *"no Docker engine answers"*"SAM3_RUNTIME=local"* ]]
  run "$copy/build.sh"
  [ "$status" = 2 ]
  [[ "$output" == *"no Docker engine answers"* ]]
}

@test "without docker at all the same" {
  rm "$stubs/docker"
  PATH="$stubs:/usr/bin:/bin" run env -u DOCKER_HOST "$copy/train.sh" a
  [ "$status" = 0 ]
  [[ "$output" == *"runtime: local (no Docker engine answers)"* ]]
}

@test "without the image: local where nothing was asked, refused where docker was" {
  docker_without_image
  run "$copy/train.sh" a
  [ "$status" = 0 ]
  [[ "$output" == *"local (the image sam3-finetuning is not built: ./build.sh)"* ]]
  SAM3_RUNTIME=docker run "$copy/train.sh" a
  [ "$status" = 2 ]
  [[ "$output" == *"the image sam3-finetuning is not built: ./build.sh"* ]]
}

@test "a runtime that there is none of is refused" {
  SAM3_RUNTIME=podman run "$copy/train.sh"
  [ "$status" = 2 ]
  [ "$output" = "train.sh: SAM3_RUNTIME=podman: must be docker or local, or unset to choose by itself" ]
}

@test "called through a link, from elsewhere and with CDPATH set" {
  mkdir -p elsewhere/scripts
  cd elsewhere
  CDPATH="$BATS_TEST_TMPDIR" SAM3_RUNTIME=local run "$copy/train.sh" a
  [ "$status" = 0 ]
  [ "${lines[-1]}" = a ]
}

@test "test.sh passes its words on to pytest" {
  run "$repository/test.sh" --collect-only -q -n 0 tests/test_scripts.py -k "gpus and bad"
  [ "$status" = 0 ]
  [[ "$output" == *"1/"*" tests collected"* ]]
}

@test "a .venv that is a link to other packages is left as it is" {
  tree="$BATS_TEST_TMPDIR/tree"
  mkdir -p "$tree/theirs/bin"
  cp -r "$copy"/{train.sh,scripts,requirements.lock,app} "$tree"
  touch "$tree/theirs/keep"
  ln -s theirs "$tree/.venv"
  SAM3_RUNTIME=local run "$tree/train.sh"
  [ "$status" = 2 ]
  [[ "$output" == *"is a link"* ]]
  [ -f "$tree/theirs/keep" ]
}
