"""How a real TensorFlow Serving is started."""

from pathlib import Path


def tensorflow_serving_command(binary: str | Path, port: int, rest_port: int, config_file: Path) -> list[str]:
    """Write an empty configuration to `config_file`; return the command of a server that serves nothing yet.

    Args:
        binary: `tensorflow_model_server`, 2.20.
        port: gRPC port, on all interfaces.
        rest_port: REST port, 0 for none.
        config_file: read once, at the start; clients configure the server from then on.
    """
    config_file.write_text("model_config_list {}\n")
    return [
        str(binary),
        f"--port={port}",
        f"--rest_api_port={rest_port}",
        f"--model_config_file={config_file}",
        "--file_system_poll_wait_seconds=1",
        "--max_num_load_retries=0",  # a bad version ends at once instead of holding up good ones for minutes
        "--num_load_threads=2",
        "--grpc_max_threads=64",  # by default 4 a core, and calls beyond are refused
        "--enable_batching=false",  # the gateway batches, and one odd request would fail its whole batch
    ]
