"""Build the images of the Dockerfile without Docker, run them together and measure them: `make images`.

The base is a minimal Debian that debootstrap makes from this machine's own apt sources; buildah builds the targets on
it. pip runs out here, with this machine's configuration, and the builds install from the wheels that it downloads, so
that nothing of this machine ends up in an image. Then the command of each image runs as the image says, all of them
with one volume and in network and process namespaces of their own (as the containers of one pod would), until the
health check of each succeeds and the gateway answers a prediction. Ending the process namespace ends all of them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import httpx

ROOT = Path(__file__).parents[1]
Target = Literal["gateway", "trainer", "model-server"]
TARGETS: tuple[Target, ...] = ("gateway", "trainer", "model-server")  # the last starts from the one before
LOCKS: Mapping[Target, str] = {"gateway": "gateway", "trainer": "trainer", "model-server": "trainer"}
MOST_BYTES: Mapping[Target, int] = {"gateway": 300_000_000}  # of the files in an image
UID = 10001
TOOLS = {"buildah": "buildah", "debootstrap": "debootstrap", "ip": "iproute2", "unshare": "util-linux"}
URL = "http://127.0.0.1:8080"
HEALTHY_S = 180.0  # by then every health check must have succeeded, and the gateway must be ready
WRITABLE = ("/tmp/", "/run/", "/etc/hosts", "/etc/resolv.conf")  # noqa: S108 (the last three are written by buildah)
SURPLUS = ("man", "locale", "info", "lintian", "linda", "groff")  # in /usr/share; Debian's own slim images lack them


@dataclass(frozen=True)
class Builder:
    """buildah, with its storage in a directory of ours."""

    work: Path

    def __call__(self, command: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command of buildah."""
        return subprocess.run(self.line(command, *arguments), check=True, text=True, **options)

    def line(self, command: str, *arguments: str | Path) -> list[str]:
        """The command line of a command of buildah."""
        where = ("--root", self.work / "storage", "--runroot", self.work / "run", "--storage-driver", "vfs")
        return [str(part) for part in ("buildah", *where, command, *arguments)]

    def output(self, command: str, *arguments: str | Path) -> str:
        """What a command of buildah prints."""
        return self(command, *arguments, stdout=subprocess.PIPE).stdout.strip()

    def config(self, image: str) -> dict[str, Any]:
        """The configuration of an image, as Docker knows it."""
        return dict(json.loads(self.output("inspect", "--type", "image", image))["Docker"]["config"])

    def has(self, image: str) -> bool:
        """Tell whether there is an image of this name."""
        return subprocess.run(self.line("inspect", "--type", "image", image), capture_output=True).returncode == 0


def image_of(target: str) -> str:
    """The name of the image that is built for a target."""
    return f"localhost/temper-{target}"


@click.group()
def main() -> None:
    """Build, run and measure the images, without Docker."""


