"""`python -m load` (`make load`): load a service, and judge it."""

try:
    import gevent.monkey
except ImportError:
    raise SystemExit("the load kit is not installed: pip install 'temper[bench]'") from None

gevent.monkey.patch_all()  # before anything imports ssl or opens a socket

from load.command import main  # noqa: E402

if __name__ == "__main__":
    main(prog_name=f"python -m {__package__}")
