"""What is trained on top of the frozen base. One file per kind."""
