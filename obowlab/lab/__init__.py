"""What runs where: starting runs on this machine and watching over them; never imports torch."""
