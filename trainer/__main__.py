"""`python -m trainer`: a worker."""

from trainer.worker.loop import main

if __name__ == "__main__":
    main()
