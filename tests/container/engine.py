"""A Docker engine of the tests' own and a base image for it, made of what Debian packages.

Neither a registry nor a bridge nor a firewall rule: dockerd listens on a socket in a temporary
folder, keeps all that it stores there, and gives containers the host's network or none.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

PROGRAMS = ("dockerd", "containerd", "runc", "debootstrap")
BASE_IMAGE = "sam3-finetuning-test-base"
# Debian's docker brings BuildKit along; another one on PATH may be a client without it.
PATH = f"/usr/bin:/usr/sbin:/sbin:{os.environ['PATH']}"
NEEDED_GB = 20  # the image is 6 GB, and lies on the disk twice while it is made


class Unavailable(Exception):
    """No engine can be had here, and why."""


@dataclass(frozen=True)
class Engine:
    """An engine that answers, and the environment in which `docker` reaches it."""

    folder: Path
    environment: dict[str, str]

    def __call__(self, *words: object, **options: object) -> str:
        """What `docker WORDS` prints."""
        done = subprocess.run(
            ["docker", *map(str, words)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
            **options,  # type: ignore[call-overload]
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def check() -> None:
    """Raise Unavailable where there is no use in trying."""
    if os.geteuid() != 0:
        raise Unavailable("an engine of one's own needs root")
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        raise Unavailable(f"{', '.join(missing)} missing: tests/container/install.sh brings them")
    free = shutil.disk_usage("/var/tmp").free / 1e9
    if free < NEEDED_GB:
        raise Unavailable(f"/var/tmp has {free:.0f} GB free, the image needs {NEEDED_GB}")


def reach(folder: Path) -> Engine:
    """The engine of this folder, whether it is up or not."""
    socket = f"unix://{folder}/docker.sock"
    return Engine(folder, {**os.environ, "PATH": PATH, "DOCKER_HOST": socket})


def start(folder: Path, group: int) -> Engine:
    """A dockerd that keeps all in `folder` and whose socket `group` may use."""
    (folder / "dockerd.json").write_text("{}")
    engine = reach(folder)
    command = [
        *("dockerd", f"--config-file={folder}/dockerd.json", f"--group={group}"),
        *("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"),
        *("--bridge=none", "--storage-driver=overlay2"),
        *(f"--data-root={folder}/data", f"--exec-root={folder}/exec"),
        *(f"--pidfile={folder}/docker.pid", f"--host={engine.environment['DOCKER_HOST']}"),
    ]
    log = folder / "dockerd.log"
    with log.open("w") as output:
        # A session of its own: Ctrl-C is for the tests, which then stop it.
        daemon = subprocess.Popen(
            command, env=engine.environment, stdout=output, stderr=output, start_new_session=True
        )
    end = time.monotonic() + 30
    while subprocess.run(
        ["docker", "info"], env=engine.environment, capture_output=True
    ).returncode:
        if daemon.poll() is not None or time.monotonic() > end:
            stop(folder, keep=True)
            raise Unavailable(f"dockerd did not come up: {log.read_text()[-500:]}")
        time.sleep(0.2)
    return engine


def stop(folder: Path, *, keep: bool = False) -> None:
    """End the engine of this folder, by whichever process it was started, and all that it kept."""
    engine = reach(folder)
    docker = partial(subprocess.run, env=engine.environment, capture_output=True, text=True)
    left = docker(["docker", "ps", "--all", "--quiet"]).stdout.split()
    if left:  # of a test that failed: dockerd would give each its 120 s of --stop-timeout
        docker(["docker", "rm", "--force", *left])
    pid = folder / "docker.pid"
    number = int(pid.read_text()) if pid.exists() else 0
    name = Path(f"/proc/{number}/comm")
    if name.exists() and name.read_text().strip() == "dockerd":
        os.kill(number, signal.SIGTERM)
        end = time.monotonic() + 60
        while pid.exists() and time.monotonic() < end:
            time.sleep(0.1)
    for line in reversed(Path("/proc/mounts").read_text().splitlines()):
        mounted = line.split()[1]
        if mounted.startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", mounted], check=False)
    if not keep and folder.exists():
        # 14 GB in small files: minutes on a slow disk, for which no test has to wait.
        gone = folder.rename(folder.with_name(f"{folder.name}-{os.getpid()}-gone"))
        subprocess.Popen(["rm", "-rf", str(gone)], start_new_session=True)


def make_base(engine: Engine) -> None:
    """Debian of this machine's release with Python, as the image that the Dockerfile begins with.

    pip inside a build inherits nothing of this machine: its settings and certificates go in here,
    into the base of the tests alone.
    """
    root = engine.folder / "rootfs"
    mirror, release = _debian()
    _run(
        *("debootstrap", "--variant=minbase", "--include=ca-certificates,python3,python3-pip"),
        *(release, str(root), mirror),
    )
    for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", root / "etc/ssl/certs/ca-certificates.crt")
    (root / "etc/pip.conf").write_text(_pip_settings())
    packed = subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE)
    engine("import", "-", BASE_IMAGE, stdin=packed.stdout)
    assert packed.wait() == 0
    shutil.rmtree(root)


def _debian() -> tuple[str, str]:
    """The mirror that this machine's own apt uses for its release, and the release."""
    release = ""
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            release = line.partition("=")[2].strip('"')
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)"]
    for line in _run(*asked, "Created-By: Packages").splitlines():
        mirror, codename, component = line.split()
        if (codename, component) == (release, "main"):
            return mirror, release
    raise Unavailable("apt knows no mirror of this Debian's release")


def _pip_settings() -> str:
    """What pip is told outside, as a pip.conf; less the folders that are not there inside."""
    settings = {"cert": "/etc/ssl/certs/ca-certificates.crt"}
    for line in _run(sys.executable, "-m", "pip", "config", "list").splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in ("index-url", "timeout", "proxy", "trusted-host"):
            settings[name] = value.strip("'")
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items())


def _run(*words: str) -> str:
    done = subprocess.run(
        words, env={**os.environ, "PATH": PATH}, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise Unavailable(f"{words[0]} failed: {(done.stdout + done.stderr)[-500:]}")
    return done.stdout
