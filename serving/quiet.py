"""Importing TensorFlow without the greetings that its libraries print before any log level counts."""

import logging
import os
import re
import sys
import tempfile

GREETING = re.compile(rb"WARNING: All log messages before absl|[IWE]0000 .*(port|cudart_stub|cuda_platform)\.cc")


def import_tensorflow() -> None:
    """Import TensorFlow; whatever else it says on standard error is passed on."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            import tensorflow as tf

            tf.config.list_physical_devices()  # the last greeting comes from here
            for name in ("tensorflow", "absl"):
                logging.getLogger(name).setLevel(logging.ERROR)
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            said.seek(0)
            for line in said:
                if not GREETING.match(line):
                    os.write(2, line)
