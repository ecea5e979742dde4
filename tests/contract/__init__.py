"""What a model server must do to stand behind the gateway: the embedded one and a real TensorFlow Serving alike."""
