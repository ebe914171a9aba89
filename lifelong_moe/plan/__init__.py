"""What a stage is and what it costs, known before anything is trained. Torch-free."""