@main.command()
@click.option("--target", "targets", multiple=True, type=click.Choice(TARGETS), help="Only this image; repeatable.")
@click.option(
    "--work", type=click.Path(path_type=Path), default=ROOT / "var" / "images", help="Directory of images and wheels."
)
@click.option("--reuse", is_flag=True, help="Do not build images that are there.")
@click.option("--base", help="Image to run on, with --build-base.  [default: made with debootstrap, once]")
@click.option("--build-base", help="Image to build on: that one, with the venv module and binutils.")
def build(targets: Sequence[Target], work: Path, reuse: bool, base: str | None, build_base: str | None) -> None:
    """Build images, run them together, and print the size of each and the time until it was healthy."""
    targets = [target for target in TARGETS if target in (targets or TARGETS)]
    missing = sorted(package for tool, package in TOOLS.items() if not shutil.which(tool))
    if missing:
        raise click.ClickException(f"apt-get install {' '.join(missing)}")
    if bool(base) != bool(build_base):
        raise click.UsageError("--base and --build-base need each other")
    if os.geteuid() != 0:
        raise click.ClickException("debootstrap and unshare need root")
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    buildah = Builder(work)
    try:
        bases = {"BASE": base, "BUILD_BASE": build_base} if base and build_base else make_bases(buildah)
        python = python_of(buildah, bases["BUILD_BASE"])
        for target in targets:
            if not (reuse and buildah.has(image_of(target))):
                wheels = download_wheels(work, LOCKS[target], python)
                build_target(buildah, target, bases, wheels, have_trainer="trainer" in targets)
        names = [name for target in targets for name in ("--target", target)]
        # The namespaces: a network without anything but a loopback interface, and processes that end with the first.
        inside = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        trial = [*inside, sys.executable, "-m", "deploy.images", "try", "--work", str(work), *names]
        measured = json.loads(subprocess.run(trial, check=True, cwd=ROOT, stdout=subprocess.PIPE).stdout)
    except subprocess.CalledProcessError as exc:
        raise click.ClickException(f"{' '.join(map(str, exc.cmd[:8]))} … ended with {exc.returncode}") from exc
    click.echo(f"{'image':<14}{'size':>10}{'healthy after':>16}")
    for target in targets:
        size_bytes, healthy_after_s = measured[target]
        click.echo(f"{target:<14}{size_bytes / 1e6:>7.0f} MB{healthy_after_s:>14.1f} s")
    for target, most_bytes in MOST_BYTES.items():
        if target in measured and measured[target][0] >= most_bytes:
            raise click.ClickException(f"the {target} image has {most_bytes / 1e6:.0f} MB or more")


def make_bases(buildah: Builder) -> dict[str, str]:
    """Make the bases from this machine's release of Debian, unless they are there; return the build arguments.

    One has Python, for the images; the other also what the builds need.
    """
    bases = {"BASE": image_of("base"), "BUILD_BASE": image_of("build-base")}
    if all(buildah.has(name) for name in bases.values()):
        return bases
    release = _os_release()
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    parts = [line.rpartition(" ") for line in targets.stdout.splitlines()]
    sources = [uri for uri, _, name in parts if name == release]
    if not sources:
        raise click.ClickException(f"no apt source of this machine has the release {release!r}; give --base")
    click.echo(f"making bases of Debian {release}", err=True)
    tree, log = buildah.work / "debootstrap", buildah.work / "debootstrap.log"

    def debootstrap(packages: str, *options: str) -> str:
        shutil.rmtree(tree, ignore_errors=True)
        command = [
            "debootstrap",
            "--variant=minbase",
            f"--include={packages}",
            *options,
            release,
            str(tree),
            sources[0],
        ]
        with log.open("w") as file:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"debootstrap failed; see {log}")
        return done.stdout

    wanted = debootstrap("python3,ca-certificates", "--print-debs").split()
    debootstrap("python3,ca-certificates,python3-venv,binutils")
    for path in (tree / "usr/share/doc").rglob("*"):  # the licences stay
        if path.is_symlink() or (path.is_file() and path.name != "copyright"):
            path.unlink()
    for path in (*(tree / "usr/share" / name for name in SURPLUS), tree / "var/lib/apt/lists", tree / "var/cache/apt"):
        shutil.rmtree(path, ignore_errors=True)
    (tree / "etc/apt/sources.list").unlink(missing_ok=True)  # this machine's, and packages are not installed in it
    _commit(buildah, tree, bases["BUILD_BASE"])
    inside = ["chroot", str(tree)]
    shown = subprocess.run(
        [*inside, "dpkg-query", "--show", "--showformat", "${Package}\n"], check=True, capture_output=True, text=True
    )
    surplus = sorted(set(shown.stdout.split()) - set(wanted))
    with log.open("a") as file:
        subprocess.run([*inside, "dpkg", "--purge", *surplus], check=True, stdout=file, stderr=file)
    _commit(buildah, tree, bases["BASE"])
    shutil.rmtree(tree)
    return bases


