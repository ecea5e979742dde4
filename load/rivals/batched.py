"""A SavedModel behind LitServe with its batching: `SAVED_MODEL=directory python -m load.rivals.batched PORT`."""

import os
import sys

import litserve as ls
import numpy as np

BATCH, WAIT_S = 64, 0.005


class Classifier(ls.LitAPI):  # type: ignore[misc]
    """One image per request, 28 rows of 28 pixels from 0 to 1."""

    def setup(self, device: str) -> None:
        """Load the model, in LitServe's worker."""
        import tensorflow as tf

        self.serve = tf.saved_model.load(os.environ["SAVED_MODEL"]).signatures["serving_default"]
        self.constant = tf.constant

    # With annotations, LitServe would have FastAPI validate the body.
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        """Return (28, 28, 1) float32, which LitServe stacks into a batch."""
        return np.asarray(request["instances"], np.float32).reshape(28, 28, 1)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return probabilities (n, classes), which LitServe splits by rows."""
        probabilities: np.ndarray = self.serve(image=self.constant(x))["probabilities"].numpy()
        return probabilities

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        """Return the same JSON as the other sides."""
        return {"predictions": [{"label": int(output.argmax()), "probabilities": output.tolist()}]}


if __name__ == "__main__":
    server = ls.LitServer(
        Classifier(max_batch_size=BATCH, batch_timeout=WAIT_S),
        accelerator="cpu",
        workers_per_device=1,
        fast_queue=True,  # advised in its documentation above 100 requests a second
    )
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", generate_client_file=False)
