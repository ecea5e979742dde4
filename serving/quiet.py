"""Import TensorFlow without the banner that its libraries print before any log level takes effect."""

import gc
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

BANNER = re.compile(rb"WARNING: All log messages before absl|[IWE]0000 .*(port|cudart_stub|cuda_platform)\.cc")


def import_tensorflow() -> None:
    """Import TensorFlow, fast and with exact float32 arithmetic. All but the banner is passed on to standard error.

    TensorFlow uses oneDNN's convolutions by itself only on processors with AVX-512 VNNI; on the others they are three
    times as fast as its own. TF32, which TensorFlow uses on GPUs unless told otherwise, rounds factors to 10 bits:
    logits would differ by more than the comparison of servers and trainer allows.

    An operation runs on one thread: those of a network this small take microseconds, and dividing them costs more than
    it saves. Several runs at once keep all cores busy, see `trainer.parallel`.

    Keras is not loaded before it is used, which it never is in serving and learning. With scikit-learn, which it
    imports where it finds it, it takes a second and 80 MB.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            with _without_keras_and_collections():
                import tensorflow as tf

            tf.config.experimental.enable_tensor_float_32_execution(False)
            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.list_physical_devices()  # prints the last line of the banner
            for name in ("tensorflow", "absl"):
                logging.getLogger(name).setLevel(logging.ERROR)
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            captured.seek(0)
            for line in captured:
                if not BANNER.match(line):
                    os.write(2, line)


@contextmanager
def _without_keras_and_collections() -> Iterator[None]:
    """Have TensorFlow skip Keras, and collect no garbage.

    TensorFlow imports Keras eagerly but ignores a failure. Asked for the legacy Keras (`tf_keras`), which we do not
    install, it imports none.
    """
    chosen, collected = os.environ.get("TF_USE_LEGACY_KERAS"), gc.isenabled()
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    gc.disable()  # looking through 2,000 modules again and again takes half a second
    try:
        yield
    finally:
        if collected:
            gc.enable()
        if chosen is None:
            del os.environ["TF_USE_LEGACY_KERAS"]
        else:
            os.environ["TF_USE_LEGACY_KERAS"] = chosen