def _commit(buildah: Builder, tree: Path, name: str) -> None:
    """Make an image of the files of a system."""
    archive = buildah.work / "base.tar"
    subprocess.run(["tar", "--create", "--numeric-owner", "--file", archive, "--directory", tree, "."], check=True)
    container = buildah.output("from", "scratch")
    buildah("add", "--quiet", container, archive, "/", stdout=subprocess.DEVNULL)
    archive.unlink()
    buildah("config", "--env", "LANG=C.UTF-8", "--cmd", "bash", container)
    buildah("commit", "--quiet", "--rm", "--format", "docker", container, name, stdout=subprocess.DEVNULL)


def _os_release() -> str:
    found = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    if found is None:
        raise click.ClickException("/etc/os-release names no release of Debian; give --base")
    return found[1]


def python_of(buildah: Builder, base: str) -> str:
    """The interpreter of this machine that has the version of the one in the base, which pip chooses wheels for."""
    ask = "import sys; print('python%d.%d' % sys.version_info[:2])"
    with _container(buildah, base) as container:
        name = buildah.output("run", "--isolation", "chroot", container, "--", "python3", "-c", ask)
    own = "python{}.{}".format(*sys.version_info)
    python = sys.executable if name == own else shutil.which(name)
    if python is None:
        raise click.ClickException(f"the base has {name}, and this machine must have it too, with pip")
    return python


def download_wheels(work: Path, lock: str, python: str) -> Path:
    """Download the wheels of a lock file, those that are not there yet; return their directory."""
    wheels = work / "wheels" / lock
    click.echo(f"downloading the wheels of requirements/{lock}.txt", err=True)
    subprocess.run(
        [
            python, "-m", "pip", "download", "--quiet", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--only-binary", ":all:", "--require-hashes",
            "--requirement", ROOT / "requirements" / f"{lock}.txt", "--dest", wheels,
        ],
        check=True,
    )  # fmt: skip
    return wheels


