"""`python -m trainer.pretrain`: train the base model on MNIST's 60,000 training images.

Augmentation makes the base recognize digits from other sources too. The 10,000 test images are used once, after the
last epoch, and for no choice.
"""

import json
import platform
from pathlib import Path
from typing import Any

import click
import numpy as np

from serving.quiet import import_tensorflow

FOLDER = Path(__file__).parent / "base"
SETTINGS = {
    "method": "full", "learning_rate": 1.5e-3, "l2": 0.0, "dropout": 0.05,
    "augmentation": {"shift": 2.0, "rotate": 11.5, "scale": 0.25},
}  # fmt: skip


@click.command()
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    help="mnist.npz. Without it, keras.datasets downloads MNIST.",
)
@click.option("--epochs", default=60, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", default=FOLDER, type=click.Path(path_type=Path), help="Folder for lenet5.npz and lenet5.json.")
def main(data: Path | None, epochs: int, batch_size: int, seed: int, out: Path) -> None:
    """Train LeNet-5 on MNIST, and write its weights and model card."""
    import_tensorflow()
    import tensorflow as tf

    from trainer.evaluate import accuracy
    from trainer.fit import Split, Start, fit
    from trainer.lenet import initial
    from trainer.methods import Method
    from trainer.spec import Spec

    if data is None:
        (x, y), (x_test, y_test) = tf.keras.datasets.mnist.load_data()
    else:
        with np.load(data) as arrays:
            x, y, x_test, y_test = (arrays[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    train, some, test = (
        Split(tf.constant(images[..., None] / np.float32(255)), labels.astype(np.int32))
        for images, labels in ((x, y), (x[::60], y[::60]), (x_test, y_test))
    )
    spec = Spec.model_validate({**SETTINGS, "epochs": epochs, "batch_size": batch_size, "seed": seed})
    start = Start(initial(10, seed), frozenset(), Method("full"), lora_scale=0.0)

    def show(record: dict[str, Any]) -> None:
        click.echo(f"epoch {record['epoch']}/{epochs}  loss {record['data_loss']:.4f}")

    fitted = fit(spec, start, train, some, classes=10, on_epoch=show)
    logits = fitted.network.logits(test.images)
    card = {
        "model": "LeNet-5, 107,786 parameters",
        "data": "MNIST, 60,000 training images",
        "command": f"python -m trainer.pretrain --epochs {epochs} --batch-size {batch_size} --seed {seed}",
        "settings": SETTINGS,
        "test_accuracy": round(accuracy(logits, test.labels), 4),
        "made_with": f"TensorFlow {tf.__version__}, Python {platform.python_version()}, CPU",
    }
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "lenet5.npz", allow_pickle=False, **fitted.params)
    (out / "lenet5.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    click.echo(f"test accuracy {card['test_accuracy']:.2%}")


if __name__ == "__main__":
    main()
