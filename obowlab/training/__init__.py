"""Pretraining: the loop, the processes it runs in, checkpoints, and encoder files to and from elsewhere."""
