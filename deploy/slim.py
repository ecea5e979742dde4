"""Make the gateway's virtual environment small, inside the build of its image: `python -m deploy.slim`.

Removes what the gateway never reads: the packages' own tests, C sources and type stubs, debug symbols, build tools, the
descriptions of AWS services other than S3, and libraries for fonts and for an image format that is refused. Only
modules that the gateway and the command import get bytecode; they are imported here, which also shows that nothing is
missing.
"""

import importlib
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCES = {".a", ".c", ".cpp", ".h", ".hpp", ".pxd", ".pxi", ".pyi", ".pyx"}
AWS = {"s3", "sts", "sso", "sso-oidc", "signin"}  # storage, and what credentials for it come from
UNUSED = (
    "numpy/distutils", "numpy/f2py", "PIL/_avif.*", "PIL/_imagingft.*",
    *(f"pillow.libs/lib{name}-*" for name in ("avif", "brotlicommon", "brotlidec", "freetype", "harfbuzz", "png16")),
)  # fmt: skip
OURS = ("api", "cli", "store", "temper")
LAZY = (  # imported by settings only
    "deploy.healthcheck", "opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk.trace.export",
    "psycopg", "s3fs", "uvicorn.lifespan.on", "uvloop",
)  # fmt: skip


def prune(packages: Path) -> None:
    """Remove what is never read from a directory of installed packages."""
    for path in sorted(packages.rglob("*")):
        if path.is_dir() and path.name == "tests":
            shutil.rmtree(path)
        elif path.is_file() and path.suffix in SOURCES:
            path.unlink()
    for path in packages.glob("botocore/data/*"):
        if path.is_dir() and path.name not in AWS:
            shutil.rmtree(path)
    for pattern in UNUSED:
        found = list(packages.glob(pattern))
        if not found:
            sys.exit(f"deploy/slim.py: no {pattern} in {packages}; has a new release moved it?")
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def strip(packages: Path) -> None:
    """Remove debug symbols, except where a wheel brings libraries: those files were rewritten, and would break."""
    for path in packages.rglob("*.so"):
        dynamic = subprocess.run(["readelf", "--dynamic", path], check=True, capture_output=True, text=True).stdout
        if ".libs" not in dynamic and not any(parent.suffix == ".libs" for parent in path.parents):
            subprocess.run(["strip", "--strip-unneeded", path], check=True)


def import_all() -> None:
    """Import what the gateway and the command do, and so compile it."""
    for name in OURS:
        for module in pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}."):
            if not module.name.endswith("__main__") and ".migrations." not in module.name:  # Alembic runs those
                importlib.import_module(module.name)
    for name in LAZY:
        importlib.import_module(name)
    if "tensorflow" in sys.modules:
        sys.exit("the gateway imports TensorFlow")


if __name__ == "__main__":
    installed = Path(sysconfig.get_path("purelib"))
    prune(installed)
    strip(installed)
    sys.dont_write_bytecode = False
    import_all()