def build_target(
    buildah: Builder, target: Target, bases: Mapping[str, str], wheels: Path, *, have_trainer: bool
) -> None:
    """Build the image of a target.

    Args:
        have_trainer: the model server can start from the trainer's image instead of building it again.
    """
    click.echo(f"building {target}", err=True)
    config = buildah.work / "pip.conf"
    config.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    arguments = [part for name, image in bases.items() for part in ("--build-arg", f"{name}={image}")]
    if target == "model-server" and have_trainer:
        arguments += ["--build-context", f"trainer=container-image://{image_of('trainer')}"]
    # Without --layers: vfs copies everything for each layer, and TensorFlow's are large.
    buildah(
        "build", "--quiet", "--isolation", "chroot", "--format", "docker", "--pull-never", *arguments,
        "--volume", f"{wheels}:/wheels:ro", "--volume", f"{config}:/etc/pip.conf:ro",
        "--target", target, "--tag", image_of(target), ROOT,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    buildah("rmi", "--prune", "--force", stdout=subprocess.DEVNULL)


@main.command("try", hidden=True)
@click.option("--target", "targets", multiple=True, type=click.Choice(TARGETS))
@click.option("--work", type=click.Path(path_type=Path), required=True)
def try_(targets: Sequence[Target], work: Path) -> None:
    """Run images together, as the first process of a namespace; print the size and the time until healthy of each."""
    if os.getpid() != 1:
        raise click.ClickException("run this through the command `build`")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    buildah = Builder(work)
    home = work / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    os.chown(home, UID, UID)
    containers = {target: buildah.output("from", "--pull-never", image_of(target)) for target in targets}
    try:
        sizes = {target: _size_bytes(Path(buildah.output("mount", each))) for target, each in containers.items()}
        seconds = Trial(buildah, containers, home).run()
        click.echo(json.dumps({target: (sizes[target], seconds[target]) for target in targets}))
    finally:
        for container in containers.values():
            with (work / "rm.log").open("a") as log:
                subprocess.run(buildah.line("rm", container), stdout=log, stderr=log, check=False)


def _size_bytes(tree: Path) -> int:
    """The size of the files in a directory."""
    return int(subprocess.run(["du", "-sbx", tree], check=True, capture_output=True, text=True).stdout.split()[0])


@dataclass(frozen=True)
class Trial:
    """Containers that run together."""

    buildah: Builder
    containers: Mapping[Target, str]
    home: Path  # the volume

    def run(self) -> dict[Target, float]:
        """Start the containers and wait for their health checks, and for a prediction if all three are there.

        Returns:
            the seconds after which each was healthy.
        """
        configs = {target: self.buildah.config(image_of(target)) for target in self.containers}
        (self.buildah.work / "started").touch()
        started_at = time.monotonic()
        processes = {}
        for target, config in configs.items():
            with self._log(target).open("w") as log:
                processes[target] = subprocess.Popen(self._line(target, config["Cmd"]), stdout=log, stderr=log)
        healthy: dict[Target, float] = {}
        while len(healthy) < len(processes):
            for target, process in processes.items():
                if process.poll() is not None:
                    self._fail(target, f"ended with {process.returncode}")
                if target not in healthy:
                    kind, *check = configs[target]["Healthcheck"]["Test"]
                    assert kind == "CMD", kind
                    done = subprocess.run(self._line(target, check), capture_output=True, text=True, check=False)
                    if done.returncode == 0:
                        healthy[target] = time.monotonic() - started_at
                    elif time.monotonic() > started_at + HEALTHY_S:
                        self._fail(target, f"is not healthy after {HEALTHY_S:.0f} s: {done.stderr.strip()}")
        if set(TARGETS) <= healthy.keys():
            self._predict(started_at + HEALTHY_S)
        for target in healthy:
            self._check_files(target)
        return healthy

    def _predict(self, deadline: float) -> None:
        """Make an API key with the command in the gateway's image, and have the base model classify a drawn 1."""
        create = ("temper", "keys", "create", "--name", "trial", "--scope", "predict")
        key = subprocess.run(self._line("gateway", create), check=True, capture_output=True, text=True).stdout.strip()
        while httpx.get(f"{URL}/readyz").status_code != 200:
            if time.monotonic() > deadline:
                self._fail("gateway", f"is not ready after {HEALTHY_S:.0f} s")
            time.sleep(0.2)
        stroke = [[255 if 4 <= row < 24 and 13 <= column < 16 else 0 for column in range(28)] for row in range(28)]
        body = {"model": "lenet5", "range": "byte", "instances": [stroke]}
        answer = httpx.post(f"{URL}/predict", json=body, headers={"Authorization": f"Bearer {key}"})
        if answer.status_code != 200 or answer.json()["predictions"][0]["label"] != "1":
            self._fail("gateway", f"a drawn 1 was answered with {answer.status_code}: {answer.text}")
        click.echo("a prediction through all three: 1, as drawn", err=True)

    def _check_files(self, target: Target) -> None:
        """Fail if a container has written what a read-only root file system would refuse."""
        tree = self.buildah.output("mount", self.containers[target])
        written = subprocess.run(
            ["find", tree, "-xdev", "-type", "f", "-newercc", self.buildah.work / "started", "-printf", "/%P\\n"],
            check=True, capture_output=True, text=True,
        ).stdout.split()  # fmt: skip
        surplus = [path for path in written if not path.startswith(WRITABLE)]
        if surplus:
            self._fail(target, f"has written {', '.join(surplus[:5])}, outside of the volume and /tmp")

    def _line(self, target: Target, command: Sequence[str]) -> list[str]:
        """The command line that runs a command in a container as its image's user."""
        options = ("--isolation", "chroot", "--volume", f"{self.home}:/var/lib/temper")
        return self.buildah.line("run", *options, self.containers[target], "--", *command)

    def _log(self, target: Target) -> Path:
        return self.buildah.work / f"{target}.log"

    def _fail(self, target: Target, problem: str) -> None:
        tail = "\n".join(self._log(target).read_text().splitlines()[-20:])
        raise click.ClickException(f"{target} {problem}\n{tail}")


@contextmanager
def _container(buildah: Builder, image: str) -> Iterator[str]:
    """A container of an image, removed at the end."""
    container = buildah.output("from", "--pull-never", image)
    try:
        yield container
    finally:
        buildah("rm", container, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
