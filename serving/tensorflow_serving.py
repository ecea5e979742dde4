"""How a real TensorFlow Serving is started."""

import re
from pathlib import Path

# Lines below WARNING, in the formats of TensorFlow ("2026-01-31 12:00:00.123456: I file.cc:1] ...") and of Abseil
# ("I0131 12:00:00.123456 1 file.cc:1] ..."). The binary writes several for every reload.
INFO_LINE = re.compile(rb"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: I |I\d{4} )")


def tensorflow_serving_command(
    binary: str | Path, port: int, rest_port: int, config_file: Path, socket: Path | None = None
) -> list[str]:
    """Write an empty configuration to `config_file`; return the command of a server that serves nothing yet.

    Args:
        binary: `tensorflow_model_server`, 2.20.
        port: gRPC port, 0 for none. It is open on all interfaces, and whoever reaches it may replace what is served.
        rest_port: REST port, 0 for none; likewise.
        config_file: read once, at the start; clients configure the server from then on.
        socket: Unix socket for gRPC.
    """
    config_file.write_text("model_config_list {}\n")
    return [
        str(binary),
        f"--port={port}",
        f"--rest_api_port={rest_port}",
        f"--grpc_socket_path={socket or ''}",
        f"--model_config_file={config_file}",
        # Seconds, and whole ones. With 0 the disk is read once, at the start, and never after a reload (issue 1519 of
        # tensorflow/serving), so 1 is the shortest time in which it finds a version.
        "--file_system_poll_wait_seconds=1",
        "--enable_grpc_healthcheck_service=true",
        "--max_num_load_retries=0",  # a bad version ends at once instead of holding up good ones for minutes
        "--num_load_threads=2",
        "--grpc_max_threads=64",  # by default 4 a core, and calls beyond are refused
        "--enable_batching=false",  # the gateway batches, and one odd request would fail its whole batch
    ]
