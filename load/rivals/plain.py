"""A SavedModel behind FastAPI as most people would write it: `SAVED_MODEL=directory uvicorn load.rivals.plain:app`."""

import os
from typing import Any

import tensorflow as tf
from fastapi import FastAPI
from pydantic import BaseModel

serve = tf.saved_model.load(os.environ["SAVED_MODEL"]).signatures["serving_default"]
app = FastAPI()


class Question(BaseModel):
    """Images of 28 rows of 28 pixels from 0 to 1."""

    instances: list[list[list[float]]]


@app.post("/predict")
def predict(question: Question) -> dict[str, Any]:
    """Classify images."""
    images = tf.constant(question.instances, tf.float32)[..., None]
    probabilities = serve(image=images)["probabilities"].numpy()
    return {"predictions": [{"label": int(row.argmax()), "probabilities": row.tolist()} for row in probabilities]}
