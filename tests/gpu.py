"""`make test-gpu`: the trainer's tests and a training benchmark on a GPU; says why it skips where there is none."""

import shutil
import subprocess
import sys

import click

from serving.quiet import import_tensorflow

TESTS = [f"tests/trainer/test_{name}.py" for name in ("learning", "attacks", "fit", "run", "report", "export")]


@click.command()
def main() -> None:
    """Run the trainer's tests and the training benchmark on a GPU; without one, say so and succeed."""
    import_tensorflow()
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        built = "with" if tf.test.is_built_with_cuda() else "without"
        driver = "there is" if shutil.which("nvidia-smi") else "there is no"
        print(f"skipped: TensorFlow {tf.__version__}, built {built} CUDA, sees no GPU; {driver} nvidia-smi on the PATH")
        return
    print(f"on {len(gpus)} GPU: {', '.join(gpu.name for gpu in gpus)}")
    for command in (["pytest", *TESTS], ["load.bench_train"]):
        status = subprocess.run([sys.executable, "-m", *command]).returncode
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main()
